"""How many posterior samples a text needs, and what deciding that per sequence saves.

    python benchmarks/adaptive_sampling.py MODEL --text held_out.txt

Windows of the first half of the text are validation data, those of the second half are the test. All rows of a table
from two samples on are of the same posterior samples, so that they differ by how many of them were used; a row "drawn
anew" ran the model only as often as it asked for, with other noise. Looks are at 2, 8 and 32 samples, "fine" ones at
2, 4, 8, 16 and 32.
"""

import argparse
import time
from itertools import pairwise, product

import torch
from report import machine, show
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import hf_variational  # noqa: F401  registers its classes with the Auto classes
from hf_variational.acting import AdaptiveSampling, KeptLooks, UncertaintyController
from hf_variational.acting.looks import MEASURES
from hf_variational.acting.policy import SCHEDULE
from hf_variational.demo.texts import read_text
from hf_variational.evaluation import token_scores, token_windows
from hf_variational.evaluation.selective import RiskCoverage
from hf_variational.evaluation.statistics import bootstrap_documents

FIXED = (2, 4, 8, 16, 32)
SHORT = {"predictive_entropy": "entropy", "mutual_information": "MI"}


def steps(schedule) -> list[int]:
    """Samples that each look adds."""
    return [later - earlier for earlier, later in pairwise((0, *schedule))]


def flops_per_token(model, windows: list[list[int]], device) -> dict[int, float]:
    """Floating-point operations of the matrix products of one pass, by its number of samples."""
    ids = torch.tensor(windows[:1], device=device)
    costs = {}
    for size in sorted({1, *FIXED, *steps(SCHEDULE)}):
        with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(ids, num_posterior_samples=size, use_cache=False)
        costs[size] = counter.get_total_flops() / ids.numel()
    return costs


def quality(scores, reference=None, resamples: int = 0) -> dict:
    """NLL and AURC of a table of scores, and by how much they are above another table's of the same tokens."""

    def nll(table) -> float:
        return float(table.values["nll"].double().mean())

    def area(name: str):
        return lambda table: RiskCoverage.of(table, name).area()

    found = {}
    for name, statistic in {"nll": nll, **{f"aurc_{name}": area(name) for name in MEASURES}}.items():
        if name == "aurc_mutual_information" and "excess" not in scores.values:
            continue  # of one sample it is 0
        found[name] = statistic(scores)
        if reference is None:
            continue

        def change(tokens, statistic=statistic) -> float:
            return statistic(scores.select(tokens)) / statistic(reference.select(tokens)) - 1

        found[f"{name}_change"] = statistic(scores) / statistic(reference) - 1
        if resamples:
            interval = bootstrap_documents(change, scores.windows, num_resamples=resamples).interval
            found[f"{name}_interval"] = list(interval)
    return found


def cell(row: dict, name: str) -> str:
    if name not in row:
        return "–"
    text = f"{row[name]:.4f}"
    if f"{name}_change" in row:
        text += f" {row[f'{name}_change']:+.2%}"
    if f"{name}_interval" in row:
        low, high = row[f"{name}_interval"]
        text += f" [{low:+.2%}, {high:+.2%}]"
    return text


def generation(controller, model, prompts: torch.Tensor, new_tokens: int) -> dict:
    """What controlled greedy decoding of prompts [rows, length] costs, against the most samples from the start."""
    torch.manual_seed(0)
    # The model knows no end, so that every row has as many steps.
    out = controller.generate(model, prompts, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None)
    steps = (out.samples > 0).sum(1)
    most = controller.sampling.schedule[-1]
    return {
        "generated_samples": float(out.samples[out.samples > 0].double().mean()),
        "generated_cost": float(out.sample_tokens.sum() / (most * (prompts.shape[1] + steps - 1)).sum()),
        "recomputed": float(out.recomputed_tokens.sum() / out.sample_tokens.sum()),
        "abstained": float(out.abstained.double().mean()),
    }


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or Hub name of a causal language model with posteriors")
    parser.add_argument("--text", required=True, help="file with held-out text of its domain")
    parser.add_argument("--windows", type=int, default=200, help="half of them to fit on (default: %(default)s)")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--coverage", type=float, default=0.9, help="share that the controllers answer")
    parser.add_argument("--reversals", type=float, nargs="+", default=[0.01, 0.05])
    parser.add_argument("--resamples", type=int, default=100, help="of whole windows, for the intervals")
    parser.add_argument("--prompts", type=int, default=32, help="first quarters of test windows to go on from")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval().requires_grad_(False)
    model.to(device)
    windows = token_windows(
        read_text(options.text), AutoTokenizer.from_pretrained(options.model), options.length, options.windows
    )
    validation, test = windows[: len(windows) // 2], windows[len(windows) // 2 :]
    run = {"batch_size": options.batch_size, "progress": False}
    fitting = KeptLooks.draw(model, validation, FIXED, internal=True, seed=0, **run)
    looks = KeptLooks.draw(model, test, FIXED, internal=True, seed=1, **run)
    costs = flops_per_token(model, windows, device)
    of_all = looks.looks[-1]

    def spent(found, schedule) -> float:
        passes = zip(steps(schedule), found.cost.drawn, strict=True)
        return sum(costs[size] * tokens for size, tokens in passes) / found.cost.tokens

    rows = {}
    one = token_scores(model, test, 1, seed=2, **run)
    rows["1"] = {"samples": 1.0, "flops": costs[1], **quality(one, of_all)}
    for size, table in zip(FIXED, looks.looks, strict=True):
        compared = (None, 0) if size == FIXED[-1] else (of_all, options.resamples)
        rows[str(size)] = {"samples": float(size), "flops": costs[size], **quality(table, *compared)}
    for measure, schedule in product(MEASURES, (SCHEDULE, FIXED)):
        sampling = AdaptiveSampling.fit_looks(fitting.at(schedule), measure)
        kept = looks.at(schedule).act(sampling.act, measure)
        started = time.perf_counter()
        drawn = sampling.evaluate(model, test, seed=3, **run)
        seconds = time.perf_counter() - started
        title = f"{SHORT[measure]}{'' if schedule == SCHEDULE else ', fine'}"
        for name, found in ((f"adaptive, {title}", kept), (f"{title}, drawn anew", drawn)):
            rows[name] = {
                "samples": found.cost.mean_samples,
                "flops": spent(found, schedule),
                "tolerance": sampling.tolerance,
                **quality(found.scores, of_all, options.resamples),
            }
        rows[name]["seconds"] = seconds

    controlled = {}
    prompts = torch.tensor(test[: options.prompts], device=device)[:, : max(1, options.length // 4)]
    for unit in ("sequence", "step"):
        for reversals in options.reversals:
            controller = UncertaintyController.fit_looks(
                fitting.at(SCHEDULE), unit=unit, coverage=options.coverage, reversals=reversals
            )
            found = looks.at(SCHEDULE).act(controller.act, controller.sampling.measure)
            controlled[f"{unit}, {reversals:.0%} reversed"] = {
                "coverage": found.coverage,
                "risk": found.selective_risk,
                "samples": found.cost.mean_samples,
                "samples_at_a_token": float(found.samples.double().mean()),
                "nll_change": found.nll / float(of_all.values["nll"].double().mean()) - 1,
                "coefficients": controller.score.coefficients,
                **generation(controller, model, prompts, options.new_tokens),
            }
    information = {
        str(size): {
            "raw": float((table.values["mutual_information"] - table.values["excess"]).double().mean()),
            "corrected": float(table.values["mutual_information"].double().mean()),
            "excess": float(table.values["excess"].double().mean()),
        }
        for size, table in zip(FIXED, looks.looks, strict=True)
    }
    result = {
        "conditions": {
            "model": f"{options.model.rstrip('/').rsplit('/', 1)[-1]}, {model.num_parameters():,} parameters",
            "windows": f"{len(validation)} to fit on, {len(test)} to test, {options.length} tokens each",
            "wrong": f"{float((~of_all.correct).double().mean()):.1%} of the test's tokens",
        },
        "machine": machine(options.threads),
        "rows": rows,
        "mutual_information": information,
        "controlled": controlled,
    }
    base = costs[1]
    columns = ["samples", "a token", "FLOPs / 1 sample", "NLL", *(f"AURC, {SHORT[name]}" for name in MEASURES)]
    lines = [
        [name, f"{row['samples']:.2f}", f"{row['flops'] / base:.2f}", cell(row, "nll")]
        + [cell(row, f"aurc_{measure}") for measure in MEASURES]
        for name, row in rows.items()
    ]
    show("Adaptive sampling; changes against 32 samples", columns, lines, result, options.json)
    if options.json:
        return result
    lines = [
        [size, *(f"{row[name]:.5f}" for name in ("raw", "corrected", "excess"))] for size, row in information.items()
    ]
    show("Mutual information, nats", ["samples", "raw", "corrected", "excess"], lines, result, False)
    lines = [
        [name, *(f"{row[column]:.3f}" for column in ("coverage", "risk", "samples")), f"{row['nll_change']:+.2%}"]
        for name, row in controlled.items()
    ]
    columns = ["decisions", "coverage", "risk", "samples a token", "NLL of all tokens"]
    show(f"Controllers that answer {options.coverage:.0%} of the validation data", columns, lines, result, False)
    columns = ["decisions", "abstained", "samples a step", "cost / 32 samples", "recomputed"]
    names = ("abstained", "generated_samples", "generated_cost", "recomputed")
    lines = [[name, *(f"{row[column]:.3f}" for column in names)] for name, row in controlled.items()]
    show(
        f"Greedy decoding, {options.new_tokens} tokens of each of {len(prompts)} prompts",
        columns,
        lines,
        result,
        False,
    )
    return result


if __name__ == "__main__":
    main()
