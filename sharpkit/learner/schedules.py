"""Learning-rate schedules: decays by name, a torch scheduler as a factor of the learned rate, and one made from a run's gradient norms."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from sharpkit._arguments import reals, whole
from sharpkit.optimizers import gradient_descent, held_parameters, is_adaptive, learning_rate, set_learning_rates, unwrap_optimizer

Schedule = Callable[[float], float]  # share of the run that is done, 0 to 1 -> factor of the peak rate


def linear(z: float) -> float:
    """1 - z.

    Example:
        >>> linear(0.25)
        0.75
    """
    return 1.0 - z


def cosine(z: float) -> float:
    """(1 + cos(pi z)) / 2.

    Example:
        >>> round(cosine(0.5), 12)
        0.5

    References:
        Loshchilov and Hutter (2017), arXiv 1608.03983.
    """
    return 0.5 * (1 + math.cos(math.pi * z))


DECAYS: dict[str, Schedule] = {"linear": linear, "cosine": cosine, "constant": lambda z: 1.0}


class Multiplier:
    """A torch scheduler run on a stand-in optimizer of rate 1: its lr over its peak is the multiplier; without one it stays 1.

    Raises:
        TypeError: a scheduler instead of a function that makes one, or one whose step needs a metric.
        ValueError: it cannot drive one group alone.
    """

    def __init__(self, make: Callable[[torch.optim.Optimizer], Any] | None) -> None:
        if make is not None and not callable(make):
            raise TypeError(
                "schedule must be a function optimizer -> scheduler, such as lambda o: torch.optim.lr_scheduler.StepLR(o, 30), got a "
                f"{type(make).__name__}: an existing scheduler would overwrite the learned rate"
            )
        self._make, self._peak = make, 1.0
        self._optimizer, self._scheduler = _stand_in(make)

    def rehearse(self, total_steps: int) -> None:
        """Find the peak, by a run of another scheduler: OneCycleLR and CyclicLR set rates of their own, whatever the optimizer's was.

        Raises:
            ValueError: the scheduler ends before the run, or its rate never rises above 0.
        """
        if self._scheduler is not None:
            self._peak = _peak(*_stand_in(self._make), total_steps=total_steps)

    @property
    def value(self) -> float:
        """The present factor."""
        return learning_rate(self._optimizer) / self._peak

    def advance(self) -> None:
        """One step of the scheduler."""
        if self._scheduler is not None:
            self._optimizer.step()  # type: ignore[call-overload]  # schedulers warn where it was left out
            self._scheduler.step()

    # Written by hand: a saved scheduler may be absent, and some schedulers compute the next value from the present one.
    def state_dict(self) -> dict[str, Any]:
        """The present value, and the scheduler's state."""
        return {"value": self.value, "scheduler": None if self._scheduler is None else self._scheduler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved scheduler."""
        if self._scheduler is not None and state["scheduler"] is not None:
            self._scheduler.load_state_dict(state["scheduler"])
        set_learning_rates(self._optimizer, [float(state["value"]) * self._peak])


def _stand_in(make: Callable[[torch.optim.Optimizer], Any] | None) -> tuple[torch.optim.Optimizer, Any]:
    """An optimizer with one group of rate 1, and its scheduler."""
    optimizer = gradient_descent([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    if make is None:
        return optimizer, None
    try:
        scheduler = make(optimizer)
        needed = [
            p for p in inspect.signature(scheduler.step).parameters.values() if p.default is p.empty and p.kind <= p.POSITIONAL_OR_KEYWORD
        ]
    except Exception as error:  # several lambdas, for one: one factor multiplies the rates of all groups
        raise ValueError(
            "schedule must make a torch scheduler for an optimizer with one group of rate 1, whose rate multiplies that of every group; "
            f"it raised {type(error).__name__}: {error}"
        ) from error
    if needed:
        raise TypeError(
            f"schedule makes a {type(scheduler).__name__}, whose step needs {needed[0].name}, and the learner steps a scheduler by the "
            "number of steps alone: choose another, such as CosineAnnealingLR, or none, since the learner lowers the rate by curvature"
        )
    return optimizer, scheduler


def _peak(optimizer: torch.optim.Optimizer, scheduler: Any, *, total_steps: int) -> float:
    """The highest rate of a run, by a rehearsal."""
    rates = [learning_rate(optimizer)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what there is to warn of, the run itself will
        for step in range(total_steps):
            try:
                optimizer.step()  # type: ignore[call-overload]
                scheduler.step()
            except Exception as error:
                raise ValueError(
                    f"schedule fails after {step} of total_steps={total_steps} steps: {type(error).__name__}: {error}"
                ) from error
            rates.append(learning_rate(optimizer))
    if not 0 < max(rates) < math.inf:
        raise ValueError(
            f"schedule's rate goes up to {max(rates):g} in total_steps={total_steps} steps: it must rise above 0 and stay finite"
        )
    return max(rates)


# -- from the gradient norms of an earlier run ----------------------------------------------------------------------------------------
_WINDOW = 0.1  # of the run: width of the median filter, tau of Defazio et al.; its size by judgement


def refined_schedule(norms: Sequence[float], *, power: int = 2) -> Callable[[float], float]:
    """The decay that the gradient norms of an earlier run call for: eta_t proportional to w_t sum_{p > t} w_p, w_t = G_t^-power.

    The norms are smoothed by a median over a tenth of the run first. Constant norms give exactly the linear decay; norms that grow towards
    the end, as they often do, decay earlier. Give the result to ``CurvatureLearner(decay=...)`` or multiply a rate by it.

    Args:
        norms: gradient norm G_t of every step, before clipping: l2 norms with ``power=2`` for SGD, l1 norms with ``power=1`` for Adam.
        power: 2 or 1.

    Returns:
        a function of the share z of steps done, between 0 and 1, at most 1.

    Raises:
        ValueError: fewer than 3 norms, or one that is not positive and finite.

    Example:
        >>> import sharpkit as sk
        >>> decay = sk.refined_schedule([3.0] * 101)
        >>> [round(decay(z), 6) for z in (0.0, 0.25, 1.0)]
        [1.0, 0.75, 0.0]

    References:
        Defazio, Cutkosky, Mehta and Mishchenko (2023), arXiv 2310.07831.
    """
    values = np.array(reals("norms", norms, above=0, hint="leave out the steps that were skipped"))
    if len(values) < 3:
        raise ValueError(f"norms must hold the gradient norm of every step of a run, at least 3, got {len(values)}")
    power = whole("power", power, most=2, hint="2 is for SGD and l2 norms, 1 for Adam and l1 norms")
    from scipy.ndimage import median_filter

    # divided by the least norm first: a high power of small norms would overflow
    width = max(1, round(_WINDOW * len(values))) | 1
    weights = (values.min() / median_filter(values, size=width, mode="reflect")) ** power
    # sum of w_p over later steps p > t
    after = weights[::-1].cumsum()[::-1] - weights
    rates = weights * after
    rates = rates / rates.max()
    shares = np.linspace(0.0, 1.0, len(rates))
    return lambda z: float(np.interp(z, shares, rates))


class GradientNorms:
    """Records the gradient norm of every step of a run, and makes the schedule that they call for.

    Call :meth:`record` after ``backward()`` and before clipping. Norms stay on the device until they are asked for. In Lightning add
    ``sharpkit.integrations.lightning.GradientNormsCallback()``; Hugging Face's Trainer logs l2 norms from before clipping itself, as
    ``grad_norm`` in ``trainer.state.log_history``, which :func:`sharpkit.refined_schedule` takes.

    Args:
        optimizer: of the run: adaptive ones go by l1 norms and the power 1, others by l2 norms and the power 2.

    Raises:
        TypeError: optimizer is no torch optimizer.

    Example:
        >>> import torch, sharpkit as sk
        >>> model = torch.nn.Linear(1, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> norms = sk.laws.GradientNorms(optimizer)
        >>> for _ in range(10):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(1, 1)).sum().backward()
        ...     norms.record()
        >>> [round(v, 3) for v in norms.values[:2]], round(norms.schedule()(0.5), 3)
        ([1.414, 1.414], 0.5)

    References:
        Defazio, Cutkosky, Mehta and Mishchenko (2023), arXiv 2310.07831, algorithm 1.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = unwrap_optimizer(optimizer)
        self._power = 1 if is_adaptive(self._optimizer, unknown=True) else 2
        self._norms: list[torch.Tensor] = []

    @torch.no_grad()
    def record(self) -> None:
        """Note the norm of the gradients that the optimizer's parameters hold now.

        Raises:
            ValueError: none of them holds a gradient.
        """
        gradients = [p.grad for group in held_parameters(self._optimizer) for p in group if p.grad is not None]
        if not gradients:
            raise ValueError("no parameter of the optimizer holds a gradient: call record() after backward() and before zero_grad()")
        norms = torch.nn.utils.get_total_norm(gradients, norm_type=float(self._power))  # l2 with the power 2, l1 with 1
        self._norms.append(norms.detach())

    @property
    def values(self) -> list[float]:
        """The norms so far, l2 or, of an adaptive optimizer, l1."""
        return [float(v) for v in torch.stack([n.float() for n in self._norms]).tolist()] if self._norms else []

    def schedule(self) -> Schedule:
        """:func:`sharpkit.refined_schedule` of the norms; steps whose gradient was 0 or not finite are left out."""
        return refined_schedule([v for v in self.values if 0 < v < math.inf], power=self._power)

    def state_dict(self) -> dict[str, Any]:
        """The norms, to go on from."""
        return {"norms": self.values, "power": self._power}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from saved norms."""
        if int(state["power"]) != self._power:
            raise ValueError(f"the saved norms are for power {state['power']}, this optimizer's for {self._power}")
        self._norms = [torch.tensor(float(v)) for v in state["norms"]]
