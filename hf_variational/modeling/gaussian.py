"""Gaussian posteriors: divergence and reparameterised sampling, as functions of tensors.

Every function works in float32 (or the float64 of its input), whatever the dtype of the activations.
"""

import torch
from torch import Tensor

# Rows of one block of the fused pass: its temporaries stay in a core's cache.
_BLOCK_ELEMENTS = 65_536


def gaussian_kl(mean: Tensor, log_scale: Tensor, prior_mean: Tensor | None, prior_log_scale: Tensor) -> Tensor:
    """KL divergence of N(mean, scale^2) from N(prior_mean, prior_scale^2), elementwise, in nats.

    log(s / sigma) + (sigma^2 + (mu - m)^2) / (2 s^2) - 1/2; for m = 0 and s = 1 that is
    (mu^2 + sigma^2 - log sigma^2 - 1) / 2.

    Args:
        mean, log_scale, prior_mean, prior_log_scale: broadcastable tensors. `prior_mean=None` centres the prior on the
            posterior's mean, which then gets no gradient from the KL.

    Returns:
        The KL, of the broadcast shape.
    """
    inverse_variance = torch.exp(-2.0 * prior_log_scale)
    spread = torch.exp(2.0 * log_scale)
    if prior_mean is not None:
        spread = spread + (mean - prior_mean).square()
    return prior_log_scale - log_scale + 0.5 * spread * inverse_variance - 0.5


def sample_gaussian(mean: Tensor, log_scale: Tensor, noise: Tensor, copies: int = 1) -> Tensor:
    """Reparameterised sample mean + exp(log_scale) * noise (Kingma and Welling 2014).

    Args:
        mean: [rows, ...].
        log_scale: broadcastable to `mean`.
        noise: [rows * copies, ...], broadcastable in the other axes.
        copies: samples drawn of each row, neighbours in the answer.

    Returns:
        [rows * copies, ...].
    """
    scale = torch.exp(log_scale)
    if copies == 1:
        return mean + scale * noise
    noise = noise.unflatten(0, (-1, copies))
    scale = scale.unsqueeze(1) if scale.ndim == mean.ndim else scale
    return (mean.unsqueeze(1) + scale * noise).flatten(0, 1)


def weighted_sums(
    kl: Tensor, mean: Tensor, kl_weights: Tensor | None, energy_weights: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """What the units of each token are charged where each has weights of its own.

    Args:
        kl: [rows, length, units], or with a last axis for latent dimensions.
        mean: of the same shape, or with one entry for all latent dimensions of a unit.
        kl_weights: r, [units], or `None`.
        energy_weights: c, [units], or `None`.

    Returns:
        sum_i r_i KL_i and sum_i c_i mu_i^2, each [rows, length], or `None` where there are no such weights.
    """
    charged_kl = energy = None
    if kl_weights is not None:
        per_unit = kl if kl.ndim == 3 else kl.sum(-1)
        charged_kl = (per_unit * kl_weights).sum(-1)
    if energy_weights is not None:
        square = mean.square()
        if kl.ndim == 4:
            square = square.expand(kl.shape).sum(-1)
        energy = (square * energy_weights).sum(-1)
    return charged_kl, energy


class _SampleWithKL(torch.autograd.Function):
    """One pass over the activations for the sample and for the KL, block by block."""

    @staticmethod
    def forward(
        ctx,
        mean,
        log_scale,
        noise,
        prior_mean,
        prior_log_scale,
        log_scale_min,
        log_scale_max,
        kl_weights,
        energy_weights,
    ):
        sample = torch.empty_like(noise)
        dispersion = torch.empty_like(noise)
        kl = noise.new_empty(noise.shape[0])
        charged_kl = None if kl_weights is None else torch.empty_like(kl)
        energy = None if energy_weights is None else torch.empty_like(kl)
        inverse_scale = torch.exp(-prior_log_scale).expand(noise.shape[1])
        for rows in _blocks(noise):
            mu = mean[rows].to(noise.dtype)
            clipped = log_scale[rows].clamp(log_scale_min, log_scale_max)
            scale = clipped.exp()
            torch.mul(scale, noise[rows], out=dispersion[rows])
            torch.add(mu, dispersion[rows], out=sample[rows])
            # Subtracted unit by unit: near collapse the sums over units are large and equal.
            spread = scale.mul_(inverse_scale).square_().sub_(1.0).mul_(0.5)
            spread.sub_(clipped.sub_(prior_log_scale))
            if prior_mean is not None:
                spread.add_((mu - prior_mean).mul_(inverse_scale).square_(), alpha=0.5)
            kl[rows] = spread.sum(-1)
            if charged_kl is not None:
                charged_kl[rows] = spread.mul_(kl_weights).sum(-1)
            if energy is not None:
                energy[rows] = mu.square().mul_(energy_weights).sum(-1)
        ctx.save_for_backward(mean, log_scale, dispersion, prior_mean, prior_log_scale, kl_weights, energy_weights)
        ctx.bounds = (log_scale_min, log_scale_max)
        return sample, kl, charged_kl, energy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, sample_grad, kl_grad, charged_grad, energy_grad):
        mean, log_scale, dispersion, prior_mean, prior_log_scale, kl_weights, energy_weights = ctx.saved_tensors
        low, high = ctx.bounds
        units = dispersion.shape[1]
        inverse_variance = torch.exp(-2.0 * prior_log_scale).expand(units)
        mean_grad = torch.empty_like(mean)
        log_scale_grad = torch.empty_like(dispersion)
        prior_mean_grad = dispersion.new_zeros(units)
        excess = dispersion.new_zeros(units)
        slopes = None if energy_weights is None else 2.0 * energy_weights
        for rows in _blocks(dispersion):
            weight = kl_grad[rows, None]
            if kl_weights is not None:
                weight = torch.addcmul(weight, charged_grad[rows, None], kl_weights)
            raw = log_scale[rows]
            # (sigma^2 + (mu - m)^2) / s^2, whose excess over 1 is the gradient in log s.
            ratio = (2.0 * raw.clamp(low, high)).exp_().mul_(inverse_variance)
            grad = torch.mul(sample_grad[rows], dispersion[rows], out=log_scale_grad[rows])
            grad.addcmul_(ratio - 1.0, weight).masked_fill_((raw < low) | (raw > high), 0.0)
            if prior_mean is None:
                mean_grad[rows] = sample_grad[rows]
            else:
                offset = mean[rows].to(dispersion.dtype) - prior_mean
                pull = offset * inverse_variance
                ratio.addcmul_(offset, pull)
                pull.mul_(weight)
                prior_mean_grad -= pull.sum(0)
                mean_grad[rows] = pull.add_(sample_grad[rows])
            if slopes is not None:
                mean_grad[rows] += (mean[rows] * slopes).mul_(energy_grad[rows, None])
            excess += (weight * (1.0 - ratio)).sum(0)
        return (
            mean_grad,
            log_scale_grad,
            None,
            _like(prior_mean_grad, prior_mean),
            _like(excess, prior_log_scale),
            *[None] * 4,
        )


def _blocks(tensor: Tensor) -> list[slice]:
    rows, units = tensor.shape
    step = rows if tensor.device.type != "cpu" else max(1, _BLOCK_ELEMENTS // units)
    return [slice(start, start + step) for start in range(0, rows, step)] if rows else []


def _like(gradient: Tensor, parameter: Tensor | None) -> Tensor | None:
    """Sums a per-unit gradient to the shape of a parameter that was broadcast over units."""
    if parameter is None:
        return None
    return gradient if parameter.shape == gradient.shape else gradient.sum().reshape(parameter.shape)


def sample_with_kl(
    mean: Tensor,
    log_scale: Tensor,
    noise: Tensor,
    prior_mean: Tensor | None,
    prior_log_scale: Tensor,
    log_scale_min: float,
    log_scale_max: float,
    kl_weights: Tensor | None = None,
    energy_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """`sample_gaussian` and `gaussian_kl` summed over units, in one pass forward and one backward.

    The clip of the log-scale is part of it, and no gradient passes where it is clipped. The plain functions are its
    oracle; under `torch.compile` they are what runs, for the compiler fuses them itself.

    Args:
        mean: [rows, length, units], any floating dtype.
        log_scale: [rows, length, units], before clipping.
        noise: [rows, length, units].
        prior_mean: [units], 0-dim, or `None` (centred on the mean).
        prior_log_scale: [units] or 0-dim.
        kl_weights, energy_weights: [units], without gradient, or `None`; see `weighted_sums`.

    Returns:
        sample [rows, length, units] in the dtype of `noise`; kl [rows, length]; the two of `weighted_sums`.
    """
    if torch.compiler.is_compiling():
        clipped = log_scale.clamp(log_scale_min, log_scale_max)
        wide = mean.to(noise.dtype)
        kl = gaussian_kl(wide, clipped, prior_mean, prior_log_scale)
        return sample_gaussian(mean, clipped, noise), kl.sum(-1), *weighted_sums(kl, wide, kl_weights, energy_weights)
    sample, *sums = _SampleWithKL.apply(
        mean.flatten(0, 1),
        log_scale.flatten(0, 1),
        noise.flatten(0, 1),
        prior_mean,
        prior_log_scale,
        log_scale_min,
        log_scale_max,
        kl_weights,
        energy_weights,
    )
    rows = mean.shape[:2]
    return sample.unflatten(0, rows), *(one if one is None else one.unflatten(0, rows) for one in sums)
