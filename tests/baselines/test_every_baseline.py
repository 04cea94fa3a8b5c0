"""One tester that runs every baseline over two models: all speak the interface of the posterior samples."""

import math

import pytest
import torch
from baseline_models import (
    ENSEMBLES,
    FAMILIES,
    LAYERS,
    METHODS,
    PEFT_METHODS,
    SAMPLES,
    VOCAB,
    given,
    stock,
    with_positions,
)
from torch.nn import functional as F

from hf_variational import evaluate_language_model, fit_temperature, token_scores
from hf_variational.evaluation.streaming import MEASURE_NAMES
from hf_variational.modeling.predictive import predictive_measures

each_method = pytest.mark.parametrize("method", METHODS)
each_family = pytest.mark.parametrize("family", FAMILIES)


def sampled(model, **options):
    options = {"num_posterior_samples": SAMPLES, "output_uncertainty": True, "output_sample_logits": True, **options}
    with torch.no_grad():
        return model(**with_positions(given()), **options)


@each_family
@each_method
def test_logits_are_the_log_of_the_mean_probability_and_the_measures_those_of_the_samples(method, family):
    out = sampled(METHODS[method](family))
    batch, length = given()["input_ids"].shape
    assert out.sample_logits.shape == (batch, SAMPLES, length, VOCAB)
    torch.testing.assert_close(out.logits, out.sample_logits.double().exp().mean(1).log().float())
    targets = F.pad(given()["input_ids"][:, 1:], (0, 1), value=-100)
    expected = predictive_measures(out.sample_logits.flatten(0, 1), SAMPLES, targets)
    for name, value in expected.items():
        torch.testing.assert_close(out.uncertainty[name], value, equal_nan=True)
    spread = out.uncertainty.mutual_information.max()
    assert spread == 0 if method == "temperature" else spread > 1e-3


@each_family
@each_method
def test_loss_is_the_negative_log_likelihood_of_the_predictive_distribution(method, family):
    model, labels = METHODS[method](family), given()["input_ids"].masked_fill(given()["attention_mask"] == 0, -100)
    out = sampled(model, labels=labels)
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(out.nll, expected)
    torch.manual_seed(1)
    whole = sampled(model, labels=labels).loss
    torch.manual_seed(1)
    accumulated = sampled(model, labels=labels, num_items_in_batch=torch.tensor(100)).loss
    torch.testing.assert_close(accumulated * 100, whole * (labels[:, 1:] != -100).sum())


@each_family
@each_method
def test_without_samples_the_stock_model_answers(method, family):
    model, inputs = METHODS[method](family), with_positions(given())
    with torch.no_grad():
        out = model(**inputs, num_posterior_samples=0, labels=inputs["input_ids"])
        expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), inputs["input_ids"][:, 1:].flatten())
        if method in ENSEMBLES:
            plain = model.members[0](**inputs).logits
        elif method in PEFT_METHODS:
            plain = model(**inputs, num_posterior_samples=0).logits
            assert (plain - stock(family)(**inputs).logits).abs().max() > 1e-3  # of the adapter
        else:
            plain = stock(family)(**inputs).logits / (1.7 if method == "temperature" else 1)
    assert torch.equal(out.logits, plain)
    torch.testing.assert_close(out.loss, expected)


@each_family
@each_method
@pytest.mark.parametrize(
    "options",
    [{"do_sample": False}, {"do_sample": True}, {"num_beams": 2}, {"cache_implementation": "static"}],
    ids=["greedy", "sampling", "beams", "static"],
)
def test_generate_returns_the_measures_of_each_token(method, family, options):
    model, prompt = METHODS[method](family), given()
    result = model.generate(
        **prompt,
        **{"max_new_tokens": 4, "disable_compile": True, **options},
        num_posterior_samples=SAMPLES,
        output_uncertainty=True,
        return_dict_in_generate=True,
    )
    assert result.sequences.shape == (2, prompt["input_ids"].shape[1] + 4)
    assert set(result.uncertainty) == set(MEASURE_NAMES)
    for value in result.uncertainty.values():
        assert value.shape == (2, 4) and torch.isfinite(value).all()
    assert 0 < result.uncertainty.predictive_entropy.max() <= math.log(VOCAB) + 1e-5
    spread = result.uncertainty.mutual_information.max()
    assert spread < 1e-6 if method == "temperature" else spread > 1e-3


@each_family
@each_method
def test_evaluation_takes_it_as_it_is_and_repeats_with_its_seed(method, family):
    model = METHODS[method](family)
    data = list(given(batch=4, padding=0)["input_ids"])
    options = {"num_posterior_samples": SAMPLES, "seed": 0, "progress": False}
    first, second = (evaluate_language_model(model, data, **options) for _ in range(2))
    assert first == second
    if method == "temperature":  # nothing is random
        assert "samples" not in first and model.variational_layers == []
    else:
        assert first["samples"]["mutual_information"] > 1e-3
        # The head counts as the layer behind the last.
        assert model.variational_layers == ([LAYERS] if method == "last_layer_laplace" else list(range(LAYERS)))
    fitted = fit_temperature(model, data, **options)
    assert fitted.nll <= fitted.untempered_nll
    key = "mean_pass" if method == "temperature" else "samples"
    assert fitted.untempered_nll == pytest.approx(first[key]["nll"], rel=1e-5)
    scores = token_scores(model, data, **options)
    assert scores.evaluation().compute()["nll"] == pytest.approx(fitted.untempered_nll, rel=1e-5)


@each_family
@each_method
def test_the_cache_holds_a_row_for_each_sample_and_says_so_when_it_is_continued_otherwise(method, family):
    model, inputs = METHODS[method](family), given(padding=0)
    with torch.no_grad():
        cache = model(**inputs, num_posterior_samples=SAMPLES, use_cache=True).past_key_values
    assert cache.get_seq_length() == inputs["input_ids"].shape[1]
    token = {"input_ids": inputs["input_ids"][:, :1], "past_key_values": cache}
    if method in ENSEMBLES:
        with torch.no_grad():
            model(**token, num_posterior_samples=1)
        with pytest.raises(ValueError, match="tokens of different members"):
            model(**token, num_posterior_samples=2)
        return
    if method == "last_layer_laplace":  # the body runs once for any number of samples
        assert cache.layers[0].keys.shape[0] == 2
        model(**token, num_posterior_samples=2)
        return
    assert cache.layers[0].keys.shape[0] == 2 * SAMPLES
    with pytest.raises(ValueError, match=f"num_posterior_samples={SAMPLES}, this pass has 2"):
        model(**token, num_posterior_samples=2)


@each_family
@each_method
def test_bfloat16(method, family):
    model = METHODS[method](family).to(torch.bfloat16)
    out = sampled(model)
    assert out.logits.dtype == torch.float32 and torch.isfinite(out.logits).all()


@each_method
def test_a_tuple_and_the_last_positions(method):
    model, inputs = METHODS[method]("llama"), with_positions(given())
    torch.manual_seed(0)
    whole = model(**inputs, num_posterior_samples=SAMPLES, output_uncertainty=True)
    torch.manual_seed(0)
    last = model(**inputs, num_posterior_samples=SAMPLES, output_uncertainty=True, logits_to_keep=2)
    torch.testing.assert_close(last.logits, whole.logits[:, -2:])
    for name, value in last.uncertainty.items():
        torch.testing.assert_close(value, whole.uncertainty[name][:, -2:], equal_nan=True)
    torch.manual_seed(0)
    answer = model(
        **inputs, num_posterior_samples=SAMPLES, labels=inputs["input_ids"], use_cache=False, return_dict=False
    )
    torch.manual_seed(0)
    named = model(**inputs, num_posterior_samples=SAMPLES, labels=inputs["input_ids"], use_cache=False)
    assert torch.equal(answer[0], named.loss) and torch.equal(answer[1], named.logits)
    with pytest.raises(ValueError, match="leave out logits_to_keep, got 2"):
        model(**inputs, num_posterior_samples=SAMPLES, labels=inputs["input_ids"], logits_to_keep=2)


@each_method
@pytest.mark.parametrize("samples", [-1, 1.5, True, "8"])
def test_what_is_no_number_of_samples_is_refused(method, samples):
    with pytest.raises(ValueError, match="num_posterior_samples must be a whole number of at least 0"):
        METHODS[method]("llama")(**given(), num_posterior_samples=samples)


@each_method
def test_measures_of_no_samples_are_refused(method):
    model = METHODS[method]("llama")
    with pytest.raises(ValueError, match="output_uncertainty=True needs posterior samples"):
        model(**given(), num_posterior_samples=0, output_uncertainty=True)
    with pytest.raises(ValueError, match="Per-token uncertainty needs posterior samples"):
        model.generate(**given(), num_posterior_samples=0, output_uncertainty=True, return_dict_in_generate=True)
