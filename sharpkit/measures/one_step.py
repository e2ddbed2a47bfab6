"""How far the loss rises after one step of ascent: the sharpness that SAM and ASAM see."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from sharpkit._arguments import as_seed, flag, real
from sharpkit._calls import public_call
from sharpkit._errors import NonFiniteError
from sharpkit._results import Result, format_with_error, standard_error
from sharpkit.measures.nearby import batches_of, weight_scale
from sharpkit.objective.objective import Objective, check_objective
from sharpkit.objective.params import moved

_RHO = {False: 0.05, True: 0.5}  # by the papers' own choice for CIFAR-10: SAM's, and ASAM's


@dataclass(frozen=True)
class OneStepSharpness(
    Result,
    kind="one_step_sharpness",
    saved=("adaptive", "floor", "rho", "m", "num_batches", "loss", "value", "stderr", "slope", "num_gradients", "seconds", "findings"),
):
    """f(w + e) - f(w), e the step of length rho along the gradient.

    Attributes:
        adaptive: whether the step's length is measured relative to each weight.
        floor: added to each absolute weight where it is.
        rho: the length.
        m: samples in a batch.
        num_batches: batches averaged over.
        loss: mean loss of the batches at the weights themselves.
        value: the rise of the loss, in units of the loss.
        stderr: its standard error over batches; 0 where the whole objective was one batch.
        slope: what the gradient alone says of it, rho ||c * g||_2; the rest is curvature.
        num_gradients: gradients of m samples; as many forward passes are made besides.
        seconds: wall time spent.
    """

    adaptive: bool
    floor: float
    rho: float
    m: int
    num_batches: int
    loss: float
    value: float
    stderr: float
    slope: float
    num_gradients: int
    seconds: float = 0.0

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        return f"{format_with_error(self.value, self.stderr)} ({'ASAM' if self.adaptive else 'SAM'} step of {self.rho:g}, m = {self.m})"

    def findings(self) -> list[str]:
        """What the numbers say, in sentences."""
        name, rise = "ASAM" if self.adaptive else "SAM", format_with_error(self.value, self.stderr)
        share = f", {self.slope:.3g} of it by the slope alone" if 0 < self.slope <= self.value else f", the slope alone {self.slope:.3g}"
        return [f"After {name}'s step of {self.rho:g} the loss of {self.m} samples has risen by {rise} from {self.loss:.4g}{share}."]


@public_call
def sam_sharpness(
    objective: Objective,
    *,
    rho: float | None = None,
    adaptive: bool = False,
    floor: float = 0.0,
    m: int | None = None,
    max_batches: int | None = None,
    seed: int = 0,
    name: str = "",
) -> OneStepSharpness:
    """f(w + e) - f(w) at SAM's e = rho g / ||g||_2, or at ASAM's e = rho T^2 g / ||T g||_2 with T = diag(|w| + floor).

    One gradient and one forward pass more for each batch. It is a lower bound of the worst case in the same ball
    (:func:`sharpkit.measures.m_sharpness`), and on a quadratic rho ||g|| + rho^2 g^T H g / (2 ||g||^2).

    Invariant, when adaptive with ``floor=0``, under layer rescaling of ReLU networks and scaling of filters before a batch norm; the plain
    one is not. Both are under permutations of neurons. ASAM trains with a floor of 0.01, which breaks the invariance a little.

    Args:
        objective: f.
        rho: length of the step; by default 0.05, adaptive 0.5.
        adaptive: ASAM's step in place of SAM's.
        floor: added to each |w_i| in T.
        m: samples in a batch, each with a step of its own; by default all of the objective's data are one.
        max_batches: at most so many disjoint batches; by default 1024 / m, at least one.
        seed: seeds the batches.
        name: of the result, which pages and comparisons show.

    Raises:
        ValueError, TypeError: arguments out of range.
        NonFiniteError: the gradient is 0, so that it gives no direction, or the loss is not finite after the step.

    Example:
        >>> import torch, sharpkit as sk
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(model.weight, 2.0)
        >>> objective = sk.Objective(model, (torch.ones(4, 1), torch.zeros(4, 1)), loss=torch.nn.functional.mse_loss)
        >>> round(sk.measures.sam_sharpness(objective, rho=0.5).value, 4)  # 2.5^2 - 2^2
        2.25

    References:
        Foret, Kleiner, Mobahi and Neyshabur (2021), arXiv 2010.01412, equation 2; Kwon, Kim, Park and Choi (2021), arXiv 2102.11600.
    """
    check_objective(objective, "sam_sharpness")
    adaptive, floor = flag("adaptive", adaptive), real("floor", floor, least=0)
    rho = _RHO[adaptive] if rho is None else real("rho", rho, above=0)
    started = time.perf_counter()
    batches = [objective] if m is None else batches_of(objective, m, max_batches, seed=as_seed(seed))
    scale = weight_scale(objective, adaptive=adaptive, floor=floor)
    rises, slopes, losses = [], [], []
    for batch in batches:
        loss, gradient = batch.gradient()
        turned = scale * gradient
        length = float(turned.norm())
        if not length > 0:
            raise NonFiniteError("the gradient is 0 here (or that of all weights that differ from 0): it gives no direction to step in")
        with moved(batch.layout, batch.layout.split(scale * turned), rho / length):
            rises.append(batch.value() - loss)
        losses.append(loss)
        slopes.append(rho * length)
    size = objective.num_samples if m is None else batches[0].num_samples
    value, stderr = float(np.mean(rises)), 0.0 if m is None else standard_error(np.array(rises))
    return OneStepSharpness(
        *(adaptive, floor, rho, size, len(batches), float(np.mean(losses)), value, stderr, float(np.mean(slopes))),
        num_gradients=len(batches),
        seconds=time.perf_counter() - started,
    )
