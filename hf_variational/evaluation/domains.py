"""Whether a language model notices that a text is not of its domain, and that a token is wrong.

A short window of a text is a sequence of its own; its score is the mean of a measure over its predicted tokens. How
well the score tells windows of two texts apart is the area under the ROC curve (AUROC): the probability that a window
of the other text scores higher, 0.5 for a score that says nothing. For wrong tokens the score is each token's own.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .language_model import _check_whole
from .predictions import Predictions, each_prediction
from .streaming import MEASURE_NAMES, StreamingEvaluation
from .temperature import check_temperature, temper

# What needs no sample, and what the predictive distribution alone says.
SCORE_NAMES = (*MEASURE_NAMES, "one_minus_confidence", "nll")
# These look at the token that came, so they cannot tell beforehand that a prediction is wrong.
_OF_THE_TARGET = ("token_variance", "nll")


@dataclass(frozen=True)
class TokenScores:
    """Scores of every predicted token, on the CPU; higher is less certain.

    Attributes:
        values: by name (of `SCORE_NAMES`), each [tokens]. The mean pass has `predictive_entropy`,
            `one_minus_confidence` and `nll`.
        correct: whether the most probable token was the target, [tokens].
        windows: number of the sequence that the token is from, [tokens].
        num_windows: sequences.
    """

    values: dict[str, Tensor]
    correct: Tensor
    windows: Tensor
    num_windows: int

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
            if name not in _OF_THE_TARGET
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


def token_windows(
    texts: str | Iterable[str],
    tokenizer,
    length: int,
    max_windows: int | None = None,
    prefix: list[int] | None = None,
) -> list[list[int]]:
    """
    Cuts text into windows of `length` tokens, each a sequence of its own that starts as the tokenizer starts a text.

    Args:
        texts: A text, or several; no window goes from one to the next, and what is left at the end of a text is
            dropped.
        tokenizer: Any tokenizer.
        length (`int`): Tokens of the text in a window.
        max_windows (`int`, *optional*): At most so many, spread evenly over all there are.
        prefix (`list[int]`, *optional*):
            Tokens in front of every window. `None` takes what the tokenizer puts in front of a text: of Llama the
            beginning-of-sequence token, of GPT-2 nothing, which leaves the first token of a window unpredicted.

    Returns:
        Lists of `len(prefix) + length` token ids.

    Raises:
        ValueError: if no text is as long as a window.
    """
    _check_whole("length", length, 1)
    if max_windows is not None:
        _check_whole("max_windows", max_windows, 1)
    texts = [texts] if isinstance(texts, str) else list(texts)
    prefix = text_prefix(tokenizer) if prefix is None else list(prefix)
    if len(prefix) + length < 2:
        raise ValueError(f"A window of length={length} without a token in front of it has nothing to predict.")
    windows, longest = [], 0
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        longest = max(longest, len(ids))
        windows += [prefix + ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    if not windows:
        raise ValueError(f"No window of length={length} fits: the longest of {len(texts)} texts has {longest} tokens.")
    if max_windows is None or max_windows >= len(windows):
        return windows
    return [windows[index * len(windows) // max_windows] for index in range(max_windows)]


def text_prefix(tokenizer) -> list[int]:
    """The tokens that a tokenizer puts in front of a text: of Llama the beginning-of-sequence token, of GPT-2 none."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    starts = (start for start in range(len(whole)) if whole[start : start + len(bare)] == bare)
    return list(whole[: next(starts, 0)])


_prefix_of = text_prefix


def token_scores(
    model,
    data,
    num_posterior_samples: int = 8,
    batch_size: int = 32,
    *,
    temperature: float = 1.0,
    seed: int = 0,
    progress: bool = True,
) -> TokenScores:
    """
    Scores of every predicted token of a data set.

    Args:
        model, data, num_posterior_samples, batch_size: As in [`evaluate_language_model`].
        temperature (`float`, defaults to 1.0):
            Of the predictive distribution: likelihood, confidence and predictive entropy are those of p_T ∝ p̄^(1/T).
            The other measures compare posterior samples and stay as they are, so only at 1 is the predictive entropy
            the sum of expected entropy and mutual information.
        seed (`int`, defaults to 0): Seeds the posterior noise.
        progress (`bool`, defaults to `True`): Whether to show a progress bar.

    Raises:
        ValueError: for data without a target, or a temperature that is not a number above 0.
    """
    return scores_at_temperatures(
        model, data, [temperature], num_posterior_samples, batch_size, seed=seed, progress=progress
    )[0]


def scores_at_temperatures(
    model,
    data,
    temperatures: Sequence[float],
    num_posterior_samples: int = 8,
    batch_size: int = 32,
    *,
    seed: int = 0,
    progress: bool = True,
) -> list[TokenScores]:
    """[`token_scores`] at each of several temperatures, from one pass over the data."""
    temperatures = [check_temperature(temperature) for temperature in temperatures]
    parts: list[list[dict[str, Tensor]]] = [[] for _ in temperatures]
    places: list[Tensor] = []

    def visit(block: Predictions) -> None:
        places.append(block.sequences.cpu())
        for temperature, part in zip(temperatures, parts, strict=True):
            part.append({name: values.cpu() for name, values in _scores(block, temperature).items()})

    count = each_prediction(
        model,
        data,
        visit,
        num_posterior_samples,
        batch_size,
        measures=True,
        seed=seed,
        progress=progress,
        description="Scoring",
    )
    answers = []
    for part in parts:
        values = {name: torch.cat([block[name] for block in part]) for name in part[0]}
        correct = values.pop("correct")
        answers.append(
            TokenScores(
                {name: values[name] for name in SCORE_NAMES if name in values}, correct, torch.cat(places), count
            )
        )
    return answers


def _scores(block: Predictions, temperature: float) -> dict[str, Tensor]:
    log_p = block.log_probabilities if temperature == 1 else temper(block.log_probabilities, temperature)
    largest, predicted = log_p.max(-1)
    scores = {
        **block.measures,
        "one_minus_confidence": -torch.expm1(largest),
        "nll": -log_p.gather(-1, block.targets[:, None]).squeeze(-1),
        "correct": predicted == block.targets,
    }
    if temperature != 1 or "predictive_entropy" not in scores:
        scores["predictive_entropy"] = torch.special.entr(log_p.exp()).sum(-1)
    return scores


def auroc(negative: Tensor, positive: Tensor) -> float:
    """P(positive > negative) + ½ P(positive = negative) of a random pair, [n] and [m]; nan where a value is nan.

    Raises:
        ValueError: if either side is empty.
    """
    if not negative.numel() or not positive.numel():
        raise ValueError(
            f"An AUROC needs values on both sides, got {negative.numel()} negative and {positive.numel()} positive."
        )
    values = torch.cat([negative.flatten(), positive.flatten()])
    if values.isnan().any():
        return float("nan")
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    # Equal values share the mean of the ranks they take up (Mann and Whitney 1947).
    ranks = (counts.cumsum(0).double() - (counts - 1) / 2)[place[negative.numel() :]]
    pairs = negative.numel() * positive.numel()
    return float((ranks.sum() - positive.numel() * (positive.numel() + 1) / 2) / pairs)


def domain_auroc(in_domain: TokenScores, other: TokenScores) -> dict[str, float]:
    """AUROC of the other text's windows against the domain's own, for each score that both have."""
    own, others = in_domain.window_means(), other.window_means()
    return {name: auroc(own[name], others[name]) for name in own if name in others}


def mean_over_domains(table: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Mean over the domains of `{domain: {measure: value}}` of each measure that all of them have."""
    if not table:
        raise ValueError("There is no domain to take a mean over.")
    rows = list(table.values())
    names = [name for name in rows[0] if all(name in row for row in rows)]
    return {name: sum(row[name] for row in rows) / len(rows) for name in names}


def evaluate_domains(
    model,
    in_domain,
    others: Mapping[str, object],
    num_posterior_samples: int = 8,
    batch_size: int = 32,
    *,
    temperature: float = 1.0,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, dict[str, float]]:
    """
    How well each measure tells other texts from the model's own domain.

    Args:
        model: A causal language model.
        in_domain: Windows of held-out text of the domain, as [`token_windows`] cuts them.
        others: Windows of each other text, by name.
        num_posterior_samples, batch_size, temperature, seed, progress: As in [`token_scores`].

    Returns:
        `{name: {measure: AUROC}}`; see [`mean_over_domains`].

    Example:

    ```python
    >>> own = token_windows(stories, tokenizer, length=8)
    >>> others = {"law": token_windows(law, tokenizer, length=8)}
    >>> evaluate_domains(model, own, others)["law"]["mutual_information"]
    ```
    """
    if not others:
        raise ValueError("`others` is empty: there is no text to tell from the domain's own.")
    options = {"temperature": temperature, "seed": seed, "progress": progress}
    own = token_scores(model, in_domain, num_posterior_samples, batch_size, **options)
    return {
        name: domain_auroc(own, token_scores(model, windows, num_posterior_samples, batch_size, **options))
        for name, windows in others.items()
    }
