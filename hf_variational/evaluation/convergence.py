"""How many posterior samples are enough: every metric at several numbers of samples, with its Monte Carlo error.

Samples are drawn independently, so any S of them are a valid draw of S. One pass with the most samples therefore
answers for all smaller numbers, in as many disjoint groups as fit.

Two things happen as S grows. The spread between draws falls, and the expectation moves: the NLL falls to its limit,
the predictive entropy and the mutual information rise to theirs (Jensen's inequality). The expected conditional
variance is (S − 1)/S of its limit, and to second order in what the samples differ by so is the mutual information.
With one sample both are 0 whatever the model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..checks import check_whole
from ..modeling.predictive import measures_of_log_probabilities
from .predictions import each_sampled_prediction
from .statistics import Estimate, over_seeds
from .streaming import StreamingEvaluation

SAMPLE_NUMBERS = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class SampleConvergence:
    """The metrics of one data set at several numbers of posterior samples.

    Attributes:
        values: by number of samples S and name (of `METRIC_NAMES`), one of every draw, [repeats, draws], float64: a
            repeat's draws are the disjoint groups of S among its samples.
    """

    values: dict[int, dict[str, Tensor]]

    def estimates(self, name: str) -> dict[int, Estimate]:
        """By number of samples the mean of a metric, its standard deviation over draws, which is the error that one
        evaluation with S samples has, and Student's interval of the mean. The data are the same throughout: what other
        data would change is no part of it.
        """
        self._check(name)
        return {
            size: replace(over_seeds(metrics[name].flatten()), unit="draw") for size, metrics in self.values.items()
        }

    def bias(self, name: str) -> dict[int, Estimate]:
        """By number of samples the expected difference of a metric from that at the largest number, whose own distance
        from the limit is about the difference that half as many samples have.

        A repeat's draws are compared with the same samples taken together, so that noise common to both cancels.
        """
        self._check(name)
        most = max(self.values)
        last = self.values[most][name].mean(-1)
        return {
            size: replace(over_seeds(metrics[name].mean(-1) - last), unit="repeat")
            for size, metrics in self.values.items()
            if size < most
        }

    def _check(self, name: str) -> None:
        known = next(iter(self.values.values()))
        if name not in known:
            raise ValueError(f"There is no metric {name!r}: choose one of {', '.join(known)}.")


def sample_convergence(
    model,
    data,
    samples: Sequence[int] = SAMPLE_NUMBERS,
    repeats: int = 3,
    batch_size: int = 1,
    *,
    seed: int = 0,
    progress: bool = True,
) -> SampleConvergence:
    """
    Evaluates a causal language model at several numbers of posterior samples.

    Args:
        model: A causal language model with posterior samples.
        data (`DataLoader`, dataset or list): As in [`evaluate_language_model`]; it is read once a repeat.
        samples: Numbers of samples.
        repeats (`int`, defaults to 3): Passes with the largest of them, each with noise of its own.
        batch_size (`int`, defaults to 1):
            Sequences at a time. Their samples' log-probabilities are in memory together: batch × S × length × vocab
            numbers in float32, 16 MiB for one sequence of 64 tokens, 32 samples and a vocabulary of 2,048.
        seed (`int`, defaults to 0): Of the noise; the repeats take this and the following ones.
        progress (`bool`, defaults to `True`): Whether to show a progress bar.

    Raises:
        ValueError: for a model without posterior samples, data that can be read only once, or without a target, and
            logits that are NaN.

    Example:

    ```python
    >>> convergence = sample_convergence(model, windows)
    >>> print(convergence.estimates("mutual_information")[8], convergence.bias("mutual_information")[8])
    ```
    """
    check_whole("repeats", repeats, 1)
    check_whole("batch_size", batch_size, 1)
    sizes = sorted(set(samples))
    if not sizes:
        raise ValueError("`samples` is empty: name the numbers of posterior samples.")
    for size in sizes:
        check_whole("samples", size, 1)
    if not getattr(getattr(model, "module", model), "variational_layers", None):
        raise ValueError(f"{type(model).__name__} has no posterior samples: there is nothing that converges.")
    if not (isinstance(data, DataLoader) or hasattr(data, "__getitem__")):
        raise ValueError(f"`data` is read {repeats} times: give a data loader, a dataset or a list, not {type(data)}.")
    most = sizes[-1]
    passes = []
    for repeat in range(repeats):
        evaluations = {size: [StreamingEvaluation() for _ in range(most // size)] for size in sizes}

        def visit(log_p: Tensor, targets: Tensor, evaluations=evaluations) -> None:
            log_p = log_p.transpose(0, 1)
            for size, groups in evaluations.items():
                _add(groups, log_p[: size * len(groups)].unflatten(0, (len(groups), size)), targets)

        title = f"Pass {repeat + 1} of {repeats}"
        each_sampled_prediction(
            model, data, visit, most, batch_size, seed=seed + repeat, progress=progress, description=title
        )
        passes.append({size: [group.compute() for group in groups] for size, groups in evaluations.items()})
    return SampleConvergence({size: _stacked([found[size] for found in passes]) for size in sizes})


def _stacked(passes: list[list[dict[str, float]]]) -> dict[str, Tensor]:
    names = [name for name in passes[0][0] if name != "num_tokens"]
    values = {name: [[group[name] for group in groups] for groups in passes] for name in names}
    return {name: torch.tensor(table, dtype=torch.float64) for name, table in values.items()}


def _add(groups: list[StreamingEvaluation], log_p: Tensor, targets: Tensor) -> None:
    """Adds to each group what its samples say, [groups, S, n, vocab], of the targets, [n]."""
    targets = targets.expand(len(groups), -1)
    measures, log_mean = measures_of_log_probabilities(log_p, targets)
    nll = -log_mean.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    largest, predicted = log_mean.max(-1)
    columns = {"nll": nll, "confidence": largest.exp(), "correct": predicted == targets, **measures}
    columns = {name: column.cpu().double() for name, column in columns.items()}
    for index, group in enumerate(groups):
        group._add_predictions(*(columns[name][index] for name in ("nll", "confidence", "correct")))
        for name in measures:
            group._add_measure(name, columns[name][index])
