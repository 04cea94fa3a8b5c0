"""What the training steps since the last log have measured, read on the host only when somebody asks.

A row of numbers per micro-batch stays on the device. Reading them is one transfer per log, so an ordinary step never
waits for the accelerator.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .statistics import StatisticsMean

# Rows kept before they are added up, so that a run that never logs stays bounded.
MAX_ROWS = 256


class StepRecorder:
    """
    Sums over the micro-batches of a step and averages over the steps since the last flush.

    The values added are shares of the accumulated batch (each already divided by the target tokens of the whole
    batch), which is why the micro-batches of a step add up.
    """

    def __init__(self):
        self.names: list[str] = []
        self._clear()

    def _clear(self) -> None:
        self._rows: list[Tensor] = []
        self._row_steps: list[int] = []
        self._sum: Tensor | None = None
        self._weights: dict[int, float] = {}
        self._statistics = StatisticsMean()

    @torch.no_grad()
    def add(self, step: int, values: Mapping[str, Tensor], kl_weight: float | None = None) -> None:
        """Adds a micro-batch of `step`: 0-dim tensors under the names that are logged."""
        row = torch.stack([value.detach().float() for value in values.values()])
        if list(values) != self.names:
            if self._rows or self._sum is not None:
                raise ValueError(f"A micro-batch reported {list(values)} after others reported {self.names}.")
            self.names = list(values)
        self._rows.append(row)
        self._row_steps.append(step)
        if kl_weight is not None:
            self._weights[step] = kl_weight
        else:
            self._weights.setdefault(step, 0.0)

    def add_statistics(self, posteriors: Mapping | None, attention_posteriors: Mapping | None = None) -> None:
        """Adds the statistics of a micro-batch: `{layer: PosteriorStatistics}`, `{layer: AttentionStatistics}`."""
        self._statistics.add(posteriors, attention_posteriors)

    @property
    def pending(self) -> bool:
        """Whether micro-batches were added since the last flush."""
        return bool(self._rows)

    @property
    def full(self) -> bool:
        """Whether it is time to `fold`."""
        return len(self._rows) >= MAX_ROWS

    def fold(self) -> None:
        """Adds the rows up into one; call it after `first_non_finite`, which can then no longer tell them apart."""
        if self._rows:
            total = torch.stack(self._rows).sum(0)
            self._sum = total if self._sum is None else self._sum + total
            self._rows, self._row_steps = [], []

    def last_is_finite(self) -> bool:
        """Whether the last micro-batch is finite; waits for the device."""
        return bool(self._rows[-1].isfinite().all())

    def first_non_finite(self) -> tuple[int, list[str]] | None:
        """Step and names of the first micro-batch with a value that is not finite; waits for the device."""
        if not self._rows:
            return None
        finite = torch.stack(self._rows).isfinite().cpu()
        bad = (~finite.all(1)).nonzero().flatten()
        if not len(bad):
            return None
        first = int(bad[0])
        return self._row_steps[first], [name for name, ok in zip(self.names, finite[first], strict=True) if not ok]

    def non_finite_statistics(self) -> dict[str, list[int]]:
        """Layers whose gathered statistics are not finite, by statistic; waits for the device."""
        return self._statistics.non_finite()

    def flush(self, mean_over_processes: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The averages since the last flush as plain floats; forgets them."""
        if not self._rows and self._sum is None:
            return {}
        self.fold()
        averages = self._sum / len(self._weights)
        vector = torch.cat([averages, self._statistics.sums()]) if self._statistics else averages
        averages, sums = mean_over_processes(vector).split([len(averages), len(vector) - len(averages)])
        statistics = self._statistics.summary(sums) if self._statistics else {}
        numbers = torch.cat([averages, *(value.reshape(1) for value in statistics.values())]).tolist()
        logs = dict(zip(self.names, numbers, strict=False))
        if self.reports_kl:
            logs["kl_weight"] = sum(self._weights.values()) / len(self._weights)
        logs.update(zip(statistics, numbers[len(self.names) :], strict=True))
        self._clear()
        return logs

    @property
    def reports_kl(self) -> bool:
        return "kl" in self.names


def layer_names(layers: Sequence[int]) -> list[str]:
    """The names under which the KL of each layer is logged."""
    return [f"kl/layer_{layer}" for layer in layers]
