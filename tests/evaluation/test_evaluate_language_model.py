"""The one-call evaluation on a model whose predictions are known in closed form."""

import logging
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from hf_variational.evaluation import StreamingEvaluation, evaluate_language_model

VOCAB = 7


class Bigram(nn.Module):
    """Logits from the current token; a posterior sample adds noise to them."""

    def __init__(self, variational=True):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(VOCAB, VOCAB, generator=generator))
        self.inner = nn.Dropout(0.5)
        self.variational_layers = [0] if variational else []
        self.config = SimpleNamespace(pad_token_id=None)
        self.calls = []

    def forward(self, input_ids, attention_mask=None, **options):
        assert not self.training and not torch.is_grad_enabled()
        self.calls.append(options)
        samples = options.get("num_posterior_samples", 0)
        logits = self.table[input_ids]
        uncertainty = None
        if samples:
            noise = torch.randn(samples, *logits.shape)
            logits = (logits + noise).log_softmax(-1).logsumexp(0) - math.log(samples)
            value = torch.full(input_ids.shape, 0.25)
            names = ("predictive_entropy", "expected_entropy", "mutual_information", "conditional_variance")
            uncertainty = SimpleNamespace(**dict.fromkeys((*names, "token_variance", "top1_flip_rate"), value))
        return SimpleNamespace(logits=logits, uncertainty=uncertainty)


def rows(count=5, length=6):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, VOCAB, (length - index % 2,), generator=generator).tolist() for index in range(count)]


def test_both_passes_over_a_dataset_of_unequal_rows():
    model, data = Bigram(), rows()
    evaluations = {}
    result = evaluate_language_model(model, data, 4, batch_size=2, progress=False, evaluations=evaluations)
    expected = StreamingEvaluation()
    for row in data:
        ids = torch.tensor([row])
        expected.update(model.table.detach()[ids], ids)
    assert result["mean_pass"] == pytest.approx(expected.compute(), rel=1e-6)
    assert result["samples"]["mutual_information"] == 0.25
    assert result["samples"]["num_tokens"] == result["mean_pass"]["num_tokens"] == sum(len(row) - 1 for row in data)
    assert result["conditions"] == {
        "num_posterior_samples": 4,
        "num_tokens": 23,
        "dtype": "float32",
        "complete": True,
    }
    assert int(evaluations["samples"].reliability()[2].sum()) == 23


def test_a_deterministic_model_has_one_result():
    model = Bigram(variational=False)
    result = evaluate_language_model(model, rows(), progress=False)
    assert set(result) == {"mean_pass", "conditions"} and result["conditions"]["num_posterior_samples"] == 0
    # a stock model's forward need not know the argument
    assert all("num_posterior_samples" not in call for call in model.calls)
    assert set(evaluate_language_model(Bigram(), rows(), 0, progress=False)) == {"mean_pass", "conditions"}


def test_modes_are_restored_even_after_an_error():
    model = Bigram().train()
    model.inner.eval()
    evaluate_language_model(model, rows(), 2, progress=False)
    assert model.training and not model.inner.training
    with pytest.raises(IndexError):
        evaluate_language_model(model, [[VOCAB, 1]], 2, progress=False)
    assert model.training and not model.inner.training


def test_a_seed_repeats_the_noise_and_leaves_the_generator():
    model = Bigram()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = evaluate_language_model(model, rows(), 2, seed=11, progress=False)
    assert torch.equal(state, torch.get_rng_state())
    assert evaluate_language_model(model, rows(), 2, seed=11, progress=False) == first
    assert evaluate_language_model(model, rows(), 2, progress=False)["samples"]["nll"] != first["samples"]["nll"]


def test_labels_and_masks_of_a_data_loader():
    ids = torch.tensor([row for row in rows(4) if len(row) == 6])
    labels = ids.clone()
    labels[:, :3] = -100
    mask = torch.ones_like(ids)
    mask[:, -1] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "name": "ignored"}
    assert evaluate_language_model(Bigram(), iter([batch]), progress=False)["conditions"]["num_tokens"] == 4 * len(ids)
    assert evaluate_language_model(Bigram(), iter([{**batch, "labels": labels}]), progress=False)["mean_pass"][
        "num_tokens"
    ] == 3 * len(ids)
    loader = DataLoader(ids, batch_size=1, collate_fn=lambda rows: {"input_ids": torch.stack(rows)})
    assert evaluate_language_model(Bigram(), loader, progress=False)["conditions"]["num_tokens"] == 5 * len(ids)


def test_stopping_early_is_said(caplog):
    logger = logging.getLogger("hf_variational.evaluation.language_model")
    logger.addHandler(caplog.handler)
    result = evaluate_language_model(Bigram(), rows(), 2, batch_size=1, max_batches=2, progress=False)
    logger.removeHandler(caplog.handler)
    assert result["conditions"]["complete"] is False and result["conditions"]["num_tokens"] == 9
    assert "first 2 batches only" in caplog.text
    exact = evaluate_language_model(Bigram(), rows(), 2, batch_size=1, max_batches=5, progress=False)
    assert exact["conditions"]["complete"] is True


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"num_posterior_samples": -1}, "-1"),
        ({"num_posterior_samples": 1.5}, "1.5"),
        ({"batch_size": 0}, "batch_size"),
        ({"max_batches": 0}, "max_batches"),
    ],
)
def test_bad_numbers_are_named(options, name):
    with pytest.raises(ValueError, match=name):
        evaluate_language_model(Bigram(), rows(), **{"progress": False, **options})
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate_language_model(Bigram(), [], progress=False)
