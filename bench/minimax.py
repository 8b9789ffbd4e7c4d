"""Where the coefficients of the kernels' polynomials come from: ``python -m bench.minimax``.

Each is the polynomial of least maximal relative error, by Lawson's algorithm: least squares at
Chebyshev points whose weights grow where the error is large.
"""

import math

import numpy as np
import torch


def minimax(f, degree, low, high, points=4000, steps=200):
    """Coefficients of `f` on [low, high], the highest power first, and the relative error."""
    z = np.cos(np.pi * (np.arange(points) + 0.5) / points)
    exact = f((low + high) / 2 + (high - low) / 2 * z)
    basis = np.polynomial.chebyshev.chebvander(z, degree)
    weights = np.full(points, 1 / points)
    for _ in range(steps):
        root = np.sqrt(weights)
        series = np.linalg.lstsq(basis * (root / exact)[:, None], root, rcond=None)[0]
        error = np.abs(basis @ series / exact - 1)
        weights *= error
        weights /= weights.sum()
    fitted = np.polynomial.chebyshev.Chebyshev(series, [low, high])
    return fitted.convert(kind=np.polynomial.Polynomial).coef[::-1], error.max()


def normal_cdf(degree, c, center=0.25, furthest=13.2):
    """P(y) = Phi(-t) exp(t^2 / 2) for y = 1 / (t + c) - center, t from 0 to `furthest`."""

    def f(y):
        t = torch.from_numpy(1 / (y + center) - c)
        return torch.special.erfcx(t / math.sqrt(2)).numpy() / 2

    return minimax(f, degree, 1 / (furthest + c) - center, 1 / c - center)


def power(degree):
    """e^(-x / 2) for x from -ln 2 to ln 2."""
    return minimax(lambda x: np.exp(-x / 2), degree, -math.log(2), math.log(2))


if __name__ == "__main__":
    for name, (coefficients, error) in {
        "normal_cdf, float32: c = 2.5, degree 8": normal_cdf(8, 2.5),
        "normal_cdf, halves: c = 2.75, degree 5": normal_cdf(5, 2.75),
        "e^(-x/2), float32: degree 6": power(6),
        "e^(-x/2), halves: degree 4": power(4),
    }.items():
        numbers = ", ".join(f"{x:.9e}f" for x in coefficients)
        print(f"{name}, error {error:.1e}\n  {numbers}")
