"""Extreme eigenpairs by Lanczos with full re-orthogonalisation, thick restart, warm start and a search for missed ones."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from sharpkit._errors import ConvergenceWarning
from sharpkit._results import ProgressCallback
from sharpkit.linalg.krylov import Array, KrylovSpace, affordable_rows
from sharpkit.linalg.results import Budget, Eigenpairs
from sharpkit.operators.base import SymmetricOperator, as_operator

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


Which = Literal["largest", "smallest", "magnitude"]

_WARM_NOISE = 0.2


def eigenpairs(
    operator: Any,
    k: int = 1,
    *,
    which: Which = "largest",
    tol: float = 1e-3,
    seed: int = 0,
    initial: Tensor | None = None,
    max_matvecs: int | None = None,
    max_seconds: float | None = None,
    basis_size: int | None = None,
    offload: bool = False,
    callback: ProgressCallback | None = None,
) -> Eigenpairs:
    """The k extreme eigenpairs of a symmetric operator, multiplicities included.

    The Lanczos iteration ends when all k residuals ||A v - theta v|| are below ``tol`` times the largest eigenvalue magnitude and no
    further Ritz value can reach in among them, twice in a row. For k >= 2 a few more products from a fresh random start orthogonal
    to everything found then look for copies of multiple eigenvalues and members of clusters; what they find is merged. Where the
    memory for the basis ends, the iteration restarts from the best Ritz vectors.

    The eigenvalue's own error is about residual^2 / gap, far below ``tol`` for separated eigenvalues.

    Args:
        operator: anything :func:`sharpkit.as_operator` takes.
        k: how many pairs, 1 <= k <= n.
        which: ``"largest"`` or ``"smallest"`` algebraic, or largest ``"magnitude"``.
        tol: largest residual, relative to the largest eigenvalue magnitude.
        seed: of the random vectors.
        initial: (n,) or (n, j) vectors near the wanted eigenvectors, for instance those of an earlier call.
        max_matvecs: product budget; by default 1000 + 50 k.
        max_seconds: time budget in seconds.
        basis_size: most basis vectors kept, at least k + 10 or n; by default max(2 k + 20, 80) or what half the free memory holds.
        offload: keep the basis in host memory.
        callback: called with a :class:`~sharpkit.Progress` after each product.

    Returns:
        the pairs, by descending value (``"magnitude"``: by descending magnitude); what has not converged is flagged. Where a budget
        ends before k products, the missing pairs have the value NaN and an infinite residual.

    Raises:
        ValueError: k outside 1..n, or another argument out of range.
        NonFiniteError: a product is not finite.
        NotSymmetricError: the products contradict each other.

    References:
        Paige, "Accuracy and effectiveness of the Lanczos algorithm for the symmetric eigenproblem" (1980);
        Wu and Simon, "Thick-restart Lanczos method for large symmetric eigenvalue problems" (2000).

    Example:
        >>> import torch, sharpkit as sk
        >>> pairs = sk.eigenpairs(torch.diag(torch.tensor([5.0, 5.0, 3.0, 1.0, -7.0])), k=3)
        >>> [round(value, 4) for value in pairs.values.tolist()]
        [5.0, 5.0, 3.0]
        >>> bool(pairs.converged.all())
        True
    """
    operator = as_operator(operator)
    check_arguments(operator, k, which, tol, initial)
    budget = Budget(operator, max_matvecs=1000 + 50 * k if max_matvecs is None else max_matvecs, max_seconds=max_seconds, callback=callback)
    generator = torch.Generator().manual_seed(seed)
    space = KrylovSpace(operator, offload=offload)
    _add_starts(space, initial, generator)
    capacity = _capacity(operator, k, basis_size, offload, space.rows.row(0).shape[0])
    search = Search(space, k, which, tol, generator, capacity, warm=initial is not None)
    pairs = search.result(budget, search.run(budget))
    if not bool(pairs.converged.all()):
        warnings.warn(
            f"{int(pairs.converged.sum())} of {k} eigenpairs converged after {pairs.num_matvecs} products: {pairs.outcome}. The result "
            "carries the residual of each; raise max_matvecs, max_seconds or tol for a complete answer.",
            ConvergenceWarning,
            stacklevel=2,
        )
    return pairs


def check_arguments(operator: SymmetricOperator, k: int, which: str, tol: float, initial: Tensor | None) -> None:
    """Raise TypeError or ValueError unless the arguments of an eigensolver make sense."""
    n = operator.size
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k must be an integer, got {type(k).__name__}")
    if not 1 <= k <= n:
        raise ValueError(f"k must be between 1 and n = {n}, the number of eigenvalues there are; got k={k}")
    if which not in get_args(Which):
        raise ValueError(f"which must be one of {get_args(Which)}, got {which!r}")
    if not 0 < tol < 1:
        raise ValueError(f"tol is relative to the largest eigenvalue magnitude and must lie between 0 and 1, got {tol}")
    if initial is not None and (initial.ndim not in (1, 2) or initial.numel() == 0):
        raise ValueError(f"initial must have shape (n,) or (n, j), got {tuple(initial.shape)}")


def _capacity(operator: SymmetricOperator, k: int, basis_size: int | None, offload: bool, length: int) -> int:
    least = min(operator.size, k + 10)
    if basis_size is None:
        affordable = affordable_rows(operator, length, host=offload)
        return max(least, min(operator.size, affordable, max(2 * k + 20, 80)))
    if basis_size < least:
        raise ValueError(f"basis_size must be at least {least} for k={k} (k + 10, or n where that is less), got {basis_size}")
    return min(operator.size, basis_size)


def _add_starts(space: KrylovSpace, initial: Tensor | None, generator: torch.Generator) -> None:
    """The start: a random vector, or the sum of the given ones with some noise, so that an invariant subspace is no trap.

    Several vectors enter as their sum: as a block each needs products of its own to improve, which measured slower than a cold start.
    """
    operator = space.operator
    if initial is not None:
        given = initial if initial.ndim == 2 else initial[:, None]
        given = given.to(device=operator.device, dtype=space.dtype)
        noise = operator.random_vectors(1, generator=generator).to(space.dtype)
        if len(noise) != len(given):
            raise ValueError(f"initial must have {noise.shape[0]} rows, got shape {tuple(initial.shape)}")
        squares = torch.stack([operator.dot(vector, vector) for vector in given.T])
        start = given @ squares.clamp_min(torch.finfo(space.dtype).tiny).rsqrt()
        noise = noise[:, 0]
        level = _WARM_NOISE * (operator.dot(start, start) / operator.dot(noise, noise)).sqrt()
        space.add_start(start + level * noise)
    if not space.pending:
        space.add_random(generator)
