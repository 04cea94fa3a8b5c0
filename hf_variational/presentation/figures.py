"""Figures of reports: panels in one style, and a figure as markup of a page."""

from __future__ import annotations

import io
import math
import re

import matplotlib
from markupsafe import Markup
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .plots import COLOURS, GRID, INK, plain

__all__ = ["colour_of", "figure_of", "grid_of", "legend_beside", "svg_of", "title_of"]


def colour_of(index: int) -> str:
    """The colour of the index-th thing that is drawn."""
    return COLOURS[index % len(COLOURS)]


def figure_of(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=144, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def grid_of(panels: int, columns: int, width: float, height: float) -> tuple[Figure, list]:
    """Panels in rows of `columns`, without the empty places of the last row."""
    columns = min(columns, panels)
    rows = math.ceil(panels / columns)
    figure = figure_of(width * columns, height * rows)
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for unused in list(axes)[panels:]:
        unused.remove()
    axes = figure.axes
    for one in axes:
        plain(one)
    return figure, axes


def title_of(axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=11, color=INK, fontweight="bold")


def legend_beside(figure: Figure, axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9, labelcolor=INK)


def svg_of(figure: Figure, name: str) -> Markup:
    """The figure as markup whose ink, grid and paper are those of the page, light or dark."""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": name}):
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    for colour, variable in ((INK, "--ink"), (GRID, "--line"), ("#ffffff", "--card")):
        svg = svg.replace(colour, f"var({variable})")
    # Names are made unique, for several pictures share a page.
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{name}-", svg)
    return Markup(re.sub(r'(<svg [^>]*?)width="[^"]*"', r"\1", re.sub(r'(<svg [^>]*?)height="[^"]*"', r"\1", svg)))
