"""The data of a report: test, validation and windows of other texts, with what has to be said of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..token_scores import TokenScores
from .resamples import DocumentResamples
from .rows import Described, described, front, refuse_overlap, short_windows
from .settings import EvaluationSettings

# Fewer documents than this say little of their spread: then sequences are resampled.
_FEWEST_DOCUMENTS = 10
_WINDOW_TOKENS = 16_000  # of each text and length


@dataclass(frozen=True)
class ReportData:
    """
    Attributes:
        test, validation: sequences; there may be no validation data.
        windows: of the test data, by length.
        others: of other texts, by name and length.
        facts: of the test data.
        notes: what a reader has to know of how the data was divided.
    """

    test: Sequence
    validation: Sequence | None
    windows: dict[int, list]
    others: dict[str, dict[int, list]]
    facts: Described
    notes: list[str]

    @classmethod
    def prepare(cls, dataset, validation, ood: Mapping, settings: EvaluationSettings) -> "ReportData":
        """
        Raises:
            ValueError: for data that is empty, validation data that has windows of the test data, or other texts
                without a window.
        """
        described(dataset, "dataset")
        notes: list[str] = []
        test = dataset
        if validation is None and settings.validation_fraction:
            validation, test, repeated = front(dataset, settings.validation_fraction)
            left_out = f" ({repeated} more, which the rest has too, were left out)" if repeated else ""
            notes.append(
                f"The validation data is split off the front of the data: {len(validation)} of {len(dataset)} "
                f"sequences{left_out}. The numbers are of the rest."
            )
        facts = described(test, "dataset")
        if validation is None:
            notes.append("There is no validation data, so nothing is fitted: no temperature, combination or policy.")
        else:
            refuse_overlap(described(validation, "validation"), facts)
        windows, others, left_out = _all_windows(test, ood, settings)
        return cls(test, validation, windows, others, facts, notes + left_out)

    @property
    def documents(self) -> Tensor:
        """The document of each sequence, or if there are few documents the sequence itself, [sequences]."""
        if len(set(self.facts.documents)) < _FEWEST_DOCUMENTS:
            return torch.arange(len(self.test))
        return torch.tensor(self.facts.documents)

    def resamples(self, scores: TokenScores, settings: EvaluationSettings, seed: int) -> DocumentResamples:
        """Of the documents of the test data, whose scores are given."""
        return DocumentResamples(self.documents[scores.windows], settings.num_resamples, seed=seed)

    def configuration(self, settings: EvaluationSettings) -> dict:
        """How much of what there is."""
        documents = len(set(self.facts.documents))
        resampled = len(self.documents.unique())
        return {
            "data": {"sequences": len(self.test), "documents": documents, "longest": self.facts.longest},
            "validation": {"sequences": 0 if self.validation is None else len(self.validation)},
            "resampled": {
                "unit": "document" if documents >= _FEWEST_DOCUMENTS else "sequence",
                "count": resampled,
                "resamples": settings.num_resamples,
            },
            "windows": {str(length): len(rows) for length, rows in self.windows.items()},
            "out_of_domain": {
                text: {str(length): len(rows) for length, rows in each.items()} for text, each in self.others.items()
            },
        }


def _all_windows(test, ood: Mapping, settings: EvaluationSettings) -> tuple[dict, dict, list[str]]:
    """Windows of the test data and of the other texts by length, and what to say of those that are left out."""
    windows: dict[int, list] = {}
    others: dict[str, dict[int, list]] = {text: {} for text in ood}
    notes: list[str] = []
    for text, rows in ood.items():
        described(rows, text)
    for length in settings.window_lengths if ood else ():
        if len(settings.prefix) + length < 2:
            notes.append(
                "Windows of 1 token are left out: nothing stands in front of them that could predict it, for the "
                "tokenizer puts no token there."
            )
            continue
        limit = min(settings.max_windows, max(1, _WINDOW_TOKENS // length))
        own = short_windows(test, length, settings.prefix, limit)
        if not own:
            notes.append(f"Windows of {length} tokens are left out: no sequence of the test data has so many.")
            continue
        windows[length] = own
        for text, rows in ood.items():
            if found := short_windows(rows, length, settings.prefix, limit):
                others[text][length] = found
            else:
                notes.append(f"{text}: windows of {length} tokens are left out, for it has not so many on end.")
    for text, found in others.items():
        if not found:
            raise ValueError(
                f"{text} has no window of {' or '.join(map(str, settings.window_lengths))} tokens: give more text."
            )
    return windows, others, notes
