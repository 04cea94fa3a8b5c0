"""The plots of an inspection: distributions over units, a map of them, their states, attention heads, drift."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from ..diagnostics import Diagnostics, Drift, LayerDiagnostics
from ..diagnostics.drift import LABELS
from ..modeling.posterior import ACTIVE_KL
from .figures import figure_of
from .plots import COLOURS, GRID, INK, QUIET, plain

__all__ = ["drift_of_units", "histograms", "histograms_of", "map_of_heads", "map_of_units", "states"]

BLUE, ORANGE, LIGHT = COLOURS[0], COLOURS[1], COLOURS[5]
_BINS = 48
# Below this a KL or an energy is drawn as this.
_SMALLEST = 1e-12
# A histogram goes so far below the median, and has at its left edge what is lower.
_DEEP = 1e6
# A map's colours reach from the median over this to the median times this, where there are units so far off.
_REACH = 1e3
# Units of a row of the map, so that a wide layer is a block and not a line.
_ACROSS = 128
# Each quantity of a unit: its name in prose.
_QUANTITIES = (("kl", "KL, nats a token"), ("scale", "σ"), ("mean_energy", "mean energy μ²"))
_OF_HEADS = {
    "kl": "KL, nats a token",
    "scale": "σ",
    "concentration": "concentration",
    "entropy": "entropy, nats",
    "effective_keys": "effective keys",
}


def histograms(diagnostics: Diagnostics) -> Figure | None:
    """Units of each layer by KL, σ and mean energy, on logarithmic axes, one layer below the other."""
    return histograms_of({f"layer {number}": layer for number, layer in diagnostics.layers.items()})


def histograms_of(layers: Mapping[str, LayerDiagnostics]) -> Figure | None:
    """The same of layers by name, of one model or of several."""
    if not layers:
        return None
    relative = any(_is_heterogeneous(layer) for layer in layers.values())
    figure, axes = _side_by_side(3, 3.9, 1.3 + 0.42 * len(layers))
    for one, (name, label) in zip(axes, _QUANTITIES, strict=True):
        values = {title: getattr(layer, name).numpy() for title, layer in layers.items()}
        is_ratio = name == "mean_energy" and relative
        if is_ratio:
            label = "mean energy μ² / its target"
            bands = {title: layer.band for title, layer in layers.items() if layer.band is not None}
            values = {title: values[title] / band.targets.numpy() for title, band in bands.items()}
        edges = _edges(values.values())
        for place, (title, found) in enumerate(values.items()):
            counts, _ = np.histogram(_clipped(found, edges), edges)
            base = -place
            if name == "mean_energy" and layers[title].band is not None:
                _shade(one, layers[title], is_ratio, base)
            height = 0.85 * counts / max(counts.max(), 1)
            one.stairs(base + height, edges, baseline=base, fill=True, color=BLUE, alpha=0.35)
            one.stairs(base + height, edges, baseline=base, color=BLUE, linewidth=1.2)
        if name == "kl":
            one.axvline(ACTIVE_KL, color=ORANGE, linewidth=1.2, linestyle=(0, (4, 2)))
        one.set_xscale("log")
        one.set(xlim=(edges[0], edges[-1]), ylim=(-len(values) + 0.9, 1.0))
        one.grid(axis="y", visible=False)
        _log_ticks(one.xaxis, edges[0], edges[-1])
        _name_layers(one, list(values) if one is axes[0] else [""] * len(values))
        one.set_xlabel(label, color=INK)
    return figure


def map_of_units(diagnostics: Diagnostics) -> Figure | None:
    """Every unit as a cell, coloured by KL, σ and mean energy; those in trouble are marked."""
    layers = diagnostics.layers
    if not layers:
        return None
    across = min(_ACROSS, max(layer.units for layer in layers.values()))
    rows = {number: math.ceil(layer.units / across) for number, layer in layers.items()}
    total = sum(rows.values()) + len(rows) - 1
    figure, axes = _side_by_side(3, 3.9, min(14.0, 1.3 + max(0.26 * total if total < 20 else 0.07 * total, 0.5)))
    for one, (name, label) in zip(axes, _QUANTITIES, strict=True):
        image = np.full((total, across), np.nan)
        starts, top = {}, 0
        for number, layer in layers.items():
            block = np.full(rows[number] * across, np.nan)
            block[: layer.units] = np.maximum(getattr(layer, name).numpy(), _SMALLEST)
            image[top : top + rows[number]] = block.reshape(-1, across)
            starts[number] = top
            top += rows[number] + 1  # a gap between layers
        _draw_map(figure, one, image, label)
        for kind, marker in (("dead", "x"), ("exploding", "^")):
            places = [
                (unit % across, starts[number] + unit // across)
                for number, layer in layers.items()
                for unit in getattr(layer, kind).nonzero().flatten().tolist()
            ]
            if 0 < len(places) <= 400:
                one.scatter(*zip(*places, strict=True), s=16, marker=marker, color=ORANGE, linewidth=1.0, label=kind)
        one.set_yticks([starts[number] + (rows[number] - 1) / 2 for number in layers])
        one.set_yticklabels([f"layer {number}" if one is axes[0] else "" for number in layers])
        one.set_xlabel(f"unit (modulo {across})" if max(rows.values()) > 1 else "unit", color=INK)
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9, labelcolor=INK)
    return figure


def states(diagnostics: Diagnostics) -> Figure | None:
    """Of each layer the shares of dead and exploding units, and of units under, inside and over the band."""
    layers = diagnostics.layers
    if not layers:
        return None
    banded = {number: layer for number, layer in layers.items() if layer.band is not None}
    figure, axes = _side_by_side(2 if banded else 1, 5.6, 1.2 + 0.34 * len(layers))
    shares = {}
    for number, layer in layers.items():
        neither = ~layer.dead & ~layer.exploding
        shares[number] = [part.float().mean() for part in (layer.dead, neither, layer.exploding)]
    _stack(axes[0], shares, ("dead", "neither", "exploding"))
    if banded:
        _stack(
            axes[1], {number: layer.shares for number, layer in banded.items()}, ("under the band", "inside", "over")
        )
    return figure


def map_of_heads(diagnostics: Diagnostics) -> Figure | None:
    """Every head of variational attention as a cell."""
    layers = diagnostics.heads
    if not layers:
        return None
    names = [name for name in _OF_HEADS if any(name in layer.values for layer in layers.values())]
    across = max(layer.heads for layer in layers.values())
    figure, axes = _side_by_side(len(names), 3.0, 1.5 + 0.3 * len(layers))
    for one, name in zip(axes, names, strict=True):
        image = np.full((len(layers), across), np.nan)
        for row, layer in enumerate(layers.values()):
            if name in layer.values:
                image[row, : layer.heads] = np.maximum(layer.values[name].numpy(), _SMALLEST)
        _draw_map(figure, one, image, _OF_HEADS[name])
        _name_layers(one, _titles(layers, one is axes[0]), step=1)
        one.set_xlabel("head", color=INK)
    return figure


def drift_of_units(drift: Drift) -> Figure | None:
    """Of each layer the changes of its units: the median, half of them (thick) and nine in ten (thin)."""
    if not drift.layers:
        return None
    names = list(next(iter(drift.layers.values())).changes)
    figure, axes = _side_by_side(len(names), 3.9, 1.3 + 0.3 * len(drift.layers))
    for one, name in zip(axes, names, strict=True):
        one.axvline(0, color=QUIET, linewidth=1)
        for place, layer in enumerate(drift.layers.values()):
            found = layer.summary()[name]
            one.plot([found["q05"], found["q95"]], [-place] * 2, color=BLUE, linewidth=1.2)
            one.plot([found["q25"], found["q75"]], [-place] * 2, color=BLUE, linewidth=5, alpha=0.55)
            one.plot(found["q50"], -place, color=BLUE, marker="o", markersize=5, markerfacecolor="white")
        one.set_ylim(-len(drift.layers) + 0.5, 0.5)
        one.grid(axis="y", visible=False)
        one.locator_params(axis="x", nbins=5)
        _name_layers(one, _titles(drift.layers, one is axes[0]))
        one.set_xlabel(LABELS[name], color=INK)
    return figure


def _side_by_side(panels: int, width: float, height: float) -> tuple[Figure, list]:
    figure = figure_of(width * panels, min(height, 14.0))
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for one in axes:
        plain(one)
    return figure, axes


def _titles(numbers: Iterable[int], is_first: bool = True) -> list[str]:
    """What layers are called; nothing in the panels beside the first."""
    return [f"layer {number}" if is_first else "" for number in numbers]


def _name_layers(axes, titles: Sequence[str], step: int = -1) -> None:
    axes.set_yticks([step * place for place in range(len(titles))])
    axes.set_yticklabels(titles)


def _draw_map(figure: Figure, axes, image: np.ndarray, label: str) -> None:
    finite = image[np.isfinite(image)]
    low, middle, high = np.quantile(finite, (0, 0.5, 1)) if len(finite) else (0.5, 1.0, 2.0)
    # A dead or an exploding unit is at the end of the scale and does not stretch it.
    low, high = max(low, middle / _REACH), min(high, middle * _REACH)
    low, high = (low, high) if high / low > 1.05 else (middle / 2, middle * 2)
    drawn = axes.imshow(image, aspect="auto", cmap="cividis", norm=LogNorm(low, high), interpolation="nearest")
    axes.grid(visible=False)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    bar = figure.colorbar(drawn, ax=axes, location="top", aspect=30, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=INK, labelsize=9, length=2)
    _log_ticks(bar.ax.xaxis, low, high)
    bar.set_label(label, color=INK)


def _log_ticks(axis, low: float, high: float) -> None:
    """Ticks at powers of ten, and between them where there are few."""
    decades = math.log10(high / low)
    if decades < 2.5:
        subs = (1, 2, 5) if decades > 0.7 else (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)
        axis.set_major_locator(LogLocator(subs=subs))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        axis.set_major_locator(LogLocator(numticks=7))
    axis.set_minor_locator(NullLocator())


def _stack(axes, shares: dict[int, Sequence], names: tuple[str, str, str]) -> None:
    """Bars of three shares: too little, fine, too much."""
    for place, found in enumerate(shares.values()):
        left = 0.0
        for share, colour, name in zip(map(float, found), (LIGHT, GRID, ORANGE), names, strict=True):
            axes.barh(-place, share, left=left, height=0.7, color=colour, label=name if place == 0 else None)
            if share >= 0.08:
                # Black on each of the three reads in the dark too; the middle one changes with the page.
                ink = INK if colour == GRID else "#000000"
                text = f"{100 * share:.0f} %"
                axes.text(left + share / 2, -place, text, ha="center", va="center", fontsize=8, color=ink)
            left += share
    axes.set(xlim=(0, 1), ylim=(-len(shares) + 0.4, 0.6))
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.grid(visible=False)
    _name_layers(axes, _titles(shares))
    axes.set_xlabel("units", color=INK)
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 0.98), ncols=3, frameon=False, fontsize=9, labelcolor=INK)


def _edges(values) -> np.ndarray:
    """Edges of bins, even in logarithm, over all the values."""
    found = np.concatenate([np.zeros(0), *(one[np.isfinite(one)] for one in values)])
    low, middle, high = np.quantile(found, (0, 0.5, 1)) if len(found) else (1.0, 1.0, 1.0)
    low, high = max(low, middle / _DEEP, _SMALLEST), max(high, _SMALLEST)
    if high / low < 1.5:  # so that a spike is a spike
        low, high = low / 3, high * 3
    return np.geomspace(low, high * 1.0001, _BINS + 1)


def _clipped(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    return np.clip(values[np.isfinite(values)], edges[0], edges[-1])


def _is_heterogeneous(layer: LayerDiagnostics) -> bool:
    return layer.band is not None and float(layer.band.targets.min()) < float(layer.band.targets.max())


def _shade(axes, layer: LayerDiagnostics, is_ratio: bool, base: float) -> None:
    """The band behind a layer's histogram."""
    band = layer.band
    low, high = (band.low_factor, band.high_factor) if is_ratio else (float(band.low[0]), float(band.high[0]))
    axes.fill_betweenx([base, base + 0.9], max(low, _SMALLEST), high, color=COLOURS[4], alpha=0.22, linewidth=0)
