"""An evaluation from text files to the folder of its report."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets
from rich.console import Console

from ..baselines import measure_cost
from ..evaluation.domains import text_prefix
from ..evaluation.report import EvaluationReport, EvaluationSettings, evaluate_model
from ..presentation.report import write_report
from ..presentation.report_tables import report_tables
from .contenders import Loaded, baselines_of, training_of
from .texts import read_rows, source_name

__all__ = ["check_output", "run"]

# What a report folder holds, and nothing else is written over.
_OWN = {"report.json", "report.html", "model-index.yaml"}


def check_output(output: Path, overwrite: bool) -> None:
    """
    Raises:
        ValueError: for a file, or a folder with something in it that is not to be written over.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file: give a folder to write to.")
    inside = {file.name for file in output.iterdir()} if output.is_dir() else set()
    if inside and not overwrite:
        raise ValueError(f"--output {output} is not empty: give another folder, or --overwrite to replace the report.")
    if inside and not inside & _OWN:
        raise ValueError(f"--output {output} has no report in it to overwrite: give another folder.")


def run(
    model,
    tokenizer,
    name: str,
    data: object,
    output: Path,
    *,
    validation: object | None = None,
    ood: Mapping[str, object] | None = None,
    baselines: bool = False,
    ensemble: Sequence[Loaded] = (),
    compared: Mapping[str, Loaded] | None = None,
    samples: int = 8,
    length: int = 256,
    batch_size: int = 8,
    max_sequences: int | None = None,
    target_risk: float = 0.2,
    corruption: bool = False,
    readouts: bool = False,
    seed: int = 0,
    progress: bool = True,
    quiet: bool = False,
    console: Console | None = None,
) -> EvaluationReport:
    """
    Measures a model on text, prints the tables, and writes the report.

    Args:
        model, tokenizer: Loaded; `name` is where from.
        data, validation, ood: Text sources, see [`source_of`].
        output: The folder to write to.
        baselines: Whether to compare with the model's mean pass, temperatures and MC dropout.
        ensemble, compared: See [`baselines_of`]; they imply `baselines`.
        samples: Posterior samples; 0 is the mean pass.
        length: Tokens of a sequence.
        max_sequences: Sequences that are read of each text.
        target_risk, corruption, readouts, seed: As in [`evaluate_model`].
        quiet: Prints no tables.

    Raises:
        ValueError: for text that is too short, overlapping validation data, and whatever else cannot be.
    """
    console = console or Console()
    datasets.disable_progress_bars()
    # The report says it, for each contender.
    logging.getLogger("hf_variational.evaluation.selective_policy").setLevel(logging.ERROR)
    prefix = tuple(text_prefix(tokenizer))
    settings = EvaluationSettings(batch_size=batch_size, prefix=prefix, target_risk=target_risk)
    rows = read_rows(data, tokenizer, length, max_sequences, "--data")
    held = None if validation is None else read_rows(validation, tokenizer, length, max_sequences, "--validation")
    longest = max(settings.window_lengths) + len(prefix)
    others = {
        text: read_rows(source, tokenizer, longest, settings.max_windows, f"--ood {text}", shortest=len(prefix) + 2)
        for text, source in (ood or {}).items()
    }
    contenders, notes = None, []
    if baselines or ensemble or compared:
        contenders, notes = baselines_of(
            model, samples, ensemble=ensemble, compared=compared, batch_size=batch_size, seed=seed
        )
    sources = {
        "data": data,
        "validation": validation,
        **{f"ood {text}": source for text, source in (ood or {}).items()},
    }
    title = Path(name).name if Path(name).expanduser().is_dir() else name
    report = evaluate_model(
        model,
        rows,
        samples,
        name=title,
        validation=held,
        ood=others,
        baselines=contenders,
        cost=measure_cost,
        corrupt_with=tokenizer if corruption else None,
        readouts=readouts,
        facts={
            "data": {"name": source_name(data), "length": length},
            "sources": {key: source_name(source) for key, source in sources.items() if source is not None},
        },
        training=training_of(name),
        settings=settings,
        seed=seed,
        progress=progress,
    )
    report.notes.extend(notes)
    for table in report_tables(report) if not quiet else ():
        console.print(table, "")
    write_report(report, report.save(output))
    return report
