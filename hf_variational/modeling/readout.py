"""Where the sample rows join again: from hidden states to the predictive distribution, in blocks of positions."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .predictive import (
    BLOCK_ELEMENTS,
    PredictiveMeasures,
    join_measures,
    log_mean_exp,
    measures_of_log_probabilities,
    widen,
)


@dataclass
class Readout:
    """The joined answer of `read_out`; fields as in `VariationalCausalLMOutput`.

    Attributes:
        logits: log p̄, [batch, length, vocab], float32.
        nll_sum: negative log-likelihood summed over the target tokens, 0-dim, or `None` without targets.
        uncertainty: or `None`.
        sample_logits: [batch, S, length, vocab], or `None`.
    """

    logits: Tensor
    nll_sum: Tensor | None = None
    uncertainty: PredictiveMeasures | None = None
    sample_logits: Tensor | None = None


def read_out(
    hidden_states: Tensor,
    head: Callable[[Tensor], Tensor] | None,
    num_samples: int,
    vocab_size: int,
    objective: str,
    targets: Tensor | None = None,
    observed: Tensor | None = None,
    output_uncertainty: bool = False,
    output_sample_logits: bool = False,
) -> Readout:
    """Joins S sample rows into the predictive distribution.

    Args:
        hidden_states: [batch * S, length, hidden].
        head: from hidden states to logits; `None`: they are logits.
        num_samples: S, at least 1.
        vocab_size: of the head.
        objective: `"elbo"` sums the samples' mean NLL, `"mc_nll"` the NLL of p̄.
        targets: target token of each position for the NLL, [batch, length]; negative: none.
        observed: token whose variance is measured, likewise.
    """
    batch, length = hidden_states.shape[0] // num_samples, hidden_states.shape[1]
    step = max(1, BLOCK_ELEMENTS // max(1, hidden_states.shape[0] * vocab_size))
    if num_samples == 1 and not output_uncertainty:
        step = length  # nothing to reduce over: log p̄ is as large as the one sample
    block = partial(_read_block, head, num_samples, objective, output_uncertainty, output_sample_logits)
    # With several samples the logits are larger than what is kept of them, so the backward pass computes them again.
    recompute = torch.is_grad_enabled() and num_samples > 1
    logits, sample_logits, rest = [], [], []
    kept = None
    for start in range(0, length, max(step, 1)):
        here = slice(start, start + step)
        arguments = (
            hidden_states[:, here],
            None if targets is None else targets[:, here],
            None if observed is None else observed[:, here],
        )
        log_mean, log_p, *others = (
            checkpoint(block, *arguments, use_reentrant=False) if recompute else block(*arguments)
        )
        if kept is None and step < length and not torch.is_grad_enabled():
            kept = log_mean.new_empty(batch, length, vocab_size)
        if kept is not None:
            kept[:, here] = log_mean  # never twice in memory, as joining a list of blocks would be
        else:
            logits.append(log_mean)
        sample_logits.append(log_p)
        rest.append(others)
    nll_sums, measures = zip(*rest, strict=True)
    return Readout(
        logits=_join(logits, dim=1) if kept is None else kept,
        nll_sum=None if targets is None else torch.stack(nll_sums).sum(),
        uncertainty=join_measures(measures) if output_uncertainty else None,
        sample_logits=_join(sample_logits, dim=2) if output_sample_logits else None,
    )


def _read_block(head, num_samples, objective, output_uncertainty, output_sample_logits, hidden, targets, observed):
    logits = hidden if head is None else head(hidden)
    log_p = torch.log_softmax(widen(logits), dim=-1).unflatten(0, (-1, num_samples))
    measures = log_mean = None
    if output_uncertainty:
        measures, log_mean = measures_of_log_probabilities(log_p, observed)
    if log_mean is None or torch.is_grad_enabled():
        log_mean = log_p.squeeze(1) if num_samples == 1 else log_mean_exp(log_p, dim=1)
    nll = None
    if targets is not None:
        chosen = log_mean.unsqueeze(1) if objective == "mc_nll" else log_p
        index = targets.clamp(min=0)[:, None, :, None].expand(-1, chosen.shape[1], -1, -1)
        token_nll = -chosen.gather(-1, index).squeeze(-1).mean(1)
        nll = torch.where(targets >= 0, token_nll, 0.0).sum()
    return log_mean, log_p if output_sample_logits else None, nll, measures


def _join(blocks: list[Tensor], dim: int) -> Tensor:
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=dim)
