"""Regime control and diagnostics over two processes are those of one with twice the accumulation."""

import pytest
import torch
from test_two_processes import launch

REGIME = ("under", "inside", "over", "band_factor", "band_penalty", "rescaled", "kl_inside", "kl_log_weight")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("regime")
    script = "regime_processes.py"
    return {
        "one": launch(folder / "one", 2, processes=1, script=script),
        "two": launch(folder / "two", 1, processes=2, script=script),
    }


def test_the_same_regime_step_by_step(runs):
    (one,), _ = runs["one"]
    first, second = runs["two"][0]
    curves = [[entry for entry in result["history"] if "loss" in entry] for result in (one, first)]
    assert len(curves[0]) == len(curves[1]) == 6
    for single, double in zip(*curves, strict=True):
        for name in ("loss", "nll", "kl", *(f"regime/{name}" for name in REGIME)):
            assert (name in single) == (name in double)
            if name in single:
                assert double[name] == pytest.approx(single[name], rel=1e-4, abs=1e-6), (single["step"], name)
    assert curves[0][-1]["regime/rescaled"] > 0 and curves[0][-1]["regime/kl_log_weight"] != 0
    for name, value in one["state"].items():
        torch.testing.assert_close(torch.tensor(first["state"][name]), torch.tensor(value), rtol=1e-3, atol=1e-5)
        assert first["state"][name] == second["state"][name], name


def test_histograms_are_those_of_the_tokens_of_all_processes(runs):
    (one,), _ = runs["one"]
    first, second = runs["two"][0]
    assert len(one["histograms"]) == 6 and not second["histograms"], "the first process writes"
    for name, values in one["histograms"].items():
        assert first["histograms"][name] == pytest.approx(values, rel=1e-4, abs=1e-5), name


def test_the_same_parameters_on_both_processes(runs):
    (one,), (first, second) = runs["one"][1], runs["two"][1]
    for name in one:
        torch.testing.assert_close(first[name], one[name], rtol=1e-3, atol=2e-5)
        assert torch.equal(first[name], second[name]), name


def test_an_evaluation_has_the_shares_of_all_processes(runs):
    (one,), _ = runs["one"]
    first, second = runs["two"][0]
    for name in ("under", "inside", "over"):
        key = f"eval_regime_{name}"
        assert first["metrics"][key] == pytest.approx(one["metrics"][key], abs=1 / 48 + 1e-6)
        assert first["metrics"][key] == second["metrics"][key]
