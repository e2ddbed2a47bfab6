"""XTrace: every test vector serves both the low-rank approximation and, left out of it, the estimate of the rest."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from sharpkit.linalg.basis import Array
from sharpkit.linalg.krylov import KrylovSpace
from sharpkit.linalg.progress import Budget
from sharpkit.linalg.results import standard_error
from sharpkit.operators.base import SymmetricOperator

# The leave-one-out estimates share most of their basis, so their spread understates the error: by 1.0 to 1.3 over reference spectra.
_SHARED_BASIS = 1.25
_LEAST_TESTS = 5


def xtrace(
    operator: SymmetricOperator, target: Callable[[float], float], budget: Budget, generator: torch.Generator, *, fixed: bool
) -> tuple[float, float, str]:
    """The exchangeable trace estimate, grown two products (one test vector) at a time.

    Args:
        operator: A.
        target: the asked standard error, given the estimate.
        budget: ends it.
        generator: of the Gaussian test vectors.
        fixed: use the whole product budget.

    References:
        Epperly, Tropp and Webber, arXiv 2301.07825, section 2.2 (with its scaling for Gaussian test vectors).
    """
    space = KrylovSpace(operator)
    tests: list[Tensor] = []
    images: list[Array] = []  # R: A omega_i in the basis
    value, stderr, passes = math.nan, math.inf, 0
    while budget.allows(2) and not space.is_complete:
        test = operator.random_vectors(1, generator=generator)[:, 0].to(space.dtype)
        image = operator.multiply(test.to(operator.dtype)).to(space.dtype)
        known = space.size
        grew = space.add_start(image)
        images.append(space.rows.coefficients(image).cpu().double().numpy())
        tests.append(test)
        if not grew:  # the range of A is exhausted: its trace is known
            return float(np.trace(space.projected())) if space.expanded else 0.0, 0.0, "XTrace, exact"
        space.expand(known)
        space.forget_pending()
        if len(tests) >= _LEAST_TESTS:
            value, stderr = _leave_one_out(space, tests, images)
        budget.report(2 * len(tests) + 2, "trace, XTrace")
        passes = passes + 1 if stderr <= target(value) else 0
        if not fixed and passes >= 2:
            break
    if space.is_complete and not space.pending:
        return float(np.trace(space.projected())), 0.0, "XTrace, exact"
    return value, stderr, "XTrace"


def _leave_one_out(space: KrylovSpace, tests: list[Tensor], images: list[Array]) -> tuple[float, float]:
    """Mean of the estimates that leave test vector i out of the basis, and its standard error."""
    m, n = len(tests), space.operator.size
    inner = space.projected()  # Q^T A Q
    triangle = np.zeros((m, m))
    for i, image in enumerate(images):
        triangle[: min(len(image), m), i] = image[:m]
    coordinates = space.rows.coefficients(torch.stack(tests, dim=1)).cpu().double().numpy()  # Q^T Omega
    norms = np.array([float(space.operator.dot(test, test)) for test in tests])
    dual = np.linalg.inv(triangle).T  # column i: orthogonal to every image but the i-th
    dual = dual / np.linalg.norm(dual, axis=0)
    reduced = coordinates - dual * (dual * coordinates).sum(axis=0)
    rest = (coordinates * triangle).sum(axis=0) - 2 * (reduced * triangle).sum(axis=0) + (reduced * (inner @ reduced)).sum(axis=0)
    scaling = (n - m + 1) / np.maximum(norms - (reduced**2).sum(axis=0), np.finfo(float).tiny)
    estimates = np.trace(inner) - (dual * (inner @ dual)).sum(axis=0) + scaling * rest
    return float(estimates.mean()), _SHARED_BASIS * standard_error(estimates)
