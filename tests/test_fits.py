"""Power laws and slopes of logarithms: exact on power laws, intervals that cover, errors that grow where the law is no power law."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from sharpkit._results import to_json
from sharpkit.fits import PowerLaw, Slope, bootstrap_interval, log_slope, power_law

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


def test_power_laws_are_found_exactly_where_there_is_no_scatter() -> None:
    x = np.geomspace(1, 1000, 8)
    law = power_law(x, 3 * x**-0.4, num_resamples=20)
    assert (law.amplitude, law.exponent, law.offset) == pytest.approx((3.0, -0.4, 0.0), rel=1e-9)
    assert law.exponent.upper - law.exponent.lower < 1e-9
    assert law.at(1e4) == pytest.approx(3 * 1e4**-0.4, rel=1e-9)
    above = power_law(x, 2 + 3 * x**-0.4, offset=True, num_resamples=20)
    assert (above.amplitude, above.exponent, above.offset) == pytest.approx((3.0, -0.4, 2.0), rel=1e-5)
    assert "above an offset of 2" in above.findings()[0]


@pytest.mark.parametrize("trials", [40, pytest.param(400, marks=pytest.mark.slow)])
def test_the_intervals_of_a_power_law_cover_as_often_as_they_say(trials: int) -> None:
    rng, x = np.random.default_rng(0), np.geomspace(1, 100, 8)
    covered = np.zeros(2)
    for seed in range(trials):
        law = power_law(x, 2 * x**-0.5 * np.exp(0.05 * rng.standard_normal(8)), seed=seed, num_resamples=100)
        there = law.at(300)
        covered += [law.exponent.lower <= -0.5 <= law.exponent.upper, there.lower <= 2 * 300**-0.5 <= there.upper]
    chance = 3 * math.sqrt(0.95 * 0.05 / trials)
    assert (np.abs(covered / trials - 0.95) < chance).all(), covered / trials


def test_a_diverged_run_does_not_turn_the_law() -> None:
    x = np.geomspace(1, 100, 12)
    y = x**-0.5 * np.exp(0.02 * np.random.default_rng(1).standard_normal(12))
    y[-1] *= 30
    assert power_law(x, y).exponent == pytest.approx(-0.5, abs=0.05)
    assert np.polyfit(np.log(x), np.log(y), 1)[0] > -0.4  # least squares follows it


def test_errors_weigh_the_points() -> None:
    x, y = np.array([1.0, 2.0, 4.0, 8.0, 16.0]), np.array([1.0, 2.0, 4.0, 8.0, 40.0])
    sure = power_law(x, y, errors=y * np.array([0.01, 0.01, 0.01, 0.01, 10.0]), num_resamples=20)
    assert sure.exponent == pytest.approx(1.0, abs=0.01)


def test_a_power_law_is_saved_read_back_and_repeated_by_its_seed() -> None:
    x, y = [1.0, 2.0, 4.0, 8.0], [3.0, 4.1, 6.2, 8.3]
    law = power_law(x, y, seed=3)
    assert power_law(x, y, seed=3) == law
    again = PowerLaw.from_dict(json.loads(to_json(law.to_dict())))
    assert again.at(5) == law.at(5) and again.at(5).upper == law.at(5).upper
    assert repr(law).startswith("PowerLaw(y = 2.98 x^0.5, exponent 0.4")


def test_a_law_without_dependence_says_so() -> None:
    y = 2 * np.exp(0.1 * np.random.default_rng(0).standard_normal(10))
    assert "contains 0" in power_law(np.arange(1.0, 11.0), y).findings()[1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (((1, 2, 3), (1, 2)), "of one length, got 3 and 2"),
        (((1, 2), (1, 2)), "at least 3 different x, got 2"),
        (((1, 1, 2, 2), (1, 2, 3, 4)), "at least 3 different x, got 2"),
        (((1, 2, 3), (1, -2, 3)), "y"),
        (((1, 2, 3), (1, math.inf, 3)), "each of y must be a positive number, got inf"),
    ],
)
def test_points_that_make_no_law_are_refused(arguments: tuple[tuple[float, ...], tuple[float, ...]], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        power_law(*arguments)


def test_the_bootstrap_interval_of_a_mean_is_students() -> None:
    values = np.random.default_rng(0).standard_normal(200)
    low, high = bootstrap_interval(lambda drawn: float(values[drawn].mean()), 200, num_resamples=4000)
    assert (high - low) / 2 == pytest.approx(1.97 * values.std(ddof=1) / math.sqrt(200), rel=0.05)
    with pytest.raises(ValueError, match="count"):
        bootstrap_interval(lambda drawn: 0.0, 1)
