"""One shared pass over a matrix: both ends of the spectrum, its density, trace and Frobenius norm from the same products."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sharpkit._errors import ConvergenceWarning
from sharpkit._results import ProgressCallback, standard_error
from sharpkit.linalg.krylov import Array, KrylovSpace
from sharpkit.linalg.results import Budget, Eigenpairs, Estimate, SpectralDensity
from sharpkit.linalg.slq import density_from_runs
from sharpkit.operators.base import SymmetricOperator, as_operator

_CONTROL_RESIDUAL = 1e-2  # relative to the scale: a Ritz pair this good may serve as a control variate
_MAX_CONTROLS = 30
_MOMENTS: tuple[Callable[[Array], Array], ...] = (lambda x: x, np.square, np.abs)
_FIRST_RUN_LIMIT = 4  # times num_steps: how long the first run may go on until both ends have converged


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

    The first run goes on until the extreme Ritz pairs have converged. Its converged Ritz pairs (theta_i, v_i) then reduce the variance of
    the other probes' moments: z^T A z - sum_i theta_i ((v_i . z)^2 - 1) has the same mean, tr A, without the noise of the outliers, and
    likewise for A^2. Costs about num_probes x num_steps products.

    Args:
        operator: anything :func:`sharpkit.as_operator` takes.
        num_probes: Lanczos runs, at least 3: all errors of sums come from their spread.
        num_steps: products per run.
        tol: residual of the extreme pairs relative to the largest magnitude.
        seed: of the probes.
        max_matvecs, max_seconds: budgets; what is there when one ends comes back flagged.
        callback: called after each product.

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
    if num_probes < 3 or num_steps < 2:
        raise ValueError(f"an overview needs num_probes >= 3 and num_steps >= 2, got {num_probes} and {num_steps}")
    budget = Budget(operator, max_matvecs=max_matvecs, max_seconds=max_seconds, callback=callback)
    generator = torch.Generator().manual_seed(seed)
    steps, expected = min(num_steps, operator.size), num_probes * min(num_steps, operator.size)
    first = _run(operator, generator, budget, _ends_converged(steps, tol), expected, "both ends of the spectrum")
    pairs = _Ritz(first.space)
    values, vectors = pairs.controls()
    runs, moments = [first.quadrature()], []
    for probe in range(1, num_probes):
        if not budget.allows():
            break
        run = _run(operator, generator, budget, lambda space: len(space.expanded) >= steps, expected, f"probe {probe + 1} of {num_probes}")
        if run.complete:
            runs.append(run.quadrature())
            moments.append(_moments(run, values, vectors))
    complete = len(runs) == num_probes
    if not complete:
        warnings.warn(
            f"the budget ended after {budget.num_matvecs} of about {expected} products, {len(runs)} of {num_probes} probes: "
            f"errors are wider, or unknown",
            ConvergenceWarning,
            stacklevel=2,
        )
    density = density_from_runs(runs, max(len(nodes) for nodes, _, _ in runs), operator.size, budget, complete)
    trace, squared, absolute = _sums(np.array(moments).reshape(-1, len(_MOMENTS)), density, budget)
    ends = [pairs.extreme(which, tol, budget) for which in ("largest", "smallest")]
    return SpectralOverview(ends[0], ends[1], density, trace, _root(squared), absolute, budget.num_matvecs, budget.seconds)


def both_ends(operator: Any, *, tol: float = 1e-3, seed: int = 0, num_steps: int = 12) -> tuple[Eigenpairs, Eigenpairs]:
    """The largest and the smallest eigenpair from one Lanczos run.

    Args:
        operator: anything :func:`sharpkit.as_operator` takes.
        tol: of both residuals, relative to the largest magnitude.
        seed: of the start vector.
        num_steps: products at least.

    Example:
        >>> import torch
        >>> top, bottom = both_ends(torch.diag(torch.linspace(-1, 9, 11).double()))
        >>> round(float(top.values), 6), round(float(bottom.values), 6)
        (9.0, -1.0)
    """
    operator = as_operator(operator)
    budget, steps = Budget(operator), min(num_steps, operator.size)
    run = _run(operator, torch.Generator().manual_seed(seed), budget, _ends_converged(steps, tol), steps, "both ends of the spectrum")
    pairs = _Ritz(run.space)
    return pairs.extreme("largest", tol, budget), pairs.extreme("smallest", tol, budget)


@dataclass(frozen=True)
class _Run:
    """One Lanczos run: its probe z (||z||^2 = n), its Krylov space, and whether it went as far as it was to go."""

    probe: Tensor
    space: KrylovSpace
    complete: bool

    def quadrature(self) -> tuple[Array, Array, Array]:
        """Nodes, weights (summing to 1) and residuals."""
        nodes, coordinates = np.linalg.eigh(self.space.projected())
        residuals = np.linalg.norm(self.space.couplings() @ coordinates, axis=0) if self.space.pending else np.zeros(len(nodes))
        return nodes, coordinates[0] ** 2, residuals


def _run(operator: SymmetricOperator, generator: torch.Generator, budget: Budget, done: Any, expected: int, stage: str) -> _Run:
    probe = operator.random_vectors(1, generator=generator, distribution="rademacher")[:, 0]
    space = KrylovSpace(operator)
    space.add_start(probe)
    complete = True
    while space.pending and not done(space):
        if space.expanded and not budget.allows():
            complete = False
            break
        space.expand(space.pending[0])
        budget.report(expected, stage)
    return _Run(probe, space, complete)


def _ends_converged(steps: int, tol: float) -> Any:
    """At least ``steps`` steps, and both extreme Ritz pairs within tolerance at two checks in a row."""
    streak = 0

    def done(space: KrylovSpace) -> bool:
        nonlocal streak
        if len(space.expanded) < steps:
            return False
        ritz = _Ritz(space)
        ends = ritz.residuals[[0, -1]] <= max(tol * ritz.scale, space.floor())
        streak = streak + 1 if bool(ends.all()) else 0
        return streak >= 2 or len(space.expanded) >= _FIRST_RUN_LIMIT * steps

    return done


class _Ritz:
    """The Ritz pairs of a space, ascending, with residuals."""

    def __init__(self, space: KrylovSpace) -> None:
        self.space = space
        self.values, self.coordinates = np.linalg.eigh(space.projected())
        outward = np.linalg.norm(space.couplings() @ self.coordinates, axis=0) if space.pending else np.zeros(len(self.values))
        self.residuals = np.hypot(outward, space.floor())
        self.scale = float(np.abs(self.values).max())

    def controls(self) -> tuple[Array, Tensor]:
        """Values and vectors of the good pairs, largest magnitude first, (m,) and (n, m)."""
        good = np.flatnonzero(self.residuals <= _CONTROL_RESIDUAL * self.scale)
        good = good[np.argsort(-np.abs(self.values[good]))][:_MAX_CONTROLS]
        return self.values[good], self.space.vectors(self.coordinates[:, good])

    def extreme(self, which: str, tol: float, budget: Budget) -> Eigenpairs:
        index = -1 if which == "largest" else 0
        residual = float(self.residuals[index])
        converged = residual <= max(tol * self.scale, 2 * self.space.floor())
        vectors = self.space.vectors(self.coordinates[:, [index]])
        return Eigenpairs(
            torch.tensor([self.values[index]], dtype=torch.float64),
            vectors,
            torch.tensor([residual], dtype=torch.float64),
            torch.tensor([converged]),
            budget.num_matvecs,
            budget.seconds,
            which,
            tol,
            "converged" if converged else "ended before convergence",
        )


def _moments(run: _Run, values: Array, vectors: Tensor) -> list[float]:
    """z^T f(A) z for each f of _MOMENTS, with the controls' noise taken out."""
    nodes, weights, _ = run.quadrature()
    along = run.space.operator.dot(vectors, run.probe).double().cpu().numpy() ** 2 - 1 if len(values) else np.zeros(0)
    return [run.space.operator.size * float(weights @ f(nodes)) - float(f(values) @ along) for f in _MOMENTS]


def _sums(moments: Array, density: SpectralDensity, budget: Budget) -> list[Estimate]:
    """n times the mean of each f of _MOMENTS over the spectrum."""
    if len(moments) < 2:
        means = [density.expectation(f) for f in _MOMENTS]
        return [replace(m, value=m.value * density.size, stderr=m.stderr * density.size) for m in means]
    how = "Lanczos probes, outliers taken out"
    return [Estimate(float(c.mean()), standard_error(c), budget.num_matvecs, budget.seconds, how, density.converged) for c in moments.T]


def _root(squared: Estimate) -> Estimate:
    """The norm from its square, the error by the delta method."""
    norm = math.sqrt(max(squared.value, 0.0))
    return replace(squared, value=norm, stderr=squared.stderr / (2 * norm) if norm > 0 else math.sqrt(squared.stderr))
