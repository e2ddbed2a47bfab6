"""The sharpness of a whole data set between two bounds, from a part of it: samples only until the bounds are close enough."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sharpkit._arguments import as_seed, check_callback, real, whole
from sharpkit._calls import public_call
from sharpkit._results import Progress, ProgressCallback, Result, student_factor
from sharpkit.linalg.lanczos import eigenpairs
from sharpkit.linalg.results import warn_unconverged
from sharpkit.objective.memory import keeps_memory_limit
from sharpkit.objective.objective import Objective
from sharpkit.objective.samples import SamplePool
from sharpkit.operators.hessian import HessianOperator

_QUARTERS, _GROUPS = 4, 4  # evaluation sets, and groups within each, whose spread gives the standard errors: by judgement
# Each end misses 1.25 % of the time: room for skewed samples and for looking more than once. experiments/bracket_coverage.py counts 97.5 %.
_WIDEN = 2.24
_TOL, _SPAN_TOL = 2e-3, 0.1  # by judgement: any span is valid below, and above the residual is added


@dataclass(frozen=True)
class SharpnessBracket(
    Result,
    kind="sharpness_bracket",
    saved=("lower", "upper", "num_samples", "pool_size", "converged", "num_matvecs", "sample_gradients", "seconds", "history"),
):
    """lambda_max of the full-data Hessian between two bounds that hold together with a probability of at least 95 %.

    Attributes:
        lower, upper: the bounds, in units of curvature.
        num_samples, pool_size: samples used, and those of the objective; where equal, the value is exact up to the solver's residual.
        history: (samples, lower, upper) as it grew.
        converged: whether the asked width was reached.
        num_matvecs: Hessian products, each over the samples of its part.
        sample_gradients: cost of everything in single-sample gradients, a product counting 2.
        seconds: wall time.
    """

    lower: float
    upper: float
    num_samples: int
    pool_size: int
    history: tuple[tuple[int, float, float], ...]
    converged: bool
    num_matvecs: int
    sample_gradients: float
    seconds: float

    @property
    def midpoint(self) -> float:
        """Middle of the two bounds."""
        return (self.lower + self.upper) / 2

    def __str__(self) -> str:
        flag = "" if self.converged else ", not as narrow as asked"
        return f"{self.lower:.4g} to {self.upper:.4g} from {self.num_samples} of {self.pool_size} samples{flag}"


@public_call
@keeps_memory_limit
def sharpness_bracket(
    objective: Objective,
    *,
    rtol: float = 0.2,
    start: int = 256,
    max_samples: int | None = None,
    k: int = 5,
    seed: int = 0,
    memory_limit: float | None = None,
    callback: ProgressCallback | None = None,
    name: str = "",
) -> SharpnessBracket:
    """Bound the sharpness of all the data from n samples, n doubled until the bounds are close.

    Above: lambda_max is convex, so E lambda_max(H_n) >= lambda_max(H) for random samples. Below: a direction chosen on some samples has,
    on others, a curvature of at most lambda_max(H) in expectation. The n samples make two halves of two quarters: the top k eigenvectors V
    of one half span the directions, one quarter of the other half chooses among them (the top eigenvector y of V^T H_1 V), the last judges,
    y^T V^T H_2 V y; all four ways round are averaged. Both ends are widened by 2.24 standard errors over groups of samples. Where n reaches
    all samples, lambda_max is computed plainly.

    Args:
        objective: its loss must be a mean or sum over samples.
        rtol: width asked for, relative to the middle.
        start: first n, at least 16.
        max_samples: largest n; by default all.
        k: directions from each half.
        seed: seeds the draws and start vectors.
        memory_limit: bytes that may be taken on the model's device, besides model and data.
        callback: called with a :class:`sharpkit.Progress` after each n.
        name: of the result, which pages and comparisons show.

    Raises:
        ValueError: an argument out of range.
        ObjectiveError: the loss is no mean or sum over samples.

    Example:
        >>> import torch, sharpkit as sk
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> objective = sk.Objective(model, (torch.ones(400, 1), torch.zeros(400, 1)), loss=torch.nn.functional.mse_loss)
        >>> print(sk.sharpness_bracket(objective, start=64))
        2 to 2 from 64 of 400 samples
    """
    least = _QUARTERS * _GROUPS
    start, k, rtol, seed = whole("start", start, least=least), whole("k", k), real("rtol", rtol, above=0), as_seed(seed)
    max_samples = None if max_samples is None else whole("max_samples", max_samples, least=start, hint="it may not be below start")
    check_callback(callback)
    began, pool = time.perf_counter(), SamplePool(objective)
    order = torch.randperm(pool.size, generator=torch.Generator().manual_seed(seed))
    most, size = min(max_samples or pool.size, pool.size), start
    work = _BracketWork(pool, min(k, objective.num_parameters), seed)
    history: list[tuple[int, float, float]] = []
    done = False
    while not done:
        size = min(size, most)
        lower, upper = work.exact() if size == pool.size else work.bounds(order[:size])
        crossed = lower - upper > _TOL * abs(upper)
        if crossed:  # by noise, or because an eigenvalue was missed: no reason to stop
            crossing = f"from {size} samples the bounds crossed ({lower:.4g} below, {upper:.4g} above)"
            warn_unconverged(crossing)
        lower, upper = min(lower, upper), max(lower, upper)
        history.append((size, lower, upper))
        converged = not crossed and upper - lower <= rtol * abs(lower + upper) / 2
        done, elapsed, spent = converged or size == most, time.perf_counter() - began, work.num_matvecs
        if callback is not None:
            # the next size is twice as large: it is expected to take twice the time of everything so far
            expected, left = (spent, 0.0) if done else (spent * (len(history) + 1) // len(history), 2 * elapsed)
            callback(Progress(spent, expected, elapsed, left, f"{lower:.4g} to {upper:.4g} from {size} samples"))
        size *= 1 if done else 2  # by doubling, all sizes before the last cost no more than the last
    return SharpnessBracket(lower, upper, size, pool.size, tuple(history), converged, spent, work.sample_gradients, elapsed)


@dataclass
class _BracketWork:
    """Eigenvectors of parts of the data, kept as start vectors for larger parts, and what everything cost."""

    pool: SamplePool
    k: int
    seed: int
    num_matvecs: int = 0
    sample_gradients: float = 0.0
    known: list[Tensor] = field(default_factory=list)

    def exact(self) -> tuple[float, float]:
        """lambda_max of all samples, -+ the residual."""
        # started from the halves' vectors, which cost nothing more
        value, residual, _ = self._top(self.pool.parent, 1, self.known)
        return float(value[0]) - residual, float(value[0]) + residual

    def bounds(self, indices: Tensor) -> tuple[float, float]:
        """Both ends, widened by their standard errors."""
        quarters = [indices[i::_QUARTERS] for i in (0, 2, 1, 3)]  # strides: as n grows each half keeps its samples, and the other's out
        groups = [[self.pool.objective(part) for part in torch.tensor_split(quarter, _GROUPS)] for quarter in quarters]
        halves = [self.pool.objective(indices[i::2]) for i in range(2)]
        self.known = [self._top(half, self.k, self.known[i : i + 1], tol=_SPAN_TOL)[2] for i, half in enumerate(halves)]
        # warm-started from both halves' vectors: their span holds the top vector of the union up to noise
        top, residual, vector = self._top(self.pool.objective(indices), 1, self.known)
        shrink = math.sqrt(1 - len(indices) / self.pool.size)  # samples drawn without replacement
        values = np.array([self._forms(group, vector)[0, 0] for quarter in groups for group in quarter])
        upper = float(top[0]) + residual + _WIDEN * shrink * _grouped_error(values.reshape(1, -1))
        judged = np.concatenate([self._held_out(groups[2:], self.known[0]), self._held_out(groups[:2], self.known[1])])
        lower = float(judged.mean()) - _WIDEN * shrink * _grouped_error(judged)
        return lower, upper

    def _held_out(self, quarters: Sequence[Sequence[Objective]], span: Tensor) -> NDArray[np.float64]:
        """(2, groups): curvature in each group of either quarter along the direction that the other quarter chose from the span."""
        # choosing and judging on the same samples would read too high, by the same convexity as above
        forms = np.array([[self._forms(group, span) for group in quarter] for quarter in quarters])
        chosen = [np.linalg.eigh(quarter.mean(axis=0))[1][:, -1] for quarter in forms]
        return np.array([np.einsum("i,gij,j->g", y, quarter, y) for y, quarter in zip(reversed(chosen), forms, strict=True)])

    def _forms(self, part: Objective, span: Tensor) -> NDArray[np.float64]:
        """V^T H_part V."""
        operator = HessianOperator(part)
        form = (span.T @ operator.multiply(span)).double().cpu().numpy() * self._scale(part)
        self._spend(operator, part)
        return np.asarray((form + form.T) / 2)

    def _top(self, part: Objective, k: int, known: Sequence[Tensor], *, tol: float = _TOL) -> tuple[Tensor, float, Tensor]:
        """Top eigenvalues of a part, the first one's residual, and vectors."""
        operator = HessianOperator(part)
        pairs = eigenpairs(operator, k, tol=tol, seed=self.seed, initial=torch.cat(list(known), dim=1) if known else None)
        self._spend(operator, part)
        return pairs.values * self._scale(part), float(pairs.residuals[0]) * self._scale(part), pairs.vectors

    def _scale(self, part: Objective) -> float:
        """A sum over fewer samples, scaled up to all of them; a mean stays."""
        return self.pool.size / part.num_samples if part.reduction == "sum" else 1.0

    def _spend(self, operator: HessianOperator, part: Objective) -> None:
        self.num_matvecs += operator.num_matvecs
        self.sample_gradients += 2.0 * operator.num_matvecs * part.num_samples


def _grouped_error(values: NDArray[np.float64]) -> float:
    """Standard error of the mean of independent values in rows, each row with a mean of its own, widened for their small number."""
    freedom = values.size - len(values)  # each row's mean costs one
    deviation = values - values.mean(axis=1, keepdims=True)
    return float(np.sqrt((deviation**2).sum() / freedom / values.size)) * student_factor(freedom + 1)
