"""The top eigenvalue of a mini-batch Hessian as a function of the batch size: four estimators and direct measurement."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from sharpkit._errors import NotSymmetricError
from sharpkit._results import Bounded, ProgressCallback, Result, standard_error
from sharpkit.batch_size.pilot import Ledger
from sharpkit.linalg.lanczos import eigenpairs
from sharpkit.linalg.overview import both_ends, spectral_overview
from sharpkit.objective.samples import SamplePool
from sharpkit.operators.base import SymmetricOperator
from sharpkit.operators.hessian import HessianOperator

# experiments/batch_lambda.py measures what comes of these.
_TOL = 1e-2  # of a drawn batch's eigenvalues, by judgement: far below their scatter from batch to batch
_NOTHING = 2e-2  # of the full data's lambda_max, by judgement: a batch Hessian below that may be rounding, and hardly moves the mean
_GROUPS = 64  # disjoint groups whose Hessians give the noise, by judgement: s^2 is then known to 18 %
# Samples for trace, spectrum and further eigenvectors, a sixth within these bounds, by judgement: no learning-rate limit rests on them.
_PART, _PART_SHARE = (64, 256), 6
# Batches drawn of a size until their mean is known to so much, 24 at most, and at most as many samples as there are, or 2048. Fitted
# samples make for heavy tails: four batches of 32 missed the mean of a trained network by a fifth (experiments/batch_heldout.py, wine).
_MEAN_TOL, _MOST_DRAWS, _DRAWN_SAMPLES = 0.06, 24, 2048
_TABLE = 2**22  # numbers of a table of products made at a time, 32 MB in float64: by judgement
_ENDS_TOL = 3e-2  # of both ends' residuals, by judgement; the top one has converged far beyond by then

Floats = NDArray[np.float64]
Wrap = Callable[[SymmetricOperator], SymmetricOperator]


@dataclass(frozen=True)
class DirectPoint(Result):
    """The extreme eigenvalues of batch Hessians, measured on drawn batches.

    Attributes:
        batch_size: B.
        largest, smallest: (k,) eigenvalues, one a drawn batch.
    """

    batch_size: int
    largest: tuple[float, ...]
    smallest: tuple[float, ...]

    def mean(self, which: str = "largest") -> tuple[float, float]:
        """(mean, standard error) over the batches."""
        values = np.array(getattr(self, which))
        return float(values.mean()), standard_error(values)


@dataclass(frozen=True)
class BatchCurvature(Result, saved=("lambda_max", "lambda_min", "trace", "directional", "isotropic", "num_samples", "estimator", "direct")):
    """Curvature of the full data and its mini-batch noise.

    Attributes:
        lambda_max, lambda_min, trace: what the full-data Hessian has; lambda_min to some 3 % of lambda_max, from above.
        nodes, counts: the spectrum on a sixth of the data (64 to 256 samples) as a quadrature: eigenvalues, how many each. The trace comes
            from the same samples.
        directional: s^2 = E ||(h_i - H) v||^2 of a single sample along the top eigenvector, with its standard error.
        isotropic: r^2 = E ||(h_i - H) z||^2 of a single sample along a random unit vector.
        block: (k, k) the full matrix within the span of the top eigenvectors; where they are close, noise mixes them.
        mixing: (groups, k, k) the groups' deviations within the span of those eigenvectors, scaled to one sample.
        leakage: the part of s^2 that leads out of that span.
        direct: measured points, ascending in B.
        num_samples: N.
    """

    lambda_max: float
    lambda_min: float
    trace: float
    nodes: tuple[float, ...]
    counts: tuple[float, ...]
    directional: tuple[float, float]
    isotropic: float
    block: NDArray[np.float64] = field(repr=False)
    mixing: NDArray[np.float64] = field(repr=False)
    leakage: float
    direct: tuple[DirectPoint, ...]
    num_samples: int

    def effective(self, batch_size: float) -> float:
        """b for this pool, without replacement."""
        return float(effective_batch_size(batch_size, self.num_samples))

    @property
    def noise(self) -> float:
        """s^2 / lambda_max: what takes the trace's place in the mean-square limit."""
        return self.directional[0] / self.lambda_max if self.lambda_max > 0 else 0.0

    @property
    def estimator(self) -> str:
        """Name of the estimator that :meth:`lambda_max_of` uses."""
        return self.choose()[0]

    # -- the estimators of E lambda_max(H_B) ------------------------------------------------------------------------------
    def isotropic_estimate(self, batch_size: float) -> float:
        """The additive model of independent noise entries: lambda + r^2 / (b lambda) above the transition, else the bulk edge 2 r."""
        return float(additive_outlier(self.lambda_max, math.sqrt(max(self.isotropic, 0.0) / self.effective(batch_size))))

    def directional_estimate(self, batch_size: float) -> float:
        """Noise along the top eigenvectors: exact within their span, second order out of it (leakage / (b lambda)).

        With one eigenvector it is lambda + s^2 / (b lambda), less the noise along the vector itself, which has mean zero. Nearly equal
        eigenvalues are mixed by the noise, so their k x k matrix is perturbed as a whole and its largest eigenvalue averaged over groups.
        """
        b = self.effective(batch_size)
        if math.isinf(b) or self.lambda_max <= 0:
            return self.lambda_max
        perturbed = self.block + self.mixing / math.sqrt(b)
        inside = float(np.linalg.eigvalsh(perturbed)[:, -1].mean())
        return self._capped(inside + self.leakage / (b * self.lambda_max), batch_size)

    def calibrated_estimate(self, batch_size: float) -> float:
        """lambda + c / b, c fitted to the measured points."""
        c = self.noise  # without points the noise along the top eigenvector, second order in it
        if self.direct:
            means, errors = np.array([point.mean() for point in self.direct]).T
            scale = np.hypot(errors, 0.05 * means)  # 5 % for the law itself, by judgement: a chance agreement weighs no more
            w = 1 / (np.array([self.effective(point.batch_size) for point in self.direct]) * scale)
            # weighted least squares through the full-data value
            c = max(float(w @ ((means - self.lambda_max) / scale) / (w @ w)), 0.0) if float(w @ w) > 0 else c
        return self._capped(self.lambda_max + c / self.effective(batch_size), batch_size)

    def _capped(self, value: float, batch_size: float) -> float:
        """The mean falls with B (larger batches' Hessians are means of smaller ones'), so measured smaller ones bound it from above."""
        bound = min((point.mean()[0] for point in self.direct if point.batch_size <= batch_size), default=math.inf)
        return min(value, max(bound, self.lambda_max))

    def interpolated(self, batch_size: float, which: str = "largest") -> Bounded:
        """Through the measured points: straight lines in log excess over log b; beyond them the outer slopes, kept between b^0 and b^-1."""
        end = self.lambda_max if which == "largest" else self.lambda_min
        sign = 1.0 if which == "largest" else -1.0
        b = self.effective(batch_size)
        if math.isinf(b):
            return Bounded(end, end, end)
        measured = [p for p in self.direct if math.isfinite(self.effective(p.batch_size))]
        x = np.log([self.effective(p.batch_size) for p in measured])
        means, errors = np.array([p.mean(which) for p in measured]).T
        floor = 1e-3 * max(abs(end), 1e-30)  # log needs a positive excess; a thousandth is below what is measured
        value = end + sign * math.exp(_line(x, np.log(np.maximum(sign * (means - end), floor)), math.log(b)))
        # the relative error of the nearest measured point: between points nothing else is known
        nearest = int(np.argmin(np.abs(x - math.log(b))))
        half = float(1.96 * errors[nearest] * abs(value) / max(abs(means[nearest]), 1e-30))
        return Bounded(value, value - half, value + half)

    def choose(self) -> tuple[str, str]:
        """(estimator, why): what :meth:`lambda_max_of` uses."""
        if len(self.direct) >= 2:
            sizes = ", ".join(str(p.batch_size) for p in self.direct)
            return "interpolated", f"lambda_max(H_B) was measured on drawn batches of {sizes} and is interpolated between them"
        if len(self.direct) == 1:
            return "calibrated", "one batch size was measured, which fixes c in lambda + c / b"
        return "directional", "nothing was measured directly; the noise along the top eigenvector gives lambda + s^2 / (b lambda)"

    def lambda_max_of(self, batch_size: float) -> Bounded:
        """E lambda_max(H_B) by the chosen estimator."""
        method = self.choose()[0]
        if method == "interpolated":
            return self.interpolated(batch_size)
        value = self.calibrated_estimate(batch_size) if method == "calibrated" else self.directional_estimate(batch_size)
        spread = abs(value - self.lambda_max)  # as wide as what the estimator adds: by judgement, no more is known of its error
        return Bounded(value, value - spread, value + spread)

    def lambda_min_of(self, batch_size: float) -> Bounded:
        """E lambda_min(H_B), from the measured points; the full value where there are none."""
        if len(self.direct) >= 2:
            return self.interpolated(batch_size, "smallest")
        # no law is known for this end: the noise bends many small eigenvalues at once
        return Bounded(self.lambda_min, self.lambda_min, self.lambda_min)


def _line(x: Floats, y: Floats, at: float) -> float:
    """Piecewise linear, the outer pieces continued with slopes between -1 and 0."""
    if len(x) == 1 or at > x[-1]:
        return float(y[-1] - (at - x[-1]))  # far out the excess is that of the law of large numbers, 1 / b
    if at < x[0]:
        return float(y[0] + np.clip((y[1] - y[0]) / (x[1] - x[0]), -1, 0) * (at - x[0]))
    return float(np.interp(at, x, y))


def measure_batch_curvature(
    pool: SamplePool,
    *,
    sizes: Sequence[int],
    seed: int,
    ledger: Ledger,
    repeats: int = 4,
    wrap: Wrap | None = None,
    k: int = 3,
    callback: ProgressCallback | None = None,
) -> BatchCurvature:
    """Measure full curvature, its noise in disjoint groups, and the extreme eigenvalues of drawn batches.

    Args:
        pool: the samples.
        sizes: batch sizes to measure directly; those above N / 2 are left out.
        seed: seeds the draws and random probes.
        ledger: where the cost is written.
        repeats: least number of batches drawn per size.
        wrap: turns each Hessian into the operator meant (preconditioning).
        k: further eigenvectors, of part of the data, that noise along the top one is shared out to.
        callback: progress of the full-data part.
    """
    turned = wrap or (lambda operator: operator)
    # one pass over all data gives both ends; everything else comes from parts, groups and drawn batches
    full = HessianOperator(pool.parent)
    largest, smallest = both_ends(turned(full), tol=_ENDS_TOL, seed=seed, num_steps=8)
    ledger.spend(2 * full.num_matvecs * pool.size)
    part = pool.limited(min(max(pool.size // _PART_SHARE, _PART[0]), _PART[1]), seed=seed)
    sketch = HessianOperator(part.parent)
    density = (overview := spectral_overview(turned(sketch), num_probes=3, num_steps=12, seed=seed, callback=callback)).density
    pairs = eigenpairs(turned(sketch), k=min(k, full.size), tol=2e-2, seed=seed, initial=largest.vectors[:, 0])
    ledger.spend(2 * sketch.num_matvecs * part.size)
    # the part's eigenvectors are not those of all data: the top one of all data comes first, the others span what it is mixed with
    span = torch.linalg.qr(torch.cat([largest.vectors[:, :1], pairs.vectors], dim=1))[0]
    noise, top = _group_noise(pool, turned, span, seed=seed, ledger=ledger), float(largest.values[0])
    direct = _drawn(pool, sizes, turned, seed=seed, ledger=ledger, repeats=repeats, ignorable=_NOTHING * top)
    return BatchCurvature(
        lambda_max=top,
        lambda_min=float(smallest.values[0]),
        trace=overview.trace.value,
        nodes=tuple(density.nodes.ravel().tolist()),
        counts=tuple((density.weights * density.size).ravel().tolist()),
        directional=(float(noise.along.mean()), standard_error(noise.along)),
        isotropic=noise.isotropic,
        block=noise.block,
        mixing=noise.mixing,
        leakage=noise.leakage,
        direct=direct,
        num_samples=pool.size,
    )


def measure_coupled_curvature(pool: SamplePool, *, sizes: Sequence[int], seed: int, ledger: Ledger, wrap: Wrap) -> BatchCurvature:
    """The same where batch statistics tie samples together: both ends of all data as one batch and of drawn batches; noise is NaN.

    A sample has no Hessian of its own there, so that only what is measured on batches of a stated size means anything.
    """
    full = HessianOperator(pool.parent)
    largest, smallest = both_ends(wrap(full), tol=_ENDS_TOL, seed=seed, num_steps=8)
    ledger.spend(2 * full.num_matvecs * pool.size)
    top, none = float(largest.values[0]), np.zeros((1, 1))
    # at least two, so that lambda_max of batches is what was measured and no estimate from the noise
    direct = _drawn(pool, sizes, wrap, seed=seed, ledger=ledger, repeats=4, ignorable=_NOTHING * abs(top))
    noise = (math.nan, math.nan)
    return BatchCurvature(top, float(smallest.values[0]), math.nan, (), (), noise, math.nan, none, none[None], math.nan, direct, pool.size)


def _drawn(
    pool: SamplePool, sizes: Sequence[int], wrap: Wrap, *, seed: int, ledger: Ledger, repeats: int, ignorable: float
) -> tuple[DirectPoint, ...]:
    points = []
    for size in (size for size in sorted(set(sizes)) if size <= pool.size // 2):
        draws, ends = pool.draws(size, generator=torch.Generator().manual_seed(seed + size)), list[tuple[float, float]]()
        most = max(repeats, min(_MOST_DRAWS, max(pool.size, _DRAWN_SAMPLES) // size))
        while len(ends) < most:
            operator = HessianOperator(next(draws))
            ends.append(extreme_values(wrap(operator), seed=seed + len(ends), ignorable=ignorable))
            ledger.spend(2 * operator.num_matvecs * size)
            values = np.array(ends)[:, 0]
            if len(ends) >= repeats and values.std(ddof=1) / math.sqrt(len(ends)) <= _MEAN_TOL * abs(values.mean()):
                break
        points.append(DirectPoint(size, *zip(*ends, strict=True)))
    return tuple(points)


def extreme_values(operator: SymmetricOperator, *, seed: int, ignorable: float = 0.0) -> tuple[float, float]:
    """(largest, smallest) eigenvalue from one Krylov space; zeros where the matrix is below ``ignorable`` and rounding alone.

    A batch whose samples are all fitted has a Hessian of the size of rounding, whose products need not be symmetric.
    """
    try:
        largest, smallest = both_ends(operator, tol=_TOL, seed=seed, num_steps=8)
    except NotSymmetricError:
        # the size of the matrix by three steps of the power method, which need no symmetry
        vector = operator.random_vectors(1, generator=torch.Generator().manual_seed(seed))[:, 0]
        for _ in range(3):
            vector = operator.multiply(vector / max(float(vector.norm()), 1e-30))
        if float(vector.norm()) > ignorable:
            raise
        return 0.0, 0.0
    return float(largest.values[0]), float(smallest.values[0])


def top_and_noise(pool: SamplePool, *, seed: int, ledger: Ledger, wrap: Wrap) -> tuple[float, float]:
    """Only lambda_max of the full matrix and s^2 / lambda_max, at a fraction of the cost of everything."""
    full = HessianOperator(pool.parent)
    pairs = eigenpairs(wrap(full), k=1, tol=5e-2, seed=seed)
    ledger.spend(2 * full.num_matvecs * pool.size)
    noise = _group_noise(pool, wrap, pairs.vectors, seed=seed, ledger=ledger)
    top = float(pairs.values[0])
    return top, float(noise.along.mean()) / top if top > 0 else 0.0


@dataclass(frozen=True)
class _GroupNoise:
    """Noise of one sample, from disjoint groups of m: deviations of their Hessians scaled by sqrt(m)."""

    along: Floats  # (groups,) ||(h - H) v_1||^2
    block: Floats  # (k, k) V^T H V
    mixing: Floats  # (groups, k, k) V^T (h - H) V
    leakage: float  # the part of the first that leads out of the span of V
    isotropic: float  # ||(h - H) z||^2, z a random unit vector


def _group_noise(pool: SamplePool, turned: Wrap, vectors: Tensor, *, seed: int, ledger: Ledger) -> _GroupNoise:
    generator = torch.Generator().manual_seed(seed + 1)
    size, k = max(1, pool.size // _GROUPS), vectors.shape[1]
    groups = pool.groups(size, generator=generator)
    probe = torch.randn(vectors.shape[0], 1, generator=generator, dtype=torch.float64).to(vectors)
    directions = torch.cat([vectors, probe / probe.norm()], dim=1)
    products = [turned(HessianOperator(group)).multiply(directions) for group in groups]
    ledger.spend(2 * (k + 1) * size * len(groups))
    squared = torch.zeros(len(groups), k + 1, dtype=torch.float64, device=vectors.device)
    inside, block = squared.new_zeros(len(groups), k, k), squared.new_zeros(k, k)
    # some rows at a time: tables of all would be several times what the products take
    for rows in torch.split(torch.arange(len(vectors)), max(1, _TABLE // (len(groups) * (k + 1)))):
        here = slice(int(rows[0]), int(rows[-1]) + 1)
        stacked, span = torch.stack([product[here] for product in products]).double(), vectors[here].double()  # (groups, rows, k + 1)
        mean = stacked.mean(dim=0)
        # sqrt(m) scales the deviation of a mean over m samples to one sample, K / (K - 1) makes the variance unbiased
        deviation = (stacked - mean) * math.sqrt(size * len(groups) / (len(groups) - 1))
        squared += deviation.square().sum(dim=1)
        inside += torch.einsum("nj,gnk->gjk", span, deviation[:, :, :k])
        # groups are equal in size, so the mean of their products is the product with the full matrix
        block += span.T @ mean[:, :k]
    leakage = float((squared[:, 0] - inside[:, :, 0].square().sum(dim=1)).mean())
    mixing = ((inside + inside.transpose(1, 2)) / 2).cpu().numpy()
    whole = ((block + block.T) / 2).cpu().numpy()
    return _GroupNoise(squared[:, 0].cpu().numpy(), whole, mixing, max(leakage, 0.0), float(squared[:, k].mean()))


def effective_batch_size(batch_size: ArrayLike, num_samples: float = math.inf) -> Floats:
    """b = B / (1 - B / N): the batch size that fluctuates as much when drawn with replacement; inf for the full batch.

    Args:
        batch_size: B, drawn without replacement.
        num_samples: N; inf means with replacement, b = B.

    Raises:
        ValueError: B outside 1..N.

    Example:
        >>> effective_batch_size([50, 100], num_samples=100).tolist()
        [100.0, inf]
    """
    size = np.asarray(batch_size, dtype=np.float64)
    if np.any(size < 1) or np.any(size > num_samples):
        raise ValueError(f"batch sizes must lie between 1 and the {num_samples:g} samples, got {size.tolist()}")
    with np.errstate(divide="ignore"):
        return np.asarray(size / (1 - size / num_samples))


def additive_outlier(eigenvalue: ArrayLike, radius: ArrayLike) -> Floats:
    """Where an eigenvalue of H appears in H + E, E symmetric noise of semicircle radius 2 r: lambda + r^2 / lambda, or the edge.

    Outliers beyond +-r survive, the others drown in the bulk and read +-2 r; mirrored for negative eigenvalues. At most twice lambda.

    References:
        Granziol, Zohren and Roberts (2022), arXiv 2006.09092; Capitaine, Donati-Martin and Feral (2009), arXiv 0706.0136.

    Example:
        >>> float(additive_outlier(10.0, 2.0)), float(additive_outlier(1.0, 2.0))
        (10.4, 4.0)
    """
    lam, r = np.broadcast_arrays(np.asarray(eigenvalue, dtype=np.float64), np.asarray(radius, dtype=np.float64))
    sign = np.where(lam < 0, -1.0, 1.0)
    safe = np.where(lam == 0, 1.0, lam)
    return np.where(np.abs(lam) > r, lam + r**2 / safe, sign * 2 * r)
