"""When the learner measures, how fast its rate grows, and what the rate is multiplied by."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

Schedule = Callable[[float], float]

DECAYS: dict[str, Schedule] = {"linear": lambda z: 1 - z, "cosine": lambda z: 0.5 * (1 + math.cos(math.pi * z)), "constant": lambda z: 1.0}

_GRAPH, _PRODUCT = 1.3, 2.0  # gradients that the graph of a measurement, and each of its products, cost
COLD_MATVECS, WARM_MATVECS = 4, 3
_COLD_COST, _COST = _GRAPH + COLD_MATVECS * _PRODUCT, _GRAPH + WARM_MATVECS * _PRODUCT
_LEAST, _MOST = 4, 200  # measurements after the first
_GROWING_SHARE = 0.6  # of them fall into the growth
_TYPICAL, _CONFIRMING_SHARE, _MOST_CONFIRMING = 4, 0.06, 12  # batches whose limits are averaged where the growth ends
_LONGEST_GROWTH = 3  # warm-ups
_SETTLE = 20  # steps of an adaptive optimizer before its second moments say anything


class Pace:
    """Steps at which to measure, within a share of the gradients of the run.

    Args:
        total_steps: of the run.
        start: share of the target to grow from.
        warmup: share of the run in which the rate grows from there to the target.
        budget: share of the run's gradients.
        interval: steps between measurements once settled, or ``"auto"``.
        adaptive: whether the optimizer's state must settle first.

    Attributes:
        longest_growth: steps after which it ends even where the limit was not met.
    """

    def __init__(self, total_steps: int, *, start: float, warmup: float, budget: float, interval: int | str, adaptive: bool) -> None:
        self._count = min(max(int((budget * total_steps - _COLD_COST) / _COST), _LEAST), _MOST)
        self._planned, self._grown, self._made = max(3, round(_GROWING_SHARE * self._count) + 1), 0, 0
        self._growth = math.log(1 / start) / max(warmup * total_steps, 1.0)
        self._while_growing = max(1, round(warmup * total_steps / self._planned))
        self.longest_growth = round(_LONGEST_GROWTH * warmup * total_steps)
        self._total, self._interval = total_steps, None if interval == "auto" else int(interval)
        self._settled_every = 0
        self._next = min(_SETTLE, max(1, total_steps // 20)) if adaptive else 1

    @property
    def growth(self) -> float:
        """Factor of the rate, a step: the same from one measurement to the next, however far apart they are."""
        return math.exp(self._growth / self._stretch)

    @property
    def _stretch(self) -> int:
        """How many times further apart than planned measurements are, once there are more than planned."""
        return int(2 ** max(self._grown - self._planned, 0))

    @property
    def num_confirming(self) -> int:
        """Batches, with the one that ends the growth, whose limits the rate should settle by: what the budget leaves, but two at least."""
        wanted = min(max(round(_CONFIRMING_SHARE * self._count), _TYPICAL), _MOST_CONFIRMING)
        return max(2, min(wanted, self._count - self._grown + 1))

    def is_due(self, step: int) -> bool:
        """Whether to measure after this step."""
        return self._next <= step < self._total

    def plan(self, step: int, *, settled: bool, growing: bool) -> None:
        """Fix the next measurement; where the rate grows for longer than planned, they come further and further apart."""
        self._made += 1
        if settled:
            if not self._settled_every:
                left = max(self._count + 1 - self._made, 0)
                self._settled_every = self._interval or (self._total - step) // (left + 1) + 1
            self._next = step + self._settled_every
            return
        if growing:
            self._grown += 1
        self._next = step + self._while_growing * self._stretch

    def restart(self) -> None:
        """The rate grows anew."""
        self._grown = 0

    def state_dict(self) -> dict[str, Any]:
        """The next step, and the measurements so far."""
        return {"next": self._next, "grown": self._grown, "made": self._made, "settled_every": self._settled_every}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from it."""
        self._next, self._grown = int(state["next"]), int(state["grown"])
        self._made, self._settled_every = int(state["made"]), int(state["settled_every"])


class Multiplier:
    """A torch scheduler run on a stand-in of rate 1: what it makes of it multiplies the learned rate."""

    def __init__(self, make: Callable[[torch.optim.Optimizer], Any] | None) -> None:
        self._optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        self._scheduler = None if make is None else make(self._optimizer)

    @property
    def value(self) -> float:
        """The present factor."""
        return float(self._optimizer.param_groups[0]["lr"])

    def advance(self) -> None:
        """One step."""
        if self._scheduler is not None:
            self._optimizer.step()  # type: ignore[call-overload]  # schedulers warn where it was left out
            self._scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        """Of the scheduler."""
        return {"value": self.value, "scheduler": None if self._scheduler is None else self._scheduler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved scheduler."""
        if self._scheduler is not None and state["scheduler"] is not None:
            self._scheduler.load_state_dict(state["scheduler"])
        self._optimizer.param_groups[0]["lr"] = float(state["value"])


def multiplier_of(schedule: Callable[[torch.optim.Optimizer], Any] | None) -> Multiplier:
    """The multiplier of a scheduler factory, 1 without one.

    Raises:
        TypeError: a scheduler instead of a function that makes one.
    """
    if schedule is not None and not callable(schedule):
        raise TypeError(
            f"schedule must be a function optimizer -> scheduler, such as lambda o: torch.optim.lr_scheduler.StepLR(o, 30), got a "
            f"{type(schedule).__name__}: an existing scheduler would overwrite the learned rate"
        )
    return Multiplier(schedule)
