"""Measured costs against operations counted by hand."""

import math

import pytest
import torch
from baseline_models import VOCAB, cooled, dropped, ensemble, given, lora, stock
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import CausalLMOutput

from hf_variational import EVEConfig, variationalize
from hf_variational.baselines import measure_cost

WIDTHS = (6, 10, 4)


class LinearStack(nn.Module):
    """A language model of nothing but linear maps of an embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTHS[0])
        maps = zip(WIDTHS, (*WIDTHS[1:], VOCAB), strict=True)
        self.layers = nn.ModuleList([nn.Linear(entering, leaving, bias=False) for entering, leaving in maps])

    def forward(self, input_ids, labels=None, use_cache=None, **kwargs):
        hidden = self.embedding(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        loss = None if labels is None else F.cross_entropy(hidden.flatten(0, 1), labels.flatten())
        return CausalLMOutput(loss=loss, logits=hidden)


def batch() -> dict[str, torch.Tensor]:
    return given(padding=0)


def llama_flops_per_token(model, length: int) -> float:
    """Two operations a weight of each matrix, and 4 · length · width in the attention of each layer."""
    config = model.config
    weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    return 2 * weights + 4 * length * config.hidden_size * config.num_hidden_layers


def test_a_linear_stack_costs_two_operations_a_weight_and_three_times_that_to_train():
    model = LinearStack()
    weights = sum(layer.weight.numel() for layer in model.layers)
    cost = measure_cost(model, batch())
    assert cost.inference_flops_per_token == 2 * weights
    assert cost.training_flops_per_token == 3 * 2 * weights
    assert cost.parameters == cost.trained_parameters == weights + VOCAB * WIDTHS[0]
    assert cost.weight_bytes == 4 * cost.parameters
    assert (cost.num_posterior_samples, cost.tokens, cost.device) == (0, 14, "cpu")


def test_frozen_maps_cost_no_weight_gradients():
    model = LinearStack()
    model.embedding.requires_grad_(False)
    model.layers[0].requires_grad_(False)
    first, *rest = (layer.weight.numel() for layer in model.layers)
    cost = measure_cost(model, batch())
    # Forward through all; a gradient of each trained weight; of the inputs, of all but the first trained map.
    assert cost.training_flops_per_token == 2 * (first + sum(rest)) + 2 * sum(rest) + 2 * sum(rest[1:])
    assert cost.trained_parameters == sum(rest)
    assert measure_cost(model.requires_grad_(False), batch()).training_flops_per_token == 0


def test_a_llama_is_counted_with_its_attention():
    model = stock("llama")
    expected = llama_flops_per_token(model, length=7)
    cost = measure_cost(model, batch())
    positions = 2 * model.config.hidden_size // model.config.num_attention_heads  # the rotary frequencies, per row
    assert cost.inference_flops_per_token == pytest.approx(expected, abs=positions)
    assert cost.training_flops_per_token == pytest.approx(3 * expected, rel=0.01)


@pytest.mark.parametrize("samples", [1, 2, 5])
def test_samples_are_paid_for_from_where_the_rows_split(samples):
    single = measure_cost(stock("llama"), batch()).inference_flops_per_token
    assert measure_cost(dropped("llama"), batch(), samples).inference_flops_per_token == pytest.approx(
        samples * single, rel=0.01
    )
    top = variationalize(stock("llama"), eve=EVEConfig(scale="unit"), layers="last")
    split = measure_cost(top, batch(), samples).inference_flops_per_token
    assert split == pytest.approx(single, rel=0.01) if samples == 1 else single < split < 0.85 * samples * single


def test_an_ensemble_costs_its_members_and_lora_shares_its_base():
    single = measure_cost(stock("llama", seed=0), batch())
    three = measure_cost(ensemble("llama"), batch(), 3)
    assert three.parameters == 3 * single.parameters
    assert three.inference_flops_per_token == 3 * single.inference_flops_per_token
    assert three.training_flops_per_token == 3 * single.training_flops_per_token
    adapters = measure_cost(lora("llama"), batch(), 3)
    assert adapters.parameters < 1.2 * single.parameters and adapters.num_posterior_samples == 3
    assert measure_cost(cooled("llama"), batch(), 3).num_posterior_samples == 0


def test_memory_holds_at_least_the_logits_and_grows_with_the_samples():
    one, eight = (measure_cost(dropped("llama"), batch(), samples) for samples in (1, 8))
    logits = 4 * 14 * VOCAB
    assert one.peak_memory_bytes > logits
    assert 3 * one.peak_memory_bytes < eight.peak_memory_bytes < 20 * one.peak_memory_bytes
    assert one.seconds > 0 and math.isfinite(one.seconds)


def test_memory_of_a_pass_whose_tensors_are_known():
    class Doubling(LinearStack):
        def forward(self, input_ids, use_cache=None, **kwargs):
            first = torch.empty(1000, 1000)
            second = torch.empty(1000, 1000)
            del first
            return torch.empty(500, 1000) + second[:500]

    cost = measure_cost(Doubling().requires_grad_(False), batch())
    assert cost.peak_memory_bytes == pytest.approx(8_000_000, rel=0.01)


def test_modes_and_gradients_stay():
    model = dropped("llama")
    model.model.layers[0].train()
    before = {name: module.training for name, module in model.named_modules()}
    measure_cost(model, batch(), 2)
    assert before == {name: module.training for name, module in model.named_modules()}
    assert all(parameter.grad is None for parameter in model.parameters())


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="batch needs input_ids"):
        measure_cost(stock("llama"), {"inputs_embeds": torch.zeros(1, 2, 32)})
    with pytest.raises(ValueError, match="repeats must be at least 1"):
        measure_cost(stock("llama"), batch(), repeats=0)
