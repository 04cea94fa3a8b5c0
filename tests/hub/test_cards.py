"""What a card says, and that it says nothing else."""

import math
import re

import pytest
import yaml
from huggingface_hub import ModelCard

from hf_variational import evaluate_language_model, model_card
from hf_variational.hub.cards import is_untouched, template_path

FACTS = {
    "data": "Chapters | of a book",
    "dataset": "Salesforce/wikitext",
    "tokenizer": "BPE, 67 tokens",
    "training_tokens": 123456,
    "recipe": {"arguments": {"learning_rate": 1e-3, "max_steps": 100}},
    "hardware": "2 CPU cores",
    "license": "apache-2.0",
    "language": "en",
    "remark": "found nowhere else",
}
METRICS = {
    "samples": {"nll": 1.23456, "perplexity": 3.4369, "mutual_information": 0.0123456, "num_tokens": 12345},
    "mean_pass": {"nll": 1.3, "perplexity": 3.6693, "num_tokens": 12345},
    "conditions": {"num_posterior_samples": 8, "block_size": 128},
}


def test_a_card_without_facts_says_so(model):
    card = model_card(model)
    parsed = ModelCard(card)
    assert "## Data\n\nNot recorded.\n" in card
    assert "## Recipe\n\nNot recorded.\n" in card
    assert "## Measured\n\nNot measured.\n" in card
    assert parsed.data.eval_results is None and parsed.data.license is None and parsed.data.datasets is None
    total = sum(parameter.numel() for parameter in model.parameters())
    variational = sum(parameter.numel() for name, parameter in model.named_parameters() if ".eve." in name)
    assert f"| Parameters | {total:,}, of which {variational:,} (" in card
    assert "all 2 layers" in card
    for setting in ("mean='identity'", "scale='input'", "scale_rank=2", "prior='empirical'", "initial_scale=0.5"):
        assert setting in card
    assert "trust_remote_code" not in card and "needs the package" in card


def test_facts_and_metrics_are_all_there(model):
    card = model_card(model, FACTS, METRICS, path="me/book", has_code=True, has_tokenizer=True)
    parsed = ModelCard(card)
    assert parsed.data.license == "apache-2.0" and parsed.data.language == ["en"]
    assert parsed.data.datasets == ["Salesforce/wikitext"] and parsed.data.pipeline_tag == "text-generation"
    assert "Chapters | of a book" in card and "123,456" in card and "- remark: found nowhere else" in card
    recipe = re.search(r"```yaml\n(.*?)\n```", card, re.DOTALL).group(1)
    assert yaml.safe_load(recipe) == FACTS["recipe"]
    assert "| | 8 posterior samples | mean pass |" in card
    assert "| NLL | 1.235 | 1.3 |" in card and "| Mutual information | 0.01235 | – |" in card
    assert "| Scored tokens | 12,345 | 12,345 |" in card
    assert "Conditions: num_posterior_samples 8; block_size 128." in card
    assert 'from_pretrained("me/book", trust_remote_code=True)' in card
    assert 'AutoTokenizer.from_pretrained("me/book")' in card
    results = {(result.metric_type, result.metric_name): result.metric_value for result in parsed.data.eval_results}
    assert results[("perplexity", "Perplexity (8 posterior samples)")] == pytest.approx(3.4369)
    assert results[("perplexity", "Perplexity (mean pass)")] == pytest.approx(3.6693)


def test_several_texts_and_the_log_of_the_trainer(model):
    several = model_card(model, metrics={"In domain": METRICS, "Source code": METRICS})
    assert "### In domain" in several and "### Source code" in several
    assert {result.dataset_name for result in ModelCard(several).data.eval_results} == {"In domain", "Source code"}
    log = {"eval_nll": 2.0, "eval_mean_pass_nll": 3.0, "eval_runtime": 9.0, "epoch": 1.0}
    assert "| NLL | 2 | 3 |" in model_card(model, metrics=log)
    with pytest.raises(ValueError, match="eval_runtime"):
        model_card(model, metrics={"eval_runtime": 1.0})
    with pytest.raises(ValueError, match="neither 'samples' nor 'mean_pass'"):
        model_card(model, metrics={"In domain": {"nll": 1.0}})
    with pytest.raises(ValueError, match="'speed'"):
        model_card(model, metrics={"In": METRICS, "speed": 3})


def test_what_is_measured_goes_straight_into_a_card(model):
    measured = evaluate_language_model(model, [[1, 5, 9, 7], [3, 4]], 2, progress=False)
    card = model_card(model, metrics=measured)
    assert "| | 2 posterior samples | mean pass |" in card and "| Scored tokens | 4 | 4 |" in card


def test_the_twin_claims_no_uncertainty(twin):
    card = model_card(twin, metrics=evaluate_language_model(twin, [[1, 5, 9, 7]], progress=False))
    assert "deterministic twin" in card and "| | mean pass |" in card
    assert "output_uncertainty" not in card and "mutual_information" not in card
    assert "eve" not in ModelCard(card).data.tags
    logged = model_card(twin, metrics={"eval_nll": 2.0, "eval_mean_pass_nll": 2.0})
    assert "posterior samples" not in logged.partition("## Measured")[2] and "| NLL | 2 |" in logged


def test_metadata_holds_no_local_paths_and_no_infinities(model):
    metrics = {"mean_pass": {"perplexity": math.inf, "accuracy": 0.5}}
    parsed = ModelCard(model_card(model, {"dataset": ["./texts", "a/b", "/tmp/x"], "base_model": "../old"}, metrics))
    assert parsed.data.datasets == ["a/b"] and parsed.data.base_model is None
    assert [result.metric_type for result in parsed.data.eval_results] == ["accuracy"]


def test_text_from_outside_cannot_break_the_card(model):
    recipe = "name: |\n  ```\n  end\n"
    card = model_card(model, {"recipe": recipe, "name": "a: {b}", "data": "{{ 1 + 1 }}"}, path='odd"name')
    assert "````yaml\n" + recipe.strip() + "\n````" in card
    assert "{{ 1 + 1 }}" in card and r'from_pretrained("odd\"name")' in card
    assert ModelCard(card).text.strip().startswith("# a: {b}")


def test_llama_is_named_only_where_its_pass_is_the_mean_pass(model):
    assert "LlamaForCausalLM.from_pretrained" in model_card(model)
    model.config.eve.mean = "gain"
    assert "LlamaForCausalLM" not in model_card(model)


def test_a_card_knows_whether_it_was_edited(model):
    card = model_card(model, FACTS, METRICS)
    assert is_untouched(card)
    assert is_untouched(card.replace("\n", "\r\n"))
    tagged = ModelCard(card)
    tagged.data.tags.append("added-by-a-push")
    assert is_untouched(str(tagged))
    assert not is_untouched(card.replace("Chapters", "Pages"))
    assert not is_untouched(card.replace("apache-2.0", "mit"))
    assert not is_untouched(card + "\nA line below.\n")
    assert not is_untouched("# My model\n")
    assert not is_untouched("---\na: [\n---\n" + card)


def test_the_template_is_the_one_of_the_checkout():
    assert template_path().name == "template.md"
    assert "{{ metadata }}" in template_path().read_text()
