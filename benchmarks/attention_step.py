"""What variational attention costs a model: training step, mean pass and peak memory beside the deterministic twin's.

Run it with `python benchmarks/attention_step.py`.
"""

from functools import partial

import torch
from evaluation_memory import peak_tensors
from models import TINY, Size, num_parameters
from report import NOT_MEASURED, arguments, cell, machine, show
from timing import accelerator, interleave

from hf_variational import EVEConfig, VariationalAttentionConfig, VariationalGPTForCausalLM

SIZE = Size(hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8)
VARIANTS = {
    "gaussian": {"attention": VariationalAttentionConfig("gaussian")},
    "approximate Dirichlet": {"attention": VariationalAttentionConfig("approximate_dirichlet")},
    "Dirichlet": {"attention": VariationalAttentionConfig("dirichlet")},
    "Dirichlet, a number per head": {"attention": VariationalAttentionConfig("dirichlet", data_dependent=False)},
    "Dirichlet, constant prior": {"attention": VariationalAttentionConfig("dirichlet", prior="constant")},
    "Dirichlet and EVE": {"attention": VariationalAttentionConfig("dirichlet"), "eve": EVEConfig()},
}
EAGER = "twin, eager softmax attention"


class Model:
    """A model, its optimizer and what is measured of both."""

    def __init__(self, size: Size, shape: tuple[int, int], device, fast: bool, attn="sdpa", eve=None, attention=None):
        torch.manual_seed(0)
        config = size.config(eve)
        config.attention = attention
        config.max_position_embeddings = shape[1]
        config._attn_implementation = attn
        self.model = VariationalGPTForCausalLM(type(config).from_dict(config.to_dict())).to(device)
        self.model.set_attn_implementation(attn)
        self.parameters = num_parameters(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(0, size.vocab_size, shape, generator=generator).to(device)
        self.forward = torch.compile(self.model) if fast else self.model
        self.autocast = partial(torch.autocast, torch.device(device).type, torch.bfloat16, enabled=fast)

    def step(self) -> None:
        self.model.train()
        with self.autocast():
            loss = self.forward(input_ids=self.tokens, labels=self.tokens, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def mean_pass(self) -> None:
        self.model.eval()
        with self.autocast():
            self.forward(input_ids=self.tokens, use_cache=False)


def measure(size: Size, shape: tuple[int, int], rounds: int, device, fast: bool) -> dict[str, dict]:
    """By row: the series of steps and of mean passes, parameters beside the twin's, and peak bytes of a step."""
    if fast:
        # The models are of one class, and each compiles its forward anew.
        torch._dynamo.config.recompile_limit = 16 * (len(VARIANTS) + 1)
    make = partial(Model, size, shape, device, fast)
    twin, eager = make(), make(attn="eager")
    models = {name: make(**variant) for name, variant in VARIANTS.items()}
    contenders = {EAGER: eager, **models}
    warmup = 3 if fast else 1
    steps = interleave(twin.step, {name: one.step for name, one in contenders.items()}, rounds, warmup, device)
    passes = interleave(
        twin.mean_pass, {name: one.mean_pass for name, one in contenders.items()}, 2 * rounds, warmup, device
    )
    return {
        name: {
            "step": steps[name].summary(),
            "mean_pass": passes[name].summary(),
            "parameters": one.parameters / twin.parameters,
            "peak_bytes": peak(one, device),
        }
        for name, one in {"baseline": twin, **contenders}.items()
    }


def peak(model: Model, device) -> int:
    """The most bytes that a training step held beyond weights, their gradients and the optimizer's state."""
    if torch.device(device).type == "cuda":
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        model.step()
        return torch.cuda.max_memory_allocated() - held
    return peak_tensors(model.step)


def main(argv: list[str] | None = None) -> dict:
    options = arguments(__doc__.splitlines()[0], rounds=5, threads=2).parse_args(argv)
    torch.set_num_threads(options.threads)
    size, shape = (TINY, (2, 16)) if options.tiny else (SIZE, (8, 256))
    on_cpu = measure(size, shape, options.rounds, "cpu", fast=False)
    device = accelerator()
    on_device = None if device is None else measure(size, shape, 10 * options.rounds, device, fast=True)
    result = {
        "claim": "a model with variational attention / deterministic twin",
        "conditions": {
            "model": size.describe(),
            "batch": f"{shape[0]} x {shape[1]} tokens",
            "twin": "SDPA attention",
            "step": "forward, backward, AdamW, one posterior sample",
            "memory": f"peak of tensors during a step less what was held before it, beside the {EAGER}",
            "CPU": "eager, float32",
            "accelerator": "torch.compile, bfloat16 autocast" if device is not None else NOT_MEASURED,
        },
        "machine": machine(options.threads),
        "rows": {name: {"cpu": row, "accelerator": on_device and on_device[name]} for name, row in on_cpu.items()},
    }
    base = on_cpu[EAGER]["peak_bytes"]
    rows = [
        [
            "deterministic twin" if name == "baseline" else name,
            f"{row['cpu']['step']['wall_seconds'] * 1e3:.0f}",
            cell(row["cpu"]["step"], "wall"),
            cell(row["cpu"]["mean_pass"], "wall"),
            f"{row['cpu']['peak_bytes'] / 2**20:.0f}",
            f"{row['cpu']['peak_bytes'] / base:.2f}",
            cell(row["accelerator"] and row["accelerator"]["step"], "wall"),
            f"{row['cpu']['parameters']:.4f}",
        ]
        for name, row in result["rows"].items()
    ]
    columns = [
        *("attention", "ms, CPU step", "step", "mean pass", "MiB, step", "memory"),
        *("step, accelerator", "parameters"),
    ]
    show("Variational attention beside the deterministic twin's", columns, rows, result, options.json)
    return result


if __name__ == "__main__":
    main()
