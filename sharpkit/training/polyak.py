"""Polyak's pair of learning rate and momentum for a quadratic whose curvature lies between two ends, and how its lower end is read."""

from __future__ import annotations

import math
from collections.abc import Sequence

BULKS = ("median", "weighted median", "mean")


def polyak_pair(largest: float, smallest: float) -> tuple[float, float]:
    """eta = 4 / (sqrt L + sqrt mu)^2 and beta = ((sqrt L - sqrt mu) / (sqrt L + sqrt mu))^2.

    The best rate of heavy ball on a deterministic quadratic with curvature in [mu, L]; gradient noise makes it too bold.

    Args:
        largest: L > 0.
        smallest: mu, taken as 0 where negative.

    Raises:
        ValueError: L is not positive, or less than mu.

    Example:
        >>> polyak_pair(1.0, 1.0), [round(v, 3) for v in polyak_pair(100.0, 1.0)]
        ((1.0, 0.0), [0.033, 0.669])

    References:
        Polyak, "Some methods of speeding up the convergence of iteration methods" (1964).
    """
    if not 0 < largest < math.inf or smallest > largest:
        raise ValueError(f"the largest curvature must be positive and not below the smallest, got {largest} and {smallest}")
    a, b = math.sqrt(largest), math.sqrt(max(smallest, 0.0))
    return 4 / (a + b) ** 2, ((a - b) / (a + b)) ** 2


def bulk_curvature(nodes: Sequence[float], weights: Sequence[float], largest: float, reading: str | float) -> float | None:
    """mu, the lower end of the curvature that counts, from a quadrature of the spectral density.

    Args:
        nodes, weights: Ritz values of a random probe, and the share of directions that each stands for.
        largest: L.
        reading: ``"median"`` of the positive nodes; ``"weighted median"`` and ``"mean"`` of positive curvature by weight; or the condition
            number kappa: mu = L / kappa.

    Returns:
        mu in (0, L]; None without positive curvature.

    Example:
        >>> [bulk_curvature([-1.0, 0.1, 2.0, 9.0], [0.1, 0.7, 0.15, 0.05], 9.0, r) for r in ("median", "weighted median", 90.0)]
        [2.0, 0.1, 0.1]
    """
    positive = sorted((node, weight) for node, weight in zip(nodes, weights, strict=True) if node > 0 and weight > 1e-12)
    if not positive or largest <= 0:
        return None
    if not isinstance(reading, str):
        return largest / reading
    total = sum(weight for _, weight in positive)
    if reading == "mean":
        found = sum(node * weight for node, weight in positive) / total
    elif reading == "weighted median":
        passed, found = 0.0, positive[-1][0]
        for node, weight in positive:
            passed += weight
            if passed >= total / 2:
                found = node
                break
    else:
        found = positive[(len(positive) - 1) // 2][0]
    return min(found, largest)
