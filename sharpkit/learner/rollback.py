"""Noticing that a run is lost, and going back to where it was not."""

from __future__ import annotations

import math
import statistics
from collections import deque

import torch
from torch import nn

from sharpkit._results import State
from sharpkit.training_run import Snapshot

# In experiments/learner_robust.py none of 60 runs, all of which trained well, was taken for lost.
_WINDOW = 16  # losses whose mean is the present level; by judgement
_LOST_SHARE = 0.5  # of the improvement so far; by judgement
_SCATTER = 5.0  # standard errors of the recent mean: many, since the best mean is the lowest of many; by judgement
_BEGINNING, _SUDDEN = 4, 5  # losses whose mean is the start, and whose median tells of a sudden end: by judgement
_BLOWN, _BLOWN_EARLY = 3.0, 10.0  # times the first loss, once it is known and before; by judgement
_NEAR_WON = 0.25  # of the improvement so far, by judgement: half of it is lost
_NEAR_BEST, _WITHIN = 0.1, 2.0  # of the best mean, and standard errors of the recent one: a good mean is near it; by judgement
_KEEP_EVERY = 16  # steps between two points to go back to, by judgement: a copy costs less than a step, and little is lost by going back


def tells_of_return(reason: str) -> bool:
    """Whether the reason of a decision is that of going back to an earlier point."""
    return reason.startswith(("the loss rose", "the loss was", "the held-out loss"))


class LossWatch(State, saved=("first", "best", "broken", "recent=_recent", "beginning=_beginning")):
    """The mean of the last losses against the first and the best.

    A run is lost when its loss is not finite; when the recent mean has given back half of the best improvement, or rose by half of the
    first loss where nothing has improved yet, beyond the scatter of the losses; or when most of the last five are far above the first, as
    the scatter of a run that blows up is as large as its losses.

    Attributes:
        first: mean of the first window, or of its first four losses if that is higher; NaN before the window is full.
        best: lowest recent mean so far.
        broken: the last loss, with its step, if it was not finite.
    """

    broken: tuple[int, float] | None

    def __init__(self) -> None:
        self.first, self.best = math.nan, math.inf
        self.broken = None
        self._recent: deque[float] = deque(maxlen=_WINDOW)
        self._beginning: list[float] = []  # the first losses, before a fast run has fallen

    def add(self, loss: float, *, step: int = 0) -> None:
        """One step's loss; one that is not finite counts only while it is the last (a gradient scaler may skip such a step)."""
        self.broken = None if math.isfinite(loss) else self.broken or (step, loss)
        if self.broken is not None:
            return
        self._recent.append(loss)
        if len(self._beginning) < _BEGINNING:
            self._beginning.append(loss)
        if len(self._recent) == _WINDOW:
            if math.isnan(self.first):
                self.first = max(self.mean, self.start)
            self.best = min(self.best, self.mean)

    @property
    def start(self) -> float:
        """Mean of the first four losses; NaN before there is one."""
        return sum(self._beginning) / len(self._beginning) if self._beginning else math.nan

    @property
    def mean(self) -> float:
        """Mean of the recent losses; NaN if there are none."""
        return sum(self._recent) / len(self._recent) if self._recent else math.nan

    @property
    def is_lost(self) -> bool:
        """Whether the run should go back."""
        if self.broken is not None or self._has_blown_up:
            return True
        if len(self._recent) < _WINDOW or math.isnan(self.first) or math.isinf(self.best):
            return False
        # a run that has hardly improved has little to lose: there half of the first loss counts
        slack = max(_LOST_SHARE * (self.first - self.best), 0.0 if self.best < 0.9 * self.first else 0.5 * abs(self.first))
        return self.mean > self.best + max(slack, _SCATTER * self._error)

    @property
    def _has_blown_up(self) -> bool:
        """Most of the last five losses are far above the first ones; further where few are known to tell how much they vary."""
        last, unknown = list(self._recent)[-_SUDDEN:], math.isnan(self.first)
        level = _BLOWN_EARLY * self.start if unknown else _BLOWN * self.first
        return len(last) == _SUDDEN and statistics.median(last) > level > 0

    @property
    def _error(self) -> float:
        """Standard error of the recent mean; 0 for a single loss."""
        return statistics.stdev(self._recent) / math.sqrt(len(self._recent)) if len(self._recent) > 1 else 0.0

    @property
    def is_good(self) -> bool:
        """Whether the recent mean is near the best, or nothing is known yet: a point worth going back to."""
        return self.broken is None and self.was_good

    @property
    def was_good(self) -> bool:
        """The same of the last finite losses: what follows suddenly is the data's fault rather than the rate's."""
        if not self._recent:
            return False
        if math.isnan(self.first):
            return True
        # where losses blow up their scatter does too: near is no further than a share of what has been won
        near = max(_NEAR_BEST * abs(self.best), min(_WITHIN * self._error, _NEAR_WON * max(self.first - self.best, 0.0)))
        return math.isfinite(self.best) and self.mean <= self.best + near

    def forget(self) -> None:
        """Drop the recent losses: they no longer count."""
        self._recent.clear()
        self.broken = None

    def come_back(self) -> None:
        """After going back, find the best level anew: one that was never reached again would make every later mean count as lost."""
        self.forget()
        self.best = math.inf

    def restart(self) -> None:
        """Begin anew: the losses to come are not comparable, as after a change of the batch size."""
        self.come_back()
        self.first = math.nan
        self._beginning = []


class GoodPoints(State, saved=("step", "rate", "point=_point", "next_step=_next_step", "next_rate=_next_rate", "next=_next")):
    """The last good point, by steps, and a newer one that the losses after it have still to confirm: a step may spoil what it starts from.

    Attributes:
        step: optimizer steps done at the good point; -1 without one.
        rate: the learned rate there.
    """

    _point: Snapshot | None
    _next: Snapshot | None

    def __init__(self) -> None:
        self.step, self.rate, self._point = -1, 0.0, None
        self._next_step, self._next_rate, self._next = -1, 0.0, None

    def keep(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, step: int, rate: float) -> None:
        """Take this point as good: it was measured."""
        self.step, self.rate, self._point, self._next = step, rate, Snapshot(model, optimizer), None

    def advance(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, step: int, rate: float, good: bool) -> None:
        """Confirm the point taken last by the losses since, which were ``good`` or not, and take another if it is time."""
        if good and self._next is not None:
            self.step, self.rate, self._point = self._next_step, self._next_rate, self._next
        self._next = None
        if good and step - self.step >= _KEEP_EVERY:
            self._next_step, self._next_rate, self._next = step, rate, Snapshot(model, optimizer)

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
        """Go back to the good point; False without one."""
        self._next = None
        if self._point is not None:
            self._point.restore(model, optimizer)
        return self._point is not None
