"""Checkpoints that can be trusted: complete, finite, in one dtype where that is asked."""

import json
import re
from pathlib import Path

import torch
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def last_complete_checkpoint(folder: str | Path) -> str | None:
    """
    The newest checkpoint in a folder that was written to its end, or `None`.

    The trainer's state is the last file of a checkpoint: one that was interrupted while it was written has none, or
    half of one.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return None
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _CHECKPOINT.fullmatch(path.name))]
    for _, path in sorted(found, reverse=True):
        try:
            json.loads((path / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return str(path)
    return None


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@torch.no_grad()
def non_finite_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters with a value that is not finite (of a sharded one: on this process)."""
    names, finite = [], []
    for name, parameter in model.named_parameters():
        local = _local(parameter)
        if local.is_floating_point() and local.device.type != "meta":
            names.append(name)
            finite.append(local.isfinite().all())
    if not finite:
        return []
    flags = torch.stack([flag.to(finite[0].device) for flag in finite]).tolist()
    return [name for name, ok in zip(names, flags, strict=True) if not ok]


def refuse_mixed_dtypes(model: nn.Module) -> None:
    """
    FSDP2 shards the parameters of a layer together, so all that is trained has to have one dtype.

    Log-scales load in float32 whatever the model's dtype, so a variational model loaded in bfloat16 has two.
    """
    by_dtype: dict[torch.dtype, list[str]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            by_dtype.setdefault(parameter.dtype, []).append(name)
    if len(by_dtype) > 1:
        parts = [
            f"{str(dtype).removeprefix('torch.')}: {len(names)} ({names[0]}, ...)" for dtype, names in by_dtype.items()
        ]
        raise ValueError(
            f"FSDP2 needs one dtype for the parameters it trains, and this model has {'; '.join(parts)}. Load the "
            "model in float32 and let `bf16=True` in the training arguments do the mixed precision."
        )
