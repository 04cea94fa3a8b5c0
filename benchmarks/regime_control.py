"""What regime control costs beside the same training without it, at its default interval.

Run it with `python benchmarks/regime_control.py`. The row of a control is the mean over the steps of one interval, of
which the last one measures the units and acts.
"""

from functools import partial
from types import SimpleNamespace

import torch
from models import TINY, Size, build
from report import NOT_MEASURED, arguments, cell, machine, show
from timing import accelerator, interleave

from hf_variational import EVEConfig, RegimeControl
from hf_variational.training import RegimeControlCallback

INTERVAL = RegimeControl().interval
BETWEEN, ACTING = "between control steps", "a control step"
EVE = EVEConfig(mean="gain")
BAND = {"target": 1e-4, "spread": 4.0}
PENALTY = {"band": BAND, "penalty": {}}
THERMOSTAT = {"thermostat": {"kl_min": 0.1, "kl_max": 0.5}}
CONTROLS = {
    "the band watched": {"band": BAND},
    "homeostasis": {"band": BAND, "homeostasis": {}},
    "thermostat": THERMOSTAT,
    "penalty": PENALTY,
    "all of it": {
        **PENALTY,
        **THERMOSTAT,
        "homeostasis": {},
        "projection": {"interval": 10},
        "scale_guard": {"floor": 0.01, "kick": 0.1},
        "calibration": {},
    },
}


class Step:
    """A model, its optimizer and one training step: without control, between two control steps, or with one."""

    def __init__(self, size: Size, control: dict | None, acts: bool, shape: tuple[int, int], device, fast: bool):
        self.model = build(size, EVE).train().to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(0, size.vocab_size, shape, generator=generator).to(device)
        self.kl_weight = torch.full((), 1e-4, device=device)
        self.state = SimpleNamespace(global_step=INTERVAL - 1 if acts else 0)
        self.control = None
        if control is not None:
            settings = RegimeControl.of(control)
            self.control = RegimeControlCallback(settings, self.model, torch.device(device), lambda: 1e-4)
        self.forward = torch.compile(self.model) if fast else self.model
        self.autocast = partial(torch.autocast, torch.device(device).type, torch.bfloat16, enabled=fast)

    def __call__(self) -> None:
        extra, control = {"kl_weight": self.kl_weight}, self.control
        measures = control is not None and control.measures_at(self.state.global_step)
        if control is not None:
            control.on_step_begin(None, self.state, None)
            weights = control.unit_weights()
            extra |= {} if weights is None else {"unit_weights": weights}
        if measures:
            extra["output_posteriors"] = True
        with self.autocast():
            outputs = self.forward(input_ids=self.tokens, labels=self.tokens, use_cache=False, **extra)
        if measures:
            control.measure(outputs.posteriors, outputs.nll)
        outputs.loss.backward()
        self.optimizer.step()
        if control is not None:
            control.on_optimizer_step(None, self.state, None, optimizer=self.optimizer)
        self.optimizer.zero_grad()


def measure(size: Size, shape: tuple[int, int], rounds: int, device, fast: bool) -> dict:
    """A summary by row; the rows of a whole interval are put together of the two kinds of steps."""
    if fast:
        # The models are of one class, and each compiles its forward anew.
        torch._dynamo.config.recompile_limit = 8 * (2 * len(CONTROLS) + 1)
    make = partial(Step, size, shape=shape, device=device, fast=fast)
    steps = {
        f"{name}, {kind}": make(control=control, acts=kind == ACTING)
        for name, control in CONTROLS.items()
        for kind in (BETWEEN, ACTING)
    }
    series = interleave(make(control=None, acts=False), steps, rounds, warmup=2, device=device)
    rows = {"baseline": series["baseline"].summary()}
    for name in CONTROLS:
        between, acting = (series[f"{name}, {kind}"].summary() for kind in (BETWEEN, ACTING))
        rows[f"{name}, {ACTING}"] = acting
        rows[name] = {key: _mixed(between[key], acting[key]) if key != "rounds" else between[key] for key in between}
    return rows


def _mixed(between, acting):
    """Of an interval, where the last step is a control step."""
    if isinstance(between, list):
        return [_mixed(*pair) for pair in zip(between, acting, strict=True)]
    return ((INTERVAL - 1) * between + acting) / INTERVAL


def main(argv: list[str] | None = None) -> dict:
    options = arguments(__doc__.splitlines()[0], rounds=6, threads=1).parse_args(argv)
    torch.set_num_threads(options.threads)
    size, shape = (TINY, (2, 16)) if options.tiny else (Size(), (8, 128))
    eager = measure(size, shape, options.rounds, "cpu", fast=False)
    device = accelerator()
    compiled = None if device is None else measure(size, shape, 5 * options.rounds, device, fast=True)
    result = {
        "claim": "training with regime control / without",
        "conditions": {
            "model": size.describe(),
            "batch": f"{shape[0]} x {shape[1]} tokens",
            "step": "forward, backward, AdamW, one posterior sample; EVE with mean='gain'",
            "interval": f"{INTERVAL} steps",
            "CPU": "eager, float32",
            "accelerator": "torch.compile, bfloat16 autocast" if device is not None else NOT_MEASURED,
        },
        "machine": machine(options.threads),
        "rows": {name: {"cpu": eager[name], "accelerator": compiled and compiled[name]} for name in eager},
    }
    rows = [
        [
            "no control" if name == "baseline" else name,
            f"{row['cpu']['wall_seconds'] * 1e3:.0f}",
            _percent(row["cpu"], "wall"),
            _percent(row["cpu"], "cpu"),
            cell(row["accelerator"], "wall"),
        ]
        for name, row in result["rows"].items()
    ]
    columns = ["training", "ms, CPU", "ratio, wall clock", "ratio, CPU time", "ratio, accelerator"]
    show("A training step beside the same without regime control", columns, rows, result, options.json)
    return result


def _percent(summary: dict, clock: str) -> str:
    low, high = summary[f"{clock}_ratio_range"]
    return f"{summary[f'{clock}_ratio']:.3f}  ({low:.3f} to {high:.3f})"


if __name__ == "__main__":
    main()
