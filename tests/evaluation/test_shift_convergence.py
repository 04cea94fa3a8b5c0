"""Metrics at several numbers of samples: closed forms, what Jensen's inequality fixes exactly, and brute force."""

import math
from types import SimpleNamespace

import pytest
import torch
from shift_models import ID, letters, spelled, variational
from torch import nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from hf_variational import EVEConfig
from hf_variational.evaluation.convergence import SampleConvergence, sample_convergence
from hf_variational.evaluation.language_model import evaluate_language_model
from hf_variational.evaluation.streaming import METRIC_NAMES, StreamingEvaluation
from hf_variational.modeling.predictive import log_mean_probability, predictive_measures

VOCAB = len(ID)
STILL = EVEConfig(scale="scalar", initial_scale=1e-5)


class Coin(nn.Module):
    """Two tokens, whose probabilities in a sample are (½ + x, ½ − x) with x uniform in ±`spread`, fresh everywhere."""

    def __init__(self, spread=0.3):
        super().__init__()
        self.spread = nn.Parameter(torch.tensor(spread))
        self.variational_layers = [0]
        self.config = SimpleNamespace(pad_token_id=None)

    def forward(self, input_ids, attention_mask=None, num_posterior_samples=0, **options):
        shape = (input_ids.shape[0], num_posterior_samples, input_ids.shape[1])
        x = self.spread * (2 * torch.rand(shape, device=input_ids.device) - 1)
        return SimpleNamespace(sample_logits=torch.stack([0.5 + x, 0.5 - x], -1).log())


@pytest.fixture(scope="module")
def model():
    return variational(EVEConfig(scale="input", scale_rank=2, initial_scale=0.6))


@pytest.fixture(scope="module")
def convergence(model):
    return sample_convergence(model, letters(6), (1, 2, 4, 8), repeats=3, seed=2, progress=False)


# ---- Closed forms ----


def test_the_conditional_variance_is_s_minus_one_of_s_of_its_limit():
    data = [[0, 1] * 20] * 20
    found = sample_convergence(Coin(), data, (1, 2, 4, 8, 16), repeats=2, progress=False)
    limit = 2 * 0.3**2 / 3  # two tokens, each with the variance of a uniform number
    for size, estimate in found.estimates("conditional_variance").items():
        assert estimate.n == 2 * 16 // size and estimate.unit == "draw"
        error = 1e-7 + 4 * estimate.sd / math.sqrt(estimate.n)
        assert abs(estimate.mean - (size - 1) / size * limit) < error and error < 0.002
        # of n draws at one size the spread is that of fresh tokens: 780 of them
        assert estimate.sd < 0.1 / math.sqrt(780 * size / 4)
    bias = found.bias("conditional_variance")
    assert set(bias) == {1, 2, 4, 8}
    for size, estimate in bias.items():
        assert estimate.n == 2 and estimate.unit == "repeat"
        assert estimate.mean == pytest.approx((1 / 16 - 1 / size) * limit, abs=0.002)
    # to second order so is the mutual information
    information = sample_convergence(Coin(0.05), data, (2, 4, 8), repeats=2, progress=False)
    means = {size: estimate.mean for size, estimate in information.estimates("mutual_information").items()}
    limit = 0.05**2 / 3 * 2  # Var / (2 p̄), of two tokens
    assert means == pytest.approx({size: (size - 1) / size * limit for size in (2, 4, 8)}, rel=0.05)


def test_samples_that_are_identical_converge_at_once():
    found = sample_convergence(Coin(0.0), [[0, 1] * 5], (1, 2, 3, 7), repeats=2, progress=False)
    for name, expected in {"nll": math.log(2), "predictive_entropy": math.log(2), "mutual_information": 0.0}.items():
        for size, estimate in found.estimates(name).items():
            assert estimate.n == 2 * (7 // size)
            assert estimate.mean == pytest.approx(expected, abs=1e-6) and estimate.sd == pytest.approx(0, abs=1e-9)
        assert all(difference.mean == pytest.approx(0, abs=1e-6) for difference in found.bias(name).values())
    flat = sample_convergence(variational(STILL), letters(3), (1, 4), repeats=1, progress=False)
    for name, values in flat.values[1].items():
        torch.testing.assert_close(values, flat.values[4][name].expand(1, 4), rtol=1e-3, atol=1e-3, msg=name)


# ---- What holds exactly ----


def test_what_joining_samples_does_to_the_same_samples(convergence):
    """Groups of 2S are pairs of groups of S, so these hold of every repeat and not only on average."""
    means = {
        name: torch.stack([metrics[name].mean(-1) for metrics in convergence.values.values()])
        for name in ("nll", "predictive_entropy", "expected_entropy", "mutual_information", "conditional_variance")
    }
    steps = {name: table.diff(dim=0) for name, table in means.items()}
    assert (steps["nll"] < 0).all()
    for name in ("predictive_entropy", "mutual_information", "conditional_variance"):
        assert (steps[name] > 0).all(), name
    torch.testing.assert_close(steps["expected_entropy"], torch.zeros(3, 3).double(), rtol=0, atol=1e-5)
    for name in ("mutual_information", "conditional_variance", "token_variance", "top1_flip_rate"):
        assert convergence.values[1][name].abs().max() < 1e-7
    assert all(estimate.mean < 0 for estimate in convergence.bias("mutual_information").values())


def test_estimates_and_bias_by_hand():
    one = torch.tensor([[1.0, 2.0, 3.0, 6.0], [2.0, 2.0, 4.0, 8.0]], dtype=torch.float64)
    four = torch.tensor([[2.5], [3.0]], dtype=torch.float64)
    found = SampleConvergence({1: {"nll": one}, 4: {"nll": four}})
    assert found.estimates("nll")[1].mean == 3.5 and found.estimates("nll")[1].n == 8
    assert found.estimates("nll")[4].sd == pytest.approx(math.sqrt(0.125))
    bias = found.bias("nll")
    assert list(bias) == [1] and bias[1].mean == pytest.approx((0.5 + 1.0) / 2) and bias[1].n == 2


def test_draws_get_closer(convergence):
    spread = [estimate.sd for estimate in convergence.estimates("nll").values()]
    assert spread[0] > spread[2] and spread[0] > 0


# ---- Brute force ----


@pytest.mark.parametrize("block", [1, 300, 2**22])
def test_groups_against_brute_force(model, block, monkeypatch):
    monkeypatch.setattr("hf_variational.evaluation.predictions.BLOCK_ENTRIES", block)
    data = letters(4)
    found = sample_convergence(model, data, (3, 1, 7), repeats=2, batch_size=4, seed=5, progress=False)
    assert list(found.values) == [1, 3, 7]
    ids = torch.tensor(data)
    observed = nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    for repeat in range(2):
        torch.manual_seed(5 + repeat)
        with torch.no_grad():
            samples = model(ids, num_posterior_samples=7, output_sample_logits=True).sample_logits
        for size in (1, 3, 7):
            for group in range(7 // size):
                logits = samples[:, group * size : (group + 1) * size].flatten(0, 1)
                evaluation = StreamingEvaluation()
                evaluation.update(log_mean_probability(logits, size), ids, predictive_measures(logits, size, observed))
                mine = {name: values[repeat, group].item() for name, values in found.values[size].items()}
                expected = evaluation.compute()
                assert expected.pop("num_tokens") == 36 and set(mine) == set(METRIC_NAMES) - {"num_tokens"}
                assert mine == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_all_samples_are_the_evaluation_with_as_many(model):
    data = letters(5)
    found = sample_convergence(model, data, [4], repeats=1, batch_size=8, seed=3, progress=False)
    expected = evaluate_language_model(model, data, 4, progress=False, seed=3)["samples"]
    assert {name: values.item() for name, values in found.values[4].items()} == pytest.approx(
        {name: value for name, value in expected.items() if name != "num_tokens"}, rel=1e-4, abs=1e-6
    )
    assert str(found.estimates("nll")[4]).endswith("(one draw)") and found.bias("nll") == {}


def test_rows_of_several_lengths_in_batches(model):
    rows = [row[: 10 - index % 3] for index, row in enumerate(letters(6))]
    padded = sample_convergence(variational(STILL), rows, [2], 1, 6, progress=False)
    single = sample_convergence(variational(STILL), rows, [2], 1, 1, progress=False)
    for name in ("nll", "accuracy", "predictive_entropy"):
        torch.testing.assert_close(padded.values[2][name], single.values[2][name], rtol=1e-3, atol=1e-4)
    training, state = variational(EVEConfig()).train(), torch.get_rng_state()
    sample_convergence(training, rows, [1], 1, progress=False)
    assert torch.equal(state, torch.get_rng_state()) and training.training


# ---- Bad input ----


def test_bad_input_is_named(model):
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(ValueError, match="LlamaForCausalLM has no posterior samples"):
        sample_convergence(LlamaForCausalLM(config), letters(), progress=False)
    with pytest.raises(ValueError, match="`samples` is empty"):
        sample_convergence(model, letters(), [], progress=False)
    for wrong in ({"samples": [2, 0]}, {"repeats": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="at least 1, got 0"):
            sample_convergence(model, letters(), **wrong, progress=False)
    with pytest.raises(ValueError, match="read 3 times"):
        sample_convergence(model, iter([{"input_ids": torch.tensor(letters())}]), progress=False)
    with pytest.raises(ValueError, match="none of the 2 sequences"):
        sample_convergence(model, [[3], [4]], [2], progress=False)
    with pytest.raises(ValueError, match="'kl': choose one of nll"):
        SampleConvergence({2: {"nll": torch.zeros(1, 1)}}).estimates("kl")
    broken = variational(EVEConfig())
    nn.init.constant_(broken.lm_head.weight, math.nan)
    loader = DataLoader([{"input_ids": torch.tensor(row)} for row in spelled(4)], batch_size=2)
    with pytest.raises(ValueError, match=r"batch 0, row 0 \(sequence 0"):
        sample_convergence(broken, loader, [2], progress=False)
