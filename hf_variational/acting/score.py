"""The internal score: from what a forward pass shows of its posteriors to how likely the next token is wrong."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..evaluation.selective import CombinedScore
from ..evaluation.token_scores import TokenScores

SCORED = ("kl", "scale", "mutual_information")


@dataclass(frozen=True)
class InternalScore:
    """a · KL + b · σ + c · MI + intercept: log-odds that the next token is wrong; higher is less certain.

    KL is summed over layers and units or heads, σ the mean over layers and feed-forward units (both of the posteriors
    given this input), MI the mutual information corrected for the number of samples. With variational attention alone
    there is no σ. None of them is a probability; the logistic regression makes one of them.

    Attributes:
        coefficients: by name, of `SCORED`; per nat of `kl` and `mutual_information`, per unit of `scale`.
        intercept: log-odds.

    Raises:
        ValueError: for a name that is not of `SCORED`, none at all, or a number that is not finite.
    """

    coefficients: dict[str, float]
    intercept: float = 0.0

    def __post_init__(self):
        if not self.coefficients or not set(self.coefficients) <= set(SCORED):
            raise ValueError(f"The coefficients are of {', '.join(SCORED)}, got {sorted(self.coefficients)}.")
        for name, value in {**self.coefficients, "intercept": self.intercept}.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"The coefficient of {name!r} is a finite number, got {value!r}.")

    @classmethod
    def fit(cls, scores: TokenScores) -> "InternalScore":
        """A logistic regression of wrong tokens on those of `SCORED` that the table has.

        Raises:
            ValueError: if all tokens are right or all are wrong.
        """
        names = tuple(name for name in SCORED if name in scores.values)
        combined = CombinedScore.fit(scores, names)
        scaler, regression = combined.model[0], combined.model[-1]
        weights = regression.coef_[0] / scaler.scale_
        intercept = float(regression.intercept_[0] - (weights * scaler.mean_).sum())
        return cls(dict(zip(names, weights.tolist(), strict=True)), intercept)

    def __call__(self, values: Mapping[str, Tensor]) -> Tensor:
        """Log-odds, [...], float64, of values by name, each [...].

        Raises:
            ValueError: if one of the coefficients has no value.
        """
        missing = [name for name in self.coefficients if name not in values]
        if missing:
            raise ValueError(
                f"This score was fitted with {', '.join(missing)}, which this model's posteriors do not have: fit the "
                "controller on this model."
            )
        # Metal has no float64.
        terms = [weight * values[name].cpu().double() for name, weight in self.coefficients.items()]
        return torch.stack(terms).sum(0) + self.intercept
