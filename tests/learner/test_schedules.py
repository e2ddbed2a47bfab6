"""Schedules: a torch scheduler as a share of its peak, and the refined schedule, linear for constant norms, by the formula for others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler

import sharpkit as sk
from sharpkit.learner.schedules import Multiplier


def factors(make: Callable[[Any], Any] | None, *, steps: int = 20) -> list[float]:
    multiplier = Multiplier(make)
    multiplier.rehearse(steps)
    values = [multiplier.value]
    for _ in range(steps):
        multiplier.advance()
        values.append(multiplier.value)
    return values


@pytest.mark.parametrize("peak", [1e-3, 1.0, 50.0])
def test_a_scheduler_with_rates_of_its_own_is_read_relative_to_its_peak(peak: float) -> None:
    cycle = factors(lambda o: lr_scheduler.OneCycleLR(o, max_lr=peak, total_steps=20))
    assert max(cycle) == 1.0 and cycle[0] == pytest.approx(1 / 25) and cycle.index(1.0) == 5
    assert max(factors(lambda o: lr_scheduler.CyclicLR(o, base_lr=peak / 4, max_lr=peak, step_size_up=5))) == 1.0


def test_one_that_multiplies_the_rate_is_taken_as_it_is() -> None:
    assert factors(lambda o: lr_scheduler.StepLR(o, 10, gamma=0.5)) == [1.0] * 10 + [0.5] * 10 + [0.25]
    assert factors(None) == [1.0] * 21
    warm = factors(lambda o: lr_scheduler.LambdaLR(o, lambda step: min(step / 4, 1)))
    assert warm[:6] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lr_scheduler.ReduceLROnPlateau, "ReduceLROnPlateau, whose step needs metrics"),
        (lambda o: lr_scheduler.LambdaLR(o, [lambda s: 1.0, lambda s: 0.5]), "one group of rate 1.*Expected 1 lr_lambdas"),
        (lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=11), "fails after 11 of total_steps=20"),
        (lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.0), "rise above 0"),
        (lambda o: lr_scheduler.LambdaLR(o, lambda step: float("inf")), "stay finite"),
        (lambda o: None, "it raised AttributeError"),
    ],
    ids=["plateau", "several lambdas", "too short", "zero", "infinite", "none"],
)
def test_a_scheduler_that_cannot_multiply_the_rate_is_refused_when_the_learner_is_made(make: Any, message: str) -> None:
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises((TypeError, ValueError), match=message):
        sk.CurvatureLearner(optimizer, model=model, loss=torch.nn.functional.mse_loss, total_steps=20, schedule=make)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("level", [1e-9, 1.0, 1e9])
def test_constant_norms_give_exactly_the_linear_decay(power: int, level: float) -> None:
    decay = sk.refined_schedule([level] * 200, power=power)
    for z in np.linspace(0, 1, 11):
        assert decay(z) == pytest.approx(1 - z, abs=1e-12)


def test_smooth_norms_follow_the_formula_and_growing_ones_decay_earlier() -> None:
    steps = np.arange(401)
    norms = 1 + steps / 400
    w = norms**-2.0
    expected = np.array([w[t] * w[t + 1 :].sum() for t in steps])
    expected /= expected.max()
    decay = sk.refined_schedule(norms)
    inner = steps[40:-40]  # the filter leaves a line as it is, but for the ends
    found = np.array([decay(t / 400) for t in inner])
    ratio = found / expected[inner]
    assert ratio.max() / ratio.min() < 1.01
    assert decay(0.5) < 0.5 * decay(0.0)
    assert sk.refined_schedule(norms[::-1])(0.5) > 0.5, "falling norms hold the rate up"


def test_single_spikes_are_filtered_out() -> None:
    norms = np.ones(300)
    norms[[50, 150, 250]] = 100.0
    assert sk.refined_schedule(norms)(0.5) == pytest.approx(0.5, abs=1e-9)


@pytest.mark.parametrize(
    ("norms", "message"), [([1.0, 2.0], "at least 3"), ([1.0, 0.0, 1.0], "positive"), ([1.0, np.nan, 1.0], "positive")]
)
def test_norms_without_sense_are_refused(norms: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sk.refined_schedule(norms)
    with pytest.raises(ValueError, match="power must be"):
        sk.refined_schedule([1.0] * 5, power=3)
