"""Corruption: what is replaced and by what, and what a sweep reports, on models whose answers are known."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shift_models import ID, LETTERS, letters, spelled, tokenizer_of_letters, variational
from torch import nn

from hf_variational import EVEConfig
from hf_variational.evaluation.shift import CorruptionSweep, _change, corrupt, corruption_sweep
from hf_variational.evaluation.shift_slices import score_metrics
from hf_variational.evaluation.streaming import MEASURE_NAMES
from hf_variational.evaluation.token_scores import token_scores
from hf_variational.modeling.predictive import PredictiveMeasures

KINDS = ("eos", "random")
BOS, EOS = ID["<s>"], ID["</s>"]
TOKENIZER = tokenizer_of_letters()


@pytest.fixture
def tokenizer():
    return TOKENIZER


@pytest.fixture(scope="module")
def model():
    return variational(EVEConfig(scale="input", scale_rank=2, initial_scale=0.4))


def replaced(rows, corrupted):
    return [torch.tensor(row) != torch.tensor(other["input_ids"]) for row, other in zip(rows, corrupted, strict=True)]


# ---- What is replaced ----


@pytest.mark.parametrize("kind", KINDS)
def test_each_token_is_replaced_with_the_given_probability(kind, tokenizer):
    rows = letters(count=40, length=500)
    for rate in (0.05, 0.15, 0.3):
        hits = torch.cat(replaced(rows, corrupt(rows, rate, kind, tokenizer=tokenizer)))
        spread = math.sqrt(rate * (1 - rate) / len(hits))
        assert abs(hits.double().mean().item() - rate) < 4 * spread
    # independently of its neighbours
    together = (hits[1:] & hits[:-1]).double().mean().item()
    assert together == pytest.approx(0.3**2, abs=4 * 0.3 / math.sqrt(len(hits)))


@given(rates=st.tuples(st.floats(0, 1), st.floats(0, 1)), kind=st.sampled_from(KINDS), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_what_is_replaced_stays_so_at_higher_rates_by_the_same_token(rates, kind, seed):
    rows, low, high = letters(count=3, length=30), min(rates), max(rates)
    fewer, more = (corrupt(rows, rate, kind, tokenizer=TOKENIZER, seed=seed) for rate in (low, high))
    for before, mine, theirs in zip(rows, fewer, more, strict=True):
        pairs = zip(before, mine["input_ids"], theirs["input_ids"], strict=True)
        assert all(token in (original, other) for original, token, other in pairs)


def test_both_kinds_replace_the_same_tokens(tokenizer):
    rows = letters()
    eos, random = (replaced(rows, corrupt(rows, 0.3, kind, tokenizer=tokenizer, seed=5)) for kind in KINDS)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(eos, random, strict=True))
    others = corrupt(rows, 0.3, tokenizer=tokenizer, seed=6)
    assert any(not torch.equal(mine, theirs) for mine, theirs in zip(eos, replaced(rows, others), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_the_targets_and_what_stands_in_front_stay(kind, tokenizer):
    rows = [[BOS, *row] for row in letters(3)] + [[EOS, BOS, *letters(1)[0], EOS]]
    whole = corrupt(rows, 1.0, kind, tokenizer=tokenizer)
    for row, other in zip(rows, whole, strict=True):
        front = 1 if row[0] == BOS else 2
        assert other["labels"] == row and other["input_ids"][:front] == row[:front]
        rest = other["input_ids"][front:]
        assert all(token == EOS for token in rest) if kind == "eos" else not {*rest} & {*tokenizer.all_special_ids}
    assert corrupt(rows, 0.0, kind, tokenizer=tokenizer) == [{"input_ids": row, "labels": row} for row in rows]


def test_random_tokens_are_all_the_others_alike(tokenizer):
    rows = [[ID["a"]] * 6000, [ID["j"]] * 6000]
    for row, other in zip(rows, corrupt(rows, 1.0, "random", tokenizer=tokenizer), strict=True):
        counts = torch.bincount(torch.tensor(other["input_ids"]), minlength=len(ID)).double()
        others = [ID[letter] for letter in LETTERS if ID[letter] != row[0]]
        assert counts[row[0]] == 0 and counts[others].sum() == 6000
        expected = 6000 / len(others)
        assert ((counts[others] - expected).abs() < 4.5 * math.sqrt(expected)).all()


def test_padding_stays_and_labels_are_kept(tokenizer):
    ids, mask = [3, 4, 5, 6, 2, 2], [1, 1, 1, 1, 0, 0]
    row = corrupt([{"input_ids": torch.tensor(ids), "attention_mask": mask}], 1.0, tokenizer=tokenizer)[0]
    assert row["input_ids"] == [EOS] * 4 + [2, 2] and row["attention_mask"] == mask
    assert row["labels"] == [3, 4, 5, 6, -100, -100]
    chosen = {"input_ids": [3, 4, 5], "labels": [-100, -100, 5]}
    assert corrupt([chosen], 1.0, tokenizer=tokenizer)[0] == {"input_ids": [EOS] * 3, "labels": [-100, -100, 5]}


def test_bad_corruptions_are_named(tokenizer):
    with pytest.raises(ValueError, match="one of eos, random, got 'mask'"):
        corrupt(letters(), 0.1, "mask", tokenizer=tokenizer)
    for rate in (-0.1, 1.5, True, "much", math.nan):
        with pytest.raises(ValueError, match=rf"`rate` .*got {rate!r}"):
            corrupt(letters(), rate, tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"shape \[1, 3\]"):
        corrupt([[[3, 4, 5]]], 0.1, tokenizer=tokenizer)
    without = tokenizer_of_letters()
    without.eos_token = None
    with pytest.raises(ValueError, match="kind='random'"):
        corrupt(letters(), 0.1, tokenizer=without)
    assert len(corrupt(letters(), 0.1, "random", tokenizer=without)) == len(letters())


# ---- The sweep ----


class Copy(nn.Module):
    """Sure that the next token is the current one's successor; says of a special token that it knows nothing."""

    def __init__(self, certainty=4.0):
        super().__init__()
        self.certainty = nn.Parameter(torch.tensor(certainty))
        self.variational_layers = [0]
        self.config = SimpleNamespace(pad_token_id=None)

    def forward(self, input_ids, attention_mask=None, num_posterior_samples=0, output_uncertainty=False, **options):
        known = (input_ids > EOS).float()
        after = nn.functional.one_hot((input_ids + 1) % len(ID), len(ID))
        logits = self.certainty * known[..., None] * after
        measures = PredictiveMeasures(**dict.fromkeys(MEASURE_NAMES, 1 - known)) if output_uncertainty else None
        return SimpleNamespace(logits=logits.log_softmax(-1), uncertainty=measures)


def test_the_likelihood_under_corruption_in_closed_form(tokenizer):
    rows = spelled(count=30, length=9)
    sweep = corruption_sweep(Copy(), rows, tokenizer, [0.1, 0.6], ["eos"], 2, progress=False)
    known = -math.log(math.exp(4) / (math.exp(4) + len(ID) - 1))
    assert sweep.metrics["clean", 0.0]["nll"] == pytest.approx(known, rel=1e-5)
    for rate in (0.1, 0.6):
        hits = torch.stack(replaced(rows, corrupt(rows, rate, tokenizer=tokenizer)))[:, :-1].double().mean(-1)
        found = sweep.metrics["eos", rate]
        assert found["nll"] == pytest.approx(known + (math.log(len(ID)) - known) * hits.mean().item(), rel=1e-5)
        assert found["mutual_information"] == pytest.approx(hits.mean().item(), rel=1e-5)
        torch.testing.assert_close(sweep.changes["eos", rate]["mutual_information"], hits, rtol=1e-5, atol=1e-6)
    # what the model says of itself moves with its losses exactly
    correlated = sweep.correlations("eos", 0.6, num_resamples=50)["mutual_information"]
    assert correlated["pearson"].mean == pytest.approx(1, abs=1e-6) and correlated["spearman"].mean > 0.9


def test_a_sweep_is_the_scores_of_corrupted_rows(model, tokenizer):
    rows = letters(6)
    sweep = corruption_sweep(model, rows, tokenizer, [0.0, 0.3], num_posterior_samples=2, seed=4, progress=False)
    assert list(sweep.metrics) == [("clean", 0.0), *((kind, rate) for kind in KINDS for rate in (0.0, 0.3))]
    assert list(sweep.changes) == list(sweep.metrics)[1:]
    clean = token_scores(model, rows, 2, internal=True, seed=4, progress=False)
    for kind in KINDS:
        assert sweep.metrics[kind, 0.0] == sweep.metrics["clean", 0.0]
        assert all(not change.any() for change in sweep.changes[kind, 0.0].values())
        corrupted = corrupt(rows, 0.3, kind, tokenizer=tokenizer, seed=4)
        scores = token_scores(model, corrupted, 2, internal=True, seed=4, progress=False)
        expected = score_metrics(scores)
        assert {"kl", "scale", "mean_energy", "expected_calibration_error", "cvar_nll"} < set(expected)
        del expected["token_variance"]
        assert sweep.metrics[kind, 0.3] == pytest.approx(expected)
        for name, change in sweep.changes[kind, 0.3].items():
            difference = scores.window_means()[name] - clean.window_means()[name]
            torch.testing.assert_close(
                change, difference, rtol=1e-6, atol=1e-6 * clean.values[name].abs().max().item()
            )
    assert "token_variance" not in sweep.changes["eos", 0.3]


def test_rows_of_one_document_are_taken_together(tokenizer):
    rows = spelled(count=9, length=9)
    apart = corruption_sweep(Copy(), rows, tokenizer, [0.5], ["eos"], 0, progress=False).changes["eos", 0.5]["nll"]
    documents = [7, 7, 7, 2, 2, 2, 5, 5, 5]
    together = corruption_sweep(Copy(), rows, tokenizer, [0.5], ["eos"], 0, documents=documents, progress=False)
    expected = apart.unflatten(0, (3, 3)).mean(-1)[[1, 2, 0]]
    torch.testing.assert_close(together.changes["eos", 0.5]["nll"], expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="each of 9 rows, got 2"):
        corruption_sweep(Copy(), rows, tokenizer, documents=[1, 2], progress=False)


def planted(correlation, documents=400, seed=0):
    generator = torch.Generator().manual_seed(seed)
    nll, noise = torch.randn(2, documents, generator=generator, dtype=torch.float64)
    kl = correlation * nll + math.sqrt(1 - correlation**2) * noise
    return {"nll": nll, "kl": kl, "scale": -nll.exp(), "mean_energy": torch.full_like(nll, 0.25)}


def test_a_planted_correlation_is_found(monkeypatch):
    warned = []
    monkeypatch.setattr("hf_variational.evaluation.shift.logger.warning", warned.append)
    low, high = planted(0.6), planted(0.6, seed=1)
    sweep = CorruptionSweep(metrics={}, changes={("eos", 0.05): low, ("eos", 0.3): high})
    found = sweep.correlations("eos", 0.3, num_resamples=300)
    assert set(found) == {"kl", "scale"} and len(warned) == 1 and "`mean_energy`" in warned[0]
    pearson, spearman = found["kl"]["pearson"], found["kl"]["spearman"]
    assert pearson.mean == pytest.approx(pearson_of(high))
    assert pearson.interval[0] < 0.6 < pearson.interval[1] and pearson.n == 400 and pearson.unit == "document"
    assert pearson.interval[1] - pearson.interval[0] < 0.2  # (1 − ρ²) / √n is 0.032
    # of two normals Spearman's is 6/π asin(ρ/2)
    assert spearman.interval[0] < 6 / math.pi * math.asin(0.3) < spearman.interval[1]
    # what only ranks see
    assert found["scale"]["spearman"].mean == pytest.approx(-1) and found["scale"]["pearson"].mean > -0.9
    both = sweep.correlations("eos", num_resamples=50)["kl"]["pearson"]
    assert both.mean == pytest.approx(pearson_of(low, high))
    assert both.n == 400


def pearson_of(*changes):
    pair = torch.stack([torch.cat([change[name] for change in changes]) for name in ("kl", "nll")])
    return torch.corrcoef(pair)[0, 1].item()


def test_a_scale_without_an_input_does_not_move(tokenizer, monkeypatch):
    warned = []
    monkeypatch.setattr("hf_variational.evaluation.shift.logger.warning", warned.append)
    constant = variational(EVEConfig(scale="unit", initial_scale=0.4))
    sweep = corruption_sweep(constant, letters(6), tokenizer, [0.3], ["random"], 1, progress=False)
    assert not sweep.changes["random", 0.3]["scale"].any() and sweep.changes["random", 0.3]["kl"].any()
    found = sweep.correlations("random", 0.3, num_resamples=20)
    assert "scale" not in found and "kl" in found and any("`scale`" in text for text in warned)


def test_a_change_below_rounding_is_none():
    before = torch.tensor([100.0, 100.0, 0.0, -2.0], dtype=torch.float64)
    after = torch.tensor([100.00001, 100.1, 1e-9, -2.1], dtype=torch.float64)
    torch.testing.assert_close(_change(before, after), torch.tensor([0.0, 0.1, 1e-9, -0.1], dtype=torch.float64))


def test_without_posteriors_the_predictions_are_measured(tokenizer, monkeypatch):
    warned = []
    monkeypatch.setattr("hf_variational.evaluation.predictions.logger.warning", warned.append)
    sweep = corruption_sweep(Copy(), spelled(), tokenizer, [0.3], progress=False)
    assert len(warned) == 1 and "Copy has no posteriors" in warned[0]
    assert "kl" not in sweep.metrics["eos", 0.3] and sweep.metrics["eos", 0.3]["nll"] > 0


def test_bad_sweeps_are_named(tokenizer):
    with pytest.raises(ValueError, match=r"\[\] and \['eos'\]"):
        corruption_sweep(Copy(), spelled(), tokenizer, [], ["eos"], progress=False)
    sweep = CorruptionSweep({}, {("eos", 0.3): planted(0.5)})
    with pytest.raises(ValueError, match=r"no corruption \('random', None\): it has \('eos', 0.3\)"):
        sweep.correlations("random")
    with pytest.raises(ValueError, match="one of nll, kl, scale, mean_energy, got 'loss'"):
        sweep.correlations("eos", external="loss")
