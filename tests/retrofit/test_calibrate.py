"""Priors and scales from data: moments against brute force, what is set from them, and what is refused."""

import copy
import math

import pytest
import torch
import transformers as hf
from eve_families import stock
from torch import nn

from hf_variational import EVEConfig, calibrate_prior, variationalize
from hf_variational.retrofit.experts import ExpertsEVE
from hf_variational.retrofit.families import find_projections
from hf_variational.retrofit.ffn import eve_modules

LENGTH, VOCAB = 12, 64


def sequences(count: int = 10, seed: int = 0, shortest: int = 4) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, LENGTH + 1, (count,), generator=generator).tolist()
    return [{"input_ids": torch.randint(3, VOCAB, (length,), generator=generator).tolist()} for length in lengths]


def activations(model, rows, layer: int) -> torch.Tensor:
    """What enters a layer's W_out, a sequence at a time, [tokens, units]."""
    heard = []
    handle = find_projections(model)[layer].register_forward_pre_hook(
        lambda module, args: heard.append(args[0].reshape(-1, args[0].shape[-1]))
    )
    with torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor([row["input_ids"]]))
    handle.remove()
    return torch.cat(heard).double()


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gptj", "bert-masked"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_moments_are_those_of_every_token_but_padding(name, batch_size):
    plain, rows = stock(name), sequences()
    expected = activations(copy.deepcopy(plain), rows, 1)
    config = EVEConfig(prior="empirical", scale="unit")
    model = calibrate_prior(
        variationalize(plain, eve=config, layers=[1]), rows, scale=0.2, batch_size=batch_size, progress=False
    )
    eve = eve_modules(model)[1]
    torch.testing.assert_close(eve.prior_mean.double(), expected.mean(0), rtol=1e-4, atol=1e-5)
    deviation = expected.var(0, correction=0).sqrt()
    deviation = deviation.clamp(min=1e-3 * deviation.square().mean().sqrt())
    torch.testing.assert_close(eve.prior_log_scale.exp().double(), deviation, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(eve.log_scale.exp().double(), 0.2 * deviation, rtol=1e-3, atol=1e-6)


def test_every_way_to_hold_a_data_set(tmp_path):
    rows = sequences()
    wanted = None
    batches = [{"input_ids": torch.tensor([row["input_ids"]])} for row in rows]
    datasets = pytest.importorskip("datasets")
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    for dataset in (rows, batches, iter(rows), datasets.Dataset.from_list(rows), loader):
        model = calibrate_prior(variationalize(stock("llama")), dataset, progress=False)
        found = eve_modules(model)[0].log_scale.detach()
        wanted = found if wanted is None else wanted
        torch.testing.assert_close(found, wanted)


def test_only_the_first_sequences_and_tokens_are_read():
    rows = sequences(shortest=LENGTH)
    few = calibrate_prior(variationalize(stock("llama")), rows[:3], progress=False)
    limited = calibrate_prior(variationalize(stock("llama")), rows, max_sequences=3, progress=False)
    torch.testing.assert_close(eve_modules(limited)[0].log_scale, eve_modules(few)[0].log_scale)
    short = calibrate_prior(variationalize(stock("llama")), rows, max_length=5, progress=False)
    cut = [{"input_ids": row["input_ids"][:5]} for row in rows]
    torch.testing.assert_close(
        eve_modules(short)[0].log_scale,
        eve_modules(calibrate_prior(variationalize(stock("llama")), cut, progress=False))[0].log_scale,
    )


@pytest.mark.parametrize("scale", ["scalar", "unit", "input"])
@pytest.mark.parametrize("prior", ["standard", "empirical", "centered"])
def test_what_is_set(scale, prior):
    config = EVEConfig(scale=scale, prior=prior, initial_scale=0.5)
    model = variationalize(stock("llama"), eve=config)
    for eve in eve_modules(model).values():
        if scale == "input":
            nn.init.normal_(eve.scale_up)
    before = copy.deepcopy(model.state_dict())
    calibrate_prior(model, sequences(), scale=0.1, progress=False)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    ends = {name.rsplit(".", 1)[1] for name in changed}
    expected = {"log_scale"} | ({"scale_up"} if scale == "input" else set())
    expected |= {"empirical": {"prior_mean", "prior_log_scale"}, "centered": {"prior_log_scale"}}.get(prior, set())
    assert ends == expected and all(".eve." in name for name in changed)
    eve = eve_modules(model)[0]
    if prior == "centered":
        # a KL of 0 to begin with
        torch.testing.assert_close(eve.prior_log_scale, eve.log_scale.detach().expand_as(eve.prior_log_scale)) if (
            scale != "scalar"
        ) else None
        out = model(torch.tensor([sequences()[0]["input_ids"]]), labels=torch.tensor([sequences()[0]["input_ids"]]))
        assert scale == "scalar" or abs(out.kl.item()) < 1e-4


def test_latent_dimensions_share_the_unit_s_scale():
    model = variationalize(stock("llama"), eve=EVEConfig(latent_dim=3, scale="unit", pool="sum", prior="centered"))
    calibrate_prior(model, sequences(), progress=False)
    eve = eve_modules(model)[1]
    assert eve.log_scale.shape[1] == 3 and torch.equal(eve.log_scale[:, 0], eve.log_scale[:, 2])


def test_units_that_never_move_keep_a_little_noise():
    plain = stock("gpt2")
    with torch.no_grad():  # a unit that is always 0
        plain.transformer.h[1].mlp.c_fc.weight[:, 0] = 0.0
        plain.transformer.h[1].mlp.c_fc.bias[0] = 0.0
    model = calibrate_prior(variationalize(plain, layers=[1]), sequences(), scale=0.1, progress=False)
    scales = eve_modules(model)[1].log_scale.exp()
    assert 0 < scales[0] < 0.01 * scales[1:].mean() and scales.isfinite().all()


def test_experts_are_calibrated_apart():
    plain, rows = stock("mixtral"), sequences(20)
    model = calibrate_prior(
        variationalize(plain, eve=EVEConfig(prior="empirical", scale="unit"), layers=[2]), rows, progress=False
    )
    experts = find_projections(model)[2]
    eve = eve_modules(model)[2]
    assert isinstance(eve, ExpertsEVE) and eve.listener is None
    heard = {index: [] for index in range(len(eve))}
    eve.listener = lambda expert, h, token: heard[expert].append(h)
    with torch.no_grad():
        for row in rows:
            model(torch.tensor([row["input_ids"]]))
    eve.listener = None
    for index, one in enumerate(eve):
        h = torch.cat(heard[index]).double()
        torch.testing.assert_close(one.prior_mean.double(), h.mean(0), rtol=1e-4, atol=1e-5)
    assert not torch.equal(eve[0].prior_mean, eve[1].prior_mean) and experts.eve is eve


def test_towers_of_t5_are_masked_apart():
    plain = stock("t5")
    generator = torch.Generator().manual_seed(2)
    rows = []
    for source, target in ((6, 3), (9, 5), (4, 4)):
        ids = torch.randint(3, VOCAB, (source,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": torch.randint(3, VOCAB, (target,), generator=generator).tolist()})
    config = EVEConfig(prior="empirical", scale="unit")
    together = calibrate_prior(variationalize(copy.deepcopy(plain), eve=config), rows, batch_size=3, progress=False)
    apart = calibrate_prior(variationalize(plain, eve=config), rows, batch_size=1, progress=False)
    for index, eve in eve_modules(together).items():
        torch.testing.assert_close(eve.prior_mean, eve_modules(apart)[index].prior_mean, rtol=1e-3, atol=1e-5)


def test_mean_pass_and_mode_stay():
    model = variationalize(stock("llama")).train()
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = model(ids, num_posterior_samples=0).logits
    calibrate_prior(model, sequences(), progress=False)
    assert model.training and torch.equal(model(ids, num_posterior_samples=0).logits, expected)
    assert not find_projections(model)[0]._forward_pre_hooks.keys() - {eve_modules(model)[0].handle.id}


def test_texts_need_a_tokenizer():
    model = variationalize(stock("llama"))
    with pytest.raises(ValueError, match="give the tokenizer"):
        calibrate_prior(model, ["some text"], progress=False)


@pytest.mark.parametrize(
    ("dataset", "options", "named"),
    [
        ([], {}, "data set is empty"),
        ([{"words": [1]}], {}, "words.*neither input_ids nor pixel_values"),
        (sequences(), {"scale": 0.0}, "scale.*0.0"),
        (sequences(), {"scale": math.inf}, "scale.*inf"),
        (sequences(), {"prior_scale": -1.0}, "prior_scale.*-1.0"),
    ],
)
def test_bad_input(dataset, options, named):
    model = variationalize(stock("llama"))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=named):
        calibrate_prior(model, dataset, progress=False, **options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_models_without_units():
    with pytest.raises(ValueError, match="LlamaForCausalLM is not variational"):
        calibrate_prior(stock("llama"), sequences())
    from hf_variational import VariationalAttentionConfig

    model = variationalize(stock("llama"), attention=VariationalAttentionConfig("dirichlet"))
    with pytest.raises(ValueError, match="no variational units"):
        calibrate_prior(model, sequences())
    assert isinstance(model, hf.LlamaForCausalLM)
