"""Noise that a test can hand out twice: tables per layer, sequence, sample and position, read by request."""

import torch
from torch import Tensor

from hf_variational import NoiseRequest


class NoiseTable:
    """Standard normal noise for every (layer, sequence, sample, position); `noise="sequence"` reads position 0.

    Called with a request it answers for all its sequences and samples; `only` restricts it to some. Attention has a
    table of its own, for every (layer, sequence, sample, query position, head, key position, draw).
    """

    def __init__(
        self,
        layers: int,
        sequences: int,
        samples: int,
        positions: int,
        width: tuple[int, ...],
        seed: int = 0,
        heads: int = 0,
        draws: int = 2,
    ):
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(layers, sequences, samples, positions, *width, generator=generator)
        rows = (layers, sequences, samples)
        self.attention = torch.randn(*rows, positions, heads, positions, draws, generator=generator)

    @classmethod
    def of(cls, model, sequences: int, samples: int, positions: int = 32, seed: int = 0) -> "NoiseTable":
        """A table wide enough for a model."""
        config = model.config
        width = (config.intermediate_size,)
        if config.eve is None:
            width = (0,)
        elif config.eve.latent_dim > 1:
            width = (config.intermediate_size, config.eve.latent_dim)
        heads = 0 if config.attention is None else config.num_attention_heads
        return cls(config.num_hidden_layers, sequences, samples, positions, width, seed, heads)

    def __call__(self, request: NoiseRequest) -> Tensor:
        table = self.table[request.layer]
        assert request.batch == table.shape[0] and request.num_samples == table.shape[1]
        if request.site == "attention":
            return self._of_weights(request)
        if request.positions is None:
            return table[:, :, 0:1].flatten(0, 1)
        sequences = torch.arange(table.shape[0])[:, None, None]
        samples = torch.arange(table.shape[1])[None, :, None]
        return table[sequences, samples, request.positions[:, None, :]].flatten(0, 1)

    def _of_weights(self, request: NoiseRequest) -> Tensor:
        table = self.attention[request.layer]
        sequences = torch.arange(table.shape[0])[:, None, None]
        # Where a key is masked its position means nothing.
        keys = request.key_positions.clamp(0, table.shape[4] - 1)[:, None, :]
        picked = table.transpose(3, 4)[sequences, :, request.positions[:, :, None], keys]
        # [sequences, queries, keys, samples, heads, draws]
        return picked.permute(0, 3, 4, 1, 2, 5)[..., : request.shape[-1]].flatten(0, 1)

    def only(
        self, sequences: slice | list[int] = slice(None), samples: slice | list[int] = slice(None)
    ) -> "NoiseTable":
        """The table of some sequences and samples."""
        part = object.__new__(type(self))
        part.table = self.table[:, sequences][:, :, samples]
        part.attention = self.attention[:, sequences][:, :, samples]
        return part
