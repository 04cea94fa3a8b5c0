"""Numbers of the negative log-likelihood of tokens: of its worst part, and per byte of the text."""

import math

import torch
from torch import Tensor


def conditional_value_at_risk(values: Tensor, fraction: float = 0.05) -> float:
    """
    Mean of the largest `fraction` of the values: CVaR_f = (1 / f·n) · Σ of the largest f·n values.

    Where f·n is not whole, the value at the edge counts with the part of it that is left (Rockafellar and Uryasev
    2000, for an empirical distribution), so the number moves smoothly with n.
    """
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"The fraction of the tail is a number in (0, 1], got {fraction}.")
    values = values.reshape(-1)
    if values.numel() == 0:
        raise ValueError("The mean of a tail needs at least one value, got none.")
    mass = fraction * values.numel()
    # 0.05 * 140 is 7.000000000000001: a mass that is whole up to rounding is whole
    mass = round(mass) if abs(mass - round(mass)) < 1e-6 else mass
    whole = int(mass)
    largest = values.double().topk(min(whole + 1, values.numel())).values
    total = largest[:whole].sum()
    if mass > whole:
        total = total + (mass - whole) * largest[whole]
    return float(total / mass)


def bits_per_byte(nll, num_bytes) -> float:
    """Σ NLL / (ln 2 · bytes): unlike the NLL per token it compares models with different tokenizers on one text.

    Args:
        nll: negative log-likelihood of every token of the text, nats, [tokens].
        num_bytes: UTF-8 bytes of these tokens' text, or of each token, [tokens]; those of a token that nothing
            predicted, such as the first one, do not count.

    Raises:
        ValueError: without a byte.
    """
    nats = torch.as_tensor(nll).double().sum()
    total = torch.as_tensor(num_bytes).double().sum()
    if not total > 0:
        raise ValueError(f"Bits per byte need the bytes of the text, got {float(total):g} of them.")
    return float(nats / (math.log(2) * total))
