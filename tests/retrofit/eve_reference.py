"""What a retrofitted model must compute, by hand: a stock model with hooks on its W_out, a sample a pass."""

import math
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from eve_families import TINY, answer
from families import WeightsNoise
from torch import Tensor
from torch.nn import functional as F

from hf_variational import NoiseRequest

POSITIONS = 24
Pairs = list[tuple[int, int]]


def grid(sequences: list[int] | int, samples: list[int] | int) -> Pairs:
    """(sequence, sample) of each row of a batch, in the order that the package has them."""
    sequences = list(range(sequences)) if isinstance(sequences, int) else sequences
    samples = list(range(samples)) if isinstance(samples, int) else samples
    return [(sequence, sample) for sequence in sequences for sample in samples]


class UnitNoise:
    """Standard normal noise for every (layer, sequence, sample, position, unit).

    Args:
        pairs: (sequence, sample) of the table that the rows of a batch take, in order; `None`: the first ones.
        offsets: positions of padding in front of each sequence, for models whose positions count it.
    """

    tables: dict = {}

    def __init__(self, pairs: Pairs | None = None, offsets: list[int] | None = None):
        self.pairs, self.offsets = pairs, offsets
        self.asked: list[NoiseRequest] = []

    def of(self, layer: int, sequence: int, sample: int, positions: Tensor, width: int) -> Tensor:
        """[length, width] at `positions`, [length]."""
        key = (layer, sequence, sample, width)
        if key not in self.tables:
            seed = 10_000 * layer + 100 * sequence + sample
            self.tables[key] = torch.randn(POSITIONS, width, generator=torch.Generator().manual_seed(seed))
        return self.tables[key][positions.cpu().clamp(0, POSITIONS - 1)]

    def __call__(self, request: NoiseRequest) -> Tensor:
        self.asked.append(request)
        pairs = grid(request.batch, request.num_samples) if self.pairs is None else self.pairs
        pairs = _of_originals(pairs, request)
        if request.site == "attention":
            return self._of_weights(pairs, request)
        rows, width = [], math.prod(request.shape[2:])
        for row, (sequence, sample) in enumerate(pairs):
            if request.positions is None:
                positions = torch.zeros(1, dtype=torch.long)
            else:
                positions = request.positions[row // request.num_samples]
            if self.offsets is not None:
                positions = positions - self.offsets[row // request.num_samples]
            rows.append(self.of(request.layer, sequence, sample, positions, width))
        return torch.stack(rows).reshape(request.shape)

    def _of_weights(self, pairs: Pairs, request: NoiseRequest) -> Tensor:
        sequences = [pairs[row][0] for row in range(0, len(pairs), request.num_samples)]
        samples = [sample for _, sample in pairs[: request.num_samples]]
        assert pairs == grid(sequences, samples)
        return WeightsNoise(sequences, samples=8, only=samples)(request)


def _of_originals(pairs: Pairs, request: NoiseRequest) -> Pairs:
    """An encoder runs before its sequences are copied for beams, and has the noise of the first copy of each."""
    rows = request.batch * request.num_samples
    copies = len(pairs) // rows
    assert len(pairs) == rows * copies
    groups = [pairs[start : start + request.num_samples] for start in range(0, len(pairs), request.num_samples)]
    assert all(groups[copy] == groups[copy - copy % copies] for copy in range(len(groups)))
    return [pair for group in groups[::copies] for pair in group]


def same_everywhere(request: NoiseRequest) -> Tensor:
    """Noise of the positions alone, so that it does not matter which batch a row is in."""
    return UnitNoise(grid([0] * request.batch, request.num_samples))(request)


@dataclass
class Pass:
    """One sample's pass: the stock outputs, and each variational layer's KL, [batch, length]."""

    outputs: object
    kl: dict[int, Tensor] = field(default_factory=dict)


def by_hand(name: str, plain, model, inputs: dict, pairs: Pairs | None, extra: dict | None = None, **options) -> Pass:
    """A pass of the stock model `plain` with the posterior of `model`, retrofitted from it.

    Args:
        pairs: (sequence, sample) of the noise of each row; `None`: the mean pass.
        extra: more arguments of the pass, such as labels.
        options: `offsets`, as in [`UnitNoise`].
    """
    noise = UnitNoise(pairs, **options)
    result = Pass(None)
    with ExitStack() as stack:
        for layer in model.settings.eve_layers:
            replace = _experts if TINY[name].model_type == "mixtral" else _projection
            stack.enter_context(replace(name, plain, model, inputs, noise, layer, result))
        result.outputs = plain(**inputs, **(extra or {}))
    return result


def _posterior(model, where: str, h: Tensor) -> tuple[Tensor, Tensor]:
    """sigma and the KL of each unit from N(mu, s^2), from the names that the parameters have."""
    named = model.state_dict(keep_vars=True)
    low_rank = h @ named[f"{where}.scale_down"].T @ named[f"{where}.scale_up"].T
    log_scale = (low_rank + named[f"{where}.log_scale"]).clamp(-12.0, 2.0)
    log_ratio = log_scale - named[f"{where}.prior_log_scale"]
    return log_scale.exp(), 0.5 * ((2 * log_ratio).exp() - 2 * log_ratio - 1)


def _noise(name: str, noise: UnitNoise, layer: int, inputs: dict, shape: tuple[int, int], width: int) -> Tensor:
    batch, length = shape
    positions = torch.arange(length).expand(batch, -1)
    if "position_ids" in inputs:
        positions = inputs["position_ids"]
    if noise.offsets is not None:
        positions = positions - torch.tensor(noise.offsets)[:, None]
    rows = [noise.of(layer, *pair, positions[row], width) for row, pair in enumerate(noise.pairs)]
    return torch.stack(rows)


@contextmanager
def _projection(name, plain, model, inputs, noise, layer, result):
    tiny, batch = TINY[name], len(next(iter(inputs.values())))

    def hook(module, args):
        # OPT lays its rows end to end.
        h = args[0].reshape(batch, -1, tiny.units)
        scale, kl = _posterior(model, tiny.eve(layer), h)
        result.kl[layer] = kl.sum(-1)
        if noise.pairs is None:
            return None
        z = h + scale * _noise(name, noise, layer, inputs, h.shape[:2], tiny.units)
        return (z.reshape(args[0].shape), *args[1:])

    handle = plain.get_submodule(tiny.projection(layer)).register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _experts(name, plain, model, inputs, noise, layer, result):
    """Each place among the top k of a token has noise of its own, [length, k * units]."""
    tiny = TINY[name]
    where = tiny.projection(layer).rpartition(".")[0]
    experts, (batch, length) = plain.get_submodule(where), inputs["input_ids"].shape

    def forward(hidden_states, top_k_index, top_k_weights):
        places = top_k_index.shape[1]
        outputs, spent = [], []
        if noise.pairs is not None:
            eps = _noise(name, noise, layer, inputs, (batch, length), places * tiny.units)
            eps = eps.reshape(-1, places, tiny.units)
        for token in range(len(hidden_states)):
            parts, kls = [], []
            for place in range(places):
                expert = int(top_k_index[token, place])
                gate, up = (experts.gate_up_proj[expert] @ hidden_states[token]).chunk(2)
                h = F.silu(gate) * up
                scale, kl = _posterior(model, f"{where}.eve.{expert}", h)
                z = h if noise.pairs is None else h + scale * eps[token, place]
                parts.append(experts.down_proj[expert] @ z * top_k_weights[token, place])
                kls.append(kl.sum())
            outputs.append(sum(parts))
            spent.append(sum(kls))
        result.kl[layer] = torch.stack(spent).reshape(batch, length)
        return torch.stack(outputs)

    experts.forward = forward
    try:
        yield
    finally:
        del experts.forward


def predictive(passes: list[Pass]) -> Tensor:
    """log of the mean over samples of the probabilities."""
    return torch.stack([answer(one.outputs).double().softmax(-1) for one in passes]).mean(0).log().float()


def sampled_by_hand(name: str, plain, model, inputs: dict, samples: int, extra=None, sequences=None, **options):
    """One pass a sample."""
    batch = len(next(iter(inputs.values())))
    sequences = list(range(batch)) if sequences is None else sequences
    return [
        by_hand(name, plain, model, inputs, grid(sequences, [sample]), extra, **options) for sample in range(samples)
    ]


def kl_weights(name: str, inputs: dict, wanted: dict) -> tuple[int, dict[int, Tensor | float]]:
    """Number of targets, and the positions of each layer that carry KL, [batch, length]."""
    tiny, labels = TINY[name], wanted["labels"]
    if tiny.task == "next":
        has_target = F.pad(labels[:, 1:] != -100, (0, 1))
    else:
        has_target = labels != -100
    count = int(has_target.sum())
    mask = inputs.get("attention_mask", 1.0)
    if tiny.task in ("next", "masked", "tokens"):
        mask = has_target * mask
    weights = dict.fromkeys(range(tiny.depth), mask)
    if tiny.task == "translation":
        half = tiny.depth // 2
        weights = {layer: mask if layer < half else has_target for layer in range(tiny.depth)}
    return count, weights


def kl_by_hand(name: str, passes: list[Pass], inputs: dict, wanted: dict) -> Tensor:
    """KL per target of each variational layer, averaged over samples."""
    count, weights = kl_weights(name, inputs, wanted)
    layers = sorted(passes[0].kl)
    mean = [sum(one.kl[layer] for one in passes) / len(passes) for layer in layers]
    return torch.stack([(kl * weights[layer]).sum() / count for kl, layer in zip(mean, layers, strict=True)])
