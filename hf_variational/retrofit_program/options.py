"""What somebody asks for on the command line, as a recipe."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from ..training.recipe import Recipe, load_recipe

__all__ = ["layers_from", "named_source", "recipe_for", "shipped_recipe", "source_from"]


def shipped_recipe(name: str) -> Path:
    """A recipe that comes with the package: in a wheel beside this module, in a checkout in `training/recipes/`."""
    packaged = Path(__file__).with_name("recipes") / f"{name}.yaml"
    checkout = Path(__file__).resolve().parents[2] / "training" / "recipes" / f"{name}.yaml"
    return packaged if packaged.is_file() else checkout


def recipe_for(
    model: str,
    data: str,
    output: str | Path,
    *,
    recipe: str | Path | None = None,
    train: str | None = None,
    layers: str | None = None,
    attention: str | None = None,
    test: str | None = None,
    tolerance: float | None = None,
    samples: int | None = None,
    max_sequences: int | None = None,
    length: int | None = None,
    seed: int | None = None,
    adapter: bool = False,
    overrides: Iterable[str] = (),
) -> Recipe:
    """
    The recipe with what was asked for in the place of its own values; `None` leaves them.

    Args:
        model: Folder or Hub name of the base model.
        data, test: Text sources, see [`source_from`].
        output: The folder to write to.
        recipe: A recipe's file; without it the package's: `retrofit_scale`, or to train `retrofit_posterior`.
        layers: See [`layers_from`].
        attention: Kind of attention posterior, beside the units'.
        samples: Posterior samples of every measurement.
        max_sequences: Sequences to calibrate on.
        length: Tokens of a sequence.

    Raises:
        ValueError: for a value that cannot be.
    """
    if recipe is None:
        recipe = shipped_recipe("retrofit_scale" if train in (None, "none") else "retrofit_posterior")
    values = {
        "retrofit.model": model,
        "retrofit.train": train,
        "retrofit.layers": None if layers is None else layers_from(layers),
        "retrofit.attention": None if attention is None else {"kind": attention},
        "retrofit.calibration.tolerance": tolerance,
        "retrofit.calibration.sequences": max_sequences,
        "retrofit.adapter": adapter or None,
        "data.train": source_from(data),
        "data.block_size": length,
        "arguments.output_dir": str(output),
        "arguments.eval_posterior_samples": samples,
        "arguments.seed": seed,
    }
    values = {name: value for name, value in values.items() if value is not None}
    if test is not None:
        values |= {"data.validation": source_from(test), "data.validation_fraction": 0.0}
    return load_recipe(recipe, overrides, values)


def layers_from(text: str) -> str | list[int]:
    """`0,2` is a list of layers; anything else is left to [`variationalize`]."""
    return [int(part) for part in text.split(",")] if re.fullmatch(r"\d+(,\d+)*", text) else text


def source_from(text: str):
    """
    A text source, see [`load_text`]: a file, a pattern, or a mapping such as `{dataset: wikitext, split: test}`.

    Raises:
        ValueError: for braces without a mapping in them.
    """
    if not text.lstrip().startswith("{"):
        return text
    import yaml

    try:
        return dict(yaml.safe_load(text))
    except (yaml.YAMLError, TypeError, ValueError):
        raise ValueError(f"{text} is no mapping: write {{dataset: NAME, split: train}}.") from None


def named_source(text: str) -> tuple[str, object]:
    """`NAME=SOURCE`.

    Raises:
        ValueError: for anything else.
    """
    name, separator, source = text.partition("=")
    if not separator or not name.strip() or not source.strip():
        raise ValueError(f"{text!r} names no text: write NAME=FILE.")
    return name.strip(), source_from(source.strip())
