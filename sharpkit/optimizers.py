"""Everything that sharpkit knows about optimizers: one table, one entry for each kind.

All other modules ask here: which linear rule a parameter group follows, what an adaptive optimizer divides its gradients by, at which rates
the groups train, which parameters they hold, and what the next step would be. To teach sharpkit another optimizer, call
:func:`register_optimizer`, or add a line to the table ``_KINDS``.

A subclass that does not override ``step`` is treated as its parent. One that does is another method, and unknown unless registered.

The limit of several groups: at a rate eta of the reference group (the first that trains), the others at r_i eta, training is stable where
eta s lambda_max(S (H + W) + V) <= 1 with s = gain / (2 (1 + beta)) of the reference's rule, S = diag(r_i s_i / s) D^-1, W the coupled decay
and V = diag(r_i decay_i / (2 s)) the decoupled one. It is exact on a quadratic whatever the groups' momenta: with H, W and V positive, the
step's eigenvalues reach the unit circle at +-1 alone, as the imaginary part of the characteristic equation on the circle shows.
"""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sharpkit._arguments import as_text, flag, real
from sharpkit._errors import UnsupportedError
from sharpkit.objective.interrupts import Whole
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
        matrix: its name, where it is not H or D^-1 H: see :attr:`operator`.

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
    matrix: str = ""

    def __post_init__(self) -> None:
        limits: dict[str, Any] = {
            "momentum": {"least": 0.0, "below": 1.0},
            "dampening": {"least": 0.0, "below": 1.0},
            "weight_decay": {"least": 0.0},
        }
        for name, bounds in limits.items():
            object.__setattr__(self, name, real(name, getattr(self, name), **bounds))
        for name in ("nesterov", "decoupled", "adaptive"):
            object.__setattr__(self, name, flag(name, getattr(self, name)))
        for name in ("name", "matrix"):
            as_text(name, getattr(self, name))
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError("Nesterov momentum needs momentum > 0 and dampening = 0")

    def max_learning_rate(self, curvature: float) -> float:
        """The rate at which the mode with this curvature starts to flip sign with growing size; inf where there is none."""
        if math.isnan(curvature if type(curvature) is float else (curvature := real("curvature", curvature, infinite=True))):
            return math.nan
        load = self.gain * curvature + self.drag
        return 2 * (1 + self.momentum) / load if load > 0 else math.inf

    def max_curvature(self, lr: float) -> float:
        """The largest curvature that is stable at a learning rate, a positive one: what lambda_max is to be compared with."""
        lr = lr if type(lr) is float else real("lr", lr, infinite=True)
        if lr <= 0:
            raise ValueError(f"the learning rate must be positive, got {lr}")
        return (2 * (1 + self.momentum) / lr - self.drag) / self.gain

    # In the condition lr (gain * curvature + drag) <= 2 (1 + momentum), the characteristic polynomial at z = -1.
    @property
    def gain(self) -> float:
        """How much of the curvature counts: 1 for heavy ball, 1 - beta for an averaging momentum, 1 + 2 beta for Nesterov's."""
        return 1 + 2 * self.momentum if self.nesterov else 1 - self.dampening

    @property
    def drag(self) -> float:
        """What weight decay adds to the curvature that counts."""
        # coupled decay is curvature like any other; decoupled decay shrinks w beside the step, with no part in the momentum buffer
        return self.weight_decay * (1 + self.momentum if self.decoupled else self.gain)

    @property
    def operator(self) -> str:
        """Name of the matrix whose largest eigenvalue the limit is about: H, D^-1 H, R H, R D^-1 (H + decay) ..."""
        return self.matrix or ("D^-1 H" if self.adaptive else "H")

    @property
    def condition(self) -> str:
        """The condition as a formula in the usual letters."""
        load, above = "lr", "2"
        if self.momentum:
            above = "2 (1 + beta)"
            load = "((1 + 2 beta) lr)" if self.nesterov else f"((1 - {self.dampening:g}) lr)" if self.dampening else "lr"
        formula = f"lambda_max({self.operator}) <= {above} / {load}"
        formula += f", beta = {self.momentum:g}" if self.momentum else ""
        formula += ", R the groups' rates over that of the first" if self.matrix else ""
        if self.weight_decay:
            formula += f", less {'decoupled ' if self.decoupled else ''}weight decay {self.weight_decay:g}"
        return f"{self.name}: {formula}"


def operator_in(condition: str) -> str:
    """The :attr:`UpdateRule.operator` that a condition names, as documents keep it; empty where it names none.

    Example:
        >>> operator_in(UpdateRule(adaptive=True, matrix="R D^-1 (H + decay)").condition), operator_in("no limit: unknown")
        ('R D^-1 (H + decay)', '')
    """
    named = re.search(r"lambda_max\((.+?)\) <= ", condition)
    return named.group(1) if named else ""


# -- the table ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OptimizerKind:
    """What is known about one kind of optimizer; None where nothing is.

    Attributes:
        rule: settings of a parameter group -> its linear rule. An adaptive rule is about the gradient divided by D.
        preconditioner: (state of a parameter, settings of its group, the parameter) -> D in the parameter's shape, what the gradient is
            divided by. Not needed where the rule is not adaptive: then D = 1.
        step: (state of a parameter, settings of its group, the parameter) -> (a, b) in the step a g + b at rate 1, b None for 0.
        geometry: the norm in which the optimizer is steepest descent.
    """

    rule: Callable[[Settings], UpdateRule] | None = None
    preconditioner: Callable[[State, Settings, Tensor], Tensor] | None = None
    step: Callable[[State, Settings, Tensor], tuple[float, Tensor | None]] | None = None
    geometry: Any = None


def _decay(settings: Settings) -> float:
    return float(settings.get("weight_decay") or 0.0)


def _sgd_rule(settings: Settings) -> UpdateRule:
    return UpdateRule(float(settings["momentum"]), float(settings["dampening"]), bool(settings["nesterov"]), _decay(settings))


def _sgd_step(state: State, settings: Settings, p: Tensor) -> tuple[float, Tensor | None]:
    buffer: Tensor | None = state.get("momentum_buffer")
    beta, sign = float(settings["momentum"]), -1.0 if settings.get("maximize") else 1.0  # climbing, torch accumulates -g in the buffer
    fresh = 1.0 if buffer is None else 1.0 - float(settings["dampening"])  # the first gradient fills the buffer undampened
    factor = (1 + beta * fresh if settings["nesterov"] else fresh) if beta else 1.0
    push = None if buffer is None or not beta else sign * (beta**2 if settings["nesterov"] else beta) * buffer
    if decay := _decay(settings):
        push = sign * factor * decay * p.detach() + (0.0 if push is None else push)
    return factor, push


def _schedule_free_rule(settings: Settings) -> UpdateRule:
    # arXiv 2405.15682: the gradient is taken at y = (1 - beta) z + beta x, and the fast iterate z moves by it. So z sees its own curvature
    # times 1 - beta, which is what dampening = beta without a momentum buffer does. The mean x moves too slowly to matter.
    return UpdateRule(0.0, float(settings["momentum"]), False, _decay(settings))


def _adam_rule(settings: Settings, *, decoupled: bool | None = None) -> UpdateRule:
    beta1 = float(settings["betas"][0])
    decoupled = bool(settings.get("decoupled_weight_decay")) if decoupled is None else decoupled
    # Coupled decay is part of the gradient and so of the preconditioned matrix, not of the rule: see gradient_decays.
    return UpdateRule(beta1, beta1, False, _decay(settings) if decoupled else 0.0, decoupled, adaptive=True)


def _adam_preconditioner(state: State, settings: Settings, p: Tensor) -> Tensor:
    """sqrt(v_hat) + eps, v_hat the bias-corrected second moment, without the factor 1 - beta1^t of Cohen et al. (2022, arXiv 2207.14484).

    That factor is the bias correction of the first moment, and goes to 1 in the steps to come, which decide: with v_hat held, torch's Adam
    breaks within .1 % of the limit without it after 1, 3, 10, 30 and 1000 steps alike; with it the limit after the first step would read a
    fifth of that. What it does is pass by: at half the limit a mode first grows 1300-fold after 1 step, 35-fold after 3, 1.8-fold after 10,
    and not at all after 30, before it decays (experiments/adam_first_steps.py).
    """
    moment: Tensor = state["max_exp_avg_sq" if settings.get("amsgrad") else "exp_avg_sq"]
    corrected = moment.double() / (1 - float(settings["betas"][1]) ** float(state["step"]))
    divisor: Tensor = corrected.sqrt() + settings["eps"]
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
    torch.optim.SGD: OptimizerKind(_sgd_rule, step=_sgd_step),
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
    # no step: batch sharpness along the step stays what it is for an unknown optimizer, along the gradient
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

# Subclasses of the torch class, or holders of one, whose step only calls the real one's; by name, so that no package need be imported.
_WRAPPERS = ("AcceleratedOptimizer", "LightningOptimizer", "_FabricOptimizer")


def unwrap_optimizer(optimizer: Any) -> Optimizer:
    """The torch optimizer inside a trainer's wrapper (accelerate, Lightning), or held as ``.optimizer`` by an object without a step.

    Raises:
        TypeError: there is none.
        UnsupportedError: it is held by an object with a step of its own, as that of SAM or LookAhead.
    """
    inside = optimizer
    while True:
        # by names in the whole mro, since Lightning's wrapper makes a class of itself and the optimizer's class, "LightningAdam"
        trusted = any(cls.__name__ in _WRAPPERS for cls in type(inside).__mro__)
        if isinstance(inside, Optimizer) and not trusted:
            return inside
        inner = getattr(inside, "optimizer", None)
        if inner is None or inner is inside:
            came = type(optimizer).__name__
            raise TypeError(f"the optimizer must be a torch.optim.Optimizer, got {came}: pass the torch optimizer that it steps")
        # SAM's first and second step, LookAhead's, a scheduler's: whether such a step is only the inner one, nobody can tell
        if not trusted and (steps := [name for name in dir(type(inside)) if "step" in name and not name.startswith("_")]):
            holder, held = type(inside).__name__, type(inner).__name__
            raise UnsupportedError(
                f"{holder} holds a {held} and has a step of its own ({', '.join(steps)}), whose limit is not known: pass its .optimizer "
                f"instead of the {holder} if that step does nothing to the parameters but the inner one's"
            )
        inside = inner


def update_rule(optimizer: Optimizer, *, group: int | None = None) -> UpdateRule:
    """The linear update rule of a parameter group, by default of the first that trains.

    Raises:
        UnsupportedError: an optimizer whose linear rule is not known, or one that maximizes.
    """
    optimizer = unwrap_optimizer(optimizer)
    kind = kind_of(optimizer)
    if kind is None or kind.rule is None:
        raise _no_rule(optimizer)
    if is_maximizing(optimizer):
        raise UnsupportedError(
            f"{type(optimizer).__name__} has maximize=True, and stability limits are those of descent: minimize the negative loss instead"
        )
    rule = kind.rule(optimizer.param_groups[_reference(relative_rates(optimizer)) if group is None else group])
    return replace(rule, name=type(optimizer).__name__) if rule.name == UpdateRule.name else rule


def update_rules(optimizer: Optimizer) -> list[UpdateRule]:
    """The linear update rule of every parameter group; errors as in :func:`update_rule`."""
    return [update_rule(optimizer, group=index) for index in range(len(unwrap_optimizer(optimizer).param_groups))]


def is_adaptive(optimizer: Optimizer, *, unknown: bool | None = None) -> bool:
    """Whether gradients are divided by their own size, so that the limit is about D^-1 H.

    Where the rule is not known, the answer is ``unknown``, or an UnsupportedError if that is None.
    """
    kind = kind_of(optimizer)
    if kind is not None and kind.rule is not None:
        return kind.rule(optimizer.param_groups[0]).adaptive
    if unknown is None:
        raise _no_rule(optimizer)
    return unknown


def is_maximizing(optimizer: Optimizer) -> bool:
    """Whether any group climbs the objective (``maximize=True``): limits are about descent, and say nothing then."""
    return any(group.get("maximize") for group in unwrap_optimizer(optimizer).param_groups)


def check_one_way(optimizer: Optimizer, layout: ParamLayout) -> None:
    """Raise UnsupportedError where some groups that train the layout's parameters climb the objective while others descend it."""
    optimizer = unwrap_optimizer(optimizer)
    ways = {bool(g.get("maximize")) for g, r in zip(optimizer.param_groups, relative_rates(optimizer, layout), strict=True) if r}
    if len(ways) > 1:
        raise UnsupportedError(
            f"some parameter groups of the {type(optimizer).__name__} have maximize=True and others minimize, so the loss along their "
            "common step bounds neither: select the parameters of one kind with params="
        )


# -- its groups -------------------------------------------------------------------------------------------------------------------


def held_parameters(optimizer: Optimizer) -> list[list[nn.Parameter]]:
    """The parameters of every group."""
    return [list(group["params"]) for group in optimizer.param_groups]


def _rate(settings: Settings) -> float:
    try:
        if (rate := float(settings["lr"])) >= 0 and not isinstance(settings["lr"], str):
            return rate
        raise ValueError
    except (KeyError, TypeError, ValueError, RuntimeError):  # absent, None, a text, a tensor of several rates
        raise UnsupportedError(
            f"a parameter group has lr={settings.get('lr')!r}, not a number of at least 0, so nothing says how far the optimizer "
            "steps: limits and learned rates are for optimizers whose groups keep a number as lr; give one (in transformers' Adafactor "
            "with relative_step=False)"
        ) from None


def learning_rates(optimizer: Optimizer) -> list[float]:
    """The learning rate of every group; UnsupportedError where one has none."""
    return [_rate(group) for group in optimizer.param_groups]


def rates_at_hand(optimizer: Optimizer) -> tuple[float | Tensor, ...] | None:
    """The learning rate of every group, without waiting for a device: a copy of a tensor that lies there; None where one has none."""
    rates: list[float | Tensor] = []
    for group in optimizer.param_groups:
        rate = group.get("lr")
        try:
            rates.append(rate.detach().clone() if isinstance(rate, Tensor) and rate.device.type != "cpu" else _rate(group))
        except UnsupportedError:
            return None
    return tuple(rates)


def relative_rates(optimizer: Optimizer, layout: ParamLayout | None = None) -> list[float]:
    """Every group's learning rate over that of the reference: the first that trains, and holds some of the layout's parameters if given.

    Groups that hold none of them count as resting.
    """
    rates = learning_rates(optimizer)
    if not any(rates):  # a warmup from 0: the scheduler multiplies the initial rates, if it noted them
        rates = [float(group.get("initial_lr", 1.0)) for group in optimizer.param_groups]
    if layout is not None:
        rates = [rate if holds else 0.0 for rate, holds in zip(rates, _holding(optimizer, layout), strict=True)]
    first = next((rate for rate in rates if rate), 0.0)
    return [rate / first if first else 1.0 for rate in rates]


def learning_rate(optimizer: Optimizer, layout: ParamLayout | None = None) -> float:
    """The learning rate of the reference group, as in :func:`relative_rates`: the one that limits are stated for."""
    return learning_rates(optimizer)[_reference(relative_rates(optimizer, layout))]


def _reference(ratios: Sequence[float]) -> int:
    return next((index for index, ratio in enumerate(ratios) if ratio == 1), 0)


def _holding(optimizer: Optimizer, layout: ParamLayout) -> list[bool]:
    """Whether each group holds some of the parameters."""
    wanted = {id(p) for p in layout.params}
    return [any(id(p) in wanted for p in group["params"]) for group in optimizer.param_groups]


_NONE_HELD = "the optimizer holds none of the objective's parameters: make it from the same model's parameters()"


def check_trains(optimizer: Optimizer, model: nn.Module) -> None:
    """Make sure that the optimizer trains this model and nothing beside it.

    Raises:
        ValueError: it holds none of the model's parameters.
        UnsupportedError: it also trains parameters that are not the model's, such as the loss's own.
    """
    optimizer = unwrap_optimizer(optimizer)
    if any(math.isinf(rate) for rate in learning_rates(optimizer)):
        raise ValueError("the optimizer has an infinite learning rate, which no step can be made with: give its groups finite ones")
    own = {id(p) for p in model.parameters()}
    moving = [p for group, ratio in zip(optimizer.param_groups, relative_rates(optimizer), strict=True) for p in group["params"] if ratio]
    if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(_NONE_HELD)
    if strangers := sum(p.requires_grad and id(p) not in own for p in moving):
        raise UnsupportedError(
            f"the optimizer also trains {strangers} parameters that are no part of the {type(model).__name__}, the loss's own or another "
            "model's, and its limit is that of all together: put both into one nn.ModuleList, and pass that with closure="
        )


def set_learning_rates(optimizer: Optimizer, rates: Iterable[float]) -> None:
    """Give every group its learning rate; one that is a tensor is overwritten in place, as captured graphs need it.

    All or none: Ctrl-C waits until every group has its own.
    """
    with Whole(_rates_set(optimizer, list(rates))):
        pass


@contextmanager
def _rates_set(optimizer: Optimizer, rates: Sequence[float]) -> Iterator[None]:
    written: dict[int, float] = {}
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        held = group["lr"]
        if not isinstance(held, Tensor):
            group["lr"] = rate
        elif written.setdefault(id(held), rate) == rate:
            held.fill_(rate)
        else:  # torch gives all groups the one tensor of lr=: groups that part need tensors of their own
            group["lr"] = torch.full_like(held, rate)
    yield


def restore_initial_rates(optimizer: Optimizer) -> None:
    """Give back the rates from before a scheduler's warmup, which may have begun at 0 and so hidden the groups' ratios."""
    set_learning_rates(optimizer, [float(group.get("initial_lr", _rate(group))) for group in optimizer.param_groups])


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


def gradient_decays(optimizer: Optimizer) -> list[float]:
    """Weight decay of every group that is divided by D together with the gradient, so that the matrix is D^-1 (H + decay).

    It is 0 where the rule holds the decay, as it does for SGD and AdamW.
    """
    kind = kind_of(optimizer)
    if kind is None or kind.rule is None:
        return [0.0 if group.get("decoupled_weight_decay") else _decay(group) for group in optimizer.param_groups]
    rules = [kind.rule(group) for group in optimizer.param_groups]
    # torch adds coupled decay to g before g enters the second moment and is divided by D, as if the loss had 0.5 decay |w|^2 more
    return [
        _decay(group) if rule.adaptive and not rule.weight_decay else 0.0 for rule, group in zip(rules, optimizer.param_groups, strict=True)
    ]


def plain_settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Every group's settings that are plain values, for a key that tells runs apart."""
    plain = (int, float, str, tuple, bool, type(None))
    # a rate may be a tensor; it must count all the same, or runs at two rates would share a key
    groups = [{**group, "lr": _rate(group)} for group in optimizer.param_groups]
    return [{k: v for k, v in group.items() if k != "params" and isinstance(v, plain)} for group in groups]


# -- what its state says ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Groups:
    """The groups of an optimizer against the reference, by the formula at the head of this file.

    Attributes:
        rule: the reference's own.
        weights: r_i s_i / s of each group.
        coupled, shifts: decay_i of coupled and r_i decay_i / (2 s) of decoupled decay.
        extra: coupled decay that is no part of the rule, since it is divided by D.
        agree: whether one weight and one decay move all parameters, so that the limit is about H, or D^-1 H, itself.
    """

    rule: UpdateRule
    weights: list[float]
    coupled: list[float]
    shifts: list[float]
    extra: float
    agree: bool

    @classmethod
    def of(cls, optimizer: Optimizer, layout: ParamLayout | None, ratios: Sequence[float] | None) -> _Groups:
        ratios = relative_rates(optimizer, layout) if ratios is None else ratios
        rules, first = update_rules(optimizer), _reference(ratios)
        speeds = [rule.gain / (2 * (1 + rule.momentum)) for rule in rules]
        weights = [ratio * speed / speeds[first] for ratio, speed in zip(ratios, speeds, strict=True)]
        divided = gradient_decays(optimizer)
        coupled = [own + (0.0 if rule.decoupled else rule.weight_decay) for own, rule in zip(divided, rules, strict=True)]
        shifts = [ratio * decay / (2 * speeds[first]) for ratio, decay in zip(ratios, decoupled_decays(optimizer), strict=True)]
        holding = [True] * len(rules) if layout is None else _holding(optimizer, layout)
        training = [index for index, ratio in enumerate(ratios) if ratio and holding[index]]
        moving = {id(p) for index in training for p in optimizer.param_groups[index]["params"]}
        agree = all(ratios) if layout is None else all(id(p) in moving for p in layout.params)  # none rests
        # 1e-9 by judgement: rates that a scheduler multiplied group by group agree to rounding
        agree = agree and all(
            math.isclose(values[index], values[first], rel_tol=1e-9) for values in (weights, coupled, shifts) for index in training
        )
        return cls(rules[first], weights, coupled, shifts, divided[first], agree)

    @property
    def limit_rule(self) -> UpdateRule:
        if self.agree:
            return self.rule
        inside = "(H + decay)" if any((*self.coupled, *self.shifts)) else "H"
        return replace(self.rule, weight_decay=0.0, matrix=f"R {'D^-1 ' if self.rule.adaptive else ''}{inside}")


def limit_rule(optimizer: Optimizer, layout: ParamLayout | None = None, *, ratios: Sequence[float] | None = None) -> UpdateRule:
    """The rule by which the top eigenvalue of :func:`step_matrix` bounds the reference group's rate; errors as in :func:`update_rule`."""
    return _Groups.of(unwrap_optimizer(optimizer), layout, ratios).limit_rule


def known_rule(optimizer: Optimizer, layout: ParamLayout | None = None) -> UpdateRule | None:
    """The same; None for an optimizer whose stability limit is not known."""
    try:
        return limit_rule(optimizer, layout)
    except UnsupportedError:
        return None


def groups_agree(optimizer: Optimizer, layout: ParamLayout | None = None) -> bool:
    """Whether one rate, one rule and one decay move all parameters, so that the limit is about H, or D^-1 H, itself."""
    return _Groups.of(unwrap_optimizer(optimizer), layout, None).agree


@dataclass(frozen=True)
class StepMatrix:
    """What turns the curvature A into the matrix that a limit is about, scale (A + decay) scale + shift, and its top into a rate.

    Attributes:
        rule: of the reference group, without the decay that the matrix holds.
        scale: (n,) square root of the groups' weights over D; None for 1 throughout.
        decay, shift: (n,) of coupled and decoupled decay; a number where it is the same throughout.
    """

    rule: UpdateRule
    scale: Tensor | None
    decay: Tensor | float
    shift: Tensor | float


def step_matrix(
    optimizer: Optimizer, layout: ParamLayout, *, ratios: Sequence[float] | None = None, diagonal: Tensor | None = None
) -> StepMatrix:
    """The matrix of an optimizer's limit, by the formula at the head of this file.

    Args:
        optimizer: after at least one step, if it is adaptive.
        layout: the parameters meant; those that the optimizer does not hold never move.
        ratios: the groups' rates over the reference's, where the optimizer's own are not those meant.
        diagonal: (n,) D, where it is not read from the optimizer's state.

    Raises:
        UnsupportedError: an optimizer whose rule or D is not known, or one that maximizes.
        ValueError: it has not stepped yet, or holds none of the parameters.
    """
    optimizer = unwrap_optimizer(optimizer)
    groups = _Groups.of(optimizer, layout, ratios)
    if groups.agree and not groups.rule.adaptive:
        return StepMatrix(groups.rule, None, 0.0, 0.0)
    scale = _scale(optimizer, layout, groups.weights, diagonal)
    if groups.agree:
        return StepMatrix(groups.rule, scale, groups.extra, 0.0)
    decay, shift = (_by_group(optimizer, layout, values) for values in (groups.coupled, groups.shifts))
    return StepMatrix(groups.limit_rule, scale, decay, shift)


def _by_group(optimizer: Optimizer, layout: ParamLayout, values: Sequence[float]) -> Tensor | float:
    """(n,) each group's value at its parameters, 0 at those that no group holds; the number 0 where all are 0."""
    if not any(values):
        return 0.0
    own = {id(p): value for value, group in zip(values, optimizer.param_groups, strict=True) for p in group["params"]}
    return layout.flatten([torch.full_like(p, own.get(id(p), 0.0), dtype=torch.float64) for p in layout.params])


def preconditioner_scale(optimizer: Optimizer, layout: ParamLayout) -> Tensor:
    """D^-1/2 from an optimizer's live state, with the groups' weights relative to the reference.

    Returns:
        (n,) in the layout's order; 0 for parameters that do not move: not held, at rate 0, or without a gradient so far.

    Raises:
        UnsupportedError: an optimizer whose D is not known.
        ValueError: it has not stepped yet, or holds none of the parameters.
    """
    optimizer = unwrap_optimizer(optimizer)
    kind = kind_of(optimizer)
    known = kind is not None and kind.rule is not None and not is_maximizing(optimizer)
    weights = _Groups.of(optimizer, layout, None).weights if known else relative_rates(optimizer, layout)
    return _scale(optimizer, layout, weights, None)


def _scale(optimizer: Optimizer, layout: ParamLayout, weights: Sequence[float], diagonal: Tensor | None) -> Tensor:
    kind = kind_of(optimizer)
    divide = kind.preconditioner if kind is not None and diagonal is None else None
    known = kind is not None and kind.rule is not None and (diagonal is not None or not update_rule(optimizer).adaptive)
    if divide is None and not known:
        remedy = "Pass diagonal= with what it divides gradients by"
        raise _unknown(optimizer, "the state", lambda k: k.preconditioner or k.step, remedy, "preconditioner")
    groups = {id(p): (group, weight) for group, weight in zip(optimizer.param_groups, weights, strict=True) for p in group["params"]}
    if not any(id(p) in groups for p in layout.params):
        raise ValueError(_NONE_HELD)
    if divide is not None and not any(map(_has_stepped, optimizer.state.values())):
        raise ValueError(f"{type(optimizer).__name__} has no state yet: measure after its first step")
    pieces: list[Tensor | None] = []
    for name, p in zip(layout.names, layout.params, strict=True):
        (settings, weight), state = groups.get(id(p), ({}, 0.0)), optimizer.state.get(p, {})
        if not weight or (divide is not None and not _has_stepped(state)):
            pieces.append(None)
        elif divide is None:
            pieces.append(torch.full_like(p, weight, dtype=torch.float64).sqrt())
        else:
            denominator = divide(state, settings, p)
            if denominator.shape != p.shape:
                raise ValueError(f"the preconditioner of {name!r} must have shape {tuple(p.shape)}, got {tuple(denominator.shape)}")
            # a group at r times the first group's rate moves as if D were r times smaller, so the limit holds for the first's rate
            pieces.append((weight / denominator.double()).sqrt())
    scale = layout.flatten(pieces)
    return scale if diagonal is None else scale * diagonal.to(scale.device).rsqrt()


def _has_stepped(state: State) -> bool:
    # Adagrad makes its state, with step 0, before the first step; a method that counts its steps elsewhere makes it at the first one
    return bool(float(state["step"])) if "step" in state else bool(state)


def settled_preconditioner(optimizer: Optimizer, layout: ParamLayout, second_moment: Tensor) -> Tensor:
    """(n,) sqrt(v) + eps: the D that an adaptive optimizer comes to where the squared gradient has the mean v; each group's own eps."""
    eps = [float(group.get("eps", 1e-8)) for group in optimizer.param_groups]  # torch's default where the optimizer names none
    own = _by_group(optimizer, layout, eps)
    return second_moment.sqrt() + (own.to(second_moment) if isinstance(own, Tensor) else own)


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
    for p in layout.params:
        if id(p) not in own:
            factors.append(None)
            pushes.append(None)
            continue
        group, ratio = own[id(p)]
        factor, push = kind.step(optimizer.state.get(p, {}), group, p)
        factors.append(torch.full_like(p, ratio * factor))
        pushes.append(None if push is None else ratio * push)
    return layout.flatten(factors), layout.flatten(pushes)


# -- a step elsewhere -------------------------------------------------------------------------------------------------------------

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
    if _needs_closure(optimizer):
        raise UnsupportedError(f"{name} evaluates the loss several times in a step, so it has no next update to look at; use another one")
    if not any(_holding(optimizer, layout)):
        raise ValueError(_NONE_HELD)
    present = learning_rate(optimizer, layout)
    # u is the step over the rate, so at rate 0 (the first step of a warmup) the copy steps at rate 1 instead
    step = _step_elsewhere(optimizer, layout, gradient, factor=1.0 if present else None)
    # A rate that is no factor of the step has no critical value. Of the torch classes in the table it is one; else two rates must agree.
    if kind_of(optimizer) is None or not _own_step(type(optimizer)).__module__.startswith("torch.optim."):
        twice = _step_elsewhere(optimizer, layout, gradient, factor=2.0 if present else None)
        rounding = 1e-12 * float(layout.current().double().norm())  # by judgement: steps are differences of parameters in float64
        if present and not float((twice - 2 * step).norm()) <= 1e-6 * float(twice.norm()) + rounding:
            raise UnsupportedError(
                f"the step of {name} is not proportional to its learning rate here, so no rate along it is critical; use another optimizer"
            )
    return step / (present or 1.0)


def _step_elsewhere(optimizer: Optimizer, layout: ParamLayout, gradient: Tensor, *, factor: float | None) -> Tensor:
    """(n,) w less what a copy makes of it at the present rates times a factor; at the ratios of the rates without one."""
    # In float64, since the step is a difference of parameters: in float32 one of 1e-6 |w| would keep one correct digit.
    copies = {id(p): nn.Parameter(p.detach().double().clone()) for group in held_parameters(optimizer) for p in group}
    before = {key: p.detach().clone() for key, p in copies.items()}
    twin = copy_optimizer(optimizer, copies)
    rates = relative_rates(optimizer, layout) if factor is None else [factor * rate for rate in learning_rates(optimizer)]
    for group, rate in zip(twin.param_groups, rates, strict=True):
        group.update({"lr": rate, **{key: False for key in _FAST_PATHS if key in group}})
    for values in twin.state.values():
        moments = {k: v for k, v in values.items() if isinstance(v, Tensor) and v.is_floating_point() and k not in _COUNTERS}
        values.update({k: v.double() for k, v in moments.items()})
    for p, g in zip(layout.params, layout.split(gradient), strict=True):
        if id(p) in copies:
            copies[id(p)].grad = g.double()
    try:
        with torch.random.fork_rng(devices=[layout.device] if layout.device.type == "cuda" else []):  # some steps draw noise
            type(twin).step(twin)  # type: ignore[call-arg]
    except Exception as error:
        name = type(optimizer).__name__
        raise UnsupportedError(f"the step of {name} failed on a copy, so its next update is not known: {error}") from error
    return layout.flatten([before[id(p)] - copies[id(p)].detach() if id(p) in copies else None for p in layout.params])


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
