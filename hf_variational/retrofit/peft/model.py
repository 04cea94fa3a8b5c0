"""The tuner of EVE adapters."""

import re
import warnings
from dataclasses import dataclass

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..convert import abandon, adopt, chosen_layers
from ..experts import EXPERTS_IMPLEMENTATIONS
from ..families import Layer, find_projections, is_experts, layers_of
from ..ffn import fold_means
from ..install import remove_rows, use_experts
from ..model import VariationalMixin
from ..outputs import ADDED
from .config import EVEAdapterConfig
from .layer import CHILD, AttachedAdapters, EVELayer, check_one, eve_layers, units_in
from .registration import PREFIX

_ENTRY = "eve_posterior"


@dataclass
class _Target:
    """A W_out: its name and itself, without the layers of other adapters around it; the layer it is in; its units."""

    name: str
    projection: nn.Module
    layer: Layer
    units: int


class EVEModel(BaseTuner):
    """Makes the feed-forward units of a frozen model random, by adapters.

    The model gets a subclass of its class, whose `forward` and `generate` take `num_posterior_samples` and whose loss
    has the KL, until `unload` or `merge_and_unload`.

    Args:
        model: a transformers model, of which other adapters may be a part already.
        config: the adapter's configuration.
        adapter_name: its name, which no other adapter of the model has.
        low_cpu_mem_usage: leave the posterior on the meta device, for weights that are loaded next.

    Raises:
        ValueError: for a model that is wrapped by PEFT, is variational already or is none of transformers'; for a name
            that is taken; if no FFN is found, or several that may be meant; for layers that are not there; for a saved
            adapter of another base.
    """

    prefix = PREFIX
    tuner_layer_cls = EVELayer
    target_module_mapping: dict[str, list[str]] = {}
    # What the base's config had itself, instead of its class.
    _ignored: list[str] | None = None

    def __init__(self, model, config, adapter_name: str, low_cpu_mem_usage: bool = False, state_dict=None):
        _check_base(model)
        _check_name(model, adapter_name)
        before = set(getattr(model, "peft_config", {}))
        try:
            with warnings.catch_warnings():
                # Several tuners of one base share what they know of its adapters, which is what is wanted here.
                warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
                super().__init__(model, config, adapter_name, low_cpu_mem_usage, state_dict)
        except Exception:
            if adapter_name not in before:
                getattr(model, "peft_config", {}).pop(adapter_name, None)
            raise
        # A second tuner finds it on the model alone, where a first one's unloading deletes it.
        self.peft_config = model.peft_config

    def _prepare_adapter_config(self, peft_config: EVEAdapterConfig, model_config: dict) -> EVEAdapterConfig:
        return peft_config

    def _prepare_model(self, peft_config: EVEAdapterConfig, model: PreTrainedModel) -> None:
        self._targets = {target.name: target for target in _targets(model, peft_config)}

    def _check_target_module_exists(self, peft_config: EVEAdapterConfig, key: str) -> bool:
        return key in self._targets

    def _create_and_replace(
        self, peft_config, adapter_name, target, target_name, parent, current_key, parameter_name=None
    ) -> None:
        found = self._targets[current_key]
        holder = found.projection if is_experts(found.projection) else parent
        layer = holder._modules.get(CHILD)
        if layer is None:
            layer = EVELayer(parent, target_name, found.projection, found.layer)
            layer.set_adapter(self.active_adapters)
            setattr(holder, CHILD, layer)
        layer.update_layer(adapter_name, peft_config)

    def _replace_module(self, parent, child_name, new_module, child) -> None:
        # Of other methods' layers alone, when they are unloaded: what they were around is whole.
        setattr(parent, child_name, new_module)

    def inject_adapter(
        self,
        model: PreTrainedModel,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """As in peft. Where the posteriors are follows from the configuration, whatever `state_dict` has."""
        _check_base(model)
        _check_name(model, adapter_name)
        is_first = not isinstance(model, VariationalMixin)
        try:
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
            model.adapters = AttachedAdapters(model)
            if is_first:
                adopt(model)
        except Exception:
            for layer in eve_layers(model):
                layer.forget(adapter_name)
            if is_first:
                remove_rows(model)
                model.__dict__.pop("adapters", None)
                abandon(model, type(model.config))
            raise
        config = self.peft_config[adapter_name]
        config.place({target.layer.index: target.units for target in self._targets.values()})
        use_experts(model)
        if is_first:
            # A plain Trainer hands every other field of an output to `compute_metrics`.
            self._ignored = model.config.__dict__.get("keys_to_ignore_at_inference")
            ignored = getattr(model.config, "keys_to_ignore_at_inference", None) or ["past_key_values"]
            model.config.keys_to_ignore_at_inference = [*ignored, *ADDED]
        model.adapters.settings(model)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activates an adapter.

        Raises:
            ValueError: for more than one EVE adapter.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        check_one([name for name in names if isinstance(self.peft_config.get(name), EVEAdapterConfig)])
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter.

        Raises:
            ValueError: for one that is not there, or is not an EVE adapter.
        """
        config = self.peft_config.get(adapter_name)
        if config is not None and not isinstance(config, EVEAdapterConfig):
            raise ValueError(
                f"The adapter {adapter_name!r} has a {type(config).__name__}: delete it with the PeftModel that it "
                "was added by."
            )
        super().delete_adapter(adapter_name)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> PreTrainedModel:
        model, folded = self.model, []
        if merge:
            folded = _folded(model, self.active_adapters if adapter_names is None else adapter_names)
        # Other methods' layers go as well: peft's unloading is of all adapters.
        super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        for posterior, layer in folded:
            fold_means(layer.projection, posterior)
        for layer in eve_layers(model):
            layer.remove()
        remove_rows(model)
        _release_experts(model)
        del model.adapters
        model.config.__dict__.pop("keys_to_ignore_at_inference", None)
        if self._ignored is not None:
            model.config.keys_to_ignore_at_inference = self._ignored
        abandon(model, type(model.config))
        return model

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        # peft's own takes whatever is in any tuner's layers.
        return {key: value for key, value in state_dict.items() if f".{_ENTRY}.{adapter_name}." in key}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # Experts' posteriors have a number behind the name, which peft's own does not expect; and LoRA may be around
        # the experts or not.
        entry = f".{_ENTRY}.{adapter_name}."
        if entry in key:
            key = key.replace(entry, f".{_ENTRY}.", 1)
            return ".".join(part for part in key.split(".") if part != "base_layer")
        return super()._remove_adapter_name_from_key(key, adapter_name)


def _check_base(model) -> None:
    if isinstance(model, PeftModel):
        raise ValueError(
            f"This model is a {type(model).__name__}, which would become a part of the adapter's names: put both on "
            "one base with get_peft_model(model.get_base_model(), EVEAdapterConfig(...), adapter_name='posterior')."
        )
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"An EVE adapter needs a transformers PreTrainedModel, got {type(model).__name__}.")
    has_adapters = getattr(model, "adapters", None) is not None
    if not has_adapters and (getattr(model, "posterior_sites", None) or hasattr(model.config, "eve")):
        raise ValueError(
            f"{type(model).__name__} is variational already: put an EVE adapter on the stock model (to_deterministic "
            "gives it back), or train this one."
        )


def _check_name(model: PreTrainedModel, adapter_name: str) -> None:
    for module in model.modules():
        other = isinstance(module, BaseTunerLayer) and not isinstance(module, EVELayer)
        if other and adapter_name in module._get_available_adapters():
            raise ValueError(
                f"The model has an adapter {adapter_name!r} of another method already ({type(module).__module__}): "
                "give this one another name, as in get_peft_model(base, config, adapter_name='posterior')."
            )


def _targets(model: PreTrainedModel, config: EVEAdapterConfig) -> list[_Target]:
    """Where an adapter goes.

    Raises:
        ValueError: if it does not fit.
    """
    layers, kind = layers_of(model), type(model).__name__
    projections = find_projections(model, config.target_modules)
    numbers = config.layers
    if config.layer_units:
        numbers = sorted(int(layer) for layer in config.layer_units)
        if missing := [number for number in numbers if number not in projections]:
            raise ValueError(
                f"This adapter is for the layers {numbers} of its base, {_base_of(config)}, and this {kind} has no "
                f"FFN in {missing} ({len(layers)} layers): load it on the base that it was trained on."
            )
    names = {module: name for name, module in model.named_modules()}
    found = []
    for number in chosen_layers(model, numbers, projections):
        outermost = projections[number]
        inner = outermost.get_base_layer() if isinstance(outermost, BaseTunerLayer) else outermost
        target = _Target(names[outermost], inner, layers[number], units_in(inner, layers[number].name))
        trained = (config.layer_units or {}).get(str(number), target.units)
        if trained != target.units:
            raise ValueError(
                f"This adapter is for FFNs of {trained} units in layer {number}, and those of this {kind} have "
                f"{target.units}: load it on the base that it was trained on, {_base_of(config)}."
            )
        for module in config.modules_to_save or []:
            if re.match(rf"(^|.*\.){module}($|\..*)", target.name):
                raise ValueError(
                    f"modules_to_save names {module!r}, which {target.name} belongs to: EVE's posterior cannot be in "
                    "a module that is trained and saved itself."
                )
        found.append(target)
    return found


def _base_of(config: EVEAdapterConfig) -> str:
    return repr(config.base_model_name_or_path) if config.base_model_name_or_path else "whose name it does not have"


@torch.no_grad()
def _folded(model: PreTrainedModel, adapter_names: list[str]) -> list[tuple[nn.Module, EVELayer]]:
    """The learned means that merging multiplies into W_out, with their layers.

    Raises:
        ValueError: for several EVE adapters; for a mean that the stock class cannot compute.
    """
    layers = eve_layers(model)
    check_one(sorted({name for layer in layers for name in adapter_names if name in layer.eve_posterior}))
    found = []
    for layer in layers:
        for name in adapter_names:
            posterior = layer.eve_posterior._modules.get(name)
            if posterior is None or posterior.config.mean == "identity":
                continue
            projection = layer.projection
            weight = projection.down_proj if is_experts(projection) else getattr(projection, "weight", None)
            if weight is None or not weight.is_floating_point():
                raise ValueError(
                    f"The learned mean of layer {layer.index} would be multiplied into its W_out, a "
                    f"{type(projection).__name__} whose weights are not plain numbers: dequantise the model first, or "
                    "unload() the adapter."
                )
            biases = [value for key, value in posterior.named_parameters() if key.endswith("mean_bias")]
            has_none = getattr(projection, "bias", None) is None
            if has_none and any(bias.abs().max() > 0 for bias in biases):
                raise ValueError(
                    f"The mean of layer {layer.index} has learned a bias, and its W_out has none to take it: the "
                    "stock class cannot compute this mean pass."
                )
            found.append((posterior, layer))
    return found


def _release_experts(model: PreTrainedModel) -> None:
    names = {ours: stock for stock, ours in EXPERTS_IMPLEMENTATIONS.items()}
    experts = getattr(model.config, "_experts_implementation", None)
    if experts in names:
        model.config._experts_implementation = names[experts]
