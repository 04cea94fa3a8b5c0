"""What `evaluate_model` returns: numbers, how they were made, and nothing that cannot be written as JSON."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from ...files import plain, write_whole
from .metadata import model_index

REPORT, METADATA = "report.json", "model-index.yaml"
FORMAT = 1
# Place in a contender's sections, label, and whether less is better (None: neither).
ROWS = (
    (("quality", "nll"), "NLL, nats a token", True),
    (("quality", "perplexity"), "perplexity", True),
    (("quality", "bits_per_byte"), "bits per byte", True),
    (("quality", "accuracy"), "accuracy", False),
    (("quality", "expected_calibration_error"), "ECE, bins of equal width", True),
    (("quality", "expected_calibration_error_mass"), "ECE, bins of equal mass", True),
    (("quality", "maximum_calibration_error"), "MCE, bins of equal mass", True),
    (("quality", "classwise_calibration_error"), "classwise ECE", True),
    (("quality", "brier_score"), "Brier score", True),
    (("quality", "cvar_nll"), "NLL of the worst 5 %", True),
    (("measures", "predictive_entropy"), "predictive entropy, nats", None),
    (("measures", "expected_entropy"), "expected entropy, nats", None),
    (("measures", "mutual_information"), "mutual information, nats", None),
    (("measures", "conditional_variance"), "conditional variance", None),
    (("measures", "top1_flip_rate"), "top-1 flip rate", None),
    (("measures", "kl"), "KL of the posteriors, nats a token", None),
    (("measures", "scale"), "scale of the units", None),
    (("error_detection", "predictive_entropy", "auroc"), "AUROC, wrong tokens: predictive entropy", False),
    (("error_detection", "mutual_information", "auroc"), "AUROC, wrong tokens: mutual information", False),
    (("error_detection", "combination", "auroc"), "AUROC, wrong tokens: all combined", False),
    (("selective", "token", "predictive_entropy", "aurc"), "AURC: predictive entropy", True),
    (("selective", "token", "combination", "aurc"), "AURC: all combined", True),
)


class Row(NamedTuple):
    """A number of every contender: its label, whether less is better (`None`: neither), its place, and the values."""

    label: str
    less_is_better: bool | None
    place: tuple[str, ...]
    values: dict[str, float | None]


@dataclass(frozen=True)
class EvaluationReport:
    """
    The numbers of a model and of what it is compared with.

    Attributes:
        model: what the model is called; its column is the first of `contenders`.
        seed: of the noise and of the resamples.
        configuration: samples, data, validation data, windows, dtype, and whatever the caller adds.
        versions: of what computed it.
        notes: sentences that a reader of the numbers has to know.
        contenders: by name, sections of plain numbers: `quality`, `measures`, `error_detection`, `selective`,
            `policies`, `out_of_domain`, `cost`, and beside them `num_posterior_samples`, `temperature`, `training`.
            A number with an interval is `{"value", "interval"}`, where the interval is of whole documents (or
            sequences) resampled, and `None` where there is none.
        curves: by contender, what the plots draw.
        times: seconds and peak memory, the only entry that a repeated run may change.
    """

    model: str
    seed: int
    configuration: dict
    versions: dict
    notes: list[str]
    contenders: dict[str, dict]
    curves: dict[str, dict] = field(default_factory=dict)
    times: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict:
        """Plain values; what is not a finite number is `None`, for JSON has none."""
        return {"format": FORMAT, **plain(asdict(self))}

    def to_json(self) -> str:
        """The same as JSON."""
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "EvaluationReport":
        """
        Raises:
            ValueError: for JSON that is no report, or one of a newer version of the package.
        """
        values = json.loads(text)
        found = values.pop("format", None) if isinstance(values, dict) else None
        if found != FORMAT or set(values) != {one.name for one in fields(cls)}:
            raise ValueError(
                f"This is no report of format {FORMAT}, but of {found!r}: update hf-variational, or write it again."
            )
        return cls(**values)

    def value(self, contender: str, *keys: str) -> float | None:
        """A number by its place in a contender's sections; `None` if it is not there.

        Example:

        ```python
        >>> report.value("model", "error_detection", "mutual_information", "auroc")
        ```
        """
        place: Any = self.contenders[contender]
        for key in keys:
            if not isinstance(place, Mapping) or key not in place:
                return None
            place = place[key]
        return place.get("value") if isinstance(place, Mapping) else place

    def interval(self, contender: str, *keys: str) -> list[float] | None:
        """The interval of the same number; `None` if it has none."""
        place: Any = self.contenders[contender]
        for key in keys:
            place = place.get(key) if isinstance(place, Mapping) else None
        return place.get("interval") if isinstance(place, Mapping) else None

    def rows(self) -> list[Row]:
        """Every number of the table that some contender has."""
        rows = [
            Row(label, less, place, {name: self.value(name, *place) for name in self.contenders})
            for place, label, less in ROWS
        ]
        return [row for row in rows if any(value is not None for value in row.values.values())]

    def table(self) -> str:
        """The rows and the notes as text."""
        names = list(self.contenders)
        lines = [["", *names], *([row.label, *map(_shown, row.values.values())] for row in self.rows())]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [
            "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines
        ]
        return "\n".join([*text, "", *self.notes])

    def model_index(self, contender: str | None = None) -> str:
        """YAML of the metadata `model-index` of a model card; see [`model_index`]."""
        return model_index(self, contender)

    def save(self, folder: str | Path) -> Path:
        """Writes `report.json` and `model-index.yaml`, each whole or not at all; the page and the plots are
        `hf_variational.presentation.report.write_report`'s.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in ((REPORT, self.to_json()), (METADATA, self.model_index())):
            write_whole(folder / name, text)
        return folder


def _shown(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.4g}"
