"""The spectral density by stochastic Lanczos quadrature, with its error over the probes and its outliers shown apart."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sharpkit._arguments import as_seed, whole
from sharpkit._calls import public_call
from sharpkit._checkpoint import counted_step, resumable
from sharpkit._results import ProgressCallback
from sharpkit.linalg.krylov import (
    KrylovSpace,
    Offload,
    abreast,
    affordable_rows,
    checked_offload,
    lanczos_abreast,
    lanczos_run,
    place_for,
    where,
)
from sharpkit.linalg.results import OUTLIER_RESIDUAL, Array, Budget, SpectralDensity, warn_unconverged
from sharpkit.objective.memory import keeps_memory_limit
from sharpkit.operators.base import SymmetricOperator, as_operator, operator_call

_OUTLIER_GAP = 3.0  # an outlier stands this many times the bulk's own node spacing apart: by judgement, a bulk shows none (tested)
_CONTROL_RESIDUAL = 1e-2  # relative to the scale: a Ritz pair this good may serve as a control; by judgement
_MAX_CONTROLS = 30  # by judgement: as many as a run of 32 steps may have
_MOST_CONTROLLED = 4  # one control for so many dimensions at most, by judgement: the probes have to tell the rest
_AGREEMENT = 0.9  # share of the probes that must see an outlier: by judgement, one probe in ten may miss it


@public_call
@keeps_memory_limit
@resumable(operator_call)
def spectral_density(
    operator: Any,
    *,
    num_probes: int = 10,
    num_steps: int = 80,
    seed: int = 0,
    distribution: str = "rademacher",
    max_matvecs: int | None = None,
    max_seconds: float | None = None,
    memory_limit: float | None = None,
    offload: Offload = False,
    checkpoint: str | os.PathLike[str] | None = None,
    callback: ProgressCallback | None = None,
    name: str = "",
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
        memory_limit: bytes that may be taken where the vectors live; by default half of what is free holds num_steps + 1 vectors, or
            several times as many, for runs abreast.
        offload: True keeps the vectors in host memory, the path of a folder in a file there.
        checkpoint: a folder from which the call goes on if it is killed and made again (docs/guide.md); until it ends it takes
            a vector of disk for each product of the runs under way.
        callback: called with a :class:`~sharpkit.Progress` after each product, or several made at once.
        name: of the result, which pages and comparisons show.

    Ritz vectors found by one probe tell how much of them is in the others by chance: a dominating eigenvalue adds no noise to the sums.

    Returns:
        nodes, weights and outliers; if a budget is exhausted, those of the probes so far, with ``converged=False``.

    Raises:
        ValueError: fewer than one probe or step.
        NonFiniteError: a product is not finite.
        NotSymmetricError: the products contradict each other.
        OutOfMemoryError: num_steps + 1 vectors fit nowhere.
        DocumentError: the checkpoint is of another call, or of other parameters or data.

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
    probes, steps = Probes(operator, as_seed(seed), distribution), min(num_steps, operator.size)
    runs = ProbeRuns(probes, budget, num_probes, steps=steps, offload=checked_offload(offload))
    runs.go_on()
    if not runs.complete:
        warn_unconverged(
            f"the budget ended after {budget.num_matvecs} of about {num_probes * steps} products: the density rests on {len(runs.rules)} "
            f"of {num_probes} probes; raise max_matvecs or max_seconds, or ask for fewer probes."
        )
    return runs.density()


class Quadrature(NamedTuple):
    """The rule of one probe: nodes (ascending), weights (summing to 1) and the nodes' residuals, (m,) each."""

    nodes: Array
    weights: Array
    residuals: Array


class Outcome(NamedTuple):
    """What a probe's run tells.

    Attributes:
        quadrature: Gauss quadrature of the probe's spectral measure.
        values: of the good Ritz pairs, (c,), largest magnitude first.
        shares: of their vectors in the other probes, (c,) by number.
        complete: False if the budget ended it.
    """

    quadrature: Quadrature
    values: Array
    shares: dict[int, Array]
    complete: bool


class Probes:
    """The random probes of an operator by number, drawn anew whenever one is wanted: keeping them would take a vector each.

    Args:
        operator: A.
        seed: seeds them all.
        distribution: of their entries.
    """

    def __init__(self, operator: SymmetricOperator, seed: int, distribution: str = "rademacher") -> None:
        self.operator, self._distribution = operator, distribution
        self._generator = torch.Generator().manual_seed(seed)
        self._states: list[Tensor] = []  # of the generator, before each probe

    def __getitem__(self, number: int) -> Tensor:
        """Probe ``number``, z of shape (n,), with ||z||^2 = n (on average, for normal entries)."""
        while len(self._states) < number:  # those before it
            self._draw_next()
        if number == len(self._states):
            return self._draw_next()
        again = torch.Generator()
        again.set_state(self._states[number])
        return self._draw(again)

    def _draw_next(self) -> Tensor:
        self._states.append(self._generator.get_state())
        return self._draw(self._generator)

    def _draw(self, generator: torch.Generator) -> Tensor:
        return self.operator.random_vectors(1, generator=generator, distribution=self._distribution)[:, 0]


class ProbeRun:
    """One Lanczos run from a random probe.

    Args:
        probes: where the probe comes from.
        number: of the probe.
        others: tells, when it has ended, the numbers of the probes that its good Ritz vectors are to be compared with.
        rows: of the basis at most, if it is known.
        offload: where the basis goes.

    Attributes:
        space: grown from the probe.
        complete: False if the budget ended it.
    """

    def __init__(
        self, probes: Probes, number: int, others: Callable[[], Iterable[int]], *, rows: int | None = None, offload: Offload = False
    ) -> None:
        self.space, self.complete = KrylovSpace(probes.operator, offload=offload, most=rows), True
        self.space.add_start(probes[number])
        self._probes, self._others = probes, others
        self.quadrature: Quadrature | None = None
        self.values, self.shares = np.zeros(0), dict[int, Array]()

    @property
    def outcome(self) -> Outcome:
        """What it has told."""
        self.record()
        assert self.quadrature is not None
        return Outcome(self.quadrature, self.values, self.shares, self.complete)

    def record(self) -> None:
        """Take down what the space tells, once: when it has ended, or before it is restarted and forgets."""
        if self.quadrature is not None:
            return
        space, ritz = self.space, self.space.ritz()
        # a weight is the squared share of its Ritz vector in z
        self.quadrature = Quadrature(ritz.values, ritz.coordinates[0] ** 2, ritz.outward)
        share = 1 if space.is_complete else _MOST_CONTROLLED  # over a complete basis all vectors are exact
        good = np.flatnonzero(ritz.residuals <= _CONTROL_RESIDUAL * ritz.scale)
        good = good[np.argsort(-np.abs(ritz.values[good]))][: min(_MAX_CONTROLS, space.operator.size // share)]
        self.values = ritz.values[good]
        for number in self._others() if len(good) else ():
            probe = self._probes[number]
            square = float(space.operator.dot(probe, probe))
            inside = space.rows.coefficients(probe.to(space.dtype)).cpu().double().numpy()[space.expanded]
            self.shares[number] = (ritz.coordinates[:, good].T @ inside) ** 2 / square


class ProbeRuns:
    """Lanczos runs from probe after probe: the rule of each, and the shares of good Ritz vectors in the probes.

    A share of a unit vector v in a random probe z, (v.z)^2 / ||z||^2, has the mean 1 / n if v does not depend on z: so those of the first
    run are looked for in all other probes, and those of the second in the first.

    Args:
        probes: where they start.
        budget: ends the runs when exhausted.
        num_probes: how many.
        steps: products of a run.
        offload: where the bases go.

    Attributes:
        rules: of the probes so far; a run that the budget ended counts only if there is no other.
        complete: whether all probes were made.
    """

    def __init__(self, probes: Probes, budget: Budget, num_probes: int, *, steps: int, offload: Offload = False) -> None:
        self._probes, self.operator, self._budget = probes, probes.operator, budget
        self._num_probes, self._steps, self._offload = num_probes, steps, offload
        self.rules: list[Quadrature] = []
        self._runs: list[tuple[Array, dict[int, Array]]] = []  # values and shares, of complete runs
        self._done = 0

    @property
    def complete(self) -> bool:
        """Whether all probes were made."""
        return self._done == self._num_probes

    @property
    def expected(self) -> int:
        """Products of all runs."""
        return self._num_probes * self._steps

    def run_first(self, enough: Callable[[KrylovSpace], bool], *, most: int, text: str) -> tuple[KrylovSpace, Outcome]:
        """The first run, to be added; it goes on until it is enough, restarted from both ends of the spectrum where memory is full.

        Args:
            enough: asked after each product, whether to stop.
            most: products at most, and vectors to keep.
            text: what is being done, for the callback.
        """
        operator, rows = self.operator, min(self.operator.size, self._steps + 1)
        place = place_for(operator, rows, self._offload)
        if isinstance(place, bool):  # half of what the basis may take holds it, if not the steps alone need more
            rows = max(rows, min(operator.size, most + 1, affordable_rows(operator, host=place) // 2))
        else:
            rows = min(operator.size, most + 1)
        run = ProbeRun(self._probes, 0, self._later, rows=rows, offload=place)
        space, self._budget.vectors, self._budget.place = run.space, rows, where(place)

        def choose() -> int:
            if space.size >= rows and not space.is_complete:
                run.record()
                ritz, keep = space.ritz(), max(1, rows // 6)  # a third of the rows, half from each end: by judgement, as in eigenpairs
                ends = np.r_[:keep, len(ritz.values) - keep : len(ritz.values)]
                space.compress(ritz.values[ends], ritz.coordinates[:, ends])
            return space.pending[0]

        run.complete = lanczos_run(space, self._budget, lambda: enough(space), lambda: (self.expected, text), choose=choose, least=1)
        return space, run.outcome

    def go_on(self) -> None:
        """All other runs, as many abreast as memory and budget allow; the first one makes a product at least."""
        while not self.complete and (not self.rules or self._budget.allows()):
            # runs abreast all end late: if time is limited, they go one after another
            width = 1 if self._budget.is_timed else int(min(self._num_probes - self._done, self._budget.matvecs_left / self._steps))
            if width > 1:
                width = 1 if self._offload else min(width, abreast(self.operator, self._steps + 1))
            if not (self._run_abreast(width) if width > 1 else self._run_alone()):
                return

    def _run_alone(self) -> bool:
        outcome = counted_step(self.operator, f"probe {self._done}", self._alone)
        self.add(outcome)
        return outcome.complete

    def _alone(self) -> Outcome:
        rows, number = min(self.operator.size, self._steps + 1), self._done
        place = place_for(self.operator, rows, self._offload)
        run = ProbeRun(self._probes, number, self._others(number), rows=rows, offload=place)
        self._budget.vectors, self._budget.place = max(self._budget.vectors, rows), where(place)
        text = f"probe {number + 1} of {self._num_probes}"
        run.complete = lanczos_run(
            run.space, self._budget, lambda: len(run.space.expanded) >= self._steps, lambda: (self.expected, text), least=1
        )
        return run.outcome

    def _run_abreast(self, width: int) -> bool:
        for outcome in counted_step(self.operator, f"probes {self._done} and {width - 1} more", lambda: self._abreast(width)):
            self.add(outcome)
        return True

    def _abreast(self, width: int) -> list[Outcome]:
        numbers = range(self._done, self._done + width)
        runs = [ProbeRun(self._probes, number, self._others(number), rows=self._steps + 1) for number in numbers]
        self._budget.vectors = max(self._budget.vectors, width * (self._steps + 3))  # and the one that is multiplied, and its product
        text = f"probes {numbers[0] + 1} to {numbers[-1] + 1} of {self._num_probes}"
        lanczos_abreast([run.space for run in runs], self._budget, self._steps, (self.expected, text))
        return [run.outcome for run in runs]

    def _others(self, number: int) -> Callable[[], Iterable[int]]:
        """The probes with which a run's vectors are to be compared."""
        return self._later if number == 0 else lambda: (0,) if number == 1 else ()

    def _later(self) -> Iterable[int]:
        """All but the first, as far as the budget will come."""
        return range(1, int(min(self._num_probes, 2 + self._budget.matvecs_left / self._steps)))

    def add(self, outcome: Outcome) -> None:
        """Count a run in."""
        if outcome.complete or not self.rules:  # part of a run is better than nothing
            self.rules.append(outcome.quadrature)
        if outcome.complete:
            self._done += 1
            self._runs.append((outcome.values, outcome.shares))

    def density(self) -> SpectralDensity:
        """The density of all runs so far."""
        steps = max(self._steps, *(len(rule.nodes) for rule in self.rules))
        tables, rounding = self._controls(), self.operator.rounding
        return density_from(self.rules, steps, self.operator.size, self._budget, self.complete, tables, rounding=rounding)

    def _controls(self) -> tuple[Tensor, Tensor] | None:
        """Values and shares of control vectors, (probes, c) each; None of a single probe, where there are none."""
        if len(self._runs) < 2:
            return None
        (first, later), (second, before) = self._runs[:2]
        empty = np.zeros(0)
        rows = [(second, before.get(0, empty)), *((first, later.get(number, empty)) for number in range(1, len(self._runs)))]
        count = min(len(shares) for _, shares in rows)
        values, shares = (np.stack([row[:count] for row in column]) for column in zip(*rows, strict=True))
        return torch.from_numpy(values), torch.from_numpy(shares)


def density_from(
    rules: list[Quadrature],
    steps: int,
    size: int,
    budget: Budget,
    complete: bool,
    controls: tuple[Tensor, Tensor] | None = None,
    *,
    rounding: float = 0.0,
) -> SpectralDensity:
    """The density as the mean of the probes' rules, padded with weight 0 to ``steps`` nodes."""
    nodes, weights = (torch.from_numpy(array) for array in _padded(rules, steps))
    outliers = torch.from_numpy(_outliers(rules))
    return SpectralDensity(nodes, weights, size, budget.num_matvecs, budget.seconds, outliers, complete, rounding, *(controls or ()))


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
