"""`hf-variational autopilot` on the command line."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ..command_line import check_whole, fail, reported
from .options import OBJECTIVES, require_optuna, seconds_of

__all__ = ["autopilot"]

INTERRUPTED = 130
Objective = Enum("Objective", {name: name for name in OBJECTIVES})


def autopilot(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML recipe, which every trial begins with.")],
    space: Annotated[Path, typer.Option(help="A YAML file: what varies, which gates a trial has to pass.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Values to set in the recipe.")
    ] = None,
    trials: Annotated[int, typer.Option(help="Trials in all; those of an earlier call count.")] = 40,
    budget: Annotated[
        str | None, typer.Option(metavar="TIME", help="Time in all, like 2h, 90m or 30s; earlier calls count.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Further seeds of the best trials; 0 leaves the last rung out.")] = 3,
    output: Annotated[Path, typer.Option(help="The search's folder; a search in it goes on.")] = Path(
        "runs/autopilot"
    ),
    objective: Annotated[
        Objective, typer.Option(help="The NLL, or the front of NLL, calibration error and FLOPs.")
    ] = "nll",
) -> None:
    """Search for a recipe: trials that are halved, gates, further seeds for the best, a report, best.yaml to train."""
    check_whole("--trials", trials, 1)
    check_whole("--seeds", seeds, 0)
    for name, file in (("RECIPE", recipe), ("--space", space)):
        if not file.is_file():
            fail(f"{name} {file} is no file: give a YAML file", 2)
    with reported("", FloatingPointError):
        seconds = None if budget is None else seconds_of(budget)
        require_optuna()
        from .program import search
        from .results import BEST

        try:
            outcome = search(
                recipe,
                space,
                output,
                trials=trials,
                budget=seconds,
                seeds=seeds,
                objective=objective.value,
                overrides=overrides or (),
                progress=sys.stderr.isatty(),
            )
        except KeyboardInterrupt as interrupt:
            fail(str(interrupt) or "interrupted", INTERRUPTED)
    best = outcome.best
    error = best.standard_error()
    over = f" ± {error:.4f} over {len(best.shared)} further seeds" if error is not None else ""
    typer.echo(f"trial {best.row.number} is best: NLL {best.mean():.4f}{over}")
    typer.echo(f"wrote {output / BEST} and {output / 'report.html'}", err=True)
