"""`hf-variational evaluate` without a report: the metrics of each file, printed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import datasets
import typer
from rich.console import Console

from ..command_line import fail, load, reported, samples_of
from ..evaluation import evaluate_language_model
from ..presentation.terminal import comparison_table
from ..training.data import load_text, pack

__all__ = ["evaluate_files"]


def evaluate_files(
    model, data, samples, block_size, batch_size, max_batches, seed, as_json, trust_remote_code, device
) -> None:
    """The metrics of each file, printed."""
    for path in data:
        if not Path(path).is_file():
            fail(f"--data {path} is no file: give a text file", 2)
    network, tokenizer, variational = load(model, trust_remote_code, device)
    count = samples_of(samples, variational, model)
    longest = getattr(network.config, "max_position_embeddings", None) or 256
    datasets.disable_progress_bars()  # packing is quick; the evaluation has a bar
    results = {}
    for path in data:
        with reported(str(path)):
            blocks = pack(load_text(path), tokenizer, block_size or min(256, longest))
            results[str(path)] = evaluate_language_model(
                network,
                blocks,
                num_posterior_samples=count,
                batch_size=batch_size,
                max_batches=max_batches,
                progress=sys.stderr.isatty(),
                seed=seed,
            )
    if as_json:
        typer.echo(
            json.dumps({"model": model, "num_posterior_samples": count, "seed": seed, "data": results}, indent=1)
        )
        return
    console = Console()
    for name, result in results.items():
        columns = {f"{count} samples": result.get("samples"), "mean pass": result["mean_pass"]}
        # Not wrapped: a path is to be copied.
        title = f"{name}, {result['mean_pass']['num_tokens']:,} tokens"
        console.print(title, style="bold", soft_wrap=True, highlight=False, markup=False)
        console.print(comparison_table({k: v for k, v in columns.items() if v is not None}), "")
