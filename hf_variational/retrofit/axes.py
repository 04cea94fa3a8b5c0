"""The sample axes of a forward pass of a retrofitted model, and the targets that its KL is divided by."""

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from ..modeling.objective import IGNORE_INDEX, ScoredTokens, attended_positions, following_positions, shift_targets
from ..modeling.posterior import PosteriorRecord
from ..modeling.sample_axis import SampleAxis, prepare_cache, tokens_held
from .families import layers_of, recorded

# Arguments that are the targets of a loss.
TARGETS = ("labels", "shift_labels", "start_positions", "end_positions", "next_sentence_label")


@dataclass
class Pass:
    """What a forward pass works with.

    Attributes:
        axes: a sample axis for each tower.
        weights: for each tower, [batch, length], 1 at the positions that carry KL; `None`: all positions.
        targets: of the loss, or `None`.
        num_items: targets of the whole accumulated batch.
        observed: token whose probability's variance is measured, [batch, length], or `None`.
        first_layers: number of each tower's first layer.
    """

    axes: tuple[SampleAxis, ...]
    weights: tuple[Tensor | None, ...]
    targets: Tensor | None
    num_items: Tensor | int | None
    observed: Tensor | None
    first_layers: tuple[int, ...]

    @property
    def main(self) -> SampleAxis:
        """The axis of the last tower, whose rows the logits have."""
        return self.axes[-1]

    def scored(self, records: list[PosteriorRecord]) -> list[tuple[tuple[PosteriorRecord, ...], ScoredTokens]]:
        """The records of each tower that has some, and the tokens that carry their KL."""
        answer = []
        ends = (*self.first_layers[1:], float("inf"))
        for tower, (first, end) in enumerate(zip(self.first_layers, ends, strict=True)):
            here = tuple(record for record in records if first <= record.layer < end)
            if not here:
                continue
            weights = self.weights[tower]
            if weights is None:
                kl = here[0].statistics.kl
                weights = kl.new_ones(self.main.batch, kl.shape[1])
            answer.append((here, ScoredTokens(self.targets, weights, self.num_items)))
        return answer


def pass_of(
    model, inputs: dict, num_samples: int, record: bool, statistics: bool, unit_weights: dict | None = None
) -> Pass:
    """Reads the arguments of a stock forward pass; a cache among them is made ready for samples.

    Raises:
        ValueError: for arguments without the model's main input, kernels that pack several sequences in a row, or a
            cache that was filled with another number of samples.
    """
    for name in ("cu_seq_lens_q", "cu_seqlens_q"):
        if num_samples > 1 and inputs.get(name) is not None:
            raise ValueError(
                f"{name} lists the sequences of one row for a kernel, and posterior samples make more rows: use "
                "num_posterior_samples of 0 or 1, or pack with position_ids."
            )
    towers = _towers(model)
    entering = [_entering(model, inputs, tower, len(towers)) for tower in range(len(towers))]
    main = entering[-1] if entering[-1] is not None else entering[0]
    if main is None:
        raise ValueError(f"{type(model).__name__} needs {model.main_input_name}.")
    targets, num_items = targets_of(model, inputs)
    weights, positions, follows = [], [], []
    for tower, (tensor, mask, ids) in enumerate(_described(model, inputs, entering)):
        is_last = tower == len(towers) - 1
        weight = None
        if record and tensor is not None and _is_text(model):
            weight = attended_positions(mask, tensor)
            if targets is not None and is_last and _is_per_token(targets, tensor):
                weight = weight * (targets != IGNORE_INDEX)
        weights.append(weight)
        positions.append(ids if ids is not None and ids.ndim == 2 else None)
        follows.append(_follows(mask, tensor, positions[-1]) if record and _is_text(model) else None)
    cache = _prepared_cache(model, inputs, num_samples, towers)
    seen, tape, visited = tokens_held(cache), [] if record else None, set()
    axes = []
    for tower, first in enumerate(towers):
        is_last = tower == len(towers) - 1
        own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        axis = SampleAxis(
            num_samples,
            main.shape[0],
            positions[tower],
            record=record,
            statistics=record and statistics,
            token_weights=weights[tower],
            follows=follows[tower],
            cache=own if num_samples and is_last else None,
            seen=seen if is_last else 0,
            tape=tape,
            first_layer=first,
            unit_weights=unit_weights,
        )
        axis.visited = visited
        attentions = inputs.get("output_attentions")
        axis.attentions = model.config.output_attentions if attentions is None else attentions
        axes.append(axis)
    observed = None
    if _is_text(model) and model.can_generate():
        tokens = _tokens(inputs, len(towers))
        observed = inputs.get("labels") if len(towers) > 1 and inputs.get("labels") is not None else None
        observed = shift_targets(tokens) if observed is None and tokens is not None else observed
    return Pass(tuple(axes), tuple(weights), targets, num_items, observed, tuple(towers))


def shifts_labels(model) -> bool:
    """Whether the target of a position is the next one's label. Not every language model's name says so, which is all
    that transformers' `loss_type` knows.
    """
    return model.can_generate() and len(_towers(model)) == 1


def _towers(model) -> list[int]:
    """Number of each tower's first layer."""
    return _layer_numbers(model)[0]


def _layer_numbers(model) -> tuple[list[int], int]:
    # Kept: which modules are the layers does not change, and is asked at every step of a generation.
    if "_layer_numbers" not in model.__dict__:
        layers = layers_of(model)
        first = [layer.index for layer in layers if layer.index == 0 or layers[layer.index - 1].tower != layer.tower]
        model._layer_numbers = first, len(layers)
    return model._layer_numbers


def _is_text(model) -> bool:
    return model.main_input_name == "input_ids"


def _tokens(inputs: dict, towers: int) -> Tensor | None:
    return inputs.get("decoder_input_ids" if towers > 1 else "input_ids")


def _entering(model, inputs: dict, tower: int, towers: int) -> Tensor | None:
    """What a tower reads: ids, embeddings or an image, [batch, ...]."""
    if towers == 1 or tower == 0:
        names = ["inputs_embeds", model.main_input_name]
    else:
        names = ["decoder_inputs_embeds", "decoder_input_ids", "labels"]
    return next((inputs[name] for name in names if inputs.get(name) is not None), None)


def _described(model, inputs: dict, entering: list) -> list[tuple]:
    """For each tower what it reads, its padding mask, and its position ids."""
    described = [(entering[0], inputs.get("attention_mask"), inputs.get("position_ids"))]
    if len(entering) > 1:
        described.append((entering[1], inputs.get("decoder_attention_mask"), None))
    return described


def targets_of(model, inputs: dict) -> tuple[Tensor | None, Tensor | int | None]:
    """The targets of each position or sequence, -100 where there is none, and how many the accumulated batch has."""
    given = next((inputs[name] for name in TARGETS if inputs.get(name) is not None), None)
    if given is None:
        return None, None
    num_items = inputs.get("num_items_in_batch")
    targets = given
    if shifts_labels(model):
        targets = inputs.get("shift_labels")
        targets = shift_targets(inputs["labels"]) if targets is None else targets.contiguous()
    elif len(_towers(model)) > 1:
        targets = inputs["labels"]
    if num_items is None:
        num_items = (targets != IGNORE_INDEX).sum().clamp(min=1)
    elif torch.is_tensor(num_items):
        num_items = num_items.to(targets.device)
    return targets, num_items


def _is_per_token(targets: Tensor, entering: Tensor) -> bool:
    return targets.ndim == 2 and targets.shape == entering.shape[:2] and not targets.is_floating_point()


def _follows(mask: Tensor | None, entering: Tensor | None, positions: Tensor | None) -> Tensor | None:
    if entering is None:
        return None
    if positions is None:
        positions = torch.arange(entering.shape[1], device=entering.device).unsqueeze(0)
    return following_positions(attended_positions(mask, entering), positions.expand(entering.shape[0], -1))


def _prepared_cache(model, inputs: dict, num_samples: int, towers: list[int]) -> Cache | None:
    cache = inputs.get("past_key_values")
    use_cache = inputs.get("use_cache")
    use_cache = getattr(model.config, "use_cache", False) if use_cache is None else use_cache
    is_pair = len(towers) > 1
    if cache is None and use_cache and num_samples and not model.training and _can_cache(model, is_pair):
        made = EncoderDecoderCache(DynamicCache(), DynamicCache()) if is_pair else DynamicCache(config=model.config)
        cache = inputs["past_key_values"] = made
    if cache is None:
        return None
    count = _layer_numbers(model)[1] - towers[-1]
    first = model.variational_layers[0]
    split = max(0, first - towers[-1])
    shared = model._row_hooks.shares_attention and first >= towers[-1]
    if isinstance(cache, EncoderDecoderCache):
        prepare_cache(cache.self_attention_cache, count, split, num_samples, shared_at_split=shared)
        prepare_cache(cache.cross_attention_cache, count, split, num_samples, shared_at_split=False)
    else:
        prepare_cache(cache, count, split, num_samples, shared_at_split=shared)
    return cache


def _can_cache(model, is_pair: bool) -> bool:
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        return False
    if is_pair:
        return True
    attentions = [one for one in recorded(model, "attentions") if not getattr(one, "is_cross_attention", 0)]
    return all(getattr(one, "is_causal", True) for one in attentions)
