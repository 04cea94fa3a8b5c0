"""The numbers of a report as a Hub model card's metadata takes them."""

import math
import re
from typing import TYPE_CHECKING

from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index

if TYPE_CHECKING:
    from .report import EvaluationReport

# The metric's type on the Hub, its place in a contender's sections, and its name.
INDEXED = (
    ("perplexity", ("quality", "perplexity"), "Perplexity"),
    ("accuracy", ("quality", "accuracy"), "Accuracy (next token)"),
    ("expected_calibration_error", ("quality", "expected_calibration_error"), "Expected calibration error"),
    ("brier_score", ("quality", "brier_score"), "Brier score"),
    ("roc_auc", ("error_detection", "predictive_entropy", "auroc"), "AUROC of wrong tokens, predictive entropy"),
    ("roc_auc", ("error_detection", "mutual_information", "auroc"), "AUROC of wrong tokens, mutual information"),
)


def eval_results(report: "EvaluationReport", contender: str | None = None) -> list[EvalResult]:
    """
    A contender's numbers as `huggingface_hub` has them: for `ModelCardData(eval_results=...)`.

    Args:
        contender: its name in the report; `None`: the model.
    """
    contender = next(iter(report.contenders)) if contender is None else contender
    if contender not in report.contenders:
        raise ValueError(f"The report has no {contender!r}; it has {', '.join(report.contenders)}.")
    data = report.configuration["data"]["name"]
    samples = report.contenders[contender]["num_posterior_samples"]
    drawn = f"{samples} posterior samples" if samples else "mean pass"
    results = []
    for kind, place, label in INDEXED:
        value = report.value(contender, *place)
        if value is not None and math.isfinite(value):
            results.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type=re.sub(r"[^a-z0-9]+", "-", data.lower()).strip("-") or "evaluation-data",
                    dataset_name=data,
                    metric_type=kind,
                    metric_name=f"{label} ({drawn})",
                    metric_value=float(f"{value:.6g}"),
                    metric_args={"seed": report.seed},
                )
            )
    return results


def model_index(report: "EvaluationReport", contender: str | None = None) -> str:
    """
    YAML of `model-index`, for `huggingface_hub.metadata_update(repo, yaml.safe_load(text))` or the top of a card.

    Args:
        contender: as in [`eval_results`].
    """
    import yaml

    index = eval_results_to_model_index(report.model, eval_results(report, contender))
    return yaml.safe_dump({"model-index": _without_empty(index)}, sort_keys=False, allow_unicode=True)


def _without_empty(value):
    if isinstance(value, list):
        return [_without_empty(entry) for entry in value]
    if isinstance(value, dict):
        return {key: _without_empty(entry) for key, entry in value.items() if entry is not None}
    return value
