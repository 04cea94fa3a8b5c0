"""Coloured tokens and tables for the terminal, with rich."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rich.console import Group
from rich.panel import Panel
from rich.style import Style
from rich.table import Table
from rich.text import Text

from .measures import format_value, measure, scale_maximum
from .tokens import AnnotatedText, Token

__all__ = ["colour", "comparison_table", "legend", "panel", "token_table"]

# Dark to bright at even steps of lightness: rises on dark terminals, and carries its own text colour on light ones.
RAMP = ((32, 36, 48), (66, 40, 92), (122, 42, 106), (180, 58, 92), (224, 98, 66), (246, 152, 56), (250, 212, 96))

# Metrics as evaluation names them, with the label, whether less is better (None: neither), and how to print them.
METRICS = (
    ("nll", "NLL (nats a token)", True),
    ("perplexity", "perplexity", True),
    ("accuracy", "accuracy", False),
    ("expected_calibration_error", "ECE (15 bins)", True),
    ("cvar_nll", "NLL of the worst 5 %", True),
    ("wrong_token_auroc", "AUROC, wrong tokens", False),
    ("mutual_information", "mutual information", None),
    ("predictive_entropy", "predictive entropy", None),
    ("expected_entropy", "expected entropy", None),
    ("conditional_variance", "conditional variance", None),
    ("top1_flip_rate", "top-1 flip rate", None),
)

TABLED = ("mutual_information", "predictive_entropy", "expected_entropy", "top1_flip_rate")


def colour(share: float) -> Style:
    """The ramp at `share` of its range, with a text colour that stays readable on it."""
    place = min(max(share, 0.0), 1.0) * (len(RAMP) - 1)
    low = min(int(place), len(RAMP) - 2)
    rgb = [round(a + (b - a) * (place - low)) for a, b in zip(RAMP[low], RAMP[low + 1], strict=True)]
    linear = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in rgb))
    luminance = sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    # Where black and white have the same contrast, 4.6.
    text = "#000000" if luminance > 0.179 else "#ffffff"
    return Style(bgcolor="#{:02x}{:02x}{:02x}".format(*rgb), color=text)


def _printable(text: str) -> str:
    """Control characters would move the cursor; newlines and tabs are text."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def coloured_tokens(passage: AnnotatedText, name: str, maximum: float) -> Text:
    text = Text(overflow="fold").append(_printable(passage.prompt), "dim")
    for chunk in passage.chunks:
        value = chunk.value(name)
        style = Style() if math.isnan(value) else colour(value / maximum)
        shown = _printable(chunk.text)
        if chunk.special:
            text.append(shown, style + Style(italic=True))
            continue
        # A coloured newline paints the rest of the line: a mark carries the colour instead.
        for part in shown.replace("\n", "↵\n").splitlines(keepends=True):
            text.append(part.rstrip("\n"), style)
            if part.endswith("\n"):
                text.append("\n")
    return text


def legend(name: str, maximum: float, width: int = 24) -> Text:
    described = measure(name)
    text = Text(f"{described.label}  0 ")
    for step in range(width):
        text.append(" ", colour(step / (width - 1)))
    text.append(f" {format_value(maximum)}{' ' + described.unit if described.unit else ''}")
    text.append(f"   ({described.meaning})", "dim")
    return text


def token_table(
    tokens: Sequence[Token], texts: Sequence[str], name: str = "mutual_information", top: int = 5
) -> Table:
    """The tokens with the largest values: all there is where a terminal shows no colour."""
    order = sorted(range(len(tokens)), key=lambda i: -tokens[i].value(name))[:top]
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("token")
    for column in TABLED:
        table.add_column(measure(column).label, justify="right")
    for i in order:
        table.add_row(Text(repr(texts[i])), *(format_value(tokens[i].value(column)) for column in TABLED))
    return table


def panel(passage: AnnotatedText, name: str = "mutual_information", maximum: float | None = None) -> Panel:
    """A passage coloured by a measure, its legend and its most uncertain tokens."""
    if not passage.has_measures:
        text = Text().append(_printable(passage.prompt), "dim").append(_printable(passage.text))
        return Panel(text, title=passage.title or None, title_align="left", border_style="dim")
    maximum = maximum or scale_maximum(name, passage.values(name))
    described = measure(name)
    uncertain = [(t, chunk.text) for chunk in passage.chunks for t in chunk.tokens if not math.isnan(t.value(name))]
    share = passage.mean(name) / passage.mean("predictive_entropy") if passage.mean("predictive_entropy") else math.nan
    note = f"mean {described.label} {format_value(passage.mean(name))} {described.unit}".rstrip()
    if name == "mutual_information" and not math.isnan(share):
        note += f", {100 * share:.1f} % of the predictive entropy"
    body = Group(
        coloured_tokens(passage, name, maximum),
        Text(),
        legend(name, maximum),
        Text(note, "dim"),
        Text(),
        token_table([t for t, _ in uncertain], [text for _, text in uncertain], name),
    )
    return Panel(body, title=passage.title or None, title_align="left", border_style="dim")


def comparison_table(columns: Mapping[str, Mapping[str, float] | None], title: str = "") -> Group:
    """Metrics down, models (or passes) across; the better value of a row is bold where there is a better one."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("")
    for header in columns:
        table.add_column(header, justify="right")
    for name, label, less_is_better in METRICS:
        values = [None if column is None else column.get(name) for column in columns.values()]
        known = [v for v in values if v is not None and not math.isnan(v)]
        if not known:
            continue
        best = None
        if less_is_better is not None and len(known) > 1:
            best = min(known) if less_is_better else max(known)
        # As printed: two numbers that read the same are not better and worse.
        cells = [
            Text(format_value(v), style="bold" if best is not None and format_value(v) == format_value(best) else "")
            for v in values
        ]
        table.add_row(label, *cells)
    # A title of the table's own would be broken at the table's width.
    return Group(Text(title, "bold"), table) if title else Group(table)
