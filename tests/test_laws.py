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
    "infinite": laws.infinite(),
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
