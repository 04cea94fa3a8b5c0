"""A search from a recipe and a space to the best recipe and a report."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import filelock
import optuna
import torch
import transformers
from rich.console import Console

from ..training.arguments import VariationalTrainingArguments
from ..training.recipe import read_content, recipe_from_dict
from .dimensions import Halving, Space, SpaceError
from .importance import importance_of
from .last_rung import run_last_rung, runs_of
from .objective import PARETO, objective_of
from .options import OBJECTIVES
from .outcome import SearchOutcome, finalists_of, front_of, rank
from .progress import Watch
from .results import write_results
from .runs import TrialRuns
from .sampling import Halved, RepeatableSampler, counts, was_interrupted
from .space import load_space
from .study import NAME, check_same, description_of, open_study, rows_of, storage_of
from .trainer import SearchTrainer, TrialFailed

__all__ = ["search"]

# Of the budget, where there is a last rung; the rest is for that.
_SHARE_OF_TRIALS = 2 / 3


def search(
    recipe: str | Path,
    space: str | Path,
    output: str | Path = "runs/autopilot",
    *,
    trials: int = 40,
    budget: float | None = None,
    seeds: int = 3,
    objective: str = "nll",
    overrides: Iterable[str] = (),
    progress: bool = True,
    console: Console | None = None,
) -> SearchOutcome:
    """
    Searches a space of recipes with [`~transformers.Trainer.hyperparameter_search`] and Optuna, and writes the best
    recipe (`best.yaml`), every number (`results.json`) and a page (`report.html`) to `output`. Called again it goes on
    where it stopped.

    Trials are proposed by a tree-structured Parzen estimator, and stopped by successive halving on their evaluations.
    Those that are trained to their end and do best are trained again with `seeds` further seeds, and ranked by the
    mean over these. A trial that misses a gate is worse than every trial that passes.

    Args:
        recipe: A recipe's YAML file, see [`load_recipe`]; its text, its steps and its evaluations are every trial's.
        space: A space's, see [`load_space`].
        output: The folder of the search.
        trials: Trials in all, those of earlier calls included.
        budget: Seconds in all, likewise; no trial begins after two thirds of it, which leaves the rest to the last
            rung. What runs when the time is up runs to its end.
        seeds: Further seeds of the last rung: those after the recipe's own. With 0 there is no last rung.
        objective: `"nll"`: the NLL of the last evaluation. `"pareto"`: the front of NLL, expected calibration error
            and operations of a forward pass; its trials are not pruned, for Optuna prunes only one objective.
        overrides: `section.key=value`, set in the recipe.
        progress: Shows a bar.
        console: Where to.

    Returns:
        The trials, the last rung and the best.

    Raises:
        ValueError: for a space or a recipe that cannot be searched, for another search in the folder, and if no trial
            passes the gates (what is found is written all the same).
        KeyboardInterrupt: on Ctrl-C; what is done is kept, and the report is of that.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective={objective!r} is unknown: choose one of {', '.join(OBJECTIVES)}.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("A search runs in one process: start it without accelerate launch.")
    console, folder = console or Console(), Path(output)
    content = read_content(recipe, overrides)
    checked = recipe_from_dict(content, where=str(recipe))
    if checked.retrofit is not None and checked.retrofit.train == "none":
        raise ValueError("This recipe trains nothing (`retrofit.train: none`): there is nothing to search.")
    found = load_space(space, content)
    first_rung = None  # of a search for a front, whose trials are not pruned
    if objective == "nll":
        first_rung = _first_rung(found.halving, VariationalTrainingArguments(**checked.arguments))
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"The output folder {folder} is a file: name another --output.")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(folder / ".lock", timeout=0), _quiet():
            check_same(folder, description_of(checked.to_dict(), found, objective))
            storage = storage_of(folder)
            study = open_study(storage, objective)
            runs = TrialRuns(content, found, folder, costs=objective == "pareto")
            runs.clear()  # what a call that was killed has left
            clock = _Clock(budget, study.user_attrs.get("seconds", 0.0))
            interrupted = False
            try:
                _search(study, storage, runs, first_rung, objective, trials, clock, seeds, progress, console)
            except KeyboardInterrupt:
                interrupted = True
            facts = {"recipe": str(recipe), "space": str(space), "first_rung": first_rung}
            facts["asked"] = {"trials": trials, "budget_seconds": budget, "seeds": seeds}
            outcome = _outcome(study, found, objective, facts | _facts(runs, seeds, study))
            write_results(outcome, folder, content)
            storage.engine.dispose()
            if interrupted:
                raise KeyboardInterrupt(f"{folder} keeps {len(outcome.rows)} trials; the same command goes on.")
    except filelock.Timeout:
        raise ValueError(f"Another search is at work in {folder}: wait for it, or name another --output.") from None
    if outcome.best is None:
        raise ValueError(_nothing_found(outcome, folder))
    return outcome


def _search(study, storage, runs, first_rung, objective, trials, clock, seeds, progress, console) -> None:
    """The trials that are missing, then the runs of the last rung that are."""
    done = sum(counts(trial) for trial in study.get_trials(deepcopy=False))
    timeout = clock.left(_SHARE_OF_TRIALS if seeds else 1.0)
    watch = Watch(console, progress, trials, done, clock.left)
    passed = [row for row in rows_of(study, runs.space) if row.state == "complete" and not row.missed]
    watch.best = min(((row.nll, row.number) for row in passed), default=None)
    if done < trials and (timeout is None or timeout > 0):
        with watch:
            _run_trials(study, storage, runs, first_rung, objective, trials - done, timeout, watch)
    rows = finalists_of(rows_of(study, runs.space), objective, runs.space.halving.factor)
    further = _further_seeds(runs, seeds)
    finished = runs_of(study)
    missing = [seed for seed in further for row in rows if seed not in finished.get(row.number, {})]
    if missing:
        total = len(rows) * len(further)
        last = Watch(console, progress, total, total - len(missing), clock.left, "runs of the last rung")
        last.best = watch.best
        with last:
            run_last_rung(study, runs, rows, further, last, clock.is_up)


def _run_trials(study, storage, runs, first_rung, objective, number, timeout, watch) -> None:
    trainer = SearchTrainer(runs, watch)
    pruner = optuna.pruners.NopPruner()
    if first_rung is not None:
        pruner = Halved(min_resource=first_rung, reduction_factor=runs.space.halving.factor)
    try:
        trainer.hyperparameter_search(
            hp_space=lambda trial: {},  # a trial's trainer is made with its values
            compute_objective=objective_of(objective, runs.space),
            n_trials=number,
            direction="minimize" if objective == "nll" else ["minimize"] * len(PARETO),
            backend="optuna",
            storage=storage,
            study_name=NAME,
            load_if_exists=True,
            sampler=RepeatableSampler(trainer.args.seed),
            pruner=pruner,
            timeout=timeout,
            catch=(TrialFailed,),
            gc_after_trial=True,
        )
    except SpaceError:
        raise
    except ValueError:
        # The Trainer asks for the best trial in the end, and there may be none that passes. An error on the way leaves
        # a last trial that does not count.
        last = study.get_trials(deepcopy=False)[-1:]
        passed = any(row.state == "complete" and not row.missed for row in rows_of(study, runs.space))
        if passed or not last or not counts(last[0]):
            raise


class _Clock:
    """The budget, of which earlier calls have spent a part."""

    def __init__(self, budget: float | None, spent: float):
        self._budget, self._start = budget, time.monotonic() - spent

    def left(self, share: float = 1.0) -> float | None:
        """Seconds until a share of the budget is spent; `None` without a budget."""
        return None if self._budget is None else share * self._budget - (time.monotonic() - self._start)

    def is_up(self) -> bool:
        left = self.left()
        return left is not None and left <= 0


def _further_seeds(runs: TrialRuns, number: int) -> list[int]:
    own = runs.arguments(runs.recipe({})).seed
    return [own + place for place in range(1, number + 1)]


def _first_rung(halving: Halving, arguments: VariationalTrainingArguments) -> int:
    """
    The steps of the first rung.

    Raises:
        ValueError: if the recipe evaluates nothing on the way, or not at steps that are known.
    """
    if arguments.eval_strategy == "no":
        raise ValueError(
            "Trials are halved on their evaluations, and the recipe has none: set arguments.eval_strategy=steps and "
            "arguments.eval_steps."
        )
    steps = halving.min_steps
    if steps is None:
        every = arguments.eval_steps if arguments.eval_strategy == "steps" else None
        if every is not None and every < 1:
            every = math.ceil(every * arguments.max_steps) if arguments.max_steps > 0 else None
        if every is None:
            raise ValueError(
                "The recipe evaluates at steps that are not known before: set `halving: {min_steps: ...}` in the "
                "space, or arguments.eval_strategy=steps with a whole number of arguments.eval_steps."
            )
        steps = int(every)
    return steps


def _outcome(study: optuna.Study, space: Space, objective: str, facts: dict[str, Any]) -> SearchOutcome:
    rows = rows_of(study, space)
    return SearchOutcome(
        objective=objective,
        rows=rows,
        finalists=rank(finalists_of(rows, objective, space.halving.factor), runs_of(study), space),
        front=[row.number for row in front_of(rows)] if objective == "pareto" else [],
        importance=importance_of(study, objective),
        interrupted=sum(was_interrupted(trial) for trial in study.get_trials(deepcopy=False)),
        facts=facts,
        space=space,
    )


def _facts(runs: TrialRuns, seeds: int, study: optuna.Study) -> dict[str, Any]:
    arguments = runs.arguments(runs.recipe({}))
    return {
        "seconds": study.user_attrs.get("seconds", 0.0),
        "seed": arguments.seed,
        "further_seeds": _further_seeds(runs, seeds),
        "device": arguments.device.type,
        "threads": torch.get_num_threads(),
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "optuna": optuna.__version__,
        },
    }


def _nothing_found(outcome: SearchOutcome, folder: Path) -> str:
    """Why there is no best recipe, in a sentence."""
    complete = [row for row in outcome.rows if row.state == "complete"]
    if outcome.finalists:
        return f"The trials of the last rung fail or miss a gate with further seeds; see {folder / 'report.html'}."
    if not complete:
        return f"No trial was trained to its end; see {folder / 'report.html'}."
    nearest = min(complete, key=lambda row: row.missed)
    missed = ", ".join(
        f"{gate} (it has {nearest.metrics[gate.metric]:.4g})"
        for gate in outcome.space.gates
        if nearest.violations[gate.metric] > 0
    )
    return (
        f"No trial passes the gates. The nearest, trial {nearest.number}, misses {missed}: loosen the gate, or search "
        f"elsewhere. What was found is in {folder / 'report.html'}."
    )


@contextlib.contextmanager
def _quiet():
    """The trials are told of here, and not by those who run them."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
        if not bars:
            datasets.enable_progress_bars()
