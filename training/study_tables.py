"""The study's tables, as Markdown. Nothing is left out for being unfavourable."""

import platform
import statistics
from collections.abc import Callable

import torch
import transformers
from study_measures import TEMPERED

from hf_variational.evaluation import mean_over_domains
from hf_variational.evaluation.statistics import over_seeds, paired_difference

LABELS = {
    "deterministic": "deterministic",
    "mc_dropout": "dropout, MC dropout",
    "ensemble": "ensemble",
    "eve_identity_empirical": "EVE, identity mean, empirical prior",
    "eve_identity_standard": "EVE, identity mean, standard prior",
    "eve_identity_centered": "EVE, identity mean, centered prior",
    "eve_linear_empirical": "EVE, linear mean, empirical prior",
    "eve_linear_standard": "EVE, linear mean, standard prior",
    "eve_linear_centered": "EVE, linear mean, centered prior",
    "eve_no_kl": "EVE, identity mean, KL weight 0",
    "gaussian_attention": "Gaussian attention",
    "dirichlet_attention": "Dirichlet attention",
    "eve_dirichlet": "EVE and Dirichlet attention",
}
# One distribution says these; they move with a temperature.
PREDICTED = ("predictive_entropy", "one_minus_confidence")


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(values: list[float], digits: int = 3) -> str:
    """Mean and standard deviation over seeds; a single seed says so."""
    estimate = over_seeds(values)
    if estimate.n == 1:
        return f"{estimate.mean:.{digits}f} (one seed)"
    return f"{estimate.mean:.{digits}f} ± {estimate.sd:.{digits}f}"


def difference(first: list[float], second: list[float], digits: int = 3) -> str:
    if len(first) < 2:
        return "one seed"
    estimate = paired_difference(first, second)
    low, high = estimate.interval
    return f"{estimate.mean:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"


def column(result: dict, read: Callable[[dict], float]) -> list[float]:
    return [read(run) for run in result["runs"]]


def quality_table(results: dict) -> str:
    reference = (
        column(results["deterministic"], lambda run: run["rows"][""]["nll"]) if "deterministic" in results else None
    )
    rows = []
    for name, result in results.items():
        for suffix in ("", TEMPERED):
            nll = column(result, lambda run, suffix=suffix: run["rows"][suffix]["nll"])
            rows.append(
                [
                    LABELS[name] + (f", {TEMPERED} {_temperature(result):.2f}" if suffix else ""),
                    cell(nll),
                    ""
                    if reference is None or (name == "deterministic" and not suffix)
                    else difference(nll, reference),
                    *(
                        cell(
                            column(result, lambda run, suffix=suffix, metric=metric: run["rows"][suffix][metric]),
                            digits,
                        )
                        for metric, digits in (("ece", 4), ("cvar_nll", 3), ("accuracy", 4), ("brier", 4))
                    ),
                ]
            )
    columns = ["", "NLL", "less the deterministic (95 % interval)", "ECE", "CVaR-NLL 5 %", "accuracy", "Brier"]
    return table(columns, rows)


def _temperature(result: dict) -> float:
    return statistics.mean(column(result, lambda run: run["rows"][TEMPERED]["temperature"]))


def mean_pass_table(results: dict) -> str:
    rows = []
    for name, result in results.items():
        if result["runs"][0]["mean_pass"] is None:
            continue
        sampled = column(result, lambda run: run["rows"][""]["nll"])
        mean = column(result, lambda run: run["mean_pass"]["nll"])
        share = column(
            result, lambda run: 100 * run["rows"][""]["mutual_information"] / run["rows"][""]["predictive_entropy"]
        )
        rows.append(
            [
                LABELS[name],
                cell(sampled),
                cell(mean),
                cell(column(result, lambda run: run["mean_pass"]["ece"]), 4),
                cell(share, 2),
            ]
        )
    return table(
        ["", "NLL, samples", "NLL, mean pass", "ECE, mean pass", "mutual information, % of the entropy"], rows
    )


def uncertainty_table(results: dict, lengths: list[int]) -> str:
    rows = []
    for name, result in results.items():
        for measure in result["runs"][0]["rows"][""]["wrong"]:
            row = [LABELS[name], measure]
            for length in lengths:
                values = column(
                    result,
                    lambda run, length=length, measure=measure: mean_over_domains(
                        run["rows"][""]["domains"][str(length)]
                    )[measure],
                )
                row.append(cell(values))
            row.append(cell(column(result, lambda run, measure=measure: run["rows"][""]["wrong"][measure])))
            row.append(cell(column(result, lambda run, measure=measure: run["rows"][""]["aurc"][measure])))
            rows.append(row)
    columns = ["", "measure", *(f"other texts, {length} tokens, AUROC" for length in lengths)]
    return table([*columns, "wrong tokens, AUROC", "AURC of errors"], rows)


def domain_table(results: dict, length: int) -> str:
    """Mutual information (of a deterministic model the predictive entropy), a column for each text."""
    first = next(iter(results.values()))
    others = list(first["runs"][0]["rows"][""]["domains"][str(length)])
    rows = []
    for name, result in results.items():
        measures = result["runs"][0]["rows"][""]["wrong"]
        measure = "mutual_information" if "mutual_information" in measures else "predictive_entropy"
        cells = [
            cell(column(result, lambda run, other=other, m=measure: run["rows"][""]["domains"][str(length)][other][m]))
            for other in others
        ]
        rows.append([LABELS[name], measure, *cells])
    return table(["", "measure", *others], rows)


def convergence_table(found: dict) -> str:
    """A row for each number of samples: mean ± standard deviation over draws (expected difference from the most)."""
    rows = []
    for size, metrics in found["rows"].items():
        cells = []
        for values in metrics.values():
            bias = "" if values["bias"] is None else f" ({values['bias']:+.4f})"
            spread = "" if values["draws"] < 2 else f" ± {values['sd']:.4f}"
            cells.append(f"{values['mean']:.4f}{spread}{bias}")
        rows.append([size, *cells])
    return table(["samples", *next(iter(found["rows"].values()))], rows)


def cost_table(results: dict) -> str:
    rows = []
    for name, result in results.items():
        run = result["runs"][0]
        cost = run["cost"]
        training = cost["training_flops_per_token"] * run["training_tokens"]
        if name == "ensemble":
            training = cost["training_flops_per_token"] * run["training_tokens"] / len(run["members"])
        rows.append(
            [
                LABELS[name],
                f"{cost['parameters']:,}",
                f"{run['training_tokens']:,}",
                f"{training / 1e12:.2f}",
                str(run["num_posterior_samples"]),
                f"{cost['inference_flops_per_token'] / 1e6:.2f}",
                f"{1e6 * cost['seconds'] / cost['tokens']:.0f}",
                "not measured" if cost["peak_memory_bytes"] is None else f"{cost['peak_memory_bytes'] / 2**20:.0f}",
                cell(column(result, lambda run: run["seconds"]), 0),
            ]
        )
    columns = ["", "parameters", "training tokens", "training TFLOPs", "samples", "inference MFLOPs / token"]
    return table([*columns, "inference µs / token", "peak MiB", "training seconds"], rows)


def tuning_table(results: dict, length: int) -> str:
    """Every trial: its validation NLL, by which one is chosen, and what it does on the test text."""
    rows = []
    for name, result in results.items():
        if name == "ensemble":
            continue
        for number, trial in enumerate(result["tuning"]):
            plain = trial["rows"][""]
            information = plain["mutual_information"]
            shares = ["", ""]
            if information is not None:
                told = mean_over_domains(plain["domains"][str(length)])["mutual_information"]
                shares = [f"{100 * information / plain['predictive_entropy']:.2f}", f"{told:.3f}"]
            rows.append(
                [
                    LABELS[name],
                    f"`{_varied(trial['trial'], result['tuning'])}`",
                    f"{trial['validation_nll']:.4f}" + (", chosen" if number == result["best"] else ""),
                    f"{plain['nll']:.4f}",
                    f"{plain['ece']:.4f}",
                    *shares,
                ]
            )
    columns = ["", "trial", "validation NLL", "test NLL", "ECE", "mutual information, % of the entropy"]
    return table([*columns, f"its AUROC, other texts, {length} tokens"], rows)


def _varied(trial: dict, trials: list[dict]) -> str:
    """What the trials of an arm do not have in common, or if there is one trial all of it."""
    flat = [_flat(other["trial"]) for other in trials]
    own = {
        key: value
        for key, value in _flat(trial).items()
        if len(flat) == 1 or any(one.get(key) != value for one in flat)
    }
    return ", ".join(f"{key}: {value}" for key, value in own.items())


def _flat(trial: dict) -> dict:
    found = {}
    for key, value in trial.items():
        name = key.rpartition(".")[2]
        found |= (
            {f"{name}.{inner}": each for inner, each in value.items()} if isinstance(value, dict) else {name: value}
        )
    return found


def markdown(results: dict, options, texts) -> str:
    seeds = ", ".join(map(str, options.seeds))
    conditions = [
        f"seeds {seeds}; a cell is mean ± standard deviation over them, a difference is paired by seed",
        f"{options.train_characters:,} characters to train on, {options.held_out_characters:,} to choose with and as "
        f"many to measure with: {len(texts.validation)} and {len(texts.test)} windows of {texts.block_size} tokens",
        f"other texts: {options.windows} windows of each and length; a window's score is the mean over its tokens",
        f"{options.samples} posterior samples; an ensemble has {options.members} members, and ensembles of "
        "neighbouring seeds share all members but one",
        f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}, "
        f"{options.threads} CPU thread; seconds are those of a machine with other work",
    ]
    parts = [
        "### Prediction",
        quality_table(results),
        "### Without samples",
        mean_pass_table(results),
        "### Uncertainty",
        uncertainty_table(results, options.lengths),
        f"### Each text, windows of {options.lengths[0]} tokens, AUROC",
        domain_table(results, options.lengths[0]),
        "### Cost",
        cost_table(results),
        "### Tuning, one seed",
        tuning_table(results, options.lengths[0]),
        "### Conditions",
        "\n".join(f"- {condition}" for condition in conditions),
    ]
    for name, result in results.items():
        if (found := result.get("convergence")) is not None:
            title = f"### Samples: {LABELS[name]}, one seed, {found['windows']} windows of the test text"
            parts[-2:-2] = [title, convergence_table(found)]
    return "\n\n".join(parts) + "\n"
