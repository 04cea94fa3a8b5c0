"""What somebody says of a band on the command line."""

from __future__ import annotations

from ..training.regime.settings import BandSettings

__all__ = ["band_settings"]


def band_settings(
    target: float | None, low: float | None, high: float | None, spread: float | None
) -> BandSettings | None:
    """
    The band that the options ask for, or `None` without a target; what is not said is as in training.

    Raises:
        ValueError: for an end without a target, and for what is no band.
    """
    if target is None:
        given = {"--band-low": low, "--band-high": high, "--band-spread": spread}
        if wrong := [option for option, value in given.items() if value is not None]:
            raise ValueError(f"{wrong[0]} needs --band-target, which it is a multiple of.")
        return None
    values = {"low_factor": low, "high_factor": high, "spread": spread}
    return BandSettings(target, **{name: value for name, value in values.items() if value is not None})
