"""The streamed metrics against brute force over the whole set at once."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from sklearn.metrics import accuracy_score, log_loss

from hf_variational.evaluation import METRIC_NAMES, StreamingEvaluation, conditional_value_at_risk, streaming

MEASURES = streaming.MEASURE_NAMES


def example(rows=6, length=9, vocab=11, seed=0, dtype=torch.float32, ignored=0.3):
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(rows, length, vocab, generator=generator)).to(dtype)
    labels = torch.randint(0, vocab, (rows, length), generator=generator)
    labels[torch.rand(rows, length, generator=generator) < ignored] = -100
    measures = SimpleNamespace(**{name: torch.rand(rows, length, generator=generator) for name in MEASURES})
    measures.token_variance[:, -1] = math.nan
    return logits, labels, measures


def scored(logits, labels):
    """Probabilities and targets of the positions that count, in plain numpy float64."""
    keep = (labels[:, 1:] != -100).numpy()
    values = logits[:, :-1].double().numpy()[keep]
    values = np.exp(values - values.max(-1, keepdims=True))
    return values / values.sum(-1, keepdims=True), labels[:, 1:].numpy()[keep], keep


def metrics_of(*batches, **options):
    evaluation = StreamingEvaluation(**options)
    for batch in batches:
        evaluation.update(*batch)
    return evaluation.compute()


def test_likelihood_and_accuracy_against_sklearn():
    logits, labels, measures = example(rows=20)
    probabilities, targets, keep = scored(logits, labels)
    metrics = metrics_of((logits, labels, measures))
    assert tuple(metrics) == METRIC_NAMES
    assert metrics["nll"] == pytest.approx(log_loss(targets, probabilities, labels=range(11)), rel=1e-6)
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["nll"]), rel=1e-9)
    assert metrics["accuracy"] == pytest.approx(accuracy_score(targets, probabilities.argmax(-1)), abs=1e-12)
    assert metrics["num_tokens"] == len(targets)
    for name in MEASURES:
        values = getattr(measures, name)[:, :-1].numpy()[keep]
        assert metrics[name] == pytest.approx(values.mean(), rel=1e-6)


def test_calibration_against_sklearn_and_by_hand():
    logits, labels, _ = example(rows=60)
    probabilities, targets, _ = scored(logits, labels)
    confidence, correct = probabilities.max(-1), probabilities.argmax(-1) == targets
    evaluation = StreamingEvaluation()
    evaluation.update(logits, labels)
    bin_confidence, bin_accuracy, count = evaluation.reliability()

    by_hand = 0.0
    for index in range(15):
        inside = (confidence > index / 15) & (confidence <= (index + 1) / 15)
        assert count[index] == inside.sum()
        if inside.any():
            by_hand += inside.mean() * abs(confidence[inside].mean() - correct[inside].mean())
    assert evaluation.compute()["expected_calibration_error"] == pytest.approx(by_hand, abs=1e-7)

    fraction, mean = calibration_curve(correct, confidence, n_bins=15)
    filled = count > 0
    torch.testing.assert_close(bin_confidence[filled].numpy(), mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(bin_accuracy[filled].numpy(), fraction, rtol=0, atol=1e-6)
    assert bin_confidence[~filled].isnan().all() and bin_accuracy[~filled].isnan().all()


def test_known_answers():
    certain = torch.full((1, 4, 5), -math.inf)
    certain[..., 2] = 0.0
    metrics = metrics_of((certain, torch.full((1, 4), 2)))
    assert (metrics["nll"], metrics["perplexity"], metrics["accuracy"]) == (0.0, 1.0, 1.0)
    assert metrics["expected_calibration_error"] == 0.0 and metrics["predictive_entropy"] == 0.0
    uniform = metrics_of((torch.zeros(1, 4, 5), torch.full((1, 4), 2)))
    assert uniform["perplexity"] == pytest.approx(5, rel=1e-6)
    assert uniform["predictive_entropy"] == pytest.approx(math.log(5), rel=1e-6)
    impossible = metrics_of((certain, torch.full((1, 4), 3)))
    assert impossible["nll"] == math.inf and impossible["perplexity"] == math.inf


@given(
    values=st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=80),
    fraction=st.sampled_from([0.01, 0.05, 0.2, 0.5, 1.0]),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_value_at_risk_is_the_mean_of_the_tail(values, fraction):
    # every value a hundred times: the tail is then whole and a plain mean of the largest
    repeated = np.sort(np.repeat(np.array(values, dtype=np.float64), 100))[::-1]
    expected = repeated[: round(fraction * len(repeated))].mean()
    got = conditional_value_at_risk(torch.tensor(values), fraction)
    assert got == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert got <= max(values) + 1e-6


def test_tail_of_the_likelihood():
    logits, labels, _ = example(rows=50)
    probabilities, targets, _ = scored(logits, labels)
    nll = np.sort(-np.log(probabilities[np.arange(len(targets)), targets]))[::-1]
    mass = 0.05 * len(nll)
    whole = int(mass)
    expected = (nll[:whole].sum() + (mass - whole) * nll[whole]) / mass
    assert metrics_of((logits, labels))["cvar_nll"] == pytest.approx(expected, rel=1e-6)
    everything = metrics_of((logits, labels), cvar_fraction=1.0)
    assert everything["cvar_nll"] == pytest.approx(everything["nll"], rel=1e-9)


@given(
    cuts=st.lists(st.integers(1, 7), max_size=4),
    block=st.integers(1, 200),
    seed=st.integers(0, 5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_batching_blocks_and_merging_change_nothing(cuts, block, seed, dtype):
    logits, labels, measures = example(rows=8, seed=seed, dtype=dtype)
    whole = metrics_of((logits, labels, measures))
    edges = [0, *sorted(set(cuts)), 8]
    parts = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "BLOCK_ENTRIES", block)
        for low, high in itertools.pairwise(edges):
            part = StreamingEvaluation()
            part.update(
                logits[low:high],
                labels[low:high],
                SimpleNamespace(**{name: getattr(measures, name)[low:high] for name in MEASURES}),
            )
            parts.append(part)
    merged = StreamingEvaluation()
    for part in reversed(parts):
        merged.merge(part)
    assert merged.compute() == pytest.approx(whole, rel=1e-6, abs=1e-9)


def test_log_probabilities_and_logits_are_the_same_thing():
    logits, labels, _ = example()
    assert metrics_of((logits.log_softmax(-1), labels)) == pytest.approx(metrics_of((logits, labels)), rel=1e-5)


def test_the_given_labels_may_be_shifted_already():
    logits, labels, _ = example()
    evaluation = StreamingEvaluation()
    evaluation.update(logits[:, :-1], labels[:, 1:], shifted=True)
    expected = metrics_of((logits, labels))
    assert evaluation.compute() == pytest.approx(expected, rel=1e-6)


def test_the_float32_copies_stay_small(monkeypatch):
    monkeypatch.setattr(streaming, "BLOCK_ENTRIES", 64)
    seen = []
    original = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda self: seen.append(self.numel()) or original(self))
    logits, labels, measures = example(rows=20, dtype=torch.bfloat16)
    metrics_of((logits, labels, measures))
    assert max(seen) <= 20 * 9 < logits.numel()


def test_a_transposed_batch_is_not_copied_wrongly():
    logits, labels, _ = example()
    strided = logits.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    assert metrics_of((strided, labels)) == pytest.approx(metrics_of((logits, labels)), rel=1e-7)


def test_a_nan_is_reported_not_hidden():
    logits, labels, _ = example(ignored=0)
    logits[0, 0, 0] = math.nan
    metrics = metrics_of((logits, labels))
    assert math.isnan(metrics["nll"]) and math.isnan(metrics["cvar_nll"])
    assert math.isnan(metrics["expected_calibration_error"])


def test_bad_input_is_named():
    logits, labels, _ = example()
    evaluation = StreamingEvaluation()
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluation.compute()
    evaluation.update(logits, torch.full_like(labels, -100))
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluation.compute()
    with pytest.raises(ValueError, match=r"\(6, 8\)"):
        evaluation.update(logits, labels[:, 1:])
    with pytest.raises(ValueError, match="A label is 99"):
        evaluation.update(logits, torch.full_like(labels, 99))
    with pytest.raises(ValueError, match="A label is -1"):
        evaluation.update(logits, torch.full_like(labels, -1))
    for wrong in ({"num_bins": 0}, {"num_bins": 1.5}, {"cvar_fraction": 0.0}, {"cvar_fraction": 1.5}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong.values()))}"):
            StreamingEvaluation(**wrong)
    with pytest.raises(ValueError, match="10 bins into 15"):
        evaluation.merge(StreamingEvaluation(num_bins=10))
    with pytest.raises(ValueError, match="at least one value"):
        conditional_value_at_risk(torch.zeros(0))
