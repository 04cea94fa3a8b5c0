"""The tokens of one evaluation in parts: rare and common targets, short and long contexts."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..checks import check_whole
from .predictions import INTERNAL_NAMES
from .token_scores import TokenScores

FREQUENCIES = ("rare", "middle", "common")
CONTEXTS = ("short", "long")


def score_metrics(scores: TokenScores) -> dict[str, float]:
    """Likelihood, calibration and tail of some tokens, and the mean of each measure and of each statistic of the
    posteriors that the table has.

    The calibration error of few tokens is too large even where the model is calibrated: compare parts of like
    `num_tokens`.
    """
    names = [name for name in ("brier", *INTERNAL_NAMES) if name in scores.values]
    return {**scores.evaluation().compute(), **{name: float(scores.values[name].double().mean()) for name in names}}


def token_counts(rows: Iterable) -> Tensor:
    """How often each token id occurs in a reference text such as the training data, [largest id + 1], int64.

    Args:
        rows: token ids, or dictionaries with `input_ids` [, `attention_mask`].

    Raises:
        ValueError: if there is no token.
    """
    total = torch.zeros(0, dtype=torch.int64)
    for row in rows:
        row = row if isinstance(row, Mapping) else {"input_ids": row}
        ids = torch.as_tensor(row["input_ids"], dtype=torch.int64)
        if "attention_mask" in row:
            ids = ids[torch.as_tensor(row["attention_mask"]) != 0]
        here = torch.bincount(ids, minlength=len(total))
        here[: len(total)] += total
        total = here
    if not len(total):
        raise ValueError("There is no token to count: the reference text is empty.")
    return total


def frequency_slices(scores: TokenScores, counts: Tensor) -> dict[str, TokenScores]:
    """Thirds of the tokens by how often their target occurs in a reference text.

    Targets that are equally frequent stay together, so the parts are thirds only as nearly as that allows: a target
    that makes up half of the text is in one part. A part without tokens is left out.

    Args:
        scores: token scores.
        counts: occurrences by token id, [ids], see [`token_counts`]; ids beyond its end have none.

    Returns:
        `"rare"`, `"middle"` and `"common"`.

    Raises:
        ValueError: without tokens, or for counts that are not counts.
    """
    _check_tokens(scores)
    counts = torch.as_tensor(counts)
    if counts.dim() != 1 or not len(counts) or not bool((counts >= 0).all()):
        raise ValueError(f"`counts` has one number of occurrences for each token id, 0 or more, got {counts}.")
    frequency = counts[scores.targets.clamp(max=len(counts) - 1)].masked_fill(scores.targets >= len(counts), 0)
    _, place, sizes = frequency.unique(return_inverse=True, return_counts=True)
    # a group of equals goes where its middle is
    middles = sizes.cumsum(0) - sizes / 2
    return _parts(scores, (middles * len(FREQUENCIES) / len(scores)).long()[place], FREQUENCIES)


def context_slices(scores: TokenScores, boundary: int | None = None) -> dict[str, TokenScores]:
    """The tokens that were predicted from few tokens, and those that were predicted from many.

    Args:
        scores: token scores.
        boundary (`int`, *optional*): Tokens in the longest context that is short; `None`: the median.

    Returns:
        `"short"` and `"long"`; a part without tokens is left out.

    Raises:
        ValueError: without tokens.
    """
    _check_tokens(scores)
    if boundary is None:
        boundary = int(scores.positions.median())
    check_whole("boundary", boundary, 1)
    return _parts(scores, (scores.positions > boundary).long(), CONTEXTS)


def _check_tokens(scores: TokenScores) -> None:
    if not len(scores):
        raise ValueError("There are no tokens to take parts of.")


def _parts(scores: TokenScores, part: Tensor, names: tuple[str, ...]) -> dict[str, TokenScores]:
    masks = {name: part == index for index, name in enumerate(names)}
    return {name: scores.select(mask) for name, mask in masks.items() if mask.any()}
