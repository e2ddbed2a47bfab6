"""A number with the interval it lies in."""

from __future__ import annotations

import math
from typing import Any, Self


class Bounded(float):
    """A number (usable as a plain float) with a 95 % interval.

    Attributes:
        lower, upper: the interval.
    """

    lower: float
    upper: float

    def __new__(cls, value: float, lower: float, upper: float) -> Self:
        self = super().__new__(cls, value)
        self.lower, self.upper = lower, upper
        return self

    @property
    def value(self) -> float:
        """The plain number."""
        return float(self)

    def __reduce__(self) -> tuple[type[float], tuple[float]]:
        return (float, (float(self),))  # a checkpoint that holds it must load anywhere

    def __str__(self) -> str:
        if math.isinf(self):
            return "unbounded"
        return f"{float(self):.3g} ({self.lower:.3g}-{self.upper:.3g})"

    def __repr__(self) -> str:
        return f"Bounded({self})"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"value": float(self), "lower": self.lower, "upper": self.upper}
