"""The table of token scores: its columns against brute force, whatever the batches, the order and the padding."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_variational import EVEConfig, VariationalAttentionConfig, VariationalGPTConfig, VariationalGPTForCausalLM
from hf_variational.evaluation import (
    INTERNAL_NAMES,
    SCORE_NAMES,
    ClasswiseCalibration,
    TokenScores,
    expected_calibration_error,
    scores_at_temperatures,
    token_scores,
)
from hf_variational.modeling.posterior import unit_statistics

VOCAB = 13


def rows(count=7, seed=1, vocab=VOCAB):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, vocab, (9 - index % 4,), generator=generator).tolist() for index in range(count)]


def made(**options):
    torch.manual_seed(0)
    config = VariationalGPTConfig(
        vocab_size=VOCAB,
        hidden_size=12,
        intermediate_size=10,
        num_hidden_layers=3,
        num_attention_heads=2,
        pad_token_id=0,
        **options,
    )
    return VariationalGPTForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model():
    model = made(eve=EVEConfig(scale="input", scale_rank=2, initial_scale=0.3))
    with torch.no_grad():  # so that the scale depends on the token, and the predictions are not all alike
        for name, parameter in model.named_parameters():
            if name.endswith("scale_up"):
                parameter.normal_(0, 2.0)
        model.lm_head.weight.mul_(8)
    return model


def padded(data, side):
    length = max(map(len, data))
    ids = torch.zeros(len(data), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(data):
        here = slice(0, len(tokens)) if side == "right" else slice(length - len(tokens), length)
        ids[row, here] = torch.tensor(tokens)
        mask[row, here] = 1
    return [{"input_ids": ids, "attention_mask": mask}]


def assert_same(left: TokenScores, right: TokenScores, **tolerance):
    assert list(left.values) == list(right.values) and left.num_windows == right.num_windows
    for name in ("correct", "windows", "targets", "positions"):
        assert torch.equal(getattr(left, name), getattr(right, name)), name
    for name, values in left.values.items():
        torch.testing.assert_close(values, right.values[name], msg=name, **tolerance)


# ---- What a token is ----


def test_targets_and_positions():
    data = rows()
    scores = token_scores(made(), data, 0, progress=False)
    assert scores.targets.tolist() == [token for row in data for token in row[1:]]
    assert scores.positions.tolist() == [place for row in data for place in range(1, len(row))]
    assert len(scores) == sum(len(row) - 1 for row in data)
    assert scores.targets.dtype == scores.positions.dtype == torch.int64


def test_positions_of_packed_documents_and_of_chosen_labels():
    ids = torch.tensor([[1, 2, 3, 4, 5, 6]])
    places = torch.tensor([[0, 1, 2, 0, 1, 2]])
    labels = torch.tensor([[-100, 2, 3, -100, 5, -100]])
    batches = iter([{"input_ids": ids, "position_ids": places, "labels": labels}])
    scores = token_scores(made(), batches, 0, progress=False)
    assert scores.targets.tolist() == [2, 3, 5] and scores.positions.tolist() == [1, 2, 1]


@pytest.mark.parametrize("samples", [0, 1])
def test_padding_batches_and_order_change_nothing(model, samples):
    """The mean pass; and a sample whose noise, which is another in another batch, is too small to be seen."""
    data = rows()
    options = {"internal": True, "progress": False}
    if samples:
        model = made(eve=EVEConfig(initial_scale=1e-5))
    one = token_scores(model, data, samples, batch_size=1, **options)
    close = {"rtol": 2e-4, "atol": 2e-4} if samples else {"rtol": 1e-4, "atol": 1e-5}
    for batch_size in (2, 7):
        assert_same(one, token_scores(model, data, samples, batch_size=batch_size, **options), **close)
    for side in ("left", "right"):
        assert_same(one, token_scores(model, iter(padded(data, side)), samples, **options), **close)
    labelled = [
        {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}
        for batch in padded(data, "left")
    ]
    assert_same(one, token_scores(model, iter(labelled), samples, **options), **close)
    order = [4, 2, 6, 0, 1, 5, 3]
    turned = token_scores(model, [data[index] for index in order], samples, batch_size=3, **options)
    for place, index in enumerate(order):
        own, other = one.select(one.windows == index), turned.select(turned.windows == place)
        assert torch.equal(own.targets, other.targets)
        for name, values in own.values.items():
            torch.testing.assert_close(values, other.values[name], msg=name, **close)


# ---- Values ----


@pytest.mark.parametrize("samples", [0, 3])
@pytest.mark.parametrize("temperature", [1.0, 1.6])
def test_brier_score_against_brute_force(model, samples, temperature):
    data = [row for row in rows(12) if len(row) == 9]
    scores = token_scores(model, data, samples, temperature=temperature, seed=4, progress=False)
    torch.manual_seed(4)
    ids = torch.tensor(data)
    with torch.no_grad():
        logits = model(ids, num_posterior_samples=samples).logits.double()
    p = (logits / temperature).softmax(-1)[:, :-1].flatten(0, 1)
    one_hot = nn.functional.one_hot(ids[:, 1:].flatten(), VOCAB)
    expected = (p - one_hot).square().sum(-1)
    torch.testing.assert_close(scores.values["brier"].double(), expected, rtol=1e-5, atol=1e-5)


def test_predictions_that_are_calibrated_by_construction():
    """Tokens drawn from the distribution that the model predicts them with."""
    torch.manual_seed(0)
    table = 1.5 * torch.randn(VOCAB, VOCAB)
    tokens = torch.randint(0, VOCAB, (400, 1))
    for _ in range(24):
        tokens = torch.cat([tokens, torch.multinomial(table[tokens[:, -1]].softmax(-1), 1)], 1)
    classwise, sharp = ClasswiseCalibration(), ClasswiseCalibration()
    scores = token_scores(Table(table), tokens.tolist(), 0, batch_size=400, classwise=classwise, progress=False)
    n = len(scores)
    confidence = table.softmax(-1).amax(-1)[tokens[:, :-1].flatten()].double()
    assert n == 9600 and torch.equal(scores.correct, table.argmax(-1)[tokens[:, :-1]].flatten() == scores.targets)
    # every bin's gap has standard deviation √(Σ p (1 − p)) / n
    bins = torch.bucketize(confidence, torch.linspace(0, 1, 16, dtype=torch.float64)[1:-1])
    variance = torch.zeros(15, dtype=torch.float64).index_add_(0, bins, confidence * (1 - confidence))
    bound = float((variance.sqrt() / n).sum() * math.sqrt(2 / math.pi))
    spread = float((variance.sum() * (1 - 2 / math.pi)).sqrt() / n)
    found = scores.evaluation().compute()["expected_calibration_error"]
    assert abs(found - bound) < 4 * spread
    assert found == pytest.approx(expected_calibration_error(confidence, scores.correct), abs=1e-6)
    # the same predictions made sharper are not calibrated
    wrong = token_scores(Table(2 * table), tokens.tolist(), 0, batch_size=400, classwise=sharp, progress=False)
    assert wrong.evaluation().compute()["expected_calibration_error"] > 10 * bound
    assert sharp.compute() > 4 * classwise.compute()


class Table(nn.Module):
    """Logits from the current token."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(table)
        self.config = SimpleNamespace(pad_token_id=None)

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        return SimpleNamespace(logits=self.table[input_ids])


@pytest.mark.parametrize("block", [1, 40, 2**22])
def test_classwise_in_the_same_pass(model, block, monkeypatch):
    monkeypatch.setattr("hf_variational.evaluation.predictions.BLOCK_ENTRIES", block)
    data = rows()
    found = [ClasswiseCalibration(5), ClasswiseCalibration(5)]
    tables = scores_at_temperatures(model, data, [1.0, 2.0], 0, classwise=found, progress=False)
    whole = [ClasswiseCalibration(5), ClasswiseCalibration(5)]
    for row in data:
        with torch.no_grad():
            logits = model(torch.tensor([row])).logits[0, :-1].float()
        for temperature, classwise in zip((1.0, 2.0), whole, strict=True):
            classwise.update((logits / temperature).softmax(-1), torch.tensor(row[1:]))
    for mine, theirs in zip(found, whole, strict=True):
        assert mine.num_predictions == len(tables[0])
        assert mine.compute() == pytest.approx(theirs.compute(), rel=1e-4)


# ---- Statistics of the posteriors ----


@pytest.mark.parametrize("samples", [0, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"eve": EVEConfig(scale="input", scale_rank=2)},
        {"eve": EVEConfig(latent_dim=3, scale="unit", prior="empirical")},
        {"eve": EVEConfig(), "attention": VariationalAttentionConfig("gaussian")},
        {"eve": None, "attention": VariationalAttentionConfig("dirichlet")},
    ],
    ids=["low rank", "wide", "with attention", "attention"],
)
def test_internal_statistics_are_those_of_the_posteriors(options, samples):
    model, data = made(**options), rows(6)
    ids = torch.tensor([row[:6] for row in data])
    scores = token_scores(model, ids.tolist(), samples, internal=True, seed=3, progress=False)
    plain = token_scores(model, ids.tolist(), samples, seed=3, progress=False)
    assert set(scores.values) - set(plain.values) == ({"kl"} if options["eve"] is None else set(INTERNAL_NAMES))
    for name, values in plain.values.items():
        torch.testing.assert_close(values, scores.values[name], rtol=1e-5, atol=1e-6, msg=name)
    torch.manual_seed(3)
    with torch.no_grad():
        out = model(ids, labels=ids, num_posterior_samples=samples, output_posteriors=True)
    # the loss charges exactly these tokens
    assert scores.values["kl"].mean().item() == pytest.approx(out.kl.item(), rel=1e-4)
    if options["eve"] is None:
        return
    for name in ("scale", "mean_energy"):
        layers = torch.stack([getattr(layer, name).mean() for layer in out.posteriors.values()])
        assert scores.values[name].mean().item() == pytest.approx(layers.mean().item(), rel=1e-4), name


def test_unit_statistics_per_token_against_brute_force():
    torch.manual_seed(0)
    kl, log_scale, mean = torch.rand(2, 5, 4, 3), torch.randn(2, 5, 4, 3), torch.randn(2, 5, 4, 1)
    found = unit_statistics(kl, log_scale, mean, torch.ones(2, 5))
    torch.testing.assert_close(found["scale_per_token"], log_scale.exp().mean((-1, -2)))
    torch.testing.assert_close(found["mean_energy_per_token"], (3 * mean.square()).mean((-1, -2)))
    for name in ("scale", "mean_energy"):
        torch.testing.assert_close(found[f"{name}_per_token"].mean(), found[name].mean())


def test_a_model_without_posteriors_says_that_it_has_no_statistics(monkeypatch):
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    warned = []
    monkeypatch.setattr("hf_variational.evaluation.predictions.logger.warning", warned.append)
    scores = token_scores(model, rows(), 4, internal=True, progress=False)
    assert set(scores.values) == {"predictive_entropy", "one_minus_confidence", "nll", "brier"}
    assert len(warned) == 1 and "LlamaForCausalLM has no posteriors" in warned[0] and "mean_energy" in warned[0]


# ---- The table ----


@pytest.fixture(scope="module")
def scores(model):
    return token_scores(model, [*rows(), [3], rows(1)[0]], 2, internal=True, progress=False)


def test_the_names(scores):
    assert tuple(scores.values) == (*SCORE_NAMES, *INTERNAL_NAMES)


def test_a_selection_keeps_its_rows_together(scores):
    early = scores.select(scores.positions <= 3)
    assert 0 < len(early) < len(scores) and (early.positions <= 3).all()
    by_index = scores.select((scores.positions <= 3).nonzero().squeeze(-1))
    assert_same(early, by_index, rtol=0, atol=0)
    rest = scores.select(scores.positions > 3)
    total = early.values["nll"].double().sum() + rest.values["nll"].double().sum()
    assert total.item() == pytest.approx(scores.values["nll"].double().sum().item())
    means = early.window_means()["nll"]
    assert len(means) == scores.num_windows - 1  # one has no token to predict
    assert means[0].item() == pytest.approx(scores.values["nll"][:3].double().mean().item())
    evaluated = early.evaluation().compute()
    assert evaluated["num_tokens"] == len(early)
    assert evaluated["accuracy"] == pytest.approx(early.correct.double().mean().item())
    with pytest.raises(ValueError, match=r"\(2,\), and there are"):
        scores.select(torch.tensor([True, False]))


def test_concatenation_is_one_pass_over_all(model):
    data = [[3], *rows()]
    tables = [token_scores(model, part, 0, batch_size=1, progress=False) for part in (data[:3], data[3:4], data[4:])]
    whole = token_scores(model, data, 0, batch_size=1, progress=False)
    assert_same(TokenScores.concatenate(tables), whole, rtol=0, atol=0)
    assert_same(TokenScores.concatenate([whole]), whole, rtol=0, atol=0)
    with pytest.raises(ValueError, match="no token scores"):
        TokenScores.concatenate([])
    more = token_scores(model, data, 0, internal=True, progress=False)
    with pytest.raises(ValueError, match="kl, mean_energy, scale"):
        TokenScores.concatenate([whole, more])


# ---- Bad input ----


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_numbers_are_named(bad):
    class Broken(Table):
        def forward(self, input_ids, attention_mask=None, use_cache=None):
            logits = self.table[input_ids].clone()
            logits[(input_ids == 5).any(-1), 1, 2] = bad
            return SimpleNamespace(logits=logits)

    data = [[1, 2, 3], [2, 1, 3], [3, 1, 4], [1, 5, 2], [2, 2, 2]]
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"batch 1, row 1 \(sequence 3 of the data"):
        token_scores(Broken(torch.randn(VOCAB, VOCAB)), data, 0, batch_size=2, progress=False)


def test_ruled_out_tokens_are_no_error():
    table = torch.randn(VOCAB, VOCAB)
    table[:, 0] = -math.inf
    scores = token_scores(Table(table), rows(), 0, progress=False)
    assert all(values.isfinite().all() for values in scores.values.values())


def test_accumulators_of_another_number_are_refused(model):
    with pytest.raises(ValueError, match="1 accumulators for 2 temperatures"):
        scores_at_temperatures(model, rows(), [1, 2], 0, classwise=[ClasswiseCalibration()], progress=False)
