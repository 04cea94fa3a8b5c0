"""What cannot be made variational, and what a retrofitted model refuses, each with its reason."""

import pytest
import torch
import transformers as hf
from families import (
    FAMILIES,
    HEADS,
    LAYERS,
    POSITIONS,
    VOCAB,
    attention,
    inputs,
    posterior_parameters,
    retrofitted,
    stock,
    targets,
)

from hf_variational.modeling.attention import AttentionPosterior
from hf_variational.retrofit import variationalize

TEXT = {name: value for name, value in FAMILIES["llama"].options.items() if name != "num_key_value_heads"}


def small(model: type, config: type, **options):
    torch.manual_seed(0)
    return model(config(**options)).eval()


def llama_like(model: type, config: type, **options):
    return small(model, config, **{**TEXT, "num_key_value_heads": 2, **options})


class TestRefused:
    @pytest.mark.parametrize(
        "build",
        [
            lambda: small(hf.BloomForCausalLM, hf.BloomConfig, hidden_size=16, n_layer=2, n_head=2, vocab_size=VOCAB),
            lambda: small(
                hf.GPTJForCausalLM, hf.GPTJConfig, n_embd=16, n_layer=2, n_head=2, rotary_dim=4, vocab_size=9
            ),
            lambda: small(
                hf.FalconForCausalLM, hf.FalconConfig, hidden_size=16, num_hidden_layers=2, num_attention_heads=2
            ),
            lambda: small(hf.MambaForCausalLM, hf.MambaConfig, hidden_size=16, num_hidden_layers=2, vocab_size=VOCAB),
        ],
        ids=["bloom", "gptj", "falcon", "mamba"],
    )
    def test_families_without_the_interface(self, build):
        with pytest.raises(ValueError, match="does not call its attention through transformers' attention interface"):
            variationalize(build(), attention=attention())

    def test_shared_layers_two_towers_and_sinks(self):
        albert = small(hf.AlbertForMaskedLM, hf.AlbertConfig, **{**FAMILIES["bert"].options, "embedding_size": 16})
        with pytest.raises(ValueError, match="AlbertForMaskedLM has 3 layers, and records 1"):
            variationalize(albert, attention=attention())
        vision = {**FAMILIES["vit"].options, "projection_dim": 8}
        clip = small(hf.CLIPModel, hf.CLIPConfig, text_config=dict(TEXT), vision_config=vision)
        with pytest.raises(ValueError, match="CLIPModel has 3 layers, and records 6"):
            variationalize(clip, attention=attention())
        sinks = llama_like(hf.GptOssForCausalLM, hf.GptOssConfig, num_local_experts=4, head_dim=8)
        with pytest.raises(ValueError, match="GptOssForCausalLM has sinks"):
            variationalize(sinks, attention=attention())

    @pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
    def test_what_is_no_model_of_transformers(self):
        from peft import LoraConfig, get_peft_model

        wrapped = get_peft_model(stock("bert-masked"), LoraConfig(target_modules=["query"]))
        with pytest.raises(ValueError, match=r"PeftModel: merge its adapter first.*merge_and_unload"):
            variationalize(wrapped, attention=attention())
        for model in (torch.nn.Linear(2, 2), "bert-base-uncased"):
            with pytest.raises(ValueError, match="must be a transformers PreTrainedModel.*unwrap it first"):
                variationalize(model, attention=attention())

    def test_second_time(self):
        model = retrofitted("bert-masked")
        with pytest.raises(ValueError, match="variational already"):
            variationalize(model, attention=attention())

    def test_meta_device(self):
        with torch.device("meta"):
            model = hf.BertForMaskedLM(hf.BertConfig(**FAMILIES["bert"].options))
        with pytest.raises(ValueError, match="meta device"):
            variationalize(model, attention=attention())

    @pytest.mark.parametrize("layers", [[3], [-1], [0, 5], [True], ["1"], [[1]], [1.0], [], 1, "01", {}, range(0)])
    def test_layers(self, layers):
        plain = stock("bert-masked")
        with pytest.raises(ValueError, match="layers"):
            variationalize(plain, attention=attention(), layers=layers)
        assert type(plain) is hf.BertForMaskedLM

    @pytest.mark.parametrize(
        ("options", "named"),
        [
            ({"kl_weight": -1.0}, "kl_weight.*-1.0"),
            ({"kl_weight": float("nan")}, "kl_weight.*nan"),
            ({"kl_weight": "0.1"}, "kl_weight.*'0.1'"),
            ({"kl_weight": True}, "kl_weight"),
            ({"num_posterior_samples": -2}, "num_posterior_samples.*-2"),
            ({"num_posterior_samples": 1.5}, "num_posterior_samples.*1.5"),
            ({"attention": "dirichlet"}, "VariationalAttentionConfig or None, got 'dirichlet'"),
        ],
    )
    def test_settings(self, options, named):
        plain = stock("bert-masked")
        with pytest.raises(ValueError, match=named):
            variationalize(plain, **{"attention": attention(), **options})
        assert type(plain) is hf.BertForMaskedLM and not posterior_parameters(plain)

    def test_unknown_kind(self):
        with pytest.raises(ValueError, match="kind='laplace' is unknown"):
            attention("laplace")

    def test_a_model_that_cannot_be_made_variational_stays_as_it_was(self):
        plain = stock("vit-single", image_size=[16, 16])
        with pytest.raises(ValueError, match=r"max_position_embeddings.*data_dependent='query'"):
            variationalize(plain, attention=attention(data_dependent=True))
        assert type(plain) is hf.ViTForImageClassification and not hasattr(plain.config, "variational")
        given = inputs("vit-single")
        expected = plain(**given).logits
        model = variationalize(plain, attention=attention(data_dependent="query"))
        assert torch.equal(model(**given).logits, expected)
        assert model(**given, num_posterior_samples=2).logits.shape == expected.shape

    @torch.no_grad()
    def test_row_longer_than_the_network_reads(self):
        """Refused where it is sampled; the mean pass does not read the row."""
        model, ids = retrofitted("llama", data_dependent=True), torch.ones(1, POSITIONS + 1, dtype=torch.long)
        assert model(ids).logits.shape == (1, POSITIONS + 1, VOCAB)
        with pytest.raises(ValueError, match=f"row of {POSITIONS + 1} keys.*max_position_embeddings={POSITIONS}"):
            model(ids, num_posterior_samples=1)
        assert model(ids[:, 1:], num_posterior_samples=1).logits.shape == (1, POSITIONS, VOCAB)

    def test_passes(self):
        model, given = retrofitted("bert-single"), inputs("bert-single")
        for name in ("output_uncertainty", "output_sample_logits"):
            with pytest.raises(ValueError, match=f"{name}=True needs posterior samples"):
                model(**given, **{name: True})
        with pytest.raises(ValueError, match="num_posterior_samples.*-1"):
            model(**given, num_posterior_samples=-1)
        with pytest.raises(ValueError, match="needs input_ids"):
            model(num_posterior_samples=2)
        for name in ("bert-multi", "bert-regression"):
            labels = targets(name, given)
            with pytest.raises(ValueError, match="output_sample_logits"):
                retrofitted(name)(**given, **labels, num_posterior_samples=2, output_uncertainty=True)
        for name in ("bert", "bert-spans"):
            with pytest.raises(ValueError, match="about the logits"):
                retrofitted(name)(**given, num_posterior_samples=2, output_uncertainty=True)

    def test_default_number_of_samples_is_of_train_mode(self):
        model, given = retrofitted("bert-single", num_posterior_samples=2), inputs("bert-single")
        assert torch.equal(model(**given).logits, stock("bert-single")(**given).logits)
        drawn = model.train()(**given, output_sample_logits=True).sample_logits
        assert drawn.shape[1] == 2 and len(model.posterior_sites) == LAYERS
        assert sum(isinstance(module, AttentionPosterior) for module in model.modules()) == LAYERS
        assert model.bert.encoder.layer[0].attention.self.posterior.num_heads == HEADS
