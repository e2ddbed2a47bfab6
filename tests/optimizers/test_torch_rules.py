"""torch's optimizers: what their state says, however it is kept, and which of them have no linear rule."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import mlp, relative_error
from torch import Tensor, nn
from traces import same

import sharpkit as sk
from sharpkit import optimizers
from sharpkit.objective.params import ParamLayout
from sharpkit.optimizers import limit_rule, update_rule

Make = Callable[..., torch.optim.Optimizer]
ADAPTIVE: dict[str, Make] = {
    "Adam": torch.optim.Adam,
    "amsgrad": lambda g, **kw: torch.optim.Adam(g, amsgrad=True, **kw),
    "AdamW": torch.optim.AdamW,
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "Adamax": torch.optim.Adamax,
    "Adadelta": lambda g, **kw: torch.optim.Adadelta(g, rho=0.999, **kw),
    "Adagrad": torch.optim.Adagrad,
    "RMSprop": lambda g, **kw: torch.optim.RMSprop(g, centered=True, momentum=0.5, **kw),
    "Adafactor": torch.optim.Adafactor,
}
OTHERS: dict[str, Make] = {"SGD": torch.optim.SGD, "ASGD": torch.optim.ASGD}


def objective_of(problem: Any) -> sk.Objective:
    return sk.Objective(problem.model, problem.batches, loss=problem.loss)


def trained(make: Make, *, steps: int = 12, **settings: Any) -> tuple[sk.Objective, torch.optim.Optimizer]:
    """A small network and its optimizer after some steps; RAdam adapts from the sixth on."""
    problem = mlp()
    objective, optimizer = objective_of(problem), make(list(problem.model.parameters()), **{"lr": 0.01, **settings})
    x, y = (torch.cat(parts) for parts in zip(*problem.batches, strict=True))
    for _ in range(steps):
        optimizer.zero_grad()
        problem.loss(problem.model(x), y).backward()
        optimizer.step()
    return objective, optimizer


def layout_of(*params: nn.Parameter) -> ParamLayout:
    return ParamLayout(tuple(f"w{i}" for i in range(len(params))), params)


def scale_of(objective: sk.Objective, optimizer: torch.optim.Optimizer) -> Tensor:
    return optimizers.preconditioner_scale(optimizer, objective.layout)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_the_divisor_is_what_the_next_step_divides_by(name: str) -> None:
    """With the momentum emptied, the real next step is gradient / D times how much of a fresh gradient a step holds."""
    objective, optimizer = trained(ADAPTIVE[name], steps=400)  # so many that one step more changes no bias correction by much
    for state in optimizer.state.values():
        for key in ("exp_avg", "momentum_buffer"):
            if key in state:
                state[key].zero_()
    gradient = objective.gradient()[1]
    gradient = 1e-6 * gradient / gradient.norm()  # leaves no mark on the second moment, and is not clipped
    with torch.no_grad():
        before = copy.deepcopy(optimizer.state_dict())
        update = optimizers.next_update(optimizer, objective.layout, gradient)
    assert same(before, optimizer.state_dict())
    rule = update_rule(optimizer)
    decay = rule.weight_decay * objective.layout.current()  # AdamW's decays by default
    fresh = rule.direct + rule.share * (1 - rule.dampening)
    expected = fresh * scale_of(objective, optimizer).square() * gradient
    assert relative_error(update - decay, expected) < 5e-3, "1 - beta2 of the second moment"


@pytest.mark.parametrize("way", ["foreach", "fused", "capturable", "a tensor as the rate"])
@pytest.mark.parametrize("name", [*ADAPTIVE, *OTHERS])
def test_however_the_step_is_computed_rule_and_divisor_are_the_same(name: str, way: str) -> None:
    make = (ADAPTIVE | OTHERS)[name]
    settings: dict[str, Any] = {"lr": torch.tensor(0.01)} if way.startswith("a tensor") else {}
    if way in ("foreach", "fused"):
        settings[way] = True
        cls = type(make([nn.Parameter(torch.ones(2))], lr=0.01))
        if way not in inspect.signature(cls.__init__).parameters:
            pytest.skip(f"torch has no {way} {cls.__name__}")  # most classes have no fused kernel at all
    objective, other = trained(make, **settings)
    plain, one = trained(make)
    if way == "capturable":  # asks for a device that graphs can be captured on; its state has the step as a tensor either way
        for group in other.param_groups:
            group["capturable"] = True
    assert update_rule(other).gain == pytest.approx(update_rule(one).gain) and update_rule(other).name == update_rule(one).name
    if update_rule(one).adaptive:
        assert relative_error(scale_of(objective, other), scale_of(plain, one)) < 1e-5
    assert sk.measure(objective, optimizer=other, num_probes=3, num_steps=8).stable_lr == pytest.approx(
        float(sk.measure(plain, optimizer=one, num_probes=3, num_steps=8).stable_lr), rel=1e-4
    )


def test_betas_may_be_tensors() -> None:
    objective, other = trained(torch.optim.Adam, betas=(torch.tensor(0.9), torch.tensor(0.999)), foreach=False)
    plain, one = trained(torch.optim.Adam)
    assert update_rule(other).momentum == pytest.approx(0.9) and relative_error(scale_of(objective, other), scale_of(plain, one)) < 1e-4


@pytest.mark.parametrize("name", [*ADAPTIVE, *OTHERS])
def test_measuring_changes_no_state_and_climbing_has_no_limit(name: str) -> None:
    objective, optimizer = trained((ADAPTIVE | OTHERS)[name])
    before = copy.deepcopy(optimizer.state_dict())
    assert sk.measure(objective, optimizer=optimizer, num_probes=3, num_steps=8).stable_lr > 0
    sk.critical_learning_rate(objective, optimizer)
    assert same(before, optimizer.state_dict())
    optimizer.param_groups[0]["maximize"] = True
    with pytest.raises(sk.UnsupportedError, match="maximize=True"):
        sk.measure(objective, optimizer=optimizer)


def test_an_attribute_that_says_maximize_counts_as_a_setting_does() -> None:
    optimizer = trained(torch.optim.SGD)[1]
    optimizer.maximize = True  # type: ignore[attr-defined]
    assert optimizers.is_maximizing(optimizer)


def test_states_that_are_codes_are_refused() -> None:
    objective, optimizer = trained(torch.optim.Adam)
    for state in optimizer.state.values():
        state["exp_avg_sq"] = (255 * state["exp_avg_sq"] / state["exp_avg_sq"].max()).to(torch.uint8)
    with pytest.raises(sk.UnsupportedError, match=r"Adam keeps exp_avg_sq as uint8.*diagonal="):
        sk.measure(objective, optimizer=optimizer)


def test_an_optimizer_of_another_name_with_8_bit_states_is_unknown() -> None:
    objective = objective_of(mlp())
    eight = type("Adam8bit", (torch.optim.Optimizer,), {"step": lambda self, closure=None: None})
    with pytest.raises(sk.UnsupportedError, match=r"limit of Adam8bit is not known.*sharpkit.register_optimizer\(Adam8bit, rule=...\)"):
        sk.measure(objective, optimizer=eight(objective.layout.params, {"lr": 0.1}))


# -- as they stand ----------------------------------------------------------------------------------------------------------------
def test_nadams_momentum_is_that_of_its_last_step() -> None:
    """mu_t = beta1 (1 - .96^(.004 t) / 2), from .45 up to beta1."""
    rules = [update_rule(trained(torch.optim.NAdam, steps=steps)[1]) for steps in (0, 1, 30)]
    assert rules[0] == rules[1], "before the first step, the first"
    mu = [0.9 * (1 - 0.5 * 0.96 ** (0.004 * t)) for t in (1, 2, 30, 31)]
    assert (rules[1].direct, rules[1].share, rules[2].direct, rules[2].share) == pytest.approx((1 - mu[0], mu[1], 1 - mu[2], mu[3]))
    assert sk.stable_learning_rate(1.0, optimizer=trained(torch.optim.NAdam, steps=1)[1]) == pytest.approx(
        2 * 1.9 / (1.9 * (1 - mu[0]) + 0.1 * mu[1])
    )


@pytest.mark.parametrize(("steps", "adapted"), [(1, False), (5, False), (6, True)])
def test_radam_divides_by_nothing_while_rho_is_at_most_5(steps: int, adapted: bool) -> None:
    scale = scale_of(*trained(torch.optim.RAdam, steps=steps))
    assert bool((scale == 1).all()) != adapted


def test_asgds_rate_falls_with_its_steps_and_lambd_is_a_decay() -> None:
    _, optimizer = trained(torch.optim.ASGD, steps=30, lambd=2.0, weight_decay=0.3)
    eta = next(float(state["eta"]) for state in optimizer.state.values())
    rule = update_rule(optimizer)
    assert 0.01 * rule.gain == pytest.approx(eta) and eta < 0.009
    assert rule.max_curvature(0.01) == pytest.approx(2 / eta - 2.3)
    assert "lambda_max(H) <= 2 / (" in rule.condition


def test_adafactors_rate_acts_up_to_the_relative_step() -> None:
    objective, optimizer = trained(torch.optim.Adafactor, steps=16)
    rule = limit_rule(optimizer, objective.layout)
    assert rule.ceiling == pytest.approx(1 / 4) and rule.name == "Adafactor while it clips no update"
    groups = torch.optim.Adafactor([{"params": [p], "lr": 0.01 * (i + 1)} for i, p in enumerate(objective.layout.params)])
    groups.load_state_dict({"state": optimizer.state_dict()["state"], "param_groups": groups.state_dict()["param_groups"]})
    assert limit_rule(groups, objective.layout).ceiling == pytest.approx(1 / 4 / len(groups.param_groups)), "the fastest group's"
    gradient = objective.gradient()[1]
    optimizers.next_update(optimizer, objective.layout, gradient)
    optimizer.param_groups[0]["lr"] = 0.5
    with pytest.raises(sk.UnsupportedError, match="Adafactor is not proportional to its learning rate here"):
        optimizers.next_update(optimizer, objective.layout, gradient)


@pytest.mark.parametrize("factor", [0.9, 1.5])
def test_adafactor_beyond_its_limit_grows_until_its_updates_are_clipped_and_stays(factor: float) -> None:
    """It flips between x and 2 factor d - x, sqrt(v) being 1: on average, clipping shortens the step to that of the limit."""
    w, curvature = nn.Parameter(torch.tensor([1e-3], dtype=torch.float64)), 4.0
    optimizer, sizes = torch.optim.Adafactor([w], lr=factor * 5e-4, eps=(None, 1e3), d=1.0), []
    for step in range(400):
        w.grad = curvature * w.detach()
        if step:  # the state is made at the first
            optimizer.state[w].update({"variance": torch.ones(1, dtype=torch.float64), "step": torch.tensor(1e6)})
        optimizer.step()
        sizes.append(curvature * abs(float(w.detach())))
    preconditioned = optimizers.preconditioner_scale(optimizer, layout_of(w)).square() * curvature
    assert limit_rule(optimizer).max_learning_rate(float(preconditioned)) == pytest.approx(5e-4, rel=1e-3)
    assert sizes[-1] < 1e-6 if factor < 1 else sum(sizes[-2:]) / 2 == pytest.approx(factor, rel=1e-3)


# -- no linear rule ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("Rprop", r"Rprop has no linear rule.*follows the signs.*generalized_sharpness\(objective, optimizer\)"),
        ("Muon", r"Muon has no linear rule.*orthogonal.*generalized_sharpness\(objective, optimizer\)"),
        ("LBFGS", r"LBFGS has no linear rule.*several times in a step.*measure without optimizer="),
        ("SparseAdam", r"SparseAdam has no linear rule.*use Adam"),
    ],
)
def test_some_have_no_linear_rule_and_say_why_and_what_to_do(name: str, why: str) -> None:
    if not hasattr(torch.optim, name):
        pytest.skip("from torch 2.9 on")
    objective = objective_of(mlp())
    optimizer = getattr(torch.optim, name)([p for p in objective.layout.params if p.dim() == 2 or name != "Muon"])
    with pytest.raises(sk.UnsupportedError, match=why):
        sk.measure(objective, optimizer=optimizer)
    with pytest.raises(sk.UnsupportedError, match=why):
        sk.stable_learning_rate(1.0, optimizer=optimizer)
    assert optimizers.known_rule(optimizer) is None


# -- what D comes to --------------------------------------------------------------------------------------------------------------
def test_what_the_divisor_comes_to_is_each_kinds_own() -> None:
    params = [nn.Parameter(torch.ones(2, dtype=torch.float64))]
    layout = layout_of(*params)
    mean, moment = torch.tensor([1.0, 2.0]).double(), torch.tensor([4.0, 8.0]).double()
    for make in (torch.optim.NAdam, torch.optim.RAdam, torch.optim.RMSprop):
        assert optimizers.settled_preconditioner(make(params, eps=0.5), layout, moment, mean=mean).tolist() == [2.5, math.sqrt(8) + 0.5]
    centred = torch.optim.RMSprop(params, eps=0.5, centered=True)
    assert optimizers.settled_preconditioner(centred, layout, moment, mean=mean).tolist() == [math.sqrt(3) + 0.5, 2.5]
    for make in (torch.optim.Adamax, torch.optim.Adadelta, torch.optim.Adafactor):
        with pytest.raises(sk.UnsupportedError, match=r"does not follow from the mean of the squared gradient.*sharpkit\.measure"):
            optimizers.settled_preconditioner(make(params), layout, moment)
