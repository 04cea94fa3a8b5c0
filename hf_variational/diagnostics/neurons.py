"""Where a model keeps its variational neurons, and what their statistics are judged by."""

import math

import torch
from torch import Tensor, nn

from ..modeling.eve import EVE


def neurons_of(model: nn.Module) -> dict[int, list[EVE]]:
    """Layer number to the EVE modules whose units the tape reports for it, in order of the layers.

    One module a layer, or one for each expert where the experts of a layer are stacked. Of several adapters in one
    model only the active one's count.
    """
    idle = {
        id(inside)
        for module in model.modules()
        if getattr(module, "is_active", True) is False
        for inside in module.modules()
    }
    found: dict[int, list[EVE]] = {}
    for module in model.modules():
        if isinstance(module, EVE) and id(module) not in idle:
            found.setdefault(module.layer_idx, []).append(module)
    return dict(sorted(found.items()))


@torch.no_grad()
def unwatched_mean_kl(neurons: list[EVE], energy: Tensor) -> Tensor:
    """What N(0, s^2) would charge for the mean, E[mu^2] / (2 s^2), where the prior N(mu, s^2) charges nothing; 0 under
    every other prior, whose KL has the mean in it. [units], nats.

    Args:
        neurons: the EVE modules of a layer.
        energy: E[mu^2] of the layer's units, [units].
    """
    if neurons[0].config.prior != "centered":
        return torch.zeros_like(energy)
    log_scale = torch.cat([one.prior_log_scale for one in neurons]).to(energy)
    return 0.5 * energy * torch.exp(-2.0 * log_scale)


def scale_ceiling(neurons: list[EVE]) -> float:
    """The largest sigma that the neurons of a layer can have, exp(`log_scale_max`)."""
    return math.exp(neurons[0].config.log_scale_max)
