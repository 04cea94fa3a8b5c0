"""The fitted temperature against closed forms, against a grid, and on a model whose predictions are known."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_variational.evaluation import predictions
from hf_variational.evaluation import temperature as temperature_module
from hf_variational.evaluation.temperature import fit_temperature, optimal_temperature, temper

VOCAB = 7


class Bigram(nn.Module):
    """Logits from the current token; a posterior sample adds noise to them."""

    def __init__(self, variational=True):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(2 * torch.randn(VOCAB, VOCAB, generator=generator))
        self.variational_layers = [0] if variational else []
        self.config = SimpleNamespace(pad_token_id=None)
        self.passes = 0

    def forward(self, input_ids, attention_mask=None, num_posterior_samples=0, **options):
        assert not self.training and not torch.is_grad_enabled()
        self.passes += 1
        logits = self.table[input_ids]
        if num_posterior_samples:
            noise = torch.randn(num_posterior_samples, *logits.shape)
            logits = (logits + noise).log_softmax(-1).logsumexp(0) - math.log(num_posterior_samples)
        return SimpleNamespace(logits=logits)


def rows(count=20, length=9, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (length - index % 3,), generator=generator).tolist() for index in range(count)]


def example(n=500, vocab=11, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(n, vocab, generator=generator, dtype=torch.float64)).to(dtype)
    # often, but not always, among the probable ones
    targets = torch.distributions.Categorical(logits=0.5 * logits.double())
    torch.manual_seed(seed)
    return logits, targets.sample()


def nll(logits, targets, temperature=1.0):
    return torch.nn.functional.cross_entropy(logits.double() / temperature, targets).item()


@given(gap=st.floats(0.2, 12.0), right=st.integers(60, 99))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_of_two_tokens_in_closed_form(gap, right):
    # every position says the same: the best confidence is the share that is right, sigmoid(gap / T) = right / 100
    targets = (torch.arange(100) >= right).long()
    logits = torch.tensor([[gap, 0.0]], dtype=torch.float64).expand(100, -1)
    expected = gap / math.log(right / (100 - right))
    fitted = optimal_temperature(logits, targets)
    assert fitted.temperature == pytest.approx(expected, rel=1e-6)
    share = right / 100
    assert fitted.nll == pytest.approx(-share * math.log(share) - (1 - share) * math.log(1 - share), rel=1e-6)
    assert fitted.untempered_nll == pytest.approx(nll(logits, targets), rel=1e-9)
    assert fitted.num_tokens == 100


@pytest.mark.parametrize("true", [0.4, 1.0, 1.7, 5.0])
def test_a_known_temperature_is_recovered(true):
    generator = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(20_000, 12, generator=generator)
    targets = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    # the targets are from softmax(logits), and the model answers with logits that are `true` times too large
    assert optimal_temperature(true * logits, targets).temperature == pytest.approx(true, rel=0.03)


@given(scale=st.floats(0.05, 20.0), offset=st.floats(-500, 500))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_the_scale_of_the_logits_goes_into_the_temperature_and_their_offset_does_not(scale, offset):
    logits, targets = example()
    reference = optimal_temperature(logits, targets)
    moved = optimal_temperature(scale * logits + offset, targets)
    assert moved.temperature == pytest.approx(scale * reference.temperature, rel=1e-5)
    assert moved.nll == pytest.approx(reference.nll, rel=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_gradient_is_zero_at_the_optimum_and_no_other_is_better(dtype):
    logits, targets = example(dtype=dtype)
    fitted = optimal_temperature(logits, targets)
    log_t = torch.tensor(math.log(fitted.temperature), dtype=torch.float64, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(logits.double() / log_t.exp(), targets)
    assert torch.autograd.grad(loss, log_t)[0].abs() < 1e-6
    assert fitted.nll == pytest.approx(loss.item(), rel=1e-6)
    grid = [nll(logits, targets, math.exp(step / 50)) for step in range(-100, 101)]
    assert fitted.nll <= min(grid) + 1e-6 <= fitted.untempered_nll


def test_the_sums_are_the_derivatives_of_the_likelihood():
    logits, targets = example(n=40)
    beta = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(beta * logits, targets, reduction="sum")
    (slope,) = torch.autograd.grad(loss, beta, create_graph=True)
    (curvature,) = torch.autograd.grad(slope, beta)
    expected = torch.stack([loss, slope, curvature, torch.tensor(40.0, dtype=torch.float64)]).detach()
    torch.testing.assert_close(temperature_module._sums(logits, targets, 0.8), expected)


def test_tempering():
    logits, _ = example()
    log_p = logits.log_softmax(-1)
    torch.testing.assert_close(temper(log_p, 1.0), log_p, rtol=0, atol=1e-12)
    torch.testing.assert_close(temper(log_p, 1), log_p, rtol=0, atol=1e-12)
    tempered = temper(log_p, 2.5).exp()
    torch.testing.assert_close(tempered, log_p.exp().pow(0.4) / log_p.exp().pow(0.4).sum(-1, keepdim=True))
    assert temper(log_p.float(), 2.5).dtype == torch.float32
    masked = torch.tensor([[0.0, -math.inf, -1.0]])
    assert temper(masked, 3.0).exp()[0, 1] == 0 and temper(masked, 3.0)[0, 0].isfinite()


def test_a_class_without_probability_adds_nothing():
    logits, targets = example()
    reference = optimal_temperature(logits, targets)
    masked = torch.cat([logits, torch.full((len(logits), 2), -math.inf, dtype=torch.float64)], dim=-1)
    assert optimal_temperature(masked, targets).temperature == pytest.approx(reference.temperature, rel=1e-9)


def test_a_minimum_out_of_reach_is_said(caplog):
    logits, _ = example(n=50)
    temperature_module.logger.addHandler(caplog.handler)
    always_right = optimal_temperature(logits, logits.argmax(-1))
    assert always_right.temperature == pytest.approx(0.01) and "still falls at temperature 0.01" in caplog.text
    always_wrong = optimal_temperature(logits, logits.argmin(-1))
    assert always_wrong.temperature == pytest.approx(100) and "still falls at temperature 100" in caplog.text
    temperature_module.logger.removeHandler(caplog.handler)
    # nothing to fit: every temperature gives the same, so it stays where it is
    assert optimal_temperature(torch.zeros(3, 4), torch.tensor([0, 1, 2])).temperature == 1


def test_confident_and_wrong_from_far_away():
    # at T = 1 the curvature is so small that Newton's first step goes to the end of the range
    logits = torch.tensor([[80.0, 0.0]]).expand(10, -1)
    targets = torch.tensor([0] * 8 + [1] * 2)
    assert optimal_temperature(logits, targets).temperature == pytest.approx(80 / math.log(4), rel=1e-5)


def _targets_of(data):
    return torch.tensor([token for row in data for token in row[1:]])


def test_of_a_model():
    model, data = Bigram(), rows()
    logits = torch.cat([model.table.detach()[torch.tensor(row[:-1])] for row in data])
    expected = optimal_temperature(logits, _targets_of(data))
    model.train()
    fitted = fit_temperature(model, data, num_posterior_samples=0, batch_size=3, progress=False)
    assert model.training and model.passes == 7
    assert fitted.temperature == pytest.approx(expected.temperature, rel=1e-5)
    assert fitted.num_tokens == expected.num_tokens == len(_targets_of(data))
    assert fit_temperature(Bigram(variational=False), data, 4, progress=False).temperature == pytest.approx(
        fitted.temperature, rel=1e-6
    )


@pytest.mark.parametrize("samples", [0, 4])
def test_what_does_not_fit_is_computed_again_with_the_same_noise(samples, monkeypatch):
    monkeypatch.setattr(predictions, "BLOCK_ENTRIES", 5 * VOCAB)
    model, data = Bigram(), rows()
    state = torch.get_rng_state()
    kept = fit_temperature(model, data, samples, progress=False)
    once, model.passes = model.passes, 0
    again = fit_temperature(model, data, samples, cache_bytes=100, progress=False)
    assert model.passes > 2 * once
    assert again == kept
    assert torch.equal(state, torch.get_rng_state())
    other = fit_temperature(model, data, samples, seed=1, progress=False)
    assert (other == kept) is (samples == 0)


def test_samples_make_their_own_temperature():
    model, data = Bigram(), rows()
    assert fit_temperature(model, data, 4, progress=False) != fit_temperature(model, data, 0, progress=False)


def test_labels_choose_the_tokens():
    ids = torch.tensor([row for row in rows() if len(row) == 9])
    labels = ids.clone()
    labels[:, :4] = -100
    fitted = fit_temperature(Bigram(), [{"input_ids": ids, "labels": labels}].__iter__(), 0, progress=False)
    assert fitted.num_tokens == 5 * len(ids)


def test_bad_input_is_named():
    logits, targets = example()
    with pytest.raises(ValueError, match=r"\(0, 4\)"):
        optimal_temperature(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))
    with pytest.raises(ValueError, match=r"\(499,\)"):
        optimal_temperature(logits, targets[1:])
    impossible = logits.clone()
    impossible[3, targets[3]] = -math.inf
    with pytest.raises(ValueError, match=f"Token {targets[3]} is a target whose log-probability is -inf"):
        optimal_temperature(impossible, targets)
    with pytest.raises(ValueError, match="nan"):
        optimal_temperature(logits * math.nan, targets)
    for wrong in (0, -1.0, math.inf, math.nan, "1", True):
        with pytest.raises(ValueError, match=f"got {wrong!r}"):
            temper(logits, wrong)
    with pytest.raises(ValueError, match="nothing to evaluate"):
        fit_temperature(Bigram(), [], progress=False)
    with pytest.raises(ValueError, match="none of the 2 sequences"):
        fit_temperature(Bigram(), [[1], [2]], progress=False)
    with pytest.raises(ValueError, match="cache_bytes.*-1"):
        fit_temperature(Bigram(), rows(), cache_bytes=-1, progress=False)
    with pytest.raises(ValueError, match="num_posterior_samples.*1.5"):
        fit_temperature(Bigram(), rows(), 1.5, progress=False)
    batches = iter([{"input_ids": torch.tensor([[1, 2, 3]])}])
    with pytest.raises(ValueError, match="more than cache_bytes=10"):
        fit_temperature(Bigram(), batches, 0, cache_bytes=10, progress=False)
