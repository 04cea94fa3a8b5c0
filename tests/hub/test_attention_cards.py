"""What a card says of variational attention, and of models that are no language models."""

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import LlamaForCausalLM

from hf_variational import (
    EVEConfig,
    VariationalAttentionConfig,
    VariationalGPTConfig,
    VariationalGPTForCausalLM,
    VariationalGPTForSequenceClassification,
    VariationalGPTForTokenClassification,
    evaluate_language_model,
    model_card,
    save_for_hub,
)

SIZES = {
    "vocab_size": 67,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}


def build(**options):
    torch.manual_seed(0)
    return VariationalGPTForCausalLM(VariationalGPTConfig(**SIZES, **options)).eval()


def attention(kind="dirichlet", **settings):
    return VariationalAttentionConfig(kind, **settings)


def row(card, label):
    (line,) = [line for line in card.splitlines() if line.startswith(f"| {label} |")]
    return line


@pytest.mark.parametrize(
    ("kind", "data_dependent", "words"),
    [
        (
            "gaussian",
            False,
            "logits that are Gaussian around the ordinary ones, with a scale σ that is learned for each",
        ),
        (
            "dirichlet",
            "query",
            "Dirichlet-distributed around the ordinary ones, with a concentration a that a small netwo",
        ),
        (
            "approximate_dirichlet",
            True,
            "(in an approximation) around the ordinary ones, with a concentration a that a",
        ),
    ],
)
def test_attention_alone(kind, data_dependent, words):
    model = build(eve=None, attention=attention(kind, data_dependent=data_dependent), attention_layers=[1])
    card = model_card(model)
    assert words in card and "in 1 of 2 layers (number 1, counted from 0) every row of attention weights" in card
    own = sum(parameter.numel() for name, parameter in model.named_parameters() if ".self_attn.posterior." in name)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert f"| Parameters | {total:,}, of which {own:,} (" in card
    assert row(card, "Attention posterior's parameters") == f"| Attention posterior's parameters | {own:,} |"
    settings = row(card, "Attention posterior")
    assert f"`kind={kind!r}`, `data_dependent={data_dependent!r}`" in settings and "`prior='contextual'`" in settings
    # what its kind has no use for is no fact about it
    unused, used = ("concentration", "scale") if kind == "gaussian" else ("scale", "concentration")
    assert f"prior_{used}=" in settings and unused not in settings and "initial_raw" not in settings
    assert ("hidden_size=16" in settings) == bool(data_dependent)
    assert "EVE" not in card and "feed-forward unit" not in card
    tags = ModelCard(card).data.tags
    assert {"variational", "uncertainty", "variational-attention"} <= set(tags) and "eve" not in tags
    assert "output_uncertainty=True" in card and "deterministic twin" not in card


def test_units_and_attention_together():
    model = build(eve=EVEConfig(scale_rank=2), attention=attention(initial_raw=-7.0), variational_layers=[0])
    card = model_card(model, {"license": "mit"})
    assert "in 1 of 2 layers (number 0, counted from 0) every feed-forward unit" in card
    assert "and in all 2 layers every row of\nattention weights is random" in card
    variational = sum(p.numel() for name, p in model.named_parameters() if ".eve." in name or ".posterior." in name)
    assert f"of which {variational:,} (" in card
    assert "scale_rank=2" in row(card, "EVE")
    settings = row(card, "Attention posterior")
    assert "`initial_raw=-7.0`" in settings and "initial_concentration" not in settings
    assert {"eve", "variational-attention"} <= set(ModelCard(card).data.tags)


def test_a_llama_reads_the_mean_pass(tmp_path):
    model = build(eve=None, attention=attention())
    save_for_hub(model, tmp_path / "model")
    assert 'LlamaForCausalLM.from_pretrained("model")' in (tmp_path / "model" / "README.md").read_text()
    ids = torch.tensor([[1, 5, 9, 20]])
    llama = LlamaForCausalLM.from_pretrained(tmp_path / "model").eval()
    torch.testing.assert_close(llama(ids).logits, model(ids).logits)


def test_what_is_measured_goes_straight_into_a_card():
    model = build(eve=None, attention=attention())
    card = model_card(model, metrics=evaluate_language_model(model, [[1, 5, 9, 7]], 2, progress=False))
    assert "| | 2 posterior samples | mean pass |" in card and "| Mutual information |" in card


@pytest.mark.parametrize(
    ("head", "auto", "task"),
    [
        (VariationalGPTForSequenceClassification, "AutoModelForSequenceClassification", "text-classification"),
        (VariationalGPTForTokenClassification, "AutoModelForTokenClassification", "token-classification"),
    ],
)
def test_a_classifier_is_no_language_model(tmp_path, head, auto, task):
    model = head(VariationalGPTConfig(**SIZES, eve=None, attention=attention()))
    save_for_hub(model, tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    assert ModelCard(card).data.pipeline_tag == task
    assert f"{auto}.from_pretrained" in card and "CausalLM" not in card and "generate" not in card
    assert f"`{auto.replace('AutoModel', 'Llama')}.from_pretrained" in card
    assert "causal language model" not in card
    assert list(VariationalGPTConfig.get_config_dict(tmp_path / "model")[0]["auto_map"]) == ["AutoConfig", auto]
    assert head._auto_class is None
