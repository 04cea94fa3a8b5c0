"""The layer of an EVE adapter, and what a model knows of all of them."""

import warnings

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ...modeling.eve import EVE
from ..experts import ExpertsEVE
from ..families import Layer, device_of, is_experts
from ..ffn import AttachedEVE, units_of
from ..install import install_rows
from ..settings import VariationalSettings
from .config import EVEAdapterConfig

# Name of the layer beside W_out. It does not contain peft's prefix, which would hide it from `delete_adapter`, and is
# not what somebody would call an adapter: peft's saving leaves out keys with the names of other adapters.
CHILD = "variational_neurons"


class EVELayer(nn.Module, BaseTunerLayer):
    """The posteriors of one layer's units, one for each adapter that has this layer.

    It stands beside W_out, the FFN's output projection (or in the module of stacked experts), and changes what enters
    it. Not around it, as peft's layers do: LoRA on the same projection then reads the sampled activation too,
    whichever of the two was added first, keeps its names in its file, and can be merged without EVE.

    Args:
        parent, name: W_out is the child `name` of the module `parent`.
        projection: W_out, or the module of the stacked experts, without the layers of other adapters around it.
        layer: the layer it is in.
    """

    adapter_layer_names = ("eve_posterior",)
    other_param_names = ("eve_config",)

    def __init__(self, parent: nn.Module, name: str, projection: nn.Module, layer: Layer):
        super().__init__()
        self.eve_posterior = nn.ModuleDict()
        self.eve_config: dict[str, EVEAdapterConfig] = {}
        self.merged_adapters: list[str] = []
        self.changes = Changes()
        self.active_name: str | None = None
        # In tuples, so that they do not become children: they are above or beside this module.
        self.place = (parent, name)
        self.hooked = None
        self.index, self.tower, self.layer_name = layer.index, layer.tower, layer.name
        self.holder = (projection if is_experts(projection) else parent,)

    @property
    def projection(self) -> nn.Module:
        """W_out, or the module of the stacked experts."""
        parent, name = self.place
        module = parent._modules[name]
        return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module

    @property
    def current(self) -> AttachedEVE | ExpertsEVE | None:
        """The posterior that is in force, that of the adapter `active_name`."""
        return None if self.active_name is None else self.eve_posterior[self.active_name]

    @property
    def units(self) -> int:
        """Number of units that enter W_out (of one expert)."""
        return units_in(self.projection, self.layer_name)

    def update_layer(self, adapter_name: str, config: EVEAdapterConfig) -> None:
        """Adds the posterior of an adapter.

        Raises:
            ValueError: for a projection whose width cannot be told, or experts that cannot be variational.
        """
        eve = config.settings([]).eve
        if is_experts(self.projection):
            posterior = ExpertsEVE(eve, self.projection, self.index, self.tower)
        else:
            posterior = AttachedEVE(eve, self.units, self.index, self.tower)
        for module in posterior.modules():
            if isinstance(module, EVE):
                module.init_weights()
        # log sigma in bfloat16 moves in steps of 0.03 and more.
        self.eve_posterior[adapter_name] = posterior.float()
        self.eve_config[adapter_name] = config
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def follow(self) -> None:
        """Has what enters W_out come through here. The outermost module at its place is meant, which changes when LoRA
        is put around it or merged into it.
        """
        parent, name = self.place
        outermost = parent._modules[name]
        if self.hooked is not None and self.hooked[0] is outermost:
            return
        self.release()
        handle = None
        if is_experts(self.projection):
            # Where our experts function looks; not a second child.
            self.projection.__dict__["eve"] = self
        else:
            handle = outermost.register_forward_pre_hook(self.enter)
        self.hooked = (outermost, handle)

    def release(self) -> None:
        """Undoes `follow`."""
        if self.hooked is not None and self.hooked[1] is not None:
            self.hooked[1].remove()
        self.hooked = None
        self.projection.__dict__.pop("eve", None)

    def remove(self) -> None:
        """Takes this layer out of the model."""
        self.release()
        del self.holder[0]._modules[CHILD]

    def forget(self, adapter_name: str) -> None:
        """Takes an adapter out that could not be added, and this layer with it if it was the only one."""
        if adapter_name in self.eve_posterior:
            del self.eve_posterior[adapter_name]
        self.eve_config.pop(adapter_name, None)
        if not self.eve_posterior:
            self.remove()

    def enter(self, module: nn.Module, args: tuple) -> tuple | None:
        """The forward pre-hook of W_out."""
        return None if self.active_name is None else (self(args[0]), *args[1:])

    def forward(self, h: Tensor) -> Tensor:
        """z for h in the forward pass that is under way, [rows, length, units] or [rows * length, units]."""
        return self.current.replace(h)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """As in peft.

        Raises:
            ValueError: for more than one EVE adapter.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        check_one([name for name in names if name in self.eve_posterior])
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._tell()

    def enable_adapters(self, enabled: bool) -> None:
        """As in peft."""
        super().enable_adapters(enabled)
        self._tell()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Has the mean pass in the place of the posterior, until `unmerge`.

        Raises:
            ValueError: for a learned mean.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.eve_posterior]
        for name in names:
            mean = self.eve_posterior[name].config.mean
            if mean != "identity":
                raise ValueError(
                    f"The mean {mean!r} of the EVE adapter {name!r} is multiplied into W_out by merge_and_unload() "
                    "only. To merge other adapters, name them: merge_adapter(['lora'])."
                )
        self.merged_adapters.extend(names)
        self._tell()

    def unmerge(self) -> None:
        """Undoes `merge`."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        self.merged_adapters.clear()
        self._tell()

    def _tell(self) -> None:
        in_force = not (self.disable_adapters or self.merged)
        self.active_name = None
        for name, posterior in self.eve_posterior.items():
            posterior.is_active = in_force and name in self.active_adapters
            if posterior.is_active:
                self.active_name = name
        self.changes.seen = False

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # Without the cast that peft does here: what was trained in float32 stays so on a bfloat16 base.
        posterior = self.eve_posterior._modules.get(adapter_name)
        if posterior is not None and not any(tensor.is_meta for tensor in posterior.state_dict().values()):
            posterior.to(device or device_of(self.projection))

    def extra_repr(self) -> str:
        return f"layer={self.index}"


class Changes:
    """Whether what the layers of a model last said has been seen. It knows no module: a copied layer copies it."""

    seen = False


class AttachedAdapters:
    """What a model knows of its EVE adapters, read off their layers.

    The active adapter changes behind any tuner's back, as by `PreTrainedModel.set_adapter`, which calls the layers.
    """

    def __init__(self, model: nn.Module):
        self.layers = eve_layers(model)
        self.changes = Changes()
        for layer in self.layers:
            layer.changes = self.changes
        self._settings = VariationalSettings()

    def settings(self, model) -> VariationalSettings:
        """What is variational in `model` now: the layers of the active adapter. Puts the hooks where they belong.

        Raises:
            ValueError: if several EVE adapters are active.
        """
        if not self.changes.seen:
            active = [layer for layer in self.layers if layer.active_name is not None]
            check_one(sorted({layer.active_name for layer in active}))
            self._settings = VariationalSettings()
            if active:
                config = active[0].eve_config[active[0].active_name]
                self._settings = config.settings([layer.index for layer in active])
            install_rows(model, self._settings)
            self.changes.seen = True
        for layer in self.layers:
            layer.follow()
        return self._settings


def eve_layers(model: nn.Module) -> list[EVELayer]:
    """The layers of EVE adapters, in order."""
    return sorted((m for m in model.modules() if isinstance(m, EVELayer)), key=lambda layer: layer.index)


def units_in(projection: nn.Module, name: str) -> int:
    """Number of units that enter W_out (of one expert)."""
    return projection.intermediate_dim if is_experts(projection) else units_of(projection, name)


def check_one(names: list[str]) -> None:
    """Raises `ValueError` for more than one name of an active EVE adapter."""
    if len(names) > 1:
        raise ValueError(
            f"The EVE adapters {', '.join(map(repr, names))} cannot be active together: each says how random the same "
            "units are. Activate one (and any number of LoRA adapters)."
        )
