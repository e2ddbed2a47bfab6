"""The spectral density by stochastic Lanczos quadrature, with its error over the probes and its outliers shown apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sharpkit._arguments import as_seed, whole
from sharpkit._results import ProgressCallback
from sharpkit.linalg.krylov import KrylovSpace, Ritz, affordable_rows, lanczos_abreast, lanczos_run
from sharpkit.linalg.results import OUTLIER_RESIDUAL, Array, Budget, SpectralDensity, warn_unconverged
from sharpkit.operators.base import SymmetricOperator, as_operator

_OUTLIER_GAP = 3.0  # an outlier stands this many times the bulk's own node spacing apart: by judgement, a bulk shows none (tested)
_CONTROL_RESIDUAL = 1e-2  # relative to the scale: a Ritz pair this good may serve as a control; by judgement
_MAX_CONTROLS = 30  # as many vectors as fit beside a basis of 32 steps: by judgement
_MOST_CONTROLLED = 4  # one control for so many dimensions at most, by judgement: the probes have to tell the rest
_AGREEMENT = 0.9  # share of the probes that must see an outlier: by judgement, one probe in ten may miss it


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
        seed: seeds the probes.
        distribution: ``"rademacher"`` or ``"normal"`` entries of the probes.
        max_matvecs, max_seconds: most products and seconds.
        callback: called with a :class:`~sharpkit.Progress` after each product, or several made at once.

    Ritz vectors found by one probe tell how much of them is in the others by chance: a dominating eigenvalue adds no noise to the sums.

    Returns:
        nodes, weights and outliers; if a budget is exhausted, those of the probes so far, with ``converged=False``.

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
    operator.check_alike("spectral_density", locals())  # before an argument is refused on one process alone
    num_probes, num_steps = whole("num_probes", num_probes), whole("num_steps", num_steps)
    budget = Budget(operator, max_matvecs=max_matvecs, max_seconds=max_seconds, callback=callback)
    generator = torch.Generator().manual_seed(as_seed(seed))
    steps = min(num_steps, operator.size)
    rules: list[Quadrature] = []
    controls, complete = ControlVectors(), True
    for run in probe_runs(operator, generator, budget, num_probes, steps=steps, distribution=distribution):
        complete = run.complete
        if complete:
            controls.add(run)
        if complete or not rules:  # part of a run is better than nothing
            rules.append(run.quadrature)
    complete = complete and len(rules) == num_probes
    if not complete:
        warn_unconverged(
            f"the budget ended after {budget.num_matvecs} of about {num_probes * steps} products: the density rests on {len(rules)} of "
            f"{num_probes} probes; raise max_matvecs or max_seconds, or ask for fewer probes."
        )
    return density_from(rules, steps, operator.size, budget, complete, controls, rounding=operator.rounding)


class Quadrature(NamedTuple):
    """The rule of one probe: nodes (ascending), weights (summing to 1) and the nodes' residuals, (m,) each."""

    nodes: Array
    weights: Array
    residuals: Array


@dataclass(frozen=True)
class ProbeRun:
    """One Lanczos run from a random probe.

    Attributes:
        probe: z, (n,), with ||z||^2 = n (on average, for normal entries).
        space: grown from it.
        complete: False if the budget ended it.
    """

    probe: Tensor
    space: KrylovSpace
    complete: bool

    @cached_property
    def ritz(self) -> Ritz:
        """The Ritz pairs of its space."""
        return self.space.ritz()

    @property
    def quadrature(self) -> Quadrature:
        """Gauss quadrature of z's spectral measure: a weight is the squared share of its Ritz vector in z."""
        return Quadrature(self.ritz.values, self.ritz.coordinates[0] ** 2, self.ritz.outward)


def probe_run(
    operator: SymmetricOperator,
    generator: torch.Generator,
    budget: Budget,
    *,
    steps: int,
    text: str,
    expected: int,
    distribution: str = "rademacher",
    enough: Callable[[KrylovSpace], bool] | None = None,
) -> ProbeRun:
    """Lanczos from a new probe, one product at least.

    Args:
        operator: A.
        generator: draws the probe.
        budget: stops the run when exhausted.
        steps: products, unless ``enough`` decides.
        text: what is being done, for the callback.
        expected: products of all runs, for the callback.
        distribution: entries of the probe.
        enough: asked after each product, whether to stop.
    """
    probe = _probe(operator, generator, distribution)
    space = KrylovSpace(operator, offload=steps > affordable_rows(operator, len(probe)))
    space.add_start(probe)

    def done() -> bool:
        return enough(space) if enough is not None else len(space.expanded) >= steps

    return ProbeRun(probe, space, lanczos_run(space, budget, done, lambda: (expected, text), least=1))


def probe_runs(
    operator: SymmetricOperator,
    generator: torch.Generator,
    budget: Budget,
    num_probes: int,
    *,
    steps: int,
    done: int = 0,
    distribution: str = "rademacher",
) -> Iterator[ProbeRun]:
    """Lanczos runs from new probes, as many abreast as memory and budget allow; the last may be incomplete if the budget ends it.

    Args:
        operator: A.
        generator: draws the probes, one after another.
        budget: ends the runs when exhausted.
        num_probes: all runs, with those made before.
        steps: products of a run.
        done: runs made before; without any, the first one makes a product at least.
        distribution: entries of the probes.
    """
    settings: dict[str, Any] = {"steps": steps, "expected": num_probes * steps, "distribution": distribution}
    while done < num_probes and (done == 0 or budget.allows()):
        # runs abreast all end late: if time is limited, they go one after another
        width = 1 if budget.is_timed else int(min(num_probes - done, budget.matvecs_left / steps))
        if width > 1:
            width = min(width, affordable_rows(operator, operator.size) // steps)
        if width <= 1:
            run = probe_run(operator, generator, budget, text=f"probe {done + 1} of {num_probes}", **settings)
            yield run
            if not run.complete:
                return
            done += 1
            continue
        runs = [ProbeRun(_probe(operator, generator, distribution), KrylovSpace(operator), True) for _ in range(width)]
        for run in runs:
            run.space.add_start(run.probe)
        text = f"probes {done + 1} to {done + width} of {num_probes}"
        lanczos_abreast([run.space for run in runs], budget, steps, (num_probes * steps, text))
        yield from runs
        done += width


def _probe(operator: SymmetricOperator, generator: torch.Generator, distribution: str) -> Tensor:
    return operator.random_vectors(1, generator=generator, distribution=distribution)[:, 0]


class ControlVectors:
    """The shares of good Ritz vectors in the probes: those of the first run in all other probes, those of the second in the first.

    A share of a unit vector v in a random probe z, (v.z)^2 / ||z||^2, has the mean 1 / n if v does not depend on z.
    """

    def __init__(self) -> None:
        self._first: Tensor | None = None  # the first probe
        self._values, self._vectors = np.zeros(0), torch.zeros(0, 0)
        self._rows: list[tuple[Array, Array]] = []

    def add(self, run: ProbeRun) -> None:
        """One more probe, after its run."""
        if self._first is None:
            self._first = run.probe
            self._values, self._vectors = _good_pairs(run)
            return
        if not self._rows:
            values, vectors = _good_pairs(run)
            self._rows.append((values, _shares(run.space.operator, vectors, self._first)))
        self._rows.append((self._values, _shares(run.space.operator, self._vectors, run.probe)))

    def tables(self) -> tuple[Tensor, Tensor]:
        """Values and shares, (probes, c) each; (0, 0) of a single probe."""
        if not self._rows:
            return torch.zeros(0, 0, dtype=torch.float64), torch.zeros(0, 0, dtype=torch.float64)
        count = min(len(values) for values, _ in self._rows)
        values, shares = (np.stack([row[:count] for row in column]) for column in zip(*self._rows, strict=True))
        return torch.from_numpy(values), torch.from_numpy(shares)


def _good_pairs(run: ProbeRun) -> tuple[Array, Tensor]:
    """Values and vectors of the run's good Ritz pairs, largest magnitude first, (c,) and (n, c)."""
    operator, ritz = run.space.operator, run.ritz
    share = 1 if run.space.is_complete else _MOST_CONTROLLED  # over a complete basis all vectors are exact
    most = min(_MAX_CONTROLS, operator.size // share, affordable_rows(operator, len(run.probe)) // 2)
    good = np.flatnonzero(ritz.residuals <= _CONTROL_RESIDUAL * ritz.scale)
    good = good[np.argsort(-np.abs(ritz.values[good]))][:most]
    return ritz.values[good], run.space.vectors(ritz.coordinates[:, good])


def _shares(operator: SymmetricOperator, vectors: Tensor, probe: Tensor) -> Array:
    if not vectors.shape[1]:
        return np.zeros(0)
    inside, square = operator.dot(vectors, probe.to(vectors.dtype)), operator.dot(probe, probe)
    return np.asarray(inside.double().cpu().numpy() ** 2 / float(square))


def density_from(
    rules: list[Quadrature],
    steps: int,
    size: int,
    budget: Budget,
    complete: bool,
    controls: ControlVectors | None = None,
    *,
    rounding: float = 0.0,
) -> SpectralDensity:
    """The density as the mean of the probes' rules, padded with weight 0 to ``steps`` nodes."""
    nodes, weights = (torch.from_numpy(array) for array in _padded(rules, steps))
    outliers, tables = torch.from_numpy(_outliers(rules)), controls.tables() if controls is not None else ()
    return SpectralDensity(nodes, weights, size, budget.num_matvecs, budget.seconds, outliers, complete, rounding, *tables)


def _padded(rules: list[Quadrature], steps: int) -> tuple[Array, Array]:
    nodes, weights = np.zeros((len(rules), steps)), np.zeros((len(rules), steps))
    for row, rule in enumerate(rules):
        known = len(rule.nodes)
        nodes[row, :known], nodes[row, known:] = rule.nodes, rule.nodes[-1]
        weights[row, :known] = rule.weights / rule.weights.sum() / len(rules)
    return nodes, weights


def _outliers(rules: list[Quadrature]) -> Array:
    """Converged Ritz values at either end that nearly every probe sees and that stand apart from the bulk, descending."""
    width = max(float(rule.nodes[-1] - rule.nodes[0]) for rule in rules)
    scale = max(float(np.abs(rule.nodes).max()) for rule in rules)
    if width <= 1e-6 * scale:  # a multiple of the identity, up to rounding
        return np.zeros(0)
    top = [_apart(rule.nodes[::-1], rule.residuals[::-1], width) for rule in rules]
    bottom = [_apart(rule.nodes, rule.residuals, width) for rule in rules]
    return np.sort(np.concatenate([_agreed(top, width), _agreed(bottom, width)]))[::-1].copy()


def _apart(nodes: Array, residuals: Array, width: float) -> Array:
    """From one end inwards: the converged nodes before the last wide gap ahead of the bulk."""
    gaps = np.abs(np.diff(nodes))
    inner = gaps[len(gaps) // 4 : max(1, 3 * len(gaps) // 4)]  # the middle half: the bulk's own spacing
    if len(nodes) < 8 or len(inner) == 0:
        return np.zeros(0)
    wide = max(_OUTLIER_GAP * float(np.median(inner)), OUTLIER_RESIDUAL * width)
    converged = np.cumprod(residuals <= OUTLIER_RESIDUAL * width).astype(bool)
    candidates = [j for j in range(len(gaps) // 2) if gaps[j] > wide and converged[j]]
    return nodes[: candidates[-1] + 1] if candidates else np.zeros(0)


def _agreed(per_probe: list[Array], width: float) -> Array:
    """The outliers that nearly all probes share, each the mean over the probes."""
    shared = []
    for value in max(per_probe, key=len):
        nearest = [float(seen[np.argmin(np.abs(seen - value))]) for seen in per_probe if len(seen)]
        near = [x for x in nearest if abs(x - value) <= 2 * OUTLIER_RESIDUAL * width]  # each is off by one residual at most
        if len(near) >= _AGREEMENT * len(per_probe):
            shared.append(float(np.mean(near)))
    return np.array(shared)
