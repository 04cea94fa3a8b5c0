"""Acting on uncertainty: answer, draw more posterior samples, or abstain."""

from .adaptive import AdaptiveSampling, QualityAtCost
from .controller import UncertaintyController
from .corrections import CorrectedMeasures, corrected_measures
from .generation import ControlledGenerateOutput
from .noise import NumberedNoiseRequest
from .policy import Action, ActionThresholds
from .score import InternalScore
from .settling import Acted, KeptLooks

__all__ = [
    "Acted",
    "Action",
    "ActionThresholds",
    "AdaptiveSampling",
    "ControlledGenerateOutput",
    "CorrectedMeasures",
    "InternalScore",
    "KeptLooks",
    "NumberedNoiseRequest",
    "QualityAtCost",
    "UncertaintyController",
    "corrected_measures",
]
