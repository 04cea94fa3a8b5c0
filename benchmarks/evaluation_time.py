"""Time of `evaluate_model` beside that of the forward passes it cannot do without.

Run it with `python benchmarks/evaluation_time.py`.

The forward passes are as many as there are posterior samples, one sample each, over the same batches, for their logits
alone. The report is all that `evaluate_model` says of one model: validation data is split off and scored, scores are
ranked, policies fitted, documents resampled.
"""

import logging
from functools import partial

import torch
from models import TINY, Size, build
from report import NOT_MEASURED, arguments, cell, machine, show
from timing import accelerator, interleave

from hf_variational import EVEConfig
from hf_variational.evaluation.report import EvaluationSettings, evaluate_model

SAMPLES = 8


def forward_passes(model, rows: list[list[int]], batch_size: int, passes: int, samples: int) -> None:
    """Logits of every batch, and nothing of them."""
    device = next(model.parameters()).device
    with torch.no_grad():
        for start in range(0, len(rows), batch_size):
            batch = torch.tensor(rows[start : start + batch_size], device=device)
            for _ in range(passes):
                model(input_ids=batch, num_posterior_samples=samples, use_cache=False)


def measure(options, size: Size, device: str) -> dict[str, dict]:
    """Summaries by row."""
    model = build(size, EVEConfig()).eval().to(device)
    sequences, length = (24, 16) if options.tiny else (options.sequences, 256)
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(0, size.vocab_size, (sequences, length), generator=generator).tolist()
    settings = EvaluationSettings(batch_size=4)
    without = EvaluationSettings(batch_size=4, internal=False)
    run = partial(forward_passes, model, rows, settings.batch_size)
    report = partial(evaluate_model, model, rows, SAMPLES, progress=False)
    contenders = {
        f"one pass of {SAMPLES} samples": partial(run, 1, SAMPLES),
        "evaluate_model": partial(report, settings=settings),
        "evaluate_model, internal=False": partial(report, settings=without),
    }
    series = interleave(partial(run, SAMPLES, 1), contenders, options.rounds, device=device)
    return {name: one.summary() for name, one in series.items()}


def main(argv: list[str] | None = None) -> dict:
    parser = arguments(__doc__.splitlines()[0], rounds=3, threads=1)
    parser.add_argument("--sequences", type=int, default=32, help="sequences of the data (default: %(default)s)")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    # Of an untrained model on random tokens no policy can promise anything.
    logging.getLogger("hf_variational.evaluation.selective_policy").setLevel(logging.ERROR)
    size = TINY if options.tiny else Size()
    cpu = measure(options, size, "cpu")
    device = accelerator()
    fast = None if device is None else measure(options, size, device)
    result = {
        "claim": f"evaluate_model with {SAMPLES} samples / the {SAMPLES} forward passes themselves",
        "conditions": {
            "model": size.describe(),
            "data": f"{options.sequences} x 256 random tokens in batches of 4, of which a fifth is for validation",
            "EVE": "all layers",
            "accelerator": "float32" if device is not None else NOT_MEASURED,
        },
        "machine": machine(options.threads),
        "rows": {name: {"cpu": cpu[name], "accelerator": fast and fast[name]} for name in cpu},
    }
    rows = [
        [
            name.replace("baseline", f"{SAMPLES} passes of one sample"),
            f"{row['cpu']['wall_seconds']:.2f}",
            cell(row["cpu"], "wall"),
            cell(row["cpu"], "cpu"),
            cell(row["accelerator"], "wall"),
        ]
        for name, row in result["rows"].items()
    ]
    columns = ["evaluation", "s, CPU", "ratio, wall clock", "ratio, CPU time", "ratio, accelerator"]
    show("A report beside the forward passes it is made of", columns, rows, result, options.json)
    return result


if __name__ == "__main__":
    main()
