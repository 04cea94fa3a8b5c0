"""Uncertainty as a signal to act on: answer, draw more posterior samples, or abstain."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..evaluation.token_scores import TokenScores
from .adaptive import QUALITY, AdaptiveSampling, QualityAtCost, cheapest, check_share, tolerances
from .generation import ControlledGenerateOutput, controlled_generate
from .policy import SCHEDULE, ActionThresholds
from .score import InternalScore
from .settling import Acted, KeptLooks, act_on_data, check_measure, sequence_means

UNITS = ("step", "sequence")
REVERSALS = 0.01


@dataclass(frozen=True)
class UncertaintyController:
    """
    Decides about steps or sequences from their internal score, with as few posterior samples as that takes.

    A look at a unit answers where the score is at most `thresholds.answer` and abstains where it is above
    `thresholds.abstain`. Between the two it draws the next number of samples of `sampling.schedule`, unless the Monte
    Carlo error of `sampling.measure` is below `sampling.tolerance` or there are no more; then `thresholds.final`
    decides.

    The thresholds describe the validation data; a promise about the risk of what is answered is what
    [`SelectivePolicy`] makes.

    Args:
        score: Internal score, [`InternalScore`].
        thresholds: Where a score leads.
        sampling: Schedule, measure and tolerance.
        unit: `"step"`: each token; a sequence whose step draws more goes on with those samples. `"sequence"`: all
            tokens of a sequence together, by the mean of their scores and the root mean square of their errors.

    Example:

    ```python
    >>> controller = UncertaintyController.fit(model, validation, unit="step", coverage=0.9)
    >>> out = controller.generate(model, **inputs, max_new_tokens=32)
    >>> out.abstained, out.samples, out.sample_tokens
    >>> controller.save("controller.json")
    ```
    """

    score: InternalScore
    thresholds: ActionThresholds = field(default_factory=ActionThresholds)
    sampling: AdaptiveSampling = field(default_factory=AdaptiveSampling)
    unit: str = "sequence"

    def __post_init__(self):
        _check_unit(self.unit)

    @classmethod
    def fit(
        cls,
        model,
        validation,
        *,
        unit: str = "sequence",
        coverage: float = 0.9,
        schedule: Sequence[int] = SCHEDULE,
        measure: str = "predictive_entropy",
        quality: float = QUALITY,
        reversals: float = REVERSALS,
        batch_size: int = 8,
        seed: int = 0,
        progress: bool = True,
    ) -> "UncertaintyController":
        """
        Fits coefficients, thresholds and tolerance on validation data, from one pass with the most samples.

        - The coefficients by a logistic regression of wrong tokens, at the last look.
        - `final` such that this share of the validation units is answered at the last look. `answer` and `abstain`
          lie on either side of it, as near as scores outside them decide otherwise than the last look about at most
          half of `reversals`. With `coverage=1` nothing is abstained from, and only the Monte Carlo error stops a
          unit.
        - The tolerance with the least cost at which at most `reversals` of the tokens are decided otherwise than with
          all samples, and NLL and AURC keep what [`AdaptiveSampling.fit`] asks of them. If early decisions by the
          score cost more quality than that, `answer` and `abstain` go to −∞ and ∞.

        Args:
            model: A causal language model with posteriors.
            validation: Text that the model was not trained on; as in [`evaluate_language_model`].
            unit: See [`UncertaintyController`].
            coverage: Share of the validation units to answer, in (0, 1].
            reversals: Share of the decisions that may be others than with all samples, in (0, 1).
            schedule, measure, quality, batch_size, seed, progress: As in [`AdaptiveSampling.fit`].

        Raises:
            ValueError: for a model without posteriors, validation data without a target or whose tokens are all right
                or all wrong, a coverage outside (0, 1], reversals outside (0, 1), and as [`AdaptiveSampling.fit`].
        """
        fit = {"unit": unit, "coverage": coverage, "measure": measure, "quality": quality, "reversals": reversals}
        _check_fit(**fit)
        check_posteriors(model)
        options = {"batch_size": batch_size, "seed": seed, "progress": progress}
        return cls.fit_looks(KeptLooks.draw(model, validation, schedule, internal=True, **options), **fit)

    @classmethod
    def fit_looks(
        cls,
        looks: KeptLooks,
        *,
        unit: str = "sequence",
        coverage: float = 0.9,
        measure: str = "predictive_entropy",
        quality: float = QUALITY,
        reversals: float = REVERSALS,
    ) -> "UncertaintyController":
        """The same of looks that are there already, with `internal=True`: several controllers from one pass."""
        _check_fit(unit, coverage, measure, quality, reversals)
        score = InternalScore.fit(looks.looks[-1])
        scored = [_unit_scores(score(table.values), table, unit).numpy() for table in looks.looks]
        fitted = _thresholds(scored, coverage, reversals / 2)
        return cls._cheapest(looks, score, fitted, measure, unit, quality, reversals)

    @classmethod
    def _cheapest(
        cls, looks: KeptLooks, score: InternalScore, fitted: ActionThresholds, measure, unit, quality, reversals
    ) -> "UncertaintyController":
        def controller(thresholds: ActionThresholds, tolerance: float, frontier=()) -> "UncertaintyController":
            return cls(score, thresholds, AdaptiveSampling(tolerance, looks.schedule, measure, frontier), unit)

        undecided = ActionThresholds(-math.inf, fitted.final, math.inf)
        of_all = looks.act(controller(undecided, 0.0).act, measure)
        errors = [controller(fitted, 0.0)._look(table)[1] for table in looks.looks[:-1]]
        best = None
        for thresholds in dict.fromkeys((fitted, undecided)):

            def acted(tolerance: float, thresholds=thresholds) -> Acted:
                return looks.act(controller(thresholds, tolerance).act, measure)

            frontier, allowed = [], []
            for tolerance in tolerances(errors):
                found = acted(tolerance)
                frontier.append(QualityAtCost.of(found, tolerance))
                if (found.actions != of_all.actions).double().mean() <= reversals:
                    allowed.append(frontier[-1])
            point = cheapest(allowed, acted, of_all, quality)
            if point is not None and (best is None or point.mean_samples < best[0]):
                best = point.mean_samples, controller(thresholds, point.tolerance, tuple(frontier))
        return best[1]

    def act(self, scores: TokenScores, last: bool) -> Tensor:
        """The [`Action`] about each token, [tokens], int8, at a look at open tokens."""
        return self.thresholds.act(*self._look(scores), self.sampling.tolerance, last)

    def _look(self, scores: TokenScores) -> tuple[Tensor, Tensor]:
        """Score and error of each token's unit, [tokens]."""
        values = self.score(scores.values)
        error = scores.values[f"{self.sampling.measure}_error"].double()
        if self.unit == "sequence":
            values = sequence_means(values, scores.windows)
            error = sequence_means(error.square(), scores.windows).sqrt()
        return values, error

    def evaluate(self, model, data, *, batch_size: int = 8, seed: int = 0, progress: bool = True) -> Acted:
        """Acts on every predicted token of a data set: the text is given, so an abstention does not end a sequence.

        Args:
            model: A causal language model with posteriors.
            data, batch_size, seed, progress: As in [`evaluate_language_model`].

        Returns:
            [`Acted`]: decisions, coverage, risk, NLL, AURC, and the samples that they cost.
        """
        check_posteriors(model)
        options = {"batch_size": batch_size, "seed": seed, "progress": progress, "internal": True}
        return act_on_data(model, data, self.act, self.sampling.schedule, self.sampling.measure, **options)

    def generate(
        self, model, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs
    ) -> ControlledGenerateOutput:
        """`model.generate`, whose steps or sequences are answered, sampled more, or abstained from.

        It starts with the first number of samples. Rows that want more are run again with the next number, from
        the token at which they asked (`unit="step"`) or from the prompt (`"sequence"`): keys and values of the new
        samples do not exist yet, so the prefix is computed again, which `sample_tokens` counts. An abstention ends a
        row.

        Args:
            model: A decoder-only model with posteriors.
            input_ids, attention_mask: Prompts, [rows, length], padded on the left.
            kwargs: As in `generate`: greedy search or sampling, `generation_config`, logits processors, stopping
                criteria.

        Raises:
            ValueError: for a model without posteriors, beams, several sequences for a prompt, and settings that count
                from where a call of `generate` starts (such as `min_new_tokens`).
        """
        check_posteriors(model)
        return controlled_generate(self, model, input_ids, attention_mask, **kwargs)

    def save(self, path: str | Path) -> None:
        """Writes a JSON file; numbers that JSON does not have are strings (`"inf"`)."""
        content = _plain({**asdict(self), "format": _FORMAT})
        Path(path).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "UncertaintyController":
        """Reads what [`save`] wrote.

        Raises:
            ValueError: if the file is no controller, or one of another format.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content["format"] != _FORMAT:
                raise ValueError(f"its format is {content['format']!r}, and this version reads {_FORMAT}")
            sampling = content["sampling"]
            frontier = tuple(QualityAtCost(**_numbers(point)) for point in sampling.pop("frontier"))
            return cls(
                score=InternalScore(**content["score"]),
                thresholds=ActionThresholds(**_numbers(content["thresholds"])),
                sampling=AdaptiveSampling(
                    **{**sampling, "tolerance": float(sampling["tolerance"]), "frontier": frontier}
                ),
                unit=content["unit"],
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} holds no UncertaintyController: {error}.") from error


_FORMAT = 1


def check_posteriors(model) -> None:
    """Raises `ValueError` unless the model has posteriors to look at."""
    inner = getattr(model, "module", model)
    if not getattr(inner, "posterior_sites", None):
        raise ValueError(
            f"{type(inner).__name__} has no posteriors, of whose KL and σ the internal score is made: give a "
            "VariationalGPT or a model made variational. For methods that only sample there is AdaptiveSampling."
        )


def _check_fit(unit, coverage, measure, quality, reversals) -> None:
    _check_unit(unit)
    check_measure(measure)
    check_share("quality", quality)
    check_share("reversals", reversals)
    if isinstance(coverage, bool) or not isinstance(coverage, (int, float)) or not 0 < coverage <= 1:
        raise ValueError(f"`coverage` is the share of validation units to answer, in (0, 1], got {coverage!r}.")


def _check_unit(unit) -> None:
    if unit not in UNITS:
        raise ValueError(f"`unit` is one of {', '.join(UNITS)}, got {unit!r}.")


def _unit_scores(values: Tensor, table: TokenScores, unit: str) -> Tensor:
    """Scores of units, [units], of those of tokens."""
    if unit == "step":
        return values
    first = torch.cat([torch.ones(1, dtype=torch.bool), table.windows[1:] != table.windows[:-1]])
    return sequence_means(values, table.windows)[first]


def _thresholds(scored: list[np.ndarray], coverage: float, reversals: float) -> ActionThresholds:
    """Of the units' scores at each look, [units]."""
    *early, last = scored
    if coverage == 1:
        return ActionThresholds()
    final = float(np.quantile(last, coverage, method="inverted_cdf"))
    if not early:
        return ActionThresholds(final, final, final)
    looks = np.stack(early)
    is_reversed = (looks > final) != (last > final)
    # A little wider than a distance that occurs, so that a score at that distance lies within.
    widths = np.quantile(np.abs(looks - final), np.linspace(0, 1, 201), method="inverted_cdf") * (1 + 1e-9)
    for width in (0.0, *widths.tolist()):
        clear = (looks <= final - width) | (looks > final + width)
        # Of each unit the first look that is clear.
        first = clear & (np.cumsum(clear, axis=0) == 1)
        if (first & is_reversed).sum() <= reversals * len(last):
            return ActionThresholds(final - width, final, final + width)
    return ActionThresholds(-math.inf, final, math.inf)


def _plain(value):
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(values: dict) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}
