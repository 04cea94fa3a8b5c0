"""What a search varies, the gates that a trial has to pass, and when a trial is stopped."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Choices", "Gate", "Halving", "Range", "Space", "SpaceError"]


class SpaceError(ValueError):
    """The search cannot go on: no trial of this space could be judged."""


@dataclass(frozen=True)
class Range:
    """
    Numbers of an interval, both ends included.

    Attributes:
        key: dotted name in the recipe.
        low, high: the ends.
        step: distance of the values from `low`; `None` is any number, or 1 of whole numbers.
        log: whether the logarithm is uniform.
        whole: whether values are whole numbers.
    """

    key: str
    low: float
    high: float
    step: float | None = None
    log: bool = False
    whole: bool = False

    def suggest(self, trial) -> Any:
        if self.whole:
            return trial.suggest_int(self.key, int(self.low), int(self.high), step=int(self.step or 1), log=self.log)
        return trial.suggest_float(self.key, self.low, self.high, step=self.step, log=self.log)

    def value(self, parameter: Any) -> Any:
        return parameter

    @property
    def examples(self) -> tuple:
        return (self.low, self.high)


@dataclass(frozen=True)
class Choices:
    """
    Values that are listed, of any kind that YAML has: also lists, mappings and null.

    Attributes:
        key: dotted name in the recipe.
        choices: the values.
    """

    key: str
    choices: tuple

    @property
    def labels(self) -> list[str]:
        """What the values are called in the study, whose storage knows no lists."""
        return [choice if isinstance(choice, str) else json.dumps(choice) for choice in self.choices]

    def suggest(self, trial) -> Any:
        return self.value(trial.suggest_categorical(self.key, self.labels))

    def value(self, parameter: Any) -> Any:
        return copy.deepcopy(self.choices[self.labels.index(parameter)])

    @property
    def examples(self) -> tuple:
        return self.choices


@dataclass(frozen=True)
class Gate:
    """
    Bounds on a metric of an evaluation.

    Attributes:
        metric: its name, for example `eval_regime_inside`.
        least, most: bounds, which are allowed themselves; `None` where there is none.
    """

    metric: str
    least: float | None = None
    most: float | None = None

    def violation(self, metrics: Mapping[str, float]) -> float:
        """
        How far the metric is outside, as a share of the bound (of a bound of 0: as it is); 0 if it is inside.

        Raises:
            SpaceError: if the evaluation has no such metric.
        """
        if self.metric not in metrics:
            raise SpaceError(
                f"`gates` names {self.metric}, which no evaluation of this recipe reports: it reports "
                f"{', '.join(sorted(metrics))}."
            )
        value = metrics[self.metric]
        if not math.isfinite(value):
            return math.inf
        beyond = [
            (bound, distance)
            for bound, distance in (
                (self.least, (self.least or 0.0) - value),
                (self.most, value - (self.most or 0.0)),
            )
            if bound is not None and distance > 0
        ]
        return max((distance / (abs(bound) or 1.0) for bound, distance in beyond), default=0.0)

    def __str__(self) -> str:
        ends = [f"{sign} {bound:g}" for sign, bound in (("≥", self.least), ("≤", self.most)) if bound is not None]
        return f"{self.metric} {' and '.join(ends)}"


@dataclass(frozen=True)
class Halving:
    """
    Successive halving (Li et al. 2020, arXiv 1810.05934): the rungs are at min_steps · factor^k steps, and the better
    1/factor of the trials at a rung go on.

    Attributes:
        min_steps: optimizer steps of the first rung; `None` is the first evaluation.
        factor: of the steps from rung to rung.
    """

    min_steps: int | None = None
    factor: int = 3


@dataclass(frozen=True)
class Space:
    """
    Attributes:
        dimensions: what varies.
        gates: what a trial has to pass.
        halving: when trials are stopped.
    """

    dimensions: tuple[Range | Choices, ...]
    gates: tuple[Gate, ...] = ()
    halving: Halving = field(default_factory=Halving)

    def suggest(self, trial) -> dict[str, Any]:
        """The values of an Optuna trial by dotted key; asked again, a trial answers the same."""
        return {dimension.key: dimension.suggest(trial) for dimension in self.dimensions}

    def values(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The values that a finished trial's parameters stand for."""
        return {d.key: d.value(parameters[d.key]) for d in self.dimensions if d.key in parameters}

    def violations(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """By metric, how far a gate is missed; 0 where it is passed."""
        return {gate.metric: gate.violation(metrics) for gate in self.gates}
