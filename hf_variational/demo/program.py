"""The demo from the text to the reloaded checkpoint."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import datasets
import torch
from rich.console import Console
from transformers.utils import logging

from ..evaluation import evaluate_language_model
from ..hub import save_for_hub
from ..presentation.generation import generate_annotated
from ..presentation.html import write_page
from ..presentation.measures import format_value, scale_maximum
from ..presentation.plots import Reliability, training_and_calibration
from ..presentation.terminal import comparison_table, panel
from ..presentation.tokens import AnnotatedText
from ..training.data import train_tokenizer
from .matched_training import Trained, matched_models, train_all
from .output import PAGE, PICTURE, RESULTS, RUNS, check_output, check_reload, prepare_output
from .report import files_table, sizes_table, summary, texts_table
from .settings import QUICK, DemoSettings
from .texts import DemoTexts, demo_texts, prompt_from, text_blocks

__all__ = ["run"]


def _evaluate(models, blocks, settings: DemoSettings, seed: int) -> tuple[dict[str, Any], list[Reliability]]:
    """The metrics of both models on one text, and their reliability diagrams."""
    results, diagrams = {}, []
    for name, model in models.items():
        gathered: dict[str, Any] = {}
        results[name] = evaluate_language_model(
            model,
            blocks,
            num_posterior_samples=settings.posterior_samples,
            batch_size=settings.batch_size,
            progress=False,
            seed=seed,
            evaluations=gathered,
        )
        key = "samples" if "samples" in gathered else "mean_pass"
        label = f"EVE, {settings.posterior_samples} samples" if key == "samples" else name
        bins = (values.tolist() for values in gathered[key].reliability())
        diagrams.append(Reliability(label, *bins, results[name][key]["expected_calibration_error"]))
    return results, diagrams


def _generate(model, tokenizer, texts: DemoTexts, settings: DemoSettings, seed: int) -> list[AnnotatedText]:
    prompts = {
        "After a prompt from the held-out text": prompt_from(texts.held_out, tokenizer),
        "After a prompt of another kind": prompt_from(texts.other, tokenizer, ("def ", "class ", "    def ")),
    }
    return [
        generate_annotated(
            model,
            tokenizer,
            prompt,
            max_new_tokens=settings.new_tokens,
            num_posterior_samples=settings.posterior_samples,
            do_sample=True,
            temperature=settings.temperature,
            seed=seed,
            title=title,
        )
        for title, prompt in prompts.items()
    ]


def _save(name: str, result: Trained, tokenizer, directory: Path, texts, settings: DemoSettings, seed: int, metrics):
    facts = {
        "name": f"Demo: {name}",
        "description": f"Trained for {result.seconds:.0f} seconds to be looked at, not to be used.",
        "data": texts.name,
        "training_tokens": settings.tokens,
        "training_seconds": round(result.seconds),
        "seeds": [seed],
        "recipe": {key: value for key, value in asdict(settings).items() if value is not None},
    }
    if result.model.variational_layers:
        # generate and pipelines then draw samples without being told
        result.model.generation_config.num_posterior_samples = settings.posterior_samples
    save_for_hub(result.model, directory, tokenizer, facts, metrics)


def run(
    text: Path | None = None,
    output: Path = Path("demo_output"),
    steps: int | None = None,
    seed: int = 0,
    quick: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train, compare, generate, write `output` and load the checkpoint again; returns what results.json holds.

    Raises:
        ValueError: the text cannot be used, or the folder holds what no demo wrote.
        RuntimeError: the checkpoint does not load, or computes something else.
    """
    console = console or Console()
    # The demo has bars of its own.
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    output = Path(output)
    check_output(output)
    settings = QUICK if quick else DemoSettings()
    if steps is not None:
        settings = replace(settings, steps=steps)
    texts = demo_texts(text, settings.characters)
    tokenizer = train_tokenizer([texts.training], settings.vocab_size)
    parts = {"training": texts.training, "in_domain": texts.held_out, "another_kind": texts.other}
    blocks = {name: text_blocks(part, tokenizer, settings.block_size) for name, part in parts.items()}
    console.print(texts_table(texts, blocks), "")

    prepare_output(output)
    models = matched_models(settings, tokenizer, seed)
    trained = train_all(models, settings, blocks["training"], blocks["in_domain"], output / RUNS, seed, console)
    console.print("", sizes_table(trained, settings), "")

    titles = {"in_domain": f"In domain: {texts.name}, held out", "another_kind": f"Another kind: {texts.other_name}"}
    results, diagrams = {}, {}
    samples = settings.posterior_samples
    for name, title in titles.items():
        with console.status(f"Evaluating: {title}"):
            results[name], diagrams[title.split(":")[0]] = _evaluate(models, blocks[name], settings, seed)
        columns = {
            "deterministic": results[name]["deterministic"]["mean_pass"],
            f"EVE, {samples} samples": results[name]["eve"]["samples"],
            "EVE, mean pass": results[name]["eve"]["mean_pass"],
        }
        console.print(comparison_table(columns, title), "")
    for line in summary(results):
        console.print(line, highlight=False)

    passages = _generate(models["eve"], tokenizer, texts, settings, seed)
    shared = scale_maximum("mutual_information", [v for p in passages for v in p.values("mutual_information")])
    for passage in passages:
        console.print("", panel(passage, maximum=shared))

    facts = {"model": f"{output}/eve", "posterior samples": samples, "temperature": settings.temperature, "seed": seed}
    write_page(output / PAGE, passages, title=f"EVE, trained on {texts.name}", facts=facts)
    caption = f"{texts.name}, {settings.tokens:,} tokens, seed {seed}"
    training_and_calibration(output / PICTURE, [result.curve for result in trained.values()], diagrams, caption)
    for name, result in trained.items():
        metrics = {titles[key]: by_model[name] for key, by_model in results.items()}
        _save(name, result, tokenizer, output / name, texts, settings, seed, metrics)
    rows = torch.tensor(blocks["in_domain"][:2]["input_ids"])
    with console.status("Loading the checkpoint in a fresh process"):
        kind, difference = check_reload(models["eve"], output / "eve", rows)
    report = {
        "texts": {"training": texts.name, **titles},
        "settings": asdict(settings),
        "seed": seed,
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
        "threads": torch.get_num_threads(),
        "training": {
            name: {"parameters": r.model.num_parameters(), "seconds": r.seconds, "curve": asdict(r.curve)}
            for name, r in trained.items()
        },
        "results": results,
        "reload": {"class": kind, "largest_difference_of_logits": difference},
    }
    (output / RESULTS).write_text(json.dumps(report, indent=1), encoding="utf-8")
    shutil.rmtree(output / RUNS, ignore_errors=True)
    if not difference <= 1e-5:
        raise RuntimeError(f"the logits of {output / 'eve'}, loaded again, differ by {difference}")
    console.print(
        f"\n{output / 'eve'}, loaded with AutoModelForCausalLM in a fresh process, is a {kind} and its logits match "
        f"(largest difference {format_value(difference)}).\n",
        highlight=False,
    )
    console.print(files_table(output), highlight=False)
    return report
