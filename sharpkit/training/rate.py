"""The learned rate: how it starts, grows, settles, is lowered, and grows anew."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sharpkit.training.pace import Pace
from sharpkit.training.rollback import LossWatch

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
