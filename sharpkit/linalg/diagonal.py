"""The diagonal and the Frobenius norm from random probes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sharpkit._arguments import as_seed, real, whole
from sharpkit._results import ProgressCallback, Result, student_factor
from sharpkit.linalg.krylov import BasisRows, KrylovSpace, affordable_rows
from sharpkit.linalg.results import HALF, Budget, Estimate, warn_unconverged
from sharpkit.linalg.trace import DEFAULT_MATVECS, SHARED_BASIS, AdaptiveEstimate, Tolerance, block_size, rademacher
from sharpkit.objective.memory import keeps_memory_limit
from sharpkit.operators.base import SymmetricOperator, as_operator

_WORKING = 8  # vectors besides, of products made at once and of means: by judgement
_LEAST_HALF = 8  # probes that tell whether a subspace pays: by judgement, as for the spread of a pilot
_WORTH = 0.3  # noise outside the range relative to that of plain probes, of which there would be twice as many: by judgement below 1 / 2
_ENTRIES = 2**22  # numbers of each table made at a time, 32 MB in float64: by judgement
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


@keeps_memory_limit
def diagonal(
    operator: Any,
    *,
    num_probes: int = 100,
    seed: int = 0,
    max_matvecs: int | None = None,
    max_seconds: float | None = None,
    memory_limit: float | None = None,
    callback: ProgressCallback | None = None,
) -> DiagonalEstimate:
    """The diagonal of A as the mean of z * (A z) over Rademacher probes z.

    The variance of entry i is sum_{j != i} A_ij^2: a diagonal matrix is exact after one probe. Where half the probes show that a few
    directions hold most of it, the other half of the products multiplies their range instead, and only what lies outside is left to
    chance (XDiag). With ``num_probes`` >= n an orthonormal basis takes the probes' place and the result is exact.

    Args:
        operator: anything :func:`sharpkit.as_operator` takes.
        num_probes: products to spend, at least 2.
        seed: seeds the probes.
        max_matvecs, max_seconds: most products and seconds.
        memory_limit: bytes that may be taken where the vectors live; by default half of what is free.
        callback: called with a :class:`~sharpkit.Progress` after each product, or several made at once.

    Raises:
        ValueError: fewer than two probes.
        NonFiniteError: a product is not finite.

    References:
        Bekas, Kokiopoulou and Saad, "An estimator for the diagonal of a matrix" (2007); Epperly, Tropp and Webber, arXiv 2301.07825.

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
    mean = squares = None
    waiting: list[tuple[Tensor, Tensor]] = []  # probes and their products
    done, half = 0, min(num_probes, max_matvecs or num_probes) // 2
    pairs: list[tuple[Tensor, Tensor]] | None = [] if half >= _LEAST_HALF and num_probes < operator.size else None
    while done < num_probes and (waiting or budget.allows()):
        if not waiting:  # +-1: A_ii itself adds no variance
            count = block_size(operator, budget, (half if done < half else num_probes) - done)
            probes = rademacher(operator, generator, count)
            waiting = list(zip(probes.T, (operator @ probes).T, strict=True))
        probe, product = waiting.pop(0)
        sample = product * probe
        done += 1
        if mean is None or squares is None:
            mean, squares = sample.clone(), torch.zeros_like(sample)
        else:  # Welford's recurrence
            change = sample - mean
            mean += change / done
            squares += change * (sample - mean)
        budget.vectors = (2 * len(waiting) if pairs is None else 4 * half) + _WORKING
        budget.report(num_probes, "diagonal")
        if pairs is not None:
            # four sets of vectors are in memory at the end: probes and their products, the range and its own
            if not pairs and affordable_rows(operator) < 4 * half + _WORKING:
                pairs = None
            else:
                pairs.append((probe, sample * probe))
        if pairs is not None and done == half:
            deflated = _leave_one_out(operator, pairs, mean, budget) if budget.allows(half) else None
            if deflated is not None:
                if not (complete := num_probes - 2 * half <= 1):
                    warn_unconverged(f"the budget ended after {2 * half} of {num_probes} probes: see stderr")
                return DiagonalEstimate(*deflated, budget.num_matvecs, budget.seconds, complete).rounded(operator.rounding)
            pairs = None
    if mean is None or squares is None:
        raise ValueError("the time budget ended before the first product: raise max_seconds")
    stderr = (squares / max(1, done - 1) / done).sqrt() * student_factor(done) if done > 1 else torch.full_like(mean, math.inf)
    if done < num_probes:
        warn_unconverged(f"the budget ended after {done} of {num_probes} probes: see stderr")
    return DiagonalEstimate(mean, stderr, budget.num_matvecs, budget.seconds, done == num_probes).rounded(operator.rounding)


def _leave_one_out(
    operator: SymmetricOperator, pairs: list[tuple[Tensor, Tensor]], plain: Tensor, budget: Budget
) -> tuple[Tensor, Tensor] | None:
    """XDiag: value and error of the m estimates that leave probe i out of the basis Q of the images, or None where plain probes do better.

    With s_i the unit vector that is orthogonal to all images but the i-th, Q without it is Q (1 - s_i s_i^T), and A z_i leads out of that
    by Q s_i (s_i . r_i), r_i being the coordinates of A z_i. So the i-th estimate is, entry by entry,

        diag(Q Q^T A) - (Q s_i) * (A Q s_i) + z_i * (Q s_i) (s_i . r_i).
    """
    m, rows = len(pairs), BasisRows(operator)
    coordinates, energy, exact = np.zeros((m, m)), 0.0, False
    for i, (_, image) in enumerate(pairs):
        rest, inside = rows.orthogonalise(image.to(rows.dtype))
        whole, beyond = float(operator.dot(image, image)), float(operator.dot(rest, rest))
        energy += whole / m
        if not math.isfinite(whole) or whole == 0.0:  # squares that the type cannot hold: plain probes have none
            return None
        if beyond <= whole * _EXHAUSTED**2:  # the range is exhausted, and Q Q^T A is A
            exact = True
            break
        coordinates[: len(inside), i], coordinates[len(inside), i] = inside.cpu().numpy(), beyond**0.5
        rows.append(rest / beyond**0.5)
    if not exact:
        inverse = np.linalg.inv(coordinates).T
        dual = inverse / np.linalg.norm(inverse, axis=0)
        left = (dual * coordinates).sum(axis=0)  # s_i . r_i: what a new image has outside
        noise = energy - float(operator.dot(plain, plain))  # the diagonal itself adds none
        if not float((left**2).mean()) < _WORTH * noise:
            return None
    images, done = torch.zeros(rows.size, len(plain), dtype=rows.dtype, device=plain.device), 0
    while done < rows.size:
        block = range(done, done + block_size(operator, budget, rows.size - done))
        basis = torch.stack([rows.row(j) for j in block]).to(operator.dtype)
        images[done : block.stop] = (operator @ basis.T).T
        done = block.stop
        budget.report(2 * m, "diagonal, leading subspace")
    value, error = torch.empty_like(plain), torch.zeros_like(plain)
    for entries in torch.split(torch.arange(len(plain)), max(1, _ENTRIES // m)):  # a few at a time: every table of all would be a fifth set
        here = slice(int(entries[0]), int(entries[-1]) + 1)
        basis, products = (torch.stack([row[here] for row in each]) for each in (map(rows.row, range(rows.size)), images))  # (m, entries)
        known = (basis * products).sum(dim=0)
        if exact:
            value[here] = known
            continue
        mixing = torch.from_numpy(dual.T).to(basis)
        outer, probes = mixing @ basis, torch.stack([probe[here] for probe, _ in pairs]).to(basis)
        estimates = known + outer * (probes * torch.from_numpy(left).to(basis)[:, None] - mixing @ products)
        value[here] = estimates.mean(dim=0)
        error[here] = estimates.std(dim=0) / m**0.5 * (SHARED_BASIS * student_factor(m))
    return value, error


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


@keeps_memory_limit
def frobenius_norm(
    operator: Any,
    *,
    rtol: float = 0.01,
    seed: int = 0,
    max_matvecs: int | None = None,
    max_seconds: float | None = None,
    memory_limit: float | None = None,
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
        memory_limit: bytes that may be taken where the vectors live; by default half of what is free.
        callback: called with a :class:`~sharpkit.Progress` after each product, or several made at once.

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
