"""The diagonal and the Frobenius norm from random probes."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sharpkit._arguments import as_seed, real, whole
from sharpkit._calls import public_call
from sharpkit._checkpoint import resumable
from sharpkit._results import ProgressCallback, Result, student_factor
from sharpkit.linalg.krylov import KrylovSpace, affordable_rows
from sharpkit.linalg.leave_one_out import LeaveOneOut
from sharpkit.linalg.results import HALF, Budget, Estimate, warn_unconverged
from sharpkit.linalg.trace import DEFAULT_MATVECS, AdaptiveEstimate, Tolerance, block_size, rademacher
from sharpkit.objective.memory import keeps_memory_limit
from sharpkit.operators.base import SymmetricOperator, as_operator, operator_call

_WORKING = 8  # vectors besides, of products made at once and of means: by judgement
_LEAST = 16  # probes below which nothing is approximated: by judgement, the spread of fewer tells too little of what that is worth
_PILOT, _PILOT_SHARE = 8, 8  # probes that decide whether a Krylov basis pays, or one in so many: by judgement
# The pilot's spread with an approximation relative to that without, up to which a basis pays: .2 to .75 on Hessians of networks, .9 or more
# where nothing stands out (as for the shared errors below). A quarter of the products for it: an eighth or a half made the error 2 to 7 %
# larger on three such Hessians, no basis 7 to 9 % (experiments/diagonal_error.py).
_WORTH, _BASIS_SHARE = 0.7, 4
_ENTRIES = 2**22  # numbers of each table made at a time, 32 MB in float64: by judgement
_SAMPLED = 2**13  # entries that choose the shift: by judgement, the spread summed over them is known to a few percent
# By judgement: the errors of nine spectra of 100 to 1500 rows were 1.0 to 1.2 times their spread, 1.05 at most below 0.1 rows.
_SHARED = 0.5
_EXHAUSTED = 1e-5  # of an image, what is left outside the basis: by judgement, a hundred roundings of float32


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

    def rounded(self, rounding: float) -> DiagonalEstimate:
        """The same with errors of twice the rounding of a half-precision type at least, as those of other estimates."""
        if rounding < HALF:
            return self
        # An entry is a difference of terms, so small ones are off by more than their own rounding: with a fifth of the typical entry, two
        # errors held 99 % of the entries of exact diagonals of small networks, without it 90 % (tests/linalg/test_rounding.py).
        sizes = torch.hypot(self.value, 0.2 * self.value.square().mean().sqrt())
        return replace(self, stderr=torch.maximum(self.stderr, 2 * rounding * sizes))


@public_call
@keeps_memory_limit
@resumable(operator_call)
def diagonal(
    operator: Any,
    *,
    num_probes: int = 100,
    seed: int = 0,
    max_matvecs: int | None = None,
    max_seconds: float | None = None,
    memory_limit: float | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    callback: ProgressCallback | None = None,
    name: str = "",
) -> DiagonalEstimate:
    """The diagonal of A as the mean of z * (A z) over Rademacher probes z.

    The variance of entry i is sum_{j != i} A_ij^2: a diagonal matrix is exact after one probe. From 16 probes on, each of them estimates
    only what an approximation of A from all the others leaves, where that makes the spread smaller; and where the first probes show that a
    few directions dominate, a quarter of the products computes those exactly on a Krylov basis Q, and probes see (1 - QQ^T) A (1 - QQ^T).
    With ``num_probes`` >= n an orthonormal basis takes the probes' place and the result is exact.

    Args:
        operator: anything :func:`sharpkit.as_operator` takes.
        num_probes: products to spend, at least 2.
        seed: seeds the probes.
        max_matvecs, max_seconds: most products and seconds.
        memory_limit: bytes that may be taken where the vectors live; by default half of what is free.
        checkpoint: a folder from which the call goes on if it is killed and made again (docs/guide.md); until it ends it takes
            a vector of disk for each product.
        callback: called with a :class:`~sharpkit.Progress` after each product, or several made at once.
        name: of the result, which pages and comparisons show.

    Raises:
        ValueError: fewer than two probes.
        NonFiniteError: a product is not finite.

    References:
        Bekas, Kokiopoulou and Saad, "An estimator for the diagonal of a matrix" (2007); Epperly, Tropp and Webber, arXiv 2301.07825 (the
        estimates that leave one probe out).

    Example:
        >>> import torch, sharpkit as sk
        >>> sk.diagonal(torch.tensor([[2.0, 1.0], [1.0, 3.0]])).value.round(decimals=4).tolist()
        [2.0, 3.0]
    """
    operator = as_operator(operator)
    operator.check_alike("diagonal", locals())  # before an argument is refused on one process alone
    num_probes = whole("num_probes", num_probes, least=2, hint="their spread gives the error")
    max_matvecs = None if max_matvecs is None else whole("max_matvecs", max_matvecs)
    budget = Budget(operator, max_matvecs=max_matvecs, max_seconds=max_seconds, callback=callback)
    generator = torch.Generator().manual_seed(as_seed(seed))
    # n products over a basis are exact, and no dearer than as many probes
    if num_probes >= operator.size and budget.allows(operator.size):
        exact = _exact_diagonal(operator, generator, budget)
        if exact is not None:  # None if the time was up
            return exact
    planned = min(num_probes, max_matvecs or num_probes)
    probes = _Probes(operator, generator, budget, planned)
    probes.draw(max(_PILOT, planned // _PILOT_SHARE))
    if probes.stand_out():
        probes.deflate(planned // _BASIS_SHARE)
    probes.draw(planned)
    value, stderr = probes.estimate()
    if not (complete := probes.exhausted or budget.num_matvecs >= num_probes):
        warn_unconverged(f"the budget ended after {budget.num_matvecs} of {num_probes} probes: see stderr")
    return DiagonalEstimate(value, stderr, budget.num_matvecs, budget.seconds, complete).rounded(operator.rounding)


class _Probes:
    """Samples of the diagonal, a product each; with their vectors, where memory allows and they are enough for that to pay.

    Args:
        operator: A.
        generator: draws the probes.
        budget: stops the estimate when exhausted.
        most: products in all.
    """

    def __init__(self, operator: SymmetricOperator, generator: torch.Generator, budget: Budget, most: int) -> None:
        self.operator, self.generator, self.budget, self.most = operator, generator, budget, most
        self.space = KrylovSpace(operator)
        self.pairs: list[tuple[Tensor, Tensor]] | None = [] if _LEAST <= most < operator.size else None  # z, and what is outside of A z
        self.mean: Tensor | None = None
        self.squares: Tensor | None = None
        self.done, self.exhausted = 0, False

    def draw(self, most: int) -> None:
        """Probes until so many products are made in all."""
        while not self.exhausted and (left := min(most, self.most) - self.budget.num_matvecs) > 0 and self.budget.allows():
            probes = rademacher(self.operator, self.generator, block_size(self.operator, self.budget, left))
            inside = self._coefficients(probes) if self.space.expanded else None
            outer = probes if inside is None else self._less(probes, inside)
            products = self.operator @ outer.to(self.operator.dtype)
            for i, (probe, product) in enumerate(zip(probes.T, products.T, strict=True)):
                if self.pairs is not None and not self.done and affordable_rows(self.operator) < 2 * self.most + _WORKING:
                    self.pairs = None
                if self.pairs is None:
                    self._add(probe * product)
                else:
                    product = self.space.products.in_units(product)
                    self.pairs.append((probe, product.clone() if inside is None else self._less(product, self._coefficients(product))))
                self.done += 1
                waiting = 2 * (probes.shape[1] - i - 1)
                self.budget.vectors = waiting + _WORKING + (self.space.size + 2 * self.done if self.pairs is not None else 0)
                self.budget.report(self.most, "diagonal")

    def _add(self, sample: Tensor) -> None:
        if self.mean is None or self.squares is None:
            self.mean, self.squares = sample.clone(), torch.zeros_like(sample)
        else:  # Welford's recurrence
            change = sample - self.mean
            self.mean += change / (self.done + 1)
            self.squares += change * (sample - self.mean)

    def _coefficients(self, vectors: Tensor) -> Tensor:
        """In the basis, (size,) or (size, k), 0 for what has not been multiplied."""
        coefficients = self.space.rows.coefficients(vectors.to(self.space.dtype))
        coefficients[self.space.pending] = 0.0
        return coefficients

    def _less(self, vectors: Tensor, coefficients: Tensor) -> Tensor:
        rest = vectors.to(self.space.dtype, copy=True)
        self.space.rows.subtract_(rest, coefficients)
        return rest

    def stand_out(self) -> bool:
        """Whether an approximation from these few probes lowers their spread enough for a basis to pay."""
        if not self.pairs or len(self.pairs) < _PILOT:
            return False
        others = self._leave_one_out()
        spread = self._spread(others)
        return spread(others.best_shift(spread, self._rounding())) < _WORTH * spread(math.inf)

    def deflate(self, steps: int) -> None:
        """A Krylov basis, from a start of its own so that the probes drawn so far stay good: they are freed of it without new products."""
        space, pairs = self.space, self.pairs or []
        before = [float(self.operator.dot(image, image)) for _, image in pairs]
        space.add_random(self.generator)
        while space.pending and len(space.expanded) < steps and self.budget.allows():
            space.expand(space.pending[0])
            self.budget.vectors = _WORKING + space.size + 2 * self.done
            self.budget.report(self.most, "diagonal")
        outward = torch.from_numpy(space.couplings() / space.products.unit)
        for i, (probe, image) in enumerate(pairs):
            inside = space.rows.coefficients(probe.to(space.dtype))[space.expanded]
            removed = space.rows.coefficients(image)
            removed[space.pending] = outward.to(inside) @ inside  # where A Q leads out of Q
            pairs[i] = probe, self._less(image, removed)
        self.exhausted = all(
            float(self.operator.dot(image, image)) <= _EXHAUSTED**2 * size for (_, image), size in zip(pairs, before, strict=True)
        )

    def _rounding(self) -> float:
        return max(self.operator.rounding, self.space.eps)

    def _leave_one_out(self) -> LeaveOneOut:
        probes, images = (torch.stack(part).T for part in zip(*(self.pairs or []), strict=True))
        inner, gram = (self.operator.dot(part.to(images), images).cpu().double().numpy() for part in (probes, images))
        return LeaveOneOut(inner, gram)

    def _spread(self, others: LeaveOneOut) -> Callable[[float], float]:
        """Summed variances of some entries, given the shift."""
        pairs, length = self.pairs or [], len((self.pairs or [])[0][0])
        generator = torch.Generator().manual_seed(0)  # its own, so that the probes do not depend on it
        chosen = torch.randint(length, (_SAMPLED,), generator=generator) if length > _SAMPLED else torch.arange(length)
        probes, images = (torch.stack([vector[chosen.to(vector.device)] for vector in part], dim=1) for part in zip(*pairs, strict=True))

        def spread(shift: float) -> float:
            deviations = others.diagonals(probes.to(images), images, shift).std(dim=1)
            return self.operator.agree(float(self.operator.dot(deviations, deviations)))

        return spread

    def estimate(self) -> tuple[Tensor, Tensor]:
        """Value and standard error."""
        if self.pairs:
            return self._approximated(self.pairs)
        if self.mean is None or self.squares is None:
            raise ValueError("the time budget ended before the first product: raise max_seconds")
        done = self.done
        stderr = (self.squares / max(1, done - 1) / done).sqrt() * student_factor(done)
        return self.mean, stderr if done > 1 else torch.full_like(self.mean, math.inf)

    def _approximated(self, pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        m, space, length = len(pairs), self.space, len(pairs[0][0])
        others = self._leave_one_out()
        shift = math.inf if m < _PILOT or self.exhausted else others.best_shift(self._spread(others), self._rounding())
        # estimates that share what approximates the matrix agree more than they are right, the more of the rows they take
        factor = student_factor(m) * (1.0 if math.isinf(shift) else 1 + _SHARED * m / self.operator.size)
        value = torch.empty(length, dtype=space.dtype, device=self.operator.device)
        error = torch.zeros_like(value)
        # a few entries at a time: tables of all would be further sets of vectors
        for entries in torch.split(torch.arange(length), max(1, _ENTRIES // max(m, space.size))):
            here = slice(int(entries[0]), int(entries[-1]) + 1)
            probes, images = (torch.stack([vector[here] for vector in part], dim=1) for part in zip(*pairs, strict=True))
            estimates = others.diagonals(probes.to(images), images, shift)
            value[here] = self._known(here)
            if not self.exhausted:
                value[here] += estimates.mean(dim=1)
                error[here] = estimates.std(dim=1) / m**0.5 * factor if m > 1 else math.inf
        unit = space.products.unit
        return (value * unit).to(self.operator.dtype), (error * unit).to(self.operator.dtype)

    def _known(self, here: slice) -> Tensor | float:
        """Entries of diag(QQ^T A + A QQ^T - QQ^T A QQ^T), for which A Q = Q H is at hand."""
        space = self.space
        if not space.expanded:
            return 0.0
        rows = torch.stack([space.rows.row(j)[here] for j in range(space.size)])
        inside, out = (torch.from_numpy(part / space.products.unit).to(rows) for part in (space.projected(), space.couplings()))
        basis = rows[space.expanded]
        return (basis * (inside @ basis + 2 * out.T @ rows[space.pending])).sum(dim=0)


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
    return DiagonalEstimate(value, torch.zeros_like(value), budget.num_matvecs, budget.seconds).rounded(operator.rounding)


@public_call
@keeps_memory_limit
@resumable(operator_call)
def frobenius_norm(
    operator: Any,
    *,
    rtol: float = 0.01,
    seed: int = 0,
    max_matvecs: int | None = None,
    max_seconds: float | None = None,
    memory_limit: float | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    callback: ProgressCallback | None = None,
    name: str = "",
) -> Estimate:
    """||A||_F to a relative standard error of ``rtol``.

    E ||A z||^2 = ||A||_F^2 for random z. If few probes do not settle it, a Krylov basis Q computes the leading eigenvalues exactly:
    ||A||_F^2 = ||A Q||_F^2 + E ||A P z||^2 with P = 1 - Q Q^T, as in :func:`sharpkit.trace`.

    Args:
        operator: anything :func:`sharpkit.as_operator` takes.
        rtol: relative standard error of the norm to reach.
        seed: seeds the probes.
        max_matvecs, max_seconds: most products, by default 2000, and seconds.
        memory_limit: bytes that may be taken where the vectors live; by default half of what is free.
        checkpoint: a folder from which the call goes on if it is killed and made again (docs/guide.md); until it ends it takes
            a vector of disk for each product.
        callback: called with a :class:`~sharpkit.Progress` after each product, or several made at once.
        name: of the result, which pages and comparisons show.

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
    rtol, seed = real("rtol", rtol, above=0), as_seed(seed)
    limit = DEFAULT_MATVECS if max_matvecs is None else whole("max_matvecs", max_matvecs)
    budget = Budget(operator, max_matvecs=limit, max_seconds=max_seconds, callback=callback)
    # the relative error of a root is half that of the square
    value, stderr, how = AdaptiveEstimate(operator, Tolerance(2 * rtol), budget, seed=seed, limit=limit, squared=True).estimate("auto")
    norm = Estimate(value, stderr, budget.num_matvecs, budget.seconds, how).root().rounded(operator.rounding)
    converged = norm.stderr <= rtol * norm.value
    if not converged:
        warn_unconverged(
            f"||A||_F = {norm.value:.4g} has a standard error of {norm.stderr:.2g} after {budget.num_matvecs} products, "
            f"{rtol * norm.value:.2g} was asked: raise max_matvecs or rtol."
        )
    return replace(norm, converged=converged)
