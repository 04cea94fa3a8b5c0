"""One call that evaluates a causal language model: its posterior samples and its mean pass, on the same batches."""

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers.utils import logging

from ..checks import check_whole
from .batches import data_batches, evaluating, take_labels
from .streaming import StreamingEvaluation, mask_repeated_rows

logger = logging.get_logger(__name__)


def evaluate_language_model(
    model,
    data,
    num_posterior_samples: int = 8,
    batch_size: int = 8,
    max_batches: int | None = None,
    progress: bool = True,
    *,
    seed: int | None = None,
    accelerator=None,
    evaluations: dict[str, StreamingEvaluation] | None = None,
) -> dict[str, dict]:
    """
    The metrics of a causal language model, for its posterior samples and for its mean pass.

    Args:
        model: A causal language model. A deterministic one (or `num_posterior_samples=0`) gets only `"mean_pass"`.
        data (`DataLoader`, dataset or list):
            Batches of `input_ids` [, `attention_mask`, `position_ids`, `labels`]; or a dataset of such rows or of bare
            token ids, which is then batched here and padded on the right. Without labels every attended token is one.
            Nothing is scored that a padded position predicts, so the side of the padding does not matter.
        num_posterior_samples (`int`, defaults to 8): Posterior samples of the predictive distribution.
        batch_size (`int`, defaults to 8): Rows of a batch, when `data` is a dataset.
        max_batches (`int`, *optional*): Stops after so many batches, and says so in the log and the conditions.
        progress (`bool`, defaults to `True`): Whether to show a progress bar.
        seed (`int`, *optional*):
            Seeds the posterior noise and leaves the global generator as it was. Without it the noise comes from the
            global generator as it stands.
        accelerator (`accelerate.Accelerator`, *optional*):
            In a distributed run: a dataset is divided among the processes, the rows a prepared data loader repeats are
            left out, and the result is that of all processes. Pass a prepared data loader for FSDP and the like, where
            all processes must make the same number of forward passes.
        evaluations (`dict`, *optional*):
            Filled with the `StreamingEvaluation` behind each result, for reliability diagrams.

    Returns:
        `{"samples": {...}, "mean_pass": {...}, "conditions": {...}}`, the first two with the names of `METRIC_NAMES`.

    Example:

    ```python
    >>> result = evaluate_language_model(model, dataset, num_posterior_samples=8)
    >>> result["samples"]["nll"], result["mean_pass"]["nll"]
    ```
    """
    check_whole("num_posterior_samples", num_posterior_samples, 0)
    check_whole("batch_size", batch_size, 1)
    if max_batches is not None:
        check_whole("max_batches", max_batches, 1)

    inner = getattr(model, "module", model)
    variational = bool(getattr(inner, "variational_layers", None))
    samples = num_posterior_samples if variational else 0
    results = {} if evaluations is None else evaluations
    results.clear()
    if samples:
        results["samples"] = StreamingEvaluation()
    results["mean_pass"] = StreamingEvaluation()

    device = next(model.parameters()).device
    pad_token_id = getattr(inner.config, "pad_token_id", None) or 0
    batches = data_batches(data, batch_size, pad_token_id, accelerator)
    total = len(batches) if hasattr(batches, "__len__") else None
    if max_batches is not None:
        total = max_batches if total is None else min(total, max_batches)
    show = progress and (accelerator is None or accelerator.is_main_process)
    seen, complete = 0, True
    if seed is not None and accelerator is not None:
        seed = seed + accelerator.process_index

    with evaluating(model, seed is not None, device), tqdm(total=total, desc="Evaluating", disable=not show) as bar:
        # a data loader draws from the generator when it starts: seeded after that, the noise is the same for all
        batches = iter(batches)
        if seed is not None:
            torch.manual_seed(seed)
        for batch in batches:
            if max_batches is not None and seen == max_batches:
                complete = False
                break
            batch = {name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor)}
            labels = take_labels(batch)
            if accelerator is not None and hasattr(data, "end_of_dataloader"):
                labels = mask_repeated_rows(labels, accelerator)
            extra = {"num_posterior_samples": 0} if variational else {}
            out = model(**batch, **extra, use_cache=False)
            results["mean_pass"].update(out.logits, labels)
            if samples:
                # the first pass's logits go before the second pass makes its own
                del out
                out = model(**batch, num_posterior_samples=samples, output_uncertainty=True, use_cache=False)
                results["samples"].update(out.logits, labels, out.uncertainty)
            del out
            seen += 1
            bar.update()

    if not complete:
        logger.warning(f"Evaluated the first {seen} batches only (max_batches={max_batches}): the data holds more.")
    if accelerator is not None:
        for name in list(results):
            results[name] = results[name].gather(accelerator)
    computed = {name: evaluation.compute() for name, evaluation in results.items()}
    computed["conditions"] = {
        "num_posterior_samples": samples,
        "num_tokens": computed["mean_pass"]["num_tokens"],
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "complete": complete,
    }
    return computed
