"""Stability limits are exact on quadratics: convergence just below, divergence just above, for every optimizer's real update."""

from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch

import sharpkit as sk
from sharpkit.optimizers import UpdateRule, update_rule

CURVATURE = 7.0


def _final_size(optimizer: torch.optim.Optimizer, w: torch.Tensor) -> float:
    for _ in range(5000):
        if not 1e-5 < float(w.detach().abs().max()) < 1e5:
            break
        optimizer.zero_grad()
        (0.5 * CURVATURE * w.square()).sum().backward()
        optimizer.step()
    return float(w.detach().abs().max())


def _sgd(lr: float, **settings: object) -> tuple[torch.optim.Optimizer, torch.Tensor]:
    w = torch.ones(1, dtype=torch.float64, requires_grad=True)
    return torch.optim.SGD([w], lr=lr, **settings), w  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.5, "nesterov": True},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.9, "dampening": 0.9},
        {"weight_decay": 3.0},
        {"momentum": 0.9, "weight_decay": 3.0},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 3.0},
        {"momentum": 0.9, "dampening": 0.5, "weight_decay": 3.0},
    ],
    ids=str,
)
def test_sgd_converges_just_below_the_limit_and_diverges_just_above(settings: dict[str, float]) -> None:
    limit = sk.stable_learning_rate(CURVATURE, optimizer=_sgd(0.1, **settings)[0])
    assert _final_size(*_sgd(0.99 * limit, **settings)) < 1e-2
    assert _final_size(*_sgd(1.01 * limit, **settings)) > 1e2


@pytest.mark.parametrize("beta", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 2.0])
def test_averaged_momentum_with_decoupled_decay_is_exact(beta: float, decay: float) -> None:
    """AdamW with its denominator held constant: m <- beta m + (1 - beta) g, w <- (1 - lr decay) w - lr m."""
    rule = UpdateRule(momentum=beta, dampening=beta, weight_decay=decay, decoupled=True)
    for factor, stable in ((0.999, True), (1.001, False)):
        lr, w, m = factor * rule.max_learning_rate(CURVATURE), 1.0, 0.0
        for _ in range(20000):
            m = beta * m + (1 - beta) * CURVATURE * w
            w = (1 - lr * decay) * w - lr * m
            if abs(w) > 1e12:
                break
        assert (abs(w) < 1e-3) is stable


def test_nesterov_with_decoupled_decay_is_exact() -> None:
    rule = UpdateRule(momentum=0.9, nesterov=True, weight_decay=2.0, decoupled=True)
    for factor, stable in ((0.999, True), (1.001, False)):
        lr, w, v = factor * rule.max_learning_rate(CURVATURE), 1.0, 0.0
        for _ in range(20000):
            g = CURVATURE * w
            v = 0.9 * v + g
            w = (1 - lr * 2.0) * w - lr * (g + 0.9 * v)
            if abs(w) > 1e12:
                break
        assert (abs(w) < 1e-3) is stable


class SGDScheduleFree(torch.optim.Optimizer):
    """The method of arXiv 2405.15682: gradients at y = (1 - beta) z + beta x, steps of z, x the mean of all z."""

    def __init__(self, params: Any, lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta = group["momentum"]
            for y in group["params"]:
                state = self.state[y] or {"z": y.clone(), "x": y.clone(), "k": 0}
                state["k"] += 1
                state["z"] -= group["lr"] * (y.grad + group["weight_decay"] * y)
                state["x"] += (state["z"] - state["x"]) / state["k"]
                y.copy_((1 - beta) * state["z"] + beta * state["x"])
                self.state[y] = state


@pytest.mark.parametrize("decay", [0.0, 5.0])
@pytest.mark.parametrize("package", [False, True], ids=["from the paper", "the package"])
def test_schedule_free_sgd_converges_just_below_its_limit_and_diverges_just_above(decay: float, package: bool) -> None:
    make = pytest.importorskip("schedulefree").SGDScheduleFree if package else SGDScheduleFree
    curvature = torch.tensor([10.0, 1.0], dtype=torch.float64)
    found = []
    for factor in (0.97, 1.03):
        w = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
        optimizer = make([w], lr=1.0, momentum=0.8, weight_decay=decay)
        if package:
            optimizer.train()
        limit = update_rule(optimizer).max_learning_rate(10.0)
        assert limit == pytest.approx(2 / (0.2 * (10 + decay)))
        optimizer.param_groups[0]["lr"] = factor * limit
        for _ in range(3000):
            optimizer.zero_grad()
            (0.5 * curvature * w.square()).sum().backward()
            optimizer.step()
        found.append(float(w.detach().abs().max()))
    assert found[0] < 1e-9 and found[1] > 1e9


def test_limits_have_their_closed_forms() -> None:
    assert sk.stable_learning_rate(10.0) == pytest.approx(0.2)
    assert sk.stable_learning_rate(10.0, momentum=0.9) == pytest.approx(0.38)
    assert sk.stable_learning_rate(10.0, momentum=0.9, nesterov=True) == pytest.approx(3.8 / 28)
    assert sk.stable_learning_rate(10.0, momentum=0.9, dampening=0.9) == pytest.approx(3.8)
    assert sk.stable_learning_rate(10.0, weight_decay=2.0) == pytest.approx(2 / 12)
    w = torch.nn.Parameter(torch.ones(1))
    assert sk.stable_learning_rate(10.0, optimizer=torch.optim.Adam([w])) == pytest.approx(3.8)
    assert sk.stable_learning_rate(10.0, optimizer=torch.optim.RMSprop([w], momentum=0.9)) == pytest.approx(0.38)
    assert sk.stable_learning_rate(10.0, optimizer=torch.optim.Adagrad([w])) == pytest.approx(0.2)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad"])
def test_max_curvature_inverts_max_learning_rate(name: str) -> None:
    w = torch.nn.Parameter(torch.ones(1))
    settings = {"momentum": 0.8, "weight_decay": 0.3} if name == "SGD" else {"weight_decay": 0.3} if name == "AdamW" else {}
    rule = update_rule(getattr(torch.optim, name)([w], lr=0.1, **settings))
    assert rule.max_curvature(rule.max_learning_rate(5.0)) == pytest.approx(5.0)


def test_the_interval_comes_from_the_eigenvalues_residual() -> None:
    pairs = sk.eigenpairs(torch.diag(torch.tensor([4.0, 1.0], dtype=torch.float64)), k=1)
    rate = sk.stable_learning_rate(pairs)
    assert rate == pytest.approx(0.5)
    assert rate.lower <= rate <= rate.upper
    wide = sk.stable_learning_rate(4.0, error=1.0)
    assert (wide.lower, wide.upper) == pytest.approx((2 / 5, 2 / 3))


def test_without_positive_curvature_the_rate_is_unbounded() -> None:
    rate = sk.stable_learning_rate(-1.0)
    assert math.isinf(rate) and "unbounded" in str(rate)


def test_the_rate_is_a_number_that_loads_anywhere() -> None:
    rate = sk.stable_learning_rate(10.0)
    assert type(pickle.loads(pickle.dumps(rate))) is float
    assert rate * 2 == pytest.approx(0.4)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        sk.stable_learning_rate(float("nan"))
    with pytest.raises(ValueError, match="momentum"):
        sk.stable_learning_rate(1.0, momentum=1.0)
    with pytest.raises(ValueError, match="Nesterov"):
        sk.stable_learning_rate(1.0, nesterov=True)
    with pytest.raises(sk.UnsupportedError, match="Rprop"):
        sk.stable_learning_rate(1.0, optimizer=torch.optim.Rprop([torch.nn.Parameter(torch.ones(1))]))


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_adam_on_a_quadratic_oscillates_exactly_when_its_preconditioned_curvature_exceeds_the_limit(kind: type) -> None:
    """Its second moment is frozen by beta2 = 1 - 1e-15 and an advanced step counter, so that the linear rule is what runs."""
    curvatures = torch.tensor([5.0, 1.0], dtype=torch.float64)
    for factor, stable in ((0.98, True), (1.02, False)):
        w = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
        optimizer = kind([w], lr=1e-9, betas=(0.9, 1 - 1e-15), weight_decay=0.0)
        (0.5 * curvatures * w.square()).sum().backward()
        optimizer.step()
        state = optimizer.state[w]
        state["step"].fill_(1e20)
        state["exp_avg_sq"].copy_(torch.tensor([0.3, 2.0]))
        matrix = sk.as_operator(torch.diag(curvatures))
        top = sk.eigenpairs(sk.PreconditionedOperator(matrix, diagonal=state["exp_avg_sq"].sqrt() + 1e-8), k=1).values[0]
        optimizer.param_groups[0]["lr"] = factor * sk.stable_learning_rate(float(top), optimizer=optimizer)
        with torch.no_grad():
            w.mul_(1e-6)
        state["exp_avg"].mul_(1e-6)
        for _ in range(3000):
            optimizer.zero_grad()
            (0.5 * curvatures * w.square()).sum().backward()
            optimizer.step()
            if float(w.detach().abs().max()) > 1e-3:
                break
        assert (float(w.detach().abs().max()) < 1e-6) is stable


# -- the rule of each optimizer, and what it says -----------------------------------------------------------------------------
def _weight() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(1))


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda w: torch.optim.SGD([w], lr=0.1), UpdateRule(name="SGD")),
        (
            lambda w: torch.optim.SGD([w], lr=0.1, momentum=0.9, dampening=0.5, weight_decay=0.3),
            UpdateRule(momentum=0.9, dampening=0.5, weight_decay=0.3, name="SGD"),
        ),
        (lambda w: torch.optim.SGD([w], lr=0.1, momentum=0.8, nesterov=True), UpdateRule(momentum=0.8, nesterov=True, name="SGD")),
        (
            lambda w: torch.optim.Adam([w], betas=(0.7, 0.99), weight_decay=0.3),
            UpdateRule(momentum=0.7, dampening=0.7, adaptive=True, name="Adam"),
        ),
        (
            lambda w: torch.optim.AdamW([w], betas=(0.7, 0.99), weight_decay=0.3),
            UpdateRule(momentum=0.7, dampening=0.7, weight_decay=0.3, decoupled=True, adaptive=True, name="AdamW"),
        ),
        (lambda w: torch.optim.RMSprop([w], momentum=0.6), UpdateRule(momentum=0.6, adaptive=True, name="RMSprop")),
        (lambda w: torch.optim.Adagrad([w]), UpdateRule(adaptive=True, name="Adagrad")),
        (
            lambda w: SGDScheduleFree([w], lr=0.1, momentum=0.8, weight_decay=0.3),
            UpdateRule(0.0, 0.8, weight_decay=0.3, name="SGDScheduleFree"),
        ),
    ],
    ids=["SGD", "SGD, all settings", "Nesterov", "Adam", "AdamW", "RMSprop", "Adagrad", "SGDScheduleFree"],
)
def test_each_optimizer_has_its_linear_rule(make: Any, rule: UpdateRule) -> None:
    assert update_rule(make(_weight())) == rule


def test_the_rule_is_that_of_the_group_asked_for() -> None:
    optimizer = torch.optim.SGD([{"params": [_weight()]}, {"params": [_weight()], "momentum": 0.7}], lr=0.1)
    assert [update_rule(optimizer).momentum, update_rule(optimizer, group=1).momentum] == [0.0, 0.7]


@pytest.mark.parametrize(
    ("rule", "gain", "decay"),
    [
        (UpdateRule(), 1.0, 0.0),
        (UpdateRule(0.5), 1.0, 0.0),
        (UpdateRule(0.5, weight_decay=3.0), 1.0, 3.0),
        (UpdateRule(0.5, nesterov=True, weight_decay=3.0), 2.0, 6.0),
        (UpdateRule(0.5, 0.25, weight_decay=3.0), 0.75, 2.25),
        (UpdateRule(0.5, 0.5, weight_decay=3.0, decoupled=True), 0.5, 4.5),
    ],
    ids=["plain", "momentum", "decay", "Nesterov", "dampening", "decoupled"],
)
def test_the_limit_is_2_1_plus_beta_over_gain_times_curvature_plus_decay(rule: UpdateRule, gain: float, decay: float) -> None:
    """lr (gain c + decay) = 2 (1 + beta), solved for the rate and for the curvature."""
    assert rule.max_learning_rate(7.0) == pytest.approx(2 * (1 + rule.momentum) / (gain * 7.0 + decay))
    assert rule.max_curvature(0.125) == pytest.approx((2 * (1 + rule.momentum) / 0.125 - decay) / gain)
    assert rule.max_learning_rate(-decay / gain) == math.inf, "where nothing is curved"


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (UpdateRule(), "gradient descent: lambda_max(H) <= 2 / lr"),
        (UpdateRule(0.9), "gradient descent: lambda_max(H) <= 2 (1 + beta) / lr, beta = 0.9"),
        (UpdateRule(0.9, nesterov=True), "gradient descent: lambda_max(H) <= 2 (1 + beta) / ((1 + 2 beta) lr), beta = 0.9"),
        (
            UpdateRule(0.9, 0.9, weight_decay=0.1, decoupled=True, adaptive=True, name="AdamW"),
            "AdamW: lambda_max(D^-1 H) <= 2 (1 + beta) / ((1 - 0.9) lr), beta = 0.9, less decoupled weight decay 0.1",
        ),
        (UpdateRule(weight_decay=0.1, name="SGD"), "SGD: lambda_max(H) <= 2 / lr, less weight decay 0.1"),
    ],
    ids=["plain", "momentum", "Nesterov", "AdamW", "decay"],
)
def test_the_condition_is_told_as_a_formula(rule: UpdateRule, words: str) -> None:
    assert rule.condition == words


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"momentum": -0.1}, r"momentum must be a number in \[0, 1\)"),
        ({"momentum": 1.0}, r"momentum must be a number in \[0, 1\)"),
        ({"dampening": -0.1}, r"dampening must be a number in \[0, 1\)"),
        ({"dampening": 1.0}, r"dampening must be a number in \[0, 1\)"),
        ({"weight_decay": -0.1}, "weight_decay must be a number of at least 0"),
        ({"nesterov": True}, "Nesterov momentum needs"),
        ({"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "Nesterov momentum needs"),
    ],
)
def test_rules_without_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UpdateRule(**settings)


@pytest.mark.parametrize("lr", [0.0, -1.0])
def test_no_curvature_is_stable_at_a_rate_that_is_not_positive(lr: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        UpdateRule().max_curvature(lr)


def test_the_interval_is_that_of_the_curvature() -> None:
    estimate = sk.Estimate(4.0, 1.0)
    rates = [sk.stable_learning_rate(estimate), sk.stable_learning_rate(estimate, error=2.0), sk.stable_learning_rate(4.0)]
    assert [(r.lower, float(r), r.upper) for r in rates] == [
        pytest.approx(v) for v in ((2 / 5, 0.5, 2 / 3), (2 / 6, 0.5, 1.0), (0.5, 0.5, 0.5))
    ]
    assert [str(r) for r in rates] == ["0.5 (0.4 to 0.6667)", "0.5 (0.3333 to 1)", "0.5"]
    wide = sk.stable_learning_rate(4.0, error=5.0)
    assert wide.upper == math.inf and wide.lower == pytest.approx(2 / 9), "the curvature may be none"
    smallest = sk.eigenpairs(torch.diag(torch.tensor([4.0, 1.0, -9.0, 0.0]).double()), k=2, which="smallest")
    flat = sk.stable_learning_rate(smallest)  # 0 comes out as 1e-16 on some processors
    assert flat > 1e12 and flat.upper == math.inf and smallest.values.tolist() == pytest.approx([0.0, -9.0], abs=1e-6)
    magnitude = sk.eigenpairs(torch.diag(torch.tensor([4.0, 1.0, -9.0, 0.0]).double()), k=2, which="magnitude")
    assert sk.stable_learning_rate(magnitude) == pytest.approx(0.5), "the largest of the values, not the first"


@pytest.mark.parametrize(("value", "error"), [(math.inf, 0.0), (-math.inf, 0.0), (1.0, math.nan)])
def test_a_curvature_that_is_no_number_is_refused(value: float, error: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        sk.stable_learning_rate(sk.Estimate(value, error))


@pytest.mark.parametrize(
    ("settings", "name"), [({}, "gradient descent"), ({"momentum": 0.9}, "SGD"), ({"weight_decay": 0.1}, "SGD")], ids=str
)
def test_without_an_optimizer_the_rule_is_named_by_its_settings(settings: dict[str, float], name: str) -> None:
    rate = sk.stable_learning_rate(4.0, **settings)
    assert rate.rule.startswith(f"{name}: ") and rate.lambda_max == 4.0
    assert repr(rate) == f"StableLearningRate({rate}: {rate.rule})"


def test_a_number_with_values_but_no_residuals_is_a_number() -> None:
    class Reading(float):
        values = torch.tensor([9.0])

    assert sk.stable_learning_rate(Reading(4.0)) == pytest.approx(0.5)


def test_decay_is_coupled_unless_asked_otherwise() -> None:
    plain, coupled, decoupled = (
        sk.stable_learning_rate(4.0, momentum=0.5, weight_decay=1.0, **options)
        for options in ({}, {"decoupled": False}, {"decoupled": True})
    )
    assert plain == coupled == pytest.approx(3 / 5) and decoupled == pytest.approx(3 / 5.5)


def test_the_document_of_a_rate_holds_what_it_was_computed_from() -> None:
    rate = sk.stable_learning_rate(sk.Estimate(4.0, 1.0))
    assert rate.to_dict() == {
        "kind": "stable_learning_rate",
        "version": 1,
        "value": 0.5,
        "lower": 0.4,
        "upper": pytest.approx(2 / 3),
        "rule": "gradient descent: lambda_max(H) <= 2 / lr",
        "lambda_max": 4.0,
    }


@pytest.mark.parametrize("error", [0.0, 0.25])
def test_an_error_may_be_as_small_as_one_likes(error: float) -> None:
    rate = sk.stable_learning_rate(4.0, error=error)
    assert (rate.lower, rate.upper) == pytest.approx((2 / (4 + error), 2 / (4 - error)))


@pytest.mark.parametrize("value", ["4", None, True, torch.ones(2)])
def test_curvatures_and_rates_are_numbers(value: Any) -> None:
    rule = UpdateRule()
    for method, name in ((rule.max_learning_rate, "curvature"), (rule.max_curvature, "lr")):
        with pytest.raises(TypeError, match=f"{name} must be a finite number, got|{name} must be"):
            method(value)
        assert method(np.float32(4)) == method(torch.tensor(4.0)) == method(4) == method(4.0) == 0.5  # type: ignore[arg-type]
    assert math.isnan(rule.max_learning_rate(math.nan)), "where curvature could not be measured, there is no rate"
