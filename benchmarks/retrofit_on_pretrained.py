"""What a retrofit makes of a pretrained language model: its own rival is the same model with a fitted temperature.

    python benchmarks/retrofit_on_pretrained.py MODEL --train stories.jsonl.xz --test held_out.txt.xz \\
        --other law=law.txt.xz --other code=code.txt.xz --low-entropy code --output retrofit.md

The training text is cut into windows; a seed deals them into calibration data (for the prior, the scales and every
temperature) and training data, and seeds all noise. Four models are measured on the held-out text: the base; the base
with every unit's noise scaled by `fit_scale`; that one after its posterior alone was trained; and each of them with a
temperature on its predictive distribution. The control says what training alone is worth: LoRA without noise on the
same projections, with about as many parameters, the same steps on the same text, and the best of several learning
rates on the first seed's calibration data. A window of a few tokens of another text, each a sequence of its own,
should score higher than one of the held-out text. Files are .txt or .jsonl, plain or as .xz, .gz or .bz2.
"""

import argparse
import copy
import json
import re
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from report import machine
from retrofit_tables import MODELS, TEMPERED, markdown
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from hf_variational import EVEConfig, calibrate_prior, fit_scale, variationalize
from hf_variational.demo.texts import read_text
from hf_variational.evaluation import domain_auroc, evaluate_language_model, scores_at_temperatures, token_windows
from hf_variational.evaluation.temperature import fit_temperature
from hf_variational.retrofit.families import find_projections
from hf_variational.training import VariationalTrainer, VariationalTrainingArguments

PIECE = 2**16
PUNCTUATION = {'"': "“”", "'": "‘’", "-": "–—", "...": "…"}


class _Clock(TrainerCallback):
    """Stops a training that has used its processor time, of all threads."""

    def __init__(self, limit: float):
        self.limit, self.stopped = limit, False

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = time.process_time(), time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.cpu, self.wall = time.process_time() - self.started[0], time.perf_counter() - self.started[1]
        if self.cpu > self.limit and state.global_step < state.max_steps:
            self.stopped = control.should_training_stop = True


def plain_text(text: str) -> str:
    """Text with one line break for several and ASCII quotes and dashes, also where UTF-8 was read as Windows-1252."""
    meant = {character: plain for plain, characters in PUNCTUATION.items() for character in characters}
    # Mangled ones first: a dash read as Windows-1252 ends in a quote.
    for character, plain in meant.items():
        mangled = "".join(bytes([byte]).decode("cp1252", "ignore") or chr(byte) for byte in character.encode())
        text = text.replace(mangled, plain)
    text = text.translate(str.maketrans(meant))
    return re.sub(r"\s*\n\s*", "\n", text)


def read_pieces(path: str, plain: bool = False, start: float = 0.0) -> list[str]:
    """A file's text, its documents a blank line apart, without the first `start` of it; in pieces, for a tokenizer's
    memory grows with the longest text. No document is cut apart from the next: the held-out text may have lost where
    its documents end, and windows of both should begin alike.
    """
    text = plain_text(read_text(path)) if plain else read_text(path)
    text = text[int(start * len(text)) :]
    return [text[begin : begin + PIECE] for begin in range(0, len(text), PIECE)]


def named_file(text: str) -> tuple[str, str]:
    name, separator, path = text.partition("=")
    if not separator or not name or not path:
        raise argparse.ArgumentTypeError(f"expected NAME=FILE, got {text!r}")
    return name, path


def rows_of(windows: list[list[int]]) -> list[dict]:
    return [{"input_ids": window, "labels": window} for window in windows]


def dealt(windows: list[list[int]], count: int, seed: int) -> tuple[list[dict], list[dict]]:
    """Calibration and training data: `count` windows at random, and the rest."""
    if count >= len(windows):
        raise ValueError(f"--calibration {count} leaves none of the {len(windows)} windows of --train to train on.")
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed)).tolist()
    return rows_of([windows[i] for i in order[:count]]), rows_of([windows[i] for i in order[count:]])


def train(model, rows: list[dict], options, seed: int, learning_rate: float) -> dict:
    """Trains what requires a gradient; says what that took."""
    clock = _Clock(60 * options.minutes)
    with tempfile.TemporaryDirectory() as folder:
        arguments = VariationalTrainingArguments(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=learning_rate,
            weight_decay=0.0,
            warmup_steps=min(20, options.steps // 10),
            lr_scheduler_type="cosine",
            kl_weight=options.kl_weight,
            train_posterior_samples=options.train_samples,
            logging_steps=max(1, options.steps // 20),
            save_strategy="no",
            report_to=[],
            seed=seed,
            disable_tqdm=True,
        )
        trainer = VariationalTrainer(model=model, args=arguments, train_dataset=rows, callbacks=[clock])
        if not options.verbose:
            trainer.remove_callback(PrinterCallback)
        trainer.train()
    return {
        "seconds": clock.wall,
        "cpu_seconds": clock.cpu,
        "steps": trainer.state.global_step,
        "stopped_by_the_clock": clock.stopped,
        "parameters": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
    }


def without_noise(base, rows: list[dict], options, seed: int, learning_rate: float):
    """The control, and what its training took."""
    torch.manual_seed(seed)
    projections = sorted({name.rsplit(".", 1)[-1] for name in projection_names(base)})
    model = get_peft_model(
        copy.deepcopy(base),
        LoraConfig(r=options.control_rank, lora_alpha=options.control_rank, target_modules=projections),
    )
    took = train(model, rows, options, seed, learning_rate)
    return model.merge_and_unload().eval(), {**took, "learning_rate": learning_rate}


def projection_names(model) -> list[str]:
    """Full names of the modules that EVE stands beside."""
    found = {id(projection) for projection in find_projections(model, None).values()}
    return [name for name, module in model.named_modules() if id(module) in found]


def control_learning_rate(base, windows: list[list[int]], options) -> float:
    """The learning rate whose control has the lowest NLL on the calibration data of the first seed."""
    seed = options.seeds[0]
    calibration, training = dealt(windows, options.calibration, seed)

    def calibration_nll(learning_rate: float) -> float:
        model, _ = without_noise(base, training, options, seed, learning_rate)
        result = evaluate_language_model(model, calibration, 0, options.eval_batch_size, progress=False)
        return result["mean_pass"]["nll"]

    return min(options.control_learning_rates, key=calibration_nll)


def measure(model, calibration: list[dict], texts: dict, options, seed: int) -> dict[str, dict]:
    """One model as it is and with a temperature: `{"": {...}, ", temperature": {...}}`."""
    samples = options.samples
    fitted = fit_temperature(model, calibration, samples, options.eval_batch_size, seed=seed, progress=False)
    temperatures = {"": 1.0, TEMPERED: fitted.temperature}

    def scored(windows, batch_size):
        return scores_at_temperatures(
            model, windows, list(temperatures.values()), samples, batch_size, seed=seed, progress=False
        )

    test = scored(texts["test"], options.eval_batch_size)
    # the noise of a text is the same each time, and windows are short
    batch_size = max(1, options.eval_batch_size * options.length // options.window)
    own = scored(texts["in_domain"], batch_size)
    others = {name: scored(windows, batch_size) for name, windows in texts["others"].items()}
    result = {}
    for index, (name, temperature) in enumerate(temperatures.items()):
        metrics = test[index].evaluation().compute()
        result[name] = {
            "temperature": temperature,
            "nll": metrics["nll"],
            "ece": metrics["expected_calibration_error"],
            "accuracy": metrics["accuracy"],
            "means": {
                measure: values.double().mean().item()
                for measure, values in test[index].values.items()
                if measure in ("predictive_entropy", "mutual_information")
            },
            "wrong": test[index].error_auroc(),
            "domains": {other: domain_auroc(own[index], scores[index]) for other, scores in others.items()},
        }
    return result


def run_seed(base, windows: list[list[int]], texts: dict, options, seed: int, control_rate: float) -> dict:
    """Every row of the tables for one seed."""
    calibration, training = dealt(windows, options.calibration, seed)
    rows, seconds = {}, {}

    def add(name: str, model) -> None:
        for suffix, row in measure(model, calibration, texts, options, seed).items():
            rows[name + suffix] = row
        plain, tempered = rows[name], rows[name + TEMPERED]
        print(
            f"seed {seed}, {MODELS[name]}: NLL {plain['nll']:.4f}, ECE {plain['ece']:.4f}; at temperature "
            f"{tempered['temperature']:.3f} NLL {tempered['nll']:.4f}, ECE {tempered['ece']:.4f}",
            flush=True,
        )

    add("base", base)
    torch.manual_seed(seed)
    model = variationalize(
        copy.deepcopy(base),
        eve=EVEConfig(mean=options.mean, scale="input", scale_rank=options.rank, prior="centered"),
        layers=options.layers,
        kl_weight=options.kl_weight,
        objective=options.objective,
    )
    started = time.perf_counter()
    # As many sequences as the temperature has.
    calibrate_prior(model, calibration, scale=options.scale, max_sequences=len(calibration), progress=False)
    seconds["calibrate_prior"] = time.perf_counter() - started
    started = time.perf_counter()
    fit_scale(
        model,
        calibration,
        max_sequences=len(calibration),
        num_posterior_samples=options.samples,
        seed=seed,
        progress=False,
    )
    seconds["fit_scale"] = time.perf_counter() - started
    add("fit_scale", model)
    trained = train(model, training, options, seed, options.learning_rate)
    add("trained", model)
    model, control = without_noise(base, training, options, seed, control_rate)
    add("control", model)
    return {"seed": seed, "rows": rows, "seconds": seconds, "training": trained, "control": control}


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or Hub name of a causal language model")
    parser.add_argument("--train", required=True, help="text of its domain, to calibrate and to train on")
    parser.add_argument("--test", required=True, help="held-out text of its domain")
    parser.add_argument("--test-from", type=float, default=0.5, help="share of it that tuning has seen (default: 0.5)")
    parser.add_argument("--other", type=named_file, action="append", required=True, metavar="NAME=FILE")
    parser.add_argument(
        "--plain-text", action="store_true", help="one line break for several, ASCII quotes and dashes"
    )
    parser.add_argument("--low-entropy", help="the name of the other text whose tokens are easy to predict")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=8, help="posterior samples of every measurement")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--calibration", type=int, default=256, help="sequences")
    parser.add_argument("--test-sequences", type=int, default=256)
    parser.add_argument("--window", type=int, default=8, help="tokens of a window of another text")
    parser.add_argument("--windows", type=int, default=1000, help="of each text")
    parser.add_argument("--eval-batch-size", type=int, default=8)
    parser.add_argument("--layers", default="all")
    parser.add_argument("--mean", default="identity", choices=("identity", "gain"))
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument(
        "--scale", type=float, default=0.1, help="share of a unit's deviation that fit_scale starts at"
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="of processor time for the training, at most")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--kl-weight", type=float, default=1e-4)
    parser.add_argument("--objective", default="mc_nll", choices=("elbo", "mc_nll"))
    parser.add_argument("--train-samples", type=int, default=4)
    parser.add_argument("--control-rank", type=int, default=12, help="of the LoRA that is trained without noise")
    parser.add_argument("--control-learning-rates", type=float, nargs="+", default=[2e-3, 5e-3, 1e-2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", help="a file for the tables, as Markdown")
    parser.add_argument("--json", help="a file that keeps every number; seeds that it holds are not run again")
    parser.add_argument("--verbose", action="store_true", help="print the training's log")
    return parser


def texts_of(options, tokenizer) -> tuple[list[list[int]], dict]:
    """Windows to calibrate and train on, and those to measure on."""
    plain = options.plain_text
    held_out = read_pieces(options.test, plain, options.test_from)
    windows = token_windows(read_pieces(options.train, plain), tokenizer, options.length)
    return windows, {
        "test": token_windows(held_out, tokenizer, options.length, options.test_sequences),
        "in_domain": token_windows(held_out, tokenizer, options.window, options.windows),
        "others": {
            name: token_windows(read_pieces(path, plain), tokenizer, options.window, options.windows)
            for name, path in options.other
        },
    }


def main(argv: list[str] | None = None) -> dict:
    parser = arguments()
    options = parser.parse_args(argv)
    if options.low_entropy and options.low_entropy not in dict(options.other):
        parser.error(f"--low-entropy {options.low_entropy!r} is none of {', '.join(dict(options.other))}")
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    windows, texts = texts_of(options, tokenizer)
    first = len(texts["test"][0]) - options.length
    recipe = ("layers", "mean", "rank", "scale", "steps", "batch_size", "learning_rate", "kl_weight", "objective")
    result = {
        "conditions": {
            "model": f"{options.model.rstrip('/').rsplit('/', 1)[-1]}, {base.num_parameters():,} parameters",
            "sequence": f"{options.length} tokens" + (f" behind {first} of the tokenizer's" if first else ""),
            "calibration": f"{options.calibration} sequences of {Path(options.train).name}",
            "training": f"the other {len(windows) - options.calibration} sequences",
            "test": f"{len(texts['test'])} sequences of {Path(options.test).name} from {options.test_from:.0%} on",
            "window of another text": f"windows of {options.window} tokens",
            "windows": ", ".join(
                f"{name} {len(found)}" for name, found in {"in domain": texts["in_domain"], **texts["others"]}.items()
            ),
            "texts": "one line break for several, ASCII quotes and dashes" if options.plain_text else "as they are",
            "posterior samples": options.samples,
            "recipe": ", ".join(f"{name} {getattr(options, name)}" for name in (*recipe, "train_samples")),
            "control": f"LoRA of rank {options.control_rank}, learning rates "
            + ", ".join(map(str, options.control_learning_rates)),
            "seeds": ", ".join(map(str, options.seeds)),
        },
        "low_entropy": options.low_entropy,
        "machine": machine(options.threads),
        "seeds": [],
    }
    kept = Path(options.json) if options.json else None
    if kept is not None and kept.exists():
        before = json.loads(kept.read_text())
        if before["conditions"] | {"seeds": ""} != result["conditions"] | {"seeds": ""}:
            parser.error(f"--json {kept} holds other conditions: name another file")
        result["seeds"] = [seed for seed in before["seeds"] if seed["seed"] in options.seeds]
    missing = [seed for seed in options.seeds if all(done["seed"] != seed for done in result["seeds"])]
    if missing:
        done = result["seeds"]
        rate = done[0]["control"]["learning_rate"] if done else control_learning_rate(base, windows, options)
        for seed in missing:
            result["seeds"].append(run_seed(base, windows, texts, options, seed, rate))
            if kept is not None:
                kept.write_text(json.dumps(result, indent=1))
    tables = markdown(result)
    print(tables)
    if options.output:
        Path(options.output).write_text(tables)
    return json.loads(json.dumps(result))


if __name__ == "__main__":
    main()
