"""Everything that sharpkit knows about optimizers: one table, one entry for each kind.

All other modules ask here: which linear rule a parameter group follows, what an adaptive optimizer divides its gradients by, at which rates
the groups train, which parameters they hold, and what the next step would be. To teach sharpkit another optimizer, call
:func:`register_optimizer`, or add a line to the table ``_KINDS``.

A subclass that does not override ``step`` is treated as its parent. One that does is another method, and unknown unless registered.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sharpkit._errors import UnsupportedError
from sharpkit.objective.params import ParamLayout

Settings = Mapping[str, Any]  # of a parameter group: lr, betas, weight_decay ...
State = Mapping[str, Any]  # that an optimizer keeps for one parameter: exp_avg, step ...


@dataclass(frozen=True)
class UpdateRule:
    """The linear part of an optimizer's update, as far as stability on a quadratic depends on it.

    With gradient g and momentum buffer v: v <- momentum v + (1 - dampening) g, or, with ``nesterov``, the step is g + momentum v. Coupled
    weight decay adds weight_decay * w to g; decoupled decay multiplies w by (1 - lr weight_decay).

    Attributes:
        adaptive: the curvature meant is that of D^-1 H.
        name: for messages.

    Example:
        >>> UpdateRule(momentum=0.9).max_learning_rate(10.0)
        0.38

    References:
        Cohen et al. (2021), arXiv 2103.00065, for SGD with either momentum; Cohen et al. (2022), arXiv 2207.14484, for Adam.
    """

    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    decoupled: bool = False
    adaptive: bool = False
    name: str = "gradient descent"

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")
        if not 0 <= self.dampening < 1:
            raise ValueError(f"dampening must be in [0, 1), got {self.dampening}")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must not be negative, got {self.weight_decay}")
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError("Nesterov momentum needs momentum > 0 and dampening = 0")

    def max_learning_rate(self, curvature: float) -> float:
        """The rate at which the mode with this curvature starts to flip sign with growing size; inf where there is none."""
        gain, decay = self._gains()
        load = gain * curvature + decay
        return 2 * (1 + self.momentum) / load if load > 0 else math.inf

    def max_curvature(self, lr: float) -> float:
        """The largest curvature that is stable at a learning rate: what lambda_max is to be compared with.

        Raises:
            ValueError: the rate is not positive.
        """
        if lr <= 0:
            raise ValueError(f"the learning rate must be positive, got {lr}")
        gain, decay = self._gains()
        return (2 * (1 + self.momentum) / lr - decay) / gain

    def _gains(self) -> tuple[float, float]:
        """(gain, decay) in the condition lr (gain * curvature + decay) <= 2 (1 + momentum): the characteristic polynomial at z = -1."""
        gain = 1 + 2 * self.momentum if self.nesterov else 1 - self.dampening
        # coupled decay is curvature like any other; decoupled decay shrinks w beside the step, with no part in the momentum buffer
        return gain, self.weight_decay * (1 + self.momentum if self.decoupled else gain)

    @property
    def condition(self) -> str:
        """The condition as a formula in the usual letters."""
        curvature = "lambda_max(D^-1 H)" if self.adaptive else "lambda_max(H)"
        if self.momentum == 0:
            formula = f"{curvature} <= 2 / lr"
        elif self.nesterov:
            formula = f"{curvature} <= 2 (1 + beta) / ((1 + 2 beta) lr), beta = {self.momentum:g}"
        elif self.dampening:
            formula = f"{curvature} <= 2 (1 + beta) / ((1 - {self.dampening:g}) lr), beta = {self.momentum:g}"
        else:
            formula = f"{curvature} <= 2 (1 + beta) / lr, beta = {self.momentum:g}"
        if self.weight_decay:
            formula += f", less {'decoupled ' if self.decoupled else ''}weight decay {self.weight_decay:g}"
        return f"{self.name}: {formula}"


# -- the table ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OptimizerKind:
    """What is known about one kind of optimizer; None where nothing is.

    Attributes:
        rule: settings of a parameter group -> its linear rule. An adaptive rule is about the gradient divided by D.
        preconditioner: (state of a parameter, settings of its group, the parameter) -> D in the parameter's shape, what the gradient is
            divided by. Not needed where the rule is not adaptive: then D = 1.
        velocity: (state of a parameter, settings of its group) -> what the step adds to the gradient, None before the first step.
        geometry: the norm in which the optimizer is steepest descent.
    """

    rule: Callable[[Settings], UpdateRule] | None = None
    preconditioner: Callable[[State, Settings, Tensor], Tensor] | None = None
    velocity: Callable[[State, Settings], Tensor | None] | None = None
    geometry: Any = None


def _decay(settings: Settings) -> float:
    return float(settings.get("weight_decay") or 0.0)


def _sgd_rule(settings: Settings) -> UpdateRule:
    return UpdateRule(float(settings["momentum"]), float(settings["dampening"]), bool(settings["nesterov"]), _decay(settings))


def _sgd_velocity(state: State, settings: Settings) -> Tensor | None:
    buffer: Tensor | None = state.get("momentum_buffer")
    if buffer is None:
        return None
    sign = -1.0 if settings.get("maximize") else 1.0  # torch then accumulates -g in the buffer
    return sign * float(settings["momentum"]) * buffer


def _schedule_free_rule(settings: Settings) -> UpdateRule:
    # arXiv 2405.15682: the gradient is taken at y = (1 - beta) z + beta x, and the fast iterate z moves by it. So z sees its own curvature
    # times 1 - beta, which is what dampening = beta without a momentum buffer does. The mean x moves too slowly to matter.
    return UpdateRule(0.0, float(settings["momentum"]), False, _decay(settings))


def _adam_rule(settings: Settings, *, decoupled: bool | None = None) -> UpdateRule:
    beta1 = float(settings["betas"][0])
    decoupled = bool(settings.get("decoupled_weight_decay")) if decoupled is None else decoupled
    # Coupled decay is part of the gradient and so of the preconditioned matrix, not of the rule: see gradient_decay.
    return UpdateRule(beta1, beta1, False, _decay(settings) if decoupled else 0.0, decoupled, adaptive=True)


def _adam_preconditioner(state: State, settings: Settings, p: Tensor) -> Tensor:
    """(1 - beta1^t)(sqrt(v_hat) + eps), v_hat the bias-corrected second moment (Cohen et al. 2022, arXiv 2207.14484)."""
    beta1, beta2 = settings["betas"]
    moment: Tensor = state["max_exp_avg_sq" if settings.get("amsgrad") else "exp_avg_sq"]
    t = float(state["step"])
    corrected = moment.double() / (1 - float(beta2) ** t)
    divisor: Tensor = (corrected.sqrt() + settings["eps"]) * (1 - float(beta1) ** t)
    return divisor


def _rmsprop_preconditioner(state: State, settings: Settings, p: Tensor) -> Tensor:
    """sqrt(v) + eps, less the square of the mean gradient under the root if the optimizer is centred."""
    moment: Tensor = state["square_avg"].double()
    if settings.get("centered"):
        moment = moment - state["grad_avg"].double().square()
    divisor: Tensor = moment.clamp_min(0).sqrt() + settings["eps"]
    return divisor


def _adagrad_preconditioner(state: State, settings: Settings, p: Tensor) -> Tensor:
    """sqrt(sum) + eps; torch's own decay of the rate enters here, since lr stays as it was given."""
    total: Tensor = state["sum"].double()
    divisor: Tensor = (total.sqrt() + settings["eps"]) * (1 + (float(state["step"]) - 1) * settings["lr_decay"])
    return divisor


# A key is a class or, so that its package need not be imported, the name of one. The most derived entry of an optimizer counts.
_KINDS: dict[type | str, OptimizerKind] = {
    torch.optim.SGD: OptimizerKind(_sgd_rule, velocity=_sgd_velocity),
    torch.optim.Adam: OptimizerKind(_adam_rule, _adam_preconditioner),
    torch.optim.AdamW: OptimizerKind(lambda settings: _adam_rule(settings, decoupled=True), _adam_preconditioner),
    torch.optim.RMSprop: OptimizerKind(lambda s: UpdateRule(float(s["momentum"]), adaptive=True), _rmsprop_preconditioner),
    torch.optim.Adagrad: OptimizerKind(lambda s: UpdateRule(adaptive=True), _adagrad_preconditioner),
    "SGDScheduleFree": OptimizerKind(_schedule_free_rule),
}


def register_optimizer(
    cls: type[Optimizer],
    *,
    rule: Callable[[Settings], UpdateRule] | None = None,
    preconditioner: Callable[[State, Settings, Tensor], Tensor] | None = None,
    geometry: Any = None,
) -> None:
    """Tell sharpkit what an optimizer class does, for this process; its subclasses that keep its ``step`` are included.

    Args:
        cls: a subclass of torch.optim.Optimizer. What was known about it before is replaced.
        rule: settings of a parameter group (a dict such as ``optimizer.param_groups[0]``) -> its :class:`UpdateRule`, with
            ``adaptive=True`` where gradients are divided by D.
        preconditioner: (state of a parameter, settings of its group, the parameter) -> D, positive, in the parameter's shape. Needed for
            an adaptive rule; without one, D = 1.
        geometry: the norm in which the optimizer is steepest descent.

    Raises:
        TypeError: cls is no optimizer class, or an argument is no function.
        ValueError: there is nothing to register.

    Example:
        >>> import torch, sharpkit as sk
        >>> class HalfStep(torch.optim.SGD):
        ...     def step(self, closure=None):
        ...         for group in self.param_groups:
        ...             for p in group["params"]:
        ...                 p.data.add_(p.grad, alpha=-group["lr"] / 2)
        >>> sk.register_optimizer(HalfStep, rule=lambda settings: sk.UpdateRule(dampening=0.5))
        >>> float(sk.stable_learning_rate(10.0, optimizer=HalfStep([torch.nn.Parameter(torch.ones(1))], lr=0.1)))
        0.4
    """
    given: Any = cls
    if not (isinstance(given, type) and issubclass(given, Optimizer)):
        raise TypeError(f"register_optimizer takes a subclass of torch.optim.Optimizer, got {given!r}")
    if rule is None and preconditioner is None and geometry is None:
        raise ValueError(f"nothing to register for {cls.__name__}: pass rule=, preconditioner= or geometry=")
    for name, function in (("rule", rule), ("preconditioner", preconditioner)):
        if function is not None and not callable(function):
            raise TypeError(f"{name} must be a function, got {type(function).__name__}")
    # no velocity: batch sharpness along the step stays what it is for an unknown optimizer, along the gradient
    _KINDS[cls] = OptimizerKind(rule, preconditioner, geometry=geometry)


def kind_of(optimizer: Optimizer) -> OptimizerKind | None:
    """The entry of an optimizer's class, or of the parent whose ``step`` it keeps; None for an unknown method."""
    cls = type(unwrap_optimizer(optimizer))
    parent = _nearest_entry(cls)
    # unknown rather than taken for its parent: a rule that is nearly right would give limits that are silently wrong
    if parent is None or _own_step(parent) is not _own_step(cls):
        return None
    return _KINDS.get(parent) or _KINDS[parent.__name__]


def _nearest_entry(cls: type) -> type[Any] | None:
    """The most derived class in the table that cls is or derives from."""
    return next((base for base in cls.__mro__ if base in _KINDS or base.__name__ in _KINDS), None)


def _own_step(cls: type[Any]) -> Any:
    # torch wraps the step of every class in a profiler hook when its first optimizer is made, subclasses that inherit it included
    return inspect.unwrap(cls.step)


def _unknown(optimizer: Optimizer, what: str, supported: Callable[[OptimizerKind], Any], remedy: str, argument: str) -> UnsupportedError:
    cls = type(optimizer)
    names = ", ".join(key if isinstance(key, str) else key.__name__ for key, kind in _KINDS.items() if supported(kind))
    parent = _nearest_entry(cls)
    why = f" (it overrides the step of {parent.__name__})" if parent not in (None, cls) and kind_of(optimizer) is None else ""
    register = f"register it with sharpkit.register_optimizer({cls.__name__}, {argument}=...)"
    return UnsupportedError(f"{what} of {cls.__name__} is not known{why}; supported: {names}. {remedy}, or {register}")


def _no_rule(optimizer: Optimizer) -> UnsupportedError:
    remedy = "Pass momentum=, dampening=, weight_decay= of its linear part instead"
    return _unknown(optimizer, "the stability limit", lambda kind: kind.rule, remedy, "rule")


# -- what an optimizer is ---------------------------------------------------------------------------------------------------------

_WRAPPERS = ("AcceleratedOptimizer", "LightningOptimizer")  # subclasses of the torch class that hold the real one


def unwrap_optimizer(optimizer: Any) -> Optimizer:
    """The torch optimizer inside a trainer's wrapper (accelerate, Lightning, anything else that holds it as ``.optimizer``).

    Raises:
        TypeError: there is none.

    Example:
        >>> from types import SimpleNamespace
        >>> inner = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        >>> unwrap_optimizer(SimpleNamespace(optimizer=inner)) is inner
        True
    """
    inside = optimizer
    # by names in the whole mro, since Lightning's wrapper makes a class of itself and the optimizer's class, "LightningAdam"
    while not isinstance(inside, Optimizer) or any(cls.__name__ in _WRAPPERS for cls in type(inside).__mro__):
        inner = getattr(inside, "optimizer", None)
        if inner is None or inner is inside:
            raise TypeError(f"the optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        inside = inner
    return inside


def update_rule(optimizer: Optimizer, *, group: int = 0) -> UpdateRule:
    """The linear update rule of a parameter group.

    Raises:
        UnsupportedError: an optimizer whose linear rule is not known, or one that maximizes.

    Example:
        >>> update_rule(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.9)).condition
        'SGD: lambda_max(H) <= 2 (1 + beta) / lr, beta = 0.9'
    """
    optimizer = unwrap_optimizer(optimizer)
    kind = kind_of(optimizer)
    if kind is None or kind.rule is None:
        raise _no_rule(optimizer)
    if is_maximizing(optimizer):
        raise UnsupportedError(
            f"{type(optimizer).__name__} has maximize=True, and stability limits are those of descent: minimize the negative loss instead"
        )
    rule = kind.rule(optimizer.param_groups[group])
    return replace(rule, name=type(optimizer).__name__) if rule.name == UpdateRule.name else rule


def update_rules(optimizer: Optimizer) -> list[UpdateRule]:
    """The linear update rule of every parameter group.

    Raises:
        UnsupportedError: an optimizer whose linear rule is not known, or one that maximizes.
    """
    return [update_rule(optimizer, group=index) for index in range(len(optimizer.param_groups))]


def known_rule(optimizer: Optimizer) -> UpdateRule | None:
    """The linear update rule of the first group; None for an optimizer whose stability limit is not known."""
    try:
        return update_rule(optimizer)
    except UnsupportedError:
        return None


def is_adaptive(optimizer: Optimizer, *, unknown: bool | None = None) -> bool:
    """Whether the optimizer divides gradients by their own size, so that its limit is about D^-1 H.

    Args:
        optimizer: any.
        unknown: answer for an optimizer whose rule is not known; None raises.

    Raises:
        UnsupportedError: an optimizer whose rule is not known, without ``unknown``.
    """
    kind = kind_of(optimizer)
    if kind is not None and kind.rule is not None:
        return kind.rule(optimizer.param_groups[0]).adaptive
    if unknown is None:
        raise _no_rule(optimizer)
    return unknown


def is_maximizing(optimizer: Optimizer) -> bool:
    """Whether any group climbs the objective (``maximize=True``): limits are about descent, and say nothing then."""
    return any(group.get("maximize") for group in optimizer.param_groups)


# -- its groups -------------------------------------------------------------------------------------------------------------------


def held_parameters(optimizer: Optimizer) -> list[list[nn.Parameter]]:
    """The parameters of every group."""
    return [list(group["params"]) for group in optimizer.param_groups]


def learning_rate(optimizer: Optimizer) -> float:
    """The learning rate of the first group."""
    return float(optimizer.param_groups[0]["lr"])


def learning_rates(optimizer: Optimizer) -> list[float]:
    """The learning rate of every group."""
    return [float(group["lr"]) for group in optimizer.param_groups]


def relative_rates(optimizer: Optimizer) -> list[float]:
    """Every group's learning rate over the first group's; 1 for all where that is 0."""
    first = learning_rate(optimizer)
    return [rate / first if first else 1.0 for rate in learning_rates(optimizer)]


def set_learning_rates(optimizer: Optimizer, rates: Iterable[float]) -> None:
    """Give every group its learning rate; one that is a tensor is overwritten in place, as captured graphs need it.

    Example:
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        >>> set_learning_rates(optimizer, [0.2])
        >>> learning_rates(optimizer)
        [0.2]
    """
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def restore_initial_rates(optimizer: Optimizer) -> None:
    """Give back the rates from before a scheduler's warmup, which may have begun at 0 and so hidden the groups' ratios."""
    for group in optimizer.param_groups:
        if "initial_lr" in group and not isinstance(group["lr"], Tensor):
            group["lr"] = group["initial_lr"]


def current_momentum(optimizer: Optimizer) -> float:
    """Momentum, or beta1, of the first group; NaN for an optimizer that has none."""
    settings = optimizer.param_groups[0]
    return float(settings["betas"][0] if "betas" in settings else settings.get("momentum", math.nan))


def set_momentum(optimizer: Optimizer, value: float) -> None:
    """Give every group of an optimizer of SGD's kind this momentum."""
    for group in optimizer.param_groups:
        group["momentum"] = value


def averaging(optimizer: Optimizer) -> tuple[float, float] | None:
    """Beta1 and beta2 of the first group; None for an optimizer that does not average both moments."""
    return optimizer.param_groups[0].get("betas")


def weight_decay(optimizer: Optimizer) -> float:
    """Weight decay of the first group, coupled or not."""
    return _decay(optimizer.param_groups[0])


def decoupled_decays(optimizer: Optimizer) -> list[float]:
    """Decoupled weight decay of every group; 0 where decay enters the gradient instead."""
    kind = kind_of(optimizer)
    if kind is None or kind.rule is None:
        return [_decay(group) if group.get("decoupled_weight_decay") else 0.0 for group in optimizer.param_groups]
    return [rule.weight_decay if rule.decoupled else 0.0 for rule in map(kind.rule, optimizer.param_groups)]


def gradient_decay(optimizer: Optimizer) -> float:
    """The first group's weight decay that is divided by D together with the gradient, so that the matrix is D^-1 (H + decay).

    It is 0 where the rule holds the decay, as it does for SGD and AdamW.
    """
    kind, settings = kind_of(optimizer), optimizer.param_groups[0]
    if kind is None or kind.rule is None:
        return 0.0 if settings.get("decoupled_weight_decay") else _decay(settings)
    rule = kind.rule(settings)
    # torch adds coupled decay to g before g enters the second moment and is divided by D, as if the loss had 0.5 decay |w|^2 more
    return _decay(settings) if rule.adaptive and not rule.weight_decay else 0.0


def plain_settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Every group's settings that are plain values, for a key that tells runs apart."""
    plain = (int, float, str, tuple, bool, type(None))
    # a rate may be a tensor; it must count all the same, or runs at two rates would share a key
    groups = [{**group, "lr": float(group["lr"])} for group in optimizer.param_groups]
    return [{k: v for k, v in group.items() if k != "params" and isinstance(v, plain)} for group in groups]


# -- what its state says ----------------------------------------------------------------------------------------------------------


def preconditioner_scale(optimizer: Optimizer, layout: ParamLayout) -> Tensor:
    """D^-1/2 from an optimizer's live state, with groups' learning rates relative to the first's.

    Args:
        optimizer: after at least one step, if it is adaptive.
        layout: the parameters meant; the optimizer must hold them all.

    Returns:
        (n,) in the layout's order; 0 for parameters that an adaptive optimizer has not moved yet.

    Raises:
        UnsupportedError: an optimizer whose D is not known.
        ValueError: it has not stepped yet, does not hold a parameter, or has rate 0 in its first group only.
    """
    optimizer = unwrap_optimizer(optimizer)
    kind = kind_of(optimizer)
    divide = kind.preconditioner if kind is not None else None
    if divide is None and (kind is None or kind.rule is None or update_rule(optimizer).adaptive):
        remedy = "Pass diagonal= with what it divides gradients by"
        raise _unknown(optimizer, "the state", lambda k: k.preconditioner or k.velocity, remedy, "preconditioner")
    groups = {id(p): (settings, rate) for settings, rate in _groups_with_rates(optimizer) for p in settings["params"]}
    if learning_rate(optimizer) == 0 and any(learning_rates(optimizer)):
        raise ValueError("the first group's learning rate is 0, and the others' are relative to it: measure after the warmup's first step")
    if divide is not None and not any(map(_has_stepped, optimizer.state.values())):
        raise ValueError(f"{type(optimizer).__name__} has no state yet: measure after its first step")
    pieces: list[Tensor | None] = []
    for name, p in zip(layout.names, layout.params, strict=True):
        if id(p) not in groups:
            raise ValueError(f"parameter {name!r} is not in the optimizer; select the optimizer's parameters with params=, or add it")
        (settings, rate), state = groups[id(p)], optimizer.state.get(p, {})
        if divide is None:
            pieces.append(torch.full_like(p, rate, dtype=torch.float64).sqrt())
        elif not _has_stepped(state):
            pieces.append(None)  # without a gradient so far, it has never been moved
        else:
            denominator = divide(state, settings, p)
            if denominator.shape != p.shape:
                raise ValueError(f"the preconditioner of {name!r} must have shape {tuple(p.shape)}, got {tuple(denominator.shape)}")
            # a group at r times the first group's rate moves as if D were r times smaller, so the limit holds for the first's rate
            pieces.append((rate / denominator.double()).sqrt())
    return layout.flatten(pieces)


def _groups_with_rates(optimizer: Optimizer) -> list[tuple[dict[str, Any], float]]:
    return list(zip(optimizer.param_groups, relative_rates(optimizer), strict=True))


def _has_stepped(state: State) -> bool:
    # Adagrad makes its state, with step 0, before the first step; a method that counts its steps elsewhere makes it at the first one
    return bool(float(state["step"])) if "step" in state else bool(state)


def settled_preconditioner(optimizer: Optimizer, second_moment: Tensor) -> Tensor:
    """sqrt(v) + eps: the D that an adaptive optimizer comes to where the squared gradient has this mean.

    Args:
        optimizer: gives eps, 1e-8 (torch's own default) where it has none.
        second_moment: (n,) mean of the squared gradient per coordinate.

    Returns:
        (n,).
    """
    return second_moment.sqrt() + float(optimizer.param_groups[0].get("eps", 1e-8))


def has_velocity(optimizer: Optimizer) -> bool:
    """Whether the step is the gradient plus a velocity: SGD's kind, with momentum or without."""
    kind = kind_of(optimizer)
    return kind is not None and kind.velocity is not None


def velocity(optimizer: Optimizer, layout: ParamLayout) -> Tensor:
    """beta v of SGD's step g + beta v, each parameter with its own group's beta.

    Returns:
        (n,) in the layout's order; 0 where there is no momentum, before the first step, and for parameters that are not held.

    Raises:
        TypeError: an optimizer of another kind than SGD.
    """
    optimizer = unwrap_optimizer(optimizer)
    kind = kind_of(optimizer)
    if kind is None or kind.velocity is None:
        raise TypeError(f"the step along a momentum buffer is defined for torch.optim.SGD, got {type(optimizer).__name__}")
    settings = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    return layout.flatten([kind.velocity(optimizer.state.get(p, {}), settings.get(id(p), {})) for p in layout.params])


# -- a step elsewhere -------------------------------------------------------------------------------------------------------------

_COUNTERS = ("step", "mu_product")  # scalars beside the moments, kept in their own type
_FAST_PATHS = ("fused", "foreach", "capturable")  # ask for devices or types that a copy in float64 does not have


def copy_optimizer(optimizer: Optimizer, place: Mapping[int, nn.Parameter], *, lr: float | None = None, reset: bool = False) -> Optimizer:
    """The same optimizer over other parameters, with a copy of its state; schedulers and hooks stay behind.

    Args:
        optimizer: the original; only read.
        place: the new parameter for each of its own, by ``id``.
        lr: rate of the first group, the others' keeping their ratio to it.
        reset: start with an empty state.

    Raises:
        ValueError: the optimizer holds parameters that the model does not.

    Example:
        >>> old, new = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1))
        >>> other = copy_optimizer(torch.optim.SGD([old], lr=0.1), {id(old): new}, lr=0.5)
        >>> learning_rates(other), held_parameters(other)[0][0] is new
        ([0.5], True)
    """
    optimizer = unwrap_optimizer(optimizer)
    groups: list[dict[str, Any]] = []
    for group, ratio in _groups_with_rates(optimizer):
        if any(id(p) not in place for p in group["params"]):
            raise ValueError("the optimizer holds parameters that are not the model's: make it from model.parameters()")
        settings = {key: value for key, value in group.items() if key not in ("params", "initial_lr")}
        settings["lr"] = _copied(group["lr"])  # a tensor would be shared, and set in place
        if lr is not None:
            settings["lr"] = lr * ratio
        groups.append({**settings, "params": [place[id(p)] for p in group["params"]]})
    # Not the class's own __init__, whose arguments are unknown, nor deepcopy, which would copy the parameters, hooks and schedulers too.
    other = type(optimizer).__new__(type(optimizer))
    Optimizer.__init__(other, groups, dict(optimizer.defaults))
    for name, value in vars(optimizer).items():
        if isinstance(value, (bool, int, float, str)):  # settings that some optimizers keep as attributes
            vars(other).setdefault(name, value)
    if not reset:
        for p, values in optimizer.state.items():
            other.state[place[id(p)]] = {key: _copied(value) for key, value in values.items()}
    return other


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def next_update(optimizer: Optimizer, layout: ParamLayout, gradient: Tensor) -> Tensor:
    """u in w <- w - eta u for the step that the optimizer would make with this gradient, groups' rates relative to the first's.

    The optimizer is copied with its state, in float64; the original and its hooks are not touched.

    Args:
        optimizer: any whose step takes no closure, known or not.
        layout: the parameters meant.
        gradient: (n,) in the layout's order.

    Returns:
        (n,) in the layout's order; 0 for parameters the optimizer does not hold.

    Raises:
        UnsupportedError: LBFGS, whose step searches.
        ValueError: the optimizer holds none of these parameters.
    """
    optimizer = unwrap_optimizer(optimizer)
    if _needs_closure(optimizer):
        raise UnsupportedError(
            f"{type(optimizer).__name__} evaluates the loss several times in a step, so it has no next update to look at; use another one"
        )
    # In float64, since u is a difference of parameters: in float32 a step of 1e-6 |w| would keep one correct digit.
    copies = {id(p): nn.Parameter(p.detach().double().clone()) for group in held_parameters(optimizer) for p in group}
    if not any(id(p) in copies for p in layout.params):
        raise ValueError("the optimizer holds none of the objective's parameters: make it from the same model's parameters()")
    before = {key: p.detach().clone() for key, p in copies.items()}
    present = learning_rate(optimizer)
    # u is the step over the rate, so at rate 0 (the first step of a warmup) the copy steps at rate 1 instead
    twin = copy_optimizer(optimizer, copies, lr=None if present else 1.0)
    for values in twin.state.values():
        moments = {k: v for k, v in values.items() if isinstance(v, Tensor) and v.is_floating_point() and k not in _COUNTERS}
        values.update({k: v.double() for k, v in moments.items()})
    for group in twin.param_groups:
        group.update({key: False for key in _FAST_PATHS if key in group})
    for p, g in zip(layout.params, layout.split(gradient), strict=True):
        if id(p) in copies:
            copies[id(p)].grad = g.double()
    type(twin).step(twin)  # type: ignore[call-arg]
    steps = [before[id(p)] - copies[id(p)].detach() if id(p) in copies else None for p in layout.params]
    return layout.flatten(steps, 1.0 / (present or 1.0))


def _needs_closure(optimizer: Optimizer) -> bool:
    # LBFGS alone of torch's optimizers asks for a closure; a method of the same kind elsewhere does so too
    arguments = inspect.signature(type(optimizer).step).parameters
    return "closure" in arguments and arguments["closure"].default is inspect.Parameter.empty


# -- optimizers that sharpkit itself runs -------------------------------------------------------------------------------------------


def gradient_descent(params: Iterable[nn.Parameter], lr: float) -> Optimizer:
    """Plain gradient descent: what the demo trains with, and what carries the rate of a scheduler that only gives a multiplier."""
    return torch.optim.SGD(params, lr=lr)


def line_search_minimizer(params: Iterable[Tensor], *, max_iter: int, history_size: int) -> torch.optim.LBFGS:
    """A quasi-Newton method with a strong Wolfe line search, for small smooth problems solved to the end."""
    return torch.optim.LBFGS(params, max_iter=max_iter, history_size=history_size, line_search_fn="strong_wolfe")
