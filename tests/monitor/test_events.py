"""Each event is found where real dynamics show it, and not where noise, decay or a plain quadratic look like it.

The runs are gradient descent on functions whose Hessian is known in closed form.
"""

from __future__ import annotations

import json
import math
import random
import time
import tracemalloc
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from sharpkit._results import to_json
from sharpkit.monitor.events import EVENT_KINDS, Event, EventDetector

LR = 0.1
LIMIT = 2 / LR
Rows = list[dict[str, Any]]


def record(
    step: int, value: float, *, stderr: float = 0.0, limit: float | None = LIMIT, loss: float | None = None, metric: str = "lambda_max"
) -> dict[str, Any]:
    values = {metric: {"value": value, "stderr": stderr, "limit": limit}}
    return {"kind": "monitor_record", "version": 1, "step": step, "loss": loss, "lr": LR, "values": values, "failed": {}}


def top(hessian: list[list[float]]) -> float:
    return float(np.linalg.eigvalsh(np.array(hessian))[-1])


def events_of(rows: Iterable[dict[str, Any]], detector: EventDetector | None = None) -> list[Event]:
    detector = detector or EventDetector()
    return [event for row in rows for event in detector.update(row)]


def events_of_losses(losses: Iterable[tuple[int, float]]) -> list[Event]:
    """Losses alone, then a record without values that collects what they began."""
    detector, step = EventDetector(), 0
    for step, loss in losses:
        detector.update_loss(step, loss)
    return detector.update({"step": step, "loss": None, "values": {}})


def kinds(rows: Iterable[dict[str, Any]]) -> list[str]:
    return [event.kind for event in events_of(rows)]


# -- dynamics with a known answer ------------------------------------------------------------------


def quadratic(ratio: float, *, num_steps: int = 60, stderr: float = 0.0) -> Rows:
    """Gradient descent on f = lambda x^2 / 2 with lambda = ratio * 2 / lr."""
    x, rows, sharpness = 1.0, [], ratio * LIMIT
    for step in range(num_steps):
        rows.append(record(step, sharpness, stderr=stderr, loss=0.5 * sharpness * x**2))
        x -= LR * sharpness * x
    return rows


def sharpening(end: float, *, num_steps: int = 120, stderr: float = 0.05) -> Rows:
    """Gradient descent on f = lambda(t) x^2 / 2, lambda rising steadily from 5 to 35 unless it stops at ``end``."""
    x, rows = 1.0, []
    for step in range(num_steps):
        sharpness = min(5 + 30 * step / num_steps, end)
        rows.append(record(step, sharpness, stderr=stderr, loss=0.5 * sharpness * x**2))
        x -= LR * sharpness * x
    return rows


def about_the_edge(*, drift: float = 1.0, num_steps: int = 130) -> Rows:
    """Gradient descent on f = (20 + y) x^2 / 2 - drift y: the term in y sharpens, a large x flattens (2209.15594, the smallest case)."""
    x, y, rows = 0.8 * math.sqrt(2 * drift), 0.0, []
    for step in range(num_steps):
        loss = 0.5 * (LIMIT + y) * x * x - drift * y
        rows.append(record(step, top([[LIMIT + y, x], [x, 0.0]]), stderr=0.01, loss=loss))
        x, y = x - LR * (LIMIT + y) * x, y - LR * (0.5 * x * x - drift)
    return rows


def two_layers(factor: float, *, num_steps: int = 60) -> Rows:
    """Gradient descent on f = (u v)^2 / 2 from u = 6, v = 0.01, with lr = factor / lambda_max at the start (2003.02218)."""
    u, v = 6.0, 0.01
    lr, rows = factor / (u * u + v * v), []
    for step in range(num_steps):
        sharpness = top([[v * v, 2 * u * v], [2 * u * v, u * u]])
        rows.append(record(step, sharpness, stderr=1e-3, limit=2 / lr, loss=0.5 * (u * v) ** 2))
        u, v = u - lr * u * v * v, v - lr * u * u * v
    return rows


def noise(*, ratio: float, scatter: float, stderr: float, loss_noise: float = 0.1, seed: int = 0, num_steps: int = 1000) -> Rows:
    """Constant curvature read with noise, a loss that decays with noise."""
    draw, rows = random.Random(seed), []
    for step in range(num_steps):
        value = ratio * LIMIT * (1 + scatter * draw.gauss(0, 1))
        loss = (0.2 + 2 * math.exp(-step / 300)) * math.exp(loss_noise * draw.gauss(0, 1))
        rows.append(record(step, value, stderr=stderr * ratio * LIMIT, loss=loss))
    return rows


# -- nothing happens -------------------------------------------------------------------------------


def test_a_quadratic_far_below_its_limit_has_no_events() -> None:
    assert kinds(quadratic(0.5)) == []


@pytest.mark.parametrize(("scatter", "stderr"), [(0.1, 0.0), (0.1, 0.1), (0.3, 0.3)])
@pytest.mark.parametrize("seed", range(4))
def test_noise_about_half_the_limit_has_no_events(scatter: float, stderr: float, seed: int) -> None:
    assert kinds(noise(ratio=0.5, scatter=scatter, stderr=stderr, loss_noise=0.3, seed=seed)) == []


@pytest.mark.parametrize("seed", range(4))
def test_noise_at_the_limit_within_its_error_is_no_crossing_and_no_oscillation(seed: int) -> None:
    assert not {"limit_crossed", "self_stabilisation"} & set(kinds(noise(ratio=1.0, scatter=0.3, stderr=0.3, seed=seed)))


def test_a_steady_decay_of_curvature_and_loss_has_no_events() -> None:
    assert kinds(record(s, 18 * 0.99**s, stderr=0.1, loss=3 * 0.98**s) for s in range(0, 300, 5)) == []


def test_records_without_curvature_or_limit_are_taken() -> None:
    empty = {"step": 0, "loss": None, "values": {}, "failed": {"lambda_max": "OutOfMemoryError: ..."}}
    unlimited = [record(s, 30.0, limit=None, loss=1.0) for s in range(1, 20)]
    unknown = [record(s, math.nan, loss=math.nan) for s in range(20, 30)]
    assert kinds([empty, *unlimited, *unknown]) == []


# -- progressive sharpening ------------------------------------------------------------------------


def test_sharpening_below_the_limit_is_found_once_with_its_numbers() -> None:
    (event,) = events_of(sharpening(14.0))
    assert event.kind == "progressive_sharpening"
    assert "rose from 5.25 +- 0.05 (step 1) to 8 +- 0.05 (step 12)" in event.text  # lambda(1) = 5.25 and lambda(12) = 8
    assert "below the limit 20" in event.text


def test_a_slow_rise_counts_as_well() -> None:
    assert kinds(record(s, 5 * 1.004**s, stderr=0.02) for s in range(200)) == ["progressive_sharpening"]


def test_a_rise_within_its_errors_is_not_sharpening() -> None:
    assert kinds(sharpening(14.0, stderr=3.0)) == []
    assert kinds(sharpening(14.0, stderr=math.inf)) == []


def test_a_rise_by_a_tenth_is_not_sharpening() -> None:
    assert kinds(record(s, 5 + 0.5 * s / 100, stderr=0.001) for s in range(100)) == []


def test_a_second_rise_after_a_fall_is_a_second_episode() -> None:
    course = [5 + 0.2 * s for s in range(40)] + [13 - 0.2 * s for s in range(40)] + [5 + 0.2 * s for s in range(40)]
    assert kinds(record(s, value, stderr=0.05) for s, value in enumerate(course)) == ["progressive_sharpening"] * 2


# -- edge of stability -----------------------------------------------------------------------------


def test_sharpening_that_stops_at_the_limit_reaches_the_edge_once() -> None:
    assert kinds(sharpening(LIMIT)) == ["progressive_sharpening", "edge_of_stability"]


def test_a_quadratic_above_the_limit_diverges_and_is_not_at_the_edge() -> None:
    assert "edge_of_stability" not in kinds(quadratic(1.05))
    assert "edge_of_stability" not in kinds(quadratic(1.01))


def test_a_ratio_that_is_not_known_well_enough_is_not_at_the_edge() -> None:
    assert kinds(sharpening(0.99 * LIMIT, stderr=0.3 * LIMIT)) == []
    assert "edge_of_stability" in kinds(sharpening(0.99 * LIMIT, stderr=0.02 * LIMIT))


@pytest.mark.parametrize("ratio", [0.91, 0.97])
@pytest.mark.parametrize("stderr", [0.0, 0.02])
def test_a_curvature_that_never_rose_is_not_at_the_edge(ratio: float, stderr: float) -> None:
    assert kinds(quadratic(ratio, stderr=stderr * LIMIT)) == []


def test_a_rise_that_ends_below_the_limit_is_not_at_the_edge() -> None:
    assert kinds(sharpening(0.93 * LIMIT)) == ["progressive_sharpening"]


def test_a_run_watched_from_the_edge_on_is_at_the_edge() -> None:
    assert "edge_of_stability" in kinds(
        record(s, LIMIT * (1 + 0.03 * math.sin(2 * s)), stderr=0.01 * LIMIT, loss=0.99**s) for s in range(30)
    )


def test_the_edge_is_that_of_the_optimizer_in_use() -> None:
    adam = [record(s, 380.0, limit=380.0, metric="preconditioned_lambda_max") for s in range(9)]
    for row in adam:
        row["values"]["lambda_max"] = {"value": 3.0, "stderr": 0.0, "limit": None}
    (event,) = events_of(adam)
    assert event.text.startswith("Edge of stability")
    assert "preconditioned lambda_max has stayed at 1.00 +- 0.01 of the limit, now 380" in event.text
    for matrix in ("D^-1 H", "R H", "R D^-1 (H + decay)"):
        (event,) = events_of(adam, EventDetector({"condition": f"A name: lambda_max({matrix}) <= 2 / lr, R the groups' rates"}))
        assert f"lambda_max of {matrix} has stayed at 1.00 +- 0.01 of the limit, now 380" in event.text


# -- self-stabilisation ----------------------------------------------------------------------------


def test_oscillation_about_the_limit_is_self_stabilisation() -> None:
    rows = about_the_edge()
    ratios = [row["values"]["lambda_max"]["value"] / LIMIT for row in rows]
    crossings = sum((a > 1) != (b > 1) for a, b in pairwise(ratios))
    assert crossings >= 4  # the system does what the test is about
    found = [event for event in events_of(rows) if event.kind == "self_stabilisation"]
    assert len(found) == 1
    assert "crossed the limit, 20, 4 times, up and down in turn" in found[0].text


def test_one_passage_through_the_limit_is_not_self_stabilisation() -> None:
    assert "self_stabilisation" not in kinds(record(s, 30 * 0.97**s, stderr=0.01, loss=0.9**s) for s in range(60))


def test_a_learning_rate_that_goes_up_and_down_is_not_self_stabilisation() -> None:
    rows = [record(s, 20.0, stderr=0.01, limit=20 + 8 * math.sin(s / 3), loss=1.0) for s in range(100)]
    assert "self_stabilisation" not in kinds(rows)


def test_oscillation_with_a_loss_that_runs_away_is_not_self_stabilisation() -> None:
    rows = [record(s, 20 + 3 * math.sin(s / 3), stderr=0.01, loss=1.2**s) for s in range(100)]
    assert "self_stabilisation" not in kinds(rows)


# -- limit crossed ---------------------------------------------------------------------------------


def test_three_readings_above_the_limit_are_a_crossing_told_in_records_and_steps() -> None:
    found = [
        event
        for event in events_of({**row, "step": 10 * row["step"]} for row in quadratic(1.05, stderr=0.1))
        if event.kind == "limit_crossed"
    ]
    assert [event.step for event in found] == [20]
    assert "above the limit for 3 measurements, 20 steps from step 0 on; it is 21 +- 0.1 against 20" in found[0].text


def test_a_quadratic_just_below_the_limit_is_no_crossing() -> None:
    assert "limit_crossed" not in kinds(quadratic(0.99))


def test_above_by_less_than_two_errors_is_no_crossing() -> None:
    assert "limit_crossed" not in kinds(quadratic(1.05, stderr=0.6))  # 21 +- 0.6 against 20


def test_two_readings_above_are_no_crossing_and_a_new_excursion_is_a_new_one() -> None:
    course = [10.0] * 6 + [25.0] * 2 + [10.0] * 6 + [25.0] * 9 + [10.0] * 6 + [25.0] * 9
    assert kinds(record(s, value, stderr=0.1) for s, value in enumerate(course)).count("limit_crossed") == 2


# -- catapult --------------------------------------------------------------------------------------


def test_a_learning_rate_between_two_and_four_over_lambda_max_is_a_catapult() -> None:
    rows = two_layers(2.5)
    sharpness, losses = [r["values"]["lambda_max"]["value"] for r in rows], [r["loss"] for r in rows]
    assert max(losses) > 100 * losses[0] > 100 * losses[-1]
    assert sharpness[-1] < 0.8 * sharpness[0]
    found = [event for event in events_of(rows) if event.kind == "catapult"]
    assert len(found) == 1
    assert "the loss rose from 0.0018 (step 0)" in found[0].text
    assert "lambda_max fell from 36.000" in found[0].text


def test_below_two_over_lambda_max_there_is_no_catapult() -> None:
    assert kinds(two_layers(1.5)) == []


def test_divergence_is_no_catapult() -> None:
    assert "catapult" not in kinds(quadratic(1.05))


def test_a_loss_that_rises_and_falls_back_with_the_same_curvature_is_no_catapult() -> None:
    losses = [1.0] * 20 + [2.0, 4.0, 4.0, 2.0] + [0.5] * 20
    assert "catapult" not in kinds(record(s, 10.0, stderr=0.1, loss=loss) for s, loss in enumerate(losses))


def test_a_catapult_between_measurements_is_found_from_the_losses_alone() -> None:
    detector, found = EventDetector(), []
    for row in two_layers(2.5):
        if row["step"] % 12 == 0:
            found += detector.update(row)
        else:
            detector.update_loss(row["step"], row["loss"])
    assert [event.kind for event in found].count("catapult") == 1


# -- loss spikes -----------------------------------------------------------------------------------


def spiky(sharpness: float, *, num_steps: int = 60) -> Rows:
    draw = random.Random(0)
    return [record(s, sharpness, stderr=0.1, loss=(5.0 if s == 40 else 1.0) * math.exp(0.05 * draw.gauss(0, 1))) for s in range(num_steps)]


def test_a_spike_with_the_curvature_above_the_limit_is_explained() -> None:
    (event,) = [event for event in events_of(spiky(25.0)) if event.kind == "loss_spike"]
    assert event.step == 40
    assert "Explained by a crossing: lambda_max was 25 +- 0.1" in event.text


def test_a_spike_with_the_curvature_below_the_limit_is_said_to_be_unexplained() -> None:
    (event,) = events_of(spiky(10.0))
    assert event.kind == "loss_spike"
    assert "Not explained by the limit: lambda_max was 10 +- 0.1" in event.text


def spike_after(raised: float, *, at: int) -> str:
    """A curvature of half the limit, read every ten steps; the rate is multiplied at a step, and the loss jumps at step 46."""
    detector, draw = EventDetector(), random.Random(0)
    events: list[Event] = []
    for s in range(51):
        loss = (5.0 if s == 46 else 1.0) * math.exp(0.02 * draw.gauss(0, 1))
        detector.update_loss(s, loss)
        detector.note_rate(s, LR * raised if s >= at else LR)
        if s % 10 == 0 and s < 50:
            events += detector.update(record(s, 10.0, stderr=0.1, loss=loss))
    (event,) = events + detector.update({"step": 50, "values": {}})
    assert (event.kind, event.step) == ("loss_spike", 46)
    return event.text


def test_a_spike_after_a_raised_rate_is_explained_by_the_limit_at_that_rate() -> None:
    text = spike_after(20.0, at=44)
    assert "Explained by the learning rate: lambda_max was 10 +- 0.1 at step 40" in text
    assert "raised from 0.1 to 2 after that, where the limit is 1" in text
    assert "look at the data" not in text


def test_a_rate_raised_too_little_or_at_the_step_of_the_spike_itself_does_not_explain_it() -> None:
    assert "Not explained by the limit: lambda_max was 10 +- 0.1 at step 40, not above 13.33; even though the" in spike_after(1.5, at=44)
    text = spike_after(20.0, at=46)  # the step at the new rate is made after this loss
    assert "Not explained by the limit: lambda_max was 10 +- 0.1 at step 40, not above 20; look at the data" in text


def test_a_loss_that_becomes_nan_within_a_spike_is_an_event_of_its_own_said_once() -> None:
    course = [1.0] * 20 + [30.0] * 4 + [math.nan, 40.0, math.nan, math.nan]
    found = events_of_losses(enumerate(course))
    assert [(event.kind, event.step) for event in found] == [("loss_spike", 20), ("loss_spike", 24)]
    assert found[1].text.startswith("The loss is nan at step 24.")


def test_a_spike_that_stays_finite_is_one_event() -> None:
    assert len(events_of_losses(enumerate([1.0] * 20 + [30.0] * 4 + [1.0] * 9))) == 1


def test_a_spike_without_curvature_is_said_to_be_unexplained() -> None:
    found = events_of_losses((row["step"], row["loss"]) for row in spiky(10.0))
    assert [event.kind for event in found] == ["loss_spike"]
    assert "No curvature with a limit was measured" in found[0].text


def test_a_diverging_quadratic_ends_in_an_explained_spike() -> None:
    spikes = [event for event in events_of(quadratic(1.2)) if event.kind == "loss_spike"]
    assert spikes
    assert "Explained by a crossing" in spikes[0].text


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_a_spike_said_once(loss: float) -> None:
    found = events_of_losses((step, 1.0 if step < 4 else loss) for step in range(9))
    assert [(event.kind, event.step) for event in found] == [("loss_spike", 4)]


@pytest.mark.parametrize("seed", range(5))
def test_noisy_and_decaying_losses_are_no_spikes(seed: int) -> None:
    assert kinds(noise(ratio=0.5, scatter=0.0, stderr=0.01, loss_noise=0.4, seed=seed)) == []


def test_a_spike_in_a_fast_decay_is_seen() -> None:
    losses = [2 * math.exp(-s / 20) for s in range(60)]
    losses[45] = 1.5
    assert kinds(record(s, 10.0, loss=loss) for s, loss in enumerate(losses)) == ["loss_spike"]


def test_a_new_level_of_the_loss_is_one_spike() -> None:
    draw = random.Random(1)
    losses = [(1.0 if s < 50 else 4.0) * math.exp(0.05 * draw.gauss(0, 1)) for s in range(300)]
    assert kinds(record(s, 10.0, loss=loss) for s, loss in enumerate(losses)) == ["loss_spike"]


# -- the detector as a whole -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows", [two_layers(2.5), about_the_edge(drift=3.0, num_steps=120), spiky(25.0)], ids=["catapult", "edge", "spike"]
)
@pytest.mark.parametrize("cut", [7, 19, 41])
def test_a_saved_and_loaded_detector_goes_on_as_if_nothing_had_happened(rows: Rows, cut: int) -> None:
    first, second = EventDetector(), EventDetector()
    found = events_of(rows[:cut], first)
    second.load_state_dict(json.loads(to_json(first.state_dict())))
    assert found + events_of(rows[cut:], second) == events_of(rows)


def test_a_state_of_another_version_is_refused() -> None:
    with pytest.raises(ValueError, match="version 2, got version 7"):
        EventDetector().load_state_dict({**EventDetector().state_dict(), "version": 7})


def test_a_loss_given_twice_for_a_step_counts_once() -> None:
    detector, found = EventDetector(), []
    for row in spiky(10.0):
        detector.update_loss(row["step"], row["loss"])
        found += detector.update(row)
    assert [(event.kind, event.step) for event in found] == [("loss_spike", 40)]


def test_what_the_losses_begin_waits_for_the_next_record_also_across_a_restart() -> None:
    first, second = EventDetector(), EventDetector()
    for row in spiky(10.0):
        first.update_loss(row["step"], row["loss"])
    second.load_state_dict(json.loads(to_json(first.state_dict())))
    (event,) = second.update(record(60, 10.0))
    assert (event.kind, event.step) == ("loss_spike", 40)
    assert second.update(record(61, 10.0)) == []


def test_a_less_telling_curvature_does_not_mix_into_the_course() -> None:
    telling = [record(s, 380.0, limit=760.0, metric="preconditioned_lambda_max") for s in range(0, 40, 2)]
    other = [record(s, 3.0, limit=None) for s in range(1, 40, 2)]
    rows = [row for pair in zip(telling, other, strict=True) for row in pair]
    assert kinds(rows) == []


def test_a_run_that_goes_back_starts_anew() -> None:
    detector = EventDetector()
    events_of([record(s, 25.0, stderr=0.1) for s in range(100, 102)], detector)
    assert events_of([record(50, 25.0, stderr=0.1)], detector) == []  # the third above the limit, but of another course


def test_memory_stays_bounded_over_a_long_run() -> None:
    rows = about_the_edge(num_steps=100)
    detector = EventDetector()
    events_of(rows, detector)
    size = len(json.dumps(detector.state_dict()))
    tracemalloc.start()
    for lap in range(1, 30):
        for row in rows:
            detector.update({**row, "step": row["step"] + 100 * lap})
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(json.dumps(detector.state_dict())) < 3 * size
    assert grown < 200_000


def test_a_loss_takes_microseconds() -> None:
    detector, draw = EventDetector(), random.Random(0)
    losses = [math.exp(0.3 * draw.gauss(0, 1)) for _ in range(3000)]
    started = time.perf_counter()
    for step, loss in enumerate(losses):
        detector.update_loss(step, loss)
    assert (time.perf_counter() - started) / len(losses) < 500e-6  # measured: 20e-6


def test_kinds_are_distinct_words() -> None:
    assert len(set(EVENT_KINDS)) == 6
