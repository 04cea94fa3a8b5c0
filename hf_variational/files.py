"""Files that are there whole or not at all, and numbers that JSON has."""

import math
import os
from collections.abc import Mapping
from pathlib import Path

__all__ = ["plain", "write_whole"]


def write_whole(path: str | Path, text: str) -> Path:
    """Writes beside the file and then over it, so that an interrupted write leaves the old one."""
    path = Path(path)
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
    return path


def plain(value):
    """The same with names as text, tuples as lists, and `None` for a number that is not finite: JSON has none."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
