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

from sharpkit._results import Parts, State
from sharpkit.objective.distributed import find_ranks

# What a call costs on steps of 0.3 to 10 ms is measured in experiments/monitor_overhead.py.
_PAUSE = 5.0  # a gap longer than so many typical steps is a pause (validation, a checkpoint) and counts as so many; by judgement
_RECENT = 32  # gaps whose median is the typical step; by judgement
_REFRESH = 8  # gaps between two computations of that median, the slowest part of a step without measurement; by judgement


@dataclass
class Stopwatch(State, saved=("training", "measuring", "gaps=_gaps")):
    """Time spent training and time spent measuring, from the gaps between the monitor's calls."""

    training: float = 0.0  # seconds of training steps; a pause counts as five typical steps
    measuring: float = 0.0  # seconds inside the monitor
    entered: float = 0.0  # time of the last call, in seconds of mark
    _gaps: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT))
    _left: float | None = None
    _typical: float = math.nan
    _since: int = 0

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
            if self._since >= _REFRESH or math.isnan(self._typical):
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
        """Duration of a typical recent training step; NaN before the first."""
        return self._typical

    @property
    def overhead(self) -> float:
        """Time spent measuring over time spent training; NaN before the first step was timed."""
        return self.overhead_with(0.0)

    def overhead_with(self, seconds: float) -> float:
        """The overhead with some more seconds of measuring added."""
        return (self.measuring + seconds) / self.training if self._gaps else math.nan

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        # the time between two processes is not training
        self._left, self._typical = None, statistics.median(self._gaps) if self._gaps else math.nan


@dataclass
class Account(State, saved=("spent", "forecast", "last=_last")):
    """What one metric may spend and has spent."""

    share: float  # share of the training time that it may spend
    spent: float = 0.0  # seconds spent so far
    # predicted seconds of the next measurement: the larger of the last two, so that an expensive one is spread over more steps
    forecast: float = math.nan
    _last: float = math.nan

    def pay(self, seconds: float, *, typical: bool = True) -> None:
        """Charge a measurement; not ``typical`` where the next will take less long, as after a cold start."""
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


_PRIMARY_SHARE = 0.6  # of the budget goes to the first metric; by judgement
_FIRST_LOOK = 8  # steps timed before the first plan; by judgement: enough for a median that a slow first step does not decide
_FIRST_BY = (
    40  # step of the first record, whatever it costs, by judgement: who has just begun wants to see something; the next ones pay for it
)
_SETUP_GRADIENTS = 3  # cost of making the first objective, which evaluates the loss a few times; by judgement
# Factors on the predicted cost of what was never measured, the main metric and others, by judgement: small models pay for calls more than
# for arithmetic, so gradients predict too little there.
_FIRST_CAUTION, _CAUTION = 1.5, 2.5
_NOISE = 1.2  # of a budget, by judgement: timers of short steps are no better
_PRODUCT = 1.6  # Hessian product over training step, about: the lower end of what experiments/product_cost.py measured, 1.6 to 2.4
_LEAST_MATVECS = 6  # with three, experiments/monitor_overhead.py had the curvature of a GPT off by a fifth in the median


class Planner(State, saved=("next=_next", "planned=_planned", "part", "watch", "accounts=_accounts")):
    """Decides at each measurement when the next one is, so that between them a step costs nothing and all processes agree.

    The first measurement comes early, and those after it wait until the budget has paid for it. The cost of a first measurement of each
    metric, the main one first, is guessed in gradients of the batch. If the budget asks for more
    than ``max_interval`` steps between two, only a ``part`` of each batch is measured.
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
        shares = {name: first if name == self._main else (1 - first) / others for name in self._gradients}
        # accounts of metrics that a resumed run no longer measures are dropped on loading
        self._accounts = Parts(parts={name: Account(budget * share) for name, share in shares.items()})
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
        """Number of products that a metric's account can pay for; None if there is no bound."""
        if self.every != "auto":
            return None
        account, each = self._accounts[name], _PRODUCT * self.watch.step_seconds
        room = account.share * self.watch.training - account.spent
        # one less than there is room for: the graph costs about a product too
        return round(self._agree(max(_LEAST_MATVECS, int(room / each) - 1) if each > 0 else _LEAST_MATVECS))

    def pay(self, name: str, seconds: float, *, cold: bool) -> None:
        """Charge a metric with what it took; a cold start is no forecast of the next."""
        self._accounts[name].pay(seconds, typical=not cold)

    def plan(self, step: int, *, may_halve: bool) -> None:
        """Fix the next measurement; ``may_halve`` says whether the part of the batch that is measured may still be halved."""
        if self.every != "auto":
            self._next = step + int(self.every)
            return
        account, typical = self._accounts[self._main], self.watch.step_seconds
        charged = sum(a.spent for a in self._accounts.values())
        account.spent += max(self.watch.measuring - charged, 0.0)  # what no metric was charged with: calls, planning, sinks
        if math.isnan(account.forecast):
            account.forecast = _FIRST_CAUTION * (self._gradients[self._main] + (0 if self._planned else _SETUP_GRADIENTS)) * typical
        first, self._planned = not self._planned, True
        wait = round(self._agree(account.steps_until(self.watch.training, typical)))
        # The interval in the long run. Debts of the past also make the next wait long, but pass; half a batch for good would be no remedy.
        steady = round(self._agree(account.forecast / account.share / typical if typical > 0 else 0.0))
        if min(wait, steady) > self._max_interval and may_halve:
            self.part /= 2
            account.forecast /= 2
            wait = round(self._agree(account.steps_until(self.watch.training, typical)))
        self._next = step + max(1, min(wait, _FIRST_BY - step) if first else wait)

    @property
    def first_by(self) -> int:
        """The latest step of the first record."""
        return _FIRST_BY if self.every == "auto" else 0

    @property
    def exceeds(self) -> float | None:
        """The overhead so far where it is above the budget by more than a timer's noise; None where it keeps to it, or has none to keep."""
        total, overhead = sum(account.share for account in self._accounts.values()), self.watch.overhead
        return overhead if self.every == "auto" and overhead > _NOISE * total else None

    def _agree(self, value: float) -> float:
        """The first process's number, on every process."""
        ranks = find_ranks(self._group)
        on_gpu = ranks.size > 1 and torch.distributed.get_backend(ranks.group) == "nccl"  # which sends from GPUs only
        return ranks.agree(float(value), device=torch.device("cuda" if on_gpu else "cpu"))
