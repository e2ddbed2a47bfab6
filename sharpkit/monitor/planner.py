"""When to measure, what, and on how much: every so many steps, or as often as a share of the training time allows."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from sharpkit.objective.distributed import Ranks, find_ranks

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


_PRIMARY_SHARE = 0.6  # of the budget goes to the first metric
_FIRST_LOOK = 8  # steps timed before the first plan
_SETUP_GRADIENTS = 3  # of making the first objective
# Factors on the cost of what was never measured, the main metric and others: small models pay for calls more than for arithmetic.
_FIRST_CAUTION, _CAUTION = 1.5, 2.5
_PRODUCT = 1.6  # Hessian product over training step, about
_LEAST_MATVECS = 6  # fewer leave a cold start tens of per cent off


class Planner:
    """Decides at each measurement when the next one is, so that between them a step costs nothing and all processes agree.

    Args:
        gradients: by metric, the main one first, about what one measurement costs in gradients of the batch.
        every: steps between measurements, or ``"auto"``.
        budget: share of training time.
        max_interval: steps between measurements from which on a smaller part of the batch is measured.
        process_group: as in Objective.

    Attributes:
        watch: times training and measuring.
        part: share of each batch that is measured.
    """

    def __init__(
        self, gradients: Mapping[str, float], *, every: int | str, budget: float, max_interval: int, process_group: Any = None
    ) -> None:
        self.every, self.part = every, 1.0
        self.watch = Stopwatch()
        self._gradients, self._max_interval, self._group = dict(gradients), max_interval, process_group
        self._main = next(iter(self._gradients))
        others = len(self._gradients) - 1
        first = _PRIMARY_SHARE if others else 1.0
        self._accounts = {name: Account(budget * (first if name == self._main else (1 - first) / others)) for name in self._gradients}
        self._planned = every != "auto"
        self._next = 0 if self._planned else _FIRST_LOOK

    def is_due(self, step: int) -> bool:
        """Whether something is to be done at this step."""
        return step >= self._next

    @property
    def measures(self) -> bool:
        """Whether it is a measurement that is due, rather than the first plan."""
        return self._planned

    def affords(self, name: str) -> bool:
        """Whether a metric is measured along with the main one."""
        if self.every != "auto" or name == self._main:
            return True
        account = self._accounts[name]
        if math.isnan(account.forecast):
            account.forecast = _CAUTION * self._gradients[name] * self.watch.step_seconds
        return bool(self._agree(account.allows(self.watch.training)))

    def matvecs(self, name: str) -> int | None:
        """Products that a metric's account has room for; None without a bound."""
        if self.every != "auto":
            return None
        account, each = self._accounts[name], _PRODUCT * self.watch.step_seconds
        room = account.share * self.watch.training - account.spent
        return round(self._agree(max(_LEAST_MATVECS, int(room / each) - 1) if each > 0 else _LEAST_MATVECS))

    def pay(self, name: str, seconds: float, *, cold: bool) -> None:
        """Charge a metric with what it took; a cold start is no forecast of the next."""
        self._accounts[name].pay(seconds, typical=not cold)

    def plan(self, step: int, *, may_halve: bool) -> None:
        """Fix the next measurement.

        Args:
            step: the present one.
            may_halve: whether the part of the batch that is measured may still be halved.
        """
        if self.every != "auto":
            self._next = step + int(self.every)
            return
        account, typical = self._accounts[self._main], self.watch.step_seconds
        charged = sum(a.spent for a in self._accounts.values())
        account.spent += max(self.watch.measuring - charged, 0.0)  # what no metric was charged with: calls, planning, sinks
        if math.isnan(account.forecast):
            account.forecast = _FIRST_CAUTION * (self._gradients[self._main] + (0 if self._planned else _SETUP_GRADIENTS)) * typical
        self._planned = True
        wait = round(self._agree(account.steps_until(self.watch.training, typical)))
        steady = round(self._agree(account.forecast / account.share / typical if typical > 0 else 0.0))
        if min(wait, steady) > self._max_interval and may_halve:
            self.part /= 2
            account.forecast /= 2
            wait = round(self._agree(account.steps_until(self.watch.training, typical)))
        self._next = step + max(1, wait)

    def _agree(self, value: float) -> float:
        """The first process's number, on every process."""
        ranks: Ranks = find_ranks(self._group)
        return ranks.agree(float(value), device=torch.device("cuda") if ranks.size > 1 and _on_gpu(ranks) else torch.device("cpu"))

    def state_dict(self) -> dict[str, Any]:
        """Plain containers."""
        return {
            "next": self._next,
            "planned": self._planned,
            "part": self.part,
            "watch": self.watch.state_dict(),
            "accounts": {name: account.state_dict() for name, account in self._accounts.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved plan; accounts of metrics that are no longer measured are dropped."""
        self._next, self._planned, self.part = int(state["next"]), bool(state["planned"]), float(state["part"])
        self.watch.load_state_dict(state["watch"])
        for name, saved in state["accounts"].items():
            if name in self._accounts:
                self._accounts[name].load_state_dict(saved)


def _on_gpu(ranks: Ranks) -> bool:
    return bool(torch.distributed.get_backend(ranks.group) == "nccl")
