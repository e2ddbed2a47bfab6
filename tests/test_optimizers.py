"""The table of optimizers: kinds and subclasses, registration, every group's settings, and a step taken elsewhere."""

from __future__ import annotations

import ast
import math
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from problems import gaussian, mlp, relative_error
from torch import Tensor, nn
from traces import same

import sharpkit as sk
from sharpkit import optimizers
from sharpkit.optimizers import UpdateRule, kinds, register_optimizer, update_rule, update_rules

SGD, ADAM, ADAMW, RMS, ADAGRAD = (getattr(torch.optim, name) for name in ("SGD", "Adam", "AdamW", "RMSprop", "Adagrad"))
NADAM = torch.optim.NAdam


pytestmark = pytest.mark.usefixtures("optimizers_as_known")


def weight(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values or (1.0,), dtype=torch.float64))


class HalfStep(SGD):
    """Another method under a known parent: half the rate of gradient descent."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(p.grad, alpha=-group["lr"] / 2)


class RootDescent(torch.optim.Optimizer):
    """Divides gradients by the root of their own square's running mean; counts its steps in the group, and holds a setting itself."""

    def __init__(self, params: Any, lr: float, keep: float = 0.5) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.0, "steps": 0})
        self.keep = keep

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["steps"] += 1
            for p in group["params"]:
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                mean.mul_(self.keep).addcmul_(p.grad, p.grad, value=1 - self.keep)
                p.addcdiv_(p.grad, mean.sqrt(), value=-group["lr"])


# -- kinds ------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("parent", [SGD, ADAM, ADAMW, RMS, ADAGRAD])
@pytest.mark.parametrize("generations", [1, 2])
def test_a_subclass_that_keeps_the_step_is_its_parent(parent: type, generations: int) -> None:
    cls = parent
    for _ in range(generations):
        cls = type("Renamed", (cls,), {"extra": lambda self: None})
    settings = {"lr": 0.1, "weight_decay": 0.3}
    child, original = (update_rule(kind([weight()], **settings)) for kind in (cls, parent))
    assert child.condition == original.condition.replace(parent.__name__, "Renamed")
    assert child.max_learning_rate(5.0) == original.max_learning_rate(5.0)
    assert optimizers.is_adaptive(cls([weight()], **settings)) == (parent is not SGD)


@pytest.mark.parametrize("parent", [SGD, ADAM, ADAMW, RMS, ADAGRAD])
def test_a_subclass_that_overrides_the_step_is_unknown(parent: type) -> None:
    other = type("Other", (parent,), {"step": lambda self, closure=None: None})([weight()], lr=0.1)
    message = rf"Other is not known \(it overrides the step of {parent.__name__}\); supported: SGD, .*register_optimizer\(Other, rule=...\)"
    with pytest.raises(sk.UnsupportedError, match=message):
        update_rule(other)
    layout = sk.Objective(nn.Linear(1, 1), (torch.ones(1, 1), torch.ones(1, 1)), loss=nn.functional.mse_loss).layout
    with pytest.raises(sk.UnsupportedError, match=r"diagonal=.*register_optimizer\(Other, preconditioner=...\)"):
        optimizers.preconditioner_scale(other, layout)
    assert optimizers.known_rule(other) is None
    assert optimizers.is_adaptive(other, unknown=True) and not optimizers.is_adaptive(other, unknown=False)
    with pytest.raises(sk.UnsupportedError, match="register_optimizer"):
        optimizers.is_adaptive(other)


def test_a_step_mixed_in_before_a_known_parent_counts_as_overridden() -> None:
    mixin = type("Mixin", (), {"step": lambda self, closure=None: None})
    assert optimizers.kind_of(type("Mixed", (mixin, ADAM), {})([weight()])) is None


def test_hooks_and_schedulers_do_not_hide_the_kind() -> None:
    optimizer = type("Plain", (SGD,), {})([weight()], lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: None)
    torch.optim.lr_scheduler.StepLR(optimizer, 10)  # replaces the instance's step
    assert update_rule(optimizer).name == "Plain"


def test_sgd_schedule_free_is_known_by_its_name_alone() -> None:
    cls = type("SGDScheduleFree", (torch.optim.Optimizer,), {"step": lambda self, closure=None: None})
    rule = update_rule(cls([weight()], {"lr": 1.0, "momentum": 0.8, "weight_decay": 5.0}))
    assert rule.max_learning_rate(10.0) == pytest.approx(2 / (0.2 * 15))
    assert not rule.adaptive


def test_an_optimizer_that_maximizes_has_no_limit_of_descent() -> None:
    climbing = SGD([weight()], lr=0.1, maximize=True)
    assert optimizers.is_maximizing(climbing) and not optimizers.is_maximizing(SGD([weight()], lr=0.1))
    with pytest.raises(sk.UnsupportedError, match=r"maximize=True.*negative loss"):
        sk.stable_learning_rate(10.0, optimizer=climbing)
    assert optimizers.known_rule(climbing) is None and not optimizers.is_adaptive(climbing)


# -- registration -----------------------------------------------------------------------------------------------------------------
def test_a_registered_rule_gives_the_rate_at_which_training_really_breaks() -> None:
    register_optimizer(HalfStep, rule=lambda settings: UpdateRule(dampening=0.5, name="half steps"))
    sizes = []
    for factor in (0.99, 1.01):
        w = weight(1.0)
        optimizer = HalfStep([w], lr=0.1)
        limit = sk.stable_learning_rate(7.0, optimizer=optimizer)
        assert limit == pytest.approx(4 / 7) and limit.rule.startswith("half steps:")
        optimizer.param_groups[0]["lr"] = factor * limit
        for _ in range(500):
            optimizer.zero_grad()
            (3.5 * w.square()).sum().backward()
            optimizer.step()
        sizes.append(float(w.detach()))
    assert abs(sizes[0]) < 1e-2 and abs(sizes[1]) > 1e2


def test_registration_reaches_subclasses_that_keep_the_step_and_no_others() -> None:
    register_optimizer(HalfStep, rule=lambda settings: UpdateRule(dampening=0.5))
    kept, changed = type("Kept", (HalfStep,), {}), type("Changed", (HalfStep,), {"step": lambda self, closure=None: None})
    assert update_rule(kept([weight()], lr=0.1)).condition.startswith("Kept: ")
    with pytest.raises(sk.UnsupportedError, match=r"overrides the step of HalfStep.*supported: SGD, .*, HalfStep"):
        update_rule(changed([weight()], lr=0.1))
    assert update_rule(SGD([weight()], lr=0.1)).dampening == 0, "the parent is as it was"


def test_a_known_class_can_be_registered_anew() -> None:
    register_optimizer(SGD, rule=lambda settings: UpdateRule(dampening=0.75))
    assert sk.stable_learning_rate(1.0, optimizer=SGD([weight()], lr=0.1)) == 8


@pytest.mark.parametrize("lrs", [(1e-2, 1e-2), (1e-2, 4e-2)], ids=["one rate", "two rates"])
def test_a_registered_preconditioner_is_read_from_live_state(lrs: tuple[float, float]) -> None:
    register_optimizer(RootDescent, rule=lambda s: UpdateRule(adaptive=True), preconditioner=lambda state, s, p: state["mean"].sqrt())
    problem = mlp()
    groups = [{"params": list(problem.model[0].parameters())}, {"params": list(problem.model[2].parameters()), "lr": lrs[1]}]
    optimizer = RootDescent(groups, lr=lrs[0])
    hessian = sk.HessianOperator(sk.Objective(problem.model, problem.batches, loss=problem.loss))
    with pytest.raises(ValueError, match="first step"):
        sk.PreconditionedOperator(hessian, optimizer)
    problem.value().backward()
    optimizer.step()
    d = torch.cat([optimizer.state[p]["mean"].sqrt().reshape(-1) * lrs[0] / g["lr"] for g in optimizer.param_groups for p in g["params"]])
    expected = sk.HessianOperator(sk.Objective(problem.model, problem.batches, loss=problem.loss)).to_dense() / (d[:, None] * d).sqrt()
    assert relative_error(sk.PreconditionedOperator(hessian, optimizer).to_dense(), expected) < 1e-9


def test_a_preconditioner_of_another_shape_is_refused() -> None:
    register_optimizer(RootDescent, preconditioner=lambda state, s, p: torch.ones(3))
    problem = mlp()
    optimizer = RootDescent(problem.model.parameters(), lr=0.1)
    problem.value().backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"preconditioner of '0.weight' must have shape \(.*\), got \(3,\)"):
        sk.PreconditionedOperator(sk.HessianOperator(sk.Objective(problem.model, problem.batches, loss=problem.loss)), optimizer)


def test_an_adaptive_rule_without_a_preconditioner_says_what_is_missing() -> None:
    register_optimizer(RootDescent, rule=lambda s: UpdateRule(adaptive=True))
    problem = mlp()
    hessian = sk.HessianOperator(sk.Objective(problem.model, problem.batches, loss=problem.loss))
    with pytest.raises(sk.UnsupportedError, match=r"RootDescent is not known; .*register_optimizer\(RootDescent, preconditioner=...\)"):
        sk.PreconditionedOperator(hessian, RootDescent(problem.model.parameters(), lr=0.1))


def test_registration_checks_its_arguments() -> None:
    for wrong in (ADAM([weight()]), nn.Linear, "Adam"):
        with pytest.raises(TypeError, match=r"subclass of torch\.optim\.Optimizer"):
            register_optimizer(wrong, rule=lambda s: UpdateRule())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nothing to register for HalfStep"):
        register_optimizer(HalfStep)
    with pytest.raises(TypeError, match="rule must be a function, got UpdateRule"):
        register_optimizer(HalfStep, rule=UpdateRule())  # type: ignore[arg-type]


# -- groups -----------------------------------------------------------------------------------------------------------------------
def two_groups(make: Callable[..., torch.optim.Optimizer], first: dict[str, Any], second: dict[str, Any]) -> torch.optim.Optimizer:
    return make([{"params": [weight()], **first}, {"params": [weight(), weight()], **second}], lr=0.1)


def test_every_group_has_its_own_rule() -> None:
    optimizer = two_groups(SGD, {"momentum": 0.9}, {"momentum": 0.5, "nesterov": True, "weight_decay": 2.0})
    assert update_rules(optimizer) == [
        UpdateRule(0.9, name="SGD"), UpdateRule(0.5, nesterov=True, weight_decay=2.0, name="SGD")
    ]  # fmt: skip
    assert update_rule(optimizer, group=1) == update_rules(optimizer)[1]
    assert [len(group) for group in optimizers.held_parameters(optimizer)] == [1, 2]


def test_rates_are_read_and_set_group_by_group() -> None:
    optimizer = two_groups(SGD, {"lr": 0.2}, {"lr": 0.6})
    assert (optimizers.learning_rate(optimizer), optimizers.learning_rates(optimizer)) == (0.2, [0.2, 0.6])
    assert optimizers.relative_rates(optimizer) == pytest.approx([1, 3])
    optimizers.set_learning_rates(optimizer, [1.0, 2.0])
    assert optimizers.learning_rates(optimizer) == [1.0, 2.0]
    optimizers.set_learning_rates(optimizer, [0.0, 2.0])
    assert optimizers.relative_rates(optimizer) == [0.0, 1.0], "relative to the first that trains"
    assert optimizers.learning_rate(optimizer) == 2.0
    optimizers.set_learning_rates(optimizer, [0.0, 0.0])
    assert optimizers.relative_rates(optimizer) == [1.0, 1.0], "there is nothing to be relative to"
    with pytest.raises(ValueError, match="zip"):
        optimizers.set_learning_rates(optimizer, [1.0])


def test_a_rate_that_is_a_tensor_is_set_in_place() -> None:
    rate = torch.tensor(0.1)
    optimizer = ADAM([weight()], lr=rate)
    optimizers.set_learning_rates(optimizer, [0.5])
    assert optimizer.param_groups[0]["lr"] is rate and optimizers.learning_rate(optimizer) == 0.5


def test_plain_settings_tell_rates_apart_however_they_are_kept() -> None:
    settings = [optimizers.plain_settings(ADAM([weight()], lr=lr)) for lr in (0.25, torch.tensor(0.25), torch.tensor(0.5))]
    assert settings[0] == settings[1] != settings[2] and "params" not in settings[0][0]


def test_rates_from_before_a_warmup_are_restored() -> None:
    optimizer = two_groups(SGD, {"lr": 0.2}, {"lr": 0.6})
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    assert optimizers.learning_rates(optimizer) == [0.0, 0.0]
    optimizers.restore_initial_rates(optimizer)
    assert optimizers.learning_rates(optimizer) == [0.2, 0.6]


@pytest.mark.parametrize(
    ("make", "decoupled", "in_gradient"),
    [
        (lambda g: SGD(g, lr=0.1, weight_decay=0.3), 0.0, 0.0),
        (lambda g: ADAM(g, weight_decay=0.3), 0.0, 0.3),
        (lambda g: ADAMW(g, weight_decay=0.3), 0.3, 0.0),
        (lambda g: RMS(g, weight_decay=0.3), 0.0, 0.3),
        (lambda g: ADAGRAD(g, weight_decay=0.3), 0.0, 0.3),
        (lambda g: NADAM(g, weight_decay=0.3, decoupled_weight_decay=True), 0.3, 0.0),
        (lambda g: NADAM(g, weight_decay=0.3), 0.0, 0.3),
        (lambda g: getattr(torch.optim, "Muon", ADAMW)([torch.nn.Parameter(torch.ones(2, 2))], weight_decay=0.3), 0.3, 0.0),
    ],
    ids=["sgd", "adam", "adamw", "rmsprop", "adagrad", "nadam decoupled", "nadam", "muon"],
)
def test_decay_is_counted_once_either_in_the_rule_or_in_the_matrix(make: Any, decoupled: float, in_gradient: float) -> None:
    optimizer = make([weight()])
    assert optimizers.weight_decay(optimizer) == 0.3
    assert optimizers.decoupled_decays(optimizer) == [decoupled]
    assert optimizers.gradient_decays(optimizer) == [in_gradient]


def test_momentum_and_averaging_are_those_of_the_first_group() -> None:
    optimizer = two_groups(SGD, {"momentum": 0.9}, {"momentum": 0.5})
    assert optimizers.current_momentum(optimizer) == 0.9 and optimizers.averaging(optimizer) is None
    optimizers.set_momentum(optimizer, 0.7)
    assert [rule.momentum for rule in update_rules(optimizer)] == [0.7, 0.7]
    adam = ADAM([weight()], betas=(0.8, 0.95))
    assert optimizers.current_momentum(adam) == 0.8 and optimizers.averaging(adam) == (0.8, 0.95)
    assert math.isnan(optimizers.current_momentum(ADAGRAD([weight()])))


def test_the_settled_preconditioner_adds_each_groups_own_eps() -> None:
    moment = torch.tensor([4.0, 9.0], dtype=torch.float64)
    params = [weight(), weight()]
    layout = layout_of(*params)
    assert optimizers.settled_preconditioner(ADAM(params, eps=0.5), layout, moment).tolist() == [2.5, 3.5]
    apart = ADAM([{"params": params[1:], "eps": 0.25}, {"params": params[:1]}], eps=0.5)
    assert optimizers.settled_preconditioner(apart, layout, moment).tolist() == [2.5, 3.25]
    assert optimizers.settled_preconditioner(SGD(params, lr=0.1), layout, moment).tolist() == [2 + 1e-8, 3 + 1e-8]


def test_a_rate_that_is_a_tensor_is_at_hand_as_a_number() -> None:
    optimizer = SGD([{"params": [weight()], "lr": torch.tensor(0.25)}, {"params": [weight()]}], lr=0.5)
    rates = optimizers.rates_at_hand(optimizer)
    optimizer.param_groups[0]["lr"].fill_(1.0)
    assert rates == (0.25, 0.5), "not the tensor itself, which the next scheduler overwrites"
    optimizer.param_groups[1]["lr"] = None
    assert optimizers.rates_at_hand(optimizer) is None


# -- wrappers ---------------------------------------------------------------------------------------------------------------------
def test_wrappers_are_unwrapped() -> None:
    inner = SGD([weight()], lr=0.1)
    accelerated = type("AcceleratedOptimizer", (torch.optim.Optimizer,), {"optimizer": inner, "__init__": lambda self: None})()
    for wrapper in (inner, SimpleNamespace(optimizer=inner), accelerated, SimpleNamespace(optimizer=accelerated)):
        assert optimizers.unwrap_optimizer(wrapper) is inner
        assert update_rule(wrapper).name == "SGD"
    for nothing in (SimpleNamespace(), nn.Linear(1, 1), None, SimpleNamespace(optimizer=None)):
        with pytest.raises(TypeError, match=r"must be a torch\.optim\.Optimizer"):
            optimizers.unwrap_optimizer(nothing)


def test_lightnings_wrapper_which_takes_the_optimizers_class_is_unwrapped() -> None:
    module = pytest.importorskip("lightning.pytorch.core.optimizer")
    inner = ADAM([weight()])
    assert optimizers.unwrap_optimizer(module.LightningOptimizer(inner)) is inner


class LookAhead(torch.optim.Optimizer):
    """Every second step goes back half-way to where the last one was: a wrapper that is an optimizer itself, as many packages have it."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.optimizer, self.count, self.blend = inner, 0, lambda slow, fast: slow + 0.5 * (fast - slow)
        self.slow = [p.detach().clone() for group in inner.param_groups for p in group["params"]]
        super().__init__(inner.param_groups, inner.defaults)
        self.param_groups = inner.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.optimizer.step()
        self.count += 1
        if self.count % 2 == 0:
            for slow, p in zip(self.slow, (p for group in self.param_groups for p in group["params"]), strict=True):
                p.copy_(slow.copy_(self.blend(slow, p)))


def test_a_wrapper_with_a_step_of_its_own_is_not_taken_for_what_it_wraps() -> None:
    class Ascent:  # SAM, as some write it: two steps, and no torch optimizer
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

        def first_step(self) -> None: ...

    inner = SGD([weight()], lr=0.1, momentum=0.9)
    with pytest.raises(sk.UnsupportedError, match=r"Ascent holds a SGD and has a step of its own \(first_step\).*\.optimizer instead"):
        sk.stable_learning_rate(1.0, optimizer=Ascent(inner))  # type: ignore[arg-type]
    with pytest.raises(sk.UnsupportedError, match="LookAhead is not known"):
        sk.stable_learning_rate(1.0, optimizer=LookAhead(inner))


# -- a step elsewhere -------------------------------------------------------------------------------------------------------------
def stepped(make: Callable[[Any], torch.optim.Optimizer], *, steps: int = 2) -> tuple[torch.optim.Optimizer, list[nn.Parameter]]:
    params = [weight(1.0, 2.0), weight(3.0)]
    optimizer = make([{"params": params[:1]}, {"params": params[1:], "lr": 0.3}])
    for seed in range(steps):
        for p in params:
            p.grad = gaussian(p.numel(), seed=seed)
        optimizer.step()
    return optimizer, params


COPIED: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda g: SGD(g, lr=0.1, momentum=0.9),
    "a rate as a tensor": lambda g: ADAM([g[0]], lr=torch.tensor(0.1)),
    "Adam": lambda g: ADAM(g, lr=0.1, amsgrad=True),
    "AdamW": lambda g: ADAMW(g, lr=0.1),
    "Adadelta": lambda g: torch.optim.Adadelta(g, lr=0.1),
    "settings as attributes": lambda g: RootDescent(g, lr=0.1, keep=0.9),
}


@pytest.mark.parametrize("name", COPIED)
def test_a_copy_steps_as_the_original_would_and_leaves_it_alone(name: str) -> None:
    optimizer, params = stepped(COPIED[name])
    held = [p for group in optimizers.held_parameters(optimizer) for p in group]
    torch.optim.lr_scheduler.StepLR(optimizer, 10)  # patches the instance
    twins = {id(p): nn.Parameter(p.detach().clone()) for p in held}
    before = [optimizer.state_dict(), [p.detach().clone() for p in params]]
    other = optimizers.copy_optimizer(optimizer, twins)
    gradients = [gaussian(p.numel(), seed=7) for p in held]
    for twin, g in zip(twins.values(), gradients, strict=True):
        twin.grad = g.clone()
    other.step()
    assert same(before, [optimizer.state_dict(), [p.detach() for p in params]])
    for p, g in zip(held, gradients, strict=True):
        p.grad = g
    optimizer.step()
    assert all(torch.equal(twins[id(p)], p) for p in held)
    optimizers.set_learning_rates(other, [9.0] * len(other.param_groups))
    assert 9.0 not in optimizers.learning_rates(optimizer)


def test_a_copy_may_start_afresh_at_another_rate() -> None:
    optimizer, params = stepped(COPIED["SGD"])
    twins = {id(p): weight(*p.tolist()) for p in params}
    other = optimizers.copy_optimizer(optimizer, twins, reset=True)
    optimizers.set_learning_rates(other, optimizers.relative_rates(optimizer))
    assert optimizers.learning_rates(other) == pytest.approx([1.0, 3.0]) and not other.state
    assert optimizers.learning_rates(optimizer) == [0.1, 0.3], "the original's are its own"
    with pytest.raises(ValueError, match="not the model's"):
        optimizers.copy_optimizer(optimizer, {})


class Pair(nn.Module):
    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__()
        self.first, self.second = params


@pytest.mark.parametrize("steps", [0, 2], ids=["first step", "third step"])
@pytest.mark.parametrize(
    "settings",
    [
        ({"momentum": 0.9}, {"momentum": 0.5, "lr": 0.1}),
        ({"momentum": 0.9, "nesterov": True}, {"momentum": 0.0}),
        ({"momentum": 0.8, "dampening": 0.3, "weight_decay": 0.7}, {"weight_decay": 0.2}),
        ({"lr": 0.0}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.4}),
    ],
    ids=["momenta", "Nesterov", "dampening and decay", "one at rest"],
)
@pytest.mark.parametrize("maximize", [False, True])
def test_the_linear_step_is_the_next_step(maximize: bool, settings: tuple[dict[str, Any], ...], steps: int) -> None:
    """Each group with its own rate, momentum and decay; the step of a climbing optimizer is the same one upwards."""

    def make(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return SGD([{**group, **own} for group, own in zip(groups, settings, strict=True)], lr=0.1, maximize=maximize)

    optimizer, params = stepped(make, steps=steps)
    layout = sk.Objective(Pair(params), torch.ones(1, 1), closure=lambda m, b: m.first.sum() + m.second.sum() * b.sum(), count=len).layout
    gradient = gaussian(3, seed=5)
    step = optimizers.next_update(optimizer, layout, gradient)
    factor, push = optimizers.linear_step(optimizer, layout)
    assert relative_error(factor * gradient + push, -step if maximize else step) < 1e-12
    assert optimizers.has_linear_step(optimizer)


@pytest.mark.parametrize("make", [lambda g: ADAM(g), lambda g: HalfStep(g, lr=0.1)], ids=["Adam", "another step"])
def test_other_kinds_have_no_linear_step(make: Any) -> None:
    problem = mlp()
    layout = sk.Objective(problem.model, problem.batches, loss=problem.loss).layout
    optimizer = make(problem.model.parameters())
    assert not optimizers.has_linear_step(optimizer)
    with pytest.raises(TypeError, match=f"torch.optim.SGD, got {type(optimizer).__name__}"):
        optimizers.linear_step(optimizer, layout)


def test_without_adaptivity_only_the_groups_rates_scale() -> None:
    cls = type("SGDScheduleFree", (torch.optim.Optimizer,), {"step": lambda self, closure=None: None})
    problem = mlp()
    groups = [{"params": list(problem.model[0].parameters()), "lr": 1.0}, {"params": list(problem.model[2].parameters()), "lr": 4.0}]
    layout = sk.Objective(problem.model, problem.batches, loss=problem.loss).layout
    for optimizer in (SGD(groups), cls(groups, {"lr": 1.0, "momentum": 0.9})):
        scale: Tensor = optimizers.preconditioner_scale(optimizer, layout)
        assert scale.unique().tolist() == [1.0, 2.0]


def layout_of(*params: nn.Parameter) -> Any:
    return sk.Objective(nn.ParameterList(params), torch.ones(1, 1), closure=lambda m, b: m[0].sum() * b.sum(), count=len).layout


def test_the_next_update_of_a_wrapper_is_that_of_its_inner_optimizer_and_nothing_of_it_moves() -> None:
    p, gradient = weight(1.0, 2.0), gaussian(2, seed=3)
    inner = SGD([p], lr=0.1, momentum=0.9)
    optimizer = LookAhead(inner)
    p.grad = gradient.clone()
    inner.step()
    before = [p.detach().clone(), inner.state_dict(), optimizer.count, optimizer.slow[0].clone()]
    assert relative_error(optimizers.next_update(optimizer, layout_of(p), gradient), 1.9 * gradient) < 1e-12
    assert same(before, [p.detach(), inner.state_dict(), optimizer.count, optimizer.slow[0]])
    optimizer.step()
    with pytest.raises(sk.UnsupportedError, match="LookAhead is not proportional to its learning rate"):
        optimizers.next_update(optimizer, layout_of(p), gradient)  # the step that goes back half-way


class Noisy(SGD):
    """Langevin's method: every step draws noise."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(p.grad + torch.randn_like(p), alpha=-group["lr"])


class NeedsMore(SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is not None, "this step needs a closure"


def test_a_step_that_no_rate_scales_or_that_fails_on_a_copy_is_refused_and_the_random_state_stays() -> None:
    p, gradient = weight(1.0, 2.0), gaussian(2, seed=3)
    rprop = torch.optim.Rprop([p], lr=0.1)
    p.grad = gradient.clone()
    rprop.step()
    with pytest.raises(sk.UnsupportedError, match="Rprop is not proportional"):
        optimizers.next_update(rprop, layout_of(p), gradient)
    with pytest.raises(sk.UnsupportedError, match=r"step of NeedsMore failed on a copy.*needs a closure"):
        optimizers.next_update(NeedsMore([p], lr=0.1), layout_of(p), gradient)
    state = torch.get_rng_state()
    noise = optimizers.next_update(Noisy([p], lr=0.1), layout_of(p), gradient) - gradient
    assert torch.equal(state, torch.get_rng_state())
    assert relative_error(noise, torch.randn(2, dtype=torch.float64)) < 1e-12


def test_rates_are_set_in_all_groups_or_none_whenever_the_signal_comes() -> None:
    class Interrupted(dict[str, Any]):
        def __setitem__(self, key: str, value: Any) -> None:
            super().__setitem__(key, value)
            signal.raise_signal(signal.SIGINT)

    optimizer = SGD([{"params": [weight()]}, {"params": [weight()]}, {"params": [weight()]}], lr=0.1)
    optimizer.param_groups = [Interrupted(group) for group in optimizer.param_groups]
    with pytest.raises(KeyboardInterrupt):
        optimizers.set_learning_rates(optimizer, [1.0, 2.0, 3.0])
    assert optimizers.learning_rates(optimizer) == [1.0, 2.0, 3.0]


def test_groups_that_share_one_tensor_as_their_rate_part_when_their_rates_do() -> None:
    rate = torch.tensor(0.1, dtype=torch.float64)
    optimizer = ADAM([{"params": [weight()]}, {"params": [weight()]}, {"params": [weight()]}], lr=rate)
    assert all(group["lr"] is rate for group in optimizer.param_groups)
    optimizers.set_learning_rates(optimizer, [0.2, 0.2, 0.2])
    assert all(group["lr"] is rate for group in optimizer.param_groups) and float(rate) == 0.2
    optimizers.set_learning_rates(optimizer, [0.2, 0.6, 0.2])
    assert optimizers.learning_rates(optimizer) == [0.2, 0.6, 0.2] and optimizer.param_groups[0]["lr"] is rate


@pytest.mark.parametrize("rate", [None, "fast", torch.ones(2)])
def test_a_rate_that_is_no_number_is_refused_by_name(rate: Any) -> None:
    optimizer = SGD([weight()], lr=0.1)
    optimizer.param_groups[0]["lr"] = rate
    with pytest.raises(sk.UnsupportedError, match=r"a parameter group has lr=.*give one"):
        update_rule(optimizer)


# -- the only place that knows optimizers -------------------------------------------------------------------------------------------
CLASSES = {name for name, value in vars(torch.optim).items() if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)}
CLASSES = CLASSES - {"Optimizer"} | {key.rpartition(".")[2] for key in kinds._KINDS if isinstance(key, str)}
SETTINGS = {
    "betas", "momentum", "dampening", "nesterov", "eps", "weight_decay", "decoupled_weight_decay", "maximize", "amsgrad", "centered",
    "lr_decay", "initial_lr", "momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "square_avg", "grad_avg",
}  # fmt: skip
ALLOWED = {
    "batch_size/scaling.py": {"betas", "eps", "weight_decay"},  # the arguments of scale_learning_rate, which names them as torch does
    "integrations/attachment.py": {"momentum"},  # the learner's argument, "keep" or "polyak"
    "learner/baselines.py": {
        "SGDScheduleFree",
        "AdamWScheduleFree",
        "Prodigy",
        "param_groups",
    },  # rivals in the race construct their own package's optimizer
}


def knowledge_of_optimizers(source: str) -> set[str]:
    """Optimizer classes, parameter groups, and settings or state read by name; docstrings may speak of them."""
    known: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        keys: list[ast.expr] = []
        if isinstance(node, ast.Attribute):
            known |= {node.attr} & (CLASSES | {"param_groups"})
        elif isinstance(node, ast.Name):
            known |= {node.id} & CLASSES
        elif isinstance(node, ast.alias):
            known |= {node.name} & CLASSES
        elif isinstance(node, ast.Subscript):
            keys = [node.slice]
        elif isinstance(node, ast.Compare):
            keys = [node.left, *node.comparators]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("get", "pop", "setdefault"):
            keys = node.args[:1]
        known |= {key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str)} & (CLASSES | SETTINGS)
    return known


def test_no_other_module_knows_an_optimizer() -> None:
    package = Path(sk.__file__).parent
    knowing = {}
    for path in package.rglob("*.py"):
        name = path.relative_to(package).as_posix()
        if known := knowledge_of_optimizers(path.read_text(encoding="utf-8")) - ALLOWED.get(name, set()):
            knowing[name] = known
    assert {name.split("/")[0] for name in knowing} == {"optimizers"}, f"ask sharpkit.optimizers instead: {knowing}"


@pytest.mark.parametrize(
    ("source", "known"),
    [
        ("isinstance(o, torch.optim.SGD)", {"SGD"}),
        ("from torch.optim import AdamW", {"AdamW"}),
        ("type(o).__name__ == 'Adam'", {"Adam"}),
        ("group['betas'][0]", {"betas"}),
        ("group.get('momentum', 0.0)", {"momentum"}),
        ("'dampening' in group", {"dampening"}),
        ("for group in optimizer.param_groups: pass", {"param_groups"}),
        ("def f(o: torch.optim.Optimizer, momentum=0.0):\n    'As torch.optim.SGD.'\n    return f(o, momentum=momentum)", set()),
    ],
)
def test_what_counts_as_knowing_one(source: str, known: set[str]) -> None:
    assert knowledge_of_optimizers(source) == known
