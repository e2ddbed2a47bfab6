"""A metric of one's own is one function; a registered one has a name, a cost and a limit."""

from __future__ import annotations

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
        ("slope", gradient_norm, {"gradients": 0}, ValueError, "gradients must be positive, got 0"),
    ],
)
def test_what_cannot_be_registered_is_refused(
    name: str, function: object, settings: dict[str, object], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        sk.register_metric(name, function, **settings)  # type: ignore[arg-type]
