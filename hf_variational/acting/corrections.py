"""What posterior samples say of their limit: measures without the bias of few samples, and their Monte Carlo errors.

The entropy of a mean of S samples is on average too low, by b/S + O(1/S²) with b = ½ Σ_v Var[p(v)] / p(v) (delta
method; Miller 1955, "Note on the bias of information estimates", for counts). So is the mutual information, whose
other term, the mean of the samples' entropies, is unbiased. The jackknife (Quenouille 1956; Efron 1982) takes b/S
away. With p̄₋ⱼ the mean without sample j, its pseudo-values of H(p̄) and of the mutual information are

    H(p_j) + KL(p_j ‖ p̄) + (S − 1) KL(p̄₋ⱼ ‖ p̄)    and    KL(p_j ‖ p̄) + (S − 1) KL(p̄₋ⱼ ‖ p̄),

because S H(p̄) = Σ_j [H(p_j) + KL(p_j ‖ p̄)] and H(p̄₋ⱼ) is the cross-entropy with p̄ less KL(p̄₋ⱼ ‖ p̄). Their means are
the corrected values, never below the raw ones, and their spread gives the standard error. Since p̄₋ⱼ / p̄ is linear in
p_j / p̄, all of it is one pass over S × vocabulary.

The alternative, b with the samples' own variance in it, has a higher bias where samples differ much (of Dirichlet
samples in the tests) and no standard error. Both double the mutual information of two samples to second order.

log p̄(y) is biased the same way: on average low by Var[p(y)] / (2 S p(y)²). A corrected value would belong to no
distribution, so a likelihood is always that of the p̄ at hand; `excess` says how far it is from its limit.
"""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..modeling.predictive import BLOCK_ELEMENTS, log_mean_exp, widen


@dataclass(frozen=True)
class CorrectedMeasures:
    """Estimates of the measures of infinitely many samples, each [...], nats (the variance: probability²).

    Attributes:
        predictive_entropy: jackknifed H(p̄).
        expected_entropy: (1/S) Σ_s H(p_s), which is unbiased as it is.
        mutual_information: the difference of the two, jackknifed; it may exceed log S, as its limit may.
        conditional_variance: Σ_v Var_s[p_s(v)] with 1/(S − 1), unbiased.
        predictive_entropy_error, mutual_information_error: their Monte Carlo standard errors. Two samples have one
            distance between them and say nothing of its spread: the error of their mutual information is √2 times its
            value, as of the variance of two Gaussian numbers.
        excess: estimate of KL(p_∞ ‖ p̄), by how much the likelihood of p̄ falls short of the limit's under the model's
            own distribution; also the raw entropy's and the raw mutual information's bias, with its sign changed.
    """

    predictive_entropy: Tensor
    expected_entropy: Tensor
    mutual_information: Tensor
    conditional_variance: Tensor
    predictive_entropy_error: Tensor
    mutual_information_error: Tensor
    excess: Tensor


@torch.no_grad()
def corrected_measures(log_probabilities: Tensor) -> CorrectedMeasures:
    """
    Args:
        log_probabilities: log p_s, [..., S, vocab], normalised; -inf where a token was ruled out.

    Returns:
        [`CorrectedMeasures`], each [...], float32 (float64 stays).

    Raises:
        ValueError: with fewer than two samples, which do not differ.
    """
    shape = log_probabilities.shape[:-2]
    num_samples, vocab = log_probabilities.shape[-2:]
    if num_samples < 2:
        raise ValueError(
            f"What samples differ by takes at least two of them, got S = {num_samples}: draw 2 or more posterior "
            "samples."
        )
    flat = log_probabilities.reshape(-1, num_samples, vocab)
    step = max(1, BLOCK_ELEMENTS // (num_samples * vocab))
    blocks = [_of_block(widen(block)) for block in flat.split(step)]
    joined = {field.name: torch.cat([getattr(b, field.name) for b in blocks]) for field in fields(CorrectedMeasures)}
    return CorrectedMeasures(**{name: values.reshape(shape) for name, values in joined.items()})


def _of_block(log_p: Tensor) -> CorrectedMeasures:
    num_samples = log_p.shape[-2]
    log_p = log_p.clamp(min=-1e30)  # keeps 0 * log 0 at 0
    log_mean = log_mean_exp(log_p, -2).unsqueeze(-2)
    p, mean = log_p.exp(), log_mean.exp()
    ratio = log_p - log_mean
    # p_j / p̄ - 1, of which p̄₋ⱼ / p̄ - 1 is a multiple. Divergences as sums of terms that are never negative, because
    # differences of entropies would cancel.
    above = ratio.expm1()
    divergence = torch.linalg.vecdot((1 + above) * ratio - above, mean)
    without = (above / (1 - num_samples)).clamp(min=-1)
    rest = torch.where(without > -1, (1 + without) * without.log1p() - without, 1.0)
    rest = (num_samples - 1) * torch.linalg.vecdot(rest, mean)
    entropy = -torch.linalg.vecdot(p, log_p)
    information = divergence + rest
    corrected = information.mean(-1)
    root = math.sqrt(num_samples)
    return CorrectedMeasures(
        predictive_entropy=(entropy + information).mean(-1),
        expected_entropy=entropy.mean(-1),
        mutual_information=corrected,
        conditional_variance=p.var(-2).sum(-1),
        predictive_entropy_error=(entropy + information).std(-1) / root,
        mutual_information_error=information.std(-1) / root if num_samples > 2 else root * corrected,
        excess=rest.mean(-1),
    )
