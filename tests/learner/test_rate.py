"""The learned rate, decision by decision: targets, growth, meeting the limit, confirming it, cuts, changes of the batch size."""

from __future__ import annotations

import math
from typing import Any

import pytest

from sharpkit.learner.rate import LearnedRate, Pace
from sharpkit.learner.rollback import LossWatch


def pace(total: int = 1000, **changes: Any) -> Pace:
    settings: dict[str, Any] = {"start": 0.02, "warmup": 0.1, "budget": 0.05, "interval": "auto", "adaptive": False}
    return Pace(total, **{**settings, **changes})


def watch(first: float = 1.0, now: float = 1.0) -> LossWatch:
    """Losses that were ``first`` in the first window and are ``now``."""
    losses = LossWatch()
    for loss in [first] * 16 + [now] * 16:
        losses.add(loss)
    return losses


class Rate(LearnedRate):
    """With a shorter way to decide."""

    def __init__(
        self, *, safety: float = 0.25, max_lr: float = math.inf, total: int = 1000, peak: float | None = None, **changes: Any
    ) -> None:
        super().__init__(pace(total, **changes), safety=safety, max_lr=max_lr, peak=peak, keeps_limit=not changes.get("adaptive"))

    def see(self, limit: float, **changes: Any) -> str:
        about: dict[str, Any] = {"step": 30, "decay": 1.0, "losses": watch(), "batch_size": 8, "changed": False}
        return self.decide(limit, **{**about, **changes})


def grown(rate: LearnedRate) -> float:
    """Where growth ends."""
    for _ in range(3000):
        rate.grow()
    return rate.value


def settled(value: float, limit: float = 1.0, **settings: Any) -> Rate:
    """A rate that settled on its own, at a share of this limit, and was then set to a value."""
    rate = Rate(**settings)
    rate.see(limit)
    rate.value = rate._target
    for _ in range(4):  # what the pace of 1000 steps wants a limit confirmed by
        rate.see(limit)
    assert rate.settled
    rate.value = value
    return rate


# -- how it starts and grows --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("max_lr", "target"), [(math.inf, 0.1), (0.05, 0.05)])
def test_it_starts_at_a_fiftieth_of_the_target_and_grows_to_the_target(max_lr: float, target: float) -> None:
    rate = Rate(max_lr=max_lr)
    rate.grow()
    assert rate.value == 0.0 and rate.growing, "before the first limit there is nothing to grow"
    assert rate.see(0.4) == f"starts at 2% of the target {target:.3g}"
    assert rate.value == pytest.approx(0.02 * target)
    rate.grow()
    assert rate.value == pytest.approx(0.02 * target * 50 ** (1 / 100)), "over a warm-up of 100 steps it would grow by 50"
    assert grown(rate) == pytest.approx(target)


@pytest.mark.parametrize(
    ("limits", "typical"), [([1.0, 4.0], 2.0), ([1.0, 4.0, 9.0], 6.0), ([4.0, 1.0], 1.0), ([1.0, 4.0, 4.0, 16.0], 8.0), ([2.0], 2.0)]
)
def test_the_target_goes_by_the_geometric_mean_of_two_limits_but_falls_at_once(limits: list[float], typical: float) -> None:
    rate = Rate()
    for limit in limits:
        rate.see(limit)
    assert rate.growing and grown(rate) == pytest.approx(0.25 * typical)


def test_a_target_that_falls_below_the_rate_does_not_pull_a_growing_rate_down() -> None:
    rate = Rate()
    rate.see(1.0)
    rate.value = 0.1
    rate._target = 0.05
    rate.grow()
    assert rate.value == 0.1


# -- where growth ends --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("share", "met"), [(1 / 1.41, False), (1 / 1.39, True), (2.0, True)])
def test_a_rate_within_a_factor_of_1_4_of_its_target_has_met_it(share: float, met: bool) -> None:
    rate, losses = Rate(), watch()
    rate.see(0.4)
    rate.value = share * 0.1
    reason = rate.see(0.4, losses=losses)
    assert rate.growing is not met and not rate.settled
    assert rate.value == pytest.approx(0.1 if met else share * 0.1)
    assert reason.startswith("reached 0.25 of the limit 0.4" if met else "grows towards 0.1")
    assert math.isnan(losses.mean) is met, "losses under a rate that was too high for a moment do not count"


@pytest.mark.parametrize(("now", "ends"), [(0.09, True), (0.11, False)])
def test_growth_ends_where_the_loss_has_fallen_to_a_tenth(now: float, ends: bool) -> None:
    rate = Rate()
    rate.see(0.4)
    reason = rate.see(0.4, losses=watch(1.0, now))
    assert rate.settled is ends and ("the loss has fallen to 0.09 from 1" in reason) is ends
    assert rate.value == pytest.approx(0.002)


@pytest.mark.parametrize(("step", "ends"), [(329, False), (330, True)])
def test_growth_ends_after_three_warm_ups(step: int, ends: bool) -> None:
    rate = Rate()
    rate.see(0.4, step=30)
    reason = rate.see(0.4, step=step)
    assert rate.settled is ends and ("grew for 300 steps without meeting its share 0.1" in reason) is ends


def test_confirming_goes_by_the_harmonic_mean_of_the_limits_and_then_settles() -> None:
    rate = Rate(safety=0.25)
    rate.see(0.4)
    rate.value = 0.1
    rate.see(0.4)
    assert rate.see(0.2) == "the limit is 0.267 by 2 batches: goes on at 0.0667"
    assert rate.value == pytest.approx(0.25 * 2 / (1 / 0.4 + 1 / 0.2))
    rate.see(0.4)
    assert "by 4 batches: settles at" in rate.see(0.4) and rate.settled and not rate.growing
    assert rate.value == pytest.approx(0.25 * 4 / (3 / 0.4 + 1 / 0.2))
    rate.see(0.4)
    mean = math.sqrt(0.4 * 4 / (3 / 0.4 + 1 / 0.2))
    assert rate.see(0.4) == "stays; the limit is 0.4" and mean < 0.4, "the confirmed limit is the first of the two that count from there on"


def test_the_confirmed_limit_counts_as_the_last_one() -> None:
    rate = settled(0.25, limit=1.0)
    assert rate.see(4.0) == "stays; the limit is 2"


@pytest.mark.parametrize(("now", "rises"), [(0.019, False), (0.021, True)])
def test_a_rate_being_confirmed_may_rise_unless_the_data_is_fitted(now: float, rises: bool) -> None:
    rate = Rate()
    rate.see(0.4)
    rate.value = 0.1
    rate.see(0.4)
    rate.see(40.0, losses=watch(1.0, now))
    assert rate.value == pytest.approx(0.14 if rises else 0.1)


def test_after_a_change_of_the_batch_size_a_rate_being_confirmed_does_not_rise() -> None:
    rate = settled(0.1)
    rate.grow_anew(4.0, step=100)
    rate.see(1.0, step=110)
    rate.see(1.0, step=120)
    value = rate.value
    rate.see(40.0, step=130)
    assert rate.value == pytest.approx(value) and not rate.growing


def test_the_highest_rate_allowed_bounds_what_is_confirmed() -> None:
    rate = Rate(max_lr=0.12)
    rate.see(0.4)
    rate.value = 0.1
    rate.see(0.4)
    rate.see(40.0)
    assert rate.value == pytest.approx(0.12)


# -- once settled -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("limit", "decay", "safety", "value"),
    [
        (0.9, 1.0, 0.25, 0.5),  # a share of the limit would be 0.225: no more than half at once
        (0.9, 1.0, 0.8, 0.72),
        (0.4, 0.5, 0.8, 0.64),  # at half the peak the rate in use is 0.5; it is the peak that is set
        (0.6, 0.5, 0.8, 1.0),
        (1.1, 1.0, 0.8, 1.0),
    ],
)
def test_a_settled_rate_above_the_limit_is_cut_to_its_share_but_to_no_less_than_half(
    limit: float, decay: float, safety: float, value: float
) -> None:
    rate = settled(1.0, limit=100.0, safety=safety)
    reason = rate.see(limit, decay=decay)
    assert rate.value == pytest.approx(value)
    assert reason == (
        f"stays; the limit is {limit:.3g}" if value == 1.0 else f"the rate in use was above the limit {limit:.3g}: 1 -> {value:.3g}"
    )


def test_a_rate_from_elsewhere_is_settled() -> None:
    rate = Rate()
    rate.settle_at(0.3)
    assert rate.value == 0.3 and rate.settled and not rate.growing
    rate.grow()
    assert rate.value == 0.3


# -- changes of the batch size ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("ratio", "at_once", "at_most"), [(4.0, 2.0, 4.0), (0.25, 0.25, 0.5)])
def test_a_settled_rate_moves_by_the_least_a_batch_rule_gives_and_grows_to_the_most(ratio: float, at_once: float, at_most: float) -> None:
    rate = settled(0.1)
    rate.grow_anew(ratio, step=100)
    assert rate.value == pytest.approx(0.1 * at_once) and rate.growing
    rate.see(1000.0, step=110)
    assert grown(rate) == pytest.approx(0.1 * at_most)
    assert rate.see(1000.0, step=120).startswith("capped after the change of the batch size; fixed at") and rate.settled


@pytest.mark.parametrize(("ratio", "at_once"), [(4.0, 1.0), (0.25, 0.25)])
def test_a_rate_still_growing_loses_by_smaller_batches_and_gains_nothing_by_larger_ones(ratio: float, at_once: float) -> None:
    rate = Rate()
    rate.see(0.4)
    rate.grow_anew(ratio, step=50)
    assert rate.value == pytest.approx(0.002 * at_once)
    rate.see(400.0, step=60)
    assert grown(rate) == pytest.approx(100.0), "no bound by linear scaling, and the limits of the other size are forgotten"


def test_a_second_change_before_the_rate_has_settled_is_bounded_from_where_it_had_settled() -> None:
    rate = settled(0.1)
    for _ in range(2):
        rate.grow_anew(0.25, step=100)
    rate.see(1000.0, step=110)
    assert grown(rate) == pytest.approx(0.1 / 4), "a sixteenth of the batch, a quarter of the rate"


def test_growth_after_a_change_is_timed_from_the_change_and_ends_by_fitted_data_no_more() -> None:
    rate = settled(0.1)
    rate.grow_anew(1e4, step=500)
    reason = rate.see(1e6, step=799, losses=watch(1.0, 0.01))
    assert not rate.settled and reason.startswith("grows towards")
    rate.see(1e6, step=800)
    assert rate.settled


def test_the_first_limit_of_another_batch_size_lowers_a_rate_above_its_target_and_says_so() -> None:
    for limit, value in ((4.0, 0.2), (0.4, 0.1)):
        rate = settled(0.1)
        rate.grow_anew(4.0, step=100)
        reason = rate.see(limit, step=101, changed=True, batch_size=32)
        assert rate.value == pytest.approx(value) and rate.growing
        assert reason == f"the batch size changed to 32: goes on from {value:.3g} towards {min(0.25 * limit, 0.4):.3g}"


def test_a_change_while_a_limit_is_confirmed_begins_anew() -> None:
    rate = Rate()
    rate.see(0.4)
    rate.value = 0.1
    rate.see(0.4)
    assert not rate.growing
    rate.grow_anew(0.5, step=100)
    assert rate.growing and rate.value == pytest.approx(0.05)
    assert "batch size changed" in rate.see(0.4, changed=True)


def test_another_momentum_scales_the_rate_its_bound_and_the_limits_seen() -> None:
    rate = settled(0.1)
    rate.grow_anew(4.0, step=100)
    rate.see(100.0, step=110)
    rate.scale(3.0)
    assert rate.value == pytest.approx(0.6)
    rate.see(1200.0, step=120)  # with 100 scaled by 3: the mean is 600
    assert rate._target == pytest.approx(0.25 * 600.0)
    rate.see(1e6, step=130)
    assert grown(rate) == pytest.approx(3 * 0.4)


# -- lost runs ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("share", "grows_on"), [(0.09, True), (0.11, False)])
def test_a_lost_run_halves_the_rate_which_grows_on_only_if_it_was_far_from_its_target(share: float, grows_on: bool) -> None:
    rate = Rate()
    rate.see(0.4)
    rate.value = share * 0.1
    rate.back_off()
    assert rate.value == pytest.approx(0.5 * share * 0.1) and rate.growing is grows_on
    rate.see(0.9)
    assert rate._target == pytest.approx(0.25 * 0.9), "limits of before are forgotten"


@pytest.mark.parametrize(("good", "before", "expected"), [(0.08, 0.3, 0.04), (0.3, 0.08, 0.04), (0.001, 0.3, 0.005)])
def test_a_run_lost_while_confirming_goes_back_to_the_lower_of_the_two_rates_before(good: float, before: float, expected: float) -> None:
    rate = Rate()
    rate.see(1.0)
    rate.value = good
    rate.remember()
    rate.value = before
    rate.see(0.04)
    assert rate.value == pytest.approx(0.01), "met its share of the low limit"
    rate.back_off()
    assert rate.value == pytest.approx(expected) and rate.settled


def test_a_settled_rate_stays_settled_after_a_lost_run() -> None:
    rate = settled(1e-9)
    rate.back_off()
    assert rate.settled and rate.value == 5e-10


# -- saving -------------------------------------------------------------------------------------------------------------------
def test_a_saved_rate_decides_as_the_original_in_every_phase() -> None:
    growing, confirming, changed = Rate(), Rate(), settled(0.1)
    growing.see(0.4)
    confirming.see(1.0)
    confirming.value = 0.08
    confirming.remember()
    confirming.value = 0.16
    confirming.see(0.4)
    changed.grow_anew(2.0, step=100)
    changed.see(3.0, step=101)
    for rate in (growing, confirming, changed, settled(0.3)):
        other = Rate()
        other.load_state_dict(rate.state_dict())
        assert other.state_dict() == rate.state_dict() and other.growing == rate.growing
        for _ in range(3):
            reasons = [each.see(0.3, step=350) for each in (rate, other)]
            assert reasons[0] == reasons[1] and rate.value == other.value
        other.back_off()
        rate.back_off()
        assert rate.value == other.value and rate.settled == other.settled


# -- when to measure ----------------------------------------------------------------------------------------------------------
def test_the_first_measurement_waits_for_an_adaptive_optimizers_second_moments() -> None:
    def first(total: int, adaptive: bool) -> int:
        made = pace(total, adaptive=adaptive)
        return next(step for step in range(total) if made.is_due(step))

    assert [first(total, False) for total in (10, 1000)] == [1, 1]
    assert [first(total, True) for total in (10, 60, 200, 1000)] == [1, 3, 10, 20]
    assert not pace(100).is_due(100), "after the last step a rate is of no use"


def test_growth_is_by_fifty_over_the_warm_up_and_slows_once_measurements_are_used_up() -> None:
    """2000 steps: 100 gradients, 9.3 for the first measurement, 12 more at 7.3; eight fall into the warm-up of 200 steps, 25 apart."""
    made = pace(2000)
    assert made.longest_growth == 600
    gaps, factors, step = [], [], 1
    for _ in range(11):
        factors.append(math.log(made.growth) / math.log(50) * 200)
        made.plan(step, settled=False, growing=True)
        gaps.append(next(s for s in range(step + 1, 2000) if made.is_due(s)) - step)
        step += gaps[-1]
    assert gaps == [25] * 8 + [50, 100, 200]
    assert factors == pytest.approx([1] * 9 + [0.5, 0.25]), "the same growth from one measurement to the next"
    made.restart()
    assert math.log(made.growth) / math.log(50) * 200 == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("total", "settings", "counts"),
    [
        (2000, {}, [4] * 10 + [3, 2, 2]),  # 12 measurements after the first
        (100_000, {}, [12] * 3),  # 200, the most
        (15_000, {}, [6] * 3),  # 101
        (100, {}, [4, 4, 3, 2, 2]),  # 4, the least
        (2000, {"budget": 0.5}, [8] * 3),  # 135
    ],
)
def test_limits_to_confirm_by_are_a_few_in_a_hundred_measurements_between_4_and_12_and_what_the_budget_leaves(
    total: int, settings: dict[str, Any], counts: list[int]
) -> None:
    made, seen = pace(total, **settings), []
    for step in range(len(counts)):
        seen.append(made.num_confirming)
        made.plan(step, settled=False, growing=True)
    assert seen == counts


def test_measurements_left_are_spread_over_the_steps_left() -> None:
    made = pace(2000)  # 13 in all
    for step in (1, 26, 51):
        made.plan(step, settled=False, growing=True)
    made.plan(76, settled=False, growing=False)
    made.plan(101, settled=True, growing=False)
    due = [step for step in range(102, 2000) if made.is_due(step)][:1]
    assert due == [101 + (2000 - 101) // 9 + 1], "8 of 13 are left, which part the rest into 9"
    made.plan(due[0], settled=True, growing=False)
    assert next(step for step in range(due[0] + 1, 2000) if made.is_due(step)) == due[0] + 212, "the distance stays"
    used_up = pace(100)
    for step in range(20):
        used_up.plan(step, settled=False, growing=False)
    used_up.plan(20, settled=True, growing=False)
    assert not any(used_up.is_due(step) for step in range(21, 100)), "none is left"


@pytest.mark.parametrize(
    ("total", "budget", "count"),
    [(900, 0.05, 4), (918, 0.05, 5), (100, 0.05, 4), (10_000, 0.05, 67), (29_000, 0.05, 197), (201_000, 0.05, 200), (2000, 0.5, 135)],
)
def test_measurements_are_what_the_budget_pays_for_between_4_and_200(total: int, budget: float, count: int) -> None:
    """9.3 gradients for the first (its graph 1.3 and 4 products at 2), 7.3 for each further one (3 products)."""
    made = pace(total, budget=budget)
    assert count == min(max(int((budget * total - 9.3) / 7.3), 4), 200)
    made.plan(0, settled=True, growing=False)
    assert next(step for step in range(1, total) if made.is_due(step)) == total // (count + 1) + 1, "the rest parts the run evenly"


def test_a_given_interval_is_kept_once_settled() -> None:
    made = pace(2000, interval=37)
    made.plan(100, settled=True, growing=False)
    assert [made.is_due(step) for step in (136, 137)] == [False, True]


def test_a_short_warm_up_measures_every_step_and_still_grows_by_fifty() -> None:
    made = pace(40, warmup=0.01)
    assert made.growth == pytest.approx(50.0), "in one step at least"
    made.plan(1, settled=False, growing=True)
    assert made.is_due(2)


def test_a_saved_pace_goes_on() -> None:
    made, other = pace(2000), pace(2000)
    for step in range(12):
        made.plan(step, settled=step > 10, growing=step < 10)
    other.load_state_dict(made.state_dict())
    assert (
        other.state_dict()
        == made.state_dict()
        == {"next": 11 + made._settled_every, "grown": 10, "made": 12, "settled_every": made._settled_every}
    )
    assert other.growth == made.growth and other.num_confirming == made.num_confirming


def test_a_given_peak_is_grown_to_whatever_the_first_limits_say() -> None:
    """As with Adam and a readout of zeros, whose first limit is a thousand times too low."""
    rate = Rate(peak=0.1)
    assert rate.value == pytest.approx(0.002), "from the first step on"
    assert "grows towards 0.1" in rate.see(1e-4, step=5)
    assert grown(rate) == 0.1
    assert "reached the peak given: settles at 0.1" in rate.see(0.3, step=101) and rate.settled
    assert "was above the limit" in rate.see(0.05, step=200) and rate.value < 0.1, "what is not stable is still lowered"
    adaptive = Rate(peak=0.1, adaptive=True)
    grown(adaptive)
    adaptive.see(0.3)
    assert "stays" in adaptive.see(0.05) and adaptive.value == 0.1, "Adam's limit by a few batches is too low by any factor"
    assert Rate(peak=0.1, max_lr=0.05).value == pytest.approx(0.001)
    other = Rate(peak=0.1)
    grown(other)
    other.see(0.3)
    other.grow_anew(0.25, step=50)
    other.see(0.2, changed=True, batch_size=2)
    assert other._target == pytest.approx(0.05), "of another batch size the peak says nothing: a share of its limit"


# -- fitted batches, and runs that blow up -----------------------------------------------------------------------------------------
def test_a_fitted_batch_never_raises_a_rate() -> None:
    """On 128 wines a batch of loss 1e-8 allowed 6e4, and the rate grew until the next batch was lost."""
    growing = Rate()
    growing.see(2.0)
    target = growing._target
    growing.see(6e4, loss=1e-8)
    assert growing._target == pytest.approx(target)
    growing.see(6e4, loss=0.9)
    assert growing._target > 10 * target, "a batch that is not fitted may"
    held = Rate()
    held.see(1.0)
    held.value = held._target
    held.see(1.0)
    before = held.value
    held.see(45.0, loss=1e-3)
    assert held.value <= before * (1 + 1e-9)
    held.see(0.1, loss=1e-3)
    assert held.value < before, "it may lower one"


def test_a_run_that_blows_up_is_lost_and_no_point_to_go_back_to() -> None:
    losses = watch(now=0.3)
    for loss in (0.1, 1.8, 61.0):
        losses.add(loss)
    assert not losses.is_lost and not losses.was_good, "two bad batches may be chance; the point is not good"
    for loss in (1e4, 880.0):
        losses.add(loss)
    assert losses.is_lost, "although the scatter is as large as the losses"
    early = LossWatch()
    for loss in (1.0, 1.1, 0.9, 1.0, 5.0, 5.0, 5.0, 5.0, 5.0):
        early.add(loss)
    assert not early.is_lost, "few losses say little of how much they vary"
    for _ in range(3):
        early.add(50.0)
    assert early.is_lost
