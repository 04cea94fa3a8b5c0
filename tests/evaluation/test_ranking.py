"""Detection against torchmetrics and counting; rejection against all orders of equal scores and against the oracle."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import binary_auroc, binary_average_precision

from hf_variational.evaluation import (
    aupr,
    aurc,
    auroc,
    detection,
    excess_aurc,
    fpr_at_tpr,
    prediction_rejection_ratio,
    risk_coverage_curve,
)

SIDE = st.lists(st.integers(-4, 4), min_size=1, max_size=25)


# ---- Detection ----


@given(negative=SIDE, positive=SIDE)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_detection_is_torchmetrics_and_counting(negative, positive):
    negative, positive = torch.tensor(negative).double() / 10, torch.tensor(positive).double() / 10
    scores = torch.cat([negative, positive])
    labels = torch.cat([torch.zeros(len(negative)), torch.ones(len(positive))]).long()
    # torchmetrics wants probabilities
    probabilities = (scores + 0.5) / 1.0
    assert auroc(negative, positive) == pytest.approx(binary_auroc(probabilities, labels).item(), abs=1e-6)
    precision = binary_average_precision(probabilities, labels).item()
    assert aupr(negative, positive) == pytest.approx(precision, abs=1e-6)
    for level in (0.5, 0.95, 1.0):
        rates = [
            (negative >= threshold).double().mean().item()
            for threshold in scores
            if (positive >= threshold).double().mean() >= level - 1e-12
        ]
        assert fpr_at_tpr(negative, positive, level) == pytest.approx(min(rates), abs=1e-12)


def test_detection_where_it_is_known():
    assert detection(torch.zeros(3), torch.ones(2)) == {"auroc": 1.0, "aupr": 1.0, "fpr_at_95_tpr": 0.0}
    # a score that says nothing
    assert detection(torch.ones(30), torch.ones(10)) == {"auroc": 0.5, "aupr": 0.25, "fpr_at_95_tpr": 1.0}
    # exactly 19 of 20 reach the threshold that 3 of 4 do not
    positive = torch.tensor([0.0] + [2.0] * 19)
    assert fpr_at_tpr(torch.tensor([1.0, 1.0, 1.0, 3.0]), positive) == 0.25
    assert fpr_at_tpr(torch.tensor([1.0, 1.0, 1.0, 3.0]), positive, 0.96) == 1.0


def test_detection_of_nothing_and_of_nan():
    bad = torch.tensor([math.nan, 1.0])
    for function, name in ((auroc, "AUROC"), (aupr, "precision-recall"), (fpr_at_tpr, "false positive")):
        assert math.isnan(function(bad, torch.ones(2))) and math.isnan(function(torch.ones(2), bad))
        with pytest.raises(ValueError, match=f"(?i){name}.*0 negative and 2 positive"):
            function(torch.zeros(0), torch.ones(2))
        with pytest.raises(ValueError, match="3 negative and 0 positive"):
            function(torch.zeros(3), torch.ones(0))
    for wrong in (0, 1.5):
        with pytest.raises(ValueError, match=f"`tpr`.*{wrong}"):
            fpr_at_tpr(torch.zeros(1), torch.ones(1), wrong)


# ---- Risk and coverage ----


def risks(order, loss):
    return np.cumsum(np.asarray(loss, dtype=float)[list(order)]) / np.arange(1, len(loss) + 1)


@given(rows=st.lists(st.tuples(st.integers(0, 2), st.sampled_from([0.0, 1.0, 2.5])), min_size=1, max_size=6))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_the_risk_is_the_mean_over_all_orders_of_equal_scores(rows):
    uncertainty, loss = map(list, zip(*rows, strict=True))
    orders = [
        order
        for order in itertools.permutations(range(len(rows)))
        if all(uncertainty[a] <= uncertainty[b] for a, b in itertools.pairwise(order))
    ]
    curve = risk_coverage_curve(uncertainty, loss)
    expected = np.mean([risks(order, loss) for order in orders], axis=0)
    np.testing.assert_allclose(curve.risk, expected, atol=1e-12)
    np.testing.assert_allclose(curve.coverage, np.arange(1, len(rows) + 1) / len(rows))
    assert curve.thresholds.tolist() == sorted(uncertainty)
    assert aurc(uncertainty, loss) == pytest.approx(expected.mean())
    best = min(risks(order, loss).mean() for order in itertools.permutations(range(len(rows))))
    assert excess_aurc(uncertainty, loss) == pytest.approx(expected.mean() - best, abs=1e-12)


@pytest.mark.parametrize("kind", ["errors", "nll"])
def test_the_oracle_and_a_score_that_says_nothing(kind):
    generator = torch.Generator().manual_seed(0)
    loss = -torch.rand(300, generator=generator).log()
    if kind == "errors":
        loss = (loss > 1).double()
    for oracle in (loss, loss.double().exp(), 3 * loss - 7):
        assert excess_aurc(oracle, loss) == pytest.approx(0, abs=1e-12)
        assert prediction_rejection_ratio(oracle, loss) == pytest.approx(1)
    nothing = torch.zeros(300)
    assert aurc(nothing, loss) == pytest.approx(loss.double().mean().item())
    assert prediction_rejection_ratio(nothing, loss) == pytest.approx(0, abs=1e-9)
    assert prediction_rejection_ratio(-loss, loss) < 0
    # random orders have these expectations
    draws = [torch.rand(300, generator=generator) for _ in range(400)]
    for measure, expected in ((aurc, loss.double().mean().item()), (prediction_rejection_ratio, 0.0)):
        values = np.array([measure(draw, loss) for draw in draws])
        assert abs(values.mean() - expected) < 4 * values.std() / math.sqrt(len(values))


def test_the_oracles_area_of_errors_in_closed_form():
    # risk is 0 until the n − m right ones are used up, then (k − n + m) / k
    n, m = 50, 13
    loss = torch.tensor([0.0] * (n - m) + [1.0] * m)
    expected = sum((k - n + m) / k for k in range(n - m + 1, n + 1)) / n
    assert aurc(loss, loss) == pytest.approx(expected)


@given(negative=SIDE, positive=SIDE)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_the_rejection_ratio_of_errors_is_twice_the_auroc_less_one(negative, positive):
    uncertainty = negative + positive
    loss = [0] * len(negative) + [1] * len(positive)
    ratio = prediction_rejection_ratio(uncertainty, loss)
    assert ratio == pytest.approx(2 * auroc(torch.tensor(negative), torch.tensor(positive)) - 1, abs=1e-9)


def test_the_rejection_ratio_by_areas():
    generator = np.random.default_rng(0)
    uncertainty, loss = generator.random(40), generator.random(40)

    def area(order):
        """Trapezoids under the loss that is left, over the share that is kept."""
        left = np.concatenate([[0.0], np.cumsum(loss[order])]) / 40
        return float(((left[1:] + left[:-1]) / 2 / 40).sum())

    random = loss.mean() / 2
    expected = (random - area(np.argsort(uncertainty))) / (random - area(np.argsort(loss)))
    assert prediction_rejection_ratio(uncertainty, loss) == pytest.approx(expected)


def test_bad_losses_are_named():
    with pytest.raises(ValueError, match="losses that differ, got 3 times 1.0"):
        prediction_rejection_ratio([1, 2, 3], [1, 1, 1])
    with pytest.raises(ValueError, match="2 of `uncertainty`, 3 of `loss`"):
        aurc([1, 2], [0, 0, 1])
    with pytest.raises(ValueError, match="0 of `uncertainty`"):
        risk_coverage_curve([], [])
    for uncertainty, loss in (([math.nan, 1.0], [0, 1]), ([0.0, 1.0], [math.nan, 1])):
        assert math.isnan(aurc(uncertainty, loss)) and math.isnan(excess_aurc(uncertainty, loss))
        assert math.isnan(prediction_rejection_ratio(uncertainty, loss))
