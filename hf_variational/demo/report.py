"""What the demo prints, as tables and sentences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..presentation.measures import format_value
from .matched_training import LABELS, Trained
from .output import MODELS, PAGE, PICTURE, RESULTS
from .settings import DemoSettings
from .texts import DemoTexts

__all__ = ["files_table", "sizes_table", "summary", "texts_table"]


def _table(title: str, *columns: str, left: int = 1) -> tuple[Group, Table]:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right")
    return Group(Text(title, "bold"), table), table


def texts_table(texts: DemoTexts, blocks: dict[str, Any]) -> Group:
    group, table = _table("Text", "", "", "characters", "blocks", left=2)
    rows = (
        ("training", texts.name, texts.training, "training"),
        ("in domain", f"{texts.name}, held out", texts.held_out, "in_domain"),
        ("another kind", texts.other_name, texts.other, "another_kind"),
    )
    for label, name, text, key in rows:
        table.add_row(label, name, f"{len(text):,}", f"{len(blocks[key]):,}")
    return group


def sizes_table(trained: dict[str, Trained], settings: DemoSettings) -> Group:
    group, table = _table("Training", "", "parameters", "steps", "tokens", "seconds", "tokens/s")
    for name, result in trained.items():
        table.add_row(
            LABELS[name],
            f"{result.model.num_parameters():,}",
            f"{settings.steps:,}",
            f"{settings.tokens:,}",
            f"{result.seconds:.1f}",
            f"{settings.tokens / result.seconds:,.0f}",
        )
    return group


def summary(results: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """What the numbers say, in sentences: also where EVE is not better."""
    lines = []
    for text, label in (("in_domain", "In domain"), ("another_kind", "On the other kind of text")):
        eve, twin = results[text]["eve"]["samples"], results[text]["deterministic"]["mean_pass"]
        parts = []
        for metric, name in (("nll", "NLL"), ("expected_calibration_error", "ECE")):
            difference = eve[metric] - twin[metric]
            parts.append(f"{name} is {abs(difference):.4f} {'below' if difference < 0 else 'above'}")
        share = 100 * eve["mutual_information"] / eve["predictive_entropy"]
        lines.append(
            f"{label}, EVE's {' and its '.join(parts)} the deterministic model's; its mutual information is "
            f"{format_value(share)} % of its predictive entropy."
        )
    inside, outside = (results[text]["eve"]["samples"] for text in ("in_domain", "another_kind"))
    ratios = [
        f"{outside[name] / inside[name]:.2f} times for the {label}"
        for name, label in (("mutual_information", "mutual information"), ("predictive_entropy", "predictive entropy"))
        if inside[name] > 0
    ]
    lines.append(f"From held-out text to the other kind, EVE's uncertainty changes: {', '.join(ratios)}.")
    return lines


def files_table(output: Path) -> Table:
    table = Table.grid(padding=(0, 3))
    for name in MODELS:
        table.add_row(f"{output / name}/", "checkpoint, with its tokenizer, code and card")
    table.add_row(str(output / PAGE), "the generated text; each token's measures on hover")
    table.add_row(str(output / PICTURE), "training curves and reliability diagrams")
    table.add_row(str(output / RESULTS), "every number above")
    return table
