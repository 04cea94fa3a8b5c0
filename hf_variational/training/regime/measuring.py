"""Statistics of all units of a model in one vector: summed over passes and processes, weighted by tokens."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .rules import Limits
from .settings import BandSettings


class UnitMeans(NamedTuple):
    """Means over the tokens that carry KL, each [all units], the layers one after the other."""

    kl: Tensor
    scale: Tensor
    energy: Tensor


class Units:
    """
    Where the units of each layer are in a vector of all of them.

    Args:
        sizes: Layer number to its number of units.
    """

    def __init__(self, sizes: Mapping[int, int]):
        self.sizes = dict(sorted(sizes.items()))
        self.layers = list(self.sizes)
        self.total = sum(self.sizes.values())

    def split(self, values: Tensor) -> dict[int, Tensor]:
        """Layer number to its part of [all units]."""
        return dict(zip(self.layers, values.split(list(self.sizes.values())), strict=True))

    def spread(self, values: Tensor) -> Tensor:
        """Each layer's value for all its units: [layers] to [all units]."""
        parts = zip(values.unbind(), self.sizes.values(), strict=True)
        return torch.cat([value.expand(size) for value, size in parts])

    def limits(self, settings: BandSettings, device: torch.device) -> Limits:
        """The bands of all units, before any calibration."""
        bands = [settings.of(size, layer) for layer, size in self.sizes.items()]
        parts = ([getattr(band, name) for band in bands] for name in ("low", "high", "targets"))
        return Limits(*(torch.cat(part).to(device) for part in parts))

    def names(self, found: Tensor, most: int = 5) -> str:
        """The units that are marked in [all units], in words; waits for the device."""
        words = []
        for layer, marked in self.split(found).items():
            numbers = marked.nonzero().flatten().tolist()
            if numbers:
                more = f" and {len(numbers) - most} more" if len(numbers) > most else ""
                words.append(f"layer {layer}: {', '.join(map(str, numbers[:most]))}{more}")
        return "; ".join(words)


class UnitSums:
    """Sums over the tokens of several passes."""

    def __init__(self):
        self.units: Units | None = None
        self._sums: Tensor | None = None

    @torch.no_grad()
    def add(self, posteriors: Mapping) -> None:
        """Adds a pass's `{layer: PosteriorStatistics}`."""
        layers = dict(sorted(posteriors.items()))
        if self.units is None:
            self.units = Units({layer: len(one.kl_per_unit) for layer, one in layers.items()})
        parts = [
            one.tokens * getattr(one, name).float()
            for name in ("kl_per_unit", "scale", "mean_energy")
            for one in layers.values()
        ]
        vector = torch.cat([*parts, torch.stack([one.tokens for one in layers.values()])])
        self._sums = vector if self._sums is None else self._sums + vector

    def vector(self) -> Tensor:
        """All sums, [3 * all units + layers]: what processes add up."""
        return self._sums

    def means(self, vector: Tensor) -> UnitMeans:
        """The means, from a vector like `vector()`, of one process or of all."""
        total = self.units.total
        *sums, tokens = vector.split([total, total, total, len(self.units.layers)])
        tokens = self.units.spread(tokens.clamp(min=1))
        return UnitMeans(*(part / tokens for part in sums))
