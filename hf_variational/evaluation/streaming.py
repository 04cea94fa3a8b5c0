"""The metrics of a language model, streamed: one pass over the data, bounded memory, the same for any batching.

Every metric is over the positions whose shifted label is not -100. Only the negative log-likelihood of each token is
kept (float32, on the CPU), because the worst 5 % of the tokens are not known before the last one was seen.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .calibration import ReliabilityCurve, check_num_bins, curve_of_sums, width_bins
from .likelihood import conditional_value_at_risk

IGNORED_LABEL = -100
MEASURE_NAMES = (
    "predictive_entropy",
    "expected_entropy",
    "mutual_information",
    "conditional_variance",
    "token_variance",
    "top1_flip_rate",
)
METRIC_NAMES = (
    "nll",
    "perplexity",
    "accuracy",
    "expected_calibration_error",
    "cvar_nll",
    *MEASURE_NAMES,
    "num_tokens",
)
# Entries of a float32 block of logits (16 MiB): small beside any model, large enough that the loop costs nothing.
BLOCK_ENTRIES = 2**22


def shifted_labels(labels: Tensor) -> Tensor:
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)


def _token_scores(logits: Tensor, rows: Tensor, columns: Tensor, targets: Tensor, entropy: bool) -> Iterator[tuple]:
    """Negative log-likelihood, confidence, correctness and entropy (or None) of the positions, block by block."""
    block = max(1, BLOCK_ENTRIES // logits.shape[-1])
    for start in range(0, targets.numel(), block):
        part = slice(start, start + block)
        values = logits[rows[part], columns[part]].float()
        normaliser = values.logsumexp(-1)
        largest, predicted = values.max(-1)
        target = targets[part]
        nll = normaliser - values.gather(-1, target[:, None]).squeeze(-1)
        confidence = (largest - normaliser).exp()
        entropies = None
        if entropy:
            # masked classes have log-probability -inf and probability 0: they add nothing, not nan
            values = values.sub_(normaliser[:, None])
            entropies = torch.special.entr(values.exp_()).sum(-1)
        yield nll, confidence, predicted == target, entropies


class StreamingEvaluation:
    """
    Gathers the metrics of a language model batch by batch.

    Args:
        num_bins (`int`, defaults to 15):
            Equal-width bins of the maximum probability for the calibration error; a bin is (low, high].
        cvar_fraction (`float`, defaults to 0.05):
            Share of the tokens in the tail of `cvar_nll`.

    Example:

    ```python
    >>> evaluation = StreamingEvaluation()
    >>> for batch in dataloader:
    ...     out = model(**batch, num_posterior_samples=8, output_uncertainty=True)
    ...     evaluation.update(out.logits, batch["labels"], out.uncertainty)
    >>> evaluation.compute()["perplexity"]
    ```
    """

    def __init__(self, num_bins: int = 15, cvar_fraction: float = 0.05):
        check_num_bins(num_bins)
        if not 0.0 < cvar_fraction <= 1.0:
            raise ValueError(f"`cvar_fraction` is a number in (0, 1], got {cvar_fraction!r}.")
        self.num_bins = num_bins
        self.cvar_fraction = cvar_fraction
        self.reset()

    def reset(self) -> None:
        """Forgets everything seen."""
        self._correct = torch.zeros((), dtype=torch.float64)
        self._bin_count = torch.zeros(self.num_bins, dtype=torch.float64)
        self._bin_confidence = torch.zeros(self.num_bins, dtype=torch.float64)
        self._bin_correct = torch.zeros(self.num_bins, dtype=torch.float64)
        self._measure_sum = torch.zeros(len(MEASURE_NAMES), dtype=torch.float64)
        self._measure_count = torch.zeros(len(MEASURE_NAMES), dtype=torch.float64)
        self._token_nll: list[Tensor] = []

    @property
    def num_tokens(self) -> int:
        return sum(block.numel() for block in self._token_nll)

    @torch.no_grad()
    def update(self, log_probabilities: Tensor, labels: Tensor, measures=None, *, shifted: bool = False) -> None:
        """
        Adds a batch.

        Args:
            log_probabilities (`[batch, length, vocab]`, any floating dtype):
                Log-probabilities or unnormalised logits (they are normalised here, in float32, a block of rows at a
                time), as the model returned them.
            labels (`[batch, length]`):
                As they are given to the model: position t is scored against `labels[:, t + 1]`, and -100 is left out.
            measures (`PredictiveMeasures`, *optional*):
                As the model returned them, each `[batch, length]`. Without them the predictive entropy is taken from
                the log-probabilities and the other measures are absent from the result.
            shifted (`bool`, defaults to `False`):
                Whether `labels[:, t]` already is the target of position t.
        """
        if log_probabilities.dim() != 3 or labels.shape != log_probabilities.shape[:2]:
            raise ValueError(
                "Expected log-probabilities [batch, length, vocab] and labels [batch, length], got "
                f"{tuple(log_probabilities.shape)} and {tuple(labels.shape)}."
            )
        targets = labels if shifted else shifted_labels(labels)
        targets = targets.to(log_probabilities.device)
        rows, columns = (targets != IGNORED_LABEL).nonzero(as_tuple=True)
        chosen = targets[rows, columns]
        if chosen.numel() == 0:
            return
        if (low := int(chosen.min())) < 0 or (high := int(chosen.max())) >= log_probabilities.shape[-1]:
            raise ValueError(
                f"A label is {low if low < 0 else high}, outside the vocabulary of {log_probabilities.shape[-1]}. "
                f"Labels that are not to be scored are {IGNORED_LABEL}."
            )

        given = {} if measures is None else {name: getattr(measures, name, None) for name in MEASURE_NAMES}
        own_entropy = given.get("predictive_entropy") is None
        for nll, confidence, correct, entropy in _token_scores(log_probabilities, rows, columns, chosen, own_entropy):
            self._add_predictions(nll.cpu(), confidence.cpu().double(), correct.cpu().double())
            if entropy is not None:
                self._add_measure("predictive_entropy", entropy)
        for name, values in given.items():
            if values is not None:
                self._add_measure(name, values[rows.to(values.device), columns.to(values.device)])

    def _add_predictions(self, nll: Tensor, confidence: Tensor, correct: Tensor) -> None:
        self._token_nll.append(nll.float())
        self._correct += correct.sum()
        bins = width_bins(confidence, self.num_bins)
        self._bin_count.index_add_(0, bins, torch.ones_like(confidence))
        self._bin_confidence.index_add_(0, bins, confidence)
        self._bin_correct.index_add_(0, bins, correct)

    def _add_measure(self, name: str, values: Tensor) -> None:
        index = MEASURE_NAMES.index(name)
        self._measure_sum[index] += values.float().cpu().double().sum()
        self._measure_count[index] += values.numel()

    def compute(self) -> dict[str, float]:
        """The metrics so far, as plain numbers, under the names of `METRIC_NAMES`."""
        if self.num_tokens == 0:
            raise ValueError("There is nothing to evaluate: no position had a label other than -100.")
        token_nll = torch.cat(self._token_nll)
        self._token_nll = [token_nll]
        count = token_nll.numel()
        nll = token_nll.double().mean()
        metrics = {
            "nll": float(nll),
            "perplexity": float(nll.exp()),
            "accuracy": float(self._correct / count),
            "expected_calibration_error": self.reliability().expected_error,
            "cvar_nll": math.nan if nll.isnan() else conditional_value_at_risk(token_nll, self.cvar_fraction),
        }
        for index, name in enumerate(MEASURE_NAMES):
            if self._measure_count[index] > 0:
                metrics[name] = float(self._measure_sum[index] / self._measure_count[index])
        metrics["num_tokens"] = count
        return metrics

    def reliability(self) -> ReliabilityCurve:
        """Mean confidence, accuracy and count of every bin; an empty bin's first two are nan."""
        return curve_of_sums(self._bin_confidence, self._bin_correct, self._bin_count)

    def merge(self, other: "StreamingEvaluation") -> "StreamingEvaluation":
        """Adds what another one has seen, in place."""
        if other.num_bins != self.num_bins:
            raise ValueError(f"Cannot merge {other.num_bins} bins into {self.num_bins}.")
        return self._add_state(other._sums(), torch.cat([torch.zeros(0), *other._token_nll]))

    def gather(self, accelerator) -> "StreamingEvaluation":
        """
        What all processes of an Accelerate run have seen together, the same on every process; one's own state stays
        as it is. Every process has to call it.
        """
        gathered = StreamingEvaluation(self.num_bins, self.cvar_fraction)
        own = torch.cat([torch.zeros(0), *self._token_nll])
        if accelerator.num_processes == 1:
            return gathered._add_state(self._sums(), own)
        device = accelerator.device
        # Metal has no float64; a count stays exact in float32 up to 16.7 million tokens
        dtype = torch.float32 if device.type == "mps" else torch.float64
        sums = accelerator.gather(self._sums()[None].to(device, dtype)).cpu().double()
        sizes = accelerator.gather(torch.tensor([own.numel()], device=device)).cpu()
        padded = torch.zeros(int(sizes.max()), device=device)
        padded[: own.numel()] = own.to(device)
        tokens = accelerator.gather(padded[None]).cpu()
        for process, size in enumerate(sizes.tolist()):
            gathered._add_state(sums[process], tokens[process, :size])
        return gathered

    def _sums(self) -> Tensor:
        return torch.cat(
            [
                self._correct[None],
                self._bin_count,
                self._bin_confidence,
                self._bin_correct,
                self._measure_sum,
                self._measure_count,
            ]
        )

    def _add_state(self, sums: Tensor, token_nll: Tensor) -> "StreamingEvaluation":
        bins, measures = self.num_bins, len(MEASURE_NAMES)
        correct, *parts = sums.split([1, bins, bins, bins, measures, measures])
        self._correct += correct[0]
        own = (self._bin_count, self._bin_confidence, self._bin_correct, self._measure_sum, self._measure_count)
        for mine, theirs in zip(own, parts, strict=True):
            mine += theirs
        if token_nll.numel():
            self._token_nll.append(token_nll.clone())
        return self


def mask_repeated_rows(labels: Tensor, accelerator) -> Tensor:
    """
    Labels without the rows that Accelerate repeats to fill the last batch of a distributed data loader.

    `gather_for_metrics` drops such rows after a gather. Here nothing is gathered per batch, so each process takes its
    own repeated rows out by labelling them -100.
    """
    state = accelerator.gradient_state
    if accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return labels
    batch = labels.shape[0]
    place = accelerator.process_index * batch + torch.arange(batch, device=labels.device)
    repeated = (place >= state.remainder).reshape(-1, *[1] * (labels.ndim - 1))
    return labels.masked_fill(repeated, IGNORED_LABEL)
