"""One shared pass over a matrix: both ends of the spectrum, its density, trace and Frobenius norm from the same products."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from sharpkit._arguments import as_seed, real, whole
from sharpkit._checkpoint import counted_step, resumable
from sharpkit._results import ProgressCallback
from sharpkit.linalg.krylov import KrylovSpace, Offload, Ritz, checked_offload
from sharpkit.linalg.results import Budget, Eigenpairs, Estimate, SpectralDensity, warn_unconverged
from sharpkit.linalg.slq import Outcome, ProbeRuns, Probes
from sharpkit.objective.memory import keeps_memory_limit
from sharpkit.operators.base import as_operator, operator_call

# Times num_steps: how long the first run may go on until both ends have converged, each to its own size. The demo's digits, with
# -0.024 beside 20, take 133 products for 32 steps; 6 by judgement.
_FIRST_RUN_LIMIT = 6
_ENDS_LIMIT = 100  # products at least for both ends alone: by judgement, the edge of a bulk beside a far outlier takes 40 to 60


@dataclass(frozen=True)
class SpectralOverview:
    """What one shared pass tells.

    Attributes:
        largest: the top eigenpair (k = 1).
        smallest: the lowest eigenpair (k = 1).
        density: the quadrature over all probes.
        trace: tr A.
        frobenius_norm: ||A||_F.
        absolute_trace: tr |A|, the sum of the eigenvalues' sizes.
        num_matvecs: products spent on everything together.
        seconds: wall time.
    """

    largest: Eigenpairs
    smallest: Eigenpairs
    density: SpectralDensity
    trace: Estimate
    frobenius_norm: Estimate
    absolute_trace: Estimate
    num_matvecs: int
    seconds: float


@keeps_memory_limit
@resumable(operator_call)
def spectral_overview(
    operator: Any,
    *,
    num_probes: int = 6,
    num_steps: int = 32,
    tol: float = 1e-3,
    seed: int = 0,
    max_matvecs: int | None = None,
    max_seconds: float | None = None,
    memory_limit: float | None = None,
    offload: Offload = False,
    checkpoint: str | os.PathLike[str] | None = None,
    callback: ProgressCallback | None = None,
) -> SpectralOverview:
    """Both extreme eigenpairs, spectral density, trace and Frobenius norm from one set of Lanczos runs.

    The first run goes on until the extreme Ritz pairs have converged. The eigenvalues known from one run are free of the other probes'
    noise, as in :func:`sharpkit.spectral_density`. Costs about num_probes x num_steps products.

    Args:
        operator: anything :func:`sharpkit.as_operator` takes.
        num_probes: Lanczos runs, at least 3, since the errors of all sums come from their spread.
        num_steps: products per run.
        tol: error of the extreme values, relative to each.
        seed: seeds the probes.
        max_matvecs, max_seconds: if one is exhausted, the partial result is returned with ``converged=False``.
        memory_limit, offload: as for :func:`sharpkit.spectral_density`.
        checkpoint: as for :func:`sharpkit.spectral_density`.
        callback: called after each product, or several made at once.

    Raises:
        ValueError: num_probes below 3 or num_steps below 2.
        NonFiniteError, NotSymmetricError, OutOfMemoryError: as for :func:`sharpkit.spectral_density`.

    Example:
        >>> import torch
        >>> overview = spectral_overview(torch.diag(torch.linspace(-1, 9, 11).double()))
        >>> round(float(overview.largest.values), 6), round(overview.trace.value, 6)
        (9.0, 44.0)
    """
    operator = as_operator(operator)
    operator.check_alike("spectral_overview", locals())  # before an argument is refused on one process alone
    num_probes, num_steps = whole("num_probes", num_probes, least=3), whole("num_steps", num_steps, least=2)
    tol = real("tol", tol, above=0, below=1)
    budget = Budget(operator, max_matvecs=max_matvecs, max_seconds=max_seconds, callback=callback)
    steps = min(num_steps, operator.size)
    runs = ProbeRuns(Probes(operator, as_seed(seed)), budget, num_probes, steps=steps, offload=checked_offload(offload))
    ends = _ends_of_first(runs, budget, tol, steps)
    runs.go_on()
    if not runs.complete:
        warn_unconverged(
            f"the budget ended after {budget.num_matvecs} of about {runs.expected} products, {len(runs.rules)} of {num_probes} probes: "
            "errors are wider, or unknown."
        )
    density = runs.density()
    cost: Any = {"num_matvecs": budget.num_matvecs, "seconds": budget.seconds}
    largest, smallest = (replace(pair, **cost) for pair in ends)
    return SpectralOverview(largest, smallest, density, density.trace, density.frobenius_norm, density.total(np.abs), **cost)


def both_ends(operator: Any, *, tol: float = 1e-3, seed: int = 0, num_steps: int = 12) -> tuple[Eigenpairs, Eigenpairs]:
    """The largest and the smallest eigenpair from one Lanczos run.

    Args:
        operator: anything :func:`sharpkit.as_operator` takes.
        tol: error of both values, relative to each.
        seed: seeds the start vector.
        num_steps: least number of products.

    Example:
        >>> import torch
        >>> top, bottom = both_ends(torch.diag(torch.linspace(-1, 9, 11).double()))
        >>> round(float(top.values), 6), round(float(bottom.values), 6)
        (9.0, -1.0)
    """
    operator = as_operator(operator)
    budget, steps = Budget(operator), min(num_steps, operator.size)
    return _ends_of_first(ProbeRuns(Probes(operator, seed), budget, 1, steps=steps), budget, tol, steps, most=_ENDS_LIMIT)


def _ends_of_first(runs: ProbeRuns, budget: Budget, tol: float, steps: int, most: int = 0) -> tuple[Eigenpairs, Eigenpairs]:
    """The largest and the smallest eigenpair from the first run; its basis is freed."""
    most = max(most, _FIRST_RUN_LIMIT * steps)

    def run() -> tuple[Eigenpairs, Eigenpairs, Outcome]:
        space, outcome = runs.run_first(_ends_converged(steps, tol, most), most=most, text="both ends of the spectrum")
        ritz = space.ritz()
        return _extreme(space, ritz, "largest", tol, budget), _extreme(space, ritz, "smallest", tol, budget), outcome

    largest, smallest, outcome = counted_step(runs.operator, "both ends", run)
    runs.add(outcome)
    return largest, smallest


def _ends_converged(steps: int, tol: float, most: int) -> Callable[[KrylovSpace], bool]:
    """At least ``steps`` products, and both extreme Ritz pairs within tolerance at two checks in a row; or ``most`` products."""
    streak = 0

    def enough(space: KrylovSpace) -> bool:
        nonlocal streak
        if space.num_products < steps:
            return False
        streak = streak + 1 if bool(space.ritz().settled(tol)[[0, -1]].all()) else 0
        return streak >= 2 or space.num_products >= most

    return enough


def _extreme(space: KrylovSpace, ritz: Ritz, which: str, tol: float, budget: Budget) -> Eigenpairs:
    pair = ritz.pick(np.array([-1 if which == "largest" else 0]))
    converged = ritz.converged(tol)[[-1 if which == "largest" else 0]]
    return Eigenpairs(
        torch.from_numpy(pair.values),
        space.vectors(pair.coordinates),
        torch.from_numpy(pair.residuals),
        torch.from_numpy(converged),
        budget.num_matvecs,
        budget.seconds,
        which,
        tol,
        "converged" if bool(converged) else "ended before convergence",
    )
