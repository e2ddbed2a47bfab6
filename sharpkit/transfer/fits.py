"""Fits over sizes and rates: how a quantity grows with width, and the lowest point of loss against learning rate, with errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sharpkit._results import number


@dataclass(frozen=True)
class Slope:
    """The exponent a in size ~ width^a, fitted over widths and seeds.

    Attributes:
        value: a.
        stderr: its standard error, from the scatter about the line.
        half_width: half of the 95 % interval (Student's t).
        num_points: values that entered.
    """

    value: float
    stderr: float
    half_width: float
    num_points: int

    @property
    def interval(self) -> tuple[float, float]:
        """95 %."""
        return self.value - self.half_width, self.value + self.half_width

    def contains(self, value: float) -> bool:
        """Whether a value lies within the 95 % interval."""
        return abs(self.value - value) <= self.half_width

    def __str__(self) -> str:
        return f"{self.value:+.2f} +- {self.stderr:.2f}" if math.isfinite(self.value) else "unknown"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready but for NaN."""
        return {"value": self.value, "stderr": self.stderr, "half_width": self.half_width, "num_points": self.num_points}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Slope:
        """Back from :meth:`to_dict`, also after JSON."""
        value, stderr, half_width = (number(document[key]) for key in ("value", "stderr", "half_width"))
        return cls(value, stderr, half_width, int(document["num_points"]))


def log_slope(sizes: Mapping[int, Sequence[float]]) -> Slope:
    """Fit log size = c + a log width by least squares.

    Where every width has several seeds, the standard error is the larger of the one from the scatter about the line and the one from the
    scatter between seeds: a bent curve is not a precise slope.

    Args:
        sizes: width -> one value per seed, each positive; zeros, NaN and infinities are left out.

    Returns:
        the slope; NaN with infinite errors where fewer than two widths have a value.

    Example:
        >>> str(log_slope({64: [1.0, 1.0], 128: [2.0, 2.0], 256: [4.0, 4.0]}))
        '+1.00 +- 0.00'
    """
    points = [(math.log(w), math.log(v)) for w, values in sizes.items() for v in values if math.isfinite(v) and v > 0]
    x, y = np.array([p[0] for p in points]), np.array([p[1] for p in points])
    if len(set(x.tolist())) < 2:
        return Slope(math.nan, math.inf, math.inf, len(points))
    centred = x - x.mean()
    spread = float((centred**2).sum())
    value = float((centred * y).sum() / spread)
    residuals = y - y.mean() - value * centred
    freedom = len(points) - 2
    if freedom < 1:
        return Slope(value, math.inf, math.inf, len(points))
    stderr = math.sqrt(float((residuals**2).sum()) / freedom / spread)
    means = {float(w): y[x == w].mean() for w in set(x.tolist())}
    if len(means) >= 3 and len(points) > len(means):
        stderr = max(stderr, _of_means(means))
    from scipy.stats import t

    return Slope(value, stderr, float(t.ppf(0.975, freedom)) * stderr, len(points))


def _of_means(means: Mapping[float, float]) -> float:
    """Standard error of the slope from the widths' means alone."""
    x, y = np.array(list(means)), np.array(list(means.values()))
    centred = x - x.mean()
    spread = float((centred**2).sum())
    residuals = y - y.mean() - float((centred * y).sum() / spread) * centred
    return math.sqrt(float((residuals**2).sum()) / (len(x) - 2) / spread)


FINE = 0.5  # octaves: the grid around the optimum
_STEPS = (2.0, 1.0, FINE)  # octaves: of the search, from coarse to fine, by judgement
_WINDOW = 1.5  # octaves to each side that are run with every seed and enter the parabola
_REACH = 14.0  # octaves from the first guess, then the search gives up
_DEEP = 0.35  # share of the way from the best loss to the initial one beyond which a point says nothing about the bottom
_RESAMPLES = 400  # bootstrap samples: the ends of a 95 % interval then rest on ten samples each, by judgement

Array = np.ndarray[Any, Any]
Evaluate = Callable[[float, int], float]  # log2 factor, seed -> loss


@dataclass
class Curve:
    """Losses by log2 factor and seed at one size.

    Attributes:
        size: width or depth.
        losses: log2 factor -> seed -> loss, diverged runs as the initial loss.
        diverged: (log2 factor, seed) of those.
        initial: seed -> loss before training.
        interior: whether the best point has worse ones on both sides; None before the search.
    """

    size: int
    losses: dict[float, dict[int, float]] = field(default_factory=dict)
    diverged: set[tuple[float, int]] = field(default_factory=set)
    initial: dict[int, float] = field(default_factory=dict)
    interior: bool | None = None

    def points(self, seeds: Sequence[int]) -> list[float]:
        """Ascending log2 factors at which all these seeds were run."""
        return sorted(x for x, found in self.losses.items() if all(s in found for s in seeds))

    def values(self, points: Sequence[float], seeds: Sequence[int]) -> Array:
        """(seeds, points) losses."""
        return np.array([[self.losses[x][s] for x in points] for s in seeds])

    def mean(self, x: float) -> float:
        """Mean loss at a point over the seeds that were run there."""
        return float(np.mean(list(self.losses[x].values())))

    def best(self, seeds: Sequence[int]) -> float:
        """The grid point of lowest mean loss; one where every run diverged only if there is no other, and then that of the lowest rate."""

        def key(x: float) -> tuple[bool, float, float]:
            lost = all((x, s) in self.diverged for s in seeds)
            return lost, 0.0 if lost else float(np.mean([self.losses[x][s] for s in seeds])), x

        return min(self.points(seeds), key=key)

    @property
    def start_loss(self) -> float:
        """Mean initial loss."""
        return float(np.mean(list(self.initial.values()))) if self.initial else math.inf


def search(curve: Curve, evaluate: Evaluate, *, start: float, seeds: int) -> None:
    """Find the lowest point with one seed by ever finer steps, then run all seeds on seven points around it.

    Args:
        curve: filled.
        evaluate: runs a point; it may end the search by raising.
        start: first guess, log2 factor; rounded to the grid.
        seeds: runs at each point around the optimum.
    """
    start = round(start / FINE) * FINE
    everyone = range(seeds)

    def ask(x: float, which: Sequence[int]) -> None:
        for seed in which:
            if seed not in curve.losses.get(x, {}):
                curve.losses.setdefault(x, {})[seed] = evaluate(x, seed)

    ask(start, [0])
    for step in _STEPS:
        while abs(curve.best([0]) - start) <= _REACH:
            at = curve.best([0])
            ask(at - step, [0])
            ask(at + step, [0])
            if curve.best([0]) == at:
                break
    for _ in range(6):
        complete = curve.points(everyone)
        at = curve.best(everyone) if complete else curve.best([0])
        wanted = [at + i * FINE for i in range(-3, 4)]
        if abs(at - start) > _REACH:
            ask(at, everyone)
            break
        if all(x in complete for x in wanted):
            break
        for x in sorted(wanted, key=lambda x: abs(x - at)):
            ask(x, everyone)
    complete = curve.points(everyone)
    curve.interior = bool(complete) and complete[0] < curve.best(everyone) < complete[-1]


@dataclass(frozen=True)
class Optimum:
    """Where the loss is lowest at one size.

    Attributes:
        size: width or depth.
        log2: of the best factor, by the parabola.
        lower, upper: 95 % bootstrap interval over seeds; one half octave to each side for a single seed.
        per_seed: the same for each seed alone.
        loss: at the parabola's lowest point.
        curvature: a in log loss = log lowest + a (log2 factor - optimum)^2; 0 where the points have no parabola.
        interior: False where the lowest point lies at the edge of what was run.
    """

    size: int
    log2: float
    lower: float
    upper: float
    per_seed: tuple[float, ...]
    loss: float
    curvature: float
    interior: bool

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "size": self.size,
            "log2": self.log2,
            "lower": self.lower,
            "upper": self.upper,
            "per_seed": list(self.per_seed),
            "loss": self.loss,
            "curvature": self.curvature,
            "interior": self.interior,
        }


def optimum(curve: Curve, *, seeds: int, seed: int = 0) -> Optimum:
    """The bottom of a searched curve with its interval.

    Args:
        curve: after :func:`search`.
        seeds: that were run.
        seed: of the resampling.
    """
    everyone = range(seeds)
    points = curve.points(everyone)
    at = curve.best(everyone)
    window = [x for x in points if abs(x - at) <= _WINDOW + 1e-9]
    values, log = _scaled(curve.values(window, everyone))
    ceiling = _scaled(np.array([curve.start_loss]))[0][0] if log else curve.start_loss
    x = np.array(window)
    low, bottom, bend = _parabola(x, values.mean(0), ceiling)
    each = tuple(_parabola(x, row, ceiling)[0] for row in values)
    if seeds == 1:
        interval = (low - FINE, low + FINE)
    else:
        rng = np.random.default_rng(seed)
        drawn = [_parabola(x, values[rng.integers(seeds, size=seeds)].mean(0), ceiling)[0] for _ in range(_RESAMPLES)]
        widened = math.sqrt(seeds / (seeds - 1))  # resampling n values scatters by (n - 1) / n too little
        ends = np.quantile(drawn, [0.025, 0.975])
        interval = (low - widened * max(low - ends[0], 0.0), low + widened * max(ends[1] - low, 0.0))
    lower, upper = (float(end) for end in interval)
    lowest, curvature = (math.exp(bottom), bend) if log else (bottom, 0.0)
    return Optimum(curve.size, low, lower, upper, each, lowest, curvature, bool(curve.interior))


def _scaled(values: Array) -> tuple[Array, bool]:
    """Logarithms where all losses are positive."""
    return (np.log(values), True) if bool((values > 0).all()) else (values, False)


def _parabola(x: Array, y: Array, ceiling: float) -> tuple[float, float, float]:
    """(lowest point, value there, curvature) of a least-squares parabola near the lowest of the points."""
    at = int(np.argmin(y))
    near = np.argsort(np.abs(x - x[at]), kind="stable")
    deep = y <= y[at] + _DEEP * max(ceiling - y[at], 0.0)
    kept = sorted({*near[:3].tolist(), *np.flatnonzero(deep).tolist()})
    if len(kept) < 3:
        return float(x[at]), float(y[at]), 0.0
    a, b, c = np.polyfit(x[kept], y[kept], 2)
    if not a > 1e-12:
        return float(x[at]), float(y[at]), 0.0
    low = float(np.clip(-b / (2 * a), x[kept].min(), x[kept].max()))
    return low, float(min(a * low**2 + b * low + c, y[at])), float(a)


def loss_at(curve: Curve, x: float) -> float:
    """Mean loss at any factor, linear in log2 of it between the points that were run; beyond them, that of the last.

    Example:
        >>> loss_at(Curve(8, {0.0: {0: 1.0}, 2.0: {0: 3.0}}), 1.0)
        2.0
    """
    points = sorted(curve.losses)
    return float(np.interp(x, points, [curve.mean(p) for p in points]))


def sensitivity(curve: Curve, center: float, *, octaves: float = 2.0) -> float:
    """Mean of (min(loss, initial loss) - best loss) over log2 rate, from ``octaves`` below ``center`` to as many above.

    Example:
        >>> sensitivity(Curve(8, {-2.0: {0: 3.0}, 0.0: {0: 1.0}, 2.0: {0: 3.0}}), 0.0)
        1.0

    References:
        Wortsman et al., "Small-scale proxies for large-scale Transformer training instabilities" (2023), arXiv 2309.14322, section 3.
    """
    from scipy.integrate import trapezoid  # np.trapezoid came with numpy 2.0

    grid = np.linspace(center - octaves, center + octaves, 401)
    points = sorted(curve.losses)
    losses = np.minimum(np.interp(grid, points, [curve.mean(x) for x in points]), curve.start_loss)
    return float(trapezoid(losses, grid) / (2 * octaves)) - min(curve.mean(x) for x in curve.losses)
