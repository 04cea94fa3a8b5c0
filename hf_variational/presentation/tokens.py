"""Generated tokens with their measures, cut into pieces of text that can be printed.

A token is not always a piece of text: byte-level tokenizers spread one character over several tokens. Such tokens
share a `Chunk`, so that no character is ever broken, and each keeps its own measures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .measures import MEASURES

__all__ = ["AnnotatedText", "Chunk", "Token", "annotate", "chunks_of"]

REPLACEMENT = "\ufffd"
LONGEST_CHARACTER = 4  # bytes of UTF-8, so tokens that one character can be spread over


@dataclass(frozen=True)
class Token:
    """`piece` is the tokenizer's own spelling; `measures` is empty where the model has no uncertainty."""

    id: int
    piece: str
    special: bool
    measures: dict[str, float]

    def value(self, name: str) -> float:
        return self.measures.get(name, math.nan)


@dataclass(frozen=True)
class Chunk:
    text: str
    tokens: tuple[Token, ...]

    @property
    def special(self) -> bool:
        return self.tokens[0].special

    def value(self, name: str) -> float:
        """The largest value of its tokens; NaN where none has one."""
        return max((t.value(name) for t in self.tokens if not math.isnan(t.value(name))), default=math.nan)


@dataclass(frozen=True)
class AnnotatedText:
    prompt: str
    chunks: tuple[Chunk, ...]
    title: str = ""

    @property
    def text(self) -> str:
        return "".join(chunk.text for chunk in self.chunks if not chunk.special)

    @property
    def tokens(self) -> tuple[Token, ...]:
        return tuple(token for chunk in self.chunks for token in chunk.tokens)

    @property
    def has_measures(self) -> bool:
        return any(token.measures for token in self.tokens)

    def values(self, name: str) -> list[float]:
        return [token.value(name) for token in self.tokens if not math.isnan(token.value(name))]

    def mean(self, name: str) -> float:
        values = self.values(name)
        return sum(values) / len(values) if values else math.nan

    def to_dict(self) -> dict[str, Any]:
        """For JSON: NaN becomes None; a token inside an unfinished character has no text of its own."""
        tokens = []
        for chunk in self.chunks:
            for position, token in enumerate(chunk.tokens):
                last = position == len(chunk.tokens) - 1
                measures = {name: None if math.isnan(v) else v for name, v in token.measures.items()}
                tokens.append({"id": token.id, "piece": token.piece, "text": chunk.text if last else "", **measures})
        return {"prompt": self.prompt, "text": self.text, "tokens": tokens}


def chunks_of(tokenizer, context_ids: Sequence[int], ids: Sequence[int]) -> Iterator[tuple[str, list[int]]]:
    """Yield (text, positions in `ids`); the texts joined are what `ids` add to the decoded context."""
    special_ids = set(tokenizer.all_special_ids)
    every_id = [*context_ids, *ids]
    offset = len(context_ids)

    def decode(first: int, last: int) -> str:
        return tokenizer.decode(every_id[first:last], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    # Decoding from a few tokens before keeps the spaces that some tokenizers drop at the start of a text.
    context_start, start = max(0, offset - 5), offset
    for end in range(offset + 1, len(every_id) + 1):
        if every_id[end - 1] in special_ids:
            if start < end - 1:
                yield decode(start, end - 1), list(range(start - offset, end - 1 - offset))
            yield decode(end - 1, end), [end - 1 - offset]
            context_start, start = end, end
            continue
        before, now = decode(context_start, start), decode(context_start, end)
        added = now[len(before) :] if now.startswith(before) else decode(start, end)
        unfinished = added == "" or added.endswith(REPLACEMENT)
        if unfinished and end - start < LONGEST_CHARACTER and end < len(every_id):
            continue
        yield added, list(range(start - offset, end - offset))
        context_start, start = max(context_start, start), end


def annotate(
    tokenizer,
    prompt_ids: Sequence[int],
    new_ids: Sequence[int],
    uncertainty: Any = None,
    row: int = 0,
    title: str = "",
) -> AnnotatedText:
    """One generated row: `new_ids` up to its end-of-text token, with the measures of `uncertainty` (or none).

    Args:
        uncertainty: `generate(..., output_uncertainty=True).uncertainty`, each measure [rows, new tokens].
    """
    new_ids = [int(token) for token in new_ids]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id in new_ids:
        new_ids = new_ids[: new_ids.index(tokenizer.eos_token_id) + 1]
    columns: dict[str, list[float]] = {}
    for description in MEASURES if uncertainty is not None else ():
        values = getattr(uncertainty, description.name, None)
        if values is not None:
            columns[description.name] = [float(value) for value in values[row][: len(new_ids)].tolist()]
            if len(columns[description.name]) != len(new_ids):
                raise ValueError(
                    f"{description.name} has {len(columns[description.name])} values for {len(new_ids)} new tokens: "
                    "pass the uncertainty of the same call to generate"
                )
    special_ids = set(tokenizer.all_special_ids)
    pieces = tokenizer.convert_ids_to_tokens(new_ids)
    tokens = [
        Token(token, str(piece), token in special_ids, {name: column[i] for name, column in columns.items()})
        for i, (token, piece) in enumerate(zip(new_ids, pieces, strict=True))
    ]
    prompt_ids = [int(token) for token in prompt_ids]
    prompt = tokenizer.decode(prompt_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    chunks = tuple(
        Chunk(text, tuple(tokens[p] for p in positions))
        for text, positions in chunks_of(tokenizer, prompt_ids, new_ids)
    )
    return AnnotatedText(prompt, chunks, title)
