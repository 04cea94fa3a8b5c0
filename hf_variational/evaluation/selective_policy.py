"""When to accept a prediction, when to abstain and when to draw more samples, so that what is accepted is right often
enough.
"""

import math
from dataclasses import dataclass, fields
from enum import IntEnum
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging

from ..checks import check_whole
from .risk_control import betting_p_value, binomial_p_value, fixed_sequence, growth_optimal_bet
from .selective import COMBINATION, UNITS, CombinedScore, in_units, score_values
from .token_scores import TokenScores

logger = logging.get_logger(__name__)


class Decision(IntEnum):
    """What the first look says; `DRAW_MORE` becomes one of the others after the second."""

    ACCEPT = 0
    ABSTAIN = 1
    DRAW_MORE = 2


@dataclass(frozen=True)
class Thresholds:
    """A rule: accept a score of at most `accept`; draw more samples up to `draw_more`, and then accept a second score
    of at most `second`; abstain from the rest. Without a second look `draw_more` is `accept`.
    """

    accept: float
    draw_more: float
    second: float


@dataclass(frozen=True)
class SelectiveResult:
    """What a policy did to a table of scores.

    Attributes:
        decisions: a [`Decision`] at the first look, [units], int8; units are tokens, or sequences that have any.
        accepted: whether accepted in the end, [units].
        coverage: share accepted. With `unit="sequence"` every sequence counts the same, otherwise every token.
        selective_risk: share wrong of what is accepted, counted likewise; nan if nothing is.
        cost: mean posterior samples drawn for a token, both looks together.
    """

    decisions: Tensor
    accepted: Tensor
    coverage: float
    selective_risk: float
    cost: float


@dataclass(frozen=True)
class SelectivePolicy:
    """
    Chooses thresholds of a score such that at most a share `target_risk` of what is accepted is wrong.

    The guarantee: with probability at least 1 − δ over the validation data, the *expected* risk of the fitted policy
    on new data of the same kind is at most `target_risk`. It holds for any model, score and size of data, and says
    nothing of text of another kind. The share wrong in one test set scatters around the expected one.

    - `unit="sequence"`: sequences are independent, and the tokens within one may depend on each other as they will.
      Risk is E[share of a sequence accepted and wrong] / E[share accepted]: every sequence counts the same. Tested by
      betting on each sequence's shares. It takes many sequences: even without a single error, fewer than
      ln δ / ln(1 − r) certify nothing.
    - `unit="token"`: tokens are independent of each other, which those of one text are not. Tested with the exact
      binomial distribution. Right for windows with one scored token, or tokens drawn at random from as many texts.

    The validation data is divided at random: a design part, of which come the thresholds to test, the order to test
    them in, the bets, and the combined score if there is one; and the rest, which tests (split fixed sequence testing,
    Angelopoulos et al. 2021, arXiv 2110.01052).

    Args:
        score: Name of a score that does not look at the target; `"combination"`, a logistic combination of all, fitted
            on the design part; or a [`CombinedScore`] fitted on data that is neither validation nor test.
        target_risk: r, the share of wrong predictions among the accepted, in (0, 1).
        delta: δ, the probability with which validation data may mislead, in (0, 1).
        unit: `"sequence"` or `"token"`, what is independent.
        decide: What is accepted or not: each `"token"`, or each whole `"sequence"` by its mean score.
        num_samples: Posterior samples behind the scores, for the cost.
        num_more_samples: Samples drawn for a second look, in addition to the first ones; `None`: no second look.
        band: Share of tokens (or sequences) to look at again, around the threshold.
        design_fraction: Share of the validation data in the design part.
        num_thresholds: Coverages 1/m, 2/m, ..., 1 to test.
        seed: Of the division.

    Example:

    ```python
    >>> policy = SelectivePolicy(score="mutual_information", target_risk=0.2, num_samples=8, num_more_samples=32)
    >>> fitted = policy.fit(validation_8, more=validation_32)
    >>> result = fitted.apply(test_8, more=test_32)
    >>> result.coverage, result.selective_risk, result.cost
    ```
    """

    score: str | CombinedScore = "predictive_entropy"
    target_risk: float = 0.1
    delta: float = 0.1
    unit: str = "sequence"
    decide: str = "token"
    num_samples: int = 8
    num_more_samples: int | None = None
    band: float = 0.2
    design_fraction: float = 0.25
    num_thresholds: int = 100
    seed: int = 0

    def __post_init__(self):
        for name in ("target_risk", "delta", "band", "design_fraction"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
                raise ValueError(f"`{name}` is a number between 0 and 1, got {value!r}.")
        for name in ("unit", "decide"):
            if getattr(self, name) not in UNITS:
                raise ValueError(f"`{name}` is one of {', '.join(UNITS)}, got {getattr(self, name)!r}.")
        if self.decide == "sequence" and self.unit == "token":
            raise ValueError("A decision about whole sequences is tested on sequences: give unit='sequence'.")
        check_whole("num_samples", self.num_samples, 0)
        check_whole("num_thresholds", self.num_thresholds, 1)
        if self.num_more_samples is not None:
            check_whole("num_more_samples", self.num_more_samples, 1)

    def fit(self, validation: TokenScores, more: TokenScores | None = None) -> "FittedSelectivePolicy":
        """Chooses the thresholds with the largest coverage that are certified to keep the risk.

        If none is, the fitted policy abstains from everything and a warning says which target would be within reach.

        Args:
            validation: scores of text that neither the model nor the combined score was fitted on.
            more: the same tokens, scored with `num_more_samples` fresh samples.

        Raises:
            ValueError: if there is one sequence (or token) only, `more` is missing, or it is of other tokens.
        """
        units, score = self._design(validation, more)
        looks = _Looks.of(validation, more, score, self)
        design, rest = (looks.select(np.isin(looks.groups, part)) for part in units)
        grid = self._thresholds(design)
        certified = self._certify(design, rest, grid, self.target_risk)
        if certified is None:
            self._warn_of_reach(design, rest, grid)
            return FittedSelectivePolicy(self, score, Thresholds(-math.inf, -math.inf, -math.inf), False)
        return FittedSelectivePolicy(self, score, grid[certified], True)

    def _design(self, validation: TokenScores, more: TokenScores | None):
        """The units of the two parts, and the score."""
        _check_more(self, validation, more)
        groups = validation.windows.unique() if self.unit == "sequence" else torch.arange(len(validation))
        if len(groups) < 2:
            raise ValueError(f"A policy is designed on one {self.unit} and tested on another, got {len(groups)}.")
        groups = np.random.default_rng(self.seed).permutation(groups.numpy())
        size = min(max(1, round(self.design_fraction * len(groups))), len(groups) - 1)
        design, rest = groups[:size], groups[size:]
        if self.score != COMBINATION:
            return (design, rest), self.score
        of_design = validation.windows if self.unit == "sequence" else torch.arange(len(validation))
        table = validation.select(torch.isin(of_design, torch.from_numpy(design)))
        return (design, rest), CombinedScore.fit(table)

    def _thresholds(self, design: "_Looks") -> list[Thresholds]:
        coverages = np.arange(1, self.num_thresholds + 1) / self.num_thresholds
        if design.second is None:
            return [Thresholds(value, value, -math.inf) for value in _quantiles(design.first, coverages)]
        half = self.band / 2
        return [
            Thresholds(*values)
            for values in zip(
                _quantiles(design.first, coverages - half),
                _quantiles(design.first, coverages + half),
                _quantiles(design.second, coverages),
                strict=True,
            )
        ]

    def _certify(self, design: "_Looks", rest: "_Looks", grid: list[Thresholds], risk: float) -> int | None:
        of_design = [design.shares(thresholds) for thresholds in grid]
        if self.unit == "token":
            evidence = [-binomial_p_value(lost.sum(), taken.sum(), risk) for lost, taken in of_design]
        else:
            bets, evidence = zip(*(growth_optimal_bet(*shares, risk) for shares in of_design), strict=True)

        def p_value(index: int) -> float:
            lost, taken = rest.shares(grid[index])
            if self.unit == "token":
                return binomial_p_value(lost.sum(), taken.sum(), risk)
            return betting_p_value(lost, taken, risk, bets[index])

        # Strict thresholds accept too few to be told from risky ones: begin where the evidence is best.
        return fixed_sequence(p_value, range(int(np.argmax(evidence)), len(grid)), self.delta)

    def _warn_of_reach(self, design: "_Looks", rest: "_Looks", grid: list[Thresholds]) -> None:
        low, high = self.target_risk, None
        trial = 1 - 1e-6
        while high is None or high - low > 0.005:
            if self._certify(design, rest, grid, trial) is not None:
                high = trial
            elif high is None:
                break
            else:
                low = trial
            trial = (low + high) / 2
        reach = "no target is" if high is None else f"a target of {high:.3f} is the lowest that is"
        logger.warning(
            f"No threshold of {_name(self.score)} keeps the risk at {self.target_risk:g} with probability "
            f"{1 - self.delta:g} on this validation data ({reach} within its reach), so the policy abstains from "
            "everything. Give more validation data, a better score, or another target on other validation data."
        )


@dataclass(frozen=True)
class FittedSelectivePolicy:
    """Thresholds, and what they do.

    Attributes:
        policy: what it was fitted with.
        score: name of the score, or the combined one.
        thresholds: [`Thresholds`]; all −inf if none was certified.
        certified: whether the risk is guaranteed; if not, everything is abstained from.
    """

    policy: SelectivePolicy
    score: str | CombinedScore
    thresholds: Thresholds
    certified: bool

    def decide(self, scores: TokenScores) -> Tensor:
        """The first look's [`Decision`] about each token (or sequence that has any), [units], int8."""
        return _Looks.of(scores, None, self.score, self.policy).decisions(self.thresholds)

    def apply(self, test: TokenScores, more: TokenScores | None = None) -> SelectiveResult:
        """Decides about every token (or sequence) of `test`, and compares with the targets.

        Args:
            test: scores of new text of the kind of the validation data.
            more: the same tokens, scored with `num_more_samples` fresh samples; read only where the first look says
                `DRAW_MORE`.
        """
        _check_more(self.policy, test, more)
        looks = _Looks.of(test, more, self.score, self.policy)
        lost, taken = looks.shares(self.thresholds)
        decisions = looks.decisions(self.thresholds)
        again = (decisions == Decision.DRAW_MORE).double() @ torch.from_numpy(looks.tokens)
        extra = self.policy.num_more_samples or 0
        return SelectiveResult(
            decisions=decisions,
            accepted=torch.from_numpy(looks.accepted(self.thresholds)[0]),
            coverage=float(taken.mean()),
            selective_risk=float(lost.sum() / taken.sum()) if taken.any() else math.nan,
            cost=self.policy.num_samples + extra * float(again) / len(test),
        )


@dataclass(frozen=True)
class _Looks:
    """The scores at both looks and the errors they would be accepted with, each [units]; `groups` has the independent
    unit that each is part of, `tokens` how many tokens it has.
    """

    first: np.ndarray
    first_error: np.ndarray
    second: np.ndarray | None
    second_error: np.ndarray | None
    groups: np.ndarray
    tokens: np.ndarray

    @classmethod
    def of(cls, scores: TokenScores, more: TokenScores | None, score, policy: SelectivePolicy) -> "_Looks":
        first, first_error = _columns(scores, score, policy.decide)
        second, second_error = (None, None) if more is None else _columns(more, score, policy.decide)
        if policy.decide == "sequence":
            groups, tokens = np.unique(scores.windows.numpy(), return_counts=True)
        else:
            groups = scores.windows.numpy() if policy.unit == "sequence" else np.arange(len(scores))
            tokens = np.ones(len(scores), dtype=np.int64)
        return cls(first, first_error, second, second_error, groups, tokens.astype(np.float64))

    def select(self, mask: np.ndarray) -> "_Looks":
        columns = (getattr(self, field.name) for field in fields(self))
        return _Looks(*(None if column is None else column[mask] for column in columns))

    def decisions(self, thresholds: Thresholds) -> Tensor:
        decisions = np.full(len(self.first), Decision.ABSTAIN, dtype=np.int8)
        decisions[self.first <= thresholds.draw_more] = Decision.DRAW_MORE
        decisions[self.first <= thresholds.accept] = Decision.ACCEPT
        return torch.from_numpy(decisions)

    def accepted(self, thresholds: Thresholds) -> tuple[np.ndarray, np.ndarray]:
        """Whether accepted after both looks, and with which error, each [units]."""
        accepted = self.first <= thresholds.accept
        if self.second is None:
            return accepted, self.first_error
        later = ~accepted & (self.first <= thresholds.draw_more) & (self.second <= thresholds.second)
        return accepted | later, np.where(later, self.second_error, self.first_error)

    def shares(self, thresholds: Thresholds) -> tuple[np.ndarray, np.ndarray]:
        """Of each independent unit the share that is accepted and wrong, and the share accepted, each [groups]."""
        accepted, error = self.accepted(thresholds)
        place, sizes = self._grouping
        columns = (accepted * error, accepted.astype(np.float64))
        return tuple(np.bincount(place, weights=column) / sizes for column in columns)

    @cached_property
    def _grouping(self) -> tuple[np.ndarray, np.ndarray]:
        _, place, sizes = np.unique(self.groups, return_inverse=True, return_counts=True)
        return place, sizes


def _columns(scores: TokenScores, score: str | CombinedScore, unit: str) -> tuple[np.ndarray, np.ndarray]:
    values = (score_values(scores, score), (~scores.correct).double())
    return tuple(in_units(column, scores, unit).numpy() for column in values)


def _quantiles(values: np.ndarray, coverages: np.ndarray) -> list[float]:
    """The score up to which a share is accepted; below 0 nothing is, and from 1 on everything."""
    inside = np.quantile(values, coverages.clip(0, 1), method="inverted_cdf")
    return np.where(coverages <= 0, -np.inf, np.where(coverages >= 1, np.inf, inside)).tolist()


def _check_more(policy: SelectivePolicy, scores: TokenScores, more: TokenScores | None) -> None:
    if (more is None) != (policy.num_more_samples is None):
        raise ValueError(
            f"num_more_samples={policy.num_more_samples} and more={'None' if more is None else 'a table'}: a second "
            "look needs both, the scores made with more samples as `more` and how many samples as `num_more_samples`."
        )
    if more is not None and not (
        torch.equal(more.windows, scores.windows) and torch.equal(more.targets, scores.targets)
    ):
        raise ValueError("`more` is of other tokens: score the same data again, in the same order, with more samples.")


def _name(score: str | CombinedScore) -> str:
    return score if isinstance(score, str) else COMBINATION
