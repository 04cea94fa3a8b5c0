"""EVE in the feed-forward networks of existing models: at the input of W_out, beside the pretrained parameters."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..modeling.configuration_variational_gpt import EVEConfig
from ..modeling.eve import EVE
from .experts import ExpertsEVE
from .families import Layer, device_of, holder_of, is_experts, width_in
from .passes import active_axis


class AttachedEVE(EVE):
    """EVE whose summary h is what enters the W_out of an existing FFN, gated or not.

    It replaces h by z on the way in, so W_out runs as it is, quantised too. Without posterior samples and without a
    tape nothing happens there (a learned mean is applied).
    """

    def __init__(self, config: EVEConfig, units: int, layer_idx: int, tower: int = 0):
        super().__init__(config, units, layer_idx)
        self.tower = tower

    def replace(self, h: Tensor) -> Tensor:
        """z for h in the forward pass that is under way, [rows, length, units] or [rows * length, units]."""
        axis = active_axis(self.tower)
        if h.ndim == 2:  # OPT lays its rows end to end
            return self.replace(h.unflatten(0, (1 if axis is None else axis.rows, -1))).flatten(0, 1)
        if axis is None:
            return self.pooled_mean(h)
        axis.visited.add((self.layer_idx, "ffn"))
        if axis.num_samples == 0 and not axis.record:
            return self.pooled_mean(h)
        if h.shape[0] != axis.rows:
            raise ValueError(
                f"The FFN of layer {self.layer_idx} runs with {h.shape[0]} rows, and batch times samples is "
                f"{axis.rows}: a model that folds another axis into its batch (choices, windows, packed sequences) "
                "has no posterior samples and no KL."
            )
        return self(h, axis)

    def enter(self, projection: nn.Module, args: tuple) -> tuple:
        """The forward pre-hook of W_out."""
        return (self.replace(args[0]), *args[1:])


def attach_eve(layer: Layer, projection: nn.Module, config: EVEConfig) -> None:
    """Puts EVE, `eve`, beside the projection of a layer (or into its experts), on its device, in float32.

    Raises:
        ValueError: for a projection whose width cannot be told, or experts of another form than Mixtral's.
    """
    if is_experts(projection):
        eve = ExpertsEVE(config, projection, layer.index, layer.tower)
        holder = projection
    else:
        eve = AttachedEVE(config, units_of(projection, layer.name), layer.index, layer.tower)
        holder = holder_of(layer, projection)
    device = device_of(projection)
    eve.to(device)
    if device.type != "meta":
        for one in eve.modules():
            if isinstance(one, EVE):
                one.init_weights()
    holder.eve = eve
    if isinstance(eve, AttachedEVE):
        eve.handle = projection.register_forward_pre_hook(eve.enter)


def units_of(projection: nn.Module, name: str) -> int:
    """Number of units that enter a projection."""
    units = width_in(projection)
    if units is None:
        raise ValueError(
            f"The output projection of {name} is a {type(projection).__name__}, which does not say how wide its input "
            "is: EVE needs a linear module (Linear, Conv1D, or a quantised one with in_features)."
        )
    return units


def fold_means(projection: nn.Module, eve: nn.Module) -> None:
    """Multiplies what the mean of a layer's EVE does to h into W_out (or into each expert's), in place, so that the
    stock layer computes the mean pass.

    Raises:
        ValueError: for a learned mean before a W_out that is quantised, or that has no bias to take the mean's.
    """
    if eve.config.mean == "identity":
        return
    if isinstance(eve, ExpertsEVE):
        for expert, one in enumerate(eve):
            _fold(one, projection.down_proj.data[expert], None)
        return
    weight = getattr(projection, "weight", None)
    if weight is None or not weight.is_floating_point():
        raise ValueError(
            f"The mean {eve.config.mean!r} of layer {eve.layer_idx} would be multiplied into its W_out, a "
            f"{type(projection).__name__} whose weights are not plain numbers: dequantise the model first."
        )
    is_conv = hasattr(projection, "nx")
    _fold(eve, weight.data.T if is_conv else weight.data, projection.bias)


@torch.no_grad()
def _fold(eve: EVE, matrix: Tensor, bias: Tensor | None) -> None:
    """Multiplies a mean into W_out, [hidden, units], and adds its bias to W_out's, in place."""
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    if eve.config.mean == "gain":
        matrix.copy_(wide * eve.gain.to(wide))
        return
    # The pooled mean is linear in h: its columns are what it makes of the units, beyond what it makes of 0.
    units = torch.eye(eve.units, dtype=wide.dtype, device=wide.device)
    shift = eve.pooled_mean(torch.zeros_like(units[None, :1]))[0, 0]
    columns = eve.pooled_mean(units[None])[0] - shift
    moved = wide @ shift
    if bias is not None:
        bias.add_(moved.to(bias))
    elif shift.abs().max() > 0:
        raise ValueError(
            f"The mean of layer {eve.layer_idx} has learned a bias, and its W_out has none to take it: the stock "
            "class cannot compute this mean pass."
        )
    matrix.copy_(wide @ columns.T)


def eve_modules(model: PreTrainedModel) -> dict[int, nn.Module]:
    """Layer number to the EVE of its FFN (or the `ExpertsEVE` of its experts)."""
    found = [module for module in model.modules() if isinstance(module, (AttachedEVE, ExpertsEVE))]
    # Of several adapters' one is active.
    found = [module for module in found if getattr(module, "is_active", True)]
    return {module.layer_idx: module for module in sorted(found, key=lambda module: module.layer_idx)}
