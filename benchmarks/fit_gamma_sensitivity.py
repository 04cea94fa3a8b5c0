"""Fits the polynomial in `hf_variational/modeling/gamma.py` that corrects the large-shape limit of d log z / d s.

    python benchmarks/fit_gamma_sensitivity.py

prints the coefficients and the largest relative error over shapes 1 to 1,000 and quantiles of -6.5 to 6.5 standard
deviations, beside that of `torch._standard_gamma_grad`. Needs SciPy.
"""

import numpy as np
import torch
from scipy import special

WIDTH, DEGREE, ORDER = 4.0, 4, 3


def reference(s, z):
    """d log z / d s at a constant quantile: -dF/ds / (z f), by a five-point difference of the smaller tail's log."""
    h = 1e-3

    def derivative(log_tail):
        return (8 * (log_tail(s + h) - log_tail(s - h)) - (log_tail(s + 2 * h) - log_tail(s - 2 * h))) / (12 * h)

    lower, upper = special.gammainc(s, z), special.gammaincc(s, z)
    from_below = lower * derivative(lambda shape: np.log(special.gammainc(shape, z)))
    from_above = -upper * derivative(lambda shape: np.log(special.gammaincc(shape, z)))
    log_density = (s - 1) * np.log(z) - z - special.gammaln(s)
    return -np.where(lower < upper, from_below, from_above) / (np.exp(log_density) * z)


def grid():
    """Shapes [n], samples [n] and s d log z / d s [n]."""
    normal = np.linspace(-6.5, 6.5, 201)
    shapes, samples, values = [], [], []
    for shape in 1 / np.maximum(np.linspace(0, 1, 81), 1e-3):
        below = special.gammaincinv(shape, special.ndtr(normal))
        z = np.where(normal < 0, below, special.gammainccinv(shape, special.ndtr(-normal)))
        shapes.append(np.full_like(z, shape))
        samples.append(z)
        values.append(shape * reference(shape, z))
    return tuple(map(np.concatenate, (shapes, samples, values)))


def fit(s, z, value):
    """Coefficients [ORDER, DEGREE + 1] and the largest relative error, by reweighted least squares."""
    log_ratio = np.log(z / s)
    limit = np.where(np.abs(log_ratio) < 1e-6, 1 - log_ratio / 2, log_ratio / np.expm1(log_ratio))
    t = np.tanh(log_ratio / WIDTH)
    basis = np.stack([t**i / s ** (j + 1) for j in range(ORDER) for i in range(DEGREE + 1)], 1)
    weights, best = 1 / value, (np.inf, None)
    for _ in range(200):
        size = np.abs(basis * weights[:, None]).max(0)
        solution = np.linalg.lstsq(basis * weights[:, None] / size, (value - limit) * weights, rcond=1e-13)[0] / size
        error = np.abs(basis @ solution + limit - value) / value
        best = min(best, (error.max(), solution.reshape(ORDER, DEGREE + 1)), key=lambda pair: pair[0])
        weights = weights * np.sqrt(0.5 + 2 * (error / error.max()) ** 2)
        weights *= (1 / value).mean() / weights.mean()
    return best[1], best[0]


def main():
    s, z, value = grid()
    coefficients, error = fit(s, z, value)
    print(np.array2string(coefficients, precision=8, floatmode="fixed", separator=", "))
    print(f"largest relative error {error:.2e}")
    builtin = torch._standard_gamma_grad(torch.tensor(s), torch.tensor(z)).numpy() / z * s
    print(f"torch._standard_gamma_grad {np.abs(builtin / value - 1).max():.2e}")


if __name__ == "__main__":
    main()
