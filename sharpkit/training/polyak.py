"""Polyak's pair of learning rate and momentum for a quadratic whose curvature lies between two ends."""

from __future__ import annotations

import math


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
