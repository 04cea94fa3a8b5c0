"""The plots of an evaluation's report, one figure each, drawn of its numbers alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

from ..evaluation.report import EvaluationReport
from .figures import colour_of, figure_of, grid_of, legend_beside, title_of
from .measures import label_of
from .plots import COLOURS, GRID, INK, QUIET, Curve, Reliability, draw_curves, draw_reliability, plain

__all__ = ["FIGURES"]

# In the order of the names that a legend lists.
_STYLES = ("-", (0, (5, 2)), (0, (1, 1.5)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
# Of the token that came, but no better than its NLL.
_NOT_OF_TEXTS = ("token_variance", "brier")
_CORRUPTED = ("kl", "scale", "mean_energy", "mutual_information")


def reliability(report: EvaluationReport) -> Figure | None:
    """A reliability diagram with counts for each contender."""
    drawn = [(name, curves["reliability"]) for name, curves in report.curves.items() if "reliability" in curves]
    if not drawn:
        return None
    columns = min(3, len(drawn))
    rows = math.ceil(len(drawn) / columns)
    figure = figure_of(4.2 * columns, 4.6 * rows)
    grid = figure.add_gridspec(2 * rows, columns, height_ratios=(4, 1) * rows)
    for index, (name, curve) in enumerate(drawn):
        row, column = divmod(index, columns)
        axes = figure.add_subplot(grid[2 * row, column])
        counts = figure.add_subplot(grid[2 * row + 1, column])
        plain(axes)
        plain(counts)
        error = report.value(name, "quality", "expected_calibration_error")
        number = [value or 0 for value in curve["count"]]
        values = ([math.nan if v is None else v for v in curve[key]] for key in ("confidence", "accuracy"))
        draw_reliability(axes, counts, [Reliability("", *values, number)], f"{name}\nECE {error:.3f}")
        if column:
            axes.set_ylabel("")
            counts.set_ylabel("")
    return figure


def risk_coverage(report: EvaluationReport) -> Figure | None:
    """Risk against coverage of every score of the model, over tokens and over sequences."""
    curves = report.curves[report.model].get("risk_coverage")
    if not curves:
        return None
    figure, axes = grid_of(len(curves), 2, 5.2, 4.4)
    for one, (unit, found) in zip(axes, curves.items(), strict=True):
        for index, (name, risk) in enumerate(found["risk"].items()):
            if np.ptp(risk) < 1e-9:  # of a score that is the same everywhere
                continue
            style = _STYLES[index // len(COLOURS) % len(_STYLES)]
            colour, style = (INK, "-") if name == "combination" else (colour_of(index), style)
            one.plot(found["coverage"], risk, color=colour, linestyle=style, linewidth=1.6, label=label_of(name))
        one.plot(found["coverage"], found["oracle"], color=QUIET, linewidth=1.2, linestyle=(0, (2, 3)), label="oracle")
        one.set(xlim=(0, 1), ylim=(0, None))
        one.set_xlabel(f"coverage: share of the {unit}s that are kept", color=INK)
        one.set_ylabel("risk: share wrong of what is kept", color=INK)
        title_of(one, f"{report.model}, over {unit}s")
    legend_beside(figure, axes[0])
    return figure


def histograms(report: EvaluationReport) -> Figure | None:
    """Windows of the domain and of other texts by the mean of each measure."""
    found = report.curves[report.model].get("histograms") or {}
    measures = {name: one for name, one in (found.get("measures") or {}).items() if name not in _NOT_OF_TEXTS}
    if not measures:
        return None
    figure, axes = grid_of(len(measures), 4, 3.4, 2.9)
    for one, (name, histogram) in zip(axes, measures.items(), strict=True):
        edges = np.asarray(histogram["edges"])
        for index, (text, counts) in enumerate(histogram["counts"].items()):
            share = np.asarray(counts, dtype=float) / max(sum(counts), 1)
            if text == "":
                one.stairs(share, edges, fill=True, color=GRID, label="test data")
                one.stairs(share, edges, color=QUIET, linewidth=1.0)
            else:
                one.stairs(share, edges, color=colour_of(index - 1), linewidth=1.6, label=text)
        one.set(ylim=(0, None))
        one.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        one.locator_params(axis="both", nbins=4)
        title_of(one, label_of(name))
    figure.supxlabel(f"mean over a window of {found['length']} tokens, {report.model}", fontsize=10, color=INK)
    figure.supylabel("windows", fontsize=10, color=INK)
    legend_beside(figure, axes[0])
    return figure


def corruption(report: EvaluationReport) -> Figure | None:
    """The change of what the posteriors say against the change of the NLL, a point for each document and rate."""
    conditions = report.curves[report.model].get("corruption")
    if not conditions:
        return None
    kinds = list(dict.fromkeys(condition["kind"] for condition in conditions))
    names = [name for name in _CORRUPTED if name in conditions[0]["changes"] and _varies(conditions, name)]
    if not names:
        return None
    figure, axes = grid_of(len(kinds) * len(names), len(names), 3.6, 3.3)
    rates = list(dict.fromkeys(condition["rate"] for condition in conditions))
    for index, one in enumerate(axes):
        kind, name = kinds[index // len(names)], names[index % len(names)]
        for condition in conditions:
            if condition["kind"] == kind:
                place = rates.index(condition["rate"])
                one.scatter(
                    condition["changes"][name],
                    condition["changes"]["nll"],
                    s=14,
                    marker=_MARKERS[place],
                    color=colour_of(place),
                    alpha=0.6,
                    linewidth=0,
                    label=f"{100 * condition['rate']:g} % of the tokens",
                )
        rank = report.value(report.model, "corruption", "correlations", kind, name, "spearman")
        title_of(one, {"eos": "end-of-sequence tokens", "random": "random tokens"}.get(kind, kind))
        note = "" if rank is None else f"\nrank correlation {rank:.2f}"
        one.set_xlabel(f"change of {label_of(name)}{note}", color=INK)
        if index % len(names) == 0:
            one.set_ylabel("change of NLL, nats a token", color=INK)
        one.locator_params(axis="both", nbins=5)
    legend_beside(figure, axes[0])
    return figure


def _varies(conditions: list[dict], name: str) -> bool:
    return any(len(set(condition["changes"][name])) > 1 for condition in conditions)


def pareto(report: EvaluationReport) -> Figure | None:
    """Cost against quality of every contender: down and to the left is better."""
    cost = {name: report.value(name, "cost", "inference_flops_per_token") for name in report.contenders}
    named = [name for name, flops in cost.items() if flops]
    if len(named) < 2:
        return None
    figure, axes = grid_of(2, 2, 4.6, 4.2)
    rows = (("nll", "NLL, nats a token"), ("expected_calibration_error", "expected calibration error"))
    for one, (metric, label) in zip(axes, rows, strict=True):
        for index, name in enumerate(named):
            value = report.value(name, "quality", metric)
            interval = report.interval(name, "quality", metric)
            place = cost[name] * _beside(named[:index], cost, name)
            if interval:
                one.plot([place] * 2, interval, color=colour_of(index), linewidth=1.2, alpha=0.7)
            one.plot(
                place,
                value,
                color=colour_of(index),
                marker=_MARKERS[index % len(_MARKERS)],
                markersize=8,
                linestyle="",
                label=name,
            )
        one.set_xscale("log")
        one.margins(0.15)
        one.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        one.xaxis.set_major_formatter(EngFormatter(sep=" "))
        one.xaxis.set_minor_locator(NullLocator())
        one.set_xlabel("inference, FLOPs a token", color=INK)
        one.set_ylabel(label, color=INK)
    title_of(axes[0], "Cost and likelihood")
    title_of(axes[1], "Cost and calibration")
    legend_beside(figure, axes[0])
    return figure


def _beside(before: list[str], cost: dict[str, float], name: str) -> float:
    """A factor that sets contenders of the same cost beside each other."""
    return 1.04 ** sum(abs(math.log(cost[other] / cost[name])) < 0.01 for other in before)


def training(report: EvaluationReport) -> Figure | None:
    """Training curves of the contenders whose trainer's log is known; each model once."""
    curves = []
    for name, sections in report.contenders.items():
        known = sections.get("training") or {}
        if known.get("steps") and sections["temperature"] == 1.0:
            columns = ("steps", "nll", "eval_steps", "eval_nll")
            curves.append(Curve(name, *(known.get(key) or () for key in columns)))
    if not curves:
        return None
    figure, axes = grid_of(1, 1, 6.4, 4.2)
    draw_curves(axes[0], curves)
    return figure


# File name, heading of the page, and what a reader has to know to read it.
FIGURES: tuple[tuple[str, str, str, Callable[[EvaluationReport], Figure | None]], ...] = (
    (
        "reliability",
        "Calibration",
        "Of the predictions made with a confidence, the share that was right; on the dotted line the two agree. "
        "Below, how many tokens each bin has.",
        reliability,
    ),
    (
        "risk_coverage",
        "Answering only where it is certain enough",
        "The least certain are left out first. A score is worth something if its curve lies below the error rate at "
        "full coverage, and no order lies below the oracle's.",
        risk_coverage,
    ),
    (
        "histograms",
        "In and out of its domain",
        "Short windows of the test data (grey) and of other texts.",
        histograms,
    ),
    (
        "corruption",
        "Corrupted contexts",
        "Tokens of the context are replaced, and the targets stay. Each point is a document or sequence at one rate.",
        corruption,
    ),
    (
        "cost",
        "Cost and quality",
        "Lower and further left is better. The lines are 95 % intervals over the test data.",
        pareto,
    ),
    ("training", "Training", "As the trainer logged it; dashed on held-out text.", training),
)
