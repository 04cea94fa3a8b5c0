"""Percentile intervals of whole documents resampled, of many statistics of one table.

The same resamples as [`bootstrap_documents`] of the same seed draws, and the same intervals. A document that is drawn
twice weighs twice, so nothing is sorted or copied again: a table of 300,000 tokens takes milliseconds a resample.
"""

import numpy as np
import torch
from torch import Tensor

from ..calibration import width_bins

Interval = list[float] | None


class DocumentResamples:
    """
    How often each document is drawn, for statistics that take weights.

    Args:
        documents: the document that each token is from, [tokens].
        num_resamples: resamples.
        confidence: of the intervals.
        seed: of the resamples.
    """

    def __init__(self, documents: Tensor, num_resamples: int = 400, confidence: float = 0.95, seed: int = 0):
        self.place = np.unique(documents.numpy(), return_inverse=True)[1]
        self.num_documents = int(self.place.max()) + 1
        self.confidence = confidence
        generator = np.random.default_rng(seed)
        count = self.num_documents
        drawn = (generator.integers(count, size=count) for _ in range(num_resamples if count > 1 else 0))
        self.weights = np.stack([np.bincount(one, minlength=count) for one in drawn]) if count > 1 else None

    def interval(self, resampled: np.ndarray) -> Interval:
        """The percentiles of a statistic's resamples, [resamples]; those that are nan do not count."""
        if np.isnan(resampled).all():
            return None
        tails = [(1 - self.confidence) / 2, (1 + self.confidence) / 2]
        return np.nanquantile(resampled, tails).tolist()

    def means(self, values: Tensor) -> np.ndarray | None:
        """The mean of tokens' values in each resample, [resamples]; `None` of a single document."""
        if self.weights is None:
            return None
        totals = np.stack([self._by_document(values.double().numpy()), np.bincount(self.place)], axis=1)
        sums = self.weights @ totals
        return sums[:, 0] / sums[:, 1]

    def of_mean(self, values: Tensor) -> Interval:
        """Interval of the mean of tokens' values."""
        means = self.means(values)
        return None if means is None else self.interval(means)

    def of_calibration_error(self, confidence: Tensor, correct: Tensor, num_bins: int) -> Interval:
        """Interval of the expected calibration error with equal-width bins."""
        if self.weights is None:
            return None
        bins = width_bins(confidence.double(), num_bins).numpy()
        gaps = (confidence.double() - correct.double()).numpy()
        cells = np.bincount(self.place * num_bins + bins, weights=gaps, minlength=self.num_documents * num_bins)
        sums = np.abs(self.weights @ cells.reshape(self.num_documents, num_bins)).sum(-1)
        return self.interval(sums / (self.weights @ np.bincount(self.place)))

    def of_tail_mean(self, values: Tensor, fraction: float = 0.05) -> Interval:
        """Interval of the mean of the largest `fraction` of the values."""
        if self.weights is None:
            return None
        values, order = values.double().sort(descending=True)
        values, place = values.numpy(), self.place[order.numpy()]
        resampled = np.empty(len(self.weights))
        for number, weights in enumerate(self.weights):
            drawn = weights[place]
            reached = np.cumsum(drawn)
            mass = fraction * reached[-1]
            inside = np.clip(mass - (reached - drawn), 0, drawn)
            resampled[number] = (inside @ values) / mass
        return self.interval(resampled)

    def of_auroc(self, scores: Tensor, positive: Tensor) -> Interval:
        """Interval of the AUROC of tokens' scores against whether each is positive."""
        if self.weights is None or scores.isnan().any():
            return None
        values, order = scores.double().sort()
        starts = np.flatnonzero(np.diff(values.numpy(), prepend=-np.inf))  # of runs of equal scores
        place, positive = self.place[order.numpy()], positive[order].double().numpy()
        resampled = np.full(len(self.weights), np.nan)
        for number, weights in enumerate(self.weights):
            drawn = weights[place]
            above = np.add.reduceat(drawn * positive, starts)
            below = np.add.reduceat(drawn * (1 - positive), starts)
            pairs = above.sum() * below.sum()
            if pairs:
                resampled[number] = above @ (np.cumsum(below) - below / 2) / pairs
        return self.interval(resampled)

    def _by_document(self, values: np.ndarray) -> np.ndarray:
        return np.bincount(self.place, weights=values, minlength=self.num_documents)


def window_auroc_interval(
    own: Tensor, other: Tensor, num_resamples: int = 400, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Interval of the AUROC of two samples of windows, both resampled, [n] and [m]."""
    if own.isnan().any() or other.isnan().any() or len(own) < 2 or len(other) < 2:
        return None
    generator = np.random.default_rng(seed)
    won = (other[None, :] > own[:, None]).float() + 0.5 * (other[None, :] == own[:, None]).float()
    below, above = (
        torch.from_numpy(generator.multinomial(len(side), np.full(len(side), 1 / len(side)), num_resamples)).float()
        for side in (own, other)
    )
    resampled = ((below @ won) * above).sum(-1) / won.numel()
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    return np.quantile(resampled.double().numpy(), tails).tolist()
