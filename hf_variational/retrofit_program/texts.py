"""What a retrofit reads: sequences to calibrate on, to train on and to measure on, none of them in two parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..evaluation.domains import text_prefix, token_windows
from ..training.data import cut_batch, load_text, pieces
from ..training.recipe import DataRecipe

__all__ = ["RetrofitTexts", "read_texts"]

# Characters: about a thousand tokens.
_PASSAGE = 4096
# A short text is still dealt out in so many passages.
_FEWEST_PASSAGES = 32
# Which passages are held out does not depend on the run's seed, so that runs of several seeds are measured alike.
_SPLIT_SEED = 0
Rows = list[dict]


@dataclass(frozen=True)
class RetrofitTexts:
    """
    Attributes:
        calibration, training, test: sequences, as [`cut`] makes them.
        overlapping: number of sequences left out, for the test has them too.
        windows: short windows of the test, each a sequence of its own; empty without other texts.
        others: the like of other texts, by name.
        data, held_out: what the text is called, and what the test.
    """

    calibration: Rows
    training: Rows
    test: Rows
    overlapping: int
    windows: list[list[int]]
    others: dict[str, list[list[int]]]
    data: str
    held_out: str


def read_texts(
    data: DataRecipe,
    tokenizer,
    *,
    calibration: int,
    test: int,
    trains: bool,
    others: Mapping[str, object] | None = None,
    window: int = 8,
    windows: int = 1000,
    seed: int = 0,
) -> RetrofitTexts:
    """
    Reads the text and deals it out in passages of a document, so that neighbours stay in one part.

    Args:
        data: section `data` of the recipe: `validation` is the test, or `validation_fraction` of the text is.
        tokenizer: the model's.
        calibration, test: sequences, at most.
        trains: whether the rest is for training.
        others: text sources by name.
        window: tokens of the short windows.
        windows: of each text, at most.
        seed: deals calibration and training data.

    Raises:
        ValueError: for a text that is too short to be dealt out, or a test that has all of it.
    """
    passages, name = _passages(data.train), source_name(data.train)
    if data.validation is not None:
        held_out, test_name = _shuffled(_passages(data.validation), _SPLIT_SEED), source_name(data.validation)
    else:
        share = data.validation_fraction or 0.2
        passages = _shuffled(passages, _SPLIT_SEED)
        count = max(1, round(share * len(passages)))
        held_out, passages, test_name = passages[:count], passages[count:], f"{name}, held out"
    test_rows = _sequences(held_out, tokenizer, data.block_size, test)
    limit = None if trains else calibration + len(test_rows)
    rows = _sequences(_shuffled(passages, seed), tokenizer, data.block_size, limit)
    seen = {tuple(row["input_ids"]) for row in test_rows}
    kept = [row for row in rows if tuple(row["input_ids"]) not in seen]
    if rows and not kept:
        raise ValueError(f"Every sequence of {name} is in {test_name} too: nothing is left to calibrate on.")
    count = min(calibration, len(kept) // 2 if trains else len(kept))
    _check_length(name, kept[:count], data.block_size, "to calibrate on")
    _check_length(test_name, test_rows, data.block_size, "to measure on")
    return RetrofitTexts(
        calibration=kept[:count],
        training=kept[count:] if trains else [],
        test=test_rows,
        overlapping=len(rows) - len(kept),
        windows=_windows_of(test_rows, text_prefix(tokenizer), window, windows) if others else [],
        others={
            label: _named(label, token_windows, _texts(source), tokenizer, window, windows)
            for label, source in (others or {}).items()
        },
        data=name,
        held_out=test_name,
    )


def source_name(source) -> str:
    """What a text source is called: without the folders of this machine."""
    if isinstance(source, Mapping):
        source = source.get("dataset", source.get("files"))
    if isinstance(source, (list, tuple)):
        return ", ".join(source_name(one) for one in source)
    return str(source).rstrip("/").rpartition("/")[2] or str(source)


def targets(rows: Rows) -> int:
    """Tokens that are predicted."""
    return sum(label != -100 for row in rows for label in row["labels"][1:])


def _texts(source) -> list[str]:
    return [row["text"] for row in load_text(source)]


def _passages(source) -> list[str]:
    texts = _texts(source)
    size = max(1, min(_PASSAGE, sum(map(len, texts)) // _FEWEST_PASSAGES))
    stripped = (piece.strip() for text in texts for piece in pieces(text, size))
    return [piece for piece in stripped if piece]


def _shuffled(passages: list[str], seed: int) -> list[str]:
    order = torch.randperm(len(passages), generator=torch.Generator().manual_seed(seed)).tolist()
    return [passages[index] for index in order]


def _sequences(passages: list[str], tokenizer, length: int, limit: int | None) -> Rows:
    rows: Rows = []
    prefix = text_prefix(tokenizer)
    if length < len(prefix) + 2:
        raise ValueError(f"A sequence of {length} tokens has nothing to predict: it needs {len(prefix) + 2} or more.")
    for begin in range(0, len(passages), 64):
        columns = cut_batch({"text": passages[begin : begin + 64]}, tokenizer, length, prefix)
        rows += [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        if limit is not None and len(rows) >= limit:
            return rows[:limit]
    return rows


def _check_length(name: str, rows: Rows, length: int, purpose: str) -> None:
    count = targets(rows)
    if count < length - 1:
        raise ValueError(
            f"{name} is too short: its {count} tokens {purpose} do not fill one sequence of {length}. Give more text, "
            "a test text of its own, or shorter sequences."
        )


def _windows_of(rows: Rows, prefix: list[int], length: int, limit: int) -> list[list[int]]:
    """Short windows of the sequences, without their own beginning."""
    found = []
    for row in rows:
        ids = row["input_ids"][len(prefix) : sum(row["attention_mask"])]
        found += [[*prefix, *ids[start : start + length]] for start in range(0, len(ids) - length + 1, length)]
    if not found:
        raise ValueError(f"The text to measure on has no {length} tokens on end.")
    count = min(limit, len(found))
    return [found[index * len(found) // count] for index in range(count)]


def _named(name: str, function, *args):
    try:
        return function(*args)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
