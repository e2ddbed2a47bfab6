"""The linear part of an optimizer's update: its stability limit on a quadratic, and the condition as a formula."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sharpkit._arguments import as_text, flag, real

Settings = Mapping[str, Any]  # of a parameter group: lr, betas, weight_decay ...; "step" is how many steps it has made
State = Mapping[str, Any]  # that an optimizer keeps for one parameter: exp_avg, step ...


@dataclass(frozen=True)
class UpdateRule:
    """The linear part of an optimizer's update, as far as stability on a quadratic depends on it.

    With gradient g (divided by D where that is adaptive) and momentum buffer v: v <- momentum v + (1 - dampening) g, and the step is
    lr (direct g + share v); ``nesterov`` stands for direct = 1, share = momentum. Coupled weight decay adds weight_decay * w to g, after
    its division by D; decoupled decay multiplies w by (1 - lr weight_decay).

    Attributes:
        adaptive: the curvature meant is that of D^-1 H.
        name: for messages.
        matrix: its name, where it is not H or D^-1 H: see :attr:`operator`.
        direct, share: how much of the gradient and of the momentum buffer a step at rate 1 holds.
        ceiling: the rate up to which the step grows with the rate; decoupled decay grows on.

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
    direct: float = 0.0
    share: float = 1.0
    ceiling: float = math.inf

    def __post_init__(self) -> None:
        limits: dict[str, Any] = {
            "momentum": {"least": 0.0, "below": 1.0},
            "dampening": {"least": 0.0, "below": 1.0},
            "weight_decay": {"least": 0.0},
            "direct": {"least": 0.0},
            "share": {"least": 0.0},
            "ceiling": {"above": 0.0, "infinite": True},
        }
        for name, bounds in limits.items():
            object.__setattr__(self, name, real(name, getattr(self, name), **bounds))
        for name in ("nesterov", "decoupled", "adaptive"):
            object.__setattr__(self, name, flag(name, getattr(self, name)))
        for name in ("name", "matrix"):
            as_text(name, getattr(self, name))
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError("Nesterov momentum needs momentum > 0 and dampening = 0")
        if self.nesterov and (self.direct != 0 or self.share != 1):
            raise ValueError("Nesterov momentum is direct=1, share=momentum already: pass nesterov=True or the two shares, not both")

    def max_learning_rate(self, curvature: float) -> float:
        """The rate at which the mode with this curvature starts to flip sign with growing size; inf where there is none."""
        if math.isnan(curvature if type(curvature) is float else (curvature := real("curvature", curvature, infinite=True))):
            return math.nan
        load, room = self.gain * curvature + self.drag, 2 * (1 + self.momentum)
        rate = room / load if load > 0 else math.inf
        if rate <= self.ceiling or self.matrix:  # groups at several rates reach their ceilings one by one: a lower bound then
            return rate
        growing = self.drag if self.decoupled else 0.0  # beyond the ceiling, decoupled decay alone grows with the rate
        return (room - self.ceiling * (load - growing)) / growing if growing else math.inf

    def max_curvature(self, lr: float) -> float:
        """The largest curvature that is stable at a learning rate, a positive one: what lambda_max is to be compared with."""
        lr = lr if type(lr) is float else real("lr", lr, infinite=True)
        if lr <= 0:
            raise ValueError(f"the learning rate must be positive, got {lr}")
        reached = lr if self.matrix else min(lr, self.ceiling)
        if not self.gain:
            return math.inf  # the step is not taken
        return (2 * (1 + self.momentum) / reached - self.drag * (lr / reached if self.decoupled else 1.0)) / self.gain

    # In the condition lr (gain * curvature + drag) <= 2 (1 + momentum), the characteristic polynomial at z = -1.
    @property
    def gain(self) -> float:
        """How much of the curvature counts: 1 for heavy ball, 1 - beta for an averaging momentum, 1 + 2 beta for Nesterov's."""
        return self.direct_share[0] * (1 + self.momentum) + self.direct_share[1] * (1 - self.dampening)

    @property
    def drive(self) -> float:
        """How much of the gradient's noise counts, relative to heavy ball: (1 - beta) times what a lasting gradient adds to the step."""
        return self.direct_share[0] * (1 - self.momentum) + self.direct_share[1] * (1 - self.dampening)

    @property
    def direct_share(self) -> tuple[float, float]:
        """(a, b) in the step lr (a g + b v), Nesterov's included."""
        return (1.0, self.momentum) if self.nesterov else (self.direct, self.share)

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
        above, load = "2 (1 + beta)" if self.momentum else "2", "lr"
        if self.nesterov:
            load = "((1 + 2 beta) lr)"
        elif self.direct or self.share != 1:
            load = f"({self.gain:.4g} lr)"
        elif self.dampening:
            load = f"((1 - {self.dampening:g}) lr)"
        formula = f"lambda_max({self.operator}) <= {above} / {load}"
        formula += f", beta = {self.momentum:g}" if self.momentum else ""
        formula += ", R the groups' rates over that of the first" if self.matrix else ""
        if self.weight_decay:
            formula += f", less {'decoupled ' if self.decoupled else ''}weight decay {self.weight_decay:g}"
        if self.ceiling < math.inf:
            formula += f", for a rate of at most {self.ceiling:.4g}, beyond which its steps grow no longer"
        return f"{self.name}: {formula}"


def operator_in(condition: str) -> str:
    """The :attr:`UpdateRule.operator` that a condition names, as documents keep it; empty where it names none.

    Example:
        >>> operator_in(UpdateRule(adaptive=True, matrix="R D^-1 (H + decay)").condition), operator_in("no limit: unknown")
        ('R D^-1 (H + decay)', '')
    """
    named = re.search(r"lambda_max\((.+?)\) <= ", condition)
    return named.group(1) if named else ""
