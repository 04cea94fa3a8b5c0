"""What it is worth to answer only where one is certain: risk against coverage, of tokens and of whole sequences."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from .ranking import risk_coverage_curve
from .token_scores import OF_THE_TARGET, TokenScores

# What is accepted or not, and what is independent of what: a token, or a sequence.
UNITS = ("token", "sequence")
LOSSES = ("error", "nll", "brier")
COMBINATION = "combination"
# What the combination is of, as far as a table has it.
COMBINED_SCORES = (
    "predictive_entropy",
    "expected_entropy",
    "mutual_information",
    "conditional_variance",
    "one_minus_confidence",
    "kl",
)


@dataclass(frozen=True)
class CombinedScore:
    """A logistic regression of "this token will be wrong" on standardised scores.

    Attributes:
        names: the scores that go in.
        model: scikit-learn's scaler and regression.

    Example:

    ```python
    >>> combined = CombinedScore.fit(validation)
    >>> RiskCoverage.of(test, combined).area()
    ```
    """

    names: tuple[str, ...]
    model: Pipeline

    @classmethod
    def fit(cls, validation: TokenScores, names: tuple[str, ...] | None = None) -> "CombinedScore":
        """Fits on validation data, never on data that is then tested or certified with the score.

        Args:
            validation: token scores.
            names: scores that go in; `None`: all of `COMBINED_SCORES` that are there.

        Raises:
            ValueError: if a score is missing, looks at the target or is NaN, or if all tokens are right or all wrong.
        """
        if names is None:
            names = tuple(name for name in COMBINED_SCORES if name in validation.values)
        wrong = (~validation.correct).numpy()
        if wrong.all() or not wrong.any():
            raise ValueError(
                f"All of the {len(wrong)} validation tokens are {'wrong' if wrong.any() else 'right'}: there is "
                "nothing to tell apart, so give more validation data or a single score."
            )
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        return cls(tuple(names), model.fit(_features(validation, names), wrong))

    def __call__(self, scores: TokenScores) -> Tensor:
        """Probability that each token is wrong, [tokens], float64."""
        return torch.from_numpy(self.model.predict_proba(_features(scores, self.names))[:, 1])

    @property
    def weights(self) -> dict[str, float]:
        """The coefficient of each score, per standard deviation of it."""
        return dict(zip(self.names, self.model[-1].coef_[0].tolist(), strict=True))


@dataclass(frozen=True)
class RiskCoverage:
    """The risk-coverage curve of one score: units accepted one after the other, the most certain first.

    A curve describes the data it is of. A threshold read off it keeps no promise on other data: that is what
    [`SelectivePolicy`] is for.

    Attributes:
        coverage: share accepted, from 1/n to 1, [n].
        risk: mean loss of the accepted, [n]; among equal scores its expectation over their random order.
        thresholds: score of the last one accepted, [n].
        oracle_risk: the same of the order by the loss itself, which no score can be below, [n].
    """

    coverage: Tensor
    risk: Tensor
    thresholds: Tensor
    oracle_risk: Tensor

    @classmethod
    def of(
        cls, scores: TokenScores, score: str | CombinedScore, *, unit: str = "token", loss: str = "error"
    ) -> "RiskCoverage":
        """
        Args:
            scores: of the data that the curve describes.
            score: name of a score that does not look at the target, or a combined one.
            unit: `"token"`, or `"sequence"`: whole sequences by their mean score, with their mean loss.
            loss: `"error"` (0 or 1), `"nll"` (nats) or `"brier"`.

        Raises:
            ValueError: if the score is missing, NaN or looks at the target.
        """
        if loss not in LOSSES:
            raise ValueError(f"`loss` is one of {', '.join(LOSSES)}, got {loss!r}.")
        losses = (~scores.correct).double() if loss == "error" else scores.values[loss].double()
        return cls.of_values(in_units(score_values(scores, score), scores, unit), in_units(losses, scores, unit))

    @classmethod
    def of_values(cls, uncertainty: Tensor, loss: Tensor) -> "RiskCoverage":
        """Of an uncertainty and a loss for each unit, [n] and [n]."""
        return cls(*risk_coverage_curve(uncertainty, loss), risk_coverage_curve(loss, loss).risk)

    def area(self) -> float:
        """AURC, the mean risk over the coverages."""
        return float(self.risk.mean())

    def excess(self) -> float:
        """E-AURC, the area above the oracle's; 0 is best."""
        return float((self.risk - self.oracle_risk).mean())

    def at(self, coverage: float) -> float:
        """Risk at a coverage in (0, 1]; between two units the next one is accepted with the probability that is left
        to the coverage.
        """
        if not 0 < coverage <= 1:
            raise ValueError(f"A coverage is a number in (0, 1], got {coverage!r}.")
        zero = np.zeros(1)
        total = np.interp(
            coverage,
            np.concatenate([zero, self.coverage.numpy()]),
            np.concatenate([zero, (self.coverage * self.risk).numpy()]),
        )
        return float(total / coverage)

    def coverage_at(self, risk: float) -> float:
        """The largest coverage with at most this risk on this data; 0 if there is none."""
        within = self.coverage[self.risk <= risk]
        return float(within[-1]) if within.numel() else 0.0


def risk_coverages(
    scores: TokenScores, combined: CombinedScore | None = None, *, unit: str = "token", loss: str = "error"
) -> dict[str, RiskCoverage]:
    """[`RiskCoverage`] of every score in the table that does not look at the target, by name; with the combined one,
    if it is given, as `"combination"`.
    """
    chosen: dict[str, str | CombinedScore] = {name: name for name in scores.values if name not in OF_THE_TARGET}
    if combined is not None:
        chosen[COMBINATION] = combined
    return {name: RiskCoverage.of(scores, score, unit=unit, loss=loss) for name, score in chosen.items()}


def score_values(scores: TokenScores, score: str | CombinedScore) -> Tensor:
    """The values of a score, [tokens], float64; higher is less certain.

    Raises:
        ValueError: if it is missing, looks at the target or is NaN somewhere.
    """
    if isinstance(score, CombinedScore):
        return score(scores)
    usable = [name for name in scores.values if name not in OF_THE_TARGET]
    if score in OF_THE_TARGET:
        raise ValueError(f"{score!r} looks at the target, so it is not there when a decision is made: {usable}.")
    if score not in scores.values:
        raise ValueError(f"These token scores have no {score!r}; they have {usable}.")
    values = scores.values[score].double()
    if values.isnan().any():
        raise ValueError(f"The score {score!r} is NaN at {int(values.isnan().sum())} of {len(scores)} tokens.")
    return values


def in_units(values: Tensor, scores: TokenScores, unit: str) -> Tensor:
    """Values of tokens as they are, [tokens], or their means over each sequence that has tokens, [sequences]."""
    if unit not in UNITS:
        raise ValueError(f"`unit` is one of {', '.join(UNITS)}, got {unit!r}.")
    return values if unit == "token" else replace(scores, values={"values": values}).window_means()["values"]


def _features(scores: TokenScores, names) -> np.ndarray:
    return torch.stack([score_values(scores, name) for name in names], dim=1).numpy()
