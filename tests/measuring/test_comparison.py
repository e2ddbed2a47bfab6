"""Optimizers compared at one point: each row is what the optimizer alone gives, and moments that have not formed are what they come to."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

import sharpkit as sk
from tests.traces import untouched


@pytest.fixture
def objective() -> sk.Objective:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()
    x, y = torch.randn(48, 6, dtype=torch.float64), torch.randint(0, 3, (48,))
    return sk.Objective(model, [(x[:24], y[:24]), (x[24:], y[24:])], loss=F.cross_entropy)


def test_each_row_is_the_optimizers_own(objective: sk.Objective) -> None:
    parameters = list(objective.model.parameters())
    adam = torch.optim.AdamW(parameters, lr=0.01)
    for p in parameters:
        p.grad = torch.ones_like(p)
    adam.step()
    adam.zero_grad()
    several = [torch.optim.Rprop(parameters, lr=0.01), torch.optim.SGD(parameters, lr=0.1, momentum=0.9), adam]
    seen = list[sk.Progress]()
    with untouched(objective.model):
        made = sk.compare_optimizers(objective, several, callback=seen.append)
    for row, optimizer in zip(made.rows, several, strict=True):
        alone = sk.generalized_sharpness(objective, optimizer)
        assert (row.value, row.limit) == pytest.approx((alone.value, alone.limit)) and row.norm == alone.norm
    assert made.settled == (False, False, False) and made.batch_size is None
    shares = [row.share for row in made.rows]
    assert made.finding.startswith(f"Rprop is at {shares[0]:.2g} of its limit") and f"AdamW would be at {shares[2]:.2g}" in made.finding
    assert made.table().count("\n") == 3 and "settle" not in made.table()
    assert [p.done for p in seen] == [1, 2, 3] and seen[-1].remaining == 0


@pytest.mark.parametrize("batch_size", [48, 12])
def test_moments_that_have_not_formed_are_those_that_standing_still_would_form(objective: sk.Objective, batch_size: int) -> None:
    fresh = torch.optim.AdamW(objective.model.parameters(), lr=0.01)
    made = sk.compare_optimizers(objective, [fresh], batch_size=batch_size)
    assert not fresh.state and made.settled == (True,) and f"batches of {batch_size}" in made.table()
    model = copy.deepcopy(objective.model)
    real = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.0, 0.9999))
    x, y = (torch.cat(part) for part in zip(*objective.batches(), strict=True))
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        for i in range(0, 48, batch_size):
            real.zero_grad()
            chosen = order[i : i + batch_size]
            F.cross_entropy(model(x[chosen]), y[chosen]).backward()
            real.step()
    for group in real.param_groups:
        group.update(lr=0.01, betas=(0.9, 0.9999))
    alone = sk.generalized_sharpness(sk.Objective(model, list(objective.batches()), loss=F.cross_entropy), real)
    # the mean over three epochs; Adam's correction of its bias and its unequal weights leave 1e-3
    assert made.rows[0].value == pytest.approx(alone.value, rel=1e-3) and made.rows[0].limit == pytest.approx(alone.limit)


def test_what_cannot_be_compared_is_refused(objective: sk.Objective) -> None:
    parameters = list(objective.model.parameters())
    sgd = torch.optim.SGD(parameters, lr=0.1)
    for wrong in (sgd, [], 3):
        with pytest.raises(TypeError, match="a list of at least one optimizer"):
            sk.compare_optimizers(objective, wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="measure after its first step"):
        sk.compare_optimizers(objective, [torch.optim.Adadelta(parameters)])
    for diagonal, optimizer, message in (
        (torch.ones(objective.layout.size), sgd, "such as Adam"),
        (torch.zeros(objective.layout.size), torch.optim.Adam(parameters), "positive"),
        (torch.ones(3), torch.optim.Adam(parameters), "shape"),
    ):
        with pytest.raises(ValueError, match=message):
            sk.generalized_sharpness(objective, optimizer, diagonal=diagonal)
    resting = sk.compare_optimizers(objective, [sgd, torch.optim.SGD(parameters, lr=0.0)])
    assert "SGD has rate 0 and is stable up to" in resting.finding and resting.rows[1].share is None
