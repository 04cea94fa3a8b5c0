"""How well each score tells other texts from the model's own domain, by the length of the window that it sees."""

from collections.abc import Iterable, Mapping, Sequence

from transformers.utils import logging

from ..checks import check_whole
from .domains import text_prefix, token_windows
from .predictions import has_posteriors
from .ranking import detection
from .token_scores import TokenScores, token_scores

logger = logging.get_logger(__name__)

WINDOW_LENGTHS = (1, 8, 32, 128)


def ood_windows(
    texts: Mapping[str, str | Iterable[str]],
    tokenizer,
    lengths: Sequence[int] = WINDOW_LENGTHS,
    max_windows: int | None = None,
    prefix: list[int] | None = None,
) -> dict[int, dict[str, list[list[int]]]]:
    """
    Windows of several lengths, each cut anew: the last token of a long window has a longer context than any of a short
    one, so scores of long windows say nothing of short ones.

    Args:
        texts: A text or several by name, see [`token_windows`].
        tokenizer: Any tokenizer.
        lengths: Tokens of the text in a window. A window of one token is predicted from what stands in front of it, so
            with a tokenizer that puts nothing there (GPT-2's) that length is left out, which a warning says; so is a
            length that a text is too short for, of that text.
        max_windows (`int`, *optional*): Of each text and length, spread evenly over all there are.
        prefix (`list[int]`, *optional*): Tokens in front of every window; `None`: the tokenizer's own.

    Returns:
        `{length: {name: windows}}`.

    Raises:
        ValueError: for a text that is empty, or if no text has a window of any of these lengths.
    """
    texts = {name: [text] if isinstance(text, str) else list(text) for name, text in texts.items()}
    for name, parts in texts.items():
        if not any(part.strip() for part in parts):
            raise ValueError(f"The text {name!r} is empty: there is no window to cut from it.")
    if max_windows is not None:
        check_whole("max_windows", max_windows, 1)
    prefix = text_prefix(tokenizer) if prefix is None else list(prefix)
    found: dict[int, dict[str, list[list[int]]]] = {}
    for length in _predictable(lengths, prefix):
        for name, parts in texts.items():
            try:
                windows = token_windows(parts, tokenizer, length, max_windows, prefix)
            except ValueError as error:
                logger.warning(f"{name!r} is left out at length {length}: {error}")
                continue
            found.setdefault(length, {})[name] = windows
    if not found:
        raise ValueError(f"No text of {', '.join(map(repr, texts))} has a window of any length of {list(lengths)}.")
    return found


def _predictable(lengths: Sequence[int], prefix: list[int]) -> list[int]:
    """The lengths whose windows have a token to predict."""
    for length in lengths:
        check_whole("length", length, 1)
    if prefix or 1 not in lengths:
        return list(lengths)
    logger.warning(
        "Windows of 1 token are left out: the tokenizer puts no token in front of a text, so nothing predicts the "
        "first one. Pass one, such as prefix=[tokenizer.eos_token_id]."
    )
    return [length for length in lengths if length > 1]


def domain_detection(in_domain: TokenScores, other: TokenScores) -> dict[str, dict[str, float]]:
    """AUROC, AUPR and the false positive rate at 95 % true positives (see [`detection`]) of the other text's windows
    against the domain's own, for each score that both have.
    """
    own, others = in_domain.window_means(), other.window_means()
    return {name: detection(own[name], others[name]) for name in own if name in others}


def evaluate_ood(
    model,
    in_domain: str | Iterable[str],
    others: Mapping[str, str | Iterable[str]],
    tokenizer,
    lengths: Sequence[int] = WINDOW_LENGTHS,
    num_posterior_samples: int = 8,
    batch_size: int = 32,
    *,
    max_windows: int | None = 500,
    prefix: list[int] | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    progress: bool = True,
) -> dict[int, dict[str, dict[str, dict[str, float]]]]:
    """
    How well each score tells other texts from held-out text of the model's domain, by the length of the window.

    A window's score is the mean over its predicted tokens.

    Args:
        model: A causal language model.
        in_domain: Held-out text of its domain, one or several.
        others: Other texts by name.
        tokenizer, lengths, prefix: As in [`ood_windows`].
        num_posterior_samples, batch_size, temperature, seed, progress: As in [`token_scores`].
        max_windows (`int`, *optional*, defaults to 500):
            Of each text and length. AUPR depends on how many windows there are on either side: with texts that are
            long enough this makes them equal.

    Returns:
        `{length: {name: {score: {"auroc", "aupr", "fpr_at_95_tpr"}}}}`; the statistics of the posteriors are among the
        scores.

    Raises:
        ValueError: without other texts, for an empty one, or if no length has windows on both sides.

    Example:

    ```python
    >>> evaluate_ood(model, stories, {"law": law}, tokenizer)[8]["law"]["mutual_information"]["auroc"]
    ```
    """
    if not others:
        raise ValueError("`others` is empty: there is no text to tell from the domain's own.")
    options = {"internal": has_posteriors(getattr(model, "module", model)), "temperature": temperature}
    options |= {"seed": seed, "progress": progress}
    prefix = text_prefix(tokenizer) if prefix is None else list(prefix)
    lengths = _predictable(lengths, prefix)
    own = ood_windows({"in_domain": in_domain}, tokenizer, lengths, max_windows, prefix)
    table: dict[int, dict[str, dict[str, dict[str, float]]]] = {}
    for length, windows in ood_windows(others, tokenizer, list(own), max_windows, prefix).items():
        reference = token_scores(model, own[length]["in_domain"], num_posterior_samples, batch_size, **options)
        table[length] = {
            name: domain_detection(reference, token_scores(model, cut, num_posterior_samples, batch_size, **options))
            for name, cut in windows.items()
        }
    return table
