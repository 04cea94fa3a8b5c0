"""The tables of a search: cells of text, for the page and for the terminal."""

from __future__ import annotations

import json
import math

from ..autopilot.objective import COST, NLL, PARETO
from ..autopilot.outcome import SearchOutcome, TrialRow
from .measures import format_value
from .report_tables import Cell, ReportTable, large

__all__ = ["last_rung_table", "shown", "trials_table"]


def shown(value) -> str:
    """A value of a recipe as a person reads it."""
    if isinstance(value, float):
        return format_value(value)
    return value if isinstance(value, str) else json.dumps(value)


def _number(metric: str, value: float) -> str:
    if value is None or math.isnan(value):
        return "–"
    if metric == COST:
        return large(value)
    return f"{value:.4f}" if metric == NLL else format_value(value)


def _keys(outcome: SearchOutcome) -> list[str]:
    return [dimension.key for dimension in outcome.space.dimensions]


def _short(keys: list[str]) -> list[str]:
    """The keys without their sections, where that leaves them apart."""
    last = [key.rpartition(".")[2] for key in keys]
    return [name if last.count(name) == 1 else key for name, key in zip(last, keys, strict=True)]


def _metrics(outcome: SearchOutcome) -> dict[str, str]:
    """Metrics that are shown beside the objective: the others of a front, and the gates'."""
    others = {name: label for name, label in PARETO.items() if name != NLL} if outcome.objective == "pareto" else {}
    return others | {gate.metric: gate.metric.removeprefix("eval_").replace("_", " ") for gate in outcome.space.gates}


def _values(row: TrialRow, keys: list[str]) -> list[Cell]:
    return [Cell(shown(row.values[key]) if key in row.values else "–") for key in keys]


def last_rung_table(outcome: SearchOutcome) -> ReportTable:
    """The finalists, the best first: means over further seeds, and each seed's run."""
    keys, metrics = _keys(outcome), _metrics(outcome)
    seeds = sorted({seed for finalist in outcome.finalists for seed in finalist.runs})
    rows = []
    for finalist in outcome.finalists:
        error = finalist.standard_error(NLL)
        best = outcome.best is not None and finalist.row.number == outcome.best.row.number
        cells = [Cell(f"{finalist.mean(NLL):.4f}" + ("" if error is None else f" ± {format_value(error)}"), best=best)]
        cells.append(Cell(_number(NLL, finalist.row.nll)))
        for seed in seeds:
            run = finalist.runs.get(seed)
            cells.append(Cell("–" if run is None else "failed" if isinstance(run, str) else f"{run[NLL]:.4f}"))
        cells += [Cell(_number(name, finalist.mean(name))) for name in metrics]
        missed = ", ".join(name for name, value in finalist.violations.items() if value > 0)
        cells.append(Cell("fails" if finalist.failed else f"misses {missed}" if missed else "passes"))
        rows.append((f"trial {finalist.row.number}", cells + _values(finalist.row, keys)))
    header = [
        "",
        "NLL, mean ± standard error" if seeds else "NLL",
        f"seed {outcome.facts['seed']} (of the search)",
        *(f"seed {seed}" for seed in seeds),
        *metrics.values(),
        "gates",
        *_short(keys),
    ]
    shared = len(outcome.finalists[0].shared)
    note = (
        f"Means and standard errors are over {shared} further seeds, and not over the search's, on which the trials "
        "were chosen."
        if shared
        else "No further seed was run by all: the NLL is that of the seed on which the trials were chosen."
    )
    title = "The front, by NLL" if outcome.objective == "pareto" else "The best trials with further seeds"
    return ReportTable(title, header, rows, note)


def trials_table(outcome: SearchOutcome) -> ReportTable:
    """Every trial that counts, by number."""
    keys, metrics = _keys(outcome), _metrics(outcome)
    complete = [row.nll for row in outcome.rows if row.state == "complete" and not row.missed]
    rows = []
    for row in outcome.rows:
        step = f"{row.curve[-1][0]}" if row.curve else "–"
        best = row.state == "complete" and not row.missed and row.nll == min(complete)
        cells = [Cell(row.state), Cell(step), Cell(_number(NLL, row.nll), best=best)]
        cells += [Cell(_number(name, row.metrics.get(name, math.nan))) for name in metrics]
        missed = ", ".join(name.removeprefix("eval_") for name, value in row.violations.items() if value > 0)
        cells.append(Cell(f"misses {missed}" if missed else "passes" if row.metrics else "–"))
        rows.append((f"{row.number}", [*cells, *_values(row, keys), Cell(f"{row.seconds:.0f}")]))
    header = ["", "state", "steps", "NLL", *metrics.values(), "gates", *_short(keys), "seconds"]
    failed = {row.error for row in outcome.rows if row.error}
    note = "NLL, gates and all else are of the trial's last evaluation; a pruned trial's is at an earlier step. "
    return ReportTable("By number", header, rows, note + " ".join(f"Failed: {error}" for error in sorted(failed)))
