"""Where a retrofit writes: refused before anything is computed, replaced when there is something to replace."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from ..files import plain, write_whole

__all__ = ["RESULTS", "TRAINING", "check", "clear", "prepare", "write_results"]

RESULTS, TRAINING = "results.json", "training"
# Files of another checkpoint, which would be loaded together with or instead of the one that is written.
_REPLACED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "adapter_config.json",
)


def check(output: Path, base: str, overwrite: bool) -> None:
    """
    Refuses a folder that something would be lost in; writes nothing.

    Raises:
        ValueError: for a file, a folder with something in it without `overwrite`, or the base model's own.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file: give a folder to write to.")
    if output.is_dir() and Path(base).is_dir() and os.path.samefile(output, base):
        raise ValueError(f"{output} is the base model's own folder: write to another.")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise ValueError(f"{output} is not empty: give another folder, or overwrite what is there (--overwrite).")


def prepare(output: Path) -> None:
    """
    Makes the folder, and sees that it can be written to.

    Raises:
        OSError: if it cannot.
    """
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=output):
        pass


def clear(output: Path) -> None:
    """Takes an earlier checkpoint away."""
    for pattern in _REPLACED:
        for file in output.glob(pattern):
            file.unlink()


def write_results(output: Path, results: dict) -> None:
    """Writes what is known so far, whole or not at all."""
    write_whole(output / RESULTS, json.dumps(plain(results), indent=1, ensure_ascii=False) + "\n")
