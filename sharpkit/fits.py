"""How a quantity grows with width, batch size or steps: power laws through measured points, with intervals that cover."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sharpkit._arguments import as_seed, flag, real, reals, shown, whole
from sharpkit._calls import public_call
from sharpkit._results import Bounded, Result, student_factor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["PowerLaw", "Slope", "bootstrap_interval", "log_slope", "power_law"]

Array = NDArray[np.float64]

NUM_RESAMPLES = 400  # of a bootstrap, by judgement: each end of a 95 % interval then rests on the ten outermost
_HUBER = 1.345  # scatters: beyond, a residual counts linearly; with Gaussian ones 95 % as efficient as least squares (Huber 1964)
_ROUNDS = 50  # of reweighting at most, by judgement: it settles to 1e-9 in 10 to 20
_STARTS = (0.1, 0.5, 0.9)  # of the least y, where a search for the offset begins; by judgement, the fit is not convex in it
_DENSE = 200  # points of a drawn law


# -- intervals by resampling --------------------------------------------------------------------------------------------------
def bootstrap_interval(
    statistic: Callable[[NDArray[np.int64]], float], count: int, *, seed: int = 0, num_resamples: int = NUM_RESAMPLES
) -> tuple[float, float]:
    """A 95 % interval of a statistic of a few runs, by resampling the runs.

    The percentile interval's distances from the statistic of all runs are widened by sqrt(n / (n - 1)), since n values resampled scatter
    by (n - 1) / n too little.

    Args:
        statistic: from (n,) indices of runs, some of them more than once, to a number.
        count: n, at least 2.
        seed: seeds the resampling.
        num_resamples: how often.

    Returns:
        its two ends.

    Raises:
        ValueError: fewer than two runs.

    Example:
        >>> import numpy as np
        >>> losses = np.array([1.0, 1.1, 1.2, 0.9])
        >>> low, high = bootstrap_interval(lambda drawn: float(losses[drawn].mean()), 4)
        >>> bool(low < losses.mean() < high)
        True

    References:
        Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    count, num_resamples = whole("count", count, least=2), whole("num_resamples", num_resamples)
    value, rng = statistic(np.arange(count)), np.random.default_rng(as_seed(seed))
    drawn = [statistic(rng.integers(count, size=count)) for _ in range(num_resamples)]
    return _widened(value, drawn, math.sqrt(count / (count - 1)))


def _widened(value: float, drawn: Sequence[float] | Array, factor: float) -> tuple[float, float]:
    """Percentiles of resampled values, their distances from the value itself multiplied by a factor."""
    low, high = (float(q) for q in np.quantile(drawn, [0.025, 0.975]))
    return value - factor * max(value - low, 0.0), value + factor * max(high - value, 0.0)


# -- power laws ---------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class PowerLaw(Result, kind="power_law"):
    """y = offset + amplitude x^exponent, fitted robustly in logarithms.

    Attributes:
        amplitude, exponent, offset: of the law, each a number with its 95 % interval; the offset is 0 unless it was asked for.
        scatter: of log y about the law, by the median of the absolute residuals: what one point is off, relatively.
        x, y: (n,) the points.
        resamples: (amplitude, exponent, offset) of each fit to resampled residuals, from which intervals come.
    """

    amplitude: Bounded
    exponent: Bounded
    offset: Bounded
    scatter: float
    x: tuple[float, ...]
    y: tuple[float, ...]
    resamples: tuple[tuple[float, float, float], ...]

    def at(self, x: float) -> Bounded:
        """The law at x, with a 95 % interval of the law there; a single measurement scatters about it by :attr:`scatter` besides.

        Example:
            >>> law = power_law([1, 2, 4, 8], [3.0, 6.0, 12.0, 24.0])
            >>> round(law.at(16), 6)
            48.0
        """
        x = real("x", x, above=0)
        value = float(_value(np.array([self.amplitude, self.exponent, self.offset]), np.array(x)))
        drawn = np.log(np.array([float(_value(np.array(row), np.array(x))) for row in self.resamples]))
        low, high = _widened(math.log(value), drawn, self._factor)
        return Bounded(value, math.exp(low), math.exp(high))

    @property
    def _factor(self) -> float:
        return student_factor(len(self.x) - (3 if self.has_offset else 2) + 1)

    @property
    def has_offset(self) -> bool:
        """Whether an offset was fitted."""
        return self.offset.upper > 0

    def findings(self) -> list[str]:
        """What came out, in sentences."""
        text = f"y grows as x^{self.exponent.value:.3g} (95 %: {self.exponent.lower:.3g} to {self.exponent.upper:.3g})"
        if self.has_offset:
            text += f" above an offset of {self.offset.value:.3g} ({self.offset.lower:.3g} to {self.offset.upper:.3g})"
        said = [f"{text}; points scatter by {self.scatter:.1%} about it."]
        if self.exponent.lower <= 0 <= self.exponent.upper:
            said.append("The interval contains 0: that y depends on x at all is not shown.")
        return said

    def plot(self, ax: Axes | None = None, *, x: str = "x", y: str = "y") -> Axes:
        """Points, law and interval on logarithmic axes; ``x`` and ``y`` name them, with units.

        Example:
            >>> import matplotlib; matplotlib.use("Agg")
            >>> power_law([1, 2, 4, 8], [3.0, 6.1, 12.0, 24.5]).plot(x="width", y="lambda_max").get_xscale()
            'log'
        """
        from sharpkit.plots.laws import draw_power_law

        grid = np.geomspace(min(self.x), max(self.x), _DENSE)
        return draw_power_law(self.x, self.y, grid, [self.at(v) for v in grid.tolist()], x=x, y=y, ax=ax)

    def __repr__(self) -> str:
        start = f"{self.offset.value:.3g} + " if self.has_offset else ""
        ends = f"{self.exponent.lower:.3g} to {self.exponent.upper:.3g}"
        return f"PowerLaw(y = {start}{self.amplitude.value:.3g} x^{self.exponent.value:.3g}, exponent {ends}, {len(self.x)} points)"


@public_call
def power_law(
    x: Sequence[float],
    y: Sequence[float],
    *,
    offset: bool = False,
    errors: Sequence[float] | None = None,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
    name: str = "",
) -> PowerLaw:
    """Fit y = offset + amplitude x^exponent through measured points, robustly, with 95 % intervals.

    Residuals are those of log y; beyond 1.345 times their scatter they count linearly (Huber), so that a diverged run does not turn the
    law. Intervals come from refits to resampled residuals, each divided by what leverage leaves of it, and are widened by Student's t for
    the few points there are. One point far off on one side still moves the amplitude, which its interval does not know of.

    Args:
        x: (n,) positive.
        y: (n,) positive.
        offset: fit a level of at least 0 that y approaches, too, as losses have it.
        errors: (n,) standard errors of y; only their ratios count, as weights.
        seed: seeds the resampling.
        num_resamples: refits.
        name: of the result, which pages and comparisons show.

    Raises:
        ValueError: different lengths, numbers that are not positive and finite, or too few different x: 3, with an offset 4.

    Example:
        >>> law = power_law([64, 128, 256, 512], [3.0, 4.3, 5.9, 8.6])
        >>> round(law.exponent, 2), law.exponent.lower < 0.5 < law.exponent.upper
        (0.5, True)

    References:
        Huber (1964), "Robust estimation of a location parameter"; Davison and Hinkley, Bootstrap Methods and their Application (1997),
        section 6.3.
    """
    xs, ys = np.array(reals("x", x, above=0)), np.array(reals("y", y, above=0))
    if xs.shape != ys.shape:
        raise ValueError(f"x and y must be of one length, got {len(xs)} and {len(ys)} numbers")
    offset = flag("offset", offset)
    needed = 4 if offset else 3
    if len(np.unique(xs)) < needed:
        law = "a power law with an offset" if offset else "a power law"
        raise ValueError(f"{law} and its error need at least {needed} different x, got {len(np.unique(xs))}")
    if errors is None:
        weights = np.ones_like(ys)
    else:
        weights = ys / np.array(reals("errors", errors, length=len(ys), above=0))  # 1 / the error of log y
        weights /= np.sqrt(np.mean(weights**2))
    fit = _fit_with_offset if offset else _fit_line
    best = fit(np.log(xs), np.log(ys), weights, None)
    left = (np.log(ys) - np.log(_value(best, xs))) * weights
    scatter = _scatter(left, 3 if offset else 2)
    spread = left / np.sqrt(np.maximum(1 - _leverages(best, xs, weights, offset), 0.1))  # a point that the law must pass shows nothing
    spread -= spread.mean()
    rng, drawn = np.random.default_rng(as_seed(seed)), []
    for _ in range(whole("num_resamples", num_resamples)):
        again = np.log(_value(best, xs)) + rng.choice(spread, len(xs)) / weights
        drawn.append(fit(np.log(xs), again, weights, best))
    factor = student_factor(len(xs) - needed + 2)  # which takes a count, one more than the degrees of freedom
    ends = [_widened(value, column, factor) for value, column in zip(best.tolist(), np.array(drawn).T, strict=True)]
    # an amplitude is positive and an offset at least 0: where widening passes that, the interval ends there
    ends[0] = tuple(np.exp(_widened(math.log(best[0]), np.log(np.array(drawn)[:, 0]), factor)).tolist())
    ends[2] = (max(ends[2][0], 0.0), ends[2][1])
    amplitude, exponent, level = (Bounded(value, *end) for value, end in zip(best.tolist(), ends, strict=True))
    rows = tuple((a, b, c) for a, b, c in np.array(drawn).tolist())
    return PowerLaw(amplitude, exponent, level, scatter, tuple(xs.tolist()), tuple(ys.tolist()), rows)


def _value(law: Array, x: Array) -> Array:
    amplitude, exponent, offset = law
    return np.asarray(offset + amplitude * x**exponent)


def _scatter(residuals: Array, parameters: int) -> float:
    """Standard deviation by the median of absolute residuals, without those that the parameters took to 0."""
    kept = np.sort(np.abs(residuals))[max(parameters - 1, 0) :] if len(residuals) > parameters else np.abs(residuals)
    return float(1.4826 * np.median(kept))


def _fit_line(logx: Array, logy: Array, weights: Array, start: Array | None) -> Array:
    """(amplitude, exponent, 0) by least squares, reweighted until large residuals count linearly."""
    own, level, slope = weights**2, math.nan, math.nan
    for _ in range(_ROUNDS):
        before, total = (level, slope), own.sum()
        middle, height = float(own @ logx) / total, float(own @ logy) / total
        slope = float(own @ ((logx - middle) * (logy - height)) / (own @ (logx - middle) ** 2))
        level = float(height - slope * middle)
        if abs(level - before[0]) + abs(slope - before[1]) < 1e-9:  # NaN at first
            break
        sizes = np.abs(logy - level - slope * logx) * weights
        limit = _HUBER * _scatter(sizes, 2)
        # points that scatter by rounding alone are left as they are
        own = weights**2 * (np.minimum(1.0, limit / np.maximum(sizes, 1e-300)) if limit > 1e-12 else 1.0)
    return np.array([math.exp(level), slope, 0.0])


def _fit_with_offset(logx: Array, logy: Array, weights: Array, start: Array | None) -> Array:
    """(amplitude, exponent, offset), the offset at least 0."""
    from scipy.optimize import least_squares

    least = math.exp(float(logy.min()))

    def residuals(law: Array) -> Array:  # law: log amplitude, exponent, offset over the least y
        return np.asarray((np.log(law[2] * least + np.exp(np.clip(law[0] + law[1] * logx, -700, 700))) - logy) * weights)

    starts = []
    for share in _STARTS if start is None else ():
        above = np.maximum(np.exp(logy) - share * least, 1e-3 * least)
        amplitude, exponent, _ = _fit_line(logx, np.log(above), weights, None)
        starts.append(np.array([math.log(amplitude), exponent, share]))
    if start is not None:
        starts.append(np.array([math.log(start[0]), start[1], start[2] / least]))
    bounds, best = ([-np.inf, -np.inf, 0.0], np.inf), None
    for begin in starts:  # plain least squares first: it says how large a residual is
        begin[2] = max(begin[2], 1e-6)
        found = least_squares(residuals, begin, bounds=bounds, x_scale="jac")
        best = found if best is None or found.cost < best.cost else best
    assert best is not None
    scale = _HUBER * _scatter(best.fun, 3)
    if scale > 1e-9:
        best = least_squares(residuals, best.x, bounds=bounds, x_scale="jac", loss="huber", f_scale=scale)
    return np.array([math.exp(best.x[0]), best.x[1], best.x[2] * least])


def _leverages(law: Array, x: Array, weights: Array, offset: bool) -> Array:
    """(n,) the diagonal of the hat matrix of the law's linearisation in log y."""
    amplitude, exponent, level = law
    share = amplitude * x**exponent / _value(law, x)  # d log y / d log amplitude
    columns = [share, share * np.log(x), *([1 / _value(law, x)] if offset and level > 0 else [])]
    q = np.linalg.qr(np.stack(columns, axis=1) * weights[:, None])[0]
    return np.asarray((q**2).sum(axis=1))


# -- slopes of logarithms, over several seeds each ------------------------------------------------------------------------------
@dataclass(frozen=True)
class Slope(Result):
    """The exponent a in size ~ width^a, fitted over widths and seeds.

    Attributes:
        value: the exponent a.
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

    @property
    def known(self) -> bool:
        """Whether both the value and its interval are finite."""
        return math.isfinite(self.value) and math.isfinite(self.half_width)

    def contains(self, value: float) -> bool:
        """Whether a value lies within the 95 % interval."""
        return abs(self.value - value) <= self.half_width

    def __str__(self) -> str:
        # two decimals, more where the error is smaller than that
        places = max(2, math.ceil(-math.log10(self.stderr))) if 1e-4 < self.stderr < math.inf else 2
        error = f"{self.stderr:.{places}f}" if self.stderr > 1e-4 else "0"
        return f"{self.value:+.{places}f} +- {error}" if math.isfinite(self.value) else "unknown"


def _values(values: Any) -> list[float]:
    return (
        [v if isinstance(v, float) else real("each value", v) for v in values]
        if isinstance(values, Iterable)
        else [real("a value", values)]
    )


def log_slope(sizes: Mapping[int, Sequence[float]]) -> Slope:
    """Fit log size = c + a log width by least squares, over one value per seed of each width; zeros, NaN and infinities are left out.

    If every width has several seeds, the standard error is the larger of the one from the scatter about the line and the one from the
    means of the widths alone: a bent curve is not a precise slope.

    Returns:
        the slope; NaN with infinite errors if fewer than two widths have a value.

    Example:
        >>> str(log_slope({64: [1.0, 1.0], 128: [2.0, 2.0], 256: [4.0, 4.0]}))
        '+1.00 +- 0'
    """
    if not isinstance(sizes, Mapping):
        raise TypeError(f"sizes must be a dict from each width to one value for each seed, got {shown(sizes)}")
    rows = {real("each width", w, above=0): [float(v) for v in _values(values)] for w, values in sizes.items()}
    points = [(math.log(w), math.log(v)) for w, values in rows.items() for v in values if math.isfinite(v) and v > 0]
    x, y = np.array([p[0] for p in points]), np.array([p[1] for p in points])
    widths = np.unique(x)
    if len(widths) < 2:
        return Slope(math.nan, math.inf, math.inf, len(points))
    value, left, spread = _line(x, y)
    freedom = len(points) - 2
    if freedom < 1:
        return Slope(value, math.inf, math.inf, len(points))
    stderr = math.sqrt(left / freedom / spread)
    if len(widths) >= 3 and len(points) > len(widths):
        # with many seeds the scatter about the line shrinks even where the widths' means do not lie on one
        _, left, spread = _line(widths, np.array([y[x == w].mean() for w in widths]))
        stderr = max(stderr, math.sqrt(left / (len(widths) - 2) / spread))
    from scipy.stats import t

    return Slope(value, stderr, float(t.ppf(0.975, freedom)) * stderr, len(points))


def _line(x: Array, y: Array) -> tuple[float, float, float]:
    """A least-squares line: its slope, the sum of squared residuals, and the sum of squared deviations of x from their mean."""
    centred = x - x.mean()
    spread = float((centred**2).sum())
    value = float((centred * y).sum() / spread)
    return value, float(((y - y.mean() - value * centred) ** 2).sum()), spread
