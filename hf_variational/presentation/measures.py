"""The measures of a token as they are shown: their names in code, their names in prose, units and ranges."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["MEASURES", "Measure", "format_value", "label_of", "measure", "nice_maximum", "scale_maximum"]


@dataclass(frozen=True)
class Measure:
    name: str
    label: str
    unit: str
    meaning: str
    maximum: float | None = None  # None: taken from the values shown


MEASURES = (
    Measure("mutual_information", "mutual information", "nats", "what the posterior samples disagree about"),
    Measure("predictive_entropy", "predictive entropy", "nats", "how open the next token is, all told"),
    Measure("expected_entropy", "expected entropy", "nats", "how open it is within one sample, on average"),
    Measure("conditional_variance", "conditional variance", "", "spread of the probabilities over the samples"),
    Measure("token_variance", "token variance", "", "spread of the probability of this very token"),
    Measure("top1_flip_rate", "top-1 flip rate", "", "share of samples that favour another token", 1.0),
)


def measure(name: str) -> Measure:
    for candidate in MEASURES:
        if candidate.name == name:
            return candidate
    raise ValueError(f"unknown measure {name!r}: choose one of {', '.join(m.name for m in MEASURES)}")


# Of scores that no token of a page is coloured by.
_OTHER_LABELS = {
    "one_minus_confidence": "1 − confidence",
    "nll": "NLL",
    "brier": "Brier score",
    "kl": "KL of the posteriors",
    "scale": "scale of the units",
    "mean_energy": "mean energy",
    "combination": "all combined",
}


def label_of(name: str) -> str:
    """The name of a score in prose."""
    return _OTHER_LABELS[name] if name in _OTHER_LABELS else measure(name).label


def format_value(value: float | None) -> str:
    """Three significant digits, without an exponent where a reader can do without."""
    if value is None or math.isnan(value):
        return "–"
    if value == 0:
        return "0"
    if abs(value) < 1e-4 or abs(value) >= 1e5:
        return f"{value:.1e}"
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f}"


def nice_maximum(largest: float) -> float:
    """The least of 1, 1.5, 2, 3, 5, 7.5 times a power of ten that is not below `largest`."""
    if not math.isfinite(largest) or largest <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(largest))
    for step in (1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0):
        if step * power >= largest * (1 - 1e-9):
            # Rounded, so that 3 * 0.1 is shown as 0.3.
            return float(f"{step * power:.3g}")
    return 10.0 * power


def scale_maximum(name: str, values: Iterable[float]) -> float:
    """The upper end of the colour scale of a measure; the lower end is always 0."""
    fixed = measure(name).maximum
    if fixed is not None:
        return fixed
    return nice_maximum(max((value for value in values if math.isfinite(value)), default=0.0))
