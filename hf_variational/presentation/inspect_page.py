"""An inspection as a page that needs no network: tables and plots of diagnostics, and of their drift."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy
import torch
import transformers

from ..diagnostics import Diagnostics, Drift
from ..diagnostics.diagnostics import COLUMNS, HEAD_COLUMNS, SHARES, listed
from ..diagnostics.drift import LABELS, UNIT_QUANTITIES
from ..diagnostics.text import shown
from ..files import write_whole
from ..version import __version__
from .figures import svg_of
from .html import template_environment
from .inspect_plots import drift_of_units, histograms, map_of_heads, map_of_units, states
from .report_tables import Cell, ReportTable

__all__ = ["render_inspection", "write_inspection"]

_TROUBLE = (
    "A dead unit's posterior is its prior, whatever the input is: its KL is at most 1e-4 nats a token (and under a "
    "centered prior its mean is 0 too). An exploding unit has a mean energy above 100 times its band's target, or "
    "without a band 100 times the median of its layer's active units; or its σ is within 10 % of its ceiling; or a "
    "number of it is not finite."
)
_FIGURES = (
    (
        "histograms",
        "Distributions over units",
        "Each layer's units by KL, σ and mean energy. The dashed line is 1e-4 nats, above which a unit is active; the "
        "shaded ranges are the band. What is more than a factor of a million below the median is at the left edge.",
        histograms,
    ),
    (
        "map",
        "Map of the units",
        "A cell is a unit; colours stay within a factor of 1000 of the median. Dead units are crossed out and "
        "exploding ones have a triangle, where there are at most 400.",
        map_of_units,
    ),
    ("states", "Shares", "Shares of the units of each layer.", states),
    ("heads", "Attention heads", "A cell is a head of variational attention.", map_of_heads),
)


def render_inspection(diagnostics: Diagnostics, drift: Drift | None = None) -> str:
    """The page as a string, with the plots inside it."""
    sections = [
        _section("Layers", _layers(diagnostics)),
        _section("Units in trouble", _troubled(diagnostics)),
        *(_section(heading, [], name, text, draw(diagnostics)) for name, heading, text, draw in _FIGURES),
    ]
    if drift is not None:
        text = (
            "Changes from before to after: of every layer the median over its units (circle), half of them (thick "
            "line) and nine in ten (thin line)."
        )
        sections.append(_section("Drift", _drifts(drift), "drift", text, drift_of_units(drift)))
    return (
        template_environment()
        .get_template("inspect.html.j2")
        .render(
            title=f"Inside {diagnostics.model}",
            facts=_facts(diagnostics),
            notes=_notes(drift),
            sections=[one for one in sections if one["picture"] or one["tables"]],
            configuration=json.dumps(_configuration(diagnostics, drift), indent=1, ensure_ascii=False),
            versions={
                "hf-variational": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "numpy": numpy.__version__,
            },
        )
    )


def write_inspection(path: str | Path, diagnostics: Diagnostics, drift: Drift | None = None) -> Path:
    """Writes the page, whole or not at all."""
    return write_whole(path, render_inspection(diagnostics, drift))


def _section(heading: str, tables: list[ReportTable], name: str = "", text: str = "", figure=None) -> dict:
    picture = None if figure is None else svg_of(figure, name)
    return {"heading": heading, "text": text, "picture": picture, "tables": tables}


def _facts(diagnostics: Diagnostics) -> dict[str, object]:
    samples = diagnostics.num_posterior_samples
    return {
        "data": f"{diagnostics.data}, {diagnostics.sequences:,} sequences",
        "tokens that carry KL": f"{diagnostics.tokens:,}",
        "posterior samples": samples if samples else "0 (the mean pass)",
        "β": f"{diagnostics.kl_weight:g}",
        "seed": diagnostics.seed,
    }


def _notes(drift: Drift | None) -> list[str]:
    if drift is None:
        return []
    sides = (drift.before, drift.after)
    before, after = (f"{one.model} on {one.data} ({one.tokens:,} tokens, seed {one.seed})" for one in sides)
    return [f"Drift is from {before} to {after}. Everything else is of the latter."]


def _configuration(diagnostics: Diagnostics, drift: Drift | None) -> dict:
    facts = ("model", "data", "num_posterior_samples", "seed", "sequences", "tokens", "kl_weight")
    found = {name: getattr(diagnostics, name) for name in facts}
    bands = {number: layer.band for number, layer in diagnostics.layers.items() if layer.band is not None}
    found["band"] = {
        f"layer {number}": {
            "targets": [float(f"{edge:.6g}") for edge in (band.targets.min(), band.targets.max())],
            "low_factor": band.low_factor,
            "high_factor": band.high_factor,
        }
        for number, band in bands.items()
    } or None
    if drift is not None:
        found["before"] = {name: getattr(drift.before, name) for name in facts}
    return found


def _table(summaries: Mapping[int, Mapping], columns: Mapping[str, str], title: str, note: str) -> ReportTable:
    names = [name for name in columns if any(name in summary for summary in summaries.values())]
    rows = [
        (f"layer {number}", [Cell(shown(summary.get(name), name in SHARES)) for name in names])
        for number, summary in summaries.items()
    ]
    return ReportTable(title, ["", *(columns[name] for name in names)], rows, note)


def _layers(diagnostics: Diagnostics) -> list[ReportTable]:
    tables = []
    if diagnostics.layers:
        note = (
            "KL in nats a token, summed over units; the effective KL is what the loss is charged for it. σ and mean "
            "μ² are means over units. Active is the share of units with a KL above 1e-4."
        )
        summaries = {number: layer.summary() for number, layer in diagnostics.layers.items()}
        tables.append(_table(summaries, COLUMNS, "Variational neurons", note))
    if diagnostics.heads:
        note = (
            "KL in nats a token, summed over heads; the rest are means over heads. Entropies are the weights', nats."
        )
        summaries = {number: layer.summary() for number, layer in diagnostics.heads.items()}
        tables.append(_table(summaries, HEAD_COLUMNS, "Variational attention", note))
    return tables


def _troubled(diagnostics: Diagnostics) -> list[ReportTable]:
    if not diagnostics.layers:
        return []
    named = {"dead": diagnostics.dead, "exploding": diagnostics.exploding}
    numbers = [number for number in diagnostics.layers if any(number in found for found in named.values())]
    rows = [
        (f"layer {number}", [Cell(listed(found[number]) if number in found else "–") for found in named.values()])
        for number in numbers
    ]
    if not rows:
        return [ReportTable("No unit is dead and none explodes.", [""], [], _TROUBLE)]
    return [ReportTable("By number", ["", *named], rows, _TROUBLE)]


def _drifts(drift: Drift) -> list[ReportTable]:
    tables = []
    for found, kind in ((drift.layers, ""), (drift.heads, ", attention heads")):
        names = list(dict.fromkeys(name for layer in found.values() for name in layer.changes))
        for name in names:
            summaries = {number: layer.summary()[name] for number, layer in found.items() if name in layer.changes}
            columns = {key: key.replace("_", " ") for key in next(iter(summaries.values()))}
            title = LABELS[name][:1].upper() + LABELS[name][1:] + kind
            tables.append(_table(summaries, columns, title, ""))
    for name in UNIT_QUANTITIES.values():
        movers = drift.movers(name)
        if movers:
            rows = [
                (f"layer {one.layer}, unit {one.unit}", [Cell(shown(value)) for value in one[2:]]) for one in movers
            ]
            stored = {"kl": "KL", "log_scale": "σ", "log_mean_energy": "mean μ²"}[name]
            header = ["", f"{stored} before", f"{stored} after", LABELS[name]]
            tables.append(ReportTable(f"Biggest movers: {stored}", header, rows))
    return tables
