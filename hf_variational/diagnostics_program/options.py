"""What somebody says of a band on the command line."""

from __future__ import annotations

from dataclasses import dataclass

from ..diagnostics import Band
from ..diagnostics.band import check_band

__all__ = ["BandOptions", "band_options"]

# The ends that a band has where nobody says: half and twice its target.
LOW, HIGH = 0.5, 2.0


@dataclass(frozen=True)
class BandOptions:
    """A band before it is known of how many units; see [`Band`]."""

    target: float
    low_factor: float
    high_factor: float
    spread: float

    def of(self, units: int) -> Band:
        """The band of a layer."""
        return Band.heterogeneous(self.target, units, self.low_factor, self.high_factor, self.spread)


def band_options(target: float | None, low: float | None, high: float | None, spread: float | None):
    """
    The band that the options ask for, or `None`.

    Raises:
        ValueError: for an end without a target, and for what is no band.
    """
    if target is None:
        given = {"--band-low": low, "--band-high": high, "--band-spread": spread}
        if wrong := [option for option, value in given.items() if value is not None]:
            raise ValueError(f"{wrong[0]} needs --band-target, which it is a multiple of.")
        return None
    options = BandOptions(
        target, LOW if low is None else low, HIGH if high is None else high, 1.0 if spread is None else spread
    )
    check_band(*(getattr(options, name) for name in ("target", "low_factor", "high_factor", "spread")))
    return options
