"""An evaluation's report as a page that needs no network, and its plots as PNG files."""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.figure import Figure

from ..evaluation.report import EvaluationReport
from ..files import write_whole
from .figures import svg_of
from .html import template_environment
from .report_plots import FIGURES
from .report_tables import page_tables

__all__ = ["PAGE", "render_report", "write_report"]

PAGE = "report.html"


def render_report(report: EvaluationReport, figures: dict[str, Figure] | None = None) -> str:
    """The page as a string, with the plots inside it."""
    figures = _figures(report) if figures is None else figures
    tables = page_tables(report)
    explained = {heading: (name, text) for name, heading, text, _ in FIGURES}
    sections = []
    for heading in dict.fromkeys([*tables, *explained]):
        name, text = explained.get(heading, ("", ""))
        picture = svg_of(figures[name], name) if name in figures else None
        if picture or tables.get(heading):
            sections.append(
                {"heading": heading, "text": text, "picture": picture, "name": name, "tables": tables.get(heading, [])}
            )
    configuration = report.configuration
    return (
        template_environment()
        .get_template("report.html.j2")
        .render(
            title=f"Evaluation of {report.model}",
            facts={
                "data": f"{configuration['data']['name']}, {configuration['data']['sequences']:,} sequences",
                "posterior samples": configuration["num_posterior_samples"],
                "seed": f"{report.seed} (one)",
                "dtype": configuration["dtype"],
                "device": configuration["device"],
            },
            notes=report.notes,
            sections=sections,
            configuration=json.dumps(configuration, indent=1, ensure_ascii=False),
            versions=report.versions,
        )
    )


def write_report(report: EvaluationReport, folder: str | Path) -> Path:
    """Writes `report.html` and a PNG of each plot; those of an earlier report that this one does not have go."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    figures = _figures(report)
    write_whole(folder / PAGE, render_report(report, figures))
    for name, _, _, _ in FIGURES:
        file = folder / f"{name}.png"
        if name in figures:
            figures[name].savefig(file)
        else:
            file.unlink(missing_ok=True)
    return folder / PAGE


def _figures(report: EvaluationReport) -> dict[str, Figure]:
    drawn = {name: draw(report) for name, _, _, draw in FIGURES}
    return {name: figure for name, figure in drawn.items() if figure is not None}
