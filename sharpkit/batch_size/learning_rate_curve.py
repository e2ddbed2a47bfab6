"""The largest stable learning rate as a function of the batch size: measured curvature, theory, and short calibrating runs."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from sharpkit._arguments import as_seed, check_callback, whole, wholes
from sharpkit._results import Bounded, Progress, ProgressCallback, Result
from sharpkit.batch_size.curvature import BatchCurvature
from sharpkit.batch_size.limits import limits_for
from sharpkit.batch_size.pilot import Trainer
from sharpkit.objective.objective import Objective, check_objective
from sharpkit.objective.samples import SamplePool
from sharpkit.optimizers import UpdateRule, check_settles, check_trains, learning_rate, limit_rule, unwrap_optimizer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

logger = logging.getLogger(__name__)

# -- reading the law
_HALF_STEP = 2**0.25  # half of the factor sqrt(2) between the largest rate that trained and the next, in log: by definition of the search
_MODEL_SPREAD = 1.5  # by judgement: what a rate read off curvature alone may be off by where curvature does not move in training
# Standard deviation of an anchor's log rate about the law, by chance and because the law is no more than that. With it all measured rates
# of experiments/batch_curve.py lay within the intervals, from both initialisations.
_SCATTER = 0.25
_FIRST_BEND = 0.1  # the law may bend anywhere from this batch size to N, every octave alike: by judgement, below 1 it is flat throughout

# -- what is measured and trained
_MAX_POOL = 4096  # samples, by judgement: it bounds what a full-data gradient costs
# Batch size of the pilot: an eighth of the data, within these bounds, by judgement; half of what it was before, to make curves cheaper.
_PILOT_BATCH, _PILOT_SHARE = (16, 128), 8
_LEAST_PILOT = 10  # steps, by judgement: fewer show neither a settled sharpness nor what breaks
_RUNS, _MORE_RUNS = 7, 2.5  # runs that a search took and each repeat added, about, in experiments/batch_curve.py: for the forecast
_MEASURING = 70  # full-data gradients for curvature and its noise, about, in experiments/batch_curve.py as well
# Calibrate at every eighth batch size up to N / 28, since runs at large batches cost most, and once more at N / 16: with these
# experiments/batch_curve.py was 50 times cheaper than the sweep. Parts of the data used whole instead of N / 16 scattered by a factor of 2.
_ANCHOR_STRIDE, _ANCHOR_SHARE, _LAST_SHARE = 8, 28, 16
_MAX_LENGTH = 3.0  # times the pilot's steps, at the smallest batch sizes, by judgement: small batches need more to show what breaks
_REPEATS = (4, 3)  # searches at each batch size and at the last: one scatters by a factor of 1.5 to 2 (docs/batch_size.md)


@dataclass(frozen=True)
class Anchor(Result):
    """Where training really broke at one batch size, by short runs; geometric means where the search was repeated.

    Attributes:
        batch_size: B.
        trained: largest rate that trained.
        broke: smallest rate above it that did not.
        repeats: searches with other orders of the data.
    """

    batch_size: int
    trained: float
    broke: float
    repeats: int = 1

    @property
    def rate(self) -> float:
        """Geometric middle of the two."""
        return math.sqrt(self.trained * self.broke)


# What a document holds first.
_READINGS = ("optimizer", "condition=rule.condition", "exponent", "rows", "crossover", "rule_holds_to", "curvature", "anchors")


@dataclass(frozen=True)
class LearningRateCurve(
    Result,
    kind="learning_rate_curve",
    saved=(*_READINGS, "sharpness_at_start", "sharpness_after_pilot", "lr", "num_samples", "gradients", "seconds", "findings"),
):
    """The largest stable learning rate and the batch curvature against the batch size.

    Attributes:
        batch_sizes: those asked for, ascending.
        optimizer: name of its class.
        rule: by which curvature bounds its rate.
        curvature: full-data curvature and its noise (preconditioned for an adaptive optimizer, at the smallest batch size).
        limits: (batch size, rate) by the mean-square condition on the curvature measured, on a fine grid.
        anchors: short runs that fix the level; empty without.
        sharpness: lambda_max at the starting point and after the pilot, of H for an adaptive optimizer, else of the matrix of its limit.
        lr: the optimizer's present rate.
        num_samples: N.
        gradients, seconds: cost in full-data gradients (products count two), and wall time.
    """

    batch_sizes: tuple[int, ...]
    optimizer: str
    rule: UpdateRule
    curvature: BatchCurvature = field(repr=False)
    limits: tuple[tuple[float, float], ...] = field(repr=False)
    anchors: tuple[Anchor, ...]
    sharpness: tuple[float, float]
    lr: float
    num_samples: int
    gradients: float
    seconds: float

    @property
    def sharpness_at_start(self) -> float:
        """lambda_max at the starting point."""
        return self.sharpness[0]

    @property
    def sharpness_after_pilot(self) -> float:
        """lambda_max after the pilot."""
        return self.sharpness[1]

    # -- reading it -------------------------------------------------------------------------------------------------------
    def lambda_max(self, batch_size: float) -> Bounded:
        """The expected largest eigenvalue of a batch Hessian."""
        return self.curvature.lambda_max_of(self._checked(batch_size))

    def lambda_min(self, batch_size: float) -> Bounded:
        """The expected smallest eigenvalue of a batch Hessian."""
        return self.curvature.lambda_min_of(self._checked(batch_size))

    def by_curvature(self, batch_size: float) -> float:
        """The mean-square limit on the curvature measured, without calibrating runs; below the sizes measured by the simple rule."""
        x, y = (np.log([point[j] for point in self.limits]) for j in (0, 1))
        at = math.log(self._checked(batch_size))
        # noise decides there, so that the limit falls on as the rule says; above, it rises no further than where it was measured
        return float(np.exp(np.interp(at, x, y) + self.exponent * min(at - x[0], 0.0)))

    def max_lr(self, batch_size: float) -> Bounded:
        """The largest stable learning rate at a batch size, with an interval.

        The mean-square condition makes 1 / rate linear in 1 / b (adaptive optimizers, whose small-batch rates go as sqrt(B): 1 / rate^2).
        That law's two constants, a level and the batch size c where it bends, are fitted to the rates at which short runs broke: the rate
        is the geometric mean over all c up to N, weighted by how well they fit. Real curves bend more sharply: beyond the largest batch
        size calibrated, the rate may stay as it is there or follow the law, which weigh alike. The interval takes in the spread of all.
        """
        theory = self.by_curvature(batch_size)
        if not self.anchors:
            return Bounded(theory, theory / _MODEL_SPREAD, theory * _MODEL_SPREAD)
        bends, levels, weights = self._laws
        # (bends,) log rate if the law goes on, and if the rate stays as it is at the largest anchor. Held there alone, heavy-ball rates
        # were too low at the full batch; the law alone bends less sharply than real curves do
        logs = levels - self.exponent * np.log1p(bends / self.curvature.effective(batch_size))
        held = levels - self.exponent * np.log1p(bends / self.curvature.effective(min(batch_size, self.anchors[-1].batch_size)))
        mean = float(weights @ (logs + held) / 2)
        own = _SCATTER**2 / len(self.anchors)  # of the level, whatever c
        spread = 1.96 * math.sqrt(float(weights @ ((logs - mean) ** 2 + (held - mean) ** 2) / 2) + own) + math.log(_HALF_STEP)
        return Bounded(math.exp(mean), math.exp(mean - spread), math.exp(mean + spread))

    @cached_property
    def _laws(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """(c, log r, weight) of the laws rate = r (1 + c / b)^-exponent: for each c the best r, weighted by the anchors' likelihood."""
        x = np.array([1 / self.curvature.effective(a.batch_size) for a in self.anchors])
        rates = np.log([a.rate for a in self.anchors])
        bends = np.geomspace(_FIRST_BEND, self.num_samples, 400)
        levels = rates + self.exponent * np.log1p(bends[:, None] * x)  # as each anchor has it
        misfit = levels.var(axis=1) * len(rates)
        weights = np.exp(-(misfit - misfit.min()) / (2 * _SCATTER**2))
        return bends, levels.mean(axis=1), weights / weights.sum()

    @property
    def exponent(self) -> float:
        """The power of B in the simple rule of this optimizer: 1 for SGD (linear), 1/2 for adaptive ones (square root)."""
        return 0.5 if self.rule.adaptive else 1.0

    @property
    def crossover(self) -> Bounded:
        """B*: where the simple rule, drawn through the smallest batch sizes, meets the plateau (the largest rate of all).

        The smallest two batch sizes give the rule's level.
        """
        grid = np.array(self.batch_sizes, dtype=float)
        rates = np.array([float(self.max_lr(b)) for b in grid])
        # two sizes for the level, since one point of the curve may be off by its interval
        level = float(np.exp(np.mean(np.log(rates[:2]) - self.exponent * np.log(grid[:2]))))
        value = float((rates.max() / level) ** (1 / self.exponent))
        spread = _MODEL_SPREAD ** (1 / self.exponent)
        return Bounded(value, value / spread, value * spread)

    def rule_holds_to(self, tolerance: float = 0.1) -> float:
        """The largest batch size up to which the simple rule, from the smallest one on, stays within a tolerance."""
        grid = np.geomspace(self.batch_sizes[0], self.batch_sizes[-1], 200)
        start, last = float(self.max_lr(grid[0])), float(grid[0])
        for b in grid[1:]:
            if abs(float(self.max_lr(b)) / (start * (b / grid[0]) ** self.exponent) - 1) > tolerance:
                break
            last = float(b)
        return last

    def _checked(self, batch_size: float) -> float:
        if not 1 <= batch_size <= self.num_samples:
            raise ValueError(f"batch_size must lie between 1 and the {self.num_samples} samples measured, got {batch_size}")
        return batch_size

    # -- showing it -------------------------------------------------------------------------------------------------------
    def rows(self) -> list[dict[str, float]]:
        """One row per batch size, plain numbers."""

        def ends(name: str, value: Bounded) -> dict[str, float]:
            return {name: float(value), f"{name}_lower": value.lower, f"{name}_upper": value.upper}

        return [
            {"batch_size": b, **ends("lambda_max", self.lambda_max(b)), "lambda_min": float(self.lambda_min(b))}
            | {**ends("max_lr", self.max_lr(b)), "by_curvature": self.by_curvature(b)}
            for b in self.batch_sizes
        ]

    def table(self) -> str:
        """The curve as text."""
        lines = [f"{'batch':>7}  {'lambda_max(H_B)':>24}  {'largest stable lr':>26}  {'by curvature alone':>18}"]
        lines += [f"{b:>7}  {self.lambda_max(b)!s:>24}  {self.max_lr(b)!s:>26}  {self.by_curvature(b):>18.3g}" for b in self.batch_sizes]
        return "\n".join(lines)

    def findings(self) -> list[str]:
        """What the curve says, in sentences."""
        name = "square-root scaling" if self.rule.adaptive else "linear scaling"
        first, last, cross = self.batch_sizes[0], self.batch_sizes[-1], self.crossover
        plateau = f"{float(self.max_lr(last)):.2g}"
        shape = f"{name} still holds at B = {last}, where the limit is {plateau}."
        if cross < last:
            reached = f"{name} reaches the plateau at B = {float(cross):.0f} ({cross.lower:.0f}-{cross.upper:.0f})"
            shape = f"{reached}; at B = {last} the limit is {plateau}."
        before, after = self.sharpness
        level = "No calibrating runs were made: rates are those at which training from the measured point is stable, not from scratch."
        if self.anchors:
            level = f"The level is calibrated by short training runs at B = {', '.join(str(a.batch_size) for a in self.anchors)}."
        picked = sorted({first, self.batch_sizes[len(self.batch_sizes) // 2], last})  # both ends and the middle say the shape
        return [
            f"{self.optimizer}: {shape} From B = {first}, it is off by more than 10 % beyond B = {self.rule_holds_to():.0f}.",
            "; ".join(f"at B = {b} stay below {self.max_lr(b)}" for b in picked) + ".",
            f"lambda_max is {before:.3g} at the start and {after:.3g} after the pilot. For batches: {self.curvature.choose()[1]}.",
            level,
        ]

    def __str__(self) -> str:
        return "\n".join(self.findings())

    def plot(self, ax: Axes | None = None) -> Axes:
        """The largest rate against B with its interval, the anchors, the limit by curvature and the simple rule."""
        from sharpkit.plots.spectrum import plot_learning_rate_curve

        return plot_learning_rate_curve(self.to_dict(), ax=ax)


def learning_rate_curve(
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    *,
    batch_sizes: Sequence[int] | None = None,
    pilot: int = 100,
    calibrate: bool | Sequence[int] = True,
    max_samples: int = _MAX_POOL,
    seed: int = 0,
    callback: ProgressCallback | None = None,
) -> LearningRateCurve:
    """The largest stable learning rate for every batch size.

    A pilot run on a private copy reaches settled curvature; there the spectrum, its mini-batch noise and lambda_max of drawn batches are
    measured, which gives the mean-square limit of the optimizer's kind at every batch size. Sharpness grows until it meets the limit of
    whatever rate is used, so that says how the limit depends on the batch size, but not the rate at which training from the present point
    breaks: both constants of the limit are fitted to short runs at a few batch sizes up to a sixteenth of the data, repeated with other
    orders of the data. A run counts as trained if it makes at least half of the best improvement over the untrained baseline, the lower of
    the initial loss and the best constant output's.

    Args:
        objective: at the point to train from, usually freshly initialised. Only read.
        optimizer: SGD (with momentum), Adam, AdamW, NAdam, RAdam, RMSprop, Adagrad or ASGD, over the objective's parameters; only read.
            Of its rates the groups' ratios count.
        batch_sizes: where to evaluate; by default powers of two from 4 to all samples.
        pilot: steps of the pilot and of each calibrating run.
        calibrate: whether to make calibrating runs, or the batch sizes to make them at (the cost grows with them).
        max_samples: use at most so many samples, drawn at random.
        seed: seeds the draws and the random probes.
        callback: called with a :class:`sharpkit.Progress` in full-data gradients before each stage.

    Raises:
        ValueError: batch sizes out of range, pilot shorter than 10 steps.
        ObjectiveError: the loss is no mean or sum over samples, or no run trains.
        UnsupportedError: an optimizer whose limit is not known, or whose divisor does not follow from the gradient's moments.

    References:
        Granziol, Zohren and Roberts (2022), arXiv 2006.09092; the mean-square condition: docs/mathematics.md.
    """
    started = time.perf_counter()
    check_objective(objective, "learning_rate_curve")
    optimizer = unwrap_optimizer(optimizer)
    check_trains(optimizer, objective.model)
    pilot, max_samples, seed = whole("pilot", pilot, least=_LEAST_PILOT), whole("max_samples", max_samples, least=2), as_seed(seed)
    check_callback(callback)
    rule = limit_rule(optimizer, objective.layout)
    check_settles(optimizer)
    pool = SamplePool(objective).limited(max_samples, seed=seed)
    sizes = _checked_sizes(batch_sizes, pool.size)
    at = _anchor_sizes(calibrate, sizes, pool.size)
    plans = [_Plan.at(size, pilot, last=size == at[-1]) for size in at]
    trainer = Trainer(pool, optimizer, seed)
    size = min(max(pool.size // _PILOT_SHARE, _PILOT_BATCH[0]), _PILOT_BATCH[1], pool.size)
    forecast = _MEASURING + (pilot * size + sum(plan.runs * plan.batch_size * plan.steps for plan in plans)) / pool.size

    def say(text: str) -> None:
        done, elapsed = trainer.ledger.samples / pool.size, time.perf_counter() - started
        expected = max(forecast, done)
        left = elapsed / done * (expected - done) if done else math.nan
        progress = Progress(round(done), round(expected), elapsed, left, text, unit="gradients")
        callback(progress) if callback is not None else logger.info("%s", progress)

    runs = sum(plan.runs for plan in plans) + 1
    say(f"learning-rate curve over {pool.size} samples: about {forecast:.0f} full-data gradients, in some {runs:.0f} short runs")
    settled, rate, (before, after) = trainer.settle(steps=pilot, batch_size=size, rule=rule)
    say(f"pilot done (loss {settled.losses[0]:.3g} -> {settled.losses[-1]:.3g}); measuring curvature and its noise")
    curvature, limits = limits_for(SamplePool(settled.objective), settled.optimizer, rule, sizes=sizes, seed=seed, ledger=trainer.ledger)
    anchors: list[Anchor] = []
    for plan in plans:
        say(f"calibrating at B = {plan.batch_size}")
        # begin at the last anchor's rate, which is a safe guess for the next larger size; first at the pilot's, scaled by sqrt(B)
        begin = anchors[-1].trained if anchors else rate * (plan.batch_size / size) ** 0.5
        anchors.append(plan.search(trainer, begin))
    readings = (
        curvature,
        limits,
        tuple(anchors),
        (before, after if rule.adaptive else curvature.lambda_max),
        learning_rate(optimizer, objective.layout),
        pool.size,
    )
    cost = (trainer.ledger.samples / pool.size, time.perf_counter() - started)
    return LearningRateCurve(sizes, type(optimizer).__name__, rule, *readings, *cost)


def _checked_sizes(batch_sizes: Sequence[int] | None, available: int) -> tuple[int, ...]:
    if batch_sizes is None:
        return (*(2**j for j in range(2, 31) if 2**j < available), available)
    sizes = tuple(sorted({*wholes("batch_sizes", batch_sizes)}))
    if len(sizes) < 2:
        raise ValueError(f"batch_sizes needs at least two different sizes of 1 or more, got {list(batch_sizes)}")
    if sizes[-1] > available:
        too_large = f"batch size {sizes[-1]} is larger than the objective's {available} samples"
        raise ValueError(f"{too_large}; give more data or smaller batch_sizes")
    return sizes


def _anchor_sizes(calibrate: bool | Sequence[int], sizes: tuple[int, ...], available: int) -> list[int]:
    if calibrate is False:
        return []
    if calibrate is not True:
        return sorted({int(b) for b in calibrate})
    cap = max(sizes[-1] // _ANCHOR_SHARE, sizes[0])
    wanted = [size for size in (sizes[0] * _ANCHOR_STRIDE**j for j in range(31)) if size <= cap and size < available]
    last = wanted[-1] if wanted else sizes[0]
    return [*wanted, min(max(available // _LAST_SHARE, 2 * last), available)]


@dataclass(frozen=True)
class _Plan:
    """A search for the rate that breaks training at one batch size, by runs of so many steps, repeated."""

    batch_size: int
    steps: int
    repeats: int

    @classmethod
    def at(cls, batch_size: int, pilot: int, *, last: bool) -> _Plan:
        # the last anchor is at a large batch, where a step costs most and shows what breaks soonest; small batches need more of them
        steps = pilot if last else round(pilot * min(max(math.sqrt(64 / batch_size), 1.0), _MAX_LENGTH))
        return cls(batch_size, steps, _REPEATS[last])

    @property
    def runs(self) -> float:
        """About so many."""
        return _RUNS + _MORE_RUNS * (self.repeats - 1)

    def search(self, trainer: Trainer, begin: float) -> Anchor:
        trained, broke = trainer.largest_stable_rate(begin, batch_size=self.batch_size, steps=self.steps, repeats=self.repeats)
        return Anchor(self.batch_size, trained, broke, self.repeats)
