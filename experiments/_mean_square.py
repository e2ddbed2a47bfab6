"""The largest learning rate of SGD on noisy curvature: the mean-square condition, exact for Gaussian least squares and in short form."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq


def gaussian_limit(nodes: ArrayLike, counts: ArrayLike, batch_size: float, *, momentum: float = 0.0) -> float:
    """The exact mean-square limit of SGD with a heavy ball on Gaussian least squares, over a quadrature of the spectrum.

    The largest eta with sum_i c_i eta k lambda_i / (2 (1 + beta) - eta lambda_i (1 + k)) < 1, k = (1 + beta) / ((1 - beta) b), summed over
    the positive nodes with counts c_i: equal to the point where the second-moment map's spectral radius reaches 1.

    Args:
        nodes: eigenvalues or quadrature nodes; those not positive are left out.
        counts: how many eigenvalues each stands for.
        batch_size: b, drawn with replacement.
        momentum: beta.

    Example:
        >>> round(gaussian_limit([1.0], [1.0], 1e12), 6)
        2.0
    """
    lam, c = np.asarray(nodes, dtype=np.float64).ravel(), np.asarray(counts, dtype=np.float64).ravel()
    lam, c = lam[lam > 0], c[lam > 0]
    if len(lam) == 0:
        return math.inf
    k = (1 + momentum) / ((1 - momentum) * batch_size)
    top = 2 * (1 + momentum) / (float(lam.max()) * (1 + k))

    def excess(eta: float) -> float:
        return float(np.sum(c * eta * k * lam / (2 * (1 + momentum) - eta * lam * (1 + k)))) - 1.0

    low, high = top * 1e-12, top * (1 - 1e-12)
    if excess(high) < 0:
        return top
    return float(brentq(excess, low, high, xtol=1e-15 * top, rtol=1e-10))


def equal_norm_trace_limit(lambda_max: float, trace: float, batch_size: float) -> float:
    """2 / (tr(H) / B + (1 - 1/B) lambda_max): below it an interpolating minimum with equal-norm gradients and square loss is stable.

    With C the second moment of the error, tr C changes by -2 eta tr(HC) + eta^2 (tr(H) tr(HC) / B + (1 - 1/B) tr(H^2 C)), and
    tr(H^2 C) <= lambda_max tr(HC): so the rate is safe for every B. At B = 1, where it is 2 / tr(H), and where all curvatures are equal it
    is also the largest stable one; else stability ends later.

    References:
        Wu and Su (2023), arXiv 2305.17490, for B = 1.

    Example:
        >>> equal_norm_trace_limit(2.0, 8.0, 1), equal_norm_trace_limit(2.0, 8.0, 3)
        (0.25, 0.5)
    """
    load = trace / batch_size + (1 - 1 / batch_size) * lambda_max
    return 2 / load if load > 0 else math.inf
