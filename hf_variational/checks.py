"""Refusals of values that are no number, not in their range, or not whole: errors that name the value."""

import math
from numbers import Integral, Real

__all__ = ["check_number", "check_whole"]


def check_number(
    name: str,
    value,
    low: float,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
    where: str = "",
) -> None:
    """Raises `ValueError` unless the value is a finite number of the range; an end that is open is not of it.

    Args:
        name: the value's.
        where: what the error begins with.
    """
    fits = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    fits = fits and (low < value if open_low else low <= value) and (value < high if open_high else value <= high)
    if not fits:
        ends = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high or math.isinf(high) else ']'}"
        raise ValueError(f"{where}`{name}` is a number in {ends}, got {value!r}.")


def check_whole(name: str, value, least: int, *, where: str = "") -> None:
    """Raises `ValueError` unless the value is a whole number of at least `least`; see [`check_number`]."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{where}`{name}` is a whole number of at least {least}, got {value!r}.")
