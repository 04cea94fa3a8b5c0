"""How well a score ranks: whether it is higher where the model is wrong, or where the text is not of its domain."""

import numpy as np
from sklearn.metrics import roc_auc_score
from torch import Tensor


def auroc(negative: Tensor, positive: Tensor) -> float:
    """P(positive > negative) + ½ P(positive = negative) of a random pair, [n] and [m]; nan where a value is nan.

    Raises:
        ValueError: if either side is empty.
    """
    scores, labels = _sides(negative, positive, "An AUROC")
    return float("nan") if np.isnan(scores).any() else float(roc_auc_score(labels, scores))


def _sides(negative: Tensor, positive: Tensor, name: str) -> tuple[np.ndarray, np.ndarray]:
    negative, positive = (side.detach().flatten().cpu().double().numpy() for side in (negative, positive))
    if not len(negative) or not len(positive):
        raise ValueError(
            f"{name} needs values on both sides, got {len(negative)} negative and {len(positive)} positive."
        )
    return np.concatenate([negative, positive]), np.repeat([0, 1], [len(negative), len(positive)])
