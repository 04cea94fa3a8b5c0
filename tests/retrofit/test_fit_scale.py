"""Fitting scales without training: against a fine grid, and what may not change."""

import copy
import math

import pytest
import torch
from eve_families import stock
from torch.nn import functional as F

from hf_variational import EVEConfig, VariationalAttentionConfig, calibrate_prior, fit_scale, variationalize
from hf_variational.retrofit.ffn import eve_modules
from hf_variational.retrofit.scale import _raw_of, _Scales, _softplus_log, _vertex


@torch.no_grad()
def own_texts(name: str = "llama", count: int = 6, length: int = 10) -> list[dict]:
    """Texts that a tiny model writes itself, of which noise can only take away."""
    torch.manual_seed(4)
    ids = torch.randint(3, 64, (count, 2))
    written = stock(name).generate(ids, do_sample=True, max_new_tokens=length, min_new_tokens=length)
    return [{"input_ids": row[: len(row) - index % 3].tolist()} for index, row in enumerate(written)]


ROWS = own_texts()


def calibrated(name: str = "llama", scale: float = 0.3, **options):
    model = variationalize(stock(name), **{"eve": EVEConfig(prior="centered"), **options})
    return calibrate_prior(model, ROWS, scale=scale, progress=False) if eve_modules(model) else model


@torch.no_grad()
def predictive_nll(model, rows, samples: int, seed: int, batch_size: int) -> float:
    """By hand: the noise of a batch is that of its seed."""
    total = count = 0
    for index in range(0, len(rows), batch_size):
        part = rows[index : index + batch_size]
        longest = max(len(row["input_ids"]) for row in part)
        ids = torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in part])
        mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in part])
        given = {"attention_mask": mask} if mask.min() == 0 else {}
        torch.manual_seed(seed + 1000 * (index // batch_size))
        drawn = model(ids, **given, num_posterior_samples=samples, output_sample_logits=samples > 0)
        log_p = torch.log_softmax(drawn.logits, -1) if not samples else drawn.sample_logits.exp().mean(1).log()
        targets = ids.masked_fill(mask == 0, -100)[:, 1:]
        total += F.nll_loss(log_p[:, :-1].flatten(0, 1), targets.flatten(), reduction="sum").item()
        count += int((targets != -100).sum())
    return total / count


@pytest.mark.parametrize("batch_size", [2, 6])
def test_finds_what_a_fine_grid_finds(batch_size):
    model = calibrated()
    start = copy.deepcopy(model.state_dict())
    options = {"num_posterior_samples": 4, "batch_size": batch_size, "seed": 3, "progress": False}
    found = fit_scale(model, ROWS, per_layer=False, **options)
    grid = {}
    for log_factor in torch.linspace(-3, 3, 61).tolist():
        model.load_state_dict(start)
        for eve in eve_modules(model).values():
            eve.log_scale.data += log_factor
        grid[math.exp(log_factor)] = predictive_nll(model, ROWS, 4, 3, batch_size)
    assert found.base_nll == pytest.approx(predictive_nll(model, ROWS, 0, 3, batch_size), abs=1e-5)
    # a parabola through three points; the noise is the same for both
    assert found.nll <= min(grid.values()) + 2e-3 * abs(found.base_nll)
    assert min(nll for _, nll in found.evaluations) == found.nll
    tried = dict(found.evaluations)
    near = min(grid, key=lambda factor: abs(math.log(factor)))
    assert tried[1.0] == pytest.approx(grid[near], abs=1e-5)


def test_model_has_the_scales_that_were_found():
    model = calibrated()
    start = {layer: eve.log_scale.detach().clone() for layer, eve in eve_modules(model).items()}
    found = fit_scale(model, ROWS, num_posterior_samples=4, batch_size=2, seed=1, progress=False)
    assert predictive_nll(model, ROWS, 4, 1, 2) == pytest.approx(found.nll, abs=1e-5)
    for (layer, site), factor in found.multipliers.items():
        eve = eve_modules(model)[layer]
        assert site == "ffn"
        torch.testing.assert_close(eve.log_scale - start[layer], torch.full_like(eve.log_scale, math.log(factor)))
        torch.testing.assert_close(eve.prior_log_scale, eve.log_scale.detach())
    assert len({round(factor, 4) for factor in found.multipliers.values()}) == 3
    options = {"num_posterior_samples": 4, "batch_size": 2, "seed": 1, "progress": False}
    shared = fit_scale(calibrated(), ROWS, per_layer=False, **options)
    assert found.nll <= shared.nll + 1e-6 and shared.shared == pytest.approx(found.shared)


def test_nothing_else_changes():
    model = calibrated().train()
    before, gradients = copy.deepcopy(model.state_dict()), {n: p.requires_grad for n, p in model.named_parameters()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fit_scale(model, ROWS, num_posterior_samples=2, progress=False)
    assert torch.equal(torch.rand(3), expected), "the global generator moved"
    after = model.state_dict()
    changed = {name.rsplit(".", 1)[1] for name, value in before.items() if not torch.equal(after[name], value)}
    assert changed == {"log_scale", "prior_log_scale"} and model.training
    assert gradients == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert all(parameter.grad is None for parameter in model.parameters())


def test_same_seed_same_answer():
    answers = [fit_scale(calibrated(), ROWS, num_posterior_samples=2, progress=False).multipliers for _ in range(2)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("tolerance", [0.0, 0.02, 0.2])
def test_tolerance_is_used_up_and_kept(tolerance):
    model = calibrated()
    found = fit_scale(
        model, ROWS, tolerance=tolerance, num_posterior_samples=4, batch_size=6, seed=2, epochs=1, progress=False
    )
    limit = found.base_nll * (1 + tolerance)
    assert found.nll <= limit + 1e-9
    assert predictive_nll(model, ROWS, 4, 2, 6) == pytest.approx(found.nll, abs=1e-5)
    for eve in eve_modules(model).values():
        eve.log_scale.data += math.log(1.1)
    assert predictive_nll(model, ROWS, 4, 2, 6) > limit


def test_tolerance_below_the_best_lowers_the_scales():
    """A model that noise only harms: the largest scale within the limit is far below the calibrated one."""
    model = calibrated(scale=3.0)
    found = fit_scale(model, ROWS, tolerance=0.001, num_posterior_samples=2, epochs=0, progress=False)
    assert found.nll <= found.base_nll * 1.001 + 1e-9 and max(found.multipliers.values()) < 1


@pytest.mark.parametrize("kind", ["gaussian", "dirichlet"])
@pytest.mark.parametrize("dependent", [False, "query"])
def test_attention_has_multipliers_too(kind, dependent):
    options = {"initial_scale": 0.5, "initial_concentration": 20.0, "data_dependent": dependent}
    model = calibrated(eve=None, attention=VariationalAttentionConfig(kind, **options))
    query = torch.zeros(1, 4, 1, 8)
    before = [layer.self_attn.posterior.log_value(query, None).detach() for layer in model.model.layers]
    found = fit_scale(model, ROWS, num_posterior_samples=3, progress=False)
    for index, layer in enumerate(model.model.layers):
        moved = layer.self_attn.posterior.log_value(query, None).detach() - before[index]
        power = 1 if kind == "gaussian" else -2
        expected = power * math.log(found.multipliers[index, "attention"])
        torch.testing.assert_close(moved, torch.full_like(moved, expected), atol=1e-4, rtol=1e-3)
    assert found.nll < max(nll for _, nll in found.evaluations)


@pytest.mark.parametrize("with_attention", [False, True])
def test_gradient_in_the_multipliers_is_a_difference(with_attention):
    # Of a Gamma's draws a seed does not make a smooth function, of a Gaussian's it does.
    attention = VariationalAttentionConfig("gaussian", initial_scale=0.5) if with_attention else None
    model = calibrated(attention=attention).double()
    assert len(_Scales(model).sites) == (6 if with_attention else 3)
    scales = _Scales(model)
    ids = torch.tensor([ROWS[0]["input_ids"]])

    def loss():
        torch.manual_seed(0)
        logits = model(ids, num_posterior_samples=3).logits
        return F.nll_loss(logits[:, :-1].flatten(0, 1).double(), ids[:, 1:].flatten())

    for parameter in scales.parameters:
        parameter.requires_grad_(True)
    loss().backward()
    gradient = scales.gradient()
    for parameter in scales.parameters:
        parameter.requires_grad_(False)
    for site in scales.sites:
        values = []
        for step in (1e-3, -1e-3):
            before = scales.snapshot()
            scales.multiply({other: math.exp(step if other == site else 0.0) for other in scales.sites})
            values.append(loss().item())
            scales.restore(before)
        assert gradient[site] == pytest.approx((values[0] - values[1]) / 2e-3, rel=2e-2, abs=1e-4)


def test_inverse_of_the_softplus():
    raw = torch.tensor([-60.0, -19.0, -3.0, 0.0, 2.0, 30.0, 200.0], dtype=torch.float64)
    torch.testing.assert_close(_raw_of(_softplus_log(raw)), raw, rtol=1e-6, atol=1e-6)


def test_vertex_of_a_parabola():
    points = [(x, 3.0 * (x - 0.7) ** 2 + 1.0) for x in (0.0, 0.5, 2.0)]
    assert _vertex(*points) == pytest.approx(0.7)


def test_classifiers_are_fitted_on_their_labels():
    model = calibrated("bert-single")
    rows = [{**row, "labels": index % 3} for index, row in enumerate(ROWS)]
    found = fit_scale(model, rows, num_posterior_samples=4, progress=False)
    assert found.num_targets == len(ROWS) and math.isfinite(found.nll)


@pytest.mark.parametrize(
    ("rows", "options", "named"),
    [
        ([], {}, "data set is empty"),
        ([{"input_ids": [5]}], {}, "no target"),
        (ROWS, {"num_posterior_samples": 0}, "at least 1"),
        (ROWS, {"tolerance": -0.1}, "tolerance.*-0.1"),
    ],
)
def test_bad_input(rows, options, named):
    model = variationalize(stock("llama"))
    with pytest.raises(ValueError, match=named):
        fit_scale(model, rows, progress=False, **options)


def test_heads_without_labels():
    with pytest.raises(ValueError, match="give rows with labels"):
        fit_scale(variationalize(stock("bert-single")), ROWS, progress=False)
    with pytest.raises(ValueError, match="is not variational"):
        fit_scale(stock("llama"), ROWS)
