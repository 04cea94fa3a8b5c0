"""Regime control: the mean energy, the KL and the scale of each unit are watched and steered while a model trains."""

from .callback import RegimeControlCallback
from .settings import (
    AutoregressiveControl,
    BandCalibration,
    BandPenalty,
    BandSettings,
    Homeostasis,
    Projection,
    RegimeControl,
    ScaleGuard,
    Thermostat,
)

__all__ = [
    "AutoregressiveControl",
    "BandCalibration",
    "BandPenalty",
    "BandSettings",
    "Homeostasis",
    "Projection",
    "RegimeControl",
    "RegimeControlCallback",
    "ScaleGuard",
    "Thermostat",
]
