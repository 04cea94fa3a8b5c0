"""The folder of a search: what is searched, and the study that the search goes on from."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import optuna
from optuna.trial import TrialState

from ..files import write_whole
from .dimensions import Space
from .objective import PARETO
from .outcome import TrialRow
from .sampling import counts

__all__ = ["NAME", "check_same", "description_of", "open_study", "rows_of", "storage_of"]

NAME, _STUDY, _SEARCH = "autopilot", "study.db", "search.json"
_ABSENT = object()


def description_of(recipe: dict, space: Space, objective: str) -> dict:
    """What makes a search the search it is, as plain values."""
    recipe = json.loads(json.dumps(recipe))
    recipe["arguments"].pop("output_dir")
    recipe["data"].pop("num_proc")
    dimensions = {d.key: {"kind": type(d).__name__, **dataclasses.asdict(d)} for d in space.dimensions}
    gates = {gate.metric: dataclasses.asdict(gate) for gate in space.gates}
    searched = {"dimensions": dimensions, "gates": gates, "halving": dataclasses.asdict(space.halving)}
    return json.loads(json.dumps({"objective": objective, "recipe": recipe, "space": searched}))


def check_same(folder: Path, description: dict) -> None:
    """
    Sees that the search in the folder is this one; an empty one gets its description.

    Raises:
        FileExistsError: if it has something else in it.
        ValueError: if the search in it is another; it names what differs.
    """
    file = folder / _SEARCH
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        here, there = _flat(description), _flat(before)
        for key in sorted({*here, *there}):
            now, then = here.get(key, _ABSENT), there.get(key, _ABSENT)
            if now != then:
                shown = ["nothing" if value is _ABSENT else repr(value) for value in (then, now)]
                raise ValueError(
                    f"The search in {folder} has {key}={shown[0]}, and this one {shown[1]}: trials of two searches "
                    "cannot be compared. Name another --output."
                )
        return
    if folder.is_dir() and any(path.name != ".lock" for path in folder.iterdir()):
        raise FileExistsError(
            f"The output folder {folder} is not empty, and no search is in it: name another --output."
        )
    write_whole(file, json.dumps(description, indent=1) + "\n")


def _flat(value, prefix: str = "") -> dict[str, object]:
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    return {
        name: leaf
        for key, entry in value.items()
        for name, leaf in _flat(entry, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def storage_of(folder: Path) -> optuna.storages.RDBStorage:
    """Where the trials are kept: one SQLite file."""
    return optuna.storages.RDBStorage(f"sqlite:///{folder / _STUDY}")


def open_study(storage: optuna.storages.RDBStorage, objective: str) -> optuna.Study:
    """The study that is kept there, made if it is not; a trial that another process left running has failed."""
    directions = ["minimize"] * (len(PARETO) if objective == "pareto" else 1)
    study = optuna.create_study(storage=storage, study_name=NAME, directions=directions, load_if_exists=True)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
    return study


def rows_of(study: optuna.Study, space: Space) -> list[TrialRow]:
    """The trials that count, by number."""
    states = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
    return [
        TrialRow(
            number=trial.number,
            state=states[trial.state],
            values=space.values(trial.params),
            **{
                name: trial.user_attrs[name]
                for name in ("metrics", "violations", "curve", "seconds", "error")
                if name in trial.user_attrs
            },
        )
        for trial in study.get_trials(deepcopy=False)
        if counts(trial)
    ]
