"""The learned rate: how it starts, grows, settles, is lowered, and grows anew; and its pace, when to measure for that.

The experiments that the constants come from are described in docs/learner_results.md.
"""

from __future__ import annotations

import math

from sharpkit._results import State
from sharpkit.learner.rollback import LossWatch

_GRAPH, _PRODUCT = 1.3, 2.0  # gradients that a graph and each product cost; experiments/product_cost.py measured 1.6 to 2.4 for a product
COLD_MATVECS, WARM_MATVECS = 4, 3  # by judgement: one batch is off by a factor of two either way, so that more products would buy nothing
_COLD_COST, _COST = _GRAPH + COLD_MATVECS * _PRODUCT, _GRAPH + WARM_MATVECS * _PRODUCT
_LEAST, _MOST = 4, 200  # measurements after the first, whatever the budget; by judgement
_GROWING_SHARE = 0.6  # share of them that falls into the growth; by judgement: there the limit moves most
# Batches whose limits are averaged where the growth ends. One batch left a scatter of 0.41 in the logarithm of the settled rate, several
# 0.23 (the digits; docs/learner_results.md, Against the grid); the share and the bounds are by judgement.
_TYPICAL, _CONFIRMING_SHARE, _MOST_CONFIRMING = 4, 0.06, 12
_LONGEST_GROWTH = 3  # warm-ups after which growth ends; by judgement
_SETTLE = 20  # steps of an adaptive optimizer before its second moments say anything; by judgement


class Pace(State, saved=("next=_next", "grown=_grown", "made=_made", "settled_every=_settled_every")):
    """Steps at which to measure, within a share of the gradients of the run.

    The rate grows from the share ``start`` of its target to the target in the share ``warmup`` of the run.
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
        """Factor by which the rate grows a step; it grows by the same factor between any two measurements, however far apart they are."""
        return math.exp(self._growth / self._stretch)

    @property
    def _stretch(self) -> int:
        """How many times further apart than planned the measurements are: doubled at each one beyond the plan, to bound their cost."""
        return int(2 ** max(self._grown - self._planned, 0))

    @property
    def num_confirming(self) -> int:
        """Number of batches whose limits the rate settles by, with the one that ended the growth: what the budget leaves, at least two."""
        wanted = min(max(round(_CONFIRMING_SHARE * self._count), _TYPICAL), _MOST_CONFIRMING)
        return max(2, min(wanted, self._count - self._grown + 1))

    def is_due(self, step: int) -> bool:
        """Whether to measure after this step."""
        return self._next <= step < self._total

    def plan(self, step: int, *, settled: bool, growing: bool) -> None:
        """Fix the next measurement; if the rate grows for longer than planned, measurements come further and further apart."""
        self._made += 1
        if settled:
            if not self._settled_every:  # what is left of the budget is spread evenly over the rest of the run
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


_START = 0.02  # share of the target to start from; by judgement: sharpness at initialisation is low and rises
_BACK_OFF = 0.5  # of the rate, after going back; by judgement
_NEAR = 0.1  # of the target: a rate that was lost there has grown enough; by judgement
_MOSTLY_DONE = 0.1  # of the first loss, by judgement: curvature of fitted data bounds nothing (experiments/learner_robust.py: up to 6e6)
_DONE = 0.02  # of the first loss: nor may the rate rise there while a limit is being confirmed; by judgement
_STEP = 1.4  # a rate this near to its target has met it, and rises by no more in one decision from there on; by judgement
_STEEPEST_CUT = 0.5  # of the rate, in one decision once it has settled; by judgement: one batch's limit is off by a factor of two


_NUMBERS = ("value", "settled", "cap=_cap", "grows_since=_grows_since", "target=_target", "before=_before", "good=_good", "peak=_peak")


class LearnedRate(State, saved=(*_NUMBERS, "limits=_limits", "pool=_pool", "pace=_pace")):
    """The peak rate of the first group, and the reasons for its moves.

    Attributes:
        value: the rate; 0 before the first limit is known, unless a peak is given.
        settled: whether it has been decided.

    Args:
        pace: of growth.
        safety: share of the limit to settle at.
        max_lr: upper bound.
        peak: a rate to settle at instead.
        keeps_limit: whether the limit lowers a rate that grew to a peak.
    """

    start_share = _START
    _peak: float | None
    _limits: list[float]  # the last two while growing
    _pool: list[float]  # all since the rate met its share of one

    def __init__(self, pace: Pace, *, safety: float, max_lr: float, peak: float | None = None, keeps_limit: bool = True) -> None:
        self._pace, self._safety, self._max_lr, self._keeps_limit = pace, safety, max_lr, keeps_limit
        self._peak = None if peak is None else min(peak, max_lr)
        # a rate that short runs found says more than the curvature of the first steps, so that none is waited for
        self.value, self.settled = 0.0 if self._peak is None else _START * self._peak, False
        self._cap, self._grows_since = math.inf, 0  # the cap is a batch rule's, after a change of the size
        self._target = math.inf if self._peak is None else self._peak
        self._before, self._good = 0.0, 0.0  # the rate before it met its limit, and at the point to go back to
        self._limits, self._pool = [], []

    @property
    def growing(self) -> bool:
        """Whether it rises from step to step."""
        return not self.settled and not self._pool

    def settle_at(self, value: float) -> None:
        """Take a rate from elsewhere, for good."""
        self.value, self.settled = value, True

    def grow(self) -> None:
        """One step of growth towards the last target; never beyond it, which spoiled single runs in experiments/learner_ablation.py."""
        if self.value > 0 and self.growing:
            self.value = max(self.value, min(self.value * self._pace.growth, self._target, self._cap))

    def decide(
        self, limit: float, *, step: int, decay: float, losses: LossWatch, batch_size: int, changed: bool, loss: float = math.nan
    ) -> str:
        """Move the rate by the limit of a batch just measured, with the schedule at the factor ``decay``; returns the reason in words.

        ``loss`` is that of the batch: the curvature of one that is fitted bounds nothing.
        """
        fitted = loss < _MOSTLY_DONE * losses.start
        if self._pool and not changed:
            return self._confirm(limit, losses, fitted=fitted)
        if fitted and self._limits and not changed:  # what it allows is no reason to grow further
            limit = min(limit, _geometric_mean(self._limits))
        self._limits = [*self._limits, limit][-2:]
        # one batch says little, so two are averaged, but a fall of the limit counts at once
        typical = min(limit, _geometric_mean(self._limits))
        if changed:
            self._peak = None  # it was for another batch size
        share = self._safety * typical if self._peak is None else self._peak
        target = self._target = min(share, self._max_lr)
        if self.value == 0:
            self.value, self._grows_since = _START * target, step
            return f"starts at {_START:.0%} of the target {target:.3g}"
        if changed:
            self.value = min(self.value, target)
            return f"the batch size changed to {batch_size}: goes on from {self.value:.3g} towards {min(target, self._cap):.3g}"
        if not self.settled:
            return self._meet(target, limit, step, losses)
        if self.value * decay > typical and (self._peak is None or self._keeps_limit):
            before = self.value
            self.value = max(_STEEPEST_CUT * before, min(target, self._safety * typical) / decay)
            return f"the rate in use was above the limit {typical:.3g}: {before:.3g} -> {self.value:.3g}"
        return f"stays; the limit is {typical:.3g}"

    def _meet(self, target: float, limit: float, step: int, losses: LossWatch) -> str:
        """Whether a growing rate has grown enough."""
        if self._peak is not None and self.value * _STEP >= target:
            self.value, self.settled = min(target, self._cap), True
            return f"reached the peak given: settles at {self.value:.3g}; the limit is {limit:.3g}"
        if self.value * _STEP >= target:
            self._before, self.value, self._pool = self.value, min(target, self._cap), [limit]
            losses.forget()  # those of a rate that was too high for a moment
            return f"reached {self._safety:.3g} of the limit {target / self._safety:.3g}: held there while more batches are measured"
        self.settled = True
        if self.value >= self._cap:
            return f"capped after the change of the batch size; fixed at {self.value:.3g}, below its share {target:.3g} of the limit"
        if self._peak is None and math.isinf(self._cap) and losses.mean < _MOSTLY_DONE * losses.first:
            return f"the loss has fallen to {losses.mean:.3g} from {losses.first:.3g}: settles at {self.value:.3g}"
        if step - self._grows_since >= self._pace.longest_growth:
            grown = step - self._grows_since
            return f"grew for {grown} steps without meeting its share {target:.3g} of the limit: settles at {self.value:.3g}"
        self.settled = False
        return f"grows towards {target:.3g}"

    def _confirm(self, limit: float, losses: LossWatch, *, fitted: bool) -> str:
        """One batch's limit is off by a factor of two either way: go by the mean curvature of several, the harmonic mean of their limits.

        Training at a higher rate lowers the curvature further, so the rise is bounded; after a change of the batch size there is none.
        """
        if fitted:  # what it allows is no reason to rise
            limit = min(limit, len(self._pool) / sum(1 / other for other in self._pool))
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
        """After a change of the batch size by a factor ``ratio``, grow again, bounded by a batch rule.

        For larger batches the rate gains sqrt(ratio) at once, the least that any batch rule gives, and ``ratio`` at most. For smaller ones
        it is multiplied by ``ratio`` at once, since the curvature of fitted data would not show that it must fall, and grows back to
        sqrt(ratio) at most: of the two rules that are in use, linear and square root, each the bolder one bounds it.
        """
        met = self.settled or bool(self._pool)
        self._cap = (self.value if met else self._cap) * max(ratio, math.sqrt(ratio))
        self._limits.clear()
        self._pool.clear()
        if ratio < 1 or self.settled:
            self.value *= min(ratio, math.sqrt(ratio))
        self.settled, self._grows_since = False, step
        self._pace.restart()

    def scale(self, factor: float) -> None:
        """Multiply the rate by the factor that another momentum gave its limit."""
        self.value *= factor
        self._cap *= factor
        self._limits = [limit * factor for limit in self._limits]

    def back_off(self) -> None:
        """Halve the rate after a lost run; it grows on only if it was far from its target.

        A run lost just after the rate met its limit was lost by the higher rate before that, so the halving starts from the rate at the
        point that the run goes back to.
        """
        if self._pool:
            self.value = max(self.value, min(self._before, self._good))
        self.settled = self.settled or self.value >= _NEAR * self._target
        self.value *= _BACK_OFF
        self._limits.clear()
        self._pool.clear()

    def remember(self, value: float | None = None) -> None:
        """Note a rate, the present one by default, as that of the last good point."""
        self._good = self.value if value is None else value


def _geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))
