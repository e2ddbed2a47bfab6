"""The table of optimizers: what is known about each kind, and how to add one.

To teach sharpkit another optimizer, call :func:`register_optimizer`, or add a line to the table ``_KINDS``.

A subclass that does not override ``step`` is treated as its parent. One that does is another method, and unknown unless registered.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from sharpkit._arguments import choice
from sharpkit._errors import UnsupportedError
from sharpkit.optimizers.rules import UpdateRule
from sharpkit.optimizers.wrappers import unwrap_optimizer

Settings = Mapping[str, Any]  # of a parameter group: lr, betas, weight_decay ...


State = Mapping[str, Any]  # that an optimizer keeps for one parameter: exp_avg, step ...

# A matrix has the shape (first, all others) of its tensor: its largest singular value, or largest l2 norm of a row or column. "blocks" is
# the l2 norm of each tensor, as all but "linf" (the largest entry) are of a vector; "l2" that of all parameters together.
Norm = Literal["l2", "linf", "spectral", "blocks", "rows", "columns"]


@dataclass(frozen=True)
class OptimizerKind:
    """What is known about one kind of optimizer; None where nothing is.

    Attributes:
        rule: settings of a parameter group -> its linear rule. An adaptive rule is about the gradient divided by D.
        preconditioner: (state of a parameter, settings of its group, the parameter) -> D in the parameter's shape, what the gradient is
            divided by. Not needed where the rule is not adaptive: then D = 1.
        step: (state of a parameter, settings of its group, the parameter) -> (a, b) in the step a g + b at rate 1, b None for 0.
        geometry: of a method whose steps have a fixed length: (state of a parameter, settings of its group, the parameter) -> the norm in
            which it is steepest descent, and the norm of its step at rate 1, or, in "linf", that of each entry.
    """

    rule: Callable[[Settings], UpdateRule] | None = None
    preconditioner: Callable[[State, Settings, Tensor], Tensor] | None = None
    step: Callable[[State, Settings, Tensor], tuple[float, Tensor | None]] | None = None
    geometry: Callable[[State, Settings, Tensor], tuple[Norm, float | Tensor]] | None = None


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


def _sign_geometry(state: State, settings: Settings, p: Tensor) -> tuple[Norm, float]:
    """Every entry moves by the rate: sign descent, Lion (arXiv 2302.06675)."""
    return "linf", 1.0


def _rprop_geometry(state: State, settings: Settings, p: Tensor) -> tuple[Norm, float | Tensor]:
    """Every entry moves by a length of its own, which the rate only begins with."""
    return "linf", state["step_size"] / float(settings["lr"]) if state else 1.0


def _muon_geometry(state: State, settings: Settings, p: Tensor) -> tuple[Norm, float]:
    """All singular values of a matrix move by the rate, times a factor for its shape (Jordan et al. (2024); torch's ``adjust_lr_fn``)."""
    rows, columns = p.shape[0], math.prod(p.shape[1:])
    if settings.get("adjust_lr_fn") == "match_rms_adamw":
        return "spectral", 0.2 * math.sqrt(max(rows, columns))
    return "spectral", math.sqrt(max(1.0, rows / columns))


# A key is a class or, so that its package need not be imported, the name of one. The most derived entry of an optimizer counts.
_KINDS: dict[type | str, OptimizerKind] = {
    torch.optim.SGD: OptimizerKind(_sgd_rule, step=_sgd_step),
    torch.optim.Adam: OptimizerKind(_adam_rule, _adam_preconditioner),
    torch.optim.AdamW: OptimizerKind(lambda settings: _adam_rule(settings, decoupled=True), _adam_preconditioner),
    torch.optim.RMSprop: OptimizerKind(lambda s: UpdateRule(float(s["momentum"]), adaptive=True), _rmsprop_preconditioner),
    torch.optim.Adagrad: OptimizerKind(lambda s: UpdateRule(adaptive=True), _adagrad_preconditioner),
    torch.optim.Rprop: OptimizerKind(geometry=_rprop_geometry),
    "SGDScheduleFree": OptimizerKind(_schedule_free_rule),
    "Lion": OptimizerKind(geometry=_sign_geometry),
}
if hasattr(torch.optim, "Muon"):  # from torch 2.9 on
    _KINDS[torch.optim.Muon] = OptimizerKind(geometry=_muon_geometry)


def register_optimizer(
    cls: type[Optimizer],
    *,
    rule: Callable[[Settings], UpdateRule] | None = None,
    preconditioner: Callable[[State, Settings, Tensor], Tensor] | None = None,
    geometry: Norm | Callable[[State, Settings, Tensor], tuple[Norm, float | Tensor]] | None = None,
) -> None:
    """Tell sharpkit what an optimizer class does, for this process; its subclasses that keep its ``step`` are included.

    Args:
        cls: a subclass of torch.optim.Optimizer. What was known about it before is replaced.
        rule: settings of a parameter group (a dict such as ``optimizer.param_groups[0]``) -> its :class:`UpdateRule`, with
            ``adaptive=True`` where gradients are divided by D.
        preconditioner: (state of a parameter, settings of its group, the parameter) -> D, positive, in the parameter's shape. Needed for
            an adaptive rule; without one, D = 1.
        geometry: of a method whose steps have a fixed length, as those of sign methods and Muon: the norm in which it is steepest descent
            (see :func:`sharpkit.generalized_sharpness`), if a step has the norm lr in it; or a function of the same arguments as
            ``preconditioner`` -> that norm, and the step's norm at rate 1.

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
    if isinstance(geometry, str):
        choice("geometry", geometry, get_args(Norm)[1:], other="a function")
        norm = geometry
        geometry = lambda state, settings, p: (norm, 1.0)  # noqa: E731
    for name, function in (("rule", rule), ("preconditioner", preconditioner), ("geometry", geometry)):
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


def refuse_unknown(optimizer: Optimizer, what: str, remedy: str, argument: str) -> None:
    """Raise UnsupportedError for an optimizer of which neither a rule nor a geometry is known.

    Args:
        optimizer: any.
        what: is not known of it.
        remedy: what to do, beside registering it.
        argument: of :func:`register_optimizer` that tells.
    """
    if (kind := kind_of(optimizer)) is None or (kind.rule is None and kind.geometry is None):
        raise _unknown(optimizer, what, lambda kind: kind.rule or kind.geometry, remedy, argument)


def _no_rule(optimizer: Optimizer) -> UnsupportedError:
    remedy = "Pass momentum=, dampening=, weight_decay= of its linear part instead"
    return _unknown(optimizer, "the stability limit", lambda kind: kind.rule, remedy, "rule")
