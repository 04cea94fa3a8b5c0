"""What the command takes, and what it needs to be installed."""

from __future__ import annotations

import re

__all__ = ["OBJECTIVES", "require_optuna", "seconds_of"]

OBJECTIVES = ("nll", "pareto")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def seconds_of(text: str) -> float:
    """
    A time such as `2h`, `90m`, `30s`, `1h30m`, in seconds.

    Raises:
        ValueError: for anything else, and for no time at all.
    """
    if re.fullmatch(r"(\d+(\.\d+)?[smhd])+", text):
        seconds = sum(float(number) * _UNITS[unit] for number, _, unit in re.findall(r"(\d+(\.\d+)?)([smhd])", text))
        if seconds > 0:
            return seconds
    raise ValueError(f"{text!r} is no time: write 2h, 90m, 30s or 1h30m.")


def require_optuna() -> None:
    """
    Raises:
        ValueError: if Optuna is not installed, with the way to install it.
    """
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"AutoPilot searches with Optuna, which cannot be imported ({error}): "
            "pip install 'hf-variational[autopilot]'."
        ) from error
