"""What the demo reads: text that every CPython carries, or a file; a held-out part; and text of another kind."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "DemoTexts",
    "demo_texts",
    "language_reference",
    "prompt_from",
    "python_source",
    "read_text",
    "split_text",
    "text_blocks",
]

OTHER_MODULES = ("csv", "json.decoder", "json.encoder", "heapq")
PROMPT_TOKENS = 24


@dataclass(frozen=True)
class DemoTexts:
    name: str
    training: str
    held_out: str
    other_name: str
    other: str


def read_text(path: str | Path) -> str:
    """A local text as one string, its documents a blank line apart."""
    from ..training.data import load_text

    return "".join(row["text"] + ("\n\n" if row["ends_document"] else "") for row in load_text(path))


def text_blocks(text: str, tokenizer, block_size: int):
    """One text packed into blocks, as a `datasets.Dataset`."""
    import datasets

    from ..training.data import pack

    return pack(datasets.Dataset.from_dict({"text": [text], "ends_document": [True]}), tokenizer, block_size)


def _paragraphs(text: str) -> list[str]:
    return [p for p in re.split(r"\n(?:[ \t]*\n)+", text.replace("\r\n", "\n")) if p.strip()]


def language_reference() -> str:
    """The topics of `help()`, about 0.5 MB. They quote each other, so every longer paragraph is kept once only:
    otherwise held-out text would stand in the training text."""
    from pydoc_data.topics import topics

    seen, kept = set(), []
    for name in sorted(topics):
        for paragraph in _paragraphs(topics[name]):
            words = " ".join(paragraph.split())
            if len(words) < 60 or words not in seen:
                seen.add(words)
                kept.append(paragraph)
    return "\n\n".join(kept)


def python_source(characters: int) -> str:
    """Modules of the standard library as they stand, cut to a length."""
    parts = []
    for module in OTHER_MODULES:
        parts.append(Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8"))
    return "\n\n".join(parts)[:characters]


def split_text(text: str, passage: int = 4000) -> tuple[str, str]:
    """Training and held-out text: of passages of about 4,000 characters, cut between paragraphs, every tenth is held
    out, so that both come from all over the text."""
    passages, current = [], []
    # A text without blank lines still has lines, and one without lines has characters.
    paragraphs = [
        piece for p in _paragraphs(text) for piece in (p[i : i + passage] for i in range(0, len(p), passage))
    ]
    passage = min(passage, max(1, sum(map(len, paragraphs)) // 30))
    for paragraph in paragraphs:
        current.append(paragraph)
        if sum(map(len, current)) >= passage:
            passages.append("\n\n".join(current))
            current = []
    if current:
        passages.append("\n\n".join(current))
    training = [p for i, p in enumerate(passages) if i % 10 != 9]
    held_out = [p for i, p in enumerate(passages) if i % 10 == 9]
    return "\n\n".join(training), "\n\n".join(held_out)


def demo_texts(path: Path | None = None, characters: int | None = None) -> DemoTexts:
    """The text to train on, its held-out part, and as much text of another kind.

    Raises:
        ValueError: the file is empty, no text, or too short to hold anything out.
    """
    if path is None:
        name, text = "Python's language reference", language_reference()
    else:
        name, text = Path(path).name, read_text(path)
    text = text[:characters]
    training, held_out = split_text(text)
    if len(held_out) < 500:
        raise ValueError(
            f"{path or name} has {len(text):,} characters, too few to hold any out: give a text of 10,000 or more"
        )
    other = python_source(len(held_out))
    return DemoTexts(name, training, held_out, f"Python source code ({', '.join(OTHER_MODULES)})", other)


def prompt_from(text: str, tokenizer, starts: tuple[str, ...] = ("",)) -> str:
    """The first tokens of a paragraph from the middle of the text."""
    paragraphs = _paragraphs(text)
    middle = paragraphs[len(paragraphs) // 2 :] + paragraphs
    chosen = next((p for p in middle if len(p) >= 120 and p.startswith(starts)), middle[0])
    ids = tokenizer(chosen)["input_ids"][:PROMPT_TOKENS]
    return tokenizer.decode(ids, skip_special_tokens=True)
