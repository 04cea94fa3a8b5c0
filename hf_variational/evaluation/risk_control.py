"""Tests of "the risk is above r" that are valid for any number of observations, and the order in which to make them.

Learn then Test (Angelopoulos, Bates, Candès, Jordan and Lei 2021, arXiv 2110.01052): every setting λ of a rule has the
null hypothesis H_λ: R(λ) > r. A procedure that rejects a true one with probability at most δ hands back settings that
all keep the risk at r, with probability at least 1 − δ over the calibration data.
"""

from collections.abc import Callable

import numpy as np
from scipy import special

# Fractions of the largest bet that can be made without going bankrupt.
_BETS = np.arange(1, 50) / 50


def binomial_p_value(errors: float, accepted: float, risk: float) -> float:
    """P(Binomial(accepted, risk) ≤ errors): of H "the error rate of what is accepted is above risk".

    Exact given how many are accepted. That it is at most δ says the same as that the Clopper-Pearson upper bound is at
    most the risk; this is the bound of selective guaranteed risk (Geifman and El-Yaniv 2017, arXiv 1705.08500).

    Args:
        errors, accepted: counts.
        risk: r, in (0, 1).
    """
    return float(special.bdtr(errors, int(accepted), risk))


def betting_p_value(lost: np.ndarray, accepted: np.ndarray, risk: float, bet: float) -> float:
    """Of H "E[lost] > risk · E[accepted]", for independent documents in an order that does not look at
    the losses.

    K_n = Π_{d ≤ n} (1 + b (r a_d − l_d)) starts at 1, is never negative for b in [0, 1 / (1 − r)] and under H expected
    to fall, so P(max_n K_n ≥ 1 / p) ≤ p (Ville's inequality; Waudby-Smith and Ramdas 2024, arXiv 2010.09686).

    Args:
        lost: l_d, share of document d that is accepted and wrong, [documents].
        accepted: a_d ≥ l_d, share that is accepted, [documents].
        risk: r, in (0, 1).
        bet: b, chosen without these documents.
    """
    wealth = np.cumsum(np.log1p(bet * (risk * accepted - lost)))
    return float(np.exp(-max(0.0, wealth.max(initial=0.0))))


def growth_optimal_bet(lost: np.ndarray, accepted: np.ndarray, risk: float) -> tuple[float, float]:
    """The bet of [`betting_p_value`] whose log wealth would have grown most on these documents, and that growth, nats.

    Args:
        lost, accepted, risk: As in [`betting_p_value`], of other documents.
    """
    bets = _BETS / (1 - risk)
    growth = np.log1p(np.outer(risk * accepted - lost, bets)).sum(0)
    best = int(growth.argmax())
    return float(bets[best]), float(growth[best])


def fixed_sequence(p_value: Callable[[int], float], order: range, delta: float) -> int | None:
    """The last setting of those at the beginning of `order` whose p-values are all at most δ; `None` if the first's is
    not.

    An order fixed without the data of the p-values needs no correction for how many are tested: a true H is only
    rejected if the first true one in the order is, whose probability is at most δ (Angelopoulos et al. 2021, fixed
    sequence testing).
    """
    last = None
    for setting in order:
        if p_value(setting) > delta:
            break
        last = setting
    return last
