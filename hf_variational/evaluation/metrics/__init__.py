"""The metrics as modules of `evaluate`: folders for `evaluate.load(metric_path(name))` and `evaluate.combine`.

Modules with the same inputs combine; `docs/metrics.md` says which have which.
"""

from pathlib import Path

METRIC_MODULES = (
    "nll",
    "perplexity",
    "bits_per_byte",
    "cvar_nll",
    "expected_calibration_error",
    "maximum_calibration_error",
    "classwise_calibration_error",
    "brier_score",
    "predictive_entropy",
    "expected_entropy",
    "mutual_information",
    "conditional_variance",
    "top1_flip_rate",
    "auroc",
    "aupr",
    "fpr_at_tpr",
    "aurc",
    "excess_aurc",
    "prediction_rejection_ratio",
    "rank_calibration_error",
)


def metric_path(name: str) -> str:
    """Where the module is that `evaluate.load` loads.

    Args:
        name: one of `METRIC_MODULES`.

    Raises:
        ValueError: for another name.

    Example:

    ```python
    >>> auroc = evaluate.load(metric_path("auroc"))
    >>> auroc.compute(predictions=scores.values["predictive_entropy"], references=~scores.correct)
    ```
    """
    if name not in METRIC_MODULES:
        raise ValueError(f"There is no metric {name!r}: it is one of {', '.join(METRIC_MODULES)}.")
    return str(Path(__file__).parent / name)
