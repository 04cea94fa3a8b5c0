"""Whether a language model notices that a text is not of its domain, and that a token is wrong.

A short window of a text is a sequence of its own; its score is the mean of a measure over its predicted tokens. How
well the score tells windows of two texts apart is the area under the ROC curve (AUROC): the probability that a window
of the other text scores higher, 0.5 for a score that says nothing. For wrong tokens the score is each token's own.
"""

from collections.abc import Iterable, Mapping

from ..checks import check_whole
from .ranking import auroc
from .token_scores import TokenScores, token_scores


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
    check_whole("length", length, 1)
    if max_windows is not None:
        check_whole("max_windows", max_windows, 1)
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
