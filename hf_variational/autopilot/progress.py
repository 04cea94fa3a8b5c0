"""How far a search is, while it runs: a bar where somebody looks, a line for each trial elsewhere."""

from __future__ import annotations

import math
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from .objective import NLL

__all__ = ["Watch"]


class Watch:
    """
    Shows the trials of a search: how many, the best so far, what the running one does, and how much time is left.

    Args:
        console: Where to.
        bar: Whether there is a bar.
        total: Trials, or runs of the last rung.
        done: Of them, those that an earlier call has finished.
        left: Says how many seconds of the budget are left, `None` where there is no budget.
        what: What is counted.
    """

    def __init__(self, console: Console, bar: bool, total: int, done: int, left, what: str = "trials"):
        self.console, self._left, self._what = console, left, what
        self.best: tuple[float, int] | None = None
        self._began = 0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total} {task.fields[what]}"),
            TextColumn("{task.fields[state]}", style="dim"),
            console=console,
            transient=True,
            disable=not bar,
        )
        self._task = self._bar.add_task("AutoPilot", total=total, completed=done, what=what, state="")

    def __enter__(self) -> Watch:
        self._bar.start()
        return self

    def __exit__(self, *error) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _state(self, now: str) -> str:
        parts = [] if self.best is None else [f"best {self.best[0]:.4f} (trial {self.best[1]})"]
        seconds = self._left()
        if seconds is not None:
            parts.append(f"{timedelta(seconds=round(max(0.0, seconds)))} left")
        return " · ".join([*parts, now])

    def update(self, now: str, advance: int = 0) -> None:
        self._bar.update(self._task, advance=advance, state=self._state(now))

    def began(self, trial, values: dict[str, Any]) -> None:
        self.update(f"trial {trial.number} begins")

    def evaluated(self, trial, step: int, steps: int, nll: float) -> None:
        self.update(f"trial {trial.number}: step {step}/{steps}, NLL {nll:.4f}")

    def ended(self, trial, state: str) -> None:
        """Of a trial: `"complete"`, `"pruned"`, `"failed"` or `"interrupted"`."""
        facts = trial.user_attrs
        metrics, violations = facts.get("metrics", {}), facts.get("violations", {})
        nll, missed = metrics.get(NLL, math.nan), [name for name, value in violations.items() if value > 0]
        if state == "complete" and not missed and (self.best is None or nll < self.best[0]):
            self.best = (nll, trial.number)
        result = f"NLL {nll:.4f} at step {facts['curve'][-1][0]}" if metrics else "no evaluation"
        if missed:
            result += f", misses {', '.join(missed)}"
        if state == "failed":
            result = facts["error"]
        # an interrupted one is repeated, and not one of those that are counted
        self.update(f"trial {trial.number} {state}", advance=state != "interrupted")
        self.say(f"trial {trial.number} {state}: {result} ({facts.get('seconds', 0.0):.0f} s)")
