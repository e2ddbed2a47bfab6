"""The step that an optimizer would make next: as a linear function of the gradient, or made by a copy."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sharpkit._errors import UnsupportedError
from sharpkit.objective.params import ParamLayout
from sharpkit.optimizers.groups import (
    _NONE_HELD,
    _holding,
    held_parameters,
    is_maximizing,
    learning_rate,
    learning_rates,
    own_state,
    relative_rates,
)
from sharpkit.optimizers.kinds import _own_step, kind_of
from sharpkit.optimizers.wrappers import unwrap_optimizer


def has_linear_step(optimizer: Optimizer) -> bool:
    """Whether the next step is known as a multiple of the gradient plus a push: SGD's kind, with momentum or without."""
    kind = kind_of(optimizer)
    return kind is not None and kind.step is not None


def linear_step(optimizer: Optimizer, layout: ParamLayout) -> tuple[Tensor, Tensor]:
    """(a, b) in SGD's step a g + b at rate 1 of the reference group, each group at its own rate, momentum and decay.

    Returns:
        (n,) each in the layout's order; 0 for parameters that do not move. Of a climbing optimizer, the step downwards.

    Raises:
        TypeError: another kind of optimizer.
    """
    optimizer = unwrap_optimizer(optimizer)
    kind = kind_of(optimizer)
    if kind is None or kind.step is None:
        raise TypeError(f"the step along a momentum buffer is defined for torch.optim.SGD, got {type(optimizer).__name__}")
    groups = zip(optimizer.param_groups, relative_rates(optimizer, layout), strict=True)
    own = {id(p): (group, ratio) for group, ratio in groups for p in group["params"] if ratio}
    factors, pushes = list[Tensor | None](), list[Tensor | None]()
    for live, p in zip(layout.live, layout.params, strict=True):
        if id(live) not in own:
            factors.append(None)
            pushes.append(None)
            continue
        group, ratio = own[id(live)]
        factor, push = kind.step(own_state(optimizer, layout, live), group, p)
        factors.append(torch.full_like(p, ratio * factor))
        pushes.append(None if push is None else ratio * push)
    return layout.flatten(factors), layout.flatten(pushes)


_COUNTERS = ("step", "mu_product")  # scalars beside the moments, kept in their own type

_FAST_PATHS = ("fused", "foreach", "capturable")  # ask for devices or types that a copy in float64 does not have


def copy_optimizer(optimizer: Optimizer, place: Mapping[int, nn.Parameter], *, reset: bool = False) -> Optimizer:
    """The same optimizer over other parameters, with a copy of its state; schedulers and hooks stay behind.

    Args:
        optimizer: the original; only read.
        place: the new parameter for each of its own, by ``id``.
        reset: start with an empty state.

    Raises:
        ValueError: the optimizer holds parameters that the model does not.
        UnsupportedError: it holds something that cannot be copied.
    """
    optimizer = unwrap_optimizer(optimizer)
    if any(id(p) not in place for group in optimizer.param_groups for p in group["params"]):
        raise ValueError("the optimizer holds parameters that are not the model's: make it from model.parameters()")
    try:
        other = _twin(optimizer, dict(place))
    except Exception as error:
        raise UnsupportedError(f"{type(optimizer).__name__} cannot be copied to step elsewhere: {type(error).__name__}: {error}") from error
    for group in other.param_groups:
        group.pop("initial_lr", None)
    if reset:
        other.state.clear()
        for group in other.param_groups:
            if "initial_accumulator_value" in group:  # older releases of torch make Adagrad's state with it, not at its first step
                for p in group["params"]:
                    start = torch.full_like(p, float(group["initial_accumulator_value"]))
                    other.state[p] = {"step": torch.tensor(0.0), "sum": start.detach()}
    return other


def _twin(optimizer: Optimizer, memo: dict[int, Any]) -> Optimizer:
    """A deep copy in which ``memo`` says, by ``id``, what stands for what; inner optimizers, as LookAhead has one, are copied alike."""
    # Not the class's own __init__, whose arguments are unknown, nor deepcopy of the whole: torch leaves all but groups and state out of it.
    twin = memo[id(optimizer)] = type(optimizer).__new__(type(optimizer))
    Optimizer.__setstate__(twin, {"defaults": {}, "state": {}, "param_groups": []})  # hooks of its own, none in them
    for value in vars(optimizer).values():
        if isinstance(value, Optimizer) and id(value) not in memo:
            _twin(value, memo)
    for name, value in vars(optimizer).items():
        # a method among the attributes was patched in, by a scheduler for one: the class's own counts
        if not name.startswith("_optimizer_") and not (callable(value) and hasattr(type(optimizer), name)):
            vars(twin)[name] = copy.deepcopy(value, memo)
    return twin


def next_update(optimizer: Optimizer, layout: ParamLayout, gradient: Tensor) -> Tensor:
    """u in w <- w - eta u for the step that the optimizer would make with this gradient, groups' rates relative to the reference's.

    The optimizer is copied with its state, in float64; the original and its hooks are not touched.

    Args:
        optimizer: any whose step takes no closure and is proportional to its rate, known or not.
        layout: the parameters meant.
        gradient: (n,) in the layout's order.

    Returns:
        (n,) in the layout's order; 0 for parameters the optimizer does not hold.

    Raises:
        UnsupportedError: LBFGS, whose step searches; Rprop, whose step does not depend on its rate; one that cannot step on a copy.
        ValueError: the optimizer holds none of these parameters.
    """
    optimizer = unwrap_optimizer(optimizer)
    name = type(optimizer).__name__
    if layout.shards is not None and not _is_proportional(optimizer):  # those that are step entry by entry
        raise UnsupportedError(
            f"the next update of {name} is not known to be one for each entry, as it must be of parameters sharded over processes: use "
            "another optimizer, such as AdamW"
        )
    if _needs_closure(optimizer):
        raise UnsupportedError(f"{name} evaluates the loss several times in a step, so it has no next update to look at; use another one")
    if not any(_holding(optimizer, layout)):
        raise ValueError(_NONE_HELD)
    present = learning_rate(optimizer, layout)
    # u is the step over the rate, so at rate 0 (the first step of a warmup) the copy steps at rate 1 instead
    step = _step_elsewhere(optimizer, layout, gradient, factor=1.0 if present else None)
    # A rate that is no factor of the step has no critical value; where it is not known to be one, two rates must agree.
    if present and not _is_proportional(optimizer):
        half = _step_elsewhere(optimizer, layout, gradient, factor=0.5)
        rounding = 1e-12 * float(layout.current().double().norm())  # by judgement: steps are differences of parameters in float64
        if not float((step - 2 * half).norm()) <= 1e-6 * float(step.norm()) + rounding:
            kind, instead = kind_of(optimizer), "use another optimizer"
            if kind is not None and kind.rule is not None:
                instead = "its stability limit is that of sharpkit.measure(objective, optimizer=optimizer)"
            elif kind is not None and kind.geometry is not None:
                instead = "its curvature is that of sharpkit.generalized_sharpness(objective, optimizer)"
            raise UnsupportedError(
                f"the step of {name} is not proportional to its learning rate here, so no rate along it is critical; {instead}"
            )
    return step / (present or 1.0)


def _is_proportional(optimizer: Optimizer) -> bool:
    """Whether the step is known to be proportional to the rate: torch's own with a linear rule, but for Adafactor's relative step."""
    kind = kind_of(optimizer)
    if kind is None or kind.rule is None or not _own_step(type(optimizer)).__module__.startswith("torch.optim."):
        return False
    return all(math.isinf(rule.ceiling) for rule in kind.rules(optimizer))


def _step_elsewhere(optimizer: Optimizer, layout: ParamLayout, gradient: Tensor, *, factor: float | None) -> Tensor:
    """(n,) w less what a copy makes of it at the present rates times a factor; at the ratios of the rates without one."""
    # In float64, since the step is a difference of parameters: in float32 one of 1e-6 |w| would keep one correct digit.
    held = [p for group in held_parameters(optimizer) for p in group]
    copies = {id(p): nn.Parameter(layout.part_of(p, p.detach()).double().clone()) for p in held}
    before = {key: p.detach().clone() for key, p in copies.items()}
    state: dict[int, Any] = {}  # of sharded parameters, what stands for this process's part of it
    for p in held if layout.shards is not None else ():
        theirs = optimizer.state.get(p, {})
        own = own_state(optimizer, layout, p)
        state |= {id(theirs[key]): own[key].detach().clone() for key in own if isinstance(own[key], Tensor)}
    twin = copy_optimizer(optimizer, {**copies, **state})
    rates = relative_rates(optimizer, layout) if factor is None else [factor * rate for rate in learning_rates(optimizer)]
    for group, rate in zip(twin.param_groups, rates, strict=True):
        group.update({"lr": rate, **{key: False for key in _FAST_PATHS if key in group}})
    for values in twin.state.values():
        moments = {k: v for k, v in values.items() if isinstance(v, Tensor) and v.is_floating_point() and k not in _COUNTERS}
        values.update({k: v.double() for k, v in moments.items()})
    for p, g in zip(layout.live, layout.split(gradient), strict=True):
        if id(p) in copies:
            copies[id(p)].grad = g.double()
    try:
        with torch.random.fork_rng(devices=[layout.device] if layout.device.type == "cuda" else []):  # some steps draw noise
            type(twin).step(twin)  # type: ignore[call-arg]
    except Exception as error:
        name = type(optimizer).__name__
        raise UnsupportedError(f"the step of {name} failed on a copy, so its next update is not known: {error}") from error
    return layout.flatten([before[id(p)] - copies[id(p)].detach() if id(p) in copies else None for p in layout.live])


def _needs_closure(optimizer: Optimizer) -> bool:
    """Whether a step evaluates the loss itself, by a closure that must be given."""
    # LBFGS alone of torch's optimizers asks for a closure; a method of the same kind elsewhere does so too
    arguments = inspect.signature(type(optimizer).step).parameters
    return "closure" in arguments and arguments["closure"].default is inspect.Parameter.empty


def check_takes_rate(optimizer: Optimizer) -> None:
    """Raise UnsupportedError where short runs at several rates would say nothing of the rate to train with."""
    name = type(optimizer).__name__
    if is_maximizing(optimizer):
        raise UnsupportedError(f"{name} maximizes, and the loss of an objective is to fall: minimize the negative loss instead")
    if _needs_closure(optimizer):
        raise UnsupportedError(
            f"{name} evaluates the loss itself, several times a step, so that its rate cannot be tried out in short runs"
        )
    if isinstance(optimizer, torch.optim.Rprop):
        raise UnsupportedError(f"the rate of {name} is only the length of its first step: leave it, and set step_sizes")
    if "d" in optimizer.param_groups[0]:  # Prodigy and the methods of D-adaptation keep their own rate there, which takes long to grow
        raise UnsupportedError(f"{name} finds its own rate while it trains, and lr is a factor of that: leave it at 1")


def gradient_descent(params: Iterable[nn.Parameter], lr: float) -> Optimizer:
    """Plain gradient descent: what the demo trains with, and what carries the rate of a scheduler that only gives a multiplier."""
    return torch.optim.SGD(params, lr=lr)


def line_search_minimizer(params: Iterable[Tensor], *, max_iter: int, history_size: int) -> torch.optim.LBFGS:
    """A quasi-Newton method with a strong Wolfe line search, for small smooth problems solved to the end."""
    return torch.optim.LBFGS(params, max_iter=max_iter, history_size=history_size, line_search_fn="strong_wolfe")
