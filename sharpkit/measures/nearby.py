"""How far the loss rises near the weights: worst-case and average-case sharpness, of batches of m samples, adaptive or plain."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sharpkit._arguments import as_seed, check_callback, choice, flag, real, reals, whole
from sharpkit._calls import public_call
from sharpkit._errors import NonFiniteError, ObjectiveError
from sharpkit._results import Progress, ProgressCallback, Result, standard_error
from sharpkit.linalg.results import Estimate
from sharpkit.objective.loss import recognise_loss
from sharpkit.objective.objective import Objective, check_objective
from sharpkit.objective.params import moved
from sharpkit.objective.samples import SamplePool

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Doubling grids of the paper's released scripts for residual networks (Andriushchenko et al. 2023), by perturbation.
_GRIDS = {
    "l2": (0.25, 0.5, 1.0, 2.0),
    "linf": (0.001, 0.002, 0.004, 0.008),
    "gaussian": (0.05, 0.1, 0.2, 0.4),
    "uniform": (0.1, 0.2, 0.4, 0.8),
}
_WORST = ("l2", "linf")
_M, _SAMPLES = 128, 1024  # by the same paper's evaluation: 8 batches of 128
_NEW, _OLD = 0.75, 0.25  # shares of a new step and of the last one, by Croce and Hein (2020)
_PROGRESS = 0.75  # of the steps since the last checkpoint must have raised the loss, or the step is halved: as there
_LEAST_LOGITS = 1e-10  # length of centred logits that they are divided by at least, by the paper's released code


@dataclass(frozen=True)
class MSharpness(
    Result,
    kind="m_sharpness",
    saved=(
        *("perturbation", "adaptive", "floor", "logit_normalization", "m", "num_batches", "loss", "rho", "values", "slopes"),
        *("num_steps", "num_gradients", "num_evaluations", "seconds", "findings"),
    ),
):
    """How far the loss of m samples rises within rho of the weights, for each rho.

    Attributes:
        perturbation: ``"l2"`` and ``"linf"`` worst case, ``"gaussian"`` and ``"uniform"`` average case.
        adaptive: whether perturbations are measured relative to each weight.
        floor: added to each absolute weight where they are.
        logit_normalization: whether logits were centred and divided by their length before the loss.
        m: samples in a batch.
        num_batches: batches averaged over.
        loss: mean loss of the batches at the weights themselves.
        rho: radii, or scales of the noise, ascending.
        values: the rise of the loss at each, in units of the loss, with its standard error over batches (over the draws, if there is one
            batch of an average case); 0 for one batch of a worst case, which is a maximum found, and so a lower bound.
        slopes: of the worst cases, the first-order part of each: rho times the dual norm of the gradient, averaged over batches.
        num_steps: steps of ascent, or draws, for each batch and rho.
        num_gradients, num_evaluations: gradients, and further forward passes, of m samples each.
        seconds: wall time spent.
    """

    perturbation: str
    adaptive: bool
    floor: float
    logit_normalization: bool
    m: int
    num_batches: int
    loss: float
    rho: tuple[float, ...]
    values: tuple[Estimate, ...]
    slopes: tuple[float, ...]
    num_steps: int
    num_gradients: int
    num_evaluations: int
    seconds: float = 0.0

    @property
    def is_worst_case(self) -> bool:
        """Whether the values are maxima over a ball, and no means over random perturbations."""
        return self.perturbation in _WORST

    def findings(self) -> list[str]:
        """What the numbers say, in sentences."""
        size = "relative to each weight" if self.adaptive else "in absolute size"
        shape = {"l2": "in the l2 ball", "linf": "in the l-inf ball", "gaussian": "under Gaussian noise", "uniform": "under uniform noise"}
        kind = f"{shape[self.perturbation]} of {self.rho[-1]:g}, {size},"
        rise = "rises by at least" if self.is_worst_case else "rises on average by"
        sentences = [f"The loss of {self.m} samples {rise} {self.values[-1]} {kind} from {self.loss:.4g}."]
        pairs = list(itertools.pairwise(zip(self.rho, (v.value for v in self.values), strict=True)))
        if pairs and min(pairs[0][0][1], pairs[0][1][1]) > 0 and math.isfinite(pairs[0][1][1]):
            (near, low), (far, high) = pairs[0]
            power = math.log(high / low) / math.log(far / near)
            what = "the slope" if power < 1.25 else "curvature" if power > 1.75 else "slope and curvature together"  # by judgement
            sentences.append(f"At the smallest rho it grows as rho^{power:.2f}: {what} makes the rise there.")
        if any(math.isinf(v.value) for v in self.values):
            sentences.append("At some rho the loss is not finite everywhere near: the rise is infinite there.")
        return sentences

    def __str__(self) -> str:
        case = "worst case" if self.is_worst_case else "average case"
        rows = ", ".join(f"{rho:g}: {value}" for rho, value in zip(self.rho, self.values, strict=True))
        kind = f"{'adaptive ' if self.adaptive else ''}{self.perturbation} {case}"
        return f"MSharpness({kind}, m = {self.m}, {rows}; {self.num_gradients} gradients of {self.m} samples)"

    def plot(self, ax: Axes | None = None) -> Axes:
        """The rise over rho, with its error; see :func:`sharpkit.plots.measures.plot_m_sharpness`."""
        from sharpkit.plots.measures import plot_m_sharpness

        return plot_m_sharpness(self, ax=ax)


@public_call
def m_sharpness(
    objective: Objective,
    *,
    perturbation: str = "l2",
    adaptive: bool = True,
    rho: float | Sequence[float] | None = None,
    m: int | None = None,
    max_batches: int | None = None,
    logit_normalization: bool = False,
    floor: float = 0.0,
    num_steps: int = 20,
    seed: int = 0,
    callback: ProgressCallback | None = None,
    name: str = "",
) -> MSharpness:
    """How far the loss rises within rho of the weights, on batches of m samples: worst case or average case, on a grid of rho.

    Worst case: the mean over batches B of max {f_B(w + c * z) - f_B(w) : ||z||_p <= rho}, p = 2 or inf, with c = |w| + floor if adaptive
    and c = 1 if not. Average case: the mean of f_B(w + c * z) - f_B(w) over z with independent entries, normal with standard deviation rho
    or uniform in [-rho, rho]. The maximum is looked for by auto-PGD in z: steps along the normalised gradient (its signs in l-inf)
    beginning with 2 rho, with momentum, halved and taken back to the best point at checkpoints where the loss has stalled. What is stated
    is the best point found, which the exact maximum may exceed. Average cases draw z and -z together, so that the slope cancels.

    Invariant, when adaptive with ``floor=0``, under everything that scales weights and leaves the function: a layer by a and the next by
    1 / a in a ReLU network, filters before a batch norm whose statistics go with them. The plain one is not. Both are invariant under
    permutations of neurons, average cases up to their draws.

    Args:
        objective: the samples that batches are drawn from, in the objective's mode (eval by default).
        perturbation: ``"l2"`` or ``"linf"`` for the worst case in that ball, ``"gaussian"`` or ``"uniform"`` for the average case.
        adaptive: measure perturbations relative to each weight, |delta_i| <= rho |w_i| in l-inf.
        rho: one radius or several; by default the paper's doubling grid of four for this perturbation.
        m: samples in a batch; by default 128, or all if there are fewer.
        max_batches: at most so many disjoint batches; by default 1024 / m, at least one.
        logit_normalization: subtract their mean from the logits of each target and divide them by their length: takes out the scale of
            the logits. Needs an objective made with ``loss=`` cross-entropy.
        floor: added to each |w_i|, so that weights at 0 move too; it breaks the exact invariance.
        num_steps: steps of ascent for each batch and rho; of average cases, draws.
        seed: seeds batches and draws, and the first step where the gradient is 0.
        callback: called with a :class:`sharpkit.Progress` after each batch.
        name: of the result, which pages and comparisons show.

    Returns:
        the rise at each rho with its standard error over batches. A worst case costs num_steps gradients of m samples for each batch and
        rho, and one more for each batch; an average case num_steps forward passes.

    Raises:
        ValueError, TypeError: arguments out of range.
        ObjectiveError: the loss is not a mean over samples, or logits are asked for where the loss is no cross-entropy of outputs.
        UnsupportedError: the data lies on several processes.

    Example:
        >>> import torch, sharpkit as sk
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(model.weight, 2.0)
        >>> objective = sk.Objective(model, (torch.ones(4, 1), torch.zeros(4, 1)), loss=torch.nn.functional.mse_loss)
        >>> sharpness = sk.measures.m_sharpness(objective, rho=[0.5, 1.0])  # w^2 at 2 (1 + rho), less 4
        >>> [round(value.value, 4) for value in sharpness.values]
        [5.0, 12.0]

    References:
        Andriushchenko, Croce, Mueller, Hein and Flammarion (2023), arXiv 2302.07011; Croce and Hein (2020), arXiv 2003.01690, for auto-PGD.
    """
    check_objective(objective, "m_sharpness")
    check_callback(callback)
    choice("perturbation", perturbation, tuple(_GRIDS))
    adaptive, logit_normalization = flag("adaptive", adaptive), flag("logit_normalization", logit_normalization)
    grid = sorted(reals("rho", _GRIDS[perturbation] if rho is None else [rho] if np.ndim(rho) == 0 else rho, above=0))
    if not grid:
        raise ValueError("rho must hold at least one radius, got none")
    floor, num_steps, seed = real("floor", floor, least=0), whole("num_steps", num_steps, least=2), as_seed(seed)
    started = time.perf_counter()
    objective = normalised(objective) if logit_normalization else objective
    batches = batches_of(objective, m, max_batches, seed=seed)
    scale = weight_scale(objective, adaptive=adaptive, floor=floor)
    generator, rises, slopes, losses = torch.Generator().manual_seed(seed), list[Any](), list[list[float]](), list[float]()
    places = [_Place(batch, scale) for batch in batches]
    for number, place in enumerate(places, start=1):
        base, gradient = place.at(None) if perturbation in _WORST else (place.value(None), None)
        losses.append(base)
        if gradient is not None:
            rises.append(_worst_cases(place, base, gradient, perturbation, grid, num_steps, generator))
            slopes.append([rho * float(gradient.norm() if perturbation == "l2" else gradient.abs().sum()) for rho in grid])
        else:
            rises.append(_average_cases(place, base, perturbation, grid, num_steps, generator))
        if callback is not None:
            elapsed, size = time.perf_counter() - started, batches[0].num_samples
            left = elapsed / number * (len(batches) - number)
            callback(Progress(number * size, len(batches) * size, elapsed, left, f"sharpness, {perturbation}", unit="samples"))
    return MSharpness(
        perturbation=perturbation,
        adaptive=adaptive,
        floor=floor,
        logit_normalization=logit_normalization,
        m=batches[0].num_samples,
        num_batches=len(batches),
        loss=float(np.mean(losses)),
        rho=tuple(grid),
        values=tuple(_estimate([each[i] for each in rises], perturbation) for i in range(len(grid))),
        slopes=tuple(np.mean(slopes, axis=0).tolist()) if slopes else (),
        num_steps=num_steps,
        num_gradients=sum(place.num_gradients for place in places),
        num_evaluations=sum(place.num_evaluations for place in places),
        seconds=time.perf_counter() - started,
    )


def _estimate(rises: list[Any], perturbation: str) -> Estimate:
    """The mean over batches of the rises at one rho, each one number or one of every draw, and its error."""
    means = np.array([np.mean(each) for each in rises])
    if not np.isfinite(means).all():
        return Estimate(math.inf, math.inf, method="a loss that is not finite was met")
    if len(means) > 1:
        return Estimate(float(means.mean()), standard_error(means), method=f"mean over {len(means)} batches")
    if perturbation in _WORST:
        return Estimate(float(means[0]), 0.0, method="best point of auto-PGD, one batch")
    return Estimate(float(means[0]), standard_error(np.asarray(rises[0])), method=f"mean over {len(rises[0])} pairs of draws")


# -- batches, weights and logits ---------------------------------------------------------------------------------------------------
def batches_of(objective: Objective, m: int | None, max_batches: int | None, *, seed: int) -> list[Objective]:
    """Disjoint random batches of m samples.

    Raises:
        ValueError: there are fewer samples.
        ObjectiveError, UnsupportedError: as :class:`SamplePool`.
    """
    pool = SamplePool(objective)
    m = min(_M, pool.size) if m is None else whole("m", m)
    most = max(1, _SAMPLES // m) if max_batches is None else whole("max_batches", max_batches)
    if m > pool.size:
        raise ValueError(f"m must be at most the {pool.size} samples of the objective, got {m}")
    return pool.groups(m, generator=torch.Generator().manual_seed(seed), max_groups=most)


def weight_scale(objective: Objective, *, adaptive: bool, floor: float) -> Tensor:
    """c, (n,): what perturbations are measured relative to."""
    weights = objective.layout.current()
    return weights.abs().add_(floor) if adaptive else torch.ones_like(weights)


def normalised(objective: Objective) -> Objective:
    """The same cross-entropy, of logits that are centred over the classes and divided by their length.

    Raises:
        ObjectiveError: the loss is not ``torch.nn.functional.cross_entropy`` of a model's output.
    """
    loss, known = objective.loss, None if objective.loss is None else recognise_loss(objective.loss)
    if loss is None or known is None or known.function is not F.cross_entropy:
        given = "the model's own loss or a closure" if loss is None else getattr(loss, "__name__", type(loss).__name__)
        raise ObjectiveError(
            f"logit_normalization=True needs logits, and the loss is {given}: make the Objective with "
            "loss=torch.nn.functional.cross_entropy (or its module, or a functools.partial of it) and (input, target) batches"
        )
    cross_entropy: Callable[[Any, Any], Tensor] = loss

    def of_normalised(output: Tensor, target: Any) -> Tensor:
        classes = 1 if output.ndim > 1 else 0
        centred = output - output.mean(dim=classes, keepdim=True)
        return cross_entropy(centred / centred.norm(dim=classes, keepdim=True).clamp_min(_LEAST_LOGITS), target)

    return objective.with_loss(of_normalised)


class _Place:
    """The loss of one batch at w + c * z, and its gradient in z.

    Args:
        batch: f_B.
        scale: c, (n,).

    Attributes:
        num_gradients, num_evaluations: made so far.
    """

    def __init__(self, batch: Objective, scale: Tensor) -> None:
        self._batch, self._scale, self.layout = batch, scale, batch.layout
        self.num_gradients = self.num_evaluations = 0

    def at(self, z: Tensor | None) -> tuple[float, Tensor]:
        """Loss and gradient in z, (n,); an infinite loss where it is not finite."""
        self.num_gradients += 1
        loss, gradient = self._there(z, self._batch.gradient, (math.inf, torch.zeros_like(self._scale)))
        return loss, gradient * self._scale

    def value(self, z: Tensor | None) -> float:
        """The loss; infinite where it is not finite."""
        self.num_evaluations += 1
        value: float = self._there(z, self._batch.value, math.inf)
        return value

    def _there(self, z: Tensor | None, evaluate: Callable[[], Any], otherwise: Any) -> Any:
        if z is None:
            return evaluate()
        with moved(self.layout, self.layout.split(self._scale * z), 1.0):
            try:
                return evaluate()
            except NonFiniteError:
                return otherwise


# -- worst case ----------------------------------------------------------------------------------------------------------------------
def checkpoints(num_steps: int) -> list[int]:
    """Steps after which auto-PGD looks back: shares .22, .41, .57, .70, .80, .87, .93, .99 of all, by Croce and Hein (2020).

    Example:
        >>> checkpoints(20)
        [5, 9, 12, 14, 16, 18, 19, 20]
    """
    shares, gap = [22], 19  # in hundredths, so that no rounding moves a checkpoint
    while shares[-1] + gap < 100:
        shares.append(shares[-1] + gap)
        gap = max(gap - 3, 6)
    return sorted({-(-share * num_steps // 100) for share in shares})


def _uphill(gradient: Tensor, norm: str) -> Tensor:
    """The direction of the unit ball along which a linear function rises most."""
    return gradient / gradient.norm() if norm == "l2" else gradient.sign()


def _into_ball(z: Tensor, norm: str, rho: float) -> Tensor:
    if norm == "linf":
        return z.clamp(-rho, rho)
    length = float(z.norm())
    return z if length <= rho else z * (rho / length)


def _worst_cases(
    place: _Place, base: float, gradient: Tensor, norm: str, grid: Sequence[float], num_steps: int, generator: torch.Generator
) -> list[float]:
    """The largest rise found in the ball of each radius; what was found in a smaller ball lies in the larger ones too."""
    rises, best = [], 0.0
    start = gradient
    # what the slope changes over the smallest ball is below rounding: at a minimum or a saddle any direction may be the first
    dual = float(gradient.norm() if norm == "l2" else gradient.abs().sum())
    if grid[0] * dual <= torch.finfo(gradient.dtype).eps * abs(base):
        start = torch.randn(gradient.shape, generator=generator, dtype=torch.float64).to(gradient)
    for rho in grid:
        best = max(best, _auto_pgd(place, base, start, norm, rho, num_steps) - base)
        rises.append(best)
    return rises


def _auto_pgd(place: _Place, base: float, start: Tensor, norm: str, rho: float, num_steps: int) -> float:
    """The largest loss that auto-PGD meets in the ball of radius rho, from its centre.

    Args:
        place: the loss around the weights.
        base: the loss at the centre.
        start: (n,) the gradient there, or what stands for it.
        norm: of the ball.
        rho: its radius.
        num_steps: gradients at most.
    """
    marks, last_mark = checkpoints(num_steps), 0
    z = before = torch.zeros_like(start)
    loss, gradient = base, start
    best, best_z, best_gradient = loss, z, gradient
    step, raised = 2 * rho, 0
    step_then, best_then = math.nan, math.nan  # at the last checkpoint: nothing has stalled before the first
    for k in range(1, num_steps + 1):
        if not bool(gradient.any()):  # flat here: no way is uphill
            break
        straight = _into_ball(z + step * _uphill(gradient, norm), norm, rho)
        new = straight if k == 1 else _into_ball(z + _NEW * (straight - z) + _OLD * (z - before), norm, rho)
        new_loss, gradient = place.at(new)
        raised += new_loss > loss
        before, z, loss = z, new, new_loss
        if loss > best:
            best, best_z, best_gradient = loss, z, gradient
        if math.isinf(best):
            break
        if k in marks:
            stalled = step == step_then and best == best_then
            step_then, best_then = step, best
            if raised < _PROGRESS * (k - last_mark) or stalled:
                step /= 2
                z = before = best_z
                loss, gradient = best, best_gradient
            last_mark, raised = k, 0
    return best


# -- average case --------------------------------------------------------------------------------------------------------------------
def _average_cases(
    place: _Place, base: float, noise: str, grid: Sequence[float], num_steps: int, generator: torch.Generator
) -> list[list[float]]:
    """The rises at each rho, a mean over z and -z for each pair of draws; the same draws for every rho."""
    rises = [list[float]() for _ in grid]
    layout = place.layout
    for _ in range(max(1, num_steps // 2)):
        draw = torch.randn if noise == "gaussian" else torch.rand
        z = draw(layout.size, generator=generator, dtype=torch.float64)
        z = (z if noise == "gaussian" else 2 * z - 1).to(dtype=layout.dtype, device=layout.device)
        for i, rho in enumerate(grid):
            rises[i].append((place.value(rho * z) + place.value(-rho * z)) / 2 - base)
    return rises
