"""Optimizers of other packages: known by name, and, where the package is installed, as their state says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import mlp, relative_error

import sharpkit as sk
from sharpkit import optimizers
from sharpkit.optimizers import kinds, update_rule


def trained(make: Any, *, steps: int, **settings: Any) -> tuple[sk.Objective, torch.optim.Optimizer]:
    problem = mlp()
    objective = sk.Objective(problem.model, problem.batches, loss=problem.loss)
    optimizer: torch.optim.Optimizer = make(list(problem.model.parameters()), **settings)
    if hasattr(optimizer, "train"):
        optimizer.train()
    for _ in range(steps):
        for p, g in zip(objective.layout.params, objective.layout.split(objective.gradient()[1]), strict=True):
            p.grad = g.clone()  # some add the decay to it
        optimizer.step()
    return objective, optimizer


def measured(objective: sk.Objective, optimizer: torch.optim.Optimizer) -> sk.Sharpness:
    return sk.measure(objective, optimizer=optimizer, num_probes=3, num_steps=8)


# -- without the packages ---------------------------------------------------------------------------------------------------------
def stranger(name: str, module: str) -> torch.optim.Optimizer:
    cls = type(name, (torch.optim.Optimizer,), {"step": lambda self, closure=None: None, "__module__": module})
    settings = {"lr": 1.0, "betas": (0.9, 0.999), "d": 0.5, "k": 0, "decouple": True, "use_bias_correction": False, "weight_decay": 0.1}
    return cls([torch.nn.Parameter(torch.ones(1))], settings)


def test_a_name_that_several_packages_use_counts_with_its_package_alone() -> None:
    rule = update_rule(stranger("Prodigy", "prodigyopt.prodigy"))
    assert (rule.momentum, rule.dampening, rule.weight_decay, rule.decoupled) == (0.9, 0.9, 0.05, True)
    assert kinds.kind_of(stranger("Prodigy", "pytorch_optimizer.optimizer.prodigy")) is None


@pytest.mark.parametrize("module", ["lion_pytorch.lion_pytorch", "pytorch_optimizer.optimizer.lion"])
def test_lions_steps_are_signs_in_every_package(module: str) -> None:
    with pytest.raises(sk.UnsupportedError, match=r"Lion has no linear rule.*generalized_sharpness\(objective, optimizer\)"):
        sk.stable_learning_rate(1.0, optimizer=stranger("Lion", module))


# -- with them --------------------------------------------------------------------------------------------------------------------
def test_schedule_free_warmup_counts_as_it_stands() -> None:
    make = pytest.importorskip("schedulefree").SGDScheduleFree
    rules = [update_rule(trained(make, steps=steps, lr=0.1, momentum=0.8, warmup_steps=10)[1]) for steps in (0, 1, 5, 20)]
    assert [rule.gain for rule in rules] == pytest.approx([0.02, 0.02, 0.1, 0.2])


def test_schedule_free_radam_takes_no_steps_at_first_and_adapts_then() -> None:
    make = pytest.importorskip("schedulefree").RAdamScheduleFree
    objective, silent = trained(make, steps=3, lr=0.01)
    assert update_rule(silent).gain == 0 and measured(objective, silent).stable_lr == float("inf")
    descending = trained(make, steps=3, lr=0.01, silent_sgd_phase=False)
    assert update_rule(descending[1]).gain == pytest.approx(0.1)
    assert bool((optimizers.preconditioner_scale(descending[1], descending[0].layout) == 1).all())
    objective, adapting = trained(make, steps=30, lr=0.01)
    assert 0 < update_rule(adapting).gain < 0.1 and 0 < measured(objective, adapting).stable_lr < float("inf")


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_prodigys_step_is_the_gradient_over_its_divisor(decay: float) -> None:
    """With the momentum emptied: (1 - beta1) g / D and the decay d times as strong."""
    objective, optimizer = trained(pytest.importorskip("prodigyopt").Prodigy, steps=400, weight_decay=decay)
    for state in optimizer.state.values():
        state["exp_avg"].zero_()
    gradient = objective.gradient()[1]
    gradient = 1e-6 * gradient / gradient.norm()
    update, rule = optimizers.next_update(optimizer, objective.layout, gradient), update_rule(optimizer)
    pushed = update - rule.weight_decay * objective.layout.current()
    assert relative_error(pushed, 0.1 * optimizers.preconditioner_scale(optimizer, objective.layout).square() * gradient) < 2e-3
    assert rule.weight_decay == pytest.approx(decay * optimizer.param_groups[0]["d"])


def test_measuring_leaves_the_state_of_a_schedule_free_optimizer() -> None:
    objective, optimizer = trained(pytest.importorskip("schedulefree").AdamWScheduleFree, steps=5, lr=0.01)
    before = [v.clone() for state in optimizer.state.values() for v in state.values()], dict(optimizer.param_groups[0])
    assert measured(objective, optimizer).stable_lr > 0
    assert all(torch.equal(a, b) for a, b in zip(before[0], [v for s in optimizer.state.values() for v in s.values()], strict=True))
    assert {k: v for k, v in before[1].items() if k != "params"} == {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
