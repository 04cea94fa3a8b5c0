"""The objective: the negative evidence lower bound per target token, the same for any accumulation and any devices."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .configuration_variational_gpt import EVEConfig
from .posterior import PosteriorRecord
from .sample_axis import mean_over_samples

IGNORE_INDEX = -100


@dataclass
class ScoredTokens:
    """The target tokens of a forward pass.

    Attributes:
        targets: target of each position, [batch, length]; -100 where there is none.
        weights: 1 where a position is attended and has a target, so carries KL, [batch, length].
        num_items: target tokens of the whole accumulated batch, over all devices, which every sum is divided by.
    """

    targets: Tensor
    weights: Tensor
    num_items: Tensor | int

    @classmethod
    def of(
        cls,
        labels: Tensor | None,
        attention_mask: Tensor | None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs,
    ) -> "ScoredTokens":
        """From the arguments of a forward pass; without `num_items_in_batch` the batch is taken to be whole."""
        targets = shift_targets(labels) if shift_labels is None else shift_labels.contiguous()
        has_target = targets != IGNORE_INDEX
        if num_items_in_batch is None:
            num_items_in_batch = has_target.sum().clamp(min=1)
        elif torch.is_tensor(num_items_in_batch):
            num_items_in_batch = num_items_in_batch.to(targets.device)
        return cls(targets, has_target * attended_positions(attention_mask, targets), num_items_in_batch)


@dataclass
class Penalties:
    """What the posteriors add to the loss, per target token.

    Attributes:
        kl: sum of `kl_per_layer`, 0-dim.
        kl_per_layer: [variational layers].
        charged_kl: the KL that the loss is charged for: `kl`, or more where free bits hold a layer's charge up.
        reconstruction: sum of the layers' local reconstruction errors, 0-dim, or `None`.
        energy: what the units' mean energies are charged, 0-dim, or `None` where no unit has a weight for it.
    """

    kl: Tensor
    kl_per_layer: Tensor
    charged_kl: Tensor
    reconstruction: Tensor | None
    energy: Tensor | None = None

    def added_to(self, loss: Tensor, kl_weight: Tensor | float, eve: EVEConfig | None) -> Tensor:
        """The loss with all of them, weighted; `eve` has the reconstruction's weight, the energy's are in it."""
        loss = loss + kl_weight * self.charged_kl
        if self.reconstruction is not None:
            loss = loss + eve.reconstruction_weight * self.reconstruction
        return loss if self.energy is None else loss + self.energy


def shift_targets(labels: Tensor) -> Tensor:
    """The target of each position: the label of the next one, [batch, length]; -100 at the end."""
    return F.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:].contiguous()


def attended_positions(attention_mask: Tensor | None, like: Tensor) -> Tensor:
    """1 where a position is not padding, [batch, length] of `like`; all of them if the mask is not a 2-D tensor."""
    batch, length = like.shape[:2]
    if torch.is_tensor(attention_mask) and attention_mask.ndim == 2:
        return (attention_mask[:, -length:] != 0).to(like.device)
    return torch.ones(batch, length, dtype=torch.bool, device=like.device)


def following_positions(attended: Tensor, position_ids: Tensor) -> Tensor:
    """True where a position continues the sequence of the one before it, [batch, length].

    False at the first position, across padding, and where packed documents meet (the position ids start again).
    """
    steps = F.pad(position_ids.diff(dim=-1) == 1, (1, 0))
    return steps & attended & F.pad(attended[:, :-1], (1, 0))


def posterior_penalties(
    records: tuple[PosteriorRecord, ...], scored: ScoredTokens, free_bits: float = 0.0
) -> Penalties:
    """Sums the KL over the tokens that carry it, divided by the number of target tokens of the whole batch.

    Args:
        records: the tape, at least one record.
        scored: the target tokens.
        free_bits: nats that a unit may spend at a token at no cost and no gradient (free bits, Kingma et al. 2016): a
            record is charged at each token for at least `free_bits` times its units. Where the units have weights of
            their own (`UnitWeights`) that is the least of the weighted sum.
    """
    batch, device = scored.weights.shape[0], scored.weights.device

    def per_target(values: Tensor) -> Tensor:
        return (values.to(device) * scored.weights).sum() / scored.num_items

    def added_up(name: str) -> Tensor | None:
        parts = [getattr(record, name) for record in records if getattr(record, name) is not None]
        return torch.stack([per_target(mean_over_samples(part, batch)) for part in parts]).sum() if parts else None

    is_plain = free_bits == 0 and all(record.charged_kl is None for record in records)
    spent = {}
    charged = []
    for record in records:
        kl = mean_over_samples(record.statistics.kl, batch)
        if not is_plain:
            charge = kl if record.charged_kl is None else mean_over_samples(record.charged_kl, batch)
            charged.append(per_target(charge.clamp(min=free_bits * record.units) if free_bits > 0 else charge))
            kl = kl.detach()
        value = per_target(kl)
        spent[record.layer] = spent[record.layer] + value if record.layer in spent else value
    kl_per_layer = torch.stack([spent[layer] for layer in sorted(spent)])
    return Penalties(
        kl=kl_per_layer.sum(),
        kl_per_layer=kl_per_layer,
        charged_kl=kl_per_layer.sum() if is_plain else torch.stack(charged).sum(),
        reconstruction=added_up("reconstruction"),
        energy=added_up("energy"),
    )
