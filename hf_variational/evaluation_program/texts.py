"""Text sources as the command line names them, as sequences."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from ..evaluation.report import text_rows
from ..training.data import load_text

__all__ = ["named", "read_rows", "source_name", "source_of"]

# Data sets that need more than their name.
_KNOWN = {
    "wikitext": {
        "dataset": "Salesforce/wikitext",
        "name": "wikitext-2-raw-v1",
        "split": "test",
        "rows_are_documents": False,
    }
}
_ENDINGS = (".txt", ".jsonl", ".xz", ".gz", ".bz2")
# Characters of a piece of text that is tokenised at once; short rows of a data set are joined up to it.
_PIECE = 2**15


def source_of(text: str, option: str) -> object:
    """
    A text source (see `load_text`): a file or a pattern, a mapping in braces, or else a data set of the Hub.

    Raises:
        ValueError: for what looks like a file and is none, a file without anything in it, or braces without a mapping.
    """
    if text.lstrip().startswith("{"):
        import yaml

        try:
            return dict(yaml.safe_load(text))
        except (yaml.YAMLError, TypeError, ValueError):
            raise ValueError(f"{option} {text} is no mapping: write {{dataset: NAME, split: test}}.") from None
    path = Path(text).expanduser()
    if path.is_file():
        if not path.stat().st_size:
            raise ValueError(f"{option} {text} is empty: there is no text to measure on. Fill it, or leave it out.")
        return str(path)
    if any(mark in text for mark in "*?["):
        return text
    if text.startswith((".", "/", "~")) or text.endswith(_ENDINGS) or path.is_dir():
        raise ValueError(f"{option} {text} is no file: give a text file, or the name of a data set.")
    return dict(_KNOWN.get(text, {"dataset": text, "split": "test"}))


def named(texts: Iterable[str], option: str) -> dict[str, str]:
    """`NAME=VALUE`, several times.

    Raises:
        ValueError: for anything else, or a name that comes twice.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, separator, value = (part.strip() for part in text.partition("="))
        if not (name and separator and value):
            raise ValueError(f"{option} {text} has no name: write {option} NAME=FILE.")
        if name in found:
            raise ValueError(f"{option} names {name} twice: give the other one another name.")
        found[name] = value
    return found


def source_name(source) -> str:
    """What a source is called in a report: without the folders of this machine."""
    if isinstance(source, dict):
        named = source.get("name"), source.get("dataset", source.get("files"))
        return str(named[0] or named[1]).rstrip("/").rpartition("/")[2]
    return Path(str(source)).name


def read_rows(
    source, tokenizer, length: int, limit: int | None, option: str, shortest: int | None = None
) -> list[dict]:
    """
    Sequences of a text source; see [`text_rows`].

    Raises:
        ValueError: for a source that cannot be read or is too short; the error begins with the option.
    """
    try:
        pieces = list(_pieces(load_text(source), None if limit is None else limit * length))
        numbers, texts = zip(*pieces, strict=True) if pieces else ((), ())
        return text_rows(texts, tokenizer, length, limit, documents=numbers, shortest=shortest)
    except Exception as error:
        if not isinstance(source, dict) and not isinstance(error, (ValueError, OSError)):
            raise
        # Loaders of data sets raise errors of many kinds: no network, no such name, no such part of it.
        text = " ".join(str(error).split()) or type(error).__name__
        if isinstance(source, dict) and "shorter than a window" not in text:
            text = (
                f"the data set {source.get('dataset')} cannot be loaded ({text[:300]}): give a text file, see that "
                "the network is there, or write {dataset: NAME, name: CONFIGURATION, split: test}"
            )
        raise ValueError(f"{option}: {text}") from error


def _pieces(dataset, most: int | None) -> Iterator[tuple[int, str]]:
    """Pieces of text with the number of their document, of about as many characters as there are tokens to fill."""
    document, held, seen = 0, "", 0
    for row in dataset:
        held += row["text"]
        ends = row.get("ends_document", True)
        if held and (ends or len(held) >= _PIECE):
            yield document, held
            # a token has a character or more
            seen, held = seen + len(held), ""
        if most is not None and seen > 64 * most:
            return
        document += bool(ends)
    if held:
        yield document, held
