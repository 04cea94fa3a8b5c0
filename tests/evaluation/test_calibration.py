"""Calibration errors against torchmetrics, scikit-learn and brute force, and where their values are known."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss
from torchmetrics.functional.classification import binary_calibration_error

from hf_variational.evaluation import (
    ClasswiseCalibration,
    StreamingEvaluation,
    bits_per_byte,
    brier,
    expected_calibration_error,
    maximum_calibration_error,
    rank_calibration_error,
    reliability_curve,
)


def predictions(count=400, seed=0, power=1.0):
    """Confidences, and outcomes that are right with probability confidence ** power."""
    generator = torch.Generator().manual_seed(seed)
    confidence = torch.rand(count, generator=generator, dtype=torch.float64)
    return confidence, (torch.rand(count, generator=generator, dtype=torch.float64) < confidence**power).long()


# ---- Binned gaps ----


@pytest.mark.parametrize("num_bins", [1, 5, 15])
@pytest.mark.parametrize("power", [1.0, 3.0])
def test_equal_width_bins_are_torchmetrics(num_bins, power):
    # float32, in which no confidence lies on an edge, because the two put an edge in different bins
    confidence, correct = predictions(power=power)
    confidence = confidence.float()
    for norm, error in (("l1", expected_calibration_error), ("max", maximum_calibration_error)):
        theirs = binary_calibration_error(confidence, correct, n_bins=num_bins, norm=norm)
        assert error(confidence, correct, num_bins) == pytest.approx(theirs.item(), abs=1e-6)


def test_equal_mass_bins_are_scikit_learns():
    confidence, correct = predictions(300, power=2.0)
    curve = reliability_curve(confidence, correct, 15, "mass")
    accuracy, mean = calibration_curve(correct.numpy(), confidence.numpy(), n_bins=15, strategy="quantile")
    assert curve.count.tolist() == [20] * 15
    np.testing.assert_allclose(curve.confidence, mean, rtol=1e-12)
    np.testing.assert_allclose(curve.accuracy, accuracy, rtol=1e-12)
    by_hand = np.abs(accuracy - mean)
    assert expected_calibration_error(confidence, correct, binning="mass") == pytest.approx(by_hand.mean())
    assert maximum_calibration_error(confidence, correct, binning="mass") == pytest.approx(by_hand.max())


@given(
    grains=st.lists(st.integers(0, 12), min_size=1, max_size=60),
    num_bins=st.integers(1, 8),
    binning=st.sampled_from(["width", "mass"]),
    order=st.randoms(use_true_random=False),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_bins_do_not_depend_on_the_order(grains, num_bins, binning, order):
    rows = [(grain / 12, (grain * 7 + index) % 2) for index, grain in enumerate(grains)]
    curve = reliability_curve(*zip(*rows, strict=True), num_bins, binning)
    order.shuffle(rows)
    again = reliability_curve(*zip(*rows, strict=True), num_bins, binning)
    torch.testing.assert_close(torch.stack(list(curve)), torch.stack(list(again)), equal_nan=True)
    assert int(curve.count.sum()) == len(rows)
    filled = curve.count > 0
    total = (curve.confidence * curve.count)[filled].sum().item()
    assert total == pytest.approx(sum(confidence for confidence, _ in rows))
    assert 0 <= curve.expected_error <= curve.maximum_error + 1e-12 <= 1 + 1e-12


def test_equal_confidences_share_a_bin_and_different_ones_fill_bins_equally():
    curve = reliability_curve([0.2] * 6 + [0.9] * 2, [0, 1] * 4, 4, "mass")
    # of 8 in rising order the six lie about the third, the two about the seventh
    assert curve.count.tolist() == [0, 6, 0, 2]
    for count in range(1, 40):
        counts = reliability_curve(torch.arange(count) / count, torch.zeros(count), 7, "mass").count
        assert counts.max() - counts.min() <= 1


def test_errors_by_hand():
    confidence, correct = [0.05, 0.1, 0.95, 0.95], [0, 0, 1, 0]
    # bins of a tenth: two in (0, 0.1] with gap 0.075, two in (0.9, 1] with gap 0.45
    assert expected_calibration_error(confidence, correct, 10) == pytest.approx(0.5 * 0.075 + 0.5 * 0.45)
    assert maximum_calibration_error(confidence, correct, 10) == pytest.approx(0.45)
    assert maximum_calibration_error([1.0, 0.0], [0, 1]) == 1
    assert expected_calibration_error(torch.tensor([1.0, 0.0]), torch.tensor([True, False])) == 0
    assert math.isnan(expected_calibration_error([0.5, math.nan], [0, 1]))


def test_the_streamed_error_is_this_one():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 20, 5, generator=generator)
    labels = torch.randint(0, 5, (3, 20), generator=generator)
    streamed = StreamingEvaluation()
    for row in range(3):
        streamed.update(logits[row : row + 1], labels[row : row + 1])
    log_p = logits[:, :-1].log_softmax(-1)
    confidence, predicted = log_p.exp().max(-1)
    correct = predicted == labels[:, 1:]
    expected = expected_calibration_error(confidence, correct)
    assert streamed.compute()["expected_calibration_error"] == pytest.approx(expected, abs=1e-7)
    assert streamed.reliability().maximum_error == pytest.approx(
        maximum_calibration_error(confidence, correct), abs=1e-6
    )


@pytest.mark.parametrize("binning", ["width", "mass"])
def test_calibrated_predictions_have_the_error_of_their_number(binning):
    errors = []
    for seed in range(40):
        confidence, correct = predictions(3000, seed)
        errors.append(expected_calibration_error(confidence, correct, binning=binning))
    # A bin of n_b predictions has a gap of mean √(2 v / (π n_b)), v = E[p (1 − p)]; both kinds of bins are alike here.
    edges = torch.linspace(0, 1, 16, dtype=torch.float64)
    middle = (edges[1:] + edges[:-1]) / 2
    variance = middle * (1 - middle) - (1 / 15) ** 2 / 12
    expected = float((2 * variance * 15 / (math.pi * 3000)).sqrt().mean())
    spread = np.std(errors) / math.sqrt(len(errors))
    assert abs(np.mean(errors) - expected) < 4 * spread
    # what is not calibrated stands out from that
    wrong = expected_calibration_error(*predictions(3000, 0, power=3.0), binning=binning)
    assert wrong > 5 * expected


def test_bad_predictions_are_named():
    with pytest.raises(ValueError, match="`confidence` is a probability from 0 to 1.*1.5"):
        expected_calibration_error([0.5, 1.5], [0, 1])
    with pytest.raises(ValueError, match="`correct` is 0 or 1.*0.5"):
        expected_calibration_error([0.5, 0.5], [0, 0.5])
    with pytest.raises(ValueError, match="2 of `confidence`, 3 of `correct`"):
        expected_calibration_error([0.5, 0.5], [0, 1, 1])
    with pytest.raises(ValueError, match="0 of `confidence`"):
        reliability_curve([], [])
    with pytest.raises(ValueError, match="'width', 'mass', got 'equal'"):
        reliability_curve([0.5], [1], binning="equal")
    for wrong in (0, 2.0, True):
        with pytest.raises(ValueError, match=f"num_bins.*{wrong}"):
            maximum_calibration_error([0.5], [1], wrong)


# ---- Brier score ----


def test_brier_score_against_brute_force_and_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(50, 4, generator=generator, dtype=torch.float64).softmax(-1)
    targets = torch.randint(0, 4, (50,), generator=generator)
    expected = (p - torch.nn.functional.one_hot(targets, 4)).square().sum(-1)
    torch.testing.assert_close(brier(p, targets), expected)
    # of two classes it is twice the score of one of them
    two = torch.stack([1 - p[:, 0], p[:, 0]], -1)
    outcome = (targets == 0).long()
    assert brier(two, outcome).mean().item() == pytest.approx(2 * brier_score_loss(outcome, two[:, 1]))
    assert brier(torch.eye(3)[:2], torch.tensor([0, 2])).tolist() == [0, 2]


# ---- Classwise ----


def naive_classwise(p, targets, num_bins):
    total = 0.0
    edges = torch.linspace(0, 1, num_bins + 1, dtype=torch.float64)
    for k in range(p.shape[-1]):
        for low, high in itertools.pairwise(edges):
            inside = (p[:, k] > low) & (p[:, k] <= high)
            if low == 0:
                inside |= p[:, k] == 0
            if inside.any():
                share = (targets[inside] == k).double().mean()
                total += inside.double().mean() * (share - p[inside, k].mean()).abs()
    return float(total / p.shape[-1])


@pytest.mark.parametrize("num_bins", [1, 2, 15])
@pytest.mark.parametrize("sharpness", [0.0, 1.0, 6.0])
def test_the_accumulator_is_the_naive_computation(num_bins, sharpness):
    generator = torch.Generator().manual_seed(0)
    p = (sharpness * torch.randn(90, 7, generator=generator, dtype=torch.float64)).softmax(-1)
    targets = torch.randint(0, 7, (90,), generator=generator)
    expected = naive_classwise(p, targets, num_bins)
    for block in (1, 13, 90):
        classwise = ClasswiseCalibration(num_bins)
        for start in range(0, 90, block):
            classwise.update(p[start : start + block], targets[start : start + block])
        assert classwise.compute() == pytest.approx(expected, abs=1e-12)
    assert classwise.num_predictions == 90


def test_classwise_of_two_classes_is_the_mean_of_each_ones_torchmetrics():
    confidence, correct = predictions(500, power=2.0)
    p = torch.stack([1 - confidence, confidence], -1)
    classwise = ClasswiseCalibration()
    classwise.update(p, correct)
    each = [
        binary_calibration_error(p[:, k].float(), (correct == k).long(), n_bins=15, norm="l1").item() for k in (0, 1)
    ]
    assert classwise.compute() == pytest.approx(sum(each) / 2, abs=1e-5)


def test_classwise_sees_what_the_confidence_hides():
    # always sure of class 0 half of the time and of class 1 otherwise, and the classes change places
    p = torch.tensor([[0.9, 0.1, 0.0], [0.1, 0.9, 0.0]]).repeat(10, 1)
    targets = torch.tensor([0] * 10 + [1] * 10)
    assert expected_calibration_error(p.amax(-1), p.argmax(-1) == targets) == pytest.approx(0.4)
    classwise = ClasswiseCalibration()
    classwise.update(p, targets)
    assert classwise.compute() == pytest.approx((0.4 + 0.4) / 3)


def test_bad_classwise_is_named():
    classwise = ClasswiseCalibration()
    with pytest.raises(ValueError, match="no prediction"):
        classwise.compute()
    classwise.update(torch.eye(3), torch.arange(3))
    with pytest.raises(ValueError, match=r"\[n, 3\].*\(4, 4\)"):
        classwise.update(torch.eye(4), torch.arange(4))
    with pytest.raises(ValueError, match=r"\(3, 3\) and \(2,\)"):
        classwise.update(torch.eye(3), torch.arange(2))


# ---- Rank calibration ----


def naive_rank_calibration(uncertainty, loss, num_bins):
    order = np.argsort(uncertainty)
    bins = [part for part in np.array_split(order, num_bins) if len(part)]
    u = [uncertainty[part].mean() for part in bins]
    r = [-loss[part].mean() for part in bins]
    total = 0.0
    for b, part in enumerate(bins):
        others = [c for c in range(len(bins)) if c != b]
        better = np.mean([r[c] >= r[b] for c in others])
        surer = np.mean([u[c] <= u[b] for c in others])
        total += len(part) * abs(better - surer)
    return total / len(uncertainty)


@pytest.mark.parametrize("num_bins", [2, 5, 20])
def test_rank_calibration_against_brute_force(num_bins):
    generator = np.random.default_rng(0)
    uncertainty = generator.random(200)
    loss = (generator.random(200) < uncertainty**0.5).astype(float)
    found = rank_calibration_error(uncertainty, loss, num_bins)
    assert found == pytest.approx(naive_rank_calibration(uncertainty, loss, num_bins), abs=1e-12)
    assert rank_calibration_error(np.exp(9 * uncertainty), 5 * loss - 2, num_bins) == pytest.approx(found)


def test_rank_calibration_where_it_is_known():
    level = torch.arange(100.0)
    assert rank_calibration_error(level, level**3) == 0
    # turned round, a bin with k surer ones has B − 1 − k better ones: the mean of |B − 1 − 2k| / (B − 1)
    assert rank_calibration_error(level, -level) == pytest.approx(20 / (2 * 19))
    assert math.isnan(rank_calibration_error([1.0, math.nan], [0, 1]))
    assert math.isnan(rank_calibration_error([1.0, 2.0], [0, math.nan]))
    with pytest.raises(ValueError, match="5 predictions in one bin of 20"):
        rank_calibration_error([1.0] * 5, [0, 1, 0, 1, 0])


def test_bits_per_byte():
    # 8 bits for two bytes, whatever the tokens they are in
    assert bits_per_byte(torch.tensor([8 * math.log(2)]), 2) == pytest.approx(4)
    assert bits_per_byte([5 * math.log(2), 3 * math.log(2)], [1, 1]) == pytest.approx(4)
    with pytest.raises(ValueError, match="got 0 of them"):
        bits_per_byte([1.0], 0)
