"""Posterior samples of a data set in looks: after each, whoever decides says which tokens want more samples.

Samples that were drawn are kept and counted again: a look at 8 after one at 2 runs the model with 6 more. Only tokens
that are still open keep their samples' distributions, 4 bytes · tokens · S · vocabulary of one batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..checks import check_whole
from ..evaluation.predictions import check_numbers, each_batch, internal_statistics, rows_of, target_positions
from ..evaluation.streaming import IGNORED_LABEL
from ..evaluation.token_scores import TokenScores, distribution_scores
from ..modeling.predictive import BLOCK_ELEMENTS, log_mean_exp
from .corrections import corrected_measures
from .noise import numbered_noise
from .policy import check_schedule

MEASURES = ("predictive_entropy", "mutual_information")
# From a look's open tokens to which of them go on to the next look, [tokens].
Settle = Callable[[int, TokenScores], Tensor]


@dataclass
class DrawnSamples:
    """What looks cost.

    Attributes:
        tokens: attended tokens of the data.
        sample_tokens: tokens times posterior samples that the model ran: the cost of S samples of all is S · `tokens`.
        drawn: by look, tokens for which its samples were drawn.
    """

    tokens: int = 0
    sample_tokens: int = 0
    drawn: list[int] = field(default_factory=list)

    @property
    def mean_samples(self) -> float:
        """Posterior samples drawn for a token of the data, on average."""
        return self.sample_tokens / self.tokens


def draw_looks(
    model,
    data,
    schedule: Sequence[int],
    settle: Settle,
    batch_size: int = 8,
    *,
    internal: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> DrawnSamples:
    """Runs the model over the data, without gradients and in eval mode, as often as tokens want more samples.

    Args:
        model: a causal language model with posterior samples.
        data, batch_size, seed, progress: as in [`evaluate_language_model`].
        schedule: numbers of samples of the looks, rising from at least 2.
        settle: called as `settle(look, scores)` with the open tokens of a batch, in the order of the data;
            answers which of them go on, [tokens], bool (none at the last look). A sequence is run again if any does.
            The scores are those of [`TokenScores`], measures corrected as in [`corrected_measures`], with their
            errors and the excess beside them.
        internal: whether the scores have `kl` and `scale`, means over all samples drawn.

    Raises:
        ValueError: for a model without posterior samples, a schedule that does not rise, data without a target, and
            logits that are NaN.
    """
    schedule = check_schedule(schedule)
    check_whole("batch_size", batch_size, 1)
    inner = getattr(model, "module", model)
    if not getattr(inner, "variational_layers", None):
        raise ValueError(f"{type(inner).__name__} has no posterior samples, so there are no more of them to draw.")
    cost = DrawnSamples(drawn=[0] * len(schedule))

    def take(batch: dict[str, Tensor], targets: Tensor, number: int, first: int) -> int:
        rows, places = (targets != IGNORED_LABEL).nonzero(as_tuple=True)
        lengths = _lengths(batch, targets)
        cost.tokens += int(lengths.sum())
        open_tokens = _OpenTokens(rows, places, targets[rows, places], target_positions(batch, targets)[rows, places])
        drawn = 0
        for look, size in enumerate(schedule):
            pending = open_tokens.rows.unique()
            if not pending.numel():
                break
            samples = range(drawn, size)
            with numbered_noise(pending.cpu() + first, torch.arange(drawn, size)):
                out = model(
                    **rows_of(batch, pending, targets.shape[0]),
                    num_posterior_samples=len(samples),
                    output_sample_logits=True,
                    use_cache=False,
                    **({"output_posteriors": True} if internal else {}),
                )
            open_tokens.add(out, pending, drawn, internal)
            drawn = size
            check_numbers(open_tokens.log_p[..., 0].sum(1, keepdim=True), open_tokens.rows, number, first)
            cost.drawn[look] += int(lengths[pending].sum())
            cost.sample_tokens += int(lengths[pending].sum()) * len(samples)
            open_tokens.keep(settle(look, open_tokens.scores(first)))
        return rows.numel()

    each_batch(model, data, take, batch_size, seed, progress, "Drawing samples")
    return cost


@dataclass
class _OpenTokens:
    """Tokens of a batch that are still open, with what was drawn for them: rows and places in the batch, targets and
    positions [n], log p_s [n, S, vocab], and the internal statistics [n].
    """

    rows: Tensor
    places: Tensor
    targets: Tensor
    positions: Tensor
    log_p: Tensor | None = None
    internal: dict[str, Tensor] = field(default_factory=dict)

    def add(self, out, pending: Tensor, drawn: int, internal: bool) -> None:
        # Of the pass, whose rows are the pending ones.
        device = out.sample_logits.device  # of a model on several, not that of its inputs
        here = torch.searchsorted(pending, self.rows).to(device), self.places.to(device)
        fresh = out.sample_logits[here[0], :, here[1]].float().to(self.rows.device)
        size = fresh.shape[1]
        self.log_p = fresh if self.log_p is None else torch.cat([self.log_p, fresh], dim=1)
        for name, values in (internal_statistics(out) if internal else {}).items():
            before = self.internal.get(name, 0.0)
            self.internal[name] = (before * drawn + values.to(device)[here].to(self.rows.device) * size) / (
                drawn + size
            )

    def keep(self, mask: Tensor) -> None:
        mask = mask.to(self.rows.device)
        for name in ("rows", "places", "targets", "positions", "log_p"):
            setattr(self, name, getattr(self, name)[mask])
        self.internal = {name: values[mask] for name, values in self.internal.items()}

    def scores(self, first: int) -> TokenScores:
        measures = vars(corrected_measures(self.log_p))
        values = {**measures, **_of_predictive(self.log_p, self.targets), **self.internal}
        correct = values.pop("correct").cpu()
        windows = self.rows.cpu() + first
        return TokenScores(
            values={name: column.cpu() for name, column in values.items()},
            correct=correct,
            windows=windows,
            num_windows=int(windows[-1]) + 1,
            targets=self.targets.cpu(),
            positions=self.positions.cpu(),
        )


def _of_predictive(log_p: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Scores of p̄, each [n], of log p_s [n, S, vocab]; in blocks, as the measures."""
    step = max(1, BLOCK_ELEMENTS // (log_p.shape[1] * log_p.shape[2]))
    blocks = []
    for block, target in zip(log_p.split(step), targets.split(step), strict=True):
        log_mean = log_mean_exp(block, 1)
        blocks.append(distribution_scores(log_mean, log_mean.exp(), target))
    return {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}


def _lengths(batch: dict[str, Tensor], targets: Tensor) -> Tensor:
    mask = batch.get("attention_mask")
    if mask is not None and mask.ndim == 2:
        return mask.ne(0).sum(1)
    return torch.full((targets.shape[0],), targets.shape[1], device=targets.device)
