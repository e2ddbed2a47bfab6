"""The extreme eigenvalues of drawn batches' Hessians, measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from sharpkit._errors import NotSymmetricError
from sharpkit.analysis.pilot import Ledger
from sharpkit.analysis.pool import SamplePool
from sharpkit.linalg.overview import both_ends
from sharpkit.linalg.results import standard_error
from sharpkit.operators.base import SymmetricOperator
from sharpkit.operators.hessian import HessianOperator

_TOL = 1e-2
_NOTHING = 1e-3  # of the full data's lambda_max: a batch Hessian below that may be rounding alone


@dataclass(frozen=True)
class DirectPoint:
    """The extreme eigenvalues of batch Hessians, measured on drawn batches.

    Attributes:
        batch_size: B.
        largest, smallest: (k,) per drawn batch.
    """

    batch_size: int
    largest: tuple[float, ...]
    smallest: tuple[float, ...]

    def mean(self, which: str = "largest") -> tuple[float, float]:
        """(mean, standard error) over the batches."""
        values = np.array(getattr(self, which))
        return float(values.mean()), standard_error(values)


def direct_point(
    pool: SamplePool,
    turned: Callable[[SymmetricOperator], SymmetricOperator],
    size: int,
    *,
    seed: int,
    ledger: Ledger,
    repeats: int,
    full: float,
) -> DirectPoint:
    """Draw ``repeats`` batches of ``size`` and measure both ends; ``full`` is lambda_max of all data."""
    draws = pool.draws(size, generator=torch.Generator().manual_seed(seed + size))
    largest, smallest = [], []
    for number, batch in zip(range(repeats), draws, strict=False):
        operator = HessianOperator(batch)
        ends = extreme_values(turned(operator), seed=seed + number, ignorable=_NOTHING * full)
        largest.append(ends[0])
        smallest.append(ends[1])
        ledger.spend(2 * operator.num_matvecs * size)
    return DirectPoint(size, tuple(largest), tuple(smallest))


def extreme_values(operator: SymmetricOperator, *, seed: int, ignorable: float = 0.0) -> tuple[float, float]:
    """(largest, smallest) eigenvalue from one Krylov space; zeros where the matrix is below ``ignorable`` and rounding alone.

    A batch whose samples are all fitted has a Hessian of the size of rounding, whose products need not be symmetric.
    """
    try:
        largest, smallest = both_ends(operator, tol=_TOL, seed=seed, num_steps=8)
    except NotSymmetricError:
        if _size(operator, seed) > ignorable:
            raise
        return 0.0, 0.0
    return float(largest.values[0]), float(smallest.values[0])


def _size(operator: SymmetricOperator, seed: int) -> float:
    """Size of the matrix by three steps of the power method."""
    vector = operator.random_vectors(1, generator=torch.Generator().manual_seed(seed))[:, 0]
    norm = float(vector.norm())
    for _ in range(3):
        vector = operator.multiply(vector / max(norm, 1e-30))
        norm = float(vector.norm())
    return norm
