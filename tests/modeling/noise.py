"""Noise that a test can hand out twice: a table per (layer, sequence, sample, position), and sources that read it."""

import torch
from torch import Tensor

from hf_variational import NoiseRequest


class NoiseTable:
    """Standard normal noise for every (layer, sequence, sample, position); `noise="sequence"` reads position 0.

    Called with a request it answers for all its sequences and samples; `only` restricts it to some.
    """

    def __init__(
        self, layers: int, sequences: int, samples: int, positions: int, width: tuple[int, ...], seed: int = 0
    ):
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(layers, sequences, samples, positions, *width, generator=generator)

    @classmethod
    def of(cls, model, sequences: int, samples: int, positions: int = 32, seed: int = 0) -> "NoiseTable":
        """A table wide enough for a model."""
        config = model.config
        width = (
            (config.intermediate_size,)
            if config.eve.latent_dim == 1
            else (config.intermediate_size, config.eve.latent_dim)
        )
        return cls(config.num_hidden_layers, sequences, samples, positions, width, seed)

    def __call__(self, request: NoiseRequest) -> Tensor:
        table = self.table[request.layer]
        assert request.batch == table.shape[0] and request.num_samples == table.shape[1]
        if request.positions is None:
            return table[:, :, 0:1].flatten(0, 1)
        sequences = torch.arange(table.shape[0])[:, None, None]
        samples = torch.arange(table.shape[1])[None, :, None]
        return table[sequences, samples, request.positions[:, None, :]].flatten(0, 1)

    def only(
        self, sequences: slice | list[int] = slice(None), samples: slice | list[int] = slice(None)
    ) -> "NoiseTable":
        """The table of some sequences and samples."""
        part = object.__new__(type(self))
        part.table = self.table[:, sequences][:, :, samples]
        return part
