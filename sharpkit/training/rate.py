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
_STEEPEST_CUT = 0.5  # of the rate, in one decision once it has settled


class LearnedRate:
    """The peak rate of the first group, and the reasons for its moves.

    Args:
        pace: how fast it grows.
        safety: share of the limit to settle at.
        max_lr: never above.

    Attributes:
        value: the rate; 0 before the first limit is known.
        settled: whether it has stopped growing.
    """

    start_share = _START

    def __init__(self, pace: Pace, *, safety: float, max_lr: float) -> None:
        self.value, self.settled = 0.0, False
        self._pace, self._safety, self._max_lr = pace, safety, max_lr
        self._cap, self._grows_since, self._target = math.inf, 0, math.inf
        self._limits: list[float] = []

    def settle_at(self, value: float) -> None:
        """A rate from elsewhere."""
        self.value, self.settled = value, True

    def grow(self) -> None:
        """One step of growth, where it has not settled."""
        if self.value > 0 and not self.settled:
            self.value = min(self.value * self._pace.growth, self._max_lr, self._cap)

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
        self._limits = [*self._limits, limit][-2:]
        # one batch says little, but a fall of the limit counts at once
        typical = min(limit, math.exp(sum(map(math.log, self._limits)) / len(self._limits)))
        target = self._target = min(self._safety * typical, self._max_lr)
        if self.value == 0:
            self.value, self._grows_since = _START * target, step
            return f"starts at {_START:.0%} of the target {target:.3g}"
        if changed:
            self.value = min(self.value, target)
            return f"the batch size changed to {batch_size}: goes on from {self.value:.3g} towards {min(target, self._cap):.3g}"
        if not self.settled:
            return self._try_to_settle(target, typical, step, losses)
        if self.value * decay > typical:
            before = self.value
            self.value = max(_STEEPEST_CUT * before, target / decay)
            return f"the rate in use was above the limit {typical:.3g}: {before:.3g} -> {self.value:.3g}"
        return f"stays; the limit is {typical:.3g}"

    def _try_to_settle(self, target: float, typical: float, step: int, losses: LossWatch) -> str:
        self.settled = True
        if self.value >= target:
            self.value = target
            losses.forget()  # those of a rate that was too high for a moment
            return f"reached {self._safety:.0%} of the limit {typical:.3g}: settles there"
        if self.value >= self._cap:
            return f"gained as much as linear scaling allows: settles at {self.value:.3g}, below its share {target:.3g} of the limit"
        if math.isinf(self._cap) and losses.mean < _MOSTLY_DONE * losses.first:
            return f"the loss has fallen to {losses.mean:.3g} from {losses.first:.3g}: settles at {self.value:.3g}"
        if step - self._grows_since >= self._pace.longest_growth:
            grown = step - self._grows_since
            return f"grew for {grown} steps without meeting its share {target:.3g} of the limit: settles at {self.value:.3g}"
        self.settled = False
        return f"grows towards {target:.3g}"

    def grow_anew(self, ratio: float, *, step: int) -> None:
        """After a change of the batch size by a factor: linear scaling bounds the rate.

        On larger batches it gains that factor at most; on smaller ones it loses it at once, as the curvature of fitted data would not say
        so, and grows back to what it was at most.
        """
        self._limits.clear()
        self._cap = self.value * max(ratio, 1.0) if self.settled else math.inf
        self.value *= min(ratio, 1.0)
        self.settled, self._grows_since = False, step
        self._pace.restart()

    def back_off(self) -> None:
        """Half the rate after a lost run; it grows on only if it was far from its target."""
        self.settled = self.settled or self.value >= _NEAR * self._target
        self.value *= _BACK_OFF
        self._limits.clear()

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        names = ("value", "settled", "_cap", "_grows_since", "_target")
        return {**{name.strip("_"): getattr(self, name) for name in names}, "limits": list(self._limits), "pace": self._pace.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from saved numbers."""
        self.value, self.settled, self._cap = float(state["value"]), bool(state["settled"]), float(state["cap"])
        self._grows_since, self._target = int(state["grows_since"]), float(state["target"])
        self._limits = [float(v) for v in state["limits"]]
        self._pace.load_state_dict(state["pace"])
