"""The monitor's budget, on a clock that only the test moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sharpkit as sk
from sharpkit.monitor import planner as budget
from sharpkit.monitor.planner import Planner, Stopwatch


class Clock:
    """time.perf_counter, moved by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(budget.time, "perf_counter", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def watched(
    clock: Clock, costs: dict[str, float], *, steps: int, step_seconds: float = 0.01, samples: int = 8, **settings: Any
) -> sk.Monitor:
    """A run whose steps and metrics take the seconds given; a metric takes its share of them when less of the batch is measured."""

    def metric(name: str) -> Any:
        def measured(objective: sk.Objective, optimizer: torch.optim.Optimizer) -> float:
            clock.now += costs[name] * objective.num_samples / samples
            return 1.0

        measured.__name__ = name
        return measured

    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = sk.Monitor(model, optimizer, loss=F.cross_entropy, metrics=[metric(name) for name in costs], **settings)
    x, y = torch.randn(samples, 2), torch.zeros(samples, dtype=torch.long)
    for _ in range(steps):
        clock.now += step_seconds
        monitor.step((x, y), loss=1.0)
    return monitor


@pytest.mark.parametrize("share", [0.01, 0.05, 0.2])
@pytest.mark.parametrize("cost", [0.02, 0.3])
def test_the_overhead_keeps_to_the_budget_and_uses_it(clock: Clock, share: float, cost: float) -> None:
    monitor = watched(clock, {"main": cost}, steps=20_000, budget=share, max_interval=10**9)
    assert 0.8 * share <= monitor.overhead <= 1.01 * share
    later = [record.overhead for record in monitor.history][3:]
    assert max(later) <= 1.01 * share
    assert monitor.history[-1].seconds == pytest.approx(cost)


def test_other_metrics_share_what_the_main_one_leaves(clock: Clock) -> None:
    monitor = watched(clock, {"main": 0.05, "dear": 1.0, "cheap": 0.05}, steps=20_000, budget=0.05)
    count = {name: sum(name in record for record in monitor.history) for name in ("main", "dear", "cheap")}
    assert monitor.overhead <= 0.0505
    # 200 s of training at 5 %: 6 s for the main metric, 2 s for each other
    assert count["main"] == pytest.approx(120, rel=0.1)
    assert count["cheap"] == pytest.approx(40, rel=0.15)
    assert count["dear"] in (1, 2)


def test_a_metric_that_becomes_slower_is_asked_less_often(clock: Clock) -> None:
    costs = {"main": 0.05}
    monitor = watched(clock, costs, steps=2000, budget=0.05)
    before = len(monitor.history)
    costs["main"] = 0.5
    x, y = torch.randn(8, 2), torch.zeros(8, dtype=torch.long)
    for _ in range(20_000):
        clock.now += 0.01
        monitor.step((x, y), loss=1.0)
    assert before == pytest.approx(20, abs=3)
    assert len(monitor.history) - before == pytest.approx(20, abs=3)
    assert monitor.overhead <= 0.0505


def test_a_pause_is_not_training_and_earns_nothing(clock: Clock) -> None:
    watch = Stopwatch()
    for gap in [0.01] * 20 + [60.0] + [0.01] * 20:
        clock.now += gap
        watch.enter()
        watch.leave()
    assert watch.training == pytest.approx(39 * 0.01 + 0.05, rel=1e-6)


def test_where_the_interval_would_be_too_long_less_of_the_batch_is_measured_and_the_record_says_so(clock: Clock) -> None:
    monitor = watched(clock, {"main": 4.0}, steps=30_000, samples=256, budget=0.05, max_interval=1000)
    seen = [record.num_samples for record in monitor.history]
    assert seen[0] == 256 and seen[-1] == 32
    assert monitor.overhead <= 0.0505
    gaps = [b.step - a.step for a, b in zip(monitor.history, list(monitor.history)[1:], strict=False)]
    assert gaps[-1] <= 1000


def test_a_fixed_interval_knows_no_budget(clock: Clock) -> None:
    monitor = watched(clock, {"main": 1.0}, steps=100, every=10)
    assert [record.step for record in monitor.history] == list(range(0, 100, 10))
    assert monitor.overhead == pytest.approx(10.0, rel=0.05), "and says what it costs"


def test_products_are_bounded_by_what_has_been_earned(clock: Clock) -> None:
    planner = Planner({"main": 6.0}, every="auto", budget=0.05, max_interval=10**9)
    for step in range(400):
        clock.now += 0.01
        planner.watch.enter()
        planner.watch.leave()
        if step == 8:
            planner.plan(step, may_halve=False)
    # 4 s of training earn 0.2 s: 12 products of 1.6 steps, one left for the graph
    assert planner.matvecs("main") == 11


def test_a_saved_plan_goes_on(clock: Clock) -> None:
    first = Planner({"main": 6.0, "other": 4.0}, every="auto", budget=0.05, max_interval=1000)
    for step in range(50):
        clock.now += 0.01
        first.watch.enter()
        first.watch.leave()
        if first.is_due(step):
            first.plan(step, may_halve=False)
    second = Planner({"main": 6.0, "other": 4.0}, every="auto", budget=0.05, max_interval=1000)
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict()
    clock.now += 3600  # between the two processes
    second.watch.enter()
    assert second.watch.training == first.watch.training


@pytest.mark.parametrize("share", [0.001, 0.05])
def test_the_first_record_comes_early_and_the_next_ones_pay_for_it(clock: Clock, share: float) -> None:
    monitor = watched(clock, {"main": 0.3}, steps=20_000 if share > 0.01 else 90_000, budget=share, max_interval=10**9)
    first, second = monitor.history[0], monitor.history[1]
    assert first.step <= 40
    assert second.step == pytest.approx(2 * 0.3 / share / 0.01, rel=0.2)  # when training has paid for both
    assert monitor.overhead <= 1.01 * share


def test_who_watches_is_told_at_the_first_step_and_a_run_too_short_for_its_budget_at_the_end(clock: Clock) -> None:
    heard: list[dict[str, Any]] = []

    class Place:
        open_run = write = staticmethod(heard.append)

        def close(self) -> None:
            pass

    monitor = watched(clock, {"main": 0.3}, steps=1, budget=0.05, sinks=Place())
    assert [(document["kind"], document["first_by"]) for document in heard] == [("monitor_run", 40)]
    monitor.close()
    short = watched(clock, {"main": 0.3}, steps=60, budget=0.05)
    with pytest.warns(
        sk.SharpkitWarning, match=r"measuring took 5\d% of the training time, more than the budget of 5.0%: .* 60 steps was too"
    ):
        short.close()
    by_hand = watched(clock, {"main": 0.3}, steps=4, every=2)
    by_hand.close()
    assert by_hand.history[0].step == 0
