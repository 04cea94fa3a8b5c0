"""Diagnostics: what the units of a variational model do, and where they should be."""

from .band import Band, BandShares
from .diagnose import diagnose
from .diagnostics import Diagnostics
from .drift import Drift, LayerDrift, Mover, drift
from .layers import HeadDiagnostics, LayerDiagnostics

__all__ = [
    "Band",
    "BandShares",
    "Diagnostics",
    "Drift",
    "HeadDiagnostics",
    "LayerDiagnostics",
    "LayerDrift",
    "Mover",
    "diagnose",
    "drift",
]
