"""The sections of a report, each a function of the table of token scores: plain numbers, with intervals."""

from collections.abc import Mapping
from dataclasses import asdict

import torch
from torch import Tensor

from ..calibration import ClasswiseCalibration, maximum_calibration_error, reliability_curve
from ..likelihood import bits_per_byte, conditional_value_at_risk
from ..predictions import INTERNAL_NAMES
from ..ranking import detection, prediction_rejection_ratio
from ..readouts import ReadoutSelection
from ..selective import CombinedScore, RiskCoverage, in_units, risk_coverages, score_values
from ..selective_policy import SelectivePolicy
from ..shift import CorruptionSweep
from ..shift_slices import context_slices, frequency_slices, score_metrics
from ..streaming import MEASURE_NAMES
from ..token_scores import OF_THE_TARGET, TokenScores
from .resamples import DocumentResamples, Interval, window_auroc_interval

Numbers = dict[str, dict]
UNITS = ("token", "sequence")
COVERAGES = (0.5, 0.8, 0.9)
_POINTS, _HISTOGRAM_BINS = 101, 30


def number(value: float, interval: Interval = None) -> dict:
    """A value with its interval, `None` where there is none."""
    return {"value": float(value), "interval": interval}


def quality(
    scores: TokenScores,
    resamples: DocumentResamples,
    num_bytes: int | None,
    classwise: ClasswiseCalibration | None,
    num_bins: int,
) -> Numbers:
    """Likelihood, calibration and tail."""
    nll, correct = scores.values["nll"], scores.correct.double()
    confidence = 1 - scores.values["one_minus_confidence"].double()
    mean, means = float(nll.double().mean()), resamples.means(nll)
    by_width = reliability_curve(confidence, correct, num_bins)
    found = {
        "nll": number(mean, None if means is None else resamples.interval(means)),
        "perplexity": number(_exp(mean), None if means is None else [*map(_exp, resamples.interval(means))]),
        "accuracy": number(correct.mean(), resamples.of_mean(correct)),
        "expected_calibration_error": number(
            by_width.expected_error, resamples.of_calibration_error(confidence, correct, num_bins)
        ),
        "expected_calibration_error_mass": number(
            reliability_curve(confidence, correct, num_bins, "mass").expected_error
        ),
        "maximum_calibration_error": number(maximum_calibration_error(confidence, correct, num_bins, "mass")),
        "brier_score": number(scores.values["brier"].double().mean(), resamples.of_mean(scores.values["brier"])),
        "cvar_nll": number(conditional_value_at_risk(nll), resamples.of_tail_mean(nll)),
    }
    if num_bytes:
        scale = float(bits_per_byte(nll, num_bytes)) / mean if mean else 0.0
        within = found["nll"]["interval"]
        found["bits_per_byte"] = number(mean * scale, within and [scale * end for end in within])
    if classwise is not None:
        found["classwise_calibration_error"] = number(classwise.compute())
    return found


def _exp(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float64).exp())


def measures(scores: TokenScores, resamples: DocumentResamples) -> Numbers:
    """Mean of each measure of the samples and each internal statistic."""
    names = [name for name in (*MEASURE_NAMES, *INTERNAL_NAMES) if name in scores.values]
    return {
        name: number(scores.values[name].double().mean(), resamples.of_mean(scores.values[name])) for name in names
    }


def ranked_scores(scores: TokenScores, combined: CombinedScore | None) -> dict[str, Tensor]:
    """The scores that can be read before the token comes, by name."""
    found = {name: score_values(scores, name) for name in scores.values if name not in OF_THE_TARGET}
    return found if combined is None else {**found, "combination": combined(scores)}


def error_detection(scores: TokenScores, combined: CombinedScore | None, resamples: DocumentResamples) -> dict:
    """How well each score tells wrong tokens from right ones; empty if all are right or all wrong."""
    wrong = ~scores.correct
    if wrong.all() or not wrong.any():
        return {}
    found = {}
    for name, values in ranked_scores(scores, combined).items():
        found[name] = {key: number(value) for key, value in detection(values[~wrong], values[wrong]).items()}
        found[name]["auroc"]["interval"] = resamples.of_auroc(values, wrong)
    return found


def selective(scores: TokenScores, combined: CombinedScore | None) -> dict:
    """Areas under the risk-coverage curves of every score, over tokens and over sequences."""
    return {unit: _selective(scores, combined, unit) for unit in UNITS}


def _selective(scores: TokenScores, combined: CombinedScore | None, unit: str) -> dict:
    loss = in_units((~scores.correct).double(), scores, unit)
    differ = bool((loss != loss[0]).any())
    values = ranked_scores(scores, combined)
    found = {}
    for name, curve in risk_coverages(scores, combined, unit=unit).items():
        uncertainty = in_units(values[name], scores, unit)
        found[name] = {
            "aurc": curve.area(),
            "excess_aurc": curve.excess(),
            "prediction_rejection_ratio": prediction_rejection_ratio(uncertainty, loss) if differ else None,
            **{f"risk_at_{round(100 * coverage)}": curve.at(coverage) for coverage in COVERAGES},
        }
    return found


def policy(
    score: str | CombinedScore, validation: TokenScores, test: TokenScores, num_samples: int, risk: float, delta: float
) -> dict:
    """A threshold fitted on validation data, and what it does to the test data; or the reason why none is."""
    asked = {"target_risk": risk, "delta": delta}
    try:
        fitted = SelectivePolicy(score, target_risk=risk, delta=delta, num_samples=num_samples).fit(validation)
    except ValueError as error:  # as of a part of the validation data where every token is wrong
        return {**asked, "certified": False, "reason": str(error)}
    result = fitted.apply(test)
    return {
        **asked,
        "certified": fitted.certified,
        "threshold": fitted.thresholds.accept,
        "coverage": result.coverage,
        "selective_risk": result.selective_risk,
        "samples_per_token": result.cost,
    }


def reliability(scores: TokenScores, num_bins: int) -> dict:
    """What a reliability diagram shows."""
    curve = reliability_curve(1 - scores.values["one_minus_confidence"].double(), scores.correct, num_bins)
    return {name: getattr(curve, name).tolist() for name in ("confidence", "accuracy", "count")}


def risk_coverage(scores: TokenScores, combined: CombinedScore | None) -> dict:
    """Points of the risk-coverage curve of every score and of the oracle, by unit."""
    found: dict = {}
    for unit in UNITS:
        curves = risk_coverages(scores, combined, unit=unit)
        first = next(iter(curves.values()))
        oracle = RiskCoverage(first.coverage, first.oracle_risk, first.thresholds, first.oracle_risk)
        places = torch.linspace(1 / _POINTS, 1, min(_POINTS, len(first.coverage)), dtype=torch.float64).tolist()
        found[unit] = {
            "coverage": places,
            "risk": {name: [curve.at(place) for place in places] for name, curve in curves.items()},
            "oracle": [oracle.at(place) for place in places],
        }
    return found


def out_of_domain(own: Mapping[str, Tensor], other: Mapping[str, Tensor], seed: int) -> dict:
    """How well the mean of each score over a window tells another text's windows from the domain's own.

    Args:
        own, other: `TokenScores.window_means()`.
        seed: of the intervals.
    """
    found = {}
    for name in own:
        if name not in other or own[name].isnan().any() or other[name].isnan().any():
            continue
        numbers = {measure: number(value) for measure, value in detection(own[name], other[name]).items()}
        numbers["auroc"]["interval"] = window_auroc_interval(own[name], other[name], seed=seed)
        found[name] = numbers
    return found


def histograms(own: Mapping[str, Tensor], others: Mapping[str, Mapping[str, Tensor]]) -> dict:
    """Counts of windows by the mean of each measure, in shared bins: in the domain (`""`) and of each other text."""
    found = {}
    for name in own:
        sides = {"": own[name], **{text: means[name] for text, means in others.items() if name in means}}
        together = torch.cat(list(sides.values()))
        low, high = float(together.min()), float(together.max())
        if not torch.isfinite(together).all() or low == high:
            continue
        edges = torch.linspace(low, high, _HISTOGRAM_BINS + 1, dtype=torch.float64)
        counts = {
            text: torch.bucketize(values, edges[1:-1]).bincount(minlength=_HISTOGRAM_BINS).tolist()
            for text, values in sides.items()
        }
        found[name] = {"edges": edges.tolist(), "counts": counts}
    return found


def slices(scores: TokenScores, counts: Tensor | None) -> dict:
    """Metrics of the tokens with short and with long contexts, and by how often their target occurs in the validation
    data.
    """
    parts = {f"{name} context": part for name, part in context_slices(scores).items()}
    if counts is not None:
        parts |= {f"{name} target": part for name, part in frequency_slices(scores, counts).items()}
    return {name: score_metrics(part) for name, part in parts.items()}


def corruption(sweep: CorruptionSweep, seed: int) -> dict:
    """Metrics under each corruption, and how the change of internal statistics goes with that of the NLL.

    The changes of each document are there for the plot.
    """
    conditions = [{"kind": kind, "rate": rate, "metrics": metrics} for (kind, rate), metrics in sweep.metrics.items()]
    correlations = {}
    for kind in dict.fromkeys(kind for kind, _ in sweep.changes):
        correlations[kind] = {
            name: {
                measure: number(estimate.mean, estimate.interval and list(estimate.interval))
                for measure, estimate in found.items()
            }
            for name, found in sweep.correlations(kind, num_resamples=400, seed=seed).items()
        }
    return {"conditions": conditions, "correlations": correlations}


def corruption_changes(sweep: CorruptionSweep) -> list[dict]:
    """Of each condition the change of every document, of the scores that are drawn."""
    drawn = (*INTERNAL_NAMES, "mutual_information", "predictive_entropy", "nll")
    return [
        {"kind": kind, "rate": rate, "changes": {name: changes[name].tolist() for name in drawn if name in changes}}
        for (kind, rate), changes in sweep.changes.items()
    ]


def readouts(selection: ReadoutSelection) -> dict:
    """The readout that was chosen, and what it is worth on the test data."""
    named = {"chosen": selection.chosen, "test": selection.test, "untouched": selection.untouched}
    return {
        **{name: asdict(row) for name, row in named.items()},
        "validation": [asdict(row) for row in selection.validation],
    }
