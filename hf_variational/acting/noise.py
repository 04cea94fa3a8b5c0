"""Noise for samples that are drawn in parts: a source is told which sequences and which samples it is asked for."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from ..modeling.sample_axis import NoiseRequest, active_noise_source, posterior_noise


@dataclass(frozen=True)
class NumberedNoiseRequest(NoiseRequest):
    """A [`NoiseRequest`] of some sequences and some samples of each.

    Attributes:
        sequences: their numbers in the whole, [batch].
        samples: their numbers, [num_samples]; the first samples of a sequence have 0 and 1, the next ones go on.
    """

    sequences: Tensor | None = None
    samples: Tensor | None = None


@contextmanager
def numbered_noise(sequences: Tensor, samples: Tensor) -> Iterator[None]:
    """Inside it the source of the `posterior_noise` block around it, if there is one, gets a
    [`NumberedNoiseRequest`]; without a source noise comes from the global generator as ever.
    """
    source = active_noise_source()
    if source is None:
        yield
        return

    def asks_with_numbers(request: NoiseRequest) -> Tensor:
        return source(NumberedNoiseRequest(**vars(request), sequences=sequences, samples=samples))

    with posterior_noise(asks_with_numbers):
        yield
