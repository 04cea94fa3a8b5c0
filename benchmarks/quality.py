"""Is the noise worth it: EVE against its deterministic twin, trained on the same batches from the same weights.

    python benchmarks/quality.py                                            # the language reference every CPython has
    python benchmarks/quality.py --train wiki.train.txt --train-characters 500000 --held-out wiki.valid.txt

Both models get the same tuning: each is trained with every learning rate of `--learning-rates` on the first seed and
keeps the one whose NLL on the first half of the held-out text is lowest. Every seed is measured on the second half.
The twin's number is its NLL; EVE's is that of the predictive distribution over `--samples` posterior samples.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from hf_variational.demo.matched_training import matched_models, train_all
from hf_variational.demo.settings import QUICK, DemoSettings
from hf_variational.demo.texts import demo_texts, read_text, text_blocks
from hf_variational.evaluation import evaluate_language_model
from hf_variational.training.data import train_tokenizer

METRICS = ("nll", "expected_calibration_error", "accuracy", "mutual_information", "predictive_entropy", "cvar_nll")


def _measure(model, blocks, settings: DemoSettings) -> dict:
    return evaluate_language_model(
        model, blocks, num_posterior_samples=settings.posterior_samples, batch_size=16, progress=False, seed=0
    )


def _train(kind: str, settings: DemoSettings, tokenizer, training, watched, seed: int, console) -> tuple:
    models = {kind: matched_models(settings, tokenizer, seed)[kind]}
    with tempfile.TemporaryDirectory() as runs:
        trained = train_all(models, settings, training, watched, Path(runs), seed, console)[kind]
    return trained.model, trained.seconds


def study(kind: str, rates: list[float], seeds: list[int], settings: DemoSettings, tokenizer, parts, console) -> dict:
    """Tunes the learning rate on the first seed, then trains and measures every seed."""
    runs, tuning = {}, {}
    for rate in rates:
        model, seconds = _train(kind, replace(settings, learning_rate=rate), tokenizer, *parts[:2], seeds[0], console)
        validation = _measure(model, parts[1], settings)
        tuning[rate] = validation["samples" if kind == "eve" else "mean_pass"]["nll"]
        runs[rate] = (model, seconds)
    best = min(tuning, key=tuning.get)
    rows = []
    for seed in seeds:
        if seed == seeds[0]:
            model, seconds = runs[best]
        else:
            model, seconds = _train(kind, replace(settings, learning_rate=best), tokenizer, *parts[:2], seed, console)
        measured = _measure(model, parts[2], settings)
        passes = {
            name: {metric: values[metric] for metric in METRICS if metric in values}
            for name, values in measured.items()
            if name in ("samples", "mean_pass")
        }
        rows.append({"seed": seed, "seconds": seconds, **passes})
        console.print(kind, rows[-1])
    return {
        "parameters": model.num_parameters(),
        "learning_rate": best,
        "tuning": {str(rate): nll for rate, nll in tuning.items()},
        "seeds": rows,
    }


def summary(result: dict) -> list[str]:
    """The table as Markdown: mean over seeds and the range they span."""

    def cell(kind, name, metric, digits=4):
        values = [row[name][metric] for row in result[kind]["seeds"]]
        return f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"

    lines = ["| | deterministic twin | EVE, samples | EVE, mean pass |", "|---|---|---|---|"]
    for metric, label in (
        ("nll", "NLL, nats per token"),
        ("expected_calibration_error", "ECE, 15 bins"),
        ("accuracy", "accuracy"),
        ("cvar_nll", "CVaR-NLL, worst 5 %"),
    ):
        cells = [cell("deterministic", "mean_pass", metric), cell("eve", "samples", metric)]
        lines.append(f"| {label} | {' | '.join(cells)} | {cell('eve', 'mean_pass', metric)} |")
    shares = [
        row["samples"]["mutual_information"] / row["samples"]["predictive_entropy"] for row in result["eve"]["seeds"]
    ]
    share = f"{100 * statistics.mean(shares):.2f} %"
    lines.append(f"| mutual information, share of predictive entropy | 0 | {share} | |")
    for name, label in (("parameters", "parameters"), ("learning_rate", "learning rate chosen")):
        lines.append(f"| {label} | {result['deterministic'][name]:,} | {result['eve'][name]:,} | |")
    seconds = [statistics.mean(row["seconds"] for row in result[kind]["seeds"]) for kind in ("deterministic", "eve")]
    lines.append(f"| training seconds (a loaded machine's) | {seconds[0]:.0f} | {seconds[1]:.0f} | |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", help="a text file to train on (default: the language reference)")
    parser.add_argument("--held-out", help="a text file to tune (first half) and to measure (second half) on")
    parser.add_argument("--train-characters", type=int, help="train on the first so many characters (default: all)")
    parser.add_argument("--held-out-characters", type=int, default=200_000)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--vocab-size", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--kl-weight", type=float)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[1e-3, 2e-3])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--kinds", nargs="+", choices=("deterministic", "eve"), default=["deterministic", "eve"])
    parser.add_argument("--json", help="a file that keeps every number; kinds that it holds already are not run again")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to see that the script works")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    settings = QUICK if options.tiny else DemoSettings()
    chosen = {
        "steps": options.steps,
        "vocab_size": options.vocab_size,
        "batch_size": options.batch_size,
        "kl_weight": options.kl_weight,
        "num_hidden_layers": options.layers,
        "hidden_size": options.width,
        "intermediate_size": options.width and options.width * 8 // 3 // 8 * 8,
        "num_attention_heads": options.width and 4,
        "posterior_samples": options.samples,
    }
    settings = replace(settings, **{name: value for name, value in chosen.items() if value})
    if options.train:
        training = read_text(options.train)[: options.train_characters]
        held_out = read_text(options.held_out)[: options.held_out_characters]
        name = Path(options.train).name
    else:
        texts = demo_texts(characters=settings.characters)
        name, training, held_out = texts.name, texts.training, texts.held_out
    tokenizer = train_tokenizer([training], settings.vocab_size)
    half = len(held_out) // 2
    parts = [
        text_blocks(text, tokenizer, settings.block_size) for text in (training, held_out[:half], held_out[half:])
    ]
    console = Console(file=sys.stderr)
    result = {
        "text": name,
        "blocks": {label: len(part) for label, part in zip(("training", "validation", "test"), parts, strict=True)},
        "tokens": settings.tokens,
        "settings": {f: getattr(settings, f) for f in settings.__dataclass_fields__},
    }
    file = Path(options.json) if options.json else None
    if file is not None and file.exists():
        result |= {
            kind: value for kind, value in json.loads(file.read_text()).items() if kind in ("deterministic", "eve")
        }
    started = time.time()
    for kind in options.kinds:
        if kind not in result:
            result[kind] = study(kind, options.learning_rates, options.seeds, settings, tokenizer, parts, console)
        if file is not None:
            file.write_text(json.dumps(result, indent=1))
    console.print(f"{time.time() - started:.0f} s")
    if {"deterministic", "eve"} <= set(result):
        epochs = settings.tokens / (result["blocks"]["training"] * settings.block_size)
        print(f"{name}: {settings.tokens:,} training tokens ({epochs:.1f} passes), seeds {options.seeds}\n")
        print("\n".join(summary(result)))


if __name__ == "__main__":
    main()
