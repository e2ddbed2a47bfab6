"""Noticing that a run is lost, and going back to where it was not."""

from __future__ import annotations

import math
import statistics
from collections import deque

from sharpkit._results import State

# In experiments/learner_robust.py none of 60 runs, all of which trained well, was taken for lost.
_WINDOW = 16  # losses whose mean is the present level; by judgement
_LOST_SHARE = 0.5  # of the improvement so far; by judgement
_SCATTER = 5.0  # standard errors of the recent mean: many, since the best mean is the lowest of many; by judgement
_NEAR_BEST = 0.1  # of the best mean; by judgement


class LossWatch(State, saved=("first", "best", "recent=_recent", "broken=_broken")):
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
        """Mean of the recent losses; NaN if there are none."""
        return sum(self._recent) / len(self._recent) if self._recent else math.nan

    @property
    def is_lost(self) -> bool:
        """Whether the run should go back."""
        if self._broken:
            return True
        if len(self._recent) < _WINDOW or math.isnan(self.first) or math.isinf(self.best):
            return False
        # a run that has hardly improved has little to lose: there half of the first loss counts
        slack = max(_LOST_SHARE * (self.first - self.best), 0.0 if self.best < 0.9 * self.first else 0.5 * abs(self.first))
        return self.mean > self.best + max(slack, _SCATTER * statistics.stdev(self._recent) / math.sqrt(_WINDOW))

    @property
    def is_good(self) -> bool:
        """Whether the recent mean is near the best, or nothing is known yet: a point worth going back to."""
        if self._broken or not self._recent:
            return False
        return math.isnan(self.first) or (math.isfinite(self.best) and self.mean <= self.best + _NEAR_BEST * abs(self.best))

    def forget(self) -> None:
        """Drop the recent losses: they no longer count."""
        self._recent.clear()
        self._broken = False

    def come_back(self) -> None:
        """After going back, find the best level anew: one that was never reached again would make every later mean count as lost."""
        self.forget()
        self.best = math.inf

    def restart(self) -> None:
        """Begin anew: the losses to come are not comparable, as after a change of the batch size."""
        self.come_back()
        self.first = math.nan
