"""The predictive distribution over posterior samples and what it says of uncertainty, as functions of tensors.

Reductions over the vocabulary run in blocks, so that no temporary grows with samples x length x vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.utils import ModelOutput

# Elements of one block's temporaries: 16 MiB each in float32.
BLOCK_ELEMENTS = 2**22


@dataclass
class PredictiveMeasures(ModelOutput):
    """Uncertainty of the predictive distribution, each [batch, length], float32; entropies in nats.

    Attributes:
        predictive_entropy: H(p̄), total uncertainty, where p̄ = (1/S) sum_s p_s.
        expected_entropy: (1/S) sum_s H(p_s), aleatoric.
        mutual_information: H(p̄) - (1/S) sum_s H(p_s), epistemic; never negative.
        conditional_variance: sum over the vocabulary of Var_s[p_s(v)].
        token_variance: Var_s[p_s(y)] of the token y that was chosen or observed; NaN where there is none.
        top1_flip_rate: share of samples whose most probable token is not p̄'s.
    """

    predictive_entropy: Tensor | None = None
    expected_entropy: Tensor | None = None
    mutual_information: Tensor | None = None
    conditional_variance: Tensor | None = None
    token_variance: Tensor | None = None
    top1_flip_rate: Tensor | None = None

    def map(self, function) -> "PredictiveMeasures":
        """Applies `function` to each measure that is there."""
        return PredictiveMeasures(**{name: function(value) for name, value in self.items()})


def log_mean_probability(logits: Tensor, num_samples: int) -> Tensor:
    """log p̄, the log of the mean over samples of softmax(logits).

    Args:
        logits: [batch * S, length, vocab]; row `b * S + s` is sample `s` of sequence `b`.
        num_samples: S.

    Returns:
        [batch, length, vocab], float32 (float64 stays).
    """
    log_probabilities = torch.log_softmax(widen(logits), dim=-1).unflatten(0, (-1, num_samples))
    return log_mean_exp(log_probabilities, dim=1)


@torch.no_grad()
def predictive_measures(logits: Tensor, num_samples: int, targets: Tensor | None = None) -> PredictiveMeasures:
    """All measures of [`PredictiveMeasures`] from the samples' logits.

    Args:
        logits: [batch * S, length, vocab]; row `b * S + s` is sample `s` of sequence `b`.
        num_samples: S, at least 1.
        targets: the observed token of each position, [batch, length]; negative where there is none.

    Raises:
        ValueError: if the rows are not a multiple of S, or S is 0.
    """
    if num_samples < 1 or logits.shape[0] % num_samples:
        raise ValueError(
            f"predictive_measures needs S >= 1 samples and batch * S rows, got S = {num_samples} and "
            f"{logits.shape[0]} rows."
        )
    samples = logits.unflatten(0, (-1, num_samples))
    batch, _, length, vocab = samples.shape
    step = max(1, BLOCK_ELEMENTS // max(1, batch * num_samples * vocab))
    pieces = []
    for start in range(0, length, step):
        piece = samples[:, :, start : start + step]
        observed = None if targets is None else targets[:, start : start + step]
        pieces.append(_measures_of_block(piece, observed))
    return join_measures(pieces)


def join_measures(pieces: list[PredictiveMeasures]) -> PredictiveMeasures:
    """Joins the measures of consecutive positions."""
    if len(pieces) == 1:
        return pieces[0]
    return PredictiveMeasures(**{name: torch.cat([piece[name] for piece in pieces], dim=1) for name in pieces[0]})


def token_variance(log_probabilities: Tensor) -> Tensor:
    """Var_s[p_s(y)] from log p_s(y), [batch, S, ...] to [batch, ...], with 1/S and not 1/(S-1)."""
    return widen(log_probabilities).exp().var(dim=1, correction=0)


def _measures_of_block(samples: Tensor, targets: Tensor | None) -> PredictiveMeasures:
    """The measures of [batch, S, positions, vocab] logits, in blocks of the vocabulary where one position is wide."""
    batch, num_samples, positions, vocab = samples.shape
    step = max(1, min(vocab, BLOCK_ELEMENTS // max(1, batch * num_samples * positions)))
    normaliser = _log_normaliser(samples, step)
    zeros = normaliser.new_zeros(batch, positions)
    expected_entropy, information, variance = zeros.clone(), zeros.clone(), zeros.clone()
    best = normaliser.new_full((batch, positions), -math.inf)
    choice = torch.zeros_like(best, dtype=torch.long)
    for start in range(0, vocab, step):
        # A token that a processor or a mask ruled out has -inf; the clamp keeps 0 * log 0 at 0.
        log_p = (widen(samples[..., start : start + step]) - normaliser.unsqueeze(-1)).clamp_(min=-1e30)
        peak = log_p.amax(1, keepdim=True)
        p = (log_p - peak).exp_()
        log_mean = peak + p.mean(1, keepdim=True).log()
        p.mul_(peak.exp())
        mean = p.mean(1, keepdim=True)
        expected_entropy -= (p * log_p).sum(-1).mean(1)
        # The mean divergence of p_s from p̄ is the mutual information without a difference of two entropies.
        information += log_p.sub_(log_mean).mul_(p).sum(-1).mean(1)
        variance += p.sub_(mean).square_().sum(-1).mean(1)
        top, index = log_mean.squeeze(1).max(-1)
        better = top > best
        best = torch.where(better, top, best)
        choice = torch.where(better, index + start, choice)
    flips = (samples.argmax(-1) != choice.unsqueeze(1)).to(best.dtype).mean(1)
    information = information.clamp(min=0.0)
    return PredictiveMeasures(
        predictive_entropy=(expected_entropy + information).float(),
        expected_entropy=expected_entropy.float(),
        mutual_information=information.float(),
        conditional_variance=variance.float(),
        token_variance=_observed_variance(samples, normaliser, targets).float(),
        top1_flip_rate=flips.float(),
    )


def _observed_variance(samples: Tensor, normaliser: Tensor, targets: Tensor | None) -> Tensor:
    if targets is None:
        return normaliser.new_full((samples.shape[0], samples.shape[2]), math.nan)
    index = targets.clamp(min=0)[:, None, :, None].expand(-1, samples.shape[1], -1, -1)
    log_p = widen(samples.gather(-1, index).squeeze(-1)) - normaliser
    return torch.where(targets >= 0, token_variance(log_p), math.nan)


def _log_normaliser(samples: Tensor, step: int) -> Tensor:
    blocks = [widen(block).logsumexp(-1) for block in samples.split(step, dim=-1)]
    return blocks[0] if len(blocks) == 1 else torch.stack(blocks).logsumexp(0)


def log_mean_exp(values: Tensor, dim: int) -> Tensor:
    return values.logsumexp(dim) - math.log(values.shape[dim])


def widen(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
