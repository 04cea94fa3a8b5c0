"""Fits the polynomial in `hf_variational/modeling/dirichlet.py` for Stirling's remainder.

    python benchmarks/fit_stirling_remainder.py

prints the coefficients of u, u^2, ... (u = 1 / y, y >= 1) in lgamma(y) - (y - 1/2) log y + y - log(2 pi) / 2, and the
largest errors of the remainder, of digamma and of trigamma. Needs SciPy and mpmath (sympy, which torch needs, has it).
"""

import mpmath
import numpy as np
from scipy import special

TERMS = 7


def remainder(u: float) -> float:
    y = 1 / mpmath.mpf(u)
    return float(mpmath.loggamma(y) - (y - mpmath.mpf(1) / 2) * mpmath.log(y) + y - mpmath.log(2 * mpmath.pi) / 2)


def fit(u, value):
    """Coefficients [TERMS] of the smallest largest error relative to u, by reweighted least squares."""
    basis = np.stack([u ** (i + 1) for i in range(TERMS)], 1)
    weights, best = 1 / u, (np.inf, None)
    for _ in range(200):
        size = np.abs(basis * weights[:, None]).max(0)
        solution = np.linalg.lstsq(basis * weights[:, None] / size, value * weights, rcond=1e-15)[0] / size
        error = np.abs(basis @ solution - value) / u
        best = min(best, (error.max(), solution), key=lambda pair: pair[0])
        weights = weights * np.sqrt(0.5 + 2 * (error / error.max()) ** 2)
        weights *= (1 / u).mean() / weights.mean()
    return best[1], best[0]


def main():
    mpmath.mp.dps = 40
    u = ((1 - np.cos(np.linspace(0, np.pi, 400))) / 2)[1:]
    coefficients, error = fit(u, np.array([remainder(each) for each in u]))
    numbers = np.arange(1, TERMS + 1)
    slope = -(u**2) * (numbers * u[:, None] ** (numbers - 1) @ coefficients)
    curvature = u**2 * (numbers * (numbers + 1) * u[:, None] ** numbers @ coefficients)
    print(", ".join(f"{coefficient:.9e}" for coefficient in coefficients))
    print(f"remainder {error:.1e} u")
    print(f"digamma {np.abs(slope - special.digamma(1 / u) - np.log(u) - u / 2).max():.1e}")
    trigamma = special.polygamma(1, 1 / u)
    print(f"trigamma {np.abs((curvature + u + u**2 / 2) / trigamma - 1).max():.1e}, relative")


if __name__ == "__main__":
    main()
