"""When to measure: the share of training time that measuring may take, kept account of and kept to."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

_PAUSE = 5.0  # a gap of so many typical steps is a pause (validation, a checkpoint) and counts as one step
_RECENT = 32
_REFRESH = 8


@dataclass
class Stopwatch:
    """Time spent training and time spent measuring, from the gaps between the monitor's calls.

    Attributes:
        training: seconds of training steps; a pause counts as a typical step.
        measuring: seconds inside the monitor.
    """

    training: float = 0.0
    measuring: float = 0.0
    _gaps: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT))
    _left: float | None = None
    _typical: float = math.nan
    _since: int = 0

    entered: float = 0.0

    def mark(self) -> float:
        """The time."""
        return time.perf_counter()

    def enter(self) -> float:
        """The monitor is called; returns the time."""
        now = self.entered = time.perf_counter()
        if self._left is not None:
            gap = now - self._left
            self._gaps.append(gap)
            self._since += 1
            if self._since >= _REFRESH or math.isnan(self._typical):  # the median is too slow for every step
                self._typical, self._since = statistics.median(self._gaps), 0
            self.training += min(gap, _PAUSE * self._typical)
        return now

    def enter_again(self, entered: float) -> None:
        """After waiting for the device to finish the training step: that was training."""
        self.entered = time.perf_counter()
        self.training += self.entered - entered

    def leave(self) -> None:
        """The monitor returns."""
        self._left = time.perf_counter()
        self.measuring += self._left - self.entered

    @property
    def step_seconds(self) -> float:
        """Of a typical recent training step; NaN before the first."""
        return self._typical

    @property
    def overhead(self) -> float:
        """Time measuring over time training; NaN before the first step was timed."""
        return self.overhead_with(0.0)

    def overhead_with(self, seconds: float) -> float:
        """The same once so many seconds of measuring more have been counted."""
        return (self.measuring + seconds) / self.training if self._gaps else math.nan

    def state_dict(self) -> dict[str, Any]:
        """Totals; the time between two processes is not training."""
        return {"training": self.training, "measuring": self.measuring, "gaps": list(self._gaps)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from saved totals."""
        self.training, self.measuring, self._left = float(state["training"]), float(state["measuring"]), None
        self._gaps = deque((float(g) for g in state["gaps"]), maxlen=_RECENT)
        self._typical = statistics.median(self._gaps) if self._gaps else math.nan


@dataclass
class Account:
    """What one metric may spend and has spent.

    Attributes:
        share: of training time.
        spent: seconds so far.
        forecast: seconds that the next measurement will take; the larger of the last two, so that a dear one is not forgotten at once.
    """

    share: float
    spent: float = 0.0
    forecast: float = math.nan
    _last: float = math.nan

    def pay(self, seconds: float, *, typical: bool = True) -> None:
        """Charge a measurement.

        Args:
            seconds: what it took.
            typical: whether the next will be like it (a cold start is not).
        """
        self.spent += seconds
        if typical:
            self.forecast = seconds if math.isnan(self._last) else max(seconds, self._last)
            self._last = seconds

    def allows(self, training: float) -> bool:
        """Whether the next measurement fits after so many seconds of training."""
        return not self.spent + self.forecast > self.share * training

    def steps_until(self, training: float, step_seconds: float) -> int:
        """Training steps until the next measurement fits, at least 1."""
        missing = (self.spent + self.forecast) / self.share - training
        return max(1, math.ceil(missing / step_seconds)) if step_seconds > 0 else 1

    def state_dict(self) -> dict[str, Any]:
        """What was spent and is forecast."""
        return {"spent": self.spent, "forecast": self.forecast, "last": self._last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved account."""
        self.spent, self.forecast, self._last = (float(state[name]) for name in ("spent", "forecast", "last"))
