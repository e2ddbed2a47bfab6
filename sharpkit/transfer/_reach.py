"""Up to which size the optimum of the smallest one is predicted to hold, from the measured drift and its interval."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from sharpkit.transfer.learning_rates import LearningRateTransfer

MOST = 8  # times the largest size measured: nothing is claimed beyond
OCTAVES = 0.5
WIDEST = 1.0  # octaves: the parabola is not trusted further
PENALTY = 0.02


@dataclass(frozen=True)
class Reach:
    """The range of sizes in which one learning rate does.

    Attributes:
        proxy: the size whose optimum it is.
        octaves: shift of the optimum that is allowed: half an octave, or what costs ``penalty`` of the loss if that is more.
        penalty: relative loss.
        value: largest size by the drift itself.
        lower: by the end of its 95 % interval that is furthest from zero: up to there with 97.5 % confidence.
        upper: by the end nearest to zero.
        measured: largest size measured.
        cap: the size beyond which nothing is claimed; values stop there.
    """

    proxy: int
    octaves: float
    penalty: float
    value: float
    lower: float
    upper: float
    measured: int
    cap: float

    def sentence(self, dimension: str) -> str:
        """In words, with the interval."""

        def shown(size: float) -> str:
            return f"at least {self.cap:.0f}" if size >= self.cap else f"{size:.0f}"

        head = f"The best rate of {dimension} {self.proxy} is predicted to stay within {self.octaves:.2g} octaves of the best one"
        below = " - less than was measured" if self.lower < self.measured else ""
        interval = f"95 % interval {shown(self.lower)} to {shown(self.upper)}{below}"
        if self.lower >= self.cap:
            interval = "the whole 95 % interval lies beyond"
        return f"{head} up to {dimension} {shown(self.value)} ({interval}); past {self.cap:.0f} nothing is claimed."

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        names = ("proxy", "octaves", "penalty", "value", "lower", "upper", "measured", "cap")
        return {name: getattr(self, name) for name in names}


def reach(rates: LearningRateTransfer, *, octaves: float = OCTAVES, penalty: float = PENALTY) -> Reach | None:
    """The drift d says: at size w the optimum has moved by d log2(w / proxy) octaves.

    Args:
        rates: measured at two sizes or more.
        octaves, penalty: a shift up to the larger of ``octaves`` and what costs ``penalty`` of the loss at the largest size, at most one
            octave, is allowed.

    Returns:
        the range; None where the drift or its interval is not known.
    """
    drift = rates.drift
    if not math.isfinite(drift.value) or not math.isfinite(drift.half_width):
        return None
    curvature = rates.optima[-1].curvature
    flat = math.sqrt(math.log1p(penalty) / curvature) if curvature > 0 else 0.0
    allowed = max(octaves, min(flat, WIDEST))
    first, last = rates.sizes[0], rates.sizes[-1]
    cap = float(MOST * last)
    low, high = drift.interval
    least = 0.0 if low <= 0 <= high else min(abs(low), abs(high))

    def size(slope: float) -> float:
        doublings = allowed / abs(slope) if slope else math.inf
        return min(first * math.exp2(min(doublings, 64.0)), cap)

    return Reach(first, allowed, penalty, size(drift.value), size(max(abs(low), abs(high))), size(least), last, cap)
