"""What generating with posterior samples costs beside the deterministic twin's plain greedy `generate`.

Run it with `python benchmarks/generation.py`.
"""

import math
from functools import partial

import torch
from by_hand import greedy, with_dropout
from models import TINY, Size, build
from report import NOT_MEASURED, arguments, cell, machine, show
from timing import accelerator, interleave

from hf_variational import EVEConfig

SAMPLES = 8
ENSEMBLE = 5


def top_shares(depth: int) -> dict[str, list[int]]:
    """The top third and the top quarter of the layers, rounded up, by name; one entry where they are the same."""
    third, quarter = (list(range(depth - math.ceil(depth / parts), depth)) for parts in (3, 4))
    where = "layers {} to {}"
    if third == quarter:
        return {f"top third = top quarter rounded up ({where.format(third[0], third[-1])})": third}
    return {
        f"top third ({where.format(third[0], third[-1])})": third,
        f"top quarter ({where.format(quarter[0], quarter[-1])})": quarter,
    }


def contenders(size: Size, tokens, new_tokens: int, device, dtype) -> tuple[object, dict]:
    """The twin's greedy generate, and every row beside it."""

    def make(eve, layers=None, seed=0):
        return build(size, eve, layers, seed).eval().to(device, dtype)

    depth = size.num_hidden_layers
    plain = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    measured = {**plain, "return_dict_in_generate": True, "output_uncertainty": True}
    prompt = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}

    def generate(model, samples: int):
        options = {**measured, "num_posterior_samples": samples} if samples else plain
        return partial(model.generate, **prompt, **options)

    def by_hand(forwards, rows: int):
        return partial(greedy, forwards, rows, tokens, new_tokens, twin.config)

    twin = make(None)
    everywhere, dropout = make(EVEConfig()), with_dropout(make(None))
    one_sample = partial(everywhere, num_posterior_samples=1)
    rows = {
        "mean pass, all layers variational": generate(everywhere, 0),
        f"{SAMPLES} samples, all layers": generate(everywhere, SAMPLES),
        **{
            f"{SAMPLES} samples, {name}": generate(make(EVEConfig(), layers), SAMPLES)
            for name, layers in top_shares(depth).items()
        },
        f"{SAMPLES} samples, last layer": generate(make(EVEConfig(), [depth - 1]), SAMPLES),
        "3 samples, all layers": generate(everywhere, 3),
        f"naive: the batch repeated {SAMPLES} times from the input, one cache": by_hand([one_sample], SAMPLES),
        f"MC dropout by hand, {SAMPLES} masks, one cache": by_hand([dropout], SAMPLES),
        f"MC dropout by hand, {SAMPLES} masks, {SAMPLES} caches": by_hand([dropout] * SAMPLES, 1),
        f"ensemble of {ENSEMBLE} by hand": by_hand([make(None, seed=member) for member in range(ENSEMBLE)], 1),
    }
    return generate(twin, 0), rows


def measure(size: Size, shape: tuple[int, int], new_tokens: int, rounds: int, device, dtype, only: str) -> dict:
    """Summaries by row."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, size.vocab_size, shape, generator=generator).to(device)
    twin, rows = contenders(size, tokens, new_tokens, device, dtype)
    rows = {name: run for name, run in rows.items() if only in name}
    series = interleave(twin, rows, rounds, device=device)
    return {name: one.summary() for name, one in series.items()}


def main(argv: list[str] | None = None) -> dict:
    parser = arguments(__doc__.splitlines()[0], rounds=7, threads=1)
    parser.add_argument("--layers", type=int, default=6, help="layers of the model (default: %(default)s)")
    parser.add_argument("--only", default="", help="measure the rows whose name contains this")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    size, shape, new_tokens = (TINY, (2, 8), 4) if options.tiny else (Size(), (4, 64), 64)
    size = Size(**{**vars(size), "num_hidden_layers": options.layers})
    cpu = measure(size, shape, new_tokens, options.rounds, "cpu", torch.float32, options.only)
    device = accelerator()
    fast = None
    if device is not None:
        fast = measure(size, shape, new_tokens, options.rounds, device, torch.bfloat16, options.only)
    result = {
        "claim": "generation / plain greedy generate of the deterministic twin",
        "conditions": {
            "model": size.describe(),
            "batch": shape[0],
            "prompt": f"{shape[1]} tokens",
            "new_tokens": new_tokens,
            "measures": "on, except in the twin and the mean pass",
            "CPU": "eager, float32",
            "accelerator": "eager, bfloat16" if device is not None else NOT_MEASURED,
        },
        "machine": machine(options.threads),
        "rows": {name: {"cpu": cpu[name], "accelerator": fast and fast[name]} for name in cpu},
    }
    rows = [
        [
            "deterministic twin, plain greedy" if name == "baseline" else name,
            f"{row['cpu']['wall_seconds']:.2f}",
            cell(row["cpu"], "wall"),
            cell(row["cpu"], "cpu"),
            cell(row["accelerator"], "wall"),
        ]
        for name, row in result["rows"].items()
    ]
    columns = ["generation", "s, CPU", "ratio, wall clock", "ratio, CPU time", "ratio, accelerator"]
    show("Generation beside the deterministic twin's plain greedy generate", columns, rows, result, options.json)
    return result


if __name__ == "__main__":
    main()
