"""Texts told apart by window length, and the parts of one evaluation, against brute force."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shift_models import ID, LETTERS, letters, tokenizer_of_letters, variational

from hf_variational import EVEConfig
from hf_variational.evaluation.domains import evaluate_domains, token_windows
from hf_variational.evaluation.predictions import INTERNAL_NAMES
from hf_variational.evaluation.ranking import detection
from hf_variational.evaluation.shift_slices import context_slices, frequency_slices, score_metrics, token_counts
from hf_variational.evaluation.shift_windows import domain_detection, evaluate_ood, ood_windows
from hf_variational.evaluation.token_scores import SCORE_NAMES, TokenScores, token_scores


@pytest.fixture(scope="module")
def model():
    return variational(EVEConfig(scale="input", scale_rank=2, initial_scale=0.4))


@pytest.fixture
def warned(monkeypatch):
    found = []
    monkeypatch.setattr("hf_variational.evaluation.shift_windows.logger.warning", found.append)
    return found


def text(seed=0, first=0, last=10, count=90):
    generator = torch.Generator().manual_seed(seed)
    return " ".join(LETTERS[index] for index in torch.randint(first, last, (count,), generator=generator))


# ---- Windows ----


def test_windows_of_several_lengths(warned):
    tokenizer = tokenizer_of_letters(front=True)
    texts = {"one": text(0), "two": [text(1, count=7), text(2, count=20)]}
    windows = ood_windows(texts, tokenizer, max_windows=6)
    assert {length: set(cut) for length, cut in windows.items()} == {1: {*texts}, 8: {*texts}, 32: {"one"}}
    for length, cut in windows.items():
        for name, rows in cut.items():
            assert rows == token_windows(texts[name], tokenizer, length, 6) and len(rows[0]) == length + 1
    assert len(warned) == 3
    assert "'two' is left out at length 32: No window" in warned[0] and "longest of 2 texts has 20 tokens" in warned[0]
    assert "'one' is left out at length 128" in warned[1]


def test_one_token_needs_another_in_front(warned):
    tokenizer = tokenizer_of_letters()
    windows = ood_windows({"one": text()}, tokenizer, (1, 8))
    assert list(windows) == [8] and len(warned) == 1
    assert "Windows of 1 token are left out" in warned[0] and "prefix=[tokenizer.eos_token_id]" in warned[0]
    given_one = ood_windows({"one": "a b"}, tokenizer, (1,), prefix=[ID["</s>"]])
    assert given_one == {1: {"one": [[ID["</s>"], ID["a"]], [ID["</s>"], ID["b"]]]}} and len(warned) == 1


def test_bad_texts_are_named(model, warned):
    tokenizer = tokenizer_of_letters()
    for empty in ("", " \n", [], ["", " "]):
        with pytest.raises(ValueError, match="'law' is empty"):
            ood_windows({"one": text(), "law": empty}, tokenizer)
    with pytest.raises(ValueError, match=r"No text of 'one' has a window .* \[8, 32\]"):
        ood_windows({"one": "a b c"}, tokenizer, [8, 32])
    for wrong in ({"lengths": [0]}, {"max_windows": 0}):
        with pytest.raises(ValueError, match="at least 1, got 0"):
            ood_windows({"one": text()}, tokenizer, **wrong)
    with pytest.raises(ValueError, match="`others` is empty"):
        evaluate_ood(model, text(), {}, tokenizer, progress=False)
    with pytest.raises(ValueError, match="'law' is empty"):
        evaluate_ood(model, text(), {"law": ""}, tokenizer, [8], progress=False)


# ---- Detection ----


def test_detection_against_brute_force(model, warned):
    tokenizer = tokenizer_of_letters(front=True)
    others = {"late": text(1, first=6), "alike": text(2), "short": text(3, count=5)}
    options = {"num_posterior_samples": 2, "seed": 3, "progress": False}
    table = evaluate_ood(model, text(), others, tokenizer, (1, 8, 128), max_windows=10, **options)
    assert {length: list(rows) for length, rows in table.items()} == {1: list(others), 8: ["late", "alike"]}
    assert "'in_domain' is left out at length 128" in warned[0]
    for length, rows in table.items():
        cut = {name: token_windows(others[name], tokenizer, length, 10) for name in rows}
        own = token_windows(text(), tokenizer, length, 10)
        aurocs = evaluate_domains(model, own, cut, 2, seed=3, progress=False)
        for name, found in rows.items():
            assert set(found) == {*SCORE_NAMES, *INTERNAL_NAMES}
            assert {key: found[key]["auroc"] for key in SCORE_NAMES} == pytest.approx(aurocs[name])
            means = [token_scores(model, data, 2, internal=True, seed=3, progress=False) for data in (own, cut[name])]
            kl = detection(*(scores.window_means()["kl"] for scores in means))
            assert found["kl"] == pytest.approx(kl) and set(kl) == {"auroc", "aupr", "fpr_at_95_tpr"}


def test_only_what_both_have_is_detected(model):
    own = token_scores(model, letters(5), 2, progress=False)
    other = token_scores(model, letters(5, seed=1), 0, internal=True, progress=False)
    assert set(domain_detection(own, other)) == {"predictive_entropy", "one_minus_confidence", "nll", "brier"}


# ---- Parts ----


def table(targets, positions=None):
    targets = torch.as_tensor(targets)
    n = len(targets)
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.rand(n, generator=generator) for name in ("nll", "one_minus_confidence", "brier", "kl")}
    positions = torch.arange(1, n + 1) if positions is None else torch.as_tensor(positions)
    correct = torch.rand(n, generator=generator) < 0.5
    return TokenScores(values, correct, torch.zeros(n, dtype=torch.int64), 1, targets, positions)


def assert_partition(scores, parts):
    assert sum(len(part) for part in parts.values()) == len(scores) and all(len(part) for part in parts.values())
    together = torch.cat([part.values["nll"] for part in parts.values()]).sort().values
    assert torch.equal(together, scores.values["nll"].sort().values)
    # what the parts report adds up to what the whole does
    whole, metrics = score_metrics(scores), [score_metrics(part) for part in parts.values()]
    for name in ("nll", "accuracy", "brier", "kl"):
        mean = sum(found["num_tokens"] * found[name] for found in metrics) / len(scores)
        assert mean == pytest.approx(whole[name], rel=1e-5)


@given(
    targets=st.lists(st.integers(0, 12), min_size=1, max_size=60),
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=10),
    boundary=st.one_of(st.none(), st.integers(1, 80)),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_slices_partition_the_tokens(targets, counts, boundary):
    scores, counts = table(targets), torch.tensor(counts)
    parts = frequency_slices(scores, counts)
    assert_partition(scores, parts)
    frequencies = [
        torch.tensor([counts[t].item() if t < len(counts) else 0 for t in part.targets.tolist()])
        for part in parts.values()
    ]
    assert list(parts) == [name for name in ("rare", "middle", "common") if name in parts]
    for rarer, commoner in itertools.pairwise(frequencies):
        assert rarer.max() < commoner.min()
    contexts = context_slices(scores, boundary)
    assert_partition(scores, contexts)
    edge = boundary or scores.positions.median()
    assert all((part.positions <= edge).all() == (name == "short") for name, part in contexts.items())


def test_thirds_where_every_target_has_its_own_frequency():
    scores = table(torch.arange(99).flip(0))
    parts = frequency_slices(scores, torch.arange(99))
    assert {name: sorted(part.targets.tolist()) for name, part in parts.items()} == {
        "rare": list(range(33)),
        "middle": list(range(33, 66)),
        "common": list(range(66, 99)),
    }
    # equals stay together: 1 makes up four fifths of the text
    uneven = frequency_slices(table([0, 1, 1, 1, 1, 1, 1, 1, 1, 2]), torch.tensor([1, 5, 9]))
    assert {name: set(part.targets.tolist()) for name, part in uneven.items()} == {
        "rare": {0},
        "middle": {1},
        "common": {2},
    }
    assert list(frequency_slices(table([0, 1]), torch.tensor([4, 4]))) == ["middle"]


def test_counts_against_brute_force():
    rows = [[3, 3, 5], [], {"input_ids": torch.tensor([5, 1, 9]), "attention_mask": [1, 1, 0]}, [2]]
    assert token_counts(rows).tolist() == [0, 1, 1, 2, 0, 2]
    for empty in ([], [[]], [{"input_ids": [3], "attention_mask": [0]}]):
        with pytest.raises(ValueError, match="reference text is empty"):
            token_counts(empty)


def test_slices_of_a_model(model):
    rows = letters(8)
    scores = token_scores(model, rows, 2, internal=True, progress=False)
    rare = frequency_slices(scores, token_counts(rows))["rare"]
    metrics = score_metrics(rare)
    assert {"nll", "expected_calibration_error", "cvar_nll", "mutual_information", "scale"} < set(metrics)
    assert metrics["nll"] == pytest.approx(rare.values["nll"].mean().item(), rel=1e-5)
    short = context_slices(scores, 3)["short"]
    assert len(short) == 8 * 3 and score_metrics(short)["num_tokens"] == 24


def test_bad_parts_are_named():
    empty, scores = table([0]).select(torch.tensor([False])), table([1, 2])
    for cut in (lambda: frequency_slices(empty, torch.ones(3)), lambda: context_slices(empty)):
        with pytest.raises(ValueError, match="no tokens"):
            cut()
    for counts in (torch.ones(0), torch.ones(2, 2), torch.tensor([1, -1]), torch.tensor([float("nan")])):
        with pytest.raises(ValueError, match="`counts` has one number"):
            frequency_slices(scores, counts)
    with pytest.raises(ValueError, match="boundary.*got 0"):
        context_slices(scores, 0)
