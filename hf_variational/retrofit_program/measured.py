"""The numbers of one model: on held-out text, as it is and at a fitted temperature, and against other texts."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ..evaluation import TokenScores, domain_auroc, scores_at_temperatures
from ..evaluation.temperature import FittedTemperature, fit_temperature
from .texts import RetrofitTexts

__all__ = ["Measured", "measure"]

Metrics = dict[str, float]


@dataclass(frozen=True)
class Measured:
    """
    Attributes:
        temperature: what was fitted on the calibration data.
        plain, tempered: metrics on the held-out text, as the model is and at that temperature.
        others, tempered_others: area under the ROC curve of each measure, by other text.
    """

    temperature: FittedTemperature
    plain: Metrics
    tempered: Metrics
    others: dict[str, Metrics]
    tempered_others: dict[str, Metrics]

    def to_dict(self) -> dict:
        """Plain values."""
        return asdict(self)


def measure(
    model, texts: RetrofitTexts, num_posterior_samples: int, batch_size: int, seed: int, progress: bool
) -> Measured:
    """
    Measures a model's predictive distribution; with 0 samples its mean pass.

    Args:
        batch_size: sequences of a batch; of the short windows as many as have as many tokens.
        seed: of the noise.
    """
    options = {"seed": seed, "progress": progress}
    fitted = fit_temperature(model, texts.calibration, num_posterior_samples, batch_size, **options)

    def scored(rows: list, size: int) -> list[TokenScores]:
        return scores_at_temperatures(model, rows, [1.0, fitted.temperature], num_posterior_samples, size, **options)

    test = scored(texts.test, batch_size)
    others: list[dict[str, Metrics]] = [{}, {}]
    if texts.others:
        size = max(1, batch_size * len(texts.test[0]["input_ids"]) // len(texts.windows[0]))
        own = scored(texts.windows, size)
        for name, windows in texts.others.items():
            scores = scored(windows, size)
            for place, found in enumerate(others):
                found[name] = domain_auroc(own[place], scores[place])
    return Measured(fitted, *(_metrics(scores) for scores in test), *others)


def _metrics(scores: TokenScores) -> Metrics:
    metrics = scores.evaluation().compute()
    if scores.correct.any() and not scores.correct.all():
        metrics["wrong_token_auroc"] = scores.error_auroc()["predictive_entropy"]
    return metrics
