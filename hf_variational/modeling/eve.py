"""EVE: a layer of variational neurons (Ruffenach 2026, arXiv 2603.28219 and 2602.18250)."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from .configuration_variational_gpt import EVEConfig
from .gaussian import gaussian_kl, sample_gaussian, sample_with_kl, weighted_sums
from .posterior import (
    PosteriorRecord,
    PosteriorStatistics,
    PosteriorTap,
    UnitWeights,
    join_statistics,
    unit_statistics,
    weights_of,
)
from .sample_axis import SampleAxis, repeat_rows

# Of one temporary of the statistics: 1 MiB in float32.
_STATISTICS_ELEMENTS = 2**18


class EVE(nn.Module):
    """Turns the hidden activation h of a token into a sample z ~ N(mu(h), sigma(h)^2) per unit, or into its mean.

    Args:
        config: the neurons' configuration.
        units: number N of units, the width of h.
        layer_idx: number of the layer, which names its record on the tape and its noise.

    Shapes: h is [rows, length, units]. With S posterior samples the answer has `axis.rows` = batch * S rows: where h
    still has one row a sequence, the rows split here.
    """

    def __init__(self, config: EVEConfig, units: int, layer_idx: int):
        super().__init__()
        self.config = config
        self.units = units
        self.layer_idx = layer_idx
        k = config.latent_dim
        self.width = (units,) if k == 1 else (units, k)

        self.log_scale = nn.Parameter(torch.empty((1,) if config.scale == "scalar" else self.width))
        if config.scale == "input":
            if config.scale_rank is None:
                self.scale_weight = nn.Parameter(torch.empty(units * k, units))
            else:
                self.scale_down = nn.Parameter(torch.empty(config.scale_rank, units))
                self.scale_up = nn.Parameter(torch.empty(units * k, config.scale_rank))
        if config.mean == "gain":
            self.gain = nn.Parameter(torch.empty(units))
        elif config.mean == "linear":
            self.mean_weight = nn.Parameter(torch.empty(units * k, units))
            self.mean_bias = nn.Parameter(torch.empty(units * k))
        if config.prior == "empirical":
            self.prior_mean = nn.Parameter(torch.empty(units))
            self.prior_log_scale = nn.Parameter(torch.empty(units))
        elif config.prior == "centered":
            # Not trained: a prior that follows the mean and learns its scale has KL 0 and asks for nothing.
            self.register_buffer("prior_log_scale", torch.empty(units))
        elif config.learn_autoregressive_coefficient:
            # phi is its hyperbolic tangent, so it stays in (-1, 1).
            self.prior_coefficient = nn.Parameter(torch.empty(units))
        if config.reconstruction_weight > 0:
            self.reconstruction_decoder = nn.Parameter(torch.empty(units))
        self.tap = PosteriorTap()

    def init_weights(self) -> None:
        """Starts with mu = h, sigma = `initial_scale` for every input, and the prior N(0, `prior_scale`^2)."""
        config = self.config
        init.constant_(self.log_scale, math.log(config.initial_scale))
        if config.scale == "input":
            if config.scale_rank is None:
                init.zeros_(self.scale_weight)
            else:
                init.normal_(self.scale_down, mean=0.0, std=1.0 / math.sqrt(self.units))
                init.zeros_(self.scale_up)
        if config.mean == "gain":
            init.ones_(self.gain)
        elif config.mean == "linear":
            eye = torch.eye(self.units).repeat_interleave(config.latent_dim, 0) * self._share
            init.copy_(self.mean_weight, eye)
            init.zeros_(self.mean_bias)
        if config.prior == "empirical":
            init.zeros_(self.prior_mean)
        if config.prior in ("empirical", "centered"):
            init.constant_(self.prior_log_scale, math.log(config.prior_scale))
        if config.learn_autoregressive_coefficient:
            init.constant_(self.prior_coefficient, math.atanh(config.autoregressive_coefficient))
        if config.reconstruction_weight > 0:
            init.ones_(self.reconstruction_decoder)

    @property
    def _share(self) -> float:
        """What each latent dimension's mean is of h, so that the pooled mean is h."""
        k = self.config.latent_dim
        return {"mean": 1.0, "sum": 1.0 / k, "sum_sqrtk": 1.0 / math.sqrt(k)}[self.config.pool]

    def pool(self, z: Tensor) -> Tensor:
        """A unit's activity from its latent: [rows, length, units, k] to [rows, length, units]."""
        if z.ndim == 3:
            return z
        k = self.config.latent_dim
        return z.sum(-1) * {"mean": 1.0 / k, "sum": 1.0, "sum_sqrtk": 1.0 / math.sqrt(k)}[self.config.pool]

    def mean(self, h: Tensor) -> Tensor:
        """Posterior mean, [rows, length, units] or [rows, length, units, k] (1 where all dimensions share it)."""
        if self.config.mean == "linear":
            mean = F.linear(h, self.mean_weight.to(h.dtype), self.mean_bias.to(h.dtype))
            return mean.unflatten(-1, self.width)
        mean = h if self.config.mean == "identity" else h * self.gain.to(h.dtype)
        return mean if self.config.latent_dim == 1 else mean.unsqueeze(-1) * self._share

    def pooled_mean(self, h: Tensor) -> Tensor:
        """The mean pass, [rows, length, units]; with `mean="identity"` it is h itself."""
        if self.config.mean == "identity":
            return h
        if self.config.mean == "gain":
            return h * self.gain.to(h.dtype)
        return self.pool(self.mean(h))

    def raw_log_scale(self, h: Tensor) -> Tensor:
        """log sigma before the clip, in float32 (or wider), broadcastable to [rows, length, *width]."""
        log_scale = self.log_scale.to(torch.promote_types(self.log_scale.dtype, torch.float32))
        if self.config.scale != "input":
            return log_scale
        low_rank = self.config.scale_rank is not None
        # The wide product reads h as it is; what it adds up to is a logarithm and must not be rounded to bf16.
        inner = F.linear(h, self.scale_down.to(h.dtype)) if low_rank else h
        weight = self.scale_up if low_rank else self.scale_weight
        with torch.autocast(h.device.type, enabled=False):
            inner = inner.to(log_scale.dtype)
            return F.linear(inner, weight.to(inner.dtype), log_scale.flatten()).unflatten(-1, self.width)

    def forward(self, h: Tensor, axis: SampleAxis) -> Tensor:
        if axis.num_samples == 0 and not axis.record:
            return self.pooled_mean(h)
        mean = self.mean(h)
        log_scale = self.raw_log_scale(h)
        noise = None if axis.num_samples == 0 else self._noise(h, axis)
        weights = weights_of(axis.unit_weights, self.layer_idx, self.units)
        charges = None
        if self._fusible(mean, log_scale, noise, axis):
            bounds = self.config.log_scale_min, self.config.log_scale_max
            prior = self._prior(mean, axis)
            z, *charges = sample_with_kl(mean, log_scale, noise, *prior, *bounds, weights.kl, weights.energy)
        else:
            log_scale = log_scale.clamp(self.config.log_scale_min, self.config.log_scale_max)
            z = None
            if noise is not None:
                z = sample_gaussian(mean, log_scale, noise, copies=axis.rows // h.shape[0])
        z = self.pooled_mean(h) if z is None else self.pool(z).to(h.dtype)
        if axis.record:
            if charges is None:
                kl = self.elementwise_kl(mean, log_scale, axis)
                sums = weighted_sums(kl, mean.to(kl.dtype), weights.kl, weights.energy)
                charges = [kl.flatten(2).sum(-1), *sums]
            self._record(h, z, charges, weights, mean, log_scale, axis)
        return z

    def _noise(self, h: Tensor, axis: SampleAxis) -> Tensor:
        if self.config.noise == "sequence":
            noise = axis.sequence_noise(self.layer_idx, self.width, h.device)
        else:
            noise = axis.noise(self.layer_idx, h.shape[1], self.width, h.device)
        return noise.to(torch.promote_types(h.dtype, torch.float32))

    def _fusible(self, mean: Tensor, log_scale: Tensor, noise: Tensor | None, axis: SampleAxis) -> bool:
        if noise is None or not axis.record or self.config.prior == "autoregressive":
            return False
        return mean.ndim == 3 and mean.shape == log_scale.shape == noise.shape

    def _record(self, h, z, charges: list, weights: UnitWeights, mean, log_scale, axis):
        measured = self._statistics(mean, log_scale, axis) if axis.statistics else {}
        kl, charged_kl, energy = charges
        if energy is not None and weights.constant is not None:
            energy = energy + weights.constant
        reconstruction = None
        if self.config.reconstruction_weight > 0:
            target = axis.expand(h)
            decoded = z.to(kl.dtype) * self.reconstruction_decoder.to(kl.dtype)
            reconstruction = (decoded - target.detach().to(kl.dtype)).square().mean(-1)
        statistics = PosteriorStatistics(kl, **measured)
        record = PosteriorRecord(
            self.layer_idx,
            statistics,
            self.units,
            reconstruction=reconstruction,
            charged_kl=charged_kl,
            energy=energy,
        )
        self.tap(record, axis.tape)

    @torch.no_grad()
    def _statistics(self, mean: Tensor, log_scale: Tensor, axis: SampleAxis) -> dict[str, Tensor]:
        """`unit_statistics`, on the CPU of a few tokens at a time, whose temporaries stay in a core's cache."""
        weights = axis.weights(*mean.shape[:2], mean.device)
        total = weights.sum()
        if self.config.prior == "autoregressive" or mean.device.type != "cpu" or torch.compiler.is_compiling():
            return self._statistics_of(mean, log_scale, weights, total, axis)
        # But for the autoregressive prior no token's statistics know of another's: each is a row of length 1.
        shape = mean.shape[:2]
        size = max(1, _STATISTICS_ELEMENTS // math.prod(self.width))
        means = mean.flatten(0, 1).unsqueeze(1).split(size)
        scales = [log_scale] * len(means)
        if log_scale.ndim > len(self.width):
            scales = log_scale.flatten(0, 1).unsqueeze(1).split(size)
        columns = zip(means, scales, weights.reshape(-1, 1).split(size), strict=True)
        joined = join_statistics([self._statistics_of(*column, total, axis) for column in columns])
        return {name: value.view(shape) if name.endswith("_per_token") else value for name, value in joined.items()}

    def _statistics_of(self, mean, log_scale, weights, total, axis) -> dict[str, Tensor]:
        log_scale = log_scale.clamp(self.config.log_scale_min, self.config.log_scale_max)
        kl = self.elementwise_kl(mean, log_scale, axis)
        scales = log_scale.expand(*mean.shape[:2], *self.width)
        return unit_statistics(kl, scales, mean.to(kl.dtype), weights, total)

    def elementwise_kl(self, mean: Tensor, log_scale: Tensor, axis: SampleAxis) -> Tensor:
        """The KL of each latent dimension of each token, [..., *width]; `mean` is [..., *width], or has one entry for
        all latent dimensions of a unit.
        """
        mean = mean.to(log_scale.dtype)
        kl = gaussian_kl(mean, log_scale, *self._prior(mean, axis))
        # A shared mean or scale leaves axes of size 1, but each latent dimension has its KL.
        return kl.expand(*mean.shape[: mean.ndim - len(self.width)], *self.width)

    def _prior(self, mean: Tensor, axis: SampleAxis) -> tuple[Tensor | None, Tensor]:
        """Mean (`None`: the posterior's own) and log-scale of the prior, broadcastable to `mean`."""
        dtype = torch.promote_types(self.log_scale.dtype, torch.float32)
        zero = torch.zeros((), dtype=dtype, device=mean.device)
        kind = self.config.prior
        if kind == "standard":
            return zero, zero
        if kind == "autoregressive":
            follows = repeat_rows(axis.follows.to(mean.device), mean.shape[0] // axis.batch)
            follows = follows.reshape(*follows.shape, *[1] * (mean.ndim - 2))
            previous = F.pad(mean, [0, 0] * (mean.ndim - 2) + [1, 0])[:, :-1].to(dtype)
            prior_mean = torch.where(follows, self.autoregressive_coefficient(mean.ndim) * previous, zero)
            return prior_mean, torch.where(follows, zero + math.log(self.config.prior_scale), zero)
        per_unit = (lambda t: t.unsqueeze(-1)) if mean.ndim == 4 else (lambda t: t)
        log_scale = per_unit(self.prior_log_scale.to(dtype))
        return (None if kind == "centered" else per_unit(self.prior_mean.to(dtype))), log_scale

    def autoregressive_coefficient(self, ndim: int = 3) -> Tensor | float:
        """phi of the autoregressive prior: a number, or where it is learned one per unit, [units], and [units, 1] for
        means with an axis of latent dimensions (`ndim` 4).
        """
        if not self.config.learn_autoregressive_coefficient:
            return self.config.autoregressive_coefficient
        raw = self.prior_coefficient
        phi = raw.to(torch.promote_types(raw.dtype, torch.float32)).tanh()
        return phi.unsqueeze(-1) if ndim == 4 else phi

    def extra_repr(self) -> str:
        config = self.config
        return f"units={self.units}, mean={config.mean!r}, scale={config.scale!r}, prior={config.prior!r}"
