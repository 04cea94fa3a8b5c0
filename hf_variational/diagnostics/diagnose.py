"""One pass over a data set that says what every unit and every attention head of a variational model does."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..checks import check_whole
from ..evaluation.predictions import each_batch
from ..evaluation.streaming import IGNORED_LABEL
from ..modeling.posterior import UnitWeights, check_unit_weights, weights_of
from .band import Band
from .diagnostics import Diagnostics
from .layers import HeadDiagnostics, LayerDiagnostics, troubled
from .neurons import neurons_of, scale_ceiling, unwatched_mean_kl

_OF_UNITS = {"kl_per_unit": "kl", "scale": "scale", "mean_energy": "mean_energy"}
_OF_HEADS = {
    "kl_per_head": "kl",
    "scale": "scale",
    "concentration": "concentration",
    "entropy": "entropy",
    "effective_keys": "effective_keys",
}


def diagnose(
    model,
    data,
    band: Band | Mapping[int, Band] | None = None,
    *,
    num_posterior_samples: int = 1,
    batch_size: int = 8,
    kl_weight: float | None = None,
    unit_weights: Mapping[int, UnitWeights] | None = None,
    name: str | None = None,
    data_name: str = "data",
    seed: int = 0,
    progress: bool = True,
) -> Diagnostics:
    """Statistics of the posteriors of a causal language model on a data set: per layer, per unit and per head.

    They are means over the tokens that carry KL, those whose next token is a target, so the size of a batch and its
    padding change nothing but the noise that is drawn. One pass; what is kept are the units, however long the data is.

    Args:
        model: a variational model, also a retrofitted one, or one with an EVE adapter in peft's wrapper.
        data: as [`evaluate_language_model`] takes it: sequences of token ids, rows of `input_ids` (and
            `attention_mask`, `labels`), or a loader of batches of them.
        band: where the mean energy of the units should be; for all layers, or by layer number.
        num_posterior_samples: posterior samples of each token, whose noise reaches the layers above it too. The
            statistics are means over many tokens already, so that one will do; 0 is the mean pass.
        batch_size: sequences of a pass.
        kl_weight: beta, for the effective KL; `None`: the model's own.
        unit_weights: what regime control weighs the KL of each unit with, as the model's `forward` takes it; likewise
            for the effective KL.
        name, data_name: what the model (`None`: its path, or else its class) and the data are called.
        seed: of the noise.
        progress: shows a progress bar.

    Raises:
        ValueError: for a model without a posterior, data without a token to predict, a band for a layer that has no
            variational neurons or another number of units, likewise weights, or logits that are not numbers.
    """
    check_whole("num_posterior_samples", num_posterior_samples, 0)
    check_whole("batch_size", batch_size, 1)
    inner = getattr(model, "module", model)
    if not getattr(inner, "posterior_sites", None):
        raise ValueError(
            f"{type(inner).__name__} has no variational neurons and no variational attention: there is nothing to "
            "diagnose. Train a VariationalGPT with an EVEConfig, or make this model variational with variationalize."
        )
    neurons = neurons_of(inner)
    bands = _bands(band, {layer: sum(one.units for one in modules) for layer, modules in neurons.items()})
    check_unit_weights(unit_weights, list(neurons))
    weights = {
        layer: weights_of(unit_weights, layer, sum(one.units for one in modules)).kl
        for layer, modules in neurons.items()
    }
    sums = _Sums(inner.device)

    def take(batch: dict[str, Tensor], targets: Tensor, number: int, first: int) -> int:
        # Back from the target of each position to the label of each token.
        labels = torch.nn.functional.pad(targets[:, :-1], (1, 0), value=IGNORED_LABEL)
        out = model(
            **batch,
            labels=labels,
            num_posterior_samples=num_posterior_samples,
            output_posteriors=True,
            use_cache=False,
        )
        scored = targets != IGNORED_LABEL
        if batch.get("attention_mask") is not None and batch["attention_mask"].ndim == 2:
            scored = scored & batch["attention_mask"].ne(0)
        sums.add(out.posteriors, out.attention_posteriors, scored.sum())
        return int(scored.sum())

    sequences = each_batch(model, data, take, batch_size, seed, progress, "Diagnosing")
    tokens, units, heads = sums.means()
    if kl_weight is None:
        kl_weight = (getattr(inner, "settings", None) or inner.config).kl_weight
    return Diagnostics(
        model=name or _name_of(inner),
        data=data_name,
        num_posterior_samples=num_posterior_samples,
        seed=seed,
        sequences=sequences,
        tokens=tokens,
        kl_weight=float(kl_weight),
        layers={
            layer: _layer(values, neurons[layer], bands.get(layer), kl_weight, weights[layer])
            for layer, values in units.items()
        },
        heads={
            layer: HeadDiagnostics({"kl": values["kl"], "effective_kl": values["kl"] * kl_weight, **values})
            for layer, values in heads.items()
        },
    )


class _Sums:
    """Sums over tokens, on the device of the model."""

    def __init__(self, device: torch.device):
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        self.sums: dict[tuple[str, int, str], Tensor] = {}
        self.tokens: Tensor | int = 0

    def add(self, units: Mapping | None, heads: Mapping | None, tokens: Tensor) -> None:
        for site, names, found in (("ffn", _OF_UNITS, units), ("attention", _OF_HEADS, heads)):
            for layer, statistics in (found or {}).items():
                for attribute, name in names.items():
                    value = getattr(statistics, attribute)
                    if value is not None:
                        place = (site, layer, name)
                        value = value.to(self.dtype) * tokens.to(value.device)
                        self.sums[place] = self.sums[place] + value if place in self.sums else value
        self.tokens = self.tokens + tokens

    def means(self) -> tuple[int, dict[int, dict[str, Tensor]], dict[int, dict[str, Tensor]]]:
        """Number of tokens, and by layer and name the means of the units, and of the heads."""
        tokens = int(self.tokens)
        found: dict[str, dict[int, dict[str, Tensor]]] = {"ffn": {}, "attention": {}}
        for (site, layer, name), total in sorted(self.sums.items(), key=lambda item: item[0][:2]):
            found[site].setdefault(layer, {})[name] = (total / max(tokens, 1)).cpu().float()
        return tokens, found["ffn"], found["attention"]


def _layer(
    values: dict[str, Tensor], neurons: list, band: Band | None, kl_weight: float, weights: Tensor | None
) -> LayerDiagnostics:
    unwatched = unwatched_mean_kl(neurons, values["mean_energy"])
    dead, exploding = troubled(
        values["kl"], values["scale"], values["mean_energy"], unwatched, scale_ceiling(neurons), band
    )
    charged = values["kl"] if weights is None else values["kl"] * weights.to(values["kl"])
    return LayerDiagnostics(**values, effective_kl=charged * kl_weight, dead=dead, exploding=exploding, band=band)


def _bands(band: Band | Mapping[int, Band] | None, units: dict[int, int]) -> dict[int, Band]:
    """A band for each layer, or for some of them."""
    if band is None:
        return {}
    if not units:
        raise ValueError("A band is of the mean energy of variational neurons, and this model has none: leave it out.")
    bands = dict(band) if isinstance(band, Mapping) else dict.fromkeys(units, band)
    for layer, one in bands.items():
        if layer not in units:
            raise ValueError(
                f"There is a band for layer {layer}, and the layers with variational neurons are "
                f"{', '.join(map(str, units))}."
            )
        if one.units != units[layer]:
            raise ValueError(
                f"The band is of {one.units} units, and layer {layer} has {units[layer]}: give one for each layer, "
                "{layer: band}."
            )
    return {layer: one.to("cpu") for layer, one in bands.items()}


def _name_of(model) -> str:
    return getattr(model.config, "name_or_path", "") or type(model).__name__
