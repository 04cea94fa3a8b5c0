"""What is logged of posteriors: gathered as tensors over passes, summarised without asking the device for a number."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..modeling.posterior import ACTIVE_KL

# How an error names what is not finite in a layer's posterior, by statistic.
PARTS = {
    "posterior_scale": "scale",
    "mean_energy": "mean",
    "attention_scale": "attention scale",
    "attention_concentration": "attention concentration",
    "attention_entropy": "attention weights",
}
_BY_LAYER = ("attention_scale", "attention_concentration")


class StatisticsMean:
    """
    Weighted means of the statistics of posteriors over several passes.

    The sums stay on the device of the posteriors. Of feed-forward units `posterior_scale` and `mean_energy` have a
    value for each layer, `kl_per_unit` one for each unit; of attention `attention_kl` (nats a token, summed over
    heads), `attention_scale` or `attention_concentration`, `attention_entropy` (nats) and `effective_keys`, the last
    ones means over heads, have a value for each layer.
    """

    def __init__(self):
        self._sums: dict[str, Tensor] = {}
        self._layers: dict[str, list[int]] = {}
        self._weight = 0.0

    def __bool__(self) -> bool:
        return bool(self._sums)

    @torch.no_grad()
    def add(self, posteriors: Mapping | None, attention_posteriors: Mapping | None, weight: float = 1.0) -> None:
        """
        Adds the statistics of one pass.

        Args:
            posteriors: `{layer: PosteriorStatistics}`; `None` where a model has none.
            attention_posteriors: `{layer: AttentionStatistics}`, likewise.
            weight: How much the pass counts.
        """
        posteriors, attention_posteriors = posteriors or {}, attention_posteriors or {}
        new = {}
        if posteriors:
            units = posteriors.values()
            new["posterior_scale"] = torch.stack([layer.scale.detach().float().mean() for layer in units])
            new["mean_energy"] = torch.stack([layer.mean_energy.detach().float().mean() for layer in units])
            new["kl_per_unit"] = torch.cat([layer.kl_per_unit.detach().float() for layer in units])
        if attention_posteriors:
            heads = list(attention_posteriors.values())
            value = "concentration" if heads[0].scale is None else "scale"
            new["attention_kl"] = torch.stack([layer.kl_per_head.detach().float().sum() for layer in heads])
            for name in (value, "entropy"):
                by_layer = [getattr(layer, name).detach().float().mean() for layer in heads]
                new[f"attention_{name}"] = torch.stack(by_layer)
            new["effective_keys"] = torch.stack([layer.effective_keys.detach().float().mean() for layer in heads])
        for name, values in new.items():
            self._layers[name] = list(posteriors if name in _OF_UNITS else attention_posteriors)
            values = values * weight
            self._sums[name] = self._sums[name] + values if name in self._sums else values
        if new:
            self._weight += weight

    def non_finite(self) -> dict[str, list[int]]:
        """Layers with a value that is not finite, by statistic; waits for the device."""
        found = {}
        for name in PARTS:
            if name in self._sums:
                finite = self._sums[name].isfinite().tolist()
                if bad := [layer for layer, ok in zip(self._layers[name], finite, strict=True) if not ok]:
                    found[name] = bad
        return found

    def sums(self) -> Tensor:
        """All sums as one vector, with the sum of the weights at its end: what processes add up or average."""
        values = list(self._sums.values())
        return torch.cat([*values, values[0].new_full((1,), self._weight)])

    def summary(self, sums: Tensor, by_layer: bool = True) -> dict[str, Tensor]:
        """
        What is logged, by name, each 0-dim and on the device of `sums`.

        Args:
            sums: A vector like `sums()`, of one process or of all.
            by_layer: Whether scale and concentration of attention are also told for each layer.
        """
        *parts, weight = sums.split([*(values.numel() for values in self._sums.values()), 1])
        means = {name: part / weight.clamp(min=1e-12) for name, part in zip(self._sums, parts, strict=True)}
        logged = {}
        for name, values in means.items():
            if name == "kl_per_unit":
                logged["active_fraction"] = (values > ACTIVE_KL).float().mean()
            else:
                logged[name] = values.sum() if name == "attention_kl" else values.mean()
            if by_layer and name in _BY_LAYER:
                logged.update(zip((f"{name}/layer_{layer}" for layer in self._layers[name]), values, strict=True))
        if "kl_per_unit" in means and "attention_kl" in means:
            attention = logged["attention_kl"]
            logged["attention_kl_share"] = attention / (attention + means["kl_per_unit"].sum()).clamp(min=1e-12)
        return logged


_OF_UNITS = ("posterior_scale", "mean_energy", "kl_per_unit")
