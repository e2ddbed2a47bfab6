"""Events that show in the curvature: sharpening, the edge of stability, oscillation about the limit, staying above it.

Each detector sees every curvature reading, answers with a sentence when its event begins, and is silent until that episode is over.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean
from typing import ClassVar

from sharpkit._run_schema import Reading, in_words
from sharpkit.linalg.results import format_with_error
from sharpkit.training._windows import Readings


def blows_up(losses: Sequence[float]) -> bool:
    """Whether losses run away: they end well above where they began, or every one is above the one before.

    Args:
        losses: in the order of time; fewer than three never do.

    Example:
        >>> blows_up([1.0, 1.1, 1.2, 1.3, 1.4]), blows_up([1.0, 1.1, 0.9, 1.2, 0.8])
        (True, False)
    """
    finite = [loss for loss in losses if math.isfinite(loss)]
    if len(finite) < 3:
        return False
    start = max(finite[: max(1, len(finite) // 3)])
    return finite[-1] > start + 0.5 * abs(start) or all(b > a for a, b in pairwise(finite))


@dataclass
class ProgressiveSharpening:
    """The curvature rose by half or more, beyond its errors and its scatter, while it is below the limit.

    It is compared with the lowest level since the last episode, three readings each, so a slow rise counts as well as a fast one.
    """

    kind: ClassVar[str] = "progressive_sharpening"
    factor: ClassVar[float] = 1.5
    num_errors: ClassVar[float] = 4.0  # standard errors of the difference; the lowest of many noisy levels lies about three below

    low: float = math.inf
    low_error: float = math.inf
    low_step: int = -1
    age: int = 0  # readings since the lowest level
    peak: float = -math.inf
    active: bool = False

    def on_reading(self, name: str, readings: Readings) -> str | None:
        smooth = readings.smooth()
        if smooth is None:
            return None
        (value, error), last = smooth, readings.last(3)
        self.age += 1
        if self.active:
            self.peak = max(self.peak, value)
            if value + error < self.peak / self.factor:
                self.active, self.low = False, math.inf
        if value < self.low:
            self.low, self.low_error, self.low_step, self.age = value, error, last[1].step, 0
        if self.active or self.age < 3 or value >= last[-1].limit:
            return None
        clear = value - self.low > self.num_errors * math.hypot(error, max(error, self.low_error))
        if not clear or self.low <= 0 or value < self.factor * self.low:
            return None
        self.active, self.peak = True, value
        return self._text(name, value, error, last)

    def _text(self, name: str, value: float, error: float, last: list[Reading]) -> str:
        limit = last[-1].limit
        below = f", still below the limit {limit:.4g}" if math.isfinite(limit) else ""
        return (
            f"Progressive sharpening: {in_words(name)} rose from {format_with_error(self.low, self.low_error)} (step {self.low_step}) to "
            f"{format_with_error(value, error)} (step {last[1].step}), a factor of {value / self.low:.2g}{below}."
        )


@dataclass
class EdgeOfStability:
    """The curvature has stayed near the limit over five readings, known well enough to say so, and the loss does not run away."""

    kind: ClassVar[str] = "edge_of_stability"
    count: ClassVar[int] = 5
    band: ClassVar[tuple[float, float]] = (0.9, 1.15)
    released: ClassVar[tuple[float, float]] = (0.8, 1.3)

    active: bool = False

    def on_reading(self, name: str, readings: Readings) -> str | None:
        last = [r for r in readings.last(self.count) if math.isfinite(r.ratio)]
        if len(last) < self.count:
            return None
        mean = fmean(r.ratio for r in last)
        if self.active:
            self.active = self.released[0] <= mean <= self.released[1]
            return None
        error = math.sqrt(sum(r.ratio_error**2 for r in last)) / len(last)
        low, high = self.band
        near = all(low - r.ratio_error <= r.ratio <= high + r.ratio_error for r in last)
        if not (near and low <= mean <= high and error <= 0.05) or blows_up([r.loss for r in last]):
            return None
        self.active = True
        return (
            f"Edge of stability: over {len(last)} measurements, steps {last[0].step} to {last[-1].step}, {in_words(name)} has stayed at "
            f"{mean:.2f} +- {max(error, 0.01):.1g} of the limit, now {last[-1].limit:.4g}."
        )


@dataclass
class SelfStabilisation:
    """The curvature crosses the limit again and again, both ways and beyond its errors, while the loss does not run away."""

    kind: ClassVar[str] = "self_stabilisation"
    count: ClassVar[int] = 4
    memory: ClassVar[int] = 128  # readings within which they must come
    margin: ClassVar[float] = 0.01
    num_errors: ClassVar[float] = 3.0  # four times in turn by chance: below one in a million records

    side: int = 0
    crossings: list[list[float]] = field(default_factory=list)  # (readings since, step, loss, lowest and highest limit on the way)
    limits: list[float] = field(default_factory=list)  # lowest and highest since the last one
    active: bool = False

    def on_reading(self, name: str, readings: Readings) -> str | None:
        last = readings.last(1)[0]
        above = last.is_above(1 + self.margin, num_errors=self.num_errors)
        below = last.is_below(1 - self.margin, num_errors=self.num_errors)
        side = 1 if above else -1 if below else self.side
        self.limits = [min([last.limit, *self.limits]), max([last.limit, *self.limits])]
        self.crossings = [[age + 1, *rest] for age, *rest in self.crossings if age + 1 < self.memory]
        if side * self.side < 0:
            self.crossings = [*self.crossings[1 - self.count :], [0, last.step, last.loss, *self.limits]]
            self.limits = []
        self.side = side
        if self.active or len(self.crossings) < self.count:
            self.active = self.active and bool(self.crossings)
            return None
        _, steps, losses, lowest, highest = zip(*self.crossings, strict=True)
        if max(highest) > 1.2 * min(lowest) or blows_up([*losses, last.loss]):
            return None  # a schedule moved the limit, or training is leaving
        self.active = True
        loss = f", while the loss went from {losses[0]:.4g} to {last.loss:.4g}" if math.isfinite(losses[0] + last.loss) else ""
        return (
            f"Self-stabilisation: {in_words(name)} crossed the limit, {last.limit:.4g}, {len(steps)} times, up and down in turn, between "
            f"steps {steps[0]} and {steps[-1]}{loss}; it is {format_with_error(last.value, last.stderr)} now."
        )


@dataclass
class LimitCrossed:
    """The curvature is above the limit by more than twice its error and its scatter, for several readings on end."""

    kind: ClassVar[str] = "limit_crossed"
    count: ClassVar[int] = 3
    released: ClassVar[float] = 0.95

    above: int = 0
    below: int = 0
    since: int = -1
    active: bool = False

    def on_reading(self, name: str, readings: Readings) -> str | None:
        last = readings.last(1)[0]
        error = max(last.stderr, readings.scatter()) if last.value > last.limit else last.stderr
        self.below = self.below + 1 if last.value < self.released * last.limit else 0
        self.active = self.active and self.below < self.count
        if not last._replace(stderr=error).is_above():
            self.above = 0
            return None
        self.above += 1
        self.since = last.step if self.above == 1 else self.since
        if self.active or self.above < self.count:
            return None
        self.active = True
        return (
            f"Limit crossed: {in_words(name)} has been above the limit for {self.above} measurements, {last.step - self.since} steps from "
            f"step {self.since} on; it is {format_with_error(last.value, last.stderr)} against {last.limit:.4g}."
        )
