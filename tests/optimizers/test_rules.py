"""The rule itself, against the matrix of the update that it stands for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from sharpkit.optimizers import UpdateRule


def spectral_radius(rule: UpdateRule, lr: float, curvature: float) -> float:
    """Of w <- (1 - decay) w - lr (direct g + share v), v <- momentum v + (1 - dampening) g, with g = (curvature + coupled decay) w."""
    a, b = (1.0, rule.momentum) if rule.nesterov else (rule.direct, rule.share)
    coupled, decoupled = (0.0, rule.weight_decay) if rule.decoupled else (rule.weight_decay, 0.0)
    reached = min(lr, rule.ceiling)
    g = torch.tensor([curvature + coupled, 0.0], dtype=torch.float64)
    v = (1 - rule.dampening) * g + torch.tensor([0.0, rule.momentum], dtype=torch.float64)
    w = torch.tensor([1 - lr * decoupled, 0.0], dtype=torch.float64) - reached * (a * g + b * v)
    return float(torch.linalg.eigvals(torch.stack([w, v])).abs().max())


@pytest.mark.parametrize(
    "settings",
    [
        {"direct": 0.3},
        {"direct": 0.3, "share": 0.6, "momentum": 0.9, "dampening": 0.9},
        {"direct": 0.3, "share": 0.6, "momentum": 0.9, "dampening": 0.9, "weight_decay": 2.0},
        {"direct": 0.3, "share": 0.6, "momentum": 0.9, "dampening": 0.9, "weight_decay": 0.2, "decoupled": True},
        {"share": 0.25, "dampening": 0.8},
        {"direct": 1.0, "share": 0.9, "momentum": 0.9},
        {"ceiling": 0.4},
        {"ceiling": 0.1, "weight_decay": 0.5, "decoupled": True},
        {"ceiling": 0.1, "weight_decay": 0.5, "momentum": 0.5, "direct": 0.4},
    ],
)
def test_the_update_breaks_where_the_rule_says(settings: dict[str, Any]) -> None:
    rule, curvature = UpdateRule(**settings), 7.0
    limit = rule.max_learning_rate(curvature)
    if math.isinf(limit):
        assert spectral_radius(rule, 1e6, curvature) < 1
        return
    assert spectral_radius(rule, 0.999 * limit, curvature) < 1 < spectral_radius(rule, 1.001 * limit, curvature)
    assert rule.max_curvature(limit) == pytest.approx(curvature)


def test_nesterov_is_the_gradient_and_momentum_times_the_buffer() -> None:
    nesterov, same = UpdateRule(0.9, nesterov=True), UpdateRule(0.9, direct=1.0, share=0.9)
    assert (nesterov.gain, nesterov.drive) == pytest.approx((2.8, 1.0))
    assert (same.gain, same.drive) == pytest.approx((2.8, 1.0))


def test_beyond_its_ceiling_a_rate_bounds_nothing_but_decoupled_decay() -> None:
    assert UpdateRule(ceiling=0.2).max_learning_rate(7.0) == math.inf, "2 / 7 is beyond"
    assert UpdateRule(ceiling=0.2).max_curvature(100.0) == pytest.approx(2 / 0.2)
    assert UpdateRule(ceiling=0.2, matrix="R H").max_learning_rate(7.0) == pytest.approx(2 / 7), (
        "a lower bound, with groups at several rates"
    )


def test_a_step_that_is_not_taken_bounds_nothing() -> None:
    assert UpdateRule(share=0.0).max_curvature(0.1) == math.inf == UpdateRule(share=0.0).max_learning_rate(7.0)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (UpdateRule(dampening=0.9, name="SGDScheduleFree"), "SGDScheduleFree: lambda_max(H) <= 2 / ((1 - 0.9) lr)"),
        (
            UpdateRule(0.9, 0.9, direct=0.1, share=0.9, adaptive=True, name="NAdam"),
            "NAdam: lambda_max(D^-1 H) <= 2 (1 + beta) / (0.28 lr), beta = 0.9",
        ),
        (
            UpdateRule(ceiling=0.1),
            "gradient descent: lambda_max(H) <= 2 / lr, for a rate of at most 0.1, beyond which its steps grow no longer",
        ),
    ],
)
def test_the_condition_says_what_counts(rule: UpdateRule, words: str) -> None:
    assert rule.condition == words


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"direct": -1.0}, "direct must be"),
        ({"share": -1.0}, "share must be"),
        ({"ceiling": 0.0}, "ceiling must be"),
        ({"momentum": 0.9, "nesterov": True, "direct": 0.5}, "not both"),
    ],
)
def test_rules_without_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UpdateRule(**settings)
