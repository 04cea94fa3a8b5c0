"""Ratios of times measured in one process: A B A C A B A C ..., so that whatever slows the machine slows both sides.

Every contender is timed between two runs of the baseline and divided by their mean; a row of a table is the median of
these ratios and the range they span.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Reading:
    """One run: seconds on the wall, and seconds of processor time of this process, over all its threads."""

    wall: float
    cpu: float


@dataclass
class Series:
    """The runs of one contender and, beside each, the baseline's around it."""

    readings: list[Reading] = field(default_factory=list)
    baselines: list[Reading] = field(default_factory=list)

    def add(self, reading: Reading, baseline: Reading) -> None:
        self.readings.append(reading)
        self.baselines.append(baseline)

    def seconds(self, clock: str) -> float:
        return statistics.median(getattr(reading, clock) for reading in self.readings)

    def ratios(self, clock: str) -> list[float]:
        return [
            getattr(reading, clock) / getattr(baseline, clock)
            for reading, baseline in zip(self.readings, self.baselines, strict=True)
        ]

    def summary(self) -> dict:
        """Plain numbers: the median of both clocks, and of both ratios with the range they span."""
        result = {}
        for clock in ("wall", "cpu"):
            ratios = self.ratios(clock)
            result[f"{clock}_seconds"] = self.seconds(clock)
            result[f"{clock}_ratio"] = statistics.median(ratios)
            result[f"{clock}_ratio_range"] = [min(ratios), max(ratios)]
        return {**result, "rounds": len(self.readings)}


def read(run: Callable[[], object], synchronize: Callable[[], None]) -> Reading:
    """Times one run, to the end of what it has queued on the device."""
    synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    synchronize()
    return Reading(time.perf_counter() - wall, time.process_time() - cpu)


def interleave(
    baseline: Callable[[], object],
    contenders: dict[str, Callable[[], object]],
    rounds: int,
    warmup: int = 1,
    device: torch.device | str = "cpu",
) -> dict[str, Series]:
    """Runs baseline and contenders in turn.

    Args:
        baseline: what every contender is divided by.
        contenders: by name.
        rounds: runs of each contender that count.
        warmup: rounds before, which do not.
        device: where the work is queued.

    Returns:
        A series for each contender; `"baseline"` compares each run of the baseline with the one before, and so shows
        the noise.
    """
    wait = synchronizer(device)
    series = {name: Series() for name in ("baseline", *contenders)}
    with quiet():
        for number in range(-warmup, rounds):
            counts = number >= 0
            before = read(baseline, wait)
            for name, run in contenders.items():
                reading = read(run, wait)
                after = read(baseline, wait)
                if counts:
                    series[name].add(reading, _mean(before, after))
                    series["baseline"].add(after, before)
                before = after
    return series


def _mean(a: Reading, b: Reading) -> Reading:
    return Reading((a.wall + b.wall) / 2, (a.cpu + b.cpu) / 2)


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps the garbage collector out of the measured runs."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def accelerator() -> torch.device | None:
    """The CUDA device of this machine, or `None`."""
    return torch.device("cuda") if torch.cuda.is_available() else None


def synchronizer(device: torch.device | str) -> Callable[[], None]:
    return torch.cuda.synchronize if torch.device(device).type == "cuda" else (lambda: None)
