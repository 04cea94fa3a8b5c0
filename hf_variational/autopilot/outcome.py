"""What a search has found: its trials, the last rung, and which is best."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from scipy import stats

from .dimensions import Space
from .objective import NLL, PARETO

__all__ = ["Finalist", "SearchOutcome", "TrialRow", "finalists_of", "front_of", "paired_difference", "rank"]


@dataclass(frozen=True)
class TrialRow:
    """
    A trial that counts.

    Attributes:
        number: of the study.
        state: `"complete"`, `"pruned"` or `"failed"`.
        values: by dotted key of the recipe.
        metrics: of its last evaluation; empty if it failed before one.
        violations: by metric, how far its gate is missed there.
        curve: (step, NLL, sum of the violations) of each evaluation.
        seconds: that it took.
        error: why it failed.
    """

    number: int
    state: str
    values: dict[str, Any]
    metrics: dict[str, float] = field(default_factory=dict)
    violations: dict[str, float] = field(default_factory=dict)
    curve: list[list[float]] = field(default_factory=list)
    seconds: float = 0.0
    error: str = ""

    @property
    def nll(self) -> float:
        return self.metrics.get(NLL, math.nan)

    @property
    def missed(self) -> float:
        """Sum of the violations; 0 if every gate is passed."""
        return sum(self.violations.values())


@dataclass(frozen=True)
class Finalist:
    """
    A trial of the last rung.

    Attributes:
        row: the trial.
        runs: metrics by further seed, or the error that ended the run.
        shared: the seeds that all finalists have run; the mean is over these.
        violations: of the gates by the means of the metrics over these.
    """

    row: TrialRow
    runs: dict[int, dict[str, float] | str] = field(default_factory=dict)
    shared: tuple[int, ...] = ()
    violations: dict[str, float] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        return any(isinstance(self.runs[seed], str) for seed in self.shared)

    @property
    def missed(self) -> float:
        return sum(self.violations.values()) if self.shared else self.row.missed

    def over_seeds(self, metric: str) -> list[float]:
        """The metric of each shared seed's run that did not fail."""
        return [self.runs[seed][metric] for seed in self.shared if not isinstance(self.runs[seed], str)]

    def mean(self, metric: str = NLL) -> float:
        """Mean over the shared seeds; without any, the trial's own, on which it was chosen."""
        values = self.over_seeds(metric)
        return statistics.fmean(values) if values else self.row.metrics[metric]

    def standard_error(self, metric: str = NLL) -> float | None:
        """Of the mean over seeds, from their sample variance; `None` of fewer than two."""
        values = self.over_seeds(metric)
        return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


@dataclass(frozen=True)
class SearchOutcome:
    """
    Attributes:
        objective: `"nll"` or `"pareto"`.
        rows: the trials that count, by number.
        finalists: the last rung, the best first.
        front: numbers of the trials on the front; empty if one objective is searched.
        importance: by objective, the share of its variance over the trials that each key explains.
        interrupted: trials that were interrupted and repeated.
        facts: what was asked for, and where it ran.
        space: what was searched.
    """

    objective: str
    rows: list[TrialRow]
    finalists: list[Finalist]
    front: list[int]
    importance: dict[str, dict[str, float]]
    interrupted: int
    facts: dict[str, Any]
    space: Space

    @property
    def best(self) -> Finalist | None:
        """The best of the last rung, if it passes the gates."""
        first = self.finalists[0] if self.finalists else None
        return first if first is not None and not first.missed and not first.failed else None


def front_of(rows: Iterable[TrialRow]) -> list[TrialRow]:
    """The trials that are trained to their end, pass the gates and are not dominated; by NLL."""
    complete = [row for row in rows if row.state == "complete" and not row.missed]
    points = {row.number: [row.metrics[name] for name in PARETO] for row in complete}

    def dominated(row: TrialRow) -> bool:
        here = points[row.number]
        return any(
            all(a <= b for a, b in zip(there, here, strict=True)) and there != here for there in points.values()
        )

    return sorted((row for row in complete if not dominated(row)), key=lambda row: row.nll)


def finalists_of(rows: list[TrialRow], objective: str, factor: int) -> list[TrialRow]:
    """
    The last rung: of the trials that are trained to their end and pass the gates, the better 1/factor by NLL, and two
    at least; of a search for a front, the front.
    """
    if objective == "pareto":
        return front_of(rows)
    complete = sorted((row for row in rows if row.state == "complete" and not row.missed), key=lambda row: row.nll)
    return complete[: max(2, math.ceil(len(complete) / factor))]


def rank(rows: list[TrialRow], runs: Mapping[int, Mapping[int, dict[str, float] | str]], space: Space):
    """
    The last rung, the best first: by the mean NLL over the seeds that all have run. One that failed, or misses a gate
    by the means of its metrics, comes behind those that do not.

    Args:
        rows: the finalists.
        runs: by trial and seed, the metrics of its run or its error.
        space: whose gates are checked.
    """
    runs = {row.number: dict(runs.get(row.number, {})) for row in rows}
    shared = sorted(set.intersection(*(set(own) for own in runs.values()))) if rows else []
    finalists = []
    for row in rows:
        finished = [runs[row.number][s] for s in shared if not isinstance(runs[row.number][s], str)]
        means = {name: statistics.fmean(run[name] for run in finished) for name in (finished[0] if finished else ())}
        violations = space.violations(means) if means else {}
        finalists.append(Finalist(row, runs[row.number], tuple(shared), violations))
    return sorted(finalists, key=lambda f: (f.failed, f.missed, f.mean()))


def paired_difference(first: Finalist, second: Finalist) -> tuple[float, float] | None:
    """
    Mean difference of two finalists' NLL (second minus first) over their shared seeds, and the half width of its 95 %
    interval by Student's t over the pairs; `None` of fewer than two.
    """
    if first.failed or second.failed or len(first.shared) < 2:
        return None
    differences = [b - a for a, b in zip(first.over_seeds(NLL), second.over_seeds(NLL), strict=True)]
    width = statistics.stdev(differences) / math.sqrt(len(differences)) * stats.t.ppf(0.975, len(differences) - 1)
    return statistics.fmean(differences), float(width)
