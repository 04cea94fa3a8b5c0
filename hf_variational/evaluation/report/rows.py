"""The sequences that a report is of: made of text, divided into validation and test, cut into short windows."""

import hashlib
import itertools
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ...checks import check_whole
from ..domains import text_prefix
from ..streaming import IGNORED_LABEL


@dataclass(frozen=True)
class Described:
    """What a report has to know of sequences beside their tokens.

    Attributes:
        hashes: of the attended tokens of each sequence.
        documents: the document that each sequence is from, numbered from 0.
        num_bytes: UTF-8 bytes of the text that is predicted; `None` if a sequence does not say.
        longest: tokens of the longest sequence.
    """

    hashes: list[bytes]
    documents: list[int]
    num_bytes: int | None
    longest: int


def text_rows(
    texts: Iterable[str],
    tokenizer,
    length: int,
    limit: int | None = None,
    *,
    documents: Iterable[int] | None = None,
    shortest: int | None = None,
) -> list[dict]:
    """
    Sequences of at most `length` tokens, as [`evaluate_model`] takes them, each of one text and beginning as the
    tokenizer begins a text.

    Args:
        texts: Documents, or pieces of documents.
        tokenizer: Any tokenizer; one that gives no offsets leaves the bytes out.
        length (`int`): Tokens of a sequence, at least 2 more than the tokenizer begins with.
        limit (`int`, *optional*): Sequences, at most.
        documents (*optional*): The document that each text is a piece of; `None`: each is one of its own.
        shortest (`int`, *optional*): Tokens that the longest sequence has at least; `None`: `length`.

    Returns:
        Rows with `input_ids`, `labels` (-100 on what the tokenizer begins with), `document` and `num_bytes` (of the
        text of the predicted tokens).

    Raises:
        ValueError: if no sequence has `shortest` tokens.
    """
    prefix = text_prefix(tokenizer)
    check_whole("length", length, len(prefix) + 2)
    rows: list[dict] = []
    numbers = itertools.count() if documents is None else documents
    for text, document in zip(texts, numbers, strict=False):
        rows += [{**row, "document": document} for row in _text_rows(text, tokenizer, length, prefix)]
        if limit is not None and len(rows) >= limit:
            rows = rows[:limit]
            break
    longest = max((len(row["input_ids"]) for row in rows), default=len(prefix))
    if longest < (shortest or length):
        raise ValueError(
            f"The text is shorter than a window: the longest of {len(rows)} pieces has {longest - len(prefix)} "
            f"tokens, and a window takes {(shortest or length) - len(prefix)}. Give more text, or shorter windows."
        )
    return rows


def _text_rows(text: str, tokenizer, length: int, prefix: list[int]) -> list[dict]:
    fast = getattr(tokenizer, "is_fast", False)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
    ids = encoded["input_ids"]
    # a token's text goes to where the next one's begins
    starts = [start for start, _ in encoded["offset_mapping"]] + [len(text)] if fast else None
    rows, step = [], length - len(prefix)
    for begin in range(0, len(ids), step):
        piece = ids[begin : begin + step]
        if len(prefix) + len(piece) < 2:
            continue
        row = {"input_ids": [*prefix, *piece], "labels": [IGNORED_LABEL] * len(prefix) + piece}
        if starts is not None:
            first = begin if prefix else begin + 1
            row["num_bytes"] = len(text[starts[first] : starts[begin + len(piece)]].encode("utf-8", "replace"))
        rows.append(row)
    return rows


def described(data, name: str) -> Described:
    """Goes through sequences once; see [`Described`].

    Raises:
        ValueError: if there are none, or they can be gone through only once.
    """
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        raise ValueError(
            f"`{name}` is gone through several times: give a list or a dataset of sequences, got "
            f"{type(data).__name__}."
        )
    if not len(data):
        raise ValueError(f"`{name}` is empty: there is no sequence in it.")
    hashes, documents, num_bytes, longest = [], [], 0, 0
    for index in range(len(data)):
        row = data[index]
        row = row if isinstance(row, Mapping) else {"input_ids": row}
        ids = _attended(row)
        hashes.append(hashlib.blake2b(array("q", ids).tobytes(), digest_size=8).digest())
        documents.append(row.get("document", index))
        longest = max(longest, len(ids))
        num_bytes = None if num_bytes is None or "num_bytes" not in row else num_bytes + row["num_bytes"]
    numbers = {document: number for number, document in enumerate(dict.fromkeys(documents))}
    return Described(hashes, [numbers[document] for document in documents], num_bytes, longest)


def _attended(row: Mapping) -> list[int]:
    ids = torch.as_tensor(row["input_ids"]).tolist()
    if "attention_mask" not in row:
        return ids
    mask = torch.as_tensor(row["attention_mask"]).tolist()
    return [token for token, attended in zip(ids, mask, strict=True) if attended]


def front(data, fraction: float) -> tuple[Sequence, Sequence, int]:
    """The front of the data, between documents where there are several, and the rest.

    Returns:
        The front without what the rest has too, the rest, and how many sequences were left out.

    Raises:
        ValueError: if there is only one sequence, or the rest has everything that the front has.
    """
    facts = described(data, "dataset")
    total = len(data)
    if total < 2:
        raise ValueError(
            "The data is one sequence, of which no validation data can be split off: give validation data, more text "
            "or shorter windows."
        )
    cut = min(max(1, round(fraction * total)), total - 1)
    between = [i for i in range(1, total) if facts.documents[i] != facts.documents[i - 1]]
    # of few documents no cut between them may be near the fraction
    cut = min((i for i in between if abs(i - cut) <= cut / 2), key=lambda i: abs(i - cut), default=cut)
    later = set(facts.hashes[cut:])
    kept = [index for index in range(cut) if facts.hashes[index] not in later]
    if not kept:
        raise ValueError(
            f"Each of the {cut} sequences at the front of the data comes again in the rest: give validation data."
        )
    return pick(data, kept), pick(data, range(cut, total)), cut - len(kept)


def pick(data, indices: Sequence[int]) -> Sequence:
    """Sequences by their number."""
    return [data[index] for index in indices] if isinstance(data, list) else torch.utils.data.Subset(data, indices)


def refuse_overlap(validation: Described, test: Described) -> None:
    """
    Raises:
        ValueError: if validation and test data have a sequence in common.
    """
    common = len(set(validation.hashes) & set(test.hashes))
    if common:
        raise ValueError(
            f"Validation and test data have {common} {'window' if common == 1 else 'windows'} in common, of "
            f"{len(validation.hashes)} and {len(test.hashes)}: what is fitted on the test data says nothing about it. "
            "Take them out of one of the two, or leave the validation data out: then the front of the data is split "
            "off."
        )


def short_windows(data, length: int, prefix: Sequence[int], limit: int) -> list[dict]:
    """
    Windows of `length` tokens of the sequences, each a sequence of its own behind the tokens of `prefix`, which are
    not predicted.

    Args:
        data: sequences; the tokens of `prefix` at the beginning of one are left out of its windows.
        limit: windows at most, spread evenly over all there are.
    """
    prefix, found = list(prefix), []
    for index in range(len(data)):
        row = data[index]
        ids = _attended(row if isinstance(row, Mapping) else {"input_ids": row})
        ids = ids[len(prefix) :] if prefix and ids[: len(prefix)] == prefix else ids
        found += [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    if len(found) > limit:
        found = [found[index * len(found) // limit] for index in range(limit)]
    return [{"input_ids": [*prefix, *ids], "labels": [IGNORED_LABEL] * len(prefix) + ids} for ids in found]
