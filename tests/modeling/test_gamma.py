"""Gamma variables in log space against SciPy's distributions and quantiles, and their gradient against differences."""

import math

import numpy as np
import pytest
import torch
from scipy import special, stats

from hf_variational.modeling import gamma
from hf_variational.modeling.gamma import (
    draw_exponential,
    draw_log_gamma,
    exponential_from_noise,
    gamma_quantile,
    log_gamma_from_noise,
    log_gamma_sensitivity,
)

DRAWS = 20_000
CONCENTRATIONS = (1e-30, 1e-6, 1e-2, 0.3, 1.0, 3.0, 40.0, 1e3, 1e6)
# One draw in 1e5 fails a test at this level; the seed is fixed, so that a test which passes goes on passing.
LEVEL = 1e-5


def assert_distributed(sample: torch.Tensor, cdf) -> None:
    result = stats.kstest(sample.double().numpy(), cdf)
    assert result.pvalue > LEVEL, result


@pytest.fixture(params=["rejection", "kernel"])
def sampler(request, monkeypatch):
    """Both branches of the sampler: the loop of a CPU, and the kernel of an accelerator or a compiled program."""
    if request.param == "kernel":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    return draw_log_gamma


class TestDraws:
    @pytest.mark.parametrize("alpha", CONCENTRATIONS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_distributions(self, sampler, alpha, dtype):
        log_gamma, exponential = sampler(torch.full((DRAWS,), alpha, dtype=dtype))
        assert log_gamma.dtype == exponential.dtype == dtype
        assert_distributed(log_gamma.double().exp(), stats.gamma(alpha + 1.0).cdf)
        assert_distributed(exponential, stats.expon.cdf)

    @pytest.mark.parametrize("alpha", CONCENTRATIONS)
    def test_independence(self, sampler, alpha):
        """One exponential decides on acceptance and is handed out: only the lack of memory makes it independent."""
        draws = 3 * DRAWS
        log_gamma, exponential = sampler(torch.full((draws,), alpha, dtype=torch.float64))
        pairs = (log_gamma, exponential), (log_gamma, exponential.log()), (log_gamma.exp(), exponential.square())
        for pair in pairs:
            correlation = torch.corrcoef(torch.stack(pair))[0, 1].item()
            assert abs(correlation) < 4.5 / math.sqrt(draws)
        for third in log_gamma.argsort().chunk(3):
            assert_distributed(exponential[third], stats.expon.cdf)
        order = exponential.argsort()
        for tail in (order[: draws // 20], order[-draws // 20 :]):
            assert_distributed(log_gamma[tail].exp(), stats.gamma(alpha + 1.0).cdf)

    def test_every_entry_has_its_own_concentration(self, sampler):
        alpha = torch.tensor(CONCENTRATIONS, dtype=torch.float64)
        log_gamma, exponential = sampler(alpha.expand(DRAWS, -1))
        for column, concentration in enumerate(CONCENTRATIONS):
            assert_distributed(log_gamma[:, column].exp(), stats.gamma(concentration + 1.0).cdf)
            assert_distributed(exponential[:, column], stats.expon.cdf)
        correlation = torch.corrcoef(torch.cat([log_gamma, exponential], 1).T).fill_diagonal_(0.0)
        assert correlation.abs().max() < 5.0 / math.sqrt(DRAWS)

    def test_neighbours_in_memory_are_independent(self, sampler):
        """What was rejected is drawn again and put back where it belongs."""
        log_gamma, exponential = sampler(torch.full((DRAWS, 2), 1e-3, dtype=torch.float64))
        for values in (log_gamma, exponential):
            assert abs(torch.corrcoef(values.T)[0, 1].item()) < 4.5 / math.sqrt(DRAWS)
            assert values.unique().numel() == values.numel()

    @pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "scalar", "empty"])
    def test_any_shape(self, sampler, layout):
        alpha = {
            "transposed": torch.linspace(0.1, 5.0, 1200).view(30, 40).T,
            "strided": torch.linspace(0.1, 5.0, 2400).view(40, 60)[:, ::2],
            "expanded": torch.linspace(0.1, 5.0, 40)[:, None].expand(40, 30),
            "scalar": torch.tensor(0.5),
            "empty": torch.zeros(3, 0, 4),
        }[layout]
        before = alpha.clone()
        log_gamma, exponential = sampler(alpha)
        assert log_gamma.shape == exponential.shape == alpha.shape
        assert torch.isfinite(log_gamma).all() and torch.isfinite(exponential).all()
        assert torch.equal(alpha, before)

    def test_has_no_gradient(self, sampler):
        alpha = torch.ones(10, requires_grad=True)
        assert not any(part.requires_grad for part in sampler(alpha * 2.0))

    def test_repeats_under_the_global_seed(self, sampler):
        runs = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            runs.append(torch.stack(sampler(torch.full((500,), 0.2))))
        assert torch.equal(runs[0], runs[1])
        assert not torch.equal(runs[0], runs[2])

    @pytest.mark.parametrize("alpha", [1e-30, 1e6])
    def test_is_finite_and_positive_over_many_draws(self, alpha):
        log_gamma, exponential = draw_log_gamma(torch.full((1_000_000,), alpha))
        assert torch.isfinite(log_gamma).all() and torch.isfinite(exponential).all()
        assert exponential.min() > 0
        assert torch.isfinite(log_gamma - exponential / alpha).all()


class TestRejection:
    """The loop of a CPU, exactly: an acceptance that is a little wrong hides in any test of samples."""

    @pytest.mark.parametrize("alpha", CONCENTRATIONS)
    def test_acceptance_is_that_of_marsaglia_and_tsang(self, alpha, monkeypatch):
        """log u < x^2 / 2 + d - d v + d log v with v = (1 + x / sqrt(9 d))^3; E is what is left, log G is log(d v)."""
        normal = torch.linspace(-6.0, 6.0, 101, dtype=torch.float64)
        monkeypatch.setattr(torch, "randn_like", lambda like: normal.clone())
        monkeypatch.setattr(gamma, "draw_exponential", lambda like: torch.full_like(like, 2.5))
        log_gamma, exponential = gamma._propose(torch.full_like(normal, alpha))
        x, d = normal.numpy().astype(np.longdouble), np.longdouble(alpha) + np.longdouble(2) / 3
        with np.errstate(invalid="ignore"):
            log_v = 3 * np.log1p(x / np.sqrt(9 * d))
        log_f = x**2 / 2 - d * np.expm1(log_v) + d * log_v
        expected = torch.from_numpy((2.5 + log_f).astype(float))
        assert torch.equal(expected.isnan(), exponential.isnan())
        torch.testing.assert_close(exponential, expected, rtol=1e-9, atol=1e-9, equal_nan=True)
        expected = torch.from_numpy((np.log(d) + log_v).astype(float))
        torch.testing.assert_close(log_gamma, expected, rtol=1e-12, atol=1e-12, equal_nan=True)

    def test_draws_again_until_accepted_and_puts_each_draw_back_in_its_place(self, monkeypatch):
        rounds = []

        def propose(alpha):
            """Rejects an entry as often as its concentration says, by a negative E, by 0 and by NaN in turn."""
            rejection = (-1.0, 0.0, math.nan)[len(rounds) % 3]
            rounds.append(alpha.numel())
            accepted = alpha < len(rounds)
            return alpha + len(rounds) / 100.0, torch.where(accepted, float(len(rounds)), rejection)

        monkeypatch.setattr(gamma, "_propose", propose)
        alpha = torch.randint(0, 6, (7, 11)).double()
        log_gamma, exponential = draw_log_gamma(alpha)
        assert torch.equal(exponential, alpha + 1.0)
        torch.testing.assert_close(log_gamma, alpha + (alpha + 1.0) / 100.0)
        assert rounds == [int((alpha >= least).sum()) for least in range(6)]


class TestExponential:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_distribution(self, dtype):
        exponential = draw_exponential(torch.empty(200_000, dtype=dtype))
        assert exponential.dtype == dtype
        assert_distributed(exponential, stats.expon.cdf)

    @pytest.mark.parametrize("uniform", [0.0, 2.0**-53, 1.0 - 2.0**-53])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_is_finite_at_the_ends_of_the_uniform(self, uniform, dtype, monkeypatch):
        """`torch.rand` does return 0, and its largest number rounds to 1 in float32."""
        monkeypatch.setattr(torch, "rand", lambda shape, dtype, device: torch.full(shape, uniform, dtype=dtype))
        exponential = draw_exponential(torch.empty(3, dtype=dtype))
        assert torch.isfinite(exponential).all() and (exponential >= 0).all()
        if 0 < uniform < 0.5:
            torch.testing.assert_close(exponential, torch.full_like(exponential, uniform))

    def test_float32_has_small_values(self):
        """The key that wins among tiny concentrations has the smallest of them: 2^-24 would be far too coarse."""
        exponential = draw_exponential(torch.empty(1_000_000, dtype=torch.float32))
        small = exponential[exponential < 1e-4]
        assert small.unique().numel() == small.numel()
        assert_distributed(small * 1e4, "uniform")

    def test_from_noise_is_the_inverse_cdf(self):
        noise = torch.linspace(-30.0, 30.0, 121, dtype=torch.float64)
        expected = -special.log_ndtr(noise.numpy())
        torch.testing.assert_close(exponential_from_noise(noise).numpy(), expected, rtol=1e-10, atol=0)
        assert exponential_from_noise(torch.tensor([8.0])).item() > 0
        assert_distributed(exponential_from_noise(torch.randn(DRAWS)), stats.expon.cdf)


SHAPES = torch.tensor([1.0, 1.0 + 1e-12, 1.0 + 1e-3, *np.logspace(0.02, 6.0, 45)], dtype=torch.float64)
NORMALS = torch.linspace(-6.0, 6.0, 49, dtype=torch.float64)
GRID = torch.meshgrid(SHAPES, NORMALS, indexing="ij")


def scipy_quantile(shape: torch.Tensor, normal: torch.Tensor) -> np.ndarray:
    """Quantile of Gamma(shape), from whichever tail is the smaller."""
    shape, normal = shape.double().numpy(), normal.double().numpy()
    from_below = special.gammaincinv(shape, special.ndtr(normal))
    return np.where(normal < 0, from_below, special.gammainccinv(shape, special.ndtr(-normal)))


class TestQuantile:
    def test_equals_scipy(self):
        shape, normal = GRID
        error = gamma_quantile(shape, normal).numpy() - np.log(scipy_quantile(shape, normal))
        # In standard deviations of log z, which has about 1 / sqrt(shape).
        assert np.abs(error * np.sqrt(shape.numpy())).max() < 1e-8

    def test_float32_is_the_rounded_float64(self):
        shape, normal = (each.float() for each in GRID)
        quantile = gamma_quantile(shape, normal)
        assert quantile.dtype == torch.float32
        assert torch.equal(quantile, gamma_quantile(shape.double(), normal.double()).float())

    def test_pair_from_noise(self):
        alpha = torch.tensor([1e-30, 1e-3, 0.7, 12.0, 1e6], dtype=torch.float64)[:, None].expand(5, 31)
        normal = torch.linspace(-5.0, 5.0, 31, dtype=torch.float64)
        noise = torch.stack([normal.expand(5, -1), normal.flip(0).expand(5, -1)], -1)
        log_gamma, exponential = log_gamma_from_noise(alpha, noise)
        expected = np.log(scipy_quantile(alpha + 1.0, noise[..., 0]))
        torch.testing.assert_close(log_gamma.numpy(), expected, rtol=1e-8, atol=1e-8)
        expected = -special.log_ndtr(noise[..., 1].numpy())
        torch.testing.assert_close(exponential.numpy(), expected, rtol=1e-9, atol=0)
        assert [part.dtype for part in log_gamma_from_noise(alpha.float(), noise.float())] == [torch.float32] * 2

    def test_pair_from_normal_noise_is_distributed_as_the_drawn_one(self):
        for alpha in (1e-30, 0.5, 20.0):
            log_gamma, exponential = log_gamma_from_noise(torch.full((DRAWS,), alpha), torch.randn(DRAWS, 2))
            assert_distributed(log_gamma.double().exp(), stats.gamma(alpha + 1.0).cdf)
            assert_distributed(exponential, stats.expon.cdf)

    def test_rises_with_noise_and_with_shape(self):
        """The same noise at two concentrations gives coupled samples."""
        quantile = gamma_quantile(*GRID)
        assert (quantile.diff(dim=1) > 0).all()
        distinct = quantile[SHAPES.diff(prepend=torch.zeros(1, dtype=torch.float64)) > 1e-6]
        assert (distinct.diff(dim=0) > 0).all()


def difference_of_quantiles(shape: torch.Tensor, normal: torch.Tensor, relative_step: float = 1e-3) -> torch.Tensor:
    """d log z / d s at a constant quantile, by a five-point difference with common random numbers."""
    step = shape * relative_step

    def at(multiple: int) -> torch.Tensor:
        return gamma_quantile(shape + multiple * step, normal)

    return (8.0 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12.0 * step)


class TestSensitivity:
    def test_equals_the_difference_of_quantiles(self):
        shape, normal = GRID
        expected = difference_of_quantiles(shape, normal)
        torch.testing.assert_close(difference_of_quantiles(shape, normal, 3e-4), expected, rtol=1e-6, atol=0)
        actual = log_gamma_sensitivity(shape, gamma_quantile(shape, normal))
        assert ((actual - expected) / expected).abs().max() < 1.5e-4

    def test_equals_the_builtin_gradient_within_its_error_and_is_the_better(self):
        shape, normal = GRID
        log_z = gamma_quantile(shape, normal)
        builtin = torch._standard_gamma_grad(shape, log_z.exp()) / log_z.exp()
        sensitivity = log_gamma_sensitivity(shape, log_z)
        torch.testing.assert_close(sensitivity, builtin, rtol=2.5e-3, atol=0)
        exact = difference_of_quantiles(shape, normal)
        assert ((sensitivity - exact) / exact).abs().max() < 0.1 * ((builtin - exact) / exact).abs().max()

    def test_float32_is_close_to_float64(self):
        shape, normal = GRID
        log_z = gamma_quantile(shape, normal)
        single = log_gamma_sensitivity(shape.float(), log_z.float())
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), log_gamma_sensitivity(shape, log_z), rtol=2e-6, atol=0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_is_smooth_at_the_centre(self, dtype):
        """0 / 0 where a sample is the shape itself, and nothing but rounding near it."""
        shape = SHAPES.to(dtype)
        centre = log_gamma_sensitivity(shape, shape.log())
        assert torch.isfinite(centre).all()
        for offset in (1e-12, 1e-9, 1e-7, 1e-6):
            for sign in (-1.0, 1.0):
                near = log_gamma_sensitivity(shape, shape.log() + sign * offset)
                torch.testing.assert_close(near, centre, rtol=1e-5, atol=0)

    @pytest.mark.parametrize("log_z", [-15.0, -30.0, -80.0])
    def test_far_below_the_quantiles_it_was_fitted_to(self, log_z):
        """F(z) is z^s / Gamma(s + 1) for small z: d log z / d s = (psi(s + 1) - log z) / s."""
        shape = torch.tensor([1.0, 1.1, 2.0, 5.0], dtype=torch.float64)
        expected = (torch.digamma(shape + 1.0) - log_z) / shape
        actual = log_gamma_sensitivity(shape, torch.full_like(shape, log_z))
        torch.testing.assert_close(actual, expected, rtol=1.5e-4, atol=0)

    def test_leaves_its_inputs_alone(self):
        shape, log_z = SHAPES.clone(), SHAPES.log() + 0.1
        before = log_z.clone()
        log_gamma_sensitivity(shape, log_z)
        assert torch.equal(shape, SHAPES) and torch.equal(log_z, before)

    @pytest.mark.parametrize("alpha", [1e-30, 0.1, 1.0, 30.0, 1e4])
    def test_gradient_of_the_mean_and_of_the_mean_logarithm(self, alpha):
        """E[G] is alpha + 1 and E[log G] is psi(alpha + 1): their derivatives are 1 and psi'(alpha + 1)."""
        draws = 200_000
        shape = torch.full((draws,), alpha + 1.0, dtype=torch.float64)
        log_gamma, _ = draw_log_gamma(shape - 1.0)
        of_log = log_gamma_sensitivity(shape, log_gamma)
        for gradient, expected in ((of_log, special.polygamma(1, alpha + 1.0)), (of_log * log_gamma.exp(), 1.0)):
            standard_error = gradient.std().item() / math.sqrt(draws)
            assert abs(gradient.mean().item() - expected) < 4.5 * standard_error + 1e-4 * expected
