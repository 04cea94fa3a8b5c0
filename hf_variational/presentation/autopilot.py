"""A search for a recipe as a page that needs no network, and its plots as PNG files."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

from ..autopilot.outcome import SearchOutcome, paired_difference
from ..files import write_whole
from .autopilot_plots import FIGURES
from .autopilot_tables import last_rung_table, trials_table
from .figures import svg_of
from .html import template_environment
from .measures import format_value

__all__ = ["PAGE", "notes_of", "write_search_report"]

PAGE = "report.html"
# Completed trials for each key that is searched, below which an importance is hardly more than a guess.
_FEW = 10


def notes_of(outcome: SearchOutcome) -> list[str]:
    """What a reader has to know beside the numbers, a sentence each."""
    asked, complete = outcome.facts["asked"], [row for row in outcome.rows if row.state == "complete"]
    notes = []
    if len(outcome.rows) < asked["trials"]:
        notes.append(f"{len(outcome.rows)} of {asked['trials']} trials are done: the same command goes on.")
    if outcome.best is None:
        notes.append("No trial passes the gates in the end, so there is no best recipe.")
    if outcome.objective == "pareto":
        notes.append(
            "No trial of this search was pruned: Optuna prunes only where there is one objective. Every trial that is "
            "not on the front is worse in one of the three and better in none."
        )
    first, second = (*outcome.finalists, None, None)[:2]
    missing = asked["seeds"] - len(first.shared) if first else 0
    if missing > 0:
        notes.append(f"Of {asked['seeds']} further seeds the whole last rung has run {len(first.shared)}.")
    if outcome.best is not None and not first.shared:
        notes.append("The best was chosen on one seed: its NLL is lower than another seed's is to be expected.")
    if outcome.objective == "nll" and second is not None and not second.missed:
        difference = paired_difference(first, second)
        if difference is not None:
            mean, width = difference
            told = "can be told from" if mean > width else "cannot be told from"
            notes.append(
                f"Over {len(first.shared)} shared seeds trial {first.row.number} {told} trial {second.row.number}: "
                f"the second's NLL is {format_value(mean)} ± {format_value(width)} higher (95 %, paired)."
            )
    if len(complete) < _FEW * len(outcome.space.dimensions):
        worth = "say next to nothing" if len(complete) < _FEW else "are rough"
        notes.append(
            f"{len(complete)} trials were trained to their end, for {len(outcome.space.dimensions)} keys: the "
            f"importances {worth}, and trials that were pruned are not in them."
        )
    if outcome.interrupted:
        notes.append(f"{outcome.interrupted} trials were interrupted and repeated.")
    return notes


def write_search_report(outcome: SearchOutcome, folder: str | Path, recipe: str | None) -> Path:
    """Writes `report.html`, and a PNG of each plot into `plots/`; `recipe` is the best one's YAML."""
    folder = Path(folder)
    (folder / "plots").mkdir(exist_ok=True)
    sections = []
    if outcome.finalists:
        sections.append({"heading": "The last rung", "picture": None, "tables": [last_rung_table(outcome)]})
    for name, heading, text, draw in FIGURES:
        figure, file = draw(outcome), folder / "plots" / f"{name}.png"
        if figure is None:
            file.unlink(missing_ok=True)
            continue
        figure.savefig(file)
        sections.append({"heading": heading, "text": text, "picture": svg_of(figure, name), "tables": []})
    sections.append({"heading": "Every trial", "picture": None, "tables": [trials_table(outcome)]})
    facts = outcome.facts
    searched = {"nll": "NLL", "pareto": "the front of NLL, ECE and FLOPs"}[outcome.objective]
    page = (
        template_environment()
        .get_template("autopilot.html.j2")
        .render(
            title="A search for a recipe",
            facts={
                "recipe": facts["recipe"],
                "objective": searched,
                "gates": ", ".join(map(str, outcome.space.gates)) or "none",
                "trials": len(outcome.rows),
                "seed": facts["seed"],
                "further seeds": ", ".join(map(str, facts["further_seeds"])) or "none",
                "time": str(timedelta(seconds=round(facts["seconds"]))),
                "device": facts["device"],
            },
            notes=notes_of(outcome),
            sections=sections,
            configuration=json.dumps(facts, indent=1, ensure_ascii=False),
            recipe=recipe,
            versions=facts["versions"],
        )
    )
    return write_whole(folder / PAGE, page)
