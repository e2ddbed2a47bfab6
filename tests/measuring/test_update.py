"""Slope and curvature along the next update against dense matrices, and the change of the loss that they foretell."""

from __future__ import annotations

import math

import pytest
import torch
from problems import built, gaussian, labels, mlp
from torch import nn
from torch.nn import functional as F
from traces import untouched

import sharpkit as sk
from sharpkit.measuring.layers import layer_of
from sharpkit.optimizers import next_update

OPTIMIZERS = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01),
    "RMSprop": lambda model: torch.optim.RMSprop(model.parameters(), lr=0.01),
}


def trained(name: str) -> tuple[sk.Objective, torch.optim.Optimizer]:
    problem = mlp()
    optimizer = OPTIMIZERS[name](problem.model)
    for _ in range(4):
        optimizer.zero_grad()
        sum(problem.loss(problem.model(x), y) for x, y in problem.batches).backward()
        optimizer.step()
    optimizer.zero_grad()
    return sk.Objective(problem.model, problem.batches, loss=problem.loss), optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parts_within_and_across_layers_are_those_of_the_dense_matrix(name: str) -> None:
    objective, optimizer = trained(name)
    H = sk.HessianOperator(objective).to_dense()
    g = objective.gradient()[1]
    u = next_update(optimizer, objective.layout, g)
    with untouched(objective.model, optimizer=optimizer):
        met = sk.update_curvature(objective, optimizer)
    assert met.optimizer == name and met.lr == optimizer.param_groups[0]["lr"]
    assert met.slope == pytest.approx(float(u @ g)) and met.norm == pytest.approx(float(u.norm()))
    assert met.curvature == pytest.approx(float(u @ H @ u), rel=1e-9)
    assert met.normalized == pytest.approx(float(u @ H @ u / (u @ u)))
    assert met.directional == pytest.approx(sk.directional_sharpness(objective, optimizer))
    expected = {}
    for layer in dict.fromkeys(map(layer_of, objective.layout.names)):
        rows = objective.layout.indices([p for p in objective.layout.names if layer_of(p) == layer])
        expected[layer] = float(u[rows] @ H[rows][:, rows] @ u[rows] / (u @ u))
    assert met.layers == tuple(expected) and len(met.layers) > 1 and met.num_matvecs == len(met.layers)
    assert list(met.within) == pytest.approx(list(expected.values()), rel=1e-8)
    assert met.within_layers + met.across_layers == pytest.approx(met.normalized)
    assert abs(met.across_layers) > 1e-6
    whole = sk.update_curvature(objective, optimizer, layers=False)
    assert whole.num_matvecs == 1 and whole.curvature == pytest.approx(met.curvature) and math.isnan(whole.within_layers)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_change_that_is_foretold_is_that_of_the_real_step(name: str) -> None:
    objective, optimizer = trained(name)
    for group in optimizer.param_groups:
        group["lr"] *= 0.1
    met, before = sk.update_curvature(objective, optimizer), objective.value()
    for p, g in zip(objective.layout.params, objective.layout.split(objective.gradient()[1]), strict=True):
        p.grad = g
    optimizer.step()
    assert objective.value() - before == pytest.approx(met.predicted_change, rel=0.01)
    assert str(met) == met.finding and f"The next step of {name} is at {met.share:.2f} of" in met.finding


def test_a_step_uphill_is_said_and_no_step_at_all_is_refused() -> None:
    model = built(lambda: nn.Linear(3, 2))
    objective = sk.Objective(model, (gaussian(6, 3), labels(6, classes=2)), loss=F.cross_entropy)
    uphill = sk.update_curvature(objective, torch.optim.SGD(model.parameters(), lr=0.1, maximize=True))
    assert uphill.slope < 0 and uphill.finding == "The next step of SGD goes uphill."
    with torch.no_grad():
        model.weight.zero_()
        model.bias.zero_()
    flat = sk.Objective(model, gaussian(6, 3), closure=lambda m, x: m(x).square().mean())
    with pytest.raises(sk.NonFiniteError, match="no step to measure"):
        sk.update_curvature(flat, torch.optim.SGD(model.parameters(), lr=0.1))
