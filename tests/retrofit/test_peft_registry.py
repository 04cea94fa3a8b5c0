"""The method "EVE" in peft's registry, its configuration, its card, and what it refuses."""

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from eve_families import TINY, retrofitted, stock
from peft import PeftConfig, PeftModel, PeftType, get_peft_model
from peft_models import adapted, config, posterior, sampled
from torch import nn

import hf_variational
from hf_variational import EVEConfig
from hf_variational.retrofit.peft import EVEAdapterConfig, EVELayer, EVEModel
from hf_variational.retrofit.peft.registration import register
from hf_variational.version import __version__

ROOT = Path(__file__).resolve().parents[2]


def run(program: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )


class TestRegistry:
    """If one of these fails, peft has changed: see hf_variational/retrofit/peft/registration.py."""

    def test_method_is_whole(self):
        from peft.mapping import (
            PEFT_TYPE_TO_CONFIG_MAPPING,
            PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
            PEFT_TYPE_TO_PREFIX_MAPPING,
            PEFT_TYPE_TO_TUNER_MAPPING,
        )

        member = PeftType.EVE
        assert member is PeftType("EVE") is PeftType["EVE"] and isinstance(member, PeftType)
        assert member == "EVE" and member.value == member.name == "EVE" and str(member) == "PeftType.EVE"
        assert member in list(PeftType) and "EVE" in PeftType.__members__ and len(PeftType) == len(list(PeftType))
        assert pickle.loads(pickle.dumps(member)) is member and copy.deepcopy(member) is member
        assert json.dumps({"peft_type": member}) == '{"peft_type": "EVE"}'
        # peft looks them up by the member, and by what stands in a file
        for key in (member, "EVE"):
            assert PEFT_TYPE_TO_CONFIG_MAPPING[key] is EVEAdapterConfig
            assert PEFT_TYPE_TO_TUNER_MAPPING[key] is EVEModel
            assert PEFT_TYPE_TO_PREFIX_MAPPING[key] == EVEModel.prefix == "eve_"
            assert key not in PEFT_TYPE_TO_MIXED_MODEL_MAPPING

    def test_peft_still_needs_its_enumeration_extended(self):
        """Once peft takes names that it does not know, `_add_member` can go."""
        from peft.utils.peft_types import register_peft_method

        with pytest.raises(ValueError, match="add an entry to peft.utils.peft_types.PeftType"):
            register_peft_method(name="unheardof", config_cls=EVEAdapterConfig, model_cls=EVEModel)

    def test_peft_is_of_a_version_that_was_tested(self):
        assert tuple(map(int, peft.__version__.split(".")[:2])) == (0, 21), (
            "Run tests/retrofit/test_peft_*.py with this peft, read its tuners_utils.py and save_and_load.py for "
            "changes to what EVEModel and EVELayer override, and then change this test."
        )

    def test_what_is_overridden_is_there(self):
        from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

        def own(cls) -> set[str]:
            return {name for name in vars(cls) if callable(getattr(cls, name)) and not name.startswith("__")}

        assert own(EVEModel) - set(dir(BaseTuner)) == {"tuner_layer_cls"}
        added = {"update_layer", "follow", "release", "remove", "forget", "enter", "_tell"}
        assert own(EVELayer) - set(dir(BaseTunerLayer)) - set(dir(nn.Module)) == added

    def test_registering_again_changes_nothing(self):
        before = len(PeftType)
        assert register(EVEAdapterConfig, EVEModel) and len(PeftType) == before

    def test_name_that_another_method_has_is_a_warning(self):
        class Other(EVEAdapterConfig):
            pass

        with pytest.warns(UserWarning, match="another method has the name 'EVE'.*update hf-variational"):
            assert not register(Other, EVEModel)

    def test_importing_the_package_is_enough(self, tmp_path):
        adapted("gpt2").save_pretrained(tmp_path)
        load = "import sys; from peft import PeftConfig; print(type(PeftConfig.from_pretrained(sys.argv[1])).__name__)"
        done = run(f"import hf_variational; {load}", str(tmp_path))
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "EVEAdapterConfig"
        bare = run(load, str(tmp_path))
        assert bare.returncode != 0 and "KeyError: 'EVE'" in bare.stderr

    def test_package_is_imported_where_peft_is_not_installed(self):
        hidden = "import sys; sys.modules['peft'] = None; import hf_variational; print(hf_variational.__version__)"
        done = run(hidden)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == __version__

    def test_public_name(self):
        assert hf_variational.EVEAdapterConfig is EVEAdapterConfig and "EVEAdapterConfig" in dir(hf_variational)


class TestConfig:
    def test_round_trip(self, tmp_path):
        one = EVEAdapterConfig(
            eve=EVEConfig(mean="gain", scale="unit", prior="standard", initial_scale=0.3),
            layers=[0, 2],
            target_modules=("c_proj",),
            modules_to_save=["ln_f"],
            kl_weight=0.5,
            objective="mc_nll",
            num_posterior_samples=4,
            task_type="CAUSAL_LM",
        )
        one.save_pretrained(tmp_path)
        for loaded in (EVEAdapterConfig.from_pretrained(tmp_path), PeftConfig.from_pretrained(tmp_path)):
            assert loaded == one and loaded.peft_type is PeftType.EVE and loaded.version == __version__
            assert EVEConfig.from_dict(loaded.eve) == EVEConfig(
                mean="gain", scale="unit", prior="standard", initial_scale=0.3
            )
        assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "EVE"

    def test_default_is_the_retrofits(self):
        assert (
            EVEAdapterConfig().eve
            == EVEConfig(prior="centered").to_dict()
            == EVEAdapterConfig(eve={"prior": "centered"}).eve
        )

    def test_one_configuration_serves_several_bases(self):
        one = config("gpt2", "last")
        assert get_peft_model(stock("gpt2"), one).get_base_model().settings.eve_layers == [2]
        deeper = get_peft_model(stock("gpt2", n_layer=5, n_inner=64), one)
        assert deeper.get_base_model().settings.eve_layers == [4]
        assert one.layer_units is None and one.to_dict()["layer_units"] == {"4": 64}

    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [
            ("eve", 3, "eve must be an EVEConfig"),
            ("eve", {"mean": "median"}, "mean='median' is unknown"),
            ("eve", {"shape": 1}, "does not know 'shape'"),
            ("kl_weight", -1.0, "kl_weight"),
            ("kl_weight", True, "kl_weight"),
            ("objective", "mse", "objective='mse'"),
            ("num_posterior_samples", -1, "num_posterior_samples"),
            ("target_modules", "all-linear", "all-linear"),
            ("task_type", "POETRY", "Invalid task type"),
        ],
    )
    def test_bad_values(self, field, value, message):
        with pytest.raises(ValueError, match=message):
            EVEAdapterConfig(**{field: value})

    def test_misspelt_field(self):
        with pytest.raises(TypeError, match="layer"):
            EVEAdapterConfig(layer="all")

    @pytest.mark.parametrize("nested", [False, True])
    def test_adapter_of_a_newer_version_is_refused(self, nested, tmp_path):
        adapted("gpt2").save_pretrained(tmp_path)
        file = tmp_path / "adapter_config.json"
        values = {**json.loads(file.read_text()), "version": "7.3.0"}
        file.write_text(json.dumps(values))
        assert EVEAdapterConfig.from_pretrained(tmp_path).version == "7.3.0"  # nothing in it is new
        (values["eve"] if nested else values)["shape"] = "heavy-tailed"
        file.write_text(json.dumps(values))
        name = r"eve\.shape" if nested else "shape"
        for load in (PeftConfig.from_pretrained, EVEAdapterConfig.from_pretrained):
            with pytest.raises(ValueError, match=rf"7\.3\.0 and has {name}, which version {__version__}"):
                load(tmp_path)
        with pytest.raises(ValueError, match="7.3.0"):
            PeftModel.from_pretrained(stock("gpt2"), tmp_path)

    def test_field_of_a_newer_peft_is_left_to_peft(self, tmp_path):
        adapted("gpt2").save_pretrained(tmp_path)
        file = tmp_path / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "peft_novelty": 1}))
        with pytest.warns(UserWarning, match="Unexpected keyword arguments"):
            assert EVEAdapterConfig.from_pretrained(tmp_path).version == __version__


class TestPlaces:
    @pytest.mark.parametrize(
        ("layers", "expected"),
        [("all", [0, 1, 2]), ("last", [2]), ("last_quarter", [2]), ([1], [1]), (r"transformer\.h\.[01]", [0, 1])],
    )
    def test_layers(self, layers, expected):
        model = get_peft_model(stock("gpt2"), config("gpt2", layers))
        assert sorted({layer for layer, _ in posterior(model)}) == expected
        assert model.peft_config["default"].layers == layers

    def test_last_layers_are_the_decoders(self):
        assert sorted({layer for layer, _ in posterior(adapted("t5", "last"))}) == [5]

    @pytest.mark.parametrize("target_modules", [["mlp.c_proj"], r"transformer\.h\.\d+\.mlp\.c_proj"])
    def test_target_modules(self, target_modules, tmp_path):
        model = adapted("gpt2", target_modules=target_modules)
        assert torch.equal(sampled(model, "gpt2").logits, sampled(adapted("gpt2"), "gpt2").logits)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(stock("gpt2"), tmp_path)
        assert torch.equal(sampled(loaded, "gpt2").logits, sampled(model, "gpt2").logits)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"layers": [3]}, r"layers names 3, but the layers that can be chosen are \[0, 1, 2\]"),
            ({"layers": r"h\.\d"}, "matches no layer"),
            ({"layers": "["}, "no regular expression"),
            ({"layers": []}, "layers must be"),
            ({"target_modules": ["w_out"]}, "names no module"),
            ({"target_modules": ["c_proj"]}, "several modules"),
        ],
    )
    def test_bad_places(self, options, message):
        base = stock("gpt2")
        with pytest.raises(ValueError, match=message):
            get_peft_model(base, config("gpt2", **options))
        assert_untouched(base)
        model = adapted("gpt2")
        expected = sampled(model, "gpt2").logits
        with pytest.raises(ValueError, match=message):
            model.add_adapter("second", config("gpt2", **options))
        assert list(model.peft_config) == ["default"]
        assert torch.equal(sampled(model, "gpt2").logits, expected)

    @pytest.mark.parametrize("name", ["mixtral", "gpt2"])
    def test_what_fails_on_the_way_is_taken_back(self, name):
        base = stock(name)
        if name == "mixtral":  # whose experts say no when they are reached
            bad, message = config(name, eve=EVEConfig(noise="sequence", prior="centered")), "noise='token'"
        else:
            base.gradient_checkpointing_enable({"use_reentrant": True})
            bad, message = config(name), "use_reentrant"
        with pytest.raises(ValueError, match=message):
            get_peft_model(base, bad)
        assert_untouched(base, name)
        if name == "mixtral":
            model = adapted(name, base=base)
            with pytest.raises(ValueError, match=message):
                model.add_adapter("second", bad)
            assert torch.equal(sampled(model, name).logits, sampled(adapted(name), name).logits)

    def test_mixed_models_are_not_for_it(self):
        with pytest.raises(ValueError, match="not compatible with the `PeftMixedModel`"):
            get_peft_model(stock("gpt2"), config("gpt2"), mixed=True)

    def test_base_of_another_width(self, tmp_path):
        adapted("gpt2", [1, 2]).save_pretrained(tmp_path)
        base = stock("gpt2", n_inner=64)
        with pytest.raises(ValueError, match="48 units in layer 1, and those of this GPT2LMHeadModel have 64"):
            PeftModel.from_pretrained(base, tmp_path)
        assert_untouched(base)
        with pytest.raises(ValueError, match="48 units in layer 1.*have 64"):
            base.load_adapter(tmp_path)

    def test_base_of_another_depth(self, tmp_path):
        adapted("gpt2", "last").save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"layers \[2\] of its base.*no FFN in \[2\] \(2 layers\)"):
            PeftModel.from_pretrained(stock("gpt2", n_layer=2), tmp_path)
        # "last" of a deeper model would be another layer
        deeper = PeftModel.from_pretrained(stock("gpt2", n_layer=5), tmp_path)
        assert deeper.get_base_model().settings.eve_layers == [2]

    def test_variational_base_is_refused(self):
        with pytest.raises(ValueError, match="is variational already"):
            get_peft_model(retrofitted("gpt2"), config("gpt2"))
        model = adapted("gpt2").get_base_model()
        with pytest.raises(ValueError, match="is variational already"):
            hf_variational.variationalize(model)

    def test_base_that_is_no_transformers_model(self):
        with pytest.raises(ValueError, match="PreTrainedModel, got Sequential"):
            get_peft_model(nn.Sequential(nn.Linear(3, 3)), EVEAdapterConfig())

    def test_wrapped_model_is_not_variationalized(self):
        with pytest.raises(ValueError, match="PeftModelForCausalLM"):
            hf_variational.variationalize(adapted("gpt2"))


def assert_untouched(base, name: str = "gpt2") -> None:
    assert type(base) is TINY[name].model and not hasattr(base, "adapters")
    assert not any(module._forward_pre_hooks for module in base.modules())
    assert not any("neurons" in name for name, _ in base.named_modules())


class TestCard:
    def test_says_what_to_install_and_how_to_load(self, tmp_path):
        model = adapted("gpt2", "last")
        model.save_pretrained(tmp_path)
        card = (tmp_path / "README.md").read_text()
        assert f"pip install 'hf-variational>={__version__}' peft" in card
        assert "import hf_variational" in card and "KeyError: 'EVE'" in card and "AutoPeftModelForCausalLM" in card
        assert "[More Information Needed]" not in card
        assert "library_name: peft" in card and "- eve\n" in card and "pipeline_tag: text-generation" in card
        # a later save of the same folder: ours is written anew
        model.save_pretrained(tmp_path)
        assert (tmp_path / "README.md").read_text() == card
        adapted("gpt2", "all").save_pretrained(tmp_path)
        assert "| layers | 0, 1, 2 |" in (tmp_path / "README.md").read_text()

    @pytest.mark.parametrize("edited", [False, True])
    def test_card_of_a_person_is_kept(self, edited, tmp_path):
        readme = tmp_path / "README.md"
        if edited:
            adapted("gpt2").save_pretrained(tmp_path)
            readme.write_text(readme.read_text().replace("## What is in it", "## What I made of it"))
        else:
            readme.write_text("---\nlicense: mit\n---\n\n# My adapter\n\nIt writes sonnets.\n")
        adapted("gpt2", "last").save_pretrained(tmp_path)
        text = readme.read_text()
        assert ("What I made of it" if edited else "It writes sonnets.") in text
        assert "| layers | 2 |" not in text and ("license: mit" in text) != edited

    def test_card_in_the_folder_of_each_adapter(self, tmp_path):
        model = adapted("bert-single", adapter_name="eve")
        model.save_pretrained(tmp_path)
        card = (tmp_path / "eve" / "README.md").read_text()
        assert "AutoPeftModelForSequenceClassification" in card and "model.generate" not in card
