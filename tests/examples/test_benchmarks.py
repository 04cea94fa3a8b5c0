"""The benchmarks run at toy size and say what they promise to say; what they measure there means nothing."""

import json
import re
from pathlib import Path

import pytest

import hf_variational.modeling.predictive as predictive
import hf_variational.modeling.readout as readout


@pytest.mark.parametrize(("script", "baseline"), [("training_step", "twin"), ("generation", "twin, plain greedy")])
def test_times(load, script, baseline, capsys):
    main = load(script).main
    result = main(["--tiny", "--rounds", "1"])
    printed = capsys.readouterr().out
    assert baseline in printed
    rows = result["rows"]
    assert rows["baseline"]["cpu"]["wall_seconds"] > 0
    for row in rows.values():
        low, high = row["cpu"]["wall_ratio_range"]
        assert 0 < low <= row["cpu"]["wall_ratio"] <= high
    if result["machine"]["accelerator"] is None:
        assert "not measured" in printed
        assert all(row["accelerator"] is None for row in rows.values())


def test_the_cost_of_regime_control(load, capsys):
    rows = load("regime_control").main(["--tiny", "--rounds", "1"])["rows"]
    assert {"baseline", "homeostasis", "all of it", "all of it, a control step"} <= set(rows)
    assert all(row["cpu"]["wall_ratio"] > 0 for row in rows.values())
    assert "interval: 5 steps" in capsys.readouterr().out


def test_the_recovery_of_units(load, capsys):
    rows = load("regime_recovery").main(["--tiny"])["rows"]
    assert list(rows) == ["homeostasis, collapsed", "homeostasis, exploding", "thermostat"]
    (collapsed,), (exploding,) = rows["homeostasis, collapsed"], rows["homeostasis, exploding"]
    assert collapsed["without"]["inside"] == exploding["without"]["inside"] == 0 < collapsed["with"]["nll"]
    assert "NLL with / without" in capsys.readouterr().out


def test_the_time_of_a_report(load, capsys):
    rows = load("evaluation_time").main(["--tiny", "--rounds", "1"])["rows"]
    assert list(rows) == ["baseline", "one pass of 8 samples", "evaluate_model", "evaluate_model, internal=False"]
    assert all(row["cpu"]["wall_ratio"] > 0 for row in rows.values())
    assert "8 passes of one sample" in capsys.readouterr().out


def test_costs_of_a_retrofit(load, capsys):
    result = load("retrofit_cost").main(["--tiny", "--rounds", "1"])
    printed = capsys.readouterr().out
    assert "stock model, plain greedy" in printed and "GPT-2: parameters, all layers" in printed
    rows, sizes = result["rows"], result["sizes"]
    for name in ("GPT-2, batch 1: 8 samples, last quarter", "GPT-2: mean pass over a text, all layers"):
        assert rows[name]["cpu"]["wall_ratio"] > 0
    # 4 layers of 128 units: rank 8 twice and the log-scale
    assert sizes["parameters added, all layers"] == 4 * 128 * (8 + 8 + 1)
    assert sizes["adapter of the last quarter, bytes"] > 4 * 128 * (8 + 8 + 1)


def test_make_bench_names_every_script_that_needs_no_file(load):
    root = Path(__file__).parents[2]
    named = re.search(r"^BENCHMARKS := (.*)$", (root / "Makefile").read_text(), re.MULTILINE)[1].split()
    scripts = {path.stem for path in (root / "benchmarks").glob("*.py") if "__main__" in path.read_text()}
    # they read a model, or find the coefficients that the samplers are built on
    others = {"retrofit_on_pretrained", "attention_on_pretrained", "approximate_dirichlet"}
    others |= {"fit_gamma_sensitivity", "fit_stirling_remainder", "adaptive_sampling"}
    assert set(named) | others == scripts and not set(named) & others


def test_json(load, capsys):
    load("generation").main(["--tiny", "--rounds", "1", "--only", "last", "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert list(printed["rows"]) == ["baseline", "8 samples, last layer"]
    assert printed["conditions"]["batch"] == 2


def test_the_shares_of_the_layers(load):
    top_shares = load("generation").top_shares
    assert list(top_shares(6).values()) == [[4, 5]]
    assert list(top_shares(12).values()) == [[8, 9, 10, 11], [9, 10, 11]]


@pytest.mark.parametrize("method", ["tensors", "resident"])
def test_memory(load, method, capsys, monkeypatch):
    for module in (predictive, readout):
        # the script changes them for good, in a process of its own
        monkeypatch.setattr(module, "BLOCK_ELEMENTS", module.BLOCK_ELEMENTS)
    script = load("evaluation_memory")
    for row in script.ROWS:
        script.main(["--tiny", "--child", row, "--method", method])
        assert json.loads(capsys.readouterr().out)["peak"] >= (0 if method == "resident" else 1)


def test_a_contender_is_divided_by_the_baseline_around_it(load):
    timing = load("timing")
    log = []
    series = timing.interleave(
        lambda: log.append("A"), {"b": lambda: log.append("B"), "c": lambda: log.append("C")}, 2
    )
    assert "".join(log) == "ABACA" * 3
    assert len(series["b"].ratios("wall")) == 2
    assert len(series["baseline"].ratios("wall")) == 4
    middle = timing.Series()
    for seconds in (1.0, 2.0, 6.0):
        middle.add(timing.Reading(seconds, seconds), timing.Reading(1.0, 2.0))
    assert middle.summary()["wall_ratio"] == 2.0
    assert middle.summary()["cpu_ratio_range"] == [0.5, 3.0]
