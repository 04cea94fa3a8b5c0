"""The predictive distribution over posterior samples and what it says of uncertainty, as functions of tensors.

Reductions over the vocabulary run in blocks, so that no temporary grows with samples x length x vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.utils import ModelOutput

# Elements of one block's temporaries: 8 MiB each in float32.
BLOCK_ELEMENTS = 2**21


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
        log_p = torch.log_softmax(widen(samples[:, :, start : start + step]), dim=-1)
        observed = None if targets is None else targets[:, start : start + step]
        pieces.append(measures_of_log_probabilities(log_p, observed)[0])
    return join_measures(pieces)


def join_measures(pieces: list[PredictiveMeasures]) -> PredictiveMeasures:
    """Joins the measures of consecutive positions."""
    if len(pieces) == 1:
        return pieces[0]
    return PredictiveMeasures(**{name: torch.cat([piece[name] for piece in pieces], dim=1) for name in pieces[0]})


def token_variance(log_probabilities: Tensor) -> Tensor:
    """Var_s[p_s(y)] from log p_s(y), [batch, S, ...] to [batch, ...], with 1/S and not 1/(S-1)."""
    return widen(log_probabilities).exp().var(dim=1, correction=0)


@torch.no_grad()
def measures_of_log_probabilities(
    log_probabilities: Tensor, targets: Tensor | None = None
) -> tuple[PredictiveMeasures, Tensor]:
    """The measures of log p_s, [batch, S, positions, vocab], and log p̄, [batch, positions, vocab].

    Reads the vocabulary in blocks where the positions alone would make the temporaries large.
    """
    batch, num_samples, positions, vocab = log_probabilities.shape
    step = max(1, min(vocab, BLOCK_ELEMENTS // max(1, batch * num_samples * positions)))
    zeros = log_probabilities.new_zeros(batch, positions)
    expected_entropy, information, variance = zeros.clone(), zeros.clone(), zeros.clone()
    log_means = []
    for block in log_probabilities.split(step, dim=-1):
        # A token that a processor or a mask ruled out has -inf; the clamp keeps 0 * log 0 at 0.
        log_p = block.clamp(min=-1e30)
        peak = log_p.amax(1, keepdim=True)
        p = (log_p - peak).exp_()
        log_mean = p.mean(1, keepdim=True).log_().add_(peak)
        p.mul_(peak.exp_())
        mean = p.mean(1, keepdim=True)
        expected_entropy -= _inner(p, log_p)
        # The mean divergence of p_s from p̄ is the mutual information without a difference of two entropies.
        information += _inner(p, log_p.sub_(log_mean))
        p.sub_(mean)
        variance += _inner(p, p)
        log_means.append(log_mean.squeeze(1))
    log_mean = log_means[0] if len(log_means) == 1 else torch.cat(log_means, dim=-1)
    flips = log_probabilities.argmax(-1) != log_mean.argmax(-1).unsqueeze(1)
    information = information.clamp(min=0.0)
    measures = PredictiveMeasures(
        predictive_entropy=(expected_entropy + information).float(),
        expected_entropy=expected_entropy.float(),
        mutual_information=information.float(),
        conditional_variance=variance.float(),
        token_variance=_observed_variance(log_probabilities, targets).float(),
        top1_flip_rate=flips.float().mean(1),
    )
    return measures, log_mean


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Sum over the vocabulary of a * b, averaged over samples, [batch, positions], without the product in memory."""
    return torch.linalg.vecdot(a, b).mean(1)


def _observed_variance(log_probabilities: Tensor, targets: Tensor | None) -> Tensor:
    batch, num_samples, positions, _ = log_probabilities.shape
    if targets is None:
        return log_probabilities.new_full((batch, positions), math.nan)
    index = targets.clamp(min=0)[:, None, :, None].expand(-1, num_samples, -1, -1)
    chosen = log_probabilities.gather(-1, index).squeeze(-1)
    return torch.where(targets >= 0, token_variance(chosen), math.nan)


def log_mean_exp(values: Tensor, dim: int) -> Tensor:
    return values.logsumexp(dim) - math.log(values.shape[dim])


def widen(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
