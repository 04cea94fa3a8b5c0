"""How much of the objectives' variance each key explains."""

from __future__ import annotations

import optuna
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.trial import TrialState

from .objective import NLL, PARETO

__all__ = ["importance_of"]


def importance_of(study: optuna.Study, objective: str) -> dict[str, dict[str, float]]:
    """
    The functional analysis of variance of Hutter et al. (2014) over the trials that were trained to their end, whether
    or not they pass the gates.

    Returns:
        By objective and key, the share of the variance that a forest attributes to the key alone; they sum to 1. Empty
        for fewer than two trials, and without an objective that is the same for all.
    """
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    found = {}
    for metric in PARETO if objective == "pareto" else (NLL,):
        if len({trial.user_attrs["metrics"][metric] for trial in complete}) < 2:
            continue
        shares = get_param_importances(
            study,
            evaluator=FanovaImportanceEvaluator(seed=0),
            target=lambda trial, metric=metric: trial.user_attrs["metrics"][metric],
        )
        found[metric] = {key: float(share) for key, share in shares.items()}
    return found
