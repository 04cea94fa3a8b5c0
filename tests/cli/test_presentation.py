"""The page, the terminal and the plots, from hand-made measures."""

import html as html_module
import io
import json
import re
from html.parser import HTMLParser

import pytest
import torch
from rich.console import Console

from hf_variational import PredictiveMeasures
from hf_variational.presentation.html import render_page, write_page
from hf_variational.presentation.measures import MEASURES
from hf_variational.presentation.plots import Curve, Reliability, smoothed, training_and_calibration
from hf_variational.presentation.terminal import RAMP, colour, comparison_table, panel
from hf_variational.presentation.tokens import annotate

HOSTILE = "</script><script>alert(1)</script> & 日\n\n  \"quoted\" 'x' \x1b[31m <!--"


@pytest.fixture
def passage(tokenizer):
    ids = [*tokenizer(HOSTILE).input_ids, tokenizer.eos_token_id]
    generator = torch.Generator().manual_seed(0)
    values = {m.name: torch.rand(1, len(ids), generator=generator) * 0.2 for m in MEASURES}
    values["predictive_entropy"] += 1
    return annotate(tokenizer, tokenizer("<i>prompt</i> ").input_ids, ids, PredictiveMeasures(**values), title="a & b")


class Reader(HTMLParser):
    """Collects the text and attributes of the token spans, and every tag."""

    def __init__(self):
        super().__init__()
        self.tags, self.spans, self.depth, self.mark = [], [], 0, False

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag == "span":
            classes = (attributes.get("class") or "").split()
            if "t" in classes:
                self.spans.append([attributes, ""])
                self.depth = 1
            elif self.depth:
                self.depth, self.mark = self.depth + 1, True

    def handle_endtag(self, tag):
        if tag == "span" and self.depth:
            self.depth, self.mark = self.depth - 1, False

    def handle_data(self, data):
        if self.depth and not self.mark:
            self.spans[-1][1] += data


def read(page):
    reader = Reader()
    reader.feed(page)
    return reader


def test_the_page_shows_exactly_the_generated_text(passage):
    spans = read(render_page([passage])).spans
    visible = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in HOSTILE)
    assert "".join(text for _, text in spans) == visible + "<|end|>"
    assert len(spans) == len(passage.chunks)


def test_every_token_shows_every_measure_on_hover(passage):
    reader = read(render_page([passage]))
    for (attributes, _), chunk in zip(reader.spans, passage.chunks, strict=True):
        assert attributes["title"].startswith(repr(chunk.text))
        for m in MEASURES:
            assert attributes["title"].count(m.label + ":") == len(chunk.tokens)
        assert 0 <= float(re.fullmatch(r"--v:([\d.]+)", attributes["style"])[1]) <= 1


def test_the_scripts_data_holds_every_token(passage):
    page = render_page([passage])
    data = json.loads(re.search(r"const page = (.*?);\n", page)[1])
    assert [t["id"] for chunk in data["chunks"] for t in chunk] == [t.id for t in passage.tokens]
    assert [m["name"] for m in data["measures"]] == [m.name for m in MEASURES]
    for chunk, expected in zip(data["chunks"], passage.chunks, strict=True):
        for token, original in zip(chunk, expected.tokens, strict=True):
            assert token["values"]["mutual_information"] == pytest.approx(
                original.value("mutual_information"), rel=1e-5
            )


def test_text_cannot_become_markup_and_nothing_is_fetched(passage):
    page = render_page([passage], title="<b>", facts={"model": "<img src=x>"})
    reader = read(page)
    tags = [tag for tag, _ in reader.tags]
    assert tags.count("script") == 1 and not {"b", "i", "img", "link", "iframe"} & set(tags)
    assert not [a for _, attributes in reader.tags for a in attributes if a in ("src", "href") or a.startswith("on")]
    assert "http" not in page.replace('http-equiv="Content', "") and "\x1b" not in page
    assert "default-src 'none'" in html_module.unescape(page)


def test_the_page_states_its_scale_and_facts(passage):
    page = render_page([passage], facts={"posterior samples": 8}, colour_by="predictive_entropy")
    assert "posterior samples" in page and '<option value="predictive_entropy" selected>' in page
    assert "1.50 nats" in page and "prefers-color-scheme: dark" in page


def test_a_page_without_uncertainty_is_refused(tokenizer, tmp_path):
    plain = annotate(tokenizer, [], tokenizer("used").input_ids)
    with pytest.raises(ValueError, match="num_posterior_samples"):
        write_page(tmp_path / "page.html", [plain])
    assert not (tmp_path / "page.html").exists()


def printed(renderable, **options):
    console = Console(file=io.StringIO(), width=100, **options)
    console.print(renderable)
    return console.file.getvalue()


def test_the_panel_in_colour_and_without(passage):
    coloured = printed(panel(passage), force_terminal=True, color_system="truecolor", legacy_windows=False)
    assert "\x1b[38;2;" in coloured and "\x1b[31m" not in coloured
    plain = printed(panel(passage))
    assert "\x1b" not in plain
    assert "mutual information  0" in plain and "nats" in plain and "of the predictive entropy" in plain
    assert "↵" in plain and "日" in plain


def test_a_panel_without_measures_is_just_the_text(tokenizer):
    shown = printed(panel(annotate(tokenizer, tokenizer("The ").input_ids, tokenizer("used to").input_ids)))
    assert "The used to" in shown and "nats" not in shown


def contrast(style):
    def luminance(triplet):
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in triplet)]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    text, back = (luminance(c.get_truecolor()) for c in (style.color, style.bgcolor))
    return (max(text, back) + 0.05) / (min(text, back) + 0.05)


def test_text_is_readable_on_the_whole_ramp():
    assert min(contrast(colour(i / 100)) for i in range(101)) >= 4.5
    assert colour(-1) == colour(0) and colour(7) == colour(1)
    assert colour(1).bgcolor.get_truecolor() == RAMP[-1]


def test_the_better_number_is_bold_only_where_it_reads_better():
    columns = {
        "a": {"nll": 2.0, "accuracy": 0.5, "mutual_information": float("nan"), "predictive_entropy": 1.0},
        "b": {"nll": 1.0, "accuracy": 0.50001, "mutual_information": 0.1, "predictive_entropy": 2.0},
        "c": None,
    }
    lines = printed(comparison_table(columns), force_terminal=True, color_system="standard").splitlines()
    row = {line.replace("\x1b[1m", "").split("  ")[0].strip(): line for line in lines}
    assert (
        re.search(r"\x1b\[1m\s*1\.00", row["NLL (nats a token)"])
        and "\x1b[1m        2.00" not in row["NLL (nats a token)"]
    )
    assert row["accuracy"].count("\x1b[1m") == 2
    assert "\x1b[1m" not in row["predictive entropy"]
    assert "perplexity" not in row


def test_smoothing_keeps_constants_and_ends():
    assert smoothed([2.0] * 9, 5).tolist() == [2.0] * 9
    line = [float(i) for i in range(9)]
    assert smoothed(line, 5).tolist() == pytest.approx(line)


def test_the_plot_is_written_with_empty_bins_and_few_points(tmp_path):
    nan = float("nan")
    diagrams = [
        Reliability("a", [nan, 0.5, 0.9], [nan, 0.4, 0.9], [0, 50, 3], 0.1),
        Reliability("b", [nan] * 3, [nan] * 3, [0] * 3),
    ]
    curves = [Curve("a", [1, 2], [3.0, 2.0], [2], [2.5]), Curve("b", range(30), [1.0] * 30)]
    path = training_and_calibration(tmp_path / "plot.png", curves, {"in": diagrams, "out": diagrams}, "title")
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000
