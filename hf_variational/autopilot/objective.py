"""What a search minimises, as numbers of an evaluation's metrics."""

from __future__ import annotations

from collections.abc import Mapping

from .dimensions import Space

__all__ = ["CALIBRATION", "COST", "NLL", "PARETO", "gated", "objective_of"]

NLL, CALIBRATION = "eval_nll", "eval_expected_calibration_error"
# Floating-point operations of a forward pass with the posterior samples of the evaluation, per token.
COST = "flops_per_token"
# The objectives of a front, with what they are called.
PARETO = {NLL: "NLL", CALIBRATION: "ECE", COST: "FLOPs a token"}
# Nats a token. A trial that misses a gate begins here, where no trial that passes ends.
_MISSED = 1e3


def gated(nll: float, violations: Mapping[str, float]) -> float:
    """
    One number that orders trials as their gates and then their NLL do: the NLL where every gate is passed, and above
    every such NLL, the further the worse, where one is missed.
    """
    missed = sum(violations.values())
    return min(nll, _MISSED) + (_MISSED * (1.0 + min(missed, _MISSED)) if missed > 0 else 0.0)


def objective_of(kind: str, space: Space):
    """The function of an evaluation's metrics that a search minimises: one number, or of a front those of `PARETO`."""
    if kind == "pareto":
        return lambda metrics: [metrics[name] for name in PARETO]
    return lambda metrics: gated(metrics[NLL], space.violations(metrics))
