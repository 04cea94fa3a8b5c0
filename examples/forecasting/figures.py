"""The figures of the experiments, from the file of finished runs."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from .experiments import HIGH, LOW, OCTAVES, REGIMES, STARTS, Run
from .tables import LEAST_SETTINGS, Finished, points, shares

COLOURS = {"off": "#8c8c8c", "projection": "#d1712b", "homeostasis": "#2b6cb0"}
NAMES = ("collapsed start", "usual start", "exploding start")


def _axes(columns: int, rows: int = 1, height: float = 3.0):
    figure = Figure(figsize=(3.4 * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for one in axes.flat:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _legend(axis) -> None:
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize=8)


def _start(start: float, regime: str) -> Run:
    return Run("ETTh1", objective="nll", steps=100, start=start, regime=regime)


def trajectories(finished: Finished) -> Figure:
    """The share of units inside the band, and the training NLL, over training, by regime and start."""
    figure, axes = _axes(len(STARTS), 2, 2.6)
    for column, (start, name) in enumerate(zip(STARTS, NAMES, strict=True)):
        for regime in REGIMES:
            for number, result in enumerate(finished.of(_start(start, regime))):
                label = regime if number == 0 else None
                steps = [look["step"] for look in result["energy"]]
                inside = [100 * shares(look, Run.target)[1] for look in result["energy"]]
                axes[0, column].plot(steps, inside, color=COLOURS[regime], alpha=0.8, label=label)
                log = [(entry["step"], entry["nll"]) for entry in result["log"]]
                axes[1, column].plot(*zip(*log, strict=True), color=COLOURS[regime], alpha=0.8)
        axes[0, column].set(title=f"{name}, μ² × {start**2:.3g}", ylim=(-3, 103))
        axes[1, column].set(xlabel="optimizer step")
    axes[0, 0].set_ylabel("units inside the band, %")
    axes[1, 0].set_ylabel("training NLL, nats a value")
    _legend(axes[0, 0])
    return figure


def energies(finished: Finished) -> Figure:
    """Where the units' mean energies are at the end, by regime and start, of one seed."""
    figure, axes = _axes(len(STARTS), 1, 2.8)
    centres = OCTAVES[:-1].numpy() + 0.125
    for column, (start, name) in enumerate(zip(STARTS, NAMES, strict=True)):
        axis = axes[0, column]
        for regime in REGIMES:
            runs = finished.of(_start(start, regime))
            if runs:
                counts = np.asarray(runs[0]["energy"][-1]["counts"])[1:-1]
                axis.step(centres, counts, where="mid", color=COLOURS[regime], label=regime)
        band = [np.log2(factor * Run.target) for factor in (LOW, HIGH)]
        axis.axvspan(*band, color="#2b6cb0", alpha=0.12, lw=0)
        axis.set(title=name, xlabel="log₂ E[μ²] (shaded: the band)", xlim=(-14, 10))
    axes[0, 0].set_ylabel("units")
    _legend(axes[0, -1])
    return figure


def scatter(finished: Finished) -> Figure:
    """The share of units out of the band against the test error, a point for each run."""
    families = {
        name: runs for name, runs in points(finished).items() if len({run.setting for run in runs}) >= LEAST_SETTINGS
    }
    figure, axes = _axes(max(1, len(families)))
    for axis, (name, runs) in zip(axes[0], families.items(), strict=False):
        for regime in REGIMES:
            of_regime = [run for run in runs if regime in run.setting.split()]
            chosen = [(100 * run.outside, 100 * np.expm1(run.error_in_seed)) for run in of_regime]
            if chosen:
                axis.scatter(*zip(*chosen, strict=True), s=18, color=COLOURS[regime], alpha=0.8, label=regime)
        axis.set(title=name, xlabel="units out of the band, %")
    axes[0, 0].set_ylabel("test MSE over its seed's mean, %")
    _legend(axes[0, 0])
    return figure


FIGURES = {"trajectories": trajectories, "energies": energies, "out_of_band": scatter}


def write_figures(results: dict[str, dict], out: Path, seeds: int = 3) -> None:
    """Each figure as a PNG of its name in the folder `out`."""
    for name, make in FIGURES.items():
        make(Finished(results, seeds)).savefig(out / f"{name}.png", dpi=130)
