"""The search behind eigenpairs: which vector to multiply next, when to restart, to look for missed pairs, and to stop."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sharpkit.linalg.basis import Array
from sharpkit.linalg.krylov import KrylovSpace
from sharpkit.linalg.progress import Budget
from sharpkit.linalg.results import Eigenpairs

_BUFFER = 2
_PERSISTENCE = 2
_SWEEP_STEPS = 4


@dataclass
class Ritz:
    """Ritz pairs in order of preference, best first."""

    values: Array
    coordinates: Array
    residuals: Array
    ranks: Array  # what is compared: value, -value or |value|


class Search:
    """The iteration: which vector to multiply next, when to restart, sweep and stop."""

    def __init__(
        self, space: KrylovSpace, k: int, which: str, tol: float, generator: torch.Generator, capacity: int, *, warm: bool
    ) -> None:
        self.space, self.k, self.which, self.tol, self.generator, self.capacity = space, k, which, tol, generator, capacity
        self.ritz: Ritz | None = None
        self.passes = 0
        # A single pair has no search for missed ones behind it; a warm start is near what it looks for.
        self.persistence = _PERSISTENCE + (1 if k == 1 and not warm else 0)

    def run(self, budget: Budget) -> str:
        while True:
            outcome = self._until_converged(budget)
            if outcome != "converged" or self.k == 1 or (self.space.is_complete and not self.space.pending):
                return outcome
            outcome = self._sweep(budget)
            self.passes = 0
            if outcome == "unsettled":
                return self._until_converged(budget)
            if outcome != "intruder":
                return outcome

    def _until_converged(self, budget: Budget) -> str:
        while True:
            if not self.space.pending and not self.space.add_random(self.generator):
                self._update()
                return "converged"
            if not budget.allows():
                return "product or time budget used up"
            self._make_room(1)
            self.space.expand(self._most_useful())
            self._update()
            budget.report(self._forecast(budget), f"Lanczos, {self._num_accepted()} of {self.k} pairs")
            self.passes = self.passes + 1 if self._is_settled() else 0
            if self.passes >= self.persistence:
                return "converged"

    def _sweep(self, budget: Budget) -> str:
        """Look for what was missed: 'intruder' where something comes in above the k-th pair.

        What the basis does not span may hide in the vector that is still pending, or outside: so that one is multiplied, and then Lanczos
        runs from a fresh random start in the complement. It goes on while the complement's best Ritz value might still climb among the
        wanted, up to half the products made.
        """
        space = self.space
        most = max(_SWEEP_STEPS + 2, min(budget.num_matvecs // 2, self.capacity - self.k - 5))
        self._make_room(most + 2)
        if self.capacity < space.operator.size:
            most = max(1, min(most, self.capacity - space.size - 2))
        assert self.ritz is not None
        before, queue, strand = self.ritz.ranks[: self.k].copy(), space.pending[-1:], list[int]()
        if space.add_random(self.generator):
            queue.append(space.size - 1)
        for index in queue:
            if not budget.allows():
                return "product or time budget used up before the search for missed eigenvalues ended"
            grew = space.expand(index)
            self._update()
            budget.report(budget.num_matvecs + max(1, _SWEEP_STEPS - len(strand)), "search for missed eigenvalues")
            if np.any(self.ritz.ranks[: self.k] > before + self.tol * self.size_of_spectrum):
                return "intruder"
            if index != queue[0] or len(queue) == 1:
                strand.append(index)
                done = len(strand) >= most or (len(strand) >= _SWEEP_STEPS and self._clear_of_wanted(strand))
                if grew and not done:
                    queue.append(space.size - 1)
        return "converged" if self._is_settled() else "unsettled"

    def _clear_of_wanted(self, strand: list[int]) -> bool:
        """Whether the complement's best eigenvalue will not reach the k-th wanted one.

        A random start underestimates the top of a spectrum of width w by order w (log n / steps)^2 (Kuczynski and Wozniakowski, 1992);
        the factor 1/4 was chosen so that no eigenvalue was missed on clustered reference spectra.
        """
        values, coordinates = np.linalg.eigh(self.space.projected(strand))
        ranks = self._rank(values)
        best = int(np.argmax(ranks))
        positions = [self.space.expanded.index(index) for index in strand]
        residual = float(np.linalg.norm(self.space.couplings()[:, positions] @ coordinates[:, best]))
        assert self.ritz is not None
        unseen = float(np.ptp(values)) * (np.log(self.space.operator.size) / (4 * len(strand))) ** 2
        return bool(ranks[best] + residual + unseen < self.ritz.ranks[self.k - 1])

    @property
    def size_of_spectrum(self) -> float:
        assert self.ritz is not None
        return float(np.abs(self.ritz.values).max())

    def _rank(self, values: Array) -> Array:
        return np.abs(values) if self.which == "magnitude" else -values if self.which == "smallest" else values

    def _update(self) -> None:
        values, coordinates = np.linalg.eigh(self.space.projected())
        order = np.argsort(-self._rank(values), kind="stable")
        values, coordinates = values[order], coordinates[:, order]
        residuals = np.linalg.norm(self.space.couplings() @ coordinates, axis=0) if self.space.pending else np.zeros(len(values))
        self.ritz = Ritz(values, coordinates, residuals, self._rank(values))

    def _threshold(self) -> float:
        return max(self.tol * self.size_of_spectrum, self.space.floor())

    def _num_accepted(self) -> int:
        return 0 if self.ritz is None else int((self.ritz.residuals[: self.k] <= self._threshold()).sum())

    def _is_settled(self) -> bool:
        """All wanted pairs within tolerance, and the next ones too or clear of the wanted."""
        ritz, k = self.ritz, self.k
        assert ritz is not None
        if len(ritz.values) < min(k + _BUFFER, self.space.operator.size):
            return False
        buffer = slice(k, k + _BUFFER)
        clear = ritz.ranks[buffer] + ritz.residuals[buffer] < ritz.ranks[k - 1]
        within = ritz.residuals[: k + _BUFFER] <= self._threshold()
        return bool(within[:k].all() and (within[buffer] | clear).all())

    def _most_useful(self) -> int:
        """The pending vector that carries most of the residuals of the wanted pairs."""
        pending = self.space.pending
        if len(pending) == 1 or self.ritz is None or len(self.ritz.values) < self.k:
            return pending[0]
        wanted = self.ritz.coordinates[:, : self.k + _BUFFER]
        shares = self.space.couplings() @ wanted
        shares[:, self.ritz.residuals[: self.k + _BUFFER] <= self._threshold()] *= 1e-3
        return pending[int(np.argmax(np.linalg.norm(shares, axis=1)))]

    def _make_room(self, rows: int) -> None:
        if self.space.size + rows <= self.capacity or self.capacity >= self.space.operator.size or self.ritz is None:
            return
        room = self.capacity - len(self.space.pending) - rows
        keep = max(1, min(self.k + _BUFFER + (self.capacity - self.k) // 3, room))
        self.space.compress(self.ritz.values[:keep], self.ritz.coordinates[:, :keep])
        self._update()

    def _forecast(self, budget: Budget) -> int:
        """Products the whole will need, by the usual cost while nothing has converged and the share accepted afterwards."""
        done, usual = budget.num_matvecs, 10 + 2 * self.k + (_SWEEP_STEPS if self.k > 1 else 0)
        return max(usual, done + 2 * (self.k - self._num_accepted()) + (_SWEEP_STEPS if self.k > 1 else 0))

    def result(self, budget: Budget, outcome: str) -> Eigenpairs:
        space, k = self.space, self.k
        found = 0 if self.ritz is None else min(k, len(self.ritz.values))
        values, residuals = np.full(k, np.nan), np.full(k, np.inf)
        pieces: list[Tensor] = []
        if self.ritz is not None:
            order = slice(0, found)
            values[:found] = self.ritz.values[order]
            residuals[:found] = np.hypot(self.ritz.residuals[order], space.floor())
            pieces.append(space.vectors(self.ritz.coordinates[:, order]))
        while space.size < k and space.add_random(self.generator):
            pass
        for index in space.pending[: k - found]:
            pieces.append(space.rows.row(index)[:, None].to(space.operator.dtype))
        vectors = torch.cat(pieces, dim=1)
        accuracy = self.tol * (self.size_of_spectrum if self.ritz is not None else 0.0)
        converged = (residuals <= max(accuracy, 1.5 * space.floor())) & (outcome == "converged")
        if outcome == "converged" and accuracy < space.floor():
            converged[:] = False
            outcome = f"stopped at the rounding of {space.dtype}: tol={self.tol:g} is out of reach"
        if self.which == "smallest":
            flip = np.concatenate([np.arange(found)[::-1], np.arange(found, k)])
            values, residuals, converged, vectors = values[flip], residuals[flip], converged[flip], vectors[:, flip.tolist()]
        return Eigenpairs(
            torch.from_numpy(values),
            vectors,
            torch.from_numpy(residuals),
            torch.from_numpy(converged),
            budget.num_matvecs,
            budget.seconds,
            self.which,
            self.tol,
            outcome,
        )
