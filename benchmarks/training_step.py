"""What a training step costs beside the deterministic twin's: forward, backward and AdamW.

Run it with `python benchmarks/training_step.py`.
"""

from functools import partial

import torch
from models import TINY, Size, build, num_parameters
from report import NOT_MEASURED, arguments, cell, machine, show
from timing import accelerator, interleave

from hf_variational import EVEConfig

VARIANTS = {
    "EVE (identity mean, input scale of rank 8, empirical prior)": EVEConfig(),
    "EVE, a step that is logged (posterior statistics)": EVEConfig(),
    "EVE, scale per unit": EVEConfig(scale="unit"),
    "EVE, centered prior": EVEConfig(prior="centered"),
    "EVE, autoregressive prior": EVEConfig(prior="autoregressive"),
    "EVE, linear mean": EVEConfig(mean="linear"),
}


class Step:
    """A model, its optimizer and one step of both."""

    def __init__(self, size: Size, eve: EVEConfig | None, shape: tuple[int, int], device, fast: bool, logged: bool):
        self.model = build(size, eve).train().to(device)
        self.parameters = num_parameters(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(0, size.vocab_size, shape, generator=generator).to(device)
        self.extra = {} if eve is None else {"kl_weight": torch.full((), 1e-4, device=device)}
        if logged:
            self.extra["output_posteriors"] = True
        self.forward = torch.compile(self.model) if fast else self.model
        self.autocast = partial(torch.autocast, torch.device(device).type, torch.bfloat16, enabled=fast)

    def __call__(self) -> None:
        with self.autocast():
            loss = self.forward(input_ids=self.tokens, labels=self.tokens, use_cache=False, **self.extra).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def measure(size: Size, shape: tuple[int, int], rounds: int, device, fast: bool) -> tuple[dict, dict]:
    """Series by row, and the parameters of each row beside the twin's."""
    if fast:
        # The models are of one class, and each compiles its forward anew.
        torch._dynamo.config.recompile_limit = 8 * (len(VARIANTS) + 1)
    make = partial(Step, size, shape=shape, device=device, fast=fast)
    twin = make(eve=None, logged=False)
    steps = {name: make(eve=eve, logged="logged" in name) for name, eve in VARIANTS.items()}
    series = interleave(twin, steps, rounds, warmup=3 if fast else 1, device=device)
    parameters = {name: step.parameters / twin.parameters for name, step in steps.items()}
    return {name: one.summary() for name, one in series.items()}, {"baseline": 1.0, **parameters}


def main(argv: list[str] | None = None) -> dict:
    options = arguments(__doc__.splitlines()[0], rounds=10, threads=1).parse_args(argv)
    torch.set_num_threads(options.threads)
    size, shape = (TINY, (2, 16)) if options.tiny else (Size(), (8, 128))
    eager, parameters = measure(size, shape, options.rounds, "cpu", fast=False)
    device = accelerator()
    compiled = None
    if device is not None:
        compiled, _ = measure(size, shape, 5 * options.rounds, device, fast=True)
    result = {
        "claim": "training step / deterministic twin",
        "conditions": {
            "model": size.describe(),
            "batch": f"{shape[0]} x {shape[1]} tokens",
            "step": "forward, backward, AdamW, one posterior sample",
            "CPU": "eager, float32",
            "accelerator": "torch.compile, bfloat16 autocast" if device is not None else NOT_MEASURED,
        },
        "machine": machine(options.threads),
        "rows": {
            name: {"cpu": eager[name], "accelerator": compiled and compiled[name], "parameters": parameters[name]}
            for name in eager
        },
    }
    rows = [
        [
            "deterministic twin" if name == "baseline" else name,
            f"{row['cpu']['wall_seconds'] * 1e3:.0f}",
            cell(row["cpu"], "wall"),
            cell(row["cpu"], "cpu"),
            cell(row["accelerator"], "wall"),
            f"{row['parameters']:.4f}",
        ]
        for name, row in result["rows"].items()
    ]
    columns = ["training step", "ms, CPU", "ratio, wall clock", "ratio, CPU time", "ratio, accelerator", "parameters"]
    show("Training step beside the deterministic twin's", columns, rows, result, options.json)
    return result


if __name__ == "__main__":
    main()
