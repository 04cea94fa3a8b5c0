"""Puts the posteriors and the hooks of a retrofit into a model, and takes them out again."""

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..modeling.attention import AttentionPosterior
from .attention import IMPLEMENTATIONS, attention_modules, install_posteriors
from .experts import EXPERTS_IMPLEMENTATIONS, ExpertsEVE
from .families import family_of, find_projections, layers_of
from .ffn import AttachedEVE, attach_eve
from .outputs import ADDED
from .passes import RowHooks
from .settings import VariationalSettings


def install(model: PreTrainedModel, settings: VariationalSettings) -> None:
    """Puts what `settings` say into a model.

    Raises:
        ValueError: if it has not the modules for it.
    """
    layers = layers_of(model)
    if settings.eve is not None:
        projections = find_projections(model, settings.target_modules)
        for index in settings.eve_layers:
            if index not in projections:
                raise ValueError(
                    f"config.variational names the FFN of layer {index}, but the layers with an FFN are "
                    f"{sorted(projections)}."
                )
            attach_eve(layers[index], projections[index], settings.eve)
    if settings.attention is not None:
        install_posteriors(model, settings.attention, settings.attention_layers)
    install_rows(model, settings)
    # Any other implementation stays, and runs the mean pass alone.
    stock = model.config._attn_implementation
    if settings.attention is not None and stock in IMPLEMENTATIONS:
        model.set_attn_implementation(IMPLEMENTATIONS[stock])
    use_experts(model)


def make_variational(config: PreTrainedConfig, config_class: type) -> None:
    """Gives a stock configuration its variational class, in place; `make_stock` takes it away."""
    _become(config, config_class)
    ignored = getattr(config, "keys_to_ignore_at_inference", None) or ["past_key_values"]
    if not set(ADDED) <= set(ignored):  # of a family without a configuration class of its own
        config.keys_to_ignore_at_inference = list(dict.fromkeys([*ignored, *ADDED]))


def make_stock(config: PreTrainedConfig, config_class: type) -> None:
    """Gives a variational configuration its stock class, in place."""
    _become(config, config_class)
    config.__dict__.pop("keys_to_ignore_at_inference", None)
    config.__dict__.pop("variational", None)


def _become(config: PreTrainedConfig, config_class: type) -> None:
    config.__class__ = config_class
    # Instances carry the name of the class that they were made of.
    config.__dict__.pop("model_type", None)


def install_rows(model: PreTrainedModel, settings: VariationalSettings) -> None:
    """Puts the hooks by which rows enter at the first variational layer into a model, instead of those it has."""
    remove_rows(model)
    if not settings.sites:
        return
    layers = layers_of(model)
    split = min(layer for layer, _ in settings.sites)
    shares = split not in settings.attention_layers and layers[split].attention is not None
    heads = getattr(model.config.get_text_config(), "num_attention_heads", 1)
    decoder = None
    if layers[split].tower == 0 and layers[-1].tower == 1:
        decoder = model.base_model.get_submodule(family_of(model).layers[1].rpartition(".")[0])
    generates = model.can_generate()
    head = model.get_output_embeddings() if generates else None
    model._row_hooks = RowHooks(layers, split, shares, heads, not generates, decoder, head)


def remove_rows(model: PreTrainedModel) -> None:
    """Takes the hooks of `install_rows` out."""
    hooks = model.__dict__.pop("_row_hooks", None)
    if hooks is not None:
        hooks.remove()


def use_experts(model: PreTrainedModel) -> None:
    """Has a model whose experts are variational call them through our functions."""
    if any(isinstance(module, ExpertsEVE) for module in model.modules()):
        stock = model.config._experts_implementation
        model.config._experts_implementation = EXPERTS_IMPLEMENTATIONS.get(stock, stock)


def uninstall(model: PreTrainedModel) -> None:
    """Takes everything that `install` put into a model out of it, hooks and modules."""
    remove_rows(model)
    for module in list(model.modules()):
        eve = module._modules.get("eve")
        if isinstance(eve, AttachedEVE):
            eve.handle.remove()
        if isinstance(eve, (AttachedEVE, ExpertsEVE)):
            del module.eve
    if model._supports_attention_backend:
        for module in attention_modules(model).values():
            module._modules.pop("posterior", None)
    names = {ours: stock for stock, ours in IMPLEMENTATIONS.items()}
    if model.config._attn_implementation in names:
        model.set_attn_implementation(names[model.config._attn_implementation])
    release_experts(model)


def release_experts(model: PreTrainedModel) -> None:
    """Has a model call its experts through the stock functions again."""
    names = {ours: stock for stock, ours in EXPERTS_IMPLEMENTATIONS.items()}
    experts = getattr(model.config, "_experts_implementation", None)
    if experts in names:
        model.config._experts_implementation = names[experts]


def is_posterior(module: nn.Module) -> bool:
    """Whether a module is what a retrofit adds to a layer."""
    return isinstance(module, (AttachedEVE, ExpertsEVE, AttentionPosterior))
