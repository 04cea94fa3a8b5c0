"""The tables of an evaluation's report: cells of text, for the page and for the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..evaluation.report import EvaluationReport
from .measures import format_value, label_of

__all__ = ["Cell", "ReportTable", "large", "page_tables", "report_tables"]

# Scores of a window that tell texts apart; report.json has all of them.
_SHOWN = ("predictive_entropy", "mutual_information", "nll")
_SLICED = (
    ("num_tokens", "tokens"),
    ("nll", "NLL"),
    ("expected_calibration_error", "ECE"),
    ("cvar_nll", "NLL of the worst 5 %"),
    ("predictive_entropy", "predictive entropy"),
    ("mutual_information", "mutual information"),
    ("kl", "KL"),
    ("scale", "scale"),
    ("mean_energy", "mean energy"),
)


@dataclass(frozen=True)
class Cell:
    """A number as it is printed, its interval, and whether it is the best of its row or column."""

    text: str
    interval: str = ""
    best: bool = False


@dataclass(frozen=True)
class ReportTable:
    """
    Attributes:
        title: above the table.
        header: of the columns; the first is that of the labels.
        rows: a label and cells.
        note: below the table.
    """

    title: str
    header: list[str]
    rows: list[tuple[str, list[Cell]]] = field(default_factory=list)
    note: str = ""


def _cells(values: Iterable, less: bool | None = None, show: Callable = format_value, intervals=None) -> list[Cell]:
    """Cells of one row or column; with `less`, whether less is better, the best is marked where it is not all."""
    values = [None if value is None or not math.isfinite(value) else _rounded(value) for value in values]
    known = [value for value in values if value is not None]
    best = None
    if less is not None and len(known) > 1:
        best = show(min(known) if less else max(known))
    texts = ["–" if value is None else show(value) for value in values]
    # as printed: two numbers that read the same are not better and worse
    marked = [best is not None and text == best and len(set(texts)) > 1 for text in texts]
    within = intervals or [None] * len(texts)
    return [
        Cell(text, "" if ends is None else f"{show(ends[0])} to {show(ends[1])}", mark)
        for text, ends, mark in zip(texts, within, marked, strict=True)
    ]


def _rounded(value: float) -> float:
    """Without what is left of a difference of equals."""
    return 0 if abs(value) < 1e-12 else value


def _columns(rows: Mapping[str, list], less: list[bool | None], shows: list[Callable]) -> list[tuple[str, list[Cell]]]:
    """Rows of cells, where the best of each column is marked."""
    columns = [
        _cells((values[index] for values in rows.values()), less[index], shows[index]) for index in range(len(less))
    ]
    return [(name, [column[place] for column in columns]) for place, name in enumerate(rows)]


def large(value: float) -> str:
    """Three significant digits and a unit prefix."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{format_value(value / size)} {unit}"
    return f"{value:.0f}"


def _metrics(report: EvaluationReport) -> ReportTable:
    """Every metric of every contender, with its interval."""
    rows = []
    for row in report.rows():
        intervals = [report.interval(name, *row.place) for name in report.contenders]
        rows.append((row.label, _cells(row.values.values(), row.less_is_better, intervals=intervals)))
    unit = report.configuration["resampled"]
    note = (
        f"In brackets the 95 % interval over {unit['count']} {unit['unit']}s of the test data, "
        f"resampled {unit['resamples']} times. Bold is the best of a row, whether or not the difference is certain."
    )
    return ReportTable("Quality, measures and errors found", ["", *report.contenders], rows, note)


def _summary(report: EvaluationReport) -> ReportTable:
    """The numbers that are looked at first, a row for each contender."""
    shown = (
        ("NLL", True, ("quality", "nll")),
        ("ECE", True, ("quality", "expected_calibration_error")),
        ("Brier", True, ("quality", "brier_score")),
        ("worst 5 %", True, ("quality", "cvar_nll")),
        ("mut. inf.", None, ("measures", "mutual_information")),
        ("AUROC H", False, ("error_detection", "predictive_entropy", "auroc")),
        ("AUROC I", False, ("error_detection", "mutual_information", "auroc")),
    )
    values = {name: [report.value(name, *place) for _, _, place in shown] for name in report.contenders}
    rows = _columns(values, [less for _, less, _ in shown], [format_value] * len(shown))
    note = (
        "AUROC: wrong tokens told from right ones by the predictive entropy (H) and the mutual information (I). "
        "Intervals and everything else are in the report."
    )
    return ReportTable(_data_title(report), ["", *(label for label, _, _ in shown)], rows, note)


def _data_title(report: EvaluationReport) -> str:
    data = report.configuration["data"]
    return f"{data['name']}: {data['sequences']:,} sequences of up to {data['longest']} tokens"


def _error_detection(report: EvaluationReport) -> ReportTable | None:
    """Every score of the model: wrong tokens found, and what is left when they are."""
    found = report.contenders[report.model]["error_detection"]
    if not found:
        return None
    values = {}
    for name in found:
        ranked = [
            report.value(report.model, "error_detection", name, key) for key in ("auroc", "aupr", "fpr_at_95_tpr")
        ]
        keys = ("aurc", "excess_aurc", "prediction_rejection_ratio", "risk_at_80")
        token = [report.value(report.model, "selective", "token", name, key) for key in keys]
        sequence = report.value(report.model, "selective", "sequence", name, "prediction_rejection_ratio")
        values[label_of(name)] = [*ranked, *token, sequence]
    header = ["", "AUROC", "AUPR", "FPR at 95 % TPR", "AURC", "E-AURC", "PRR", "risk at 80 %", "PRR, sequences"]
    rows = _columns(values, [False, False, True, True, True, False, True, False], [format_value] * 8)
    note = "The combination is a logistic regression of all scores, fitted on the validation data."
    return ReportTable(f"Wrong tokens, {report.model}", header, rows, note if "combination" in found else "")


def _other_texts(report: EvaluationReport, length: str) -> ReportTable | None:
    """How well each contender tells other texts from the test data, in windows of one length."""
    texts = list(report.configuration["out_of_domain"])
    values: dict[str, list] = {}
    for name in report.contenders:
        for score in _SHOWN:
            if score == "mutual_information" and report.contenders[name]["temperature"] != 1:
                continue  # it is what it was
            place = [(text, length, score, "auroc") for text in texts]
            row = [report.value(name, "out_of_domain", *where) for where in place]
            known = [value for value in row if value is not None]
            if known:
                mean = sum(known) / len(known) if len(known) == len(texts) else None
                values[f"{name}: {label_of(score)}"] = [*row, mean]
    if not values:
        return None
    header = ["", *texts, "mean"]
    if len(texts) == 1:
        header, values = header[:-1], {name: row[:-1] for name, row in values.items()}
    rows = _columns(values, [False] * (len(header) - 1), [format_value] * (len(header) - 1))
    plural = "token" if length == "1" else "tokens"
    return ReportTable(f"Other texts told from the test data, AUROC of windows of {length} {plural}", header, rows)


def _policies(report: EvaluationReport) -> ReportTable | None:
    """Thresholds with a guarantee, and what they did to the test data."""
    rows = []
    some = None
    for name, sections in report.contenders.items():
        for score, found in (sections.get("policies") or {}).items():
            some = found
            guaranteed = Cell("yes" if found["certified"] else "no")
            numbers = _cells([found.get("coverage"), found.get("selective_risk")])
            rows.append((f"{name}: {label_of(score)}", [guaranteed, *numbers]))
    if some is None:
        return None
    note = (
        f"Of what is answered at most a share of {some['target_risk']:g} shall be wrong, with probability "
        f"{1 - some['delta']:g} over the validation data; where no threshold can promise that, nothing is answered."
    )
    return ReportTable("Answering or not, with a guarantee", ["", "guaranteed", "answered", "wrong of it"], rows, note)


def _costs(report: EvaluationReport) -> ReportTable | None:
    values = {}
    for name, sections in report.contenders.items():
        times = report.times.get(name, {})
        cost = sections["cost"]
        values[name] = [
            sections["num_posterior_samples"],
            cost.get("parameters"),
            (sections.get("training") or {}).get("tokens"),
            cost.get("training_flops_per_token"),
            cost.get("inference_flops_per_token"),
            times.get("test_seconds"),
            times.get("peak_memory_bytes"),
        ]
    header = [
        "",
        "samples",
        "parameters",
        "tokens trained on",
        "training FLOPs",
        "FLOPs",
        "seconds",
        "peak bytes",
    ]
    shows = [str, large, large, large, large, format_value, large]
    note = (
        "FLOPs are of a token. Seconds are of the pass over the test data, which a tempered contender shares; the "
        "peak is of one batch, beside the weights."
    )
    if not any(row[2] for row in values.values()):
        note += " Nobody recorded how many tokens were trained on."
    rows = _columns(values, [None] * len(shows), shows)
    keep = [index for index in range(len(shows)) if any(row[index] is not None for row in values.values())]
    return ReportTable(
        "What it costs",
        ["", *(header[index + 1] for index in keep)],
        [(name, [cells[index] for index in keep]) for name, cells in rows],
        note,
    )


def _table_of_metrics(title: str, parts: Mapping[str, Mapping], note: str = "") -> ReportTable:
    keep = [(key, label) for key, label in _SLICED if any(key in metrics for metrics in parts.values())]
    shows = [(lambda value: f"{value:,.0f}") if key == "num_tokens" else format_value for key, _ in keep]
    values = {name: [metrics.get(key) for key, _ in keep] for name, metrics in parts.items()}
    return ReportTable(title, ["", *(label for _, label in keep)], _columns(values, [None] * len(keep), shows), note)


def _slices(report: EvaluationReport) -> ReportTable:
    note = "Targets are rare, middle or common by how often they occur in the validation data."
    return _table_of_metrics(
        f"Parts of the test data, {report.model}", report.contenders[report.model]["slices"], note
    )


def _corruption(report: EvaluationReport) -> ReportTable | None:
    found = report.contenders[report.model].get("corruption")
    if not found:
        return None
    names = {"clean": "as it is", "eos": "end of sequence", "random": "random tokens"}
    parts = {}
    for condition in found["conditions"]:
        rate = f", {100 * condition['rate']:g} %" if condition["rate"] else ""
        parts[names.get(condition["kind"], condition["kind"]) + rate] = condition["metrics"]
    return _table_of_metrics(f"Contexts with tokens replaced, {report.model}", parts)


def _readouts(report: EvaluationReport) -> ReportTable | None:
    found = report.contenders[report.model].get("readouts")
    if not found:
        return None
    rows = {
        "as the model answers": found["untouched"],
        f"{found['test']['readout'].replace('_', ' ')}, T {found['test']['temperature']:g}": found["test"],
    }
    keys = ("nll", "expected_calibration_error", "cvar_nll")
    values = {name: [row[key] for key in keys] for name, row in rows.items()}
    note = "Chosen on the validation data by the mean rank in the three; the numbers are of the test data."
    table = _columns(values, [True] * 3, [format_value] * 3)
    return ReportTable("Ways to join the samples", ["", "NLL", "ECE", "NLL of the worst 5 %"], table, note)


def page_tables(report: EvaluationReport) -> dict[str, list[ReportTable]]:
    """The tables of the page, by the heading that they stand under."""
    windows = [_other_texts(report, length) for length in report.configuration["windows"]]
    sections = {
        "In numbers": [_metrics(report), _slices(report)],
        "Cost and quality": [_costs(report)],
        "Answering only where it is certain enough": [_error_detection(report), _policies(report)],
        "In and out of its domain": windows,
        "Corrupted contexts": [_corruption(report)],
        "Ways to join the samples": [_readouts(report)],
    }
    return {heading: [table for table in tables if table is not None] for heading, tables in sections.items()}


def report_tables(report: EvaluationReport) -> list[Group]:
    """What the terminal shows."""
    lengths = list(report.configuration["windows"])
    middle = min(lengths, key=lambda length: abs(int(length) - 8), default=None)
    tables = [
        _summary(report),
        _other_texts(report, middle) if middle else None,
        _policies(report),
        _costs(report),
    ]
    groups = [_rich(table) for table in tables if table is not None]
    notes = [Padding(Text(note), (0, 0, 0, 0)) for note in report.notes]
    return [*groups, Group(*notes)]


def _rich(table: ReportTable) -> Group:
    drawn = Table(box=None, pad_edge=False, header_style="dim")
    for index, column in enumerate(table.header):
        drawn.add_column(column, justify="left" if index == 0 else "right", no_wrap=index == 0)
    for label, cells in table.rows:
        drawn.add_row(Text(label), *(Text(cell.text, "bold" if cell.best else "") for cell in cells))
    parts = [Text(table.title, "bold"), drawn]
    return Group(*parts, *([Text(table.note, "dim")] if table.note else []))
