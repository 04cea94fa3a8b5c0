"""Classifiers are loaded in a fresh process, with the package and in an environment where there is none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_remote_code import ROOT, WITH_THE_PACKAGE, WITHOUT_THE_PACKAGE

from hf_variational import (
    EVEConfig,
    VariationalAttentionConfig,
    VariationalGPTConfig,
    VariationalGPTForSequenceClassification,
    VariationalGPTForTokenClassification,
    save_for_hub,
)

AUTO = {
    VariationalGPTForSequenceClassification: "AutoModelForSequenceClassification",
    VariationalGPTForTokenClassification: "AutoModelForTokenClassification",
}
IDS = torch.tensor([[1, 5, 9, 20, 33], [7, 8, 30, 0, 0]])
HEADS = pytest.mark.parametrize("head", AUTO, ids=["sequence", "token"])

PROGRAM = """
import torch, transformers

folder, result, auto = sys.argv[1:]
model, report = getattr(transformers, auto).from_pretrained(folder, output_loading_info=True, **options)
assert not model.training and not any(report.values()), report
ids = torch.tensor([[1, 5, 9, 20, 33], [7, 8, 30, 0, 0]])
labels = torch.tensor([2, 0]) if "Sequence" in auto else ids % 3
out = {"module": type(model).__module__, "mean": model(ids).logits, "names": model.config.id2label}
torch.manual_seed(7)
sampled = model(ids, labels=labels, num_posterior_samples=3, output_uncertainty=True)
out.update(samples=sampled.logits, measures=dict(sampled.uncertainty), loss=sampled.loss)
model.save_pretrained(folder + "-again")
torch.save(out, result)
"""


def build(head, **options):
    torch.manual_seed(0)
    settings = {
        "vocab_size": 67,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "id2label": {0: "low", 1: "middle", 2: "high"},
        "eve": EVEConfig(initial_scale=0.5, scale_rank=2),
        "attention": VariationalAttentionConfig(initial_concentration=6.0),
    }
    model = head(VariationalGPTConfig(**{**settings, **options})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".posterior." in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def run(prelude: str, folder: Path, auto: str, tmp_path: Path, *flags: str, **environment: str) -> dict:
    result = tmp_path / "result.pt"
    command = [sys.executable, *flags, "-c", prelude + PROGRAM, str(folder), str(result), auto]
    settings = {"HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, **settings, **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(result, weights_only=True)


@torch.no_grad()
def check(model, out: dict) -> None:
    same = {"rtol": 1e-5, "atol": 1e-6}
    assert out["names"] == {0: "low", 1: "middle", 2: "high"}
    torch.testing.assert_close(out["mean"], model(IDS).logits, **same)
    labels = torch.tensor([2, 0]) if isinstance(model, VariationalGPTForSequenceClassification) else IDS % 3
    torch.manual_seed(7)
    sampled = model(IDS, labels=labels, num_posterior_samples=3, output_uncertainty=True)
    torch.testing.assert_close(out["samples"], sampled.logits, **same)
    torch.testing.assert_close(out["loss"], sampled.loss, **same)
    for name, value in sampled.uncertainty.items():
        torch.testing.assert_close(out["measures"][name], value, **same)
    assert out["measures"]["mutual_information"].max() > 1e-3


@HEADS
def test_trust_remote_code_where_there_is_no_package(head, tmp_path):
    model, folder = build(head), tmp_path / "mine"
    save_for_hub(model, folder)
    assert head._auto_class is None
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert auto_map == {
        "AutoConfig": "configuration_variational_gpt.VariationalGPTConfig",
        AUTO[head]: f"classification_variational_gpt.{head.__name__}",
    }
    out = run(WITHOUT_THE_PACKAGE, folder, AUTO[head], tmp_path, "-I")
    assert out["module"].startswith("transformers_modules.")
    check(model, out)
    again = {path.name for path in Path(f"{folder}-again").iterdir()}
    assert again == {path.name for path in folder.iterdir()} - {"README.md"}


@HEADS
def test_a_fresh_process_with_the_package(head, tmp_path):
    model, folder = build(head), tmp_path / "mine"
    model.save_pretrained(folder)
    assert not list(folder.glob("*.py"))
    out = run(WITH_THE_PACKAGE, folder, AUTO[head], tmp_path, PYTHONPATH=str(ROOT))
    assert out["module"] == "hf_variational.modeling.classification_variational_gpt"
    check(model, out)


@HEADS
def test_the_card_is_a_classifiers(head, tmp_path):
    model = build(head)
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert f"import {AUTO[head]}" in card and "AutoModelForCausalLM" not in card
    assert "model.generate" not in card and "-classification" in card.partition("tags:")[0]


def test_the_card_promises_a_regression_no_measures(tmp_path):
    build(VariationalGPTForSequenceClassification, id2label={0: "score"}).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "output_uncertainty=True" not in card and "output_sample_logits=True" in card
