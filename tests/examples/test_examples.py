"""The programs of examples/ run, and the hand-written loop keeps the promises it makes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

import hf_variational

ROOT = Path(__file__).resolve().parents[2]
TINY_LOOP = [
    "--steps",
    "3",
    "--width",
    "16",
    "--vocab-size",
    "300",
    "--block-size",
    "16",
    "--eval-batches",
    "2",
    "--cpu",
]


@pytest.fixture
def examples(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))


@pytest.fixture
def fresh_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def some_text(tmp_path):
    path = tmp_path / "some.txt"
    path.write_text("".join(f"{number} green bottles hanging on the wall.\n" for number in range(200)))
    return str(path)


@pytest.fixture
def no_noise():
    """Posterior samples at the mean, so that two runs can be compared."""
    with hf_variational.posterior_noise(lambda request: torch.zeros(request.shape)):
        yield


def test_quickstart_makes_a_model_and_reads_its_measures(examples, capsys):
    import quickstart

    quickstart.main(["--max-new-tokens", "5", "--samples", "3"])
    printed = capsys.readouterr().out
    assert "mutual information" in printed
    assert "3 posterior samples" in printed
    table = printed.split("top-1 flips\n")[1].splitlines()[:5]
    assert all(float(line[-33:-13]) >= 0 for line in table)


def test_quickstart_takes_a_model_folder(examples, tmp_path, capsys):
    import quickstart

    quickstart.save_tiny_model(str(tmp_path))
    quickstart.main([str(tmp_path), "--max-new-tokens", "2", "--prompt", "with"])
    assert "after 'with' the likeliest token" in capsys.readouterr().out


def test_the_loop_trains_evaluates_and_saves(examples, fresh_accelerate, tmp_path, some_text):
    import accelerate_loop

    result = accelerate_loop.main(["--text", some_text, "--output", str(tmp_path / "out"), *TINY_LOOP])
    assert len(result["history"]) == 3
    assert all(step["nll"] > 0 and step["kl"] > 0 for step in result["history"])
    assert result["metrics"]["samples"]["mutual_information"] > 0
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_accumulation_changes_nothing(examples, fresh_accelerate, no_noise, tmp_path, some_text):
    """Four blocks a step, in one micro-batch, two or four."""
    import accelerate_loop

    histories = []
    for accumulation in (1, 2, 4):
        shape = ["--accumulation", str(accumulation), "--batch-size", str(4 // accumulation)]
        output = ["--text", some_text, "--output", str(tmp_path / f"out{accumulation}")]
        histories.append(accelerate_loop.main([*output, *TINY_LOOP, *shape])["history"])
    for other in histories[1:]:
        for ours, theirs in zip(histories[0], other, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)


def test_the_loop_runs_in_two_processes(tmp_path, some_text):
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    launch += ["--config_file", "training/accelerate/two_cpu_processes.yaml", "--main_process_port", "0"]
    program = ["examples/accelerate_loop.py", "--text", some_text, "--output", str(tmp_path / "out"), *TINY_LOOP]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "processes: 2" in done.stdout
    assert done.stdout.count("step    0") == 1  # the main process alone prints


def test_retrofit_of_a_llama_from_scratch_and_of_a_folder(examples, tmp_path, some_text, capsys):
    import retrofit_llama
    from transformers import AutoModelForCausalLM

    shorter = ["--text", some_text, "--windows", "4", "--length", "16", "--samples", "2", "--new-tokens", "3"]
    first = retrofit_llama.main([*shorter, "--base-steps", "2", "--output", str(tmp_path / "first")])
    printed = capsys.readouterr().out
    assert "base, tempered" in printed and "retrofit, tempered" in printed
    # "base" and its temperature are of the stock model; only samples have mutual information
    assert first["table"]["base"]["mutual_information"] == 0 < first["table"]["retrofit"]["mutual_information"]
    model = AutoModelForCausalLM.from_pretrained(first["folder"])
    assert type(model).__name__ == "VariationalLlamaForCausalLM" and model.generation_config.num_posterior_samples == 2
    base = ["--model", str(tmp_path / "first" / "base"), "--layers", "last_quarter"]
    second = retrofit_llama.main([*shorter, *base, "--output", str(tmp_path / "second")])
    assert list(second["multipliers"]) == [(3, "ffn")]
    assert second["table"]["base"]["nll"] == pytest.approx(first["table"]["base"]["nll"], abs=1e-4)
