"""The learner with held-out data: where their loss turns the run goes back to its best point, and ends there; otherwise nothing changes."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sharpkit as sk
from sharpkit.learner.rollback import tells_of_return

STEPS = 160
G = torch.Generator().manual_seed(0)
X = torch.randn(48, 40, generator=G, dtype=torch.float64)
W = torch.randn(40, 1, generator=G, dtype=torch.float64)
Y = X @ W * 0.2 + torch.randn(48, 1, generator=G, dtype=torch.float64)  # 24 samples of 40 inputs: the noise is fitted, and harms
TRAIN, HELD_OUT = (X[:24], Y[:24]), (X[24:], Y[24:])


def made(seed: int = 0, **settings: Any) -> tuple[nn.Module, torch.optim.Optimizer, sk.CurvatureLearner]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Linear(40, 1).double()
        nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return model, optimizer, sk.CurvatureLearner(optimizer, model=model, loss=F.mse_loss, total_steps=STEPS, **settings)


def train(run: tuple[nn.Module, torch.optim.Optimizer, sk.CurvatureLearner], first: int, last: int) -> list[float]:
    """Steps ``first`` to ``last``; the held-out loss after each."""
    model, optimizer, learner = run
    losses = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sk.SharpkitWarning)
        for step in range(first, last):
            chosen = torch.randperm(24, generator=torch.Generator().manual_seed(step))[:12]
            optimizer.zero_grad()
            loss = F.mse_loss(model(TRAIN[0][chosen]), TRAIN[1][chosen])
            loss.backward()
            optimizer.step()
            learner.step((TRAIN[0][chosen], TRAIN[1][chosen]), loss=loss)
            with torch.no_grad():
                losses.append(float(F.mse_loss(model(HELD_OUT[0]), HELD_OUT[1])))
    return losses


def test_a_run_whose_held_out_loss_turns_goes_back_lowers_its_rate_and_ends_at_its_best() -> None:
    plain, validated = made(), made(validation=HELD_OUT)
    without, losses = train(plain, 0, STEPS), train(validated, 0, STEPS)
    assert without[-1] > 1.2 * min(without)  # there is something to gain
    assert losses[-1] <= 1.08 * min(losses)
    assert losses[-1] < 0.85 * without[-1]
    back = [d for d in validated[2].history if "held-out" in d.reason]
    assert back
    assert all(tells_of_return(d.reason) for d in back)
    before = validated[2].history[validated[2].history.decisions.index(back[0]) - 1]
    assert back[0].lr == pytest.approx(before.lr / 4)


def test_looks_change_nothing_of_a_run_that_generalises() -> None:
    """The held-out data are the training data: their loss does not turn."""
    plain, validated = made(), made(validation=TRAIN)
    train(plain, 0, 60)
    train(validated, 0, 60)
    assert torch.equal(plain[0].weight, validated[0].weight)
    assert validated[0].training


def test_a_resumed_run_is_the_same() -> None:
    whole, early = made(validation=HELD_OUT), made(validation=HELD_OUT)
    train(whole, 0, STEPS)
    train(early, 0, 70)
    late = made(1, validation=HELD_OUT)
    for to, of in zip(late, copy.deepcopy([part.state_dict() for part in early]), strict=True):
        to.load_state_dict(of)
    train(late, 70, STEPS)
    assert torch.equal(whole[0].weight, late[0].weight)
    assert str(whole[2].history) == str(late[2].history)


def test_many_samples_are_judged_by_as_many_as_the_budget_allows() -> None:
    large = (HELD_OUT[0].repeat(400, 1), HELD_OUT[1].repeat(400, 1))
    run, seen = made(validation=large), 0
    forward = type(run[0]).forward

    def counted(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        nonlocal seen
        seen += 0 if self.training else len(x)
        return forward(self, x)

    run[0].forward = counted.__get__(run[0])  # type: ignore[method-assign]
    train(run, 0, STEPS)
    # in gradients of a batch of 12, of which 64 samples at each of 25 looks are at least allowed
    assert 0 < seen / 12 / 3 <= max(0.05 * STEPS, 64 * 26 / 12 / 3) * 1.2


def test_held_out_data_that_do_not_fit_are_refused_when_the_learner_is_made() -> None:
    with pytest.raises((sk.SharpkitError, ValueError, TypeError), match=r"\(24, 39\)|39"):
        made(validation=(HELD_OUT[0][:, :39], HELD_OUT[1]))
