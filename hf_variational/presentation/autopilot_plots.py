"""The plots of a search for a recipe, one figure each, drawn of its numbers alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from ..autopilot.dimensions import Choices, Range
from ..autopilot.objective import CALIBRATION, COST, NLL, PARETO
from ..autopilot.outcome import SearchOutcome, TrialRow
from .figures import colour_of, grid_of, legend_beside, title_of
from .plots import INK, QUIET

__all__ = ["FIGURES"]

_AXES = {NLL: "NLL, nats a token", CALIBRATION: "expected calibration error", COST: "inference, FLOPs a token"}
# How a trial is drawn: marker, colour, size, filled.
_KINDS = {
    "pruned": ("o", QUIET, 18, False),
    "misses a gate": ("X", colour_of(1), 30, True),
    "to its end": ("o", colour_of(0), 30, True),
    "best": ("*", colour_of(2), 150, True),
}


def _kind(row: TrialRow, outcome: SearchOutcome) -> str:
    if outcome.best is not None and row.number == outcome.best.row.number:
        return "best"
    if row.state == "pruned":
        return "pruned"
    return "misses a gate" if row.missed else "to its end"


def _measured(outcome: SearchOutcome) -> list[TrialRow]:
    return [row for row in outcome.rows if row.metrics]


def _ceiling(values: Sequence[float]) -> float:
    """Where the picture ends, so that a few bad trials do not press all others into a line."""
    low, middle = min(values), statistics.median(values)
    return max(min(low + 3.0 * (middle - low), max(values)), low + 1e-6)


def _scatter(axes, outcome: SearchOutcome, place: Callable[[TrialRow], float], height=lambda row: row.nll) -> None:
    """A point for each trial that was measured; one above the picture's end is a triangle there."""
    rows = _measured(outcome)
    top = _ceiling([height(row) for row in rows])
    low = min(height(row) for row in rows)
    for kind, (marker, colour, size, filled) in _KINDS.items():
        for inside in (True, False):
            drawn = [row for row in rows if _kind(row, outcome) == kind and (height(row) <= top) == inside]
            if drawn:
                axes.scatter(
                    [place(row) for row in drawn],
                    [min(height(row), top) for row in drawn],
                    marker=marker if inside else "^",
                    s=size,
                    facecolors=colour if filled else "none",
                    edgecolors=colour,
                    linewidths=1.0,
                    label=kind if inside else f"{kind}, above the picture",
                    zorder=3,
                )
    margin = 0.06 * (top - low)
    axes.set_ylim(low - margin, top + margin)


def history(outcome: SearchOutcome) -> Figure | None:
    """NLL of the trials in their order, and the best so far."""
    rows = _measured(outcome)
    if not rows:
        return None
    figure, (axes,) = grid_of(1, 1, 8.4, 3.8)
    _scatter(axes, outcome, lambda row: row.number)
    passed = [row for row in rows if row.state == "complete" and not row.missed]
    if passed:
        best = [min(row.nll for row in passed[: place + 1]) for place in range(len(passed))]
        numbers = [row.number for row in passed]
        axes.step(numbers, best, where="post", color=INK, linewidth=1.0, label="best so far", zorder=2)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("trial", color=INK)
    axes.set_ylabel(_AXES[NLL], color=INK)
    legend_beside(figure, axes)
    return figure


def front(outcome: SearchOutcome) -> Figure | None:
    """Each pair of the objectives; the front numbered."""
    rows = [row for row in _measured(outcome) if row.state == "complete"]
    if outcome.objective != "pareto" or not rows:
        return None
    pairs = ((COST, NLL), (CALIBRATION, NLL), (COST, CALIBRATION))
    figure, panels = grid_of(3, 3, 4.2, 4.0)
    for axes, (across, up) in zip(panels, pairs, strict=True):
        groups = (
            ("dominated", [row for row in rows if row.number not in outcome.front and not row.missed], QUIET, "o"),
            ("misses a gate", [row for row in rows if row.missed], colour_of(1), "X"),
            ("on the front", [row for row in rows if row.number in outcome.front], colour_of(0), "o"),
        )
        for label, drawn, colour, marker in groups:
            if drawn:
                points = [[row.metrics[name] for row in drawn] for name in (across, up)]
                axes.scatter(*points, s=34, color=colour, marker=marker, label=label, linewidths=0, zorder=3)
        for row in groups[-1][1]:
            axes.annotate(
                f"{row.number}",
                (row.metrics[across], row.metrics[up]),
                xytext=(4, 4),
                textcoords="offset points",
                fontsize=8,
                color=INK,
            )
        axes.margins(0.12)
        axes.locator_params(axis="x", nbins=5)
        if across == COST:
            axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
        axes.set_xlabel(_AXES[across], color=INK)
        axes.set_ylabel(_AXES[up], color=INK)
    legend_beside(figure, panels[0])
    return figure


def halving(outcome: SearchOutcome) -> Figure | None:
    """NLL over the steps of every trial, which ends where it was pruned."""
    rows = [row for row in outcome.rows if len(row.curve) > 0]
    if outcome.objective == "pareto" or not any(row.state == "pruned" for row in rows):
        return None
    figure, (axes,) = grid_of(1, 1, 8.4, 3.8)
    last = max(row.curve[-1][0] for row in rows)
    factor, rung = outcome.space.halving.factor, outcome.facts["first_rung"]
    while rung < last:
        axes.axvline(rung, color=QUIET, linewidth=1.0, linestyle=(0, (2, 3)), zorder=1)
        rung *= factor
    named = set()
    for kind, (marker, colour, _, _) in _KINDS.items():
        for row in rows:
            if _kind(row, outcome) != kind:
                continue
            steps, nll = [point[0] for point in row.curve], [point[1] for point in row.curve]
            width = 2.2 if kind == "best" else 1.0
            label = "_nolegend_" if kind in named else kind
            axes.plot(steps, nll, color=colour, linewidth=width, alpha=0.9, label=label, zorder=2)
            axes.plot(steps[-1:], nll[-1:], color=colour, marker=marker, markersize=4, zorder=3)
            named.add(kind)
    everything = [point[1] for row in rows for point in row.curve]
    axes.set_ylim(top=_ceiling(everything))
    axes.set_xlabel("step (dotted: rungs)", color=INK)
    axes.set_ylabel(_AXES[NLL], color=INK)
    legend_beside(figure, axes)
    return figure


def importance(outcome: SearchOutcome) -> Figure | None:
    """Bars for each key, a panel for each objective."""
    if not outcome.importance:
        return None
    keys = [dimension.key for dimension in outcome.space.dimensions]
    shares = {metric: [found.get(key, 0.0) for key in keys] for metric, found in outcome.importance.items()}
    first = next(iter(shares.values()))
    order = sorted(range(len(keys)), key=lambda place: first[place])
    longest = max(map(len, keys))
    figure, panels = grid_of(
        len(shares), 3, 0.07 * longest + (6.0 if len(shares) == 1 else 3.2), 0.42 * len(keys) + 1.6
    )
    for axes, (metric, found) in zip(panels, shares.items(), strict=True):
        axes.barh([keys[place] for place in order], [found[place] for place in order], color=colour_of(0), height=0.6)
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        axes.set_xlabel(f"share of the variance of the {PARETO[metric]}", color=INK)
        axes.grid(axis="y", visible=False)
    for axes in panels[1:]:
        axes.tick_params(labelleft=False)
    return figure


def slices(outcome: SearchOutcome) -> Figure | None:
    """NLL over the values of each key."""
    rows = _measured(outcome)
    if not rows:
        return None
    dimensions = outcome.space.dimensions
    # the legend is beside the panels, however few there are
    figure, panels = grid_of(len(dimensions), 3, 3.6 if len(dimensions) > 1 else 6.4, 3.0)
    for place, (axes, dimension) in enumerate(zip(panels, dimensions, strict=True)):
        if isinstance(dimension, Choices):
            labels = [label if len(label) <= 14 else f"{label[:13]}…" for label in dimension.labels]
            where = {row.number: dimension.choices.index(row.values[dimension.key]) for row in rows}
            axes.set_xticks(range(len(labels)), labels, rotation=0 if sum(map(len, labels)) < 30 else 20)
            axes.set_xlim(-0.5, len(labels) - 0.5)
        else:
            where = {row.number: row.values[dimension.key] for row in rows}
            _scale(axes, dimension)
        _scatter(axes, outcome, lambda row, where=where: where[row.number])
        title_of(axes, dimension.key)
        if place % 3 == 0:
            axes.set_ylabel(_AXES[NLL], color=INK)
    axes = max(panels, key=lambda one: len(one.get_legend_handles_labels()[0]))
    legend_beside(figure, axes)
    return figure


def _scale(axes, dimension: Range) -> None:
    if dimension.log:
        axes.set_xscale("log")
    else:
        axes.locator_params(axis="x", nbins=5)


# File name, heading of the page, and what a reader has to know to read it.
FIGURES: tuple[tuple[str, str, str, Callable[[SearchOutcome], Figure | None]], ...] = (
    (
        "front",
        "The front",
        "Lower and further left is better. No trial on the front is worse than another in all three.",
        front,
    ),
    (
        "history",
        "The trials in their order",
        "A pruned trial's NLL is that of its last evaluation, at an earlier step than the others'.",
        history,
    ),
    (
        "halving",
        "Successive halving",
        "A trial goes on past a rung if its NLL is among the better ones there so far; one that misses a gate there "
        "is worse than all that pass.",
        halving,
    ),
    (
        "importance",
        "What matters",
        "The share of the variance that each key explains by itself (functional ANOVA over a forest), over the trials "
        "that were trained to their end.",
        importance,
    ),
    ("slices", "Where the trials are", "NLL over the values of each key; all other keys vary too.", slices),
)
