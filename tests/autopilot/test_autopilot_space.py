import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from searches import recipe_content, write

from hf_variational.autopilot import load_space, seconds_of
from hf_variational.autopilot.dimensions import Choices, Gate, Halving, Range
from hf_variational.autopilot.objective import gated
from hf_variational.autopilot.space import recipe_with

WEIGHT = "arguments.kl_weight"


@pytest.fixture
def content(tmp_path):
    return recipe_content(tmp_path)


def load(tmp_path, content, space):
    return load_space(write(tmp_path / "space.yaml", space), content)


def test_a_space_is_what_its_file_says(tmp_path, content):
    space = load(
        tmp_path,
        content,
        {
            WEIGHT: {"low": 1e-5, "high": 1e-2, "log": True},
            "model.variational_layers": {"choices": [[0], [0, 1]]},
            "model.eve": {"choices": [None, {"scale": "input"}]},
            "gates": {"eval_mutual_information": {"min": 0.001}, "eval_kl": {"max": 3}},
            "halving": {"min_steps": 4},
        },
    )
    assert space.dimensions[0] == Range(WEIGHT, 1e-5, 1e-2, log=True)
    assert space.dimensions[1].labels == ["[0]", "[0, 1]"] and space.dimensions[1].value("[0, 1]") == [0, 1]
    assert space.dimensions[2].value("null") is None
    assert space.gates == (Gate("eval_mutual_information", least=0.001), Gate("eval_kl", most=3))
    assert space.halving == Halving(4, 3)


def test_whole_numbers_are_searched_where_the_recipe_takes_no_others(tmp_path, content):
    spec = {"low": 1, "high": 4}
    space = load(tmp_path, content, {"arguments.warmup_steps": spec, "arguments.free_bits": spec})
    by_key = {dimension.key: dimension for dimension in space.dimensions}
    assert not by_key["arguments.free_bits"].whole
    assert load(tmp_path, content, {"arguments.kl_cycles": spec}).dimensions[0].whole
    assert load(tmp_path, content, {"model.hidden_size": {"low": 8, "high": 32, "step": 8}}).dimensions[0].whole


def test_a_nested_key_of_a_value_that_is_a_mapping_is_set(content):
    recipe = recipe_with(content, {"arguments.optim_args": "a=1", "arguments.lr_scheduler_kwargs.num_cycles": 0.25})
    assert recipe.arguments["lr_scheduler_kwargs"] == {"num_cycles": 0.25}
    assert "lr_scheduler_kwargs" not in content["arguments"], "the content stays as it was"


def test_keys_of_the_band_and_its_controls(tmp_path, content):
    content["arguments"]["regime"] = {"band": {"target": 1.0}, "homeostasis": {"warmup_steps": 1}}
    target, eta, warmup = "band.target", "homeostasis.eta", "homeostasis.warmup_steps"
    space = {
        f"arguments.regime.{target}": {"low": 1, "high": 3},
        f"arguments.regime.{eta}": {"low": 0.1, "high": 0.5},
        f"arguments.regime.{warmup}": {"low": 1, "high": 9},
    }
    assert [dimension.whole for dimension in load(tmp_path, content, space).dimensions] == [False, False, True]
    with pytest.raises(ValueError, match=r"traget.*did you mean 'target'"):
        load(tmp_path, content, {"arguments.regime.band.traget": {"low": 1.0, "high": 3.0}})


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "nothing to search"),
        ({"gates": {"eval_kl": {"max": 1}}}, "nothing to search"),
        ({"arguments.kl_wieght": {"low": 0.1, "high": 1.0}}, "kl_wieght.*did you mean 'kl_weight'"),
        ({"argument.kl_weight": {"low": 0.1, "high": 1.0}}, "'argument'.*did you mean 'arguments'"),
        ({"model.eve.priro": {"choices": ["standard"]}}, "priro.*did you mean 'prior'"),
        ({WEIGHT: {"low": 0.1, "high": 1.0}, "gate": {}}, "'gate'.*did you mean 'gates'"),
        ({WEIGHT: {"low": 1.0, "high": 1.0}}, "kl_weight has the empty range from 1.0 to 1.0"),
        ({WEIGHT: {"low": 1.0, "high": 0.1}}, "empty range from 1.0 to 0.1"),
        ({WEIGHT: {"choices": []}}, "empty range"),
        ({WEIGHT: {"choices": [0.1, 0.1]}}, "the choice 0.1 twice"),
        ({WEIGHT: {"low": 0.1}}, "no `high`"),
        ({WEIGHT: {"low": 0.1, "hihg": 1.0}}, "'hihg'.*did you mean 'high'"),
        ({WEIGHT: 0.1}, "write {low: ..., high: ...}"),
        ({WEIGHT: {"low": 0.0, "high": 1.0, "log": True}}, "begins above 0"),
        ({WEIGHT: {"low": 0.1, "high": 1.0, "step": 2.0}}, "`step` is above 0 and at most 0.9"),
        ({WEIGHT: {"low": 0.1, "high": 1.0, "step": 0.1, "log": True}}, "do not go together"),
        ({WEIGHT: {"low": "a", "high": 1.0}}, "`low` is a number, got 'a'"),
        ({WEIGHT: {"low": -1.0, "high": 1.0}}, "-1.0 cannot be: `kl_weight` is a number in"),
        ({"arguments.kl_schedule": {"choices": ["constant", "slow"]}}, "kl_schedule='slow' is unknown"),
        ({"model.hidden_size": {"choices": ["large"]}}, "`hidden_size` is int, got 'large'"),
        ({"arguments.seed": {"low": 0, "high": 9}}, "arguments.seed cannot be searched: the last rung"),
        ({"tokenizer.vocab_size": {"choices": [300, 400]}}, "could not be compared"),
        ({"data.block_size": {"choices": [8, 16]}}, "could not be compared"),
        ({"model.eve": {"choices": [None]}, "model.eve.prior": {"choices": ["standard"]}}, "a part of model.eve"),
        ({WEIGHT: {"low": 0.1, "high": 1.0}, "gates": {"nll": {"min": 1}}}, "begin with eval_"),
        ({WEIGHT: {"low": 0.1, "high": 1.0}, "gates": {"eval_nll": {}}}, "write {min: ...}, {max: ...}"),
        ({WEIGHT: {"low": 0.1, "high": 1.0}, "gates": {"eval_nll": {"min": 2, "max": 1}}}, "empty range from 2 to 1"),
        ({WEIGHT: {"low": 0.1, "high": 1.0}, "halving": {"factor": 1}}, "`factor` is a whole number of at least 2"),
    ],
)
def test_what_cannot_be_searched_is_named(tmp_path, content, space, message):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, content, space)


def test_a_key_that_stands_twice_is_refused(tmp_path, content):
    file = tmp_path / "space.yaml"
    file.write_text(f"{WEIGHT}: {{low: 0.1, high: 1.0}}\n{WEIGHT}: {{low: 0.2, high: 1.0}}\n")
    with pytest.raises(ValueError, match="stands twice"):
        load_space(file, content)


@pytest.mark.parametrize(
    ("gate", "value", "violation"),
    [
        (Gate("m", least=0.5), 0.5, 0.0),
        (Gate("m", least=0.5), 0.4, 0.2),
        (Gate("m", most=2.0), 3.0, 0.5),
        (Gate("m", least=0.0), -0.3, 0.3),
        (Gate("m", least=-1.0, most=1.0), 0.0, 0.0),
        (Gate("m", least=-1.0, most=1.0), -2.0, 1.0),
        (Gate("m", most=1.0), math.nan, math.inf),
    ],
)
def test_a_violation_is_a_share_of_the_bound(gate, value, violation):
    assert gate.violation({"m": value}) == pytest.approx(violation)


positive = st.floats(1e-6, 1e6)


@given(nll=positive, other=positive, missed=positive, more=positive)
def test_a_missed_gate_is_worse_than_any_nll(nll, other, missed, more):
    assert gated(nll, {"a": 0.0}) <= gated(other, {"a": missed})
    assert (gated(nll, {}) <= gated(other, {})) or nll > other
    assert gated(nll, {"a": missed}) <= gated(nll, {"a": missed, "b": more})
    assert gated(nll, {"a": math.inf}) < math.inf, "Optuna takes no infinite value"


@pytest.mark.parametrize(
    ("text", "seconds"), [("2h", 7200), ("90m", 5400), ("30s", 30), ("1h30m", 5400), ("1.5h", 5400)]
)
def test_times(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["2", "h", "2 h", "-1h", "0s", "2x", ""])
def test_what_is_no_time(text):
    with pytest.raises(ValueError, match="is no time"):
        seconds_of(text)


def test_choices_are_copies():
    choices = Choices("model.variational_layers", ([0],))
    choices.value("[0]").append(1)
    assert choices.value("[0]") == [0]
