"""Schedules of the KL weight: pure functions of the optimizer step, so a resumed run continues where it stopped.

Each returns a factor in [0, 1] for the step that is about to be taken, counted from 0; the weight is the factor times
the full weight.
"""

import math

KL_SCHEDULES = ("constant", "linear_warmup", "cyclical")


def constant(step: int) -> float:
    """The full weight at every step."""
    return 1.0


def linear_warmup(step: int, warmup_steps: int) -> float:
    """
    From 0 at the first step to the full weight at step `warmup_steps`, then constant.

    A model that has not learnt anything yet lowers its loss fastest by giving up its latents (Bowman et al. 2016,
    arXiv 1511.06349): the warm-up lets the likelihood speak first.
    """
    if warmup_steps <= 0:
        return 1.0
    return min(1.0, step / warmup_steps)


def cyclical(step: int, total_steps: int, cycles: int, ratio: float) -> float:
    """
    `cycles` warm-ups one after the other, each over the first `ratio` of its cycle (Fu et al. 2019, arXiv 1903.10145).

    With t the position in the cycle, from 0 to 1, the factor is min(1, t / ratio). After the last step it stays full.
    """
    if step >= total_steps:
        return 1.0
    position = (step * cycles % total_steps) / total_steps
    return min(1.0, position / ratio)


def kl_factor(
    schedule: str,
    step: int,
    total_steps: int,
    warmup_steps: int = 0,
    warmup_ratio: float = 0.0,
    cycles: int = 4,
    cycle_ratio: float = 0.5,
) -> float:
    """The factor of the KL weight at `step`; a positive `warmup_steps` goes before `warmup_ratio`."""
    if schedule == "constant":
        return constant(step)
    if schedule == "linear_warmup":
        return linear_warmup(step, warmup_steps if warmup_steps > 0 else math.ceil(warmup_ratio * total_steps))
    if schedule == "cyclical":
        return cyclical(step, total_steps, cycles, cycle_ratio)
    raise ValueError(f"kl_schedule={schedule!r} is unknown: choose one of {', '.join(KL_SCHEDULES)}.")
