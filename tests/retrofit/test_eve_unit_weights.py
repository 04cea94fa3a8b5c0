"""Weights of single units in the loss of retrofitted models: one tower, two towers, stacked experts, one label."""

import pytest
import torch
from eve_families import TINY, assert_same_gradients, centered, given, retrofitted, stock, targets
from eve_reference import kl_weights
from families import gradients

from hf_variational import UnitWeights, posterior_noise

NAMES = ["gpt2", "opt", "mixtral", "t5", "bert-single"]


def weights_for(statistics, seed):
    generator = torch.Generator().manual_seed(seed)
    units = len(statistics.kl_per_unit)
    return UnitWeights(
        torch.randn(units, generator=generator).exp(),
        torch.randn(units, generator=generator),
        torch.tensor(0.3 + seed),
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("samples", [0, 2])
def test_the_loss_by_hand(name, samples):
    """From the sums over tokens that the statistics of each unit are."""
    model, inputs = retrofitted(stock(name), eve=centered(mean="gain")), given(name, padding=3)
    wanted = targets(name, inputs)

    def run(**options):
        with posterior_noise(lambda request: torch.full(request.shape, 0.4)):
            return model(**inputs, **wanted, num_posterior_samples=samples, **options)

    plain = run(output_posteriors=True)
    weights = {layer: weights_for(statistics, layer) for layer, statistics in plain.posteriors.items()}
    count, _ = kl_weights(name, inputs, wanted)
    expected = plain.nll.detach().clone()
    for layer, statistics in plain.posteriors.items():
        kl, energy, constant = weights[layer]
        share = statistics.tokens / max(samples, 1) / count
        expected += share * (0.1 * (kl * statistics.kl_per_unit).sum() + (energy * statistics.mean_energy).sum())
        expected += share * constant
    out = run(unit_weights=weights)
    torch.testing.assert_close(out.loss, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.kl_per_layer, plain.kl_per_layer)


def test_weights_of_one_are_none():
    model, inputs = retrofitted(stock("mixtral")), given("mixtral", padding=3)
    wanted, units = targets("mixtral", inputs), 4 * TINY["mixtral"].units
    ones = {layer: UnitWeights(torch.ones(units), torch.zeros(units)) for layer in model.variational_layers}
    plain, weighted = (model(**inputs, **wanted, unit_weights=one).loss for one in (None, ones))
    assert_same_gradients(gradients(model, weighted), gradients(model, plain))


def test_weights_of_nothing_are_refused():
    model, inputs = retrofitted(stock("gpt2")), given("gpt2")
    with pytest.raises(ValueError, match="layer 9"):
        model(**inputs, **targets("gpt2", inputs), unit_weights={9: UnitWeights(torch.ones(3))})
