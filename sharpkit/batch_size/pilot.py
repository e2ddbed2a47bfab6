"""Short training runs on a private copy: to reach a settled sharpness, and to find where training really breaks."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from sharpkit._checkpoint import clock, keeps_steps, step
from sharpkit._errors import ConvergenceWarning, NonFiniteError, ObjectiveError
from sharpkit._results import Result
from sharpkit.batch_size.baseline import constant_loss
from sharpkit.batch_size.initialisation import may_redraw, redraw
from sharpkit.batch_size.search import STRIDE, RateSearch, is_trained
from sharpkit.linalg.lanczos import eigenpairs
from sharpkit.objective.guard import grad_mode_kept, silenced
from sharpkit.objective.objective import Objective
from sharpkit.objective.samples import SamplePool
from sharpkit.operators.hessian import HessianOperator
from sharpkit.operators.preconditioned import optimizer_curvature
from sharpkit.optimizers import UpdateRule, copy_optimizer, learning_rates, relative_rates, set_learning_rates, unwrap_optimizer
from sharpkit.training_run import Snapshot, TrainingRun

logger = logging.getLogger(__name__)
T = TypeVar("T")

_JUDGES = 512  # samples that say whether a run trained, by judgement: enough to tell half an improvement from a whole one

# -- the pilot
# Of the full-batch limit, by judgement: with momentum 2 of 50 pilots from scratch and few from trained points had to begin anew at that
# (experiments/batch_heldout.py); at a half ReLU networks often diverged.
_PILOT_SHARE = 0.15
_PILOT_START = 0.07  # of that share, at the first step, by judgement: sharpness at initialisation is no guide to what follows
_PILOT_GROWTH = 1.6  # the most its rate grows from one look at lambda_max to the next, by judgement
_LOOKS = 10  # looks at lambda_max in a pilot, by judgement: 1.6^10 makes good the start fifteen times too low
_LOOK_SAMPLES, _LOOK_SHARE = (64, 256), 8  # a look takes an eighth of the data, within these bounds, by judgement: one digit will do
_ADAPTIVE_RATE = 1e-3  # of the pilot of an adaptive optimizer, whose steps have a scale of their own: Adam's default by convention
_BACK_OFF, _ATTEMPTS = 0.25, 5  # what a pilot that went astray is begun anew at, and how often, by judgement: down to 1 / 256
_ASTRAY = 100.0  # times the loss before training, by judgement: sharpness measured after that is not the user's network's
# Times the loss before training or a constant output's, and, from a trained point, times the loss before training alone: a pilot that ends
# above has unlearned. By judgement; within a factor of 2, batches of another size than the user's change the noise in the loss.
_WORSE, _UNLEARNED = 1.1, 2.0


class TimeIsUp(Exception):
    """The seconds allowed are over: the run that was going on does not count."""


@dataclass
class Ledger:
    """What was spent: single-sample gradients (a Hessian product counts two), and training runs; when runs must end."""

    samples: float = 0.0
    runs: int = 0
    deadline: float = math.inf  # of clock()

    def spend(self, samples: float) -> None:
        """Add sample gradients."""
        self.samples += samples

    def check_time(self) -> None:
        """Raise :class:`TimeIsUp` after the deadline."""
        if clock() > self.deadline:
            raise TimeIsUp

    def step(self, name: str, compute: Callable[[], T], *, whole: bool = True) -> T:
        """What ``compute`` returns, as a step; what it spends is written down, whether it was made before or not."""
        value, self.samples, self.runs = step(name, lambda: (compute(), self.samples, self.runs), whole=whole)
        return value


@dataclass(frozen=True)
class Anchor(Result):
    """Where training really broke at one batch size, by short runs; geometric means where the search was repeated.

    Attributes:
        batch_size: B.
        trained: largest rate that trained.
        broke: smallest rate above it that did not.
        repeats: searches with other orders of the data, and other initialisations where they can be drawn.
        scatter: standard deviation of the searches' log rates; NaN for one search.
        keeps: whether a rate counted as trained if it lost nothing, since little was left to improve.
    """

    batch_size: int
    trained: float
    broke: float
    repeats: int = 1
    scatter: float = math.nan
    keeps: bool = False

    @property
    def rate(self) -> float:
        """Geometric middle of the two."""
        return math.sqrt(self.trained * self.broke)


class PilotRun(TrainingRun):
    """A training run on a private copy of an objective's model; ``objective`` is the copy over all the pool's data."""

    def __init__(self, objective: Objective, optimizer: torch.optim.Optimizer, gradients: _PoolGradients, *, reference: float) -> None:
        super().__init__(objective.model, optimizer, gradients, reference=reference)
        self.objective = objective

    def follow(self, rates: Iterable[float]) -> list[float]:
        """All steps under one guard of the copy: entered at each step, it took half of a small network's time."""
        with self.objective.undisturbed():
            return super().follow(rates)


class _PoolGradients:
    """Gradients of mini-batches drawn from a pool, by the objective's own rules of weight and mode; what they cost is written down."""

    def __init__(self, pool: SamplePool, batch_size: int, *, seed: int, order: int, ledger: Ledger) -> None:
        self._draws = pool.epochs(batch_size, generator=torch.Generator().manual_seed(order))
        self._seed, self._ledger = seed, ledger

    def batch_at(self, number: int) -> Objective:
        """Drawn one after another: a pilot makes no trials, so none is asked for again."""
        return next(self._draws)

    def backward(self, batch: Objective, number: int) -> float:
        """Infinite where the gradient is not finite. Under the guard of :meth:`PilotRun.follow`."""
        self._ledger.check_time()
        batch.seed = self._seed + number
        self._ledger.spend(batch.num_samples)
        try:
            loss, gradient = batch.own_gradient()
        except NonFiniteError:
            return math.inf
        for p, g in zip(batch.layout.params, batch.layout.split(gradient), strict=True):
            p.grad = g
        return loss


@dataclass
class _EdgeRate:
    """A rate that keeps to a share of the full-batch limit; lambda_max is measured at intervals by a few warm-started products."""

    limit: Callable[[float], float]
    share: float
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

    def look(self, objective: Objective, optimizer: torch.optim.Optimizer | None, *, whole: bool = False) -> float:
        """lambda_max of the matrix of the optimizer's limit (of H without one), which also sets the rate; on a part of the data.

        The first look is told to the user and takes all of them: on an eighth, trained networks read twice as sharp.
        """
        pool = SamplePool(objective, coupled=True)
        if self.rate and not whole:
            pool = pool.limited(min(max(pool.size // _LOOK_SHARE, _LOOK_SAMPLES[0]), _LOOK_SAMPLES[1]), seed=self.seed)
        hessian = HessianOperator(pool.parent)
        matrix = hessian if optimizer is None else optimizer_curvature(hessian, optimizer)[0]
        with silenced(ConvergenceWarning):
            # 12 products from a random vector, 4 from the last look's: by judgement, the rate needs one digit and no more
            pairs = eigenpairs(matrix, k=1, tol=0.03, seed=self.seed, initial=self.vector, max_matvecs=4 if self.rate else 12)
        self.ledger.spend(2 * hessian.num_matvecs * pool.size)
        top, self.vector = float(pairs.values[0]), pairs.vectors[:, 0]
        wanted = self.share * self.limit(max(top, 1e-12))
        if self.rate:
            self.rate = min(wanted, _PILOT_GROWTH * self.rate)
        else:
            self.first, self.rate = top, _PILOT_START * wanted
        return top


@dataclass(frozen=True)
class Settled:
    """Where a pilot ended.

    Attributes:
        run: the pilot, whose objective is at the point it reached.
        rate: at its end.
        before, after: lambda_max at its start and end: of the Hessian for an adaptive optimizer; else of the matrix of its limit, which is
            measured at the end anyway, and NaN here.
        steps: that were made; 0 at the present parameters.
        attempts: pilots that went astray before this one.
    """

    run: PilotRun
    rate: float
    before: float
    after: float
    steps: int
    attempts: int


_NUMBERS = ("rate", "before", "after", "steps", "attempts")  # of :class:`Settled`, all but the run


@dataclass(frozen=True)
class Trainer:
    """Trains copies of the model of a pool's objective with the user's kind of optimizer; writes down what it costs.

    Attributes:
        told: called after each run.
    """

    pool: SamplePool
    optimizer: torch.optim.Optimizer
    seed: int = 0
    ledger: Ledger = field(default_factory=Ledger)
    told: Callable[[], None] = lambda: None

    def start(self, batch_size: int, *, order: int = 0, draw: int = 0, keep_state: bool = False) -> PilotRun:
        """A run from the present parameters, no step made yet. Groups keep their ratios.

        Args:
            batch_size: B.
            order: number of another order of the data.
            draw: number of another initialisation; 0 for the present parameters.
            keep_state: go on with the optimizer's state, its momentum for one, instead of an empty one.
        """
        with grad_mode_kept():  # copies of tensors are made under no_grad
            twin = self.pool.parent.copy(self.pool.batches)
            pairs = zip(self.pool.parent.model.parameters(), twin.model.parameters(), strict=True)
            optimizer = copy_optimizer(self.optimizer, {id(p): t for p, t in pairs}, reset=not keep_state)
        if draw:
            redraw(twin.model, seed=self.seed + draw, device=twin.device)
        set_learning_rates(optimizer, relative_rates(unwrap_optimizer(self.optimizer), self.pool.parent.layout))
        self.ledger.runs += 1
        # masks and measurements keep the seed, so that runs differ by the order of the data alone
        gradients = _PoolGradients(SamplePool(twin, coupled=True), batch_size, seed=self.seed, order=self.seed + order, ledger=self.ledger)
        return PilotRun(twin, optimizer, gradients, reference=self.reference)

    # -- the pilot ------------------------------------------------------------------------------------------------------------
    def settle(self, *, steps: int, batch_size: int, rule: UpdateRule) -> Settled:
        """The pilot: a run that keeps to a share of the full-batch limit (an adaptive optimizer: to a small rate).

        One that diverges or unlearns is begun anew at a quarter of the rate; where none holds, and for 0 steps, the point is the present
        one. The run ends where it is when the time is up.
        """
        _ = self.yardsticks  # a step of its own, before those that ask for it
        if not keeps_steps():
            return self._settle(steps=steps, batch_size=batch_size, rule=rule)
        made: list[Settled] = []

        def settle() -> dict[str, Any]:
            made.append(self._settle(steps=steps, batch_size=batch_size, rule=rule))
            run, numbers = made[0].run, {name: getattr(made[0], name) for name in _NUMBERS}
            return {
                **Snapshot(run.model, run.optimizer).state_dict(),
                "losses": run.losses,
                "rates": learning_rates(run.optimizer),
                **numbers,
            }

        kept = self.ledger.step("pilot", settle)
        if made:
            return made[0]
        runs, run = self.ledger.runs, self.start(batch_size)
        self.ledger.runs = runs  # it is written down already
        snapshot = Snapshot(run.model, run.optimizer)
        snapshot.load_state_dict(kept)
        snapshot.restore(run.model, run.optimizer)
        set_learning_rates(run.optimizer, kept["rates"])
        run.losses.extend(kept["losses"])
        return Settled(run, *(kept[name] for name in _NUMBERS))

    def _settle(self, *, steps: int, batch_size: int, rule: UpdateRule) -> Settled:
        share = 1.0
        for attempt in range(_ATTEMPTS if steps else 0):
            edge, pilot = self._edge(share, steps, rule), self.start(batch_size)
            rates = (share * _ADAPTIVE_RATE if rule.adaptive else edge.at(step, pilot) for step in range(steps))
            with contextlib.suppress(TimeIsUp):
                pilot.follow(self._until_astray(rates, pilot))
            if pilot.losses and not self._went_astray(pilot):
                rate = share * _ADAPTIVE_RATE if rule.adaptive else edge.rate
                after = edge.look(pilot.objective, None, whole=True) if rule.adaptive else math.nan
                return Settled(pilot, rate, edge.first, after, len(pilot.losses), attempt)
            logger.info("the pilot diverged or unlearned at %.3g of its rate: it begins anew at a quarter of that", share)
            share *= _BACK_OFF
        edge, pilot = self._edge(1.0, 1, rule), self.start(batch_size)
        top = edge.look(self.pool.parent, None) if rule.adaptive else edge.look(pilot.objective, pilot.optimizer)
        return Settled(pilot, _ADAPTIVE_RATE if rule.adaptive else edge.rate, top, top, 0, _ATTEMPTS if steps else 0)

    def _edge(self, share: float, steps: int, rule: UpdateRule) -> _EdgeRate:
        edge = _EdgeRate(rule.max_learning_rate, share * _PILOT_SHARE, max(1, steps // _LOOKS), self.seed, self.ledger)
        if rule.adaptive and steps > 1:  # its limit is not that of H, and D^-1 H would be no measure of what the pilot changed: D grows
            edge.look(self.pool.parent, None)
        return edge

    def _until_astray(self, rates: Iterator[float], run: PilotRun) -> Iterator[float]:
        for rate in rates:
            if run.losses and not run.losses[-1] <= _ASTRAY * self.reference:
                return
            yield rate

    def _went_astray(self, run: PilotRun) -> bool:
        if run.diverged or not max(run.losses) <= _ASTRAY * self.reference:
            return True
        initial, constant = self.yardsticks
        worst = _UNLEARNED * initial if is_trained(initial, constant) else _WORSE * self.reference
        return not self._judge(run) <= worst

    # -- runs that are judged -------------------------------------------------------------------------------------------------
    def final_loss(self, lr: float, *, batch_size: int, steps: int, order: int = 0, draw: int = 0) -> float:
        """Loss over up to 512 samples of the pool after a run at a constant rate; infinite where it diverged."""
        _ = self.yardsticks  # a step of its own, before those that ask for it

        def train() -> float:
            run = self.start(batch_size, order=order, draw=draw)
            run.follow(lr for _ in range(steps))
            return math.inf if run.diverged else self._judge(run)

        loss = self.ledger.step(f"{steps} steps at rate {lr!r} and B = {batch_size}, order {order}, initialisation {draw}", train)
        self.told()
        return loss

    def _judge(self, run: PilotRun) -> float:
        judge = SamplePool(run.objective, coupled=True).limited(_JUDGES, seed=self.seed)
        self.ledger.spend(judge.size / 3)  # a forward pass is a third of a gradient
        with contextlib.suppress(NonFiniteError):
            return judge.parent.value()
        return math.inf

    @cached_property
    def yardsticks(self) -> tuple[float, float]:
        """Loss over up to 512 samples: before training, and of the best constant output (NaN if it cannot be determined)."""
        judge = self.pool.limited(_JUDGES, seed=self.seed).parent
        self.ledger.spend(2 * judge.num_samples / 3)
        return step("yardsticks", lambda: (judge.value(), constant_loss(judge)), whole=True)

    @property
    def reference(self) -> float:
        """The loss that divergence is measured against: before training or of the best constant output, whichever is higher."""
        # at a trained point batches differ by any factor, and the first one's loss says little
        initial, constant = self.yardsticks
        return max(abs(initial), abs(constant) if math.isfinite(constant) else 0.0)

    @cached_property
    def one_start(self) -> str:
        """Why all runs begin at the present parameters; empty where repeated searches draw other initialisations."""
        return may_redraw(self.pool.limited(_JUDGES, seed=self.seed).parent, seed=self.seed + 1)

    def largest_stable_rate(self, guess: float, *, batch_size: int, steps: int, repeats: int = 1) -> Anchor:
        """Where training breaks: the largest rate that trained and the smallest above it that did not, a factor sqrt(2) apart.

        What counts as trained: :class:`RateSearch`. By factors of 2, the search walks down from the guess until the best run is no longer
        the lowest rate tried, then up from the best to the first failure; then it halves the gap. Repeats, with other orders of the data
        and other initialisations where they can be drawn, step up or down from the first answer; their geometric mean is given. When the
        time is up, the searches that had ended count.

        Raises:
            ObjectiveError: no such rate among the runs allowed.
            TimeIsUp: before the first search ended.
        """
        rates, best, keeps = list[float](), math.inf, False
        for repeat in range(repeats):
            start, draw = rates[0] if rates else guess, 0 if self.one_start else repeat

            def loss_after(power: int, start: float = start, order: int = 10_000 * repeat, draw: int = draw) -> float:
                return self.final_loss(start * STRIDE**power, batch_size=batch_size, steps=steps, order=order, draw=draw)

            search = RateSearch(loss_after, *self._yardsticks_of(draw, batch_size), best)  # repeats know the best loss already
            try:
                low = search.near() if rates and not keeps else search.from_below()
            except TimeIsUp:
                if rates:
                    break
                raise
            if low is None and rates:
                low = search.from_below()  # another start may train at quite other rates
            if low is None:
                raise ObjectiveError(self._no_answer(search, start, f"runs of {steps} steps at batch size {batch_size}"))
            best, keeps = min(best, search.best_loss), keeps or search.keeping
            rates.append(start * STRIDE**low)
        logs = torch.tensor(rates, dtype=torch.float64).log()
        trained, scatter = math.exp(float(logs.mean())), float(logs.std()) if len(rates) > 1 else math.nan
        return Anchor(batch_size, trained, trained * STRIDE, len(rates), scatter, keeps)

    def _yardsticks_of(self, draw: int, batch_size: int) -> tuple[float, float]:
        initial, constant = self.yardsticks
        if draw:
            initial = self.ledger.step(f"loss of initialisation {draw}", lambda: self._judge(self.start(batch_size, draw=draw)))
        return initial, constant

    def _no_answer(self, search: RateSearch, start: float, runs: str) -> str:
        ends = f"lr = {start * STRIDE ** min(search.losses):.3g} to {start * STRIDE ** max(search.losses):.3g}"
        why = "the loss may not depend on the rate, or the runs are too short (steps=)"
        if search.best_loss >= search.initial:
            why = "none lowered the loss: they are too short (steps=), or the starting point does not train at any of these rates"
        return f"no largest stable rate after {len(search.losses)} {runs}, {ends}: {why}"
