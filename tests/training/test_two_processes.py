import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hf_variational

HERE = Path(__file__).parent
ROOT = Path(hf_variational.__file__).parents[1]
CONFIG = HERE.parents[1] / "training" / "accelerate" / "two_cpu_processes.yaml"

ATTENTION = (
    "attention_kl",
    "attention_kl_share",
    "attention_concentration",
    "attention_concentration/layer_1",
    "attention_entropy",
    "effective_keys",
)


def launch(folder, *arguments, processes, script="two_processes.py"):
    folder.mkdir()
    command = [sys.executable]
    if processes == 2:
        command += ["-m", "accelerate.commands.launch", "--config_file", str(CONFIG), "--main_process_port", "0"]
    command += [str(HERE / script), str(folder), *map(str, arguments)]
    path = os.pathsep.join([str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    results = [json.loads((folder / f"result_{rank}.json").read_text()) for rank in range(processes)]
    assert all(result["processes"] == processes for result in results)
    return results, [torch.load(folder / f"weights_{rank}.pt", weights_only=True) for rank in range(processes)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    return {
        "one": launch(folder / "one", "given", 2, processes=1),
        "two": launch(folder / "two", "given", 1, processes=2),
        "own": launch(folder / "own", "own", 1, processes=2),
        "resumed": launch(folder / "resumed", "own", 1, folder / "own" / "checkpoint-3", processes=2),
    }


def test_two_processes_give_the_loss_curve_of_one_with_twice_the_accumulation(runs):
    (one,), _ = runs["one"]
    two = runs["two"][0][0]
    curves = [[entry for entry in result["history"] if "loss" in entry] for result in (one, two)]
    assert len(curves[0]) == len(curves[1]) == 7
    names = ("loss", "nll", "kl", "kl/layer_0", "kl/layer_1", "kl_weight", "grad_norm", "learning_rate")
    for single, double in zip(*curves, strict=True):
        for name in (*names, "posterior_scale", "mean_energy", "active_fraction", *ATTENTION):
            assert double[name] == pytest.approx(single[name], rel=2e-5, abs=1e-9), (single["step"], name)
    assert curves[0][-1]["nll"] < curves[0][0]["nll"] and curves[0][-1]["kl"] < curves[0][0]["kl"]


def test_the_weights_agree_too_and_are_those_of_both_processes(runs):
    (one,), (first, second) = runs["one"][1], runs["two"][1]
    for name in one:
        torch.testing.assert_close(first[name], one[name], rtol=1e-3, atol=2e-5)
        assert torch.equal(first[name], second[name]), name


def test_the_processes_divide_the_same_order_of_the_data(runs):
    (one,), _ = runs["one"]
    first, second = runs["two"][0]
    for offset, result in ((0, first), (1, second)):
        assert result["rows"] == one["rows"][offset::2]


def test_an_evaluation_over_two_processes_counts_every_row_once(runs):
    (one,), _ = runs["one"]
    first, second = runs["two"][0]
    assert first["metrics"]["eval_num_tokens"] == one["metrics"]["eval_num_tokens"]
    for name in ("nll", "accuracy", "expected_calibration_error", "cvar_nll", "predictive_entropy"):
        key = f"eval_mean_pass_{name}"
        assert first["metrics"][key] == pytest.approx(one["metrics"][key], rel=1e-3, abs=1e-4), name
        assert first["metrics"][key] == second["metrics"][key]
    # the posterior noise is another, but its number of tokens and its size are not
    for name in ("attention_kl", "attention_concentration", "attention_entropy", "effective_keys"):
        key = f"eval_{name}"
        assert first["metrics"][key] == pytest.approx(one["metrics"][key], rel=0.05), name
        assert first["metrics"][key] == second["metrics"][key]
    assert first["metrics"]["eval_kl"] == pytest.approx(one["metrics"]["eval_kl"], rel=0.05)
    assert first["metrics"]["eval_nll"] == pytest.approx(one["metrics"]["eval_nll"], rel=0.05)


def test_by_default_the_processes_draw_different_noise_for_one_order_and_one_start(runs):
    first, second = runs["own"][0]
    assert len(first["generator"]) == 7
    assert not set(first["generator"]) & set(second["generator"])
    # the order of the data is still shared: together they see what one process sees
    assert [first["rows"], second["rows"]] == [result["rows"] for result in runs["two"][0]]
    # they were given different weights, and train the first one's
    for name, value in runs["own"][1][0].items():
        assert torch.equal(value, runs["own"][1][1][name]), name


def test_two_processes_resume_to_the_same_bits(runs):
    whole, resumed = runs["own"], runs["resumed"]
    for rank in (0, 1):
        assert resumed[0][rank]["generator"] == whole[0][rank]["generator"][3:]
        for name, value in whole[1][rank].items():
            assert torch.equal(value, resumed[1][rank][name]), name
