"""What a language model's predictions are worth: likelihood, calibration, tails and the predictive measures."""

from .language_model import evaluate_language_model
from .streaming import METRIC_NAMES, StreamingEvaluation, conditional_value_at_risk, mask_repeated_rows

__all__ = [
    "METRIC_NAMES",
    "StreamingEvaluation",
    "conditional_value_at_risk",
    "evaluate_language_model",
    "mask_repeated_rows",
]
