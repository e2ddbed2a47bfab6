"""The largest stable learning rate of an optimizer for a given curvature."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sharpkit._errors import UnsupportedError
from sharpkit._results import Bounded


def twin_optimizer(
    optimizer: torch.optim.Optimizer, place: Mapping[int, nn.Parameter], *, lr: float | None = None, reset: bool = False
) -> torch.optim.Optimizer:
    """The same optimizer over other parameters, with a copy of its state; schedulers and hooks stay behind.

    Args:
        optimizer: the original; only read.
        place: the new parameter for each of its own, by ``id``.
        lr: rate of the first group, the others' keeping their ratio to it.
        reset: start with an empty state.

    Raises:
        ValueError: the optimizer holds parameters that the model does not.
    """
    reference = float(optimizer.param_groups[0]["lr"])
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        if any(id(p) not in place for p in group["params"]):
            raise ValueError("the optimizer holds parameters that are not the model's: make it from model.parameters()")
        settings = {key: value for key, value in group.items() if key not in ("params", "initial_lr")}
        if lr is not None:
            settings["lr"] = lr * (float(group["lr"]) / reference if reference else 1.0)
        groups.append({**settings, "params": [place[id(p)] for p in group["params"]]})
    other = type(optimizer).__new__(type(optimizer))
    torch.optim.Optimizer.__init__(other, groups, dict(optimizer.defaults))
    if not reset:
        for p, values in optimizer.state.items():
            other.state[place[id(p)]] = {
                key: v.detach().clone() if isinstance(v, torch.Tensor) else copy.deepcopy(v) for key, v in values.items()
            }
    return other


def matching(original: nn.Module, twin: nn.Module) -> dict[int, nn.Parameter]:
    """The twin's parameter for each of the original's, by ``id`` of the original."""
    return {id(p): t for p, t in zip(original.parameters(), twin.parameters(), strict=True)}


class StableLearningRate(Bounded):
    """A learning rate (usable as a plain number) with its interval and the rule it comes from.

    Attributes:
        lower, upper: the rate at the upper and lower end of the curvature's interval.
        rule: the condition in words.
        lambda_max: the curvature it was computed from.
    """

    rule: str
    lambda_max: float

    def __new__(cls, value: float, *, lower: float, upper: float, rule: str, lambda_max: float) -> StableLearningRate:
        self = super().__new__(cls, value, lower, upper)
        self.rule, self.lambda_max = rule, lambda_max
        return self

    def __str__(self) -> str:
        if math.isinf(self):
            return "unbounded (no positive curvature)"
        ends = f"{self.lower:.4g}", f"{self.upper:.4g}"
        width = f" ({ends[0]} to {ends[1]})" if ends[0] != ends[1] else ""
        return f"{float(self):.4g}{width}"

    def __repr__(self) -> str:
        return f"StableLearningRate({self}: {self.rule})"

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, JSON-ready."""
        return {
            "kind": "stable_learning_rate",
            "version": 1,
            "value": float(self),
            "lower": self.lower,
            "upper": self.upper,
            "rule": self.rule,
            "lambda_max": self.lambda_max,
        }


@dataclass(frozen=True)
class UpdateRule:
    """The linear part of an optimizer's update, as far as stability on a quadratic depends on it.

    With gradient g and momentum buffer v: v <- momentum v + (1 - dampening) g, or, with ``nesterov``, the step is g + momentum v. Coupled
    weight decay adds weight_decay * w to g; decoupled decay multiplies w by (1 - lr weight_decay).

    Attributes:
        adaptive: the curvature meant is that of D^-1 H.
        name: for messages.
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


def update_rule(optimizer: torch.optim.Optimizer, *, group: int = 0) -> UpdateRule:
    """The linear update rule of a parameter group of a torch optimizer, or of schedulefree's SGDScheduleFree (arXiv 2405.15682).

    Raises:
        UnsupportedError: an optimizer whose linear rule is not known.
    """
    settings = optimizer.param_groups[group]
    decay = float(settings.get("weight_decay", 0.0))
    name = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.SGD):
        return UpdateRule(float(settings["momentum"]), float(settings["dampening"]), bool(settings["nesterov"]), decay, name=name)
    if name == "SGDScheduleFree":  # the fast iterate moves by the gradient at its share 1 - momentum of the point where it is taken
        return UpdateRule(0.0, float(settings["momentum"]), False, decay, name=name)
    if isinstance(optimizer, torch.optim.Adam):  # AdamW derives from Adam
        beta1 = float(settings["betas"][0])
        decoupled = isinstance(optimizer, torch.optim.AdamW) or bool(settings.get("decoupled_weight_decay"))
        # coupled decay is part of the gradient and so of the preconditioned matrix, not of the rule
        return UpdateRule(beta1, beta1, False, decay if decoupled else 0.0, decoupled, adaptive=True, name=name)
    if isinstance(optimizer, torch.optim.RMSprop):
        return UpdateRule(float(settings["momentum"]), adaptive=True, name=name)
    if isinstance(optimizer, torch.optim.Adagrad):
        return UpdateRule(adaptive=True, name=name)
    raise UnsupportedError(
        f"the stability limit of {name} is not known; supported: SGD, Adam, AdamW, RMSprop, Adagrad, SGDScheduleFree. Pass momentum=, "
        f"dampening=, weight_decay= of its linear part instead"
    )


def stable_learning_rate(
    lambda_max: Any,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    error: float | None = None,
) -> StableLearningRate:
    """The largest learning rate at which full-batch training is stable on the quadratic with this top curvature.

    Above it, the component along the top eigenvector grows in size and flips sign at every step. For momentum beta (as torch.optim.SGD has
    it) lr = 2 (1 + beta) / lambda_max; Nesterov 2 (1 + beta) / ((1 + 2 beta) lambda_max); Adam's averaging momentum is dampening = beta1,
    with lambda_max that of D^-1 H: (2 + 2 beta1) / ((1 - beta1) lambda_max). Coupled weight decay adds to the curvature; decoupled decay
    subtracts weight_decay (1 + beta) / (1 - dampening) from the largest stable curvature.

    Args:
        lambda_max: the top eigenvalue: a number, an Estimate or Eigenpairs. For Adam-like optimizers that of the PreconditionedOperator,
            of H + weight_decay I where the decay is coupled.
        optimizer: takes momentum, decay and kind from its first parameter group.
        momentum, dampening, nesterov, weight_decay: as in torch.optim.SGD.
        decoupled: weight decay as in AdamW.
        error: of lambda_max, for the interval; an Estimate or Eigenpairs brings its own.

    Returns:
        A float with ``.lower``, ``.upper`` and ``.rule``; inf where nothing is curved upwards.

    Raises:
        ValueError: lambda_max is not finite, or settings out of range.
        UnsupportedError: an unknown optimizer.

    Example:
        >>> import sharpkit as sk
        >>> sk.stable_learning_rate(10.0, momentum=0.9)
        StableLearningRate(0.38: SGD: lambda_max(H) <= 2 (1 + beta) / lr, beta = 0.9)

    References:
        Cohen et al. (2021), arXiv 2103.00065; Cohen et al. (2022), arXiv 2207.14484, for Adam.
    """
    value, own_error = _curvature_of(lambda_max)
    width = own_error if error is None else error
    if optimizer is not None:
        rule = update_rule(optimizer)
    else:
        name = "SGD" if momentum or weight_decay else "gradient descent"
        rule = UpdateRule(momentum, dampening, nesterov, weight_decay, decoupled, name=name)
    return StableLearningRate(
        rule.max_learning_rate(value),
        lower=rule.max_learning_rate(value + width),
        upper=rule.max_learning_rate(value - width),
        rule=rule.condition,
        lambda_max=value,
    )


def _curvature_of(lambda_max: Any) -> tuple[float, float]:
    values, residuals = getattr(lambda_max, "values", None), getattr(lambda_max, "residuals", None)
    if isinstance(values, torch.Tensor) and isinstance(residuals, torch.Tensor):
        top = int(values.argmax())
        value, error = float(values[top]), float(residuals[top])
    else:
        value, error = float(lambda_max), float(getattr(lambda_max, "stderr", 0.0))
    if not math.isfinite(value) or math.isnan(error):
        raise ValueError(f"lambda_max must be a finite number, got {value} with error {error}")
    return value, error


_WRAPPERS = ("AcceleratedOptimizer", "LightningOptimizer")  # subclasses of the torch class that hold the real one


def plain_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside a trainer's wrapper (accelerate, Lightning).

    Raises:
        TypeError: there is none.
    """
    found = optimizer
    while not isinstance(found, torch.optim.Optimizer) or type(found).__name__ in _WRAPPERS:
        inner = getattr(found, "optimizer", None)
        if inner is None or inner is found:
            raise TypeError(f"the optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        found = inner
    return found
