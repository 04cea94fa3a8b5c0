"""What a method costs: parameters, floating-point operations, seconds and memory, all of them measured.

Operations are those of the matrix products, a multiplication and an addition each, as torch's `FlopCounterMode` counts
them; where rows split inside the model (or only at its head) the count knows, because it is of the pass itself.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Cost:
    """What a model costs on one batch.

    Attributes:
        parameters: of all members, each shared one once.
        trained_parameters: of them, those with a gradient.
        weight_bytes: of parameters and buffers.
        training_flops_per_token: floating-point operations of one forward and backward pass in train mode, with as
            many samples as the model trains with, per token of the batch; 0 if nothing is trained. Times the tokens
            that were trained on this is the training's cost; about 6 times the parameters that a token passes through.
        inference_flops_per_token: of one forward pass with `num_posterior_samples`, without a cache, likewise.
        seconds: of that pass, the median of some.
        peak_memory_bytes: the most that pass had allocated beside the weights; `None` where the device does not tell.
        num_posterior_samples: S.
        tokens: of the batch, padding included.
        device: type of the device.
    """

    parameters: int
    trained_parameters: int
    weight_bytes: int
    training_flops_per_token: float
    inference_flops_per_token: float
    seconds: float
    peak_memory_bytes: int | None
    num_posterior_samples: int
    tokens: int
    device: str


def measure_cost(model: nn.Module, batch: dict[str, Tensor], num_posterior_samples: int = 8, repeats: int = 3) -> Cost:
    """Measures what a causal language model costs on a batch. Gradients and modes stay as they were.

    Args:
        model: any model of the package, or a deterministic one, which is measured at its mean pass.
        batch: `input_ids` [batch, length] and what else `forward` takes, on the model's device.
        num_posterior_samples: S of the inference pass.
        repeats: passes that are timed, after one that is not.

    Raises:
        ValueError: for a batch without `input_ids`, or fewer than one repeat.
    """
    if not isinstance(batch.get("input_ids"), Tensor):
        raise ValueError(f"batch needs input_ids [batch, length], got {sorted(batch)}.")
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats!r}.")
    device, tokens = batch["input_ids"].device, batch["input_ids"].numel()
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "shift_labels")}
    options = {"num_posterior_samples": num_posterior_samples} if getattr(model, "variational_layers", None) else {}
    modes = {module: module.training for module in model.modules()}

    def infer() -> None:
        with torch.no_grad():
            model(**inputs, **options, use_cache=False)

    try:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        training = _flops(lambda: _training_pass(model, inputs, trained)) if trained else 0
        model.eval()
        inference = _flops(infer)
        infer()
        seconds = statistics.median(_seconds(infer, device) for _ in range(repeats))
        peak = _peak_memory(infer, device)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return Cost(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        trained_parameters=sum(parameter.numel() for parameter in trained),
        weight_bytes=sum(tensor.nbytes for tensors in (model.parameters(), model.buffers()) for tensor in tensors),
        training_flops_per_token=training / tokens,
        inference_flops_per_token=inference / tokens,
        seconds=seconds,
        peak_memory_bytes=peak,
        num_posterior_samples=options.get("num_posterior_samples", 0),
        tokens=tokens,
        device=device.type,
    )


def _training_pass(model: nn.Module, inputs: dict[str, Tensor], trained: list[nn.Parameter]) -> None:
    model.train()
    loss = model(**inputs, labels=inputs["input_ids"], use_cache=False).loss
    torch.autograd.grad(loss, trained, allow_unused=True)


def _flops(run: Callable[[], None]) -> int:
    # Of the fused kernels of attention the counter knows some; of the products that they stand for, all.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def _peak_memory(run: Callable[[], None], device: torch.device) -> int | None:
    if device.type == "cpu":
        return _peak_memory_of_cpu(run)
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before


def _peak_memory_of_cpu(run: Callable[[], None]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    held = peak = 0
    for event in events:
        if event.get("name") == "[memory]":
            held += event["args"]["Bytes"]
            peak = max(peak, held)
    return peak
