"""Extreme eigenpairs by Lanczos with full re-orthogonalisation, thick restart, warm start and a search for missed ones."""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from sharpkit._arguments import as_seed, choice, real, whole
from sharpkit._calls import public_call
from sharpkit._checkpoint import resumable
from sharpkit._errors import ConvergenceWarning
from sharpkit._results import ProgressCallback
from sharpkit.linalg.krylov import KrylovSpace, Offload, Ritz, affordable_rows, checked_offload, lanczos_run, place_for, where
from sharpkit.linalg.results import Array, Budget, Eigenpairs, warn_unconverged
from sharpkit.objective.memory import keeps_memory_limit
from sharpkit.operators.base import SymmetricOperator, as_operator, operator_call, real_tensor

Which = Literal["largest", "smallest", "magnitude"]

_BUFFER = 2  # pairs beyond the k-th that must be out of the way, so that a Ritz value still rising is noticed: by judgement
_PERSISTENCE = 2  # checks in a row that must pass, by judgement: one alone passes before a hidden eigenvalue enters the space
_SWEEP_STEPS = 4  # least products of the search for missed eigenvalues: none of 10 missed in 50 starts (experiments/eigen_products.py)
# Chance of passing over an eigenvalue that the search may leave, if the first run has passed it over too: none was missed in 198 runs for
# 10 or 20 pairs, most deep in a bulk (experiments/eigen_torture.py); .12 missed one.
_MISSED = 0.06
# The same where searches have found something: of a copy that is still missing they are the only witnesses, and .06 missed the last of
# twenty (experiments/eigen_torture.py).
_MISSED_COPY = 0.005
_PATIENT = 10  # checks in a row after which a single pair is taken although its probability does not fall: by judgement
_WRONG = 3.0  # tolerances beyond which a single value is wrong, should one be hidden there: by judgement, as in the torture
_LATE_ROUNDS = 4  # products for each vector that earlier searches left pending: by judgement, twenty copies of one value need three
_ROUGH = 1e-2  # tolerance of the pairs of another matrix to start from, by judgement: less than the two matrices differ by
# What a single pair from another matrix leaves open. To be as sure as from a random start that no better one was passed over took as many
# products as that start. A second check in a row took one more and missed the same 3 of 600 (five spectra of 150 rows and two amounts of
# noise, 60 times each): the first of two values 1 % apart, or of a bulk; the plain call missed none.
_FROM_ANOTHER = "converged, from the pair of another matrix: one close beside it and better may have been passed over"
_WARM_NOISE = 0.2  # share of noise in a warm start: less leaves the start in a trap, more costs products; by judgement


@public_call
@keeps_memory_limit
@resumable(operator_call)
def eigenpairs(
    operator: Any,
    k: int = 1,
    *,
    which: Which = "largest",
    tol: float = 1e-3,
    seed: int = 0,
    initial: Tensor | None = None,
    start_from: Any = None,
    max_matvecs: int | None = None,
    max_seconds: float | None = None,
    memory_limit: float | None = None,
    basis_size: int | None = None,
    offload: Offload = False,
    checkpoint: str | os.PathLike[str] | None = None,
    callback: ProgressCallback | None = None,
    name: str = "",
) -> Eigenpairs:
    """The k extreme eigenpairs of a symmetric operator, multiplicities included.

    The Lanczos iteration ends when the error of each of the k values is below ``tol`` times the value itself and no unconverged Ritz value
    can enter the wanted set, at two consecutive checks; for k = 1 as soon as the run can hardly have passed over a better one. The error
    is taken as the residual r = ||A v - theta v|| or, where the value stands apart, r^2 / gap; where it does not, from how far it moved
    lately. No residual exceeds ``tol`` times the largest magnitude. For k >= 2 a few more products from a fresh random start, orthogonal
    to the whole basis, then look for copies of multiple eigenvalues and members of clusters, which are merged. When the memory for the
    basis is full, the iteration restarts from the best Ritz vectors.

    Args:
        operator: anything :func:`sharpkit.as_operator` takes.
        k: how many pairs, 1 <= k <= n.
        which: ``"largest"`` or ``"smallest"`` algebraic, or largest ``"magnitude"``.
        tol: largest error of each value, relative to that value; one that is 0 to rounding has converged.
        seed: seeds the random vectors.
        initial: (n,) or (n, j) vectors near the wanted eigenvectors, for instance those of an earlier call.
        start_from: a cheaper matrix of the same size that resembles this one, such as the Hessian on a part of the data: its pairs, to 1 %,
            are the start. Residuals, errors and ``num_matvecs`` are those of ``operator`` alone. For k = 1 and a sixteenth of 4,000 to
            8,000 samples all took 1.6 to 2.2 times fewer gradients; for k = 3 about as many, and a part of 64 samples made that slower
            (experiments/two_phase.py). Which single pair it is, is decided by the cheaper matrix: of two closer to each other than the
            matrices are, the wrong one came in 3 of 600 cases, and the ``outcome`` says so.
        max_matvecs, max_seconds: most products, by default 1000 + 50 k, and seconds.
        memory_limit: bytes that may be taken where the vectors live, for graphs and basis; by default half of what is free for each.
        basis_size: most basis vectors kept, at least k + 10 or n; by default max(2 k + 20, 80) or what the memory holds.
        offload: True keeps the basis in host memory, the path of a folder in a file there.
        checkpoint: a folder from which the call goes on if it is killed and made again (docs/guide.md); until it ends it takes
            a vector of disk for each product.
        callback: called with a :class:`~sharpkit.Progress` after each product.
        name: of the result, which pages and comparisons show.

    Returns:
        the pairs, by descending value (``"magnitude"``: by descending magnitude); what has not converged is flagged. If a budget is
        exhausted before k products, the missing pairs have the value NaN and an infinite residual.

    Raises:
        ValueError: k outside 1..n, or another argument out of range.
        NonFiniteError: a product is not finite.
        NotSymmetricError: the products contradict each other.
        OutOfMemoryError: k + 10 vectors do not fit.
        DocumentError: the checkpoint is of another call, or of other parameters or data.

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
    operator.check_alike("eigenpairs", locals())  # before an argument is refused on one process alone
    k, tol = check_arguments(operator, k, which, tol, initial)
    budget = Budget(operator, max_matvecs=1000 + 50 * k if max_matvecs is None else max_matvecs, max_seconds=max_seconds, callback=callback)
    generator = torch.Generator().manual_seed(as_seed(seed))
    if start_from is not None:
        initial = _pairs_of(start_from, operator, k, initial, which=which, tol=tol, seed=seed, max_seconds=max_seconds, offload=offload)
    capacity, place = _capacity(operator, k, basis_size, checked_offload(offload))
    space, budget.place = KrylovSpace(operator, offload=place, most=capacity), where(place)
    _add_start(space, initial, generator)
    run = _Iteration(space, budget, k, which, tol, generator, capacity, warm=initial is not None)
    if start_from is not None and k == 1:
        run.persistence = 1
    pairs = run.run()
    if start_from is not None and k == 1 and bool(pairs.converged.all()):
        pairs = replace(pairs, outcome=_FROM_ANOTHER)
    if not bool(pairs.converged.all()):
        warn_unconverged(
            f"{int(pairs.converged.sum())} of {k} eigenpairs converged after {pairs.num_matvecs} products: {pairs.outcome}. The result "
            "carries the residual of each; raise max_matvecs, max_seconds or tol for a complete answer."
        )
    return pairs


def _pairs_of(other: Any, operator: SymmetricOperator, k: int, initial: Tensor | None, *, tol: float, **given: Any) -> Tensor:
    """Eigenvectors of a matrix that resembles the operator, (n, k), to a tolerance that does for a start."""
    if initial is not None:
        raise ValueError("give either initial= or start_from=, not both")
    other = as_operator(other)
    if (other.size, other.length) != (operator.size, operator.length):
        raise ValueError(f"start_from must be a matrix of the same size: {operator.size} rows are asked for, it has {other.size}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # whatever has not converged is a start all the same
        rough = eigenpairs(other, k, tol=max(tol, _ROUGH), **given)
    return rough.vectors


def check_arguments(operator: SymmetricOperator, k: int, which: str, tol: float, initial: Tensor | None) -> tuple[int, float]:
    """k and tol as plain numbers; TypeError or ValueError unless the arguments of an eigensolver make sense."""
    n, k = operator.size, whole("k", k, least=None)
    if not 1 <= k <= n:
        raise ValueError(f"k must be between 1 and n = {n}, the number of eigenvalues there are; got k={k}")
    choice("which", which, get_args(Which))
    tol = real("tol", tol, above=0, below=1, hint="it is relative to each eigenvalue")
    if initial is None:
        return k, tol
    initial = real_tensor("initial", initial)
    if initial.ndim not in (1, 2) or initial.numel() == 0:
        raise ValueError(f"initial must have shape (n,) or (n, j), got {tuple(initial.shape)}")
    if not bool(torch.isfinite(initial).all()):
        raise ValueError("initial must be finite, but holds NaN or infinity")
    return k, tol


def _capacity(operator: SymmetricOperator, k: int, basis_size: int | None, offload: Offload) -> tuple[int, Offload]:
    """Rows of the basis, and where it goes."""
    least = min(operator.size, k + 10)
    if basis_size is None:
        # By judgement: 80 rows hold a usual run of ten pairs whole (28 to 52 products, experiments/eigen_products.py).
        usual = min(operator.size, max(2 * k + 20, 80))
        if isinstance(offload, bool):
            usual = min(usual, max(least, affordable_rows(operator, host=offload)))
        basis_size = usual
    else:
        basis_size = min(operator.size, whole("basis_size", basis_size))
        if basis_size < least:
            raise ValueError(f"basis_size must be at least {least} for k={k} (k + 10, or n where that is less), got {basis_size}")
    return basis_size, place_for(operator, least, offload)


def _add_start(space: KrylovSpace, initial: Tensor | None, generator: torch.Generator) -> None:
    """The start: a random vector, or the sum of the given ones with some noise, so that an invariant subspace is no trap.

    Several vectors enter as their sum: as a block each needs products of its own to improve, which measured slower than a cold start.
    """
    operator = space.operator
    if initial is not None:
        given = (initial if initial.ndim == 2 else initial[:, None]).to(device=operator.device, dtype=space.dtype)  # (n, j)
        noise = operator.random_vectors(1, generator=generator)[:, 0].to(space.dtype)
        if len(noise) != len(given):
            raise ValueError(f"initial must have {len(noise)} rows, got shape {tuple(initial.shape)}")
        squares = torch.stack([operator.dot(vector, vector) for vector in given.T])
        start = given @ squares.clamp_min(torch.finfo(space.dtype).tiny).rsqrt()  # each of length 1: (n,)
        level = _WARM_NOISE * (operator.dot(start, start) / operator.dot(noise, noise)).sqrt()
        space.add_start(start + level * noise)
    if not space.pending:
        space.add_random(generator)


def chance_missed(tridiagonal: Array, end: float, size: int, beyond: float = 0.0) -> float:
    """The probability that Lanczos from a random start has passed over an eigenvalue at ``end`` or beyond, at most 1.

    An eigenvector's share of the start is at most the Christoffel number of its eigenvalue x, 1 / sum_j p_j(x)^2, with p_j the orthonormal
    polynomials of the tridiagonal matrix. Of a random start in ``size`` dimensions, ``size`` times the share is chi-square with one degree
    of freedom, which falls below s with a probability of sqrt(2 s / pi) at most.

    Args:
        tridiagonal: (m, m), the Lanczos matrix.
        end: outside the range of its eigenvalues, else the answer is 1: one of them has come in.
        size: dimension of the space that the start was drawn from.
        beyond: the next off-diagonal entry, which leads out of the m vectors, where it is known: it gives one polynomial more.

    References:
        Szegő, "Orthogonal Polynomials" (1939), section 3.41; Kuczynski and Wozniakowski, "Estimating the largest eigenvalue" (1992).
    """
    inner = np.linalg.eigvalsh(tridiagonal)
    if inner[0] <= end <= inner[-1]:
        return 1.0
    alpha, beta = np.diag(tridiagonal), np.abs(np.diag(tridiagonal, 1))
    beta = np.append(beta, beyond) if beyond > 0 else beta
    before, polynomial, total, coupling = 0.0, 1.0, 1.0, 0.0
    for j in range(len(beta)):
        if beta[j] == 0 or total > 1e30:  # the space is exhausted, or as good as
            return 0.0
        before, polynomial = polynomial, ((end - alpha[j]) * polynomial - coupling * before) / beta[j]
        coupling, total = beta[j], total + polynomial**2
    return min(1.0, math.sqrt(2 * size / (math.pi * total)))


class _Iteration:
    """Which vector to multiply next, when to restart, to look for missed eigenvalues, and to stop."""

    def __init__(
        self, space: KrylovSpace, budget: Budget, k: int, which: str, tol: float, generator: torch.Generator, capacity: int, *, warm: bool
    ) -> None:
        self.space, self.budget, self.k, self.which, self.tol = space, budget, k, which, tol
        self.generator, self.capacity = generator, capacity
        self.ritz: Ritz | None = None  # best first; None before the first product
        self.passes, self.chance = 0, _MISSED
        # A single pair has no search for missed ones behind it. Three checks missed 1 in 600 starts beside a close second; what a random
        # start can have passed over tells more, and a product earlier: none missed in 1600 starts. A warm start is near what it looks for.
        self.persistence = _PERSISTENCE + (1 if k == 1 and not warm else 0)
        self.from_random = not warm  # whether the basis is one run from a random start, whose probabilities are known

    def run(self) -> Eigenpairs:
        """Iterate and search in turns until nothing new comes in."""
        while True:
            if not self._converge():
                return self._result("product or time budget used up")
            if self.k == 1 or (self.space.is_complete and not self.space.pending):
                return self._result("converged")
            outcome = self._sweep()
            if outcome == "unsettled":  # once more to convergence, but no second search: nothing had come in
                return self._result("converged" if self._converge() else "product or time budget used up")
            if outcome != "intruder":
                return self._result(outcome)
            self.chance = _MISSED_COPY

    def _converge(self) -> bool:
        """Multiply until the wanted pairs are settled; False if the budget ended it."""
        self.passes = 0

        def enough() -> bool:
            self._update()
            self.passes = self.passes + 1 if self._is_settled() else 0
            if self.k == 1 and self.from_random and 0 < self.passes < _PATIENT:
                return self._chance_of_better() <= _MISSED
            return self.passes >= self.persistence

        def choose() -> int:
            self._make_room(1)
            return self._most_useful()

        def progress() -> tuple[int, str]:
            # by the usual cost while nothing has converged, and by the number accepted afterwards
            left, search = self.k - self._num_accepted(), _SWEEP_STEPS if self.k > 1 else 0
            expected = max(10 + 2 * self.k + search, self.budget.num_matvecs + 2 * left + search)
            self.budget.vectors = self.k + min(self.capacity, expected + 3)  # those of the result, and of the basis
            return expected, f"Lanczos, {self._num_accepted()} of {self.k} pairs"

        # After a breakdown a random vector goes on: the rest of the space has not been seen.
        refill = partial(self.space.add_random, self.generator)
        return lanczos_run(self.space, self.budget, enough, progress, choose=choose, refill=refill)

    def _sweep(self) -> str:
        """Look for what was missed: 'intruder' if something comes in above the k-th pair.

        What the basis does not span may hide in the vector that is still pending, or outside: so that one is multiplied, and then Lanczos
        runs from a fresh random start in the complement, until it would hardly have passed over an eigenvalue among the wanted, for up to
        three quarters of the products made. What grew from the first vector comes last, and what earlier searches left pending: the start
        is orthogonal to them, and may see nothing of an eigenvector that lies half among them. In a bulk, the eigenvectors passed over had
        24 to 78 % of their length squared there.
        """
        space, wanted = self.space, slice(self.k)
        # rows beside what has to stay, the two starts, and what grows from the first
        left = self.capacity - self.k - _BUFFER - len(space.pending) - 3
        most = max(_SWEEP_STEPS, min(max(3 * self.budget.num_matvecs // 4, _SWEEP_STEPS + 2), left))
        self._make_room(most + 3)
        assert self.ritz is not None
        before, queue, strand = self._ranks(self.ritz)[wanted].copy(), space.pending[-1:], list[int]()
        late, chain, first = space.pending[:-1], list[int](), set(queue)
        old, most_late = set(late), _LATE_ROUNDS * len(late) + 1
        if space.add_random(self.generator):
            queue.append(space.size - 1)
        intruder, size = False, space.size

        def enough() -> bool:
            nonlocal intruder, size
            index, grew, size = queue.pop(0), space.size > size, space.size
            ritz = self._update()
            ranks = self._ranks(ritz)[: len(before)]
            intruder = bool(np.any(ranks > before + ritz.tolerances(self.tol)[: len(before)]))
            if index in old or index in first:
                if index in old:
                    chain.append(index)
                if grew:
                    old.add(space.size - 1)
                    late.append(space.size - 1)
            else:
                strand.append(index)
                done = len(strand) >= most or (len(strand) >= _SWEEP_STEPS and self._chance_missed(strand) <= self.chance)
                if grew and not done:
                    queue.append(space.size - 1)
            if not queue and (not chain or (len(chain) < most_late and not self._clear_of_wanted(strand + chain))):
                queue.extend(late)
                late.clear()
            return intruder or not queue

        def progress() -> tuple[int, str]:
            return self.budget.num_matvecs + max(1, _SWEEP_STEPS - len(strand)), "search for missed eigenvalues"

        if queue and not lanczos_run(space, self.budget, enough, progress, choose=lambda: queue[0]):
            return "product or time budget used up before the search for missed eigenvalues ended"
        return "intruder" if intruder else "converged" if self._is_settled() else "unsettled"

    def _chance_missed(self, strand: list[int]) -> float:
        """How probably the strand has passed over an eigenvalue of the complement that belongs among the wanted."""
        assert self.ritz is not None
        last = float(self._ranks(self.ritz)[self.k - 1])
        ends = {"largest": [last], "smallest": [-last], "magnitude": [last, -last]}[self.which]
        outside = self.space.projected(strand)
        return max(chance_missed(outside, end, self.space.operator.size - self.space.size + len(strand)) for end in ends)

    def _chance_of_better(self) -> float:
        """How probably the run has passed over an eigenvalue beyond its best value, by so much that this would be wrong."""
        assert self.ritz is not None
        space, value = self.space, float(self.ritz.values[0])
        wrong = _WRONG * float(self.ritz.tolerances(self.tol)[0])
        ends = {"largest": [value + wrong], "smallest": [value - wrong], "magnitude": [abs(value) + wrong, -abs(value) - wrong]}[self.which]
        beyond = float(np.linalg.norm(space.couplings()[:, -1]))
        return max(chance_missed(space.projected(), end, space.operator.size, beyond) for end in ends)

    def _clear_of_wanted(self, indices: list[int]) -> bool:
        """Whether no Ritz value over these vectors can still climb among the wanted."""
        assert self.ritz is not None
        outside = self.space.ritz(indices)
        return bool((self._ranks(outside) + outside.outward).max() < self._ranks(self.ritz)[self.k - 1])

    def _ranks(self, ritz: Ritz) -> Array:
        """What pairs are compared by: value, -value or |value|."""
        return np.abs(ritz.values) if self.which == "magnitude" else -ritz.values if self.which == "smallest" else ritz.values

    def _update(self) -> Ritz:
        ritz = self.space.ritz()
        self.ritz = ritz.pick(np.argsort(-self._ranks(ritz), kind="stable"))
        return self.ritz

    def _num_accepted(self) -> int:
        return 0 if self.ritz is None else int(self.ritz.settled(self.tol)[: self.k].sum())

    def _is_settled(self) -> bool:
        """All wanted pairs within tolerance, and the next ones too or clear of the wanted."""
        ritz, k = self.ritz, self.k
        assert ritz is not None
        if len(ritz.values) < min(k + _BUFFER, self.space.operator.size):
            return False
        buffer, ranks, settled = slice(k, k + _BUFFER), self._ranks(ritz), ritz.settled(self.tol)
        clear = ranks[buffer] + ritz.outward[buffer] < ranks[k - 1]
        return bool(settled[:k].all() and (settled[buffer] | clear).all())

    def _most_useful(self) -> int:
        """The pending vector that carries most of the residuals of the wanted pairs."""
        pending = self.space.pending
        if len(pending) == 1 or self.ritz is None or len(self.ritz.values) < self.k:
            return pending[0]
        shares = self.space.couplings() @ self.ritz.coordinates[:, : self.k + _BUFFER]  # (pending, pairs)
        shares[:, self.ritz.settled(self.tol)[: self.k + _BUFFER]] *= 1e-3  # converged pairs decide only between equals
        return pending[int(np.argmax(np.linalg.norm(shares, axis=1)))]

    def _make_room(self, rows: int) -> None:
        """Thick restart where so many rows more would not fit."""
        if self.space.size + rows <= self.capacity or self.capacity >= self.space.operator.size or self.ritz is None:
            return
        room = self.capacity - len(self.space.pending) - rows
        # A third of what is left over is kept beside the wanted, by judgement: enough to go on from, and seldom another restart.
        keep = max(self.k + _BUFFER, min(self.k + _BUFFER + (self.capacity - self.k) // 3, room))
        self.from_random = False
        self.space.compress(self.ritz.values[:keep], self.ritz.coordinates[:, :keep])
        self._update()

    def _result(self, outcome: str) -> Eigenpairs:
        space, k, ritz = self.space, self.k, self.ritz
        known = 0 if ritz is None else min(k, len(ritz.values))
        values, residuals = np.full(k, np.nan), np.full(k, np.inf)
        columns: list[Tensor] = []
        if ritz is not None:
            values[:known], residuals[:known] = ritz.values[:known], ritz.residuals[:known]
            columns.append(space.vectors(ritz.coordinates[:, :known]))
        while space.size < k and space.add_random(self.generator):  # pairs that are missing still have orthonormal vectors
            pass
        columns += [space.rows.row(index)[:, None].to(space.operator.dtype) for index in space.pending[: k - known]]
        vectors = torch.cat(columns, dim=1)
        converged = np.zeros(k, dtype=bool)
        if ritz is not None and outcome == "converged":
            converged[:known] = ritz.converged(self.tol)[:known]
            if not converged.all():
                outcome = f"stopped at the rounding of the products: tol={self.tol:g} is out of reach"
        if self.which == "smallest":  # the results are by descending value
            flip = np.concatenate([np.arange(known)[::-1], np.arange(known, k)])
            values, residuals, converged, vectors = values[flip], residuals[flip], converged[flip], vectors[:, flip.tolist()]
        return Eigenpairs(
            torch.from_numpy(values),
            vectors,
            torch.from_numpy(residuals),
            torch.from_numpy(converged),
            self.budget.num_matvecs,
            self.budget.seconds,
            self.which,
            self.tol,
            outcome,
        )
