"""Slopes of logarithms: exact on power laws, intervals that cover, errors that grow where the law is no power law."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from sharpkit._results import to_json
from sharpkit.transfer.fits import Slope, log_slope

WIDTHS = (64, 128, 256, 512)


@pytest.mark.parametrize("exponent", [-1.0, -0.5, 0.0, 0.5, 1.0])
def test_a_power_law_gives_its_exponent_without_error(exponent: float) -> None:
    slope = log_slope({w: [3.0 * w**exponent] * 2 for w in WIDTHS})
    assert slope.value == pytest.approx(exponent, abs=1e-12)
    assert slope.stderr < 1e-12
    assert slope.num_points == 8


def test_the_interval_covers_the_true_exponent_at_least_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    trials = 400
    covered = 0
    for _ in range(trials):
        covered += log_slope({w: list(w**0.3 * np.exp(0.1 * rng.standard_normal(3))) for w in WIDTHS}).contains(0.3)
    assert covered / trials >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / trials)  # never less; the larger of two errors may cover more
    assert covered / trials < 1.0


def test_a_bent_curve_is_not_a_precise_slope() -> None:
    bent = {w: [1.0 if w < 256 else 4.0] * 50 for w in WIDTHS}  # the seeds agree perfectly, the widths do not lie on a line
    means_only = {w: v[:1] for w, v in bent.items()}
    assert log_slope(bent).stderr >= log_slope(means_only).stderr * 0.999


def test_what_is_not_positive_and_finite_is_left_out() -> None:
    slope = log_slope({64: [1.0, math.nan], 128: [2.0, 0.0], 256: [4.0, math.inf]})
    assert slope.value == pytest.approx(1.0)
    assert slope.num_points == 3


@pytest.mark.parametrize("sizes", [{}, {64: [1.0, 2.0]}, {64: [1.0], 128: [math.nan]}])
def test_fewer_than_two_widths_give_an_unknown_slope(sizes: dict[int, list[float]]) -> None:
    slope = log_slope(sizes)
    assert math.isnan(slope.value)
    assert math.isinf(slope.stderr)
    assert not slope.contains(0.0)
    assert str(slope) == "unknown"


def test_two_points_know_no_error() -> None:
    slope = log_slope({64: [1.0], 128: [2.0]})
    assert slope.value == pytest.approx(1.0)
    assert math.isinf(slope.half_width)


def test_a_slope_survives_json() -> None:
    for slope in (log_slope({64: [1.0, 1.1], 128: [2.0, 2.1]}), Slope(math.nan, math.inf, math.inf, 0)):
        back = Slope.from_dict(json.loads(to_json(slope.to_dict())))
        assert (
            (back.value == slope.value or math.isnan(slope.value)) and back.stderr == slope.stderr and back.num_points == slope.num_points
        )
