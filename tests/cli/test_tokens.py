"""Tokens become text without breaking characters, and keep their measures."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_variational import PredictiveMeasures
from hf_variational.presentation.measures import MEASURES, format_value, measure, nice_maximum, scale_maximum
from hf_variational.presentation.tokens import annotate, chunks_of


def uncertainty(count, rows=1, first=0.0):
    values = first + torch.arange(rows * count, dtype=torch.float32).view(rows, count) / 100
    return PredictiveMeasures(**{m.name: values + i for i, m in enumerate(MEASURES)})


@pytest.mark.parametrize(
    "text",
    ["plain words", "naïve café — 日本語", "emoji 🦊🧪!", "tabs\tand\n\n  indents\n", " leading", "<b>&amp;</b>"],
)
def test_the_texts_of_the_chunks_join_to_the_text(tokenizer, text):
    context = tokenizer("The with statement").input_ids
    ids = tokenizer(text).input_ids
    chunks = list(chunks_of(tokenizer, context, ids))
    assert "".join(t for t, _ in chunks) == text
    assert [p for _, positions in chunks for p in positions] == list(range(len(ids)))
    assert all("\ufffd" not in t for t, _ in chunks)


def test_tokens_of_one_character_share_a_chunk(tokenizer):
    ids = tokenizer("日本").input_ids
    assert len(ids) == 6
    chunks = list(chunks_of(tokenizer, [], ids))
    assert chunks == [("日", [0, 1, 2]), ("本", [3, 4, 5])]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_tokens_are_shown_once_and_in_order(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), min_size=1, max_size=24))
    chunks = list(chunks_of(tokenizer, tokenizer("The").input_ids, ids))
    assert [p for _, positions in chunks for p in positions] == list(range(len(ids)))
    assert all(positions for _, positions in chunks)


def test_a_row_ends_with_its_end_of_text_token(tokenizer):
    end = tokenizer.eos_token_id
    ids = [*tokenizer("used to").input_ids, end, end, end]
    passage = annotate(tokenizer, tokenizer("The ").input_ids, ids, uncertainty(len(ids)))
    assert passage.text == "used to" and passage.prompt == "The "
    assert passage.chunks[-1].special and len(passage.tokens) == len(ids) - 2


def test_measures_stay_with_their_tokens(tokenizer):
    ids = tokenizer("日 used").input_ids
    measures = uncertainty(len(ids), rows=2)
    passage = annotate(tokenizer, [], ids, measures, row=1)
    for i, token in enumerate(passage.tokens):
        assert token.id == ids[i]
        for m in MEASURES:
            assert token.value(m.name) == pytest.approx(float(getattr(measures, m.name)[1, i]))
    first = passage.chunks[0]
    assert first.value("mutual_information") == max(t.value("mutual_information") for t in first.tokens)
    assert len(passage.to_dict()["tokens"]) == len(ids)
    assert "".join(t["text"] for t in passage.to_dict()["tokens"]) == "日 used"


def test_nan_is_none_in_json_and_left_out_of_means(tokenizer):
    ids = tokenizer("used").input_ids
    measures = uncertainty(len(ids))
    measures.token_variance[:] = math.nan
    passage = annotate(tokenizer, [], ids, measures)
    assert passage.to_dict()["tokens"][0]["token_variance"] is None
    assert math.isnan(passage.mean("token_variance"))


def test_without_uncertainty_there_are_no_measures(tokenizer):
    passage = annotate(tokenizer, [], tokenizer("used").input_ids)
    assert not passage.has_measures and set(passage.to_dict()["tokens"][0]) == {"id", "piece", "text"}


def test_uncertainty_of_another_call_is_refused(tokenizer):
    with pytest.raises(ValueError, match="2 values for"):
        annotate(tokenizer, [], tokenizer("used to wrap").input_ids, uncertainty(2))


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0"),
        (0.012345, "0.0123"),
        (3.14159, "3.14"),
        (1234.5, "1234"),
        (1e-6, "1.0e-06"),
        (math.nan, "–"),
        (None, "–"),
    ],
)
def test_format_value(value, shown):
    assert format_value(value) == shown


@given(st.floats(1e-12, 1e12))
def test_the_scale_reaches_the_largest_value_and_not_twice_as_far(value):
    assert value * (1 - 1e-6) <= nice_maximum(value) <= value * 1.67


def test_scales():
    assert scale_maximum("mutual_information", [0.01, math.nan, 0.14]) == 0.15
    assert scale_maximum("top1_flip_rate", [0.1]) == 1.0
    assert scale_maximum("mutual_information", []) == 1.0
    with pytest.raises(ValueError, match="'entropy'.*mutual_information"):
        measure("entropy")
