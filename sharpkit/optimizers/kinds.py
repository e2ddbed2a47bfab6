"""The table of optimizers: what is known about each kind, and how to add one.

To teach sharpkit another optimizer, call :func:`register_optimizer`, or add a line to the table ``_KINDS``.

A subclass that does not override ``step`` is treated as its parent. One that does is another method, and unknown unless registered.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from sharpkit._arguments import choice
from sharpkit._errors import UnsupportedError
from sharpkit.optimizers import fixed_steps as fixed
from sharpkit.optimizers import package_rules as packages
from sharpkit.optimizers import torch_rules as rules
from sharpkit.optimizers.fixed_steps import Norm
from sharpkit.optimizers.rules import Settings, State, UpdateRule
from sharpkit.optimizers.wrappers import unwrap_optimizer


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
        settled: (mean gradient, mean of its square, settings) -> D as it comes to where these stay, in their shape; None if it does not
            come to rest, or depends on more than these.
        shared: settings that the optimizer reads from its first group for all.
        no_rule: why its update has no linear rule, a clause for the message.
    """

    rule: Callable[[Settings], UpdateRule] | None = None
    preconditioner: Callable[[State, Settings, Tensor], Tensor] | None = None
    step: Callable[[State, Settings, Tensor], tuple[float, Tensor | None]] | None = None
    geometry: Callable[[State, Settings, Tensor], tuple[Norm, float | Tensor]] | None = None
    settled: Callable[[Tensor, Tensor, Settings], Tensor] | None = None
    shared: tuple[str, ...] = ()
    no_rule: str = ""

    def rules(self, optimizer: Optimizer) -> list[UpdateRule]:
        """The linear rule of every group; only of a kind that has one."""
        assert self.rule is not None
        return [self.rule(self.settings(optimizer, group)) for group in optimizer.param_groups]

    def settings(self, optimizer: Optimizer, group: Settings) -> Settings:
        """A group's settings as the rule takes them, with the steps it has made."""
        first = optimizer.param_groups[0]
        return _LiveSettings(optimizer, {**group, **{name: first[name] for name in self.shared}})


class _LiveSettings(dict[str, Any]):
    """A group's settings; "step", where it is none of them, is read from the state when it is asked for, as it may lie on a device."""

    def __init__(self, optimizer: Optimizer, group: Settings) -> None:
        super().__init__(group)
        self._optimizer = optimizer

    def __missing__(self, name: str) -> float:
        if name != "step":
            raise KeyError(name)
        # the first that has stepped speaks for the group: parameters without a gradient at times are a few steps behind
        states = (self._optimizer.state.get(p, {}) for p in self["params"])
        return next((float(state["step"]) for state in states if "step" in state), 0.0)


# A key is a class or, so that its package need not be imported, the name of one; with the package where others have one of that name too.
# The most derived entry of an optimizer counts.
_KINDS: dict[type | str, OptimizerKind] = {
    torch.optim.SGD: OptimizerKind(rules.sgd_rule, step=rules.sgd_step),
    torch.optim.Adam: OptimizerKind(rules.adam_rule, rules.adam_preconditioner, settled=rules.settled_root),
    torch.optim.AdamW: OptimizerKind(rules.adamw_rule, rules.adam_preconditioner, settled=rules.settled_root),
    torch.optim.NAdam: OptimizerKind(rules.nadam_rule, rules.adam_preconditioner, settled=rules.settled_root),
    torch.optim.RAdam: OptimizerKind(rules.adam_rule, rules.radam_preconditioner, settled=rules.settled_root),
    torch.optim.Adamax: OptimizerKind(rules.adam_rule, rules.adamax_preconditioner),
    torch.optim.RMSprop: OptimizerKind(rules.rmsprop_rule, rules.rmsprop_preconditioner, settled=rules.settled_rmsprop),
    torch.optim.Adagrad: OptimizerKind(rules.divided_rule, rules.adagrad_preconditioner, settled=rules.settled_root),
    torch.optim.Adadelta: OptimizerKind(rules.divided_rule, rules.adadelta_preconditioner),
    torch.optim.Adafactor: OptimizerKind(rules.adafactor_rule, rules.adafactor_preconditioner),
    torch.optim.ASGD: OptimizerKind(rules.asgd_rule),
    torch.optim.Rprop: OptimizerKind(geometry=fixed.rprop_geometry, no_rule=fixed.OWN_LENGTH),
    torch.optim.SparseAdam: OptimizerKind(no_rule=fixed.SPARSE),
    torch.optim.LBFGS: OptimizerKind(no_rule=fixed.SEARCH),
    "Lion": OptimizerKind(geometry=fixed.sign_geometry, no_rule=fixed.SIGN),
    "SGDScheduleFree": OptimizerKind(packages.free_sgd_rule),
    "schedulefree.AdamWScheduleFree": OptimizerKind(
        packages.free_adamw_rule, packages.free_adamw_preconditioner, settled=rules.settled_root
    ),
    "schedulefree.RAdamScheduleFree": OptimizerKind(
        packages.free_radam_rule, packages.free_radam_preconditioner, settled=rules.settled_root
    ),
    "prodigyopt.Prodigy": OptimizerKind(packages.prodigy_rule, packages.prodigy_preconditioner, shared=("betas", "use_bias_correction")),
}
if hasattr(torch.optim, "Muon"):  # from torch 2.9 on
    _KINDS[torch.optim.Muon] = OptimizerKind(geometry=fixed.muon_geometry, no_rule=fixed.ORTHOGONAL)


def register_optimizer(
    cls: type[Optimizer],
    *,
    rule: Callable[[Settings], UpdateRule] | None = None,
    preconditioner: Callable[[State, Settings, Tensor], Tensor] | None = None,
    geometry: Norm | Callable[[State, Settings, Tensor], tuple[Norm, float | Tensor]] | None = None,
    settled: Callable[[Tensor, Tensor, Settings], Tensor] | None = None,
) -> None:
    """Tell sharpkit what an optimizer class does, for this process; its subclasses that keep its ``step`` are included.

    Args:
        cls: a subclass of torch.optim.Optimizer. What was known about it before is replaced.
        rule: settings of a parameter group (a dict such as ``optimizer.param_groups[0]``; "step" in it is how many steps the group has
            made, if the state counts them) -> its :class:`UpdateRule`, with ``adaptive=True`` where gradients are divided by D.
        preconditioner: (state of a parameter, settings of its group, the parameter) -> D, positive, in the parameter's shape. Needed for
            an adaptive rule; without one, D = 1.
        geometry: of a method whose steps have a fixed length, as those of sign methods and Muon: the norm in which it is steepest descent
            (see :func:`sharpkit.generalized_sharpness`), if a step has the norm lr in it; or a function of the same arguments as
            ``preconditioner`` -> that norm, and the step's norm at rate 1.
        settled: (mean gradient, mean of its square, settings) -> D as it comes to where these stay, for :func:`learning_rate_curve`.

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
    for name, function in (("rule", rule), ("preconditioner", preconditioner), ("geometry", geometry), ("settled", settled)):
        if function is not None and not callable(function):
            raise TypeError(f"{name} must be a function, got {type(function).__name__}")
    # no step: batch sharpness along the step stays what it is for an unknown optimizer, along the gradient
    _KINDS[cls] = OptimizerKind(rule, preconditioner, geometry=geometry, settled=settled)


def kind_of(optimizer: Optimizer) -> OptimizerKind | None:
    """The entry of an optimizer's class, or of the parent whose ``step`` it keeps; None for an unknown method."""
    cls = type(unwrap_optimizer(optimizer))
    parent = _nearest_entry(cls)
    # unknown rather than taken for its parent: a rule that is nearly right would give limits that are silently wrong
    if parent is None or _own_step(parent) is not _own_step(cls):
        return None
    return next(_KINDS[key] for key in _keys(parent) if key in _KINDS)


def _keys(cls: type) -> tuple[type | str, ...]:
    return cls, cls.__name__, f"{cls.__module__.partition('.')[0]}.{cls.__name__}"


def _nearest_entry(cls: type) -> type[Any] | None:
    """The most derived class in the table that cls is or derives from."""
    return next((base for base in cls.__mro__ if any(key in _KINDS for key in _keys(base))), None)


def _own_step(cls: type[Any]) -> Any:
    # torch wraps the step of every class in a profiler hook when its first optimizer is made, subclasses that inherit it included
    return inspect.unwrap(cls.step)


def _unknown(optimizer: Optimizer, what: str, supported: Callable[[OptimizerKind], Any], remedy: str, argument: str) -> UnsupportedError:
    cls, kind = type(optimizer), kind_of(optimizer)
    if kind is not None and kind.no_rule:
        return UnsupportedError(f"{cls.__name__} has no linear rule, and so no limit to lambda_max: {kind.no_rule}")
    names = ", ".join(key.rpartition(".")[2] if isinstance(key, str) else key.__name__ for key, kind in _KINDS.items() if supported(kind))
    parent = _nearest_entry(cls)
    why = f" (it overrides the step of {parent.__name__})" if parent not in (None, cls) and kind is None else ""
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
