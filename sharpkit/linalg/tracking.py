"""Follow the largest eigenvalue of a matrix that changes slowly, by one or two products a time."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from sharpkit._results import State
from sharpkit.linalg.krylov import KrylovSpace, Ritz, lanczos_run
from sharpkit.linalg.results import Budget, Estimate
from sharpkit.operators.base import SymmetricOperator

# Together these keep lambda_max of a training run within 1 % at one to two products an update (docs/monitor_results.md).
_COLD_MATVECS = 24  # by judgement: twice what a cold start of one pair usually takes
_MEMORY = 3  # values kept to extrapolate from: by judgement
_SKIP_SHARE = 0.5  # of the tolerance, by judgement, may be spent by an extrapolation that has held so far
_MAX_SKIP = 4  # steps extrapolated at most from one update: by judgement
_PROOF = 3  # extrapolations in a row that must hold before one is relied on, by judgement: where values jump, single ones hold by chance
_LEAST_SECOND = 0.5  # of the first, by judgement: short runs see the second eigenvalue too low
_LONG = 6  # products of a run that shows the second eigenvalue: by judgement
_SEARCH = 10  # products of an update that looks for another top eigenvalue: by judgement, as in a cold start
_MOVED = 5.0  # tolerances, by judgement: a value that moved further belongs to a matrix that must be treated as new


@dataclass
class EigenvalueTracker(State, saved=("vector", "second", "updates", "points", "hits")):
    """The largest eigenvalue of a slowly changing operator, warm-started from where it was last.

    Each update is a short Lanczos run from the last Ritz vector, moved by its residual along the first direction outside (which costs
    nothing). It ends when the error falls below ``tol``. The error is the residual bound r, or r^2 / gap where the second eigenvalue
    is known to lie further away than r. Every ``check_every`` updates a random second start looks for another eigenvalue that has risen
    above the one followed.

    Attributes:
        tol: error to reach, relative to the eigenvalue.
        max_matvecs: most products of a warm update.
        cold_matvecs: most products of the first update.
        check_every: updates between searches for another top eigenvalue.
        seed: seeds the random starts.

    Example:
        >>> import torch, sharpkit as sk
        >>> from sharpkit.linalg.tracking import EigenvalueTracker
        >>> tracker = EigenvalueTracker(tol=1e-3)
        >>> spectrum = torch.linspace(0, 5, 100).double()
        >>> spectrum[-1] = 10.0
        >>> values = [tracker.update(sk.as_operator(torch.diag(spectrum * (1 + 0.01 * t)))) for t in range(5)]
        >>> [round(v.value, 2) for v in values]
        [10.0, 10.1, 10.2, 10.3, 10.4]
        >>> values[-1].num_matvecs
        1
    """

    tol: float = 0.01
    max_matvecs: int = 8
    cold_matvecs: int = _COLD_MATVECS
    check_every: int = 32
    seed: int = 0
    vector: Tensor | None = None
    second: float = math.inf  # second eigenvalue as a share of the first, once a run was long enough to show it
    updates: int = 0
    points: list[tuple[int, float]] = field(default_factory=list)  # (step, value), the last few
    hits: int = 0  # extrapolations that have held lately

    def update(self, operator: SymmetricOperator, *, step: int | None = None, max_matvecs: int | None = None) -> Estimate:
        """Measure anew.

        Args:
            operator: the matrix as it is now.
            step: its time, for :meth:`extrapolate`.
            max_matvecs: fewer products than the tracker's own limit; the wider error says so.

        Returns:
            the eigenvalue with its error bound; ``converged`` is whether ``tol`` was reached.

        Raises:
            NonFiniteError, NotSymmetricError: from the products.
        """
        generator = torch.Generator().manual_seed(self.seed + self.updates)
        space = KrylovSpace(operator)
        if self.vector is None or self.vector.shape[0] != operator.length:
            cold, self.second = True, math.inf
            space.add_random(generator)
        else:
            cold = False
            space.add_start(self.vector.to(device=operator.device))
            if self.check_every and self.updates % self.check_every == self.check_every - 1:
                space.add_random(generator)
        searches = len(space.pending) > 1
        allowed = self.cold_matvecs if cold or searches else self.max_matvecs
        if max_matvecs is not None:
            allowed = min(allowed, max(1, max_matvecs))
        budget = Budget(operator, max_matvecs=allowed)
        value, error = self._run(space, budget, least=_SEARCH if searches else 2 if cold else 1)
        self.updates += 1
        converged = error <= self.tol * abs(value)
        if step is not None:
            self._remember(step, value, converged)
        how = "Lanczos" if cold else "Lanczos from the last vector"
        return Estimate(value, error, budget.num_matvecs, budget.seconds, how, converged, error_kind="residual bound")

    def _run(self, space: KrylovSpace, budget: Budget, *, least: int) -> tuple[float, float]:
        """The top Ritz value and its error; the next update's vector and second eigenvalue are kept."""
        last = self.points[-1][1] if self.points else None
        ritz, error, passes, several = space.ritz(), math.inf, 0, False

        def choose() -> int:  # the followed vector first, then the random one and what grows from it
            nonlocal several
            several = len(space.pending) > 1
            return space.pending[-1] if space.expanded else space.pending[0]

        def enough() -> bool:
            nonlocal ritz, error, passes
            ritz = space.ritz()
            top, error = float(ritz.values[-1]), self._error(ritz)
            passes = passes + 1 if error <= self.tol * abs(top) else 0
            # One check is enough only for the vector followed so far, in a matrix that has hardly changed.
            unlike = least > 1 or several or (last is not None and abs(top - last) > _MOVED * self.tol * abs(top))
            return len(space.expanded) >= least and passes >= (2 if unlike else 1)

        lanczos_run(space, budget, enough, lambda: (0, ""), choose=choose)
        top = float(ritz.values[-1])
        if len(ritz.values) > 1 and top > 0:
            share = max(float(ritz.values[-2]) / top, _LEAST_SECOND)
            if len(space.expanded) >= _LONG:
                self.second = share
            elif math.isfinite(self.second):
                self.second = max(share, self.second)
        self.vector = _advanced(space, ritz)
        return top, error

    def _error(self, ritz: Ritz) -> float:
        """min(r, r^2 / gap), the gap by the nearest second eigenvalue seen now or before, and what rounding moves the value by besides."""
        top, residual = float(ritz.values[-1]), float(ritz.outward[-1])
        second = max(self.second * top, float(ritz.values[-2]) if len(ritz.values) > 1 else -math.inf)
        gap = top - second - residual
        return math.hypot(min(residual, residual**2 / gap) if top > 0 and gap > 0 else residual, ritz.floor)

    # -- between updates ------------------------------------------------------------------------------------------------
    def _remember(self, step: int, value: float, converged: bool) -> None:
        predicted = self._line(step)
        self.points = [*self.points, (step, value)][-_MEMORY:]
        if predicted is None or not converged:
            self.hits = 0
        elif abs(predicted - value) <= _SKIP_SHARE * self.tol * abs(value):
            self.hits = min(self.hits + 1, _PROOF - 1 + _MAX_SKIP)
        else:
            self.hits = self.hits // 2 if abs(predicted - value) <= self.tol * abs(value) else 0

    def _line(self, step: int) -> float | None:
        if len(self.points) < 2:
            return None
        (s0, a), (s1, b) = self.points[-2:]
        return b + (b - a) / (s1 - s0) * (step - s1) if s1 > s0 else None

    def extrapolate(self, step: int) -> Estimate | None:
        """The value a few steps after the last update, without any product, after three consecutive extrapolations within tolerance.

        None before that. Its error is the tolerance, which stands for the residual bound: the last extrapolations stayed within half of it.
        """
        value = self._line(step)
        if value is None or not 0 < step - self.points[-1][0] <= self.hits - _PROOF + 1:
            return None
        return Estimate(value, self.tol * abs(value), 0, 0.0, "extrapolated from the last two", True, error_kind="residual bound")


def _advanced(space: KrylovSpace, ritz: Ritz) -> Tensor:
    """The top Ritz vector after one power step: A x / theta = x + r / theta, whose r is known without a product."""
    top, coordinates = float(ritz.values[-1]), ritz.coordinates[:, -1]
    full = np.zeros((space.size, 1))
    full[space.expanded, 0] = coordinates
    if space.pending and top > 0:
        full[space.pending, 0] = (space.couplings() @ coordinates) / max(top, float(ritz.residuals[-1]))
    return space.rows.combine(torch.from_numpy(full)).to(space.operator.dtype)[:, 0].detach()
