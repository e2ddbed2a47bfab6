"""What the optimizer's next step meets: slope, curvature within and across layers, and the change of the loss that they foretell."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from sharpkit._arguments import flag
from sharpkit._calls import public_call
from sharpkit._errors import NonFiniteError
from sharpkit._results import Result
from sharpkit.linalg.krylov import affordable_rows
from sharpkit.measuring.layers import layer_of
from sharpkit.objective.memory import keeps_memory_limit
from sharpkit.objective.objective import Objective, check_objective
from sharpkit.operators.hessian import HessianOperator
from sharpkit.optimizers import check_one_way, check_trains, learning_rate, next_update, unwrap_optimizer

_VECTORS = 4  # in memory for each product made at once, by judgement: the part of the update, its product, and their copies


@dataclass(frozen=True)
class UpdateCurvature(Result, kind="update_curvature"):
    """Slope and curvature along the optimizer's next update u, w <- w - lr u.

    Attributes:
        optimizer: its class.
        lr: its present rate.
        slope: u^T g, positive where the step goes downhill.
        curvature: u^T H u.
        norm: |u|.
        layers: modules that own parameters, in the model's order; empty where they were not told apart.
        within: for each layer l, u_l^T H u_l / |u|^2 with u_l the layer's own part of u.
        num_matvecs: Hessian products.
        seconds: wall time.
    """

    optimizer: str
    lr: float
    slope: float
    curvature: float
    norm: float
    layers: tuple[str, ...]
    within: tuple[float, ...]
    num_matvecs: int
    seconds: float

    @property
    def normalized(self) -> float:
        """Normalised directional sharpness u^T H u / |u|^2, between the ends of the spectrum of H."""
        return self.curvature / self.norm**2

    @property
    def directional(self) -> float:
        """u^T H u / (u^T g): to second order the loss rises beyond the rate 2 / this."""
        return self.curvature / self.slope

    @property
    def within_layers(self) -> float:
        """The part of :attr:`normalized` that each layer would meet if it moved alone; NaN where layers were not told apart."""
        return math.fsum(self.within) if self.layers else math.nan

    @property
    def across_layers(self) -> float:
        """The rest: what layers meet because the others move, too."""
        return self.normalized - self.within_layers

    @property
    def share(self) -> float:
        """lr / (2 / :attr:`directional`): beyond 1 the next step makes the loss rise, to second order."""
        return self.lr * self.directional / 2

    @property
    def predicted_change(self) -> float:
        """-lr slope + lr^2 curvature / 2: how the next step changes the loss, to second order."""
        return self.lr * (self.lr * self.curvature / 2 - self.slope)

    @property
    def finding(self) -> str:
        """What it means, in a sentence."""
        if self.slope < 0:
            return f"The next step of {self.optimizer} goes uphill."
        way = "falls" if self.predicted_change < 0 else "rises"
        step = f"The next step of {self.optimizer} is at {self.share:.2f} of the length at which the loss would rise: it {way} by"
        split = f"; {self.within_layers / self.normalized:.0%} of the curvature that it meets lies within layers" if self.layers else ""
        return f"{step} {abs(self.predicted_change):.3g}{split}."

    def __str__(self) -> str:
        return self.finding


@public_call
@keeps_memory_limit
def update_curvature(
    objective: Objective, optimizer: torch.optim.Optimizer, *, layers: bool = True, memory_limit: float | None = None, name: str = ""
) -> UpdateCurvature:
    """Slope and curvature along the optimizer's next update, split into what each layer meets alone and what comes of moving together.

    Optimizers that share a loss can be compared: what a step gains per length, and how much of its curvature lies across layers, which a
    method that treats each matrix by itself does not see. One Hessian product for each layer, one in all without ``layers``; the optimizer
    is left as it is.

    Args:
        objective: f; its gradient makes the update.
        optimizer: a torch optimizer holding the objective's parameters.
        layers: tell layers (modules that own parameters) apart.
        memory_limit: bytes that may be taken on the model's device.
        name: of the result, which pages and comparisons show.

    Raises:
        UnsupportedError: as :func:`sharpkit.critical_learning_rate`.
        NonFiniteError: the update, its slope or its curvature is not finite, or there is no update.

    Example:
        >>> import torch, sharpkit as sk
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> objective = sk.Objective(model, (torch.ones(8, 1), torch.zeros(8, 1)), loss=torch.nn.functional.mse_loss)
        >>> met = sk.update_curvature(objective, torch.optim.SGD(model.parameters(), lr=0.25))
        >>> round(met.normalized, 4), round(met.within_layers, 4), round(met.share, 4)
        (2.0, 2.0, 0.25)

    References:
        arXiv 2606.04662, for the normalised sharpness of an update and its parts within and across layers.
    """
    started = time.perf_counter()
    check_objective(objective, "update_curvature")
    check_trains(optimizer, objective.model)
    check_one_way(optimizer, objective.layout)
    layers, layout = flag("layers", layers), objective.layout
    gradient = objective.gradient()[1]
    update = next_update(optimizer, layout, gradient).to(gradient)
    hessian = HessianOperator(objective)
    slope, squared = float(hessian.dot(update, gradient)), float(hessian.dot(update, update))
    if not (math.isfinite(slope) and 0 < squared < math.inf):
        raise NonFiniteError(f"the next update has the squared norm {squared:g} and the slope {slope:g}: there is no step to measure")
    owners = [layer_of(name) for name in layout.names] if layers else [""] * len(layout.names)
    names = list(dict.fromkeys(owners))
    product, within = torch.zeros_like(update), list[float]()
    width = max(1, affordable_rows(hessian) // _VECTORS)
    for first in range(0, len(names), width):
        block = torch.stack([_part(update, objective, owners, name) for name in names[first : first + width]], dim=1)
        products = hessian @ block
        within += ((block * products).sum(dim=0) / squared).tolist()
        product += products.sum(dim=1)
    curvature = float(hessian.dot(update, product))
    if not math.isfinite(curvature):
        raise NonFiniteError(f"the curvature along the next update is {curvature:g}")
    kept = (tuple(names), tuple(within)) if layers else ((), ())
    name, lr = type(unwrap_optimizer(optimizer)).__name__, learning_rate(unwrap_optimizer(optimizer), layout)
    seconds = time.perf_counter() - started
    return UpdateCurvature(name, lr, slope, curvature, squared**0.5, *kept, hessian.num_matvecs, seconds)


def _part(update: Tensor, objective: Objective, owners: list[str], layer: str) -> Tensor:
    """The update of one layer, 0 elsewhere."""
    pieces = zip(objective.layout.split(update), owners, strict=True)
    return objective.layout.flatten([piece if owner == layer else None for piece, owner in pieces])
