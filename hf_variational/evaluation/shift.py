"""A shift whose size is known: tokens of the context are replaced, and the targets stay what they were.

Replacing tokens by the end-of-sequence token is the corruption of *Variational Neurons in Transformers for Language
Modeling* (Ruffenach 2026, arXiv 2603.28219). The question is whether what the posteriors say of themselves moves with
what the corruption does to the predictions.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers.utils import logging

from .predictions import INTERNAL_NAMES, has_posteriors
from .shift_slices import score_metrics
from .statistics import CORRELATIONS, Estimate, correlation
from .streaming import IGNORED_LABEL
from .token_scores import TokenScores, token_scores

logger = logging.get_logger(__name__)

CORRUPTIONS = ("eos", "random")
CORRUPTION_RATES = (0.05, 0.15, 0.30)
# Condition of the text as it is.
CLEAN = ("clean", 0.0)
# Float32 does not tell a smaller share of a document's mean from none.
_SMALLEST_CHANGE = 1e-6


def corrupt(rows: Iterable, rate: float, kind: str = "eos", *, tokenizer, seed: int = 0) -> list[dict[str, list[int]]]:
    """
    Replaces tokens of the context, each with probability `rate`; the targets stay the original tokens.

    One uniform number is drawn for each token, whatever rate and kind: what is replaced at a rate is replaced at every
    higher one, by the same token. The special tokens in front of a sequence and padding are never replaced.

    Args:
        rows: sequences of token ids, or dictionaries with `input_ids` [, `attention_mask`, `labels`].
        rate: in [0, 1].
        kind: `"eos"`, the tokenizer's end-of-sequence token, or `"random"`, any other token but the special ones, all
            equally likely.
        tokenizer: the model's.
        seed: of what is replaced, and by what.

    Returns:
        Dictionaries with the corrupted `input_ids` and the original tokens as `labels` (or the row's own labels), and
        the `attention_mask` where there was one.

    Raises:
        ValueError: for another kind or a rate outside [0, 1], for a tokenizer without an end-of-sequence token, and
            for rows that are not one sequence each.

    Example:

    ```python
    >>> token_scores(model, corrupt(windows, 0.15, "random", tokenizer=tokenizer))
    ```
    """
    if kind not in CORRUPTIONS:
        raise ValueError(f"`kind` is one of {', '.join(CORRUPTIONS)}, got {kind!r}.")
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate <= 1:
        raise ValueError(f"`rate` is the share of tokens that are replaced, in [0, 1], got {rate!r}.")
    if kind == "eos" and tokenizer.eos_token_id is None:
        raise ValueError(
            "The tokenizer has no end-of-sequence token: set `tokenizer.eos_token`, or use kind='random'."
        )
    special = torch.tensor(sorted(tokenizer.all_special_ids), dtype=torch.int64)
    ordinary = torch.tensor(sorted({*tokenizer.get_vocab().values()} - {*tokenizer.all_special_ids}))
    generator = torch.Generator().manual_seed(seed)
    corrupted = []
    for row in rows:
        row = _row(row)
        ids = row["input_ids"]
        chosen, drawn = torch.rand(2, len(ids), generator=generator, dtype=torch.float64)
        others = torch.full_like(ids, tokenizer.eos_token_id) if kind == "eos" else _others(ids, ordinary, drawn)
        front = torch.isin(ids, special).long().cumprod(0).bool()
        replaced = (chosen < rate) & ~front & (row.get("attention_mask", torch.ones_like(ids)) != 0)
        row["input_ids"] = torch.where(replaced, others, ids)
        corrupted.append({name: values.tolist() for name, values in row.items()})
    return corrupted


def _row(row) -> dict[str, Tensor]:
    """`input_ids` and `labels`, and `attention_mask` if the row has it, each [length]."""
    names = ("input_ids", "attention_mask", "labels")
    given = row if isinstance(row, Mapping) else {"input_ids": row}
    columns = {name: torch.as_tensor(given[name], dtype=torch.int64) for name in names if name in given}
    ids = columns.get("input_ids", torch.tensor(0))
    if ids.dim() != 1:
        raise ValueError(f"A row is one sequence of token ids, [length], got input_ids of the shape {[*ids.shape]}.")
    if "labels" not in columns:
        padding = columns.get("attention_mask", torch.ones_like(ids)) == 0
        columns["labels"] = ids.masked_fill(padding, IGNORED_LABEL)
    return columns


def _others(ids: Tensor, ordinary: Tensor, drawn: Tensor) -> Tensor:
    """One of the sorted `ordinary` tokens that is not the token itself, by a uniform number in [0, 1) each."""
    place = torch.searchsorted(ordinary, ids).clamp(max=len(ordinary) - 1)
    among = ordinary[place] == ids
    index = (drawn * (len(ordinary) - among.long())).long()
    return ordinary[torch.where(among & (index >= place), index + 1, index)]


@dataclass(frozen=True)
class CorruptionSweep:
    """What corruption does to the predictions and to the posteriors behind them.

    A condition is a kind and a rate; `("clean", 0.0)` is the text as it is.

    Attributes:
        metrics: by condition, as in [`score_metrics`].
        changes: by condition but the clean one, of every score and document the mean over its tokens less that of the
            clean text, [documents], float64.
    """

    metrics: dict[tuple[str, float], dict[str, float]]
    changes: dict[tuple[str, float], dict[str, Tensor]]

    def correlations(
        self,
        kind: str,
        rate: float | None = None,
        *,
        external: str = "nll",
        confidence: float = 0.95,
        num_resamples: int = 1000,
        seed: int = 0,
    ) -> dict[str, dict[str, Estimate]]:
        """Correlation over documents of the change of each internal statistic, and of the mutual information, with the
        change of an external score; the intervals are of documents resampled.

        Args:
            kind: of the corruption.
            rate: its rate; `None`: all of them together, where all that grows with the rate correlates.
            external: the score of the predictions.
            confidence, num_resamples, seed: as in [`correlation`].

        Returns:
            `{statistic: {"pearson": ..., "spearman": ...}}`. A statistic that changes alike in every document,
            such as a scale that does not depend on the input, is left out, which a warning says.

        Raises:
            ValueError: if the sweep has no such condition.
        """
        chosen = [key for key in self.changes if key[0] == kind and rate in (None, key[1])]
        if not chosen:
            raise ValueError(
                f"The sweep has no corruption {(kind, rate)}: it has {', '.join(map(str, self.changes))}."
            )
        changes = {name: torch.cat([self.changes[key][name] for key in chosen]) for name in self.changes[chosen[0]]}
        if external not in changes:
            raise ValueError(f"`external` is one of {', '.join(changes)}, got {external!r}.")
        documents = torch.arange(len(changes[external]) // len(chosen)).repeat(len(chosen))
        options = {"confidence": confidence, "num_resamples": num_resamples, "seed": seed}
        found = {}
        for name in (*INTERNAL_NAMES, "mutual_information"):
            if name not in changes:
                continue
            if changes[name].eq(changes[name][0]).all():
                logger.warning(f"`{name}` changes alike in every document ({kind}): it correlates with nothing.")
                continue
            pair = changes[name], changes[external], documents
            found[name] = {measure: correlation(*pair, kind=measure, **options) for measure in CORRELATIONS}
        return found


def corruption_sweep(
    model,
    rows: Iterable,
    tokenizer,
    rates: Sequence[float] = CORRUPTION_RATES,
    kinds: Sequence[str] = CORRUPTIONS,
    num_posterior_samples: int = 8,
    batch_size: int = 32,
    *,
    documents: Sequence[int] | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    progress: bool = True,
) -> CorruptionSweep:
    """
    Evaluates a causal language model on a text, and on the text with its contexts corrupted.

    Every pass draws the same posterior noise, so that what differs is the corruption.

    Args:
        model: A causal language model.
        rows, tokenizer, rates, kinds: As in [`corrupt`].
        num_posterior_samples, batch_size, temperature, progress: As in [`token_scores`].
        documents (`Sequence[int]`, *optional*): The document that each row is from; `None`: each is one of its own.
        seed (`int`, defaults to 0): Seeds the posterior noise and the corruption.

    Returns:
        A [`CorruptionSweep`]. `token_variance` is no part of it: the model measures that of the token it reads next,
        which may be a corrupted one.

    Example:

    ```python
    >>> sweep = corruption_sweep(model, windows, tokenizer)
    >>> sweep.metrics["eos", 0.3]["nll"], sweep.correlations("eos", 0.3)["kl"]["spearman"]
    ```
    """
    rows = list(rows)
    documents = _places(documents, len(rows))
    if not rates or not kinds:
        raise ValueError(f"A sweep takes rates and kinds of corruption, got {list(rates)} and {list(kinds)}.")
    internal = has_posteriors(getattr(model, "module", model))

    def scored(kind: str, rate: float) -> TokenScores:
        corrupted = corrupt(rows, rate, kind, tokenizer=tokenizer, seed=seed)
        options = {"temperature": temperature, "internal": internal, "seed": seed, "progress": progress}
        scores = token_scores(model, corrupted, num_posterior_samples, batch_size, **options)
        values = {name: values for name, values in scores.values.items() if name != "token_variance"}
        places = documents[scores.windows]
        return replace(scores, values=values, windows=places, num_windows=int(documents.max()) + 1)

    conditions = [(kind, rate) for kind in kinds for rate in rates]
    clean = scored(kinds[0], 0.0)
    metrics, changes, before = {CLEAN: score_metrics(clean)}, {}, clean.window_means()
    for condition in conditions:
        scores = scored(*condition)
        metrics[condition] = score_metrics(scores)
        changes[condition] = {name: _change(before[name], after) for name, after in scores.window_means().items()}
    return CorruptionSweep(metrics, changes)


def _change(before: Tensor, after: Tensor) -> Tensor:
    change = after - before
    return change.masked_fill(change.abs() <= _SMALLEST_CHANGE * before.abs(), 0.0)


def _places(documents: Sequence[int] | None, count: int) -> Tensor:
    """Number of each row's document, counted from 0 without a gap, [rows]."""
    if documents is None:
        return torch.arange(count)
    documents = torch.as_tensor(documents)
    if documents.shape != (count,):
        raise ValueError(f"`documents` has the document of each of {count} rows, got {documents.numel()}.")
    return documents.unique(return_inverse=True)[1]
