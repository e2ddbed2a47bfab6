"""Power iteration with deflation: the simplest eigensolver, kept for comparison; it says when a +- pair stalls it."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sharpkit._errors import ConvergenceWarning, NonFiniteError
from sharpkit._results import ProgressCallback
from sharpkit.linalg.krylov import BasisRows, working_dtype
from sharpkit.linalg.lanczos import check_arguments
from sharpkit.linalg.results import Budget, Eigenpairs
from sharpkit.operators.base import SymmetricOperator, as_operator

_DEFAULT_MATVECS = 1000  # for each pair, by judgement: ten times what a pair of a trained network takes to 1e-3 (50 to 100)
_STALL_CHECK = 10  # steps over which norm and Rayleigh quotient must have settled apart for a +- pair: by judgement


def power_iteration(
    operator: Any,
    k: int = 1,
    *,
    tol: float = 1e-3,
    seed: int = 0,
    initial: Tensor | None = None,
    max_matvecs: int | None = None,
    max_seconds: float | None = None,
    callback: ProgressCallback | None = None,
) -> Eigenpairs:
    """The k eigenvalues of largest magnitude, sign included, one after the other by power iteration.

    Each is iterated orthogonal to those before, until its residual ||A v - theta v|| is below ``tol`` times the largest magnitude. The
    iteration cannot separate +lambda from -lambda: such a tie is recognised (||A v|| settles while v.(A v) does not reach it), flagged and
    named in ``outcome``. :func:`sharpkit.eigenpairs` needs several times fewer products and has no such gap.

    Args:
        operator: anything :func:`sharpkit.as_operator` takes.
        k: how many, 1 <= k <= n.
        tol: residual relative to the largest magnitude.
        seed: seeds the random starts.
        initial: (n,) or (n, j) starts, used in order.
        max_matvecs: most products, by default 1000 per pair.
        max_seconds: most seconds.
        callback: called with a :class:`~sharpkit.Progress` after each product.

    Returns:
        the pairs by descending magnitude; what has not converged is flagged.

    Raises:
        ValueError: k outside 1..n, or another argument out of range.
        NonFiniteError: a product is not finite.

    Example:
        >>> import torch, sharpkit as sk
        >>> pairs = sk.power_iteration(torch.diag(torch.tensor([-5.0, 2.0, 1.0])), k=1)
        >>> round(float(pairs.values[0]), 3)
        -5.0
    """
    operator = as_operator(operator)
    operator.check_alike("power_iteration", locals())  # before an argument is refused on one process alone
    check_arguments(operator, k, "magnitude", tol, initial)
    limit = _DEFAULT_MATVECS * k if max_matvecs is None else max_matvecs
    budget = Budget(operator, max_matvecs=limit, max_seconds=max_seconds, callback=callback)
    generator = torch.Generator().manual_seed(seed)
    basis = BasisRows(operator)
    pairs: list[tuple[float, float, str]] = []
    scale = 0.0
    for number in range(k):
        vector = _start(operator, basis, initial, number, generator)
        value, residual, outcome, vector = _iterate(basis, vector, scale, tol, budget, f"power iteration, pair {number + 1} of {k}")
        scale = max(scale, abs(value)) if np.isfinite(value) else scale
        basis.append(vector)
        pairs.append((value, residual, outcome))
    return _result(operator, basis, pairs, tol, budget)


def _start(operator: SymmetricOperator, basis: BasisRows, initial: Tensor | None, number: int, generator: torch.Generator) -> Tensor:
    """A unit vector orthogonal to the pairs so far: the given one if something of it is left, else a random one."""
    candidates = [operator.random_vectors(1, generator=generator)[:, 0].to(working_dtype(operator))]
    if initial is not None:
        given = initial if initial.ndim == 2 else initial[:, None]
        if len(given) != len(candidates[0]):
            raise ValueError(f"initial must have {len(candidates[0])} rows, got shape {tuple(initial.shape)}")
        if number < given.shape[1]:
            candidates.insert(0, given[:, number].to(candidates[0]))
    while True:
        candidate = candidates.pop(0)
        rest, _ = basis.orthogonalise(candidate / operator.dot(candidate, candidate).sqrt())
        norm = float(operator.dot(rest, rest)) ** 0.5
        # 1e-5: far above float32 rounding, by judgement; NaN and 0 fail the comparison, and then the random one is taken
        if norm > 1e-5 or not candidates:
            rest, _ = basis.orthogonalise(rest / norm)
            unit: Tensor = rest / operator.dot(rest, rest).sqrt()
            return unit


def _iterate(basis: BasisRows, vector: Tensor, scale: float, tol: float, budget: Budget, stage: str) -> tuple[float, float, str, Tensor]:
    """Value, residual, outcome and vector of the leading pair of the complement."""
    operator, value, residual = basis.operator, float("nan"), float("inf")
    eps = float(torch.finfo(basis.dtype).eps)
    history: list[tuple[float, float]] = []
    while budget.allows():
        product = operator.multiply(vector.to(operator.dtype)).to(basis.dtype)
        rest, _ = basis.orthogonalise(product)
        full, inside = operator.dot(product, product), operator.dot(rest, rest)
        theta, grown, length = torch.stack([operator.dot(vector, product), inside, full]).cpu().double().numpy()
        if not np.isfinite([theta, grown, length]).all():
            raise NonFiniteError(f"a product with {operator!r} contains NaN or infinity; check the loss on this data")
        value, norm = float(theta), float(grown) ** 0.5
        scale = max(scale, float(length) ** 0.5)
        # ||A v - theta v||^2 = ||A v||^2 - theta^2 for a unit vector, a difference that rounds to a few eps of the scale
        residual = float(np.hypot(max(float(length) - value**2, 0.0) ** 0.5, 4 * eps * scale))
        if residual <= max(tol, 8 * eps) * scale:
            return value, residual, "converged", vector
        history.append((norm, value))
        budget.report(budget.num_matvecs + 10, stage)
        if _is_tie(history, tol * scale):
            tie = f"eigenvalues near +{norm:.6g} and -{norm:.6g} tie in magnitude: use eigenpairs(which='magnitude')"
            return value, residual, tie, vector
        vector = rest / norm
    return value, residual, "product or time budget used up", vector


def _is_tie(history: list[tuple[float, float]], accuracy: float) -> bool:
    """Norm and Rayleigh quotient both settled, apart from each other."""
    if len(history) < 3 * _STALL_CHECK:
        return False
    norms, values = np.array(history[-_STALL_CHECK:]).T
    gap = float(norms[-1] - abs(values[-1]))
    settled = max(float(np.ptp(norms)), float(np.ptp(values)))
    return settled <= 1e-3 * min(gap, accuracy * 10) and gap > accuracy


def _result(operator: SymmetricOperator, basis: BasisRows, pairs: list[tuple[float, float, str]], tol: float, budget: Budget) -> Eigenpairs:
    order = sorted(range(len(pairs)), key=lambda j: -abs(pairs[j][0]) if np.isfinite(pairs[j][0]) else np.inf)
    values = torch.tensor([pairs[j][0] for j in order], dtype=torch.float64)
    residuals = torch.tensor([pairs[j][1] for j in order], dtype=torch.float64)
    converged = torch.tensor([pairs[j][2] == "converged" for j in order])
    vectors = torch.stack([basis.row(j) for j in order], dim=1).to(operator.dtype)
    outcome = next((why for _, _, why in pairs if why != "converged"), "converged")
    if not bool(converged.all()):
        warnings.warn(
            f"{int(converged.sum())} of {len(pairs)} pairs converged after {budget.num_matvecs} products of power iteration: {outcome}. "
            "eigenpairs() needs far fewer products.",
            ConvergenceWarning,
            stacklevel=3,
        )
    return Eigenpairs(values, vectors, residuals, converged, budget.num_matvecs, budget.seconds, "magnitude", tol, outcome)
