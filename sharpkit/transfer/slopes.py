"""How a quantity grows with width: the slope of its logarithm against the logarithm of the width, with a standard error."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sharpkit._json import number


@dataclass(frozen=True)
class Slope:
    """The exponent a in size ~ width^a, fitted over widths and seeds.

    Attributes:
        value: a.
        stderr: its standard error, from the scatter about the line.
        half_width: half of the 95 % interval (Student's t).
        num_points: values that entered.
    """

    value: float
    stderr: float
    half_width: float
    num_points: int

    @property
    def interval(self) -> tuple[float, float]:
        """95 %."""
        return self.value - self.half_width, self.value + self.half_width

    def contains(self, value: float) -> bool:
        """Whether a value lies within the 95 % interval."""
        return abs(self.value - value) <= self.half_width

    def __str__(self) -> str:
        return f"{self.value:+.2f} +- {self.stderr:.2f}" if math.isfinite(self.value) else "unknown"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready but for NaN."""
        return {"value": self.value, "stderr": self.stderr, "half_width": self.half_width, "num_points": self.num_points}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Slope:
        """Back from :meth:`to_dict`, also after JSON."""
        value, stderr, half_width = (number(document[key]) for key in ("value", "stderr", "half_width"))
        return cls(value, stderr, half_width, int(document["num_points"]))


def log_slope(sizes: Mapping[int, Sequence[float]]) -> Slope:
    """Fit log size = c + a log width by least squares.

    Where every width has several seeds, the standard error is the larger of the one from the scatter about the line and the one from the
    scatter between seeds: a bent curve is not a precise slope.

    Args:
        sizes: width -> one value per seed, each positive; zeros, NaN and infinities are left out.

    Returns:
        the slope; NaN with infinite errors where fewer than two widths have a value.

    Example:
        >>> str(log_slope({64: [1.0, 1.0], 128: [2.0, 2.0], 256: [4.0, 4.0]}))
        '+1.00 +- 0.00'
    """
    points = [(math.log(w), math.log(v)) for w, values in sizes.items() for v in values if math.isfinite(v) and v > 0]
    x, y = np.array([p[0] for p in points]), np.array([p[1] for p in points])
    if len(set(x.tolist())) < 2:
        return Slope(math.nan, math.inf, math.inf, len(points))
    centred = x - x.mean()
    spread = float((centred**2).sum())
    value = float((centred * y).sum() / spread)
    residuals = y - y.mean() - value * centred
    freedom = len(points) - 2
    if freedom < 1:
        return Slope(value, math.inf, math.inf, len(points))
    stderr = math.sqrt(float((residuals**2).sum()) / freedom / spread)
    means = {float(w): y[x == w].mean() for w in set(x.tolist())}
    if len(means) >= 3 and len(points) > len(means):
        stderr = max(stderr, _of_means(means))
    from scipy.stats import t

    return Slope(value, stderr, float(t.ppf(0.975, freedom)) * stderr, len(points))


def _of_means(means: Mapping[float, float]) -> float:
    """Standard error of the slope from the widths' means alone."""
    x, y = np.array(list(means)), np.array(list(means.values()))
    centred = x - x.mean()
    spread = float((centred**2).sum())
    residuals = y - y.mean() - float((centred * y).sum() / spread) * centred
    return math.sqrt(float((residuals**2).sum()) / (len(x) - 2) / spread)
