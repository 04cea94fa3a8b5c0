"""What a search leaves behind: the best recipe, every number, a page."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ..files import plain, write_whole
from ..presentation.autopilot import write_search_report
from ..training.recipe import set_value
from .objective import NLL
from .outcome import Finalist, SearchOutcome, TrialRow, paired_difference

__all__ = ["BEST", "RESULTS", "recipe_text", "write_results"]

BEST, RESULTS, _FRONT = "best.yaml", "results.json", "front"


def recipe_text(content: Mapping, row: TrialRow, output_dir: Path) -> str:
    """A trial's recipe as YAML that `hf-variational train` takes, with what was found said above it."""
    content = copy.deepcopy(dict(content))
    for key, value in {**row.values, "arguments.output_dir": str(output_dir)}.items():
        set_value(content, key, copy.deepcopy(value))
    lines = [f"# Trial {row.number} of a search, whose NLL was {row.nll:.4f} nats a token. The search set:"]
    lines += [f"#   {key}: {json.dumps(value)}" for key, value in row.values.items()]
    return "\n".join(lines) + "\n" + yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def write_results(outcome: SearchOutcome, folder: Path, content: Mapping) -> None:
    """
    Writes `best.yaml` (of a front `front/trial-<number>.yaml` too), `results.json` and `report.html`; a recipe that an
    earlier call has written and this one does not is taken away.
    """
    best = outcome.best
    text = None if best is None else recipe_text(content, best.row, folder / "best")
    if text is None:
        (folder / BEST).unlink(missing_ok=True)
    else:
        write_whole(folder / BEST, text)
    for file in (folder / _FRONT).glob("trial-*.yaml"):
        file.unlink()
    rows = {row.number: row for row in outcome.rows}
    for number in outcome.front:
        (folder / _FRONT).mkdir(exist_ok=True)
        name = f"trial-{number}"
        write_whole(folder / _FRONT / f"{name}.yaml", recipe_text(content, rows[number], folder / _FRONT / name))
    write_whole(folder / RESULTS, json.dumps(plain(_results(outcome)), indent=1, ensure_ascii=False) + "\n")
    write_search_report(outcome, folder, text)


def _results(outcome: SearchOutcome) -> dict[str, Any]:
    second = outcome.finalists[1] if len(outcome.finalists) > 1 else None
    difference = paired_difference(outcome.finalists[0], second) if second else None
    return {
        **outcome.facts,
        "objective": outcome.objective,
        "best": None if outcome.best is None else outcome.best.row.number,
        "last_rung": [_finalist(finalist) for finalist in outcome.finalists],
        "best_and_second": difference and {"difference": difference[0], "half_width_95": difference[1]},
        "front": outcome.front,
        "importance": outcome.importance,
        "interrupted": outcome.interrupted,
        "trials": [dataclasses.asdict(row) for row in outcome.rows],
    }


def _finalist(finalist: Finalist) -> dict[str, Any]:
    return {
        "trial": finalist.row.number,
        "nll": finalist.mean(NLL),
        "standard_error": finalist.standard_error(NLL),
        "seeds": list(finalist.shared),
        "violations": finalist.violations,
        "runs": finalist.runs,
    }
