"""What a retrofit costs beside the model it was made of: its mean pass, its generation, its parameters, its adapter.

Run it with `python benchmarks/retrofit_cost.py`.
"""

import copy
import tempfile
from functools import partial
from pathlib import Path

import torch
from generation import SAMPLES, top_shares
from models import TINY, Size
from peft import get_peft_model
from report import NOT_MEASURED, arguments, cell, machine, show
from timing import accelerator, interleave
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hf_variational import EVEAdapterConfig, EVEConfig, variationalize

EVE = EVEConfig(scale="input", scale_rank=8, prior="centered")
TINY_GPT2 = {"vocab_size": 128, "n_embd": 32, "n_layer": 4, "n_head": 2, "n_positions": 64}


def gpt2(tiny: bool) -> GPT2LMHeadModel:
    """GPT-2 small's shape, freshly initialised."""
    torch.manual_seed(0)
    shape = TINY_GPT2 if tiny else {}
    return GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=None, eos_token_id=None)).eval()


def llama(size: Size) -> LlamaForCausalLM:
    """The shape of `generation.py`, as a stock Llama."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**vars(size), bos_token_id=None, eos_token_id=None)).eval()


def retrofit(base, layers):
    return variationalize(copy.deepcopy(base), eve=EVE, layers=layers)


def compare(base, models: dict, shape: tuple[int, int], new_tokens: int, rounds: int, mean_pass: bool) -> dict:
    """Summaries of each retrofit's generation with measures beside the base's plain greedy generate."""
    device = next(base.parameters()).device
    vocabulary = base.config.vocab_size
    tokens = torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(1)).to(device)
    plain = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "max_new_tokens": new_tokens,
        "min_new_tokens": new_tokens,
        "do_sample": False,
    }
    measured = {
        **plain, "return_dict_in_generate": True, "output_uncertainty": True, "num_posterior_samples": SAMPLES
    }  # fmt: skip
    rows = {f"{SAMPLES} samples, {name}": partial(model.generate, **measured) for name, model in models.items()}
    if mean_pass:
        rows = {"mean pass, all layers": partial(models["all layers"].generate, **plain), **rows}
    series = interleave(partial(base.generate, **plain), rows, rounds, device=device)
    return {name: one.summary() for name, one in series.items()}


def forward_passes(base, shape: tuple[int, int], rounds: int) -> dict:
    """Summaries of the mean pass of a retrofit of all layers, beside the base's forward pass over the same tokens."""
    device = next(base.parameters()).device
    tokens = torch.randint(0, base.config.vocab_size, shape, generator=torch.Generator().manual_seed(2)).to(device)
    run = torch.no_grad()(lambda model: model(input_ids=tokens, use_cache=False))
    rows = {"mean pass over a text, all layers": partial(run, retrofit(base, "all"))}
    series = interleave(partial(run, base), rows, rounds, device=device)
    return {name: one.summary() for name, one in series.items() if name != "baseline"}


def sizes(base) -> dict[str, float]:
    """What a retrofit adds: parameters of all layers over the base's, and the file of an adapter, bytes."""
    model = retrofit(base, "all")
    added = model.num_parameters() - base.num_parameters()
    adapter = get_peft_model(
        copy.deepcopy(base), EVEAdapterConfig(eve=EVE, layers="last_quarter", task_type="CAUSAL_LM")
    )
    with tempfile.TemporaryDirectory() as folder:
        adapter.save_pretrained(folder)
        adapter_bytes = sum(file.stat().st_size for file in Path(folder).iterdir())
    return {
        "parameters of the base": base.num_parameters(),
        "parameters added, all layers": added,
        "share added, all layers": added / base.num_parameters(),
        "adapter of the last quarter, bytes": adapter_bytes,
    }


def measure(options, device, dtype) -> dict[str, dict]:
    """Summaries by row, of both shapes."""
    base = gpt2(options.tiny).to(device, dtype)
    shape, new_tokens = ((1, 8), 4) if options.tiny else ((1, 64), 64)
    names = {"all layers": "all", "last quarter": "last_quarter", "last layer": "last"}
    models = {name: retrofit(base, layers) for name, layers in names.items()}
    rows = {
        f"GPT-2, batch 1: {name}": row
        for name, row in compare(base, models, shape, new_tokens, options.rounds, mean_pass=True).items()
    }
    text = (2, 8) if options.tiny else (8, 128)
    rows |= {f"GPT-2: {name}": row for name, row in forward_passes(base, text, options.rounds).items()}
    del base, models
    size = TINY if options.tiny else Size()
    base = llama(size).to(device, dtype)
    shares = {"all layers": "all", **top_shares(size.num_hidden_layers), "last layer": "last"}
    models = {name: retrofit(base, layers) for name, layers in shares.items()}
    shape, new_tokens = ((2, 8), 4) if options.tiny else ((4, 64), 64)
    compared = compare(base, models, shape, new_tokens, options.rounds, mean_pass=False)
    return rows | {f"Llama, batch 4: {name}": row for name, row in compared.items()}


def main(argv: list[str] | None = None) -> dict:
    parser = arguments(__doc__.splitlines()[0], rounds=7, threads=1)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    cpu = measure(options, "cpu", torch.float32)
    device = accelerator()
    fast = None if device is None else measure(options, device, torch.bfloat16)
    result = {
        "claim": "a retrofit / the stock model it was made of",
        "conditions": {
            "GPT-2": "the shape of GPT-2 small, 64 new tokens after 64, and 8 x 128 tokens of a text",
            "Llama": f"{Size().describe()}, 64 new tokens after 64",
            "EVE": "input-conditioned scale of rank 8, centered prior",
            "measures": "on with samples",
            "CPU": "eager, float32",
            "accelerator": "eager, bfloat16" if device is not None else NOT_MEASURED,
        },
        "machine": machine(options.threads),
        "sizes": sizes(gpt2(options.tiny)),
        "rows": {name: {"cpu": cpu[name], "accelerator": fast and fast[name]} for name in cpu},
    }
    rows = [
        [
            name.replace("baseline", "stock model, plain greedy"),
            f"{row['cpu']['wall_seconds']:.2f}",
            cell(row["cpu"], "wall"),
            cell(row["cpu"], "cpu"),
            cell(row["accelerator"], "wall"),
        ]
        for name, row in result["rows"].items()
    ]
    added = result["sizes"]
    rows += [
        ["GPT-2: parameters, all layers", "", f"{1 + added['share added, all layers']:.4f}", "", ""],
        ["GPT-2: adapter of the last quarter", "", f"{added['adapter of the last quarter, bytes']:,} bytes", "", ""],
    ]
    columns = ["retrofit", "s, CPU", "ratio, wall clock", "ratio, CPU time", "ratio, accelerator"]
    show("A retrofit beside the stock model it was made of", columns, rows, result, options.json)
    return result


if __name__ == "__main__":
    main()
