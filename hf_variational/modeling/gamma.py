"""Gamma variables in log space, exact and differentiable for every concentration.

A Gamma(alpha) variable is Gamma(alpha + 1) * U^(1 / alpha), so

    log g = log G - E / alpha,    G ~ Gamma(alpha + 1),  E ~ Exp(1),

which does not underflow for any alpha: everything here is about the pair (log G, E).
"""

import torch
from torch import Tensor

# Of s d log z / d s minus its limit for large shapes: powers of tanh(log(z / s) / 4) along the row, of 1 / s down the
# column. benchmarks/fit_gamma_sensitivity.py finds them.
_SENSITIVITY = (
    (0.16785430, -0.33880520, 0.13741809, 0.08168615, -0.05414947),
    (0.01226418, 0.02157832, -0.09305385, 0.03500689, 0.03835481),
    (-0.00668805, 0.00831940, 0.01422353, -0.01803270, -0.00193600),
)
# Beyond it the proposals overflow float32.
_LARGEST = 1e30


def draw_log_gamma(alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Draws log G of G ~ Gamma(alpha + 1), and E ~ Exp(1) independent of it, from the global generator.

    Args:
        alpha: concentrations of 0 or more, any shape, float32 or wider.

    Returns:
        log G and E, of the shape of `alpha`, without gradients.
    """
    alpha = alpha.detach()
    if alpha.device.type == "cuda" or torch.compiler.is_compiling():
        # A kernel that rejects in registers; the loop below would wait for the device.
        return torch._standard_gamma(alpha + 1.0).log_(), draw_exponential(alpha)
    alpha = alpha.contiguous()
    log_gamma, exponential = _propose(alpha)
    # What is not finite stays NaN and reaches the loss: no proposal would ever be accepted.
    rejected = (~(exponential > 0) & (alpha < _LARGEST)).flatten().nonzero().squeeze(-1)
    while rejected.numel():
        again_gamma, again_exponential = _propose(alpha.flatten()[rejected])
        log_gamma.view(-1)[rejected] = again_gamma
        exponential.view(-1)[rejected] = again_exponential
        rejected = rejected[~(again_exponential > 0)]
    return log_gamma, exponential


def _propose(alpha: Tensor) -> tuple[Tensor, Tensor]:
    """One proposal of Marsaglia and Tsang (2000) for each entry; E <= 0 (or NaN) where it is rejected.

    x ~ N(0, 1) is accepted with probability f(x), that is if an exponential exceeds -log f(x). What it exceeds it by
    is again Exp(1) and independent of x, because the exponential has no memory: one draw serves both.
    """
    d = alpha + 2.0 / 3.0
    t = torch.randn_like(d).mul_(torch.rsqrt(d)).mul_(1.0 / 3.0)
    log_v = torch.log1p(t)
    # log f = 3 d (log(1 + t) - t + t^2 / 2 - t^3 / 3), where the textbook form cancels at large d.
    log_f = t.mul(-1.0 / 3.0).add_(0.5).mul_(t).sub_(1.0).mul_(t).add_(log_v).mul_(d).mul_(3.0)
    return log_v.mul_(3.0).add_(torch.log(d)), log_f.add_(draw_exponential(d))


def draw_exponential(like: Tensor) -> Tensor:
    """E ~ Exp(1), never infinite, of the shape and dtype of `like`, from the global generator."""
    if like.device.type == "cuda" or torch.compiler.is_compiling():
        return torch.empty_like(like).exponential_()
    # float64 has small uniforms that float32 lacks: a key of weight 1e-9 is chosen one time in 1e9.
    wide = torch.float32 if like.device.type == "mps" else torch.float64
    uniform = torch.rand(like.shape, dtype=wide, device=like.device).to(like.dtype)
    return torch.log1p(uniform.clamp_(max=1.0 - 2.0**-24).neg_()).neg_()


def log_gamma_from_noise(alpha: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The pair of `draw_log_gamma` by inverse CDF: the same noise at two concentrations gives coupled samples.

    Slow (Newton's method in float64), for the noise that a test or a study supplies.

    Args:
        alpha: concentrations.
        noise: standard normal, [*alpha.shape, 2], one for G and one for E.
    """
    log_gamma = gamma_quantile(alpha.detach() + 1.0, noise[..., 0])
    return log_gamma, exponential_from_noise(noise[..., 1]).to(alpha.dtype)


def exponential_from_noise(noise: Tensor) -> Tensor:
    """Exp(1) from standard normal noise by inverse CDF, never 0 and never infinite."""
    return -torch.special.log_ndtr(noise.double())


def gamma_quantile(shape: Tensor, noise: Tensor, iterations: int = 30) -> Tensor:
    """log z where z is the quantile of Gamma(shape, 1) at the probability Phi(noise); shape of at least 1."""
    s, normal = shape.double(), noise.double().clamp(-12.0, 12.0)
    upper = normal > 0
    target = torch.special.log_ndtr(-normal.abs())
    # Wilson and Hilferty's cube, but no smaller than the bound F(z) <= z^s / Gamma(s + 1).
    cube = (1.0 - 1.0 / (9.0 * s) + normal / (3.0 * s.sqrt())).clamp(min=1e-3)
    lower_bound = (torch.special.log_ndtr(normal) + torch.lgamma(s + 1.0)) / s
    log_z = torch.maximum(s.log() + 3.0 * cube.log(), lower_bound)
    for _ in range(iterations):
        z = log_z.exp()
        tail = torch.where(upper, torch.special.gammaincc(s, z), torch.special.gammainc(s, z)).clamp(min=1e-300)
        log_density = s * log_z - z - torch.lgamma(s)
        slope = (log_density - tail.log()).exp()
        step = (tail.log() - target) / slope.clamp(min=1e-12)
        log_z = log_z - torch.where(upper, -step, step).clamp(-1.0, 1.0)
    return log_z.to(shape.dtype)


def log_gamma_sensitivity(shape: Tensor, log_sample: Tensor) -> Tensor:
    """d log z / d s of a Gamma(s) sample z at a constant quantile: the implicit reparameterisation gradient.

    -(dF / ds) / (z f) (Figurnov, Mohamed, Mnih 2018, equation 5), with a relative error below 1.5e-4 for s >= 1, a
    tenth of that of `torch._standard_gamma_grad`. For large s it is L / (s (exp(L) - 1)), L = log(z / s), by
    Laplace's method; a polynomial makes up for small s.

    Args:
        shape: s of at least 1.
        log_sample: log z, of the same shape.
    """
    inverse = shape.reciprocal()
    log_ratio = log_sample - torch.log(shape)
    # 0 / 0 at the centre; the nudge is below the rounding of the quotient.
    nudge = torch.finfo(log_ratio.dtype).tiny ** 0.5
    sensitivity = (log_ratio + nudge).div_(torch.expm1(log_ratio).add_(nudge))
    t = torch.tanh(log_ratio.mul_(0.25))
    total = _polynomial(t, _SENSITIVITY[2])
    for coefficients in (_SENSITIVITY[1], _SENSITIVITY[0]):
        total = total.mul_(inverse).add_(_polynomial(t, coefficients))
    return sensitivity.add_(total.mul_(inverse)).mul_(inverse)


def _polynomial(t: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    value = t * coefficients[-1]
    for coefficient in reversed(coefficients[1:-1]):
        value = value.add_(coefficient).mul_(t)
    return value.add_(coefficients[0])
