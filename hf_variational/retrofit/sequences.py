"""Sequences for calibration: texts, rows of token ids or batches of them, as batches."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

_LONGEST = 1024


def batches_of(
    dataset, tokenizer, model, max_sequences: int, max_length: int | None, batch_size: int, what: str, progress: bool
) -> tqdm:
    """Batches of the first `max_sequences` sequences of a data set, behind a progress bar.

    Args:
        dataset: texts, rows with a `text`, sequences of token ids, rows of `input_ids` or `pixel_values` (and
            `attention_mask`, `labels`), or batches of such rows.

    Raises:
        ValueError: if there is none, or for a text without a tokenizer, or a row of something else.
    """
    rows = list(_rows(dataset, tokenizer, model, max_sequences, max_length))
    if not rows:
        raise ValueError("The data set is empty: a few hundred sequences like those the model is for are needed.")
    pad = getattr(tokenizer, "pad_token_id", None) or 0
    # Of its own generator, for a loader draws a seed from the global one.
    loader = DataLoader(
        rows, batch_size=batch_size, collate_fn=lambda some: _collate(some, pad), generator=torch.Generator()
    )
    return tqdm(loader, desc=what, unit="batch", disable=not progress)


def _rows(dataset, tokenizer, model, max_sequences: int, max_length: int | None) -> Iterator[dict]:
    longest = getattr(model.config, "max_position_embeddings", None)
    max_length = max_length or (min(longest, _LONGEST) if isinstance(longest, int) else _LONGEST)
    count = 0
    for row in dataset:
        for one in _unbatched(row, tokenizer, max_length):
            if count == max_sequences:
                return
            count += 1
            yield one


def _unbatched(row, tokenizer, max_length: int) -> Iterator[dict]:
    if isinstance(row, str) or (isinstance(row, dict) and "input_ids" not in row and isinstance(row.get("text"), str)):
        if tokenizer is None:
            raise ValueError("The data set has texts: give the tokenizer too (tokenizer=...), or rows of input_ids.")
        encoded = tokenizer(row if isinstance(row, str) else row["text"], truncation=True, max_length=max_length)
        if encoded["input_ids"]:
            yield dict(encoded)
        return
    if not isinstance(row, Mapping):
        row = {"input_ids": row}
    kept = {name: torch.as_tensor(value) for name, value in row.items() if not isinstance(value, str)}
    main = kept.get("input_ids", kept.get("pixel_values"))
    if main is None:
        raise ValueError(f"A row of the data set has {', '.join(row)}, but neither input_ids nor pixel_values.")
    is_batch = main.ndim == (2 if "input_ids" in kept else 4)
    for index in range(main.shape[0] if is_batch else 1):
        one = {name: value[index] if is_batch else value for name, value in kept.items()}
        if "input_ids" in one:
            one = {name: value[:max_length] if value.ndim else value for name, value in one.items()}
        if main.numel():
            yield one


def _collate(rows: list[dict], pad_token_id: int) -> dict[str, Tensor]:
    """Pads on the right, which a causal model does not see, and says where in the attention mask."""
    fill = {"input_ids": pad_token_id, "labels": -100}
    rows = [{name: torch.as_tensor(value) for name, value in row.items()} for row in rows]
    if "input_ids" in rows[0] and len({len(row["input_ids"]) for row in rows}) > 1:
        rows = [{"attention_mask": torch.ones_like(row["input_ids"]), **row} for row in rows]
    batch = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        padded = values[0].ndim == 1
        batch[name] = (
            nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fill.get(name, 0))
            if padded
            else torch.stack(values)
        )
    return batch
