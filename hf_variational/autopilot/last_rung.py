"""The last rung: the trials that are trained to their end, once more with further seeds."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import optuna
import torch

from .objective import NLL
from .outcome import TrialRow
from .runs import TrialRuns

__all__ = ["run_last_rung", "runs_of"]

_PREFIX = "seed run"


def runs_of(study: optuna.Study) -> dict[int, dict[int, dict[str, float] | str]]:
    """The runs that are done: metrics, or the error that ended it, by trial and seed."""
    found: dict[int, dict[int, dict[str, float] | str]] = {}
    for name, value in study.user_attrs.items():
        if name.startswith(f"{_PREFIX} "):
            number, seed = map(int, name.removeprefix(_PREFIX).split())
            found.setdefault(number, {})[seed] = json.loads(value)
    return found


def run_last_rung(
    study: optuna.Study,
    runs: TrialRuns,
    rows: list[TrialRow],
    seeds: list[int],
    watch,
    time_is_up: Callable[[], bool],
) -> None:
    """
    Trains the finalists with further seeds, seed by seed, so that a budget which ends leaves them comparable. What is
    done already is not done again.

    Args:
        study: keeps the results.
        runs: makes what is trained.
        rows: the finalists.
        seeds: the further seeds.
        watch: is told, see [`Watch`].
        time_is_up: whether no other run may begin.
    """
    done = runs_of(study)
    for seed in seeds:
        for row in rows:
            if seed in done.get(row.number, {}):
                continue
            if time_is_up():
                return
            watch.update(f"trial {row.number} with seed {seed}")
            start = time.perf_counter()
            try:
                result: dict[str, float] | str = runs.train(row.values, seed)
                text = f"NLL {result[NLL]:.4f}"
            except (FloatingPointError, torch.OutOfMemoryError) as error:
                result = text = " ".join(str(error).split())
            seconds = time.perf_counter() - start
            study.set_user_attr(f"{_PREFIX} {row.number} {seed}", json.dumps(result))
            study.set_user_attr("seconds", study.user_attrs.get("seconds", 0.0) + seconds)
            watch.update("", advance=1)
            watch.say(f"trial {row.number} with seed {seed}: {text} ({seconds:.0f} s)")
