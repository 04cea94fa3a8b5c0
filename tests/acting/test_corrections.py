"""Measures corrected for the number of samples: against brute force, and on samples whose limit is known."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_variational.acting import corrected_measures
from hf_variational.acting import corrections as module
from hf_variational.modeling.predictive import measures_of_log_probabilities


def entropy(p):
    return torch.special.entr(p).sum(-1)


def by_hand(p):
    """Leave one out, literally: p [S, vocab]."""
    size = p.shape[0]

    def of(part):
        total = entropy(part.mean(0))
        return total, total - entropy(part).mean()

    raw = of(p)
    without = [of(torch.cat([p[:j], p[j + 1 :]])) for j in range(size)]
    pseudo = [torch.stack([size * raw[i] - (size - 1) * w[i] for w in without]) for i in range(2)]
    return raw, pseudo


def dirichlet_samples(concentration, count, num_samples, vocab=12, seed=0):
    torch.manual_seed(seed)
    alpha = concentration * torch.softmax(1.5 * torch.randn(vocab, dtype=torch.float64), 0)
    p = torch.distributions.Dirichlet(alpha).sample((count, num_samples)).clamp(min=1e-300)
    total, mean = alpha.sum(), alpha / alpha.sum()
    # H of the mean, less the mean entropy of a Dirichlet's categorical distributions.
    expected = torch.digamma(total + 1) - (mean * torch.digamma(alpha + 1)).sum()
    variance = (mean * (1 - mean) / (total + 1)).sum()
    return p.log(), entropy(mean), expected, variance


@settings(deadline=None, max_examples=25)
@given(size=st.integers(2, 9), vocab=st.integers(2, 30), spread=st.floats(0.001, 8), seed=st.integers(0, 99))
def test_is_the_jackknife(size, vocab, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    log_p = (spread * torch.randn(size, vocab, generator=generator, dtype=torch.float64)).log_softmax(-1)
    (_, information), (of_entropy, of_information) = by_hand(log_p.exp())
    found = corrected_measures(log_p)
    close = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(found.predictive_entropy, of_entropy.mean(), **close)
    torch.testing.assert_close(found.mutual_information, of_information.mean(), **close)
    torch.testing.assert_close(found.excess, of_information.mean() - information, **close)
    torch.testing.assert_close(found.predictive_entropy_error, of_entropy.std() / math.sqrt(size), **close)
    if size > 2:
        torch.testing.assert_close(found.mutual_information_error, of_information.std() / math.sqrt(size), **close)
    else:
        torch.testing.assert_close(found.mutual_information_error, math.sqrt(2) * found.mutual_information)
    assert found.mutual_information >= information - 1e-12
    torch.testing.assert_close(found.predictive_entropy - found.mutual_information, found.expected_entropy, **close)


def test_two_samples_tell_their_distance_and_nothing_of_its_spread():
    log_p = torch.randn(5, 2, 7, dtype=torch.float64).log_softmax(-1)
    raw = measures_of_log_probabilities(log_p.unsqueeze(2))[0].mutual_information.squeeze(1)
    found = corrected_measures(log_p)
    torch.testing.assert_close(found.mutual_information, 2 * raw.double(), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("size", [2, 8, 32])
def test_known_limits(size):
    # Mutual information of some hundredths of a nat, as of the samples of a language model.
    log_p, total, expected, variance = dirichlet_samples(200.0, 4000, size)
    truth = float(total - expected)
    assert 0.02 < truth < 0.08
    raw = measures_of_log_probabilities(log_p.unsqueeze(2))[0]
    found = corrected_measures(log_p)
    information = found.mutual_information
    sampling_error = float(information.std()) / math.sqrt(len(information))
    assert float(information.mean()) == pytest.approx(truth, rel=0.04, abs=3 * sampling_error)
    assert float(raw.mutual_information.mean()) == pytest.approx((1 - 1 / size) * truth, rel=0.04)
    assert float(found.predictive_entropy.mean()) == pytest.approx(float(total), abs=0.005)
    assert float(found.conditional_variance.mean()) == pytest.approx(float(variance), rel=0.05)
    assert float(raw.conditional_variance.mean()) == pytest.approx((1 - 1 / size) * float(variance), rel=0.05)
    # Each says of itself how far it scatters; the information of two samples says it too high.
    for name in ("predictive_entropy", "mutual_information"):
        spread = float(getattr(found, name).std())
        said = float(getattr(found, f"{name}_error").square().mean().sqrt())
        assert 0.8 * spread < said < (8 if size == 2 and name == "mutual_information" else 1.25) * spread


def test_numbers_of_samples_can_be_compared_only_once_corrected():
    found, raw = {}, {}
    for size in (2, 8, 32):
        log_p, *_ = dirichlet_samples(400.0, 3000, size)
        found[size] = float(corrected_measures(log_p).mutual_information.mean())
        raw[size] = float(measures_of_log_probabilities(log_p.unsqueeze(2))[0].mutual_information.mean())
    assert max(found.values()) / min(found.values()) < 1.03
    assert max(raw.values()) / min(raw.values()) > 1.8


def test_the_jackknife_leaves_less_bias_than_the_first_order_correction():
    for concentration in (5.0, 20.0):
        for size in (2, 8):
            log_p, total, expected, _ = dirichlet_samples(concentration, 4000, size)
            p = log_p.exp()
            plain = entropy(p.mean(1)) - entropy(p).mean(1)
            first_order = plain + (p.var(1) / p.mean(1)).sum(-1) / (2 * size)
            jackknife = corrected_measures(log_p).mutual_information
            truth = total - expected
            assert abs(jackknife.mean() - truth) < abs(first_order.mean() - truth) < abs(plain.mean() - truth)
            assert jackknife.std() < 1.25 * first_order.std()


def test_the_excess_is_what_the_likelihood_lacks():
    log_p, *_ = dirichlet_samples(200.0, 4000, 8)
    limit = log_p.exp().mean((0, 1))
    log_mean = log_p.logsumexp(1) - math.log(8)
    lacking = (limit * (limit.log() - log_mean)).sum(-1).mean()
    assert float(corrected_measures(log_p).excess.mean()) == pytest.approx(float(lacking), rel=0.1)


def test_small_differences_survive_single_precision():
    torch.manual_seed(0)
    base = torch.randn(1, 1, 5000, dtype=torch.float64)
    log_p = (base + 1e-3 * torch.randn(6, 8, 5000, dtype=torch.float64)).log_softmax(-1)
    exact, single = corrected_measures(log_p), corrected_measures(log_p.float())
    torch.testing.assert_close(single.mutual_information.double(), exact.mutual_information, rtol=0.01, atol=0)
    torch.testing.assert_close(single.excess.double(), exact.excess, rtol=0.01, atol=0)


def test_tokens_that_were_ruled_out():
    log_p = torch.randn(3, 4, 6, dtype=torch.float64)
    log_p[..., 2] = -torch.inf
    log_p[0, 1, 3] = -torch.inf  # of one sample alone
    log_p = log_p.log_softmax(-1)
    found = corrected_measures(log_p)
    for index in range(3):
        _, (of_entropy, of_information) = by_hand(log_p[index].exp())
        torch.testing.assert_close(found.predictive_entropy[index], of_entropy.mean())
        torch.testing.assert_close(found.mutual_information[index], of_information.mean())


def test_samples_that_agree():
    found = corrected_measures(torch.randn(3, 1, 9).log_softmax(-1).expand(3, 5, 9))
    for name in ("mutual_information", "conditional_variance", "excess", "mutual_information_error"):
        assert getattr(found, name).abs().max() < 1e-9


def test_blocks_and_shapes(monkeypatch):
    log_p = torch.randn(2, 3, 4, 7).log_softmax(-1)
    whole = corrected_measures(log_p)
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 30)
    for name, values in vars(corrected_measures(log_p)).items():
        assert values.shape == (2, 3)
        torch.testing.assert_close(values, getattr(whole, name))
    assert corrected_measures(log_p.bfloat16()).excess.dtype == torch.float32


def test_one_sample_is_refused():
    with pytest.raises(ValueError, match="S = 1: draw 2 or more"):
        corrected_measures(torch.zeros(3, 1, 4))
