"""Intervals against Student's and Fisher's, against scipy, and against how often they hold in simulation."""

import logging
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hf_variational.evaluation.statistics import (
    Estimate,
    bootstrap_documents,
    correlation,
    document_mean,
    over_seeds,
    paired_difference,
)


def clustered(num_documents=40, size=25, seed=0, between=1.0):
    """Tokens that share a number with the others of their document."""
    generator = np.random.default_rng(seed)
    documents = np.repeat(np.arange(num_documents), size)
    return between * generator.normal(size=num_documents)[documents] + generator.normal(size=len(documents)), documents


# ---- Seeds ----


def test_three_seeds_by_hand():
    estimate = over_seeds([1.0, 2.0, 3.0])
    # t of 2 degrees of freedom at 0.975 is 4.30265
    assert (estimate.mean, estimate.sd, estimate.n) == (2.0, 1.0, 3)
    assert estimate.interval == pytest.approx((2 - 4.30265 / math.sqrt(3), 2 + 4.30265 / math.sqrt(3)), abs=1e-5)
    assert str(estimate) == "2 ± 1 [-0.4841, 4.484] (3 seeds)"
    assert f"{estimate:.1f}" == "2.0 ± 1.0 [-0.5, 4.5] (3 seeds)"


def test_a_single_seed_says_so():
    estimate = over_seeds([0.043])
    assert estimate == Estimate(0.043, None, 1) and estimate.interval is None
    assert str(estimate) == "0.043 (one seed)"
    assert str(document_mean([1.0, 2.0], [5, 5])) == "1.5 (one document)"
    assert str(bootstrap_documents(lambda tokens: 0.25, [3, 3])) == "0.25 (one document)"


@given(
    values=st.lists(st.floats(-100, 100), min_size=2, max_size=9),
    scale=st.floats(0.1, 10),
    confidence=st.sampled_from([0.5, 0.9, 0.99]),
)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_intervals_move_with_the_values(values, scale, confidence):
    plain, moved = (over_seeds(np.asarray(v), confidence) for v in (values, scale * np.asarray(values) + 5))
    assert moved.mean == pytest.approx(scale * plain.mean + 5, abs=1e-9)
    assert moved.sd == pytest.approx(scale * plain.sd, rel=1e-6, abs=1e-9)
    assert moved.interval == pytest.approx([scale * end + 5 for end in plain.interval], rel=1e-6, abs=1e-9)


def test_paired_difference_is_that_of_a_paired_test():
    first, second = np.random.default_rng(0).normal(size=(2, 7))
    estimate = paired_difference(first, torch.from_numpy(second), 0.9)
    expected = stats.ttest_rel(first, second).confidence_interval(0.9)
    assert estimate.interval == pytest.approx((expected.low, expected.high), rel=1e-9)
    assert estimate.mean == pytest.approx(np.mean(first) - np.mean(second))
    # what a seed does to both is no part of it
    common = 100 * np.arange(7)
    assert paired_difference(first + common, second + common).sd == pytest.approx(estimate.sd)


def test_bootstrap_of_pairs_nears_students_interval_with_many():
    first, second = np.random.default_rng(1).normal(size=(2, 400))
    student = paired_difference(first, second)
    resampled = paired_difference(first, second, interval="bootstrap")
    assert resampled.interval == pytest.approx(student.interval, abs=0.02)
    assert resampled == paired_difference(first, second, interval="bootstrap")
    few = paired_difference([1.0, 2.0, 4.0], [0.0, 0.0, 0.0], interval="bootstrap")
    assert few.interval == (1.0, 4.0)


# ---- Documents ----


def test_the_mean_over_documents_of_equal_size_in_closed_form():
    values, documents = clustered(60)
    estimate = document_mean(torch.from_numpy(values), torch.from_numpy(documents))
    means = values.reshape(60, -1).mean(1)
    assert estimate.mean == pytest.approx(values.mean()) and estimate.n == 60
    # a bootstrap's variance has 1/n where the sample's has 1/(n - 1)
    assert estimate.sd == pytest.approx(means.std() / math.sqrt(60), rel=0.05)
    assert estimate.interval == pytest.approx(
        [values.mean() + side * 1.96 * estimate.sd for side in (-1, 1)], abs=0.03
    )
    # tokens as if they were independent would look four times as sure
    assert estimate.sd > 3 * values.std() / math.sqrt(len(values))


def test_intervals_over_documents_hold_as_often_as_they_say():
    held = {"documents": 0, "tokens": 0}
    for seed in range(200):
        values, documents = clustered(40, 10, seed)
        for name, units in (("documents", documents), ("tokens", np.arange(len(values)))):
            low, high = document_mean(values, units, 0.9, num_resamples=200).interval
            held[name] += low <= 0 <= high
    assert 0.83 <= held["documents"] / 200 <= 0.96
    assert held["tokens"] / 200 < 0.6


def test_any_statistic_is_resampled_by_whole_documents():
    documents = torch.tensor([7, 7, 2, 7, 9, 9, 2])
    sizes = {7: 3, 2: 2, 9: 2}
    seen = []

    def statistic(tokens):
        seen.append(documents[tokens].tolist())
        assert tokens.dtype == torch.int64
        for document, size in sizes.items():
            count = seen[-1].count(document)
            assert count % size == 0
            for token in (documents == document).nonzero().flatten():
                assert (tokens == token).sum() == count // size
        return float(len(tokens))

    estimate = bootstrap_documents(statistic, documents, num_resamples=100)
    assert estimate.mean == 7 and len(seen) == 101
    assert sum(len(tokens) != 7 for tokens in seen) > 10
    chosen = [sum(tokens.count(document) // size for document, size in sizes.items()) for tokens in seen]
    assert chosen == [3] * 101


def test_both_ways_of_resampling_a_mean_agree():
    generator = np.random.default_rng(3)
    documents = generator.integers(0, 50, size=900)  # of different sizes, in no order
    values = generator.normal(size=50)[documents] + generator.normal(size=900)
    fast = document_mean(values, documents)
    any_statistic = bootstrap_documents(lambda tokens: values[tokens.numpy()].mean(), documents, num_resamples=4000)
    assert fast.mean == pytest.approx(any_statistic.mean)
    assert fast.sd == pytest.approx(any_statistic.sd, rel=0.05)
    assert fast.interval == pytest.approx(any_statistic.interval, abs=0.03)


def test_resamples_without_a_value_are_counted(caplog):
    library = logging.getLogger("hf_variational")
    values = [0.0, 0.0, 1.0]

    def spread(tokens):
        chosen = np.asarray(values)[tokens.numpy()]
        return float("nan") if np.ptp(chosen) == 0 else chosen.mean()

    with caplog.at_level(logging.WARNING, library.name):
        estimate = bootstrap_documents(spread, [0, 1, 2], num_resamples=500)
    assert estimate.interval == pytest.approx((1 / 3, 2 / 3))
    # all zeros (8/27) or all ones (1/27)
    missing = int(caplog.records[-1].getMessage().split("nan in ")[1].split()[0])
    assert missing / 500 == pytest.approx(9 / 27, abs=0.08)
    with pytest.raises(ValueError, match="nan in all of 20 resamples of 2 documents"):
        bootstrap_documents(lambda tokens: math.nan, [0, 1], num_resamples=20)


# ---- Correlation ----


def test_correlations_are_scipys_and_the_interval_is_fishers():
    generator = np.random.default_rng(4)
    first = generator.normal(size=500)
    second = 0.6 * first + 0.8 * generator.normal(size=500)
    pearson = correlation(first, second)
    assert pearson.mean == pytest.approx(np.corrcoef(first, second)[0, 1])
    expected = stats.pearsonr(first, second).confidence_interval(0.95)
    assert pearson.interval == pytest.approx((expected.low, expected.high), abs=0.02)
    spearman = correlation(torch.from_numpy(first), second, kind="spearman", num_resamples=200)
    assert spearman.mean == pytest.approx(stats.spearmanr(first, second).statistic)
    # ranks do not see what is monotone
    assert correlation(first, np.exp(3 * second), kind="spearman", num_resamples=200).interval == spearman.interval
    assert correlation(first, first**3, kind="spearman", num_resamples=50).interval == pytest.approx((1.0, 1.0))


def test_correlations_of_tokens_are_as_sure_as_their_documents():
    first, documents = clustered(30, 20, seed=5, between=3.0)
    second, _ = clustered(30, 20, seed=6, between=3.0)
    by_document = correlation(first, second, documents, num_resamples=400)
    by_token = correlation(first, second, num_resamples=400)
    assert by_document.mean == by_token.mean and (by_document.n, by_token.n) == (30, 600)
    assert by_document.sd > 2.5 * by_token.sd


# ---- Bad input ----


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: over_seeds([]), r"at least one, got the shape \(0,\)"),
        (lambda: over_seeds([[1.0]]), r"got the shape \(1, 1\)"),
        (lambda: over_seeds([1.0, math.nan]), "`values` has nan at 1"),
        (lambda: over_seeds([1.0, 2.0], confidence=95), "between 0 and 1, got 95"),
        (lambda: paired_difference([1.0], [1.0, 2.0]), "same seeds on both sides, got 1 and 2"),
        (lambda: paired_difference([1.0], [1.0], interval="z"), "one of t, bootstrap, got 'z'"),
        (lambda: document_mean([1.0, 2.0], [0]), r"each of 2 tokens, got the shape \(1,\)"),
        (lambda: document_mean([1.0, 2.0], [0, 1], num_resamples=1), "at least 2, got 1"),
        (lambda: bootstrap_documents(len, []), "at least one token"),
        (lambda: correlation([1.0, 2.0], [3.0, 3.0]), "`second` is 3.0 everywhere"),
        (lambda: correlation([1.0, 2.0], [3.0]), "got 2 and 1 values"),
        (lambda: correlation([1.0], [3.0], kind="kendall"), "one of pearson, spearman, got 'kendall'"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
