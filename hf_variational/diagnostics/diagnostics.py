"""What `diagnose` returns: the units and heads of every layer in numbers, as text, as JSON."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..files import write_whole
from .layers import HeadDiagnostics, LayerDiagnostics
from .text import columns_of, shown

FORMAT = "hf_variational.diagnostics/1"

# Names of a layer's summary as columns, and what they are headed with.
COLUMNS = {
    "units": "units",
    "kl": "KL",
    "effective_kl": "effective KL",
    "scale": "σ",
    "mean_energy": "mean μ²",
    "mean_energy_median": "median μ²",
    "active_fraction": "active",
    "under": "under",
    "inside": "inside",
    "over": "over",
    "dead": "dead",
    "exploding": "exploding",
}
HEAD_COLUMNS = {
    "heads": "heads",
    "kl": "KL",
    "effective_kl": "effective KL",
    "scale": "σ",
    "concentration": "concentration",
    "entropy": "entropy",
    "effective_keys": "effective keys",
    "active_fraction": "active",
}
SHARES = ("active_fraction", "under", "inside", "over")


@dataclass(frozen=True)
class Diagnostics:
    """The state of a variational model on a data set.

    Attributes:
        model, data: what they are called.
        num_posterior_samples: posterior samples that the statistics are means over; 0 is the mean pass.
        seed: of the noise.
        sequences, tokens: how many were read, and how many of the tokens carry KL.
        kl_weight: beta, that `effective_kl` is multiplied with.
        layers: layer number to [`LayerDiagnostics`], of the layers with variational neurons.
        heads: layer number to [`HeadDiagnostics`], of the layers with variational attention.
    """

    model: str
    data: str
    num_posterior_samples: int
    seed: int
    sequences: int
    tokens: int
    kl_weight: float
    layers: dict[int, LayerDiagnostics] = field(default_factory=dict)
    heads: dict[int, HeadDiagnostics] = field(default_factory=dict)

    @property
    def dead(self) -> dict[int, list[int]]:
        """Layer number to the numbers of its dead units, of the layers that have some; see [`troubled`]."""
        return self._named("dead")

    @property
    def exploding(self) -> dict[int, list[int]]:
        """Layer number to the numbers of its exploding units, of the layers that have some; see [`troubled`]."""
        return self._named("exploding")

    def _named(self, kind: str) -> dict[int, list[int]]:
        found = {number: getattr(layer, kind).nonzero().flatten().tolist() for number, layer in self.layers.items()}
        return {number: units for number, units in found.items() if units}

    def shares(self) -> dict[str, float]:
        """Shares `under`, `inside` and `over` the band, of all units of the layers with a band; empty without one."""
        banded = [layer for layer in self.layers.values() if layer.band is not None]
        total = sum(layer.units for layer in banded)
        names = ("under", "inside", "over") if banded else ()
        return {name: sum(float(getattr(one.shares, name)) * one.units for one in banded) / total for name in names}

    def table(self) -> str:
        """The layers' summaries as text, a row a layer, and the units in trouble by number."""
        parts = []
        for found, columns in ((self.layers, COLUMNS), (self.heads, HEAD_COLUMNS)):
            summaries = {f"layer {number}": layer.summary() for number, layer in found.items()}
            if summaries:
                names = [name for name in columns if any(name in summary for summary in summaries.values())]
                rows = [
                    [label, *(shown(summary.get(name), name in SHARES) for name in names)]
                    for label, summary in summaries.items()
                ]
                parts.append(columns_of([["", *(columns[name] for name in names)], *rows]))
        for kind, named in (("dead", self.dead), ("exploding", self.exploding)):
            if named:
                parts.append("\n".join(f"{kind} in layer {layer}: {listed(units)}" for layer, units in named.items()))
        return "\n\n".join(parts)

    def to_dict(self) -> dict:
        """Plain values that `from_dict` reads back."""
        facts = ("model", "data", "num_posterior_samples", "seed", "sequences", "tokens", "kl_weight")
        return {
            "format": FORMAT,
            **{name: getattr(self, name) for name in facts},
            "layers": {str(number): layer.to_dict() for number, layer in self.layers.items()},
            "heads": {str(number): layer.to_dict() for number, layer in self.heads.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping) -> "Diagnostics":
        """Reads `to_dict`'s dictionary.

        Raises:
            ValueError: for a dictionary of something else.
        """
        found = values.get("format") if isinstance(values, Mapping) else None
        if found != FORMAT:
            raise ValueError(
                f"These are no diagnostics of format {FORMAT!r}, but of {found!r}: write them again with "
                "hf-variational inspect, or update hf-variational."
            )
        given = {name: value for name, value in values.items() if name != "format"}
        kinds = {"layers": LayerDiagnostics, "heads": HeadDiagnostics}
        for name, kind in kinds.items():
            given[name] = {int(number): kind.from_dict(layer) for number, layer in given[name].items()}
        return cls(**given)

    def save(self, path: str | Path) -> Path:
        """Writes a JSON file, whole or not at all."""
        return write_whole(path, json.dumps(self.to_dict(), ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Diagnostics":
        """Reads what `save` has written.

        Raises:
            ValueError: for a file of something else, named.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def listed(units: list[int], most: int = 20) -> str:
    """Numbers in a row, and how many are left out."""
    more = len(units) - most
    return ", ".join(map(str, units[:most])) + (f" and {more:,} more" if more > 0 else "")
