"""Variational attention that is configured, saved, loaded, copied, compiled, checkpointed and trained."""

import copy
import dataclasses
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from integration_models import RowNoise, attention_config, prompt, stock_llama, tiny_config, tiny_model, twin_of
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, Trainer, TrainingArguments

from hf_variational import (
    VariationalAttentionConfig,
    VariationalGPTConfig,
    VariationalGPTForCausalLM,
    posterior_noise,
)

KINDS = ("gaussian", "approximate_dirichlet", "dirichlet")
DEPENDENT = (False, "query", True)
ROOT = Path(__file__).parents[2]

# transformers 5.23 renames the method and still calls the one of that name where a class has its own
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

# Every field away from its default.
UNUSUAL = {
    "kind": "approximate_dirichlet",
    "data_dependent": True,
    "hidden_size": 7,
    "prior": "uniform",
    "prior_scale": 0.3,
    "prior_concentration": 4.5,
    "initial_scale": 0.2,
    "initial_concentration": 250.0,
    "initial_raw": -7.0,
}


def model_of(kind="dirichlet", data_dependent="query", seed=0, **options):
    return tiny_model(seed, **{"attention": attention_config(kind, data_dependent), **options})


def sampled(model, samples=2, **options):
    ids = prompt()
    with posterior_noise(RowNoise()):
        return model(ids, labels=ids, num_posterior_samples=samples, **options)


def gradients(model) -> dict:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same_gradients(actual: dict, expected: dict, tolerance: float = 1e-5):
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        atol = tolerance * grad.abs().max().item() + 1e-8
        torch.testing.assert_close(
            actual[name], grad, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


class TestConfiguration:
    def test_every_field_has_an_unusual_value(self):
        assert set(UNUSUAL) == {field.name for field in dataclasses.fields(VariationalAttentionConfig)}
        default = VariationalAttentionConfig()
        assert all(getattr(default, name) != value for name, value in UNUSUAL.items())

    @pytest.mark.parametrize("name", UNUSUAL)
    def test_every_field_survives(self, name, tmp_path):
        config = tiny_config(attention=VariationalAttentionConfig(**{name: UNUSUAL[name]}), attention_layers=[0, 2])
        config.save_pretrained(tmp_path)
        loaded = AutoConfig.from_pretrained(tmp_path)
        assert isinstance(loaded.attention, VariationalAttentionConfig)
        assert loaded.attention == config.attention and getattr(loaded.attention, name) == UNUSUAL[name]
        assert type(getattr(loaded.attention, name)) is type(UNUSUAL[name])
        assert loaded.attention_layers == [0, 2] and loaded.attention_layer_indices() == [0, 2]
        assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()
        text = config.to_json_string(use_diff=False)
        assert VariationalGPTConfig.from_dict(json.loads(text)).to_dict() == config.to_dict()

    def test_dictionaries_and_none(self):
        values = {"kind": "gaussian", "data_dependent": False}
        assert tiny_config(attention=values).attention == VariationalAttentionConfig(**values)
        assert tiny_config(attention={}).attention == VariationalAttentionConfig()
        assert tiny_config().attention is None and tiny_config().attention_layer_indices() == []
        twin = tiny_config(eve=None)
        assert twin.variational_layer_indices() == [] and twin.to_dict()["attention"] is None

    def test_layers(self):
        config = tiny_config(attention={}, attention_layers=[2, 0], variational_layers=[1])
        assert config.attention_layer_indices() == [0, 2] and config.eve_layer_indices() == [1]
        assert config.variational_layer_indices() == [0, 1, 2]
        model = VariationalGPTForCausalLM(config)
        names = {name.split(".self_attn")[0] for name in model.state_dict() if ".posterior." in name}
        assert names == {"model.layers.0", "model.layers.2"}
        assert model.posterior_sites == [(1, "ffn"), (0, "attention"), (2, "attention")]

    @pytest.mark.parametrize(
        "override", [{"attention": {"kind": "gaussian"}}, {"attention": None}, {"attention_layers": [1]}], ids=str
    )
    def test_fields_given_when_loading(self, override, tmp_path):
        tiny_config(attention={}).save_pretrained(tmp_path)
        loaded, expected = (
            AutoConfig.from_pretrained(tmp_path, **override),
            tiny_config(**{"attention": {}, **override}),
        )
        for name in ("attention", "attention_layers"):
            assert getattr(loaded, name) == getattr(expected, name)
        VariationalGPTForCausalLM(loaded)

    def test_fields_given_when_loading_are_checked(self, tmp_path):
        tiny_config(attention={}).save_pretrained(tmp_path)
        for override in ({"attention_layers": [7]}, {"attention": {"kind": "x"}}):
            with pytest.raises(ValueError, match=r"attention_layers|kind"):
                AutoConfig.from_pretrained(tmp_path, **override)

    def test_config_of_an_earlier_version_has_no_attention(self):
        values = tiny_config().to_dict()
        del values["attention"], values["attention_layers"]
        assert VariationalGPTConfig.from_dict(values).attention is None


NETWORK = {"network_in", "network_bias", "network_out"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("data_dependent", DEPENDENT)
class TestSaveAndLoad:
    @pytest.mark.parametrize("options", [{}, {"eve": None, "attention_layers": [1, 2]}], ids=str)
    def test_saved_and_loaded_is_equal(self, kind, data_dependent, options, tmp_path):
        model = model_of(kind, data_dependent, **options)
        model.save_pretrained(tmp_path)
        loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report.values()) and not loaded.training
        state, expected = loaded.state_dict(), model.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in expected)
        for samples in (0, 2):
            outs = [sampled(each, samples) for each in (model, loaded)]
            assert torch.equal(outs[0].logits, outs[1].logits) and torch.equal(outs[0].loss, outs[1].loss)

    def test_names_in_the_file_stand_beside_the_pretrained_ones(self, kind, data_dependent, tmp_path):
        model_of(kind, data_dependent, eve=None, attention_layers=[1]).save_pretrained(tmp_path)
        assert [path.name for path in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
        assert not list(tmp_path.glob("*.bin"))
        with safe_open(tmp_path / "model.safetensors", "pt") as file:
            names = set(file.keys())
        ours = {"raw", *(NETWORK if data_dependent else ())}
        assert names - set(stock_llama().state_dict()) == {
            f"model.layers.1.self_attn.posterior.{name}" for name in ours
        }
        stock, report = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not report["missing_keys"]
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(stock(prompt()).logits, model(prompt()).logits)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_half_precision_keeps_the_posterior_in_float32(self, kind, data_dependent, dtype, tmp_path):
        model = model_of(kind, data_dependent)
        model.save_pretrained(tmp_path / "float32")
        half = AutoModelForCausalLM.from_pretrained(tmp_path / "float32", dtype=dtype)
        state = half.state_dict()
        for name, value in model.state_dict().items():
            if ".posterior." in name:
                assert state[name].dtype == torch.float32 and torch.equal(state[name], value), name
            elif ".eve." not in name:
                assert state[name].dtype == dtype, name
        half.save_pretrained(tmp_path / "half")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto").state_dict()
        assert all(torch.equal(again[name], state[name]) and again[name].dtype == state[name].dtype for name in state)

    def test_deterministic_checkpoint_becomes_variational(self, kind, data_dependent, tmp_path):
        """Only the posterior is missing, and it starts where a new one does."""
        twin = twin_of(model_of(kind, data_dependent))
        twin.save_pretrained(tmp_path)
        config = VariationalAttentionConfig(kind=kind, data_dependent=data_dependent, hidden_size=5)
        loaded, report = VariationalGPTForCausalLM.from_pretrained(
            tmp_path, attention=config, attention_layers=[0, 2], output_loading_info=True
        )
        ours = {"raw", *(NETWORK if data_dependent else ())}
        missing = {f"model.layers.{layer}.self_attn.posterior.{name}" for layer in (0, 2) for name in ours}
        assert set(report["missing_keys"]) == missing and not report["unexpected_keys"]
        assert torch.equal(loaded(prompt()).logits, twin(prompt()).logits)
        out = sampled(loaded, output_posteriors=True)
        value = 0.1 if kind == "gaussian" else 100.0
        for statistics in out.attention_posteriors.values():
            started = statistics.scale if kind == "gaussian" else statistics.concentration
            torch.testing.assert_close(started, torch.full((4,), value))

    def test_meta_device(self, kind, data_dependent):
        """A model laid out without memory has the layout of a real one."""
        config = tiny_config(attention=attention_config(kind, data_dependent))
        with torch.device("meta"):
            meta = VariationalGPTForCausalLM(config)
        real = {name: value.shape for name, value in VariationalGPTForCausalLM(config).state_dict().items()}
        assert {name: value.shape for name, value in meta.state_dict().items()} == real

    @pytest.mark.parametrize("after_a_pass", [False, True])
    def test_copies_work_alone(self, kind, data_dependent, after_a_pass):
        """Also once the first pass has installed the recording hooks, which a pickle then cannot hold."""
        model = model_of(kind, data_dependent)
        if after_a_pass:
            sampled(model)
            double = copy.deepcopy(model)
        else:
            double = pickle.loads(pickle.dumps(model))
        for each in (model, double):
            sampled(each, output_posteriors=True).loss.backward()
        assert_same_gradients(gradients(double), gradients(model))
        expected = sampled(model).loss
        with torch.no_grad():
            double.model.layers[0].self_attn.posterior.raw.add_(1.0)
        out = sampled(double, output_posteriors=True)
        assert sorted(out.attention_posteriors) == [0, 1, 2] and not torch.equal(out.loss, expected)
        assert torch.equal(sampled(model).loss, expected)


@pytest.mark.parametrize("size", [70, 50])
def test_resize_token_embeddings(size):
    model = model_of()
    model.resize_token_embeddings(size)
    ids = prompt() % size
    out = model(ids, labels=ids, num_posterior_samples=2, output_uncertainty=True)
    assert out.logits.shape == (2, 6, size) and out.loss.isfinite()
    out.loss.backward()
    assert model.generate(ids, max_new_tokens=3, num_posterior_samples=2).max() < size


PROGRAM = """
import os, sys, torch
from transformers import AutoConfig, AutoModelForCausalLM

*folders, result = sys.argv[1:]
out = {}
for folder in folders:
    attention = AutoConfig.from_pretrained(folder, **options).attention.to_dict()
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not model.training and not any(report.values()), report
    ids = torch.tensor([[1, 5, 9, 20, 33]])
    torch.manual_seed(7)
    sampled = model(ids, num_posterior_samples=3, output_attentions=True, labels=ids)
    torch.manual_seed(7)
    sequences = model.generate(ids, max_new_tokens=3, min_new_tokens=3, num_posterior_samples=2)
    model.save_pretrained(folder + "-again")
    out[os.path.basename(folder)] = {
        "module": type(model).__module__, "attention": attention, "mean": model(ids).logits, "samples": sampled.logits,
        "loss": sampled.loss, "weights": sampled.attentions[0], "sequences": sequences,
    }
torch.save(out, result)
"""
WITH_THE_PACKAGE = "import hf_variational\noptions = {}\n"
WITHOUT_THE_PACKAGE = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_variational":
            raise ImportError(f"{name} is not here")

sys.meta_path.insert(0, Blocker())
options = {"trust_remote_code": True}
"""


@pytest.fixture
def registered():
    """The classes as `register_for_auto_class` leaves them, for one test."""
    before = {cls: cls._auto_class for cls in (VariationalGPTForCausalLM, VariationalGPTConfig)}
    VariationalGPTForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    VariationalGPTConfig.register_for_auto_class()
    yield
    for cls, auto_class in before.items():
        cls._auto_class = auto_class


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("package", [True, False], ids=["with the package", "remote code"])
def test_a_fresh_process(package, tmp_path):
    """Every kind: config, weights, samples from the same seed, generation, and saving again."""
    models = {}
    for kind, data_dependent in [("gaussian", True), ("approximate_dirichlet", False), ("dirichlet", "query")]:
        models[kind] = model_of(kind, data_dependent)
        models[kind].save_pretrained(tmp_path / kind)
    result = tmp_path / "result.pt"
    # -I keeps the checkout and PYTHONPATH out; the blocker covers a package that is installed
    command = [sys.executable, *([] if package else ["-I"]), "-c"]
    command += [(WITH_THE_PACKAGE if package else WITHOUT_THE_PACKAGE) + PROGRAM]
    command += [*(str(tmp_path / kind) for kind in models), str(result)]
    path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(ROOT)]).strip(os.pathsep)
    environment = {
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": path,
    }
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **environment}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found, ids = torch.load(result, weights_only=True), torch.tensor([[1, 5, 9, 20, 33]])
    for kind, model in models.items():
        out = found[kind]
        assert out["module"].startswith("hf_variational." if package else "transformers_modules.")
        assert out["attention"] == model.config.attention.to_dict()
        torch.manual_seed(7)
        expected = model(ids, num_posterior_samples=3, output_attentions=True, labels=ids)
        torch.testing.assert_close(out["mean"], model(ids).logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(out["samples"], expected.logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(out["loss"], expected.loss, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(out["weights"], expected.attentions[0], rtol=1e-4, atol=1e-5)
        torch.manual_seed(7)
        sequences = model.generate(ids, max_new_tokens=3, min_new_tokens=3, num_posterior_samples=2)
        assert torch.equal(out["sequences"], sequences)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / f"{kind}-again").state_dict()
        assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("data_dependent", DEPENDENT)
class TestGradientCheckpointing:
    @pytest.mark.parametrize("samples", [0, 1, 3])
    @pytest.mark.parametrize("given", [True, False], ids=["given noise", "global generator"])
    def test_changes_nothing(self, kind, data_dependent, samples, given):
        model = model_of(kind, data_dependent, attention_dropout=0.2).train()
        expected = {}
        for checkpointed in (False, True):
            if checkpointed:
                model.gradient_checkpointing_enable()
            model.zero_grad()
            torch.manual_seed(5)
            ids = prompt()
            options = {"labels": ids, "num_posterior_samples": samples, "use_cache": False}
            if given:
                with posterior_noise(RowNoise()):
                    out = model(ids, **options)
            else:
                out = model(ids, **options)
            out.loss.backward()  # the noise source is gone: a recomputation must not need it
            expected.setdefault("loss", out.loss.detach())
            expected.setdefault("gradients", {name: grad.clone() for name, grad in gradients(model).items()})
            assert torch.equal(out.loss, expected["loss"])
            assert_same_gradients(gradients(model), expected["gradients"], tolerance=1e-6)
        raw = gradients(model)["model.layers.1.self_attn.posterior.raw"]
        assert raw.abs().max() > 0


class SameForEveryRow(RowNoise):
    """Noise of the position alone, so that it does not matter which batch a row is in."""

    def __call__(self, request):
        self.rows = [0] * request.batch
        return super().__call__(request)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("samples", [0, 2])
@pytest.mark.parametrize("free_bits", [0.0, 0.5])
def test_gradient_does_not_depend_on_accumulation(kind, samples, free_bits):
    model = model_of(kind, kl_weight=0.1).train()
    ids = prompt(6, 8)
    mask = (torch.arange(8) < torch.tensor([8, 3, 5, 7, 2, 8])[:, None]).long()
    labels = ids.masked_fill(mask == 0, -100)
    items, found = (labels[:, 1:] >= 0).sum(), []
    for steps in (1, 3, 6):
        model.zero_grad()
        losses = []
        for rows in torch.arange(6).chunk(steps):
            with posterior_noise(SameForEveryRow()):
                out = model(
                    ids[rows],
                    attention_mask=mask[rows],
                    labels=labels[rows],
                    num_posterior_samples=samples,
                    num_items_in_batch=items,
                    free_bits=free_bits,
                )
            out.loss.backward()
            losses.append(out.loss.detach())
        found.append((sum(losses), {name: grad.clone() for name, grad in gradients(model).items()}))
    for loss, grads in found[1:]:
        torch.testing.assert_close(loss, found[0][0])
        assert_same_gradients(grads, found[0][1], tolerance=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"bf16": True}], ids=str)
def test_plain_trainer(kind, options, tmp_path):
    """Three steps of a stock Trainer, whose reported loss goes down and whose posterior moves."""
    model = model_of(kind, kl_weight=0.01)
    before = copy.deepcopy(model.state_dict())
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        report_to=[],
        use_cpu=True,
        per_device_train_batch_size=4,
        max_steps=6,
        logging_steps=1,
        learning_rate=2e-2,
        save_strategy="no",
        disable_tqdm=True,
        seed=7,
        **options,
    )
    data = [{"input_ids": row, "labels": row} for row in prompt(8, 6)]
    trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert {name for name in before if ".posterior." in name} <= set(moved)
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.fixture
def compiled_model(request):
    """A model with its attention variational in the second of two layers."""
    torch._dynamo.reset()
    yield model_of(request.param, eve=None, attention_layers=[1], num_hidden_layers=2)
    torch._dynamo.reset()


@pytest.mark.parametrize("compiled_model", KINDS, indirect=True)
class TestCompile:
    def test_equals_the_plain_pass(self, compiled_model):
        """The plain operations of a compiler's one graph against the fused ones: loss, KL and gradients."""
        model, ids = compiled_model.train(), prompt()
        table, found = torch.randn(4, 4, 6, 6, 2, generator=torch.Generator().manual_seed(0)), []
        for function in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
            model.zero_grad()
            with posterior_noise(lambda request: table[..., : request.shape[-1]]):
                out = function(ids, labels=ids, num_posterior_samples=2, use_cache=False)
            out.loss.backward()
            found.append((out, {name: grad.clone() for name, grad in gradients(model).items()}))
        for name in ("loss", "kl", "kl_per_layer", "logits"):
            torch.testing.assert_close(found[1][0][name], found[0][0][name], rtol=1e-4, atol=1e-5)
        assert_same_gradients(found[1][1], found[0][1], tolerance=1e-3)

    def test_samples_draw_their_own_noise(self, compiled_model):
        compiled, ids = torch.compile(compiled_model, backend="eager"), prompt()
        with torch.no_grad():
            outs = [compiled(ids, num_posterior_samples=8, output_uncertainty=True, use_cache=False) for _ in range(2)]
        assert (outs[0].uncertainty.mutual_information[:, 1:] > 1e-4).all()
        assert not torch.equal(outs[0].logits, outs[1].logits)
