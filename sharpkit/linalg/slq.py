"""The spectral density by stochastic Lanczos quadrature, with its error over the probes and its outliers shown apart."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch

from sharpkit._errors import ConvergenceWarning
from sharpkit._results import ProgressCallback
from sharpkit.linalg.krylov import Array, KrylovSpace, affordable_rows
from sharpkit.linalg.results import _OUTLIER_RESIDUAL, Budget, SpectralDensity
from sharpkit.operators.base import SymmetricOperator, as_operator

_OUTLIER_GAP = 3.0  # an outlier stands this many times the bulk's own node spacing apart


def spectral_density(
    operator: Any,
    *,
    num_probes: int = 10,
    num_steps: int = 80,
    seed: int = 0,
    distribution: str = "rademacher",
    max_matvecs: int | None = None,
    max_seconds: float | None = None,
    callback: ProgressCallback | None = None,
) -> SpectralDensity:
    """The eigenvalue density of a symmetric operator, from ``num_probes`` Lanczos runs of ``num_steps`` products each.

    Each run turns a random unit vector z into nodes theta_j and weights w_j with sum_j w_j f(theta_j) close to z^T f(A) z, exact for
    polynomials up to degree 2 num_steps - 1. Its mean over probes is tr f(A) / n. Every basis is fully re-orthogonalised, so no
    eigenvalue appears twice by rounding. Costs num_probes x num_steps products; a run that exhausts the space reachable from its
    probe ends early, its rows padded with weight 0.

    Args:
        operator: anything :func:`sharpkit.as_operator` takes.
        num_probes: random probes; the standard errors come from their spread, so at least 2.
        num_steps: Lanczos steps per probe: the resolution is about spectral width / num_steps.
        seed: of the probes.
        distribution: ``"rademacher"`` or ``"normal"`` entries of the probes.
        max_matvecs: product budget.
        max_seconds: time budget in seconds.
        callback: called with a :class:`~sharpkit.Progress` after each product.

    Returns:
        nodes, weights and outliers; where a budget ends, those of the probes so far, flagged.

    Raises:
        ValueError: fewer than one probe or step.
        NonFiniteError: a product is not finite.
        NotSymmetricError: the products contradict each other.

    References:
        Ubaru, Chen and Saad, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature" (2017);
        Ghorbani, Krishnan and Xiao, arXiv 1901.10159.

    Example:
        >>> import torch, sharpkit as sk
        >>> density = sk.spectral_density(torch.diag(torch.arange(1.0, 6.0)), num_probes=4, num_steps=5)
        >>> round(density.trace.value, 3)
        15.0
    """
    operator = as_operator(operator)
    for name, value in (("num_probes", num_probes), ("num_steps", num_steps)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    budget = Budget(operator, max_matvecs=max_matvecs, max_seconds=max_seconds, callback=callback)
    generator = torch.Generator().manual_seed(seed)
    steps = min(num_steps, operator.size)
    runs: list[tuple[Array, Array, Array]] = []
    complete = True
    for probe in range(num_probes):
        run, ended = _one_probe(operator, steps, distribution, generator, budget, f"probe {probe + 1} of {num_probes}", num_probes * steps)
        complete = complete and ended
        if run is not None and (ended or not runs):
            runs.append(run)
        if not ended:
            break
    if not complete:
        warnings.warn(
            f"the budget ended after {budget.num_matvecs} of about {num_probes * steps} products: the density rests on {len(runs)} of "
            f"{num_probes} probes; raise max_matvecs or max_seconds, or ask for fewer probes.",
            ConvergenceWarning,
            stacklevel=2,
        )
    return density_from_runs(runs, steps, operator.size, budget, complete)


def density_from_runs(runs: list[tuple[Array, Array, Array]], steps: int, size: int, budget: Budget, complete: bool) -> SpectralDensity:
    """The quadrature over finished Lanczos runs, each given as nodes (ascending), weights and residuals."""
    nodes, weights = (torch.from_numpy(array) for array in _padded(runs, steps))
    outliers = torch.from_numpy(_outliers(runs))
    return SpectralDensity(nodes, weights, size, budget.num_matvecs, budget.seconds, outliers, complete)


def _one_probe(
    operator: SymmetricOperator, steps: int, distribution: str, generator: torch.Generator, budget: Budget, stage: str, expected: int
) -> tuple[tuple[Array, Array, Array] | None, bool]:
    """Nodes, weights and residuals of one Lanczos run, and whether it was carried through."""
    probe = operator.random_vectors(1, generator=generator, distribution=distribution)[:, 0]
    space = KrylovSpace(operator, offload=steps > affordable_rows(operator, len(probe)))
    space.add_start(probe)
    ended = True
    while space.pending and len(space.expanded) < steps:
        if not budget.allows():
            ended = False
            break
        space.expand(space.pending[0])
        budget.report(expected, stage)
    if not space.expanded:
        return None, ended
    nodes, coordinates = np.linalg.eigh(space.projected())
    residuals = np.linalg.norm(space.couplings() @ coordinates, axis=0) if space.pending else np.zeros(len(nodes))
    return (nodes, coordinates[0] ** 2, residuals), ended


def _padded(runs: list[tuple[Array, Array, Array]], steps: int) -> tuple[Array, Array]:
    nodes, weights = np.zeros((len(runs), steps)), np.zeros((len(runs), steps))
    for row, (found, share, _) in enumerate(runs):
        nodes[row, : len(found)], nodes[row, len(found) :] = found, found[-1]
        weights[row, : len(found)] = share / share.sum() / len(runs)
    return nodes, weights


def _outliers(runs: list[tuple[Array, Array, Array]]) -> Array:
    """Converged Ritz values at either end that nearly every probe sees and that stand apart from the bulk, descending."""
    if not runs:
        return np.zeros(0)
    width = max(float(nodes[-1] - nodes[0]) for nodes, _, _ in runs)
    scale = max(float(np.abs(nodes).max()) for nodes, _, _ in runs)
    if width <= 1e-6 * scale:
        return np.zeros(0)
    top = [_apart(nodes[::-1], residuals[::-1], width) for nodes, _, residuals in runs]
    bottom = [_apart(nodes, residuals, width) for nodes, _, residuals in runs]
    return np.sort(np.concatenate([_agreed(top, width), _agreed(bottom, width)]))[::-1].copy()


def _apart(nodes: Array, residuals: Array, width: float) -> Array:
    """From one end inwards: the converged nodes before the last wide gap ahead of the bulk."""
    gaps = np.abs(np.diff(nodes))
    inner = gaps[len(gaps) // 4 : max(1, 3 * len(gaps) // 4)]
    if len(nodes) < 8 or len(inner) == 0:
        return np.zeros(0)
    wide = max(_OUTLIER_GAP * float(np.median(inner)), _OUTLIER_RESIDUAL * width)
    converged = np.cumprod(residuals <= _OUTLIER_RESIDUAL * width).astype(bool)
    candidates = [j for j in range(len(gaps) // 2) if gaps[j] > wide and converged[j]]
    return nodes[: candidates[-1] + 1] if candidates else np.zeros(0)


def _agreed(per_probe: list[Array], width: float) -> Array:
    """The outliers that at least 9 in 10 probes share, each the mean over the probes."""
    reference = max(per_probe, key=len)
    found = []
    for value in reference:
        nearest = [float(seen[np.argmin(np.abs(seen - value))]) for seen in per_probe if len(seen)]
        near = [x for x in nearest if abs(x - value) <= 2 * _OUTLIER_RESIDUAL * width]
        if len(near) >= 0.9 * len(per_probe):
            found.append(float(np.mean(near)))
    return np.array(found)
