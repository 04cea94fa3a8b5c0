"""Variational attention in models of other families, through transformers' attention interface.

The posterior's parameters stand beside the projections of a pretrained attention module, under `posterior`, and no
pretrained parameter is renamed: stock classes read our files, and ours read stock files.
"""

import sys

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask

from ..modeling.attention import AttentionPosterior, mean_weights
from ..modeling.configuration_variational_gpt import VariationalAttentionConfig
from .families import device_of, layers_of, recorded
from .passes import active_axis

_SINKS = "they take weight that no key has, and a row of sampled weights sums to 1 over its keys."
# Our attention functions, by the stock implementation that runs their mean pass.
IMPLEMENTATIONS = {"sdpa": "variational", "eager": "variational_eager"}


def variational_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    mean_attention=sdpa_attention_forward,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """An attention function in transformers' sense: samples where the module has a posterior and the pass has samples,
    and the stock function otherwise. Shapes and arguments as in transformers.
    """
    sample_axis = active_axis()
    if kwargs.get("s_aux") is not None:
        raise ValueError(f"This attention has sinks (s_aux): {_SINKS}")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    is_causal = kwargs.get("is_causal")
    logits = {
        "scaling": scaling,
        "is_causal": getattr(module, "is_causal", True) if is_causal is None else is_causal,
        "softcap": kwargs.get("softcap"),
        "position_bias": kwargs.get("position_bias"),
    }
    posterior = getattr(module, "posterior", None)
    output = weights = None
    if posterior is not None and sample_axis is not None:
        sample_axis.visited.add((posterior.layer_idx, "attention"))
        if sample_axis.num_samples or sample_axis.record:
            if query.shape[0] != sample_axis.rows:
                raise ValueError(
                    f"{type(module).__name__} attends with {query.shape[0]} rows, and batch times samples is "
                    f"{sample_axis.rows}: a model that folds another axis into its batch (choices, windows, packed "
                    "sequences) has no posterior samples and no KL."
                )
            output, weights = posterior(query, key, value, attention_mask, sample_axis, dropout=dropout, **logits)
    if output is None:
        output, weights = mean_attention(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if weights is None and sample_axis is not None and sample_axis.attentions:
        weights = mean_weights(query, key, attention_mask, **logits)
    return output, weights


def variational_eager_attention_forward(module: nn.Module, *args, **kwargs) -> tuple[Tensor, Tensor | None]:
    """`variational_attention_forward` whose mean pass is the eager function of the module's own family."""
    eager = sys.modules[_stock_attention_class(module).__module__].eager_attention_forward
    return variational_attention_forward(module, *args, mean_attention=eager, **kwargs)


def _stock_attention_class(module: nn.Module) -> type:
    return next(cls for cls in type(module).__mro__ if hasattr(sys.modules[cls.__module__], "eager_attention_forward"))


# Without the mask functions the mask would be None, and causality silently lost.
AttentionInterface.register(IMPLEMENTATIONS["sdpa"], variational_attention_forward)
AttentionMaskInterface.register(IMPLEMENTATIONS["sdpa"], sdpa_mask)
AttentionInterface.register(IMPLEMENTATIONS["eager"], variational_eager_attention_forward)
AttentionMaskInterface.register(IMPLEMENTATIONS["eager"], eager_mask)


def attention_modules(model: PreTrainedModel) -> dict[int, nn.Module]:
    """Layer number to self-attention module, of a model whose attention goes through the attention interface.

    Raises:
        ValueError: if the family has no attention interface, does not say where its attention is, has attention sinks,
            or has another number of layers than modules that are layers.
    """
    name = type(model).__name__
    if not model._supports_attention_backend:
        raise ValueError(
            f"{name} does not call its attention through transformers' attention interface, so its weights cannot be "
            "made variational from outside. gpt2, llama, qwen3, gemma, bert and vit are families that do."
        )
    attentions = [module for module in recorded(model, "attentions") if not getattr(module, "is_cross_attention", 0)]
    if any(getattr(module, "sinks", None) is not None for module in attentions):
        raise ValueError(f"The attention of {name} has sinks: {_SINKS}")
    found = {}
    for layer in layers_of(model):
        inside = set(layer.module.modules())
        for attention in attentions:
            if attention in inside:
                found[layer.index] = attention
    if not found:
        raise ValueError(f"{name} does not say which of its modules are its layers and their attention.")
    return found


def install_posteriors(model: PreTrainedModel, attention: VariationalAttentionConfig, layers: list[int]) -> None:
    """Puts an `AttentionPosterior` beside the attention of each of `layers`, on its device, in float32."""
    config = model.config.get_text_config()
    modules = attention_modules(model)
    for layer in layers:
        module = modules[layer]
        heads = config.num_attention_heads
        head_dim = getattr(module, "head_dim", None) or config.hidden_size // heads
        posterior = AttentionPosterior(attention, heads, head_dim, layer, _longest_row(config))
        device = device_of(module)
        posterior.to(device)
        if device.type != "meta":
            posterior.init_weights()
        module.posterior = posterior


def _longest_row(config) -> int | None:
    """Keys of the longest row of attention weights that a model knows, or `None`."""
    if getattr(config, "max_position_embeddings", None) is not None:
        return config.max_position_embeddings
    image, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if isinstance(image, int) and isinstance(patch, int):
        return (image // patch) ** 2 + 1
    return None
