"""EVE neurons: their start, their means, scales, priors, poolings, noise scopes and local reconstruction."""

import math
from copy import deepcopy

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from hf_variational import EVE, EVEConfig, posterior_noise
from hf_variational.modeling.configuration_variational_gpt import MEANS, POOLS, PRIORS
from hf_variational.modeling.objective import following_positions
from hf_variational.modeling.sample_axis import SampleAxis

UNITS = 5
SCALES = [
    {"scale": "scalar"},
    {"scale": "unit"},
    {"scale": "input", "scale_rank": None},
    {"scale": "input", "scale_rank": 2},
]
PADDED = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]])
PACKED = torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6], [0, 0, 1, 0, 1, 0, 1]])


def neurons(perturb: bool = True, dtype=torch.float64, **config) -> EVE:
    torch.manual_seed(0)
    eve = EVE(EVEConfig(**{"initial_scale": 0.5, **config}), UNITS, 0).to(dtype)
    with torch.no_grad():
        eve.init_weights()
        if perturb:
            for tensor in [*eve.parameters(), *eve.buffers()]:
                tensor.add_(0.3 * torch.randn_like(tensor))
    return eve


def hidden(batch: int = 3, length: int = 7, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, length, UNITS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def axis_for(h, samples=0, mask=None, positions=None, batch=None, **options) -> SampleAxis:
    batch = h.shape[0] if batch is None else batch
    mask = torch.ones(batch, h.shape[1], dtype=torch.bool) if mask is None else mask.bool()
    positions = torch.arange(h.shape[1])[None].expand(batch, -1) if positions is None else positions
    follows = following_positions(mask, positions)
    return SampleAxis(samples, batch, positions, token_weights=mask, follows=follows, **options)


def forward(eve: EVE, h: torch.Tensor, samples: int = 0, **options):
    """The layer's answer and the record it hands to the tape (None without `record`)."""
    records = []
    handle = eve.tap.register_forward_hook(lambda module, args, output: records.append(output))
    z = eve(h, axis_for(h, samples, **options))
    handle.remove()
    return z, records[0] if records else None


def latents(eve: EVE, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Means and scales of every latent, [batch, length, units, k], written out from the definition."""
    config, k = eve.config, eve.config.latent_dim
    share = {"mean": 1.0, "sum": 1 / k, "sum_sqrtk": k**-0.5}[config.pool]
    if config.mean == "linear":
        mean = (torch.einsum("bth,uh->btu", h, eve.mean_weight) + eve.mean_bias).unflatten(-1, (UNITS, k))
    else:
        gain = eve.gain if config.mean == "gain" else torch.ones(UNITS)
        mean = (h * gain * share)[..., None].expand(*h.shape, k)
    log_scale = eve.log_scale if config.scale == "scalar" else eve.log_scale.reshape(UNITS, k)
    if config.scale == "input":
        weight = eve.scale_weight if config.scale_rank is None else eve.scale_up @ eve.scale_down
        log_scale = log_scale + torch.einsum("bth,uh->btu", h, weight).unflatten(-1, (UNITS, k))
    scale = log_scale.clamp(config.log_scale_min, config.log_scale_max).exp()
    return mean, scale.expand(*h.shape[:2], UNITS, k)


def expected_kl(eve: EVE, h, mask, positions) -> torch.Tensor:
    """The KL summed over units and their dimensions, position by position, from torch.distributions."""
    config = eve.config
    mean, scale = latents(eve, h)
    total = torch.zeros(h.shape[:2], dtype=h.dtype)
    for row in range(h.shape[0]):
        for t in range(h.shape[1]):
            prior = Normal(torch.zeros((), dtype=h.dtype), 1.0)
            if config.prior == "empirical":
                prior = Normal(eve.prior_mean[:, None], eve.prior_log_scale.exp()[:, None])
            elif config.prior == "centered":
                prior = Normal(mean[row, t], eve.prior_log_scale.exp()[:, None])
            elif config.prior == "autoregressive":
                same_sequence = t > 0 and mask[row, t] and mask[row, t - 1]
                if same_sequence and positions[row, t] == positions[row, t - 1] + 1:
                    prior = Normal(config.autoregressive_coefficient * mean[row, t - 1], config.prior_scale)
            total[row, t] = kl_divergence(Normal(mean[row, t], scale[row, t]), prior).expand(UNITS, -1).sum()
    return total


class TestStart:
    @pytest.mark.parametrize("mean", MEANS)
    @pytest.mark.parametrize("scale", SCALES)
    @pytest.mark.parametrize("k, pool", [(1, "mean"), (4, "mean"), (4, "sum"), (4, "sum_sqrtk")])
    def test_mean_pass_is_h_and_sigma_the_initial_scale(self, mean, scale, k, pool):
        eve = neurons(perturb=False, mean=mean, latent_dim=k, pool=pool, initial_scale=0.3, **scale)
        h = hidden()
        for record in (False, True):
            torch.testing.assert_close(forward(eve, h, record=record)[0], h, rtol=1e-12, atol=1e-12)
        sigma = forward(eve, h, record=True, statistics=True)[1].statistics.scale
        torch.testing.assert_close(sigma, torch.full((UNITS,), 0.3), rtol=1e-6, atol=0)

    def test_identity_mean_pass_is_h_itself_bit_for_bit(self):
        h = hidden().bfloat16()
        for k, pool in [(1, "mean"), (3, "sum"), (3, "sum_sqrtk")]:
            eve = neurons(dtype=torch.float32, mean="identity", latent_dim=k, pool=pool)
            assert torch.equal(forward(eve, h)[0], h)
            assert torch.equal(forward(eve, h, record=True)[0], h)

    @pytest.mark.parametrize("prior_scale", [1.0, 0.2])
    def test_priors_start_at_the_prior_scale(self, prior_scale):
        for prior in ("empirical", "centered"):
            eve = neurons(perturb=False, prior=prior, prior_scale=prior_scale)
            torch.testing.assert_close(eve.prior_log_scale.exp(), torch.full((UNITS,), prior_scale).double())
        assert not isinstance(eve.prior_log_scale, torch.nn.Parameter), "a centered prior is not trained"


class TestMeanAndScale:
    @pytest.mark.parametrize("mean", MEANS)
    @pytest.mark.parametrize("k, pool", [(1, "mean"), (3, "mean"), (3, "sum"), (3, "sum_sqrtk")])
    def test_mean_pass_pools_the_means(self, mean, k, pool):
        eve, h = neurons(mean=mean, latent_dim=k, pool=pool), hidden()
        means, _ = latents(eve, h)
        factor = {"mean": 1 / k, "sum": 1.0, "sum_sqrtk": k**-0.5}[pool]
        torch.testing.assert_close(forward(eve, h)[0], means.sum(-1) * factor)

    @pytest.mark.parametrize("scale", SCALES)
    @pytest.mark.parametrize("k", [1, 3])
    def test_sample_is_mean_plus_scale_times_noise(self, scale, k):
        eve, h = neurons(latent_dim=k, pool="sum", **scale), hidden()
        means, scales = latents(eve, h)
        for samples in (1, 3):
            noise = torch.randn(h.shape[0] * samples, h.shape[1], *eve.width)
            expected = means.repeat_interleave(samples, 0) + scales.repeat_interleave(samples, 0) * noise.reshape(
                -1, h.shape[1], UNITS, k
            )
            for record in (False, True):
                with posterior_noise(lambda request, noise=noise: noise):
                    z, _ = forward(eve, h, samples, record=record)
                torch.testing.assert_close(z, expected.sum(-1))

    @pytest.mark.parametrize("scale", SCALES)
    @pytest.mark.parametrize("raw, expected", [(-50.0, -3.0), (50.0, 1.0)])
    def test_scale_is_clipped_with_no_gradient_beyond(self, scale, raw, expected):
        eve, h = neurons(log_scale_min=-3.0, log_scale_max=1.0, **scale), hidden()
        with torch.no_grad():
            eve.log_scale.fill_(raw)
        for statistics in (False, True):
            z, record = forward(eve, h, 1, record=True, statistics=statistics)
            loss = z.square().sum() + record.statistics.kl.sum()
            for name in ("log_scale", "scale_up", "scale_down", "scale_weight"):
                if hasattr(eve, name):
                    assert torch.autograd.grad(loss, getattr(eve, name), retain_graph=True)[0].abs().max() == 0
            assert torch.isfinite(loss)
        torch.testing.assert_close(record.statistics.scale, torch.full((UNITS,), math.exp(expected)))

    @pytest.mark.parametrize("scale", SCALES)
    @pytest.mark.parametrize("mean", MEANS)
    @pytest.mark.parametrize("prior", PRIORS)
    def test_every_parameter_gets_a_gradient(self, scale, mean, prior):
        eve, h = neurons(mean=mean, prior=prior, reconstruction_weight=0.1, **scale), hidden()
        z, record = forward(eve, h, 2, record=True)
        (z.square().sum() + record.statistics.kl.sum() + record.reconstruction.sum()).backward()
        for name, parameter in eve.named_parameters():
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
            assert parameter.grad.abs().max() > 0, name


class TestKL:
    @pytest.mark.parametrize("prior", PRIORS)
    @pytest.mark.parametrize("scale", SCALES)
    @pytest.mark.parametrize("k, pool", [(1, "mean"), (3, "sum")])
    def test_equals_torch_distributions(self, prior, scale, k, pool):
        eve = neurons(prior=prior, latent_dim=k, pool=pool, mean="gain", prior_scale=0.7, **scale)
        h = hidden()
        for mask, positions in (
            (PADDED, PACKED[1].expand(3, -1)),
            (torch.ones_like(PADDED), PACKED),
            (PADDED, PACKED),
        ):
            expected = expected_kl(eve, h, mask, positions)
            for samples in (0, 1, 3):
                _, record = forward(eve, h, samples, mask=mask, positions=positions, record=True)
                torch.testing.assert_close(record.statistics.kl, expected)
                assert record.layer == 0

    @pytest.mark.parametrize("prior", PRIORS)
    @pytest.mark.parametrize("mean", MEANS)
    def test_above_the_split_each_row_has_its_own(self, prior, mean):
        """There h has batch * S rows already, and the fused pass computes the KL where it can."""
        eve = neurons(prior=prior, mean=mean, prior_scale=0.7)
        h = hidden(batch=6)
        mask, positions = PADDED.repeat_interleave(2, 0), PACKED.repeat_interleave(2, 0)
        expected = expected_kl(eve, h, mask, positions)
        for statistics in (False, True):
            options = {"mask": PADDED, "positions": PACKED, "batch": 3, "record": True, "statistics": statistics}
            _, record = forward(eve, h, 2, **options)
            torch.testing.assert_close(record.statistics.kl, expected)
            per_sequence = record.statistics.over_samples(3).kl
            torch.testing.assert_close(per_sequence, expected.reshape(3, 2, -1).mean(1))

    @pytest.mark.parametrize("prior", PRIORS)
    @pytest.mark.parametrize("k", [1, 2])
    def test_monte_carlo(self, prior, k):
        """log q(z) - log p(z), averaged over samples that the layer itself drew."""
        draws = 20_000
        eve = neurons(prior=prior, latent_dim=k, pool="sum", prior_scale=0.7)
        h = hidden(batch=1, length=3)
        noise = []

        def source(request):
            noise.append(torch.randn(request.shape))
            return noise[0]

        with posterior_noise(source):
            z, record = forward(eve, h, draws, record=True)
        means, scales = latents(eve, h)
        latent = means + scales * noise[0].reshape(draws, 3, UNITS, k)
        torch.testing.assert_close(z, latent.sum(-1))
        prior_mean, prior_scale = torch.zeros_like(means), torch.ones_like(means)
        if prior == "empirical":
            prior_mean, prior_scale = eve.prior_mean[:, None], eve.prior_log_scale.exp()[:, None]
        elif prior == "centered":
            prior_mean, prior_scale = means, eve.prior_log_scale.exp()[:, None]
        elif prior == "autoregressive":
            prior_mean[:, 1:], prior_scale[:, 1:] = 0.9 * means[:, :-1], 0.7
        difference = Normal(means, scales).log_prob(latent) - Normal(prior_mean, prior_scale).log_prob(latent)
        difference = difference.sum((-1, -2))
        error = (difference.mean(0) - record.statistics.kl[0]).abs()
        assert (error < 4.5 * difference.std(0) / math.sqrt(draws)).all()

    def test_centered_prior_leaves_the_mean_free(self):
        eve, h = neurons(prior="centered", mean="gain", scale="unit"), hidden().requires_grad_()
        _, record = forward(eve, h, record=True)
        gradients = torch.autograd.grad(record.statistics.kl.sum(), (h, eve.gain), allow_unused=True)
        assert all(gradient is None or gradient.abs().max() == 0 for gradient in gradients)

    def test_gradcheck(self):
        for prior in PRIORS:
            eve = neurons(prior=prior, mean="linear", latent_dim=2, scale_rank=2)
            h = hidden(batch=2, length=3).requires_grad_()
            noise = torch.randn(4, 3, *eve.width)

            def function(h, eve=eve, noise=noise):
                with posterior_noise(lambda request: noise):
                    z, record = forward(eve, h, 2, record=True)
                return z, record.statistics.kl

            assert torch.autograd.gradcheck(function, h)


class TestPooling:
    @pytest.mark.parametrize("pool, factor", [("mean", 1 / 4), ("sum", 4.0), ("sum_sqrtk", 1.0)])
    def test_moments(self, pool, factor):
        """The pooled mean is h; the pooled variance sigma^2 / k, k sigma^2, sigma^2."""
        draws = 40_000
        eve = neurons(perturb=False, latent_dim=4, pool=pool, scale="unit", initial_scale=0.5)
        h = hidden(batch=1, length=2)
        z, _ = forward(eve, h, draws)
        variance = factor * 0.25
        assert ((z.mean(0) - h[0]).abs() < 4.5 * math.sqrt(variance / draws)).all()
        # the standard error of a Gaussian's variance is variance * sqrt(2 / draws)
        assert ((z.var(0) - variance).abs() < 4.5 * variance * math.sqrt(2 / draws)).all()

    @pytest.mark.parametrize("pool", POOLS)
    def test_width_one_pools_nothing(self, pool):
        eve, h = neurons(pool=pool), hidden()
        torch.testing.assert_close(forward(eve, h)[0], h)


class TestNoise:
    def test_token_noise_is_fresh_and_sequence_noise_constant_over_positions(self):
        h = hidden(batch=2)
        for scope, constant in (("token", False), ("sequence", True)):
            eve = neurons(scale="unit", noise=scope)
            z, _ = forward(eve, h, 3)
            noise = (z - h.repeat_interleave(3, 0)) / eve.log_scale.exp()
            assert torch.allclose(noise, noise[:, :1].expand_as(noise)) is constant, scope
            rows = noise[:, 0]
            assert (torch.cdist(rows, rows) + 9 * torch.eye(6)).min() > 1e-3, "each sequence and sample has its own"

    @pytest.mark.parametrize("k", [1, 2])
    @pytest.mark.parametrize("scope, length", [("token", 7), ("sequence", 1)])
    def test_request_tells_what_is_asked(self, scope, length, k):
        eve, h, seen = neurons(noise=scope, latent_dim=k), hidden(batch=2), []

        def source(request):
            seen.append(request)
            return torch.zeros(request.shape)

        with posterior_noise(source):
            z, _ = forward(eve, h, 3, positions=PACKED[:2])
        torch.testing.assert_close(z, h.repeat_interleave(3, 0))
        (request,) = seen
        assert (request.layer, request.batch, request.num_samples) == (0, 2, 3)
        assert request.shape == (6, length, *((UNITS,) if k == 1 else (UNITS, k)))
        if scope == "token":
            assert torch.equal(request.positions, PACKED[:2])
        else:
            assert request.positions is None

    def test_source_of_the_wrong_shape_is_refused(self):
        with posterior_noise(lambda request: torch.zeros(1)), pytest.raises(ValueError, match=r"layer 0.*\(3, 7, 5\)"):
            forward(neurons(), hidden(), 1)

    def test_sources_nest_and_are_put_back_after_an_error(self):
        eve, h = neurons(scale="unit"), hidden()

        def constant(value):
            return lambda request: torch.full(request.shape, float(value))

        def drawn():
            return ((forward(eve, h, 1)[0] - h) / eve.log_scale.exp()).flatten()

        with posterior_noise(constant(1)):
            with pytest.raises(RuntimeError), posterior_noise(constant(2)):
                torch.testing.assert_close(drawn(), torch.full_like(drawn(), 2.0))
                raise RuntimeError
            torch.testing.assert_close(drawn(), torch.full_like(drawn(), 1.0))
        assert drawn().std() > 0.5

    def test_mean_pass_draws_nothing(self):
        eve, before = neurons(), torch.get_rng_state()
        with posterior_noise(lambda request: pytest.fail("asked for noise")):
            forward(eve, hidden(), 0, record=True)
        assert torch.equal(before, torch.get_rng_state())


class TestReconstruction:
    @pytest.mark.parametrize("samples, rows", [(0, 3), (1, 3), (2, 6)])
    @pytest.mark.parametrize("k", [1, 2])
    def test_value(self, samples, rows, k):
        eve, h = neurons(reconstruction_weight=0.1, latent_dim=k), hidden()
        z, record = forward(eve, h, samples, record=True)
        target = h.repeat_interleave(max(samples, 1), 0)
        expected = (eve.reconstruction_decoder * z - target).square().mean(-1)
        assert record.reconstruction.shape == (rows, 7)
        torch.testing.assert_close(record.reconstruction, expected)

    def test_gradient_treats_the_target_as_a_constant(self):
        eve = neurons(reconstruction_weight=0.1, scale="unit")
        h, noise = hidden().requires_grad_(), torch.randn(3, 7, UNITS)
        with posterior_noise(lambda request: noise):
            z, record = forward(eve, h, 1, record=True)
        gradient = torch.autograd.grad(record.reconstruction.sum(), h)[0]
        by_hand = 2 * (eve.reconstruction_decoder * z - h) * eve.reconstruction_decoder / UNITS
        torch.testing.assert_close(gradient, by_hand)

    def test_without_weight_there_is_no_decoder(self):
        eve = neurons(reconstruction_weight=0.0)
        assert not hasattr(eve, "reconstruction_decoder")
        assert forward(eve, hidden(), 1, record=True)[1].reconstruction is None


class TestStatistics:
    @pytest.mark.parametrize("scale", SCALES)
    @pytest.mark.parametrize("k", [1, 3])
    @pytest.mark.parametrize("samples, above", [(0, False), (2, False), (2, True)])
    def test_are_means_over_the_attended_tokens(self, scale, k, samples, above):
        eve = neurons(prior="standard", latent_dim=k, pool="sum", **scale)
        h = hidden(batch=6 if above else 3)
        _, record = forward(eve, h, samples, batch=3, mask=PADDED, record=True, statistics=True)
        mask = PADDED.repeat_interleave(2, 0) if above else PADDED
        means, scales = latents(eve, h)
        kl = kl_divergence(Normal(means, scales), Normal(0.0, 1.0))
        statistics = record.statistics
        for actual, values in (
            (statistics.kl_per_unit, kl.sum(-1)),
            (statistics.scale, scales.mean(-1)),
            (statistics.mean_energy, means.square().sum(-1)),
        ):
            torch.testing.assert_close(actual, values[mask.bool()].mean(0).float())
        torch.testing.assert_close(statistics.kl, kl.sum((-1, -2)))

    def test_active_fraction(self):
        eve = neurons(perturb=False, prior="centered", scale="unit", initial_scale=1.0)
        with torch.no_grad():
            eve.log_scale[:2] = -0.5
            eve.log_scale[2] = 1e-3  # KL 1e-6: collapsed
        _, record = forward(eve, hidden(), record=True, statistics=True)
        assert record.statistics.active_fraction == pytest.approx(2 / UNITS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("k", [1, 2])
def test_half_precision_keeps_its_arithmetic_in_float32(dtype, prior, k):
    eve = neurons(dtype=torch.float32, prior=prior, latent_dim=k)
    h = (8 * hidden()).to(dtype)
    for samples in (0, 1, 2):
        z, record = forward(eve, h, samples, record=True)
        assert z.dtype == dtype and torch.isfinite(z).all()
        assert record.statistics.kl.dtype == torch.float32
        oracle = expected_kl(deepcopy(eve).double(), h.double(), torch.ones(3, 7), PACKED[1].expand(3, -1))
        torch.testing.assert_close(record.statistics.kl, oracle.float(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("prior", PRIORS)
def test_parameters_cast_to_bfloat16_still_compute_in_float32(prior):
    """`.to(bfloat16)` rounds the log-scales, but what is made of them stays wide."""
    eve = neurons(dtype=torch.float32, prior=prior).to(torch.bfloat16)
    h = hidden().bfloat16().requires_grad_()
    z, record = forward(eve, h, 1, record=True)
    oracle = expected_kl(deepcopy(eve).double(), h.detach().double(), torch.ones(3, 7), PACKED[1].expand(3, -1))
    assert z.dtype == torch.bfloat16 and record.statistics.kl.dtype == torch.float32
    torch.testing.assert_close(record.statistics.kl, oracle.float(), rtol=0.01, atol=0.01)
    (z.float().square().sum() + record.statistics.kl.sum()).backward()
    for name, parameter in [("h", h), *eve.named_parameters()]:
        assert parameter.grad.dtype == torch.bfloat16 and torch.isfinite(parameter.grad).all(), name
