"""A loaded stock model becomes a variational one, and back, in place."""

from transformers import PreTrainedModel
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from ..modeling.configuration_variational_gpt import EVEConfig, VariationalAttentionConfig
from .attention import attention_modules
from .classes import variational_class, variational_config_class
from .families import ffn_modules, find_projections, layers_of
from .ffn import eve_modules, fold_means
from .install import install, is_posterior, make_stock, make_variational, uninstall
from .layers import choose_layers
from .model import VariationalMixin
from .settings import VariationalSettings

TRAIN = ("posterior", "ffn", "all")


def variationalize(
    model: PreTrainedModel,
    eve: EVEConfig | None = None,
    attention: VariationalAttentionConfig | None = None,
    layers: str | list[int] = "all",
    train: str = "posterior",
    *,
    target_modules: list[str] | str | None = None,
    kl_weight: float = 1e-4,
    objective: str = "elbo",
    num_posterior_samples: int = 1,
) -> PreTrainedModel:
    """Makes the feed-forward networks (FFNs), the attention, or both, of a model variational, in place. What the mean
    pass predicts does not change.

    Afterwards `forward` and `generate` take `num_posterior_samples`, the loss has the KL, and `save_pretrained` saves
    a checkpoint that the Auto classes load where `hf_variational` has been imported; the stock class loads it too, and
    leaves the posteriors out.

    Args:
        model: any transformers model of a family in the table (with any head), or of one that can be told by looking.
        eve: configuration of the FFNs' units, which read what enters the FFN's output projection; `None` with
            `attention=None`: `EVEConfig(prior="centered")`.
        attention: configuration of the attention weights' posterior, for a family that calls its attention through
            transformers' attention interface.
        layers: `"all"`; `"last"` or `"last_quarter"` (of the decoder); a list of numbers, counted from the encoder's
            first layer on; or a regular expression for whole names of layers. The rows of the posterior samples split
            at the first of them, so the fewer and the higher the cheaper.
        train: what gets a gradient: `"posterior"`, only what was added; `"ffn"`, also the FFNs of these layers;
            `"all"`. Frozen parameters get `requires_grad=False`.
        target_modules: names (or ends of names, or one regular expression) of the FFNs' output projections, for an
            architecture where they cannot be told.
        kl_weight: beta, the weight of the KL in the loss.
        objective: `"elbo"`, or `"mc_nll"`: the loss is the NLL of the predictive distribution over the samples.
        num_posterior_samples: samples drawn in train mode where `forward` is not told how many.

    Returns:
        The same model, of a subclass of its class, and with the same configuration object, which changes too.

    Raises:
        ValueError: if no FFN is found, or several that may be meant; for layers that are not there; for attention of
            a family without the attention interface; for a model that is variational already, is wrapped by PEFT, or
            has no weights (on the meta device); for a value outside these.

    Example:

    ```python
    >>> from transformers import AutoModelForCausalLM
    >>> from hf_variational import EVEConfig, variationalize

    >>> model = AutoModelForCausalLM.from_pretrained("gpt2")
    >>> model = variationalize(model, eve=EVEConfig(prior="centered"), layers="last_quarter")
    >>> out = model(**inputs, num_posterior_samples=8, output_uncertainty=True)
    ```
    """
    _check_model(model)
    if eve is None and attention is None:
        eve = EVEConfig(prior="centered")
    for name, value, kind in (("eve", eve, EVEConfig), ("attention", attention, VariationalAttentionConfig)):
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"{name} must be a {kind.__name__} or None, got {value!r}.")
    if train not in TRAIN:
        raise ValueError(f"train={train!r} is unknown; choose one of {', '.join(map(repr, TRAIN))}.")
    eve_layers = chosen_layers(model, layers, find_projections(model, target_modules)) if eve is not None else []
    attention_layers = chosen_layers(model, layers, attention_modules(model)) if attention is not None else []
    settings = VariationalSettings(
        eve, eve_layers, attention, attention_layers, target_modules, kl_weight, objective, num_posterior_samples
    )
    stock_config = type(model.config)
    make_variational(model.config, variational_config_class(stock_config))
    model.config.variational = settings.to_dict()
    try:
        adopt(model)
        install(model, settings)
    except Exception:
        uninstall(model)
        abandon(model, stock_config)
        raise
    freeze(model, train)
    return model


def chosen_layers(model: PreTrainedModel, layers: str | list[int], modules: dict) -> list[int]:
    """The numbers of the layers that are meant, among those that `modules` has; see `choose_layers`."""
    every = layers_of(model)
    last_tower = [layer.index for layer in every if layer.tower == every[-1].tower]
    return choose_layers(layers, {layer.index: layer.name for layer in every if layer.index in modules}, last_tower)


def adopt(model: PreTrainedModel) -> None:
    """Gives a stock model its variational class, in place."""
    model.__class__ = variational_class(type(model))
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            # Enabled before there was a KL that it could lose.
            model._set_gradient_checkpointing(True, module._gradient_checkpointing_func)
            break
    model.settings  # noqa: B018  read now, for torch.compile cannot trace the reading
    # transformers registers what it can record of a class when one is built, and this one was a stock model then.
    dict.__setitem__(_CAN_RECORD_REGISTRY, str(type(model)), model._can_record_outputs)


def abandon(model: PreTrainedModel, stock_config: type) -> None:
    """Gives a variational model its stock class and configuration class back, in place."""
    if isinstance(model, VariationalMixin):
        model.__class__ = model.stock_class
    make_stock(model.config, stock_config)
    model.__dict__.pop("_settings", None)
    model.__dict__.pop("_layer_numbers", None)


def to_deterministic(model: PreTrainedModel) -> PreTrainedModel:
    """Turns a retrofitted model into a stock one at the posterior mean, in place: of the stock class, with the stock
    parameters. A learned mean is multiplied into the FFN's output projection.

    Returns:
        The same model.

    Raises:
        ValueError: for a model that is no retrofit, or a learned mean that the stock class cannot compute: one with a
            bias where the projection has none, or before a quantised projection.
    """
    if not isinstance(model, VariationalMixin) or getattr(model.config, "variational", None) is None:
        raise ValueError(f"{type(model).__name__} was not made variational by variationalize: nothing to turn back.")
    projections = find_projections(model, model.settings.target_modules)
    learned = [index for index, eve in eve_modules(model).items() if eve.config.mean != "identity"]
    before = {parameter: parameter.detach().clone() for i in learned for parameter in projections[i].parameters()}
    try:
        for index in learned:
            fold_means(projections[index], eve_modules(model)[index])
    except ValueError:
        for parameter, value in before.items():  # of the layers before the one that cannot be folded
            parameter.data.copy_(value)
        raise
    uninstall(model)
    frozen = model.__dict__.pop("_frozen", ())
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(True)
    abandon(model, model.stock_class.config_class)
    return model


def freeze(model: PreTrainedModel, train: str) -> None:
    """Sets which parameters get a gradient; see `variationalize`."""
    if train == "all":
        return
    trained = {
        id(parameter) for module in model.modules() if is_posterior(module) for parameter in module.parameters()
    }
    if train == "ffn":
        layers = layers_of(model)
        for index, projection in find_projections(model, model.settings.target_modules).items():
            if index in model.settings.eve_layers:
                for module in ffn_modules(model, layers[index], projection):
                    trained |= {id(parameter) for parameter in module.parameters()}
    # Kept for `to_deterministic`, which gives their gradients back.
    model._frozen = {name for name, p in model.named_parameters() if p.requires_grad and id(p) not in trained}
    for name, parameter in model.named_parameters():
        if name in model._frozen:
            parameter.requires_grad_(False)


def _check_model(model) -> None:
    if type(model).__module__.partition(".")[0] == "peft":
        raise ValueError(
            f"This model is a {type(model).__name__}: merge its adapter first (model.merge_and_unload()), or add the "
            "posterior as a second adapter on the same base: get_peft_model(model.get_base_model(), "
            "EVEAdapterConfig(...), adapter_name='posterior')."
        )
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}: unwrap it first.")
    if (isinstance(model, VariationalMixin) and model.posterior_sites) or hasattr(model.config, "eve"):
        raise ValueError(f"{type(model).__name__} is variational already: start again from the pretrained model.")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"This {type(model).__name__} has adapters ({', '.join(model.peft_config)}): remove them first "
            "(model.delete_adapter), or add the posterior as an adapter too: model.add_adapter(EVEAdapterConfig(...), "
            "'posterior')."
        )
    if model.device.type == "meta":
        raise ValueError("This model is on the meta device and has no weights: load it to a device first.")
