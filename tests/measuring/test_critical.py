"""The critical learning rate: exact on quadratics, along the optimizer's very own next step, and without a trace."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import built, gaussian, relative_error
from torch import Tensor, nn
from traces import untouched

import sharpkit as sk
from sharpkit.objective.params import moved
from sharpkit.optimizers import next_update

BRACKET = 1 / 16
H = torch.diag(torch.tensor([8.0, 3.0, 1.0, 0.5, 0.1, 0.01], dtype=torch.float64))
CENTRE = gaussian(6, seed=4)


class Pair(nn.Module):
    """Two parameters, so that groups may differ."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(2, 2)), nn.Parameter(torch.randn(2))

    @property
    def w(self) -> Tensor:
        return torch.cat([self.first.reshape(-1), self.second])


def quadratic(evaluations: list[float] | None = None) -> sk.Objective:
    """0.5 (w - c)^T H (w - c)."""

    def closure(model: nn.Module, batch: Tensor) -> Tensor:
        d = model.w - CENTRE
        loss = 0.5 * d @ H @ d + 0 * batch.sum()
        if evaluations is not None and not torch.is_grad_enabled():
            evaluations.append(float(loss))
        return loss

    return sk.Objective(built(Pair), torch.ones(1, 1, dtype=torch.float64), closure=closure, count=len)


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": [model.first], "lr": 0.02}, {"params": [model.second], "lr": 0.05}]


OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]]], torch.optim.Optimizer]] = {
    "SGD": lambda g: torch.optim.SGD(g, lr=0.02),
    "momentum": lambda g: torch.optim.SGD(g, lr=0.02, momentum=0.9, dampening=0.1, weight_decay=0.01),
    "Nesterov": lambda g: torch.optim.SGD(g, lr=0.02, momentum=0.9, nesterov=True, weight_decay=0.01),
    "foreach SGD": lambda g: torch.optim.SGD(g, lr=0.02, momentum=0.9, foreach=True),
    "Adam": lambda g: torch.optim.Adam(g, lr=0.02, weight_decay=0.01),
    "amsgrad": lambda g: torch.optim.Adam(g, lr=0.02, amsgrad=True, betas=(0.8, 0.95)),
    "AdamW": lambda g: torch.optim.AdamW(g, lr=0.02, weight_decay=0.1),
    "RMSprop": lambda g: torch.optim.RMSprop(g, lr=0.02, momentum=0.5, centered=True),
    "Adagrad": lambda g: torch.optim.Adagrad(g, lr=0.02, lr_decay=0.01, initial_accumulator_value=0.1),
    "NAdam": lambda g: torch.optim.NAdam(g, lr=0.02, weight_decay=0.01, decoupled_weight_decay=True),
    "maximizing": lambda g: torch.optim.SGD(g, lr=0.02, maximize=True),
}


def step(objective: sk.Objective, optimizer: torch.optim.Optimizer) -> None:
    layout = objective.layout
    for p, g in zip(layout.params, layout.split(objective.gradient()[1]), strict=True):
        p.grad = g.clone()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("scheduled", [False, True], ids=["", "scheduled"])
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_next_update_is_the_step_that_the_optimizer_then_makes(name: str, steps: int, scheduled: bool) -> None:
    objective = quadratic()
    optimizer = OPTIMIZERS[name](groups_of(objective.model))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9) if scheduled else None
    for _ in range(steps):
        step(objective, optimizer)
        if scheduler is not None:
            scheduler.step()
    with untouched(objective.model, optimizer=optimizer):
        update = next_update(optimizer, objective.layout, objective.gradient()[1])
    before, lr = objective.layout.current(), optimizer.param_groups[0]["lr"]
    step(objective, optimizer)
    assert relative_error(update, (before - objective.layout.current()) / lr) < 1e-10


def test_hooks_of_the_optimizer_are_not_run_and_frozen_rates_are_taken_as_one() -> None:
    objective, calls = quadratic(), []
    optimizer = torch.optim.SGD(objective.model.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    gradient = objective.gradient()[1]
    assert relative_error(next_update(optimizer, objective.layout, gradient), gradient) < 1e-12
    assert calls == []


def test_parameters_that_the_optimizer_does_not_hold_stay() -> None:
    objective = quadratic()
    optimizer = torch.optim.SGD([objective.model.second], lr=0.1)
    update = next_update(optimizer, objective.layout, objective.gradient()[1])
    assert not update[:4].any() and update[4:].all()


@pytest.mark.parametrize("name", ["SGD", "momentum", "Nesterov", "Adam", "AdamW", "RMSprop", "NAdam"])
def test_on_a_quadratic_it_is_two_slopes_over_the_curvature(name: str) -> None:
    objective = quadratic()
    optimizer = OPTIMIZERS[name](groups_of(objective.model))
    for _ in range(2):
        step(objective, optimizer)
    gradient = objective.gradient()[1]
    u = next_update(optimizer, objective.layout, gradient)
    exact = float(2 * u @ gradient / (u @ H @ u))
    for guess in (None, 1e-4, 1e3, exact):
        found = sk.critical_learning_rate(objective, optimizer, guess=guess)
        assert found.outcome == "found"
        assert found.lower <= exact * (1 + 1e-9) and found.upper >= exact * (1 - 1e-9)
        assert 1 - BRACKET <= found.lower / found.upper < 1
        assert found.lower < found.value < found.upper and float(found) == found.value
        assert found.sharpness == pytest.approx(2 / found.value)
    assert 2 / sk.directional_sharpness(objective, optimizer) == pytest.approx(exact, rel=1e-9)


def test_a_finer_bracket_can_be_asked_for() -> None:
    objective = quadratic()
    optimizer = torch.optim.SGD(objective.model.parameters(), lr=0.1)
    found = sk.critical_learning_rate(objective, optimizer, rtol=1e-4)
    assert found.lower / found.upper >= 1 - 1e-4
    assert found.value == pytest.approx(2 / sk.directional_sharpness(objective, optimizer), rel=1e-4)


def test_from_the_last_answer_it_takes_six_forward_passes() -> None:
    evaluations: list[float] = []
    objective = quadratic(evaluations)
    optimizer = torch.optim.SGD(objective.model.parameters(), lr=0.01)
    first = sk.critical_learning_rate(objective, optimizer)
    for _ in range(3):
        step(objective, optimizer)
        gradient = objective.gradient()[1]
        evaluations.clear()
        again = sk.critical_learning_rate(objective, optimizer, guess=first.value, gradient=gradient)
        assert again.num_evaluations == len(evaluations) <= 6
        first = again


def closed(value: Callable[[Tensor], Tensor], start: float) -> sk.Objective:
    model = built(lambda: nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        model.weight.fill_(start)
    return sk.Objective(model, torch.ones(1, 1, dtype=torch.float64), closure=lambda m, b: value(m.weight[0, 0]) + 0 * b.sum(), count=len)


def test_a_loss_that_is_not_a_number_counts_as_risen() -> None:
    objective = closed(torch.sqrt, 1.0)  # gradient 1/2; at rate 2 the weight is 0, beyond it the root is NaN
    optimizer = torch.optim.SGD(objective.model.parameters(), lr=0.1)
    found = sk.critical_learning_rate(objective, optimizer)
    assert found.outcome == "found" and found.lower <= 2 <= found.upper
    infinite = closed(lambda w: w + torch.where(w < -1, math.inf, 0.0), 1.0)
    found = sk.critical_learning_rate(infinite, torch.optim.SGD(infinite.model.parameters(), lr=0.1))
    assert found.lower <= 2 <= found.upper


def test_a_loss_that_never_rises_is_unbounded_not_a_number() -> None:
    objective = closed(lambda w: -w, 1.0)
    found = sk.critical_learning_rate(objective, torch.optim.SGD(objective.model.parameters(), lr=0.1))
    assert found.outcome == "unbounded" and math.isinf(found.value) and found.sharpness == 0
    assert "unbounded" in str(found)
    flat = closed(lambda w: 0 * w, 1.0)
    found = sk.critical_learning_rate(flat, torch.optim.SGD(flat.model.parameters(), lr=0.1))
    assert found.outcome == "unbounded" and found.num_evaluations == 0


def test_a_step_uphill_is_called_ascent() -> None:
    objective = quadratic()
    optimizer = torch.optim.SGD(objective.model.parameters(), lr=0.1, maximize=True)
    found = sk.critical_learning_rate(objective, optimizer)
    assert (found.outcome, found.value, found.upper) == ("ascent", 0.0, 0.0) and math.isinf(found.sharpness)
    assert "no descent direction" in str(found)
    assert found.to_dict()["outcome"] == "ascent"


def test_momentum_that_overshot_is_called_ascent() -> None:
    objective = closed(lambda w: w**2, 1.0)
    optimizer = torch.optim.SGD(objective.model.parameters(), lr=0.9, momentum=0.9)
    step(objective, optimizer)  # to -0.8, where the slope is -1.6 and 0.9 of the velocity 2 still goes on: uphill
    assert sk.critical_learning_rate(objective, optimizer).outcome == "ascent"
    step(objective, optimizer)  # to -0.98: the velocity is now spent
    assert sk.critical_learning_rate(objective, optimizer).outcome == "found"


@pytest.mark.parametrize("name", ["momentum", "AdamW"])
def test_model_and_optimizer_are_left_bit_for_bit(name: str) -> None:
    objective = quadratic()
    optimizer = OPTIMIZERS[name](groups_of(objective.model))
    for _ in range(2):
        step(objective, optimizer)
    storages = [p.untyped_storage().data_ptr() for p in objective.model.parameters()]
    state = copy.deepcopy(optimizer.state_dict())
    with untouched(objective.model, optimizer=optimizer):
        sk.critical_learning_rate(objective, optimizer)
    assert [p.untyped_storage().data_ptr() for p in objective.model.parameters()] == storages
    assert list(optimizer.state_dict()["state"]) == list(state["state"])


@pytest.mark.parametrize("at", [1, 2, 4])
def test_also_when_interrupted(at: int) -> None:
    calls = 0

    def closure(model: nn.Module, batch: Tensor) -> Tensor:
        nonlocal calls
        calls += not torch.is_grad_enabled()
        if calls > at:
            raise KeyboardInterrupt
        d = model.w - CENTRE
        return 0.5 * d @ H @ d + 0 * batch.sum()

    objective = sk.Objective(built(Pair), torch.ones(1, 1, dtype=torch.float64), closure=closure, count=len, check=False)
    calls = 0
    optimizer = torch.optim.Adam(objective.model.parameters(), lr=0.02)
    with untouched(objective.model, optimizer=optimizer), pytest.raises(KeyboardInterrupt):
        sk.critical_learning_rate(objective, optimizer)
    assert calls == at + 1


def test_graphs_kept_from_before_still_hold_after() -> None:
    objective = quadratic()
    hessian, vector = sk.HessianOperator(objective), gaussian(6)
    before, builds = hessian @ vector, []
    hessian._build, real = lambda piece: builds.append(piece) or real(piece), hessian._build
    sk.critical_learning_rate(objective, torch.optim.SGD(objective.model.parameters(), lr=0.1))
    assert torch.equal(hessian @ vector, before) and not builds


def test_moved_parameters_come_back_after_an_error() -> None:
    objective = quadratic()
    layout, before = objective.layout, objective.layout.current()
    direction = layout.split(torch.ones(6, dtype=torch.float64))

    def interrupted() -> None:
        with moved(layout, direction, 0.5):
            assert torch.equal(layout.current(), before + 0.5)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        interrupted()
    assert torch.equal(layout.current(), before)


def test_arguments_are_checked() -> None:
    objective = quadratic()
    optimizer = torch.optim.SGD(objective.model.parameters(), lr=0.0)
    with pytest.raises(ValueError, match="pass guess="):
        sk.critical_learning_rate(objective, optimizer)
    assert sk.critical_learning_rate(objective, optimizer, guess=0.1).outcome == "found"
    with pytest.raises(ValueError, match="guess must be a positive number"):
        sk.critical_learning_rate(objective, optimizer, guess=math.nan)
    with pytest.raises(ValueError, match="rtol must be a number between 0 and 1"):
        sk.critical_learning_rate(objective, optimizer, guess=0.1, rtol=0)
    with pytest.raises(sk.NonFiniteError, match="no step to measure"):
        sk.critical_learning_rate(objective, optimizer, guess=0.1, gradient=torch.full((6,), math.nan, dtype=torch.float64))


def test_an_optimizer_that_searches_within_its_step_is_refused() -> None:
    objective = quadratic()
    with pytest.raises(sk.UnsupportedError, match="LBFGS"):
        sk.critical_learning_rate(objective, torch.optim.LBFGS(objective.model.parameters(), lr=0.1))


def test_an_optimizer_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="none of the objective's parameters"):
        sk.critical_learning_rate(quadratic(), torch.optim.SGD(built(Pair).parameters(), lr=0.1))


def shifted(model: nn.Module, centre: Tensor, matrix: Tensor = H) -> sk.Objective:
    def closure(model: nn.Module, batch: Tensor) -> Tensor:
        d = model.w - centre
        return 0.5 * d @ matrix @ d + 0 * batch.sum()

    return sk.Objective(model, torch.ones(1, 1, dtype=torch.float64), closure=closure, count=len)


@pytest.mark.parametrize("name", ["SGD", "momentum", "AdamW"])
def test_along_another_loss_it_is_where_this_one_rises(name: str) -> None:
    model = built(Pair)
    first, second = shifted(model, CENTRE), shifted(model, CENTRE + 0.3 * gaussian(6, seed=5), 2 * H)
    optimizer = OPTIMIZERS[name](groups_of(model))
    for _ in range(2):
        step(first, optimizer)
    g, own = first.gradient()[1], second.gradient()[1]
    u = next_update(optimizer, first.layout, g)
    exact = float(2 * u @ own / (u @ (2 * H) @ u))
    assert exact > 0
    with untouched(model, optimizer=optimizer):
        made = sk.critical_learning_rate(second, optimizer, along=first)
    assert made.lower <= exact <= made.upper and made.num_evaluations <= 6
    assert sk.critical_learning_rate(second, optimizer, along=first, gradient=g).value == made.value
    assert sk.critical_learning_rate(first, optimizer, along=first).value == sk.critical_learning_rate(first, optimizer).value


def test_a_table_of_losses_holds_the_single_answers_and_zero_where_they_pull_apart() -> None:
    model = built(Pair)
    centre = model.w.detach()
    losses = {"a": shifted(model, centre + 1), "b": shifted(model, centre + 1.2), "c": shifted(model, centre - 1)}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with untouched(model, optimizer=optimizer):
        table = sk.relative_critical_rates(losses, optimizer)
    for i, along in enumerate(losses.values()):
        for j, objective in enumerate(losses.values()):
            single = sk.critical_learning_rate(objective, optimizer, along=along)
            assert float(table.rates[i, j]) == pytest.approx(single.value, rel=BRACKET)
    assert not table.rates[2, :2].any() and not table.rates[:2, 2].any(), "a step towards c leads away from a and b"
    assert bool((table.rates.diagonal() > 0).all()) and table.sharpness[0, 2] == math.inf
    assert table.num_evaluations <= 5 * 6 and table.lr == 0.05
    lines = str(table).splitlines()
    assert lines[0].split() == ["along", "\\", "rises", "a", "b", "c"] and lines[3].split()[:3] == ["c", "0", "0"]
    assert sk.RelativeCriticalRates.from_dict(table.to_dict()).names == ("a", "b", "c")


def test_losses_of_different_models_are_refused() -> None:
    model = built(Pair)
    one, other = shifted(model, CENTRE), shifted(built(Pair), CENTRE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with pytest.raises(ValueError, match="of the same parameters of one model"):
        sk.critical_learning_rate(one, optimizer, along=other)
    with pytest.raises(ValueError, match="of the same parameters of one model"):
        sk.relative_critical_rates({"a": one, "b": other}, optimizer)
    with pytest.raises(ValueError, match="at least two Objectives"):
        sk.relative_critical_rates({"a": one}, optimizer)
    with pytest.raises(TypeError, match="along takes an Objective"):
        sk.critical_learning_rate(one, optimizer, along=CENTRE)  # type: ignore[arg-type]


@pytest.mark.parametrize("guess", [1e-9, 1e-3, 1.0, 1e3, 1e9])
@pytest.mark.parametrize("shape", ["quartic", "log", "saturating", "overflowing"])
def test_the_crossing_is_bracketed_from_any_guess_on_other_shapes(shape: str, guess: float) -> None:
    """Along one direction, at w = 1: the loss returns to its beginning at eta = 2 / slope, since it is even."""
    losses: dict[str, Callable[[Tensor], Tensor]] = {
        "quartic": lambda w: w**4,
        "log": lambda w: torch.log1p(100 * w**2),
        "saturating": lambda w: -torch.exp(-(w**2)),
        "overflowing": lambda w: torch.exp(w**2 * 10),
    }
    model = nn.ParameterList([nn.Parameter(torch.ones(1, dtype=torch.float64))])

    def closure(model: Any, batch: Tensor) -> Tensor:
        return losses[shape](model[0]).sum() + 0 * batch.sum()

    objective = sk.Objective(model, torch.ones(1, 1, dtype=torch.float64), closure=closure, count=len)
    slope = float(objective.gradient()[1])
    made = sk.critical_learning_rate(objective, torch.optim.SGD(model.parameters(), lr=0.1), guess=guess)
    assert made.outcome == "found"
    assert made.lower <= 2 / slope <= made.upper and made.lower / made.upper >= 1 - BRACKET
    assert made.num_evaluations <= 26
