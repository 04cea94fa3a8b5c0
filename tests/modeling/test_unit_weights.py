"""Weights of single units: in the fused pass, in the loss, in its gradient, and what must not move them."""

import pytest
import torch
import torch._dynamo.testing
from tiny import assert_same_gradients, gradients, tiny_model, token_ids

from hf_variational import EVE, EVEConfig, UnitWeights, posterior_noise
from hf_variational.modeling import gaussian
from hf_variational.modeling.configuration_variational_gpt import PRIORS
from hf_variational.modeling.gaussian import gaussian_kl, sample_gaussian, sample_with_kl

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")

BOUNDS = (-3.0, 1.0)
UNITS, LAYERS = 20, 3


def draw(*shape, seed=0, dtype=torch.float64, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


def naive(mean, log_scale, noise, prior_mean, prior_log_scale, low, high, kl_weights=None, energy_weights=None):
    """The oracle of the fused pass: every sum written out."""
    clipped, mean = log_scale.clamp(low, high), mean.to(noise.dtype)
    kl = gaussian_kl(mean, clipped, prior_mean, prior_log_scale).expand(noise.shape)
    charged = None if kl_weights is None else torch.einsum("rlu,u->rl", kl, kl_weights)
    energy = None if energy_weights is None else torch.einsum("rlu,u->rl", mean**2, energy_weights)
    return sample_gaussian(mean, clipped, noise), kl.sum(-1), charged, energy


def fused_inputs(units, prior, dtype=torch.float64):
    mean, log_scale, noise = (draw(2, 5, units, seed=seed, dtype=dtype, spread=1.5) for seed in range(3))
    prior_mean = {"standard": torch.zeros((), dtype=dtype), "centered": None}.get(prior, draw(units, seed=3).to(dtype))
    return mean, log_scale, noise, prior_mean, draw(units, seed=4, spread=0.5).to(dtype)


def run(function, mean, log_scale, noise, prior_mean, prior_log_scale, *weights):
    leaves = [t if t is None else t.clone().requires_grad_() for t in (mean, log_scale, prior_mean, prior_log_scale)]
    outputs = [one for one in function(*leaves[:2], noise, *leaves[2:], *BOUNDS, *weights) if one is not None]
    total = sum((one * draw(*one.shape, seed=7 + i, dtype=one.dtype)).sum() for i, one in enumerate(outputs))
    held = [leaf for leaf in leaves if leaf is not None]
    return outputs, torch.autograd.grad(total, held, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("given", ["kl", "energy", "both"])
@pytest.mark.parametrize("prior", ["standard", "centered", "empirical"])
class TestFused:
    def weights(self, given, units, dtype=torch.float64):
        kl = draw(units, seed=5).exp().to(dtype) if given != "energy" else None
        return kl, (draw(units, seed=6).to(dtype) if given != "kl" else None)

    @pytest.mark.parametrize("block_elements", [1, 3 * 17, 65_536])
    def test_values_and_gradients_are_the_plain_functions(
        self, prior, given, block_elements, monkeypatch, poisoned_scratch
    ):
        monkeypatch.setattr(gaussian, "_BLOCK_ELEMENTS", block_elements)
        inputs, weights = fused_inputs(17, prior), self.weights(given, 17)
        for actual, expected in zip(
            run(sample_with_kl, *inputs, *weights), run(naive, *inputs, *weights), strict=True
        ):
            for one, other in zip(actual, expected, strict=True):
                torch.testing.assert_close(one, other)

    def test_gradcheck(self, prior, given, monkeypatch):
        monkeypatch.setattr(gaussian, "_BLOCK_ELEMENTS", 8)
        mean, log_scale, noise, prior_mean, prior_log_scale = fused_inputs(4, prior)
        leaves = [t.requires_grad_() for t in (mean, log_scale, prior_log_scale)]

        def function(mean, log_scale, prior_log_scale):
            weights = self.weights(given, 4)
            found = sample_with_kl(mean, log_scale, noise, prior_mean, prior_log_scale, *BOUNDS, *weights)
            return tuple(one for one in found if one is not None)

        assert torch.autograd.gradcheck(function, leaves)

    def test_bfloat16_means_and_the_branch_that_a_compiler_sees(self, prior, given, monkeypatch):
        mean, *rest = fused_inputs(8, prior, torch.float32)
        inputs, weights = (mean.bfloat16(), *rest), self.weights(given, 8, torch.float32)
        plain = run(naive, *inputs, *weights)
        found = [run(sample_with_kl, *inputs, *weights)]
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        found.append(run(sample_with_kl, *inputs, *weights))
        for outputs, grads in found:
            for one, other in zip(outputs, plain[0], strict=True):
                torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)
            for one, other in zip(grads, plain[1], strict=True):
                tolerance = 3e-2 if one.dtype == torch.bfloat16 else 2e-5
                torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


# ---- The loss of a model ----


def batch_of(sequences=4, length=9):
    ids = token_ids(sequences, length)
    mask = (torch.arange(length) < torch.tensor([9, 3, 7, 5])[:sequences, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def unit_weights(kl=True, energy=True, layers=range(LAYERS)):
    return {
        layer: UnitWeights(
            draw(UNITS, seed=layer, dtype=torch.float32).exp() if kl else None,
            draw(UNITS, seed=10 + layer, dtype=torch.float32) if energy else None,
            torch.tensor(0.25 + layer) if energy else None,
        )
        for layer in layers
    }


def still(model, samples, **inputs):
    with posterior_noise(lambda request: torch.full(request.shape, 0.5)):
        return model(**inputs, num_posterior_samples=samples)


def charged(out, weights, beta):
    """By hand from the statistics: every token that carries KL is a target here."""
    total = out.nll.detach().clone()
    for layer, statistics in out.posteriors.items():
        kl, energy, constant = weights.get(layer, UnitWeights())
        total += beta * (statistics.kl_per_unit * (1.0 if kl is None else kl)).sum()
        if energy is not None:
            total += (statistics.mean_energy * energy).sum() + constant
    return total


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("samples", [0, 1, 2])
@pytest.mark.parametrize("k", [1, 2])
def test_the_loss_by_hand(prior, samples, k):
    model, inputs = tiny_model({"prior": prior, "latent_dim": k, "mean": "gain"}), batch_of()
    plain = still(model, samples, **inputs, output_posteriors=True)
    for weights in (unit_weights(), unit_weights(energy=False), unit_weights(kl=False), unit_weights(layers=[1])):
        out = still(model, samples, **inputs, unit_weights=weights)
        torch.testing.assert_close(out.loss, charged(plain, weights, 0.1))
        # what is reported is the KL itself
        torch.testing.assert_close(out.kl_per_layer, plain.kl_per_layer)


@pytest.mark.parametrize("scale", ["unit", "input"])
def test_weights_of_one_and_zero_change_nothing(scale):
    model, inputs = tiny_model({"scale": scale}), batch_of()
    ones = {layer: UnitWeights(torch.ones(UNITS), torch.zeros(UNITS), torch.zeros(())) for layer in range(LAYERS)}
    plain, weighted = still(model, 1, **inputs), still(model, 1, **inputs, unit_weights=ones)
    torch.testing.assert_close(weighted.loss, plain.loss)
    assert_same_gradients(gradients(model, weighted.loss), gradients(model, plain.loss))


@pytest.mark.parametrize("samples", [0, 2])
def test_a_linearised_penalty_has_the_value_and_the_gradient_of_the_penalty(samples):
    """P = sum_i w (E_i - target)^2 of batch statistics, whatever the batch is cut into."""
    model, inputs = tiny_model({"mean": "gain", "scale": "unit"}).train(), batch_of()
    caught = {}
    for module in model.modules():
        if isinstance(module, EVE):
            module.register_forward_pre_hook(lambda module, args: caught.update({module.layer_idx: args[0]}))
    out = still(model, samples, **inputs, kl_weight=0.0)
    carries = inputs["labels"][:, 1:] >= 0
    weights, penalty = {}, 0.0
    for layer, h in caught.items():
        mu = h * model.model.layers[layer].mlp.eve.gain
        energy = mu.square().unflatten(0, (4, -1)).mean(1)[:, :-1][carries].mean(0)
        penalty = penalty + 3.0 * (energy - 0.2).square().sum()
        at = energy.detach()
        slope = 6.0 * (at - 0.2)
        weights[layer] = UnitWeights(None, slope, 3.0 * (at - 0.2).square().sum() - (slope * at).sum())
    expected = gradients(model, out.nll + penalty)
    for pieces in (1, 2, 4):
        model.zero_grad()
        losses = []
        for rows in torch.arange(4).chunk(pieces):
            part = {name: value[rows] for name, value in inputs.items()}
            loss = still(
                model, samples, **part, kl_weight=0.0, unit_weights=weights, num_items_in_batch=carries.sum()
            ).loss
            loss.backward()
            losses.append(loss.detach())
        torch.testing.assert_close(sum(losses), (out.nll + penalty).detach())
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert_same_gradients({name: found[name] for name in expected}, expected)


def test_a_unit_without_weight_gets_the_gradient_it_had():
    model, inputs = tiny_model({"mean": "gain", "scale": "unit", "prior": "standard"}), batch_of()
    energy = torch.zeros(UNITS)
    energy[3] = 0.7
    last = {LAYERS - 1: UnitWeights(None, energy, None)}
    gain = f"model.layers.{LAYERS - 1}.mlp.eve.gain"
    plain, weighted = still(model, 1, **inputs), still(model, 1, **inputs, unit_weights=last)
    difference = gradients(model, weighted.loss)[gain] - gradients(model, plain.loss)[gain]
    others = torch.arange(UNITS) != 3
    assert difference[3].abs() > 1e-4 and difference[others].abs().max() < 1e-7


def test_free_bits_are_the_least_that_a_weighted_layer_is_charged():
    model, inputs, weights = tiny_model(kl_weight=1.0), batch_of(), unit_weights(energy=False)
    out = still(model, 1, **inputs, output_posteriors=True)
    carries = torch.nn.functional.pad(inputs["labels"][:, 1:] >= 0, (0, 1))
    per_token = []
    for bits in (0.05, 0.3, 0.8):
        expected = 0.0
        for layer in range(LAYERS):
            records = []
            tap = model.model.layers[layer].mlp.eve.tap
            handle = tap.register_forward_hook(lambda module, args, record, seen=records: seen.append(record))
            still(model, 1, **inputs, unit_weights=weights)
            handle.remove()
            per_token.append(records[0].charged_kl[carries])
            expected += per_token[-1].clamp(min=bits * UNITS).sum() / carries.sum()
        found = still(model, 1, **inputs, unit_weights=weights, free_bits=bits)
        torch.testing.assert_close(found.loss - found.nll, expected)
        torch.testing.assert_close(found.kl, out.kl)
    assert any((kl < bits * UNITS).any() for kl, bits in zip(per_token[-3:], (0.8,) * 3, strict=True))


@pytest.mark.parametrize("samples", [0, 1, 2])
def test_gradient_checkpointing_changes_nothing(samples):
    model, inputs, weights = tiny_model({"mean": "gain"}).train(), batch_of(), unit_weights()
    plain = still(model, samples, **inputs, unit_weights=weights, use_cache=False)
    expected = gradients(model, plain.loss)
    model.gradient_checkpointing_enable()
    found = still(model, samples, **inputs, unit_weights=weights, use_cache=False)
    torch.testing.assert_close(found.loss, plain.loss)
    assert_same_gradients(gradients(model, found.loss), expected)


def test_one_graph_and_none_again_when_the_weights_move():
    model, inputs = tiny_model({"mean": "gain"}).train(), batch_of()
    options = {"num_posterior_samples": 1, "use_cache": False}
    model(**inputs, **options)
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter)
    for factor in (1.0, 2.0, 3.0):
        weights = {layer: UnitWeights(*(t * factor for t in w)) for layer, w in unit_weights().items()}
        compiled(**inputs, **options, unit_weights=weights)
    assert counter.frame_count == 1


def test_under_autocast_the_charges_stay_wide():
    model, inputs, weights = tiny_model({"mean": "gain"}).train(), batch_of(), unit_weights()
    expected = still(model, 1, **inputs, unit_weights=weights).loss
    with torch.autocast("cpu", torch.bfloat16):
        out = still(model, 1, **inputs, unit_weights=weights)
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss, expected, rtol=0.03, atol=0.03)


def test_weights_of_nothing_are_refused():
    model, inputs = tiny_model(variational_layers=[1, 2]), batch_of()
    with pytest.raises(ValueError, match=r"layer 0, .* are \[1, 2\]"):
        still(model, 1, **inputs, unit_weights={0: UnitWeights(torch.ones(UNITS))})
    for name, wrong in (("kl", UnitWeights(torch.ones(3))), ("energy", UnitWeights(None, torch.ones(UNITS, 1)))):
        with pytest.raises(ValueError, match=rf"unit_weights\[1\].{name} has the shape"):
            still(model, 1, **inputs, unit_weights={1: wrong})


def test_a_checkpoint_has_nothing_of_them():
    model = tiny_model()
    names = set(model.state_dict())
    still(model, 1, **batch_of(), unit_weights=unit_weights())
    assert set(model.state_dict()) == names


# ---- The coefficient of the autoregressive prior ----


class TestAutoregressiveCoefficient:
    @pytest.mark.parametrize("k", [1, 2])
    def test_starts_as_the_fixed_one_and_learns(self, k):
        options = {"prior": "autoregressive", "autoregressive_coefficient": 0.6, "latent_dim": k}
        inputs = batch_of()
        fixed = tiny_model(options, perturb=False)
        learned = tiny_model({**options, "learn_autoregressive_coefficient": True}, perturb=False)
        learned.load_state_dict(fixed.state_dict(), strict=False)
        ours, theirs = still(learned, 1, **inputs), still(fixed, 1, **inputs)
        torch.testing.assert_close(ours.loss, theirs.loss)
        found = gradients(learned, ours.kl)
        for layer in range(LAYERS):
            assert found[f"model.layers.{layer}.mlp.eve.prior_coefficient"].abs().max() > 0

    def test_kl_and_its_gradient_by_hand(self):
        torch.manual_seed(0)
        config = EVEConfig(
            prior="autoregressive", learn_autoregressive_coefficient=True, prior_scale=0.7, initial_scale=0.5
        )
        eve = EVE(config, 4, 0).double()
        with torch.no_grad():
            eve.init_weights()
            eve.prior_coefficient.copy_(draw(4, seed=8))
        h, follows = draw(1, 6, 4), torch.tensor([[False, True, True, False, True, True]])
        from hf_variational.modeling.sample_axis import SampleAxis

        axis = SampleAxis(0, 1, None, record=True, follows=follows)
        kl = eve.elementwise_kl(h, eve.raw_log_scale(h), axis)
        phi = eve.prior_coefficient.detach().tanh().requires_grad_()
        expected = torch.zeros_like(h)
        scale = torch.full((4,), 0.5, dtype=torch.float64)
        for t in range(6):
            prior = (phi * h[0, t - 1], 0.7) if follows[0, t] else (torch.zeros(4, dtype=torch.float64), 1.0)
            posterior = torch.distributions.Normal(h[0, t], scale)
            part = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(*prior))
            expected = expected + torch.nn.functional.pad(part[None, None], (0, 0, t, 5 - t))
        torch.testing.assert_close(kl, expected)
        (by_phi,) = torch.autograd.grad(expected.sum(), phi)
        (found,) = torch.autograd.grad(kl.sum(), eve.prior_coefficient)
        torch.testing.assert_close(found, by_phi * (1 - phi.detach() ** 2))

    def test_stays_in_float32_when_a_model_is_loaded_in_half(self, tmp_path):
        options = {"prior": "autoregressive", "learn_autoregressive_coefficient": True}
        model = tiny_model(options)
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
        for layer in range(LAYERS):
            ours, theirs = (one.model.layers[layer].mlp.eve.prior_coefficient for one in (loaded, model))
            assert ours.dtype == torch.float32 and torch.equal(ours, theirs)
            phi = loaded.model.layers[layer].mlp.eve.autoregressive_coefficient()
            assert (phi.abs() < 1).all()

    def test_what_cannot_be_learned_is_refused(self):
        with pytest.raises(ValueError, match="needs prior='autoregressive', got prior='empirical'"):
            EVEConfig(learn_autoregressive_coefficient=True)
        with pytest.raises(ValueError, match=r"autoregressive_coefficient=1.0 .* start with 0.99"):
            EVEConfig(prior="autoregressive", learn_autoregressive_coefficient=True, autoregressive_coefficient=1.0)
