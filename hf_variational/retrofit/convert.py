"""A loaded stock model becomes a variational one, in place."""

from dataclasses import asdict

from transformers import PreTrainedModel
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from ..modeling.configuration_variational_gpt import VariationalAttentionConfig
from .attention import attention_modules, check_layers
from .model import VariationalSettings, install, variational_class


def add_variational_attention(
    model: PreTrainedModel,
    attention: VariationalAttentionConfig,
    layers: list[int] | None = None,
    *,
    kl_weight: float = 1e-4,
    num_posterior_samples: int = 1,
) -> PreTrainedModel:
    """Makes the attention of a model variational, in place. What the mean pass predicts does not change.

    Afterwards `forward` and `generate` take `num_posterior_samples`, the loss has the KL, and `save_pretrained` saves
    the posteriors; `variational_class(BertModel).from_pretrained(folder)` loads them again, `BertModel` the rest.

    Args:
        model: a model whose family calls its attention through transformers' attention interface (BERT, ViT, GPT-2,
            Llama, Qwen3, Gemma, ...), with any head.
        attention: the posterior's configuration.
        layers: numbers of the layers; `None`: all.
        kl_weight: beta, the weight of the KL in the loss.
        num_posterior_samples: samples drawn in train mode where `forward` is not told how many.

    Returns:
        The same model, of a subclass of its class.

    Raises:
        ValueError: for a family without the attention interface, with attention sinks, or whose layers share a module;
            a layer that is not there; a model that is variational already, or has no weights (on the meta device).

    Example:

    ```python
    >>> from transformers import AutoModelForCausalLM
    >>> from hf_variational import VariationalAttentionConfig, add_variational_attention

    >>> model = AutoModelForCausalLM.from_pretrained("gpt2")
    >>> model = add_variational_attention(model, VariationalAttentionConfig("dirichlet"), layers=[10, 11])
    >>> out = model(**inputs, num_posterior_samples=8, output_uncertainty=True)
    ```
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}: unwrap it first.")
    if getattr(model, "posterior_sites", None):
        raise ValueError(f"{type(model).__name__} is variational already: start again from the pretrained model.")
    if model.device.type == "meta":
        raise ValueError("This model is on the meta device and has no weights: load it to a device first.")
    if not isinstance(attention, VariationalAttentionConfig):
        raise ValueError(f"attention must be a VariationalAttentionConfig, got {attention!r}.")
    layers = check_layers(layers, attention_modules(model))
    settings = VariationalSettings(attention.to_dict(), layers, kl_weight, num_posterior_samples)
    return _adopt(model, settings)


def _adopt(model: PreTrainedModel, settings: VariationalSettings) -> PreTrainedModel:
    """Turns a loaded stock model into one of its variational class, in place; a model that cannot be one stays."""
    stock = type(model)
    model.__class__ = variational_class(stock)
    model.config.variational = asdict(settings)
    try:
        for module in model.modules():
            if getattr(module, "gradient_checkpointing", False):
                # Enabled before there was a KL that it could lose.
                model._set_gradient_checkpointing(True, module._gradient_checkpointing_func)
                break
        install(model, settings)
    except ValueError:
        model.__class__ = stock
        model.config.variational = None
        raise
    # transformers registers what it can record of a class when one is built, and this one was a stock model then.
    dict.__setitem__(_CAN_RECORD_REGISTRY, str(type(model)), model._can_record_outputs)
    return model
