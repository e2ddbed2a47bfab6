"""The trace of a symmetric operator to an asked standard error: Hutchinson, Hutch++, XTrace and the cheapest mixture of them."""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal, get_args

import numpy as np
import torch

from sharpkit._errors import ConvergenceWarning
from sharpkit.linalg.deflation import DeflatedProbes
from sharpkit.linalg.krylov import KrylovSpace
from sharpkit.linalg.progress import Budget, ProgressCallback
from sharpkit.linalg.results import Estimate
from sharpkit.linalg.xtrace import xtrace
from sharpkit.operators.algebra import as_operator
from sharpkit.operators.base import SymmetricOperator

Method = Literal["auto", "hutchinson", "hutch++", "xtrace"]

_PILOT = 6
_DEFAULT_MATVECS = 2000
_HOPELESS = 4.0  # give up where the forecast exceeds the default budget this many times
_PATIENCE = 8


def trace(
    operator: Any, *, rtol: float = 0.01, atol: float = 0.0, method: Method = "auto", seed: int = 0, num_matvecs: int | None = None,
    max_matvecs: int | None = None, max_seconds: float | None = None, callback: ProgressCallback | None = None,
) -> Estimate:
    """tr A from random products, until its standard error is at most ``rtol`` |tr A| (or ``atol``).

    ``"auto"`` draws a few plain probes z^T A z, and from their spread forecasts what the plain estimator would cost. Where that is much,
    it takes the leading subspace out exactly with a Krylov basis Q, one product per vector, as long as a product spent there saves more
    than one probe; the probes already made are reused on the complement, tr A = tr Q^T A Q + E z^T P A P z with P = 1 - Q Q^T. Where n
    products are cheaper than either, the trace is exact.

    The standard error is widened by Student's factor for the number of probes, so that the truth lies within two of them in about 95 of
    100 cases. A matrix whose trace nearly cancels has no reachable relative error: set ``atol``. Without ``max_matvecs``, a computation that
    the forecast puts beyond reach ends early and is flagged.

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
    run = _Run(operator, rtol, atol, seed, budget, limit, fixed=num_matvecs is not None, may_give_up=num_matvecs is None and max_matvecs is None)
    value, stderr, how = run.estimate(method)
    converged = stderr <= run.target(value)
    if not converged and num_matvecs is None:
        warnings.warn(
            f"the trace {value:.4g} has a standard error of {stderr:.2g} after {budget.num_matvecs} products, {run.target(value):.2g} was "
            "asked: raise max_matvecs or rtol, or set atol where positive and negative eigenvalues nearly cancel.",
            ConvergenceWarning, stacklevel=2,
        )
    return Estimate(value, stderr, budget.num_matvecs, budget.seconds, how, converged)


class _Run:
    """One trace computation: its tolerance, its budget and its decisions."""

    def __init__(
        self, operator: SymmetricOperator, rtol: float, atol: float, seed: int, budget: Budget, limit: int, *, fixed: bool, may_give_up: bool
    ) -> None:
        self.operator, self.rtol, self.atol, self.budget, self.limit = operator, rtol, atol, budget, limit
        self.fixed, self.may_give_up = fixed, may_give_up
        self.generator = torch.Generator().manual_seed(seed)

    def target(self, value: float) -> float:
        """The asked standard error."""
        return max(self.atol, self.rtol * abs(value))

    def estimate(self, method: str) -> tuple[float, float, str]:
        """Value, standard error and the way it was made."""
        n = self.operator.size
        if n <= min(_PILOT, self.limit) or self.fixed and n <= self.limit:
            return self._exact()
        if method == "xtrace":
            return xtrace(self.operator, self.target, self.budget, self.generator, fixed=self.fixed)
        probes = DeflatedProbes(self.operator, self.generator)
        if method == "hutch++":
            self._sketch(probes)
            return self._probe(probes, "Hutch++")
        for _ in range(_PILOT):
            if not self.budget.allows():
                break
            probes.draw(keep=method == "auto")
            self.budget.report(_PILOT, "trace, pilot probes")
        if method == "auto":
            self._deflate(probes)
            if probes.space.is_complete and not probes.space.pending:
                return probes.known, 0.0, "exact"
        return self._probe(probes, "Hutchinson, deflated" if probes.space.expanded else "Hutchinson")

    def _exact(self) -> tuple[float, float, str]:
        space = KrylovSpace(self.operator)
        complete = _fill(space, self.generator, self.budget)
        value = float(np.trace(space.projected()))
        return value, 0.0 if complete else math.inf, "exact" if complete else "incomplete"

    def _forecast(self, probes: DeflatedProbes) -> float:
        """Probes the tolerance will need in all with the present basis."""
        value, spread = probes.mean_and_spread()
        target = self.target(value)
        if spread == 0.0:
            return 2.0
        return max(2.0, (spread / target) ** 2) + 2.0 if target > 0 else math.inf

    def _deflate(self, probes: DeflatedProbes) -> None:
        """Grow the basis while that lowers the forecast: of the cost, or of the error where the cost is fixed."""
        made = len(probes)
        if not self.fixed and self._forecast(probes) <= 2 * made:
            return
        best, best_at, space = math.inf, 0, probes.space
        while self.budget.allows(1 + _PILOT) and (space.pending or space.add_random(self.generator)):
            steps, needed = len(space.expanded), self._forecast(probes)
            cost = steps + needed
            score = probes.mean_and_spread()[1] ** 2 / max(1, self.limit - steps) if self.fixed else cost
            if score < 0.995 * best:
                best, best_at = score, steps
            reach = best if not self.fixed else self.limit
            worth_finishing = not self.fixed and reach >= self.operator.size
            if not self.fixed and needed <= made or not worth_finishing and steps - best_at >= max(_PATIENCE, 0.05 * reach):
                return
            probes.deflate_one()
            self.budget.report(int(min(cost, self.limit)), "trace, leading subspace")

    def _sketch(self, probes: DeflatedProbes) -> None:
        """A third of the products sketch the range, a third multiply it, a third probe the complement."""
        while True:
            sketched = len(probes.space.expanded)
            if self.budget.num_matvecs >= self.limit * 2 // 3 or not self.budget.allows(2 + 2):
                return
            if not self.fixed and sketched >= 4 and sketched % 2 == 0:
                while len(probes) < max(4, sketched // 2) and self.budget.allows():
                    probes.draw(keep=True)
                if self._forecast(probes) <= max(4, sketched):
                    return
            if not probes.sketch_one():
                return
            self.budget.report(min(self.limit, 3 * sketched + 12), "trace, range sketch")

    def _probe(self, probes: DeflatedProbes, how: str) -> tuple[float, float, str]:
        probes.release()
        while True:
            value, stderr = probes.estimate()
            needed = self._forecast(probes)
            settled = not self.fixed and len(probes) >= _PILOT and stderr <= self.target(value)
            hopeless = self.may_give_up and len(probes) >= 100 and needed > _HOPELESS * self.limit
            if settled or hopeless or not self.budget.allows():
                return value, stderr, how
            probes.draw(keep=False)
            done = self.budget.num_matvecs
            self.budget.report(int(min(self.limit, max(done, done + needed - len(probes)))), "trace, probes")


def _fill(space: KrylovSpace, generator: torch.Generator, budget: Budget) -> bool:
    """Expand until the basis is complete; whether the budget allowed it."""
    while True:
        if not space.pending and not space.add_random(generator):
            return True
        if not budget.allows():
            return False
        space.expand(space.pending[0])
        budget.report(space.operator.size, "all basis vectors")
