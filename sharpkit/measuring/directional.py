"""Curvature along the steps that training takes: batch sharpness, gradient-noise interaction, directional sharpness."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sharpkit._arguments import as_seed, real, whole
from sharpkit._calls import public_call
from sharpkit._errors import NonFiniteError, UnsupportedError
from sharpkit._results import standard_error
from sharpkit.linalg.results import Estimate, warn_unconverged
from sharpkit.objective.objective import Objective, check_objective
from sharpkit.objective.samples import SamplePool
from sharpkit.operators.hessian import HessianOperator
from sharpkit.optimizers import check_one_way, check_trains, has_linear_step, is_maximizing, linear_step, next_update

# By judgement: a standard error from fewer than 20 batches is itself off by more than a sixth; 1000 batches reach 5 % unless the scatter
# of one batch is more than 1.6 times the mean.
_MIN_BATCHES, _MAX_BATCHES = 20, 1000
Measure = Callable[[Objective], float]
Direction = Callable[[Tensor], Tensor]


def gradient_and_product(objective: Objective, direction: Direction | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient g, a direction d made of it, and H d, from one graph where the data is one piece: about 3 gradients.

    Args:
        objective: f.
        direction: from g to d; None for g itself.

    Returns:
        g, d and H d, (n,) each.
    """
    turn, layout = direction or (lambda g: g), objective.layout
    # With more pieces or processes, products of the pieces would have to be summed before d is known: two passes then.
    with objective.undisturbed():
        pieces = list(objective.pieces()) if objective.ranks.size == 1 and objective.shards is None else []
        if len(pieces) == 1:
            (piece,) = pieces
            roots = torch.autograd.grad(objective.evaluate(piece), layout.params, create_graph=True, allow_unused=True)
            gradient = layout.flatten([None if r is None else r.detach() for r in roots], piece.weight)
            along = turn(gradient)
            # parameters in which the loss is linear have a gradient without a graph, and no row in H
            curved = [(r, a) for r, a in zip(roots, layout.split(along), strict=True) if r is not None and r.requires_grad]
            if not curved:
                return gradient, along, torch.zeros_like(gradient)
            products = torch.autograd.grad([r for r, _ in curved], layout.params, [a for _, a in curved], allow_unused=True)
            return gradient, along, layout.flatten(products, piece.weight)
    _, gradient = objective.gradient()
    along = turn(gradient)
    return gradient, along, HessianOperator(objective, retain=False).multiply(along)


@public_call
def batch_sharpness(
    objective: Objective,
    *,
    batch_size: int,
    optimizer: torch.optim.Optimizer | None = None,
    rtol: float = 0.05,
    max_batches: int = _MAX_BATCHES,
    seed: int = 0,
    name: str = "",
) -> Estimate:
    """E_B[g_B^T H_B g_B / ||g_B||^2] over random mini-batches: what settles at 2 / lr under SGD.

    With an optimizer its step, s = g_B + beta v for momentum, takes the gradient's place: E[s^T H_B s / (s^T g_B)]. A batch costs about 3
    of its gradients; from 20 on it stops at the asked relative standard error. Batches where the ratio has no meaning (a zero gradient, a
    step uphill, NaN) are left out and counted in ``method``.

    Args:
        objective: the samples that batches are drawn from.
        batch_size: B.
        optimizer: SGD, whose momentum buffers and decay enter, with the groups' rates over the first's; None for plain SGD.
        rtol: relative standard error to reach.
        max_batches: at most so many draws; if they do not reach rtol, the estimate is returned with ``converged=False``.
        seed: seeds the draws.
        name: of the result, which pages and comparisons show.

    Raises:
        ValueError: batch_size outside 1..N.
        TypeError: the optimizer is not torch.optim.SGD.
        UnsupportedError: it maximizes.
        NonFiniteError: every batch gave no finite value.

    References:
        Andreyev and Beneventano (2024), arXiv 2412.20553.

    Example:
        >>> import torch, sharpkit as sk
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> objective = sk.Objective(model, (torch.ones(8, 1), torch.zeros(8, 1)), loss=torch.nn.functional.mse_loss)
        >>> round(sk.batch_sharpness(objective, batch_size=2).value, 4)
        2.0
    """
    check_objective(objective, "batch_sharpness")
    direction = momentum_step(objective, optimizer)

    def ratio(batch: Objective) -> float:
        gradient, step, product = gradient_and_product(batch, direction)
        below = float(step @ gradient)  # not positive: momentum carries this step uphill, and a ratio would have the wrong sign
        return float(step @ product) / below if below > 0 else math.nan

    settings: Any = {"batch_size": batch_size, "rtol": rtol, "max_batches": max_batches, "seed": seed}
    return _mean_over_batches(objective, ratio, "batch sharpness", signed=direction is not None, **settings)


@public_call
def gradient_noise_interaction(
    objective: Objective, *, batch_size: int, rtol: float = 0.05, max_batches: int = _MAX_BATCHES, seed: int = 0, name: str = ""
) -> Estimate:
    """E_B[g_B^T H g_B] / ||g||^2, H and g of all the data: the curvature that gradient noise meets.

    It equals (G^T H G + tr(H Sigma) / b) / ||G||^2. One Hessian product over all the data for each batch.

    Args:
        objective, batch_size, rtol, max_batches, seed: as in :func:`batch_sharpness`.
        name: of the result, which pages and comparisons show.

    Raises:
        ValueError: batch_size outside 1..N.
        NonFiniteError: the full gradient is 0 or not finite.

    Example:
        >>> import torch, sharpkit as sk
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> objective = sk.Objective(model, (torch.ones(8, 1), torch.zeros(8, 1)), loss=torch.nn.functional.mse_loss)
        >>> round(sk.gradient_noise_interaction(objective, batch_size=2).value, 4)
        2.0
    """
    hessian = HessianOperator(objective)  # one graph for all products
    batch_size, rtol, max_batches, seed = _checked(objective, batch_size, rtol, max_batches, seed)
    full = objective.gradient()[1]
    below = float(full @ full)
    if not 0 < below < math.inf:  # NaN fails both comparisons
        raise NonFiniteError(f"the gradient of all the data has squared norm {below}: its ratio to the noise has no meaning here")

    def ratio(batch: Objective) -> float:
        gradient = batch.gradient()[1]
        return float(gradient @ hessian.multiply(gradient)) / below

    return _mean_over_batches(
        objective, ratio, "gradient-noise interaction", batch_size=batch_size, rtol=rtol, max_batches=max_batches, seed=seed
    )


def directional_sharpness(objective: Objective, optimizer: torch.optim.Optimizer) -> float:
    """u^T H u / (u^T g) along the optimizer's next update u: to second order the loss rises beyond the rate 2 / this.

    At most the top eigenvalue of H for plain SGD, of the preconditioned Hessian for Adam without momentum. Negative where the step goes
    uphill on a convex function or along negative curvature. The optimizer is left as it is; about 3 gradients.

    Args:
        objective: f; its gradient makes the update.
        optimizer: a torch optimizer holding the objective's parameters.

    Raises:
        UnsupportedError: some of its groups maximize and others minimize, or as in :func:`sharpkit.critical_learning_rate`.
        NonFiniteError: u^T g is 0 or not finite.

    Example:
        >>> import torch, sharpkit as sk
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> objective = sk.Objective(model, (torch.ones(8, 1), torch.zeros(8, 1)), loss=torch.nn.functional.mse_loss)
        >>> round(sk.directional_sharpness(objective, torch.optim.SGD(model.parameters(), lr=0.1)), 4)
        2.0
    """
    check_objective(objective, "directional_sharpness", sharded=True)
    check_trains(optimizer, objective.model)
    check_one_way(optimizer, objective.layout)
    gradient, update, product = gradient_and_product(objective, lambda g: next_update(optimizer, objective.layout, g))
    below, above = objective.dot(update, gradient), objective.dot(update, product)
    if not (math.isfinite(below) and math.isfinite(above)) or below == 0:
        raise NonFiniteError(f"directional sharpness is {above:g} / {below:g}: the gradient or the update is zero or not finite")
    return above / below


def _mean_over_batches(
    objective: Objective, measure: Measure, name: str, *, batch_size: int, rtol: float, max_batches: int, seed: int, signed: bool = False
) -> Estimate:
    """The mean of a measure over random batches, until its relative standard error is reached; exact where the batch is everything."""
    batch_size, rtol, max_batches, seed = _checked(objective, batch_size, rtol, max_batches, seed)
    started, pool = time.perf_counter(), SamplePool(objective)
    everything, values, drawn = batch_size == pool.size, [], 0  # the batch of all samples has nothing to be averaged over
    converged = everything
    for batch in pool.draws(batch_size, generator=torch.Generator().manual_seed(seed)):
        drawn += 1
        if math.isfinite(value := measure(batch)):
            values.append(value)
        if len(values) >= _MIN_BATCHES:
            converged = standard_error(np.array(values)) <= rtol * abs(float(np.mean(values)))
        if converged or drawn >= max_batches:
            break
    if not values:
        raise NonFiniteError(f"no mini-batch gave a finite {name}: gradients are zero or not finite")
    stderr = 0.0 if everything else standard_error(np.array(values))
    how = f"{len(values)} batches of {batch_size}" + (f", {drawn - len(values)} left out" if drawn > len(values) else "")
    crosses = signed and drawn > len(values)  # a ratio whose denominator crosses 0 has tails so heavy that no mean exists
    mean = float(np.mean(values))
    estimate = Estimate(mean, stderr, drawn, time.perf_counter() - started, how, converged and not crosses).rounded(objective.rounding)
    if not estimate.converged:
        remedy = "the others step uphill, so the ratio has no mean; leave optimizer out" if crosses else "raise max_batches"
        warn_unconverged(f"{name} {estimate} after {how}: not within {rtol:g}; {remedy}")
    return estimate


def _checked(objective: Objective, batch_size: int, rtol: float, max_batches: int, seed: int) -> tuple[int, float, int, int]:
    return whole("batch_size", batch_size, least=None), real("rtol", rtol, above=0), whole("max_batches", max_batches), as_seed(seed)


def momentum_step(objective: Objective, optimizer: torch.optim.Optimizer | None) -> Direction | None:
    """g -> the optimizer's next step, each group with its own rate, momentum and decay; None for g itself."""
    if optimizer is None:
        return None
    if not has_linear_step(optimizer):
        kind = type(optimizer).__name__
        raise TypeError(f"batch sharpness along the step is defined for torch.optim.SGD, got {kind}; leave optimizer out")
    if is_maximizing(optimizer):  # the curvature that bounds an ascent is that of the negative loss
        raise UnsupportedError("batch sharpness is about descent, and this optimizer has maximize=True: minimize the negative loss instead")
    factor, push = linear_step(optimizer, objective.layout)  # read once: the optimizer does not step while batches are drawn
    return lambda g: factor * g + push
