"""Saving a PEFT model: its card is peft's kind, and gets the data, the recipe and the measurements as sections."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .cards import as_list, record

_BEGIN, _END = "<!-- hf_variational record -->", "<!-- end of the record -->"
_RECORD = re.compile(rf"{_BEGIN}\n.*?{_END}\n\n?", re.DOTALL)
# The section of peft's cards that the record stands before.
_BEFORE = "### Framework versions"


def is_adapter(model) -> bool:
    """Whether a model is a wrapper of peft, which saves its adapters."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def forget_record(directory: str | Path) -> None:
    """Takes an earlier record out of a card, which then is as the adapter's own saving left it."""
    readme = Path(directory) / "README.md"
    if readme.is_file():
        text = readme.read_text(encoding="utf-8")
        if _RECORD.search(text):
            readme.write_text(_RECORD.sub("", text), encoding="utf-8")


def write_record(directory: str | Path, facts: Mapping[str, Any] | None, metrics: Mapping[str, Any] | None) -> bool:
    """
    Writes what is known of an adapter into its card.

    Returns:
        Whether it was written: not into a card that a person wrote.
    """
    from huggingface_hub import ModelCard

    readme = Path(directory) / "README.md"
    if not (facts or metrics) or not readme.is_file():
        return False
    card = ModelCard(readme.read_text(encoding="utf-8"))
    place = card.text.rfind(_BEFORE)
    if place < 0 or _BEGIN in card.text:
        return False
    facts = dict(facts or {})
    for name in ("license", "language"):
        if facts.get(name):
            setattr(card.data, name, facts[name])
    tags = [*(card.data.tags or []), *as_list(facts.get("tags"))]
    card.data.tags = list(dict.fromkeys(tags)) or None
    card.text = f"{card.text[:place]}{_BEGIN}\n{record(facts, metrics)}{_END}\n\n{card.text[place:]}"
    readme.write_text(str(card), encoding="utf-8")
    return True
