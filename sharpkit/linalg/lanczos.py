"""Extreme eigenpairs by Lanczos with full re-orthogonalisation, thick restart, warm start and a search for missed ones."""

from __future__ import annotations

import warnings
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from sharpkit._errors import ConvergenceWarning
from sharpkit.linalg.basis import affordable_rows
from sharpkit.linalg.krylov import KrylovSpace
from sharpkit.linalg.progress import Budget, ProgressCallback
from sharpkit.linalg.results import Eigenpairs
from sharpkit.linalg.search import Search
from sharpkit.operators.algebra import as_operator
from sharpkit.operators.base import SymmetricOperator

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
        callback: called with a :class:`~sharpkit.linalg.progress.Progress` after each product.

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
