"""The law of learning-rate annealing: fitted to a run, it says what loss another schedule would end at."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sharpkit._arguments import reals
from sharpkit._calls import public_call
from sharpkit._errors import SharpkitWarning
from sharpkit._results import Result

__all__ = ["AnnealingLaw", "fit_annealing_law"]

Array = NDArray[np.float64]

_MEMORY = 0.999  # of the annealed momentum, as in the paper
_HUBER = 1e-3  # of a residual in the logarithm, as in the paper


@dataclass(frozen=True)
class AnnealingLaw(Result, kind="annealing_law"):
    """L(s) = L0 + A S1^-alpha - C S2, S1 the sum of the rates and S2 the annealing momentum up to step s.

    Attributes:
        L0, A, alpha, C: of the law.
        error: root mean square of the relative residuals of the fit.
        steps: of the runs that it was fitted to, the longest.
    """

    L0: float
    A: float
    alpha: float
    C: float
    error: float
    steps: int

    def predict(self, rates: Sequence[float]) -> Array:
        """The loss after each step of a run with other rates, (T,). Warns where it is much longer than what the law was fitted to."""
        values = np.array(reals("rates", rates, least=0))
        if len(values) > 3 * self.steps:
            longer = f"the law was fitted to {self.steps} steps and is asked about {len(values)}"
            warnings.warn(f"{longer}: beyond three times as many it was never tested", SharpkitWarning, stacklevel=2)
        return _law(np.array([self.L0, self.A, self.alpha, self.C]), *_sums(values))


@public_call
def fit_annealing_law(
    losses: Sequence[float] | Sequence[Sequence[float]], rates: Sequence[float] | Sequence[Sequence[float]], *, name: str = ""
) -> AnnealingLaw:
    """Fit the law of learning-rate annealing to the losses of one run, or of a few under different schedules.

    One run whose rate falls says what annealing is worth; from a constant rate C cannot be known, and is refused.

    Args:
        losses: smoothed training or validation loss after each step (NaN where there is none), of one run or of several.
        rates: the rate of each step, in the same shape; warm-up steps are better left out of both.
        name: of the result, which pages and comparisons show.

    Raises:
        ValueError: different lengths, fewer than 20 losses, or a rate that never falls.

    Example:
        >>> import numpy as np
        >>> rates = 0.01 * np.linspace(1, 0.01, 400)
        >>> truth = AnnealingLaw(2.0, 0.5, 0.5, 0.3, 0.0, 400)
        >>> law = fit_annealing_law(truth.predict(rates), rates)
        >>> other = rates * np.linspace(1, 0.1, 400)
        >>> bool(abs(law.predict(other)[-1] / truth.predict(other)[-1] - 1) < 0.01)
        True

    References:
        Tissue, Wang and Wang (2024), arXiv 2408.11029.
    """
    from scipy.optimize import least_squares

    runs = [(losses, rates)] if np.ndim(rates[0]) == 0 else list(zip(losses, rates, strict=True))  # type: ignore[arg-type]
    rows: list[tuple[Array, Array, Array]] = []
    falls, longest = False, 0
    for loss, rate in runs:
        observed, used = np.asarray(loss, dtype=float), np.array(reals("rates", rate, least=0))
        if observed.shape != used.shape:
            raise ValueError(f"losses and rates must be of one length, one of each step, got {observed.shape} and {used.shape}")
        S1, S2 = _sums(used)
        kept = np.isfinite(observed) & (observed > 0) & (S1 > 0)
        rows.append((observed[kept], S1[kept], S2[kept]))
        falls, longest = falls or bool(used[-1] < 0.9 * used.max()), max(longest, len(used))
    target, S1, S2 = (np.concatenate(column) for column in zip(*rows, strict=True))
    if len(target) < 20:
        raise ValueError(f"a law of four numbers needs at least 20 losses that are positive and finite, got {len(target)}")
    if not falls:
        raise ValueError("the rates never fall, so that nothing can be known of annealing: add a run whose rate decays")
    size, best = float(S2.max()) or 1.0, None

    def residuals(x: Array) -> Array:
        predicted = _law(np.exp(x), S1, S2)
        return np.asarray(np.log(np.maximum(predicted, 1e-12)) - np.log(target))

    spread = float(target.max() - target.min())
    for alpha in (0.2, 0.5, 1.0):  # several starts: the law is not convex in its numbers
        A = max(spread, 1e-6) * float(np.median(S1)) ** alpha
        start = np.log([max(0.8 * float(target.min()), 1e-9), A, alpha, max(0.1 * spread, 1e-9) / size])
        found = least_squares(residuals, start, loss="huber", f_scale=_HUBER, max_nfev=2000)
        best = found if best is None or found.cost < best.cost else best
    assert best is not None
    L0, A, alpha, C = np.exp(best.x).tolist()
    return AnnealingLaw(L0, A, alpha, C, float(np.sqrt(np.mean(np.expm1(residuals(best.x)) ** 2))), longest)


def _sums(rates: Array) -> tuple[Array, Array]:
    """S1 and S2 after each step."""
    drops = -np.diff(rates, prepend=rates[:1])
    momentum, total, second = 0.0, 0.0, np.empty_like(rates)
    for i, drop in enumerate(drops.tolist()):
        momentum = _MEMORY * momentum + drop
        total += momentum
        second[i] = total
    return rates.cumsum(), second


def _law(x: Array, S1: Array, S2: Array) -> Array:
    L0, A, alpha, C = x
    return np.asarray(L0 + A * np.maximum(S1, 1e-30) ** -alpha - C * S2)
