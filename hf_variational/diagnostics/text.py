"""Numbers as text, in columns."""

import math


def shown(value: float | None, is_share: bool = False) -> str:
    """A number with three digits, a count whole, a share in percent."""
    if value is None or not math.isfinite(value):
        return "–"
    if is_share:
        return f"{100 * value:.1f} %"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def columns_of(lines: list[list[str]]) -> str:
    """Lines of cells, the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines
    )
