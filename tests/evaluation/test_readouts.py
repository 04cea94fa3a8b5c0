"""Readouts against doing it by hand in probabilities, and their choice on a model whose samples are known."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_variational import EVEConfig, VariationalGPTConfig, VariationalGPTForCausalLM
from hf_variational.evaluation import predictions, token_scores
from hf_variational.evaluation.calibration import expected_calibration_error
from hf_variational.evaluation.readouts import (
    CONFIDENCE_WEIGHTED,
    ENTROPY_WEIGHTED,
    MEAN_LOGITS,
    MEAN_PROBABILITY,
    MEDIAN_PROBABILITY,
    READOUT_NAMES,
    TEMPERATURES,
    ReadoutScores,
    choose_readout,
    evaluate_readouts,
    read_samples,
    select_readout,
)
from hf_variational.evaluation.streaming import conditional_value_at_risk
from hf_variational.evaluation.temperature import temper

VOCAB = 7
EACH = pytest.mark.parametrize("readout", READOUT_NAMES)


class Bigram(nn.Module):
    """Sample s has logits of its own for every current token, the same whatever stands around it."""

    def __init__(self, samples=5, spread=1.0, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        table = 2 * torch.randn(VOCAB, VOCAB, generator=generator)
        self.table = nn.Parameter(table + spread * torch.randn(samples, VOCAB, VOCAB, generator=generator))
        self.variational_layers = [0]
        self.config = SimpleNamespace(pad_token_id=None)

    def forward(self, input_ids, attention_mask=None, num_posterior_samples=0, output_sample_logits=False, **options):
        assert output_sample_logits and not self.training and not torch.is_grad_enabled()
        return SimpleNamespace(
            sample_logits=self.table[:num_posterior_samples, input_ids].log_softmax(-1).transpose(0, 1)
        )


def rows(count=20, length=9, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (length - index % 3,), generator=generator).tolist() for index in range(count)]


def samples(number, vocab=11, positions=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(positions, number, vocab, generator=generator, dtype=torch.float64)).log_softmax(-1)


def by_hand(p, readout):
    """p [S, vocab] to [vocab], in probabilities."""
    p = p.numpy()
    if readout == MEAN_LOGITS:
        joined = np.prod(p, axis=0) ** (1 / len(p))
    elif readout == MEDIAN_PROBABILITY:
        joined = np.median(p, axis=0)
    else:
        entropy = -(p * np.log(p)).sum(1)
        weights = {
            MEAN_PROBABILITY: np.ones(len(p)),
            ENTROPY_WEIGHTED: np.exp(-entropy),
            CONFIDENCE_WEIGHTED: p.max(1),
        }[readout]
        joined = (weights[:, None] * p).sum(0)
    return joined / joined.sum()


# ---- Joining ----


@EACH
@pytest.mark.parametrize("number", [1, 2, 3, 8])
def test_each_readout_is_what_its_formula_says(readout, number):
    log_p = samples(number)
    joined = read_samples(log_p, readout)
    assert joined.shape == (6, 11)
    for position, answer in zip(log_p, joined, strict=True):
        np.testing.assert_allclose(answer.exp(), by_hand(position.exp(), readout), rtol=1e-9)


@EACH
def test_one_sample_and_identical_ones_are_themselves(readout):
    one = samples(1)
    torch.testing.assert_close(read_samples(one, readout), one[:, 0])
    torch.testing.assert_close(read_samples(one.expand(-1, 6, -1), readout), one[:, 0])


@EACH
@given(seed=st.integers(0, 100), number=st.integers(2, 6))
@settings(max_examples=10, deadline=None, derandomize=True)
def test_the_order_of_samples_and_tokens_says_nothing(readout, seed, number):
    log_p = samples(number, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    order, tokens = torch.randperm(number, generator=generator), torch.randperm(11, generator=generator)
    joined = read_samples(log_p, readout)
    torch.testing.assert_close(read_samples(log_p[:, order], readout), joined)
    torch.testing.assert_close(read_samples(log_p[..., tokens], readout), joined[:, tokens])
    torch.testing.assert_close(joined.logsumexp(-1), torch.zeros(6, dtype=torch.float64))


def test_sure_samples_count_more():
    sure = torch.tensor([0.98, 0.01, 0.01]).double()
    unsure = torch.tensor([0.2, 0.5, 0.3]).double()
    log_p = torch.stack([sure, unsure]).log()
    mean = read_samples(log_p, MEAN_PROBABILITY)[0]
    assert read_samples(log_p, ENTROPY_WEIGHTED)[0] > mean and read_samples(log_p, CONFIDENCE_WEIGHTED)[0] > mean


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_samples_that_exclude_each_other(readout, dtype):
    # each is sure of a token of its own: every median underflows in float32
    logits = torch.zeros(3, 5, dtype=dtype)
    logits[range(3), range(3)] = 200.0
    joined = read_samples(logits.log_softmax(-1), readout)
    assert joined.dtype == torch.float32 and joined.isfinite().all()
    if readout == MEDIAN_PROBABILITY:
        torch.testing.assert_close(joined.exp(), torch.full((5,), 0.2))
    else:
        torch.testing.assert_close(joined.exp(), torch.tensor([1 / 3, 1 / 3, 1 / 3, 0, 0]))


# ---- Over data ----


def naive(model, data, number):
    """Scores of every readout and temperature from all log-probabilities at once."""
    current = torch.tensor([token for row in data for token in row[:-1]])
    targets = torch.tensor([token for row in data for token in row[1:]])
    log_p = model.table[:number, current].log_softmax(-1).transpose(0, 1).detach()
    found = {}
    for readout in READOUT_NAMES:
        for temperature in TEMPERATURES:
            log_q = temper(read_samples(log_p, readout), temperature)
            nll = nn.functional.nll_loss(log_q, targets, reduction="none")
            confidence, predicted = log_q.exp().max(-1)
            found[readout, temperature] = (
                nll.mean().item(),
                expected_calibration_error(confidence, predicted == targets),
                conditional_value_at_risk(nll),
                len(targets),
            )
    return found


def numbers(table):
    return {
        (row.readout, row.temperature): (row.nll, row.expected_calibration_error, row.cvar_nll, row.num_tokens)
        for row in table
    }


@pytest.mark.parametrize("batch_size, block", [(1, 2**22), (8, 2**22), (8, 50), (20, 1)])
def test_the_pass_is_the_naive_computation_whatever_the_batches_and_blocks(monkeypatch, batch_size, block):
    monkeypatch.setattr(predictions, "BLOCK_ENTRIES", block)
    model = Bigram()
    found = numbers(evaluate_readouts(model, rows(), 5, batch_size, progress=False))
    expected = naive(model, rows(), 5)
    assert list(found) == list(expected) and len(found) == 40
    for pair, values in expected.items():
        assert found[pair] == pytest.approx(values, rel=1e-5, abs=1e-6)
    assert model.training


def test_left_padding_changes_nothing():
    model = Bigram()
    padded = [
        {
            "input_ids": [0] * (9 - len(row)) + row,
            "attention_mask": [0] * (9 - len(row)) + [1] * len(row),
        }
        for row in rows()
    ]
    plain = numbers(evaluate_readouts(model, rows(), 4, progress=False))
    for pair, values in numbers(evaluate_readouts(model, padded, 4, 8, progress=False)).items():
        assert values == pytest.approx(plain[pair], rel=1e-6)


def test_all_readouts_coincide_with_one_sample():
    found = numbers(evaluate_readouts(Bigram(), rows(), 1, progress=False))
    for (_, temperature), values in found.items():
        assert values == pytest.approx(found[MEAN_PROBABILITY, temperature], rel=1e-6)


def test_the_mean_of_probabilities_is_what_the_package_predicts():
    torch.manual_seed(0)
    config = VariationalGPTConfig(
        vocab_size=67,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        initializer_range=0.3,
        eve=EVEConfig(initial_scale=0.5),
    )
    model = VariationalGPTForCausalLM(config)
    data = [[1, 5, 9, 20, 33, 2], [4, 8, 15, 16], [23, 42, 7, 7, 7]]
    before = torch.get_rng_state()
    (found,) = evaluate_readouts(
        model, data, 6, 2, readouts=[MEAN_PROBABILITY], temperatures=[1.0], seed=3, progress=False
    )
    assert torch.equal(before, torch.get_rng_state()) and model.training
    expected = token_scores(model, data, 6, 2, seed=3, progress=False).evaluation().compute()
    assert found.nll == pytest.approx(expected["nll"], rel=1e-5)
    assert found.expected_calibration_error == pytest.approx(expected["expected_calibration_error"], rel=1e-4)
    assert found.cvar_nll == pytest.approx(expected["cvar_nll"], rel=1e-5)
    assert found.num_tokens == 12
    model.eval()
    with torch.no_grad():
        out = model(torch.tensor(data[:1]), num_posterior_samples=6, output_sample_logits=True)
    torch.testing.assert_close(read_samples(out.sample_logits.transpose(1, 2), MEAN_PROBABILITY), out.logits)


# ---- Choosing ----


def row(readout, ece, cvar, nll):
    return ReadoutScores(readout, 1.0, nll, ece, cvar, 100)


def test_rules_by_hand():
    table = [row("a", 0.01, 9.0, 3.5), row("b", 0.05, 7.0, 3.4), row("c", 0.02, 7.5, 3.2), row("d", 0.01, 8.0, 3.3)]
    assert choose_readout(table, "ece").readout == "d"  # as calibrated as "a", with a lighter tail
    assert choose_readout(table, "cvar").readout == "b"
    # ranks in ECE, CVaR and NLL: a 1.5 + 4 + 4, b 4 + 1 + 3, c 3 + 2 + 1, d 1.5 + 3 + 2
    assert choose_readout(table, "balanced").readout == "c"
    equal = [row("a", 0.01, 8.0, 3.0), row("b", 0.02, 7.0, 2.9), row("c", 0.03, 6.0, 2.95)]
    assert choose_readout(equal, "balanced").readout == "b"  # 1 + 3 + 3, 2 + 2 + 1, 3 + 1 + 2
    tied = [row("a", 0.01, 8.0, 3.0), row("b", 0.02, 7.0, 3.0)]
    assert choose_readout(tied, "balanced").readout == "a"


def drawn(model, temperature, number, count, seed):
    """Text whose next token is drawn from the tempered predictive distribution."""
    torch.manual_seed(seed)
    log_p = temper(read_samples(model.table[:number].log_softmax(-1).transpose(0, 1), MEAN_PROBABILITY), temperature)
    text = torch.randint(0, VOCAB, (count, 30))
    for position in range(1, 30):
        text[:, position] = torch.multinomial(log_p[text[:, position - 1]].exp(), 1)[:, 0]
    return text.tolist()


def test_a_known_temperature_is_chosen_and_helps_on_test_data():
    model = Bigram(samples=4)
    with torch.no_grad():
        validation, test = (drawn(model, 1.4, 4, 300, seed) for seed in (0, 1))
    found = select_readout(model, validation, test, 4, 100, rule="ece", readouts=[MEAN_PROBABILITY], progress=False)
    assert found.chosen.temperature == pytest.approx(1.4, abs=0.11)
    assert len(found.validation) == len(TEMPERATURES) and found.chosen in found.validation
    assert found.test.temperature == found.chosen.temperature and found.test.num_tokens == 300 * 29
    assert found.test.expected_calibration_error < 0.5 * found.untouched.expected_calibration_error
    assert (found.untouched.readout, found.untouched.temperature) == (MEAN_PROBABILITY, 1.0)
    again = evaluate_readouts(model, test, 4, readouts=[MEAN_PROBABILITY], temperatures=[1.0], progress=False)
    assert found.untouched.nll == pytest.approx(again[0].nll, rel=1e-6)


def test_the_readout_that_made_the_text_is_chosen():
    model = Bigram(samples=4, spread=3.0)
    with torch.no_grad():
        text = drawn(model, 1.0, 4, 400, 2)
    table = evaluate_readouts(model, text, 4, 100, progress=False)
    best = min(table, key=lambda scores: scores.nll)
    assert (best.readout, best.temperature) == (MEAN_PROBABILITY, 1.0)
    assert choose_readout(table, "balanced").readout == MEAN_PROBABILITY


# ---- Bad input ----


def broken():
    model = Bigram()
    with torch.no_grad():
        model.table[1, 3] = math.nan
    return model


def deterministic():
    model = Bigram()
    model.variational_layers = []
    return model


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: read_samples(samples(2), "mode"), "one of mean_probability, .* got 'mode'"),
        (lambda: evaluate_readouts(Bigram(), rows(), readouts=["mode"]), "got 'mode'"),
        (lambda: evaluate_readouts(Bigram(), rows(), temperatures=[0.0]), "above 0, got 0.0"),
        (lambda: evaluate_readouts(Bigram(), rows(), temperatures=[]), "nothing to try"),
        (lambda: evaluate_readouts(Bigram(), rows(), 0), "`num_posterior_samples` is .* at least 1, got 0"),
        (lambda: evaluate_readouts(Bigram(), [[1], [2]], progress=False), "nothing to evaluate"),
        (lambda: evaluate_readouts(deterministic(), rows()), "Bigram has no posterior samples .* fit_temperature"),
        (
            lambda: evaluate_readouts(broken(), [[1, 2], [0, 3, 3]], 5, 1, progress=False),
            r"batch 1, row 0 \(sequence 1",
        ),
        (lambda: choose_readout([]), "no readout to choose"),
        (lambda: choose_readout([row("a", 1, 1, 1)], "nll"), "one of ece, cvar, balanced, got 'nll'"),
        (lambda: select_readout(Bigram(), rows(), rows(), rule="nll"), "got 'nll'"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
