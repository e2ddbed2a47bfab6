"""Noticing that a run is lost, and going back to where it was not."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

_WINDOW = 16
_LOST_SHARE = 0.5  # of the improvement so far
_SCATTER = 5.0  # standard errors of the recent mean: the best mean is the lowest of many


class LossWatch:
    """The mean of the last losses against the first and the best.

    A run is lost when its loss is not finite, or when the recent mean has given back half of the best improvement, or rose by half of the
    first loss where nothing has improved yet; in each case beyond the scatter of the losses.

    Attributes:
        first: mean of the first window; NaN before it is full.
        best: lowest recent mean so far.
    """

    def __init__(self) -> None:
        self.first, self.best = math.nan, math.inf
        self._broken = False
        self._recent: deque[float] = deque(maxlen=_WINDOW)

    def add(self, loss: float) -> None:
        """One step's loss; one that is not finite counts only while it is the last (a gradient scaler may skip such a step)."""
        self._broken = not math.isfinite(loss)
        if self._broken:
            return
        self._recent.append(loss)
        if len(self._recent) == _WINDOW:
            if math.isnan(self.first):
                self.first = self.mean
            self.best = min(self.best, self.mean)

    @property
    def mean(self) -> float:
        """Of the recent losses; NaN without any."""
        return sum(self._recent) / len(self._recent) if self._recent else math.nan

    @property
    def is_lost(self) -> bool:
        """Whether the run should go back."""
        if self._broken:
            return True
        if len(self._recent) < _WINDOW or math.isnan(self.first):
            return False
        if math.isinf(self.best):
            return False
        slack = max(_LOST_SHARE * (self.first - self.best), 0.0 if self.best < 0.9 * self.first else 0.5 * abs(self.first))
        return self.mean > self.best + max(slack, _SCATTER * statistics.stdev(self._recent) / math.sqrt(_WINDOW))

    @property
    def is_good(self) -> bool:
        """Whether the recent mean is near the best, or nothing is known yet: a place worth coming back to."""
        if self._broken or not self._recent:
            return False
        return math.isnan(self.first) or (math.isfinite(self.best) and self.mean <= self.best + 0.1 * abs(self.best))

    def forget(self) -> None:
        """The recent losses no longer count."""
        self._recent.clear()
        self._broken = False

    def come_back(self) -> None:
        """After going back: what is best is seen anew, so that a level that was not reached by training is given up."""
        self.forget()
        self.best = math.inf

    def restart(self) -> None:
        """The losses to come are of another kind."""
        self.come_back()
        self.first = math.nan

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"first": self.first, "best": self.best, "recent": list(self._recent), "broken": self._broken}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from saved numbers."""
        self.first, self.best, self._broken = float(state["first"]), float(state["best"]), bool(state["broken"])
        self._recent = deque((float(v) for v in state["recent"]), maxlen=_WINDOW)
