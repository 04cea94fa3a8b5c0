"""Which parameters of a retrofitted model learn: what `train` freezes, and that a gradient reaches all the rest."""

import pytest
import torch
from eve_families import (
    EVERY,
    FEW,
    LAYERS,
    TINY,
    WITH_TARGETS,
    added_parameters,
    centered,
    given,
    is_added,
    move,
    retrofitted,
    stock,
    targets,
)

from hf_variational import variationalize


def trainable(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def sampled_loss(name: str, model, samples: int = 2) -> torch.Tensor:
    inputs = given(name, padding=2)
    return model.train()(**inputs, **targets(name, inputs), num_posterior_samples=samples).loss


@pytest.mark.parametrize("name", WITH_TARGETS)
def test_gradient_reaches_what_was_added_and_nothing_frozen(name):
    model = move(variationalize(stock(name), eve=centered(), train="posterior"))
    assert trainable(model) == set(added_parameters(model))
    for samples in (2, 0):
        sampled_loss(name, model, samples).backward()
        for key, parameter in model.named_parameters():
            if is_added(key):
                assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, key
            else:
                assert parameter.grad is None, key
        model.zero_grad()


@pytest.mark.parametrize("name", WITH_TARGETS)
def test_posterior_learns_from_the_data_and_not_from_the_kl_alone(name):
    """The gradient of the NLL too; of every scale parameter, whose start is not a saddle of all of them."""
    model = retrofitted(name, train="posterior")
    inputs = given(name, padding=2)
    out = model(**inputs, **targets(name, inputs), num_posterior_samples=2)
    parameters = added_parameters(model)
    for key, grad in zip(parameters, torch.autograd.grad(out.nll, list(parameters.values())), strict=True):
        assert grad.isfinite().all() and grad.abs().max() > 0, key


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "bert-single", "t5"])
@pytest.mark.parametrize("mean", ["gain", "linear"])
@pytest.mark.parametrize("prior", ["empirical", "standard"])
def test_gradient_reaches_every_form_of_neuron(name, mean, prior):
    model = retrofitted(name, eve=centered(mean=mean, prior=prior, scale_rank=None), train="posterior")
    sampled_loss(name, model).backward()
    for key, parameter in added_parameters(model).items():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, key


def in_layers(name: str, layers: list[int], key: str) -> bool:
    return any(key.startswith(TINY[name].layer(layer) + ".") for layer in layers)


@pytest.mark.parametrize("name", EVERY)
def test_ffn_trains_the_networks_of_the_variational_layers(name):
    tiny, model = TINY[name], variationalize(stock(name), eve=centered(), layers=[0, 2], train="ffn")
    trained = trainable(model)
    assert set(added_parameters(model)) <= trained
    ours = {key for key in trained if not is_added(key)}
    assert all(in_layers(name, [0, 2], key) for key in ours)
    assert not any("attention" in key.lower() or "attn" in key.lower() for key in ours)
    named = dict(model.named_parameters())
    for layer in (0, 2):
        widths = [key for key in ours if in_layers(name, [layer], key) and named[key].ndim > 1]
        # W_out, and what leads into the units
        assert tiny.projection(layer).removesuffix(".weight") in " ".join(widths)
        assert len(widths) >= 2
        for key in named:
            sizes = named[key].shape[-2:]
            is_wide = any(size in (tiny.units, 2 * tiny.units) for size in sizes) and named[key].ndim > 1
            if in_layers(name, [layer], key) and is_wide and "att" not in key:
                assert key in trained, key
    if tiny.task:
        sampled_loss(name, model).backward()
        assert all((named[key].grad is not None) == (key in trained) for key in named)


@pytest.mark.parametrize("name", FEW)
def test_all_trains_all(name):
    model = variationalize(stock(name), eve=centered(), layers=[1], train="all")
    assert trainable(model) == {key for key, _ in model.named_parameters()}
    sampled_loss(name, model).backward()
    without = {key for key, parameter in model.named_parameters() if parameter.grad is None}
    plain = stock(name)
    inputs = given(name, padding=2)
    plain.train()(**inputs, **targets(name, inputs)).loss.backward()
    assert without == {key for key, parameter in plain.named_parameters() if parameter.grad is None}


def test_frozen_before_stays_frozen_with_all():
    """Whoever froze the embeddings meant it... unless `train="all"` says otherwise: it trains all."""
    plain = stock("gpt2")
    plain.transformer.wte.weight.requires_grad_(False)
    model = variationalize(plain, eve=centered(), train="posterior")
    assert not model.transformer.wte.weight.requires_grad


@pytest.mark.parametrize("train", ["none", None, True, ["posterior"], ""])
def test_unknown_way_to_train_is_refused(train):
    plain = stock("gpt2")
    with pytest.raises(ValueError, match="train="):
        variationalize(plain, eve=centered(), train=train)
    assert type(plain) is TINY["gpt2"].model and not added_parameters(plain)
    assert all(parameter.requires_grad for parameter in plain.parameters())


@pytest.mark.parametrize("name", ["llama", "bert-masked", "t5"])
def test_default_is_the_posterior(name):
    model = variationalize(stock(name))
    assert trainable(model) == set(added_parameters(model)) and trainable(model)
    assert len(model.settings.eve_layers) == LAYERS * len(TINY[name].projections)
    assert model.settings.eve.prior == "centered" and model.settings.kl_weight == 1e-4
