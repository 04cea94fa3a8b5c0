"""As many posterior samples as a text needs: what many of them are worth, at the cost of a few."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..evaluation.ranking import aurc
from ..evaluation.statistics import bootstrap_documents
from ..evaluation.token_scores import TokenScores
from .policy import SCHEDULE, Action, check_schedule, check_tolerance
from .settling import Acted, KeptLooks, act_on_data, check_measure, sequence_means

QUALITY = 0.01
# Of the quality that is allowed to be lost, the share that a tolerance may lose on validation data; the rest is left
# to what other data will do differently.
_VALIDATION_SHARE = 0.5
_CANDIDATES = 64
# Of the validation data's sequences, for the interval of what a tolerance loses.
_RESAMPLES = 200


@dataclass(frozen=True)
class QualityAtCost:
    """One point of quality against cost, on validation data.

    Attributes:
        tolerance: nats.
        mean_samples: posterior samples drawn for a token.
        nll: mean negative log-likelihood, nats.
        aurc: area under the risk-coverage curve of errors, ranked by the measure.
    """

    tolerance: float
    mean_samples: float
    nll: float
    aurc: float

    @classmethod
    def of(cls, acted: Acted, tolerance: float) -> "QualityAtCost":
        return cls(tolerance, acted.cost.mean_samples, acted.nll, acted.aurc())

    def is_within(self, quality: float, full: "QualityAtCost") -> bool:
        """Whether NLL and AURC are at most this share above those of all samples."""
        return self.nll <= (1 + quality) * full.nll and self.aurc <= (1 + quality) * full.aurc


@dataclass(frozen=True)
class AdaptiveSampling:
    """
    Draws posterior samples of a sequence until the Monte Carlo error of a measure is below a tolerance.

    The error of a sequence is the root mean square of its tokens' standard errors. Measures are corrected for the
    number of samples ([`corrected_measures`]), so that sequences with few samples and with many can be ranked
    together; the likelihood is that of the p̄ at hand.

    Args:
        tolerance: Nats. With 0 every sequence gets all samples, with infinity the first look's.
        schedule: Numbers of samples of the looks; samples drawn before are counted again.
        measure: Whose error it is, and what predictions are ranked by: `"predictive_entropy"` or
            `"mutual_information"`.
        frontier: What other tolerances are worth, from [`AdaptiveSampling.fit`].

    Example:

    ```python
    >>> sampling = AdaptiveSampling.fit(model, validation)
    >>> found = sampling.evaluate(model, test)
    >>> found.nll, found.aurc(), found.cost.mean_samples
    ```
    """

    tolerance: float = 0.0
    schedule: tuple[int, ...] = SCHEDULE
    measure: str = "predictive_entropy"
    frontier: tuple[QualityAtCost, ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self):
        object.__setattr__(self, "tolerance", check_tolerance(self.tolerance))
        object.__setattr__(self, "schedule", check_schedule(self.schedule))
        check_measure(self.measure)

    @classmethod
    def fit(
        cls,
        model,
        validation,
        *,
        schedule: Sequence[int] = SCHEDULE,
        measure: str = "predictive_entropy",
        quality: float = QUALITY,
        batch_size: int = 8,
        seed: int = 0,
        progress: bool = True,
    ) -> "AdaptiveSampling":
        """
        Chooses the tolerance with the least cost whose NLL and AURC stay within `quality` of those of all samples.

        On the validation data only half of `quality` may be lost, and the upper ends of 95 % intervals (whole
        sequences resampled) have to stay within all of it: other data will do something else.

        Args:
            model: A causal language model with posterior samples.
            validation, batch_size, seed, progress: As in [`evaluate_language_model`].
            schedule, measure: See [`AdaptiveSampling`].
            quality: Share of NLL and of AURC that may be lost, in (0, 1).

        Raises:
            ValueError: for a model without posterior samples, validation data without a target, a schedule that does
                not rise, or a quality outside (0, 1).
        """
        check_measure(measure)
        check_share("quality", quality)
        options = {"batch_size": batch_size, "seed": seed, "progress": progress}
        return cls.fit_looks(KeptLooks.draw(model, validation, schedule, **options), measure, quality)

    @classmethod
    def fit_looks(cls, looks: KeptLooks, measure: str, quality: float = QUALITY) -> "AdaptiveSampling":
        """The same of looks that are there already."""

        def acted(tolerance: float) -> Acted:
            return looks.act(cls(tolerance, looks.schedule, measure).act, measure)

        errors = [_sequence_errors(table, measure) for table in looks.looks[:-1]]
        frontier = tuple(QualityAtCost.of(acted(tolerance), tolerance) for tolerance in tolerances(errors))
        best = cheapest(frontier, acted, acted(0.0), quality)
        return cls(best.tolerance, looks.schedule, measure, frontier)

    def evaluate(self, model, data, *, batch_size: int = 8, seed: int = 0, progress: bool = True) -> Acted:
        """Scores every predicted token of a data set with as many samples as its sequence needs.

        Args:
            model, data, batch_size, seed, progress: As in [`AdaptiveSampling.fit`].
        """
        options = {"batch_size": batch_size, "seed": seed, "progress": progress}
        return act_on_data(model, data, self.act, self.schedule, self.measure, **options)

    def act(self, scores: TokenScores, last: bool) -> Tensor:
        """The [`Action`] about each token, [tokens], int8: that about its sequence."""
        enough = _sequence_errors(scores, self.measure) < self.tolerance
        return torch.where(enough | last, Action.ANSWER, Action.DRAW_MORE).to(torch.int8)


def tolerances(errors: Sequence[Tensor]) -> list[float]:
    """Tolerances to try, rising from 0 to infinity, of the units' errors at each look but the last, [units] each."""
    if not errors:
        return [0.0]
    values = np.unique(torch.cat(list(errors)).double().numpy())
    inside = np.quantile(values, np.linspace(0, 1, _CANDIDATES), method="inverted_cdf")
    return [0.0, *np.unique(inside[inside > 0]).tolist(), math.inf]


def cheapest(
    points: Sequence[QualityAtCost], acted: Callable[[float], Acted], full: Acted, quality: float
) -> QualityAtCost | None:
    """The point with the fewest samples, of equals the smallest tolerance, that keeps the quality of all samples.

    Args:
        points: to choose from.
        acted: what was decided with a tolerance.
        full: what was decided with all samples.
        quality: share of NLL and of AURC that may be lost.
    """
    reference = QualityAtCost.of(full, 0.0)
    near = [point for point in points if point.is_within(_VALIDATION_SHARE * quality, reference)]
    for point in sorted(near, key=lambda point: (point.mean_samples, point.tolerance)):
        if _surely_within(acted(point.tolerance), full, quality):
            return point
    return None


def _surely_within(acted: Acted, full: Acted, quality: float) -> bool:
    def area(of: Acted) -> Callable[[Tensor], float]:
        uncertainty, wrong = of.scores.values[of.measure], (~of.scores.correct).double()
        return lambda tokens: aurc(uncertainty[tokens], wrong[tokens])

    def nll(of: Acted) -> Callable[[Tensor], float]:
        values = of.scores.values["nll"].double()
        return lambda tokens: float(values[tokens].mean())

    for measure in (nll, area):
        ours, theirs = measure(acted), measure(full)
        found = bootstrap_documents(
            lambda tokens, ours=ours, theirs=theirs: ours(tokens) - (1 + quality) * theirs(tokens),
            full.scores.windows,
            num_resamples=_RESAMPLES,
        )
        # a single sequence has no interval
        if (found.mean if found.interval is None else found.interval[1]) > 0:
            return False
    return True


def check_share(name: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        raise ValueError(f"`{name}` is a share between 0 and 1, got {value!r}.")


def _sequence_errors(scores: TokenScores, measure: str) -> Tensor:
    return sequence_means(scores.values[f"{measure}_error"].double().square(), scores.windows).sqrt()
