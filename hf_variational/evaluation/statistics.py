"""How far a number can be trusted: over seeds, over documents, and in pairs.

What is resampled is what was drawn independently. Runs that differ in their seed are; the tokens of one document are
not, so the bootstrap over documents resamples whole documents (a cluster bootstrap, Field and Welsh 2007).
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from transformers.utils import logging

from ..checks import check_whole

logger = logging.get_logger(__name__)

INTERVALS = ("t", "bootstrap")
CORRELATIONS = ("pearson", "spearman")
# Entries of the resamples that are in memory together.
_BATCH_ENTRIES = 2**22


@dataclass(frozen=True)
class Estimate:
    """A number with what is known of its spread; printed, it says how many runs or documents are behind it.

    Attributes:
        mean: the mean over seeds, or a statistic of all documents.
        sd: of seeds, their standard deviation (n − 1); of documents, the standard deviation of the statistic over
            bootstrap resamples. `None` with n = 1, which says nothing of spread.
        n: seeds or documents.
        interval: confidence interval of `mean`, or `None` with n = 1.
        unit: what n counts, in the singular.

    Example:

    ```python
    >>> print(over_seeds([3.31, 3.28, 3.35]), "and", over_seeds([3.31]))
    3.313 ± 0.03512 [3.226, 3.401] (3 seeds) and 3.31 (one seed)
    ```
    """

    mean: float
    sd: float | None
    n: int
    interval: tuple[float, float] | None = None
    unit: str = "seed"

    def __format__(self, spec: str) -> str:
        def show(value: float) -> str:
            return format(value, spec or ".4g")

        if self.n == 1:
            return f"{show(self.mean)} (one {self.unit})"
        low, high = self.interval
        return f"{show(self.mean)} ± {show(self.sd)} [{show(low)}, {show(high)}] ({self.n} {self.unit}s)"

    def __str__(self) -> str:
        return format(self)


def over_seeds(values, confidence: float = 0.95) -> Estimate:
    """Mean and standard deviation of runs that differ in their seed, with Student's interval of the mean.

    Args:
        values: one number a seed.
        confidence: of the interval, in (0, 1).

    Raises:
        ValueError: without a value, or if one is not a finite number.
    """
    return _of_mean(_numbers(values, "values"), confidence, "t", 0, 0)


def paired_difference(
    first,
    second,
    confidence: float = 0.95,
    *,
    interval: str = "t",
    num_resamples: int = 10_000,
    seed: int = 0,
) -> Estimate:
    """Mean of first − second over seeds that both have, so that what a seed does to both cancels.

    Args:
        first, second: one number a seed, the same seeds in the same order.
        confidence: of the interval, in (0, 1).
        interval: `"t"`, Student's, for differences that are about normal; `"bootstrap"`, the percentiles of
            resampled means, for others. With fewer than ten seeds the bootstrap's interval is too narrow: of three
            seeds it cannot leave their range.
        num_resamples, seed: of the bootstrap.

    Raises:
        ValueError: if the two do not have the same number of values.
    """
    first, second = _numbers(first, "first"), _numbers(second, "second")
    if len(first) != len(second):
        raise ValueError(f"Pairs need the same seeds on both sides, got {len(first)} and {len(second)} values.")
    if interval not in INTERVALS:
        raise ValueError(f"`interval` is one of {', '.join(INTERVALS)}, got {interval!r}.")
    return _of_mean(first - second, confidence, interval, num_resamples, seed)


def document_mean(
    values, documents, confidence: float = 0.95, *, num_resamples: int = 10_000, seed: int = 0
) -> Estimate:
    """Mean over tokens, with the percentile interval of whole documents resampled.

    The same as [`bootstrap_documents`] of a mean, from each document's sum and count. The difference of two models on
    the same tokens is the mean of their tokens' differences.

    Args:
        values: [tokens].
        documents: the document that each is from, [tokens]; `TokenScores.windows`.
        confidence: of the interval, in (0, 1).
        num_resamples, seed: of the bootstrap.
    """
    _check_confidence(confidence)
    values = _numbers(values, "values")
    place = _places(documents, len(values))
    counts = np.bincount(place).astype(np.float64)
    sums = np.bincount(place, weights=values)
    mean = float(values.mean())
    if len(counts) == 1:
        return Estimate(mean, None, 1, None, "document")

    def mean_of(sums, counts, axis):
        return sums.sum(axis) / counts.sum(axis)

    spread = _bootstrap((sums, counts), mean_of, confidence, num_resamples, seed)
    return Estimate(mean, float(spread.standard_error), len(counts), _pair(spread.confidence_interval), "document")


def bootstrap_documents(
    statistic: Callable[[Tensor], float],
    documents,
    confidence: float = 0.95,
    *,
    num_resamples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Any statistic of tokens, with the percentile interval of whole documents resampled.

    Resamples in which the statistic is nan are left out of the interval, and a warning counts them.

    Args:
        statistic: takes the indices of tokens, [n], int64, repeated as their documents are, and returns a number.
        documents: the document that each token is from, [tokens]; `TokenScores.windows`.
        confidence: of the interval, in (0, 1).
        num_resamples, seed: of the bootstrap. Each resample calls `statistic` once.

    Raises:
        ValueError: without tokens, or if the statistic is nan in every resample.

    Example:

    ```python
    >>> bootstrap_documents(lambda tokens: scores.select(tokens).error_auroc()["mutual_information"], scores.windows)
    ```
    """
    _check_confidence(confidence)
    check_whole("num_resamples", num_resamples, 2)
    place = _places(documents)
    order = np.argsort(place, kind="stable")
    sizes = np.bincount(place)
    starts = np.cumsum(sizes) - sizes
    value = float(statistic(torch.arange(len(place))))
    if len(sizes) == 1:
        return Estimate(value, None, 1, None, "document")
    generator = np.random.default_rng(seed)
    resampled = np.empty(num_resamples)
    for number in range(num_resamples):
        chosen = generator.integers(len(sizes), size=len(sizes))
        ends = np.cumsum(sizes[chosen])
        tokens = np.repeat(starts[chosen] - (ends - sizes[chosen]), sizes[chosen]) + np.arange(ends[-1])
        resampled[number] = float(statistic(torch.from_numpy(order[tokens])))
    missing = int(np.isnan(resampled).sum())
    if missing == num_resamples:
        raise ValueError(f"The statistic is nan in all of {num_resamples} resamples of {len(sizes)} documents.")
    if missing:
        logger.warning(f"The statistic is nan in {missing} of {num_resamples} resamples; the interval is the others'.")
    low, high = np.nanquantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(value, float(np.nanstd(resampled, ddof=1)), len(sizes), (float(low), float(high)), "document")


def correlation(
    first,
    second,
    documents=None,
    *,
    kind: str = "pearson",
    confidence: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Correlation of two quantities, with the percentile interval of whole documents resampled.

    Args:
        first, second: [n]; for instance of every document the change of an internal statistic and of the NLL.
        documents: the document that each is from, [n]; `None`: each is one of its own.
        kind: `"pearson"`, or `"spearman"` (of ranks, which are taken anew in every resample).
        confidence: of the interval, in (0, 1).
        num_resamples, seed: of the bootstrap.

    Raises:
        ValueError: if one of the two is constant, which correlates with nothing.
    """
    if kind not in CORRELATIONS:
        raise ValueError(f"`kind` is one of {', '.join(CORRELATIONS)}, got {kind!r}.")
    first, second = _numbers(first, "first"), _numbers(second, "second")
    if len(first) != len(second):
        raise ValueError(f"A correlation is of pairs, got {len(first)} and {len(second)} values.")
    for name, values in (("first", first), ("second", second)):
        if np.ptp(values) == 0:
            raise ValueError(f"`{name}` is {values[0]} everywhere ({len(values)} values): it correlates with nothing.")
    place = _places(np.arange(len(first)) if documents is None else documents, len(first))
    measure = stats.pearsonr if kind == "pearson" else stats.spearmanr

    def statistic(tokens: Tensor) -> float:
        with warnings.catch_warnings():  # a resample may be constant
            warnings.simplefilter("ignore", (stats.ConstantInputWarning, stats.NearConstantInputWarning))
            return float(measure(first[tokens.numpy()], second[tokens.numpy()]).statistic)

    return bootstrap_documents(statistic, place, confidence, num_resamples=num_resamples, seed=seed)


def _of_mean(values: np.ndarray, confidence: float, interval: str, num_resamples: int, seed: int) -> Estimate:
    _check_confidence(confidence)
    mean, n = float(values.mean()), len(values)
    if n == 1:
        return Estimate(mean, None, 1)
    sd = float(values.std(ddof=1))
    if interval == "t":
        half = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * sd / math.sqrt(n)
        return Estimate(mean, sd, n, (mean - half, mean + half))
    spread = _bootstrap((values,), np.mean, confidence, num_resamples, seed)
    return Estimate(mean, sd, n, _pair(spread.confidence_interval))


def _bootstrap(columns: tuple, statistic, confidence: float, num_resamples: int, seed: int):
    check_whole("num_resamples", num_resamples, 2)
    return stats.bootstrap(
        columns,
        statistic,
        paired=True,
        vectorized=True,
        n_resamples=num_resamples,
        batch=max(1, _BATCH_ENTRIES // len(columns[0])),
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    )


def _pair(interval) -> tuple[float, float]:
    return float(interval.low), float(interval.high)


def _array(values) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _numbers(values, name: str) -> np.ndarray:
    values = values.float() if isinstance(values, Tensor) and values.dtype == torch.bfloat16 else values
    array = _array(values).astype(np.float64)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"`{name}` is one number a seed or token, at least one, got the shape {array.shape}.")
    if not np.isfinite(array).all():
        raise ValueError(f"`{name}` has {array[~np.isfinite(array)][0]} at {int(np.argmin(np.isfinite(array)))}.")
    return array


def _places(documents, count: int | None = None) -> np.ndarray:
    """Documents numbered from 0 without a gap, [tokens]."""
    documents = _array(documents)
    if documents.ndim != 1 or not len(documents) or (count is not None and len(documents) != count):
        expected = "at least one token" if count is None else f"{count} tokens"
        raise ValueError(f"`documents` has the document of each of {expected}, got the shape {documents.shape}.")
    return np.unique(documents, return_inverse=True)[1]


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` is a number between 0 and 1, got {confidence!r}.")
