"""Learning-rate schedules: decays, what a torch scheduler multiplies the learned rate by, and one made from a run's own gradient norms."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from sharpkit.optimizers import gradient_descent, learning_rate, set_learning_rates

Schedule = Callable[[float], float]

DECAYS: dict[str, Schedule] = {"linear": lambda z: 1 - z, "cosine": lambda z: 0.5 * (1 + math.cos(math.pi * z)), "constant": lambda z: 1.0}


class Multiplier:
    """A torch scheduler run on a stand-in of rate 1: what it makes of it multiplies the learned rate."""

    def __init__(self, make: Callable[[torch.optim.Optimizer], Any] | None) -> None:
        self._optimizer = gradient_descent([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        self._scheduler = None if make is None else make(self._optimizer)

    @property
    def value(self) -> float:
        """The present factor."""
        return learning_rate(self._optimizer)

    def advance(self) -> None:
        """One step."""
        if self._scheduler is not None:
            self._optimizer.step()  # type: ignore[call-overload]  # schedulers warn where it was left out
            self._scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        """Of the scheduler."""
        return {"value": self.value, "scheduler": None if self._scheduler is None else self._scheduler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved scheduler."""
        if self._scheduler is not None and state["scheduler"] is not None:
            self._scheduler.load_state_dict(state["scheduler"])
        set_learning_rates(self._optimizer, [float(state["value"])])


def multiplier_of(schedule: Callable[[torch.optim.Optimizer], Any] | None) -> Multiplier:
    """The multiplier of a scheduler factory, 1 without one.

    Raises:
        TypeError: a scheduler instead of a function that makes one.
    """
    if schedule is not None and not callable(schedule):
        raise TypeError(
            f"schedule must be a function optimizer -> scheduler, such as lambda o: torch.optim.lr_scheduler.StepLR(o, 30), got a "
            f"{type(schedule).__name__}: an existing scheduler would overwrite the learned rate"
        )
    return Multiplier(schedule)


_WINDOW = 0.1  # of the run: width of the median filter


def refined_schedule(norms: Sequence[float], *, power: int = 2) -> Callable[[float], float]:
    """The decay that the gradient norms of an earlier run call for: eta_t proportional to w_t sum_{p > t} w_p, w_t = G_t^-power.

    The norms are smoothed by a median over a tenth of the run first. Constant norms give exactly the linear decay; norms that grow towards
    the end, as they often do, decay earlier. Give the result to ``CurvatureLearner(decay=...)`` or multiply a rate by it.

    Args:
        norms: G_t of every step, before clipping: l2 norms with ``power=2`` for SGD, l1 norms with ``power=1`` for Adam.
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
    found = np.asarray(norms, dtype=np.float64)
    if found.ndim != 1 or len(found) < 3:
        raise ValueError(f"norms must hold the gradient norm of every step of a run, at least 3, got shape {found.shape}")
    if not (np.isfinite(found).all() and (found > 0).all()):
        raise ValueError("every gradient norm must be positive and finite: leave out the steps that were skipped")
    if power not in (1, 2):
        raise ValueError(f"power must be 2 (SGD, l2 norms) or 1 (Adam, l1 norms), got {power}")
    from scipy.ndimage import median_filter

    width = max(1, round(_WINDOW * len(found))) | 1
    weights = (found.min() / median_filter(found, size=width, mode="reflect")) ** power
    after = weights[::-1].cumsum()[::-1] - weights
    rates = weights * after
    rates = rates / rates.max()
    shares = np.linspace(0.0, 1.0, len(rates))
    return lambda z: float(np.interp(z, shares, rates))
