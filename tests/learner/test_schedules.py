"""The refined schedule: linear for constant norms, and the formula itself for others."""

from __future__ import annotations

import numpy as np
import pytest

import sharpkit as sk


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
