"""A tempered model against `temper` of the stock model's logits."""

import pytest
import torch
from baseline_models import dropped, given, stock, with_positions
from hypothesis import given as each
from hypothesis import settings
from hypothesis import strategies as st
from torch.nn import functional as F

from hf_variational import evaluate_language_model, fit_temperature
from hf_variational.baselines import tempered, untempered
from hf_variational.evaluation.temperature import temper


@settings(max_examples=20, deadline=None)
@each(temperature=st.floats(0.1, 10), family=st.sampled_from(["llama", "gpt2"]))
def test_logits_and_loss_are_those_of_temper(temperature, family):
    inputs = with_positions(given())
    log_p = temper(stock(family)(**inputs).logits, temperature)
    model = tempered(stock(family), temperature)
    out = model(**inputs, labels=inputs["input_ids"])
    torch.testing.assert_close(out.logits.log_softmax(-1), log_p, rtol=1e-4, atol=1e-4)
    expected = F.nll_loss(log_p[:, :-1].flatten(0, 1), inputs["input_ids"][:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)
    sampled = model(**inputs, num_posterior_samples=2, output_uncertainty=True)
    torch.testing.assert_close(sampled.logits, log_p, rtol=1e-4, atol=1e-4)
    entropy = -(log_p.exp() * log_p).sum(-1)
    torch.testing.assert_close(sampled.uncertainty.predictive_entropy, entropy, rtol=1e-3, atol=1e-4)


def test_generate_chooses_from_the_tempered_distribution():
    options = {"max_new_tokens": 3, "return_dict_in_generate": True, "output_logits": True, "do_sample": False}
    plain = stock("llama").generate(**given(), **options)
    result = tempered(stock("llama"), 2.0).generate(**given(), **options)
    assert torch.equal(result.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(result.logits), torch.stack(plain.logits) / 2)
    # What is sampled is what the stock model samples with the generation setting of that name.
    options |= {"do_sample": True, "max_new_tokens": 8}
    model, plain = tempered(stock("llama"), 2.0), stock("llama")
    torch.manual_seed(7)
    drawn = model.generate(**given(), **options).sequences
    torch.manual_seed(7)
    assert torch.equal(drawn, plain.generate(**given(), **options, temperature=2.0).sequences)


def test_a_fitted_temperature_is_the_best_of_the_model_it_was_fitted_on():
    data = list(given(batch=6, padding=0)["input_ids"])
    fitted = fit_temperature(stock("llama"), data, progress=False)
    model = tempered(stock("llama"), fitted.temperature)
    nll = evaluate_language_model(model, data, progress=False)["mean_pass"]["nll"]
    assert nll == pytest.approx(fitted.nll, rel=1e-4) and nll < fitted.untempered_nll
    assert fit_temperature(model, data, progress=False).temperature == pytest.approx(1, abs=1e-3)


def test_its_gradient_is_that_of_the_tempered_loss():
    model, labels = tempered(stock("llama"), 3.0).train(), given()["input_ids"]
    model(**given(), labels=labels).loss.backward()
    plain = stock("llama").train()
    logits = plain(**given()).logits / 3
    F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()
    torch.testing.assert_close(model.lm_head.weight.grad, plain.lm_head.weight.grad)


def test_untempered_it_is_the_stock_model_and_so_is_what_it_saves(tmp_path):
    model, plain = tempered(stock("gpt2"), 2.0), stock("gpt2")
    model.save_pretrained(tmp_path)
    assert torch.equal(type(plain).from_pretrained(tmp_path)(**given()).logits, plain(**given()).logits)
    again = untempered(model)
    assert type(again) is type(plain) and vars(again).keys() == vars(plain).keys()
    assert torch.equal(again(**given()).logits, plain(**given()).logits)


def test_bad_input_is_refused():
    for temperature in (0, -1.0, float("inf"), float("nan"), True, "2"):
        with pytest.raises(ValueError, match="A temperature is a finite number above 0"):
            tempered(stock("llama"), temperature)
    with pytest.raises(ValueError, match="at temperature 2.0 already"):
        tempered(tempered(stock("llama"), 2.0), 3.0)
    with pytest.raises(ValueError, match="posterior samples of its own"):
        tempered(dropped("llama"), 2.0)
    with pytest.raises(ValueError, match="was not made by tempered"):
        untempered(stock("llama"))
