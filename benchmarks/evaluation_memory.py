"""Peak memory of an evaluation with posterior samples beside the mean pass's.

Run it with `python benchmarks/evaluation_memory.py`.

Every row is a process of its own, which builds the same model and evaluates the same batch with
`evaluate_language_model`. What is compared is what the evaluation adds to the memory the process holds before it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time

import torch
from models import TINY, Size, build
from report import NOT_MEASURED, arguments, machine, show
from torch.profiler import ProfilerActivity, profile

import hf_variational.modeling.predictive as predictive
import hf_variational.modeling.readout as readout
from hf_variational import EVEConfig, evaluate_language_model

SAMPLES = 8
VOCAB_SIZE = 50_257
# name: posterior samples, and whether reductions over the vocabulary run in blocks
ROWS = {
    "mean pass": (0, True),
    f"{SAMPLES} samples, in blocks": (SAMPLES, True),
    f"{SAMPLES} samples, not in blocks": (SAMPLES, False),
}

# how memory is measured, and what the columns call it
WAYS = {"tensors": "CPU tensors", "resident": "resident", "cuda": "accelerator"}


def peak_tensors(run) -> int:
    """The most bytes that CPU tensors held at once during `run`, beyond those they held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    held = most = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


class PeakResident:
    """The most memory this process was seen to hold, looked at every millisecond."""

    def __enter__(self):
        self.before = self.most = _resident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self):
        while not self._stop.is_set():
            self.most = max(self.most, _resident())
            time.sleep(0.001)

    def __exit__(self, *error):
        self._stop.set()
        self._thread.join()


def _resident() -> int:
    """Bytes; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm", encoding="ascii") as numbers:
            return int(numbers.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def child(row: str, size: Size, shape: tuple[int, int], device: str, method: str) -> None:
    """Evaluates once and prints the bytes it took."""
    samples, blocks = ROWS[row]
    if not blocks:
        predictive.BLOCK_ELEMENTS = readout.BLOCK_ELEMENTS = sys.maxsize
    model = build(size, EVEConfig()).eval().to(device)
    generator = torch.Generator().manual_seed(1)
    batch = torch.randint(0, size.vocab_size, shape, generator=generator)

    def run(tokens=batch):
        rows = [{"input_ids": row, "labels": row} for row in tokens]
        return evaluate_language_model(model, rows, samples, batch_size=shape[0], progress=False, seed=0)

    run(batch[:1, :2])  # what is made once and kept
    if method == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        peak = torch.cuda.max_memory_allocated() - before
    elif method == "tensors":
        peak = peak_tensors(run)
    else:
        with PeakResident() as resident:
            run()
        peak = resident.most - resident.before
    print(json.dumps({"peak": peak}))


def measure(row: str, device: str, method: str, options) -> float:
    """MiB of one row, in a fresh process."""
    command = [sys.executable, __file__, "--child", row, "--device", device, "--method", method]
    command += [
        "--threads",
        str(options.threads),
        "--batch",
        str(options.batch),
        *(["--tiny"] if options.tiny else []),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{row!r} measured by {method} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])["peak"] / 2**20


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = arguments(__doc__.splitlines()[0], rounds=1, threads=1)
    parser.add_argument("--batch", type=int, default=4, help="sequences of the batch (default: %(default)s)")
    parser.add_argument("--child", choices=list(ROWS), help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cpu", help=argparse.SUPPRESS)
    parser.add_argument("--method", choices=list(WAYS), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict | None:
    options = parse(argv)
    torch.set_num_threads(options.threads)
    size, shape = (TINY, (2, 8)) if options.tiny else (Size(vocab_size=VOCAB_SIZE), (options.batch, 128))
    if options.child:
        return child(options.child, size, shape, options.device, options.method)
    ways = {"tensors": "cpu", "resident": "cpu"}
    if torch.cuda.is_available():
        ways["cuda"] = "cuda"
    middle = {
        row: {
            way: statistics.median(measure(row, device, way, options) for _ in range(options.rounds))
            for way, device in ways.items()
        }
        for row in ROWS
    }
    base = middle["mean pass"]
    result = {
        "claim": "peak memory of an evaluation / the mean pass's",
        "conditions": {
            "model": size.describe(),
            "batch": f"{shape[0]} x {shape[1]} tokens, one batch",
            "samples": SAMPLES,
            "number": "peak during evaluate_language_model less what was held before it, float32",
        },
        "machine": machine(options.threads),
        "rows": {
            row: {
                way: {"mebibytes": values[way], "ratio": values[way] / base[way] if base[way] else None}
                for way in values
            }
            for row, values in middle.items()
        },
    }
    rows = [[row, *_cells(values)] for row, values in result["rows"].items()]
    columns = ["evaluation", *(f"{unit}, {name}" for name in WAYS.values() for unit in ("MiB", "ratio"))]
    show("Peak memory of an evaluation beside the mean pass's", columns, rows, result, options.json)
    return result


def _cells(values: dict) -> list[str]:
    cells = []
    for way in WAYS:
        value = values.get(way)
        cells.append(NOT_MEASURED if value is None else f"{value['mebibytes']:.0f}")
        cells.append(NOT_MEASURED if value is None or value["ratio"] is None else f"{value['ratio']:.2f}")
    return cells


if __name__ == "__main__":
    main()
