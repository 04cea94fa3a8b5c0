"""One contender's numbers: a pass over the test data, one over the validation data, and short ones over windows."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass
from typing import NamedTuple

from torch import Tensor

from ..batches import data_batches
from ..calibration import ClasswiseCalibration
from ..readouts import select_readout
from ..selective import CombinedScore
from ..shift import corruption_sweep
from ..shift_slices import token_counts
from ..temperature import fit_temperature
from ..token_scores import TokenScores, scores_at_temperatures
from . import contents
from .data import ReportData
from .settings import Contender, EvaluationSettings

# Of the windows whose histograms are drawn: short enough that the texts overlap.
_HISTOGRAM_LENGTH = 8
Means = dict[str, Tensor]


class Column(NamedTuple):
    """What a report says of a contender: its sections, what the plots draw, and what took how long."""

    sections: dict
    curves: dict
    times: dict


class Measuring:
    """
    Measures contenders on the same data.

    Args:
        data: what on.
        settings: how.
        seed: of the noise and the resamples.
        progress: whether to show progress bars.
        cost: as in [`evaluate_model`].
    """

    def __init__(
        self, data: ReportData, settings: EvaluationSettings, seed: int, progress: bool, cost: Callable | None
    ):
        self.data = data
        self.settings = settings
        self.cost = cost
        self.options = {"seed": seed, "progress": progress}

    def columns(self, title: str, contender: Contender) -> dict[str, Column]:
        """The contender as it is, and at a temperature if it is `tempered` and there is validation data."""
        data, size = self.data, self.settings.batch_size
        temperatures = {title: 1.0}
        start = time.perf_counter()
        if contender.tempered and data.validation is not None:
            fitted = fit_temperature(
                contender.model, data.validation, contender.num_posterior_samples, size, **self.options
            )
            temperatures[f"{title}, tempered"] = fitted.temperature
        at = list(temperatures.values())
        classwise = [ClasswiseCalibration(self.settings.num_bins) for _ in at]
        begin = time.perf_counter()
        test = self._scores(contender, data.test, at, size, classwise)
        spent = {"test_seconds": time.perf_counter() - begin}
        held = [None] * len(at)
        if data.validation is not None:
            held = self._scores(contender, data.validation, at, size)
        own = {length: self._window_means(contender, rows, at) for length, rows in data.windows.items()}
        others = {
            text: {length: self._window_means(contender, rows, at) for length, rows in each.items()}
            for text, each in data.others.items()
        }
        price, of_time = self._price(contender)
        samples = contender.num_posterior_samples
        shared = {"num_posterior_samples": samples, "training": dict(contender.training), "cost": price}
        found = {}
        for place, (column, temperature) in enumerate(temperatures.items()):
            sections, curves = self._sections(test[place], held[place], classwise[place])
            if place == 0:
                sections["policies"] = self._policies(test[place], held[place], samples)
            here = {length: means[place] for length, means in own.items()}
            there = {text: {length: means[place] for length, means in each.items()} for text, each in others.items()}
            sections["out_of_domain"] = self._out_of_domain(here, there)
            curves["histograms"] = _histograms(here, there)
            found[column] = Column({**shared, "temperature": temperature, **sections}, curves, {**spent, **of_time})
        found[title].times["seconds"] = time.perf_counter() - start
        return found

    def corruption(self, contender: Contender, tokenizer) -> tuple[dict, list]:
        """The model on corrupted contexts: numbers, and what is drawn of it."""
        step = -(-len(self.data.test) // self.settings.max_corrupted)
        places = range(0, len(self.data.test), step)
        sweep = corruption_sweep(
            contender.model,
            [self.data.test[index] for index in places],
            tokenizer,
            num_posterior_samples=contender.num_posterior_samples,
            batch_size=self.settings.batch_size,
            documents=self.data.documents[list(places)],
            **self.options,
        )
        return contents.corruption(sweep, self.options["seed"]), contents.corruption_changes(sweep)

    def readouts(self, contender: Contender) -> dict:
        """Ways to join the samples, chosen on the validation data."""
        samples = contender.num_posterior_samples
        selection = select_readout(contender.model, self.data.validation, self.data.test, samples, **self.options)
        return contents.readouts(selection)

    def _scores(self, contender: Contender, data, temperatures, batch_size: int, classwise=None) -> list[TokenScores]:
        samples = contender.num_posterior_samples
        internal = self.settings.internal and bool(samples and getattr(contender.model, "posterior_sites", None))
        return scores_at_temperatures(
            contender.model, data, temperatures, samples, batch_size,
            internal=internal, classwise=classwise, **self.options,
        )  # fmt: skip

    def _window_means(self, contender: Contender, rows, temperatures) -> list[Means]:
        size = max(1, self.settings.batch_size * self.data.facts.longest // len(rows[0]["input_ids"]))
        return [scores.window_means() for scores in self._scores(contender, rows, temperatures, size)]

    def _sections(self, scores: TokenScores, held: TokenScores | None, classwise) -> tuple[dict, dict]:
        data, num_bins = self.data, self.settings.num_bins
        combined = CombinedScore.fit(held) if held is not None and _tells_apart(held) else None
        resamples = data.resamples(scores, self.settings, self.options["seed"])
        counts = None if data.validation is None else token_counts(data.validation)
        sections = {
            "quality": contents.quality(scores, resamples, data.facts.num_bytes, classwise, num_bins),
            "measures": contents.measures(scores, resamples),
            "error_detection": contents.error_detection(scores, combined, resamples),
            "selective": contents.selective(scores, combined),
            "slices": contents.slices(scores, counts),
        }
        curves = {
            "reliability": contents.reliability(scores, num_bins),
            "risk_coverage": contents.risk_coverage(scores, combined),
        }
        return sections, curves

    def _policies(self, scores: TokenScores, held: TokenScores | None, samples: int) -> dict:
        if held is None or not _tells_apart(held) or held.num_windows < 2:
            return {}
        risk, delta = self.settings.target_risk, self.settings.delta
        return {score: contents.policy(score, held, scores, samples, risk, delta) for score in _POLICY_SCORES}

    def _out_of_domain(self, own: Mapping[int, Means], others: Mapping[str, Mapping[int, Means]]) -> dict:
        seed = self.options["seed"]
        return {
            text: {str(length): contents.out_of_domain(own[length], means, seed) for length, means in each.items()}
            for text, each in others.items()
        }

    def _price(self, contender: Contender) -> tuple[dict, dict]:
        """What the contender costs on a batch of the test data, and of that what a repeated run may change."""
        model = contender.model
        if self.cost is None:
            return {"parameters": sum(parameter.numel() for parameter in model.parameters())}, {}
        device = next(model.parameters()).device
        padding = getattr(model.config, "pad_token_id", None) or 0
        batch = next(iter(data_batches(self.data.test, self.settings.batch_size, padding, None)))
        inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
        measured = self.cost(model, inputs, contender.num_posterior_samples)
        values = asdict(measured) if is_dataclass(measured) else dict(measured)
        varying = {
            "batch_seconds": values.pop("seconds", None),
            "peak_memory_bytes": values.pop("peak_memory_bytes", None),
        }
        return values, varying


_POLICY_SCORES = ("predictive_entropy", "combination")


def _tells_apart(scores: TokenScores) -> bool:
    """Whether some of the tokens are right and some wrong."""
    return bool(scores.correct.any()) and not bool(scores.correct.all())


def _histograms(own: Mapping[int, Means], others: Mapping[str, Mapping[int, Means]]) -> dict:
    if not own:
        return {}
    length = min(own, key=lambda length: abs(length - _HISTOGRAM_LENGTH))
    there = {text: each[length] for text, each in others.items() if length in each}
    return {"length": length, "measures": contents.histograms(own[length], there)}
