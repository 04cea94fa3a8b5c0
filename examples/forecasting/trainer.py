"""VariationalTrainer for forecasters: the same loop, with the scores of a forecast in the place of those of a text."""

from hf_variational.training import VariationalTrainer

from .data import IGNORED
from .metrics import ForecastMetrics


class ForecastTrainer(VariationalTrainer):
    """[`VariationalTrainer`] that logs [`ForecastMetrics`] as `eval_<name>` and `eval_mean_pass_<name>`."""

    def _new_metrics(self):
        return ForecastMetrics()

    def _update_metrics(self, metrics, outputs, labels) -> None:
        metrics.update(outputs, labels)

    def _num_targets(self, labels) -> float:
        return float((labels != IGNORED).sum())
