"""What a report is of, and how it is made."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...checks import check_whole
from ..shift_windows import WINDOW_LENGTHS


@dataclass(frozen=True)
class Contender:
    """A model in a report.

    Attributes:
        model: a causal language model, variational or not.
        num_posterior_samples: S; 0 is the mean pass.
        tempered: whether it also gets a column at a temperature fitted on the validation data.
        notes: sentences about how it was made, for the report.
        training: what is known of its training: `steps` and `nll`, `eval_steps` and `eval_nll` of the training curve,
            `tokens`, `flops`.
    """

    model: Any
    num_posterior_samples: int = 0
    tempered: bool = False
    notes: tuple[str, ...] = ()
    training: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluationSettings:
    """How a report is made.

    Attributes:
        batch_size: sequences of a batch; of short windows as many as have as many tokens.
        validation_fraction: of the data, split off its front where no validation data is given; 0 does without, and so
            without what is fitted on it.
        window_lengths: tokens of the windows of other texts; those that no text fills are left out.
        max_windows: windows of each text and length; of long ones, whose AUROCs are near 1, at most as many as have
            16,000 tokens.
        prefix: tokens in front of every window, such as the beginning of a sequence.
        num_bins: of the calibration errors.
        target_risk, delta: of the selective policy.
        num_resamples: of the documents, for the intervals.
        max_corrupted: sequences whose context is corrupted.
        internal: whether to add the statistics of the posteriors (KL, scale, mean energy), which with all layers
            variational take a tenth of a pass.
    """

    batch_size: int = 8
    validation_fraction: float = 0.2
    window_lengths: tuple[int, ...] = WINDOW_LENGTHS
    max_windows: int = 500
    prefix: tuple[int, ...] = ()
    num_bins: int = 15
    target_risk: float = 0.2
    delta: float = 0.1
    num_resamples: int = 400
    max_corrupted: int = 128
    internal: bool = True

    def __post_init__(self):
        for name in ("batch_size", "max_windows", "num_bins", "max_corrupted"):
            check_whole(name, getattr(self, name), 1)
        check_whole("num_resamples", self.num_resamples, 2)
        for length in self.window_lengths:
            check_whole("window_lengths", length, 1)
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"`validation_fraction` is a share in [0, 1), got {self.validation_fraction!r}.")
        for name in ("target_risk", "delta"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"`{name}` is a number between 0 and 1, got {getattr(self, name)!r}.")
