"""What a language model's predictions are worth: likelihood, calibration, tails and the predictive measures."""

from importlib import import_module

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

# Imported when first asked for: they need scipy.stats and scikit-learn's models, which a training does not.
_LAZY = {
    "Estimate": ".statistics",
    "bootstrap_documents": ".statistics",
    "correlation": ".statistics",
    "document_mean": ".statistics",
    "over_seeds": ".statistics",
    "paired_difference": ".statistics",
    "CombinedScore": ".selective",
    "RiskCoverage": ".selective",
    "risk_coverages": ".selective",
    "Decision": ".selective_policy",
    "FittedSelectivePolicy": ".selective_policy",
    "SelectivePolicy": ".selective_policy",
    "SelectiveResult": ".selective_policy",
    "READOUT_NAMES": ".readouts",
    "ReadoutScores": ".readouts",
    "ReadoutSelection": ".readouts",
    "choose_readout": ".readouts",
    "evaluate_readouts": ".readouts",
    "read_samples": ".readouts",
    "select_readout": ".readouts",
    "CORRUPTIONS": ".shift",
    "CORRUPTION_RATES": ".shift",
    "CorruptionSweep": ".shift",
    "corrupt": ".shift",
    "corruption_sweep": ".shift",
    "context_slices": ".shift_slices",
    "frequency_slices": ".shift_slices",
    "score_metrics": ".shift_slices",
    "token_counts": ".shift_slices",
    "domain_detection": ".shift_windows",
    "evaluate_ood": ".shift_windows",
    "ood_windows": ".shift_windows",
    "SampleConvergence": ".convergence",
    "sample_convergence": ".convergence",
    "Contender": ".report",
    "EvaluationReport": ".report",
    "EvaluationSettings": ".report",
    "evaluate_model": ".report",
    "text_rows": ".report",
}


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])


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
