"""What a language model's predictions are worth: likelihood, calibration, tails and the predictive measures."""

from .calibration import (
    ClasswiseCalibration,
    ReliabilityCurve,
    brier,
    expected_calibration_error,
    maximum_calibration_error,
    rank_calibration_error,
    reliability_curve,
)
from .domains import domain_auroc, evaluate_domains, mean_over_domains, token_windows
from .language_model import evaluate_language_model
from .likelihood import bits_per_byte, conditional_value_at_risk
from .metrics import METRIC_MODULES, metric_path
from .predictions import INTERNAL_NAMES
from .ranking import (
    RiskCoverageCurve,
    aupr,
    aurc,
    auroc,
    detection,
    excess_aurc,
    fpr_at_tpr,
    prediction_rejection_ratio,
    risk_coverage_curve,
)
from .streaming import METRIC_NAMES, StreamingEvaluation, mask_repeated_rows
from .temperature import FittedTemperature, fit_temperature, optimal_temperature, temper
from .token_scores import SCORE_NAMES, TokenScores, scores_at_temperatures, token_scores

__all__ = [
    "INTERNAL_NAMES",
    "METRIC_MODULES",
    "METRIC_NAMES",
    "SCORE_NAMES",
    "ClasswiseCalibration",
    "FittedTemperature",
    "ReliabilityCurve",
    "RiskCoverageCurve",
    "StreamingEvaluation",
    "TokenScores",
    "aupr",
    "aurc",
    "auroc",
    "bits_per_byte",
    "brier",
    "conditional_value_at_risk",
    "detection",
    "domain_auroc",
    "evaluate_domains",
    "evaluate_language_model",
    "excess_aurc",
    "expected_calibration_error",
    "fit_temperature",
    "fpr_at_tpr",
    "mask_repeated_rows",
    "maximum_calibration_error",
    "mean_over_domains",
    "metric_path",
    "optimal_temperature",
    "prediction_rejection_ratio",
    "rank_calibration_error",
    "reliability_curve",
    "risk_coverage_curve",
    "scores_at_temperatures",
    "temper",
    "token_scores",
    "token_windows",
]
