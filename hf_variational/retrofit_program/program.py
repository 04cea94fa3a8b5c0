"""A retrofit from the base model to the measured checkpoint."""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from rich.console import Console
from transformers import default_data_collator, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..hub import save_for_hub, write_model_card
from ..presentation.terminal import comparison_table
from ..retrofit.scale import FittedScale
from ..training import VariationalTrainer, VariationalTrainingArguments
from ..training.naming import is_variational
from ..training.recipe import Recipe
from ..training.retrofitting import calibrate, make_variational
from ..training.settings import settings_of
from . import report
from .measured import Measured, measure
from .output import RESULTS, TRAINING, check, clear, prepare, write_results
from .texts import read_texts

__all__ = ["run"]


def run(
    model,
    tokenizer,
    recipe: Recipe,
    *,
    others: Mapping[str, object] | None = None,
    test_sequences: int = 256,
    batch_size: int = 8,
    overwrite: bool = False,
    progress: bool = True,
    console: Console | None = None,
) -> dict[str, Any]:
    """
    Makes a causal language model variational as a recipe's section `retrofit` says, in place; measures it before and
    after, and saves it, with its tokenizer, a card and every number (`results.json`), to the recipe's `output_dir`.

    Args:
        model: The base model, loaded; `recipe.retrofit.model` is what it is called.
        tokenizer: Its tokenizer.
        recipe: A [`Recipe`] with a section `retrofit`.
        others: Text sources by name: texts of other kinds, whose short windows should look less certain.
        test_sequences: Held-out sequences, at most.
        batch_size: Sequences of a batch, but for training.
        overwrite: Replaces a checkpoint that is in the output folder.
        progress: Shows progress bars.
        console: Where the tables go.

    Returns:
        What `results.json` holds.

    Raises:
        ValueError: for a text that is too short, layers that are not there, a model that is variational already, an
            output folder that is not empty, and whatever else cannot be.
    """
    console = console or Console()
    start = time.perf_counter()
    datasets.disable_progress_bars()
    base = recipe.retrofit.model
    arguments = VariationalTrainingArguments(**_arguments(recipe, model))
    output, samples, seed = Path(recipe.arguments["output_dir"]), arguments.eval_posterior_samples, arguments.seed
    if samples < 1:
        raise ValueError("A retrofit is measured with posterior samples: set eval_posterior_samples to 1 or more.")
    set_seed(seed)
    # before anything that takes time, for what is asked may not be possible
    check(output, base, overwrite)
    name, parameters = type(model).__name__, model.num_parameters()
    model = make_variational(model, recipe.retrofit).eval()
    trains = recipe.retrofit.train != "none"
    texts = read_texts(
        _data(recipe, model),
        tokenizer,
        calibration=recipe.retrofit.calibration.sequences,
        test=test_sequences,
        trains=trains,
        others=others,
        seed=seed,
    )
    prepare(output)
    say = partial(console.print, highlight=False, markup=False)
    say(f"{base}: {name}, {parameters:,} parameters. {_variational_text(model)}")
    say("", report.texts_table(texts))
    say(report.texts_note(texts), "\n")

    measuring = {"batch_size": batch_size, "seed": seed, "progress": progress}
    before = measure(model, texts, 0, **measuring)
    results: dict[str, Any] = {
        "model": base,
        "class": name,
        "parameters": parameters,
        "recipe": recipe.to_dict(),
        "texts": {part: len(getattr(texts, part)) for part in ("calibration", "training", "test", "windows")},
        "num_posterior_samples": samples,
        "seed": seed,
        "threads": torch.get_num_threads(),
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "base": before.to_dict(),
    }
    write_results(output, results)

    fitted = calibrate(
        model,
        recipe.retrofit,
        texts.calibration,
        num_posterior_samples=samples,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
    )
    results["fitted"] = _fitted(fitted)
    say(f"Calibrated: {report.fitted_text(fitted, recipe.retrofit)}.")
    training = _train(model, arguments, texts.training, progress) if trains else None
    results["training"] = training
    write_results(output, results)

    facts = report.card_facts(recipe, texts, fitted, training, base, seed)
    if hasattr(model, "generation_config"):
        # generate and pipelines then draw samples without being told
        model.generation_config.num_posterior_samples = samples
    clear(output)
    save_for_hub(model, output, tokenizer, facts)
    say(f"Saved to {output}; measuring it.")

    after = measure(model, texts, samples, **measuring)
    mean_pass = None
    if recipe.retrofit.train in ("ffn", "all") or getattr(settings_of(model).eve, "mean", "identity") != "identity":
        mean_pass = measure(model, replace(texts, others={}), 0, **measuring).plain
    results |= {"retrofit": after.to_dict(), "mean_pass": mean_pass, "seconds": time.perf_counter() - start}
    write_results(output, results)
    metrics = report.card_metrics(before, after, mean_pass, texts, samples, seed)
    write_model_card(model, output, facts=facts, metrics=metrics)
    shutil.rmtree(output / TRAINING, ignore_errors=True)
    _show(console, before, after, mean_pass, texts, samples)
    what = "adapter" if recipe.retrofit.adapter else "checkpoint"
    say(
        f"\n{output}: the {what}, its tokenizer, its card (README.md) and every number ({RESULTS}). Try it:\n"
        f'hf-variational generate {shlex.quote(str(output))} --prompt "Once upon a time"',
        soft_wrap=True,
    )
    return results


def _arguments(recipe: Recipe, model) -> dict:
    """The recipe's, for a training that is a part of something larger."""
    own = {
        "output_dir": str(Path(recipe.arguments["output_dir"]) / TRAINING),
        "eval_strategy": "no",
        "report_to": [],
        "use_cpu": model.device.type == "cpu",
    }
    return {**recipe.arguments, **own}


def _data(recipe: Recipe, model):
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and recipe.data.block_size > longest:
        raise ValueError(
            f"Sequences of {recipe.data.block_size} tokens are longer than the model's max_position_embeddings="
            f"{longest}: make them shorter."
        )
    return recipe.data


def _variational_text(model) -> str:
    sites = settings_of(model).sites
    parts = []
    for site, what in (("ffn", "the feed-forward units"), ("attention", "the attention")):
        layers = [layer for layer, here in sites if here == site]
        if layers:
            parts.append(f"{what} of {len(layers)} layer{'s' if len(layers) > 1 else ''} ({_span(layers)})")
    added = sum(parameter.numel() for key, parameter in model.named_parameters() if is_variational(key))
    text = f"{' and '.join(parts)} become variational; {added:,} parameters are added."
    return text[0].upper() + text[1:]


def _span(layers: list[int]) -> str:
    if len(layers) > 2 and layers == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]} to {layers[-1]}"
    return ", ".join(map(str, layers))


def _fitted(fitted: FittedScale | None) -> dict | None:
    if fitted is None:
        return None
    multipliers = {f"layer {layer} {site}": factor for (layer, site), factor in fitted.multipliers.items()}
    return {**asdict(fitted), "multipliers": multipliers}


class _Bar(ProgressCallback):
    """A progress bar that shows the loss instead of printing every log."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and logs and "nll" in logs:
            shown = {name: f"{logs[name]:.4g}" for name in ("nll", "kl") if name in logs}
            self.training_bar.set_postfix(shown)


def _train(model, arguments: VariationalTrainingArguments, rows: list[dict], progress: bool) -> dict:
    """Trains what has a gradient; says what that took."""
    start = time.perf_counter()
    trainer = VariationalTrainer(model, arguments, train_dataset=rows, data_collator=default_data_collator)
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    if progress:
        trainer.add_callback(_Bar)
    trainer.train()
    model.eval()
    return {
        "seconds": time.perf_counter() - start,
        "steps": trainer.state.global_step,
        "parameters": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "hardware": _hardware(arguments.device),
        "log": [entry for entry in trainer.state.log_history if "nll" in entry],
    }


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type}, {threads} thread{'s' if threads > 1 else ''}"


def _show(console: Console, before: Measured, after: Measured, mean_pass, texts, samples: int) -> None:
    base, own = report.columns(before, after, mean_pass, samples)
    title = f"{texts.held_out}, {after.plain['num_tokens']:,} tokens (T: a temperature fitted to the calibration data)"
    console.print("", comparison_table({**base, **own}, title), "")
    if after.others:
        console.print(report.others_table(before, after), "")
    for line in report.summary(before, after):
        console.print(line, highlight=False, markup=False)
