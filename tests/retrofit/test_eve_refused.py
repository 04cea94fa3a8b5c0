"""What cannot be made variational, and what a retrofit refuses, each with its reason; nothing is left half done."""

import json

import pytest
import torch
import transformers as hf
from eve_families import TINY, added, answer, centered, given, retrofitted, stock, targets
from families import FAMILIES, VOCAB

import hf_variational
from hf_variational import EVEConfig, VariationalAttentionConfig, variational_class, variationalize

TEXT = {name: value for name, value in FAMILIES["llama"].options.items() if name != "num_key_value_heads"}


def assert_untouched(model, stock_class) -> None:
    assert type(model) is stock_class and getattr(model.config, "variational", None) is None
    assert not added(model) and not any(module._forward_pre_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


class TestModels:
    @pytest.mark.parametrize("name", ["gpt2", "mixtral", "t5", "bert-masked"])
    def test_second_time(self, name):
        model = retrofitted(name, [1])
        for options in ({}, {"layers": [2]}, {"attention": VariationalAttentionConfig()}):
            with pytest.raises(ValueError, match="variational already"):
                variationalize(model, **options)
        assert model.settings.eve_layers == [1]
        assert answer(model(**given(name), num_posterior_samples=2)).isfinite().all()

    def test_our_own_models(self):
        config = hf_variational.VariationalGPTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=VOCAB
        )
        with pytest.raises(ValueError, match="variational already"):
            variationalize(hf_variational.VariationalGPTForCausalLM(config))

    @pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
    def test_wrapped_by_peft(self):
        from peft import LoraConfig, get_peft_model

        wrapped = get_peft_model(stock("llama"), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
        with pytest.raises(ValueError, match="merge_and_unload"):
            variationalize(wrapped)
        inside = stock("llama")
        inside.add_adapter(LoraConfig(target_modules=["q_proj"]))
        with pytest.raises(ValueError, match="adapter"):
            variationalize(inside)
        merged = wrapped.merge_and_unload()
        assert variationalize(merged).settings.eve_layers == [0, 1, 2]

    def test_what_is_no_model(self):
        for model in (torch.nn.Linear(2, 2), "gpt2", None, TINY["gpt2"].config()):
            with pytest.raises(ValueError, match="PreTrainedModel"):
                variationalize(model)

    def test_meta_device(self):
        for name in ("gpt2", "bert-masked"):
            with torch.device("meta"):
                model = TINY[name].model(TINY[name].config(**TINY[name].options))
            with pytest.raises(ValueError, match="meta device"):
                variationalize(model)
            assert_untouched(model, TINY[name].model)

    def test_models_without_layers(self):
        torch.manual_seed(0)
        config = hf.ResNetConfig(hidden_sizes=[8, 16], depths=[1, 1], embedding_size=8)
        plain = hf.ResNetForImageClassification(config)
        with pytest.raises(ValueError, match="layers"):
            variationalize(plain)
        assert_untouched(plain, hf.ResNetForImageClassification)

    def test_layers_that_share_their_weights(self):
        """A posterior of one module for several layers would have one record for all of them."""
        torch.manual_seed(0)
        plain = hf.AlbertForMaskedLM(hf.AlbertConfig(**{**FAMILIES["bert"].options, "embedding_size": 16}))
        with pytest.raises(ValueError, match="3 layers"):
            variationalize(plain)
        assert_untouched(plain, hf.AlbertForMaskedLM)

    def test_two_towers_beside_each_other(self):
        """Neither is behind the other: rows cannot split at the first variational layer of all."""
        vision = {**FAMILIES["vit"].options, "projection_dim": 8}
        torch.manual_seed(0)
        plain = hf.CLIPModel(hf.CLIPConfig(text_config=dict(TEXT), vision_config=vision))
        with pytest.raises(ValueError, match="layers"):
            variationalize(plain)
        assert_untouched(plain, hf.CLIPModel)

    def test_encoder_decoders_outside_the_table(self):
        """Of two towers the one that is found by looking would be called all layers."""
        torch.manual_seed(0)
        heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48}
        depth = {"d_model": 32, "encoder_layers": 3, "decoder_layers": 3, "decoder_ffn_dim": 48, "vocab_size": VOCAB}
        plain = hf.BartForConditionalGeneration(hf.BartConfig(**heads, **depth))
        with pytest.raises(ValueError, match="encoder"):
            variationalize(plain)
        assert_untouched(plain, hf.BartForConditionalGeneration)

    def test_what_fails_on_the_way_leaves_the_model_as_it_was(self, monkeypatch):
        """Whatever the error is: half a conversion is no model of either kind."""
        plain, inputs = stock("llama"), given("llama")
        expected = plain(**inputs).logits

        def broken(*args):
            raise AttributeError("no such thing")

        monkeypatch.setattr("hf_variational.retrofit.install.install_rows", broken)
        with pytest.raises(AttributeError, match="no such thing"):
            variationalize(plain)
        assert_untouched(plain, hf.LlamaForCausalLM)
        assert torch.equal(plain(**inputs).logits, expected)
        monkeypatch.undo()
        assert variationalize(plain).settings.eve_layers == [0, 1, 2]


class TestSettings:
    @pytest.mark.parametrize(
        ("options", "named"),
        [
            ({"kl_weight": -1.0}, "kl_weight.*-1.0"),
            ({"kl_weight": float("nan")}, "kl_weight.*nan"),
            ({"kl_weight": "0.1"}, "kl_weight.*'0.1'"),
            ({"kl_weight": True}, "kl_weight"),
            ({"num_posterior_samples": -2}, "num_posterior_samples.*-2"),
            ({"num_posterior_samples": 1.5}, "num_posterior_samples.*1.5"),
            ({"objective": "nll"}, "objective.*'nll'"),
            ({"eve": "input"}, "EVEConfig.*'input'"),
            ({"eve": VariationalAttentionConfig()}, "EVEConfig"),
            ({"eve": {"scale": "unit"}}, "EVEConfig"),
            ({"attention": EVEConfig()}, "VariationalAttentionConfig"),
            ({"train": "everything"}, "train.*'everything'.*'posterior'"),
        ],
        ids=str,
    )
    def test_are_refused_and_named(self, options, named):
        plain = stock("llama")
        with pytest.raises(ValueError, match=named):
            variationalize(plain, **options)
        assert_untouched(plain, hf.LlamaForCausalLM)
        assert variationalize(plain).settings.eve_layers == [0, 1, 2]

    @pytest.mark.parametrize(
        "options",
        [{"prior": "autoregressive"}, {"noise": "sequence"}, {"latent_dim": 2}, {"reconstruction_weight": 0.1}],
        ids=str,
    )
    def test_of_experts(self, options):
        plain = stock("mixtral")
        with pytest.raises(ValueError, match="xperts"):
            variationalize(plain, eve=centered(**options))
        assert_untouched(plain, hf.MixtralForCausalLM)
        assert torch.equal(plain(**given("mixtral")).logits, stock("mixtral")(**given("mixtral")).logits)


class TestPasses:
    def test_uncertainty_without_samples(self):
        for name in ("gpt2", "bloom", "t5", "vit"):
            model, inputs = retrofitted(name), given(name)
            for option in ("output_uncertainty", "output_sample_logits"):
                with pytest.raises(ValueError, match=f"{option}=True needs posterior samples"):
                    model(**inputs, **{option: True})
            with pytest.raises(ValueError, match="num_posterior_samples.*-1"):
                model(**inputs, num_posterior_samples=-1)

    @torch.no_grad()
    def test_networks_in_chunks(self):
        """A kernel that runs the network piece by piece never has the whole sequence: no KL in silence."""
        plain, inputs = stock("bert-masked", chunk_size_feed_forward=2), given("bert-masked")
        model = retrofitted(plain)
        assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
        with pytest.raises((ValueError, RuntimeError), match=r"layer|FFN"):
            model(**inputs, **targets("bert-masked", inputs), num_posterior_samples=2)

    def test_a_module_that_went_missing(self):
        """What replaces W_out takes the neurons' hook with it; a KL must never go missing in silence."""
        model, inputs = retrofitted("llama"), given("llama")
        model.model.layers[1].mlp.down_proj = torch.nn.Linear(48, 32, bias=False)
        with pytest.raises(RuntimeError, match=r"\(1, 'ffn'\)"):
            model(**inputs, num_posterior_samples=2)
        with pytest.raises(RuntimeError, match=r"\(1, 'ffn'\)"):
            model(**inputs, labels=inputs["input_ids"])

    @torch.no_grad()
    def test_a_stack_inside_called_by_itself(self):
        """Outside of a pass of the whole model the units are at their mean."""
        plain, inputs = stock("llama"), given("llama")
        model, ids = retrofitted(plain), inputs["input_ids"]
        expected = plain.model(ids).last_hidden_state
        assert torch.equal(model.model(ids).last_hidden_state, expected)
        model(ids, num_posterior_samples=2)
        assert torch.equal(model.model(ids).last_hidden_state, expected)

    def test_a_pass_that_fails_leaves_nothing_behind(self):
        model, inputs = retrofitted("llama"), given("llama")
        expected = model(**inputs).logits
        with pytest.raises(Exception, match=r".+"):
            model(input_ids=torch.full((2, 8), VOCAB + 5), num_posterior_samples=2)
        assert torch.equal(model(**inputs).logits, expected)


class TestNewerCheckpoints:
    def saved(self, folder, **changes):
        retrofitted("gpt2").save_pretrained(folder)
        path = folder / "config.json"
        config = json.loads(path.read_text())
        for key, value in changes.items():
            place = config["variational"]
            for part in key.split("__")[:-1]:
                place = place[part]
            place[key.split("__")[-1]] = value
        path.write_text(json.dumps(config))
        return folder

    @pytest.mark.parametrize("field", ["teleportation", "eve__teleportation"])
    def test_name_both_versions(self, field, tmp_path):
        self.saved(tmp_path, version="99.1.2", **{field: True})
        for load in (hf.AutoModelForCausalLM.from_pretrained, variational_class(hf.GPT2LMHeadModel).from_pretrained):
            with pytest.raises(ValueError, match="teleportation") as refusal:
                load(tmp_path)
            assert "99.1.2" in str(refusal.value) and hf_variational.__version__ in str(refusal.value)
        assert type(hf.GPT2LMHeadModel.from_pretrained(tmp_path)) is hf.GPT2LMHeadModel

    def test_load_where_nothing_is_unknown(self, tmp_path):
        self.saved(tmp_path, version="99.1.2")
        assert hf.AutoModelForCausalLM.from_pretrained(tmp_path).settings.eve_layers == [0, 1, 2]

    def test_damaged_settings_are_named(self, tmp_path):
        self.saved(tmp_path, eve_layers=[0, 7])
        with pytest.raises(ValueError, match="7"):
            hf.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_names_are_lazy_and_unknown_ones_an_attribute_error():
    assert hf_variational.VariationalGPT2ForCausalLM.__mro__[1:]
    assert hf_variational.VariationalLlamaConfig.model_type == "variational_llama"
    with pytest.raises(AttributeError, match="VariationalNonsense"):
        _ = hf_variational.VariationalNonsense
