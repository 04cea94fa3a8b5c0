"""What a language model's predictions are worth: likelihood, calibration, tails and the predictive measures."""

from .domains import domain_auroc, evaluate_domains, mean_over_domains, token_windows
from .language_model import evaluate_language_model
from .predictions import INTERNAL_NAMES
from .ranking import auroc
from .streaming import METRIC_NAMES, StreamingEvaluation, conditional_value_at_risk, mask_repeated_rows
from .temperature import FittedTemperature, fit_temperature, optimal_temperature, temper
from .token_scores import SCORE_NAMES, TokenScores, scores_at_temperatures, token_scores

__all__ = [
    "INTERNAL_NAMES",
    "METRIC_NAMES",
    "SCORE_NAMES",
    "FittedTemperature",
    "StreamingEvaluation",
    "TokenScores",
    "auroc",
    "conditional_value_at_risk",
    "domain_auroc",
    "evaluate_domains",
    "evaluate_language_model",
    "fit_temperature",
    "mask_repeated_rows",
    "mean_over_domains",
    "optimal_temperature",
    "scores_at_temperatures",
    "temper",
    "token_scores",
    "token_windows",
]
