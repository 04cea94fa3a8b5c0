"""How data reaches a model in an evaluation: batches of any data set, their targets, and a seeded generator."""

import contextlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .streaming import IGNORED_LABEL


def _collate(examples: list, pad_token_id: int) -> dict[str, Tensor]:
    """Pads on the right; takes dictionaries with `input_ids`, or bare sequences of token ids."""
    examples = [example if isinstance(example, Mapping) else {"input_ids": example} for example in examples]
    length = max(len(example["input_ids"]) for example in examples)
    batch = {}
    for name, padding in (("input_ids", pad_token_id), ("attention_mask", 0), ("labels", IGNORED_LABEL)):
        if name == "labels" and "labels" not in examples[0]:
            continue
        batch[name] = torch.full((len(examples), length), padding, dtype=torch.long)
        for row, example in enumerate(examples):
            values = torch.as_tensor(example.get(name, [1] * len(example["input_ids"])), dtype=torch.long)
            batch[name][row, : len(values)] = values
    return batch


def data_batches(data, batch_size: int, pad_token_id: int, accelerator) -> Iterable[Mapping]:
    if isinstance(data, DataLoader) or not hasattr(data, "__getitem__"):
        return data
    indices = range(len(data))
    if accelerator is not None:
        # every process its own share, without repeated rows
        indices = indices[accelerator.process_index :: accelerator.num_processes]
    return DataLoader(
        [data[index] for index in indices] if isinstance(data, list) else torch.utils.data.Subset(data, indices),
        batch_size=batch_size,
        collate_fn=lambda examples: _collate(examples, pad_token_id),
    )


def take_labels(batch: dict[str, Tensor]) -> Tensor:
    """Takes the labels out of a batch, or makes them; what would be predicted from padding has none."""
    labels = batch.pop("labels", None)
    attended = batch.get("attention_mask")
    attended = None if attended is None or attended.dim() != 2 else attended.ne(0)
    if labels is None:
        labels = batch["input_ids"]
        if attended is not None:
            labels = labels.masked_fill(~attended, IGNORED_LABEL)
    if attended is None:
        return labels
    # Of a sequence that is padded on the left the first token follows a position that saw nothing.
    from_padding = torch.nn.functional.pad(~attended[:, :-1], (1, 0), value=False)
    return labels.masked_fill(from_padding, IGNORED_LABEL)


@contextlib.contextmanager
def evaluating(model, keep_generator: bool, device: torch.device):
    training = {module: module.training for module in model.modules()}
    devices = [device] if device.type != "cpu" else []
    kind = device.type if devices else "cuda"
    fork = torch.random.fork_rng(devices=devices, device_type=kind, enabled=keep_generator)
    try:
        model.eval()
        with torch.no_grad(), fork:
            yield
    finally:
        for module, mode in training.items():
            module.training = mode
