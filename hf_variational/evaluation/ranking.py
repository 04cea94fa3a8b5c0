"""How well a score ranks: whether it is higher where the model is wrong, or where the text is not of its domain.

Detection takes two sides, such as right and wrong tokens or windows of two texts. Rejection takes an uncertainty and a
loss of each prediction, 0 or 1 for an error or any real number such as the negative log-likelihood: the least certain
predictions are left to somebody else, and the loss of the rest should fall.
"""

from typing import NamedTuple

import numpy as np
import torch
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from torch import Tensor

from .calibration import columns


def auroc(negative: Tensor, positive: Tensor) -> float:
    """P(positive > negative) + ½ P(positive = negative) of a random pair, [n] and [m]; nan where a value is nan.

    Raises:
        ValueError: if either side is empty.
    """
    scores, labels = _sides(negative, positive, "An AUROC")
    return float("nan") if np.isnan(scores).any() else float(roc_auc_score(labels, scores))


def aupr(negative: Tensor, positive: Tensor) -> float:
    """Average precision, the area under the precision-recall curve of the positive side, [n] and [m]; nan where a
    value is nan. A score that says nothing has the share of positives, so it compares only where that is the same.

    Raises:
        ValueError: if either side is empty.
    """
    scores, labels = _sides(negative, positive, "An area under the precision-recall curve")
    return float("nan") if np.isnan(scores).any() else float(average_precision_score(labels, scores))


def fpr_at_tpr(negative: Tensor, positive: Tensor, tpr: float = 0.95) -> float:
    """The smallest share of the negative side that is at or above a threshold which at least `tpr` of the positive
    side reaches, [n] and [m]; nan where a value is nan. 0 is best, and a score that says nothing has `tpr`.

    Raises:
        ValueError: if either side is empty, or `tpr` is not in (0, 1].
    """
    if not 0 < tpr <= 1:
        raise ValueError(f"`tpr` is a rate in (0, 1], got {tpr!r}.")
    scores, labels = _sides(negative, positive, "A false positive rate")
    if np.isnan(scores).any():
        return float("nan")
    false_positive, true_positive, _ = roc_curve(labels, scores, drop_intermediate=False)
    return float(false_positive[true_positive >= tpr - 1e-12].min())


def detection(negative: Tensor, positive: Tensor) -> dict[str, float]:
    """`auroc`, `aupr` and `fpr_at_95_tpr` of one score, [n] and [m]."""
    return {
        "auroc": auroc(negative, positive),
        "aupr": aupr(negative, positive),
        "fpr_at_95_tpr": fpr_at_tpr(negative, positive),
    }


def _sides(negative: Tensor, positive: Tensor, name: str) -> tuple[np.ndarray, np.ndarray]:
    negative, positive = (torch.as_tensor(side).detach().flatten().cpu().double() for side in (negative, positive))
    if not len(negative) or not len(positive):
        raise ValueError(
            f"{name} needs values on both sides, got {len(negative)} negative and {len(positive)} positive."
        )
    return torch.cat([negative, positive]).numpy(), np.repeat([0, 1], [len(negative), len(positive)])


class RiskCoverageCurve(NamedTuple):
    """The risk of answering only where one is certain enough (El-Yaniv and Wiener 2010), each [n], float64.

    Attributes:
        coverage: share of the predictions that are accepted, 1/n to 1.
        risk: mean loss of those. Among equal uncertainties it is the expectation over their random order.
        thresholds: uncertainty of the last one accepted.
    """

    coverage: Tensor
    risk: Tensor
    thresholds: Tensor


def risk_coverage_curve(uncertainty, loss) -> RiskCoverageCurve:
    """Accepts predictions one after the other, from the most to the least certain.

    Args:
        uncertainty: higher is less certain, [n].
        loss: higher is worse, [n].
    """
    thresholds, losses = _by_certainty(uncertainty, loss)
    accepted = torch.arange(1, losses.numel() + 1, dtype=torch.float64)
    return RiskCoverageCurve(accepted / losses.numel(), losses.cumsum(0) / accepted, thresholds)


def aurc(uncertainty, loss) -> float:
    """Area under the risk-coverage curve, (1/n) Σ_k risk at k accepted (Geifman, Uziel and El-Yaniv 2019); of an
    uncertainty that says nothing the expectation is the mean loss.

    Args:
        uncertainty, loss: as in [`risk_coverage_curve`].
    """
    return float(risk_coverage_curve(uncertainty, loss).risk.mean())


def excess_aurc(uncertainty, loss) -> float:
    """E-AURC: the area less that of the oracle, which accepts in the order of the loss (Geifman, Uziel and El-Yaniv
    2019, with the oracle's exact area in place of their approximation); 0 is best.

    Args:
        uncertainty, loss: as in [`risk_coverage_curve`].
    """
    return aurc(uncertainty, loss) - aurc(loss, loss)


def prediction_rejection_ratio(uncertainty, loss) -> float:
    """PRR = (A_random − A) / (A_random − A_oracle), A the area under the loss that is left when the least certain
    predictions are rejected and cost nothing (Malinin et al. 2017; Malinin and Gales 2021): 1 for the oracle's order,
    0 in expectation for a random one, below 0 for one that is worse. For losses of 0 and 1 it is 2 · AUROC − 1.

    Args:
        uncertainty, loss: as in [`risk_coverage_curve`].

    Raises:
        ValueError: if all losses are equal, so that no order is better than another.
    """
    _, losses = _by_certainty(uncertainty, loss)
    _, oracle = _by_certainty(loss, loss)
    if oracle[0] == oracle[-1]:
        raise ValueError(f"A rejection ratio needs losses that differ, got {losses.numel()} times {float(oracle[0])}.")
    # A random order has the mean loss everywhere.
    random = torch.full_like(losses, float(losses.mean()))
    return float((random - losses).cumsum(0).sum() / (random - oracle).cumsum(0).sum())


def _by_certainty(uncertainty, loss) -> tuple[Tensor, Tensor]:
    """Uncertainties in rising order, and the losses that are expected in these places."""
    uncertainty, loss = columns(uncertainty=uncertainty, loss=loss)
    if uncertainty.isnan().any():
        return uncertainty, torch.full_like(loss, float("nan"))
    levels, place, counts = uncertainty.unique(return_inverse=True, return_counts=True)
    means = torch.zeros_like(levels).index_add_(0, place, loss) / counts
    return levels.repeat_interleave(counts), means.repeat_interleave(counts)
