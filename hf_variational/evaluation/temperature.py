"""One temperature for a language model's predictions, fitted on calibration data (Guo et al. 2017).

p_T ∝ p^(1/T). The mean negative log-likelihood of the targets is convex in β = 1/T: with ℓ = log p,

    f(β) = mean[log Σ_v exp(β ℓ_v) − β ℓ_y],   f'(β) = mean[E_β[ℓ] − ℓ_y],   f''(β) = mean[Var_β[ℓ]],

so Newton's method, kept inside a bracket, finds the one minimum in a few passes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.utils import logging

from ..checks import check_whole
from .predictions import Predictions, each_prediction
from .streaming import BLOCK_ENTRIES

logger = logging.get_logger(__name__)

LOWEST, HIGHEST = 0.01, 100.0
# A Newton step that moves beta by no more than this part of it is the last one.
_TOLERANCE = 1e-5
_MOST_PASSES = 60


@dataclass(frozen=True)
class FittedTemperature:
    """A temperature and what it does to the data it was fitted on.

    Attributes:
        temperature: T; above 1 where the predictions were too confident.
        nll: mean negative log-likelihood of the targets at T, nats.
        untempered_nll: the same at T = 1.
        num_tokens: targets of the calibration data.
    """

    temperature: float
    nll: float
    untempered_nll: float
    num_tokens: int


def check_temperature(temperature: float) -> float:
    """Refuses a temperature that is not a finite number above 0."""
    is_number = isinstance(temperature, (int, float)) and not isinstance(temperature, bool)
    if not is_number or not 0 < temperature < math.inf:
        raise ValueError(f"A temperature is a finite number above 0, got {temperature!r}.")
    return float(temperature)


def temper(log_probabilities: Tensor, temperature: float) -> Tensor:
    """log p_T, p_T ∝ p^(1/T).

    Args:
        log_probabilities: log-probabilities or logits, [..., vocab].
        temperature: T; at 1 log-probabilities come back as they are.

    Returns:
        [..., vocab], in the dtype that was given.
    """
    temperature = check_temperature(temperature)
    return (log_probabilities if temperature == 1 else log_probabilities / temperature).log_softmax(-1)


def optimal_temperature(log_probabilities: Tensor, targets: Tensor) -> FittedTemperature:
    """The temperature with the lowest mean negative log-likelihood, of predictions that are at hand.

    Args:
        log_probabilities: log-probabilities or logits, [n, vocab].
        targets: [n].

    Raises:
        ValueError: without targets, or if a target has probability 0 or a log-probability is NaN.
    """
    if log_probabilities.dim() != 2 or targets.shape != log_probabilities.shape[:1] or not targets.numel():
        raise ValueError(
            "Expected log-probabilities [n, vocab] and targets [n] with n of at least 1, got "
            f"{tuple(log_probabilities.shape)} and {tuple(targets.shape)}."
        )
    step = max(1, BLOCK_ENTRIES // log_probabilities.shape[-1])
    blocks = list(zip(log_probabilities.split(step), targets.split(step), strict=True))
    return _minimise(lambda beta: sum(_sums(*block, beta) for block in blocks))


def fit_temperature(
    model,
    data,
    num_posterior_samples: int = 8,
    batch_size: int = 8,
    *,
    seed: int = 0,
    cache_bytes: int = 2**30,
    progress: bool = True,
) -> FittedTemperature:
    """
    Fits a temperature to a causal language model's predictions: to the predictive distribution over posterior samples,
    or to the model's own distribution where there are none.

    Args:
        model: A causal language model. A deterministic one (or `num_posterior_samples=0`) is fitted at its mean pass.
        data (`DataLoader`, dataset or list):
            Calibration data, as in [`evaluate_language_model`].
        num_posterior_samples (`int`, defaults to 8): Posterior samples of the predictive distribution.
        batch_size (`int`, defaults to 8): Rows of a batch, when `data` is a dataset.
        seed (`int`, defaults to 0): Seeds the posterior noise, the same in every pass over the data.
        cache_bytes (`int`, defaults to 1 GiB):
            Log-probabilities up to so much memory are kept, on the model's device, and the model runs once. Those of
            larger data (4 bytes · tokens · vocabulary) are made again for every step of the search, about five times.
        progress (`bool`, defaults to `True`): Whether to show a progress bar.

    Raises:
        ValueError: for data without a target, or a target of probability 0.

    Example:

    ```python
    >>> fitted = fit_temperature(model, calibration, num_posterior_samples=8)
    >>> token_scores(model, test, temperature=fitted.temperature).evaluation().compute()["nll"]
    ```
    """
    check_whole("cache_bytes", cache_bytes, 0)
    kept: list[Predictions] = []
    held = 0

    def collect(block: Predictions) -> None:
        nonlocal held
        held += block.log_probabilities.nbytes
        if held <= cache_bytes:
            kept.append(block)
        else:
            kept.clear()

    def run(visit) -> None:
        each_prediction(
            model,
            data,
            visit,
            num_posterior_samples,
            batch_size,
            seed=seed,
            progress=progress,
            description="Fitting the temperature",
        )

    run(collect)
    if not kept and iter(data) is data:
        raise ValueError(
            f"The log-probabilities take {held:,} bytes, more than cache_bytes={cache_bytes:,}, and the data can be "
            "gone through only once: give a dataset, a list or a DataLoader, or raise cache_bytes."
        )

    def sums(beta: float) -> Tensor:
        total = torch.zeros(4, dtype=torch.float64)

        def add(block: Predictions) -> None:
            total.add_(_sums(block.log_probabilities, block.targets, beta))

        if not kept:
            run(add)
        for block in kept:
            add(block)
        return total

    return _minimise(sums)


def _sums(log_probabilities: Tensor, targets: Tensor, beta: float) -> Tensor:
    """Σ of the negative log-likelihood at beta, of its first and its second derivative, and the number of targets;
    [4], float64, on the CPU.
    """
    log_p = log_probabilities.to(torch.promote_types(log_probabilities.dtype, torch.float32))
    chosen = log_p.gather(-1, targets[:, None]).squeeze(-1)
    if not bool(torch.isfinite(chosen).all()):
        token = int(targets[~torch.isfinite(chosen)][0])
        raise ValueError(
            f"Token {token} is a target whose log-probability is {float(chosen[~torch.isfinite(chosen)][0])}: no "
            "temperature makes it finite."
        )
    # Where ℓ is -inf its probability is 0 and it adds nothing; a product with it would add nan. Differences from the
    # target's ℓ keep the numbers small where the logits have an offset.
    relative = (log_p - chosen[:, None]).clamp(min=-1e30)
    scaled = relative * beta
    nll = scaled.logsumexp(-1)
    weights = (scaled - nll[:, None]).exp_()
    slope = torch.linalg.vecdot(weights, relative)
    curvature = torch.linalg.vecdot(weights, (relative - slope[:, None]).square_())
    per_token = torch.stack([nll, slope, curvature, torch.ones_like(nll)])
    return per_token.cpu().double().sum(-1)


def _minimise(sums: Callable[[float], Tensor]) -> FittedTemperature:
    first, last = 1 / HIGHEST, 1 / LOWEST
    low, high = first, last  # the minimum lies between, or beyond an end that was never tried
    beta, untempered, tried = 1.0, None, set()
    for _ in range(_MOST_PASSES):
        total = sums(beta)
        nll, slope, curvature = (total[:3] / total[3]).tolist()
        untempered = nll if untempered is None else untempered
        tried.add(beta)
        if slope == 0:
            break
        if (beta == first and slope > 0) or (beta == last and slope < 0):
            logger.warning(f"The NLL still falls at temperature {1 / beta:g}, the last one tried.")
            break
        low, high = (low, beta) if slope > 0 else (beta, high)
        step = beta - slope / curvature if curvature > 0 else (low if slope > 0 else high)
        if abs(step - beta) <= _TOLERANCE * beta:
            beta = step
            break
        beta = min(max(step, low), high)
        if beta in tried:
            beta = math.sqrt(low * high)
    return FittedTemperature(1 / beta, nll, untempered, int(total[3]))
