"""Where each family of transformers keeps its layers, its feed-forward networks and its attention."""

import re
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder


@dataclass(frozen=True)
class Family:
    """A row of the table; paths as in `named_modules`.

    Attributes:
        projection: in a layer, W_out: the projection that a feed-forward network (FFN) ends in; or the module of
            stacked experts, whose W_out are slices of one parameter.
        attention: in a layer, the module of the self-attention.
        layers: in the base model, the lists of layers, one a tower: of an encoder-decoder the encoder's first.
        ffn: in a layer, the modules of the FFN; empty: the module that holds W_out.
    """

    projection: str
    attention: str
    layers: tuple[str, ...] = ("layers",)
    ffn: tuple[str, ...] = ()


_GATED = Family("mlp.down_proj", "self_attn")
_BERT = Family("output.dense", "attention", ("encoder.layer",), ("intermediate", "output.dense"))
FAMILIES: dict[str, Family] = {
    "gpt2": Family("mlp.c_proj", "attn", ("h",)),
    "gpt_neox": Family("mlp.dense_4h_to_h", "attention"),
    "gptj": Family("mlp.fc_out", "attn", ("h",)),
    "opt": Family("fc2", "self_attn", ("decoder.layers",), ("fc1", "fc2")),
    "phi": Family("mlp.fc2", "self_attn"),
    "phi3": _GATED,
    "bloom": Family("mlp.dense_4h_to_h", "self_attention", ("h",)),
    "falcon": Family("mlp.dense_4h_to_h", "self_attention", ("h",)),
    "llama": _GATED,
    "mistral": _GATED,
    "mixtral": Family("mlp.experts", "self_attn", ffn=("mlp.experts",)),
    "qwen2": _GATED,
    "qwen3": _GATED,
    "gemma": _GATED,
    "gemma2": _GATED,
    "gemma3_text": _GATED,
    "olmo2": _GATED,
    "smollm3": _GATED,
    "starcoder2": Family("mlp.c_proj", "self_attn"),
    "cohere2": _GATED,
    "t5": Family("layer.-1.DenseReluDense.wo", "layer.0", ("encoder.block", "decoder.block")),
    "bert": _BERT,
    "roberta": _BERT,
    "vit": Family("mlp.fc2", "attention"),
    "distilbert": Family("ffn.lin2", "attention", ("transformer.layer",)),
}
_FFN_WIDTHS = ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "hidden_dim", "ffn_hidden_size")


@dataclass(frozen=True)
class Layer:
    """A transformer layer.

    Attributes:
        index: its number, counted over all towers.
        tower: 0, or 1 for the layers of a decoder behind an encoder.
        name: in the model.
        module: itself.
        attention: the module of its self-attention, or `None` where the family does not say.
    """

    index: int
    tower: int
    name: str
    module: nn.Module
    attention: nn.Module | None


def family_of(model: PreTrainedModel) -> Family | None:
    """The row of a model, stock or variational; `None` for a family that the table does not have."""
    return FAMILIES.get(str(model.config.model_type).removeprefix("variational_"))


def layers_of(model: PreTrainedModel) -> list[Layer]:
    """The layers of a model, in order; empty if nothing says which they are.

    Raises:
        ValueError: if there are more or fewer modules that are layers than the model has layers.
    """
    family, names = family_of(model), {module: name for name, module in model.named_modules()}
    if family is None:
        attentions = [m for m in recorded(model, "attentions") if not getattr(m, "is_cross_attention", 0)]
        found = []
        for index, module in enumerate(_layers_by_looking(model)):
            inside = set(module.modules())
            attention = next((one for one in reversed(attentions) if one in inside), None)
            found.append(Layer(index, 0, names[module], module, attention))
        return found
    found = []
    for tower, path in enumerate(family.layers):
        try:
            modules = model.base_model.get_submodule(path)
        except AttributeError:
            continue  # of T5's encoder there is a model without the decoder
        for module in modules:
            found.append(Layer(len(found), tower, names[module], module, _at(module, family.attention)))
    return found


def recorded(model: PreTrainedModel, key: str) -> list[nn.Module]:
    """The modules that transformers records under `key`, in order."""
    specs = (model.base_model._can_record_outputs or {}).get(key, [])
    found = []
    for spec in specs if isinstance(specs, list) else [specs]:
        target = spec.target_class if isinstance(spec, OutputRecorder) else spec
        place = getattr(spec, "layer_name", None)
        for name, module in model.named_modules():
            if isinstance(module, target) and (place is None or f".{place.strip('.')}." in f".{name}."):
                found.append(module)
    return found


def find_projections(model: PreTrainedModel, target_modules: list[str] | str | None = None) -> dict[int, nn.Module]:
    """Layer number to W_out, or to the module of the stacked experts.

    A family that is not in the table is resolved by looking: W_out is the one linear module of a layer that leads from
    the intermediate to the hidden size.

    Args:
        target_modules: as in peft: a list of names, or of ends of names; or one regular expression for whole names.

    Raises:
        ValueError: if there is no such projection, or in some layer several.
    """
    kind = type(model).__name__
    layers = layers_of(model)
    if not layers:
        raise ValueError(
            f"{kind} does not say which of its modules are its layers: no list of equal modules is as long as "
            "config.num_hidden_layers says."
        )
    family = family_of(model)
    if target_modules is None and family is not None:
        found = {layer.index: _at(layer.module, family.projection) for layer in layers}
        # T5 behind a Family of gated and plain FFNs, or a dense layer in a model of experts
        return {index: module for index, module in found.items() if module is not None}
    candidates = {}
    for layer in layers:
        inside = {f"{layer.name}.{name}": module for name, module in layer.module.named_modules() if name}
        if target_modules is None:
            candidates[layer.index] = {n: m for n, m in inside.items() if _leads_out(m, model.config)}
        else:
            candidates[layer.index] = {n: m for n, m in inside.items() if _is_named(n, target_modules)}
        names = candidates[layer.index]
        # Inside another candidate is what an adapter's layer is around.
        inner = [name for name in names if any(name.startswith(f"{other}.") for other in names)]
        candidates[layer.index] = {name: module for name, module in names.items() if name not in inner}
    for found in candidates.values():
        if len(found) > 1:
            raise ValueError(
                f"{kind} has several modules in a layer that may be the FFN's output projection: "
                f"{', '.join(found)}. Name the right one, for example target_modules=[{_end(next(iter(found)))!r}]."
            )
    if not any(candidates.values()):
        if target_modules is not None:
            raise ValueError(f"target_modules={target_modules!r} names no module in a layer of {kind}.")
        raise ValueError(
            f"{kind} has no FFN that could be found: in no layer does one linear module lead from the intermediate to "
            "the hidden size. Name the FFN's output projection with target_modules=[...]."
        )
    return {index: next(iter(found.values())) for index, found in candidates.items() if found}


def ffn_modules(model: PreTrainedModel, layer: Layer, projection: nn.Module) -> list[nn.Module]:
    """The modules of the FFN that `projection` ends."""
    family = family_of(model)
    if family is not None and family.ffn and _at(layer.module, family.projection) is projection:
        return [_at(layer.module, path) for path in family.ffn]
    holder = holder_of(layer, projection)
    return [projection if holder is layer.module else holder]


def holder_of(layer: Layer, module: nn.Module) -> nn.Module:
    """The module whose child `module` is."""
    return next(one for one in layer.module.modules() if any(child is module for child in one.children()))


def width_in(module: nn.Module) -> int | None:
    """The width of what enters a linear module, or `None`."""
    width = getattr(module, "in_features", None)
    return width if width is not None else getattr(module, "nx", None)


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes: its weights lie on the meta device where they are offloaded."""
    hook = getattr(module, "_hf_hook", None)
    if getattr(hook, "execution_device", None) is not None:
        return torch.device(hook.execution_device)
    return next(module.parameters()).device


def is_experts(module: nn.Module) -> bool:
    """Whether a module is a stack of experts, whose projections are slices of a 3-D parameter."""
    weight = getattr(module, "down_proj", None)
    return isinstance(weight, nn.Parameter) and weight.ndim == 3


def _at(module: nn.Module, path: str) -> nn.Module | None:
    for part in path.split("."):
        if part == "-1":
            module = module[-1]
        elif part in module._modules:
            module = module._modules[part]
        else:
            return None
    return module


def _layers_by_looking(model: PreTrainedModel) -> list[nn.Module]:
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder of a family that is not in the table (T5 is): where its "
            "two stacks are cannot be told."
        )
    found = recorded(model, "hidden_states")
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    if found:
        if count is not None and len(found) != count:
            raise ValueError(
                f"{type(model).__name__} has {count} layers, and records {len(found)} modules as layers: a module "
                "that several layers share has one posterior for all of them, and of two towers only one can be "
                "variational."
            )
        return found
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and len({type(one) for one in module}) == 1:
            return list(module)
    return []


def _leads_out(module: nn.Module, config) -> bool:
    config = config.get_text_config()
    entering, leaving = width_in(module), getattr(module, "out_features", getattr(module, "nf", None))
    if entering is None or leaving != config.hidden_size:
        return False
    widths = [getattr(config, name) for name in _FFN_WIDTHS if isinstance(getattr(config, name, None), int)]
    return entering in widths if widths else entering > leaving


def _is_named(name: str, target_modules: list[str] | str) -> bool:
    if isinstance(target_modules, str):
        return re.fullmatch(target_modules, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in target_modules)


def _end(name: str) -> str:
    parts = name.split(".")
    number = max((place for place, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[number + 1 :])
