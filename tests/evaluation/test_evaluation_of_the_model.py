"""The evaluation on the package's own models."""

import math

import pytest
import torch

from hf_variational import EVEConfig, VariationalGPTConfig, VariationalGPTForCausalLM, evaluate_language_model
from hf_variational.evaluation import METRIC_NAMES

ROWS = [[1, 5, 9, 20, 33, 2], [4, 8, 15, 16], [23, 42, 7, 7, 7]]


def build(eve):
    torch.manual_seed(0)
    config = VariationalGPTConfig(
        vocab_size=67,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        initializer_range=0.3,
        eve=eve,
    )
    return VariationalGPTForCausalLM(config)


@torch.no_grad()
def test_both_passes_against_single_rows_by_hand():
    model = build(EVEConfig(initial_scale=0.5))
    result = evaluate_language_model(model, ROWS, 6, batch_size=1, seed=4, progress=False)
    assert tuple(result["samples"]) == METRIC_NAMES and model.training
    model.eval()
    torch.manual_seed(4)
    mean, samples, information = [], [], []
    for row in ROWS:
        ids = torch.tensor([row])
        target = ids[0, 1:, None]
        mean.append(model(ids).logits[0, :-1].log_softmax(-1).gather(-1, target))
        out = model(ids, num_posterior_samples=6, output_sample_logits=True)
        each = out.sample_logits[0, :, :-1].double().exp()
        mixture = each.mean(0)
        samples.append(mixture.gather(-1, target).log())
        entropies = torch.special.entr(mixture).sum(-1) - torch.special.entr(each).sum(-1).mean(0)
        information.append(entropies)
    assert result["mean_pass"]["nll"] == pytest.approx(-float(torch.cat(mean).mean()), rel=1e-5)
    assert result["samples"]["nll"] == pytest.approx(-float(torch.cat(samples).mean()), rel=1e-5)
    assert result["samples"]["mutual_information"] == pytest.approx(float(torch.cat(information).mean()), rel=1e-4)
    assert result["samples"]["mutual_information"] > 1e-3
    assert all(math.isfinite(value) for value in result["samples"].values())


def test_the_mean_pass_does_not_depend_on_the_batching():
    model = build(EVEConfig())
    single = evaluate_language_model(model, ROWS, 0, batch_size=1, progress=False)["mean_pass"]
    padded = evaluate_language_model(model, ROWS, 0, batch_size=3, progress=False)["mean_pass"]
    assert padded == pytest.approx(single, rel=1e-5)


def test_the_twin_and_bfloat16():
    result = evaluate_language_model(build(None).to(torch.bfloat16), ROWS, progress=False)
    assert set(result) == {"mean_pass", "conditions"} and result["conditions"]["dtype"] == "bfloat16"
    assert math.isfinite(result["mean_pass"]["nll"])
