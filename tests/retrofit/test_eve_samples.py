"""Posterior samples of feed-forward units against stock models with hooks: values, gradients, and where rows split."""

import pytest
import torch
from eve_families import (
    EVERY,
    FEW,
    TINY,
    WITH_TARGETS,
    added_parameters,
    answer,
    assert_same_gradients,
    attended,
    centered,
    given,
    retrofitted,
    rows_of,
    stock,
    targets,
)
from eve_reference import UnitNoise, grid, kl_by_hand, predictive, sampled_by_hand
from families import HEADS, LENGTH, gradients

from hf_variational import posterior_noise

SAMPLES = 3
# In a layer, its self-attention.
ATTENTION = {
    **{"gpt2": "attn", "gpt_neox": "attention", "gptj": "attn", "bloom": "self_attention"},
    **{"falcon": "self_attention", "bert": "attention", "roberta": "attention", "vit": "attention"},
    **{"distilbert": "attention", "t5": "layer.0"},
}


def sampled(model, inputs, noise=None, samples=SAMPLES, **options):
    with posterior_noise(UnitNoise() if noise is None else noise):
        return model(**inputs, num_posterior_samples=samples, **options)


def assert_same(name, actual, expected, inputs, atol=2e-5):
    kept = attended(name, inputs)
    torch.testing.assert_close(actual[kept], expected[kept], atol=atol, rtol=1e-4)


@pytest.mark.parametrize("name", WITH_TARGETS)
@pytest.mark.parametrize("layers", ["all", [1, 2], [2]], ids=str)
def test_samples_are_stock_models_with_noise_in_their_units(name, layers):
    """Logits, NLL and KL of S rows a sequence, against a stock model whose units are moved by hand, one at a time."""
    plain, inputs = stock(name), given(name, padding=2)
    model, wanted = retrofitted(plain, layers), targets(name, inputs)
    out = sampled(model, inputs, **wanted)
    with torch.no_grad():
        passes = sampled_by_hand(name, plain, model, inputs, SAMPLES, wanted)
    assert_same(name, out.logits, predictive(passes), inputs)
    nll = torch.stack([one.outputs.loss for one in passes]).mean()
    torch.testing.assert_close(out.nll, nll, atol=1e-5, rtol=1e-4)
    kl = kl_by_hand(name, passes, inputs, wanted)
    torch.testing.assert_close(out.kl_per_layer, kl, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out.loss, nll + 0.1 * kl.sum(), atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_samples_of_an_encoder_without_a_head():
    plain, inputs = stock("t5-encoder"), given("t5-encoder", padding=2)
    for layers in ("all", [2]):
        model = retrofitted(plain, layers)
        passes = sampled_by_hand("t5-encoder", plain, model, inputs, SAMPLES)
        expected = torch.stack([one.outputs.last_hidden_state for one in passes], 1)
        actual = sampled(model, inputs).last_hidden_state.unflatten(0, (2, SAMPLES))
        kept = inputs["attention_mask"].bool()[:, None].expand(-1, SAMPLES, -1)
        torch.testing.assert_close(actual[kept], expected[kept], atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("layers", [[3, 4, 5], [4], [0], [2, 5]], ids=str)
@pytest.mark.parametrize("name", ["t5", "t5-gated"])
def test_towers_apart(name, layers):
    """Of the decoder alone, of the encoder alone, and of both."""
    plain, inputs = stock(name), given(name, padding=2)
    model, wanted = retrofitted(plain, layers), targets(name, inputs)
    out = sampled(model, inputs, **wanted)
    passes = sampled_by_hand(name, plain, model, inputs, SAMPLES, wanted)
    assert_same(name, out.logits, predictive(passes), inputs)
    torch.testing.assert_close(out.kl_per_layer, kl_by_hand(name, passes, inputs, wanted), atol=1e-5, rtol=1e-4)
    last_of_all = sampled(model, {**inputs, "labels": wanted["labels"]}, output_posteriors=True)
    assert list(last_of_all.posteriors) == layers


@pytest.mark.parametrize("name", WITH_TARGETS)
def test_gradients_are_those_of_stock_models_with_noise(name):
    plain, inputs = stock(name), given(name, padding=2)
    model, wanted = retrofitted(plain, [1, 2]), targets(name, inputs)
    ours = added_parameters(model)
    actual = gradients(model, sampled(model, inputs, **wanted).loss)
    passes = sampled_by_hand(name, plain, model, inputs, SAMPLES, wanted)
    loss = torch.stack([one.outputs.loss for one in passes]).mean()
    loss = loss + 0.1 * kl_by_hand(name, passes, inputs, wanted).sum()
    named = {**dict(plain.named_parameters()), **ours}
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    expected = {key: grad for key, grad in zip(named, grads, strict=True) if grad is not None}
    assert set(ours) <= set(expected)
    assert_same_gradients(actual, expected, 5e-5)


@pytest.mark.parametrize("name", WITH_TARGETS)
def test_samples_are_the_repeated_batch(name):
    """Each row S times in the batch, one sample a row, with the same noise: the S samples of a row, averaged."""
    inputs = given(name, padding=2)
    model, wanted = retrofitted(name, [1, 2]), targets(name, inputs)
    rows = [0] * SAMPLES + [1] * SAMPLES
    repeated, labels = rows_of(inputs, rows), rows_of(wanted, rows)
    out = sampled(model, inputs, **wanted)
    naive = sampled(model, repeated, UnitNoise(grid(2, SAMPLES)), samples=1, **labels)
    expected = naive.logits.double().exp().unflatten(0, (2, SAMPLES)).mean(1).log().float()
    assert_same(name, out.logits, expected, inputs)
    for field in ("nll", "kl", "loss"):
        torch.testing.assert_close(out[field], naive[field], atol=1e-5, rtol=1e-4)
    if name in FEW:
        assert_same_gradients(gradients(model, out.loss), gradients(model, naive.loss), 5e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(("batch", "samples"), [(1, 4), (HEADS, 2), (LENGTH, 2), (2, LENGTH // 2), (2, 1)])
def test_axes_of_equal_size_are_not_confused(name, batch, samples):
    """As many sequences (or rows) as tokens or heads; and one sequence, which broadcasts where rows are meant."""
    plain, inputs = stock(name), given(name, batch=batch, padding=2 if batch > 1 else 0)
    model = retrofitted(plain, [1])
    passes = sampled_by_hand(name, plain, model, inputs, samples)
    actual = answer(sampled(model, inputs, samples=samples))
    if TINY[name].task is None:
        expected = torch.stack([one.outputs.last_hidden_state for one in passes], 1).flatten(0, 1)
        torch.testing.assert_close(actual[samples:], expected[samples:], atol=1e-5, rtol=1e-4)
        return
    assert_same(name, actual, predictive(passes), inputs)


class Counting:
    """Rows that enter each module of some names."""

    def __init__(self, model, names: list[str], batch: int):
        self.rows, self.batch = {}, batch
        for name in names:
            model.get_submodule(name).register_forward_pre_hook(self._hook(name), with_kwargs=True)

    def _hook(self, name):
        def hook(module, args, kwargs):
            h = args[0] if args else kwargs["hidden_states"]
            # OPT lays its rows end to end: LENGTH of them a sequence.
            self.rows[name] = h.shape[0] // (LENGTH if h.ndim == 2 else 1)

        return hook


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in EVERY if TINY[name].model_type not in ("mixtral", "t5")])
@pytest.mark.parametrize(("layers", "split"), [("all", 0), ([1, 2], 1), ([2], 2), ([2, 1], 1)])
def test_rows_split_in_the_network_of_the_first_variational_layer(name, layers, split):
    """Its attention, and all below, runs on one row a sequence."""
    tiny, model, inputs = TINY[name], retrofitted(name, layers), given(name)
    path = ATTENTION.get(tiny.model_type, "self_attn")
    attentions = [f"{tiny.layer(layer)}.{path}" for layer in range(3)]
    projections = [tiny.projection(layer) for layer in range(3)]
    seen = Counting(model, attentions + projections, 2)
    model(**inputs, num_posterior_samples=SAMPLES)
    assert [seen.rows[key] for key in projections] == [2 if layer < split else 2 * SAMPLES for layer in range(3)]
    assert [seen.rows[key] for key in attentions] == [2 if layer <= split else 2 * SAMPLES for layer in range(3)]


@torch.no_grad()
@pytest.mark.parametrize(("layers", "encoder", "decoder"), [([4], [1, 1, 1], [1, 1, 3]), ([1], [1, 1, 3], [3, 3, 3])])
def test_rows_split_in_either_tower(layers, encoder, decoder):
    model, inputs = retrofitted("t5", layers), given("t5")
    names = [f"{tower}.block.{layer}.layer.0" for tower in ("encoder", "decoder") for layer in range(3)]
    seen = Counting(model, names, 2)
    model(**inputs, num_posterior_samples=SAMPLES)
    assert [rows // 2 for rows in seen.rows.values()] == encoder + decoder


@torch.no_grad()
@pytest.mark.parametrize("name", WITH_TARGETS)
def test_each_samples_logits_and_the_statistics_of_the_layers(name):
    inputs = given(name, padding=2)
    plain, wanted = stock(name), targets(name, inputs)
    model = retrofitted(plain, [0, 2])
    out = sampled(model, inputs, **wanted, output_sample_logits=True, output_posteriors=True)
    passes = sampled_by_hand(name, plain, model, inputs, SAMPLES)
    for sample, one in enumerate(passes):
        assert_same(name, out.sample_logits[:, sample], torch.log_softmax(one.outputs.logits, -1), inputs)
    assert list(out.posteriors) == [0, 2] and not out.attention_posteriors
    units = TINY[name].units * (4 if name == "mixtral" else 1)
    for layer, statistics in out.posteriors.items():
        expected = sum(one.kl[layer] for one in passes) / SAMPLES
        kept = inputs["attention_mask"].bool() if "attention_mask" in inputs else slice(None)
        torch.testing.assert_close(statistics.kl[kept], expected[kept], atol=1e-4, rtol=1e-4)
        assert statistics.scale.shape == statistics.kl_per_unit.shape == (units,)


@torch.no_grad()
@pytest.mark.parametrize("noise", ["sequence", "token"])
@pytest.mark.parametrize("name", ["gpt2", "opt", "bert-masked", "t5"])
def test_noise_of_a_sequence_is_the_same_at_every_position(name, noise):
    inputs = given(name)
    source, model = UnitNoise(), retrofitted(name, eve=centered(noise=noise))
    sampled(model, inputs, source)
    assert len(source.asked) == TINY[name].depth
    for request in source.asked:
        assert (request.positions is None) == (noise == "sequence") and request.site == "ffn"
        assert request.shape == (2 * SAMPLES, request.shape[1], TINY[name].units)
        assert (request.shape[1] == 1) == (noise == "sequence")
    assert sorted(request.layer for request in source.asked) == list(range(TINY[name].depth))


@torch.no_grad()
def test_global_generator_without_a_source():
    model, inputs = retrofitted("llama"), given("llama")
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(model(**inputs, num_posterior_samples=SAMPLES).logits)
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])
    state = torch.get_rng_state()
    model(**inputs)
    assert torch.equal(torch.get_rng_state(), state)
