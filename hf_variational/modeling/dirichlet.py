"""Dirichlet distributions over a row of keys: sampling in log space, and the divergence of the Gammas behind them.

A Dirichlet(alpha) sample is softmax(log g) of independent Gamma(alpha_k) variables g_k. Masked keys have log alpha =
-inf: they take no weight and have no divergence.

The functions without an underscore are plain and differentiable: the oracle of the fused pass in
`attention_weights`, and what runs under `torch.compile`.
"""

import torch
from torch import Tensor

from .gamma import (
    draw_exponential,
    draw_log_gamma,
    exponential_from_noise,
    log_gamma_from_noise,
    log_gamma_sensitivity,
)

# log 1e-30: a smaller concentration is taken for this one.
LOG_CONCENTRATION_FLOOR = -69.07755278982137

# lgamma(y) = (y - 1/2) log y - y + log(2 pi) / 2 + sum_i c_i y^-i for y >= 1, to 3e-9 / y; its derivatives are digamma
# to 3e-7 and trigamma to 7e-6 of itself. benchmarks/fit_stirling_remainder.py finds the c_i.
_STIRLING = (
    8.333333090e-02,
    -7.897900968e-08,
    -2.773376594e-03,
    -5.048693266e-05,
    1.044719443e-03,
    -6.297515300e-04,
    1.371133192e-04,
)
_STIRLING_SLOPE = tuple(i * c for i, c in enumerate(_STIRLING, start=1))
_STIRLING_CURVATURE = tuple(i * (i + 1) * c for i, c in enumerate(_STIRLING, start=1))


def masked_softmax(log_weights: Tensor) -> Tensor:
    """Softmax over the last axis; a row of nothing but -inf, which sees no key, gives zeros."""
    blind = (log_weights == -torch.inf).all(-1, keepdim=True)
    return torch.softmax(log_weights.masked_fill(blind, 0.0), -1).masked_fill(blind, 0.0)


def log_concentration(log_mean: Tensor, log_total: Tensor) -> Tensor:
    """log alpha of alpha = a m: log m plus log a, no less than the floor; -inf stays."""
    return torch.where(log_mean == -torch.inf, log_mean, (log_mean + log_total).clamp(min=LOG_CONCENTRATION_FLOOR))


def sample_dirichlet(log_alpha: Tensor, noise: Tensor | None = None, approximate: bool = False) -> Tensor:
    """Draws w ~ Dirichlet(alpha) along the last axis, with reparameterisation gradients.

    w = softmax(log g). Exact: log g = log G - E / alpha, implicit through G ~ Gamma(alpha + 1) (Figurnov et al. 2018)
    and explicit through E ~ Exp(1). Approximate: log g = (log Gamma(alpha + 1) - E) / alpha, the inverse CDF for small
    alpha (Joo et al. 2020), whose samples are too narrow for alpha above about 0.1.

    Args:
        log_alpha: [..., keys]; -inf at masked keys.
        noise: standard normal, [..., keys, 2] (approximate: [..., keys, 1]); `None` draws from the global generator.

    Returns:
        [..., keys]; rows sum to 1, or are 0 where every key is masked.
    """
    visible = log_alpha != -torch.inf
    floored = log_alpha.masked_fill(~visible, LOG_CONCENTRATION_FLOOR)
    value, slope = log_gamma_with_slope(floored.detach().exp(), noise, approximate)
    log_g = value + slope * (floored - floored.detach())
    return masked_softmax(log_g.masked_fill(~visible, -torch.inf))


def log_gamma_with_slope(
    alpha: Tensor, noise: Tensor | None, approximate: bool, slope: bool = True
) -> tuple[Tensor, Tensor | None]:
    """log g of g ~ Gamma(alpha) (or its approximation), and d log g / d log alpha along the sample.

    Args:
        alpha: concentrations above 0, any shape.
        noise, approximate: as in `sample_dirichlet`.
        slope: whether the derivative is wanted.
    """
    if approximate:
        if noise is None:
            exponential = draw_exponential(alpha)
        else:
            exponential = exponential_from_noise(noise[..., 0]).to(alpha.dtype)
        log_g = (torch.lgamma(alpha + 1.0) - exponential) / alpha
        return log_g, _digamma(alpha + 1.0).sub_(log_g) if slope else None
    log_gamma, exponential = draw_log_gamma(alpha) if noise is None else log_gamma_from_noise(alpha, noise)
    explicit = exponential.div_(alpha)
    log_g = log_gamma - explicit
    return log_g, explicit.addcmul_(alpha, log_gamma_sensitivity(alpha + 1.0, log_gamma)) if slope else None


def multi_gamma_kl(log_alpha: Tensor, log_prior: Tensor) -> Tensor:
    """KL divergence of Gamma(alpha, 1) from Gamma(prior, 1), elementwise, in nats; 0 at masked keys.

    log Gamma(p) - log Gamma(alpha) + (alpha - p) psi(alpha) (Cinquin et al. 2021, arXiv 2110.04020, after Joo et al.
    2020), in terms of alpha + 1, so that it is finite wherever p / alpha is. Summed over a row it bounds the KL of the
    two Dirichlets from above.

    Args:
        log_alpha: [..., keys]; -inf at masked keys.
        log_prior: broadcastable to it.
    """
    visible = log_alpha != -torch.inf
    log_alpha = log_alpha.masked_fill(~visible, 0.0)
    log_prior = torch.where(visible, log_prior, 0.0)
    alpha, prior = log_alpha.exp(), log_prior.exp()
    log_ratio = log_prior - log_alpha
    smooth = torch.lgamma(prior + 1.0) - torch.lgamma(alpha + 1.0) + (alpha - prior) * torch.digamma(alpha + 1.0)
    return (smooth + torch.exp(log_ratio) - log_ratio - 1.0).masked_fill(~visible, 0.0)


def fast_multi_gamma_kl(alpha: Tensor, log_ratio: Tensor) -> Tensor:
    """`multi_gamma_kl` without its gradient, where `log_ratio` is log prior - log alpha; finite alpha only.

    The Bregman divergence of lgamma between y = alpha + 1 and prior + 1, from Stirling's series: unlike the difference
    of two lgammas it does not cancel at large alpha, and it needs no special function.
    """
    excess = torch.expm1(log_ratio)
    gap = alpha * excess
    y = alpha + 1.0
    u, v = y.reciprocal(), (y + gap).reciprocal()
    bregman = torch.log1p(gap * u).mul_(gap + (alpha + 0.5)) - gap * (1.0 - 0.5 * u)
    remainder = _series(v, _STIRLING) - _series(u, _STIRLING)
    remainder += gap * u * _series(u, _STIRLING_SLOPE)
    return bregman.add_(remainder).add_(excess - log_ratio)


def fast_multi_gamma_kl_slope(alpha: Tensor, log_ratio: Tensor) -> Tensor:
    """d KL / d log alpha at a constant prior: alpha (alpha - prior) psi'(alpha); arguments as above."""
    u = (alpha + 1.0).reciprocal()
    trigamma = _series(u, _STIRLING_CURVATURE).add_(0.5).mul_(u).mul_(u).add_(u)
    return torch.expm1(log_ratio).neg_().mul(alpha.square().mul_(trigamma).add_(1.0))


def _digamma(y: Tensor) -> Tensor:
    """Digamma of y >= 1."""
    u = y.reciprocal()
    return torch.log(y).sub_(_series(u, _STIRLING_SLOPE).add_(0.5).mul_(u))


def _series(u: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    value = u * coefficients[-1]
    for coefficient in reversed(coefficients[:-1]):
        value = value.add_(coefficient).mul_(u)
    return value
