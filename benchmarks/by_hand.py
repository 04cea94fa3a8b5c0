"""What people write without a sample axis: greedy decoding with several copies of the whole model's work.

Each copy is a member of an ensemble, or one posterior sample or dropout mask of the same model. The predictive
distribution and its measures are computed as the package computes them, so the rows differ in how they decode.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from hf_variational import log_mean_probability, predictive_measures

Forward = Callable[..., object]


@torch.no_grad()
def greedy(forwards: Sequence[Forward], rows: int, tokens: Tensor, new_tokens: int, cache_config) -> Tensor:
    """Greedy decoding from the mean of the members' distributions, with all measures of every token.

    Args:
        forwards: one call a step and member; each keeps a cache of its own.
        rows: copies of the whole batch that a member decodes in its cache.
        tokens: prompt, [batch, length].
        new_tokens: how many to add.
        cache_config: config of the model, for the cache.

    Returns:
        [batch, length + new_tokens].
    """
    samples = rows * len(forwards)
    caches = [DynamicCache(config=cache_config) for _ in forwards]
    step, measures = tokens, []
    for _ in range(new_tokens):
        repeated = step.repeat_interleave(rows, dim=0)
        logits = [
            forward(input_ids=repeated, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            for forward, cache in zip(forwards, caches, strict=True)
        ]
        # rows of the members: [member, batch, copies] to [batch, member * copies]
        joined = torch.stack([member.unflatten(0, (-1, rows)) for member in logits], dim=1).flatten(0, 2)
        step = log_mean_probability(joined, samples)[:, -1].argmax(-1, keepdim=True)
        measures.append(predictive_measures(joined, samples, targets=step))
        tokens = torch.cat([tokens, step], dim=1)
    return tokens


def with_dropout(model, rate: float = 0.1):
    """Keeps dropout on the hidden units of every feed-forward layer active: Monte Carlo dropout."""
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(partial(_drop, rate))
    return model


def _drop(rate: float, module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (torch.nn.functional.dropout(inputs[0], rate, training=True),)
