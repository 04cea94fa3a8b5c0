"""The rules of regime control against steps computed by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal

from hf_variational import EVE, EVEConfig
from hf_variational.diagnostics import Band
from hf_variational.training.regime import (
    AutoregressiveControl,
    BandCalibration,
    BandPenalty,
    BandSettings,
    Homeostasis,
    Projection,
    RegimeControl,
    ScaleGuard,
    Thermostat,
    rules,
)
from hf_variational.training.regime.neurons import rescale_means, shift_log_scales
from hf_variational.training.regime.rules import Limits


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


LIMITS = Limits(tensor(0.5, 0.5, 0.5, 2.0), tensor(2.0, 2.0, 2.0, 8.0), tensor(1.0, 1.0, 1.0, 4.0))


class TestPenalty:
    def test_by_hand(self):
        energy = tensor(0.1, 1.0, 3.0, 10.0)
        value, slope = rules.band_penalty(energy, LIMITS, 2.0, 3.0, relative=False)
        torch.testing.assert_close(value, tensor(2 * 0.4**2, 0.0, 3 * 1.0**2, 3 * 2.0**2))
        torch.testing.assert_close(slope, tensor(-4 * 0.4, 0.0, 6 * 1.0, 6 * 2.0))
        value, slope = rules.band_penalty(energy, LIMITS, 2.0, 3.0, relative=True)
        torch.testing.assert_close(value, tensor(2 * 0.4**2, 0.0, 3.0, 3 * 0.5**2))
        torch.testing.assert_close(slope, tensor(-1.6, 0.0, 6.0, 6 * 2.0 / 16))

    @pytest.mark.parametrize("relative", [True, False])
    @settings(max_examples=30, deadline=None, derandomize=True)
    @given(seed=st.integers(0, 100))
    def test_slope_is_the_derivative(self, relative, seed):
        generator = torch.Generator().manual_seed(seed)
        energy = (3 * torch.randn(4, generator=generator, dtype=torch.float64)).exp().requires_grad_()
        value, slope = rules.band_penalty(energy, LIMITS, 0.7, 1.3, relative)
        (expected,) = torch.autograd.grad(value.sum(), energy)
        torch.testing.assert_close(slope, expected)
        assert (slope[~LIMITS.outside(energy)] == 0).all()

    def test_the_low_side_comes_first(self):
        penalty = BandPenalty(weight=0.5, low_weight=2.0, high_weight=4.0, warmup_steps=10, ramp_steps=20)
        found = {step: penalty.weights_at(step) for step in (0, 9, 10, 20, 30, 40, 50, 90)}
        assert found == {
            0: (0.0, 0.0),
            9: (0.0, 0.0),
            10: (0.0, 0.0),
            20: (0.5, 0.0),
            30: (1.0, 0.0),
            40: (1.0, 1.0),
            50: (1.0, 2.0),
            90: (1.0, 2.0),
        }
        assert BandPenalty(weight=0.5, warmup_steps=3).weights_at(3) == (0.5, 0.5)


class TestRescaling:
    def test_toward_the_center_by_hand(self):
        factor = rules.rescaling_factor(tensor(0.25, 1.9, 4.0, 16.0), LIMITS, way=1.0, eta=0.5, max_factor=10.0)
        torch.testing.assert_close(factor, tensor(4**0.25, 1.0, 0.25**0.25, 0.25**0.25))

    def test_just_inside_and_at_once_by_hand(self):
        factor = rules.rescaling_factor(tensor(0.25, 0.5, 4.0, 16.0), LIMITS, rules.JUST_INSIDE, 1.0, 10.0)
        low, high = 0.5**0.9 * 1.0**0.1, 2.0**0.9 * 1.0**0.1
        torch.testing.assert_close(
            factor, tensor((low / 0.25) ** 0.5, 1.0, (high / 4.0) ** 0.5, (8.0**0.9 * 4.0**0.1 / 16) ** 0.5)
        )
        # and there it is
        moved = tensor(0.25, 0.5, 4.0, 16.0) * factor.square()
        assert not LIMITS.outside(moved).any()

    def test_is_bounded(self):
        factor = rules.rescaling_factor(tensor(1e-9, 1.0, 1e9, 4.0), LIMITS, 1.0, 1.0, max_factor=1.25)
        torch.testing.assert_close(factor, tensor(1.25, 1.0, 0.8, 1.0))

    @settings(max_examples=30, deadline=None, derandomize=True)
    @given(st.lists(st.floats(0.5, 2.0), min_size=3, max_size=3), st.floats(2.0, 8.0), st.floats(0.01, 1.0))
    def test_a_unit_inside_is_not_touched(self, first, last, eta):
        assert (rules.rescaling_factor(tensor(*first, last), LIMITS, 1.0, eta, 2.0) == 1.0).all()

    def test_what_no_factor_recovers_is_left_alone(self):
        energy = tensor(0.0, math.nan, math.inf, 4.0)
        assert (rules.rescaling_factor(energy, LIMITS, 1.0, 1.0, 2.0) == 1.0).all()


class TestThermostat:
    options = {"kl_min": 0.1, "kl_max": 0.4, "rate": 0.5, "gain": 3.0, "ratio": 1e3, "emergency_step": 2.0}
    # the middle of the range is 0.2, and a unit is turned a quarter of the way from there to an end
    high, low = 0.2 * 2**0.25, 0.2 / 2**0.25

    def test_by_hand(self):
        integral, kl = tensor(0.0, 0.3, -0.2, 0.0), tensor(0.8, 0.2, 0.05, 1e-5)
        found, weights = rules.thermostat_step(integral, kl, kl, **self.options)
        distance = tensor(math.log(0.8 / self.high), 0.0, -math.log(self.low / 0.05), -math.log(self.low / 1e-4))
        expected = integral + 0.5 * distance
        expected[3] = -2.0
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(weights, (expected + 3.0 * distance).clamp(-math.log(1e4), math.log(1e4)))

    def test_goes_by_where_the_kl_is_heading(self):
        kl, before = tensor(0.5, 0.38, 0.2), tensor(0.53, 0.34, 0.2)
        found = rules.thermostat_distance(kl, before, 0.1, 0.4)
        heading = tensor(0.5 - 6 * 0.03, 0.38 + 6 * 0.04, 0.2)
        torch.testing.assert_close(found, (heading / self.high).log().clamp(min=0))

    def test_within_the_ratio_of_the_mean(self):
        start, kl = tensor(5.0, 0.0, 0.0, -5.0), tensor(0.2, 0.2, 0.2, 0.2)
        found, weights = rules.thermostat_step(start, kl, kl, **{**self.options, "ratio": math.e})
        torch.testing.assert_close(found, tensor(1.0, 0.0, 0.0, -1.0))
        assert torch.equal(weights, found)

    def test_never_leaves_its_bounds(self):
        integral = kl = torch.zeros(4, dtype=torch.float64)
        for _ in range(100):
            integral, weights = rules.thermostat_step(integral, kl, kl, **self.options)
        torch.testing.assert_close(weights.exp(), torch.full_like(weights, 1e-4))

    def test_without_a_floor_nothing_is_dead(self):
        kl, start = tensor(0.0, -1e-9, 0.8), tensor(0.0, 0.0, 0.0)
        found, _ = rules.thermostat_step(start, kl, kl, **{**self.options, "kl_min": 0.0})
        torch.testing.assert_close(found, tensor(0.0, 0.0, 0.5 * math.log(0.8 / (0.2 * 2**0.25))))


class TestWithinShare:
    def test_by_hand(self):
        log_weight, cost, nll = tensor(2.0, 0.0, 1.0), tensor(0.5, 1.0, 0.25), tensor(-1.5).squeeze()
        paid = 0.5 * math.exp(2.0) + 1.0 + 0.25 * math.e
        found = rules.within_share(log_weight, cost, nll, 0.6)
        assert found.item() == pytest.approx(math.log(1.5 * 1.5 / paid))
        after = ((log_weight + found).exp() * cost).sum()
        assert (after / (nll.abs() + after)).item() == pytest.approx(0.6)

    def test_nothing_to_add_below_the_share(self):
        assert rules.within_share(tensor(0.5, -1.0), tensor(0.1, 0.1), torch.tensor(3.0).double(), 0.5).item() == 0.0
        assert rules.within_share(tensor(9.0, 9.0), tensor(0.0, -1e-9), torch.tensor(3.0).double(), 0.5).item() == 0.0

    def test_a_cost_that_is_above_without_weights_is_not_added_to(self):
        log_weight, cost = tensor(2.0, 0.0), tensor(4.0, 4.0)
        found = rules.within_share(log_weight, cost, torch.tensor(1.0).double(), 0.5)
        assert ((log_weight + found).exp() * cost).sum().item() == pytest.approx(8.0)


def test_scale_guard_by_hand():
    scale, kl = tensor(0.01, 0.2, 3.0, 0.5, 0.06), tensor(1.0, 1.0, 1.0, 1e-6, 1e-6)
    shift = rules.scale_shift(scale, kl, floor=0.05, ceiling=1.0, kick=0.3, max_shift=10.0)
    expected = tensor(math.log(5), 0.0, -math.log(3), -0.3, math.log(0.05 / 0.06))
    torch.testing.assert_close(shift, expected)
    bounded = rules.scale_shift(scale, kl, floor=0.05, ceiling=1.0, kick=0.3, max_shift=0.5)
    torch.testing.assert_close(bounded, tensor(0.5, 0.0, -0.5, -0.3, math.log(0.05 / 0.06)))


def test_calibration_by_hand():
    step = rules.calibration_step(tensor(0.2), tensor(0.1), tensor(0.3), (0.05, 0.15), rate=0.5, max_step=1.0)
    torch.testing.assert_close(step, tensor(0.2 + 0.5 * (0.15 - 0.05)))
    capped = rules.calibration_step(tensor(0.2), tensor(0.9), tensor(0.0), (0.05, 0.15), rate=0.5, max_step=0.1)
    torch.testing.assert_close(capped, tensor(0.1))
    calibration = BandCalibration(warmup_steps=5, steps=10)
    assert [calibration.acts_at(step) for step in (4, 5, 14, 15)] == [False, True, True, False]


class TestAutoregressive:
    def test_by_hand(self):
        # C = 1, |NLL| = 4: a share of 0.2, meant is 0.1
        found = rules.autoregressive_step(tensor(0.0), tensor(1.0), tensor(-4.0), 0.1, 0.5, rate=0.3, ratio=100.0)
        torch.testing.assert_close(found, tensor(0.3 * math.log(0.5)))

    @settings(max_examples=30, deadline=None, derandomize=True)
    @given(st.floats(-6, 6), st.floats(1e-4, 1e4), st.floats(1e-3, 1e3))
    def test_the_cap_holds(self, log_weight, cost, nll):
        found = rules.autoregressive_step(tensor(log_weight), tensor(cost), tensor(nll), 0.05, 0.2, 0.1, 100.0)
        assert (rules.autoregressive_share(found, tensor(cost), tensor(nll)) <= 0.2 + 1e-9).all()

    def test_finds_the_share(self):
        weight = tensor(0.0)
        for _ in range(200):
            weight = rules.autoregressive_step(weight, tensor(2.0), tensor(3.0), 0.05, 0.2, 0.1, 100.0)
        torch.testing.assert_close(rules.autoregressive_share(weight, tensor(2.0), tensor(3.0)), tensor(0.05))

    def test_a_kl_of_zero_costs_nothing(self):
        found = rules.autoregressive_step(tensor(0.0), tensor(0.0), tensor(3.0), 0.05, 0.2, 0.1, 100.0)
        torch.testing.assert_close(found, tensor(math.log(100.0)))


# ---- What is done to the neurons ----


def neurons(**config):
    torch.manual_seed(0)
    eve = EVE(EVEConfig(**{"mean": "gain", **config}), 6, 0).double()
    with torch.no_grad():
        eve.init_weights()
        for parameter in eve.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return eve


def hidden():
    return torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("mean", ["gain", "linear"])
@pytest.mark.parametrize("k", [1, 2])
def test_rescaling_multiplies_the_mean_of_its_unit_and_leaves_the_others(mean, k):
    eve, h = neurons(mean=mean, latent_dim=k), hidden()
    before = eve.mean(h).detach()
    others = {name: value.clone() for name, value in eve.state_dict().items() if not name.startswith(("gain", "mean"))}
    factor = tensor(1.0, 0.5, 1.0, 3.0, 1.0, 1.0)
    rescale_means([eve], factor, None)
    after = eve.mean(h).detach()
    torch.testing.assert_close(after, before * (factor if k == 1 else factor[:, None]))
    still = factor == 1
    assert torch.equal(after[:, :, still], before[:, :, still])
    assert all(torch.equal(eve.state_dict()[name], value) for name, value in others.items())


@pytest.mark.parametrize("make", [torch.optim.AdamW, lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9)])
@pytest.mark.parametrize("mean", ["gain", "linear"])
def test_the_next_update_is_the_same_share_of_a_rescaled_row(make, mean):
    """With the same gradient's moments: the row and its update are multiplied alike, those of the others stay."""
    updates = {}
    for rescaled in (False, True):
        eve = neurons(mean=mean)
        optimizer = make([p for n, p in eve.named_parameters() if n.startswith(("gain", "mean"))], lr=0.01)
        for seed in range(3):
            optimizer.zero_grad()
            (eve.mean(hidden()) * torch.randn(3, 5, 6, dtype=torch.float64)).sum().backward()
            torch.manual_seed(seed)
            optimizer.step()
        factor = tensor(1.0, 0.5, 1.0, 3.0, 1.0, 1.0)
        if rescaled:
            rescale_means([eve], factor, optimizer)
        name = "gain" if mean == "gain" else "mean_weight"
        before = getattr(eve, name).detach().clone()
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)  # what the momentum alone does
        optimizer.step()
        updates[rescaled] = getattr(eve, name).detach() - before
    scale = factor if mean == "gain" else factor[:, None]
    torch.testing.assert_close(updates[True], updates[False] * scale)


def test_an_optimizer_with_another_state_is_refused():
    eve = neurons()
    optimizer = torch.optim.Rprop([eve.gain])
    eve.mean(hidden()).sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"'prev' of Rprop .*AdamW"):
        rescale_means([eve], torch.ones(6).double(), optimizer)


@pytest.mark.parametrize("config", [{"scale": "unit"}, {"scale": "input"}, {"scale": "unit", "latent_dim": 2}])
def test_shifting_moves_the_scale_of_its_unit(config):
    eve, h = neurons(**config), hidden()
    before = eve.raw_log_scale(h).detach().clone()
    shift = tensor(0.0, -0.5, 0.0, 0.2, 0.0, 0.0)
    shift_log_scales([eve], shift)
    expected = before + (shift if config.get("latent_dim", 1) == 1 else shift[:, None])
    torch.testing.assert_close(eve.raw_log_scale(h).detach(), expected)


def test_units_of_stacked_experts_follow_one_another():
    one, other = neurons(), neurons()
    gains = [eve.gain.detach().clone() for eve in (one, other)]
    rescale_means([one, other], torch.arange(1.0, 13.0).double(), None)
    torch.testing.assert_close(one.gain.detach(), gains[0] * torch.arange(1.0, 7.0))
    torch.testing.assert_close(other.gain.detach(), gains[1] * torch.arange(7.0, 13.0))


def test_a_kick_wakes_a_dead_unit():
    """With the centered prior: a scale that is the prior's costs nothing, and one a step away does."""
    eve = neurons(prior="centered", scale="unit", prior_scale=0.5)
    with torch.no_grad():
        eve.prior_log_scale.copy_(eve.log_scale)
    shift = rules.scale_shift(eve.log_scale.detach().exp(), torch.zeros(6).double(), None, None, 0.5, 1.0)
    shift_log_scales([eve], shift)
    posterior, prior = (Normal(torch.zeros(6).double(), one.exp()) for one in (eve.log_scale, eve.prior_log_scale))
    kl = torch.distributions.kl_divergence(posterior, prior)
    torch.testing.assert_close(kl.detach(), torch.full_like(kl, 0.5 + 0.5 * math.exp(-1.0) - 0.5).detach())
    assert (kl > 1e-4).all()


# ---- The band and the settings ----


class TestBand:
    def test_targets_are_equally_spaced_in_logarithm(self):
        band = BandSettings(target=0.5, spread=4.0, low_factor=0.5, high_factor=3.0).of(7, layer=2)
        torch.testing.assert_close(band.targets.log().diff(), torch.full((6,), math.log(16) / 6))
        torch.testing.assert_close(band.targets.log().mean().exp(), torch.tensor(0.5))
        assert band.targets[0].item() == pytest.approx(0.125) and band.targets[-1].item() == pytest.approx(2.0)
        torch.testing.assert_close(band.low, 0.5 * band.targets)
        torch.testing.assert_close(band.high, 3.0 * band.targets)

    def test_shuffling_is_a_permutation_of_each_layers_own(self):
        settings = BandSettings(target=1.0, spread=4.0, order="shuffled", seed=3)
        one, again, other = (settings.of(20, layer).targets for layer in (0, 0, 1))
        assert torch.equal(one, again) and not torch.equal(one, other)
        torch.testing.assert_close(one.sort().values, BandSettings(target=1.0, spread=4.0).of(20, 0).targets)

    def test_one_unit_and_one_target(self):
        assert Band.homogeneous(0.3, 1, 0.5, 2.0).targets.tolist() == pytest.approx([0.3])
        assert BandSettings(target=0.3, spread=5.0).of(1, 0).targets.tolist() == pytest.approx([0.3])

    def test_shares_and_violation(self):
        band = Band(torch.tensor([1.0, 1.0, 1.0, 2.0]), 0.5, 2.0)
        energy = torch.tensor([0.25, 0.5, 2.0, 6.0])
        assert [part.item() for part in band.shares(energy)] == [0.25, 0.5, 0.25]
        torch.testing.assert_close(band.violation(energy), torch.tensor([0.25, 0.0, 0.0, 2.0]))
        torch.testing.assert_close(band.violation(energy, relative=True), torch.tensor([0.25, 0.0, 0.0, 1.0]))

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"low_factor": 2.0, "high_factor": 2.0}, r"low_factor=2.0 must be below high_factor=2.0"),
            ({"target": -0.1}, r"target=-0.1: .* positive"),
            ({"target": 0.0}, r"target=0.0"),
            ({"target": math.nan}, r"target=nan"),
            ({"spread": 0.5}, r"spread=0.5 must be at least 1"),
            ({"order": "random"}, r"order='random' is unknown"),
            ({"low_factor": -1.0}, r"low_factor=-1.0"),
        ],
    )
    def test_what_makes_no_band_is_refused(self, fields, message):
        with pytest.raises(ValueError, match=message):
            BandSettings(**{"target": 1.0, **fields})
        with pytest.raises(ValueError, match=message):
            RegimeControl(band={"target": 1.0, **fields})

    def test_targets_and_energies_that_do_not_fit(self):
        with pytest.raises(ValueError, match="target of unit 1 is -2"):
            Band(torch.tensor([1.0, -2.0]), 0.5, 2.0)
        with pytest.raises(ValueError, match=r"has 2 units, and energy has the shape \[3\]"):
            Band.homogeneous(1.0, 2, 0.5, 2.0).shares(torch.ones(3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Thermostat(kl_min=0.2, kl_max=0.2), r"`kl_min`=0.2 must be below `kl_max`=0.2"),
        (lambda: Thermostat(kl_min=-0.2, kl_max=0.2), r"`kl_min` is a number in \[0, inf\), got -0.2"),
        (lambda: Homeostasis(eta=0.6, eta_max=0.5), r"`eta`=0.6 is above `eta_max`=0.5"),
        (lambda: Homeostasis(toward="middle"), r"`toward`='middle' is unknown"),
        (lambda: Projection(max_factor=1.0), r"`max_factor` is a number in \(1, inf\), got 1.0"),
        (lambda: ScaleGuard(), "neither `floor`, `ceiling` nor `kick`"),
        (lambda: ScaleGuard(floor=1.0, ceiling=0.5), r"`floor`=1.0 must be below `ceiling`=0.5"),
        (lambda: BandCalibration(under=0.6, over=0.5), "add up to less than 1"),
        (lambda: AutoregressiveControl(share=0.5, max_share=0.2), r"`share`=0.5 is above `max_share`=0.2"),
        (lambda: RegimeControl(homeostasis={}), r"`homeostasis` is about the band, and there is none"),
        (lambda: RegimeControl(min_inside=0.5), r"`min_inside` is about the band"),
        (
            lambda: RegimeControl(band={"target": 1.0}, projection={"interval": 12}),
            r"=12 is no multiple of `interval`=5",
        ),
        (lambda: RegimeControl(band={"targets": 1.0}), r"unknown key 'targets': did you mean 'target'"),
        (lambda: RegimeControl(band={}), "`band` of the regime control has no `target`"),
        (lambda: RegimeControl(thermostat={"kl_max": 1.0}), "has no `kl_min`"),
        (lambda: RegimeControl(penalty=0.5), r"`penalty` is a BandPenalty, .* got 0.5"),
        (lambda: RegimeControl.of({"homeo": {}}), r"unknown key 'homeo'"),
        (lambda: RegimeControl(interval=0), r"`interval` is a whole number of at least 1, got 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_settings_read_back():
    settings = RegimeControl(
        band=BandSettings(target=0.3, spread=2.0),
        homeostasis={"eta": 0.2},
        thermostat=Thermostat(0.1, 0.2),
        min_inside=0.5,
    )
    assert RegimeControl.of(settings.to_dict()) == settings
    assert RegimeControl.of(settings) is settings and RegimeControl.of(None) is None
    assert RegimeControl() == RegimeControl.of({})
