"""The band: where the mean energy E[mu^2] of each unit should be (arXiv 2602.18250, arXiv 2603.13849)."""

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import NamedTuple

import torch
from torch import Tensor

ORDERS = ("sorted", "shuffled")


class BandShares(NamedTuple):
    """Shares of the units under, inside and over their band, 0-dim each; they add up to 1.

    An energy that is not a number is in none of them.
    """

    under: Tensor
    inside: Tensor
    over: Tensor

    @classmethod
    def of(cls, energy: Tensor, low: Tensor, high: Tensor) -> "BandShares":
        """Of units with these energies in bands from `low` to `high`, [units] each; waits for nothing."""
        parts = energy < low, (energy >= low) & (energy <= high), energy > high
        return cls(*(part.float().mean() for part in parts))


@dataclass(frozen=True)
class Band:
    """A range of mean energy for each unit of a layer, [low_factor * target, high_factor * target], ends included.

    Args:
        targets: E[mu^2] that each unit is meant to have, [units], positive.
        low_factor, high_factor: the ends of the range as multiples of the target, 0 <= low_factor < high_factor.

    Raises:
        ValueError: for a target that is not a positive finite number, and for low_factor >= high_factor.
    """

    targets: Tensor
    low_factor: float
    high_factor: float

    def __post_init__(self):
        _check_factors(self.low_factor, self.high_factor)
        if self.targets.ndim != 1 or not len(self.targets):
            raise ValueError(f"targets is a vector, one for each unit, got a tensor of shape {[*self.targets.shape]}.")
        wrong = ~(self.targets > 0) | self.targets.isinf()
        if bool(wrong.any()):
            unit = int(wrong.nonzero()[0])
            raise ValueError(
                f"The target of unit {unit} is {self.targets[unit].item():g}: a mean energy E[mu^2] is a positive "
                "finite number."
            )

    @classmethod
    def homogeneous(cls, target: float, units: int, low_factor: float, high_factor: float) -> "Band":
        """The same range for all units; raises as the class does."""
        check_band(target, low_factor, high_factor)
        return cls(torch.full((_units(units),), float(target)), low_factor, high_factor)

    @classmethod
    def heterogeneous(
        cls,
        target: float,
        units: int,
        low_factor: float,
        high_factor: float,
        spread: float,
        order: str = "sorted",
        seed: int = 0,
    ) -> "Band":
        """Targets equally spaced in logarithm over [target / spread, target * spread]: their geometric mean is target.

        Args:
            target: geometric mean of the targets.
            units: how many.
            low_factor, high_factor: as of the class.
            spread: at least 1; 1 is the homogeneous band.
            order: `"sorted"`, rising with the unit's number, or `"shuffled"`, a permutation that `seed` decides.
            seed: of the permutation.

        Raises:
            ValueError: as the class does, and for a spread below 1 or an order that is unknown.
        """
        check_band(target, low_factor, high_factor, spread, order)
        edge = math.log(spread)
        # in float64, so that the first and the last target are exact to float32
        steps = torch.linspace(-edge, edge, _units(units), dtype=torch.float64) if units > 1 else torch.zeros(1)
        targets = (math.log(target) + steps.double()).exp().float()
        if order == "shuffled":
            targets = targets[torch.randperm(units, generator=torch.Generator().manual_seed(seed))]
        return cls(targets, low_factor, high_factor)

    @property
    def units(self) -> int:
        """How many units the band is for."""
        return len(self.targets)

    @property
    def low(self) -> Tensor:
        """Lower end of each unit's range, [units]."""
        return self.targets * self.low_factor

    @property
    def high(self) -> Tensor:
        """Upper end of each unit's range, [units]."""
        return self.targets * self.high_factor

    def to(self, device: torch.device | str) -> "Band":
        """The same band with its targets on a device."""
        return Band(self.targets.to(device), self.low_factor, self.high_factor)

    def shares(self, energy: Tensor) -> BandShares:
        """The shares of units under, inside and over the band, for energies E[mu^2], [units]; waits for nothing."""
        self._check(energy)
        return BandShares.of(energy, self.low, self.high)

    def violation(self, energy: Tensor, relative: bool = False) -> Tensor:
        """How far each unit is outside, max(low - E, E - high, 0), [units].

        Args:
            energy: mean energy E[mu^2] of each unit, [units].
            relative: whether the distance is divided by the unit's target.
        """
        self._check(energy)
        distance = torch.maximum(self.low - energy, energy - self.high).clamp(min=0)
        return distance / self.targets if relative else distance

    def _check(self, energy: Tensor) -> None:
        if energy.shape[-1:] != self.targets.shape:
            raise ValueError(
                f"The band has {self.units} units, and energy has the shape {[*energy.shape]}: its last axis is that "
                "of the units."
            )


def check_band(
    target: float, low_factor: float, high_factor: float, spread: float = 1.0, order: str = "sorted"
) -> None:
    """Raises `ValueError` that names the value, unless a band can be made of these; see [`Band.heterogeneous`]."""
    if isinstance(target, bool) or not isinstance(target, Real) or not 0 < target < math.inf:
        raise ValueError(f"target={target!r}: a mean energy E[mu^2] is a positive finite number.")
    _check_factors(low_factor, high_factor)
    if isinstance(spread, bool) or not isinstance(spread, Real) or not 1 <= spread < math.inf:
        raise ValueError(
            f"spread={spread!r} must be at least 1: the targets lie in [target / spread, target * spread]."
        )
    if order not in ORDERS:
        raise ValueError(f"order={order!r} is unknown; choose one of {', '.join(map(repr, ORDERS))}.")


def _check_factors(low: float, high: float) -> None:
    for name, value in (("low_factor", low), ("high_factor", high)):
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value < math.inf:
            raise ValueError(f"{name}={value!r} must be a finite number of 0 or more: a multiple of the target.")
    if not low < high:
        raise ValueError(
            f"low_factor={low!r} must be below high_factor={high!r}: the band is [low_factor * target, high_factor * "
            "target]."
        )


def _units(units: int) -> int:
    if isinstance(units, bool) or not isinstance(units, Integral) or units < 1:
        raise ValueError(f"units must be a whole number of at least 1, got {units!r}.")
    return int(units)
