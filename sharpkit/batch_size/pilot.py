"""Short training runs on a private copy: to reach a settled sharpness, and to find where training really breaks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from sharpkit._errors import ConvergenceWarning, NonFiniteError, ObjectiveError
from sharpkit.linalg.lanczos import eigenpairs
from sharpkit.objective.objective import Objective, twin_objective
from sharpkit.objective.samples import SamplePool
from sharpkit.operators.hessian import HessianOperator
from sharpkit.optimizers import UpdateRule, copy_optimizer, learning_rates, line_search_minimizer, set_learning_rates, step_with

_ITERATIONS = 60  # of LBFGS, on the loss alone: no pass through the network
_HISTORY = 10


def constant_loss(objective: Objective) -> float:
    """The lowest loss of an output that does not depend on the input; NaN where it cannot be told.

    For cross-entropy that is the entropy of the label frequencies, for squared error the variance of the targets. Where the targets are
    classes at several positions (text, pixels), one vector of class scores serves all positions.

    Args:
        objective: made with ``loss=``; a closure keeps output and loss together, and gives NaN.

    Returns:
        NaN as well where the output is not one floating-point tensor, its shape changes from sample to sample, or the search fails.

    Example:
        >>> import torch, sharpkit as sk
        >>> from sharpkit.batch_size.pilot import constant_loss
        >>> data = (torch.randn(4, 2), torch.tensor([[1.0], [1.0], [3.0], [3.0]]))
        >>> round(constant_loss(sk.Objective(torch.nn.Linear(2, 1), data, loss=torch.nn.functional.mse_loss)), 4)
        1.0
    """
    if objective.loss is None:
        return math.nan
    pieces: list[tuple[Tensor, Any, float]] = []
    with objective.undisturbed(), torch.no_grad():
        for piece in objective.pieces():
            objective.seed_for(piece.key[0])
            pieces.append((objective.predict(piece.batch), piece.batch[1], piece.weight))
    outputs = [output for output, _, _ in pieces]
    if not all(isinstance(z, Tensor) and z.is_floating_point() and z.ndim and z.shape[1:] == outputs[0].shape[1:] for z in outputs):
        return math.nan
    found = [_best_constant(objective, pieces, shape) for shape in _shapes(outputs[0], pieces[0][1])]
    return min((value for value in found if math.isfinite(value)), default=math.nan)


def _shapes(output: Tensor, target: Any) -> Iterable[tuple[int, ...]]:
    """Shapes of the constant, to be broadcast to the output: a score per class where targets are class numbers, else one whole output."""
    found = set()
    if isinstance(target, Tensor) and not target.is_floating_point():
        for axis in (1, output.ndim - 1):
            if 1 <= axis < output.ndim and target.shape == output.shape[:axis] + output.shape[axis + 1 :]:
                found.add(tuple(size if i == axis else 1 for i, size in enumerate(output.shape)))
    return sorted(found) or [(1, *output.shape[1:])]


def _best_constant(objective: Objective, pieces: list[tuple[Tensor, Any, float]], shape: tuple[int, ...]) -> float:
    constant = torch.zeros(shape, dtype=pieces[0][0].dtype, device=pieces[0][0].device, requires_grad=True)
    search = line_search_minimizer([constant], max_iter=_ITERATIONS, history_size=_HISTORY)
    lowest = math.inf

    def loss() -> Tensor:
        nonlocal lowest
        total = torch.stack([w * objective.output_loss(constant.expand(z.shape), target) for z, target, w in pieces]).sum()
        (constant.grad,) = torch.autograd.grad(total, constant)
        lowest = min(lowest, value) if math.isfinite(value := float(total.detach())) else lowest
        return total

    with torch.enable_grad():
        search.step(loss)  # type: ignore[no-untyped-call]
    return lowest


_BLOWN_UP = 1e3  # times the first loss: beyond help
_STRIDE = math.sqrt(2.0)
_MAX_RUNS = 24
_FAR_BELOW = 6  # steps down from a best run that a constant output outdoes, in search of better: a factor of 8
_PILOT_SHARE = 0.5  # of the full-batch limit: what the pilot's rate keeps to
_PILOT_START = 0.02  # of that share, at the first step: sharpness at initialisation is no guide to what follows
_PILOT_GROWTH = 1.6  # the most its rate grows from one look to the next
_LOOK_SAMPLES, _LOOK_SHARE = (64, 256), 8  # to look lambda_max up on: this part of the data, within these bounds
_JUDGES = 512  # samples that say whether a run trained
_ADAPTIVE_RATE = 1e-3  # of the pilot of an adaptive optimizer, whose steps have a scale of their own


@dataclass
class Ledger:
    """What was spent, in single-sample gradients (a Hessian product counts two) and runs.

    Attributes:
        samples: sample gradients.
        runs: training runs.
    """

    samples: float = 0.0
    runs: int = 0

    def spend(self, samples: float) -> None:
        """Add sample gradients."""
        self.samples += samples


@dataclass(frozen=True)
class Run:
    """A finished training run of a copy.

    Attributes:
        objective: the twin over all the pool's data.
        optimizer: the twin's, with its state.
        losses: of each step's batch; the last is inf where it blew up.
    """

    objective: Objective
    optimizer: torch.optim.Optimizer
    losses: list[float]

    @property
    def survived(self) -> bool:
        """Whether the loss stayed finite and within bounds."""
        return math.isfinite(self.losses[-1])


@dataclass
class _EdgeRate:
    """A rate that keeps to a share of the full-batch limit, with lambda_max looked up at intervals by a few warm-started products."""

    limit: Callable[[float], float]
    every: int
    seed: int
    ledger: Ledger
    rate: float = 0.0
    first: float = math.nan
    vector: Tensor | None = None

    def __call__(self, step: int, twin: Objective) -> float:
        if step % self.every == 0:
            self._look(twin)
        return self.rate

    def _look(self, twin: Objective) -> None:
        pool = SamplePool(twin)
        pool = pool.limited(min(max(pool.size // _LOOK_SHARE, _LOOK_SAMPLES[0]), _LOOK_SAMPLES[1]), seed=self.seed)
        hessian = HessianOperator(pool.parent)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            pairs = eigenpairs(hessian, k=1, tol=0.03, seed=self.seed, initial=self.vector, max_matvecs=4 if self.rate else 12)
        self.ledger.spend(2 * hessian.num_matvecs * pool.size)
        top, self.vector = float(pairs.values[0]), pairs.vectors[:, 0]
        wanted = _PILOT_SHARE * self.limit(max(top, 1e-12))
        if not self.rate:
            self.first, self.rate = top, _PILOT_START * wanted
            return
        self.rate = min(wanted, _PILOT_GROWTH * self.rate)


@dataclass(frozen=True)
class Trainer:
    """Trains copies of an objective's model with the user's kind of optimizer, started afresh.

    Attributes:
        pool: the samples, of the original objective.
        optimizer: the user's; only read.
        seed: of the draws.
        ledger: where the cost is written.
    """

    pool: SamplePool
    optimizer: torch.optim.Optimizer
    seed: int = 0
    ledger: Ledger = field(default_factory=Ledger)

    def run(self, rate: Callable[[int, Objective], float], *, batch_size: int, steps: int, seed_offset: int = 0) -> Run:
        """One run from the present parameters.

        Args:
            rate: (step, twin objective) -> learning rate of the first group; the others keep their ratio to it.
            batch_size: samples a step.
            steps: how many; a run whose loss explodes ends early.
            seed_offset: another order of the same data.
        """
        twin = twin_objective(self.pool.parent, self.pool.batches)
        optimizer = copy_optimizer(self.optimizer, _counterparts(self.pool.parent.model, twin.model), lr=1.0, reset=True)
        ratios = learning_rates(optimizer)
        draws = SamplePool(twin).epochs(batch_size, generator=torch.Generator().manual_seed(self.seed + seed_offset))
        losses: list[float] = []
        self.ledger.runs += 1
        for step, batch in zip(range(steps), draws, strict=False):
            set_learning_rates(optimizer, [rate(step, twin) * ratio for ratio in ratios])
            batch.seed = self.seed + step
            losses.append(self._step(batch, optimizer))
            if not losses[-1] <= _BLOWN_UP * max(abs(losses[0]), 1e-12):
                losses[-1] = math.inf
                break
        return Run(twin, optimizer, losses)

    def _step(self, batch: Objective, optimizer: torch.optim.Optimizer) -> float:
        self.ledger.spend(batch.num_samples)
        try:
            loss, gradient = batch.gradient()
        except NonFiniteError:
            return math.inf
        step_with(optimizer, batch.layout.params, batch.layout.split(gradient))
        optimizer.zero_grad(set_to_none=True)
        return loss

    def settle(self, *, steps: int, batch_size: int, rule: UpdateRule) -> tuple[Run, float, float]:
        """The pilot: a run that keeps to half the full-batch limit (an adaptive optimizer: to a small rate).

        Returns:
            the run, its rate at the end, and lambda_max of the Hessian at its start.

        Raises:
            ObjectiveError: it diverged all the same.
        """
        plain = UpdateRule(rule.momentum, rule.dampening, rule.nesterov)
        edge = _EdgeRate(plain.max_learning_rate, max(1, steps // 10), self.seed, self.ledger)
        if rule.adaptive:
            edge._look(self.pool.parent)
            pilot = self.run(lambda step, twin: _ADAPTIVE_RATE, batch_size=batch_size, steps=steps)
        else:
            pilot = self.run(edge, batch_size=batch_size, steps=steps)
        if not pilot.survived:
            raise ObjectiveError(
                "the pilot run diverged at a rate well inside the stability limit: start from a less sharp point, or warm up first"
            )
        return pilot, _ADAPTIVE_RATE if rule.adaptive else edge.rate, edge.first

    def final_loss(self, lr: float, *, batch_size: int, steps: int, seed_offset: int = 0) -> float:
        """Loss over up to 512 samples of the pool after a run at a constant rate; inf where it blew up."""
        run = self.run(lambda step, twin: lr, batch_size=batch_size, steps=steps, seed_offset=seed_offset)
        if not run.survived:
            return math.inf
        judge = SamplePool(run.objective).limited(_JUDGES, seed=self.seed)
        self.ledger.spend(judge.size / 3)
        try:
            return judge.parent.value()
        except NonFiniteError:
            return math.inf

    @cached_property
    def yardsticks(self) -> tuple[float, float]:
        """Loss over up to 512 samples (before training, of the best constant output); the latter NaN where it cannot be told."""
        judge = self.pool.limited(_JUDGES, seed=self.seed).parent
        self.ledger.spend(2 * judge.num_samples / 3)
        return judge.value(), constant_loss(judge)

    def largest_stable_rate(self, guess: float, *, batch_size: int, steps: int, repeats: int = 1) -> tuple[float, float]:
        """Where training breaks: (largest rate that trained, smallest above it that did not), a factor sqrt(2) apart.

        A rate trains if its run makes at least half of the best improvement that any run made. The improvement counts from the best
        constant output where a run got below that, else from the loss before training: on text, any run that gets the frequencies right
        has made most of the way from the first loss, whatever else it has ruined. By factors of 2, the search walks down from the guess
        until the best run is no longer the lowest rate tried, then up from the best to the first failure; then it halves the gap. Repeats,
        with other orders of the data, know the best loss already and step up or down from the rate found; their geometric mean is given.

        Raises:
            ObjectiveError: no such rate among the runs allowed.
        """
        found: list[float] = []
        best, where = math.inf, f"runs of {steps} steps at batch size {batch_size}"
        for repeat in range(repeats):
            start = found[0] if found else guess
            search = _Search(self._runs(start, batch_size=batch_size, steps=steps, seed_offset=10_000 * repeat), *self.yardsticks, best)
            low = search.near() if found else search.from_below()
            if low is None:
                tried = f"{len(search.losses)} {where}, lr = {start * _STRIDE ** min(search.losses):.3g} to "
                tried += f"{start * _STRIDE ** max(search.losses):.3g}"
                if search.best_loss >= self.yardsticks[0]:
                    raise ObjectiveError(f"none of {tried} lowered the loss: they are too short (pilot=), or start from no place to train")
                raise ObjectiveError(
                    f"no largest stable rate after {tried}: the loss may not depend on the rate, or the runs are too short (pilot=)"
                )
            best = min(best, search.best_loss)
            found.append(start * _STRIDE**low)
        trained = math.exp(sum(map(math.log, found)) / len(found))
        return trained, trained * _STRIDE

    def _runs(self, start: float, *, batch_size: int, steps: int, seed_offset: int) -> Callable[[int], float]:
        return lambda power: self.final_loss(start * _STRIDE**power, batch_size=batch_size, steps=steps, seed_offset=seed_offset)


def _counterparts(original: nn.Module, twin: nn.Module) -> dict[int, nn.Parameter]:
    """The twin's parameter for each of the original's, by ``id`` of the original."""
    return {id(p): t for p, t in zip(original.parameters(), twin.parameters(), strict=True)}


@dataclass
class _Search:
    """Rates by powers of sqrt(2), each run made once and remembered.

    Attributes:
        run: power -> loss at the end.
        initial: loss before training.
        constant: of the best constant output, or NaN.
        known: the best loss of runs elsewhere.
        losses: found so far.
    """

    run: Callable[[int], float]
    initial: float
    constant: float
    known: float = math.inf
    losses: dict[int, float] = field(default_factory=dict)

    def at(self, power: int) -> float:
        if power not in self.losses:
            self.losses[power] = self.run(power)
        return self.losses[power]

    @property
    def best(self) -> int:
        return min(self.losses, key=lambda power: (self.losses[power], power))

    @property
    def best_loss(self) -> float:
        return min(self.known, self.losses[self.best])

    def trained(self, power: int) -> bool:
        loss, best = self.at(power), self.best_loss
        start = min(self.initial, self.constant) if best < self.constant else self.initial
        return best < start and start - loss >= 0.5 * (start - best)

    def from_below(self) -> int | None:
        """The largest power that trained, next to one that did not; None where the runs allowed did not find it."""
        self.at(0)
        while len(self.losses) < _MAX_RUNS and self._must_go_down():
            self.at(min(self.losses) - 2)
        low = self.best
        while self.best_loss < self.initial and self.trained(low + 2):
            low += 2
            if len(self.losses) >= _MAX_RUNS:
                return None
        return low + self.trained(low + 1) if self.best_loss < self.initial else None

    def _must_go_down(self) -> bool:
        """The best is the lowest tried, or no better than a constant output."""
        below = self.best - min(self.losses)
        return self.best_loss >= self.initial or below == 0 or (self.best_loss >= self.constant and below < _FAR_BELOW)

    def near(self) -> int | None:
        """The same by single steps up or down from 0."""
        low, step = 0, 1 if self.trained(0) else -1
        while len(self.losses) < _MAX_RUNS:
            if self.trained(low + step) != (step > 0):
                return low if step > 0 else low - 1
            low += step
        return None
