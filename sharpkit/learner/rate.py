"""The learned rate: how it starts, grows, settles, is lowered, and grows anew."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sharpkit.learner.rollback import LossWatch

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


_START = 0.02  # of the target, at first: sharpness at initialisation is low and rises
_BACK_OFF = 0.5  # of the rate, after going back
_NEAR = 0.1  # of the target: a rate that was lost there has grown enough
_MOSTLY_DONE = 0.1  # of the first loss: the curvature of what is fitted says nothing, and the rate need not grow any more
_DONE = 0.02  # of the first loss: nor may it rise, where a limit is being confirmed
_STEP = 1.4  # a rate this near to its target has met it, and rises by no more in one decision from there on
_STEEPEST_CUT = 0.5  # of the rate, in one decision once it has settled


class LearnedRate:
    """The peak rate of the first group, and the reasons for its moves.

    Args:
        pace: how fast it grows.
        safety: share of the limit to settle at.
        max_lr: never above.

    Attributes:
        value: the rate; 0 before the first limit is known.
        settled: whether it has been decided.
    """

    start_share = _START

    def __init__(self, pace: Pace, *, safety: float, max_lr: float) -> None:
        self.value, self.settled = 0.0, False
        self._pace, self._safety, self._max_lr = pace, safety, max_lr
        self._cap, self._grows_since, self._target = math.inf, 0, math.inf
        self._before, self._good = 0.0, 0.0  # the rate before it met its limit, and at the point to go back to
        self._limits: list[float] = []
        self._pool: list[float] = []  # limits since the rate met its share of one

    @property
    def growing(self) -> bool:
        """Whether it rises from step to step."""
        return not self.settled and not self._pool

    def settle_at(self, value: float) -> None:
        """A rate from elsewhere."""
        self.value, self.settled = value, True

    def grow(self) -> None:
        """One step of growth towards the last target, where it has not met it."""
        if self.value > 0 and self.growing:
            self.value = max(self.value, min(self.value * self._pace.growth, self._target, self._cap))

    def decide(self, limit: float, *, step: int, decay: float, losses: LossWatch, batch_size: int, changed: bool) -> str:
        """Move the rate by a limit just measured.

        Args:
            limit: largest stable rate on the batch.
            step: optimizer steps done.
            decay: what the rate is multiplied by at this step.
            losses: of the run so far.
            batch_size: of the batch.
            changed: whether that is another size than before.

        Returns:
            the reason in words.
        """
        if self._pool and not changed:
            return self._confirm(limit, losses)
        self._limits = [*self._limits, limit][-2:]
        # one batch says little, but a fall of the limit counts at once
        typical = min(limit, _geometric_mean(self._limits))
        target = self._target = min(self._safety * typical, self._max_lr)
        if self.value == 0:
            self.value, self._grows_since = _START * target, step
            return f"starts at {_START:.0%} of the target {target:.3g}"
        if changed:
            self.value = min(self.value, target)
            return f"the batch size changed to {batch_size}: goes on from {self.value:.3g} towards {min(target, self._cap):.3g}"
        if not self.settled:
            return self._meet(target, limit, step, losses)
        if self.value * decay > typical:
            before = self.value
            self.value = max(_STEEPEST_CUT * before, target / decay)
            return f"the rate in use was above the limit {typical:.3g}: {before:.3g} -> {self.value:.3g}"
        return f"stays; the limit is {typical:.3g}"

    def _meet(self, target: float, limit: float, step: int, losses: LossWatch) -> str:
        """Whether a growing rate has grown enough."""
        if self.value * _STEP >= target:
            self._before, self.value, self._pool = self.value, min(target, self._cap), [limit]
            losses.forget()  # those of a rate that was too high for a moment
            return f"reached {self._safety:.3g} of the limit {target / self._safety:.3g}: held there while more batches are measured"
        self.settled = True
        if self.value >= self._cap:
            return f"gained as much as linear scaling allows: settles at {self.value:.3g}, below its share {target:.3g} of the limit"
        if math.isinf(self._cap) and losses.mean < _MOSTLY_DONE * losses.first:
            return f"the loss has fallen to {losses.mean:.3g} from {losses.first:.3g}: settles at {self.value:.3g}"
        if step - self._grows_since >= self._pace.longest_growth:
            grown = step - self._grows_since
            return f"grew for {grown} steps without meeting its share {target:.3g} of the limit: settles at {self.value:.3g}"
        self.settled = False
        return f"grows towards {target:.3g}"

    def _confirm(self, limit: float, losses: LossWatch) -> str:
        """One batch's limit is off by a factor of two either way: go by the mean curvature of several, the harmonic mean of their limits.

        A rate that rises presses the curvature down further, so that the rise is bounded; after a change of the batch size there is none.
        """
        self._pool.append(limit)
        count, typical = len(self._pool), len(self._pool) / sum(1 / limit for limit in self._pool)
        target = self._target = min(self._safety * typical, self._max_lr, self._cap)
        may_rise = math.isinf(self._cap) and not losses.mean < _DONE * losses.first
        self.value = min(target, self.value * (_STEP if may_rise else 1.0))
        words = f"the limit is {typical:.3g} by {count} batches"
        if count < self._pace.num_confirming:
            return f"{words}: goes on at {self.value:.3g}"
        self.settled, self._limits, self._pool = True, [typical], []
        return f"{words}: settles at {self.value:.3g}"

    def grow_anew(self, ratio: float, *, step: int) -> None:
        """After a change of the batch size by a factor: linear scaling bounds the rate.

        On larger batches it gains that factor at most, and its square root at once, the least that any batch rule gives; on smaller ones
        it loses the factor at once, as the curvature of fitted data would not say so, and grows back to what it was at most.
        """
        self._limits.clear()
        self._pool.clear()
        self._cap = self.value * max(ratio, 1.0) if self.settled else math.inf
        if ratio < 1 or self.settled:
            self.value *= min(ratio, math.sqrt(ratio))
        self.settled, self._grows_since = False, step
        self._pace.restart()

    def scale(self, factor: float) -> None:
        """By what the limit gained by another momentum."""
        self.value *= factor
        self._cap *= factor
        self._limits = [limit * factor for limit in self._limits]

    def back_off(self) -> None:
        """Half the rate after a lost run, which grows on only if it was far from its target.

        A run lost just after the rate met its limit was lost by the rate before, and goes back to a point where that was lower.
        """
        if self._pool:
            self.value = max(self.value, min(self._before, self._good))
        self.settled = self.settled or self.value >= _NEAR * self._target
        self.value *= _BACK_OFF
        self._limits.clear()
        self._pool.clear()

    def remember(self) -> None:
        """The present rate is that of the last good point."""
        self._good = self.value

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        names = ("value", "settled", "_cap", "_grows_since", "_target", "_before", "_good")
        lists = {"limits": list(self._limits), "pool": list(self._pool)}
        return {**{name.strip("_"): getattr(self, name) for name in names}, **lists, "pace": self._pace.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from saved numbers."""
        self.value, self.settled, self._cap = float(state["value"]), bool(state["settled"]), float(state["cap"])
        self._grows_since, self._target = int(state["grows_since"]), float(state["target"])
        self._before, self._good = float(state["before"]), float(state["good"])
        self._limits, self._pool = [float(v) for v in state["limits"]], [float(v) for v in state["pool"]]
        self._pace.load_state_dict(state["pace"])


def _geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))
