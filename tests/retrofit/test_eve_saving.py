"""A saved retrofit is an ordinary checkpoint: the Auto classes load it, the stock class reads it, and names stay."""

import json
import pickle
import subprocess
import sys

import pytest
import torch
import transformers as hf
from eve_families import EVERY, FEW, TINY, added, answer, attended, given, is_added, retrofitted, stock
from eve_reference import UnitNoise
from safetensors.torch import load_file

import hf_variational
from hf_variational import posterior_noise, to_deterministic, variational_class, variationalize

AUTO = {
    "next": hf.AutoModelForCausalLM,
    "masked": hf.AutoModelForMaskedLM,
    "tokens": hf.AutoModelForTokenClassification,
    "single": hf.AutoModelForSequenceClassification,
    "translation": hf.AutoModelForSeq2SeqLM,
}
SAMPLES = 3


def auto_class(name: str):
    return hf.AutoModelForImageClassification if name == "vit" else AUTO[TINY[name].task]


def made_name(stock_name: str) -> str:
    return f"Variational{stock_name.replace('LMHeadModel', 'ForCausalLM')}"


def noisy(model, inputs):
    with posterior_noise(UnitNoise()):
        return answer(model(**inputs, num_posterior_samples=SAMPLES))


def assert_same(name: str, actual, expected, inputs) -> None:
    kept = attended(name, inputs) if TINY[name].task else slice(None)
    torch.testing.assert_close(actual[kept], expected[kept], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in EVERY if TINY[name].task])
def test_auto_class_loads_what_was_saved(name, tmp_path):
    plain, inputs, tiny = stock(name), given(name, padding=2), TINY[name]
    model = retrofitted(plain, layers=[0, 2], num_posterior_samples=2, objective="mc_nll")
    expected = noisy(model, inputs)
    model.save_pretrained(tmp_path)
    again, info = auto_class(name).from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is type(model) is variational_class(tiny.model)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert not again.training and again.settings == model.settings
    assert again.settings.eve_layers == [0, 2] and again.settings.objective == "mc_nll"
    assert again.state_dict().keys() == model.state_dict().keys()
    for key, value in again.state_dict().items():
        assert torch.equal(model.state_dict()[key], value) and value.dtype == model.state_dict()[key].dtype, key
    assert_same(name, answer(again(**inputs)), answer(plain(**inputs)), inputs)
    assert_same(name, noisy(again, inputs), expected, inputs)


@torch.no_grad()
def test_encoder_alone_loads_what_was_saved(tmp_path):
    model, inputs = retrofitted("t5-encoder", layers=[1]), given("t5-encoder")
    model.save_pretrained(tmp_path)
    again = variational_class(hf.T5EncoderModel).from_pretrained(tmp_path)
    assert again.settings == model.settings
    torch.testing.assert_close(noisy(again, inputs), noisy(model, inputs))


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in EVERY if TINY[name].task])
def test_names(name, tmp_path):
    tiny, model = TINY[name], retrofitted(name)
    made = made_name(tiny.model.__name__)
    assert type(model).__name__ == made and getattr(hf_variational, made) is type(model)
    assert type(model) is variational_class(tiny.model) and issubclass(type(model), tiny.model)
    config = type(model.config)
    assert config.__name__ == f"Variational{tiny.config.__name__}" and issubclass(config, tiny.config)
    assert config.model_type == model.config.model_type == f"variational_{tiny.model_type}"
    stock(name).save_pretrained(tmp_path / "stock")
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == f"variational_{tiny.model_type}" and saved["architectures"] == [made]
    assert saved["variational"]["eve_layers"] == list(range(tiny.depth))
    assert saved["variational"]["version"] == hf_variational.__version__
    assert type(hf.AutoConfig.from_pretrained(tmp_path)) is config
    assert {item.name for item in tmp_path.iterdir()} >= {"config.json", "model.safetensors"}
    assert not list(tmp_path.glob("*.bin"))
    # A configuration that was read carries its model_type in the instance too.
    loaded = tiny.model.from_pretrained(tmp_path)
    assert type(loaded.config).model_type == tiny.model_type
    loaded = variationalize(auto_class(name).from_pretrained(tmp_path / "stock"), layers=[0])
    assert loaded.config.model_type == config.model_type
    assert to_deterministic(loaded).config.model_type == tiny.model_type
    # Of some families transformers stores other names than the modules have.
    stored = load_file(tmp_path / "model.safetensors")
    if tiny.model_type not in ("mixtral", "vit"):
        assert {key for key in stored if is_added(key)} == set(added(model))
    kept = load_file(tmp_path / "stock" / "model.safetensors")
    assert {key for key in stored if not is_added(key)} == set(kept)
    assert all(torch.equal(stored[key], value) for key, value in kept.items())


@torch.no_grad()
@pytest.mark.parametrize("name", EVERY)
def test_stock_class_reads_our_files(name, tmp_path):
    plain, inputs, tiny = stock(name), given(name, padding=2), TINY[name]
    model = retrofitted(plain)
    model.save_pretrained(tmp_path)
    read, info = tiny.model.from_pretrained(tmp_path, output_loading_info=True)
    assert type(read) is tiny.model and not info["missing_keys"] and not info["mismatched_keys"]
    assert set(info["unexpected_keys"]) == set(added(model))
    assert_same(name, answer(read(**inputs)), answer(plain(**inputs)), inputs)


@torch.no_grad()
@pytest.mark.parametrize("name", EVERY)
def test_ours_reads_stock_files(name, tmp_path):
    plain, inputs, tiny = stock(name), given(name, padding=2), TINY[name]
    plain.save_pretrained(tmp_path)
    model = variational_class(tiny.model).from_pretrained(tmp_path)
    assert type(model) is variational_class(tiny.model)
    assert model.state_dict().keys() == plain.state_dict().keys() and model.posterior_sites == []
    assert_same(name, answer(model(**inputs)), answer(plain(**inputs)), inputs)
    with pytest.raises(ValueError, match="variationalize"):
        model(**inputs, num_posterior_samples=2)
    model = variationalize(model, layers=[1])
    assert model.settings.eve_layers == [1] and type(model.config).model_type == f"variational_{tiny.model_type}"
    assert_same(name, answer(model(**inputs)), answer(plain(**inputs)), inputs)


@torch.no_grad()
@pytest.mark.parametrize("name", FEW)
def test_saved_twice(name, tmp_path):
    """What was loaded is saved and loaded again."""
    model, inputs = retrofitted(name, layers=[1]), given(name)
    model.save_pretrained(tmp_path / "first")
    auto_class(name).from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    again = auto_class(name).from_pretrained(tmp_path / "second")
    torch.testing.assert_close(noisy(again, inputs), noisy(model, inputs))
    one, other = (json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("first", "second"))
    assert one == other


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "llama", "llama-single", "mixtral", "t5", "bert-single", "vit"])
def test_back_to_the_stock_class_after_loading(name, tmp_path):
    """Of every module, also where a head builds its base model through an Auto class."""
    plain, inputs = stock(name), given(name, padding=2)
    retrofitted(plain).save_pretrained(tmp_path / "ours")
    back = to_deterministic(auto_class(name).from_pretrained(tmp_path / "ours"))
    assert type(back) is type(plain)
    for (key, module), (_, expected) in zip(back.named_modules(), plain.named_modules(), strict=True):
        assert type(module) is type(expected), key
    back.save_pretrained(tmp_path / "stock")
    saved = json.loads((tmp_path / "stock" / "config.json").read_text())
    assert saved["model_type"] == TINY[name].model_type and "variational" not in saved
    assert saved["architectures"] == [TINY[name].model.__name__]
    read, info = auto_class(name).from_pretrained(tmp_path / "stock", output_loading_info=True)
    assert type(read) is type(plain) and not info["unexpected_keys"] and not info["missing_keys"]
    assert_same(name, answer(read(**inputs)), answer(plain(**inputs)), inputs)


@torch.no_grad()
def test_file_without_its_posteriors_starts_them_anew(tmp_path):
    """As a head that is missing would; transformers reports the names."""
    model = retrofitted("llama", layers=[1])
    kept = {key: value for key, value in model.state_dict().items() if not is_added(key)}
    model.save_pretrained(tmp_path, state_dict=kept)
    again, info = hf.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == set(added(model))
    fresh = retrofitted("llama", layers=[1], moved=False)
    for key, value in added(again).items():
        if not key.endswith("scale_down"):
            assert torch.equal(value, added(fresh)[key]), key
    assert noisy(again, given("llama")).isfinite().all()


PROGRAM = """
import pickle, sys, torch, transformers
import hf_variational
folder, samples = sys.argv[1], int(sys.argv[2])
for name, stored in torch.load(folder + "/expected.pt").items():
    auto = getattr(transformers, stored["auto"])
    model = auto.from_pretrained(folder + "/" + name)
    assert type(model).__name__ == stored["class"], type(model)
    torch.manual_seed(1)
    with torch.no_grad():
        logits = model(**stored["inputs"], num_posterior_samples=samples).logits
        ids = model.generate(**stored["prompt"], max_new_tokens=4, do_sample=False) if stored["prompt"] else None
    assert torch.allclose(logits, stored["logits"], atol=1e-5), name
    assert ids is None or torch.equal(ids, stored["ids"]), name
with open(folder + "/model.pickle", "rb") as file:
    model = pickle.load(file)
torch.manual_seed(1)
logits = model(**stored["inputs"], num_posterior_samples=samples).logits
assert torch.allclose(logits, stored["logits"], atol=1e-5), name
print("same")
"""


@torch.no_grad()
def test_fresh_process(tmp_path):
    """Another process, which imports the package and the Auto classes, draws the same samples under the same seed."""
    expected = {}
    for name in ("gpt2", "llama", "mixtral", "gemma3_text", "opt", "t5", "bert-masked", "roberta-tokens", "vit"):
        model, inputs = retrofitted(name), given(name, padding=2)
        model.save_pretrained(tmp_path / name)
        prompt = {} if name not in ("gpt2", "opt", "t5") else {"input_ids": inputs["input_ids"][1:]}
        torch.manual_seed(1)
        expected[name] = {
            "auto": auto_class(name).__name__,
            "class": made_name(TINY[name].model.__name__),
            "inputs": inputs,
            "logits": model(**inputs, num_posterior_samples=SAMPLES).logits,
            "prompt": prompt,
            "ids": model.generate(**prompt, max_new_tokens=4, do_sample=False) if prompt else None,
        }
    torch.save(expected, tmp_path / "expected.pt")
    # The last model of the loop.
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(model))
    run = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", PROGRAM, str(tmp_path), str(SAMPLES)],
        capture_output=True,
        text=True,
    )
    assert run.stdout.strip() == "same", run.stderr
    for noise in ("newly initialized", "not used when initializing", "Unrecognized", "not supported"):
        assert noise not in run.stderr, run.stderr


@torch.no_grad()
def test_number_of_samples_travels_in_the_generation_config(tmp_path):
    model, inputs = retrofitted("gpt2"), given("gpt2", length=6)
    model.generation_config.num_posterior_samples = 2
    model.save_pretrained(tmp_path)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    prompt = {"input_ids": inputs["input_ids"], "max_new_tokens": 4, "do_sample": False}
    torch.manual_seed(3)
    expected = model.generate(**prompt, num_posterior_samples=2)
    torch.manual_seed(3)
    assert torch.equal(again.generate(**prompt), expected)


@torch.no_grad()
def test_half_precision_file_and_sharded_file(tmp_path):
    """log sigma stays in float32, whatever the rest is loaded in."""
    model = retrofitted("llama")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for key, value in again.state_dict().items():
        expected = torch.float32 if is_added(key) else torch.bfloat16
        assert value.dtype == expected, key
        if is_added(key):
            assert torch.equal(value, model.state_dict()[key])
    assert again(**given("llama"), num_posterior_samples=2).logits.isfinite().all()


@torch.no_grad()
def test_base_model_loads_from_the_file_of_a_head(tmp_path):
    for name in ("gpt2", "bert-masked"):
        model, inputs = retrofitted(name), given(name)
        model.save_pretrained(tmp_path / name)
        base = hf.AutoModel.from_pretrained(tmp_path / name)
        assert type(base) is variational_class(type(stock(name).base_model))
        with posterior_noise(UnitNoise()):
            out = model(**inputs, num_posterior_samples=SAMPLES, output_hidden_states=True)
        torch.testing.assert_close(noisy(base, inputs), out.hidden_states[-1])


@torch.no_grad()
def test_another_head_on_a_retrofitted_encoder(tmp_path):
    """The usual way to fine-tune: a new head, and everything below it as it was saved."""
    model = retrofitted("bert-masked", layers=[1])
    model.save_pretrained(tmp_path)
    again, info = hf.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, num_labels=3, output_loading_info=True
    )
    assert type(again).__name__ == "VariationalBertForSequenceClassification"
    assert not any(is_added(key) for key in info["missing_keys"])
    for key, value in added(again).items():
        assert torch.equal(value, model.state_dict()[key])
    out = again(**given("bert-single"), labels=torch.tensor([0, 2]), num_posterior_samples=2)
    assert out.logits.shape == (2, 3) and out.loss.isfinite()
