"""Training curves and reliability diagrams as PNG files, drawn without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

__all__ = [
    "COLOURS",
    "GRID",
    "INK",
    "QUIET",
    "Curve",
    "Reliability",
    "draw_curves",
    "draw_reliability",
    "plain",
    "training_and_calibration",
]

# Of Okabe and Ito (2008), told apart by the colour-blind too; without the black and the yellow, which a dark or a
# white page swallows.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
FEWEST = 10  # tokens of a bin whose accuracy says anything
INK, QUIET, GRID = "#2a2c33", "#8d9099", "#dcdcd8"


@dataclass(frozen=True)
class Curve:
    """NLL over training steps: of the training batches, and of held-out text where it was evaluated."""

    label: str
    steps: Sequence[float]
    nll: Sequence[float]
    eval_steps: Sequence[float] = field(default_factory=tuple)
    eval_nll: Sequence[float] = field(default_factory=tuple)


@dataclass(frozen=True)
class Reliability:
    """Mean confidence, accuracy and number of tokens of each bin of the maximum probability."""

    label: str
    confidence: Sequence[float]
    accuracy: Sequence[float]
    count: Sequence[float]
    error: float | None = None


def smoothed(values: Sequence[float], window: int) -> np.ndarray:
    """Mean over a centred window, narrower at both ends, so that nothing is invented beyond them."""
    values = np.asarray(values, dtype=float)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    positions = np.arange(len(values))
    reach = np.minimum(np.minimum(positions, len(values) - 1 - positions), window // 2)
    return (sums[positions + reach + 1] - sums[positions - reach]) / (2 * reach + 1)


def plain(axes) -> None:
    """Axes in the style of every picture."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GRID)
    axes.tick_params(colors=INK, labelsize=9, length=0)
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)


def draw_curves(axes, curves: Sequence[Curve]) -> None:
    """Training curves; the held-out text's dashed."""
    for colour, curve in zip(COLOURS, curves, strict=False):
        steps, nll = np.asarray(curve.steps), np.asarray(curve.nll, dtype=float)
        if len(steps) >= 20:
            axes.plot(steps, nll, color=colour, linewidth=0.8, alpha=0.25)
            nll = smoothed(nll, max(3, len(nll) // 15))
        axes.plot(steps, nll, color=colour, linewidth=1.8, label=f"{curve.label}, training")
        if len(curve.eval_steps):
            axes.plot(
                curve.eval_steps,
                curve.eval_nll,
                color=colour,
                linewidth=1.0,
                linestyle=(0, (4, 2)),
                marker="o",
                markersize=4.5,
                markerfacecolor="white",
                label=f"{curve.label}, held out",
            )
    axes.set_title("Training", loc="left", fontsize=11, color=INK, fontweight="bold")
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel("NLL, nats a token", color=INK)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)


def draw_reliability(axes, counts, diagrams: Sequence[Reliability], title: str) -> None:
    """A reliability diagram on `axes`, and how many tokens each bin has on `counts`."""
    axes.plot([0, 1], [0, 1], color=QUIET, linewidth=1, linestyle=(0, (2, 3)))
    width = 1.0 / max(len(d.count) for d in diagrams)
    for index, (colour, diagram) in enumerate(zip(COLOURS, diagrams, strict=False)):
        number = np.asarray(diagram.count, dtype=float)
        filled = number >= FEWEST
        label = diagram.label if diagram.error is None else f"{diagram.label}, ECE {diagram.error:.3f}"
        axes.plot(
            np.asarray(diagram.confidence, dtype=float)[filled],
            np.asarray(diagram.accuracy, dtype=float)[filled],
            color=colour,
            linewidth=1.6,
            marker="o",
            markersize=4,
            label=label or "_nolegend_",
        )
        left = np.arange(len(number)) * width + width * (0.1 + 0.8 * index / len(diagrams))
        share = number / max(number.sum(), 1.0)
        counts.bar(left, share, width=0.8 * width / len(diagrams), align="edge", color=colour, alpha=0.85)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.set_title(title, loc="left", fontsize=11, color=INK, fontweight="bold")
    axes.set_ylabel(f"accuracy (bins of {FEWEST} tokens or more)", color=INK)
    if any(diagram.label for diagram in diagrams):
        axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="best")
    axes.tick_params(labelbottom=False)
    counts.set(xlim=(0, 1))
    counts.set_xlabel("confidence (largest probability)", color=INK)
    counts.set_ylabel("tokens", color=INK)
    counts.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    counts.locator_params(axis="y", nbins=3)


def training_and_calibration(
    path: str | Path, curves: Sequence[Curve], reliability: Mapping[str, Sequence[Reliability]], title: str = ""
) -> Path:
    """One PNG: the training curves, and a reliability diagram for each text of `reliability`."""
    panels = 1 + len(reliability)
    figure = Figure(figsize=(5.2 * panels, 4.6), dpi=144, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, panels, height_ratios=(4, 1), hspace=0.04)
    training = figure.add_subplot(grid[:, 0])
    plain(training)
    draw_curves(training, curves)
    for column, (name, diagrams) in enumerate(reliability.items(), start=1):
        axes = figure.add_subplot(grid[0, column])
        counts = figure.add_subplot(grid[1, column])
        plain(axes)
        plain(counts)
        draw_reliability(axes, counts, diagrams, name)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=INK)
    figure.savefig(path)
    return Path(path)
