"""What Optuna proposes and what it stops, so that a search which was interrupted goes on as if it had not been."""

from __future__ import annotations

import optuna
from optuna.samplers import BaseSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from ..training.callbacks import noise_seed

__all__ = ["Halved", "RepeatableSampler", "counts", "was_interrupted"]


def was_interrupted(trial: FrozenTrial) -> bool:
    """Whether a trial stopped for no reason of its own: it is repeated, and nothing learns from it."""
    return trial.state == TrialState.FAIL and "error" not in trial.user_attrs


def counts(trial: FrozenTrial) -> bool:
    """Whether a trial is one of the number that was asked for."""
    return trial.state.is_finished() and not was_interrupted(trial)


class RepeatableSampler(BaseSampler):
    """
    Optuna's tree-structured Parzen estimator (Bergstra et al. 2011), whose proposal for the n-th trial follows from
    the seed, n and the finished trials. A study keeps those and not a sampler's generator. Where trials have
    constraints, those that violate one are below all others to the estimator.

    Args:
        seed: Of the proposals.
    """

    def __init__(self, seed: int):
        self._seed = seed
        self._sampler: TPESampler | None = None

    def before_trial(self, study, trial) -> None:
        number = sum(counts(other) for other in study.get_trials(deepcopy=False))
        self._sampler = TPESampler(seed=noise_seed(self._seed, number, "search"))
        self._sampler.before_trial(study, trial)

    def infer_relative_search_space(self, study, trial):
        return self._sampler.infer_relative_search_space(study, trial)

    def sample_relative(self, study, trial, search_space):
        return self._sampler.sample_relative(study, trial, search_space)

    def sample_independent(self, study, trial, param_name, param_distribution):
        return self._sampler.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study, trial, state, values) -> None:
        if self._sampler is not None:  # a trial that another process left behind was not proposed here
            self._sampler.after_trial(study, trial, state, values)


class _WithoutInterrupted:
    """A study as if the trials that were interrupted had never begun."""

    def __init__(self, study):
        self._study = study

    def get_trials(self, deepcopy=True, states=None):
        return [t for t in self._study.get_trials(deepcopy=deepcopy, states=states) if not was_interrupted(t)]

    def __getattr__(self, name):
        return getattr(self._study, name)


class Halved(optuna.pruners.SuccessiveHalvingPruner):
    """Successive halving that leaves a trial alone once it is trained to its end."""

    def prune(self, study, trial) -> bool:
        if trial.last_step is not None and trial.last_step >= trial.user_attrs["max_steps"]:
            return False
        return super().prune(_WithoutInterrupted(study), trial)
