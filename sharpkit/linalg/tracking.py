"""Follow the largest eigenvalue of a matrix that changes slowly, by one or two products a time."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sharpkit.linalg.krylov import KrylovSpace
from sharpkit.linalg.results import Estimate
from sharpkit.operators.base import SymmetricOperator

_COLD_MATVECS = 24
_MEMORY = 3  # values kept to extrapolate from
_SKIP_SHARE = 0.5  # of the tolerance may be spent by an extrapolation that has held so far
_MAX_SKIP = 4
_PROOF = 3  # extrapolations in a row that must hold before the first is relied on: where values jump about, single ones hold by chance
_LEAST_SECOND = 0.5  # short runs see the second eigenvalue too low: it is taken to be at least this share of the first
_LONG = 6  # products of a run that shows the second eigenvalue
_SEARCH = 10  # products of an update that looks for another top eigenvalue
_MOVED = 5.0  # tolerances by which the value must have moved since the last update for the matrix to count as another one


@dataclass
class EigenvalueTracker:
    """The largest eigenvalue of a slowly changing operator, warm-started from where it was last.

    Each update is a short Lanczos run from the last Ritz vector, moved by its residual along the first direction outside (which costs
    nothing). It ends when the error falls below ``tol``. The error is the residual bound r, or r^2 / gap where the second eigenvalue
    is known to lie further away than r. Every ``check_every`` updates a random second start looks for another eigenvalue that has risen
    above the one followed.

    Attributes:
        tol: error to reach, relative to the eigenvalue.
        max_matvecs: products of a warm update.
        cold_matvecs: products of the first update.
        check_every: updates between searches for another top eigenvalue.
        seed: of the random starts.

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
        started = time.perf_counter()
        generator = torch.Generator().manual_seed(self.seed + self.updates)
        space = KrylovSpace(operator)
        cold = self.vector is None or self.vector.shape[0] != operator.size
        if cold:
            self.second = math.inf
            space.add_random(generator)
        else:
            assert self.vector is not None
            space.add_start(self.vector.to(device=operator.device))
            if self.check_every and self.updates % self.check_every == self.check_every - 1:
                space.add_random(generator)
        searches = len(space.pending) > 1
        allowed = self.cold_matvecs if cold or searches else self.max_matvecs
        if max_matvecs is not None:
            allowed = min(allowed, max(1, max_matvecs))
        value, error = self._run(space, allowed, least=_SEARCH if searches else 2 if cold else 1)
        self.updates += 1
        converged = error <= self.tol * abs(value)
        if step is not None:
            self._remember(step, value, converged)
        how = "Lanczos" if cold else "Lanczos from the last vector"
        return Estimate(value, error, len(space.expanded), time.perf_counter() - started, how, converged)

    def _run(self, space: KrylovSpace, allowed: int, *, least: int) -> tuple[float, float]:
        passes, last = 0, self.points[-1][1] if self.points else None
        while True:
            several = len(space.pending) > 1  # the followed vector first, then the random one and what grows from it
            space.expand(space.pending[-1] if space.expanded else space.pending[0])
            values, coordinates = np.linalg.eigh(space.projected())
            top, ritz = coordinates[:, -1], float(values[-1])
            residual = float(np.linalg.norm(space.couplings() @ top)) if space.pending else 0.0
            residual = max(residual, space.floor())
            error = self._error(values, residual)
            done = len(space.expanded)
            passes = passes + 1 if error <= self.tol * abs(ritz) else 0
            unlike = least > 1 or several or (last is not None and abs(ritz - last) > _MOVED * self.tol * abs(ritz))
            if not space.pending or done >= allowed or (done >= least and passes >= (2 if unlike else 1)):
                break
        if len(values) > 1 and ritz > 0:
            share = max(float(values[-2]) / ritz, _LEAST_SECOND)
            if done >= _LONG:
                self.second = share
            elif math.isfinite(self.second):
                self.second = max(share, self.second)
        self.vector = self._advanced(space, top, ritz, residual)
        return ritz, error

    def _error(self, values: np.ndarray[Any, Any], residual: float) -> float:
        """min(r, r^2 / gap), the gap by the nearest second eigenvalue seen now or before."""
        ritz = float(values[-1])
        second = max(self.second * ritz, float(values[-2]) if len(values) > 1 else -math.inf)
        gap = ritz - second - residual
        return min(residual, residual**2 / gap) if ritz > 0 and gap > 0 else residual

    def _advanced(self, space: KrylovSpace, top: np.ndarray[Any, Any], ritz: float, residual: float) -> Tensor:
        """The Ritz vector, and one power step: A x / theta = x + r / theta, whose r is known without a product."""
        full = np.zeros((space.size, 1))
        full[space.expanded, 0] = top
        if space.pending and ritz > 0:
            full[space.pending, 0] = (space.couplings() @ top) / max(ritz, residual)
        vector = space.rows.combine(torch.from_numpy(full)).to(space.operator.dtype)[:, 0]
        return vector.detach()

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
        """The value a few steps after the last update without any product, where extrapolation has proved exact enough; else None.

        Its error is the tolerance: what the last extrapolations stayed within by half.
        """
        value = self._line(step)
        if value is None or not 0 < step - self.points[-1][0] <= self.hits - _PROOF + 1:
            return None
        return Estimate(value, self.tol * abs(value), 0, 0.0, "extrapolated from the last two", True)

    # -- saving -----------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """All that the next update depends on."""
        return {"vector": self.vector, "second": self.second, "updates": self.updates, "points": list(self.points), "hits": self.hits}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.vector, self.second, self.updates = state["vector"], float(state["second"]), int(state["updates"])
        self.points, self.hits = [(int(s), float(v)) for s, v in state["points"]], int(state["hits"])
