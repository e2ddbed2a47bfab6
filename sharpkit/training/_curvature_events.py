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
from sharpkit.training._windows import MAX_READINGS, Readings


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
            f"{format_with_error(mean, error)} of the limit, now {last[-1].limit:.4g}."
        )


@dataclass
class SelfStabilisation:
    """The curvature crosses the limit again and again, both ways and beyond its errors, while the loss does not run away."""

    kind: ClassVar[str] = "self_stabilisation"
    count: ClassVar[int] = 4
    margin: ClassVar[float] = 0.01

    side: int = 0
    crossings: list[int] = field(default_factory=list)  # steps, the last few
    ages: list[int] = field(default_factory=list)  # readings since each
    active: bool = False

    def on_reading(self, name: str, readings: Readings) -> str | None:
        last = readings.last(1)[0]
        side = 1 if last.is_above(1 + self.margin) else -1 if last.is_below(1 - self.margin) else self.side
        self.ages = [age + 1 for age in self.ages]
        if side * self.side < 0:
            self.crossings.append(last.step)
            self.ages.append(0)
        self.side = side
        recent = sum(age < MAX_READINGS for age in self.ages)
        self.crossings, self.ages = self.crossings[-recent:] if recent else [], self.ages[-recent:] if recent else []
        if self.active or recent < self.count:
            self.active = self.active and recent > 0
            return None
        while_crossing = [r for r in readings.items if r.step >= self.crossings[0] and r.limit > 0]
        limits = [r.limit for r in while_crossing]
        if max(limits) > 1.2 * min(limits) or blows_up([r.loss for r in while_crossing]):
            return None  # a schedule moved the limit, or training is leaving
        self.active = True
        ratios = [r.ratio for r in while_crossing]
        return (
            f"Self-stabilisation: {in_words(name)} crossed the limit {last.limit:.4g} {recent} times, up and down in turn, between steps "
            f"{self.crossings[0]} and {last.step}, and stayed at {min(ratios):.2f} to {max(ratios):.2f} of it{_loss_words(while_crossing)}."
        )


def _loss_words(readings: list[Reading]) -> str:
    losses = [r.loss for r in readings if math.isfinite(r.loss)]
    return f", while the loss went from {losses[0]:.4g} to {losses[-1]:.4g}" if len(losses) > 1 else ""


@dataclass
class LimitCrossed:
    """The curvature is above the limit by more than twice its error, for several readings on end."""

    kind: ClassVar[str] = "limit_crossed"
    count: ClassVar[int] = 3
    released: ClassVar[float] = 0.95

    above: int = 0
    since: int = -1
    active: bool = False

    def on_reading(self, name: str, readings: Readings) -> str | None:
        last = readings.last(1)[0]
        if not last.is_above():
            self.above = 0
            self.active = self.active and not last.value < self.released * last.limit
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
