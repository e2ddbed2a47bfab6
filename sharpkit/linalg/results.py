"""What the algorithms return, values with their error and cost; budgets that stop them and progress on the way."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sharpkit._results import Progress, ProgressCallback, format_with_error, standard_error
from sharpkit.linalg.krylov import Array
from sharpkit.operators.base import SymmetricOperator

if TYPE_CHECKING:
    from matplotlib.axes import Axes


_OUTLIER_RESIDUAL = 1e-2  # relative to the width: what counts as a converged Ritz value


def smooth_density(density: SpectralDensity, grid: Array, bandwidth: float | None = None) -> Array:
    """The density on a grid: a Gaussian on every node, integrating to 1 over the real line.

    The default bandwidth is the resolution of the quadrature: m Lanczos steps resolve the bulk no finer than about its width / m (the
    spacing of the nodes there), so narrower Gaussians would show the nodes and wider ones would smear the spectrum. The width is that of
    the bulk, without the outliers: a far outlier does not blur the bulk.

    Args:
        density: the quadrature.
        grid: (m,) points.
        bandwidth: standard deviation of each Gaussian, in units of the eigenvalues.

    Returns:
        (m,) densities, per unit of eigenvalue.

    Example:
        >>> import numpy as np, torch, sharpkit as sk
        >>> density = sk.spectral_density(torch.diag(torch.linspace(0, 1, 50)), num_probes=2, num_steps=20)
        >>> grid = np.linspace(-1, 2, 301)
        >>> round(float(smooth_density(density, grid).sum() * 0.01), 3)
        1.0
    """
    nodes, weights = density.nodes.numpy().ravel(), density.weights.numpy().ravel()
    if bandwidth is None:
        bandwidth = default_bandwidth(density)
    if not bandwidth > 0:
        raise ValueError(f"bandwidth must be positive, got {bandwidth}")
    total = np.zeros(len(grid))
    for first in range(0, len(nodes), 256):  # blocks keep the (grid x nodes) table small
        distance = (grid[:, None] - nodes[None, first : first + 256]) / bandwidth
        total += np.exp(-0.5 * distance**2) @ weights[first : first + 256]
    return total / (bandwidth * math.sqrt(2 * math.pi))


def default_bandwidth(density: SpectralDensity) -> float:
    """Width of the bulk (outliers left out) / number of steps."""
    nodes, weights = density.nodes.numpy().ravel(), density.weights.numpy().ravel()
    nodes = nodes[weights > 0]
    width = float(nodes.max() - nodes.min())
    tolerance = 2 * _OUTLIER_RESIDUAL * width
    bulk = nodes[np.all(np.abs(nodes[:, None] - density.outliers.numpy()[None, :]) > tolerance, axis=1)]
    inner = float(bulk.max() - bulk.min()) if len(bulk) > 1 else width
    scale = float(np.abs(nodes).max()) or 1.0
    return max(inner / density.nodes.shape[1], 1e-6 * scale)


class Budget:
    """Counts the products and seconds of one computation and says when either runs out.

    Decisions go through ``operator.agree``, so that every process of a distributed run stops at the same product.
    """

    def __init__(
        self,
        operator: SymmetricOperator,
        *,
        max_matvecs: int | None = None,
        max_seconds: float | None = None,
        callback: ProgressCallback | None = None,
    ) -> None:
        if max_matvecs is not None and max_matvecs < 1:
            raise ValueError(f"max_matvecs must be at least 1, got {max_matvecs}")
        if max_seconds is not None and max_seconds <= 0:
            raise ValueError(f"max_seconds must be positive, got {max_seconds}")
        self._operator, self._callback = operator, callback
        self._max_matvecs, self._max_seconds = max_matvecs, max_seconds
        self._first_matvec = operator.num_matvecs
        self._start = time.perf_counter()

    @property
    def num_matvecs(self) -> int:
        """Products made since this budget was opened."""
        return self._operator.num_matvecs - self._first_matvec

    @property
    def seconds(self) -> float:
        """Seconds since this budget was opened."""
        return time.perf_counter() - self._start

    def allows(self, matvecs: int = 1) -> bool:
        """Whether so many more products fit into the product budget and the time is not up."""
        if self._max_matvecs is not None and self.num_matvecs + matvecs > self._max_matvecs:
            return False
        return self._max_seconds is None or self._operator.agree(self.seconds) < self._max_seconds

    def report(self, expected_matvecs: int, stage: str) -> None:
        """Tell the callback, if there is one."""
        if self._callback is None:
            return
        done, elapsed = self.num_matvecs, self.seconds
        expected = max(expected_matvecs, done)
        if self._max_matvecs is not None:
            expected = min(expected, max(self._max_matvecs, done))
        remaining = elapsed / done * (expected - done) if done else float("nan")
        self._callback(Progress(done, expected, elapsed, remaining, stage))


SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error and cost.

    Attributes:
        value: the estimate.
        stderr: one standard error of ``value``; 0 where it is exact up to rounding.
        num_matvecs: products spent.
        seconds: wall time spent.
        method: how it was made.
        converged: whether the asked tolerance was reached.
    """

    value: float
    stderr: float
    num_matvecs: int = 0
    seconds: float = 0.0
    method: str = ""
    converged: bool = True

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        return format_with_error(self.value, self.stderr)

    def __repr__(self) -> str:
        flag = "" if self.converged else ", NOT converged"
        how = f", {self.method}" if self.method else ""
        return f"Estimate({self}, {self.num_matvecs} products{how}{flag})"

    @property
    def interval(self) -> tuple[float, float]:
        """value -+ 2 standard errors."""
        return (self.value - 2 * self.stderr, self.value + 2 * self.stderr)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, JSON-ready."""
        return {
            "kind": "estimate",
            "version": SCHEMA_VERSION,
            "value": self.value,
            "stderr": self.stderr,
            "num_matvecs": self.num_matvecs,
            "seconds": self.seconds,
            "method": self.method,
            "converged": self.converged,
        }


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenvalues with eigenvectors, each with its residual: some eigenvalue lies within ``residuals[j]`` of ``values[j]``.

    Attributes:
        values: (k,) float64 on the CPU, descending.
        vectors: (n, k) orthonormal, on the operator's device.
        residuals: (k,) float64 on the CPU, ||A v - value v||.
        converged: (k,) bool on the CPU, residual within tolerance and no sign of a missed eigenvalue.
        num_matvecs: products spent.
        seconds: wall time spent.
        which: ``"largest"``, ``"smallest"`` or ``"magnitude"``.
        tol: the asked tolerance, relative to the largest magnitude seen.
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

    def to_dict(self) -> dict[str, Any]:
        """Everything but the vectors, JSON-ready."""
        return {
            "kind": "eigenpairs",
            "version": SCHEMA_VERSION,
            "which": self.which,
            "values": self.values.tolist(),
            "residuals": self.residuals.tolist(),
            "converged": self.converged.tolist(),
            "num_matvecs": self.num_matvecs,
            "seconds": self.seconds,
            "tol": self.tol,
            "outcome": self.outcome,
        }


@dataclass(frozen=True)
class SpectralDensity:
    """The spectrum as a weighted set of nodes (stochastic Lanczos quadrature), per random probe.

    Any trace of a function of the matrix is n times a weighted sum over the nodes; the spread over the probes is its error.

    Attributes:
        nodes: (num_probes, num_steps) float64 on the CPU.
        weights: (num_probes, num_steps) float64 on the CPU; each row sums to 1 / num_probes, all to 1.
        size: n, the number of rows of the matrix.
        num_matvecs: products spent.
        seconds: wall time spent.
        outliers: converged extreme eigenvalues seen by every probe, (m,) float64, descending; they stand apart from the bulk.
        converged: False where a budget ended it before all probes were done.
    """

    nodes: Tensor
    weights: Tensor
    size: int
    num_matvecs: int
    seconds: float = 0.0
    outliers: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    converged: bool = True

    @property
    def num_probes(self) -> int:
        return int(self.nodes.shape[0])

    @property
    def bandwidth(self) -> float:
        """Standard deviation of the Gaussians that smooth the nodes, unless another one is asked for: see :func:`default_bandwidth`."""
        return default_bandwidth(self)

    def expectation(self, function: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]) -> Estimate:
        """tr f(A) / n: the mean of ``function`` over the spectrum, with its standard error over the probes.

        Args:
            function: vectorised on float64 NumPy arrays; one on tensors (``torch.exp``) is taken as well.
        """
        try:
            values = np.asarray(function(self.nodes.numpy()), dtype=np.float64)
        except TypeError:
            values = np.asarray(function(self.nodes), dtype=np.float64)  # type: ignore[arg-type]
        per_probe = (values * self.weights.numpy()).sum(axis=1) * self.num_probes
        return self._over_probes(per_probe)

    def _over_probes(self, per_probe: np.ndarray[Any, Any]) -> Estimate:
        stderr = standard_error(per_probe)
        return Estimate(float(per_probe.mean()), stderr, self.num_matvecs, self.seconds, "stochastic Lanczos quadrature", self.converged)

    def _sum(self, function: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]) -> Estimate:
        mean = self.expectation(function)
        return Estimate(mean.value * self.size, mean.stderr * self.size, self.num_matvecs, self.seconds, mean.method, self.converged)

    @property
    def trace(self) -> Estimate:
        """tr A."""
        return self._sum(lambda x: x)

    @property
    def frobenius_norm(self) -> Estimate:
        """||A||_F, its error by the delta method from that of the squared norm."""
        squared = self._sum(np.square)
        norm = math.sqrt(max(squared.value, 0.0))
        stderr = squared.stderr / (2 * norm) if norm > 0 else 0.0
        return Estimate(norm, stderr, self.num_matvecs, self.seconds, squared.method, self.converged)

    @property
    def negative_mass(self) -> Estimate:
        """Share of the spectrum clearly below zero, by more than 0.1 % of the largest magnitude: flat directions do not count."""
        floor = -1e-3 * float(self.nodes.abs().max())
        return self.expectation(lambda x: (x < floor).astype(np.float64))

    def density(self, grid: Tensor | np.ndarray[Any, Any], bandwidth: float | None = None) -> np.ndarray[Any, Any]:
        """The smoothed density on a grid: Gaussians of width ``bandwidth`` on the nodes; integrates to 1.

        Args:
            grid: (m,) points.
            bandwidth: standard deviation of each Gaussian; by default the resolution of the quadrature,
                (largest node - smallest node) / number of steps.
        """
        return smooth_density(self, np.asarray(grid, dtype=np.float64), bandwidth)

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

    def to_dict(self) -> dict[str, Any]:
        """Nodes, weights and the derived numbers, JSON-ready."""
        return {
            "kind": "spectral_density",
            "version": SCHEMA_VERSION,
            "size": self.size,
            "nodes": self.nodes.tolist(),
            "weights": self.weights.tolist(),
            "outliers": self.outliers.tolist(),
            "trace": self.trace.to_dict(),
            "frobenius_norm": self.frobenius_norm.to_dict(),
            "negative_mass": self.negative_mass.to_dict(),
            "num_matvecs": self.num_matvecs,
            "seconds": self.seconds,
            "converged": self.converged,
        }
