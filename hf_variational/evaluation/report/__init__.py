"""One call that measures a model and what it is compared with, and the report that comes of it."""

from .evaluate import evaluate_model
from .metadata import eval_results, model_index
from .report import EvaluationReport
from .rows import text_rows
from .settings import Contender, EvaluationSettings

__all__ = [
    "Contender",
    "EvaluationReport",
    "EvaluationSettings",
    "eval_results",
    "evaluate_model",
    "model_index",
    "text_rows",
]
