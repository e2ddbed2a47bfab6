"""The largest stable learning rate of an optimizer for a given curvature."""

from __future__ import annotations

import math
from typing import Any

import torch

from sharpkit._arguments import real
from sharpkit._calls import public_call
from sharpkit._errors import UnsupportedError
from sharpkit._results import Bounded
from sharpkit.optimizers import UpdateRule, limit_rule, update_rules


class StableLearningRate(Bounded, kind="stable_learning_rate", saved=("value", "lower", "upper", "rule", "lambda_max")):
    """A learning rate (usable as a plain number) with its interval and the rule it comes from.

    Attributes:
        lower, upper: the rate at the upper and lower end of the curvature's interval.
        rule: the condition in words.
        lambda_max: the curvature that the rate was computed from.
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


@public_call
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
    name: str = "",
) -> StableLearningRate:
    """The largest learning rate at which full-batch training is stable on the quadratic with this top curvature.

    Above it, the component along the top eigenvector grows in size and flips sign at every step. For momentum beta (as torch.optim.SGD has
    it) lr = 2 (1 + beta) / lambda_max; Nesterov 2 (1 + beta) / ((1 + 2 beta) lambda_max); Adam's averaging momentum is dampening = beta1,
    with lambda_max that of D^-1 H: (2 + 2 beta1) / ((1 - beta1) lambda_max). Coupled weight decay adds to the curvature; decoupled decay
    subtracts weight_decay (1 + beta) / (1 - dampening) from the largest stable curvature.

    Args:
        lambda_max: the top eigenvalue: a number, an Estimate or Eigenpairs. For Adam-like optimizers that of the PreconditionedOperator,
            of H + weight_decay I where the decay is coupled.
        optimizer: instead of the settings below; its groups must have one rate, momentum and decay, as :func:`sharpkit.measure` need not.
        momentum, dampening, nesterov, weight_decay: as in torch.optim.SGD.
        decoupled: weight decay as in AdamW.
        error: error of lambda_max, for the interval; an Estimate or Eigenpairs brings its own.
        name: of the result, which pages and comparisons show.

    Returns:
        A float with ``.lower``, ``.upper`` and ``.rule``; inf where nothing is curved upwards.

    Raises:
        ValueError: lambda_max is not finite, or settings out of range.
        UnsupportedError: an unknown optimizer, or one whose limit no eigenvalue of H (of D^-1 H) gives, since its groups differ.

    Example:
        >>> import sharpkit as sk
        >>> sk.stable_learning_rate(10.0, momentum=0.9)
        StableLearningRate(0.38: SGD: lambda_max(H) <= 2 (1 + beta) / lr, beta = 0.9)

    References:
        Cohen et al. (2021), arXiv 2103.00065; Cohen et al. (2022), arXiv 2207.14484, for Adam.
    """
    if optimizer is not None:
        rule = limit_rule(optimizer)
        if rule.matrix and (not rule.adaptive or any(own.weight_decay for own in update_rules(optimizer))):
            raise UnsupportedError(
                f"the groups of {rule.name} differ in learning rate, momentum or decay, so its limit is not that of lambda_max(H) but of "
                "another matrix: sharpkit.measure(objective, optimizer=optimizer).stable_lr measures that one"
            )
    else:
        # the name stands in the rule that people read
        momentum, weight_decay = real("momentum", momentum), real("weight_decay", weight_decay)
        name = "SGD" if momentum or weight_decay else "gradient descent"
        rule = UpdateRule(momentum, dampening, nesterov, weight_decay, decoupled, name=name)
    return rate_under(rule, lambda_max, error=error)


def rate_under(rule: UpdateRule, lambda_max: Any, *, error: float | None = None) -> StableLearningRate:
    """The largest stable learning rate by a rule, for a top eigenvalue as :func:`stable_learning_rate` takes it."""
    value, own_error = _curvature_of(lambda_max)
    width = own_error if error is None else real("error", error, least=0)
    # the rate falls with the curvature, so the ends change places
    ends = {"lower": rule.max_learning_rate(value + width), "upper": rule.max_learning_rate(value - width)}
    return StableLearningRate(rule.max_learning_rate(value), **ends, rule=rule.condition, lambda_max=value)


def _curvature_of(lambda_max: Any) -> tuple[float, float]:
    # told by its fields: this module may not import every kind of result that holds a top eigenvalue
    values, residuals = getattr(lambda_max, "values", None), getattr(lambda_max, "residuals", None)
    if isinstance(values, torch.Tensor) and isinstance(residuals, torch.Tensor):
        top = int(values.argmax())  # pairs may be asked for at the other end of the spectrum, or in order of size
        value, error = float(values[top]), float(residuals[top])
    elif hasattr(lambda_max, "stderr"):
        value, error = float(lambda_max), float(lambda_max.stderr)
    else:
        value, error = real("lambda_max", lambda_max, other="an Estimate, Eigenpairs"), 0.0
    if not math.isfinite(value) or math.isnan(error):
        raise ValueError(f"lambda_max must be a finite number, got {value} with error {error}")
    return value, error
