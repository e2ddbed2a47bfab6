"""The diagonal and the Frobenius norm from random probes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sharpkit._results import ProgressCallback, Result, student_factor
from sharpkit.linalg.krylov import KrylovSpace
from sharpkit.linalg.results import Budget, Estimate, warn_unconverged
from sharpkit.linalg.trace import DEFAULT_MATVECS, AdaptiveEstimate, Tolerance
from sharpkit.operators.base import SymmetricOperator, as_operator


@dataclass(frozen=True)
class DiagonalEstimate(Result, kind="diagonal"):
    """The diagonal of a matrix with a standard error for each entry.

    Attributes:
        value: (n,) on the operator's device.
        stderr: (n,) one standard error of each entry; 0 where it is exact to rounding.
        num_matvecs: products spent.
        seconds: wall time spent.
        converged: False where a budget was exhausted before all probes were done.
    """

    value: Tensor = field(repr=False)
    stderr: Tensor = field(repr=False)
    num_matvecs: int
    seconds: float = 0.0
    converged: bool = True


def diagonal(
    operator: Any,
    *,
    num_probes: int = 100,
    seed: int = 0,
    max_matvecs: int | None = None,
    max_seconds: float | None = None,
    callback: ProgressCallback | None = None,
) -> DiagonalEstimate:
    """The diagonal of A as the mean of z * (A z) over Rademacher probes z.

    The variance of entry i is sum_{j != i} A_ij^2: a diagonal matrix is exact after one probe. With ``num_probes`` >= n an orthonormal
    basis takes the probes' place and the result is exact.

    Args:
        operator: anything :func:`sharpkit.as_operator` takes.
        num_probes: products to spend, at least 2.
        seed: seeds the probes.
        max_matvecs, max_seconds: most products and seconds.
        callback: called with a :class:`~sharpkit.Progress` after each product.

    Raises:
        ValueError: fewer than two probes.
        NonFiniteError: a product is not finite.

    References:
        Bekas, Kokiopoulou and Saad, "An estimator for the diagonal of a matrix" (2007).

    Example:
        >>> import torch, sharpkit as sk
        >>> sk.diagonal(torch.tensor([[2.0, 1.0], [1.0, 3.0]])).value.round(decimals=4).tolist()
        [2.0, 3.0]
    """
    operator = as_operator(operator)
    operator.check_alike("diagonal", locals())  # before an argument is refused on one process alone
    if num_probes < 2:
        raise ValueError(f"num_probes must be at least 2, so that the spread gives an error; got {num_probes}")
    budget = Budget(operator, max_matvecs=max_matvecs, max_seconds=max_seconds, callback=callback)
    generator = torch.Generator().manual_seed(seed)
    # n products over a basis are exact, and no dearer than as many probes
    if num_probes >= operator.size and budget.allows(operator.size):
        exact = _exact_diagonal(operator, generator, budget)
        if exact is not None:  # None if the time was up
            return exact
    mean = squares = None
    done = 0
    while done < num_probes and budget.allows():
        probe = operator.random_vectors(1, generator=generator, distribution="rademacher")[:, 0]  # +-1: A_ii itself adds no variance
        sample = operator @ probe * probe
        done += 1
        if mean is None or squares is None:
            mean, squares = sample.clone(), torch.zeros_like(sample)
        else:  # Welford's recurrence
            change = sample - mean
            mean += change / done
            squares += change * (sample - mean)
        budget.report(num_probes, "diagonal")
    if mean is None or squares is None:
        raise ValueError("the time budget ended before the first product: raise max_seconds")
    stderr = (squares / max(1, done - 1) / done).sqrt() * student_factor(done) if done > 1 else torch.full_like(mean, math.inf)
    if done < num_probes:
        warn_unconverged(f"the budget ended after {done} of {num_probes} probes: see stderr")
    return DiagonalEstimate(mean, stderr, budget.num_matvecs, budget.seconds, done == num_probes)


def _exact_diagonal(operator: SymmetricOperator, generator: torch.Generator, budget: Budget) -> DiagonalEstimate | None:
    """diag(A) = sum_i q_i * (A q_i) over any orthonormal basis."""
    space = KrylovSpace(operator)
    while not space.is_complete:
        if not space.add_random(generator):
            return None
    total = torch.zeros_like(space.rows.row(0))
    for index in range(space.size):
        if not budget.allows():
            return None
        vector = space.rows.row(index)
        total += vector * (operator @ vector.to(operator.dtype)).to(vector.dtype)
        budget.report(operator.size, "diagonal, exact")
    value = total.to(operator.dtype)
    return DiagonalEstimate(value, torch.zeros_like(value), budget.num_matvecs, budget.seconds)


def frobenius_norm(
    operator: Any,
    *,
    rtol: float = 0.01,
    seed: int = 0,
    max_matvecs: int | None = None,
    max_seconds: float | None = None,
    callback: ProgressCallback | None = None,
) -> Estimate:
    """||A||_F to a relative standard error of ``rtol``.

    E ||A z||^2 = ||A||_F^2 for random z. If few probes do not settle it, a Krylov basis Q computes the leading eigenvalues exactly:
    ||A||_F^2 = ||A Q||_F^2 + E ||A P z||^2 with P = 1 - Q Q^T, as in :func:`sharpkit.trace`.

    Args:
        operator: anything :func:`sharpkit.as_operator` takes.
        rtol: relative standard error of the norm to reach.
        seed: seeds the probes.
        max_matvecs, max_seconds: most products, by default 2000, and seconds.
        callback: called with a :class:`~sharpkit.Progress` after each product.

    Raises:
        ValueError: rtol not positive.
        NonFiniteError: a product is not finite.

    Example:
        >>> import torch, sharpkit as sk
        >>> round(float(sk.frobenius_norm(torch.diag(torch.tensor([3.0, 4.0])))), 4)
        5.0
    """
    operator = as_operator(operator)
    operator.check_alike("frobenius_norm", locals())  # before an argument is refused on one process alone
    if not rtol > 0:
        raise ValueError(f"rtol must be positive, got {rtol}")
    limit = max_matvecs or DEFAULT_MATVECS
    budget = Budget(operator, max_matvecs=limit, max_seconds=max_seconds, callback=callback)
    # the relative error of a root is half that of the square
    value, stderr, how = AdaptiveEstimate(operator, Tolerance(2 * rtol), budget, seed=seed, limit=limit, squared=True).estimate("auto")
    norm = Estimate(value, stderr, budget.num_matvecs, budget.seconds, how).root()
    converged = norm.stderr <= rtol * norm.value
    if not converged:
        warn_unconverged(
            f"||A||_F = {norm.value:.4g} has a standard error of {norm.stderr:.2g} after {budget.num_matvecs} products, "
            f"{rtol * norm.value:.2g} was asked: raise max_matvecs or rtol."
        )
    return replace(norm, converged=converged)
