"""How regime control changes neurons: the rows that make a unit's mean, its log-scale, and the optimizer's state."""

import torch
from torch import Tensor, nn

from ...modeling.eve import EVE

# What optimizers keep of a parameter in its own unit: a displacement, which moves with it.
_MOMENTA = ("exp_avg", "momentum_buffer")
# What they keep of its gradient's size, which does not know the parameter, and what is no tensor of its shape.
_SIZES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "exp_avg_sq_row", "exp_avg_sq_col", "step", "RMS")


@torch.no_grad()
def rescale_means(neurons: list[EVE], factor: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
    """Multiplies mu of each unit by a factor, in place, and with it the momentum of what it is made of.

    mu_i = g_i h_i and mu_i = W_i h + b_i are linear in g_i, in the row W_i and in b_i, and no other unit reads these.
    An optimizer's momentum is a displacement of its parameter: times the same factor the next update is the same share
    of the parameter as before. The second moment is the size of dL/dg = dL/dmu h, where g does not stand, and stays.

    Args:
        neurons: the EVE modules of a layer.
        factor: [units] of all of them.
        optimizer: that of the training.

    Raises:
        ValueError: for an optimizer whose state is none of these, naming it.
    """
    for eve, own in _split(neurons, factor):
        if eve.config.mean == "gain":
            _multiply(eve.gain, own, optimizer)
        else:
            rows = own.repeat_interleave(eve.config.latent_dim)
            _multiply(eve.mean_weight, rows.unsqueeze(1), optimizer)
            _multiply(eve.mean_bias, rows, optimizer)


@torch.no_grad()
def shift_log_scales(neurons: list[EVE], shift: Tensor) -> None:
    """Adds to the log-scale of each unit (all its latent dimensions), in place.

    The optimizer's state stays: a shifted parameter has the updates it had.
    """
    for eve, own in _split(neurons, shift):
        if eve.config.scale == "scalar":
            own = own.mean(0, keepdim=True)
        elif eve.config.latent_dim > 1:
            own = own.unsqueeze(1)
        eve.log_scale.copy_((eve.log_scale.to(own.dtype) + own).to(eve.log_scale.dtype))


def _split(neurons: list[EVE], values: Tensor) -> list[tuple[EVE, Tensor]]:
    return list(zip(neurons, values.split([eve.units for eve in neurons]), strict=True))


def _multiply(parameter: nn.Parameter, factor: Tensor, optimizer) -> None:
    for tensor in (parameter, *_momenta(parameter, optimizer)):
        tensor.copy_((tensor.to(factor.dtype) * factor).to(tensor.dtype))


def _momenta(parameter: nn.Parameter, optimizer) -> list[Tensor]:
    optimizer = getattr(optimizer, "optimizer", optimizer)  # inside accelerate's wrapper
    state = {} if optimizer is None else optimizer.state.get(parameter, {})
    for name, value in state.items():
        unknown = name not in (*_MOMENTA, *_SIZES) and torch.is_tensor(value)
        if unknown or (name in _MOMENTA and not (value is None or value.is_floating_point())):
            raise ValueError(
                f"Regime control cannot keep the state {name!r} of {type(optimizer).__name__} consistent when it "
                "rescales a unit's mean: train with AdamW or SGD (optim='adamw_torch'), or leave out projection and "
                "homeostasis."
            )
    return [state[name] for name in _MOMENTA if state.get(name) is not None]
