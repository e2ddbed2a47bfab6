"""One shared pass over a matrix: both ends of the spectrum, its density, trace and Frobenius norm from the same products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sharpkit._arguments import as_seed, real, whole
from sharpkit._results import ProgressCallback
from sharpkit.linalg.krylov import KrylovSpace
from sharpkit.linalg.results import Budget, Eigenpairs, Estimate, SpectralDensity, warn_unconverged
from sharpkit.linalg.slq import ControlVectors, ProbeRun, density_from, probe_run, probe_runs
from sharpkit.operators.base import as_operator

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


def spectral_overview(
    operator: Any,
    *,
    num_probes: int = 6,
    num_steps: int = 32,
    tol: float = 1e-3,
    seed: int = 0,
    max_matvecs: int | None = None,
    max_seconds: float | None = None,
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
        callback: called after each product, or several made at once.

    Raises:
        ValueError: num_probes below 3 or num_steps below 2.
        NonFiniteError, NotSymmetricError: from the products.

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
    generator = torch.Generator().manual_seed(as_seed(seed))
    steps, expected = min(num_steps, operator.size), num_probes * min(num_steps, operator.size)
    text, enough = "both ends of the spectrum", _ends_converged(steps, tol)
    first = probe_run(operator, generator, budget, steps=steps, text=text, expected=expected, enough=enough)
    rules, controls = [first.quadrature], ControlVectors()
    controls.add(first)
    for run in probe_runs(operator, generator, budget, num_probes, steps=steps, done=1):
        if run.complete:
            rules.append(run.quadrature)
            controls.add(run)
    complete = len(rules) == num_probes
    if not complete:
        warn_unconverged(
            f"the budget ended after {budget.num_matvecs} of about {expected} products, {len(rules)} of {num_probes} probes: errors are "
            "wider, or unknown."
        )
    steps = max(len(rule.nodes) for rule in rules)
    density = density_from(rules, steps, operator.size, budget, complete, controls, rounding=operator.rounding)
    largest, smallest = (_extreme(first, which, tol, budget) for which in ("largest", "smallest"))
    sums = density.trace, density.frobenius_norm, density.total(np.abs)
    return SpectralOverview(largest, smallest, density, *sums, budget.num_matvecs, budget.seconds)


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
    budget, steps, text = Budget(operator), min(num_steps, operator.size), "both ends of the spectrum"
    generator = torch.Generator().manual_seed(seed)
    run = probe_run(
        operator, generator, budget, steps=steps, text=text, expected=steps, enough=_ends_converged(steps, tol, most=_ENDS_LIMIT)
    )
    return _extreme(run, "largest", tol, budget), _extreme(run, "smallest", tol, budget)


def _ends_converged(steps: int, tol: float, most: int = 0) -> Callable[[KrylovSpace], bool]:
    """At least ``steps`` steps, and both extreme Ritz pairs within tolerance at two checks in a row."""
    streak = 0

    def enough(space: KrylovSpace) -> bool:
        nonlocal streak
        if len(space.expanded) < steps:
            return False
        streak = streak + 1 if bool(space.ritz().settled(tol)[[0, -1]].all()) else 0
        return streak >= 2 or len(space.expanded) >= max(most, _FIRST_RUN_LIMIT * steps)

    return enough


def _extreme(run: ProbeRun, which: str, tol: float, budget: Budget) -> Eigenpairs:
    pair = run.ritz.pick(np.array([-1 if which == "largest" else 0]))
    converged = run.ritz.converged(tol)[[-1 if which == "largest" else 0]]
    return Eigenpairs(
        torch.from_numpy(pair.values),
        run.space.vectors(pair.coordinates),
        torch.from_numpy(pair.residuals),
        torch.from_numpy(converged),
        budget.num_matvecs,
        budget.seconds,
        which,
        tol,
        "converged" if bool(converged) else "ended before convergence",
    )
