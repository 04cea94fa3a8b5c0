"""Feed-forward units made variational in every family: the mean pass is the stock model, and back again."""

import copy

import pytest
import torch
import transformers as hf
from eve_families import (
    EVERY,
    FEW,
    TINY,
    WITH_TARGETS,
    added,
    answer,
    attended,
    centered,
    given,
    is_added,
    move,
    retrofitted,
    stock,
    targets,
)
from eve_reference import UnitNoise, predictive, sampled_by_hand

from hf_variational import EVEConfig, posterior_noise, to_deterministic, variationalize


@torch.no_grad()
@pytest.mark.parametrize("name", EVERY)
def test_mean_pass_is_the_stock_model_bit_for_bit(name):
    plain, inputs = stock(name), given(name, padding=2)
    before = {key: value.clone() for key, value in plain.state_dict().items()}
    buffers = [key for key, _ in plain.named_buffers()]
    model = retrofitted(plain)
    for options in ({}, {"output_hidden_states": True}):
        expected, actual = plain(**inputs, **options), model(**inputs, **options)
        assert torch.equal(answer(actual), answer(expected))
        for key in ("hidden_states", "encoder_hidden_states", "decoder_hidden_states"):
            pairs = zip(actual.get(key) or (), expected.get(key) or (), strict=True)
            assert all(torch.equal(one, other) for one, other in pairs)
    after = model.state_dict()
    assert all(torch.equal(after.pop(key), value) for key, value in before.items())
    assert after and all(is_added(key) for key in after)
    assert set(buffers) <= {key for key, _ in model.named_buffers()}


@torch.no_grad()
@pytest.mark.parametrize("name", WITH_TARGETS)
def test_nll_of_the_mean_pass_is_the_stock_loss(name):
    plain, inputs = stock(name), given(name, padding=2)
    wanted = targets(name, inputs)
    expected, out = plain(**inputs, **wanted), retrofitted(plain)(**inputs, **wanted)
    assert torch.equal(out.nll, expected.loss) and torch.equal(out.logits, expected.logits)
    torch.testing.assert_close(out.loss, out.nll + 0.1 * out.kl)
    assert out.kl > 0.01 and out.kl_per_layer.shape == (TINY[name].depth,)


@torch.no_grad()
@pytest.mark.parametrize("name", EVERY)
def test_what_is_added_and_where(name):
    """Of the low-rank scale with a prior around the mean: three parameters and a buffer a layer, in float32."""
    tiny, model = TINY[name], retrofitted(name, moved=False)
    units, expected = tiny.units, {}
    for layer in range(tiny.depth):
        places = [tiny.eve(layer)]
        if tiny.model_type == "mixtral":
            places = [f"{tiny.eve(layer)}.{expert}" for expert in range(4)]
        for place in places:
            shapes = {"log_scale": (units,), "scale_down": (4, units), "scale_up": (units, 4)}
            expected |= {f"{place}.{key}": shape for key, shape in {**shapes, "prior_log_scale": (units,)}.items()}
    found = {key: tuple(value.shape) for key, value in added(model).items()}
    assert found == expected
    assert all(value.dtype == torch.float32 for value in added(model).values())
    assert model.settings.eve_layers == list(range(tiny.depth)) and model.settings.attention_layers == []
    assert model.settings.eve == centered() == EVEConfig.from_dict(model.config.variational["eve"])
    assert model.variational_layers == list(range(tiny.depth))


@torch.no_grad()
@pytest.mark.parametrize("name", EVERY)
def test_certain_samples_are_the_mean_pass(name):
    """sigma to 0, with every mask and window of the family, where the rows split in the middle too."""
    plain, inputs = stock(name), given(name, padding=2)
    for layers in ("all", [1, 2]):
        model = retrofitted(plain, layers)
        for key, tensor in added(model).items():
            if not key.endswith("prior_log_scale"):
                tensor.fill_(-12.0 if key.endswith(".log_scale") else 0.0)
        expected, actual = answer(plain(**inputs)), answer(model(**inputs, num_posterior_samples=3))
        if TINY[name].task is None:
            expected, actual = expected.repeat_interleave(3, 0)[3:], actual[3:]
        else:
            expected = torch.log_softmax(expected.float(), -1)
            kept = attended(name, inputs)
            expected, actual = expected[kept], actual[kept]
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", WITH_TARGETS)
def test_samples_differ_in_every_family(name):
    """What makes the test above mean something."""
    inputs = given(name, padding=2)
    out = retrofitted(name)(**inputs, num_posterior_samples=4, output_uncertainty=True)
    assert out.uncertainty.mutual_information.shape == out.logits.shape[:-1]
    assert out.uncertainty.mutual_information.max() > 1e-3
    torch.testing.assert_close(out.logits.exp().sum(-1), torch.ones(out.logits.shape[:-1]))


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_every_kernel_of_experts(implementation):
    """Each runs the mean pass bit for bit, and is the one in use again afterwards."""
    plain, inputs = stock("mixtral"), given("mixtral", padding=2)
    plain.config._experts_implementation = implementation
    expected, model = plain(**inputs).logits, retrofitted(plain, [1, 2])
    assert torch.equal(model(**inputs).logits, expected)
    with posterior_noise(UnitNoise()):
        actual = model(**inputs, num_posterior_samples=3).logits
    passes = sampled_by_hand("mixtral", stock("mixtral"), model, inputs, 3)
    kept = attended("mixtral", inputs)
    torch.testing.assert_close(actual[kept], predictive(passes)[kept], atol=2e-5, rtol=1e-4)
    back = to_deterministic(model)
    assert back.config._experts_implementation == implementation
    assert torch.equal(back(**inputs).logits, expected)


class TestToDeterministic:
    @torch.no_grad()
    @pytest.mark.parametrize("name", EVERY)
    @pytest.mark.parametrize("mean", ["identity", "gain"])
    def test_is_the_mean_pass_in_the_stock_class(self, name, mean):
        plain, inputs = stock(name), given(name, padding=2)
        if mean == "gain" and TINY[name].model_type == "mixtral":
            pytest.skip("see test_gain_of_experts")
        model = retrofitted(plain, eve=centered(mean=mean))
        expected = answer(model(**inputs))
        assert torch.equal(expected, answer(plain(**inputs))) == (mean == "identity")
        settings = plain.config.to_dict()
        back = to_deterministic(model)
        assert back is model and type(back) is type(plain) and type(back.config) is type(plain.config)
        assert back.state_dict().keys() == plain.state_dict().keys()
        assert back.config.model_type == plain.config.model_type
        assert {**back.config.to_dict(), "architectures": 0} == {**settings, "architectures": 0}
        actual = answer(back(**inputs))
        if mean == "identity":
            assert torch.equal(actual, expected)
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
        assert not any(module._forward_pre_hooks for module in back.modules())

    @torch.no_grad()
    @pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "opt", "bert-masked", "vit", "phi"])
    def test_affine_mean_where_the_projection_has_a_bias(self, name):
        plain, inputs = stock(name), given(name, padding=2)
        model = retrofitted(plain, layers=[0, 2], eve=centered(mean="linear"))
        expected = answer(model(**inputs))
        assert not torch.allclose(expected, answer(plain(**inputs)), atol=1e-2)
        torch.testing.assert_close(answer(to_deterministic(model)(**inputs)), expected, atol=1e-4, rtol=1e-4)

    @torch.no_grad()
    def test_affine_mean_where_it_has_none(self):
        """The linear part can be multiplied into W_out; a bias has nowhere to go, and nothing changes."""
        model, inputs = retrofitted("llama", eve=centered(mean="linear")), given("llama", padding=2)
        expected = model(**inputs).logits
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match="bias"):
            to_deterministic(model)
        after = model.state_dict()
        assert all(torch.equal(after[key], value) for key, value in before.items())
        assert torch.equal(model(**inputs).logits, expected)
        for key, tensor in added(model).items():
            if key.endswith("mean_bias") and ".layers.2." not in key:
                tensor.zero_()
        expected = model(**inputs).logits
        with pytest.raises(ValueError, match="layer 2"):
            to_deterministic(model)
        assert torch.equal(model(**inputs).logits, expected), "the layers before it were changed"
        for key, tensor in added(model).items():
            if key.endswith("mean_bias"):
                tensor.zero_()
        expected = model(**inputs).logits
        back = to_deterministic(model)
        assert type(back) is hf.LlamaForCausalLM
        torch.testing.assert_close(back(**inputs).logits, expected, atol=1e-4, rtol=1e-4)

    @torch.no_grad()
    def test_gain_of_experts(self):
        model, inputs = retrofitted("mixtral", eve=centered(mean="gain")), given("mixtral", padding=2)
        expected = model(**inputs).logits
        assert not torch.allclose(expected, stock("mixtral")(**inputs).logits, atol=1e-2)
        back = to_deterministic(model)
        assert type(back) is hf.MixtralForCausalLM
        torch.testing.assert_close(back(**inputs).logits, expected, atol=1e-5, rtol=1e-4)

    @torch.no_grad()
    def test_latent_dimensions_are_pooled(self):
        plain, inputs = stock("gpt2"), given("gpt2", padding=2)
        for pool in ("mean", "sum", "sum_sqrtk"):
            eve = centered(mean="linear", latent_dim=3, pool=pool)
            fresh = retrofitted(plain, eve=eve, moved=False)
            torch.testing.assert_close(fresh(**inputs).logits, plain(**inputs).logits, atol=1e-4, rtol=1e-4)
            model = move(fresh)
            expected = model(**inputs).logits
            torch.testing.assert_close(to_deterministic(model)(**inputs).logits, expected, atol=1e-4, rtol=1e-4)

    @torch.no_grad()
    @pytest.mark.parametrize("name", FEW)
    def test_and_there_again(self, name):
        """A model that went back can be made variational once more, and be saved as the stock model that it is."""
        inputs, model = given(name, padding=2), to_deterministic(retrofitted(name))
        expected = answer(model(**inputs))
        again = variationalize(model, eve=centered(), layers=[1])
        assert again.settings.eve_layers == [1]
        assert torch.equal(answer(again(**inputs)), expected)
        sampled = again(**inputs, num_posterior_samples=2)
        assert answer(sampled).isfinite().all()

    def test_trains_like_the_stock_model(self):
        inputs, model = given("gpt2"), to_deterministic(retrofitted("gpt2", train="posterior"))
        assert all(parameter.requires_grad for parameter in model.parameters())
        loss = model.train()(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())

    def test_what_is_not_variational(self):
        with pytest.raises(ValueError, match="variational"):
            to_deterministic(stock("gpt2"))
