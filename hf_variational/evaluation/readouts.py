"""From the same posterior samples, several predictions: ways to join them, each with a temperature.

With p_s the distribution of sample s at one position, and T a temperature on what is joined, p_T ∝ p^(1/T):

- `mean_probability`: p̄ = (1/S) Σ_s p_s, the predictive distribution, which the model itself answers with;
- `mean_logits`: softmax of the mean of the logits, the normalised geometric mean Π_s p_s^(1/S);
- `median_probability`: the median over samples of each token's probability, normalised;
- `entropy_weighted`: Σ_s w_s p_s with w_s ∝ exp(−H(p_s)), sure samples count more;
- `confidence_weighted`: the same with w_s ∝ max_v p_s(v).

With one sample, or identical ones, all are that sample. Only of the first are entropy and mutual information those of
the predictive distribution.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from scipy.stats import rankdata
from torch import Tensor

from ..checks import check_whole
from ..modeling.predictive import log_mean_exp, widen
from .predictions import each_sampled_prediction
from .streaming import StreamingEvaluation
from .temperature import check_temperature

MEAN_PROBABILITY = "mean_probability"
MEAN_LOGITS = "mean_logits"
MEDIAN_PROBABILITY = "median_probability"
ENTROPY_WEIGHTED = "entropy_weighted"
CONFIDENCE_WEIGHTED = "confidence_weighted"
READOUT_NAMES = (MEAN_PROBABILITY, MEAN_LOGITS, MEDIAN_PROBABILITY, ENTROPY_WEIGHTED, CONFIDENCE_WEIGHTED)
TEMPERATURES = (0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5)
# Lowest ECE, then CVaR, then NLL; lowest CVaR, then ECE, then NLL; lowest mean rank in the three, then NLL.
SELECTION_RULES = ("ece", "cvar", "balanced")


@dataclass(frozen=True)
class ReadoutScores:
    """What a readout at a temperature is worth on some data.

    Attributes:
        readout: of `READOUT_NAMES`.
        temperature: T.
        nll: mean negative log-likelihood of the targets, nats.
        expected_calibration_error: with 15 equal-width bins.
        cvar_nll: mean NLL of the worst 5 % of the tokens, nats.
        num_tokens: targets.
    """

    readout: str
    temperature: float
    nll: float
    expected_calibration_error: float
    cvar_nll: float
    num_tokens: int


@dataclass(frozen=True)
class ReadoutSelection:
    """A readout chosen on validation data, on test data.

    Attributes:
        validation: every readout at every temperature.
        chosen: the one of `validation` that was chosen.
        test: the chosen one on the test data.
        untouched: the predictive distribution at T = 1 on the test data, which needs no choice.
    """

    validation: tuple[ReadoutScores, ...]
    chosen: ReadoutScores
    test: ReadoutScores
    untouched: ReadoutScores


def read_samples(log_probabilities: Tensor, readout: str) -> Tensor:
    """Joins samples at T = 1.

    Args:
        log_probabilities: log p_s, [..., S, vocab].
        readout: of `READOUT_NAMES`.

    Returns:
        Normalised log-probabilities, [..., vocab], float32 (float64 stays).
    """
    _check_names([readout])
    return _READ[readout](widen(log_probabilities))


def _mean_logits(log_p: Tensor) -> Tensor:
    return log_p.mean(-2).log_softmax(-1)


def _median_probability(log_p: Tensor) -> Tensor:
    # In logs, so that a median that underflows still has its place; between two, the mean of their probabilities.
    ordered, half = log_p.sort(-2).values, log_p.shape[-2] // 2
    middle = ordered[..., half - 1 + log_p.shape[-2] % 2 : half + 1, :]
    return log_mean_exp(middle, -2).log_softmax(-1)


def _entropy_weighted(log_p: Tensor) -> Tensor:
    return _weighted(log_p, -torch.special.entr(log_p.exp()).sum(-1))


def _confidence_weighted(log_p: Tensor) -> Tensor:
    return _weighted(log_p, log_p.amax(-1))


def _weighted(log_p: Tensor, log_weights: Tensor) -> Tensor:
    return (log_p + log_weights.log_softmax(-1)[..., None]).logsumexp(-2)


_READ: dict[str, Callable[[Tensor], Tensor]] = {
    MEAN_PROBABILITY: lambda log_p: log_mean_exp(log_p, -2),
    MEAN_LOGITS: _mean_logits,
    MEDIAN_PROBABILITY: _median_probability,
    ENTROPY_WEIGHTED: _entropy_weighted,
    CONFIDENCE_WEIGHTED: _confidence_weighted,
}


def evaluate_readouts(
    model,
    data,
    num_posterior_samples: int = 8,
    batch_size: int = 1,
    *,
    readouts: Sequence[str] = READOUT_NAMES,
    temperatures: Sequence[float] = TEMPERATURES,
    seed: int = 0,
    progress: bool = True,
) -> list[ReadoutScores]:
    """
    Every readout at every temperature, from one pass over the data.

    Args:
        model: A causal language model that answers with posterior samples.
        data, num_posterior_samples: As in [`evaluate_language_model`].
        batch_size (`int`, defaults to 1):
            Rows of a batch, when `data` is a dataset. The model hands out the samples of a batch whole: 4 bytes ·
            rows · samples · length · vocabulary.
        readouts, temperatures: What to try.
        seed (`int`, defaults to 0): Seeds the posterior noise.
        progress (`bool`, defaults to `True`): Whether to show a progress bar.

    Raises:
        ValueError: for a model without posterior samples, data without a target, or logits that are NaN.
    """
    readouts, temperatures = list(readouts), [check_temperature(temperature) for temperature in temperatures]
    _check_names(readouts)
    tried = {pair: StreamingEvaluation() for pair in itertools.product(readouts, temperatures)}
    if not tried:
        raise ValueError("There is nothing to try: give at least one of `readouts` and one of `temperatures`.")

    def visit(log_p: Tensor, targets: Tensor) -> None:
        for readout in readouts:
            joined = read_samples(log_p, readout)
            largest, predicted = joined.max(-1)
            correct = (predicted == targets).cpu().double()
            chosen = joined.gather(-1, targets[:, None]).squeeze(-1)
            for temperature in temperatures:
                normaliser = (joined / temperature).logsumexp(-1)
                nll = normaliser - chosen / temperature
                confidence = (largest / temperature - normaliser).exp()
                tried[readout, temperature]._add_predictions(nll.cpu(), confidence.cpu().double(), correct)

    check_whole("num_posterior_samples", num_posterior_samples, 1)
    check_whole("batch_size", batch_size, 1)
    _check_samples(model)
    each_sampled_prediction(
        model,
        data,
        visit,
        num_posterior_samples,
        batch_size,
        seed=seed,
        progress=progress,
        description="Reading out",
    )
    return [_scores(readout, temperature, evaluation) for (readout, temperature), evaluation in tried.items()]


def choose_readout(table: Sequence[ReadoutScores], rule: str = "balanced") -> ReadoutScores:
    """The best of several, of validation data.

    Args:
        table: as [`evaluate_readouts`] answers.
        rule: `"ece"`, the lowest calibration error (between equals the lower CVaR-NLL, then NLL); `"cvar"`, the lowest
            CVaR-NLL (then calibration error, then NLL); `"balanced"`, the lowest mean of the ranks in NLL, calibration
            error and CVaR-NLL (then NLL).
    """
    if rule not in SELECTION_RULES:
        raise ValueError(f"`rule` is one of {', '.join(SELECTION_RULES)}, got {rule!r}.")
    if not table:
        raise ValueError("There is no readout to choose from.")
    columns = {
        "ece": [(row.expected_calibration_error, row.cvar_nll, row.nll) for row in table],
        "cvar": [(row.cvar_nll, row.expected_calibration_error, row.nll) for row in table],
    }
    if rule == "balanced":
        ranks = rankdata(columns["ece"], axis=0).mean(1)
        columns["balanced"] = [(rank, row.nll) for rank, row in zip(ranks, table, strict=True)]
    return table[min(range(len(table)), key=columns[rule].__getitem__)]


def select_readout(
    model,
    validation,
    test,
    num_posterior_samples: int = 8,
    batch_size: int = 1,
    *,
    rule: str = "balanced",
    readouts: Sequence[str] = READOUT_NAMES,
    temperatures: Sequence[float] = TEMPERATURES,
    seed: int = 0,
    progress: bool = True,
) -> ReadoutSelection:
    """
    Chooses a readout and a temperature on validation data, and says what they are worth on test data.

    Args:
        model, num_posterior_samples, batch_size, readouts, temperatures, seed, progress:
            As in [`evaluate_readouts`].
        validation, test: Data, as there.
        rule (`str`, defaults to `"balanced"`): As in [`choose_readout`].

    Example:

    ```python
    >>> selection = select_readout(model, validation, test, rule="ece")
    >>> selection.chosen.readout, selection.chosen.temperature, selection.test.expected_calibration_error
    ```
    """
    if rule not in SELECTION_RULES:
        raise ValueError(f"`rule` is one of {', '.join(SELECTION_RULES)}, got {rule!r}.")
    options = {"seed": seed, "progress": progress}
    table = evaluate_readouts(
        model,
        validation,
        num_posterior_samples,
        batch_size,
        readouts=readouts,
        temperatures=temperatures,
        **options,
    )
    chosen = choose_readout(table, rule)
    tested = evaluate_readouts(
        model,
        test,
        num_posterior_samples,
        batch_size,
        readouts=dict.fromkeys([chosen.readout, MEAN_PROBABILITY]),
        temperatures=dict.fromkeys([chosen.temperature, 1.0]),
        **options,
    )
    found = {(row.readout, row.temperature): row for row in tested}
    return ReadoutSelection(
        tuple(table), chosen, found[chosen.readout, chosen.temperature], found[MEAN_PROBABILITY, 1.0]
    )


def _scores(readout: str, temperature: float, evaluation: StreamingEvaluation) -> ReadoutScores:
    metrics = evaluation.compute()
    names = ("nll", "expected_calibration_error", "cvar_nll", "num_tokens")
    return ReadoutScores(readout, temperature, **{name: metrics[name] for name in names})


def _check_samples(model) -> None:
    inner = getattr(model, "module", model)
    if not getattr(inner, "variational_layers", None):
        raise ValueError(
            f"{type(inner).__name__} has no posterior samples to join in several ways. For the temperature of a "
            "deterministic model there is fit_temperature."
        )


def _check_names(readouts: Sequence[str]) -> None:
    unknown = [name for name in readouts if name not in READOUT_NAMES]
    if unknown:
        raise ValueError(f"A readout is one of {', '.join(READOUT_NAMES)}, got {unknown[0]!r}.")
