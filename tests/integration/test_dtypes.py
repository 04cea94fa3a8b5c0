"""Half precision without NaN, and log-scales that stay in float32."""

import pytest
import torch
from integration_models import RowNoise, eve_config, prompt, tiny_model
from transformers import AutoModelForCausalLM

from hf_variational import posterior_noise

HALF = [torch.bfloat16, torch.float16]
LOGARITHMS = ("log_scale", "scale_down", "scale_up", "scale_weight", "prior_log_scale")
NEURONS = {
    "default": {},
    "scalar": {"scale": "scalar", "prior": "standard"},
    "unit, centred": {"scale": "unit", "prior": "centered", "mean": "gain"},
    "full, autoregressive": {"scale_rank": None, "prior": "autoregressive", "mean": "linear"},
    "wide": {"latent_dim": 2, "pool": "sum", "reconstruction_weight": 0.1, "noise": "sequence"},
}


def everything(model, samples=3, **options):
    labels = prompt()
    options = {"labels": labels, "num_posterior_samples": samples, "output_posteriors": True, **options}
    if samples:
        options.update(output_uncertainty=True, output_sample_logits=True)
    with posterior_noise(RowNoise()):
        return model(labels, **options)


def assert_finite(out):
    for name in ("loss", "nll", "kl", "kl_per_layer", "logits"):
        assert out[name].isfinite().all(), name
    for name, measure in (out.uncertainty or {}).items():
        assert measure.dtype == torch.float32, name
        last = measure[:, :-1] if name == "token_variance" else measure
        assert last.isfinite().all(), name
    for statistics in out.posteriors.values():
        for name in ("kl", "kl_per_unit", "scale", "mean_energy"):
            assert getattr(statistics, name).dtype == torch.float32, name
            assert getattr(statistics, name).isfinite().all(), name


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("neurons", NEURONS)
def test_loaded_in_half_precision(dtype, neurons, tmp_path):
    model = tiny_model(eve=eve_config(**NEURONS[neurons]))
    model.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    state = half.state_dict()
    for name, value in model.state_dict().items():
        logarithm = name.split(".")[-1] in LOGARITHMS
        assert state[name].dtype == (torch.float32 if logarithm else dtype), name
        if logarithm:
            assert torch.equal(state[name], value), name
    out, expected = everything(half), everything(model)
    assert_finite(out)
    assert out.logits.dtype == torch.float32
    # float16 and bfloat16 keep 11 and 8 bits; the posteriors are computed in float32 from activations that do not
    torch.testing.assert_close(out.kl, expected.kl, rtol=0.1, atol=0.0)
    torch.testing.assert_close(out.nll, expected.nll, rtol=0.1, atol=0.0)
    assert everything(half, samples=0).logits.dtype == dtype


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_survives_saving(dtype, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "float32")
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "float32", dtype=dtype)
    half.save_pretrained(tmp_path / "half")
    for options in ({}, {"dtype": "auto"}):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "half", **options)
        state, expected = again.state_dict(), half.state_dict()
        assert {name: value.dtype for name, value in state.items()} == {n: v.dtype for n, v in expected.items()}
        assert all(torch.equal(state[name], expected[name]) for name in state)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("neurons", NEURONS)
def test_cast_after_loading(dtype, neurons):
    model = tiny_model(eve=eve_config(**NEURONS[neurons])).to(dtype)
    for samples in (0, 1, 3):
        out = everything(model, samples=samples)
        assert_finite(out)
        model.zero_grad()
        out.loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                assert parameter.grad.isfinite().all(), name
    out = model.generate(
        prompt(), max_new_tokens=4, num_posterior_samples=2, output_uncertainty=True, return_dict_in_generate=True
    )
    assert all(measure.isfinite().all() for measure in out.uncertainty.values())


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_extreme_scales_in_half_precision(dtype):
    # exp(2 * -12) is 0 in float16 and 1e5 overflows it: neither may show.
    for low, high, start in ((-12.0, 2.0, 6.2e-6), (-12.0, 8.0, 300.0)):
        eve = eve_config(log_scale_min=low, log_scale_max=high, initial_scale=start)
        assert_finite(everything(tiny_model(eve=eve).to(dtype)))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("neurons", NEURONS)
def test_autocast(dtype, neurons):
    model = tiny_model(eve=eve_config(**NEURONS[neurons])).train()
    expected = everything(model)
    with torch.autocast("cpu", dtype=dtype):
        out = everything(model)
    assert_finite(out)
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    torch.testing.assert_close(out.kl.float(), expected.kl, rtol=0.1, atol=0.0)


def test_double_precision_stays_double():
    model = tiny_model().double()
    out = everything(model, samples=3)
    assert {out[name].dtype for name in ("loss", "nll", "kl", "logits")} == {torch.float64}
    out.loss.backward()
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float64}
