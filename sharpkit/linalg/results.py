"""What the algorithms return, values with their error and cost; budgets that stop them and progress on the way."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from sharpkit._arguments import called, check_callable, check_callback, real, reals, shown, whole
from sharpkit._checkpoint import clock, step, without_steps
from sharpkit._errors import ConvergenceWarning
from sharpkit._results import ErrorKind, Progress, ProgressCallback, Result, format_with_error, standard_error
from sharpkit.objective.memory import human_bytes
from sharpkit.operators.base import SymmetricOperator

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = np.ndarray[Any, Any]

# Residual, relative to the width of the spectrum, up to which a Ritz value at an end counts as converged, so that it may be an outlier.
# By judgement: ten times finer than anything a density plot shows, and reached within the default 80 steps by every isolated eigenvalue.
OUTLIER_RESIDUAL = 1e-2
HALF = 5e-4  # by the formats' definition: float16 rounds to 1e-3, bfloat16 to 8e-3, float32 to 1e-7

# Factors of a standard error, plain, by skewness / sqrt(count) and by its square, chosen on simulated quadratic forms of the six spectra of
# experiments/error_coverage.py so that two stated errors hold the truth in 93 % of the cases or more; six forms of a single eigenvalue
# held it in 90. An estimate that stops on its own spread stops early on lucky draws; the square tells few chi-square samples (.5 at six of
# them) from few normal ones (.2).
_STOPPING, _SKEWED, _VERY_SKEWED = 1.1, 0.6, 3.5


def warn_unconverged(text: str) -> None:
    """Warn, at the line outside this package that made the call."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == __name__.partition(".")[0]:
        level, frame = level + 1, frame.f_back
    warnings.warn(text, ConvergenceWarning, stacklevel=level)


def probe_error(samples: Array) -> float:
    """Standard error of the mean of random quadratic forms, widened so that two of them hold the truth in 93 of 100 cases or more.

    Student's factor covers a small number. A few large eigenvalues make the forms skewed: then mean and spread are low together, and the
    error of the mean is of the order of the skewness / sqrt(count) larger than it looks (Johnson, 1978).
    """
    apart = samples - samples.mean() if len(samples) else samples
    size = np.abs(apart).max(initial=0.0)
    if len(samples) < 2 or size == 0.0:
        return standard_error(samples)
    apart = apart / size
    skewness = abs(float((apart**3).mean())) / float((apart**2).mean()) ** 1.5
    shift = skewness / math.sqrt(len(samples))
    return float(standard_error(samples) * (_STOPPING + _SKEWED * shift + _VERY_SKEWED * shift**2))


class Budget:
    """Counts the products and seconds of one computation and says when either is exhausted.

    Attributes:
        vectors: that the computation holds at most, which is told with its progress.
        place: where else than beside the operator they are kept.
    """

    def __init__(
        self,
        operator: SymmetricOperator,
        *,
        max_matvecs: int | None = None,
        max_seconds: float | None = None,
        callback: ProgressCallback | None = None,
    ) -> None:
        check_callback(callback)
        self._operator, self._callback = operator, callback
        self._max_matvecs = None if max_matvecs is None else whole("max_matvecs", max_matvecs)
        self._max_seconds = None if max_seconds is None else real("max_seconds", max_seconds, above=0, infinite=True)
        self.vectors, self.place = 0, ""
        self._first_matvec = operator.num_matvecs
        self._start = clock()

    @property
    def is_timed(self) -> bool:
        """Whether seconds are limited."""
        return self._max_seconds is not None

    @property
    def num_matvecs(self) -> int:
        """Products made since this budget was opened."""
        return self._operator.num_matvecs - self._first_matvec

    @property
    def matvecs_left(self) -> float:
        """Products that are left; inf where they are not limited."""
        return math.inf if self._max_matvecs is None else self._max_matvecs - self.num_matvecs

    @property
    def seconds(self) -> float:
        """Seconds since this budget was opened, with those that kept steps had taken."""
        return clock() - self._start

    def allows(self, matvecs: int = 1) -> bool:
        """Whether so many more products fit into the product budget and the time is not up."""
        if matvecs > self.matvecs_left:
            return False
        # the first process's clock decides, so that all processes of a distributed run stop at the same product
        limit = self._max_seconds
        return limit is None or step("whether time is left", lambda: self._operator.agree(self.seconds) < limit)

    def report(self, expected_matvecs: int, text: str) -> None:
        """Tell the callback, if there is one."""
        if self._callback is not None:
            done, elapsed = self.num_matvecs, self.seconds
            # never more than the budget allows, never less than has been spent
            expected = max(done, expected_matvecs if self._max_matvecs is None else min(expected_matvecs, self._max_matvecs))
            left = elapsed / done * (expected - done) if done else math.nan
            with without_steps():
                self._callback(Progress(done, expected, elapsed, left, text, peak_bytes=self._peak_bytes(), choices=self._choices()))

    def _vector_bytes(self) -> float:
        # recurrences run in float32 at least
        return self.vectors * self._operator.length * max(self._operator.dtype.itemsize, torch.float32.itemsize)

    def _peak_bytes(self) -> float:
        return self._operator.bytes_needed() + (0.0 if self.place else self._vector_bytes())

    def _choices(self) -> dict[str, str]:
        choices = dict(self._operator.choices())
        if self.vectors:
            choices["basis"] = f"{self.vectors} vectors, {human_bytes(self._vector_bytes())}{self.place and f', {self.place}'}"
        return choices


@dataclass(frozen=True)
class Estimate(Result, kind="estimate"):
    """A number with its error and cost.

    Attributes:
        value: the estimate.
        stderr: the error of ``value``, of the kind that ``error_kind`` names; 0 where it is exact up to rounding.
        num_matvecs: products spent.
        seconds: wall time spent.
        method: how it was made.
        converged: whether the asked tolerance was reached.
        error_kind: ``"standard error"`` of a random estimate, ``"residual bound"`` of an eigenvalue (one lies within it), or ``"half
            bracket"`` of a bisection.
    """

    value: float
    stderr: float
    num_matvecs: int = 0
    seconds: float = 0.0
    method: str = ""
    converged: bool = True
    error_kind: ErrorKind = field(default="standard error", kw_only=True)

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        return format_with_error(self.value, self.stderr)

    def __repr__(self) -> str:
        # a standard error is what a reader expects: only the other kinds are named
        number = format_with_error(self.value, self.stderr, None if self.error_kind == "standard error" else self.error_kind)
        how = f", {self.method}" if self.method else ""
        return f"Estimate({number}, {self.num_matvecs} products{how}{'' if self.converged else ', NOT converged'})"

    @property
    def interval(self) -> tuple[float, float]:
        """value -+ 2 errors."""
        return (self.value - 2 * self.stderr, self.value + 2 * self.stderr)

    def rounded(self, rounding: float) -> Self:
        """The same with an error of twice the rounding of a half-precision type at least, as in a Krylov space: samples do not show it."""
        # not added to the error: of exact traces and norms of small networks a sixth of this was used (tests/linalg/test_rounding.py)
        return self if rounding < HALF else replace(self, stderr=max(self.stderr, 2 * rounding * abs(self.value)))

    def root(self) -> Self:
        """The square root, its error by the delta method: d sqrt(x) = dx / (2 sqrt(x))."""
        root = math.sqrt(max(self.value, 0.0))
        # At 0 the derivative is infinite; sqrt(stderr) is as far from 0 as the root may lie.
        return replace(self, value=root, stderr=self.stderr / (2 * root) if root > 0 else math.sqrt(self.stderr))


@dataclass(frozen=True)
class Eigenpairs(
    Result, kind="eigenpairs", saved=("which", "values", "residuals", "converged", "num_matvecs", "seconds", "tol", "outcome")
):
    """Eigenvalues with eigenvectors, each with its residual: some eigenvalue lies within ``residuals[j]`` of ``values[j]``.

    Attributes:
        values: (k,) float64 on the CPU, descending.
        vectors: (n, k) orthonormal, on the operator's device; not part of the document.
        residuals: (k,) float64 on the CPU, ||A v - value v||.
        converged: (k,) bool on the CPU: the error of the value is within ``tol`` of the value itself, or the value is 0 to rounding, and
            there is no sign of a missed eigenvalue.
        num_matvecs: products spent.
        seconds: wall time spent.
        which: ``"largest"``, ``"smallest"`` or ``"magnitude"``.
        tol: the asked tolerance, relative to each value.
        outcome: one line: why the iteration ended.
    """

    values: Tensor
    vectors: Tensor = field(repr=False)
    residuals: Tensor
    converged: Tensor
    num_matvecs: int
    seconds: float = 0.0
    which: str = "largest"
    tol: float = 1e-3
    outcome: str = "converged"

    def __repr__(self) -> str:
        shown = ", ".join(
            format_with_error(float(v), float(r)) + ("" if bool(c) else " (not converged)")
            for v, r, c in list(zip(self.values, self.residuals, self.converged, strict=True))[:10]
        )
        more = f", ... {len(self.values)} in all" if len(self.values) > 10 else ""
        return f"Eigenpairs({self.which}: {shown}{more}; {self.num_matvecs} products, {self.outcome})"


def _applied(function: Callable[[Array], Array], points: Tensor) -> Array:
    """A function of arrays, or of tensors, at the points."""
    check_callable("function", function, "function(array)")
    try:
        values = called("function", function, points.numpy())
    except TypeError:
        values = called("function", function, points)
    values = np.asarray(values)
    if values.dtype.kind not in "fiub" or values.shape not in ((), points.shape):
        expected = f"one real number for each entry of its array, of shape {tuple(points.shape)}"
        raise ValueError(f"function must return {expected}; got {shown(values)}")
    return np.broadcast_to(values.astype(np.float64), points.shape)


@dataclass(frozen=True)
class SpectralDensity(
    Result,
    kind="spectral_density",
    saved=(
        *("size", "nodes", "weights", "controls", "shares", "outliers", "trace", "frobenius_norm", "negative_mass"),
        *("num_matvecs", "seconds", "converged", "rounding"),
    ),
):
    """The spectrum as a weighted set of nodes (stochastic Lanczos quadrature), per random probe.

    Any trace of a function of the matrix is n times a weighted sum over the nodes; the spread over the probes is its error.

    Attributes:
        nodes: (num_probes, num_steps) float64 on the CPU.
        weights: (num_probes, num_steps) float64 on the CPU; each row sums to 1 / num_probes, all to 1.
        size: n, the number of rows of the matrix.
        num_matvecs: products spent.
        seconds: wall time spent.
        outliers: converged extreme eigenvalues seen by every probe, (m,) float64, descending; they stand apart from the bulk.
        converged: False where a budget was exhausted before all probes were done.
        rounding: of a product, relative; where it is that of a half-precision type, every error allows for it.
        controls: (num_probes, c) float64, eigenvalues whose vectors another probe has found, with the ``shares`` of these vectors in each
            probe, (num_probes, c) float64: random numbers of mean 1 / n, which sums over the spectrum replace by just that.
    """

    nodes: Tensor
    weights: Tensor
    size: int
    num_matvecs: int
    seconds: float = 0.0
    outliers: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    converged: bool = True
    rounding: float = 0.0
    controls: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.float64), repr=False)
    shares: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.float64), repr=False)

    @property
    def num_probes(self) -> int:
        return int(self.nodes.shape[0])

    # -- sums over the spectrum -----------------------------------------------------------------------------------------
    def expectation(self, function: Callable[[Array], Array]) -> Estimate:
        """tr f(A) / n: the mean of ``function`` over the spectrum, with its standard error over the probes.

        The c eigenvalues whose vectors another probe has found count as c of n; the probes tell the mean over the rest. Without them a
        dominating eigenvalue would be weighted by the chance of the probes.

        Args:
            function: vectorised on float64 NumPy arrays; one on tensors (``torch.exp``) is taken as well.
        """
        how = "stochastic Lanczos quadrature"
        per_probe = (_applied(function, self.nodes) * self.weights.numpy()).sum(axis=1) * self.num_probes  # weights sum to 1 / num_probes
        if self.shares.numel():
            known, shares = _applied(function, self.controls), self.shares.numpy()
            left = self.size - known.shape[1]
            rest = (per_probe - (known * shares).sum(axis=1)) / (1 - shares.sum(axis=1)) if left else np.zeros(len(known))
            per_probe = (known.sum(axis=1) + left * rest) / self.size
            how += ", outliers taken out"
        mean, error = float(per_probe.mean()), probe_error(per_probe)
        return Estimate(mean, error, self.num_matvecs, self.seconds, how, self.converged).rounded(self.rounding)

    def total(self, function: Callable[[Array], Array]) -> Estimate:
        """tr f(A): n times the mean of ``function`` over the spectrum."""
        mean = self.expectation(function)
        return replace(mean, value=mean.value * self.size, stderr=mean.stderr * self.size)

    @property
    def trace(self) -> Estimate:
        """tr A."""
        return self.total(lambda x: x)

    @property
    def frobenius_norm(self) -> Estimate:
        """||A||_F."""
        return self.total(np.square).root()

    @property
    def negative_mass(self) -> Estimate:
        """Share of the spectrum clearly below zero, by more than 0.1 % of the largest magnitude: flat directions do not count.

        In half precision, by more than twice its rounding.
        """
        floor = -max(1e-3, 2 * self.rounding if self.rounding >= HALF else 0.0) * float(self.nodes.abs().max())
        return self.expectation(lambda x: (x < floor).astype(np.float64))

    # -- the picture ----------------------------------------------------------------------------------------------------
    @property
    def bandwidth(self) -> float:
        """Standard deviation of the Gaussians that smooth the nodes: width of the bulk (outliers left out) / number of steps.

        That is the resolution of the quadrature: m Lanczos steps resolve the bulk no finer than the spacing of the nodes there, so narrower
        Gaussians would show the nodes and wider ones would smear the spectrum. A far outlier does not blur the bulk.
        """
        nodes, weights = self.nodes.numpy().ravel(), self.weights.numpy().ravel()
        nodes = nodes[weights > 0]  # the others are padding
        width = float(nodes.max() - nodes.min())
        apart = np.abs(nodes[:, None] - self.outliers.numpy()[None, :]) > 2 * OUTLIER_RESIDUAL * width
        bulk = nodes[np.all(apart, axis=1)]
        inner = float(bulk.max() - bulk.min()) if len(bulk) > 1 else width
        scale = float(np.abs(nodes).max()) or 1.0
        # A multiple of the identity has no width: 1e-6 of its eigenvalue is narrow in any picture, and no division by 0.
        return max(inner / self.nodes.shape[1], 1e-6 * scale)

    def density(self, grid: Tensor | Array, bandwidth: float | None = None) -> Array:
        """The density on a grid, per unit of eigenvalue: a Gaussian on every node, integrating to 1 over the real line.

        Args:
            grid: (m,) points.
            bandwidth: standard deviation of each Gaussian, by default :attr:`bandwidth`.

        Example:
            >>> import numpy as np, torch, sharpkit as sk
            >>> density = sk.spectral_density(torch.diag(torch.linspace(0, 1, 50)), num_probes=2, num_steps=20)
            >>> round(float(density.density(np.linspace(-1, 2, 301)).sum() * 0.01), 3)
            1.0
        """
        nodes, weights, points = self.nodes.numpy().ravel(), self.weights.numpy().ravel(), np.array(reals("grid", grid, infinite=True))
        width = self.bandwidth if bandwidth is None else real("bandwidth", bandwidth, above=0)
        total = np.zeros(len(points))
        for first in range(0, len(nodes), 256):  # blocks keep the (grid x nodes) table small
            distance = (points[:, None] - nodes[None, first : first + 256]) / width
            total += np.exp(-0.5 * distance**2) @ weights[first : first + 256]
        return total / (width * math.sqrt(2 * math.pi))

    def plot(self, ax: Axes | None = None) -> Axes:
        """Log density with the outliers marked; see :func:`sharpkit.plots.plot_density`."""
        from sharpkit.plots.spectrum import plot_density

        return plot_density(self, ax=ax)

    def __repr__(self) -> str:
        low, high = float(self.nodes.min()), float(self.nodes.max())
        return (
            f"SpectralDensity(n = {self.size}, from {low:.4g} to {high:.4g}, trace {self.trace}, {len(self.outliers)} outliers, "
            f"{self.num_probes} probes, {self.num_matvecs} products)"
        )
