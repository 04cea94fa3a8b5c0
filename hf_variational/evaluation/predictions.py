"""What a causal language model says of every target token of a data set, in blocks of positions."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers.utils import logging

from ..checks import check_whole
from .batches import data_batches, evaluating, take_labels
from .streaming import BLOCK_ENTRIES, IGNORED_LABEL, MEASURE_NAMES, shifted_labels

logger = logging.get_logger(__name__)

# Of the posteriors at the position that predicts a token: KL divergence summed over layers and units or heads, nats;
# the scale sigma and E[mu^2] averaged over layers and feed-forward units.
INTERNAL_NAMES = ("kl", "scale", "mean_energy")
# Rows of a batch go through the model together up to so many tokens: activations of more leave a core's cache, and the
# allocator fetches fresh pages for each of them.
_TOKENS_TOGETHER = 2_048


@dataclass(frozen=True)
class Predictions:
    """A block of scored positions, on the device of the logits.

    Attributes:
        sequences: number of the sequence in the data, counted from 0, [n].
        log_probabilities: float32, [n, vocab]; of the predictive distribution where there are posterior samples.
        targets: the token that followed, [n].
        positions: its index in its sequence, counted from 0 without padding, [n].
        measures: the measures of the samples by name, each [n]; empty for the mean pass.
        internal: the statistics of the posteriors by name (of `INTERNAL_NAMES`), each [n]; empty if not asked for.
    """

    sequences: Tensor
    log_probabilities: Tensor
    targets: Tensor
    positions: Tensor
    measures: dict[str, Tensor]
    internal: dict[str, Tensor]


def each_prediction(
    model,
    data,
    visit: Callable[[Predictions], None],
    num_posterior_samples: int = 8,
    batch_size: int = 8,
    *,
    measures: bool = False,
    internal: bool = False,
    seed: int | None = 0,
    progress: bool = True,
    description: str = "Predicting",
) -> int:
    """Runs the model over the data once, without gradients and in eval mode, and calls `visit` with every block.

    A block holds a few million log-probabilities whatever the vocabulary, so `visit` bounds the memory by what it
    keeps.

    Args:
        model, data, num_posterior_samples, batch_size, seed: as in [`evaluate_language_model`].
        visit: called with [`Predictions`].
        measures: whether the blocks have the measures of the samples.
        internal: whether they have the statistics of the posteriors. A model without posteriors has none, which a
            warning says.
        progress, description: the progress bar.

    Returns:
        The number of sequences.

    Raises:
        ValueError: if no position of the data has a target, or logits are NaN (the error names batch and row).
    """
    check_whole("num_posterior_samples", num_posterior_samples, 0)
    check_whole("batch_size", batch_size, 1)
    inner = getattr(model, "module", model)
    variational = bool(getattr(inner, "variational_layers", None))
    options = {"num_posterior_samples": num_posterior_samples} if variational else {}
    measures = measures and bool(options.get("num_posterior_samples"))
    if measures:
        options["output_uncertainty"] = True
    internal = internal and has_posteriors(inner)
    if internal:
        options["output_posteriors"] = True

    copies = options.get("num_posterior_samples", 1)

    def take(batch: dict[str, Tensor], targets: Tensor, number: int, first: int) -> int:
        taken = 0
        for start, rows, wanted in _together(batch, targets, copies):
            out = model(**rows, **options, use_cache=False)
            columns = {
                "targets": wanted,
                "positions": target_positions(rows, wanted),
                "measures": {name: out.uncertainty[name] for name in MEASURE_NAMES} if measures else {},
                "internal": internal_statistics(out) if internal else {},
            }
            taken += _visit_blocks(out.logits, columns, number, first, start, visit)
        return taken

    return each_batch(model, data, take, batch_size, seed, progress, description)


def each_sampled_prediction(
    model,
    data,
    visit: Callable[[Tensor, Tensor], None],
    num_posterior_samples: int,
    batch_size: int = 1,
    *,
    seed: int = 0,
    progress: bool = True,
    description: str = "Predicting",
) -> None:
    """Runs a model with posterior samples over the data once, as [`each_prediction`], and calls `visit` with the
    samples' log-probabilities, [n, S, vocab], float32, and the targets, [n], a few million numbers at a time.

    The model hands out the samples of the rows it runs on whole: 4 bytes · rows · S · length · vocabulary.

    Raises:
        ValueError: as in [`each_prediction`].
    """

    def take(batch: dict[str, Tensor], targets: Tensor, number: int, first: int) -> int:
        taken = 0
        for start, rows, wanted in _together(batch, targets, num_posterior_samples):
            samples = model(
                **rows, num_posterior_samples=num_posterior_samples, output_sample_logits=True, use_cache=False
            ).sample_logits
            wanted = wanted.to(samples.device)
            places = (wanted != IGNORED_LABEL).nonzero(as_tuple=True)
            step = max(1, BLOCK_ENTRIES // (num_posterior_samples * samples.shape[-1]))
            for row, place in zip(*(part.split(step) for part in places), strict=True):
                log_p = samples[row, :, place].float()
                check_numbers(log_p[..., 0].sum(1, keepdim=True), row + start, number, first)
                visit(log_p, wanted[row, place])
            taken += places[0].numel()
        return taken

    each_batch(model, data, take, batch_size, seed, progress, description)


def each_batch(
    model, data, take: Callable[..., int], batch_size: int, seed: int | None, progress: bool, description: str
) -> int:
    """Calls `take` with every batch without its labels, its targets [batch, length], its number and the number of
    sequences before it; it answers how many targets it took. Returns the number of sequences.
    """
    device = next(model.parameters()).device
    config = getattr(model, "module", model).config
    batches = data_batches(data, batch_size, getattr(config, "pad_token_id", None) or 0, None)
    total = len(batches) if hasattr(batches, "__len__") else None
    sequences = tokens = 0
    with (
        evaluating(model, seed is not None, device),
        tqdm(total=total, desc=description, disable=not progress) as bar,
    ):
        batches = iter(batches)
        if seed is not None:
            torch.manual_seed(seed)
        for number, batch in enumerate(batches):
            batch = {name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor)}
            targets = shifted_labels(take_labels(batch))
            tokens += take(batch, targets, number, sequences)
            sequences += targets.shape[0]
            bar.update()
    if tokens == 0:
        raise ValueError(f"There is nothing to evaluate: none of the {sequences} sequences has a token to predict.")
    return sequences


def _together(
    batch: dict[str, Tensor], targets: Tensor, copies: int
) -> Iterator[tuple[int, dict[str, Tensor], Tensor]]:
    """The rows of a batch that go through the model together, each as `copies` rows of it: the number of the first,
    the rows, and their targets. On an accelerator all of them.
    """
    size, length = targets.shape
    step = max(1, _TOKENS_TOGETHER // max(1, copies * length)) if targets.device.type == "cpu" else size
    for start in range(0, size, max(1, step)):
        here = slice(start, start + step)
        yield start, rows_of(batch, here, size), targets[here]


def rows_of(batch: dict[str, Tensor], rows: slice | Tensor, size: int) -> dict[str, Tensor]:
    """A batch of `size` sequences with only these; what has no such axis stays whole."""
    return {name: value[rows] if value.shape[:1] == (size,) else value for name, value in batch.items()}


def target_positions(batch: dict[str, Tensor], targets: Tensor) -> Tensor:
    """Index of each target in its sequence, [batch, length]."""
    if "position_ids" in batch:
        places = batch["position_ids"].expand_as(targets)
    elif "attention_mask" in batch:
        places = batch["attention_mask"].ne(0).cumsum(-1) - 1
    else:
        places = torch.arange(targets.shape[1], device=targets.device).expand_as(targets)
    return places.roll(-1, dims=-1)


def has_posteriors(model) -> bool:
    if getattr(model, "posterior_sites", None):
        return True
    logger.warning(
        f"{type(model).__name__} has no posteriors, so it has none of the internal statistics "
        f"({', '.join(INTERNAL_NAMES)}); the scores of its predictions are complete."
    )
    return False


def internal_statistics(out) -> dict[str, Tensor]:
    """Statistics of the posteriors of all layers, each [batch, length]."""
    units = list((out.posteriors or {}).values())
    heads = list((out.attention_posteriors or {}).values())
    found = {"kl": sum(layer.kl.float() for layer in units + heads)}
    for name in ("scale", "mean_energy"):
        values = [getattr(layer, f"{name}_per_token") for layer in units]
        if values and all(value is not None for value in values):
            found[name] = torch.stack(values).mean(0)
    return found


def _visit_blocks(logits: Tensor, columns: dict, batch: int, first: int, row: int, visit) -> int:
    """Cuts rows into blocks of scored positions: those from `row` on of the `batch`-th batch of the data, which has
    `first` sequences before it.
    """
    rows, places = (columns["targets"].to(logits.device) != IGNORED_LABEL).nonzero(as_tuple=True)
    step = max(1, BLOCK_ENTRIES // logits.shape[-1])
    for start in range(0, rows.numel(), step):
        here = rows[start : start + step], places[start : start + step]
        log_probabilities = logits[here].float().log_softmax(-1)
        check_numbers(log_probabilities, here[0] + row, batch, first)
        visit(
            Predictions(
                sequences=here[0] + row + first,
                log_probabilities=log_probabilities,
                **_picked(columns, here),
            )
        )
    return rows.numel()


def _picked(columns: dict, here: tuple[Tensor, Tensor]) -> dict:
    return {
        name: _picked(column, here) if isinstance(column, dict) else column.to(here[0].device)[here]
        for name, column in columns.items()
    }


def check_numbers(log_probabilities: Tensor, rows: Tensor, batch: int, first: int) -> None:
    # One NaN or infinite logit makes the whole distribution NaN: a column of it is enough to see that.
    broken = log_probabilities[:, 0].isnan()
    if bool(broken.any()):
        row = int(rows[broken][0])
        raise ValueError(
            f"The logits of batch {batch}, row {row} (sequence {first + row} of the data, counted from 0) are not "
            "numbers: NaN or infinite weights, or an overflow in half precision, which dtype=torch.float32 avoids."
        )
