"""What a causal language model says of every target token of a data set, in blocks of positions."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .language_model import _batches, _check_whole, _evaluating
from .streaming import _BLOCK_ENTRIES, IGNORED_LABEL, MEASURE_NAMES, _shifted


@dataclass(frozen=True)
class Predictions:
    """A block of scored positions, on the device of the logits.

    Attributes:
        sequences: number of the sequence in the data, counted from 0, [n].
        log_probabilities: float32, [n, vocab]; of the predictive distribution where there are posterior samples.
        targets: the token that followed, [n].
        measures: the measures of the samples by name, each [n]; empty for the mean pass.
    """

    sequences: Tensor
    log_probabilities: Tensor
    targets: Tensor
    measures: dict[str, Tensor]


def each_prediction(
    model,
    data,
    visit: Callable[[Predictions], None],
    num_posterior_samples: int = 8,
    batch_size: int = 8,
    *,
    measures: bool = False,
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
        progress, description: the progress bar.

    Returns:
        The number of sequences.

    Raises:
        ValueError: if no position of the data has a target.
    """
    _check_whole("num_posterior_samples", num_posterior_samples, 0)
    _check_whole("batch_size", batch_size, 1)
    inner = getattr(model, "module", model)
    variational = bool(getattr(inner, "variational_layers", None))
    options = {"num_posterior_samples": num_posterior_samples} if variational else {}
    measures = measures and bool(options.get("num_posterior_samples"))
    if measures:
        options["output_uncertainty"] = True
    device = next(model.parameters()).device
    batches = _batches(data, batch_size, getattr(inner.config, "pad_token_id", None) or 0, None)
    total = len(batches) if hasattr(batches, "__len__") else None
    sequences = tokens = 0
    with (
        _evaluating(model, seed is not None, device),
        tqdm(total=total, desc=description, disable=not progress) as bar,
    ):
        batches = iter(batches)
        if seed is not None:
            torch.manual_seed(seed)
        for batch in batches:
            batch = {name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor)}
            targets = _targets(batch)
            out = model(**batch, **options, use_cache=False)
            given = {name: out.uncertainty[name] for name in MEASURE_NAMES} if measures else {}
            tokens += _visit_blocks(out.logits, targets, given, sequences, visit)
            sequences += targets.shape[0]
            del out
            bar.update()
    if tokens == 0:
        raise ValueError(f"There is nothing to evaluate: none of the {sequences} sequences has a token to predict.")
    return sequences


def _targets(batch: dict[str, Tensor]) -> Tensor:
    """Takes the labels out of a batch, or makes them, and shifts them."""
    labels = batch.pop("labels", None)
    if labels is None:
        labels = batch["input_ids"]
        if "attention_mask" in batch:
            labels = labels.masked_fill(batch["attention_mask"] == 0, IGNORED_LABEL)
    return _shifted(labels)


def _visit_blocks(logits: Tensor, targets: Tensor, measures: dict[str, Tensor], first: int, visit) -> int:
    rows, columns = (targets.to(logits.device) != IGNORED_LABEL).nonzero(as_tuple=True)
    step = max(1, _BLOCK_ENTRIES // logits.shape[-1])
    for start in range(0, rows.numel(), step):
        here = rows[start : start + step], columns[start : start + step]
        visit(
            Predictions(
                sequences=here[0] + first,
                log_probabilities=logits[here].float().log_softmax(-1),
                targets=targets[here],
                measures={name: values[here] for name, values in measures.items()},
            )
        )
    return rows.numel()
