"""What a long call will take, before it is made: products, seconds, memory, and how the work will be done."""

from __future__ import annotations

import inspect
import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sharpkit._arguments import as_path, choice
from sharpkit._results import Progress, Result
from sharpkit.linalg.diagonal import diagonal, frobenius_norm
from sharpkit.linalg.lanczos import eigenpairs
from sharpkit.linalg.power import power_iteration
from sharpkit.linalg.slq import spectral_density
from sharpkit.linalg.trace import trace
from sharpkit.measuring.sharpness import measure
from sharpkit.objective.memory import human_bytes
from sharpkit.objective.objective import Objective
from sharpkit.operators.base import as_operator
from sharpkit.operators.hessian import HessianOperator

_CALLS: dict[str, Callable[..., Any]] = {
    each.__name__: each for each in (measure, eigenpairs, spectral_density, trace, diagonal, frobenius_norm, power_iteration)
}
_LEAST_STEPS = 3  # reports to wait for, by judgement: the first product builds graphs, the second finds out how several are made at once
_MOST_STEPS = 12  # reports, by judgement: what is not known by then, as the cost of a trace in its pilot, stays a guess
_LEAST_SECONDS = 0.2  # to time, by judgement: shorter times are mostly noise


@dataclass(frozen=True)
class Plan(Result, kind="plan"):
    """What a call is expected to take.

    Attributes:
        call: its name.
        num_matvecs: products in all; where a tolerance decides, what the first ones forecast.
        seconds: in all, by what the first products took.
        peak_bytes: memory taken at most where the vectors live, besides model and data; of the products made so far.
        choices: how the work is done, in words by what was chosen: ``"graphs"``, ``"batches"``, ``"products"``, ``"basis"``,
            ``"checkpoint"``.
        tried: products made to find this out.
    """

    call: str
    num_matvecs: int
    seconds: float
    peak_bytes: float
    choices: Mapping[str, str] = field(default_factory=dict)
    tried: int = 0

    def __str__(self) -> str:
        chosen = "; ".join(f"{what}: {how}" for what, how in self.choices.items())
        cost = f"about {self.num_matvecs} products, {self.seconds:.3g} s, {human_bytes(self.peak_bytes)} of memory"
        return f"{self.call}: {cost}{chosen and f' ({chosen})'}"


class _Known(BaseException):
    """Ends a call of which enough is known; none of its own code catches it."""


def plan(objective: Any, call: str, **arguments: Any) -> Plan:
    """What ``call`` on this objective will take, from its first few products, which are made and thrown away.

    Args:
        objective: an :class:`sharpkit.Objective`, or, for calls that take one, an operator or a matrix; of an objective these take the
            Hessian.
        call: ``"measure"``, ``"eigenpairs"``, ``"spectral_density"``, ``"trace"``, ``"diagonal"``, ``"frobenius_norm"`` or
            ``"power_iteration"``.
        arguments: those that the call would be made with.

    Raises:
        ValueError: an unknown call, or arguments that the call refuses.
        TypeError: an argument that the call does not have.
        OutOfMemoryError: the call's vectors do not fit.

    Example:
        >>> import torch, sharpkit as sk
        >>> plan = sk.plan(torch.diag(torch.linspace(0, 1, 500)), "spectral_density", num_probes=4, num_steps=20)
        >>> plan.num_matvecs, plan.choices["basis"]
        (80, '92 vectors, 180 KiB')
    """
    choice("call", call, _CALLS)
    function, steps, started = _CALLS[call], list[Progress](), time.perf_counter()
    names = [name for name in inspect.signature(function).parameters if name not in ("callback", "name")]
    for name in arguments:
        if name not in names[1:]:
            raise TypeError(f"{call} has no argument {name!r} to plan with; it has {', '.join(names[1:])}")
    if isinstance(objective, Objective) and function is not measure:
        objective = HessianOperator(objective)
    kept = arguments.pop("checkpoint", None)  # nothing is written for a plan

    def watch(progress: Progress) -> None:
        steps.append(progress)
        if progress.text == "pilot probes" or progress.done >= progress.expected:
            return  # what comes after is not known yet
        timed = len(steps) > 1 and progress.elapsed - steps[0].elapsed >= _LEAST_SECONDS
        if len(steps) >= _LEAST_STEPS and (timed or len(steps) >= _MOST_STEPS):
            raise _Known

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those of the result come with the call itself
            function(objective, **arguments, callback=watch)
    except _Known:
        pass
    elapsed = time.perf_counter() - started
    if not steps:  # nothing to multiply
        return Plan(call, 0, elapsed, 0.0)
    first, last = steps[0], steps[-1]
    done, expected = last.done, max(last.expected, last.done)
    each = (last.elapsed - first.elapsed) / (done - first.done) if done > first.done else last.elapsed / max(1, done)
    peak, left = max(step.peak_bytes for step in steps), each * (expected - done)
    choices = dict(last.choices)
    if kept is not None:
        operator = HessianOperator(objective) if isinstance(objective, Objective) else as_operator(objective, check=False)
        disk = human_bytes(expected * operator.size * operator.dtype.itemsize)
        choices["checkpoint"] = f"up to {disk} in {as_path('checkpoint', kept)!r}"
    return Plan(call, expected, elapsed + (left if math.isfinite(left) else 0.0), peak, choices, done)
