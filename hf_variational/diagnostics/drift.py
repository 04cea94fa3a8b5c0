"""What has changed in the units between two checkpoints, or between two data sets."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from scipy import stats
from torch import Tensor

from .diagnostics import Diagnostics
from .layers import HeadDiagnostics, LayerDiagnostics, numbers_of
from .text import columns_of, shown

# Of the changes of a layer's units.
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
# A mean energy can be 0, and has no logarithm then.
_SMALLEST = 1e-12
# The KL can be 0 and is charged as it is: its change is a difference. The others are positive and change by factors.
UNIT_QUANTITIES = {"kl": "kl", "scale": "log_scale", "mean_energy": "log_mean_energy"}
HEAD_QUANTITIES = {
    "kl": "kl",
    "scale": "log_scale",
    "concentration": "log_concentration",
    "entropy": "entropy",
}
LABELS = {
    "kl": "change of KL, nats",
    "log_scale": "change of log σ",
    "log_mean_energy": "change of log μ²",
    "log_concentration": "change of log concentration",
    "entropy": "change of entropy, nats",
}


class Mover(NamedTuple):
    """A unit (or head) that has changed much: where it is, its value before and after, and the change."""

    layer: int
    unit: int
    before: float
    after: float
    change: float


@dataclass(frozen=True)
class LayerDrift:
    """The changes in one layer.

    Attributes:
        changes: by name, after minus before, each [units] or [heads]: of units `kl` (nats), `log_scale` and
            `log_mean_energy`; of heads `kl`, `log_scale` or `log_concentration`, and `entropy` (nats). What is below
            1e-12 counts as 1e-12 in a logarithm.
        rank_correlation: by the same names, Spearman's between the values before and after over the units (or heads);
            NaN where all are alike.
    """

    changes: dict[str, Tensor]
    rank_correlation: dict[str, float]

    def summary(self) -> dict[str, dict[str, float]]:
        """By name: `mean`, the quantiles `q05`, `q25`, `q50`, `q75`, `q95` of the changes, and `rank_correlation`."""
        return {
            name: {
                "mean": float(change.mean()),
                **{f"q{100 * q:02.0f}": float(change.double().quantile(q)) for q in QUANTILES},
                "rank_correlation": self.rank_correlation[name],
            }
            for name, change in self.changes.items()
        }

    def to_dict(self) -> dict:
        """Plain values; a number that is not finite is `None`."""
        correlation = {name: one if math.isfinite(one) else None for name, one in self.rank_correlation.items()}
        changes = {name: numbers_of(change) for name, change in self.changes.items()}
        return {"changes": changes, "rank_correlation": correlation}


@dataclass(frozen=True)
class Drift:
    """What has changed from one [`Diagnostics`] to another.

    Attributes:
        before, after: the two.
        layers, heads: layer number to [`LayerDrift`], of the units and of the attention heads.
    """

    before: Diagnostics
    after: Diagnostics
    layers: dict[int, LayerDrift]
    heads: dict[int, LayerDrift]

    def movers(self, quantity: str = "log_mean_energy", count: int = 10) -> list[Mover]:
        """The units that have changed most, either way, over all layers.

        Args:
            quantity: `"kl"`, `"log_scale"` or `"log_mean_energy"`.
            count: how many, at most.

        Raises:
            ValueError: for another quantity.
        """
        stored = {changed: name for name, changed in UNIT_QUANTITIES.items()}
        if quantity not in stored:
            raise ValueError(f"quantity={quantity!r} is unknown; choose one of {', '.join(map(repr, stored))}.")
        found = []
        for number, layer in self.layers.items():
            change = layer.changes[quantity]
            values = [getattr(side.layers[number], stored[quantity]) for side in (self.before, self.after)]
            for unit in change.abs().nan_to_num(posinf=math.inf).topk(min(count, len(change))).indices.tolist():
                numbers = (float(values[0][unit]), float(values[1][unit]), float(change[unit]))
                found.append(Mover(number, unit, *numbers))
        # What has not moved at all is no mover.
        moved = [mover for mover in found if mover.change != 0]
        return sorted(moved, key=lambda mover: -abs(mover.change))[:count]

    def table(self) -> str:
        """The changes of each layer as text: mean, quantiles and rank correlation."""
        parts = []
        for found, kind in ((self.layers, ""), (self.heads, ", heads")):
            names = list(dict.fromkeys(name for layer in found.values() for name in layer.changes))
            for name in names:
                summaries = {number: layer.summary()[name] for number, layer in found.items() if name in layer.changes}
                columns = list(next(iter(summaries.values())))
                header = [LABELS[name] + kind, *(column.replace("_", " ") for column in columns)]
                rows = [
                    [f"layer {number}", *(shown(summary[column]) for column in columns)]
                    for number, summary in summaries.items()
                ]
                parts.append(columns_of([header, *rows]))
        return "\n\n".join(parts)

    def to_dict(self) -> dict:
        """Plain values: the changes of every unit and head, and what the two sides were."""
        facts = ("model", "data", "sequences", "tokens", "num_posterior_samples", "seed")
        return {
            "before": {name: getattr(self.before, name) for name in facts},
            "after": {name: getattr(self.after, name) for name in facts},
            "layers": {str(number): layer.to_dict() for number, layer in self.layers.items()},
            "heads": {str(number): layer.to_dict() for number, layer in self.heads.items()},
        }


def drift(before: Diagnostics, after: Diagnostics) -> Drift:
    """The changes of every unit and head: between two checkpoints on one data set, or of a model between two.

    Raises:
        ValueError: if the two have not the same layers, units and heads, or posterior samples.
    """
    if before.num_posterior_samples != after.num_posterior_samples:
        raise ValueError(
            f"One side has num_posterior_samples={before.num_posterior_samples} and the other "
            f"{after.num_posterior_samples}: the noise of the layers below is part of what a layer does, so diagnose "
            "both with the same number."
        )
    _check_same("variational neurons", *({n: one.units for n, one in side.layers.items()} for side in (before, after)))
    _check_same(
        "variational attention", *({n: one.heads for n, one in side.heads.items()} for side in (before, after))
    )
    return Drift(
        before,
        after,
        {number: _of_units(layer, after.layers[number]) for number, layer in before.layers.items()},
        {number: _of_heads(layer, after.heads[number]) for number, layer in before.heads.items()},
    )


def _check_same(what: str, first: dict[int, int], second: dict[int, int]) -> None:
    if first != second:
        raise ValueError(
            f"The two have not the same {what}: layers with their sizes are {first or 'none'} and {second or 'none'}. "
            "Drift is between states of one architecture."
        )


def _of_units(before: LayerDiagnostics, after: LayerDiagnostics) -> LayerDrift:
    pairs = {name: (getattr(before, name), getattr(after, name)) for name in UNIT_QUANTITIES}
    return _drift(pairs, UNIT_QUANTITIES)


def _of_heads(before: HeadDiagnostics, after: HeadDiagnostics) -> LayerDrift:
    names = [name for name in HEAD_QUANTITIES if name in before.values and name in after.values]
    return _drift({name: (before.values[name], after.values[name]) for name in names}, HEAD_QUANTITIES)


def _drift(pairs: dict[str, tuple[Tensor, Tensor]], names: dict[str, str]) -> LayerDrift:
    changes, correlations = {}, {}
    for name, (first, second) in pairs.items():
        changed = names[name]
        if changed.startswith("log_"):
            changes[changed] = second.clamp(min=_SMALLEST).log() - first.clamp(min=_SMALLEST).log()
        else:
            changes[changed] = second - first
        correlations[changed] = _rank_correlation(first, second)
    return LayerDrift(changes, correlations)


def _rank_correlation(first: Tensor, second: Tensor) -> float:
    if len(first) < 2 or bool((first == first[0]).all()) or bool((second == second[0]).all()):
        return math.nan
    return float(stats.spearmanr(first.numpy(), second.numpy()).statistic)
