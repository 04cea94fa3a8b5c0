"""The table that every measure of an evaluation is a function of: a few numbers for each predicted token."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .calibration import ClasswiseCalibration, brier
from .predictions import INTERNAL_NAMES, Predictions, each_prediction
from .ranking import auroc
from .streaming import MEASURE_NAMES, StreamingEvaluation
from .temperature import check_temperature, temper

# After the measures of the samples, what the predictive distribution alone says.
SCORE_NAMES = (*MEASURE_NAMES, "one_minus_confidence", "nll", "brier")
# These look at the token that came, so they cannot tell beforehand that a prediction is wrong.
OF_THE_TARGET = ("token_variance", "nll", "brier")


@dataclass(frozen=True)
class TokenScores:
    """Scores of every predicted token, on the CPU, in the order of the data.

    Attributes:
        values: by name, each [tokens]. Of `SCORE_NAMES`, higher is less certain; the mean pass has
            `predictive_entropy`, `one_minus_confidence` (1 minus the largest probability), `nll` (of the target, nats)
            and `brier` (Σ_v (p_v − 1[v = y])², from 0 to 2). Of `INTERNAL_NAMES`, if asked for, at the position that
            predicts the token: `kl` (nats, summed over layers and units or heads), `scale` (σ) and `mean_energy` (μ²),
            both averaged over layers and feed-forward units.
        correct: whether the most probable token was the target, [tokens].
        windows: number of the sequence that the token is from, [tokens].
        num_windows: sequences.
        targets: the token that came, [tokens], int64.
        positions: its index in its sequence, counted from 0 without padding, [tokens], int64.
    """

    values: dict[str, Tensor]
    correct: Tensor
    windows: Tensor
    num_windows: int
    targets: Tensor
    positions: Tensor

    def __len__(self) -> int:
        return self.correct.numel()

    def select(self, mask: Tensor) -> "TokenScores":
        """The tokens where `mask` is true, [tokens], or those with the given indices; the sequences keep their
        numbers.
        """
        if mask.dtype == torch.bool and mask.shape != self.correct.shape:
            raise ValueError(f"The mask has shape {tuple(mask.shape)}, and there are {len(self)} tokens.")
        columns = {name: getattr(self, name)[mask] for name in ("correct", "windows", "targets", "positions")}
        return replace(self, values={name: values[mask] for name, values in self.values.items()}, **columns)

    @classmethod
    def concatenate(cls, tables: Sequence["TokenScores"]) -> "TokenScores":
        """One table of several, whose sequences are numbered on from one to the next.

        Raises:
            ValueError: without a table, or if they do not have the same scores.
        """
        if not tables:
            raise ValueError("There are no token scores to concatenate.")
        names = list(tables[0].values)
        for table in tables[1:]:
            if set(table.values) != set(names):
                different = sorted(set(names) ^ set(table.values))
                raise ValueError(
                    f"Only some of the tables have {', '.join(different)}: make all with the same options."
                )
        first = [sum(table.num_windows for table in tables[:index]) for index in range(len(tables))]
        return cls(
            values={name: torch.cat([table.values[name] for table in tables]) for name in names},
            correct=torch.cat([table.correct for table in tables]),
            windows=torch.cat([table.windows + start for table, start in zip(tables, first, strict=True)]),
            num_windows=sum(table.num_windows for table in tables),
            targets=torch.cat([table.targets for table in tables]),
            positions=torch.cat([table.positions for table in tables]),
        )

    def window_means(self) -> dict[str, Tensor]:
        """Mean of each score over the predicted tokens of each window, [windows that have any]."""
        counts = torch.bincount(self.windows, minlength=self.num_windows)
        sums = {
            name: torch.zeros(self.num_windows, dtype=torch.float64).index_add_(0, self.windows, values.double())
            for name, values in self.values.items()
        }
        return {name: total[counts > 0] / counts[counts > 0] for name, total in sums.items()}

    def error_auroc(self) -> dict[str, float]:
        """AUROC of wrong tokens against right ones, for each score that does not look at the target."""
        return {
            name: auroc(values[self.correct], values[~self.correct])
            for name, values in self.values.items()
            if name not in OF_THE_TARGET
        }

    def evaluation(self, num_bins: int = 15) -> StreamingEvaluation:
        """The same tokens as a [`StreamingEvaluation`]: likelihood, calibration and the mean of each measure."""
        evaluation = StreamingEvaluation(num_bins)
        confidence = 1 - self.values["one_minus_confidence"].double()
        evaluation._add_predictions(self.values["nll"], confidence, self.correct.double())
        for name in MEASURE_NAMES:
            if name in self.values:
                evaluation._add_measure(name, self.values[name])
        return evaluation


def token_scores(
    model,
    data,
    num_posterior_samples: int = 8,
    batch_size: int = 32,
    *,
    temperature: float = 1.0,
    internal: bool = False,
    classwise: ClasswiseCalibration | None = None,
    seed: int = 0,
    progress: bool = True,
) -> TokenScores:
    """
    Scores of every predicted token of a data set.

    Args:
        model, data, num_posterior_samples, batch_size: As in [`evaluate_language_model`].
        temperature (`float`, defaults to 1.0):
            Of the predictive distribution: likelihood, Brier score, confidence and predictive entropy are those of
            p_T ∝ p̄^(1/T). The other measures compare posterior samples and stay as they are, so only at 1 is the
            predictive entropy the sum of expected entropy and mutual information.
        internal (`bool`, defaults to `False`):
            Whether to add the statistics of the posteriors: `kl`, and `scale` and `mean_energy` where every
            feed-forward layer has them per token (mixtures of experts do not). Those of the posteriors *given this
            input*; not uncertainty of the prediction.
        classwise ([`ClasswiseCalibration`], *optional*):
            Is updated with every prediction: what it measures takes the whole distribution, which the table does not
            keep.
        seed (`int`, defaults to 0): Seeds the posterior noise.
        progress (`bool`, defaults to `True`): Whether to show a progress bar.

    Raises:
        ValueError: for data without a target, a temperature that is not a number above 0, or logits that are NaN (the
            error names batch and row).
    """
    return scores_at_temperatures(
        model,
        data,
        [temperature],
        num_posterior_samples,
        batch_size,
        internal=internal,
        classwise=None if classwise is None else [classwise],
        seed=seed,
        progress=progress,
    )[0]


def scores_at_temperatures(
    model,
    data,
    temperatures: Sequence[float],
    num_posterior_samples: int = 8,
    batch_size: int = 32,
    *,
    internal: bool = False,
    classwise: Sequence[ClasswiseCalibration] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> list[TokenScores]:
    """[`token_scores`] at each of several temperatures, from one pass over the data; `classwise` has an accumulator
    for each.
    """
    temperatures = [check_temperature(temperature) for temperature in temperatures]
    if classwise is not None and len(classwise) != len(temperatures):
        raise ValueError(f"`classwise` has {len(classwise)} accumulators for {len(temperatures)} temperatures.")
    accumulators = [None] * len(temperatures) if classwise is None else list(classwise)
    parts: list[list[dict[str, Tensor]]] = [[] for _ in temperatures]

    def visit(block: Predictions) -> None:
        shared = {"windows": block.sequences, "targets": block.targets, "positions": block.positions}
        shared = {name: column.cpu() for name, column in {**shared, **block.internal}.items()}
        for temperature, accumulator, part in zip(temperatures, accumulators, parts, strict=True):
            own = _scores(block, temperature, accumulator)
            part.append({**shared, **{name: column.cpu() for name, column in own.items()}})

    count = each_prediction(
        model,
        data,
        visit,
        num_posterior_samples,
        batch_size,
        measures=True,
        internal=internal,
        seed=seed,
        progress=progress,
        description="Scoring",
    )
    return [_table(part, count) for part in parts]


def _table(parts: list[dict[str, Tensor]], num_windows: int) -> TokenScores:
    columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    values = {name: columns.pop(name) for name in (*SCORE_NAMES, *INTERNAL_NAMES) if name in columns}
    return TokenScores(values=values, num_windows=num_windows, **columns)


def _scores(block: Predictions, temperature: float, classwise: ClasswiseCalibration | None) -> dict[str, Tensor]:
    log_p = block.log_probabilities if temperature == 1 else temper(block.log_probabilities, temperature)
    p = log_p.exp()
    if classwise is not None:
        classwise.update(p, block.targets)
    scores = {**block.measures, **distribution_scores(log_p, p, block.targets)}
    if temperature != 1 or "predictive_entropy" not in scores:
        scores["predictive_entropy"] = torch.special.entr(p).sum(-1)
    return scores


def distribution_scores(log_p: Tensor, p: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """What a predictive distribution, [n, vocab], alone says, each [n]; see [`TokenScores`]."""
    largest, predicted = log_p.max(-1)
    return {
        "one_minus_confidence": -torch.expm1(largest),
        "nll": -log_p.gather(-1, targets[:, None]).squeeze(-1),
        "brier": brier(p, targets),
        "correct": predicted == targets,
    }
