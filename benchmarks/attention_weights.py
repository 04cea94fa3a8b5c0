"""What sampled attention costs beside softmax attention: forward and backward of one call, with the KL.

Run it with `python benchmarks/attention_weights.py`.
"""

import math

import torch
from report import NOT_MEASURED, arguments, cell, machine, show
from timing import accelerator, interleave

from hf_variational.modeling.attention_weights import WeightsPosterior, sample_weights, sample_weights_with_kl

KINDS = ("gaussian", "approximate_dirichlet", "dirichlet")
HEAD_DIMS = (64, 32)


class Call:
    """Queries, keys and values, and one forward and backward pass over them."""

    def __init__(
        self, shape: tuple[int, int, int], head_dim: int, causal: bool, device, kind: str | None, plain: bool
    ):
        generator = torch.Generator().manual_seed(0)
        batch, heads, length = shape

        def draw(*size):
            return torch.randn(*size, generator=generator).to(device)

        self.query, self.key, self.value = (draw(batch, heads, length, head_dim).requires_grad_() for _ in range(3))
        self.gradient = draw(batch, heads, length, head_dim)
        self.kl_gradient = torch.full((batch, heads, length), 1e-3, device=device)
        mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=device).tril()
        self.visible = mask if causal else None
        self.kind = kind
        self.plain = plain
        if kind is not None:
            gaussian = kind == "gaussian"
            self.posterior = WeightsPosterior(kind, "contextual", math.log(0.5 if gaussian else 10.0))
            start = math.log(0.1 if gaussian else 100.0)
            self.log_value = torch.full((1, heads, 1, 1), start, device=device, requires_grad=True)

    def __call__(self) -> None:
        logits = torch.matmul(self.query, self.key.mT) * self.query.shape[-1] ** -0.5
        if self.kind is None:
            if self.visible is not None:
                logits = logits.masked_fill(~self.visible, -torch.inf)
            torch.matmul(logits.softmax(-1), self.value).backward(self.gradient)
            return
        sample = sample_weights if self.plain else sample_weights_with_kl
        weights, kl = sample(self.posterior, logits, self.log_value, self.visible, None, 1)
        weights = weights.squeeze(1) if self.plain else weights
        torch.autograd.backward([torch.matmul(weights, self.value), kl], [self.gradient, self.kl_gradient])


def measure(shape: tuple[int, int, int], rounds: int, device) -> dict[str, dict]:
    rows = {}
    for head_dim in HEAD_DIMS:
        for causal in (False, True):
            name = f"{'causal' if causal else 'full'}, head width {head_dim}"
            options = {"shape": shape, "head_dim": head_dim, "causal": causal, "device": device}
            calls = {kind: Call(kind=kind, plain=False, **options) for kind in KINDS}
            if head_dim == HEAD_DIMS[0]:
                # The Gaussian's are plain anyway.
                calls |= {f"{kind}, plain operations": Call(kind=kind, plain=True, **options) for kind in KINDS[1:]}
            series = interleave(Call(kind=None, plain=False, **options), calls, rounds, warmup=3, device=device)
            rows |= {f"{kind}; {name}": one.summary() for kind, one in series.items()}
    return rows


def main(argv: list[str] | None = None) -> dict:
    parser = arguments(__doc__.splitlines()[0], rounds=50, threads=2)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    shape = (2, 2, 16) if options.tiny else (4, 4, 128)
    on_cpu = measure(shape, options.rounds, "cpu")
    device = accelerator()
    on_device = None if device is None else measure(shape, options.rounds, device)
    result = {
        "claim": "sampled attention / softmax attention",
        "conditions": {
            "shape": f"batch {shape[0]} x {shape[1]} heads x {shape[2]} x {shape[2]}",
            "call": "logits, weights, sum of values, KL (contextual prior), backward; float32; one sample",
            "baseline": "matmul, softmax, matmul, and their backward",
            "accelerator": NOT_MEASURED if device is None else "eager, float32",
        },
        "machine": machine(options.threads),
        "rows": {name: {"cpu": row, "accelerator": on_device and on_device[name]} for name, row in on_cpu.items()},
    }
    rows = [
        [
            name.replace("baseline", "softmax attention"),
            f"{row['cpu']['wall_seconds'] * 1e3:.2f}",
            cell(row["cpu"], "wall"),
            cell(row["cpu"], "cpu"),
            cell(row["accelerator"], "wall"),
        ]
        for name, row in result["rows"].items()
    ]
    columns = ["attention", "ms, CPU", "ratio, wall clock", "ratio, CPU time", "ratio, accelerator"]
    show("Sampled attention beside softmax attention", columns, rows, result, options.json)
    return result


if __name__ == "__main__":
    main()
