"""Tiny classifiers and labelled batches that the tests of classification share."""

import pytest
import torch
from integration_models import PAD, RowNoise, attention_config, prompt, tiny_config
from transformers import LlamaConfig, LlamaForSequenceClassification, LlamaForTokenClassification

from hf_variational import (
    VariationalGPTForSequenceClassification,
    VariationalGPTForTokenClassification,
    posterior_noise,
)

SEQUENCE, TOKEN = VariationalGPTForSequenceClassification, VariationalGPTForTokenClassification
STOCK = {SEQUENCE: LlamaForSequenceClassification, TOKEN: LlamaForTokenClassification}
HEADS = pytest.mark.parametrize("head", [SEQUENCE, TOKEN], ids=["sequence", "token"])
SINGLE, MULTI, NUMBERS = "single_label_classification", "multi_label_classification", "regression"
PROBLEMS = pytest.mark.parametrize("problem", [SINGLE, MULTI, NUMBERS])
LABELS, SAMPLES, BATCH, LENGTH = 4, 3, 4, 7
TWIN = {"eve": None, "attention": None}
SITES = {
    "units": {},
    "attention": {"eve": None, "attention": attention_config()},
    "gaussian": {"eve": None, "attention": attention_config("gaussian")},
    "both": {"attention": attention_config("approximate_dirichlet"), "attention_layers": [0, 2]},
}
SITED = pytest.mark.parametrize("options", SITES.values(), ids=SITES.keys())


def build(head=SEQUENCE, **options):
    """A model in eval mode whose variational parameters have moved away from their start."""
    torch.manual_seed(0)
    model = head(tiny_config(**{"num_labels": LABELS, "kl_weight": 0.1, **options})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".eve." in name or ".posterior." in name or name == "score.bias":
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def stock_twin(model):
    """Llama's class with the weights of a model."""
    fields = {name: value for name, value in model.config.to_dict().items() if name not in ("eve", "attention")}
    twin = STOCK[type(model)](LlamaConfig(**fields)).eval()
    report = twin.load_state_dict(model.state_dict(), strict=False)
    assert not report.missing_keys
    assert all(".eve." in name or ".posterior." in name for name in report.unexpected_keys)
    return twin


def padded(side: str = "right") -> dict:
    """Rows of different lengths with their positions; the same tokens whichever side the padding is on."""
    ids, lengths = prompt(BATCH, LENGTH), [LENGTH, 3, 5, 2]
    rows = {"input_ids": torch.full_like(ids, PAD), "attention_mask": torch.zeros_like(ids)}
    rows["position_ids"] = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        where = slice(0, length) if side == "right" else slice(LENGTH - length, None)
        rows["input_ids"][row, where] = ids[row, :length]
        rows["attention_mask"][row, where] = 1
        rows["position_ids"][row, where] = torch.arange(length)
    return rows


def labels_of(problem: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    if problem == SINGLE:
        return torch.tensor([2, 0, 3, 1])
    if problem == MULTI:
        return torch.randint(0, 2, (BATCH, LABELS), generator=generator).float()
    return torch.randn(BATCH, LABELS, generator=generator)


def token_labels(rows: dict) -> torch.Tensor:
    labels = (rows["input_ids"] % LABELS).masked_fill(rows["attention_mask"] == 0, -100)
    labels[:, 1] = -100  # attended, but without a label
    return labels


def with_labels(head, rows: dict, problem: str = SINGLE) -> dict:
    return {**rows, "labels": labels_of(problem) if head is SEQUENCE else token_labels(rows)}


def run(model, noise=None, **inputs):
    with posterior_noise(noise or RowNoise()):
        return model(**inputs)


def close(actual: torch.Tensor, expected, **options) -> None:
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, **{"atol": 2e-5, "rtol": 1e-4, **options})


CASES = pytest.mark.parametrize(
    ("head", "problem"),
    [(SEQUENCE, SINGLE), (SEQUENCE, MULTI), (SEQUENCE, NUMBERS), (TOKEN, SINGLE)],
    ids=[SINGLE, MULTI, NUMBERS, "token"],
)
