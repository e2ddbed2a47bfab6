"""Bounded memory of a run, and robust numbers over it: what the event detectors look at."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from sharpkit._json import json_ready, number
from sharpkit._run_schema import Reading

MAX_READINGS, MAX_LOSSES = 32, 48
_TO_SIGMA = 1.4826  # median absolute deviation to standard deviation, for a normal distribution


def spread_of_differences(values: Sequence[float], *, about_trend: bool = True) -> float:
    """Standard deviation of independent scatter about a smooth course, from successive differences; 0 for fewer than five values.

    Args:
        values: in the order of time.
        about_trend: take differences about their median, so that a steady trend does not count.

    Example:
        >>> spread_of_differences([1.0, 2.0, 3.0, 4.0, 5.0])
        0.0
    """
    if len(values) < 5:
        return 0.0
    differences = [later - earlier for earlier, later in pairwise(values)]
    middle = statistics.median(differences) if about_trend else 0.0
    return _TO_SIGMA * statistics.median(abs(d - middle) for d in differences) / math.sqrt(2)


class Readings:
    """The last curvature readings, no more than ``MAX_READINGS``."""

    def __init__(self) -> None:
        self.items: deque[Reading] = deque(maxlen=MAX_READINGS)

    def add(self, reading: Reading) -> None:
        self.items.append(reading)

    def last(self, count: int) -> list[Reading]:
        """The last ``count`` readings, or fewer."""
        return list(self.items)[-count:]

    def smooth(self) -> tuple[float, float] | None:
        """Median of the last three values and the largest of their errors and the scatter in memory; None for fewer than three."""
        if len(self.items) < 3:
            return None
        last = self.last(3)
        return statistics.median(r.value for r in last), max(self.scatter(), *(r.stderr for r in last))

    def scatter(self) -> float:
        """Standard deviation of the values about their course; 0 for fewer than five."""
        return spread_of_differences([r.value for r in self.items])

    def before(self, step: int, count: int) -> list[Reading]:
        """The last ``count`` readings at or before a step."""
        return [r for r in self.items if r.step <= step][-count:]

    def state(self) -> list[Any]:
        return [json_ready(list(r)) for r in self.items]

    def load(self, state: list[Any]) -> None:
        self.items = deque((Reading(int(step), *map(number, rest)) for step, *rest in state), MAX_READINGS)


class Losses:
    """The last finite losses with their steps, no more than ``MAX_LOSSES``."""

    def __init__(self) -> None:
        self.items: deque[tuple[int, float]] = deque(maxlen=MAX_LOSSES)

    def add(self, step: int, loss: float) -> None:
        self.items.append((step, loss))

    def values(self) -> list[float]:
        return [loss for _, loss in self.items]

    def since(self, step: int) -> list[float]:
        """Losses at or after a step."""
        return [loss for at, loss in self.items if at >= step]

    def state(self) -> list[Any]:
        return [list(item) for item in self.items]

    def load(self, state: list[Any]) -> None:
        self.items = deque(((int(step), float(loss)) for step, loss in state), MAX_LOSSES)
