"""Short training runs on a private copy: to reach a settled sharpness, and to find where training really breaks."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sharpkit._errors import ConvergenceWarning, NonFiniteError, ObjectiveError
from sharpkit.linalg.lanczos import eigenpairs
from sharpkit.objective.guard import grad_mode_kept, silenced
from sharpkit.objective.objective import Objective
from sharpkit.objective.samples import SamplePool
from sharpkit.operators.hessian import HessianOperator
from sharpkit.operators.preconditioned import optimizer_curvature
from sharpkit.optimizers import UpdateRule, copy_optimizer, line_search_minimizer, relative_rates, set_learning_rates, unwrap_optimizer
from sharpkit.training_run import TrainingRun

# -- the search for the largest rate that trains
_STRIDE = math.sqrt(2.0)  # one search scatters by a factor of 1.5 to 2 (docs/batch_size.md), so a finer grid would resolve its noise
_MAX_RUNS = 24  # by judgement: from 2^-12 times the guess, downwards in factors of 2; a search takes about 7 runs
# Steps of sqrt(2) down from a best run that a constant output outdoes, in search of better: a factor of 8, by judgement.
_FAR_BELOW = 6
_JUDGES = 512  # samples that say whether a run trained, by judgement: enough to tell half an improvement from a whole one

# -- the pilot
_PILOT_SHARE = 0.5  # of the full-batch limit, by judgement: far enough below it to train, near enough to settle the sharpness
_PILOT_START = 0.02  # of that share, at the first step, by judgement: sharpness at initialisation is no guide to what follows
_PILOT_GROWTH = 1.6  # the most its rate grows from one look at lambda_max to the next, by judgement
_LOOKS = 10  # looks at lambda_max in a pilot, by judgement: 1.6^10 makes good the start fifty times too low
_LOOK_SAMPLES, _LOOK_SHARE = (64, 256), 8  # a look takes an eighth of the data, within these bounds, by judgement: one digit will do
_ADAPTIVE_RATE = 1e-3  # of the pilot of an adaptive optimizer, whose steps have a scale of their own: Adam's default by convention


@dataclass
class Ledger:
    """What was spent: single-sample gradients (a Hessian product counts two), and training runs."""

    samples: float = 0.0
    runs: int = 0

    def spend(self, samples: float) -> None:
        """Add sample gradients."""
        self.samples += samples


class PilotRun(TrainingRun):
    """A training run on a private copy of an objective's model; ``objective`` is the copy over all the pool's data."""

    def __init__(self, objective: Objective, optimizer: torch.optim.Optimizer, gradients: _PoolGradients) -> None:
        super().__init__(objective.model, optimizer, gradients)
        self.objective = objective


class _PoolGradients:
    """Gradients of mini-batches drawn from a pool, by the objective's own rules of weight and mode; what they cost is written down."""

    def __init__(self, pool: SamplePool, batch_size: int, *, seed: int, order: int, ledger: Ledger) -> None:
        self._draws = pool.epochs(batch_size, generator=torch.Generator().manual_seed(order))
        self._seed, self._ledger = seed, ledger

    def batch_at(self, number: int) -> Objective:
        """Drawn one after another: a pilot makes no trials, so none is asked for again."""
        return next(self._draws)

    def backward(self, batch: Objective, number: int) -> float:
        """Infinite where the gradient is not finite."""
        batch.seed = self._seed + number
        self._ledger.spend(batch.num_samples)
        try:
            loss, gradient = batch.gradient()
        except NonFiniteError:
            return math.inf
        for p, g in zip(batch.layout.params, batch.layout.split(gradient), strict=True):
            p.grad = g
        return loss


@dataclass
class _EdgeRate:
    """A rate that keeps to a share of the full-batch limit; lambda_max is measured at intervals by a few warm-started products."""

    limit: Callable[[float], float]
    every: int
    seed: int
    ledger: Ledger
    rate: float = 0.0
    first: float = math.nan
    vector: Tensor | None = None

    def at(self, step: int, run: PilotRun) -> float:
        """The rate of a step, with a look at the run where it is due."""
        if step % self.every == 0:
            self.look(run.objective, run.optimizer)
        return self.rate

    def look(self, objective: Objective, optimizer: torch.optim.Optimizer | None) -> float:
        """lambda_max on a part of the data, of the matrix of the optimizer's limit (of H without one), which also sets the rate."""
        pool = SamplePool(objective)
        pool = pool.limited(min(max(pool.size // _LOOK_SHARE, _LOOK_SAMPLES[0]), _LOOK_SAMPLES[1]), seed=self.seed)
        hessian = HessianOperator(pool.parent)
        matrix = hessian if optimizer is None else optimizer_curvature(hessian, optimizer)[0]
        with silenced(ConvergenceWarning):
            # 12 products from a random vector, 4 from the last look's: by judgement, the rate needs one digit and no more
            pairs = eigenpairs(matrix, k=1, tol=0.03, seed=self.seed, initial=self.vector, max_matvecs=4 if self.rate else 12)
        self.ledger.spend(2 * hessian.num_matvecs * pool.size)
        top, self.vector = float(pairs.values[0]), pairs.vectors[:, 0]
        wanted = _PILOT_SHARE * self.limit(max(top, 1e-12))
        if self.rate:
            self.rate = min(wanted, _PILOT_GROWTH * self.rate)
        else:
            self.first, self.rate = top, _PILOT_START * wanted
        return top


@dataclass(frozen=True)
class Trainer:
    """Trains copies of the model of a pool's objective with the user's kind of optimizer, started afresh; writes down what it costs."""

    pool: SamplePool
    optimizer: torch.optim.Optimizer
    seed: int = 0
    ledger: Ledger = field(default_factory=Ledger)

    def start(self, batch_size: int, *, seed_offset: int = 0) -> PilotRun:
        """A run from the present parameters, no step made yet; another offset is another order of the data. Groups keep their ratios."""
        with grad_mode_kept():  # copies of tensors are made under no_grad
            twin = self.pool.parent.copy(self.pool.batches)
            pairs = zip(self.pool.parent.model.parameters(), twin.model.parameters(), strict=True)
            optimizer = copy_optimizer(self.optimizer, {id(p): t for p, t in pairs}, reset=True)
        set_learning_rates(optimizer, relative_rates(unwrap_optimizer(self.optimizer), self.pool.parent.layout))
        self.ledger.runs += 1
        # masks and measurements keep the seed, so that runs differ by the order of the data alone
        order = self.seed + seed_offset
        gradients = _PoolGradients(SamplePool(twin), batch_size, seed=self.seed, order=order, ledger=self.ledger)
        return PilotRun(twin, optimizer, gradients)

    def settle(self, *, steps: int, batch_size: int, rule: UpdateRule) -> tuple[PilotRun, float, tuple[float, float]]:
        """The pilot: a run that keeps to half the full-batch limit (an adaptive optimizer: to a small rate).

        Returns:
            the run, its rate at the end, and lambda_max at its start and end: of the Hessian for an adaptive optimizer; else of the matrix
            of its limit, which is measured at the end anyway, and NaN here.

        Raises:
            ObjectiveError: it diverged all the same.
        """
        edge = _EdgeRate(rule.max_learning_rate, max(1, steps // _LOOKS), self.seed, self.ledger)
        if rule.adaptive:  # its limit is not that of H, and D^-1 H would be no measure of what the pilot changed: D grows meanwhile
            edge.look(self.pool.parent, None)
        pilot = self.start(batch_size)
        pilot.follow(_ADAPTIVE_RATE if rule.adaptive else edge.at(step, pilot) for step in range(steps))
        if pilot.diverged:
            remedy = "start from a less sharp point, or warm up first"
            raise ObjectiveError(f"the pilot run diverged at a rate well inside the stability limit: {remedy}")
        if not rule.adaptive:
            return pilot, edge.rate, (edge.first, math.nan)
        return pilot, _ADAPTIVE_RATE, (edge.first, edge.look(pilot.objective, None))

    def final_loss(self, lr: float, *, batch_size: int, steps: int, seed_offset: int = 0) -> float:
        """Loss over up to 512 samples of the pool after a run at a constant rate; infinite where it diverged."""
        run = self.start(batch_size, seed_offset=seed_offset)
        run.follow(lr for _ in range(steps))
        if run.diverged:
            return math.inf
        judge = SamplePool(run.objective).limited(_JUDGES, seed=self.seed)
        self.ledger.spend(judge.size / 3)  # a forward pass is a third of a gradient
        with contextlib.suppress(NonFiniteError):
            return judge.parent.value()
        return math.inf

    @cached_property
    def yardsticks(self) -> tuple[float, float]:
        """Loss over up to 512 samples: before training, and of the best constant output (NaN if it cannot be determined)."""
        judge = self.pool.limited(_JUDGES, seed=self.seed).parent
        self.ledger.spend(2 * judge.num_samples / 3)
        return judge.value(), constant_loss(judge)

    def largest_stable_rate(self, guess: float, *, batch_size: int, steps: int, repeats: int = 1) -> tuple[float, float]:
        """Where training breaks: (largest rate that trained, smallest above it that did not), a factor sqrt(2) apart.

        A rate trains if its run makes at least half of the best improvement that any run made. The improvement counts from the best
        constant output where a run got below that, else from the loss before training. By factors of 2, the search walks down from the
        guess until the best run is no longer the lowest rate tried, then up from the best to the first failure; then it halves the gap.
        Repeats, with other orders of the data, step up or down from the first answer; their geometric mean is given.

        Raises:
            ObjectiveError: no such rate among the runs allowed.
        """
        rates, best = list[float](), math.inf
        for repeat in range(repeats):
            start = rates[0] if rates else guess

            def loss_after(power: int, start: float = start, seed_offset: int = 10_000 * repeat) -> float:
                return self.final_loss(start * _STRIDE**power, batch_size=batch_size, steps=steps, seed_offset=seed_offset)

            search = _Search(loss_after, *self.yardsticks, best)  # repeats know the best loss already
            low = search.near() if rates else search.from_below()
            if low is None:
                ends = f"lr = {start * _STRIDE ** min(search.losses):.3g} to {start * _STRIDE ** max(search.losses):.3g}"
                tried = f"{len(search.losses)} runs of {steps} steps at batch size {batch_size}, {ends}"
                why = "the loss may not depend on the rate, or the runs are too short (pilot=)"
                if search.best_loss >= self.yardsticks[0]:
                    why = "none lowered the loss: they are too short (pilot=), or the starting point does not train at any of these rates"
                raise ObjectiveError(f"no largest stable rate after {tried}: {why}")
            best = min(best, search.best_loss)
            rates.append(start * _STRIDE**low)
        trained = math.exp(sum(map(math.log, rates)) / len(rates))
        return trained, trained * _STRIDE


@dataclass
class _Search:
    """Rates by powers of sqrt(2), each run made once and remembered."""

    run: Callable[[int], float]  # power -> loss at the end
    initial: float  # loss before training
    constant: float  # loss of the best constant output, or NaN
    known: float = math.inf  # the best loss of runs elsewhere
    losses: dict[int, float] = field(default_factory=dict)  # at the end, by power

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
        # the bar moves with the best run so far, so that an answer holds only once the best has been passed on both sides
        loss, best = self.at(power), self.best_loss
        # on text, any run that gets the frequencies right has made most of the way from the first loss, whatever else it has ruined
        start = min(self.initial, self.constant) if best < self.constant else self.initial
        return best < start and start - loss >= 0.5 * (start - best)

    def from_below(self) -> int | None:
        """The largest power that trained, next to one that did not; None if the runs allowed do not contain it."""
        self.at(0)
        while len(self.losses) < _MAX_RUNS and self._must_go_down():
            self.at(min(self.losses) - 2)
        low = self.best
        # Upwards by 2 as well: by single steps the search ended at its bound for Adam, whose range of rates is wide.
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


# -- the baseline ----------------------------------------------------------------------------------------------------------------
def constant_loss(objective: Objective) -> float:
    """The lowest loss of an output that does not depend on the input; NaN if it cannot be determined.

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
    with objective.undisturbed():  # gradients on: a model of forces takes one inside
        for piece in objective.pieces():
            objective.seed_for(piece.key[0])
            output = objective.predict(piece.batch)
            pieces.append((output.detach() if isinstance(output, Tensor) else output, piece.batch[1], piece.weight))
    outputs = [output for output, _, _ in pieces]
    # one constant must fit all outputs
    if not all(isinstance(z, Tensor) and z.is_floating_point() and z.ndim and z.shape[1:] == outputs[0].shape[1:] for z in outputs):
        return math.nan
    losses = [_best_constant(objective, pieces, shape) for shape in _shapes(outputs[0], pieces[0][1])]
    return min((value for value in losses if math.isfinite(value)), default=math.nan)


def _shapes(output: Tensor, target: Any) -> Iterable[tuple[int, ...]]:
    """Shapes of the constant, to be broadcast to the output: a score per class where targets are class numbers, else one whole output."""
    shapes = set()
    if isinstance(target, Tensor) and not target.is_floating_point():
        for axis in (1, output.ndim - 1):
            if 1 <= axis < output.ndim and target.shape == output.shape[:axis] + output.shape[axis + 1 :]:
                shapes.add(tuple(size if i == axis else 1 for i, size in enumerate(output.shape)))
    return sorted(shapes) or [(1, *output.shape[1:])]


def _best_constant(objective: Objective, pieces: list[tuple[Tensor, Any, float]], shape: tuple[int, ...]) -> float:
    constant = torch.zeros(shape, dtype=pieces[0][0].dtype, device=pieces[0][0].device, requires_grad=True)
    # 60 iterations with 10 vectors of memory: no pass through the network, and the entropy is met to 2e-3 even where a class never occurs
    search = line_search_minimizer([constant], max_iter=60, history_size=10)
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
