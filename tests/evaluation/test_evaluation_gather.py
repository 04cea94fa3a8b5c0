"""Two processes that share an evaluation end up with the numbers of one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hf_variational.evaluation import StreamingEvaluation, mask_repeated_rows

PROGRAM = """
import json, sys
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from hf_variational.evaluation import StreamingEvaluation, mask_repeated_rows

accelerator = Accelerator(cpu=True)
generator = torch.Generator().manual_seed(0)
rows = [
    {"logits": torch.randn(6, 7, generator=generator), "labels": torch.randint(0, 7, (6,), generator=generator)}
    for _ in range(11)
]
evaluation = StreamingEvaluation()
for batch in accelerator.prepare(DataLoader(rows, batch_size=2)):
    evaluation.update(batch["logits"], mask_repeated_rows(batch["labels"], accelerator))
own = evaluation.num_tokens
metrics = evaluation.gather(accelerator).compute()
shares = accelerator.gather(torch.tensor([own])).tolist()
if accelerator.is_main_process:
    single = StreamingEvaluation()
    for row in rows:
        single.update(row["logits"][None], row["labels"][None])
    print("RESULT" + json.dumps({"shared": metrics, "single": single.compute(), "shares": shares}))
accelerator.end_training()
"""


def test_two_processes_equal_one(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}", program]
    done = subprocess.run(
        [str(part) for part in command],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.split("RESULT")[1].splitlines()[0])
    # eleven rows of five targets: nothing twice, nothing lost, though the last batch is filled with repeated rows
    assert sum(result["shares"]) == 55 and result["shared"]["num_tokens"] == 55
    assert result["shared"] == pytest.approx(result["single"], rel=1e-6)


@pytest.mark.parametrize(("process", "expected"), [(0, [True, True]), (1, [True, False])])
def test_the_repeated_rows_are_those_past_the_remainder(process, expected):
    state = SimpleNamespace(end_of_dataloader=True, remainder=3)
    accelerator = SimpleNamespace(num_processes=2, process_index=process, gradient_state=state)
    labels = mask_repeated_rows(torch.ones(2, 4, dtype=torch.long), accelerator)
    assert (labels != -100).all(-1).tolist() == expected
    state.end_of_dataloader = False
    assert (mask_repeated_rows(torch.ones(2, 4, dtype=torch.long), accelerator) == 1).all()


def test_one_process_gathers_itself():
    evaluation = StreamingEvaluation()
    evaluation.update(torch.randn(2, 3, 5), torch.ones(2, 3, dtype=torch.long))
    accelerator = SimpleNamespace(num_processes=1)
    assert evaluation.gather(accelerator).compute() == evaluation.compute()
