"""The predictive measures against brute force in float64, and their laws."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model, token_ids

from hf_variational import PredictiveMeasures, log_mean_probability, predictive_measures
from hf_variational.modeling import predictive

NAMES = (
    "predictive_entropy",
    "expected_entropy",
    "mutual_information",
    "conditional_variance",
    "token_variance",
    "top1_flip_rate",
)


def draw_logits(batch=2, samples=3, length=5, vocab=17, spread=2.0, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(batch * samples, length, vocab, generator=generator)).to(dtype)


def entropy(p: torch.Tensor) -> torch.Tensor:
    return torch.special.entr(p).sum(-1)


def brute_force(logits: torch.Tensor, num_samples: int, targets: torch.Tensor | None = None) -> dict:
    """Each measure as its definition reads, in float64, holding everything at once."""
    p = logits.double().softmax(-1).unflatten(0, (-1, num_samples))
    mean = p.mean(1)
    expected = {
        "predictive_entropy": entropy(mean),
        "expected_entropy": entropy(p).mean(1),
        "mutual_information": entropy(mean) - entropy(p).mean(1),
        "conditional_variance": p.square().sum(-1).mean(1) - mean.square().sum(-1),
        "top1_flip_rate": (p.argmax(-1) != mean.argmax(-1)[:, None]).double().mean(1),
    }
    if targets is None:
        expected["token_variance"] = torch.full_like(expected["mutual_information"], math.nan)
    else:
        index = targets.clamp(min=0)[:, None, :, None].expand(-1, num_samples, -1, 1)
        variance = p.gather(-1, index).squeeze(-1).var(1, correction=0)
        expected["token_variance"] = variance.where(targets >= 0, torch.tensor(math.nan))
    return expected


def assert_measures(actual: PredictiveMeasures, expected: dict, rtol: float = 1e-4, atol: float = 2e-6) -> None:
    assert tuple(actual) == NAMES
    for name in NAMES:
        assert actual[name].dtype == torch.float32
        torch.testing.assert_close(
            actual[name],
            expected[name].float(),
            rtol=rtol,
            atol=atol,
            equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.fixture
def tiny_blocks(monkeypatch):
    """One position at a time, and the vocabulary in pieces."""
    monkeypatch.setattr(predictive, "BLOCK_ELEMENTS", 12)


class TestAgainstBruteForce:
    @pytest.mark.parametrize("samples", [1, 2, 8])
    @pytest.mark.parametrize("spread", [0.01, 1.0, 20.0])
    def test_values(self, samples, spread):
        logits = draw_logits(samples=samples, spread=spread)
        targets = torch.randint(0, 17, (2, 5))
        targets[0, 3] = targets[1, 4] = -100
        assert_measures(predictive_measures(logits, samples, targets), brute_force(logits, samples, targets))

    def test_without_targets_the_token_variance_is_nan(self):
        logits = draw_logits()
        measures = predictive_measures(logits, 3)
        assert measures.token_variance.isnan().all()
        assert_measures(measures, brute_force(logits, 3))

    def test_by_hand(self):
        """Two samples that are certain of different tokens: all of ln 2 is epistemic."""
        logits = torch.tensor([[[1e4, 0.0, 0.0]], [[0.0, 1e4, 0.0]]])
        measures = predictive_measures(logits, 2, torch.tensor([[1]]))
        expected = {
            "predictive_entropy": math.log(2),
            "expected_entropy": 0.0,
            "mutual_information": math.log(2),
            "conditional_variance": 2 * 0.25,
            "token_variance": 0.25,
            "top1_flip_rate": 0.5,
        }
        for name, value in expected.items():
            assert measures[name].item() == pytest.approx(value, abs=1e-6), name

    @pytest.mark.parametrize("samples", [1, 3])
    @pytest.mark.parametrize("elements", [1, 12, 17 * 6, 10**9])
    def test_blocks_equal_the_whole(self, samples, elements, monkeypatch):
        logits = draw_logits(samples=samples)
        targets = torch.randint(0, 17, (2, 5))
        monkeypatch.setattr(predictive, "BLOCK_ELEMENTS", elements)
        assert_measures(predictive_measures(logits, samples, targets), brute_force(logits, samples, targets))

    @pytest.mark.parametrize("elements", [12, 10**9])
    def test_ruled_out_tokens(self, elements, monkeypatch):
        """-inf in every sample, in some of them, and a whole block of the vocabulary."""
        monkeypatch.setattr(predictive, "BLOCK_ELEMENTS", elements)
        logits = draw_logits()
        logits[..., 9:] = -math.inf
        logits[0, :, 2] = -math.inf
        logits[4, :, :8] = -math.inf
        targets = torch.tensor([[0, 2, 5, 10, 16], [8, 0, 1, 12, -100]])
        assert_measures(predictive_measures(logits, 3, targets), brute_force(logits, 3, targets))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_other_dtypes_are_reduced_wide(self, dtype):
        logits = draw_logits(dtype=dtype)
        targets = torch.randint(0, 17, (2, 5))
        assert_measures(predictive_measures(logits, 3, targets), brute_force(logits, 3, targets))

    def test_large_vocabulary_stays_accurate(self):
        """Fifty thousand terms in float32, of samples that nearly agree."""
        base = draw_logits(batch=1, samples=1, length=2, vocab=50_257, spread=3.0)
        logits = base + 0.01 * draw_logits(batch=1, samples=8, length=2, vocab=50_257, spread=1.0, seed=1)
        expected = brute_force(logits, 8)
        assert 1e-5 < expected["mutual_information"].min() < 1e-3
        assert_measures(predictive_measures(logits, 8), expected, rtol=1e-3, atol=1e-7)

    def test_takes_no_gradient(self):
        logits = draw_logits().requires_grad_()
        assert not any(value.requires_grad for value in predictive_measures(logits, 3).values())


@st.composite
def cases(draw):
    samples, vocab = draw(st.integers(1, 5)), draw(st.integers(2, 12))
    seed, spread = draw(st.integers(0, 2**16)), draw(st.sampled_from([1e-3, 0.3, 2.0, 10.0, 80.0]))
    logits = draw_logits(batch=2, samples=samples, length=2, vocab=vocab, spread=spread, seed=seed)
    if draw(st.booleans()):
        generator = torch.Generator().manual_seed(seed)
        ruled_out = torch.rand(logits.shape, generator=generator) < 0.3
        ruled_out[..., 0] = False
        logits = logits.masked_fill(ruled_out, -math.inf)
    targets = torch.randint(0, vocab, (2, 2), generator=torch.Generator().manual_seed(seed))
    return logits, samples, targets


class TestLaws:
    @settings(max_examples=80, deadline=None, derandomize=True)
    @given(cases())
    def test_laws(self, case):
        logits, samples, targets = case
        measures = predictive_measures(logits, samples, targets)
        vocab = logits.shape[-1]
        for name, value in measures.items():
            assert torch.isfinite(value).all(), name
            assert (value >= -1e-6).all(), name
        assert (measures.mutual_information >= 0).all()
        assert (measures.conditional_variance >= 0).all()
        torch.testing.assert_close(
            measures.predictive_entropy, measures.expected_entropy + measures.mutual_information, rtol=1e-6, atol=1e-6
        )
        assert (measures.predictive_entropy <= math.log(vocab) + 1e-5).all()
        assert (measures.mutual_information <= math.log(samples) + 1e-5).all()
        assert (measures.conditional_variance <= 1 - 1 / samples + 1e-6).all()
        assert (measures.token_variance <= measures.conditional_variance + 1e-6).all()
        assert (measures.top1_flip_rate <= 1).all()
        assert_measures(measures, brute_force(logits, samples, targets), rtol=1e-3, atol=1e-5)

    @settings(max_examples=30, deadline=None, derandomize=True)
    @given(cases(), st.integers(0, 1000))
    def test_the_order_of_samples_and_of_tokens_does_not_matter(self, case, seed):
        logits, samples, _ = case
        generator = torch.Generator().manual_seed(seed)
        shuffled = logits.unflatten(0, (-1, samples))[:, torch.randperm(samples, generator=generator)].flatten(0, 1)
        shuffled = shuffled[..., torch.randperm(logits.shape[-1], generator=generator)]
        expected = {name: value.double() for name, value in predictive_measures(logits, samples).items()}
        assert_measures(predictive_measures(shuffled, samples), expected, rtol=1e-5, atol=1e-6)

    @settings(max_examples=30, deadline=None, derandomize=True)
    @given(cases())
    def test_one_sample_and_equal_samples_hold_no_information(self, case):
        logits, samples, targets = case
        for rows, count in (
            (logits[::samples], 1),
            (logits[::samples].repeat_interleave(4, 0), 4),
        ):
            measures = predictive_measures(rows, count, targets)
            assert measures.mutual_information.max() < 1e-6
            assert measures.conditional_variance.max() < 1e-10
            assert measures.token_variance.max() < 1e-10
            assert measures.top1_flip_rate.max() == 0
            torch.testing.assert_close(measures.predictive_entropy, measures.expected_entropy, rtol=0, atol=1e-6)

    def test_nearly_tied_tokens_are_no_flip_of_the_only_sample(self):
        """Logits that differ by less than the rounding of their normaliser."""
        logits = torch.tensor([[[0.0, 1e-8, -1.0]]])
        assert predictive_measures(logits, 1).top1_flip_rate.item() == 0

    def test_information_vanishes_with_the_scale(self):
        """Of the model: with sigma 1, 0.1, 0.01, ... the information falls as sigma squared, to zero."""
        ids, found = token_ids(), []
        for sigma in (1.0, 1e-1, 1e-2, 1e-5):
            torch.manual_seed(0)
            model = tiny_model({"scale": "scalar", "initial_scale": sigma}, perturb=False)
            with torch.no_grad():
                measures = model(ids, num_posterior_samples=8, output_uncertainty=True).uncertainty
            found.append((measures.mutual_information.mean().item(), measures.conditional_variance.mean().item()))
        for before, after in pairwise(found[:3]):
            assert all(a < b / 10 for a, b in zip(after, before, strict=True))
        assert found[0][0] > 1e-2
        assert found[-1][0] < 1e-6 and found[-1][1] < 1e-9


class TestLogMeanProbability:
    @pytest.mark.parametrize("samples", [1, 4])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_value(self, samples, dtype):
        logits = draw_logits(samples=samples, spread=30.0, dtype=dtype)
        actual = log_mean_probability(logits, samples)
        expected = logits.double().softmax(-1).unflatten(0, (-1, samples)).mean(1).log()
        assert actual.shape == (2, 5, 17)
        assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(actual.exp().sum(-1), torch.ones(2, 5, dtype=actual.dtype))

    def test_probabilities_below_float32_survive_as_logarithms(self):
        logits = torch.tensor([[[0.0, -200.0]], [[0.0, -300.0]]])
        torch.testing.assert_close(log_mean_probability(logits, 2)[0, 0, 1].item(), -200.0 - math.log(2))

    def test_ruled_out_tokens(self):
        logits = torch.tensor([[[0.0, -math.inf, 0.0]], [[0.0, -math.inf, -math.inf]]])
        log_mean = log_mean_probability(logits, 2)
        assert log_mean[0, 0, 1] == -math.inf
        torch.testing.assert_close(log_mean[0, 0, [0, 2]].exp(), torch.tensor([0.75, 0.25]))

    def test_gradcheck(self):
        logits = draw_logits(samples=2, length=2, vocab=4, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(lambda x: log_mean_probability(x, 2), logits)


class TestRefusals:
    @pytest.mark.parametrize("samples, rows", [(0, 6), (-1, 6), (4, 6)])
    def test_rows_must_be_whole_groups(self, samples, rows):
        with pytest.raises(ValueError, match=f"S = {samples} and {rows} rows"):
            predictive_measures(draw_logits(batch=rows, samples=1), samples)

    def test_log_mean_probability_names_the_number(self):
        with pytest.raises((ValueError, RuntimeError), match="4"):
            log_mean_probability(draw_logits(batch=6, samples=1), 4)

    def test_map_keeps_what_is_there(self):
        measures = predictive_measures(draw_logits(), 3).map(lambda value: value[:, :2])
        assert tuple(measures) == NAMES and measures.mutual_information.shape == (2, 2)
