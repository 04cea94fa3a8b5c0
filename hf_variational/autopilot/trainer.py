"""The trainer whose `hyperparameter_search` is AutoPilot's search."""

from __future__ import annotations

import time
from typing import Any

import optuna
import torch
from optuna.trial import TrialState
from transformers import default_data_collator

from ..training.trainer import VariationalTrainer
from .dimensions import SpaceError
from .objective import NLL
from .runs import TrialRuns, metrics_of
from .sampling import counts

__all__ = ["SearchTrainer", "TrialFailed"]

# So many trials that fail before one does not are a mistake of the space, not of a trial.
_ALL_FAILED = 3


class TrialFailed(Exception):
    """A trial's values cannot be trained; the search goes on without it."""


class SearchTrainer(VariationalTrainer):
    """
    Runs transformers' [`~transformers.Trainer.hyperparameter_search`] over whole recipes.

    The Trainer's own loop changes arguments of one trainer from trial to trial. A recipe's values also decide on the
    model, the data and the callbacks, so every trial gets a trainer of its own here, made as `hf-variational train`
    makes it; that trainer reports its evaluations to the trial, and is stopped by its pruner, as transformers does it.

    Args:
        runs: Makes what a trial trains.
        watch: Is told what happens, see [`Watch`].
    """

    def __init__(self, runs: TrialRuns, watch):
        self.runs, self.watch = runs, watch
        recipe = runs.recipe({})
        data = runs.data(recipe)
        super().__init__(
            None,
            runs.arguments(recipe),
            model_init=runs.model,
            train_dataset=data.train,
            eval_dataset=data.validation,
            processing_class=data.tokenizer,
            data_collator=default_data_collator,
        )

    def train(self, resume_from_checkpoint=None, trial=None, **kwargs) -> None:
        """
        Trains one trial to its end, or until it is pruned.

        Raises:
            optuna.TrialPruned: if it is stopped at a rung.
            TrialFailed: if its values cannot be trained; the reason is its attribute `error`.
            SpaceError: if no trial before it could be trained either, or a gate names no metric.
        """
        start = time.perf_counter()
        state = "interrupted"
        try:
            self._train(trial)
            state = "complete"
        except optuna.TrialPruned:
            state = "pruned"
            raise
        except SpaceError:
            raise
        except (
            FloatingPointError,
            ValueError,
            torch.OutOfMemoryError,
        ) as error:  # also values that exclude each other
            state = "failed"
            trial.set_user_attr("error", " ".join(str(error).split()))
            self._refuse_hopeless(trial, error)
            raise TrialFailed(str(error)) from error
        finally:
            seconds = time.perf_counter() - start
            trial.set_user_attr("seconds", seconds)
            if state in ("complete", "pruned"):
                for metric, violation in trial.user_attrs["violations"].items():
                    trial.set_constraint(metric, violation)
            study = trial.study
            study.set_user_attr("seconds", study.user_attrs.get("seconds", 0.0) + seconds)
            self.runs.clear()
            self.watch.ended(trial, state)

    def _train(self, trial) -> None:
        values = self.runs.space.suggest(trial)
        self.watch.began(trial, values)
        trainer = self.runs.trainer(self.runs.recipe(values), self.call_model_init(trial))
        cost = self.runs.cost(trainer)
        curve: list[list[float]] = []

        def judge(evaluation: dict[str, Any]):
            metrics = metrics_of(evaluation) | cost
            step = trainer.state.global_step
            violations = self.runs.space.violations(metrics)
            curve.append([step, metrics[NLL], sum(violations.values())])
            facts = {"metrics": metrics, "violations": violations, "curve": curve}
            for name, value in {**facts, "max_steps": trainer.state.max_steps}.items():
                trial.set_user_attr(name, value)
            self.watch.evaluated(trial, step, trainer.state.max_steps, metrics[NLL])
            return self.compute_objective(metrics)

        trainer.hp_search_backend, trainer.hp_space, trainer.hp_name = (
            self.hp_search_backend,
            self.hp_space,
            self.hp_name,
        )
        trainer.compute_objective = judge
        trainer.train(trial=trial)
        if not curve or curve[-1][0] < trainer.state.global_step:
            trainer.objective = judge(trainer.evaluate())
        self.objective = trainer.objective
        # what the search frees after a trial
        self.model, self.model_wrapped = trainer.model, trainer.model_wrapped

    def _refuse_hopeless(self, trial, error: Exception) -> None:
        others = [other for other in trial.study.get_trials(deepcopy=False) if counts(other)]
        if len(others) + 1 >= _ALL_FAILED and all(other.state == TrialState.FAIL for other in others):
            raise SpaceError(f"None of the first {len(others) + 1} trials could be trained. The last one: {error}")
