"""Each finding appears for a run that shows it, and for none that does not."""

from __future__ import annotations

import math
from typing import Any

import pytest

from sharpkit.monitor.findings import run_findings

Rows = list[dict[str, Any]]


def run(values: list[float], *, losses: list[float] | None = None, name: str = "lambda_max", **entry: Any) -> Rows:
    losses = losses or [1.0] * len(values)
    made = [{name: {"value": value, "stderr": 0.1, "limit": 20.0, **entry}} for value in values]
    return [{"step": 10 * i, "loss": loss, "values": v} for i, (v, loss) in enumerate(zip(made, losses, strict=True))]


def said(rows: Rows, part: str) -> list[str]:
    return [sentence for sentence in run_findings({}, rows) if part in sentence]


def test_the_limit_was_reached_where_a_value_lies_within_its_error_of_it() -> None:
    assert said(run([5.0, 15.0, 19.95]), "first reached the limit at step 20")
    assert said(run([5.0, 15.0, 19.5]), "no measurement reached the limit")


@pytest.mark.parametrize("stderr", [math.inf, 30.0, None])
def test_an_error_that_is_unknown_or_wide_reaches_no_limit(stderr: float | None) -> None:
    assert said(run([5.0, 10.0], stderr=stderr), "no measurement reached the limit")


def test_an_unknown_limit_is_said_and_a_known_one_is_not() -> None:
    assert said(run([5.0, 6.0], limit=None), "no stability limit is known")
    assert not said(run([5.0, 6.0]), "no stability limit is known")


def test_a_peak_within_the_run_is_named_and_a_plain_rise_has_none() -> None:
    assert said(run([5.0, 15.0, 6.0]), "Its highest value was 15 +- 0.1 at step 10")
    assert not said(run([5.0, 6.0, 15.0]), "highest value")


def test_a_small_share_of_the_limit_is_not_shown_as_none() -> None:
    assert said(run([0.02, 0.03], limit=40.0, stderr=0.001), "0.00075 times the limit 40")
    assert not said(run([0.02, 0.03], limit=40.0, stderr=0.001), "0.00 ")


def test_where_batch_sharpness_settled_is_said_of_means_that_converged() -> None:
    rows = run([18.0, 19.0, 21.0] * 4, name="batch_sharpness")
    assert said(rows, "batch sharpness lay at")
    assert not said(run([18.0, 19.0, 21.0] * 4, name="batch_sharpness", converged=False), "batch sharpness lay at")
    assert not said(rows[:6], "lay at")


def test_a_loss_that_was_thrown_back_up_is_told_with_its_numbers() -> None:
    losses = [2.3, 0.5, 0.02, 0.005, 0.005, 3.6, 3.6]
    (sentence,) = said(run([5.0] * 7, losses=losses), "The loss rose")
    assert sentence == "The loss rose from 0.005 (step 30) to 3.6 (step 60), the last one known; it began at 2.3."


@pytest.mark.parametrize(
    "losses",
    [
        [2.3, 0.5, 0.02, 0.005, 0.005, 0.006, 0.005],
        [2.3, 0.5, 0.4, 3.6, 0.3, 0.2, 0.1],  # a spike that training recovered from
        [1.0, 1.1, 0.9, 1.2, 0.8, 1.1, 1.3],  # batches
        [math.nan] * 7,
    ],
)
def test_a_loss_that_ends_low_or_scatters_is_not_called_lost(losses: list[float]) -> None:
    assert not said(run([5.0] * 7, losses=losses), "The loss")


@pytest.mark.parametrize(
    "text", ["The loss is nan at step 12. Not explained by the limit: look at the data.", "The loss is inf at step 12. x"]
)
def test_a_loss_that_was_not_finite_is_told_and_a_spike_is_left_to_the_events(text: str) -> None:
    rows = run([5.0] * 4)
    rows[2]["events"] = [{"kind": "loss_spike", "step": 12, "text": text}]
    assert said(rows, "The loss is") == [text.partition(". ")[0] + "."]
    rows[2]["events"][0]["text"] = "Loss spike: the loss jumped."
    assert not said(rows, "The loss is") and not said(rows, "Loss spike")


def test_failures_and_loose_values_are_counted_where_there_are_any() -> None:
    rows = run([5.0] * 3)
    assert not said(rows, "could not be measured") and not said(rows, "tolerance")
    rows[1]["failed"] = {"trace": "NonFiniteError: nan"}
    rows[2]["values"]["lambda_max"]["converged"] = False
    assert said(rows, "trace could not be measured once, last at step 10: NonFiniteError: nan")
    assert said(rows, "1 of 3 values of lambda_max were not computed to the tolerance")


@pytest.mark.parametrize(("overhead", "verdict"), [(0.05, "within the budget of 5.0%"), (0.054, "within"), (0.06, "ABOVE")])
def test_the_cost_is_held_against_the_budget(overhead: float, verdict: str) -> None:
    rows = run([5.0, 6.0])
    rows[-1]["overhead"] = overhead
    assert verdict in run_findings({"budget": 0.05}, rows)[-1]
    assert "budget" not in run_findings({}, rows)[-1]
    assert not any("Measuring took" in sentence for sentence in run_findings({}, run([5.0])))
