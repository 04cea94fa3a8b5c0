"""Any Llama checkpoint loads here, and stock Llama reads ours."""

import json
import math

import pytest
import torch
from integration_models import RowNoise, eve_config, prompt, stock_llama, tiny_config, tiny_model
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM, LlamaModel

from hf_variational import (
    EVEConfig,
    VariationalGPTConfig,
    VariationalGPTForCausalLM,
    VariationalGPTModel,
    posterior_noise,
)


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def llama(request, tmp_path):
    model = stock_llama(tie_word_embeddings=request.param)
    model.save_pretrained(tmp_path / "llama")
    return model, tmp_path / "llama"


def variational_parameters(model):
    return {name: parameter for name, parameter in model.named_parameters() if ".eve." in name}


def assert_freshly_initialised(model):
    for index in model.variational_layers:
        eve = model.model.layers[index].mlp.eve
        assert torch.equal(eve.log_scale, torch.full_like(eve.log_scale, math.log(eve.config.initial_scale)))
        if eve.config.scale == "input":
            assert (eve.scale_up == 0).all()
            assert 0.01 < eve.scale_down.std() < 1
        if eve.config.prior == "empirical":
            assert (eve.prior_mean == 0).all()
            assert (eve.prior_log_scale == 0).all()


def test_llama_checkpoint_loads(llama):
    stock, directory = llama
    model = VariationalGPTForCausalLM.from_pretrained(directory)
    assert isinstance(model.config, VariationalGPTConfig)
    assert model.config.eve == EVEConfig()
    assert torch.equal(model(prompt()).logits, stock(prompt()).logits)
    assert_freshly_initialised(model)
    assert torch.equal(model.generate(prompt(), max_new_tokens=5), stock.generate(prompt(), max_new_tokens=5))


@pytest.mark.parametrize(
    "eve",
    [
        EVEConfig(mean="gain", scale="unit", prior="centered", prior_scale=0.3),
        EVEConfig(mean="linear", scale="scalar", prior="standard", initial_scale=0.02),
        EVEConfig(latent_dim=3, pool="sum", prior="autoregressive", reconstruction_weight=0.1),
    ],
    ids=lambda eve: eve.mean,
)
def test_llama_checkpoint_loads_with_other_neurons(llama, eve):
    stock, directory = llama
    model = VariationalGPTForCausalLM.from_pretrained(directory, eve=eve, variational_layers=[1, 2])
    assert model.config.eve == eve
    assert model.variational_layers == [1, 2]
    # every mean starts at mu = h; identity and gain compute h itself, linear multiplies by the unit matrix
    torch.testing.assert_close(model(prompt()).logits, stock(prompt()).logits, atol=1e-5, rtol=1e-5)
    assert_freshly_initialised(model)
    centred = [buffer for name, buffer in model.named_buffers() if name.endswith("prior_log_scale")]
    if eve.prior == "centered":
        assert len(centred) == 2
        assert all(torch.equal(buffer, torch.full_like(buffer, math.log(0.3))) for buffer in centred)


def test_llama_checkpoint_as_a_twin(llama):
    stock, directory = llama
    model = VariationalGPTForCausalLM.from_pretrained(directory, eve=None)
    assert model.config.eve is None
    assert model.variational_layers == []
    assert model.state_dict().keys() == stock.state_dict().keys()
    assert torch.equal(model(prompt()).logits, stock(prompt()).logits)


def test_config_made_from_a_llama_config(llama):
    stock, directory = llama
    config = VariationalGPTConfig(**{**stock.config.to_dict(), "eve": eve_config(), "variational_layers": [2]})
    model = VariationalGPTForCausalLM.from_pretrained(directory, config=config)
    assert torch.equal(model(prompt()).logits, stock(prompt()).logits)
    assert list({name.split(".")[2] for name in variational_parameters(model)}) == ["2"]


def test_model_type_changed_by_hand(llama):
    stock, directory = llama
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "model_type": "variational_gpt"}))
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert isinstance(model, VariationalGPTForCausalLM)
    assert torch.equal(model(prompt()).logits, stock(prompt()).logits)
    base = AutoModel.from_pretrained(directory)
    assert isinstance(base, VariationalGPTModel)
    assert torch.equal(base(prompt()).last_hidden_state, stock.model(prompt()).last_hidden_state)


def test_llama_checkpoint_saved_again_is_ours(llama, tmp_path):
    stock, directory = llama
    VariationalGPTForCausalLM.from_pretrained(directory).save_pretrained(tmp_path / "ours")
    saved = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert saved["model_type"] == "variational_gpt"
    assert saved["architectures"] == ["VariationalGPTForCausalLM"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert isinstance(model, VariationalGPTForCausalLM)
    assert torch.equal(model(prompt()).logits, stock(prompt()).logits)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("layers", [None, [1]], ids=["all layers", "one layer"])
def test_stock_llama_reads_our_weights(tmp_path, tied, layers):
    model = tiny_model(tie_word_embeddings=tied, variational_layers=layers)
    model.save_pretrained(tmp_path)
    stock, report = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert torch.equal(stock(prompt()).logits, model(prompt(), num_posterior_samples=0).logits)
    assert not report["missing_keys"]
    assert {name for name in report["unexpected_keys"] if ".eve." not in name} == set()
    base = LlamaModel.from_pretrained(tmp_path)
    assert torch.equal(base(prompt()).last_hidden_state, model.model(prompt()).last_hidden_state)


def test_twin_has_the_same_other_parameters():
    model, twin = tiny_model(), tiny_model(eve=None)
    ours = {name: value for name, value in model.state_dict().items() if ".eve." not in name}
    assert {name: value.shape for name, value in ours.items()} == {n: v.shape for n, v in twin.state_dict().items()}
    twin.load_state_dict(ours)
    assert torch.equal(twin(prompt()).logits, model(prompt()).logits)
    assert type(twin) is type(model)


def test_twin_trains_like_stock_llama():
    twin, stock = tiny_model(eve=None), stock_llama()
    stock.load_state_dict(twin.state_dict())
    labels = prompt()
    out, expected = twin.train()(labels, labels=labels), stock.train()(labels, labels=labels)
    assert torch.equal(out.loss, expected.loss)
    assert out.kl.shape == ()
    assert out.kl == 0
    assert torch.equal(out.nll, out.loss)
    out.loss.backward()
    expected.loss.backward()
    gradients = dict(stock.named_parameters())
    for name, parameter in twin.named_parameters():
        assert torch.equal(parameter.grad, gradients[name].grad), name


SMALL = {"num_hidden_layers": 6, "num_attention_heads": 8}
REALISTIC = [
    {**SMALL, "hidden_size": 256, "intermediate_size": 1024, "vocab_size": 4096},
    {**SMALL, "hidden_size": 384, "intermediate_size": 1536, "vocab_size": 8192},
    {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
]


@pytest.mark.parametrize("shape", REALISTIC, ids=lambda shape: f"width {shape['hidden_size']}")
def test_parameter_overhead_is_at_most_two_percent(shape):
    eve = EVEConfig(mean="identity", scale="input", scale_rank=8, prior="empirical")
    with torch.device("meta"):
        model = VariationalGPTForCausalLM(VariationalGPTConfig(**shape, eve=eve))
        twin = VariationalGPTForCausalLM(VariationalGPTConfig(**shape, eve=None))
    assert EVEConfig() == eve
    assert twin.num_parameters() < model.num_parameters() <= 1.02 * twin.num_parameters()


@pytest.mark.parametrize("layers", [[0], [2], [0, 2], [2, 1]])
def test_only_the_named_layers_are_variational(layers):
    model = tiny_model(variational_layers=layers)
    assert model.variational_layers == sorted(layers)
    assert {int(name.split(".")[2]) for name in variational_parameters(model)} == set(layers)
    labels = prompt()
    with posterior_noise(RowNoise()) as _:
        out = model(labels, labels=labels, num_posterior_samples=2, output_posteriors=True, output_hidden_states=True)
    assert sorted(out.posteriors) == sorted(layers)
    assert out.kl_per_layer.shape == (len(layers),)
    torch.testing.assert_close(out.kl_per_layer.sum(), out.kl)
    rows = [2 if index <= min(layers) else 4 for index in range(4)]
    assert [state.shape[0] for state in out.hidden_states] == rows


def test_layers_below_the_split_run_once():
    model = tiny_model(variational_layers=[2])
    seen = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["hidden_states"].shape[0]), with_kwargs=True
        )
    model(prompt(), num_posterior_samples=5)
    assert seen == [2, 2, 2]


def test_config_of_llama_fields_is_llamas():
    config, stock = tiny_config().to_dict(), stock_llama().config.to_dict()
    ours = {"eve", "variational_layers", "attention", "attention_layers", "kl_weight", "objective"}
    ours |= {"num_posterior_samples"}
    assert set(config) - set(stock) == ours
    same = set(stock) - {"model_type", "architectures"}
    assert {name: config[name] for name in same} == {name: stock[name] for name in same}
