"""EVE adapters are saved, loaded, switched and deleted as peft's are."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from eve_families import TINY, answer, centered, given, stock
from eve_reference import UnitNoise
from peft import (
    AutoPeftModelForCausalLM,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft_models import NAMES, adapted, config, move, posterior, sampled
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from hf_variational import EVEConfig, posterior_noise
from hf_variational.retrofit.peft import EVEAdapterConfig
from hf_variational.retrofit.peft.layer import eve_layers

ROOT = Path(__file__).resolve().parents[2]


def assert_same_samples(one, other, name: str) -> None:
    assert torch.equal(answer(sampled(one, name)), answer(sampled(other, name)))


class TestSaved:
    @pytest.mark.parametrize("name", NAMES)
    def test_saved_and_loaded(self, name, tmp_path):
        plain = stock(name)
        model = adapted(name, [0, 2], base=copy.deepcopy(plain))
        model.save_pretrained(tmp_path)
        saved = load_file(tmp_path / "adapter_model.safetensors")
        is_classifier = name == "bert-single"
        assert all("eve_posterior" in key or (is_classifier and "classifier" in key) for key in saved)
        assert len(saved) == len(posterior(model)) + 2 * is_classifier
        for low_cpu_mem_usage in (False, True):
            loaded = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
            for key, tensor in posterior(model).items():
                assert torch.equal(tensor, posterior(loaded)[key])
                assert not posterior(loaded)[key].requires_grad and posterior(loaded)[key].device.type == "cpu"
            assert_same_samples(loaded, model, name)
        trained_on = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path, is_trainable=True)
        parameters = [tensor for tensor in posterior(trained_on).values() if isinstance(tensor, torch.nn.Parameter)]
        assert all(parameter.requires_grad for parameter in parameters)

    def test_loaded_in_a_fresh_process_where_the_package_is_imported(self, tmp_path):
        for name in ("gpt2", "mixtral", "t5"):
            stock(name).save_pretrained(tmp_path / name / "base")
            base = TINY[name].model.from_pretrained(tmp_path / name / "base")
            model = adapted(name, "last_quarter", base=base)
            model.save_pretrained(tmp_path / name / "adapter")
            torch.save(answer(sampled(model, name)), tmp_path / name / "expected")
        done = subprocess.run(
            [sys.executable, "-c", _FRESH, str(tmp_path)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "retrofit")])},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-3:] == ["gpt2 True", "mixtral True", "t5 True"]

    def test_auto_class_generates_with_uncertainty(self, tmp_path):
        stock("llama").save_pretrained(tmp_path / "base")
        base = TINY["llama"].model.from_pretrained(tmp_path / "base")
        model = adapted("llama", base=base)
        model.save_pretrained(tmp_path / "adapter")
        loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
        prompt, outs = given("llama")["input_ids"], []
        for one in (model, loaded):
            with posterior_noise(UnitNoise()):
                outs.append(
                    one.generate(
                        input_ids=prompt,
                        max_new_tokens=3,
                        num_posterior_samples=8,
                        output_uncertainty=True,
                        return_dict_in_generate=True,
                    )
                )
        assert torch.equal(outs[0].sequences, outs[1].sequences)
        assert torch.equal(outs[0].uncertainty.mutual_information, outs[1].uncertainty.mutual_information)
        assert outs[1].uncertainty.mutual_information.shape == (2, 3)

    def test_auto_class_of_an_adapter_without_a_task(self, tmp_path):
        from peft import AutoPeftModel

        stock("bert-masked").save_pretrained(tmp_path / "base")
        base = TINY["bert-masked"].model.from_pretrained(tmp_path / "base")
        model = adapted("bert-masked", base=base)
        model.save_pretrained(tmp_path / "adapter")
        assert_same_samples(AutoPeftModel.from_pretrained(tmp_path / "adapter"), model, "bert-masked")

    def test_state_dict_of_peft(self):
        model, other = adapted("gpt2"), adapted("gpt2")
        move(other, seed=5)
        state = get_peft_model_state_dict(model)
        assert set(state) == {
            f"base_model.model.transformer.h.{layer}.mlp.variational_neurons.eve_posterior.{key}"
            for layer in range(3)
            for key in ("log_scale", "scale_down", "scale_up", "prior_log_scale")
        }
        result = set_peft_model_state_dict(other, state)
        assert not result.unexpected_keys and not [key for key in result.missing_keys if "eve_" in key]
        assert_same_samples(other, model, "gpt2")

    def test_modules_to_save(self, tmp_path):
        plain = stock("gpt2")
        model = adapted("gpt2", "last", base=copy.deepcopy(plain), modules_to_save=["ln_f"])
        with torch.no_grad():
            model.get_base_model().transformer.ln_f.modules_to_save["default"].weight.add_(1.0)
        model.save_pretrained(tmp_path)
        assert_same_samples(PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path), model, "gpt2")
        with pytest.raises(ValueError, match="modules_to_save names 'mlp'.*h.2.mlp.c_proj"):
            get_peft_model(stock("gpt2"), config("gpt2", "last", modules_to_save=["mlp"]))

    def test_size_for_a_gpt2_small(self, tmp_path):
        """An adapter for the last quarter of the layers; all layers add less than 1 % of the model's parameters."""
        with torch.device("meta"):
            base = GPT2LMHeadModel(GPT2Config())
        count = sum(parameter.numel() for parameter in base.parameters())
        base.to_empty(device="cpu")
        eve = EVEConfig(scale="input", scale_rank=8, prior="centered")
        model = get_peft_model(base, EVEAdapterConfig(eve=eve, layers="last_quarter", task_type="CAUSAL_LM"))
        assert [layer.index for layer in eve_layers(model)] == [9, 10, 11]
        model.save_pretrained(tmp_path)
        size = sum(file.stat().st_size for file in tmp_path.iterdir())
        assert 600_000 < size < 3_000_000
        every = get_peft_model(model.unload(), EVEAdapterConfig(eve=eve)).get_nb_trainable_parameters()[0]
        assert every < 0.01 * count


_FRESH = """
import sys
import torch
import hf_variational
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSeq2SeqLM
from eve_families import answer
from peft_models import sampled
for name in ("gpt2", "mixtral", "t5"):
    auto = AutoPeftModelForSeq2SeqLM if name == "t5" else AutoPeftModelForCausalLM
    model = auto.from_pretrained(f"{sys.argv[1]}/{name}/adapter")
    assert type(model.get_base_model()).__name__.startswith("Variational")
    expected = torch.load(f"{sys.argv[1]}/{name}/expected")
    print(name, torch.equal(answer(sampled(model, name)), expected))
"""


class TestDtype:
    def test_adapters_of_a_half_precision_base_stay_in_full_precision(self, tmp_path):
        plain = stock("llama").to(torch.bfloat16)
        model = adapted("llama", base=copy.deepcopy(plain))
        assert {tensor.dtype for tensor in posterior(model).values()} == {torch.float32}
        out = sampled(model, "llama", output_uncertainty=True)
        assert out.uncertainty.mutual_information.isfinite().all() and out.logits.dtype is torch.float32
        model.save_pretrained(tmp_path)
        for options in ({}, {"low_cpu_mem_usage": True}, {"autocast_adapter_dtype": False}):
            loaded = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path, **options)
            for key, tensor in posterior(model).items():
                assert torch.equal(tensor, posterior(loaded)[key])
            assert_same_samples(loaded, model, "llama")

    def test_default_dtype_of_the_process_does_not_matter(self):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = adapted("llama")
        finally:
            torch.set_default_dtype(before)
        assert {tensor.dtype for tensor in posterior(model).values()} == {torch.float32}

    def test_adapter_in_four_bits(self, tmp_path):
        bitsandbytes = pytest.importorskip("bitsandbytes")
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        stock("llama", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
        quantisation = BitsAndBytesConfig(load_in_4bit=True)
        try:
            base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantisation)
            inputs = {key: value.to(base.device) for key, value in given("llama").items()}
            with torch.no_grad():
                expected = base(**inputs).logits
        except (RuntimeError, ImportError, NotImplementedError, ValueError, AttributeError) as error:
            pytest.skip(f"bitsandbytes cannot run here: {error}")
        model = adapted("llama", base=base)
        assert isinstance(eve_layers(model)[0].projection, bitsandbytes.nn.Linear4bit)
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, expected)
        out = model.train()(**inputs, labels=inputs["input_ids"], num_posterior_samples=2)
        out.loss.backward()
        assert out.kl > 0 and all(t.grad is not None for t in posterior(model).values() if t.requires_grad)


class TestSwitching:
    def two(self, name: str = "gpt2", **options) -> PeftModel:
        model = adapted(name, [1, 2], adapter_name="first")
        model.add_adapter("second", config(name, [0, 2], **{"kl_weight": 0.7, **options}))
        move(model, "second", seed=3)
        return model.eval()

    @pytest.mark.parametrize("name", ["gpt2", "mixtral", "t5"])
    def test_adapters_switch(self, name):
        model, inputs = self.two(name), given(name)
        base = model.get_base_model()
        assert base.settings.eve_layers == [1, 2] and base.settings.kl_weight == 0.1
        first = answer(sampled(model, name))
        alone = adapted(name, [1, 2])
        assert torch.equal(first, answer(sampled(alone, name)))
        model.set_adapter("second")
        assert base.settings.eve_layers == [0, 2] and base.settings.kl_weight == 0.7
        second = sampled(model, name, labels=inputs["input_ids"] if name != "t5" else inputs["decoder_input_ids"])
        assert len(second.kl_per_layer) == 2 and not torch.equal(answer(second), first)
        model.set_adapter("first")
        assert torch.equal(answer(sampled(model, name)), first)
        with torch.no_grad():
            assert torch.equal(answer(model(**inputs)), answer(stock(name)(**inputs)))

    def test_only_the_active_adapter_is_trained(self):
        model = self.two()
        for active, other in (("first", "second"), ("second", "first")):
            model.set_adapter(active)
            parameters = {
                name: [tensor for tensor in posterior(model, name).values() if isinstance(tensor, torch.nn.Parameter)]
                for name in (active, other)
            }
            assert all(parameter.requires_grad for parameter in parameters[active])
            assert not any(parameter.requires_grad for parameter in parameters[other])

    def test_two_active_adapters_are_refused(self):
        model = self.two()
        expected = sampled(model, "gpt2").logits
        with pytest.raises(ValueError, match="'first', 'second' cannot be active together"):
            model.base_model.set_adapter(["first", "second"])
        assert torch.equal(sampled(model, "gpt2").logits, expected)
        with pytest.raises(ValueError, match="cannot be active together"):
            model.base_model.merge_and_unload(adapter_names=["first", "second"])
        assert torch.equal(sampled(model, "gpt2").logits, expected)

    def test_adapter_is_deleted(self):
        model = self.two()
        second = self.two()
        second.set_adapter("second")
        expected = sampled(second, "gpt2").logits
        with pytest.warns(UserWarning, match="Setting active adapter"):
            model.delete_adapter("first")
        assert model.active_adapter == "second" and list(model.peft_config) == ["second"]
        assert torch.equal(sampled(model, "gpt2").logits, expected)
        assert not any("first" in key for key in model.state_dict())
        base = model.get_base_model()
        model.delete_adapter("second")
        with pytest.raises(ValueError, match="nothing in this"):
            base(**given("gpt2"), num_posterior_samples=2)
        assert not posterior(model, "second")
        with pytest.raises(ValueError, match="does not exist"):
            model.delete_adapter("second")

    def test_adapters_are_saved_and_loaded_one_by_one(self, tmp_path):
        model = self.two()
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(stock("gpt2"), tmp_path / "second", adapter_name="other")
        loaded.load_adapter(tmp_path / "first", adapter_name="first")
        assert loaded.active_adapter == "other" and loaded.get_base_model().settings.eve_layers == [0, 2]
        for name, saved in (("first", "first"), ("other", "second")):
            loaded.set_adapter(name)
            model.set_adapter(saved)
            assert_same_samples(loaded, model, "gpt2")

    def test_adapter_named_as_others_would_name_theirs(self, tmp_path):
        """peft's saving leaves out keys with the name of another adapter in them."""
        model = adapted("gpt2", adapter_name="default")
        for name in ("eve", "mlp2", "log_scale2"):
            model.add_adapter(name, config("gpt2"))
        model.save_pretrained(tmp_path, selected_adapters=["default"])
        assert len(load_file(tmp_path / "adapter_model.safetensors")) == len(posterior(model))

    def test_unloading_leaves_no_adapter_behind(self):
        model = self.two()
        model.set_adapter("second")
        back = model.merge_and_unload()
        assert back.state_dict().keys() == stock("gpt2").state_dict().keys() and type(back) is GPT2LMHeadModel


class TestTransformersIntegration:
    """`model.add_adapter` and its like, which call the layers behind the tuner's back."""

    def test_add_switch_disable_and_delete(self):
        model, inputs = stock("gpt2"), given("gpt2")
        model.add_adapter(config("gpt2", [1]), "first")
        model.add_adapter(config("gpt2", [0, 2]), "second")
        assert model.active_adapters() == ["second"] and model.settings.eve_layers == [0, 2]
        move(model, "first")
        model.set_adapter("first")
        assert model.settings.eve_layers == [1]
        expected = sampled(model, "gpt2").logits
        model.disable_adapters()
        with pytest.raises(ValueError, match="enable the adapter"):
            model(**inputs, num_posterior_samples=2)
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, stock("gpt2")(**inputs).logits)
        model.enable_adapters()
        assert torch.equal(sampled(model, "gpt2").logits, expected)
        with pytest.raises(ValueError, match="cannot be active together"):
            model.set_adapter(["first", "second"])
            model(**inputs, num_posterior_samples=2)
        model.set_adapter("first")
        model.delete_adapter("second")
        assert torch.equal(sampled(model, "gpt2").logits, expected)

    @pytest.mark.parametrize("name", ["gpt2", "mixtral", "t5", "opt"])
    def test_saved_and_loaded_next_to_another(self, name, tmp_path):
        model = stock(name)
        model.add_adapter(config(name, [1]), "first")
        move(model, "first")
        model.save_pretrained(tmp_path / "first")
        assert not (tmp_path / "first" / "model.safetensors").exists()
        assert "hf-variational" in (tmp_path / "first" / "README.md").read_text()
        expected = answer(sampled(model, name))
        adapted(name, [0, 2]).save_pretrained(tmp_path / "second")
        loaded = stock(name)
        loaded.load_adapter(tmp_path / "second", adapter_name="second")
        before = {key: tensor.clone() for key, tensor in posterior(loaded, "second").items()}
        assert torch.equal(answer(sampled(loaded, name)), answer(sampled(adapted(name, [0, 2]), name)))
        loaded.load_adapter(tmp_path / "first", adapter_name="first")
        for key, tensor in posterior(loaded, "second").items():
            assert torch.equal(tensor, before[key])
        loaded.set_adapter("first")
        assert torch.equal(answer(sampled(loaded, name)), expected)

    def test_injected_into_a_model(self):
        model = inject_adapter_in_model(config("gpt2"), stock("gpt2"))
        assert model.settings.eve_layers == [0, 1, 2]
        assert sampled(model, "gpt2", output_uncertainty=True).uncertainty.mutual_information.max() > 1e-4


def test_posterior_of_a_mean_that_is_no_identity_is_saved_too(tmp_path):
    plain = stock("gpt2")
    eve = centered(mean="gain", prior="empirical", reconstruction_weight=0.1)
    model = adapted("gpt2", base=copy.deepcopy(plain), eve=eve)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    assert_same_samples(loaded, model, "gpt2")
    assert torch.equal(loaded(**given("gpt2")).logits, model(**given("gpt2")).logits)
