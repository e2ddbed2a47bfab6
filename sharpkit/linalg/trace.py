"""The trace of a symmetric operator to an asked standard error: Hutchinson, Hutch++, XTrace and the cheapest mixture of them."""

from __future__ import annotations

import warnings
from typing import Any, Literal, get_args

from sharpkit._errors import ConvergenceWarning
from sharpkit.linalg.adaptive import AdaptiveEstimate, Tolerance
from sharpkit.linalg.progress import Budget, ProgressCallback
from sharpkit.linalg.results import Estimate
from sharpkit.operators.algebra import as_operator

Method = Literal["auto", "hutchinson", "hutch++", "xtrace"]

_DEFAULT_MATVECS = 2000


def trace(
    operator: Any,
    *,
    rtol: float = 0.01,
    atol: float = 0.0,
    method: Method = "auto",
    seed: int = 0,
    num_matvecs: int | None = None,
    max_matvecs: int | None = None,
    max_seconds: float | None = None,
    callback: ProgressCallback | None = None,
) -> Estimate:
    """tr A from random products, until its standard error is at most ``rtol`` |tr A| (or ``atol``).

    ``"auto"`` draws a few plain probes z^T A z, and from their spread forecasts what the plain estimator would cost. Where that is much,
    it takes the leading subspace out exactly with a Krylov basis Q, one product per vector, as long as a product spent there saves more
    than one probe; the probes already made are reused on the complement, tr A = tr Q^T A Q + E z^T P A P z with P = 1 - Q Q^T. Where n
    products are cheaper than either, the trace is exact.

    The standard error is widened by Student's factor for the number of probes, so that the truth lies within two of them in about 95 of
    100 cases. A matrix whose trace nearly cancels has no reachable relative error: set ``atol``. Without ``max_matvecs``, a computation
    that the forecast puts beyond reach ends early and is flagged.

    Args:
        operator: anything :func:`sharpkit.as_operator` takes.
        rtol: asked standard error relative to the estimate.
        atol: asked absolute standard error; the looser of the two counts.
        method: ``"auto"``, ``"hutchinson"``, ``"hutch++"`` or ``"xtrace"``.
        seed: of the probes.
        num_matvecs: spend this many products instead of stopping at a tolerance.
        max_matvecs: product budget; by default 2000.
        max_seconds: time budget in seconds.
        callback: called with a :class:`~sharpkit.linalg.progress.Progress` after each product.

    Returns:
        the estimate; its ``stderr`` is 0 where it is exact to rounding.

    Raises:
        ValueError: an argument out of range.
        NonFiniteError: a product is not finite.

    References:
        Meyer, Musco, Musco and Woodruff, "Hutch++", arXiv 2010.09649; Persson, Cortinovis and Kressner, "Improved variants of the Hutch++
        algorithm", arXiv 2109.10659; Epperly, Tropp and Webber, "XTrace", arXiv 2301.07825.

    Example:
        >>> import torch, sharpkit as sk
        >>> estimate = sk.trace(torch.diag(torch.arange(1.0, 101.0)))
        >>> abs(estimate.value - 5050) <= 3 * estimate.stderr + 0.01
        True
    """
    operator = as_operator(operator)
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {get_args(Method)}, got {method!r}")
    if rtol < 0 or atol < 0 or not rtol + atol > 0:
        raise ValueError(f"rtol and atol must not be negative and not both 0, got rtol={rtol}, atol={atol}")
    if num_matvecs is not None and num_matvecs < 2:
        raise ValueError(f"num_matvecs must be at least 2, got {num_matvecs}")
    limit = num_matvecs or max_matvecs or _DEFAULT_MATVECS
    budget = Budget(operator, max_matvecs=limit, max_seconds=max_seconds, callback=callback)
    run = AdaptiveEstimate(operator, Tolerance(rtol, atol), budget, seed=seed, limit=limit, fixed=num_matvecs is not None)
    run.may_give_up = num_matvecs is None and max_matvecs is None
    value, stderr, how = run.estimate(method)
    target = run.target(value)
    converged = stderr <= target
    if not converged and num_matvecs is None:
        warnings.warn(
            f"the trace {value:.4g} has a standard error of {stderr:.2g} after {budget.num_matvecs} products, {target:.2g} was "
            "asked: raise max_matvecs or rtol, or set atol where positive and negative eigenvalues nearly cancel.",
            ConvergenceWarning,
            stacklevel=2,
        )
    return Estimate(value, stderr, budget.num_matvecs, budget.seconds, how, converged)
