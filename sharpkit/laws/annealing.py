"""The law of learning-rate annealing: fitted to a run, it says what loss another schedule would end at."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sharpkit._arguments import real, reals
from sharpkit._calls import public_call
from sharpkit._errors import SharpkitWarning
from sharpkit._results import Result

__all__ = ["AnnealingLaw", "fit_annealing_law"]

Array = NDArray[np.float64]

_MEMORY = 0.999  # of the annealed momentum, as in the paper
# Those that "fit" chooses from: by judgement, momenta over 100 to 2000 steps.
_MEMORIES = (0.99, 0.995, 0.997, 0.998, 0.999, 0.9995)
_POINTS = 500  # of each run that are fitted, evenly taken: by judgement, since neighbours among smoothed losses say the same
_HUBER = 1e-3  # of a residual in the logarithm, as in the paper


@dataclass(frozen=True)
class AnnealingLaw(Result, kind="annealing_law"):
    """L(s) = L0 + A S1^-alpha - C S2, S1 the sum of the rates and S2 the annealing momentum up to step s.

    Attributes:
        L0, A, alpha, C: of the law.
        error: root mean square of the relative residuals of the fit.
        steps: of the runs that it was fitted to, the longest.
        memory: share of the momentum that S2 keeps from step to step.
    """

    L0: float
    A: float
    alpha: float
    C: float
    error: float
    steps: int
    memory: float = _MEMORY

    def predict(self, rates: Sequence[float]) -> Array:
        """The loss after each step of a run with other rates, (T,). Warns where it is much longer than what the law was fitted to."""
        values = np.array(reals("rates", rates, least=0))
        if len(values) > 3 * self.steps:
            longer = f"the law was fitted to {self.steps} steps and is asked about {len(values)}"
            warnings.warn(f"{longer}: beyond three times as many it was never tested", SharpkitWarning, stacklevel=2)
        return _law(np.array([self.L0, self.A, self.alpha, self.C]), *_sums(values, self.memory))


@public_call
def fit_annealing_law(
    losses: Sequence[float] | Sequence[Sequence[float]],
    rates: Sequence[float] | Sequence[Sequence[float]],
    *,
    memory: float | str = _MEMORY,
    name: str = "",
) -> AnnealingLaw:
    """Fit the law of learning-rate annealing to the losses of one run, or of a few under different schedules.

    One run whose rate falls says what annealing is worth; from a constant rate C cannot be known, and is refused.

    Args:
        losses: smoothed training or validation loss after each step (NaN where there is none), of one run or of several.
        rates: the rate of each step, in the same shape; warm-up steps are better left out of both.
        memory: share of the annealed momentum that S2 keeps from step to step, by default the paper's 0.999. ``"fit"`` chooses it by the
            runs' losses: only where one of them decays late and fast, since gradual decays do not tell it.
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
    runs = [(losses, rates)] if np.ndim(rates[0]) == 0 else list(zip(losses, rates, strict=True))  # type: ignore[arg-type]
    memories = list(_MEMORIES) if memory == "fit" else [real("memory", memory, least=0, below=1, other='"fit"')]
    taken: list[tuple[Array, Array, NDArray[np.intp]]] = []
    falls, longest = False, 0
    for loss, rate in runs:
        observed, used = np.asarray(loss, dtype=float), np.array(reals("rates", rate, least=0))
        if observed.shape != used.shape:
            raise ValueError(f"losses and rates must be of one length, one of each step, got {observed.shape} and {used.shape}")
        kept = np.flatnonzero(np.isfinite(observed) & (observed > 0) & (used.cumsum() > 0))
        taken.append((observed, used, kept[:: max(1, len(kept) // _POINTS)]))
        falls, longest = falls or bool(used[-1] < 0.9 * used.max()), max(longest, len(used))
    target = np.concatenate([observed[kept] for observed, _, kept in taken])
    if len(target) < 20:
        raise ValueError(f"a law of four numbers needs at least 20 losses that are positive and finite, got {len(target)}")
    if not falls:
        raise ValueError("the rates never fall, so that nothing can be known of annealing: add a run whose rate decays")
    fits = []
    for kept_share in memories:
        sums = [[column[kept] for column in _sums(used, kept_share)] for _, used, kept in taken]
        S1, S2 = (np.concatenate(column) for column in zip(*sums, strict=True))
        fits.append((*_fitted(target, S1, S2), kept_share))
    (L0, A, alpha, C), error, _, chosen = min(fits, key=lambda fit: fit[2])
    return AnnealingLaw(L0, A, alpha, C, error, longest, chosen)


def _fitted(target: Array, S1: Array, S2: Array) -> tuple[list[float], float, float]:
    """(L0, A, alpha, C), the root mean square of the relative residuals, and the cost that was minimised."""
    from scipy.optimize import least_squares

    size, best = float(S2.max()) or 1.0, None

    def residuals(x: Array) -> Array:
        with np.errstate(over="ignore"):  # steps far off are taken back
            predicted = _law(np.exp(np.clip(x, -700, 700)), S1, S2)
        return np.asarray(np.log(np.clip(predicted, 1e-12, 1e300)) - np.log(target))

    spread = float(target.max() - target.min())
    for alpha in (0.2, 0.5, 1.0):  # several starts: the law is not convex in its numbers
        A = max(spread, 1e-6) * float(np.median(S1)) ** alpha
        start = np.log([max(0.8 * float(target.min()), 1e-9), A, alpha, max(0.1 * spread, 1e-9) / size])
        rough = least_squares(residuals, start, max_nfev=500).x  # near the goal first: far from it the paper's loss is all but linear
        found = least_squares(residuals, rough, loss="huber", f_scale=_HUBER, max_nfev=2000)
        best = found if best is None or found.cost < best.cost else best
    assert best is not None
    return np.exp(best.x).tolist(), float(np.sqrt(np.mean(np.expm1(residuals(best.x)) ** 2))), float(best.cost)


def _sums(rates: Array, memory: float) -> tuple[Array, Array]:
    """S1 and S2 after each step."""
    drops = -np.diff(rates, prepend=rates[:1])
    momentum, total, second = 0.0, 0.0, np.empty_like(rates)
    for i, drop in enumerate(drops.tolist()):
        momentum = memory * momentum + drop
        total += momentum
        second[i] = total
    return rates.cumsum(), second


def _law(x: Array, S1: Array, S2: Array) -> Array:
    L0, A, alpha, C = x
    return np.asarray(L0 + A * np.maximum(S1, 1e-30) ** -alpha - C * S2)
