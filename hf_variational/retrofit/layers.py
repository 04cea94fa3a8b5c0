"""Which layers a user means."""

import math
import re
from numbers import Integral

KEYWORDS = ("all", "last", "last_quarter")


def choose_layers(layers: str | list[int], names: dict[int, str], last_tower: list[int]) -> list[int]:
    """The sorted numbers of the layers that are meant.

    Args:
        layers: `"all"`; `"last"` and `"last_quarter"` (rounded up) of the last tower; a list of numbers; or a regular
            expression that the whole name of a layer matches, such as `r"model\\.layers\\.(10|11)"`.
        names: number to name, of the layers that can be chosen.
        last_tower: numbers of the layers of the last tower (the decoder, or all).

    Raises:
        ValueError: for a layer that is not there, a regular expression that matches none, or anything else.
    """
    available = sorted(names)
    last = [index for index in available if index in last_tower]
    if isinstance(layers, str):
        if layers == "all":
            return available
        if layers in KEYWORDS:
            count = 1 if layers == "last" else math.ceil(len(last_tower) / 4)
            return last[-count:]
        try:
            chosen = [index for index in available if re.fullmatch(layers, names[index])]
        except re.error as error:
            raise ValueError(f"layers={layers!r} is no regular expression: {error}.") from None
        if not chosen:
            raise ValueError(
                f"layers={layers!r} matches no layer. It must match a layer's whole name, which are "
                f"{_abbreviated(list(names.values()))}; or be one of {', '.join(map(repr, KEYWORDS))}."
            )
        return chosen
    if not isinstance(layers, (list, tuple)) or not layers:
        raise ValueError(
            f"layers must be {', '.join(map(repr, KEYWORDS))}, a list of layer numbers, or a regular expression, got "
            f"{layers!r}."
        )
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, Integral) or layer not in names:
            raise ValueError(f"layers names {layer!r}, but the layers that can be chosen are {available}.")
    return sorted({int(layer) for layer in layers})


def _abbreviated(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{names[0]}, {names[1]}, ..., {names[-1]}"
