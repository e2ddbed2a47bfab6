"""A metric of one's own is one function; a registered one has a name, a cost and a limit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import sharpkit as sk
from sharpkit.monitor import metrics


@pytest.fixture(autouse=True)
def _registered_names_end_with_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "METRICS", dict(metrics.METRICS))


def gradient_norm(objective: sk.Objective, optimizer: torch.optim.Optimizer) -> float:
    return float(objective.gradient()[1].norm())


def estimated(objective: sk.Objective, optimizer: torch.optim.Optimizer) -> sk.Estimate:
    return sk.Estimate(3.0, 0.5, 7)


def one_record(metric: metrics.MetricLike) -> sk.Record:
    """After one step of gradient descent on ||w||^2 / 2 averaged over two outputs, at w = (1, 1)."""
    model = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = sk.Monitor(model, optimizer, loss=F.mse_loss, every=1, metrics=[metric])
    x, y = torch.eye(2), torch.zeros(2, 1)
    for _ in range(3):
        monitor.step((x, y))
    return monitor.history[-1]


def test_a_function_is_a_metric_under_its_own_name() -> None:
    assert one_record(gradient_norm)["gradient_norm"].value == pytest.approx(2**0.5)  # the gradient is (1, 1)


def test_a_registered_metric_is_asked_for_by_name_and_held_against_its_limit() -> None:
    sk.register_metric("slope", gradient_norm, gradients=1, limit=lambda optimizer: 2 / optimizer.param_groups[0]["lr"])
    measured = one_record("slope")["slope"]
    assert (measured.value, measured.limit) == (pytest.approx(2**0.5), pytest.approx(20))
    assert metrics.METRICS["slope"].gradients == 1


def test_an_estimate_keeps_its_error_and_cost() -> None:
    sk.register_metric("estimated", estimated, limit=lambda optimizer: None)
    measured = one_record("estimated")["estimated"]
    assert (measured.value, measured.stderr, measured.num_matvecs, measured.limit) == (3.0, 0.5, 7, None)


@pytest.mark.parametrize(
    ("name", "function", "settings", "error", "match"),
    [
        ("", gradient_norm, {}, ValueError, "name must be a text"),
        ("slope", "gradient_norm", {}, TypeError, "function must be a function .* got str"),
        ("slope", gradient_norm, {"limit": 20.0}, TypeError, "limit must be a function .* got float"),
        ("slope", gradient_norm, {"gradients": 0}, ValueError, "gradients must be a positive number, got 0"),
    ],
)
def test_what_cannot_be_registered_is_refused(
    name: str, function: object, settings: dict[str, object], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        sk.register_metric(name, function, **settings)  # type: ignore[arg-type]


# -- means over the last batches ---------------------------------------------------------------------------------------------------
def test_a_window_is_as_long_as_its_values_have_one_mean() -> None:
    draw = np.random.default_rng(0)
    steady = [metrics._num_steady((1 + 0.1 * draw.standard_normal(16)).tolist()) for _ in range(100)]
    assert np.mean([count == 16 for count in steady]) > 0.8
    for growth in (1.05, 1.2):  # a record
        values = growth ** np.arange(16) * (1 + 0.05 * draw.standard_normal((100, 16)))
        counts = [metrics._num_steady(row.tolist()) for row in values]
        errors = [2 * sk_error(row[-count:]) for row, count in zip(values, counts, strict=True)]
        means = [float(row[-count:].mean()) for row, count in zip(values, counts, strict=True)]
        covered = [abs(mean - growth**15) < 2 * error for mean, error in zip(means, errors, strict=True)]
        assert max(counts) < 16 and np.mean(covered) > 0.85


def sk_error(values: np.ndarray) -> float:
    return metrics.standard_error(values)


def sharpnesses(*, jump: bool, momentum: float = 0.0) -> list[sk.Record]:
    """Random batches; after 20 of 40 records all inputs are three times as large, which makes the curvature nine times as large."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4, generator=generator)
    model = torch.nn.Linear(4, 1, bias=False)
    torch.nn.init.uniform_(model.weight, -0.5, 0.5, generator=generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=momentum)
    monitor = sk.Monitor(model, optimizer, loss=F.mse_loss, every=1, metrics=["lambda_max", "batch_sharpness"])
    for step in range(40):
        at = torch.randint(64, (8,), generator=generator)
        batch = (x[at] * (3.0 if jump and step >= 20 else 1.0), torch.ones(8, 1) if step % 2 or not momentum else -torch.ones(8, 1))
        optimizer.zero_grad()
        F.mse_loss(model(batch[0]), batch[1]).backward()
        monitor.step(batch)
        optimizer.step()
    return list(monitor.history)


def test_batch_sharpness_forgets_batches_of_another_sharpness() -> None:
    def window(records: list[sk.Record]) -> list[int]:
        return [int(r["batch_sharpness"].method.split()[0]) for r in records if "batch_sharpness" in r]

    assert max(window(sharpnesses(jump=False))) > 12
    changed = sharpnesses(jump=True)
    first = int(changed[-1]["batch_sharpness"].method.split("steps ")[1].split()[0])
    assert first >= 20, "none from before the jump"
    before, after = (float(changed[i]["batch_sharpness"].value) for i in (19, -1))
    assert 5 < after / before < 20  # the earlier batches among them would leave less than 5


def test_batch_sharpness_of_another_rate_is_not_averaged_in() -> None:
    model = torch.nn.Linear(4, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    monitor = sk.Monitor(model, optimizer, loss=F.mse_loss, every=1, metrics=["batch_sharpness"])
    for step in range(12):
        optimizer.param_groups[0]["lr"] = 1e-3 if step < 10 else 1e-2
        monitor.step((torch.randn(8, 4, generator=torch.Generator().manual_seed(step)), torch.ones(8, 1)))
    assert monitor.history[9]["batch_sharpness"].method == "10 training batches, steps 0 to 9"
    assert monitor.history[11]["batch_sharpness"].method == "2 training batches, steps 10 to 11"


def test_a_mean_of_ratios_whose_denominator_crosses_0_has_not_converged() -> None:
    records = sharpnesses(jump=False, momentum=0.95)
    uphill = [r for r in records if "uphill" in r.failed.get("batch_sharpness", "")]
    assert uphill  # the targets' sign turns at every batch, the velocity does not
    after = [r["batch_sharpness"] for r in records[uphill[-1].step + 1 :] if "batch_sharpness" in r]
    assert all(not m.converged for m in after if "uphill left out" in m.method)
    plain = [r["batch_sharpness"] for r in sharpnesses(jump=False) if len(r)]
    assert all(m.converged for m in plain[1:])


def test_a_noise_scale_whose_gradient_is_lost_in_noise_is_marked_and_one_that_is_not_is_not() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 3, generator=generator)
    for shift, resolved in ((0.0, False), (3.0, True)):
        model = torch.nn.Linear(3, 1, bias=False)
        torch.nn.init.zeros_(model.weight)
        y = torch.randn(32, 1, generator=generator) + shift * x[:, :1]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        monitor = sk.Monitor(model, optimizer, loss=F.mse_loss, every=1, metrics=["lambda_max", "noise_scale"])
        record = monitor.step((x, y))
        assert record is not None
        measured = record["noise_scale"]
        assert measured.converged is resolved
        assert ("not resolved: |G|^2" in measured.method) is not resolved
        assert ("not converged" in repr(record).partition("noise scale")[2]) is not resolved


def test_errors_under_autocast_hold_the_rounding_of_its_type() -> None:
    model = torch.nn.Linear(4, 1)
    batch = (torch.randn(16, 4, generator=torch.Generator().manual_seed(0)), torch.ones(16, 1))
    for autocast, rounding in ((None, 0.0), (torch.bfloat16, 2 * 2.0**-7)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        settings = {"metrics": ["lambda_max", "directional_sharpness"], "autocast": autocast}
        record = sk.Monitor(model, optimizer, loss=F.mse_loss, every=1, **settings).step(batch)
        assert record is not None
        along = record["directional_sharpness"]
        assert along.stderr == pytest.approx(rounding * abs(along.value))
        assert math.isfinite(record["lambda_max"].stderr) and record["lambda_max"].stderr >= 0.5 * rounding * record["lambda_max"].value
