"""The mean-square limit of an optimizer at every batch size, from measured curvature and noise."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sharpkit.batch_size.curvature import BatchCurvature, Wrap, measure_batch_curvature, measure_coupled_curvature, top_and_noise
from sharpkit.batch_size.pilot import Ledger
from sharpkit.objective.samples import SamplePool
from sharpkit.operators.base import SymmetricOperator
from sharpkit.operators.preconditioned import layout_of, optimizer_curvature
from sharpkit.optimizers import UpdateRule, settled_preconditioner

# By judgement, within the cost that docs/batch_size.md counts (50 times below a sweep):
_GRID = 24  # batch sizes at which the limit is written down, by judgement; it is smooth, and interpolated between them
_GROUPS = 64  # whose gradients give each coordinate's variance, by judgement: known to 18 %, and D takes its root
# lambda_max of drawn batches is measured up to this part of the data: beyond, by theory, the excess is small and goes as 1 / b. Up to a
# sixteenth it missed trained networks by .61 to .88 above that.
_DIRECT_SHARE = 4
_DIRECT_SIZES = 5  # batch sizes at which it is, by judgement
_COUPLED_GROUP = 16  # samples whose batch statistics an adaptive optimizer's gradients have there, by judgement
_FULL_SIZES = 3  # batch sizes at which an adaptive optimizer's matrix is measured anew, by judgement: both ends and the middle
_PART, _PART_SHARE = (128, 512), 4  # samples for that but at the smallest, by judgement: a quarter of the data, within these bounds
_ADAPTIVE_REPEATS = 3  # drawn batches a size, by judgement: half of what SGD has, whose curvature serves every batch size


def limits_for(
    pool: SamplePool, optimizer: torch.optim.Optimizer, rule: UpdateRule, *, sizes: Sequence[int], seed: int, ledger: Ledger
) -> tuple[BatchCurvature, tuple[tuple[float, float], ...]]:
    """Curvature and (batch size, limiting rate) pairs over the range of ``sizes``.

    For SGD one measurement serves all batch sizes. An adaptive optimizer divides by D, which itself depends on the batch size: v = g^2 +
    var / B per coordinate; its matrix is measured at a few batch sizes and the limit interpolated between them.
    """
    direct = _spread([size for size in sizes if size <= pool.size // _DIRECT_SHARE] or sizes[:1], _DIRECT_SIZES)
    if not pool.parent.may_separate:  # batch statistics: no noise of single samples, hence no limit
        wrap = as_seen_by(optimizer)
        if rule.adaptive:
            moments = gradient_moments(pool, seed=seed, ledger=ledger, least=min(_COUPLED_GROUP, pool.size // 2))
            wrap = preconditioner(*moments, sizes[0], optimizer)
        return measure_coupled_curvature(pool, sizes=direct, seed=seed, ledger=ledger, wrap=wrap), ()

    def limit(size: float, top: float, noise: float) -> tuple[float, float]:
        # Averaging momentum is a heavy ball whose rate is smaller by 1 - dampening. Nesterov's and NAdam's look ahead and decay bound the
        # full batch alone: gradient noise drives the momentum buffer as it drives heavy ball's.
        load = rule.gain * max(top, 1e-12) + rule.drag
        return float(size), short_form(load, rule.drive * noise, curvature.effective(size), momentum=rule.momentum)

    if not rule.adaptive:
        curvature = measure_batch_curvature(pool, sizes=direct, seed=seed, ledger=ledger, wrap=as_seen_by(optimizer))
        grid = np.geomspace(sizes[0], sizes[-1], _GRID)
        return curvature, tuple(limit(min(float(b), pool.size), curvature.lambda_max, curvature.noise) for b in grid)
    mean, variance = gradient_moments(pool, seed=seed, ledger=ledger)
    smallest, *others = _spread(sizes, _FULL_SIZES)
    wrap = preconditioner(mean, variance, smallest, optimizer)
    curvature = measure_batch_curvature(pool, sizes=direct, seed=seed, ledger=ledger, wrap=wrap, repeats=_ADAPTIVE_REPEATS)
    part = pool.limited(min(max(pool.size // _PART_SHARE, _PART[0]), _PART[1]), seed=seed)
    points = [limit(smallest, curvature.lambda_max, curvature.noise)]
    for size in others:
        points.append(limit(size, *top_and_noise(part, seed=seed, ledger=ledger, wrap=preconditioner(mean, variance, size, optimizer))))
    return curvature, tuple(points)


def _spread(sizes: Sequence[int], count: int) -> list[int]:
    """About ``count`` of the sizes, evenly spread in log, the ends included."""
    logs = np.log(np.array(sizes, dtype=float))
    wanted = np.linspace(logs[0], logs[-1], count)
    return sorted({int(sizes[int(np.argmin(np.abs(logs - w)))]) for w in wanted})


def gradient_moments(pool: SamplePool, *, seed: int, ledger: Ledger, least: int = 1) -> tuple[Tensor, Tensor]:
    """Mean and single-sample variance of the gradient per coordinate, (n,) each in float64, from disjoint groups of ``least`` or more."""
    size = max(least, pool.size // _GROUPS)
    groups = pool.groups(size, generator=torch.Generator().manual_seed(seed + 2))
    mean = squares = torch.zeros(0)
    for count, group in enumerate(groups, start=1):  # Welford's recurrence: all gradients beside each other would be many models
        gradient = group.gradient()[1].double()
        if count == 1:
            mean, squares = gradient, torch.zeros_like(gradient)
            continue
        change = gradient - mean
        mean += change / count
        squares += change * (gradient - mean)
    ledger.spend(size * len(groups))
    return mean, squares / (len(groups) - 1) * size


def preconditioner(mean: Tensor, variance: Tensor, batch_size: int, optimizer: torch.optim.Optimizer) -> Wrap:
    """The matrix of the limit with D = sqrt(g^2 + var / B) + eps, what an adaptive optimizer's second moment tends to at a batch size."""
    moment = mean.square() + variance / batch_size
    if not math.isfinite(float(moment.sum())):
        raise ValueError("the gradient's moments are not finite")

    def wrap(operator: SymmetricOperator) -> SymmetricOperator:
        diagonal = settled_preconditioner(optimizer, layout_of(operator), moment, mean=mean)
        return optimizer_curvature(operator, optimizer, diagonal=diagonal)[0]

    return wrap


def as_seen_by(optimizer: torch.optim.Optimizer) -> Wrap:
    """A curvature operator -> the matrix that the optimizer's limit is about, with the groups' rates, momenta and decays in it."""
    return lambda operator: optimizer_curvature(operator, optimizer)[0]


def short_form(lambda_max: float, noise: float, batch_size: float, *, momentum: float = 0.0) -> float:
    """2 (1 + beta) / (lambda_max + k noise), k = (1 + beta) / ((1 - beta) b): linear in b while the noise dominates, then flat.

    For Gaussian least squares ``noise`` is the trace of H; in general it is s^2 / lambda_max with s^2 = E ||(h_i - H) v||^2 along the top
    eigenvector v. The crossover is b* = (1 + beta) / (1 - beta) noise / lambda_max.

    Args:
        lambda_max: top eigenvalue of the full Hessian.
        noise: trace, or measured s^2 / lambda_max, in units of curvature.
        batch_size: effective batch size b; inf for the full batch.
        momentum: beta of the heavy ball v <- beta v + g.

    Returns:
        the rate; inf where nothing is curved.

    Example:
        >>> short_form(2.0, 0.0, math.inf), short_form(2.0, 6.0, 3.0)
        (1.0, 0.5)
    """
    gain = (1 + momentum) / ((1 - momentum) * batch_size)
    load = lambda_max + gain * noise
    return 2 * (1 + momentum) / load if load > 0 else math.inf


def crossover_batch_size(lambda_max: float, noise: float, *, momentum: float = 0.0) -> float:
    """b* = (1 + beta) / (1 - beta) noise / lambda_max, where the short form is half its full-batch value.

    Example:
        >>> crossover_batch_size(2.0, 6.0), round(crossover_batch_size(2.0, 6.0, momentum=0.9), 6)
        (3.0, 57.0)
    """
    return (1 + momentum) / (1 - momentum) * noise / lambda_max if lambda_max > 0 else math.inf
