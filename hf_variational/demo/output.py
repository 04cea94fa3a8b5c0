"""Where the demo writes, and whether what it wrote loads again."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

__all__ = ["check_output", "check_reload", "prepare_output"]

MARKER = ".hf_variational_demo"
PAGE, PICTURE, RESULTS, RUNS = "generation.html", "training_and_calibration.png", "results.json", "runs"
MODELS = ("deterministic", "eve")


def check_output(output: Path) -> None:
    """Touches nothing.

    Raises:
        ValueError: the folder has files and no demo wrote it.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file: give a folder with --output")
    if output.is_dir() and any(output.iterdir()) and not (output / MARKER).is_file():
        raise ValueError(
            f"{output} is not empty and no demo wrote it: give another folder with --output, or move it away"
        )


def prepare_output(output: Path) -> None:
    """Make the folder, or take out of it what an earlier demo wrote (and nothing else); raises as `check_output`."""
    check_output(output)
    output.mkdir(parents=True, exist_ok=True)
    (output / MARKER).write_text("Written by hf-variational demo, which may replace what it wrote here.\n")
    for name in (*MODELS, PAGE, PICTURE, RESULTS, RUNS):
        path = output / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


RELOAD = """
import sys
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
import hf_variational
torch.set_num_threads(int(sys.argv[3]))
reference = load_file(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    logits = model(reference["input_ids"], attention_mask=torch.ones_like(reference["input_ids"])).logits
print(type(model).__name__, float((logits - reference["logits"]).abs().max()))
"""


def check_reload(model, directory: Path, input_ids: torch.Tensor) -> tuple[str, float]:
    """The class that a fresh process loads, and the largest difference of its mean pass's logits from the model's."""
    from safetensors.torch import save_file

    model.eval().cpu()
    with torch.no_grad():
        logits = model(input_ids, attention_mask=torch.ones_like(input_ids)).logits
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder) / "reference.safetensors"
        save_file({"input_ids": input_ids.contiguous(), "logits": logits.contiguous()}, reference)
        command = [sys.executable, "-c", RELOAD, str(directory), str(reference), str(torch.get_num_threads())]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the checkpoint in {directory} does not load:\n{done.stderr[-2000:]}")
    name, difference = done.stdout.split()[-2:]
    return name, float(difference)
