"""What to do after a look at a unit, a step or a sequence: answer, draw more posterior samples, or abstain."""

import math
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise

import torch
from torch import Tensor

from ..checks import check_whole

SCHEDULE = (2, 8, 32)


class Action(IntEnum):
    """`NONE` stands where there was nothing to decide, as after the end of a sequence."""

    NONE = -1
    ANSWER = 0
    ABSTAIN = 1
    DRAW_MORE = 2


@dataclass(frozen=True)
class ActionThresholds:
    """Where a score leads; higher is less certain.

    Attributes:
        answer: a score of at most this answers at once.
        abstain: a score above this abstains at once; between the two more samples are drawn while there are any.
        final: where no more samples are to be had, or they would say nothing new, a score of at most this answers.

    Raises:
        ValueError: unless answer <= final <= abstain.
    """

    answer: float = -math.inf
    final: float = math.inf
    abstain: float = math.inf

    def __post_init__(self):
        if not self.answer <= self.final <= self.abstain:
            raise ValueError(
                f"The thresholds are reversed: answer={self.answer!r} <= final={self.final!r} <= "
                f"abstain={self.abstain!r} has to hold, because a lower score is more certain."
            )

    def act(self, score: Tensor, error: Tensor, tolerance: float, last: bool) -> Tensor:
        """The [`Action`] about each unit.

        Args:
            score: [units].
            error: Monte Carlo error of the measure, [units].
            tolerance: below it an error counts as small enough.
            last: whether this is the last look.

        Returns:
            [units], int8.
        """
        settled = torch.ones_like(error, dtype=torch.bool) if last else error < tolerance
        at_final = torch.where(score <= self.final, Action.ANSWER, Action.ABSTAIN)
        between = torch.where(settled, at_final, Action.DRAW_MORE)
        actions = torch.where(score <= self.answer, Action.ANSWER, between)
        return torch.where(score > self.abstain, Action.ABSTAIN, actions).to(torch.int8)


def check_schedule(schedule) -> tuple[int, ...]:
    """The numbers of samples of the looks; raises `ValueError` unless they rise from at least 2."""
    schedule = tuple(schedule)
    if not schedule:
        raise ValueError("`schedule` is empty: name the numbers of posterior samples, such as (2, 8, 32).")
    for size in schedule:
        check_whole("schedule", size, 2)
    if any(later <= earlier for earlier, later in pairwise(schedule)):
        raise ValueError(f"`schedule` has to rise from look to look, got {schedule}.")
    return schedule


def check_tolerance(tolerance) -> float:
    """A tolerance in nats; raises `ValueError` if it is no number of at least 0."""
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not tolerance >= 0:
        raise ValueError(f"`tolerance` is a number of nats of at least 0, got {tolerance!r}.")
    return float(tolerance)
