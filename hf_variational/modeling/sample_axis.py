"""The sample axis: S posterior samples are S rows of the batch, from the first variational layer to the logits.

Row `b * S + s` is sample `s` of sequence `b`. Below the split every sequence is computed once and cached once; from
the split on each sample keeps its own keys and values, and the cache moves whole groups of S rows.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


@dataclass(frozen=True)
class NoiseRequest:
    """What a layer asks of a noise source.

    Attributes:
        layer: number of the layer.
        batch: number of sequences.
        num_samples: posterior samples S.
        positions: position ids of the tokens, [batch, length]; `None` for `noise="sequence"`.
        shape: of the answer. Of feed-forward units [batch * S, length, units] (a last axis for a latent width above
            1), where length is 1 for `noise="sequence"`; of attention weights [batch * S, heads, length, keys, draws].
            Row `b * S + s` is sample `s` of sequence `b`.
        device: of the answer.
        site: `"ffn"` or `"attention"`: where in the layer.
        key_positions: position ids of the keys, [batch, keys], for attention; meaningless where a key is masked.
    """

    layer: int
    batch: int
    num_samples: int
    positions: Tensor | None
    shape: tuple[int, ...]
    device: torch.device
    site: str = "ffn"
    key_positions: Tensor | None = None


NoiseSource = Callable[[NoiseRequest], Tensor]
# Plain, not a ContextVar, because torch.compile cannot trace one; noise sources serve tests and studies.
_noise_source: NoiseSource | None = None


@contextmanager
def posterior_noise(source: NoiseSource) -> Iterator[None]:
    """Lets `source(request) -> Tensor` supply the standard normal noise of every posterior sample inside the block.

    Without it noise comes from the global generator, which gradient checkpointing restores. Not thread-safe.

    Example:

    ```python
    >>> table = torch.randn(6, 512, 1024)  # layer, position, unit
    >>> def source(request):
    ...     noise = table[request.layer, request.positions]  # the same for each sample
    ...     return noise.repeat_interleave(request.num_samples, dim=0)
    >>> with posterior_noise(source):
    ...     model(input_ids, num_posterior_samples=4)
    ```
    """
    global _noise_source
    previous, _noise_source = _noise_source, source
    try:
        yield
    finally:
        _noise_source = previous


def active_noise_source() -> NoiseSource | None:
    """The source of the innermost `posterior_noise` block, or `None`."""
    return _noise_source


def repeat_rows(tensor: Tensor, copies: int) -> Tensor:
    """Repeats each row `copies` times, neighbours: [rows, ...] to [rows * copies, ...]."""
    if copies == 1:
        return tensor
    return tensor.unsqueeze(1).expand(-1, copies, *tensor.shape[1:]).flatten(0, 1)


def mean_over_samples(tensor: Tensor, batch: int) -> Tensor:
    """Averages groups of sample rows: [batch * S, ...] to [batch, ...]; a tensor of `batch` rows is returned as is."""
    return tensor if tensor.shape[0] == batch else tensor.unflatten(0, (batch, -1)).mean(1)


class SampleAxis:
    """How one forward pass samples, and where its rows stand. Handed to every layer, so that a checkpointed layer's
    recomputation finds what its first computation found.

    Attributes:
        num_samples: S; 0 is the mean pass.
        batch: number of sequences.
        positions: position ids, [batch, length] (or [1, length] where all rows share them); `None`: 0, 1, 2, ...
        record: whether the variational layers compute their KL and hand their posteriors to the tape.
        statistics: whether they add per-unit statistics.
        token_weights: [batch, length], 1 at the positions that carry KL (the statistics are means over them); `None`:
            all.
        follows: [batch, length], true where the position continues the sequence of the one before it.
        cache: the cache, for the noise that lasts a sequence.
        seen: tokens that the cache held before this pass.
        tape: where the posteriors' records go in a model that transformers does not record them for.
        first_layer: number of the layer that the cache counts from: a decoder's layers come after its encoder's.
        unit_weights: layer number to `UnitWeights`: what its units are charged, each by itself.
        visited, attentions: in a retrofitted model, (layer, site) of the posteriors that this axis has reached; and
            whether attention weights are asked for.
    """

    def __init__(
        self,
        num_samples: int,
        batch: int,
        positions: Tensor | None,
        record: bool = False,
        statistics: bool = False,
        token_weights: Tensor | None = None,
        follows: Tensor | None = None,
        cache: Cache | None = None,
        seen: Tensor | int = 0,
        tape: list | None = None,
        first_layer: int = 0,
        unit_weights: dict | None = None,
    ):
        self.num_samples = num_samples
        self.batch = batch
        self.positions = positions
        self.record = record
        self.statistics = statistics
        self.token_weights = token_weights
        self.follows = follows
        self.cache = cache
        self.seen = seen
        self.tape = tape
        self.first_layer = first_layer
        self.unit_weights = unit_weights
        self.visited: set[tuple[int, str]] = set()
        self.attentions = False
        self.noise_source = _noise_source

    @property
    def rows(self) -> int:
        """Rows above the split: batch * max(S, 1)."""
        return self.batch * max(self.num_samples, 1)

    def expand(self, tensor: Tensor) -> Tensor:
        """Repeats a tensor of `batch` rows to the rows above the split; one that has them is returned as is."""
        return repeat_rows(tensor, self.rows // tensor.shape[0])

    def weights(self, rows: int, length: int, device: torch.device) -> Tensor:
        """`token_weights` of the rows of a layer, [rows, length]."""
        if self.token_weights is None:
            return torch.ones(rows, length, dtype=torch.bool, device=device)
        return repeat_rows(self.token_weights.to(device), rows // self.batch)

    def noise(self, layer: int, length: int, width: tuple[int, ...], device: torch.device) -> Tensor:
        """Fresh standard normal noise in float32, [batch * S, length, *width]."""
        positions = None if self.noise_source is None else self._positions(length, device)
        return self._draw(layer, length, width, device, positions)

    def sequence_noise(self, layer: int, width: tuple[int, ...], device: torch.device) -> Tensor:
        """Noise that lasts a sequence, [batch * S, 1, *width]: drawn when it starts, then kept by the cache."""
        kept = self.cache.layers[layer - self.first_layer] if self.cache is not None else None
        if kept is not None and kept.sequence_noise is not None:
            return kept.sequence_noise
        noise = self._draw(layer, 1, width, device, None)
        if kept is not None:
            kept.sequence_noise = noise
        return noise

    def attention_noise(self, layer: int, shape: tuple[int, int, int, int], device: torch.device) -> Tensor | None:
        """What the noise source supplies for attention weights, [batch * S, *shape], shape [heads, length, keys,
        draws]; `None` without a source: the sampler then draws from the global generator.
        """
        if self.noise_source is None or self.num_samples == 0:
            return None
        _, length, keys, _ = shape
        positions = self._positions(length, device)
        if length == keys and int(self.seen) == 0:
            key_positions = positions
        else:
            end = int(self.seen) + length
            # A sliding cache holds the last keys, every other one holds them from the start.
            index = torch.arange(keys, device=positions.device) + max(0, end - keys)
            key_positions = positions[:, -1:] - (end - 1) + index
        return self._ask(
            NoiseRequest(
                layer, self.batch, self.num_samples, positions, (self.rows, *shape), device, "attention", key_positions
            )
        )

    def _positions(self, length: int, device: torch.device) -> Tensor:
        positions = self.positions
        if positions is None:
            positions = (torch.arange(length, device=device) + int(self.seen)).unsqueeze(0)
        return positions.expand(self.batch, -1)

    def _draw(self, layer, length, width, device, positions):
        shape = (self.rows, length, *width)
        if self.noise_source is None:
            return torch.randn(shape, device=device)
        return self._ask(NoiseRequest(layer, self.batch, self.num_samples, positions, shape, device))

    def _ask(self, request: NoiseRequest) -> Tensor:
        noise = self.noise_source(request)
        if noise.shape != torch.Size(request.shape):
            raise ValueError(
                f"The posterior_noise source returned {tuple(noise.shape)} for the {request.site} of layer "
                f"{request.layer}, expected {request.shape}."
            )
        return noise.to(request.device, torch.float32)


class SampledCacheLayer:
    """Mixed into a cache layer's class where samples live: moves whole groups of S rows.

    Attributes:
        num_samples: S.
        copies: rows of keys and values per sequence; 1 below and at the split, S above it.
        sequence_noise: noise that lasts a sequence, [sequences * S, 1, units], or `None`.
        layer_class: class of the cache layer underneath; `grows`: whether it is the plain growing one.
        key_room, value_room: what the keys and values of a growing cache are the front of.
    """

    _layer_type = None  # keeps transformers from registering this class in its layer-type tables
    num_samples: int = 0
    copies: int = 1
    sequence_noise: Tensor | None = None
    layer_class: type
    grows: bool = False
    key_room: Tensor | None = None
    value_room: Tensor | None = None

    def _select(self, indices: Tensor, move: Callable[[Tensor], None]) -> None:
        move(_group_rows(indices, self.copies))
        if self.sequence_noise is not None:
            rows = _group_rows(indices, self.num_samples)
            self.sequence_noise = self.sequence_noise[rows.to(self.sequence_noise.device)]

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Appends keys and values, [rows, heads, length, head_dim], and returns all of them.

        Samples multiply what a growing cache holds, and a concatenation would copy all of it for each token: they are
        written into spare room instead. Autograd, and caches that do not simply grow, keep their own way.
        """
        if not self.grows or torch.is_grad_enabled():
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.key_room = _append(self.keys, self.key_room, key_states)
        self.values, self.value_room = _append(self.values, self.value_room, value_states)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorders sequences for beam search; `beam_idx` numbers sequences, not rows."""
        self._select(beam_idx, super().reorder_cache)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the sequences numbered by `indices`."""
        self._select(indices, super().batch_select_indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each sequence `repeats` times."""
        if self.get_seq_length() > 0:
            sequences = torch.arange(self.keys.shape[0] // self.copies, device=self.keys.device)
            self.batch_select_indices(sequences.repeat_interleave(repeats))

    def reset(self) -> None:
        """Empties the layer; the next sequence draws its own noise."""
        super().reset()
        self.sequence_noise = None

    def __reduce__(self):
        return _with_samples, (self.layer_class, self.__dict__)


def _append(held: Tensor, room: Tensor | None, states: Tensor) -> tuple[Tensor, Tensor]:
    """Writes `states` behind `held`, which is the front of `room` or else moves into a new one, half as long again."""
    start = held.shape[-2] if held.numel() else 0
    end = start + states.shape[-2]
    is_front = room is not None and held.data_ptr() == room.data_ptr() and held.shape[0] == room.shape[0]
    if not is_front or room.shape[-2] < end:
        room = states.new_empty(*states.shape[:2], end + max(end // 2, 16), states.shape[-1])
        if start:
            room[:, :, :start] = held
    room[:, :, start:end] = states
    return room[:, :, :end], room


def _group_rows(indices: Tensor, copies: int) -> Tensor:
    if copies == 1:
        return indices
    return (indices.unsqueeze(1) * copies + torch.arange(copies, device=indices.device)).flatten()


@cache
def _sampled_class(layer_class: type) -> type:
    namespace = {"_layer_type": None, "layer_class": layer_class, "grows": layer_class is DynamicLayer}
    return type(f"Sampled{layer_class.__name__}", (SampledCacheLayer, layer_class), namespace)


def _with_samples(layer_class: type, state: dict) -> SampledCacheLayer:
    """A cache layer of `layer_class` with `state` that moves groups of rows."""
    sampled_class = _sampled_class(layer_class)
    sampled = sampled_class.__new__(sampled_class)
    sampled.__dict__.update(state)
    return sampled


def tokens_held(cache: Cache | None) -> Tensor | int:
    """Tokens that the cache holds now; a copy, because a static cache counts on in the tensor that it answers with."""
    held = 0 if cache is None else cache.get_seq_length()
    return held.clone() if torch.is_tensor(held) else held


def prepare_cache(cache: Cache, num_layers: int, split: int, num_samples: int, shared_at_split: bool = True) -> None:
    """Makes the cache of a pass with samples move groups of rows, from the layer of the split on.

    Args:
        cache: changed in place.
        num_layers: layers of the model.
        split: number of the first variational layer.
        num_samples: S.
        shared_at_split: whether that layer's keys and values are still one row a sequence.

    Raises:
        ValueError: if the cache was filled with another number of samples.
    """
    while len(cache.layers) < num_layers:
        cache.layers.append(cache.layer_class_to_replicate())
    for index in range(split, num_layers):
        layer = cache.layers[index]
        is_sampled = isinstance(layer, SampledCacheLayer)
        held = layer.num_samples if is_sampled else 0
        if held == num_samples:
            continue
        # At the split itself a mean pass has filled the cache with the very rows that samples have.
        shared = shared_at_split and index == split
        if not shared or held:
            if layer.is_initialized and int(layer.get_seq_length()) > 0:
                raise ValueError(
                    f"past_key_values was filled with num_posterior_samples={held}, this pass has {num_samples}: go "
                    f"on with {held}, or start again with a new cache."
                )
            layer.is_initialized = False  # what is allocated, if anything, is for another number of rows
        if not is_sampled:
            layer = cache.layers[index] = _with_samples(type(layer), layer.__dict__)
        layer.num_samples = num_samples
        layer.copies = 1 if shared else max(num_samples, 1)
