"""The gate of the best checkpoint: one whose units are not inside their band enough is no candidate."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import TrainingArguments
from transformers.utils import logging

from .settings import RegimeControl

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Gate:
    """
    What a checkpoint needs to be a candidate for the best one.

    Args:
        min_inside: Floor of the share of units inside their band.
        metric: The metric that chooses, as an evaluation logs it (`eval_nll`; of one of several evaluation sets
            `eval_<set>_nll`).
    """

    min_inside: float
    metric: str

    @classmethod
    def of(cls, args: TrainingArguments) -> "Gate | None":
        """The gate of a training, or `None`."""
        regime = RegimeControl.of(args.regime)
        if regime is None or regime.min_inside is None or args.metric_for_best_model is None:
            return None
        metric = args.metric_for_best_model
        return cls(regime.min_inside, metric if metric.startswith("eval_") else f"eval_{metric}")

    def inside(self, metrics: Mapping[str, float]) -> float | None:
        """The share inside of the evaluation that has the metric; `None`: these metrics are not of that evaluation."""
        if self.metric not in metrics:
            return None
        end = "_regime_inside"
        # the longest prefix: eval_<set> is longer than eval
        found = [name for name in metrics if name.endswith(end) and self.metric.startswith(name.removesuffix(end))]
        return metrics[max(found, key=len)] if found else None

    def admits(self, metrics: Mapping[str, float]) -> bool:
        """Whether the checkpoint of this evaluation may be the best one."""
        inside = self.inside(metrics)
        return inside is None or inside >= self.min_inside

    def warn_that_none_was_admitted(self, log_history: Sequence[Mapping[str, float]]) -> None:
        """Says in a warning that no evaluation of a training was admitted, and how near the best came."""
        seen = [(inside, entry["step"]) for entry in log_history if (inside := self.inside(entry)) is not None]
        if seen:
            inside, step = max(seen)
            logger.warning(
                f"No checkpoint had a share of units inside their band of regime.min_inside={self.min_inside}: the "
                f"highest was {inside:.3f}, at step {step}. None is the best one; the last weights are kept. Lower "
                "the floor, widen the band, or steer the units (homeostasis, projection)."
            )
