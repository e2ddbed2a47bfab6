"""How a random perturbation moves a spectrum: bulk edges and outliers of batch matrices, additive and sample-covariance models."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from sharpkit.batch_size.curvature import Floats


def semicircle_edge(radius: ArrayLike) -> Floats:
    """Upper edge 2 r of the bulk of symmetric noise with independent entries, r^2 = n sigma^2 / b (Wigner).

    Example:
        >>> float(semicircle_edge(2.0))
        4.0
    """
    return np.asarray(2 * np.asarray(radius, dtype=np.float64))


def additive_overlap(eigenvalue: ArrayLike, radius: ArrayLike) -> Floats:
    """Squared overlap of the perturbed and the true eigenvector: 1 - r^2 / lambda^2 above the transition, 0 below.

    Example:
        >>> float(additive_overlap(4.0, 2.0)), float(additive_overlap(1.0, 2.0))
        (0.75, 0.0)
    """
    lam, r = np.broadcast_arrays(np.asarray(eigenvalue, dtype=np.float64), np.asarray(radius, dtype=np.float64))
    return np.where(np.abs(lam) > r, 1 - (r / np.where(lam == 0, 1.0, lam)) ** 2, 0.0)


def additive_inverse(seen: ArrayLike, radius: ArrayLike) -> Floats:
    """The eigenvalue behind one seen as an outlier, lambda = (seen + sqrt(seen^2 - 4 r^2)) / 2.

    Inside the bulk no eigenvalue can be read off: nan. With r^2 = n sigma^2 / N it leads from the empirical to the true Hessian.

    Example:
        >>> float(additive_inverse(10.4, 2.0))
        10.0
    """
    value, r = np.broadcast_arrays(np.asarray(seen, dtype=np.float64), np.asarray(radius, dtype=np.float64))
    inside = np.abs(value) <= 2 * r
    root = np.sqrt(np.where(inside, 0.0, value**2 - 4 * r**2))
    return np.where(inside & (r > 0), np.nan, (value + np.sign(value) * root) / 2)


def marchenko_pastur_edges(variance: ArrayLike, ratio: ArrayLike) -> tuple[Floats, Floats]:
    """Edges tau^2 (1 -+ sqrt q)^2 of the spectrum of a sample covariance matrix, population tau^2 I, q = dimensions / samples.

    Args:
        variance: tau^2, the population eigenvalue.
        ratio: q; above 1 the lower edge is that of the non-zero eigenvalues.

    Example:
        >>> [float(edge) for edge in marchenko_pastur_edges(2.0, 0.25)]
        [0.5, 4.5]
    """
    tau2, root = np.asarray(variance, dtype=np.float64), np.sqrt(np.asarray(ratio, dtype=np.float64))
    return np.asarray(tau2 * (1 - root) ** 2), np.asarray(tau2 * (1 + root) ** 2)


def covariance_outlier(eigenvalue: ArrayLike, variance: ArrayLike, ratio: ArrayLike) -> Floats:
    """Where a population eigenvalue l above a flat bulk tau^2 appears in a sample covariance: l (1 + q tau^2 / (l - tau^2)), or the edge.

    Args:
        eigenvalue: l.
        variance: tau^2, all other population eigenvalues.
        ratio: q = dimensions / samples.

    Example:
        >>> float(covariance_outlier(3.0, 1.0, 0.5)), float(covariance_outlier(1.5, 1.0, 1.0))
        (3.75, 4.0)

    References:
        Baik, Ben Arous and Peche (2005), arXiv math/0403022; Baik and Silverstein (2006), arXiv math/0408165.
    """
    lam, tau2, q = np.broadcast_arrays(*(np.asarray(x, dtype=np.float64) for x in (eigenvalue, variance, ratio)))
    above = lam > tau2 * (1 + np.sqrt(q))
    gap = np.where(above, lam - tau2, 1.0)
    return np.asarray(np.where(above, lam * (1 + q * tau2 / gap), tau2 * (1 + np.sqrt(q)) ** 2))


def covariance_outlier_general(eigenvalue: float, others: ArrayLike, num_samples: float) -> float:
    """l (1 + (1/n) sum_j l_j / (l - l_j)) for any population spectrum below l: about l + tr(others) / n.

    Args:
        eigenvalue: l, well above the others.
        others: the remaining population eigenvalues.
        num_samples: n, independent columns: B for one output, B (C - 1) for C logits.

    Raises:
        ValueError: one of the others is not below l.

    Example:
        >>> covariance_outlier_general(3.0, [1.0] * 50, 100)
        3.75
    """
    rest = np.asarray(others, dtype=np.float64)
    if np.any(rest >= eigenvalue):
        raise ValueError("the other eigenvalues must lie below the outlier")
    return float(eigenvalue * (1 + np.sum(rest / (eigenvalue - rest)) / num_samples))
