"""The file of a search's space, checked against the recipe that it varies."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checks import check_whole
from ..training.naming import refuse_unknown
from ..training.recipe import Recipe, read_yaml, recipe_from_dict, set_value
from .dimensions import Choices, Gate, Halving, Range, Space

__all__ = ["load_space", "recipe_with"]

_NO_EFFECT = "a trial does not keep to it"
_NOT_COMPARABLE = "trials would be measured on other tokens, and their NLL could not be compared"
# What a search sets itself, and what would change how trials are measured.
_FIXED = {
    "arguments.output_dir": _NO_EFFECT,
    "arguments.seed": "the last rung has its own seeds",
    "arguments.data_seed": "the last rung has its own seeds",
    "arguments.save_strategy": _NO_EFFECT,
    "arguments.load_best_model_at_end": _NO_EFFECT,
    "arguments.report_to": _NO_EFFECT,
    "arguments.disable_tqdm": _NO_EFFECT,
    "arguments.push_to_hub": _NO_EFFECT,
    "arguments.eval_strategy": "trials are halved at the same evaluations",
    "arguments.eval_steps": "trials are halved at the same evaluations",
    "data.validation": _NOT_COMPARABLE,
    "data.validation_fraction": _NOT_COMPARABLE,
    "data.block_size": _NOT_COMPARABLE,
    "data.separate_documents": _NOT_COMPARABLE,
    "tokenizer": _NOT_COMPARABLE,
    "retrofit.model": _NOT_COMPARABLE,
}


def load_space(path: str | Path, content: Mapping) -> Space:
    """
    Reads a space, and checks its keys and values against a recipe.

    Args:
        path: A YAML file: dotted keys of the recipe, each with `{low, high}` (also `log: true`, or `step`) or
            `{choices: [...]}`; and the keys `gates`, `{metric: {min, max}}`, and `halving`, `{min_steps, factor}`.
        content: What the recipe says, as [`read_content`] reads it.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: for a key that the recipe does not know, an empty range, and whatever else cannot be searched.
    """
    read = read_yaml(path)
    keys = [key for key in read if "." in str(key)]
    refuse_unknown([key for key in read if key not in keys], ("gates", "halving"), f"{path}")
    if not keys:
        raise ValueError(
            f"{path} has nothing to search: name a key, like arguments.kl_weight: {{low: 1e-5, high: 1e-2}}."
        )
    for key in keys:
        reason = next((why for fixed, why in _FIXED.items() if key == fixed or key.startswith(f"{fixed}.")), None)
        if reason is not None:
            raise ValueError(f"{path}: {key} cannot be searched: {reason}.")
        inside = next((other for other in keys if key.startswith(f"{other}.")), None)
        if inside is not None:
            raise ValueError(f"{path}: {key} is a part of {inside}, which is searched too: leave out one of them.")
    return Space(
        dimensions=tuple(_dimension(key, read[key], content, f"{path}: {key}") for key in keys),
        gates=_gates(read.get("gates") or {}, f"{path}: gates"),
        halving=_halving(read.get("halving") or {}, f"{path}: halving"),
    )


def recipe_with(content: Mapping, values: Mapping[str, Any], where: str = "The recipe") -> Recipe:
    """The recipe of `content` with `values` by dotted key in the place of its own."""
    content = copy.deepcopy(dict(content))
    for key, value in values.items():
        set_value(content, key, copy.deepcopy(value))
    return recipe_from_dict(content, where=where)


def _check_value(content: Mapping, key: str, value: Any, where: str) -> None:
    """Raises for a key or a value that no run could have."""
    from ..training.arguments import VariationalTrainingArguments

    recipe = recipe_with(content, {key: value}, where=where)
    if key.startswith("arguments."):
        try:
            VariationalTrainingArguments(**recipe.arguments)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: {value!r} cannot be: {error}") from error


def _dimension(key: str, spec: Any, content: Mapping, where: str) -> Range | Choices:
    if not isinstance(spec, Mapping):
        raise ValueError(f"{where} is {spec!r}: write {{low: ..., high: ...}} or {{choices: [...]}}.")
    refuse_unknown(spec, ("low", "high", "log", "step", "choices"), where)
    dimension = _choices(key, spec, where) if "choices" in spec else _range(key, spec, where)
    for value in dimension.examples:
        _check_value(content, key, value, where)
    if isinstance(dimension, Range) and dimension.whole:
        return _whole_or_not(dimension, content)
    return dimension


def _whole_or_not(dimension: Range, content: Mapping) -> Range:
    """{low: 0, high: 1} means whole numbers only where the recipe takes no others."""
    try:
        _check_value(content, dimension.key, dimension.low + 0.5, dimension.key)
    except ValueError:
        return dimension
    return Range(dimension.key, float(dimension.low), float(dimension.high), dimension.step, dimension.log)


def _choices(key: str, spec: Mapping, where: str) -> Choices:
    choices = spec["choices"]
    if len(spec) > 1:
        raise ValueError(f"{where} has `choices` and {sorted(set(spec) - {'choices'})}: leave out one of them.")
    if not isinstance(choices, list) or not choices:
        raise ValueError(f"{where} has the empty range {choices!r}: list the values, like [standard, centered].")
    found = Choices(key, tuple(choices))
    twice = [label for label in found.labels if found.labels.count(label) > 1]
    if twice:
        raise ValueError(f"{where} has the choice {twice[0]} twice.")
    return found


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _range(key: str, spec: Mapping, where: str) -> Range:
    missing = [name for name in ("low", "high") if name not in spec]
    if missing:
        raise ValueError(f"{where} has no `{missing[0]}`: write {{low: ..., high: ...}} or {{choices: [...]}}.")
    low, high, log, step = spec["low"], spec["high"], spec.get("log", False), spec.get("step")
    for name, value in (("low", low), ("high", high), ("step", step)):
        if value is not None and not _number(value):
            raise ValueError(f"{where}: `{name}` is a number, got {value!r}.")
    if low is None or high is None or low >= high:
        raise ValueError(f"{where} has the empty range from {low} to {high}: `low` must be below `high`.")
    if not isinstance(log, bool):
        raise ValueError(f"{where}: `log` is true or false, got {log!r}.")
    if log and low <= 0:
        raise ValueError(f"{where}: a range with `log: true` begins above 0, got low={low}.")
    if log and step is not None:
        raise ValueError(f"{where}: `log: true` and `step` do not go together: leave out one of them.")
    if step is not None and not 0 < step <= high - low:
        raise ValueError(f"{where}: `step` is above 0 and at most {high - low:g}, the width of the range; got {step}.")
    whole = all(isinstance(value, int) for value in (low, high, step) if value is not None)
    return Range(key, low, high, step, log, whole)


def _gates(spec: Any, where: str) -> tuple[Gate, ...]:
    if not isinstance(spec, Mapping):
        raise ValueError(f"{where} is {spec!r}: write {{eval_mutual_information: {{min: 0.001}}}}.")
    gates = []
    for metric, bounds in spec.items():
        if not str(metric).startswith("eval_"):
            raise ValueError(f"{where}: {metric} is no metric of an evaluation: their names begin with eval_.")
        if not isinstance(bounds, Mapping) or not bounds:
            raise ValueError(f"{where}: {metric} is {bounds!r}: write {{min: ...}}, {{max: ...}} or both.")
        refuse_unknown(bounds, ("min", "max"), f"{where}: {metric}")
        for name, value in bounds.items():
            if not _number(value):
                raise ValueError(f"{where}: {metric}: `{name}` is a number, got {value!r}.")
        least, most = bounds.get("min"), bounds.get("max")
        if least is not None and most is not None and least > most:
            raise ValueError(f"{where}: {metric} has the empty range from {least} to {most}.")
        gates.append(Gate(metric, least, most))
    return tuple(gates)


def _halving(spec: Any, where: str) -> Halving:
    if not isinstance(spec, Mapping):
        raise ValueError(f"{where} is {spec!r}: write {{min_steps: 100, factor: 3}}.")
    refuse_unknown(spec, ("min_steps", "factor"), where)
    for name, least in (("min_steps", 1), ("factor", 2)):
        check_whole(name, spec.get(name, least), least, where=f"{where}: ")
    return Halving(**spec)
