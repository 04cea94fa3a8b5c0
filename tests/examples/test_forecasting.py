"""The forecasting experiments: splits, scores against closed forms, the model and its twin."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from forecasting_series import HORIZON, LOOKBACK, batch_of, series, tiny, tiny_parts
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal
from transformers import AutoConfig, AutoModel

from examples.forecasting import EVEForecaster, EVEForecasterConfig, data, metrics
from examples.forecasting.modeling import ForecastOutput, objective_of, trend_of
from hf_variational import posterior_noise

# ---- Data ----


def test_the_usual_borders():
    assert data.borders(17420, (8640, 2880, 2880)) == {
        "train": (0, 8640),
        "validation": (8640, 11520),
        "test": (11520, 14400),
    }
    # as in the reference code: train and test are rounded down, validation is what is left
    assert data.borders(7588, None) == {"train": (0, 5311), "validation": (5311, 6071), "test": (6071, 7588)}
    with pytest.raises(ValueError, match=r"need 14400 rows, but the file has 100"):
        data.borders(100, (8640, 2880, 2880))


def test_nothing_leaks():
    """What is forecast lies in its part; scales come from training rows alone; a past ends before its future."""
    values = np.arange(400, dtype=np.float64)[:, None].repeat(2, 1)
    parts = data.split(values, data.Source("ramp", None, 4, 2), LOOKBACK, HORIZON, 3)
    training = values[:280, 0]
    for name, (first, end) in data.borders(400, None).items():
        for index in range(len(parts[name])):
            item = parts[name][index]
            kept = item["labels"][:, 0] != data.IGNORED
            rows = item["labels"][kept] * training.std() + training.mean()
            past = item["past"][kept] * training.std() + training.mean()
            assert rows.min() >= first - 1e-3 and rows.max() <= end - 1 + 1e-3
            assert torch.allclose(past[:, -1] + 1, rows[:, 0], atol=1e-3)
            assert torch.allclose(rows.diff(dim=-1), torch.ones(()), atol=1e-3)


@settings(max_examples=30, deadline=None)
@given(st.integers(60, 150), st.integers(1, 4), st.sampled_from([(4, 2), (4, 4), (3, 1), (6, 3)]))
def test_an_evaluation_takes_each_origin_once(end, length, steps):
    step, stride = steps
    windows = data.Windows(np.zeros((160, 1)), (40, end), LOOKBACK, HORIZON, length, step, stride)
    origins = (windows.starts[:, None] + windows.offsets).flatten()
    origins = origins[origins <= windows.last]
    assert sorted(origins.tolist()) == list(range(40, end - HORIZON + 1, stride))
    assert windows.num_origins == len(origins)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("date,a,b\n1,1.5,2\n2,,3\n", r"broken.csv: column 'a', row 2 .* missing or not finite \(''\)"),
        ("date,a,b\n1,1.5,2\n2,2,NaN\n", r"column 'b', row 2 .*'NaN'"),
        ("date,a,b\n1,1.5,2\n2,2,inf\n", r"column 'b', row 2 .*'inf'"),
        ("date,a,b\n1,sunny,2\n2,2,3\n", r"column 'a', row 1 .* is 'sunny', no number: drop the column"),
        ("date,a\n", r"broken.csv: 0 rows of 1 channels"),
    ],
)
def test_bad_files(tmp_path, text, message):
    path = tmp_path / "broken.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        data.read_series(path)


def test_a_file_that_is_fine(tmp_path):
    frame = pd.DataFrame({"date": ["a", "b"], "x": [1.0, 2.5], "y": [3, 4]})
    frame.to_csv(tmp_path / "fine.csv.xz", index=False)
    assert data.read_series(tmp_path / "fine.csv.xz").to_numpy().tolist() == [[1.0, 3.0], [2.5, 4.0]]


def test_too_few_rows():
    with pytest.raises(ValueError, match=r"sine, train part: rows 0 to 21 of 30 are too few for one window: 16 rows"):
        data.split(series(30), data.Source("sine", None, 4, 2), LOOKBACK, HORIZON, 3, name="sine")
    with pytest.raises(ValueError, match="stride=3 does not divide step=4"):
        data.Windows(series(), (0, 400), LOOKBACK, HORIZON, 3, 4, 3)


# ---- Scores ----


def test_crps_of_a_gaussian():
    """Gneiting and Raftery 2007: s (z (2 F(z) - 1) + 2 f(z) - 1 / sqrt(pi)); the estimate has no bias at 4 draws."""
    torch.manual_seed(0)
    location, scale, target = torch.tensor(0.3), torch.tensor(1.7), torch.tensor(1.1)
    z, standard = (target - location) / scale, Normal(0.0, 1.0)
    exact = scale * (z * (2 * standard.cdf(z) - 1) + 2 * standard.log_prob(z).exp() - 1 / math.sqrt(math.pi))
    for count in (2, 4, 32):
        draws = (location + scale * torch.randn(count, 200_000)).sort(0).values
        scores = metrics.crps_of_sorted(draws, target)
        assert abs(scores.mean() - exact) < 4 * scores.std() / math.sqrt(scores.numel())
        if count == 4:
            biased = scores.mean() + (draws[:, None] - draws[None]).abs().mean() * 0.5 * (1 / 3)
            assert abs(biased - exact) > 0.05


def test_crps_by_its_definition():
    draws, target = torch.randn(5, 7).sort(0).values, torch.randn(7)
    pairs = (draws[:, None] - draws[None]).abs().sum((0, 1)) / (5 * 4)
    assert torch.allclose(metrics.crps_of_sorted(draws, target), (draws - target).abs().mean(0) - pairs / 2, atol=1e-6)
    assert torch.equal(metrics.crps_of_sorted(draws[:1], target), (draws[0] - target).abs())


def test_quantiles_cover_what_they_say():
    """A fresh draw lies under the p-quantile of M draws with probability p, also for few draws."""
    torch.manual_seed(0)
    draws = torch.rand(9, 200_000).sort(0).values
    for probability in (0.1, 0.5, 0.9):
        quantile = metrics.quantile_of_sorted(draws, probability)
        # of uniform draws the quantile is the probability to lie under it
        assert abs(quantile.mean() - probability) < 1e-3
    assert metrics.quantile_of_sorted(torch.tensor([[2.0]]), 0.1) == 2.0


def test_pinball_is_least_at_the_quantile():
    target = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    losses = {
        q: metrics.pinball(torch.tensor(q), target, 0.9).mean()
        for q in (1.0, Normal(0.0, 1.0).icdf(torch.tensor(0.9)).item(), 1.6)
    }
    assert min(losses, key=losses.get) == pytest.approx(1.2816, abs=1e-3)
    assert torch.allclose(metrics.pinball(torch.zeros(2), torch.tensor([2.0, -2.0]), 0.9), torch.tensor([1.8, 0.2]))


def test_streamed_scores():
    """In two batches as in one; a point forecast has no density and no interval; the NLL is that of the mixture."""
    torch.manual_seed(0)
    locations, log_scales = torch.randn(6, 32, 2, 3), 0.1 * torch.randn(6, 32, 2, 3)
    labels = torch.randn(6, 2, 3)
    labels[5, 1] = data.IGNORED
    outputs = ForecastOutput(forecast=locations.mean(1), locations=locations, log_scales=log_scales)

    def measure(*slices):
        streamed = metrics.ForecastMetrics()
        torch.manual_seed(1)
        for part in slices:
            fields = {name: value[part] for name, value in outputs.items()}
            streamed.update(ForecastOutput(**fields), labels[part])
        return streamed.compute()

    whole, halves = measure(slice(None)), measure(slice(0, 2), slice(2, 6))
    assert whole["num_values"] == halves["num_values"] == 33
    for name in ("mse", "mae", "nll"):
        assert whole[name] == pytest.approx(halves[name], rel=1e-6)
    kept = labels != data.IGNORED
    assert whole["mse"] == pytest.approx((locations.mean(1) - labels)[kept].square().mean().item(), rel=1e-6)
    mixture = Normal(locations, log_scales.exp()).log_prob(labels.unsqueeze(1)).exp().mean(1).log()
    assert whole["nll"] == pytest.approx(-mixture[kept].mean().item(), rel=1e-5)

    outputs = ForecastOutput(forecast=locations[:, 0], locations=locations[:, :1])
    point = measure(slice(None))
    assert point["crps"] == pytest.approx(point["mae"]) and {"nll", "coverage_80"}.isdisjoint(point)
    assert 2 * point["pinball_0.5"] == pytest.approx(point["mae"])


def test_a_calibrated_gaussian_covers_four_fifths():
    torch.manual_seed(0)
    zeros = torch.zeros(400, 1, 2, 10)
    streamed = metrics.ForecastMetrics()
    labels = 2.0 * torch.randn(400, 2, 10)
    streamed.update(ForecastOutput(forecast=zeros[:, 0], locations=zeros, log_scales=zeros + math.log(2.0)), labels)
    scores = streamed.compute()
    assert scores["coverage_80"] == pytest.approx(0.8, abs=0.015)
    assert scores["width_80"] == pytest.approx(2 * 1.2816 * 2.0, rel=0.06)
    with pytest.raises(ValueError, match="nothing to evaluate"):
        metrics.ForecastMetrics().compute()


# ---- The model ----


def test_objectives():
    torch.manual_seed(0)
    locations, log_scales, target = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4), torch.randn(2, 3, 4)
    density = Normal(locations, log_scales.exp()).log_prob(target.unsqueeze(1))
    forecast = locations.mean(1)
    nll = objective_of("nll", forecast, locations, log_scales, target)
    mixture = objective_of("mc_nll", forecast, locations, log_scales, target)
    assert torch.allclose(nll, -density.mean(1), atol=1e-5)
    assert torch.allclose(mixture, -density.exp().mean(1).log(), atol=1e-4)
    assert (mixture <= nll + 1e-6).all()
    assert torch.equal(objective_of("mse", forecast, locations, None, target), (target - forecast).square())


def test_the_trend_is_a_moving_average():
    values = torch.randn(3, 20)
    trend = trend_of(values, 5)
    padded = torch.cat([values[:, :1].expand(-1, 2), values, values[:, -1:].expand(-1, 2)], 1)
    by_hand = torch.stack([padded[:, place : place + 5].mean(1) for place in range(20)], 1)
    assert torch.allclose(trend, by_hand, atol=1e-6)


@pytest.mark.parametrize("objective", ["mse", "nll", "mc_nll"])
@pytest.mark.parametrize("k", [1, 3])
def test_without_dispersion_the_samples_are_the_twin(objective, k):
    past, labels = batch_of(tiny_parts()["train"])
    eve = {"latent_dim": k, "initial_scale": math.exp(-12.0)}
    model, twin = (
        tiny(objective=objective, eve=eve).eval(),
        tiny(objective=objective, eve=eve, deterministic=True).eval(),
    )
    assert model.state_dict().keys() == twin.state_dict().keys()
    sampled, mean, of_twin = model(past, labels, num_posterior_samples=3), model(past, labels), twin(past, labels)
    assert torch.equal(mean.forecast, of_twin.forecast) and torch.equal(mean.nll, of_twin.nll)
    assert torch.allclose(sampled.forecast, of_twin.forecast, atol=1e-4)
    assert torch.allclose(sampled.nll, of_twin.nll, atol=1e-4)
    assert of_twin.kl == 0 and twin.posterior_sites == [] and of_twin.loss == of_twin.nll
    twin.train()(past, labels).loss.backward()
    trained = {name for name, parameter in twin.bank.named_parameters() if parameter.grad is not None}
    assert (
        trained
        == {name for name, p in twin.bank.named_parameters() if p.requires_grad}
        == {"mean_weight", "mean_bias"}
    )


def test_the_loss_is_a_sum_over_origins():
    """KL per forecast value by brute force; origins without labels cost nothing; accumulation changes nothing."""
    past, labels = batch_of(tiny_parts()["train"])
    labels[0, 2] = data.IGNORED
    model = tiny(objective="nll").train()

    def zeros(request):
        return torch.zeros(request.shape)

    with posterior_noise(zeros):
        out = model(past, labels, output_posteriors=True, num_posterior_samples=2)
        kept = (labels != data.IGNORED).all(-1)
        values = kept.sum() * HORIZON
        assert torch.allclose(out.kl, (out.posteriors[0].kl * kept).sum() / values)
        assert torch.allclose(out.loss, out.nll + model.config.kl_weight * out.kl)
        scores = -Normal(out.locations, out.log_scales.exp()).log_prob(labels.unsqueeze(1)).mean(1)
        assert torch.allclose(out.nll, scores[kept].mean(), rtol=1e-5)
        pieces = [model(*part, num_items_in_batch=values) for part in zip(past.split(2), labels.split(2), strict=True)]
        assert torch.allclose(sum(piece.loss for piece in pieces), out.loss, atol=1e-6)


def test_samples_are_rows_and_variances_add_up():
    past, _ = batch_of(tiny_parts()["train"])
    model = tiny(objective="nll", eve={"initial_scale": 0.5}).eval()
    torch.manual_seed(0)
    out = model(past, num_posterior_samples=7, output_uncertainty=True)
    assert out.locations.shape == (6, 7, 3, HORIZON) and out.forecast.shape == (6, 3, HORIZON)
    assert torch.allclose(out.uncertainty.variance_of_mean, out.locations.var(1, unbiased=False))
    assert torch.allclose(out.uncertainty.expected_variance, (2 * out.log_scales).exp().mean(1))


def test_aggregations():
    past, labels = batch_of(tiny_parts()["train"])
    torch.manual_seed(0)
    wide = {"initial_scale": 0.5}
    median = tiny(aggregation="median", eve=wide).eval()(past, num_posterior_samples=5)
    assert torch.equal(median.forecast, median.locations.median(1).values)
    scored = tiny(aggregation="score", eve=wide).train()
    out = scored(past, labels, num_posterior_samples=5)
    assert (out.forecast <= out.locations.max(1).values + 1e-5).all()
    assert (out.forecast >= out.locations.min(1).values - 1e-5).all()
    out.loss.backward()
    assert scored.score_head.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="aggregation='score' is trained by objective='mse' alone"):
        tiny(aggregation="score", objective="nll")


def test_the_autoregressive_prior_acts_along_origins():
    """Its KL from the means by hand, and a forecast that reads its own look-back alone."""
    past, labels = batch_of(tiny_parts()["train"])
    labels[0, 1] = data.IGNORED  # an origin that is missing is followed by none
    model = tiny(eve={"prior": "autoregressive", "autoregressive_coefficient": 0.7}).eval()
    heard = {}
    handle = model.bank.register_forward_pre_hook(lambda module, args: heard.update(h=args[0].detach()))
    kl = model(past, labels, output_posteriors=True).posteriors[0].kl
    handle.remove()
    mean, log_scale = model.bank.mean(heard["h"]), model.bank.raw_log_scale(heard["h"])
    prior = torch.zeros_like(mean)
    prior[:, 1:] = 0.7 * mean[:, :-1]
    prior[0, 1], prior[0, 2] = 0.0, 0.0
    expected = torch.distributions.kl_divergence(Normal(mean, log_scale.exp()), Normal(prior, torch.ones(())))
    assert torch.allclose(kl, expected.sum(-1), rtol=1e-4)
    alone = model(past[:, 2:]).forecast
    assert torch.allclose(model(past).forecast[:, 2:], alone, atol=1e-5)


def test_a_forecast_moves_and_stretches_with_its_window():
    model = tiny(objective="nll").eval()
    past = torch.randn(3, 2, LOOKBACK)
    here, there = model(past), model(past * 4.0 + 10.0)
    assert torch.allclose(here.forecast * 4.0 + 10.0, there.forecast, atol=1e-3)
    # a gauge that stands still has a finite density
    still = model(torch.ones(1, 1, LOOKBACK))
    assert still.log_scales.min() >= math.log(1e-2) - 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(tmp_path, dtype):
    """Loaded in half precision it forecasts much as before; what goes in and out is float32."""
    past, labels = batch_of(tiny_parts()["train"])
    model = tiny(objective="nll").eval()
    model.save_pretrained(tmp_path)
    half = EVEForecaster.from_pretrained(tmp_path, dtype=dtype).eval()
    assert half.bank.mean_weight.dtype == half.scale_head.weight.dtype == dtype
    assert half.bank.log_scale.dtype == half.log_floor.dtype == torch.float32
    out = half(past, labels, num_posterior_samples=2)
    assert out.forecast.dtype == out.log_scales.dtype == out.loss.dtype == torch.float32
    assert torch.allclose(half(past).forecast, model(past).forecast, atol=0.05)


def test_saved_and_loaded(tmp_path):
    model = tiny(objective="mc_nll", eve={"latent_dim": 2}).eval()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, EVEForecaster) and isinstance(AutoConfig.from_pretrained(tmp_path), EVEForecasterConfig)
    assert loaded.config.eve == model.config.eve
    past = torch.randn(2, 3, LOOKBACK)
    torch.manual_seed(0)
    expected = model(past, num_posterior_samples=2)
    torch.manual_seed(0)
    assert torch.equal(loaded(past, num_posterior_samples=2).locations, expected.locations)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lookback": 15}, "lookback=15 has no halves"),
        ({"units": 0}, "units must be a whole number of at least 1, got 0"),
        ({"moving_average": 4}, "moving_average must be an odd number"),
        ({"objective": "crps"}, "objective='crps' is unknown"),
        ({"aggregation": "max"}, "aggregation='max' is unknown"),
        ({"kl_weight": -1.0}, "kl_weight must be"),
        ({"eve": {"latent_dims": 2}}, "does not know 'latent_dims'"),
    ],
)
def test_bad_configurations(fields, message):
    with pytest.raises(ValueError, match=message):
        EVEForecasterConfig(**fields)


def test_bad_calls():
    with pytest.raises(ValueError, match=r"past must be \[batch, length, 16\], got \(2, 3, 15\)"):
        tiny()(torch.zeros(2, 3, 15))
    with pytest.raises(ValueError, match="this is the deterministic twin: use 0"):
        tiny(deterministic=True)(torch.zeros(2, 3, LOOKBACK), num_posterior_samples=2)
