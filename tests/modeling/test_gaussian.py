"""The Gaussian functions against torch.distributions, Monte Carlo, finite differences and one another."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from hf_variational.modeling import gaussian
from hf_variational.modeling.gaussian import gaussian_kl, sample_gaussian, sample_with_kl

BOUNDS = (-3.0, 1.0)
PRIORS = ["standard", "centered", "empirical", "centered_scalar", "mean_scalar"]


def prior_of(kind: str, units: int, dtype=torch.float32) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Prior mean and log-scale in each of the shapes that the fused function takes."""
    per_unit = torch.linspace(-1.0, 0.8, units, dtype=dtype)
    scalar = torch.tensor(0.3, dtype=dtype)
    zero = torch.zeros((), dtype=dtype)
    return {
        "standard": (zero, zero),
        "centered": (None, per_unit),
        "empirical": (per_unit.flip(0), per_unit),
        "centered_scalar": (None, scalar),
        "mean_scalar": (scalar, per_unit),
    }[kind]


def draw(*shape: int, dtype=torch.float32, seed: int = 0, spread: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


class TestKL:
    def test_equals_torch_distributions(self):
        mean, log_scale = draw(5, 7, dtype=torch.float64), draw(5, 7, dtype=torch.float64, seed=1)
        prior_mean, prior_log_scale = draw(7, dtype=torch.float64, seed=2), draw(7, dtype=torch.float64, seed=3)
        expected = kl_divergence(Normal(mean, log_scale.exp()), Normal(prior_mean, prior_log_scale.exp()))
        torch.testing.assert_close(gaussian_kl(mean, log_scale, prior_mean, prior_log_scale), expected)

    def test_standard_prior_has_the_known_formula(self):
        mean, log_scale = draw(11, dtype=torch.float64), draw(11, dtype=torch.float64, seed=1)
        zero = torch.zeros((), dtype=torch.float64)
        variance = log_scale.exp().square()
        expected = 0.5 * (mean.square() + variance - variance.log() - 1)
        torch.testing.assert_close(gaussian_kl(mean, log_scale, zero, zero), expected)

    def test_centered_prior_sits_on_the_mean_and_leaves_it_free(self):
        mean = draw(6, dtype=torch.float64).requires_grad_()
        log_scale, prior_log_scale = draw(6, dtype=torch.float64, seed=1), draw(6, dtype=torch.float64, seed=2)
        scale = log_scale.clone().requires_grad_()
        kl = gaussian_kl(mean, scale, None, prior_log_scale)
        torch.testing.assert_close(kl, gaussian_kl(mean.detach(), log_scale, mean.detach(), prior_log_scale))
        mean_grad, scale_grad = torch.autograd.grad(kl.sum(), (mean, scale), allow_unused=True)
        assert mean_grad is None or mean_grad.abs().max() == 0
        assert scale_grad.abs().min() > 0

    def test_is_zero_at_the_target_and_positive_elsewhere(self):
        mean, log_scale = draw(1000), draw(1000, seed=1)
        torch.testing.assert_close(gaussian_kl(mean, log_scale, mean, log_scale), torch.zeros(1000), atol=1e-6, rtol=0)
        elsewhere = gaussian_kl(mean, log_scale, draw(1000, seed=2), draw(1000, seed=3))
        assert elsewhere.min() >= 0

    def test_monte_carlo(self):
        draws = 200_000
        mean, log_scale = torch.tensor([0.3, -1.2, 2.0]), torch.tensor([-1.0, 0.2, -3.0])
        prior_mean, prior_log_scale = torch.tensor([0.0, -1.0, 1.9]), torch.tensor([0.0, -0.4, -2.5])
        z = sample_gaussian(mean.expand(draws, 3), log_scale, torch.randn(draws, 3))
        difference = Normal(mean, log_scale.exp()).log_prob(z) - Normal(prior_mean, prior_log_scale.exp()).log_prob(z)
        standard_error = difference.std(0) / math.sqrt(draws)
        error = (difference.mean(0) - gaussian_kl(mean, log_scale, prior_mean, prior_log_scale)).abs()
        assert (error < 4.5 * standard_error).all(), (error, standard_error)

    def test_gradcheck(self):
        inputs = [draw(3, 4, dtype=torch.float64, seed=seed).requires_grad_() for seed in range(4)]
        assert torch.autograd.gradcheck(gaussian_kl, inputs)
        assert torch.autograd.gradgradcheck(gaussian_kl, inputs)


class TestSample:
    def test_moments(self):
        mean, log_scale = torch.tensor([1.0, -2.0]), torch.tensor([-1.0, 0.5])
        z = sample_gaussian(mean.expand(100_000, 2), log_scale, torch.randn(100_000, 2))
        standard_error = log_scale.exp() / math.sqrt(100_000)
        assert ((z.mean(0) - mean).abs() < 4.5 * standard_error).all()
        torch.testing.assert_close(z.std(0), log_scale.exp(), rtol=0.02, atol=0)

    @pytest.mark.parametrize("scale_shape", [(1,), (4,), (3, 5, 4)])
    def test_copies_are_neighbours(self, scale_shape):
        mean, log_scale, noise = draw(3, 5, 4), draw(*scale_shape, seed=1), draw(6, 5, 4, seed=2)
        sample = sample_gaussian(mean, log_scale, noise, copies=2)
        for row in range(6):
            source = row // 2
            scale = log_scale[source] if log_scale.ndim == 3 else log_scale
            torch.testing.assert_close(sample[row], mean[source] + scale.exp() * noise[row])

    @pytest.mark.parametrize("copies", [1, 2])
    def test_gradcheck(self, copies):
        mean, log_scale = (draw(2, 3, 4, dtype=torch.float64, seed=seed).requires_grad_() for seed in (0, 1))
        noise = draw(2 * copies, 3, 4, dtype=torch.float64, seed=2)
        assert torch.autograd.gradcheck(lambda m, s: sample_gaussian(m, s, noise, copies), (mean, log_scale))


def naive(mean, log_scale, noise, prior_mean, prior_log_scale, low, high):
    """The oracle of `sample_with_kl`, from the plain functions."""
    clipped = log_scale.clamp(low, high)
    mean = mean.to(noise.dtype)
    kl = gaussian_kl(mean, clipped, prior_mean, prior_log_scale)
    return sample_gaussian(mean, clipped, noise), kl.expand(noise.shape).sum(-1)


def run(function, mean, log_scale, noise, prior, weights=(1.0, 1.0)):
    """Outputs and the gradients of a random projection of them, in everything that can have one."""
    leaves = [t.detach().clone().requires_grad_() if t is not None else None for t in (mean, log_scale, *prior)]
    sample, kl, *_ = function(leaves[0], leaves[1], noise, leaves[2], leaves[3], *BOUNDS)
    projection = draw(*sample.shape, dtype=sample.dtype, seed=8), draw(*kl.shape, dtype=kl.dtype, seed=9)
    total = weights[0] * (sample * projection[0]).sum() + weights[1] * (kl * projection[1]).sum()
    held = [leaf for leaf in leaves if leaf is not None]
    return (sample.detach(), kl.detach(), *torch.autograd.grad(total, held, allow_unused=True, materialize_grads=True))


class TestFused:
    """`sample_with_kl` against `gaussian_kl` and `sample_gaussian`, values and every gradient."""

    @pytest.mark.parametrize("prior", PRIORS)
    @pytest.mark.parametrize("block_elements", [1, 3 * 17, 65_536])
    def test_equals_the_plain_functions(self, prior, block_elements, monkeypatch, poisoned_scratch):
        monkeypatch.setattr(gaussian, "_BLOCK_ELEMENTS", block_elements)
        mean, log_scale, noise = draw(2, 5, 17), draw(2, 5, 17, seed=1, spread=2.0), draw(2, 5, 17, seed=2)
        clipped = (log_scale < BOUNDS[0]) | (log_scale > BOUNDS[1])
        assert 0 < clipped.float().mean() < 1, "the case must hold clipped units and free ones"
        fused = run(sample_with_kl, mean, log_scale, noise, prior_of(prior, 17))
        plain = run(naive, mean, log_scale, noise, prior_of(prior, 17))
        for actual, expected in zip(fused, plain, strict=True):
            assert actual.dtype == expected.dtype and actual.shape == expected.shape
            torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)
        assert fused[3][clipped].abs().max() == 0

    @pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0)])
    def test_each_output_alone(self, weights):
        inputs = draw(2, 3, 6), draw(2, 3, 6, seed=1), draw(2, 3, 6, seed=2), prior_of("empirical", 6)
        for actual, expected in zip(run(sample_with_kl, *inputs, weights), run(naive, *inputs, weights), strict=True):
            torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)

    def test_one_output_used(self):
        """Autograd then hands the other output no gradient at all, rather than zeros."""
        for index in (0, 1):
            leaf = draw(2, 3, 6).requires_grad_()
            outputs = sample_with_kl(
                leaf, draw(2, 3, 6, seed=1), draw(2, 3, 6, seed=2), *prior_of("standard", 6), *BOUNDS
            )
            assert torch.isfinite(torch.autograd.grad(outputs[index].sum(), leaf)[0]).all()

    def test_units_exactly_at_the_bounds_keep_their_gradient_as_clamp_does(self):
        log_scale = torch.tensor([BOUNDS[0], BOUNDS[1], 0.0]).reshape(1, 1, 3)
        inputs = draw(1, 1, 3), log_scale, draw(1, 1, 3, seed=2), prior_of("standard", 3)
        torch.testing.assert_close(run(sample_with_kl, *inputs)[3], run(naive, *inputs)[3])

    @pytest.mark.parametrize("prior", ["standard", "centered", "empirical"])
    def test_bfloat16_mean(self, prior, poisoned_scratch):
        """The sample and the KL stay float32; only the mean's gradient is rounded, once."""
        mean, log_scale, noise = draw(2, 5, 8, dtype=torch.bfloat16), draw(2, 5, 8, seed=1), draw(2, 5, 8, seed=2)
        fused = run(sample_with_kl, mean, log_scale, noise, prior_of(prior, 8))
        plain = run(naive, mean, log_scale, noise, prior_of(prior, 8))
        assert fused[0].dtype == fused[1].dtype == torch.float32 and fused[2].dtype == torch.bfloat16
        for index, (actual, expected) in enumerate(zip(fused, plain, strict=True)):
            tolerance = 2e-2 if index == 2 else 2e-5
            torch.testing.assert_close(actual.float(), expected.float(), rtol=tolerance, atol=tolerance)

    @pytest.mark.parametrize("prior", PRIORS)
    def test_gradcheck(self, prior, monkeypatch):
        monkeypatch.setattr(gaussian, "_BLOCK_ELEMENTS", 8)
        double = torch.float64
        noise = draw(2, 3, 4, dtype=double, seed=2)
        leaves = [draw(2, 3, 4, dtype=double, seed=seed).requires_grad_() for seed in (0, 1)]
        priors = prior_of(prior, 4, dtype=double)
        leaves += [t.clone().requires_grad_() for t in priors if t is not None]

        def function(mean, log_scale, *rest):
            prior_mean = None if priors[0] is None else rest[0]
            return sample_with_kl(mean, log_scale, noise, prior_mean, rest[-1], *BOUNDS)[:2]

        assert torch.autograd.gradcheck(function, leaves)

    def test_views_and_empty_inputs(self):
        wide = draw(2, 12, 5)
        mean = wide.transpose(1, 2)  # not contiguous
        log_scale = draw(2, 5, 1, seed=1).expand(2, 5, 12)
        inputs = mean, log_scale, draw(2, 5, 12, seed=2), prior_of("empirical", 12)
        for actual, expected in zip(run(sample_with_kl, *inputs), run(naive, *inputs), strict=True):
            torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)
        sample, kl, *_ = sample_with_kl(*(torch.zeros(0, 3, 4),) * 3, *prior_of("standard", 4), *BOUNDS)
        assert sample.shape == (0, 3, 4) and kl.shape == (0, 3)

    def test_leaves_its_inputs_alone(self):
        tensors = [draw(2, 3, 4), draw(2, 3, 4, seed=1), draw(2, 3, 4, seed=2), *prior_of("empirical", 4)]
        before = [t.clone() for t in tensors]
        tensors[0].requires_grad_()
        sample, kl, *_ = sample_with_kl(*tensors, *BOUNDS)
        (sample.sum() + kl.sum()).backward()
        for tensor, copy in zip(tensors, before, strict=True):
            assert torch.equal(tensor, copy)

    @pytest.mark.parametrize("units", [8, 1024])
    def test_is_zero_at_the_target(self, units):
        """A collapsed layer: thousands of logarithms cancel, and what is left is rounding, far below 1e-4 a unit."""
        mean = draw(2, 4, units)
        log_scale = draw(units, seed=1, spread=0.5).clamp(*BOUNDS)
        _, kl, *_ = sample_with_kl(
            mean, log_scale.expand(2, 4, units), draw(2, 4, units, seed=2), None, log_scale, *BOUNDS
        )
        assert kl.abs().max() < 1e-6 * units

    def test_the_branch_that_a_compiler_sees_is_the_same(self, monkeypatch):
        inputs = draw(2, 5, 8, dtype=torch.bfloat16), draw(2, 5, 8, seed=1, spread=2.0), draw(2, 5, 8, seed=2)
        plain = run(sample_with_kl, *inputs, prior_of("empirical", 8))
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        traced = run(sample_with_kl, *inputs, prior_of("empirical", 8))
        for index, (actual, expected) in enumerate(zip(traced, plain, strict=True)):
            assert actual.dtype == expected.dtype
            tolerance = 2e-2 if index == 2 else 2e-5
            torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
