"""Dirichlet samples, their gradients and their divergence, against closed forms, SciPy and torch.distributions."""

import itertools
import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from scipy import integrate, special, stats
from torch.distributions import Dirichlet, Gamma, kl_divergence

from hf_variational.modeling.attention_weights import WeightsPosterior, sample_weights_with_kl
from hf_variational.modeling.dirichlet import (
    LOG_CONCENTRATION_FLOOR,
    fast_multi_gamma_kl,
    fast_multi_gamma_kl_slope,
    log_concentration,
    log_gamma_with_slope,
    masked_softmax,
    multi_gamma_kl,
    sample_dirichlet,
)

LEVEL = 1e-5
ROWS = {
    "1e-3": (1e-3, 2e-3, 5e-3),
    "1e-2": (1e-2, 1e-2),
    "below one": (0.1, 0.3, 0.05, 0.6),
    "one": (1.0, 1.0, 1.0),
    "above one": (0.7, 2.0, 7.0),
    "1e3": (1e3, 300.0, 1e3),
    "mixed": (1e-3, 1.0, 1e3),
}


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def draws_of(alpha: torch.Tensor, draws: int, approximate: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples [draws, keys], and the log-concentrations of each of them, a leaf."""
    log_alpha = alpha.log().expand(draws, -1).clone().requires_grad_()
    return sample_dirichlet(log_alpha, approximate=approximate), log_alpha


def assert_mean(values: torch.Tensor, expected: torch.Tensor, relative_bias: float = 0.0) -> None:
    """The mean over the first axis within five of its standard errors, and what bias is allowed."""
    values = values.detach()
    standard_error = values.std(0) / math.sqrt(values.shape[0])
    error = (values.mean(0) - expected).abs()
    assert (error <= 5.0 * standard_error + relative_bias * expected.abs() + 1e-12).all(), (error, standard_error)


def mean_gradient(alpha: torch.Tensor) -> torch.Tensor:
    """d E[w_k] / d log alpha_j, [keys, keys]."""
    mean = alpha / alpha.sum()
    return torch.diag(mean) - mean[:, None] * mean


class TestSamples:
    @pytest.mark.parametrize("row", ROWS)
    def test_means_and_covariances(self, row):
        alpha = double(*ROWS[row])
        total = alpha.sum()
        w, _ = draws_of(alpha, 200_000)
        mean = alpha / total
        assert_mean(w, mean)
        centered = w.detach() - mean
        covariance = (torch.diag(mean) - mean[:, None] * mean) / (total + 1.0)
        assert_mean(centered[:, :, None] * centered[:, None, :], covariance)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_marginals_are_beta(self, dtype):
        alpha = torch.tensor([0.05, 0.3, 1.0, 5.0, 50.0, 1e3], dtype=dtype)
        w, _ = draws_of(alpha, 20_000)
        for key, concentration in enumerate(alpha.tolist()):
            marginal = stats.beta(concentration, alpha.sum().item() - concentration)
            assert stats.kstest(w[:, key].detach().double().numpy(), marginal.cdf).pvalue > LEVEL

    def test_marginals_of_tiny_concentrations_are_beta_down_to_underflow(self):
        alpha = double(1e-3, 3e-3, 6e-3)
        w, _ = draws_of(alpha, 50_000)
        for key, concentration in enumerate(alpha.tolist()):
            for threshold in (1e-300, 1e-100, 1e-6, 0.5, 0.99):
                share = special.betainc(concentration, alpha.sum().item() - concentration, threshold)
                below = int((w[:, key] < threshold).sum())
                assert stats.binomtest(below, w.shape[0], share).pvalue > LEVEL

    @pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e-6])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_a_tiny_concentration_chooses_keys_by_their_share(self, scale, dtype):
        share = torch.tensor([1.0, 2.0, 3.0, 10.0, 1000.0], dtype=dtype)
        w, _ = draws_of(share * scale, 200_000)
        assert (w.amax(-1) > 1.0 - 1e-3).double().mean() > 0.999
        counts = torch.bincount(w.argmax(-1), minlength=5)
        for count, probability in zip(counts.tolist(), (share / share.sum()).tolist(), strict=True):
            assert stats.binomtest(count, 200_000, probability).pvalue > LEVEL

    def test_noise_gives_the_same_distribution_and_the_same_sample_twice(self):
        alpha = double(0.3, 1.0, 4.0)
        noise = torch.randn(20_000, 3, 2, dtype=torch.float64)
        w = sample_dirichlet(alpha.log().expand(20_000, 3), noise)
        for key, concentration in enumerate(alpha.tolist()):
            assert stats.kstest(w[:, key].numpy(), stats.beta(concentration, 5.3 - concentration).cdf).pvalue > LEVEL
        assert torch.equal(w, sample_dirichlet(alpha.log().expand(20_000, 3), noise))

    def test_shape_may_be_transposed(self):
        log_alpha = torch.randn(40, 30).mT
        assert sample_dirichlet(log_alpha).sum(-1).allclose(torch.ones(30))


class TestExtremes:
    @pytest.mark.parametrize("approximate", [False, True])
    @pytest.mark.parametrize("supplied", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_concentrations_from_the_floor_to_a_million(self, approximate, supplied, dtype):
        decades = torch.linspace(math.log(1e-30), math.log(1e6), 37, dtype=dtype)
        mixed = torch.stack([decades[torch.randperm(37)] for _ in range(8)])
        floor = torch.full((2, 37), LOG_CONCENTRATION_FLOOR, dtype=dtype)
        log_alpha = torch.cat([mixed, floor, floor + 50.0, floor + 85.0]).expand(20, -1, -1)
        blind = torch.tensor([3])
        hidden = torch.rand(log_alpha.shape) < 0.3
        hidden[..., ::9] = False
        hidden[:, blind] = True
        hidden = hidden[: 4 if supplied else 20]
        leaf = log_alpha[: len(hidden)].masked_fill(hidden, -torch.inf).requires_grad_()
        noise = torch.randn(*leaf.shape, 1 if approximate else 2, dtype=dtype) if supplied else None
        w = sample_dirichlet(leaf, noise, approximate)
        assert torch.isfinite(w).all() and (w >= 0).all()
        assert w[hidden].abs().max() == 0
        assert w[:, blind].abs().max() == 0
        sums = w.sum(-1).index_fill(1, blind, 1.0)
        torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=20 * torch.finfo(dtype).eps)
        gradient = torch.autograd.grad((w * torch.randn_like(w)).sum(), leaf)[0]
        assert torch.isfinite(gradient).all()
        assert gradient[hidden].abs().max() == 0

    def test_below_the_floor_is_the_floor(self):
        log_total = double(0.0)
        log_mean = double(-200.0, -69.0, -1.0, -torch.inf)
        assert log_concentration(log_mean, log_total).tolist() == [LOG_CONCENTRATION_FLOOR, -69.0, -1.0, -torch.inf]
        assert math.exp(LOG_CONCENTRATION_FLOOR) == pytest.approx(1e-30)


class TestGradients:
    @pytest.mark.parametrize("row", ROWS)
    def test_of_the_mean(self, row):
        alpha = double(*ROWS[row])
        w, log_alpha = draws_of(alpha, 200_000)
        expected = mean_gradient(alpha)
        for key in range(alpha.numel()):
            gradient = torch.autograd.grad(w[:, key].sum(), log_alpha, retain_graph=True)[0]
            assert_mean(gradient, expected[key], relative_bias=3e-4)

    @pytest.mark.parametrize("row", ROWS)
    def test_of_the_mean_of_squares(self, row):
        alpha = double(*ROWS[row])
        w, log_alpha = draws_of(alpha, 200_000)
        gradient = torch.autograd.grad(w.square().sum(), log_alpha)[0]
        leaf = alpha.log().requires_grad_()
        total = leaf.exp().sum()
        closed_form = (leaf.exp() * (leaf.exp() + 1.0)).sum() / (total * (total + 1.0))
        assert_mean(w.square().sum(-1), closed_form.detach())
        assert_mean(gradient, torch.autograd.grad(closed_form, leaf)[0], relative_bias=3e-4)

    @pytest.mark.parametrize("approximate", [False, True])
    def test_equals_differences_with_common_random_numbers(self, approximate):
        """Sample by sample: with the noise supplied the sampler is a smooth function of alpha."""
        alpha = double(0.05, 0.4, 1.0, 3.0, 30.0)
        noise = torch.randn(400, 5, 1 if approximate else 2, dtype=torch.float64)
        noise[:200, 4] -= 1.5
        projection = torch.randn(5, dtype=torch.float64)

        def f(log_alpha):
            w = sample_dirichlet(log_alpha.expand(400, 5), noise, approximate)
            return (w * projection).sum(-1) + w.square().sum(-1)

        leaf = alpha.log().expand(400, 5).clone().requires_grad_()
        gradient = torch.autograd.grad(f(leaf).sum(), leaf)[0]
        step = 1e-4
        for key in range(5):
            shift = torch.zeros(5, dtype=torch.float64)
            shift[key] = step
            near = f(alpha.log() + shift) - f(alpha.log() - shift)
            far = f(alpha.log() + 2 * shift) - f(alpha.log() - 2 * shift)
            difference = (8.0 * near - far) / (12.0 * step)
            torch.testing.assert_close(gradient[:, key], difference, rtol=3e-4, atol=1e-6)
            torch.testing.assert_close(gradient[:, key].mean(), difference.mean(), rtol=3e-4, atol=1e-6)

    def test_float32_is_close_to_float64(self):
        log_alpha = torch.linspace(-6.0, 9.0, 40, dtype=torch.float64).view(8, 5).requires_grad_()
        noise = torch.randn(8, 5, 2, dtype=torch.float64)
        projection = torch.randn(8, 5, dtype=torch.float64)
        single = log_alpha.detach().float().requires_grad_()
        outputs = sample_dirichlet(log_alpha, noise), sample_dirichlet(single, noise.float())
        torch.testing.assert_close(outputs[1].double(), outputs[0], rtol=1e-3, atol=1e-5)
        gradients = [
            torch.autograd.grad((w * projection.to(w.dtype)).sum(), leaf)[0]
            for w, leaf in zip(outputs, (log_alpha, single), strict=True)
        ]
        torch.testing.assert_close(gradients[1].double(), gradients[0], rtol=1e-3, atol=1e-4)


class TestApproximation:
    def test_formula(self):
        """log g = (log u + log Gamma(alpha + 1)) / alpha of a uniform u."""
        alpha, noise = double(1e-3, 0.2, 1.0, 8.0), torch.randn(4, 1, dtype=torch.float64)
        log_g, _ = log_gamma_with_slope(alpha, noise, approximate=True)
        expected = (special.log_ndtr(noise[:, 0].numpy()) + special.gammaln(alpha.numpy() + 1.0)) / alpha.numpy()
        torch.testing.assert_close(log_g.numpy(), expected, rtol=1e-9, atol=1e-12)

    def test_is_the_gamma_distribution_for_small_concentrations(self):
        alpha = torch.full((20_000,), 0.01, dtype=torch.float64)
        log_g, _ = log_gamma_with_slope(alpha, None, approximate=True)
        cdf = special.gammainc(0.01, log_g.exp().numpy())
        # Where g underflows its CDF is g^alpha / Gamma(alpha + 1).
        tail = np.exp(0.01 * log_g.numpy() - special.gammaln(1.01))
        uniform = np.where(log_g.numpy() < -600.0, tail, np.minimum(cdf, 1.0))
        assert stats.kstest(uniform, "uniform").statistic < 0.03

    @staticmethod
    def two_keys(alpha: torch.Tensor, power: int) -> float:
        """E[w_1^power] of two keys under the approximation: log g_1 - log g_2 is an asymmetric Laplace variable."""
        first, second = alpha.tolist()
        centre = special.gammaln(first + 1.0) / first - special.gammaln(second + 1.0) / second

        def integrand(x: float) -> float:
            decay = -second * x if x > 0 else first * x
            return special.expit(centre + x) ** power * math.exp(decay)

        reach = 45.0
        kink = min(max(-centre, -reach / first), reach / second)
        points = sorted({0.0, kink})
        bounds = [-reach / first, *points, reach / second]
        pieces = [integrate.quad(integrand, *b, limit=500)[0] for b in itertools.pairwise(bounds)]
        return sum(pieces) * first * second / (first + second)

    @pytest.mark.parametrize("alpha", [(0.05, 0.1), (0.5, 1.0), (2.0, 5.0), (20.0, 20.0)])
    def test_samples_and_gradients_are_those_of_its_own_distribution(self, alpha):
        alpha = double(*alpha)
        w, log_alpha = draws_of(alpha, 200_000, approximate=True)
        for power in (1, 2):
            values = w[:, 0] ** power
            assert_mean(values, double(self.two_keys(alpha, power))[0])
            gradient = torch.autograd.grad(values.sum(), log_alpha, retain_graph=True)[0]
            step = 1e-3
            expected = [
                (self.two_keys(alpha * (step * unit).exp(), power) - self.two_keys(alpha / (step * unit).exp(), power))
                / (2.0 * step)
                for unit in torch.eye(2, dtype=torch.float64)
            ]
            assert_mean(gradient, double(*expected), relative_bias=1e-5)

    def test_is_right_for_small_concentrations_and_too_narrow_for_large_ones(self):
        """log g has a deviation of 1 / alpha and not 1 / sqrt(alpha): the variance is short by a factor of alpha."""
        for concentration, low, high in (
            (0.01, 0.98, 1.02),
            (0.1, 0.95, 1.05),
            (5.0, 0.1, 0.25),
            (100.0, 0.008, 0.012),
        ):
            w, _ = draws_of(double(concentration, concentration), 200_000, approximate=True)
            exact = 0.25 / (2.0 * concentration + 1.0)
            assert low < w[:, 0].var().item() / exact < high


class TestDeterministicParts:
    def test_masked_softmax(self):
        logits = double(1.0, -2.0, 0.5, -torch.inf).expand(3, 4).clone()
        logits[1] = -torch.inf
        w = masked_softmax(logits)
        torch.testing.assert_close(w[0], torch.softmax(logits[0], -1))
        assert w[1].abs().max() == 0 and w[:, 3].abs().max() == 0
        assert torch.autograd.gradcheck(masked_softmax, (logits.requires_grad_(),))

    def test_log_concentration(self):
        log_mean = double(-0.5, -80.0, -3.0, -torch.inf).expand(2, 4).clone().requires_grad_()
        log_total = double(2.0, -1.0).unsqueeze(-1).requires_grad_()

        def finite(log_mean, log_total):
            return log_concentration(log_mean, log_total).masked_fill(log_mean == -torch.inf, 0.0)

        assert torch.autograd.gradcheck(finite, (log_mean, log_total))

    def test_divergence(self):
        log_alpha = torch.linspace(-60.0, 8.0, 20, dtype=torch.float64)
        log_prior = (log_alpha + torch.randn(20, dtype=torch.float64)).requires_grad_()
        assert torch.autograd.gradcheck(multi_gamma_kl, (log_alpha.requires_grad_(), log_prior))

    @pytest.mark.parametrize("prior", ["contextual", "constant", "uniform"])
    @pytest.mark.parametrize("log_concentrations", [-7.0, 0.0, 5.0])
    @pytest.mark.parametrize("per_query", [False, True])
    def test_fused_divergence(self, prior, log_concentrations, per_query):
        posterior = WeightsPosterior("dirichlet", prior, 0.7)
        logits = torch.randn(2, 2, 4, 5, dtype=torch.float64)
        visible = torch.ones(4, 5, dtype=torch.bool).tril().expand(2, 1, 4, 5).clone()
        visible[1, :, 1] = False
        shape = (2, 2, 4, 1) if per_query else (1, 2, 1, 1)
        log_value = (log_concentrations + torch.randn(shape, dtype=torch.float64)).requires_grad_()
        # The contextual prior's divergence depends on the mean, but by design hands it no gradient.
        logits.requires_grad_(prior != "contextual")

        def kl(logits, log_value):
            return sample_weights_with_kl(posterior, logits, log_value, visible, None, copies=0)[1]

        assert torch.autograd.gradcheck(kl, (logits, log_value), atol=1e-4)


def log_pairs() -> st.SearchStrategy:
    """log alpha from the floor to log 1e6, and log prior - log alpha."""
    return st.tuples(st.floats(LOG_CONCENTRATION_FLOOR, math.log(1e6)), st.floats(-12.0, 12.0))


class TestDivergence:
    def grid(self, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
        log_alpha = torch.linspace(LOG_CONCENTRATION_FLOOR, math.log(1e6), 60, dtype=dtype)
        log_ratio = torch.tensor([-5.0, -1.0, -0.1, -1e-3, 0.0, 1e-3, 0.1, 1.0, 5.0], dtype=dtype)
        return torch.meshgrid(log_alpha, log_ratio, indexing="ij")

    def exact(self, log_alpha: torch.Tensor, log_ratio: torch.Tensor) -> torch.Tensor:
        """torch.distributions in float64."""
        alpha, prior = log_alpha.double().exp(), (log_alpha.double() + log_ratio.double()).exp()
        one = torch.ones_like(alpha)
        return kl_divergence(Gamma(alpha, one), Gamma(prior, one))

    def rounding(self, log_ratio: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
        """Of float32, which knows prior / alpha to epsilon and prior - alpha to epsilon / log ratio."""
        relative = 1.0 + 1.0 / log_ratio.abs().clamp(min=1e-30)
        return 6.0 * torch.finfo(torch.float32).eps * (relative * exact + 1.0 + log_ratio.exp())

    def test_equals_torch_distributions(self):
        log_alpha, log_ratio = self.grid()
        # The digamma of 1e-30 is 1e30, against which torch.distributions rounds.
        kept = log_alpha > math.log(1e-8)
        expected = self.exact(log_alpha, log_ratio)[kept]
        actual = multi_gamma_kl(log_alpha, log_alpha + log_ratio)[kept]
        torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-7)

    def test_limit_of_small_concentrations(self):
        """prior / alpha - log(prior / alpha) - 1, the same for every small alpha."""
        log_ratio = torch.linspace(-6.0, 6.0, 25, dtype=torch.float64)
        for log_alpha in (LOG_CONCENTRATION_FLOOR, -40.0):
            actual = multi_gamma_kl(torch.full_like(log_ratio, log_alpha), log_alpha + log_ratio)
            torch.testing.assert_close(actual, log_ratio.exp() - log_ratio - 1.0, rtol=1e-9, atol=1e-12)

    def test_monte_carlo(self):
        """E[log q(g) - log p(g)] over the sampler's own draws."""
        draws = 200_000
        alpha, prior = double(1e-4, 0.02, 0.5, 2.0, 40.0, 900.0), double(3e-4, 0.01, 2.0, 2.2, 30.0, 1e3)
        log_g, _ = log_gamma_with_slope(alpha.expand(draws, -1), None, approximate=False, slope=False)
        log_density_ratio = (alpha - prior) * log_g - torch.lgamma(alpha) + torch.lgamma(prior)
        assert_mean(log_density_ratio, multi_gamma_kl(alpha.log(), prior.log()))

    def test_is_zero_at_the_target_and_at_masked_keys(self):
        log_alpha, _ = self.grid()
        assert multi_gamma_kl(log_alpha, log_alpha).abs().max() == 0
        for dtype in (torch.float32, torch.float64):
            alpha = log_alpha.to(dtype).exp()
            assert fast_multi_gamma_kl(alpha, torch.zeros_like(alpha)).abs().max() == 0
            assert fast_multi_gamma_kl_slope(alpha.clone(), torch.zeros_like(alpha)).abs().max() == 0
        masked = double(0.0, -torch.inf, 1.0).requires_grad_()
        kl = multi_gamma_kl(masked, double(1.0, -torch.inf, 2.0))
        assert kl[1] == 0 and (kl[[0, 2]] > 0).all()
        gradient = torch.autograd.grad(kl.sum(), masked)[0]
        assert gradient[1] == 0 and torch.isfinite(gradient).all()

    @given(log_pairs())
    @settings(derandomize=True, max_examples=300, deadline=None)
    def test_is_not_negative(self, pair):
        log_alpha, log_ratio = double(pair[0]), double(pair[1])
        size = 1.0 + log_alpha.exp() * (1.0 + log_ratio.exp() * (1.0 + log_ratio.abs()))
        rounding = 1e-8 + 1e-14 * size
        plain = multi_gamma_kl(log_alpha, log_alpha + log_ratio)
        fast = fast_multi_gamma_kl(log_alpha.exp(), log_ratio)
        assert plain >= -rounding * (1.0 + log_alpha.abs()) and fast >= -rounding
        single = fast_multi_gamma_kl(log_alpha.float().exp(), log_ratio.float())
        assert single >= -1e-6 * (1.0 + fast)

    @given(log_pairs())
    @settings(derandomize=True, max_examples=300, deadline=None)
    def test_fast_equals_plain(self, pair):
        log_alpha, log_ratio = double(pair[0]).requires_grad_(), double(pair[1])
        log_prior = log_alpha.detach() + log_ratio
        plain = multi_gamma_kl(log_alpha, log_prior)
        prior = log_prior.exp()
        fast = fast_multi_gamma_kl(log_alpha.detach().exp(), log_ratio)
        rounding = 1e-13 * (1.0 + log_alpha.detach().exp() + prior) * (1.0 + log_alpha.detach().abs())
        assert ((fast - plain).abs() <= 1e-7 * plain.abs() + 1e-8 * prior.clamp(max=1.0) + 1e-8 + rounding).all()
        slope = fast_multi_gamma_kl_slope(log_alpha.detach().exp(), log_ratio)
        expected = torch.autograd.grad(plain.sum(), log_alpha)[0]
        torch.testing.assert_close(slope, expected, rtol=1e-5, atol=1e-9)

    @pytest.mark.parametrize("least", [1e3, 1e5])
    def test_fast_is_the_more_accurate_at_large_concentrations(self, least):
        """In float32 the plain one subtracts two lgammas of a million and more."""
        log_alpha, log_ratio = self.grid(torch.float32)
        large = log_alpha > math.log(least)
        log_alpha, log_ratio = log_alpha[large], log_ratio[large]
        alpha = log_alpha.exp()
        # The same alpha and ratio for both, so that only the formula's rounding counts.
        exact = fast_multi_gamma_kl(alpha.double(), log_ratio.double())
        torch.testing.assert_close(exact, self.exact(alpha.double().log(), log_ratio), rtol=1e-6, atol=1e-6)
        fast = (fast_multi_gamma_kl(alpha, log_ratio).double() - exact).abs()
        plain = (multi_gamma_kl(log_alpha, log_alpha + log_ratio).double() - exact).abs()
        assert (fast <= self.rounding(log_ratio, exact)).all()
        near = (log_ratio.abs() <= 0.1) & (log_ratio != 0)
        assert fast[near].max() < 0.2 * plain[near].max()
        assert fast[near].square().mean() < 0.01 * plain[near].square().mean()

    def test_fast_in_float32_over_the_whole_range(self):
        log_alpha, log_ratio = self.grid(torch.float32)
        alpha = log_alpha.exp()
        exact = fast_multi_gamma_kl(alpha.double(), log_ratio.double())
        error = (fast_multi_gamma_kl(alpha, log_ratio).double() - exact).abs()
        assert (error <= self.rounding(log_ratio, exact)).all()
        slope = fast_multi_gamma_kl_slope(alpha.clone(), log_ratio).double()
        expected = fast_multi_gamma_kl_slope(alpha.double(), log_ratio.double())
        torch.testing.assert_close(slope, expected, rtol=1e-4, atol=1e-7)

    def test_sum_over_a_row_bounds_the_divergence_of_the_dirichlets(self):
        """Normalising the Gammas loses information; where only the total differs, that is all of it but a little."""
        log_alpha = 2.0 * torch.randn(500, 6, dtype=torch.float64)
        log_prior = log_alpha + torch.randn(500, 6, dtype=torch.float64)
        bound = multi_gamma_kl(log_alpha, log_prior).sum(-1)
        exact = kl_divergence(Dirichlet(log_alpha.exp()), Dirichlet(log_prior.exp()))
        assert (bound >= exact - 1e-9).all()
        assert (bound > exact + 1e-3).any()
        # The rest is what the total says: Gamma(sum alpha) from Gamma(sum prior).
        rest = multi_gamma_kl(log_alpha.logsumexp(-1), log_prior.logsumexp(-1))
        torch.testing.assert_close(bound, exact + rest)
