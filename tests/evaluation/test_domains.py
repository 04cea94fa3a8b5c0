"""Windows, scores and AUROCs against brute force and scikit-learn, on a model whose predictions are known."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_variational.evaluation import (
    SCORE_NAMES,
    StreamingEvaluation,
    auroc,
    domain_auroc,
    evaluate_domains,
    evaluate_language_model,
    mean_over_domains,
    predictions,
    scores_at_temperatures,
    token_scores,
    token_windows,
)
from hf_variational.evaluation.temperature import temper
from hf_variational.modeling.predictive import predictive_measures

VOCAB = 7


class Bigram(nn.Module):
    """Logits from the current token; a posterior sample adds noise to them, the more the larger the token."""

    def __init__(self, variational=True):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(2 * torch.randn(VOCAB, VOCAB, generator=generator))
        self.variational_layers = [0] if variational else []
        self.config = SimpleNamespace(pad_token_id=None)

    def sampled(self, input_ids, num_posterior_samples):
        """[batch * S, length, vocab]"""
        logits = self.table[input_ids]
        noise = torch.randn(logits.shape[0], num_posterior_samples, *logits.shape[1:])
        return (logits[:, None] + noise * input_ids[:, None, :, None] / VOCAB).flatten(0, 1)

    def forward(self, input_ids, attention_mask=None, num_posterior_samples=0, output_uncertainty=False, **options):
        if not num_posterior_samples:
            return SimpleNamespace(logits=self.table[input_ids])
        logits = self.sampled(input_ids, num_posterior_samples)
        targets = nn.functional.pad(input_ids[:, 1:], (0, 1), value=-100)
        log_p = logits.log_softmax(-1).unflatten(0, (-1, num_posterior_samples))
        measures = predictive_measures(logits, num_posterior_samples, targets) if output_uncertainty else None
        return SimpleNamespace(logits=log_p.logsumexp(1) - math.log(num_posterior_samples), uncertainty=measures)


def rows(count=12, length=9, low=0, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(low, VOCAB, (length - i % 3,), generator=generator).tolist() for i in range(count)]


# ---- AUROC ----


def pairs(negative, positive):
    won = (positive[None, :] > negative[:, None]).double() + 0.5 * (positive[None, :] == negative[:, None])
    return won.mean().item()


@given(
    negative=st.lists(st.integers(-5, 5), min_size=1, max_size=30),
    positive=st.lists(st.integers(-5, 5), min_size=1, max_size=30),
    grain=st.sampled_from([1.0, 0.1]),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_auroc_counts_pairs(negative, positive, grain):
    negative, positive = grain * torch.tensor(negative), grain * torch.tensor(positive)
    got = auroc(negative, positive)
    assert got == pytest.approx(pairs(negative, positive), abs=1e-12)
    assert got == pytest.approx(1 - auroc(positive, negative), abs=1e-12)
    labels = [0] * len(negative) + [1] * len(positive)
    assert got == pytest.approx(roc_auc_score(labels, torch.cat([negative, positive]).numpy()), abs=1e-12)


def test_auroc_in_closed_form():
    assert auroc(torch.zeros(3), torch.ones(2)) == 1 and auroc(torch.ones(2), torch.zeros(5)) == 0
    assert auroc(torch.ones(4), torch.ones(3)) == 0.5
    # two normals d apart: P(difference > 0) = Φ(d / √2)
    generator = torch.Generator().manual_seed(0)
    negative, positive = torch.randn(2, 20_000, generator=generator)
    expected = 0.5 * (1 + math.erf(1.0 / math.sqrt(2) / math.sqrt(2)))
    assert auroc(negative, positive + 1) == pytest.approx(expected, abs=0.005)
    # large numbers of values keep their ranks apart
    many = torch.arange(300_000)
    assert auroc(many, many + 0) == pytest.approx(0.5, abs=1e-12)


def test_auroc_of_nothing_and_of_nan():
    assert math.isnan(auroc(torch.tensor([math.nan, 1.0]), torch.ones(2)))
    with pytest.raises(ValueError, match="0 negative and 2 positive"):
        auroc(torch.zeros(0), torch.ones(2))
    with pytest.raises(ValueError, match="3 negative and 0 positive"):
        auroc(torch.zeros(3), torch.ones(0))


# ---- Windows ----


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2} | {letter: 3 + i for i, letter in enumerate("abcdefghij")}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def with_specials(tokenizer, template):
    from copy import deepcopy

    from tokenizers.processors import TemplateProcessing

    tokenizer = deepcopy(tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return tokenizer


def test_windows_are_cut_one_after_the_other(tokenizer):
    windows = token_windows("a b c d e f g", tokenizer, length=3)
    assert windows == [[3, 4, 5], [6, 7, 8]]
    assert token_windows(["a b c d", "e", "f g h"], tokenizer, 3) == [[3, 4, 5], [8, 9, 10]]
    assert token_windows("a b", tokenizer, 2) == [[3, 4]]


@pytest.mark.parametrize(("template", "prefix"), [("<s> $A", [0]), ("<s> $A </s>", [0]), ("$A </s>", []), ("$A", [])])
def test_windows_begin_as_the_tokenizer_begins_a_text(tokenizer, template, prefix):
    tokenizer = with_specials(tokenizer, template)
    assert token_windows("a b c d e", tokenizer, 2) == [[*prefix, 3, 4], [*prefix, 5, 6]]
    assert token_windows("a b c d e", tokenizer, 2, prefix=[1, 1]) == [[1, 1, 3, 4], [1, 1, 5, 6]]
    assert token_windows("a b c", tokenizer, 1, prefix=[0]) == [[0, 3], [0, 4], [0, 5]]


def test_fewer_windows_come_from_all_over_the_text(tokenizer):
    text = " ".join("abcdefghij")
    assert token_windows(text, tokenizer, 2, max_windows=2) == [[3, 4], [7, 8]]
    assert token_windows(text, tokenizer, 2, max_windows=9) == token_windows(text, tokenizer, 2)
    assert len({tuple(window) for window in token_windows(text, tokenizer, 2, max_windows=4)}) == 4


def test_bad_windows_are_named(tokenizer):
    with pytest.raises(ValueError, match="length=8 fits: the longest of 2 texts has 3 tokens"):
        token_windows(["a b c", "d"], tokenizer, 8)
    with pytest.raises(ValueError, match="length=8 fits: the longest of 0 texts has 0 tokens"):
        token_windows([], tokenizer, 8)
    with pytest.raises(ValueError, match="length=1 without a token in front"):
        token_windows("a b c", tokenizer, 1)
    for wrong in ({"length": 0}, {"length": 2.5}, {"length": 2, "max_windows": 0}):
        with pytest.raises(ValueError, match=str(list(wrong.values())[-1])):
            token_windows("a b c", tokenizer, **wrong)


# ---- Scores ----


def test_scores_of_the_mean_pass_against_brute_force():
    model, data = Bigram(), rows()
    scores = token_scores(model, data, 0, batch_size=5, progress=False)
    assert set(scores.values) == {"predictive_entropy", "one_minus_confidence", "nll", "brier"}
    assert scores.num_windows == len(data)
    assert scores.windows.tolist() == [i for i, row in enumerate(data) for _ in row[1:]]
    log_p = torch.cat([model.table.detach()[torch.tensor(row[:-1])] for row in data]).double().log_softmax(-1)
    targets = torch.tensor([token for row in data for token in row[1:]])
    expected = {
        "predictive_entropy": -(log_p.exp() * log_p).sum(-1),
        "one_minus_confidence": 1 - log_p.exp().amax(-1),
        "nll": -log_p[torch.arange(len(targets)), targets],
    }
    for name, values in expected.items():
        torch.testing.assert_close(scores.values[name].double(), values, rtol=1e-5, atol=1e-6)
    assert torch.equal(scores.correct, log_p.argmax(-1) == targets)


@pytest.mark.parametrize("block", [1, 40, 10_000])
def test_scores_of_samples_are_the_measures(block, monkeypatch):
    monkeypatch.setattr(predictions, "BLOCK_ENTRIES", block)
    model, data = Bigram(), [row for row in rows() if len(row) == 9]
    scores = token_scores(model, data, 3, batch_size=100, seed=5, progress=False)
    assert tuple(scores.values) == SCORE_NAMES
    torch.manual_seed(5)
    ids = torch.tensor(data)
    with torch.no_grad():
        logits = model.sampled(ids, 3)
    measures = predictive_measures(logits, 3, nn.functional.pad(ids[:, 1:], (0, 1), value=-100))
    for name, values in measures.items():
        torch.testing.assert_close(scores.values[name], values[:, :-1].flatten(), msg=name)
    mean = logits.double().softmax(-1).unflatten(0, (-1, 3)).mean(1)[:, :-1].flatten(0, 1)
    chosen = mean[torch.arange(len(mean)), ids[:, 1:].flatten()]
    torch.testing.assert_close(scores.values["nll"].double(), -chosen.log(), rtol=1e-5, atol=1e-6)


def test_the_measures_and_the_evaluation_are_those_of_the_language_model():
    model, data = Bigram(), rows()
    torch.manual_seed(9)
    state = torch.get_rng_state()
    scores = token_scores(model, data, 0, progress=False)
    assert torch.equal(state, torch.get_rng_state())
    expected = evaluate_language_model(model, data, 0, progress=False)["mean_pass"]
    assert scores.evaluation().compute() == pytest.approx(expected, rel=1e-5)
    sampled = token_scores(model, data, 4, progress=False)
    metrics = sampled.evaluation().compute()
    for name in ("mutual_information", "conditional_variance", "top1_flip_rate"):
        assert metrics[name] == pytest.approx(sampled.values[name].mean().item(), rel=1e-5)
    assert sampled.evaluation(num_bins=5).num_bins == 5


def test_window_means_against_brute_force():
    data = [*rows(), [3], [4, 5]]  # one has nothing to predict
    scores = token_scores(Bigram(), data, 2, progress=False)
    means = scores.window_means()
    kept = [index for index, row in enumerate(data) if len(row) > 1]
    for name, values in scores.values.items():
        expected = [values[scores.windows == index].double().mean().item() for index in kept]
        assert means[name].tolist() == pytest.approx(expected, rel=1e-6), name


def test_a_temperature_changes_the_predictive_distribution_and_nothing_else():
    model, data = Bigram(), rows()
    plain, tempered = (token_scores(model, data, 3, temperature=t, progress=False) for t in (1.0, 1.7))
    assert torch.equal(plain.correct, tempered.correct)
    for name in ("expected_entropy", "mutual_information", "conditional_variance", "token_variance"):
        assert torch.equal(plain.values[name], tempered.values[name])
    one = token_scores(model, data, 0, temperature=1.7, progress=False)
    direct = StreamingEvaluation()
    for row in data:
        ids = torch.tensor([row])
        direct.update(temper(model.table.detach()[ids], 1.7), ids)
    assert one.evaluation().compute() == pytest.approx(direct.compute(), rel=1e-5)
    both = scores_at_temperatures(model, data, [1.0, 1.7], 3, progress=False)
    for one_pass, alone in zip(both, (plain, tempered), strict=True):
        assert all(torch.equal(one_pass.values[name], values) for name, values in alone.values.items())
    exact = token_scores(model, data, 3, temperature=1, progress=False)
    assert all(torch.equal(plain.values[name], values) for name, values in exact.values.items())


def test_wrong_tokens_against_right_ones():
    scores = token_scores(Bigram(), rows(30), 3, progress=False)
    found = scores.error_auroc()
    assert set(found) == set(SCORE_NAMES) - {"token_variance", "nll", "brier"}
    for name, value in found.items():
        expected = roc_auc_score((~scores.correct).numpy(), scores.values[name].numpy())
        assert value == pytest.approx(expected, abs=1e-9)


# ---- Domains ----


def test_domains_against_brute_force():
    model = Bigram()
    own = rows(30)
    others = {"larger": rows(25, low=4, seed=2), "same": rows(20, seed=3)}
    table = evaluate_domains(model, own, others, 4, batch_size=7, progress=False)
    assert set(table) == set(others) and set(table["same"]) == set(SCORE_NAMES)
    for name, windows in others.items():
        left, right = (
            token_scores(model, data, 4, batch_size=7, progress=False).window_means() for data in (own, windows)
        )
        for measure, value in table[name].items():
            assert value == pytest.approx(pairs(left[measure], right[measure]), abs=1e-9)
    # large tokens are where the samples differ, and only there
    assert table["larger"]["mutual_information"] > 0.85 > 0.7 > abs(table["same"]["mutual_information"])
    mean = mean_over_domains(table)
    assert mean["nll"] == pytest.approx((table["larger"]["nll"] + table["same"]["nll"]) / 2)


def test_only_what_both_have_is_compared():
    own = token_scores(Bigram(), rows(), 3, progress=False)
    other = token_scores(Bigram(), rows(seed=2), 0, progress=False)
    assert set(domain_auroc(own, other)) == {"predictive_entropy", "one_minus_confidence", "nll", "brier"}
    assert set(mean_over_domains({"a": {"x": 1.0, "y": 0.5}, "b": {"x": 0.0}})) == {"x"}


def test_of_a_real_model(tokenizer):
    config = LlamaConfig(vocab_size=13, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    own = token_windows("a b c d " * 20, tokenizer, 8, prefix=[0])
    others = {"other": token_windows("h i j " * 20, tokenizer, 8, prefix=[0])}
    assert evaluate_domains(model, own, own and {"itself": own}, progress=False)["itself"] == dict.fromkeys(
        ("predictive_entropy", "one_minus_confidence", "nll", "brier"), 0.5
    )
    assert 0 <= evaluate_domains(model, own, others, progress=False)["other"]["nll"] <= 1


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="`others` is empty"):
        evaluate_domains(Bigram(), rows(), {}, progress=False)
    with pytest.raises(ValueError, match="no domain"):
        mean_over_domains({})
    with pytest.raises(ValueError, match="nothing to evaluate"):
        token_scores(Bigram(), [], progress=False)
    with pytest.raises(ValueError, match="got -2"):
        token_scores(Bigram(), rows(), temperature=-2, progress=False)
    with pytest.raises(ValueError, match="batch_size.*0"):
        token_scores(Bigram(), rows(), batch_size=0, progress=False)
    certain = token_scores(Bigram(), [[0, 1]], progress=False)
    with pytest.raises(ValueError, match="An AUROC needs values on both sides"):
        certain.error_auroc()
