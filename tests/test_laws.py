"""Schedules at their ends and against torch, the annealing law on what it made itself, calculators at published values."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

import sharpkit as sk
from sharpkit import laws

SCHEDULES = {
    "linear": laws.linear, "cosine": laws.cosine, "rex": laws.rex, "wsd": laws.wsd(), "wsd linear": laws.wsd(0.2, shape="linear"),
    "wsd inverse": laws.wsd(0.2, shape="inverse"), "cosine power": laws.cosine_power(), "unified": laws.unified(0.5),
    "infinite": laws.infinite(), "power": laws.power(),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_begin_at_the_peak_never_rise_and_end_low(name: str) -> None:
    values = [SCHEDULES[name](z) for z in np.linspace(0, 1, 301).tolist()]
    assert values[0] == pytest.approx(1.0)
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(values))
    assert 0 <= values[-1] <= 0.0101


def test_the_scheduler_is_torchs_own_with_its_state() -> None:
    def made() -> Any:
        optimizer = torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.1, 0.3)])
        return optimizer, laws.scheduler(optimizer, laws.cosine, total_steps=100, warmup=10)

    def rates(optimizer: Any, schedule: Any, steps: int) -> list[tuple[float, float]]:
        seen = []
        for _ in range(steps):
            seen.append(tuple(group["lr"] for group in optimizer.param_groups))
            optimizer.step()
            schedule.step()
        return seen

    whole = rates(*made(), 120)
    assert whole[0] == pytest.approx((0.01, 0.03)) and whole[10] == pytest.approx((0.1, 0.3))
    torchs = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(torchs, T_max=90)
    for step in range(90):
        assert whole[10 + step][0] == pytest.approx(torchs.param_groups[0]["lr"], abs=1e-12)
        torchs.step()
        reference.step()
    assert whole[-1] == pytest.approx((0.0, 0.0), abs=1e-12)
    early, late = made(), made()
    rates(*early, 40)
    late[0].load_state_dict(early[0].state_dict())
    late[1].load_state_dict(early[1].state_dict())
    assert rates(*late, 20) == whole[40:60]


def test_the_annealing_law_finds_itself_and_predicts_other_schedules() -> None:
    truth = laws.AnnealingLaw(1.8, 0.6, 0.4, 4.0, 0.0, 400)
    cosine, steps = 0.01 * np.array([laws.cosine(z) for z in np.linspace(0, 1, 400)]), 400
    noise = 1 + 0.002 * np.random.default_rng(0).normal(size=steps)
    law = laws.fit_annealing_law(truth.predict(cosine) * noise, cosine)
    assert law.error == pytest.approx(0.002, rel=0.2)
    for name in ("linear", "wsd", "wsd linear"):
        rates = 0.01 * np.array([SCHEDULES[name](z) for z in np.linspace(0, 1, 400)])
        assert law.predict(rates)[-1] == pytest.approx(truth.predict(rates)[-1], rel=0.01), name
    again = laws.AnnealingLaw.from_dict(law.to_dict())
    assert again == law
    several = laws.fit_annealing_law([truth.predict(cosine), truth.predict(cosine[::2])], [cosine, cosine[::2]])
    assert pytest.approx(4.0, rel=0.05) == several.C


def test_runs_that_tell_it_choose_the_memory_of_their_law() -> None:
    truth = laws.AnnealingLaw(1.8, 0.6, 0.4, 4.0, 0.0, 400, memory=0.995)
    runs = [0.01 * np.array([SCHEDULES[name](z) for z in np.linspace(0, 1, 400)]) for name in ("cosine", "wsd linear")]
    law = laws.fit_annealing_law([truth.predict(rates) for rates in runs], runs, memory="fit")
    assert law.memory == 0.995 and law.error < 1e-3
    assert laws.fit_annealing_law(truth.predict(runs[0]), runs[0]).memory == 0.999
    with pytest.raises((ValueError, TypeError), match="memory"):
        laws.fit_annealing_law(truth.predict(runs[0]), runs[0], memory="best")
    assert pytest.approx(4.0, rel=0.01) == laws.fit_annealing_law(truth.predict(runs[0]), runs[0], memory=0.995).C
    older = {key: value for key, value in truth.to_dict().items() if key != "memory"}
    assert laws.AnnealingLaw.from_dict(older).memory == 0.999


def test_a_law_that_cannot_be_known_is_refused_and_one_that_reaches_too_far_warns() -> None:
    flat = np.full(100, 0.1)
    with pytest.raises(ValueError, match="the rates never fall"):
        laws.fit_annealing_law(np.linspace(3, 2, 100), flat)
    with pytest.raises(ValueError, match="at least 20 losses"):
        laws.fit_annealing_law([2.0] * 5, [0.1, 0.1, 0.05, 0.02, 0.01])
    with pytest.raises(ValueError, match="one of each step"):
        laws.fit_annealing_law(np.ones(30), np.linspace(1, 0, 31))
    with pytest.warns(sk.SharpkitWarning, match="fitted to 10 steps and is asked about 100"):
        laws.AnnealingLaw(1.0, 1.0, 1.0, 1.0, 0.0, 10).predict(flat)


def test_calculators_at_published_values_and_outside() -> None:
    assert laws.step_law(1e9, 1e11).lr == pytest.approx(1.79 * 1e9**-0.713 * 1e11**0.307)
    with pytest.warns(sk.SharpkitWarning, match=r"N = 1e\+06 and D = 1e\+06 lie outside"):
        laws.step_law(1e6, 1e6)
    assert laws.critical_batch_size(3.0) == pytest.approx(2e8 * math.exp(-math.log(3.0) / 0.21))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: laws.wsd(1.5), "decay"),
        (lambda: laws.wsd(shape="square"), "shape"),
        (lambda: laws.infinite(0.7, 0.6), "add up to 1"),
        (lambda: laws.cosine_power(-1.0), "p must"),
        (lambda: laws.scheduler(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]), laws.linear, total_steps=5, warmup=5), "warmup"),
    ],
)
def test_what_makes_no_sense_is_refused(call: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()


# -- schedules with several ends, and powers ------------------------------------------------------------------------------------
def test_wsd_s_is_at_the_peak_again_after_each_checkpoint() -> None:
    schedule = laws.wsd_s((0.5, 1.0), decay=0.2)
    assert [schedule(z) for z in (0.0, 0.39, 0.5, 0.5001, 0.79, 1.0)] == pytest.approx([1, 1, 0.1, 1, 1, 0.1])
    middle = schedule(0.45)  # 1 / rate is linear: halfway between 1 and 10
    assert 1 / middle == pytest.approx(5.5)


def test_the_power_schedule_follows_the_papers_power_of_the_steps_made() -> None:
    schedule = laws.power(0.1, exponent=-0.51, decay=0.1)
    for z in (0.2, 0.5, 0.9):
        assert schedule(z) == pytest.approx((z / 0.1) ** -0.51)
    assert schedule(1.0) == pytest.approx(9**-0.51 / 100)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: laws.wsd_s((0.5, 0.4, 1.0)), "ascend to 1"),
        (lambda: laws.wsd_s((0.5,)), "ascend to 1"),
        (lambda: laws.wsd_s((0.95, 1.0), decay=0.2), "before the checkpoint at 0.95"),
        (lambda: laws.power(0.9, decay=0.2), "add up to 1"),
        (lambda: laws.power(exponent=0.5), "exponent"),
    ],
)
def test_schedules_that_make_no_sense_are_refused(call: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()


# -- norms of a run, and the schedule they call for ------------------------------------------------------------------------------
@pytest.mark.parametrize(("kind", "order"), [(torch.optim.SGD, 2), (torch.optim.AdamW, 1), (torch.optim.Adam, 1)])
def test_norms_are_those_of_the_papers_algorithm(kind: Any, order: int) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = kind(model.parameters(), lr=0.01)
    norms = laws.GradientNorms(optimizer)
    with pytest.raises(ValueError, match="after backward"):
        norms.record()
    expected = []
    for step in range(8):
        optimizer.zero_grad()
        (model(torch.full((1, 3), 1.0 + step)) ** 2).sum().backward()
        norms.record()
        expected.append(float(torch.cat([p.grad.flatten() for p in model.parameters()]).norm(order)))  # type: ignore[union-attr]
        optimizer.step()
    assert norms.values == pytest.approx(expected, rel=1e-6)
    direct = sk.refined_schedule(norms.values, power=order)
    again = laws.GradientNorms(optimizer)
    again.load_state_dict(norms.state_dict())
    assert [again.schedule()(z) for z in (0, 0.3, 1)] == [direct(z) for z in (0, 0.3, 1)]


def test_constant_norms_give_exactly_the_linear_decay_and_steps_without_a_gradient_are_left_out() -> None:
    norms = laws.GradientNorms(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]))
    norms.load_state_dict({"norms": [2.0] * 51 + [0.0, math.inf] + [2.0] * 50, "power": 2})
    assert all(norms.schedule()(z) == pytest.approx(1 - z, abs=1e-12) for z in np.linspace(0, 1, 23).tolist())
    with pytest.raises(ValueError, match="for power 1"):
        norms.load_state_dict({"norms": [], "power": 1})


# -- rewarming -------------------------------------------------------------------------------------------------------------------
def _quadratic() -> tuple[sk.Objective, torch.optim.Optimizer]:
    model = torch.nn.Linear(2, 1, bias=False).double()
    data = (torch.eye(2).double(), torch.zeros(2, 1).double())
    return sk.Objective(model, data, loss=torch.nn.functional.mse_loss), torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.5)


def test_rewarming_begins_where_the_rate_is_stable_and_climbs_by_a_constant_factor() -> None:
    objective, optimizer = _quadratic()  # lambda_max is 1, the limit 2 (1 + 0.5)
    advice = laws.rewarming(objective, optimizer, peak=6.0, steps_per_doubling=10)
    assert (advice.limit, advice.start, advice.steps) == pytest.approx((3.0, 1.5, 20))
    assert [advice.rate(step) for step in (0, 10, 20, 100)] == pytest.approx([1.5, 3.0, 6.0, 6.0])
    assert "begin at 1.5 and climb" in str(advice)
    assert laws.Rewarming.from_dict(advice.to_dict()).steps == 20
    with pytest.raises(ValueError, match="takes 20 steps, and the run has 20"):
        advice.scheduler(optimizer, total_steps=20)
    schedule, rates = advice.scheduler(optimizer, total_steps=60, schedule=laws.linear), []
    for _ in range(61):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:21] == pytest.approx([advice.rate(step) for step in range(21)])
    assert (rates[40], rates[60]) == pytest.approx((3.0, 0.0))


def test_a_peak_that_is_stable_at_once_needs_no_climb() -> None:
    advice = laws.rewarming(*_quadratic(), peak=1.0)
    assert (advice.steps, advice.start, advice.rate(0)) == (0, 1.0, 1.0)
    assert "no climb is needed" in str(advice)
    objective, _ = _quadratic()
    with pytest.raises(ValueError, match="has no state yet"):
        laws.rewarming(objective, torch.optim.Adam(objective.model.parameters()), peak=1.0)
