"""The page of an inspection: every section that there are numbers for, offline, whatever the numbers are."""

import math
import re

import pytest
import torch
from inspected_models import UNITS, data, dirichlet, gpt

from hf_variational.diagnostics import Band, Diagnostics, LayerDiagnostics, diagnose, drift
from hf_variational.presentation.inspect_page import render_inspection, write_inspection
from hf_variational.presentation.inspect_plots import histograms, histograms_of, map_of_heads, map_of_units, states

HEADINGS = ("Layers", "Units in trouble", "Distributions over units", "Map of the units", "Shares", "Attention heads")


def inspected(model, band=None, rows=None, **options):
    return diagnose(model, data() if rows is None else rows, band, num_posterior_samples=0, progress=False, **options)


def made(layers, **facts):
    """Diagnostics of given layers."""
    given = {"model": "made", "data": "up", "num_posterior_samples": 1, "seed": 0, "sequences": 1, "tokens": 9}
    return Diagnostics(**{**given, **facts}, kl_weight=1.0, layers=layers)


def layer(values, dead=(), exploding=(), band=None):
    values = torch.as_tensor(values, dtype=torch.float32)
    marks = torch.zeros(2, len(values), dtype=torch.bool)
    marks[0, list(dead)], marks[1, list(exploding)] = True, True
    return LayerDiagnostics(values, values, values, values, *marks, band=band)


def headings(page):
    return re.findall(r"<h2>(.*?)</h2>", page)


def test_sections_are_those_that_there_are_numbers_for():
    units, heads = inspected(gpt()), inspected(gpt(attention=dirichlet()))
    assert headings(render_inspection(units)) == list(HEADINGS[:-1])
    assert headings(render_inspection(heads)) == list(HEADINGS)
    page = render_inspection(heads, drift(heads, heads))
    assert headings(page) == [*HEADINGS, "Drift"] and "Drift is from" in page
    alone = Diagnostics.from_dict({**heads.to_dict(), "layers": {}})
    assert headings(render_inspection(alone)) == ["Layers", "Attention heads"]


def test_the_numbers_of_the_table_are_on_the_page():
    found = inspected(gpt(), Band.homogeneous(0.1, UNITS, 0.5, 2.0), name="<b>ours</b>", data_name="a & b")
    page = render_inspection(found)
    for row in found.table().splitlines()[1:4]:
        for cell in re.split(r"\s{2,}", row)[1:]:
            assert f"<td>{cell}</td>" in page
    assert "Inside &lt;b&gt;ours&lt;/b&gt;" in page and "a &amp; b" in page and "<b>ours" not in page
    assert "No unit is dead and none explodes" in page


def test_units_in_trouble_are_named_and_a_long_list_is_cut():
    found = made({3: layer(torch.ones(64), dead=range(30), exploding=[40])})
    page = render_inspection(found)
    assert "18, 19 and 10 more</td>" in page and "<td>40</td>" in page
    assert "dead in layer 3: 0, 1, 2" in found.table() and "exploding in layer 3: 40" in found.table()


def test_the_page_needs_nothing_from_elsewhere(tmp_path):
    path = write_inspection(tmp_path / "page.html", inspected(gpt(attention=dirichlet())))
    page = path.read_text(encoding="utf-8")
    assert "<script" not in page and "://" not in re.sub(r'xmlns\S*="[^"]*"', "", page)
    assert not re.search(r'(src|href)="(?!#|data:)', page)
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]
    # Of images the identifier is their hash, and two of the same are the same.
    identifiers = re.findall(r'\bid="(?!\w+-image)([^"]+)"', page)
    assert len(identifiers) == len(set(identifiers))


@pytest.mark.parametrize(
    "values",
    [
        torch.zeros(5),
        torch.full((5,), 0.3),
        torch.tensor([0.0, 1e-30, 1.0, 1e30, 2.0]),
        torch.tensor([math.nan, math.inf, 1.0, 2.0, 3.0]),
        torch.full((5,), math.nan),
        torch.tensor([2.0]),
    ],
    ids=["zeros", "all alike", "far apart", "not finite", "nothing finite", "one unit"],
)
def test_any_numbers_can_be_drawn(values):
    found = made({0: layer(values), 7: layer(values.flip(0))})
    for draw in (histograms, map_of_units, states):
        draw(found).canvas.draw()
    assert headings(render_inspection(found, drift(found, found)))[-1] == "Drift"


def test_every_unit_is_in_its_histogram():
    values = torch.tensor([1e-9, 1e-3, 0.1, 0.2, 5.0, 5.0, 1e4])
    figure = histograms(made({0: layer(values)}))
    for axes in figure.axes:
        (filled, _) = axes.patches[-2:]
        heights = filled.get_data().values - filled.get_data().baseline
        # The fullest bin has two units and is drawn 0.85 high.
        assert heights.sum() / 0.85 * 2 == pytest.approx(len(values))


def test_the_band_is_shaded_and_a_heterogeneous_one_is_relative():
    same, spread = Band.homogeneous(0.1, 4, 0.5, 2.0), Band.heterogeneous(0.1, 4, 0.5, 2.0, spread=5.0)
    for band, label in ((same, "mean energy μ²"), (spread, "mean energy μ² / its target")):
        figure = histograms_of(
            {"this": layer(torch.rand(4) + 0.1, band=band), "that": layer(torch.rand(4), band=band)}
        )
        assert [axes.get_xlabel() for axes in figure.axes] == ["KL, nats a token", "σ", label]
        assert len(figure.axes[2].collections) == 2 and not figure.axes[0].collections
        assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["this", "that"]


def test_wide_layers_are_blocks_and_small_ones_rows():
    for units, shape in ((300, (3, 128)), (20, (1, 20))):
        figure = map_of_units(made({0: layer(torch.rand(units), dead=[units - 1])}))
        image = figure.axes[0].images[0].get_array()
        assert image.shape == shape and image.count() == units
        (mark,) = figure.axes[0].collections[0].get_offsets().tolist()
        assert mark == [(units - 1) % 128, (units - 1) // 128]


def test_heads_are_cells():
    figure = map_of_heads(inspected(gpt(attention=dirichlet())))
    assert [axes.images[0].get_array().shape for axes in figure.axes[:4]] == [(3, 2)] * 4
    assert map_of_heads(inspected(gpt())) is None


def test_words_do_not_lie_over_words():
    """Of every picture of a page with much on it: tick labels, axis labels and legends."""
    band = Band.homogeneous(0.1, UNITS, 0.5, 2.0)
    found = inspected(gpt(attention=dirichlet()), band)
    for draw in (histograms, map_of_units, states, map_of_heads):
        figure = draw(found)
        figure.canvas.draw()
        boxes = []
        for axes in figure.axes:
            texts = [*axes.get_xticklabels(), *axes.get_yticklabels(), axes.xaxis.label, axes.yaxis.label]
            texts += axes.get_legend().get_texts() if axes.get_legend() else []
            limits = axes.get_window_extent().expanded(1.02, 1.02)
            for text in texts:
                box = text.get_window_extent()
                inside = text not in axes.get_xticklabels() or limits.x0 <= (box.x0 + box.x1) / 2 <= limits.x1
                if text.get_text() and text.get_visible() and inside:
                    boxes.append((text.get_text(), box))
        for index, (name, box) in enumerate(boxes):
            for other, second in boxes[index + 1 :]:
                assert not box.overlaps(second), f"{draw.__name__}: {name!r} over {other!r}"
