"""Sampled attention weights and their divergence, from the logits: of the Dirichlets in one pass forward and one
backward.

The pass goes block by block: a block's temporaries stay in a core's cache, its keys end where its queries' sight ends
(which spares causal attention half the work), and what is kept for the backward pass is the weights, the mean's
logarithm and one derivative. `sample_weights` is the plain, differentiable function beside it: the oracle, and what
runs under `torch.compile`.

A fused kernel for accelerators, which would draw its noise again in the backward pass instead of keeping anything of
the size of the weights, would stand behind `sample_weights_with_kl` as a third implementation.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .dirichlet import (
    LOG_CONCENTRATION_FLOOR,
    fast_multi_gamma_kl,
    fast_multi_gamma_kl_slope,
    log_concentration,
    log_gamma_with_slope,
    masked_softmax,
    multi_gamma_kl,
    sample_dirichlet,
)

_BLOCK_ELEMENTS = 65_536


@dataclass(frozen=True)
class WeightsPosterior:
    """Which posterior the rows of attention weights have, and which prior.

    Attributes:
        kind: `"gaussian"`, `"approximate_dirichlet"` or `"dirichlet"`.
        prior: `"contextual"`, `"constant"` or `"uniform"`.
        log_prior: log of the prior's scale sigma_p or concentration a_p.
    """

    kind: str
    prior: str
    log_prior: float

    @property
    def draws(self) -> int:
        """Standard normals that one weight takes of a noise source."""
        return 2 if self.kind == "dirichlet" else 1

    def log_ratio(self, log_value: Tensor, log_alpha: Tensor, keys: Tensor) -> Tensor:
        """log prior concentration - log alpha, of a row's keys or (contextual) of the row.

        Args:
            log_value: log a, [..., 1].
            log_alpha: [..., keys].
            keys: how many the row sees, [..., 1].
        """
        if self.prior == "contextual":
            return self.log_prior - log_value
        log_prior = self.log_prior - keys.clamp(min=1).log() if self.prior == "uniform" else self.log_prior
        return log_prior - log_alpha

    def gaussian_kl(self, log_scale: Tensor, keys: Tensor) -> Tensor:
        """KL of N(A, sigma^2) from N(A, sigma_p^2) over the keys that a row sees; arguments [..., 1], answer [...]."""
        excess = log_scale - self.log_prior
        return (keys * (0.5 * torch.expm1(2.0 * excess) - excess)).squeeze(-1)


def visible_keys(visible: Tensor | None, logits: Tensor) -> Tensor:
    """Number of keys that each row sees, [batch or 1, heads or 1, queries, 1], in the dtype of the logits."""
    if visible is None:
        return logits.new_full((1, 1, 1, 1), logits.shape[-1])
    seen = visible.sum(-1, keepdim=True, dtype=logits.dtype)
    return seen * logits.shape[-1] if visible.shape[-1] == 1 else seen


def sample_weights(
    posterior: WeightsPosterior,
    logits: Tensor,
    log_value: Tensor,
    visible: Tensor | None,
    noise: Tensor | None,
    copies: int,
) -> tuple[Tensor, Tensor]:
    """`sample_weights_with_kl` in plain differentiable operations."""
    if visible is not None:
        logits = logits.masked_fill(~visible, -torch.inf)
    logits = logits.unsqueeze(1)
    rows = (logits.shape[0], copies, *logits.shape[2:])
    keys = visible_keys(visible, logits)
    if posterior.kind == "gaussian":
        noise = torch.randn(rows, dtype=logits.dtype, device=logits.device) if noise is None else noise[..., 0]
        noisy = logits + log_value.exp().unsqueeze(1) * noise
        weights = torch.softmax(noisy, -1) if _sees_something(visible) else masked_softmax(noisy)
        return weights, posterior.gaussian_kl(log_value, keys).expand(rows[0], *rows[2:-1])
    log_mean = torch.where(logits == -torch.inf, logits, torch.log_softmax(_finite(logits), -1))
    log_alpha = log_concentration(log_mean, log_value.unsqueeze(1))
    approximate = posterior.kind == "approximate_dirichlet"
    weights = sample_dirichlet(log_alpha.expand(rows), noise, approximate)
    if posterior.prior == "contextual":
        # The prior follows the mean: the divergence asks for dispersion and leaves the mean free.
        floor = LOG_CONCENTRATION_FLOOR - log_value.detach().unsqueeze(1)
        log_m = torch.where(log_mean == -torch.inf, log_mean, torch.maximum(log_mean, floor)).detach()
        log_alpha, log_prior = log_m + log_value.unsqueeze(1), log_m + posterior.log_prior
    else:
        log_prior = posterior.log_ratio(log_value, torch.zeros_like(keys), keys).unsqueeze(1)
    kl = multi_gamma_kl(log_alpha, log_prior).sum(-1)
    return weights, kl.squeeze(1)


def _sees_something(visible: Tensor | None) -> bool:
    """Whether every row is known to see a key; not asked of an accelerator, which would have to be waited for."""
    if visible is None:
        return True
    return visible.device.type == "cpu" and not torch.compiler.is_compiling() and bool(visible.any(-1).all())


def _finite(logits: Tensor) -> Tensor:
    """Logits whose blind rows are 0, so that a softmax over them has a gradient."""
    return logits.masked_fill((logits == -torch.inf).all(-1, keepdim=True), 0.0)


def sample_weights_with_kl(
    posterior: WeightsPosterior,
    logits: Tensor,
    log_value: Tensor,
    visible: Tensor | None = None,
    noise: Tensor | None = None,
    copies: int = 1,
    with_kl: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Draws attention weights around softmax(logits), and their KL divergence from the prior.

    Args:
        posterior: the posterior and its prior.
        logits: A before masking, [batch, heads, queries, keys], float32 or wider.
        log_value: log of the scale sigma or of the concentration a, [batch or 1, heads, queries or 1, 1].
        visible: True where a query sees a key, broadcastable to the logits; `None`: everywhere.
        noise: standard normal, [batch * copies, heads, queries, keys, draws]; `None` draws from the global generator.
        copies: posterior samples drawn of each row; 0: the KL alone, with no rows of weights.
        with_kl: whether the KL is wanted.

    Returns:
        weights [batch * copies, heads, queries, keys], rows that sum to 1 (or are 0 where a query sees nothing);
        KL summed over keys, nats, [batch, heads, queries], or `None`.
    """
    noise = None if noise is None else noise.to(logits.dtype).unflatten(0, (-1, copies))
    # The Gaussian has no intermediate results worth sparing: a fused pass was no faster and kept as much.
    if torch.compiler.is_compiling() or posterior.kind == "gaussian":
        weights, kl = sample_weights(posterior, logits, log_value, visible, noise, copies)
        return weights.flatten(0, 1), kl if with_kl else None
    differentiate = torch.is_grad_enabled() and (logits.requires_grad or log_value.requires_grad)
    weights, kl = _DirichletWeights.apply(posterior, logits, log_value, visible, noise, copies, with_kl, differentiate)
    return weights.flatten(0, 1), kl


class _DirichletWeights(torch.autograd.Function):
    """softmax(log g), g_k ~ Gamma(a m_k) or its approximation, m = softmax(A); and the KL of the Gammas."""

    @staticmethod
    def forward(ctx, posterior, logits, log_value, visible, noise, copies, with_kl, differentiate):
        weights = _new_weights(logits, copies)
        slope = torch.empty_like(weights) if differentiate else None
        log_mean = torch.empty_like(logits) if differentiate else None
        kl = logits.new_zeros(logits.shape[:-1]) if with_kl else None
        keys = visible_keys(visible, logits)
        ctx.blocks = _blocks(logits, visible, copies)
        for block in ctx.blocks:
            # A copy, which the softmax's logarithm may then replace.
            masked, blind = block.mask(block.of_rows(logits).clone(), visible)
            log_m = torch.log_softmax(masked, -1)
            log_v = block.of_rows(log_value)
            log_alpha = (log_m + log_v).clamp_(min=LOG_CONCENTRATION_FLOOR)
            alpha = log_alpha.exp()
            if with_kl:
                log_ratio = posterior.log_ratio(log_v, log_alpha, block.of_rows(keys))
                divergence = block.hide(fast_multi_gamma_kl(alpha, log_ratio), visible)
                block.of_rows(kl.unsqueeze(-1)).copy_(divergence.sum(-1, keepdim=True))
            drawn = block.of_samples(noise) if noise is not None else None
            approximate = posterior.kind == "approximate_dirichlet"
            alpha = alpha.expand(-1, copies, -1, -1, -1)
            log_g, derivative = log_gamma_with_slope(alpha, drawn, approximate, slope=differentiate)
            log_g, _ = block.mask(log_g, visible)
            block.of_samples(weights).copy_(_softmax(log_g, blind))
            if differentiate:
                block.of_samples(slope).copy_(derivative)
                block.of_rows(log_mean).copy_(log_m)
        ctx.posterior = posterior
        ctx.save_for_backward(weights, slope, log_mean, log_value, visible, keys)
        return weights, kl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, weights_grad, kl_grad):
        weights, slope, log_mean, log_value, visible, keys = ctx.saved_tensors
        contextual = ctx.posterior.prior == "contextual"
        logits_grad = torch.zeros_like(log_mean)
        log_value_grad = log_mean.new_zeros(*log_mean.shape[:-1], 1)
        for block in ctx.blocks:
            log_m, log_v = block.of_rows(log_mean), block.of_rows(log_value)
            grad = _softmax_backward(block.of_samples(weights), block.of_samples(weights_grad))
            grad = grad.mul_(block.of_samples(slope)).sum(1, keepdim=True)
            total = value_total = grad.sum(-1, keepdim=True)
            if kl_grad is not None:
                log_alpha = (log_m + log_v).clamp_(min=LOG_CONCENTRATION_FLOOR)
                log_ratio = ctx.posterior.log_ratio(log_v, log_alpha, block.of_rows(keys))
                pull = block.hide(fast_multi_gamma_kl_slope(log_alpha.exp_(), log_ratio), visible)
                if not contextual:
                    pull.masked_fill_(log_m + log_v < LOG_CONCENTRATION_FLOOR, 0.0)
                pull = pull.mul_(block.of_rows(kl_grad.unsqueeze(-1)))
                value_total = total + pull.sum(-1, keepdim=True)
                if not contextual:
                    grad += pull
                    total = value_total
            block.of_rows(log_value_grad).copy_(value_total)
            block.of_rows(logits_grad).copy_(grad.sub_(log_m.exp().mul_(total)))
        return None, logits_grad, log_value_grad.sum_to_size(log_value.shape), None, None, None, None, None


def _new_weights(logits: Tensor, copies: int) -> Tensor:
    return logits.new_zeros(logits.shape[0], copies, *logits.shape[1:])


def _softmax(log_weights: Tensor, blind: Tensor | None) -> Tensor:
    weights = torch.softmax(log_weights, -1)
    return weights if blind is None else weights.masked_fill_(blind, 0.0)


def _softmax_backward(weights: Tensor, grad: Tensor) -> Tensor:
    """Gradient of the logarithms of the weights."""
    return (grad - (grad * weights).sum(-1, keepdim=True)).mul_(weights)


@dataclass(frozen=True)
class _Block:
    """Some sequences, some queries of theirs, and the keys that those can see."""

    batch: slice
    queries: slice
    keys: slice

    def of_rows(self, tensor: Tensor) -> Tensor:
        """The block of a tensor that broadcasts to [batch, heads, queries, keys], as [batch, 1, heads, ...]."""
        return tensor[self._index(tensor)].unsqueeze(1)

    def of_samples(self, tensor: Tensor) -> Tensor:
        """The block of [batch, copies, heads, queries, keys, ...]."""
        return tensor[self.batch, :, :, self.queries, self.keys]

    def _index(self, tensor: Tensor) -> tuple[slice, ...]:
        everything = slice(None)
        return tuple(
            everything if size == 1 else part
            for size, part in zip(tensor.shape, (self.batch, everything, self.queries, self.keys), strict=True)
        )

    def mask(self, log_weights: Tensor, visible: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """-inf, in place, where a query does not see a key; and which rows see nothing, if any (they are 0)."""
        if visible is None:
            return log_weights, None
        hidden = ~self.of_rows(visible)
        log_weights = log_weights.masked_fill_(hidden, -torch.inf)
        blind = hidden.all(-1, keepdim=True)
        # Not asked of an accelerator, which would have to be waited for.
        if hidden.device.type == "cpu" and not blind.any():
            return log_weights, None
        return log_weights.masked_fill_(blind, 0.0), blind

    def hide(self, values: Tensor, visible: Tensor | None) -> Tensor:
        """0, in place, where a query does not see a key."""
        return values if visible is None else values.masked_fill_(~self.of_rows(visible), 0.0)


def _blocks(logits: Tensor, visible: Tensor | None, copies: int) -> list[_Block]:
    batch, heads, queries, keys = logits.shape
    if logits.device.type != "cpu" or not logits.numel():
        return [_Block(slice(None), slice(None), slice(None))]
    row = heads * max(copies, 1) * keys
    query_step = max(1, min(queries, _BLOCK_ELEMENTS // row))
    batch_step = max(1, _BLOCK_ELEMENTS // (row * queries))
    blocks = []
    for sequence in range(0, batch, batch_step):
        rows = slice(sequence, sequence + batch_step)
        for query in range(0, queries, query_step):
            some = slice(query, query + query_step)
            blocks.append(_Block(rows, some, _sight(visible, rows, some)))
    return blocks


def _sight(visible: Tensor | None, batch: slice, queries: slice) -> slice:
    """From the first key that any of these queries sees to the last."""
    if visible is None:
        return slice(None)
    seen = _Block(batch, queries, slice(None)).of_rows(visible).flatten(0, -2).any(0).nonzero()
    return slice(int(seen[0]), int(seen[-1]) + 1) if seen.numel() and visible.shape[-1] > 1 else slice(None)
