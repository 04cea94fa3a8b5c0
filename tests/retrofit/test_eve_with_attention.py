"""Feed-forward units and attention made variational together, and the families whose attention cannot be."""

import copy

import pytest
import torch
import transformers as hf
from eve_families import (
    TINY,
    added,
    added_parameters,
    answer,
    assert_same_gradients,
    attended,
    centered,
    given,
    move,
    positions_of,
    stock,
    targets,
)
from eve_reference import UnitNoise, grid
from families import KINDS, LENGTH, attention, gradients
from torch.nn import functional as F

from hf_variational import posterior_noise, to_deterministic, variationalize

SAMPLES = 3
NAMES = ["llama", "gpt2", "bert-masked", "mixtral", "opt", "vit"]


def both(model, layers="all", kind: str = "dirichlet", **options):
    model = stock(model) if isinstance(model, str) else copy.deepcopy(model)
    options = {"kl_weight": 0.1, "train": "all", **options}
    torch.manual_seed(11)
    model = variationalize(model, eve=centered(), attention=attention(kind, "query"), layers=layers, **options)
    return move(model)


def sampled(model, inputs, pairs=None, samples=SAMPLES, **options):
    with posterior_noise(UnitNoise(pairs)):
        return model(**inputs, num_posterior_samples=samples, **options)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_mean_pass_is_the_stock_model(name):
    plain, inputs = stock(name), given(name, padding=2)
    wanted = targets(name, inputs)
    model = both(plain, [0, 2])
    assert model.posterior_sites == [(0, "ffn"), (2, "ffn"), (0, "attention"), (2, "attention")]
    out, expected = model(**inputs, **wanted), plain(**inputs, **wanted)
    assert torch.equal(out.logits, expected.logits) and torch.equal(out.nll, expected.loss)
    assert out.kl_per_layer.shape == (2,)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_kl_is_the_sum_of_both(name):
    """The mean pass computes each as it does alone."""
    plain, inputs = stock(name), given(name, padding=2)
    wanted = targets(name, inputs)
    model = both(plain, [1, 2])
    out = model(**inputs, **wanted, output_posteriors=True)
    parts = []
    for options in ({"eve": centered()}, {"attention": attention("dirichlet", "query")}):
        alone = variationalize(copy.deepcopy(plain), layers=[1, 2], **options)
        alone.load_state_dict(model.state_dict(), strict=False)
        assert added(alone).keys() < added(model).keys()
        parts.append(alone(**inputs, **wanted, output_posteriors=True))
    torch.testing.assert_close(out.kl_per_layer, parts[0].kl_per_layer + parts[1].kl_per_layer)
    torch.testing.assert_close(out.loss, out.nll + 0.1 * (parts[0].kl + parts[1].kl))
    for layer in (1, 2):
        torch.testing.assert_close(out.posteriors[layer].kl, parts[0].posteriors[layer].kl)
        alone = parts[1].attention_posteriors[layer].kl
        torch.testing.assert_close(out.attention_posteriors[layer].kl, alone)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layers", ["all", [1]], ids=str)
def test_samples_are_a_loop_over_single_samples(name, layers):
    model, inputs = both(name, layers), given(name, padding=2)
    wanted = targets(name, inputs)
    out = sampled(model, inputs, **wanted)
    singles = [sampled(model, inputs, grid(2, [sample]), 1, **wanted) for sample in range(SAMPLES)]
    expected = torch.stack([one.logits.double().exp() for one in singles]).mean(0).log().float()
    kept = attended(name, inputs)
    torch.testing.assert_close(out.logits[kept], expected[kept], atol=2e-5, rtol=1e-4)
    for field in ("nll", "kl", "kl_per_layer", "loss"):
        mean = torch.stack([one[field] for one in singles]).mean(0)
        torch.testing.assert_close(out[field], mean, atol=2e-5, rtol=1e-4)
    ours = list(added_parameters(model).values())
    assert all(grad.abs().max() > 0 for grad in torch.autograd.grad(out.nll, ours, retain_graph=True))
    expected = gradients(model, sum(one.loss for one in singles) / SAMPLES)
    assert_same_gradients(gradients(model, out.loss), expected, 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_greedy_is_a_loop_of_full_passes(name):
    model, inputs = both(name, [1, 2]), given(name, length=6, padding=2, positions=False)
    options = {"do_sample": False, "max_new_tokens": 5, "num_posterior_samples": SAMPLES}
    with posterior_noise(UnitNoise()):
        result = model.generate(**inputs, return_dict_in_generate=True, output_logits=True, **options)
    ids, mask, log_p = inputs["input_ids"], inputs["attention_mask"], []
    for _ in range(5):
        whole = {"input_ids": ids, "attention_mask": mask, "position_ids": positions_of(mask)}
        log_p.append(sampled(model, whole, use_cache=False).logits[:, -1])
        ids = torch.cat([ids, log_p[-1].argmax(-1, keepdim=True)], 1)
        mask = F.pad(mask, (0, 1), value=1)
    torch.testing.assert_close(torch.stack(result.logits, 1), torch.stack(log_p, 1), atol=5e-5, rtol=1e-4)
    assert torch.equal(result.sequences, ids)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert-masked"])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_loaded_and_back_again(name, kind, tmp_path):
    plain, inputs = stock(name), given(name, padding=2)
    model = both(plain, [1, 2], kind)
    expected = answer(sampled(model, inputs))
    model.save_pretrained(tmp_path)
    auto = hf.AutoModelForMaskedLM if name == "bert-masked" else hf.AutoModelForCausalLM
    again = auto.from_pretrained(tmp_path)
    assert type(again) is type(model) and again.settings == model.settings
    assert again.config._attn_implementation == "variational"
    torch.testing.assert_close(answer(sampled(again, inputs)), expected, atol=1e-5, rtol=1e-5)
    back = to_deterministic(again)
    assert type(back) is type(plain) and back.config._attn_implementation == "sdpa"
    assert back.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(answer(back(**inputs)), answer(plain(**inputs)), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_rows_split_before_the_attention_that_is_variational():
    model, inputs, rows = both("llama", [1, 2]), given("llama"), []
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[0]))
    out = model(**inputs, num_posterior_samples=SAMPLES, output_attentions=True, use_cache=True)
    assert rows == [2, 2 * SAMPLES, 2 * SAMPLES]
    assert [weights.shape[0] for weights in out.attentions] == rows
    assert [layer.keys.shape[0] for layer in out.past_key_values.layers] == rows


@pytest.mark.parametrize("name", ["gptj", "bloom", "falcon", "falcon-alibi", "t5", "t5-encoder"])
@pytest.mark.parametrize("eve", [None, "with units"])
def test_families_without_the_attention_interface_are_refused(name, eve):
    plain, inputs = stock(name), given(name)
    before = plain.config.to_dict()
    with pytest.raises(ValueError, match="attention interface"):
        variationalize(plain, eve=centered() if eve else None, attention=attention())
    assert type(plain) is TINY[name].model and not added(plain) and plain.config.to_dict() == before
    assert not any(module._forward_pre_hooks for module in plain.modules())
    assert all(parameter.requires_grad for parameter in plain.parameters())
    assert torch.equal(answer(plain(**inputs)), answer(stock(name)(**inputs)))


def test_attention_alone_adds_no_units():
    model = variationalize(stock("llama"), attention=attention())
    assert model.settings.eve is None and model.settings.eve_layers == []
    assert model.settings.attention_layers == [0, 1, 2]
    assert all(".posterior." in key for key in added(model))
    out = model(**given("llama"), num_posterior_samples=2, labels=torch.ones(2, LENGTH, dtype=torch.long))
    assert out.kl > 0 and out.logits.shape[:2] == (2, LENGTH)
