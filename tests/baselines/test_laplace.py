"""Laplace's curvature against autograd and laplace-torch's own, its posterior against its moments and its limits."""

import copy
import importlib
import sys

import pytest
import torch
import transformers as hf
from baseline_models import (
    SAMPLES,
    VOCAB,
    ensemble,
    given,
    greedy_by_hand,
    last_layer,
    mean_probability,
    sequences,
    stock,
    weights,
    with_positions,
)
from torch import nn
from torch.nn import functional as F

pytest.importorskip("laplace")

from laplace.curvature.curvlinops import CurvlinopsGGN

from hf_variational import evaluate_language_model
from hf_variational.baselines import diagonal_laplace, last_layer_laplace, remove_last_layer_laplace
from hf_variational.baselines import laplace as last_layer_module
from hf_variational.baselines.laplace import HeadCurvature
from hf_variational.baselines.weight_laplace import SequenceFisher, _Logits

HIDDEN, CLASSES = 3, 5
each_bias = pytest.mark.parametrize("bias", [True, False])


def tiny_head(bias: bool) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(HIDDEN, CLASSES, bias=bias).double()


def tiny_data(count: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(count, HIDDEN, generator=generator, dtype=torch.float64)
    return states, torch.randint(0, CLASSES, (count,), generator=generator)


def hessian(head: nn.Linear, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Of the summed loss in all parameters, flat; of a linear map it is the generalised Gauss-Newton matrix."""
    names, values = zip(*head.named_parameters(), strict=True)
    sizes = [value.numel() for value in values]

    def loss(flat):
        parts = (part.view_as(value) for part, value in zip(flat.split(sizes), values, strict=True))
        logits = torch.func.functional_call(head, dict(zip(names, parts, strict=True)), x)
        return F.cross_entropy(logits, y, reduction="sum")

    flat = torch.cat([value.detach().flatten() for value in values])
    return torch.autograd.functional.hessian(loss, flat)


@each_bias
def test_the_diagonal_is_that_of_the_hessian(bias):
    head, (x, y) = tiny_head(bias), tiny_data()
    loss, diagonal = HeadCurvature(head, "classification").diag(x, y)
    torch.testing.assert_close(diagonal, hessian(head, x, y).diagonal())
    torch.testing.assert_close(loss, F.cross_entropy(head(x), y, reduction="sum"))


@each_bias
def test_the_kronecker_factors_of_one_datum_are_the_hessian(bias):
    head, (x, y) = tiny_head(bias), tiny_data(1)
    _, kron = HeadCurvature(head, "classification").kron(x, y, N=1)
    exact, count = hessian(head, x, y), HIDDEN * CLASSES
    found = kron.to_matrix()
    torch.testing.assert_close(found[:count, :count], exact[:count, :count])
    torch.testing.assert_close(found[count:, count:], exact[count:, count:])


@each_bias
def test_both_are_what_laplace_torch_computes_logit_by_logit(bias):
    head, (x, y) = tiny_head(bias), tiny_data()
    ours, theirs = (backend(head, "classification") for backend in (HeadCurvature, CurvlinopsGGN))
    torch.testing.assert_close(ours.diag(x, y)[1], theirs.diag(x, y)[1])
    torch.testing.assert_close(ours.kron(x, y, N=7)[1].to_matrix(), theirs.kron(x, y, N=7)[1].to_matrix())


def test_the_fit_is_the_same_for_any_batches_and_leaves_padding_out():
    padded = given(batch=2, padding=0, seed=9)
    padded["attention_mask"][1, 4:] = 0
    rows = [given(batch=2, padding=0, seed=9)["input_ids"][0], given(batch=2, padding=0, seed=9)["input_ids"][1, :4]]
    for structure in ("kron", "diag"):
        one = last_layer_laplace(stock("llama"), rows, structure, 1.0, batch_size=1, progress=False)._laplace
        for other in (
            last_layer_laplace(stock("llama"), rows, structure, 1.0, batch_size=2, progress=False)._laplace,
            last_layer_laplace(stock("llama"), iter([padded]), structure, 1.0, progress=False)._laplace,
        ):
            assert (one.n_data, float(one.loss)) == (9, pytest.approx(float(other.loss), rel=1e-4))
            if structure == "diag":
                torch.testing.assert_close(one.H, other.H, rtol=1e-3, atol=1e-4)
            else:
                torch.testing.assert_close(one.H_facs.to_matrix(), other.H_facs.to_matrix(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("structure", ["kron", "diag"])
def test_draws_have_the_moments_of_the_posterior(structure):
    model = last_layer("llama", structure)
    laplace = model._laplace
    drawn = torch.stack(model._draws(800))
    precision = laplace.posterior_precision
    variance = 1 / precision if structure == "diag" else _kron_variance(precision)
    error = (drawn.mean(0) - laplace.mean) / (variance / 800).sqrt()
    assert error.abs().max() < 5 and error.square().mean() == pytest.approx(1, abs=0.12)
    ratio = drawn.var(0) / variance
    assert ratio.mean() == pytest.approx(1, abs=0.01) and (ratio - 1).abs().max() < 0.3
    torch.testing.assert_close(laplace.mean, model.lm_head.weight.flatten())


def _kron_variance(precision) -> torch.Tensor:
    ((outer, inner),), ((outer_values, inner_values),) = precision.eigenvectors, precision.eigenvalues
    inverse = 1 / (outer_values[:, None] * inner_values + precision.deltas)
    return (outer.square() @ inverse @ inner.square().T).flatten()


@pytest.mark.parametrize("family", ["llama", "phi"])
@torch.no_grad()
def test_rows_are_the_naive_loop_over_the_drawn_heads(family):
    plain = biased() if family == "phi" else stock(family)
    model = last_layer_laplace(plain, sequences(), "kron", 2.0, progress=False)
    inputs = with_positions(given())
    seen = []
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    layers = []
    model.model.layers[0].register_forward_hook(lambda module, args, output: layers.append(args[0].shape[0]))
    out = model(**inputs, num_posterior_samples=SAMPLES, output_sample_logits=True)
    handle.remove()
    assert layers == [2]  # the body ran once, for one row a sequence
    count = head.weight.numel()
    singles = []
    for drawn in model._draws(SAMPLES):
        bias = drawn[count:] if family == "phi" else None
        singles.append(F.linear(seen[0], drawn[:count].view_as(head.weight), bias))
    for sample, single in enumerate(singles):
        torch.testing.assert_close(out.sample_logits[:, sample], single.log_softmax(-1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.logits.double(), mean_probability(singles), rtol=1e-4, atol=1e-4)


def biased() -> hf.PreTrainedModel:
    """A model whose head has a bias that is not 0."""
    sizes = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = hf.PhiForCausalLM(hf.PhiConfig(**sizes, vocab_size=VOCAB, initializer_range=0.25, resid_pdrop=0.0)).eval()
    nn.init.normal_(model.lm_head.bias)
    return model


@torch.no_grad()
def test_greedy_generation_has_one_draw_a_sample_from_the_first_token_to_the_last():
    model = last_layer("gpt2", "diag", 2.0)

    def log_p(inputs):
        return model(**inputs, num_posterior_samples=SAMPLES, use_cache=False).logits

    tokens, chosen_from = greedy_by_hand(log_p, given(), 5)
    result = model.generate(
        **given(), num_posterior_samples=SAMPLES, max_new_tokens=5, return_dict_in_generate=True, output_logits=True
    )
    assert torch.equal(result.sequences, tokens)
    torch.testing.assert_close(torch.stack(result.logits, 1), chosen_from, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("structure", ["kron", "diag"])
@torch.no_grad()
def test_the_spread_falls_with_the_prior_precision_to_the_trained_model(structure):
    inputs = with_positions(given())
    expected = stock("llama")(**inputs).logits.log_softmax(-1)
    spreads = []
    for precision in (1.0, 1e2, 1e4, 1e12):
        model = last_layer("llama", structure, precision)
        out = model(**inputs, num_posterior_samples=8, output_uncertainty=True)
        spreads.append(float(out.uncertainty.mutual_information.mean()))
    assert spreads == sorted(spreads, reverse=True) and spreads[-1] < 1e-6 < spreads[0]
    torch.testing.assert_close(out.logits, expected, rtol=1e-4, atol=1e-4)
    model.prior_precision = 1.0
    again = model(**inputs, num_posterior_samples=8, output_uncertainty=True).uncertainty.mutual_information
    assert float(again.mean()) == pytest.approx(spreads[0])


@pytest.mark.parametrize("structure", ["kron", "diag"])
def test_the_marginal_likelihood_is_largest_at_its_prior_precision(structure):
    laplace = last_layer("llama", structure, "marglik")._laplace
    best = float(laplace.prior_precision)
    at = [float(laplace.log_marginal_likelihood(torch.tensor(best * factor))) for factor in (0.8, 1.0, 1.25)]
    assert at[1] > at[0] and at[1] > at[2]


def test_validation_chooses_the_lowest_negative_log_likelihood(monkeypatch):
    precisions = (1.0, 30.0, 1e3, 1e6)
    monkeypatch.setattr(last_layer_module, "PRECISIONS", precisions)
    held_out = sequences(seed=11)
    chosen = last_layer("llama", "diag", "validation", validation=held_out)
    nll = {}
    for precision in precisions:
        model = last_layer("llama", "diag", precision)
        nll[precision] = evaluate_language_model(model, held_out, 8, progress=False)["samples"]["nll"]
    assert chosen.prior_precision == pytest.approx(min(nll, key=nll.get))
    drawn = weights("llama", "validation", validation=held_out)
    for precision in precisions:
        result = evaluate_language_model(weights("llama", precision), held_out, SAMPLES, progress=False)
        nll[precision] = result["samples"]["nll"]
    assert drawn.prior_precision == pytest.approx(min(nll, key=nll.get))


def test_removed_it_is_the_stock_model_again():
    model, plain = last_layer("llama"), stock("llama")
    again = remove_last_layer_laplace(model)
    assert type(again) is type(plain) and vars(again).keys() == vars(plain).keys()
    assert torch.equal(again(**given()).logits, plain(**given()).logits)


class Bigram(nn.Module):
    """A language model small enough for the Fisher matrix by hand: the next token's logits of a token's embedding."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(CLASSES, HIDDEN), nn.Linear(HIDDEN, CLASSES)

    def forward(self, input_ids):
        # The sum over the past, so that positions share more than the weights.
        return self.head(self.embedding(input_ids).cumsum(1))


def test_the_fisher_diagonal_is_unbiased():
    model = Bigram()
    tokens, targets = torch.tensor([[1, 3, 0, 2], [4, 4, 1, 0]]), torch.tensor([[3, 0, 2, -100], [4, 1, 0, -100]])
    parameters = list(model.parameters())
    exact = torch.zeros(sum(parameter.numel() for parameter in parameters))
    log_p = model(tokens).log_softmax(-1)
    for row in range(2):
        for position in range(3):
            for token in range(CLASSES):
                score = torch.autograd.grad(log_p[row, position, token], parameters, retain_graph=True)
                probability = log_p[row, position, token].detach().exp()
                exact += probability * torch.cat([part.flatten() for part in score]).square()
    backend = SequenceFisher(model, "classification")
    torch.manual_seed(0)
    draws = torch.stack([backend.diag(tokens, targets)[1] for _ in range(1500)])
    error = (draws.mean(0) - exact) / (draws.std(0) / 1500**0.5 + 1e-6)
    assert error.abs().max() < 5
    assert float((draws.mean(0) - exact).norm() / exact.norm()) < 0.05
    loss, _ = backend.diag(tokens, targets)
    expected = F.cross_entropy(log_p.flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(loss, expected)


def test_members_are_drawn_around_the_trained_weights_and_frozen_ones_stay():
    model = stock("gpt2")
    model.transformer.h[0].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    drawn = diagonal_laplace(model, sequences(), 40, 25.0, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    values = [torch.stack([dict(one.named_parameters())[name] for one in drawn.members]) for name in _names(model)]
    for name, value in zip(_names(model), values, strict=True):
        spread = value.std(0)
        if name.startswith("transformer.h.0"):
            assert spread.max() == 0
        else:  # the prior alone gives 1 / sqrt(25)
            assert 0 < spread.mean() < 0.21
    assert drawn.members[0].lm_head.weight is drawn.members[0].transformer.wte.weight
    state = torch.get_rng_state()
    again = diagonal_laplace(model, sequences(), 2, 25.0, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    expected = drawn.members[1].state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in again.members[1].state_dict().items())


def _names(model) -> list[str]:
    return [name for name, _ in model.named_parameters()]


@torch.no_grad()
def test_with_an_infinite_prior_precision_the_members_are_the_trained_model():
    drawn = weights("llama", 1e14)
    out = drawn(**given(), output_uncertainty=True)
    torch.testing.assert_close(out.logits, stock("llama")(**given()).logits.log_softmax(-1), rtol=1e-3, atol=1e-3)
    assert out.uncertainty.mutual_information.max() < 1e-5
    assert type(drawn) is type(ensemble("llama"))


def test_logits_as_laplace_torch_calls_them():
    plain = stock("llama")
    ids = given(padding=0)["input_ids"]
    assert torch.equal(_Logits(plain)(ids), plain(ids).logits)


def test_bad_input_is_refused(monkeypatch):
    model, data = stock("llama"), sequences()
    with pytest.raises(ValueError, match=r"has 2.4e\+06 entries: use structure='kron' or 'diag'"):
        last_layer_laplace(model, data, "full", 1.0)
    with pytest.raises(ValueError, match="structure='lowrank' is unknown"):
        last_layer_laplace(model, data, "lowrank", 1.0)
    monkeypatch.setattr(last_layer_module, "LARGEST_KRONECKER_VOCABULARY", 40)
    with pytest.raises(ValueError, match=r"a matrix of 48 x 48.*at most 40 can be had: use structure='diag'"):
        last_layer_laplace(model, data, "kron", 1.0)
    assert type(model) is hf.LlamaForCausalLM
    for precision in (0, -1.0, float("inf"), True):
        with pytest.raises(ValueError, match="prior_precision must be a finite number above 0"):
            last_layer_laplace(model, data, "diag", precision)
    with pytest.raises(ValueError, match="prior_precision='best' is unknown"):
        diagonal_laplace(model, data, prior_precision="best")
    with pytest.raises(ValueError, match="belong together"):
        last_layer_laplace(model, data, "diag")
    with pytest.raises(ValueError, match="belong together"):
        diagonal_laplace(model, data, prior_precision="marglik", validation=data)
    nothing = [{"input_ids": data[0], "labels": torch.full_like(data[0], -100)}]
    with pytest.raises(ValueError, match="There is nothing to fit to"):
        last_layer_laplace(model, nothing, "diag", 1.0)
    with pytest.raises(ValueError, match="There is nothing to fit to"):
        diagonal_laplace(model, nothing, prior_precision=1.0)
    with pytest.raises(ValueError, match="padding in front"):
        diagonal_laplace(model, iter([given()]), prior_precision=1.0)
    with pytest.raises(ValueError, match="was not made by last_layer_laplace"):
        remove_last_layer_laplace(model)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"head_dim": 8, "num_key_value_heads": 1, "vocab_size": VOCAB, "initializer_range": 1.0}
    softcapped = hf.Gemma2Config(**sizes, final_logit_softcapping=0.5)
    with pytest.raises(ValueError, match="a softcap, a scale or a temperature stands behind it"):
        last_layer_laplace(hf.Gemma2ForCausalLM(softcapped).eval(), data, "diag", 1.0, progress=False)


def test_without_laplace_torch_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "laplace", None)
    monkeypatch.delitem(sys.modules, "hf_variational.baselines.laplace")
    with pytest.raises(ImportError, match=r"'hf-variational\[laplace\]'"):
        importlib.import_module("hf_variational.baselines.laplace")
