"""What is known of one layer: statistics of its units, or of its attention heads, and which units are in trouble."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..modeling.posterior import ACTIVE_KL
from .band import Band, BandShares

# How many times its target (or its layer's median) the mean energy of an exploding unit is.
EXPLODING = 100.0
# A mean sigma from this share of its ceiling on is held by the clip, at most tokens.
_AT_CEILING = 0.9
# float32 survives nine digits.
_DIGITS = ".9g"


@dataclass(frozen=True)
class LayerDiagnostics:
    """Statistics of the variational neurons of one layer, on the CPU in float32, and the units in trouble.

    Means over the tokens that carry KL and over posterior samples; a unit's latent dimensions are summed in its KL and
    its mean energy, and averaged in its scale.

    Attributes:
        kl: KL divergence from the prior per unit, nats a token, [units].
        effective_kl: the same times the weight that the loss charges it with, nats a token, [units].
        scale: posterior scale sigma, [units].
        mean_energy: E[mu^2], [units].
        dead, exploding: see [`troubled`], bool, [units].
        band: where the mean energy should be, if anybody has said so.
    """

    kl: Tensor
    effective_kl: Tensor
    scale: Tensor
    mean_energy: Tensor
    dead: Tensor
    exploding: Tensor
    band: Band | None = None

    QUANTITIES = ("kl", "scale", "mean_energy")

    @property
    def units(self) -> int:
        """How many units the layer has (of all its experts)."""
        return len(self.kl)

    @property
    def active_fraction(self) -> float:
        """Share of units with a KL above 1e-4 nats (arXiv 2603.28219)."""
        return float((self.kl > ACTIVE_KL).float().mean())

    @property
    def shares(self) -> BandShares | None:
        """Shares of units under, inside and over the band; `None` without a band."""
        return None if self.band is None else self.band.shares(self.mean_energy)

    def summary(self) -> dict[str, float]:
        """The layer in numbers: `kl` and `effective_kl` are summed over units, the rest are means, medians, shares and
        counts. `under`, `inside` and `over` are there with a band only.
        """
        found = {
            "units": self.units,
            "kl": float(self.kl.double().sum()),
            "effective_kl": float(self.effective_kl.double().sum()),
            "kl_median": float(self.kl.median()),
            "scale": float(self.scale.mean()),
            "mean_energy": float(self.mean_energy.mean()),
            "mean_energy_median": float(self.mean_energy.median()),
            "active_fraction": self.active_fraction,
        }
        if self.band is not None:
            found.update({name: float(share) for name, share in self.shares._asdict().items()})
        return {**found, "dead": int(self.dead.sum()), "exploding": int(self.exploding.sum())}

    def to_dict(self) -> dict:
        """Plain values; a number that is not finite is `None`, and the units in trouble are listed by number."""
        values = {name: numbers_of(getattr(self, name)) for name in ("kl", "effective_kl", "scale", "mean_energy")}
        values |= {name: getattr(self, name).nonzero().flatten().tolist() for name in ("dead", "exploding")}
        if self.band is not None:
            factors = {"low_factor": self.band.low_factor, "high_factor": self.band.high_factor}
            values["band"] = {"targets": numbers_of(self.band.targets), **factors}
        return values

    @classmethod
    def from_dict(cls, values: Mapping) -> "LayerDiagnostics":
        """Reads `to_dict`'s dictionary."""
        values = dict(values)
        tensors = {name: tensor_of(values[name]) for name in ("kl", "effective_kl", "scale", "mean_energy")}
        for name in ("dead", "exploding"):
            tensors[name] = torch.zeros(len(tensors["kl"]), dtype=torch.bool)
            tensors[name][values[name]] = True
        band = values.get("band")
        if band is not None:
            band = Band(tensor_of(band["targets"]), band["low_factor"], band["high_factor"])
        return cls(**tensors, band=band)


@dataclass(frozen=True)
class HeadDiagnostics:
    """Statistics of the variational attention of one layer, on the CPU in float32; means as of the units.

    Attributes:
        values: by name, each [heads]: `kl` and `effective_kl` (nats a token), `scale` (of Gaussian attention) or
            `concentration` (of Dirichlet attention), and of the sampled weights `entropy` (nats) and `effective_keys`.
    """

    values: dict[str, Tensor] = field(default_factory=dict)

    @property
    def heads(self) -> int:
        """How many heads the layer has."""
        return len(self.values["kl"])

    def summary(self) -> dict[str, float]:
        """The layer in numbers: `kl` and `effective_kl` are summed over heads, the rest are means over heads."""
        summed = ("kl", "effective_kl")
        means = {name: float(v.double().sum() if name in summed else v.mean()) for name, v in self.values.items()}
        return {"heads": self.heads, **means, "active_fraction": float((self.values["kl"] > ACTIVE_KL).float().mean())}

    def to_dict(self) -> dict:
        """Plain values; a number that is not finite is `None`."""
        return {name: numbers_of(values) for name, values in self.values.items()}

    @classmethod
    def from_dict(cls, values: Mapping) -> "HeadDiagnostics":
        """Reads `to_dict`'s dictionary."""
        return cls({name: tensor_of(numbers) for name, numbers in values.items()})


def troubled(
    kl: Tensor, scale: Tensor, energy: Tensor, unwatched: Tensor, ceiling: float, band: Band | None
) -> tuple[Tensor, Tensor]:
    """Which units are dead and which explode, two bools, [units].

    Dead: the posterior is the prior, whatever the input is: the KL is at most 1e-4 nats. Under a centered prior, whose
    KL does not look at the mean, what N(0, s^2) would charge for it has to be that small too: sigma alone says
    nothing of a unit that passes its mean on.

    Exploding: the mean energy is more than 100 times the target of the unit's band (or over the band, if that reaches
    higher); without a band, more than 100 times the median of the layer's active units. Or sigma is at its ceiling
    (within 10 %), or a statistic is not finite.

    Args:
        kl, scale, energy: of the units, [units].
        unwatched: of [`unwatched_mean_kl`], [units].
        ceiling: the largest sigma.
        band: of the mean energy.
    """
    dead = (kl <= ACTIVE_KL) & (unwatched <= ACTIVE_KL)
    if band is not None:
        limit = band.targets * max(EXPLODING, band.high_factor)
    else:
        active = energy[kl > ACTIVE_KL]
        limit = EXPLODING * active.median() if len(active) else torch.full((), math.inf)
    finite = kl.isfinite() & scale.isfinite() & energy.isfinite()
    exploding = (energy > limit) | (scale >= _AT_CEILING * ceiling) | ~finite
    return dead & ~exploding, exploding


def numbers_of(values: Tensor) -> list[float | None]:
    """Numbers of a vector, with the digits that float32 has; `None` for what is not finite."""
    return [float(f"{value:{_DIGITS}}") if math.isfinite(value) else None for value in values.tolist()]


def tensor_of(numbers: list) -> Tensor:
    """The vector that `numbers_of` has written; what was not finite is NaN."""
    return torch.tensor([math.nan if number is None else number for number in numbers], dtype=torch.float32)
