"""The lowest point of loss against learning rate: found by trying rates, with an interval over seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sharpkit._results import Result
from sharpkit.fits import bootstrap_interval
from sharpkit.training_run import as_seeds

Array = np.ndarray[Any, Any]
Evaluate = Callable[[float, int], float]  # (log2 factor, seed) -> loss

FINE = 0.5  # octaves between points around the optimum, by judgement: seven of them span a bowl wider than the seeds' optima scatter
_STEPS = (2.0, 1.0, FINE)  # octaves, by judgement: large ones leave a bad first guess, the last is the grid
_WINDOW = 1.5  # octaves to each side of the best point that enter the parabola, by judgement: three points of the grid
_REACH = 14.0  # octaves from the first guess, a factor of 16,000, by judgement: a guess further off is a mistake, and the search gives up
# Share of the way from the best loss to the initial one, by judgement: points above it lie on the walls, where the loss is no parabola.
_DEEP = 0.35
_PASSES = 6  # by judgement: how often the window is moved when running all seeds shows a better point than the first seed did


@dataclass
class Curve(Result, saved=("size", "initial=start_loss", "points=rows")):
    """Losses by log2 factor and seed at one size."""

    size: int  # width or depth
    losses: dict[float, dict[int, float]] = field(default_factory=dict)  # log2 factor -> seed -> loss, diverged runs as the initial loss
    diverged: set[tuple[float, int]] = field(default_factory=set)  # the (log2 factor, seed) of those
    initial: dict[int, float] = field(default_factory=dict)  # seed -> loss before training

    def points(self, seeds: Collection[int]) -> list[float]:
        """Ascending log2 factors at which all these seeds were run."""
        return sorted(x for x, runs in self.losses.items() if all(s in runs for s in seeds))

    def mean(self, x: float) -> float:
        """Mean loss at a point over the seeds that were run there."""
        return float(np.mean(list(self.losses[x].values())))

    def best(self, seeds: Collection[int]) -> float:
        """The grid point of lowest mean loss; one where every run diverged only if there is no other, and then that of the lowest rate."""

        def key(x: float) -> tuple[bool, float, float]:
            lost = all((x, s) in self.diverged for s in seeds)
            # of points that all diverged the lowest rate is nearest to those that train
            return lost, 0.0 if lost else float(np.mean([self.losses[x][s] for s in seeds])), x

        return min(self.points(seeds), key=key)

    @property
    def interior(self) -> bool:
        """Whether the best of the points at which every seed was run has worse ones on both sides."""
        seeds = {s for runs in self.losses.values() for s in runs}
        points = self.points(seeds)
        return bool(points) and points[0] < self.best(seeds) < points[-1]

    @property
    def start_loss(self) -> float:
        """Mean initial loss."""
        return float(np.mean(list(self.initial.values()))) if self.initial else math.inf

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Each point with the losses of all its runs and how many of them diverged."""
        return [
            {"log2": x, "losses": list(runs.values()), "diverged": sum((x, s) in self.diverged for s in runs)}
            for x, runs in sorted(self.losses.items())
        ]


def search(curve: Curve, evaluate: Evaluate, *, start: float, seeds: int | Sequence[int]) -> None:
    """Locate the lowest point with one seed by ever finer steps from a first guess, then run all seeds on seven points around it."""
    everyone = as_seeds(seeds)
    first = everyone[:1]
    start = round(start / FINE) * FINE  # on one grid at every size, so that runs can be shared and curves compared point by point

    def ask(x: float, which: Sequence[int]) -> None:
        for seed in which:
            if seed not in curve.losses.get(x, {}):
                curve.losses.setdefault(x, {})[seed] = evaluate(x, seed)

    ask(start, first)
    for step in _STEPS:
        while abs(curve.best(first) - start) <= _REACH:
            at = curve.best(first)
            ask(at - step, first)
            ask(at + step, first)
            if curve.best(first) == at:
                break
    for _ in range(_PASSES):
        complete = curve.points(everyone)
        at = curve.best(everyone) if complete else curve.best(first)
        wanted = [at + i * FINE for i in range(-3, 4)]
        if abs(at - start) > _REACH:
            ask(at, everyone)
            break
        if all(x in complete for x in wanted):
            break
        # from the middle outwards: if the runs end early, those at the optimum are there
        for x in sorted(wanted, key=lambda x: abs(x - at)):
            ask(x, everyone)


@dataclass(frozen=True)
class Optimum(Result):
    """The learning rate of lowest loss at one size."""

    size: int  # width or depth
    log2: float  # log2 of the best factor, by the parabola
    lower: float  # 95 % bootstrap interval over seeds; one half octave to each side for a single seed
    upper: float
    per_seed: tuple[float, ...]  # the best log2 factor of each seed alone
    loss: float  # at the parabola's lowest point
    curvature: float  # the a in log loss = log lowest + a (log2 factor - optimum)^2; 0 if the points have no parabola
    interior: bool  # False if the lowest point lies at the edge of what was run


def optimum(curve: Curve, *, seeds: int | Sequence[int], seed: int = 0) -> Optimum:
    """The bottom of a searched curve with its interval; ``seed`` seeds the resampling."""
    everyone = as_seeds(seeds)
    at, count = curve.best(everyone), len(everyone)
    window = [x for x in curve.points(everyone) if abs(x - at) <= _WINDOW + 1e-9]
    values = np.array([[curve.losses[x][s] for x in window] for s in everyone])  # (seeds, points)
    # in logarithms the bowl of a loss is closest to a parabola; losses that are not all positive have none
    log, ceiling = bool((values > 0).all()), curve.start_loss
    if log:
        values, ceiling = np.log(values), math.log(ceiling) if ceiling > 0 else -math.inf
    x = np.array(window)
    low, bottom, bend = _parabola(x, values.mean(0), ceiling)
    each = tuple(_parabola(x, row, ceiling)[0] for row in values)
    if count == 1:
        lower, upper = low - FINE, low + FINE
    else:
        lower, upper = bootstrap_interval(lambda drawn: _parabola(x, values[drawn].mean(0), ceiling)[0], count, seed=seed)
    lowest, curvature = (math.exp(bottom), bend) if log else (bottom, 0.0)
    return Optimum(curve.size, low, lower, upper, each, lowest, curvature, curve.interior)


def _parabola(x: Array, y: Array, ceiling: float) -> tuple[float, float, float]:
    """(lowest point, value there, curvature) of a least-squares parabola near the lowest of the points."""
    at = int(np.argmin(y))
    near = np.argsort(np.abs(x - x[at]), kind="stable")
    deep = y <= y[at] + _DEEP * max(ceiling - y[at], 0.0)
    # the three nearest in any case: fewer determine no parabola
    kept = sorted({*near[:3].tolist(), *np.flatnonzero(deep).tolist()})
    if len(kept) < 3:
        return float(x[at]), float(y[at]), 0.0
    a, b, c = np.polyfit(x[kept], y[kept], 2)
    if not a > 1e-12:  # flat to rounding, or bent downwards: the best point of the grid is all there is
        return float(x[at]), float(y[at]), 0.0
    low = float(np.clip(-b / (2 * a), x[kept].min(), x[kept].max()))  # never further out than what was run
    return low, float(min(a * low**2 + b * low + c, y[at])), float(a)


def penalty_between(small: Curve, large: Curve, *, seeds: int | Sequence[int], seed: int = 0) -> tuple[float, float, float]:
    """Loss at the large size with the small size's best factor, over the lowest loss there, minus 1: (value, lower, upper).

    95 % by resampling seeds, the same at both sizes: they share data and its order. One seed: the small size's optimum half an octave off
    to either side. NaN where a loss is not positive.
    """
    everyone = as_seeds(seeds)
    here, there = _Bowl(small, everyone), _Bowl(large, everyone)
    if not (here.positive and there.positive):
        return math.nan, math.nan, math.nan
    whole = np.arange(len(everyone))
    best = here.lowest(whole)
    value = there.above(best, whole)
    if len(everyone) == 1:
        sides = [there.above(best + shift, whole) for shift in (-FINE, FINE)]
        return value, 0.0 if min(sides) <= value else value, max(value, *sides)
    lower, upper = bootstrap_interval(lambda drawn: there.above(here.lowest(drawn), drawn), len(everyone), seed=seed)
    return value, max(lower, 0.0), upper


class _Bowl:
    """The points of one curve around its best, by seed, and the parabola through any resampling of the seeds."""

    def __init__(self, curve: Curve, seeds: tuple[int, ...]) -> None:
        self.curve = curve
        at = curve.best(seeds)
        window = [x for x in curve.points(seeds) if abs(x - at) <= _WINDOW + 1e-9]
        values = np.array([[curve.losses[x][s] for x in window] for s in seeds])  # (seeds, points)
        self.x = np.array(window)
        self.positive = bool((values > 0).all()) and curve.start_loss > 0
        if self.positive:
            self.logs, self.ceiling = np.log(values), math.log(curve.start_loss)

    def lowest(self, drawn: Array) -> float:
        return _parabola(self.x, self.logs[drawn].mean(0), self.ceiling)[0]

    def above(self, x: float, drawn: Array) -> float:
        """Relative loss above the lowest: by the parabola within an octave of it, between the points that were run further off."""
        low, bottom, bend = _parabola(self.x, self.logs[drawn].mean(0), self.ceiling)
        if abs(x - low) <= 1.0 and bend > 0:
            return math.expm1(bend * (x - low) ** 2)
        return max(loss_at(self.curve, x) / math.exp(bottom) - 1, 0.0)


def loss_at(curve: Curve, x: float) -> float:
    """Mean loss at any factor, linear in its log2 between the points that were run; beyond them, that of the last.

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

    points = sorted(curve.losses)
    means = [curve.mean(x) for x in points]
    grid = np.linspace(center - octaves, center + octaves, 401)  # a hundred points an octave: far finer than the points that were run
    losses = np.minimum(np.interp(grid, points, means), curve.start_loss)
    return float(trapezoid(losses, grid) / (2 * octaves)) - min(means)
