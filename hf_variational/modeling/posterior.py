"""The posterior tape: what a variational layer tells of its posterior to whoever listens to this forward pass."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .sample_axis import mean_over_samples

# A unit whose mean KL is below this many nats has collapsed onto its prior (arXiv 2603.28219).
ACTIVE_KL = 1e-4


@dataclass
class PosteriorStatistics:
    """Statistics of one layer's posterior.

    Attributes:
        kl: KL divergence from the prior summed over units, averaged over posterior samples, nats, [batch, length].
        kl_per_unit: the same per unit, averaged over the tokens that carry KL, [units].
        scale: posterior scale sigma per unit, likewise averaged, [units].
        mean_energy: E[mu^2] per unit, likewise averaged (and summed over a unit's latent dimensions), [units].
        scale_per_token, mean_energy_per_token: the same of each token, averaged over units and posterior samples,
            [batch, length].
        tokens: rows times tokens that carry KL, which the averages per unit are over, 0-dim.
    """

    kl: Tensor
    kl_per_unit: Tensor | None = None
    scale: Tensor | None = None
    mean_energy: Tensor | None = None
    scale_per_token: Tensor | None = None
    mean_energy_per_token: Tensor | None = None
    tokens: Tensor | None = None

    def over_samples(self, batch: int) -> "PosteriorStatistics":
        """The same with the rows of what is per token averaged over posterior samples, to [batch, length]."""
        rows = {"kl": self.kl, "scale_per_token": self.scale_per_token}
        rows["mean_energy_per_token"] = self.mean_energy_per_token
        return replace(self, **{name: mean_over_samples(t, batch) for name, t in rows.items() if t is not None})

    @property
    def active_fraction(self) -> Tensor:
        """Share of units whose KL exceeds 1e-4 nats, 0-dim."""
        return (self.kl_per_unit > ACTIVE_KL).float().mean()


@dataclass
class AttentionStatistics:
    """Statistics of one layer's posterior over attention weights.

    Attributes:
        kl: KL divergence from the prior summed over heads and keys, averaged over posterior samples, nats,
            [batch, length].
        kl_per_head: the same per head, averaged over the tokens that carry KL, [heads].
        scale: posterior scale sigma per head, likewise averaged, [heads]; of Gaussian attention.
        concentration: posterior concentration a per head, likewise averaged, [heads]; of Dirichlet attention.
        entropy: entropy of the weights (of the mean in the mean pass) per head, likewise averaged, nats, [heads].
        effective_keys: effective number of keys exp(entropy) per head, likewise averaged, [heads].
    """

    kl: Tensor
    kl_per_head: Tensor | None = None
    scale: Tensor | None = None
    concentration: Tensor | None = None
    entropy: Tensor | None = None
    effective_keys: Tensor | None = None

    def over_samples(self, batch: int) -> "AttentionStatistics":
        """The same with the rows of `kl` averaged over posterior samples, to [batch, length]."""
        return replace(self, kl=mean_over_samples(self.kl, batch))


@dataclass
class PosteriorRecord:
    """What a posterior hands to the tape.

    `statistics.kl`, `reconstruction`, `charged_kl` and `energy` have one row per row of the layer, [rows, length].

    Attributes:
        layer: number of the layer.
        statistics: of the posterior.
        units: how many latents a token has here (feed-forward units, or attention heads): free bits are per unit.
        site: `"ffn"` or `"attention"`.
        reconstruction: error of the local reconstruction.
        charged_kl: sum over units of their KL times its weight, where the units have weights of their own.
        energy: what their mean energies are charged, likewise; see [`UnitWeights`].
    """

    layer: int
    statistics: PosteriorStatistics | AttentionStatistics
    units: int
    site: str = "ffn"
    reconstruction: Tensor | None = None
    charged_kl: Tensor | None = None
    energy: Tensor | None = None


class UnitWeights(NamedTuple):
    """What the units of one layer are charged, beyond what all are charged alike; float32, without gradients.

    The loss has, per token, kl_weight * sum_i kl_i KL_i instead of kl_weight * sum_i KL_i, and on top of it
    sum_i energy_i mu_i^2 + constant. With energy_i the derivative of a penalty P of the mean energies E[mu_i^2], and
    constant = P - sum_i energy_i E[mu_i^2], that is P to first order: it has the gradient of P and, unlike P, is a sum
    over tokens, so it is the same for any accumulation and any number of devices.

    Attributes:
        kl: weight of each unit's KL relative to `kl_weight`, [units]; `None`: 1.
        energy: weight of each unit's mu^2, [units]; `None`: 0. (Of stacked experts: one expert's units after the
            other's.)
        constant: 0-dim, or `None`.
    """

    kl: Tensor | None = None
    energy: Tensor | None = None
    constant: Tensor | None = None


def check_unit_weights(unit_weights: Mapping[int, UnitWeights] | None, layers: Sequence[int]) -> None:
    """Raises `ValueError` that names a layer that has weights for its units and no units."""
    for layer in unit_weights or ():
        if layer not in layers:
            raise ValueError(
                f"unit_weights has weights for layer {layer!r}, and the layers with variational units are "
                f"{list(layers)}."
            )


def weights_of(unit_weights: Mapping[int, UnitWeights] | None, layer: int, units: int) -> UnitWeights:
    """The weights of a layer's units; raises `ValueError` if they are of another number of units."""
    weights = UnitWeights() if unit_weights is None else unit_weights.get(layer, UnitWeights())
    for name in ("kl", "energy"):
        values = getattr(weights, name)
        if values is not None and values.shape != (units,):
            raise ValueError(
                f"unit_weights[{layer}].{name} has the shape {[*values.shape]}, and layer {layer} has {units} units."
            )
    return weights


class PosteriorTap(nn.Module):
    """Passes a record through; the tape is a forward hook on this module.

    Recorded by transformers' `OutputRecorder`, so a layer keeps nothing of a forward pass on itself. In a model of a
    family whose output classes have no room for posteriors the sample axis carries the tape.
    """

    def forward(self, record: PosteriorRecord, tape: list[PosteriorRecord] | None = None) -> PosteriorRecord:
        if tape is not None:
            tape.append(record)
        return record


def check_complete(records: tuple[PosteriorRecord, ...], expected: list[tuple[int, str]]) -> None:
    """Raises `RuntimeError` unless the tape holds one record of each expected (layer, site): a KL must never go
    missing.
    """
    recorded = [(record.layer, record.site) for record in records]
    if sorted(recorded) != sorted(expected):
        raise RuntimeError(
            f"The tape holds posteriors of (layer, site) {recorded}, but those of {sorted(expected)} are expected: "
            "the KL would be incomplete. Replace layers before the first forward pass, which installs the recording "
            "hooks, or give the weights to a fresh model: new = type(model)(model.config); "
            "new.load_state_dict(model.state_dict())."
        )


@torch.no_grad()
def unit_statistics(
    kl: Tensor, log_scale: Tensor, mean: Tensor, weights: Tensor, total: Tensor | None = None
) -> dict[str, Tensor]:
    """Averages over the tokens that carry KL, and over the units of each token.

    Args:
        kl, log_scale, mean: [rows, length, units] or [rows, length, units, k], or broadcastable to it.
        weights: [rows, length], 1 where a token counts.
        total: tokens that count, of all parts whose statistics are going to be joined, 0-dim; `None`: of these rows.

    Returns:
        `kl_per_unit`, `scale`, `mean_energy`, each [units], and `scale_per_token`, `mean_energy_per_token`, each
        [rows, length]; float32. And `tokens`, 0-dim.
    """
    shape = torch.broadcast_shapes(kl.shape, log_scale.shape, mean.shape)
    tokens = weights.sum() if total is None else total
    total = tokens.clamp(min=1)

    def of_units(values: Tensor, over_latent) -> Tensor:
        values = values.expand(shape)
        return (over_latent(values) if len(shape) == 4 else values).float()

    def average(values: Tensor) -> Tensor:
        # Not a matrix product, which autocast would do in half precision.
        return (values * weights.float().unsqueeze(-1)).sum((0, 1)) / total

    scale = of_units(log_scale.exp(), lambda values: values.mean(-1))
    energy = of_units(mean.square(), lambda values: values.sum(-1))
    return {
        "kl_per_unit": average(of_units(kl, lambda values: values.sum(-1))),
        "scale": average(scale),
        "mean_energy": average(energy),
        "scale_per_token": scale.mean(-1),
        "mean_energy_per_token": energy.mean(-1),
        "tokens": tokens.float(),
    }


def join_statistics(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Joins `unit_statistics` of consecutive rows, each with the `total` of all of them."""
    if len(parts) == 1:
        return parts[0]
    joined = {"tokens": parts[0]["tokens"]}
    for name in parts[0].keys() - joined.keys():
        values = [part[name] for part in parts]
        joined[name] = torch.cat(values) if name.endswith("_per_token") else torch.stack(values).sum(0)
    return joined
