"""Scores of probabilistic forecasts, streamed over a test set."""

import torch
from torch import Tensor

from .data import IGNORED
from .modeling import ForecastOutput, objective_of

QUANTILES = (0.1, 0.5, 0.9)
# Draws from a predictive distribution that has fewer than two posterior samples.
NUM_DRAWS = 32
SCORES = ("mse", "mae", "crps", *(f"pinball_{q}" for q in QUANTILES), "nll", "coverage_80", "width_80")


def crps_of_sorted(draws: Tensor, target: Tensor) -> Tensor:
    """Continuous ranked probability score from independent draws, without bias (fair: Ferro 2014).

    mean |x - y| - 1/2 mean_{i != j} |x_i - x_j|, whose expectation is the score of the distribution itself for any
    number of draws (with 1/2 mean over all pairs it would favour narrow distributions). The second term is a sum over
    sorted draws.

    Args:
        draws: sorted along the first axis, [M, ...]; one draw is a point forecast, whose score is |x - y|.
        target: [...].
    """
    count = draws.shape[0]
    error = (draws - target).abs().mean(0)
    if count == 1:
        return error
    rank = torch.arange(1, count + 1, device=draws.device, dtype=draws.dtype)
    weights = (2.0 * rank - count - 1.0) / (count * (count - 1.0))
    return error - torch.tensordot(weights, draws, dims=1)


def quantile_of_sorted(draws: Tensor, probability: float) -> Tensor:
    """Quantile from sorted draws at rank p (M + 1): a fresh draw lies below it with probability p exactly where that
    is a whole number (Weibull's plotting position; the usual interpolation is too narrow for few draws).

    Args:
        draws: [M, ...].
        probability: in (0, 1).
    """
    count = draws.shape[0]
    rank = min(max(probability * (count + 1) - 1.0, 0.0), count - 1.0)
    low = int(rank)
    return torch.lerp(draws[low], draws[min(low + 1, count - 1)], rank - low)


def pinball(quantile: Tensor, target: Tensor, probability: float) -> Tensor:
    """max(p (y - q), (p - 1) (y - q)), elementwise (Koenker and Bassett 1978)."""
    error = target - quantile
    return torch.maximum(probability * error, (probability - 1.0) * error)


def predictive_draws(locations: Tensor, log_scales: Tensor | None) -> Tensor:
    """Draws from the predictive distribution, [M, ...] of [batch, S, ...]: one of each posterior sample, which are
    independent of each other; of a single Gaussian `NUM_DRAWS`. A point forecast stays one point.
    """
    locations = locations.transpose(0, 1)
    if log_scales is None:
        return locations
    scales = log_scales.transpose(0, 1).exp()
    if locations.shape[0] == 1:
        locations = locations.expand(NUM_DRAWS, *locations.shape[1:])
    return locations + scales * torch.randn_like(locations)


class ForecastMetrics:
    """Means over forecast values, in the units of the (standardised) data.

    `nll` (nats) is there where the model has an output density, `coverage_80` and `width_80`, of the interval between
    the quantiles 0.1 and 0.9, where it predicts more than a point.
    """

    def __init__(self):
        self._sums = torch.zeros(len(SCORES), dtype=torch.float64)
        self._counts = torch.zeros(len(SCORES), dtype=torch.float64)

    @torch.no_grad()
    def update(self, outputs: ForecastOutput, labels: Tensor) -> None:
        """Adds a batch; an origin whose labels are -100 is left out."""
        kept = (labels != IGNORED).all(-1)
        target = labels[kept].float()
        if not len(target):
            return
        forecast = outputs["forecast"][kept].float()
        locations = outputs["locations"].float().movedim(1, 2)[kept]
        log_scales = outputs.get("log_scales")
        if log_scales is not None:
            log_scales = log_scales.float().movedim(1, 2)[kept]
        draws = predictive_draws(locations, log_scales).sort(dim=0).values
        scores = {
            "mse": (forecast - target).square(),
            "mae": (forecast - target).abs(),
            "crps": crps_of_sorted(draws, target),
        }
        quantiles = {q: quantile_of_sorted(draws, q) for q in QUANTILES}
        scores |= {f"pinball_{q}": pinball(value, target, q) for q, value in quantiles.items()}
        if log_scales is not None:
            scores["nll"] = objective_of("mc_nll", forecast, locations, log_scales, target)
        if len(draws) > 1:
            low, high = quantiles[QUANTILES[0]], quantiles[QUANTILES[-1]]
            scores["coverage_80"] = ((low <= target) & (target <= high)).float()
            scores["width_80"] = high - low
        for name, values in scores.items():
            # over the horizon in float32, which Metal has; the rest in float64
            self._sums[SCORES.index(name)] += values.sum(-1).cpu().double().sum()
            self._counts[SCORES.index(name)] += values.numel()

    def gather(self, accelerator) -> "ForecastMetrics":
        """What all processes have seen together; every process has to call it."""
        if accelerator.num_processes == 1:
            return self
        together = ForecastMetrics()
        device = accelerator.device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        state = torch.stack([self._sums, self._counts]).to(device, dtype)
        together._sums, together._counts = accelerator.reduce(state, reduction="sum").cpu().double().unbind()
        return together

    def compute(self) -> dict[str, float]:
        """The means so far, and `num_values`."""
        if not self._counts.any():
            raise ValueError("There is nothing to evaluate: no origin had labels other than -100.")
        means = {
            name: float(total / count)
            for name, total, count in zip(SCORES, self._sums, self._counts, strict=True)
            if count > 0
        }
        return {**means, "num_values": int(self._counts.max())}
