"""Auto classes, and configurations and checkpoints that survive being written and read."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from integration_models import RowNoise, eve_config, prompt, tiny_config, tiny_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from hf_variational import (
    EVEConfig,
    VariationalGPTConfig,
    VariationalGPTForCausalLM,
    VariationalGPTModel,
    posterior_noise,
)

# Every field away from its default; scale_rank apart, each value is one that the field's neighbours allow.
UNUSUAL = {
    "mean": "gain",
    "scale": "unit",
    "scale_rank": 5,
    "latent_dim": 3,
    "pool": "sum_sqrtk",
    "noise": "sequence",
    "prior": "autoregressive",
    "prior_scale": 0.7,
    "autoregressive_coefficient": 0.4,
    "learn_autoregressive_coefficient": True,
    "initial_scale": 0.03,
    "log_scale_min": -7.5,
    "log_scale_max": 1.5,
    "reconstruction_weight": 0.25,
}


def unusual_eve(name: str) -> EVEConfig:
    values = {name: UNUSUAL[name]}
    if name == "scale":
        values["scale_rank"] = None
    if name == "learn_autoregressive_coefficient":
        values["prior"] = "autoregressive"
    return EVEConfig(**values)


def test_every_field_has_an_unusual_value():
    assert set(UNUSUAL) == {field.name for field in dataclasses.fields(EVEConfig)}
    default = EVEConfig()
    assert all(getattr(default, name) != value for name, value in UNUSUAL.items())


@pytest.mark.parametrize("name", UNUSUAL)
def test_every_eve_field_survives(name, tmp_path):
    config = tiny_config(eve=unusual_eve(name))
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded.eve, EVEConfig)
    assert loaded.eve == config.eve
    assert getattr(loaded.eve, name) == UNUSUAL[name]
    assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()


@pytest.mark.parametrize(
    "fields",
    [
        {"eve": None},
        {"variational_layers": [0, 2]},
        {"kl_weight": 0.5},
        {"objective": "mc_nll"},
        {"num_posterior_samples": 4},
        {"eve": EVEConfig(scale_rank=None)},
    ],
    ids=str,
)
def test_every_model_field_survives(fields, tmp_path):
    config = tiny_config(**fields)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    for name, value in fields.items():
        assert getattr(loaded, name) == value
    text = config.to_json_string(use_diff=False)
    assert VariationalGPTConfig.from_dict(json.loads(text)).to_dict() == config.to_dict()
    assert json.loads(config.to_json_string())["model_type"] == "variational_gpt"


def test_eve_as_a_dictionary():
    assert tiny_config(eve={"mean": "gain", "prior": "centered"}).eve == EVEConfig(mean="gain", prior="centered")
    assert VariationalGPTConfig().eve == EVEConfig()
    assert tiny_config(eve={}).eve == EVEConfig()


def test_each_config_has_an_eve_config_of_its_own():
    first, second = VariationalGPTConfig(), VariationalGPTConfig()
    first.eve.prior_scale = 3.0
    assert second.eve.prior_scale == 1.0


@pytest.mark.parametrize(
    "override",
    [
        {"eve": {"scale": "unit", "prior": "centered"}},
        {"eve": None},
        {"variational_layers": [1]},
        {"kl_weight": 0.5, "objective": "mc_nll", "num_posterior_samples": 3},
    ],
    ids=str,
)
def test_fields_given_when_loading(override, tmp_path):
    tiny_config().save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path, **override)
    expected = tiny_config(**override)
    for name in override:
        assert getattr(loaded, name) == getattr(expected, name)
    VariationalGPTForCausalLM(loaded)


@pytest.mark.parametrize("override", [{"variational_layers": [7]}, {"objective": "x"}, {"num_posterior_samples": -1}])
def test_fields_given_when_loading_are_checked(override, tmp_path):
    tiny_config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=str(next(iter(override)))):
        AutoConfig.from_pretrained(tmp_path, **override)


@pytest.mark.parametrize(
    ("auto", "expected"), [(AutoModel, VariationalGPTModel), (AutoModelForCausalLM, VariationalGPTForCausalLM)]
)
def test_from_config(auto, expected):
    assert type(auto.from_config(tiny_config())) is expected
    assert type(AutoConfig.for_model("variational_gpt")) is VariationalGPTConfig


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"eve": None},
        {"tie_word_embeddings": True},
        {"variational_layers": [1]},
        {"eve": eve_config(mean="linear", prior="centered", latent_dim=2, reconstruction_weight=0.1)},
        {"eve": eve_config(mean="gain", scale="input", scale_rank=None, prior="standard")},
    ],
    ids=str,
)
def test_saved_and_loaded_is_equal(options, tmp_path):
    model = tiny_model(**options)
    for name, buffer in model.named_buffers():
        if name.endswith("prior_log_scale"):  # calibrated on data, so it must travel
            buffer.fill_(-0.3)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*.safetensors")} == {"model.safetensors"}
    assert not list(tmp_path.glob("*.bin"))
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    state, expected = loaded.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    for name in expected:
        assert torch.equal(state[name], expected[name]), name
    assert not loaded.training
    labels = prompt()
    samples = 0 if options.get("eve", True) is None else 2
    outputs = []
    for each in (model, loaded):
        with posterior_noise(RowNoise()):
            outputs.append(each(labels, labels=labels, num_posterior_samples=samples))
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    assert torch.equal(outputs[0].loss, outputs[1].loss)


def test_saved_in_shards(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "options",
    [{"device_map": "auto"}, {"device_map": "cpu"}, {"low_cpu_mem_usage": True}, {"attn_implementation": "eager"}],
    ids=str,
)
def test_ways_of_loading(options, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    torch.testing.assert_close(loaded(prompt()).logits, model(prompt()).logits, atol=1e-5, rtol=1e-5)
    assert loaded(prompt(), num_posterior_samples=2).logits.isfinite().all()


def test_layers_kept_on_disk(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    places = dict.fromkeys(("embed_tokens", "norm", "rotary_emb", "layers.0"), "cpu")
    places.update(dict.fromkeys(("layers.1", "layers.2"), "disk"))
    device_map = {"lm_head": "cpu", **{f"model.{name}": place for name, place in places.items()}}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    outputs = []
    for each in (model, loaded):
        with torch.no_grad(), posterior_noise(RowNoise()):
            outputs.append(each(prompt(), labels=prompt(), num_posterior_samples=2))
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    assert torch.equal(outputs[0].loss, outputs[1].loss)


IN_A_FRESH_PROCESS = """
import sys, torch
import hf_variational
from transformers import AutoModelForCausalLM
assert "datasets" not in sys.modules, "a user of a checkpoint does not need datasets"
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
expected = torch.load(sys.argv[2], weights_only=True)
assert not model.training
assert torch.equal(model(expected["ids"]).logits, expected["logits"])
out = model.generate(expected["ids"], max_new_tokens=2, num_posterior_samples=2, output_uncertainty=True,
                     return_dict_in_generate=True)
print(type(model).__name__, tuple(out.uncertainty.mutual_information.shape))
"""


def test_loads_in_a_fresh_process(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    torch.save({"ids": prompt(), "logits": model(prompt()).logits.detach()}, tmp_path / "expected.pt")
    command = [sys.executable, "-c", IN_A_FRESH_PROCESS, str(tmp_path), str(tmp_path / "expected.pt")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "VariationalGPTForCausalLM (2, 2)"


def test_what_a_user_gets(tmp_path):
    config = VariationalGPTConfig(
        vocab_size=512,
        hidden_size=64,
        num_hidden_layers=6,
        num_attention_heads=8,
        intermediate_size=128,
        eve=EVEConfig(prior="empirical", scale="input", scale_rank=8),
    )
    model = AutoModelForCausalLM.from_config(config)
    ids = torch.randint(3, 512, (2, 10))
    mask = torch.ones_like(ids)
    out = model(
        ids, attention_mask=mask, labels=ids, num_posterior_samples=4, output_uncertainty=True, output_posteriors=True
    )
    for name in ("loss", "nll", "kl"):
        assert out[name].shape == ()
    assert out.logits.shape == (2, 10, 512)
    torch.testing.assert_close(out.logits.logsumexp(-1), torch.zeros(2, 10), atol=1e-5, rtol=0)
    measures = ("mutual_information", "predictive_entropy", "expected_entropy", "conditional_variance")
    for name in (*measures, "token_variance", "top1_flip_rate"):
        assert getattr(out.uncertainty, name).shape == (2, 10)
    assert sorted(out.posteriors) == list(range(6))
    for statistics in out.posteriors.values():
        assert statistics.kl.shape == (2, 10)
        for name in ("scale", "mean_energy", "kl_per_unit"):
            assert getattr(statistics, name).shape == (128,)
    # no target at the last position, so it carries no KL: what is counted in the loss is the rest
    total = sum(statistics.kl[:, :-1].sum() for statistics in out.posteriors.values())
    torch.testing.assert_close(out.kl, total / 18)
    generated = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=8,
        num_posterior_samples=8,
        return_dict_in_generate=True,
        output_uncertainty=True,
    )
    assert generated.uncertainty.mutual_information.shape == (2, generated.sequences.shape[1] - 10)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
