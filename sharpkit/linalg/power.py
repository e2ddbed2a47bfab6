"""Power iteration with deflation: the simplest eigensolver, kept for comparison; it says when a +- pair stalls it."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sharpkit._arguments import as_seed
from sharpkit._calls import public_call
from sharpkit._errors import NonFiniteError
from sharpkit._results import ProgressCallback
from sharpkit.linalg.krylov import BasisRows, Products, place_for, working_dtype
from sharpkit.linalg.lanczos import check_arguments
from sharpkit.linalg.results import Budget, Eigenpairs, warn_unconverged
from sharpkit.objective.memory import keeps_memory_limit
from sharpkit.operators.base import SymmetricOperator, as_operator

_DEFAULT_MATVECS = 1000  # for each pair, by judgement: ten times what a pair of a trained network takes to 1e-3 (50 to 100)
_STALL_CHECK = 10  # steps over which norm and Rayleigh quotient must have settled apart for a +- pair: by judgement


@public_call
@keeps_memory_limit
def power_iteration(
    operator: Any,
    k: int = 1,
    *,
    tol: float = 1e-3,
    seed: int = 0,
    initial: Tensor | None = None,
    max_matvecs: int | None = None,
    max_seconds: float | None = None,
    memory_limit: float | None = None,
    callback: ProgressCallback | None = None,
    name: str = "",
) -> Eigenpairs:
    """The k eigenvalues of largest magnitude, sign included, one after the other by power iteration.

    Each is iterated orthogonal to those before, until its residual ||A v - theta v|| is below ``tol`` times the largest magnitude, and
    what of it is orthogonal to the pairs before below ``tol`` times its own. The iteration cannot separate +lambda from -lambda: such a tie
    is recognised (||A v|| settles while v.(A v) does not reach it), flagged and named in ``outcome``. :func:`sharpkit.eigenpairs` needs
    several times fewer products and has no such gap.

    Args:
        operator: anything :func:`sharpkit.as_operator` takes.
        k: how many, 1 <= k <= n.
        tol: residual relative to the value; one that is 0 to rounding has converged.
        seed: seeds the random starts.
        initial: (n,) or (n, j) starts, used in order.
        max_matvecs, max_seconds: most products, by default 1000 per pair, and seconds.
        memory_limit: bytes that may be taken where the vectors live; by default half of what is free holds k of them at most.
        callback: called with a :class:`~sharpkit.Progress` after each product.
        name: of the result, which pages and comparisons show.

    Returns:
        the pairs by descending magnitude; what has not converged is flagged.

    Raises:
        ValueError: k outside 1..n, or another argument out of range.
        NonFiniteError: a product is not finite.
        OutOfMemoryError: k vectors do not fit.

    Example:
        >>> import torch, sharpkit as sk
        >>> pairs = sk.power_iteration(torch.diag(torch.tensor([-5.0, 2.0, 1.0])), k=1)
        >>> round(float(pairs.values[0]), 3)
        -5.0
    """
    operator = as_operator(operator)
    operator.check_alike("power_iteration", locals())  # before an argument is refused on one process alone
    products = Products(operator)
    k, tol = check_arguments(operator, k, "magnitude", tol, initial)
    limit = _DEFAULT_MATVECS * k if max_matvecs is None else max_matvecs
    budget = Budget(operator, max_matvecs=limit, max_seconds=max_seconds, callback=callback)
    generator = torch.Generator().manual_seed(as_seed(seed))
    basis = BasisRows(operator, offload=place_for(operator, k, False), most=k)
    pairs: list[tuple[float, float, str]] = []
    scale = 0.0
    for number in range(k):
        vector = _start(operator, basis, initial, number, generator)
        stage = f"power iteration, pair {number + 1} of {k}"
        value, residual, outcome, vector = _iterate(basis, products, vector, scale, tol, budget, stage)
        scale = max(scale, abs(value)) if np.isfinite(value) else scale
        basis.append(vector)
        pairs.append((value, residual, outcome))
    # by magnitude, pairs that the budget left without a value last
    order = sorted(range(k), key=lambda j: -abs(pairs[j][0]) if np.isfinite(pairs[j][0]) else np.inf)
    values, residuals, outcomes = zip(*(pairs[j] for j in order), strict=True)
    converged = [outcome == "converged" for outcome in outcomes]
    outcome = next((outcome for _, _, outcome in pairs if outcome != "converged"), "converged")
    if not all(converged):
        warn_unconverged(
            f"{sum(converged)} of {k} pairs converged after {budget.num_matvecs} products of power iteration: {outcome}. "
            "eigenpairs() needs far fewer products."
        )
    as_tensor = partial(torch.tensor, dtype=torch.float64)
    return Eigenpairs(
        as_tensor(values),
        torch.stack([basis.row(j) for j in order], dim=1).to(operator.dtype),
        as_tensor(residuals),
        torch.tensor(converged),
        budget.num_matvecs,
        budget.seconds,
        "magnitude",
        tol,
        outcome,
    )


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


def _iterate(
    basis: BasisRows, products: Products, vector: Tensor, scale: float, tol: float, budget: Budget, stage: str
) -> tuple[float, float, str, Tensor]:
    """Value, residual, outcome and vector of the leading pair of the complement."""
    operator, value, residual = basis.operator, float("nan"), float("inf")
    eps = float(torch.finfo(basis.dtype).eps)
    history: list[tuple[float, float]] = []
    while budget.allows():
        product = products(vector)
        rest, _ = basis.orthogonalise(product)
        full, inside = operator.dot(product, product), operator.dot(rest, rest)
        theta, grown, length = torch.stack([operator.dot(vector, product), inside, full]).cpu().double().numpy()
        if not np.isfinite([theta, grown, length]).all():
            raise NonFiniteError(f"a product with {operator!r} contains NaN or infinity; check the loss on this data")
        unit, root = products.unit, float(grown) ** 0.5
        value, norm, scale = unit * float(theta), unit * root, max(scale, unit * float(length) ** 0.5)
        # ||A v - theta v||^2 = ||A v||^2 - theta^2 for a unit vector, a difference that rounds to a few eps of the scale
        residual, beyond = (
            float(np.hypot(unit * max(float(square - theta**2), 0.0) ** 0.5, 4 * eps * scale + products.underflow))
            for square in (length, grown)
        )
        accuracy, rounding = tol * (abs(value) if basis.size else scale), 8 * eps * scale
        if residual <= max(tol * scale, rounding) and beyond <= max(accuracy, rounding):
            reached = basis.size == 0 or rounding <= accuracy or abs(value) <= rounding
            outcome = "converged" if reached else f"stopped at the rounding of {basis.dtype}: tol={tol:g} is out of reach"
            return value, residual, outcome, vector
        history.append((norm, value))
        budget.report(budget.num_matvecs + 10, stage)
        if _is_tie(history, tol * scale):
            tie = f"eigenvalues near +{norm:.6g} and -{norm:.6g} tie in magnitude: use eigenpairs(which='magnitude')"
            return value, residual, tie, vector
        vector = rest / root
    return value, residual, "product or time budget used up", vector


def _is_tie(history: list[tuple[float, float]], accuracy: float) -> bool:
    """Norm and Rayleigh quotient both settled, apart from each other."""
    if len(history) < 3 * _STALL_CHECK:
        return False
    norms, values = np.array(history[-_STALL_CHECK:]).T
    gap = float(norms[-1] - abs(values[-1]))
    settled = max(float(np.ptp(norms)), float(np.ptp(values)))
    return settled <= 1e-3 * min(gap, accuracy * 10) and gap > accuracy
