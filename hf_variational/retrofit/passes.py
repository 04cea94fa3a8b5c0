"""A forward pass of a retrofitted model: its sample axes, how its modules find them, and where its rows split.

The axes are in a context variable, not among the arguments of the layers, because some families hand no keyword
arguments down; what gradient checkpointing computes again in the backward pass finds them there as well.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from transformers.utils.output_capturing import CompileableContextVar

from ..modeling.sample_axis import SampleAxis, repeat_rows
from .families import Layer

# An axis for each tower: positions, padding and cache of an encoder are not its decoder's.
Axes = tuple[SampleAxis, ...]
_axes = CompileableContextVar("variational_axes")


def active_axis(tower: int = 0) -> SampleAxis | None:
    """The sample axis of the forward pass that is under way, or `None` outside of one."""
    axes = _axes.get()
    return None if axes is None else axes[tower]


@contextmanager
def active_axes(axes: Axes | None) -> Iterator[None]:
    """Makes `axes` those of the forward pass inside the block."""
    token = _axes.set(axes)
    try:
        yield
    finally:
        _axes.reset(token)


def checkpoint_in_pass(function, *args, checkpoint, **kwargs):
    """`checkpoint(function, ...)` whose recomputation, in the backward pass, has the axes of now."""
    axes = _axes.get()

    def run(*inner, **inner_kwargs):
        with active_axes(axes):
            return function(*inner, **inner_kwargs)

    return checkpoint(run, *args, **kwargs)


class RowHooks:
    """The hooks by which rows enter at the first variational layer.

    They expand what a layer is given, so that it never sees rows of two kinds. Where the first layer's attention is
    not variational, it is computed for one row a sequence all the same.
    """

    def __init__(
        self,
        layers: list[Layer],
        split: int,
        shares_attention: bool,
        heads: int,
        repeats_inputs: bool = True,
        decoder: nn.Module | None = None,
        head: nn.Module | None = None,
    ):
        """
        Args:
            layers: all layers of the model.
            split: number of the first variational one.
            shares_attention: whether that layer's attention is computed for one row a sequence.
            heads: attention heads of a layer.
            repeats_inputs: whether the layers below may be given a row for each sample.
            decoder: the stack of a decoder behind an encoder that samples: rows enter before it makes its masks.
            head: the output embeddings.
        """
        self.shares_attention = shares_attention
        self.handles = []
        for layer in layers:
            if layer.index < split and not repeats_inputs:
                continue
            change = _leave_rows if layer.index < split else _enter_rows
            hook = partial(_before, layer.tower, heads, change)
            self.handles.append(layer.module.register_forward_pre_hook(hook, with_kwargs=True))
        if head is not None:
            self.handles.append(head.register_forward_pre_hook(_in_one_piece))
        if decoder is not None:
            hook = partial(_before, 1, heads, _enter_rows)
            self.handles.append(decoder.register_forward_pre_hook(hook, with_kwargs=True))
        if shares_attention:
            attention, tower = layers[split].attention, layers[split].tower
            hook = partial(_before, tower, heads, _leave_rows)
            self.handles.append(attention.register_forward_pre_hook(hook, with_kwargs=True))
            self.handles.append(attention.register_forward_hook(partial(_after, tower)))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def _in_one_piece(module: nn.Module, args: tuple) -> tuple | None:
    # Of states with gaps between rows, as the last of each sequence are, torch makes a product for each row.
    axis = active_axis()
    if axis is None or axis.num_samples <= 1 or not torch.is_tensor(args[0]):
        return None
    return (args[0].contiguous(), *args[1:])


def _before(tower: int, heads: int, change, module: nn.Module, args: tuple, kwargs: dict):
    axis = active_axis(tower)
    if axis is None or axis.num_samples <= 1:
        return None
    changed = {name: _changed(value, axis, change) for name, value in kwargs.items()}
    alibi = kwargs.get("alibi")
    if alibi is not None and alibi.ndim == 3:  # [rows * heads, 1, keys]
        changed["alibi"] = change(alibi.unflatten(0, (-1, heads)), axis).flatten(0, 1)
    return tuple(_changed(value, axis, change) for value in args), changed


def _after(tower: int, module: nn.Module, args: tuple, output):
    axis = active_axis(tower)
    if axis is None or axis.num_samples <= 1:
        return None
    return _changed(output, axis, _enter_rows)


def _changed(value, axis: SampleAxis, change):
    if isinstance(value, tuple):
        return tuple(_changed(item, axis, change) for item in value)
    if type(value).__name__ == "BlockMask":
        raise ValueError(
            "Posterior samples cannot expand an attention mask of type BlockMask: use attn_implementation='sdpa' or "
            "'eager', or num_posterior_samples=0."
        )
    return change(value, axis) if torch.is_tensor(value) and value.ndim > 1 else value


def _enter_rows(value: Tensor, axis: SampleAxis) -> Tensor:
    return repeat_rows(value, axis.num_samples) if value.shape[0] == axis.batch else value


def _leave_rows(value: Tensor, axis: SampleAxis) -> Tensor:
    # In one piece, because families view what they are given.
    return value[:: axis.num_samples].contiguous() if value.shape[0] == axis.rows else value
