"""The page and the plots of a report: its numbers, nothing from elsewhere, and pictures of what there is."""

import copy
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from report_models import Bigram, other_rows, sampled_rows

from hf_variational.baselines import Cost
from hf_variational.evaluation.report import EvaluationReport, EvaluationSettings, evaluate_model
from hf_variational.presentation.measures import format_value
from hf_variational.presentation.report import render_report, write_report
from hf_variational.presentation.report_plots import FIGURES, pareto, reliability, risk_coverage, training
from hf_variational.presentation.report_tables import page_tables, report_tables

DRAW = {name: draw for name, _, _, draw in FIGURES}


def price(model, batch, samples):
    flops = 100.0 * (samples or 1)
    return Cost(121, 121, 484, 300.0, flops, 0.1, 2**20, samples, batch["input_ids"].numel(), "cpu")


@pytest.fixture(scope="module")
def report():
    model = Bigram()
    settings = EvaluationSettings(num_resamples=20, window_lengths=(4, 8), max_windows=30, target_risk=0.5)
    curve = {"steps": [1, 2, 3], "nll": [3.0, 2.5, 2.0], "eval_steps": [3], "eval_nll": [2.1]}
    return evaluate_model(
        model,
        sampled_rows(model),
        4,
        name="<bigram> & co",
        validation=sampled_rows(model, seed=7),
        ood={"other": other_rows()},
        baselines={"quiet": Bigram(noise=0.1)},
        cost=price,
        training=curve,
        settings=settings,
        progress=False,
    )


@pytest.fixture(scope="module")
def text(report):
    return render_report(report)


@pytest.fixture(scope="module")
def with_corruption(report):
    """What a sweep of a model with posteriors adds."""
    copied = copy.deepcopy(report)
    changes = {"kl": [0.1, 0.2, 0.4], "nll": [0.5, 0.7, 0.9], "mutual_information": [0.0, 0.1, 0.1]}
    copied.curves[copied.model]["corruption"] = [
        {"kind": kind, "rate": rate, "changes": changes} for kind in ("eos", "random") for rate in (0.05, 0.3)
    ]
    correlations = {"kl": {"spearman": {"value": 1.0, "interval": None}}}
    copied.contenders[copied.model]["corruption"] = {
        "conditions": [{"kind": "clean", "rate": 0.0, "metrics": {"nll": 2.0}}],
        "correlations": {"eos": correlations},
    }
    return copied


class Page(HTMLParser):
    """Links and text of a page, and whether its tags close."""

    VOID = {"meta", "link", "br", "img", "input", "hr"}

    def __init__(self, text):
        super().__init__()
        self.links, self.words, self.open, self.tags = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name.split(":")[-1] in ("href", "src", "srcset", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


# ---- The page ----


def test_the_page_needs_nothing_from_elsewhere(text):
    page = Page(text)
    assert not page.open
    assert page.links and all(link.startswith("#") for link in page.links)
    assert set(re.findall(r"https?://[^\s\"'<>]+", text)) == {
        "http://www.w3.org/1999/xlink",
        "http://www.w3.org/2000/svg",
    }, "names of namespaces, which nobody loads"
    assert "url(" not in re.sub(r"url\(#", "", text) and "@import" not in text
    assert not {"script", "iframe", "object", "link", "img"} & set(page.tags)
    assert "default-src 'none'" in text and "prefers-color-scheme: dark" in text


def test_pictures_of_one_page_do_not_share_names(text):
    names = re.findall(r'\bid="([^"]+)"', text)
    assert len(names) == len(set(names))
    used = set(re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', text))
    assert used and used <= set(names)


def test_pictures_take_the_colours_of_the_page(report, text):
    pictures = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert text.count("<svg") == len([draw for draw in DRAW.values() if draw(report) is not None])
    assert "var(--ink)" in pictures and "#2a2c33" not in pictures and "#ffffff" not in pictures


def test_the_page_has_the_numbers_and_the_names_escaped(report, text):
    words = " ".join(Page(text).words)
    assert "<bigram>" not in text.replace("&lt;bigram&gt;", "")
    assert "Evaluation of <bigram> & co" in words
    for name in report.contenders:
        assert format_value(report.value(name, "quality", "nll")) in words
        low, high = report.interval(name, "quality", "nll")
        assert f"[{format_value(low)} to {format_value(high)}]" in words
    assert all(note in words for note in report.notes)


def test_the_page_is_the_same_twice(report, text):
    assert text == render_report(EvaluationReport.from_json(report.to_json()))


# ---- Tables ----


def test_the_best_of_a_row_is_marked(report):
    metrics = page_tables(report)["In numbers"][0]
    cells = dict(metrics.rows)
    for label, less in (("NLL, nats a token", True), ("accuracy", False)):
        key = "nll" if less else "accuracy"
        values = [report.value(name, "quality", key) for name in report.contenders]
        shown = [format_value(value) for value in values]
        best = format_value(min(values) if less else max(values))
        assert [cell.best for cell in cells[label]] == [text == best for text in shown]
    assert not any(cell.best for cell in cells["mutual information, nats"])


def test_the_costs_are_those_that_were_measured(report):
    (table,) = page_tables(report)["Cost and quality"]
    cells = {label: [cell.text for cell in row] for label, row in table.rows}
    assert cells["quiet"][:4] == ["4", "121", "300", "400"]
    assert cells["mean pass"][:4] == ["0", "121", "300", "100"]
    assert "tokens trained on" not in table.header and "Nobody recorded" in table.note


def test_what_the_terminal_shows(report):
    import io

    from rich.console import Console

    out = io.StringIO()
    for table in report_tables(report):
        Console(file=out, width=140).print(table)
    text = out.getvalue()
    assert format_value(report.value("quiet", "quality", "expected_calibration_error")) in text
    assert "AUROC of windows of 8 tokens" in text and "One seed (0)" in text and "What it costs" in text


# ---- Plots ----


def test_the_files_are_pictures_and_old_ones_go(report, text, with_corruption, tmp_path):
    (tmp_path / "corruption.png").write_bytes(b"of an earlier report")
    page = write_report(report, tmp_path)
    assert page.read_text() == text
    written = {path.stem for path in tmp_path.glob("*.png")}
    assert written == set(DRAW) - {"corruption"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.glob("*.png"))
    write_report(with_corruption, tmp_path)
    assert (tmp_path / "corruption.png").is_file()


def test_a_reliability_diagram_for_each_contender(report):
    figure = reliability(report)
    titles = [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")]
    error = report.value("quiet", "quality", "expected_calibration_error")
    assert len(titles) == len(report.contenders) and f"quiet\nECE {error:.3f}" in titles


def test_the_curves_are_the_numbers(report):
    axes = risk_coverage(report).axes[0]
    lines = {line.get_label(): line for line in axes.get_lines()}
    found = report.curves[report.model]["risk_coverage"]["token"]
    assert np.array_equal(lines["mutual information"].get_ydata(), found["risk"]["mutual_information"])
    assert np.array_equal(lines["oracle"].get_ydata(), found["oracle"])
    assert np.all(np.asarray(found["oracle"]) <= np.asarray(found["risk"]["mutual_information"]) + 1e-12)
    assert found["risk"]["mutual_information"][-1] == pytest.approx(
        1 - report.value(report.model, "quality", "accuracy")
    )


def test_cost_against_quality_has_a_mark_for_each_contender(report):
    axes = pareto(report).axes[0]
    marks = {line.get_label(): line for line in axes.get_lines() if not line.get_label().startswith("_")}
    assert set(marks) == set(report.contenders)
    assert marks["quiet"].get_ydata()[0] == report.value("quiet", "quality", "nll")
    # those of the same cost stand beside each other
    assert len({float(line.get_xdata()[0]) for line in marks.values()}) == len(marks)


def test_training_curves_of_what_was_logged(report):
    axes = training(report).axes[0]
    assert axes.get_lines()[0].get_ydata().tolist() == [3.0, 2.5, 2.0]
    assert axes.get_lines()[1].get_ydata() == [2.1]


def test_corruption_has_a_point_for_each_document_and_rate(with_corruption):
    figure = DRAW["corruption"](with_corruption)
    assert len(figure.axes) == 4
    first = figure.axes[0]
    assert [len(points.get_offsets()) for points in first.collections] == [3, 3]
    assert "rank correlation 1.00" in first.get_xlabel()


@pytest.mark.parametrize("name", list(DRAW))
def test_no_words_lie_over_others(with_corruption, name):
    figure = DRAW[name](with_corruption)
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    words = []
    for axes in figure.axes:
        axis_labels = [axes.xaxis.label, axes.yaxis.label, axes.title, axes._left_title]
        words += [text for text in axis_labels if text.get_text()]
        words += [text for axis in (axes.xaxis, axes.yaxis) for text in axis.get_ticklabels() if _shown(axis, text)]
    words += [text for text in figure.texts if text.get_text()]
    boxes = [text.get_window_extent(renderer).shrunk(0.9, 0.7) for text in words]
    for index, box in enumerate(boxes):
        hidden = [words[place].get_text() for place in range(index) if boxes[place].overlaps(box)]
        assert not hidden, f"{words[index].get_text()!r} lies over {hidden}"


def _shown(axis, text):
    if not text.get_text() or not text.get_visible():
        return False
    low, high = sorted(axis.get_view_interval())
    place = text.get_position()[0 if axis.axis_name == "x" else 1]
    return low - 1e-9 <= place <= high + 1e-9


def test_a_report_without_windows_costs_and_log_has_the_rest():
    model = Bigram(variational=False)
    report = evaluate_model(
        model,
        sampled_rows(model),
        name="plain",
        validation=sampled_rows(model, seed=7),
        settings=EvaluationSettings(num_resamples=5),
        progress=False,
    )
    drawn = {name for name, draw in DRAW.items() if draw(report) is not None}
    assert drawn == {"reliability", "risk_coverage"}
    assert "Corrupted contexts" not in render_report(report)
