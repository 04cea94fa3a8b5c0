"""The rules of regime control as functions of tensors: what is measured of each unit goes in, a step comes out.

None of them asks the device for a number. Energies are E[mu^2] of each unit, [units]; KLs are nats per token.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...diagnostics.band import BandShares
from ...modeling.posterior import ACTIVE_KL

# Where a unit out of its band is put: this share of the way, in logarithm, from the nearer end to the target.
JUST_INSIDE = 0.1
# No weight of a unit's KL leaves [1 / MAX_WEIGHT, MAX_WEIGHT]: a range that cannot be reached must not drive it to 0.
MAX_WEIGHT = 1e4
# Of the thermostat, see `thermostat_distance`; control steps, and a share of the way.
LEAD = 6.0
INNER = 0.75


class Limits(NamedTuple):
    """A band in force, each [units]: that of [`Band`], times the factor of its calibration."""

    low: Tensor
    high: Tensor
    target: Tensor

    def times(self, factor: Tensor) -> "Limits":
        return Limits(*(part * factor for part in self))

    def shares(self, energy: Tensor) -> BandShares:
        """Of units with these energies, [units]."""
        return BandShares.of(energy, self.low, self.high)

    def outside(self, energy: Tensor) -> Tensor:
        """Which units are out of their band, [units]."""
        return (energy < self.low) | (energy > self.high)


def band_penalty(
    energy: Tensor, limits: Limits, low_weight: float, high_weight: float, relative: bool
) -> tuple[Tensor, Tensor]:
    """The squared hinge and its derivative.

    P_i = w_low (low_i - E_i)_+^2 + w_high (E_i - high_i)_+^2; with `relative` the distances are divided by target_i.

    Returns:
        P_i and dP_i / dE_i, each [units]; both exactly 0 inside the band.
    """
    under = (limits.low - energy).clamp(min=0)
    over = (energy - limits.high).clamp(min=0)
    scale = limits.target.square().reciprocal() if relative else 1.0
    penalty = scale * (low_weight * under.square() + high_weight * over.square())
    return penalty, 2.0 * scale * (high_weight * over - low_weight * under)


def rescaling_factor(energy: Tensor, limits: Limits, way: float, eta: Tensor | float, max_factor: float) -> Tensor:
    """What mu of each unit is multiplied by: (aim / E)^(eta / 2) in [1 / max_factor, max_factor]; exactly 1 for a unit
    inside its band, and for one whose energy is 0, which no factor recovers.

    Args:
        energy, limits: [units].
        way: where the aim is, as a share of the way, in logarithm, from the nearer end of the band to its target.
        eta: share of the distance, in logarithm, that this step goes.
        max_factor: bound.

    Returns:
        [units].
    """
    end = torch.where(energy < limits.low, limits.low, limits.high)
    center = limits.target.clamp(limits.low, limits.high)
    aim = end.pow(1.0 - way) * center.pow(way)
    factor = (aim / energy).pow(0.5 * eta).clamp(1.0 / max_factor, max_factor)
    return torch.where(limits.outside(energy) & (energy > 0) & energy.isfinite(), factor, 1.0)


def thermostat_distance(kl: Tensor, previous_kl: Tensor, kl_min: float, kl_max: float) -> Tensor:
    """Signed distance, in logarithm, of where the KL is heading from the inner part of its range, [units].

    The heading is KL + LEAD (KL - previous KL): an average lags, and a scale goes on by an optimizer's momentum.
    The inner part leaves out INNER of the way from each end to the middle, so that a unit is turned before it leaves.
    """
    # of a collapsed unit the KL is rounding around 0
    heading = (kl + LEAD * (kl - previous_kl)).clamp(min=ACTIVE_KL)
    middle = math.sqrt(kl_min * kl_max) if kl_min > 0 else 0.5 * kl_max
    over = (heading / (kl_max ** (1.0 - INNER) * middle**INNER)).log().clamp(min=0)
    if kl_min == 0:
        return over
    return over - (kl_min ** (1.0 - INNER) * middle**INNER / heading).log().clamp(min=0)


def thermostat_step(
    integral: Tensor,
    kl: Tensor,
    previous_kl: Tensor,
    kl_min: float,
    kl_max: float,
    rate: float,
    gain: float,
    ratio: float,
    emergency_step: float,
) -> tuple[Tensor, Tensor]:
    """A proportional-integral controller of the log-weights of the units' KL.

    With d_i the `thermostat_distance`, the integral I_i moves by rate * d_i, and down by emergency_step where the unit
    is dead and should not be; it stays within log(ratio) of its mean over units. The log-weight is I_i + gain * d_i.
    The integral alone would overshoot: an optimizer like Adam moves a scale by its learning rate, however large the
    gradient, and a weight that rose all the way there would have to come down all the way afterwards.

    Args:
        integral, kl: [units].
        previous_kl: KL at the control step before, [units].
        kl_min, kl_max, rate, gain, ratio, emergency_step: see [`Thermostat`].

    Returns:
        the next integral and the log-weights, each [units].
    """
    distance = thermostat_distance(kl, previous_kl, kl_min, kl_max)
    step = rate * distance
    if kl_min > 0:
        step = torch.where(kl < min(ACTIVE_KL, kl_min), -emergency_step, step)
    moved = integral + step
    mean, reach, most = moved.mean(), math.log(ratio), math.log(MAX_WEIGHT)
    moved = moved.clamp(mean - reach, mean + reach).clamp(-most, most)
    return moved, (moved + gain * distance).clamp(-most, most)


def within_share(log_weight: Tensor, cost: Tensor, nll: Tensor, max_share: float) -> Tensor:
    """What is added to all log-weights of the units' KL, 0-dim, so that the KL is at most `max_share` of the loss.

    Args:
        log_weight: of each unit, [units].
        cost: kl_weight * KL per token of each unit, before its weight, [units].
        nll: negative log-likelihood per token.

    Returns:
        0, or what brings the weighted cost C down to C / (|nll| + C) = max_share; not below the cost without weights.
    """
    cost = cost.clamp(min=0)  # of a collapsed unit the KL is rounding around 0
    paid = (log_weight.exp() * cost).sum()
    most = torch.maximum(nll.abs() * (max_share / (1.0 - max_share)), cost.sum())
    return torch.where(paid > most, (most / paid).log(), 0.0)


def scale_shift(
    scale: Tensor, kl: Tensor, floor: float | None, ceiling: float | None, kick: float, max_shift: float
) -> Tensor:
    """What is added to the log-scale of each unit, [units]: what brings its mean scale back to the floor or to the
    ceiling, and -kick where the unit is dead; within +-max_shift. Exactly 0 for any other unit.
    """
    shift = torch.where(kl < ACTIVE_KL, -kick, torch.zeros_like(scale))
    if floor is not None:
        # The floor holds against a kick as well.
        shift = torch.maximum(shift, torch.where((scale.log() + shift).exp() < floor, (floor / scale).log(), shift))
    if ceiling is not None:
        shift = torch.where(scale > ceiling, (ceiling / scale).log(), shift)
    return shift.clamp(-max_shift, max_shift)


def calibration_step(
    log_factor: Tensor, under: Tensor, over: Tensor, meant: tuple[float, float], rate: float, max_step: float
) -> Tensor:
    """The next logarithm of the factor on all bands, 0-dim: up where too many units are over, down where too many are
    under (`under`, `over`: measured shares; `meant`: meant ones).
    """
    step = rate * ((over - meant[1]) - (under - meant[0]))
    return log_factor + step.clamp(-max_step, max_step)


def autoregressive_step(
    log_weight: Tensor, cost: Tensor, nll: Tensor, share: float, max_share: float, rate: float, ratio: float
) -> Tensor:
    """The next log-weight of the KL from the autoregressive prior, 0-dim.

    Args:
        log_weight: log w.
        cost: kl_weight * KL per token, before w; positive.
        nll: negative log-likelihood per token.
        share, max_share, rate, ratio: see [`AutoregressiveControl`].

    Returns:
        log w + rate log(share / s) with s = w cost / (|nll| + w cost), within log(ratio) of 0, and at most the
        log-weight whose share is `max_share`.
    """
    measured = autoregressive_share(log_weight, cost, nll)
    reach = math.log(ratio)
    moved = (log_weight + rate * (share / measured).log()).clamp(-reach, reach)
    most = (nll.abs() / cost).log() + math.log(max_share / (1.0 - max_share))
    return torch.minimum(moved, most)


def autoregressive_share(log_weight: Tensor, cost: Tensor, nll: Tensor) -> Tensor:
    """w cost / (|nll| + w cost), 0-dim."""
    paid = log_weight.exp() * cost
    return paid / (nll.abs() + paid)
