"""The largest stable learning rate as a function of the batch size: measured curvature, theory, and short calibrating runs."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from sharpkit._arguments import as_seed, check_callback, real, whole, wholes
from sharpkit._calls import public_call
from sharpkit._checkpoint import clock, resumable
from sharpkit._errors import ObjectiveError, SharpkitWarning
from sharpkit._results import Bounded, Progress, ProgressCallback, Result
from sharpkit.batch_size.calibration import plans_for
from sharpkit.batch_size.curvature import BatchCurvature
from sharpkit.batch_size.law import RateLaw, search_errors
from sharpkit.batch_size.limits import limits_for
from sharpkit.batch_size.pilot import Anchor, Ledger, Settled, TimeIsUp, Trainer
from sharpkit.objective.objective import Objective, check_objective, objective_call
from sharpkit.objective.samples import SamplePool
from sharpkit.optimizers import UpdateRule, check_settles, check_trains, learning_rate, limit_rule, unwrap_optimizer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

logger = logging.getLogger(__name__)

_MODEL_SPREAD = 1.5  # by judgement: what a rate read off curvature alone may be off by where curvature does not move in training
_FORETOLD = 0.15  # of a log rate, by judgement: where the law says the largest batch adds less than that, no search is made there
_MISSED = 0.1  # root mean square of log rates, by judgement, from which on it is said that the searches miss the law

# -- what is measured and trained
_MAX_POOL = 4096  # samples, by judgement: it bounds what a full-data gradient costs
# Batch size of the pilot: an eighth of the data, within these bounds, by judgement; half of what it was before, to make curves cheaper.
_PILOT_BATCH, _PILOT_SHARE = (16, 128), 8
_LEAST_STEPS = 10  # of a pilot or a run, by judgement: fewer show neither a settled sharpness nor what breaks
_STEPS = 100  # of a run where there is no pilot
_MEASURING = 100  # full-data gradients for curvature and its noise, about, in experiments/batch_curve.py: for the forecast


# What a document holds first.
_READINGS = ("optimizer", "condition=rule.condition", "matrix", "point", "exponent", "rows", "crossover", "rule_holds_to", "curvature")
_SAVED = ("anchors", "one_start", "misfit", "sharpness_at_start", "sharpness_after_pilot", "pilot_steps", "lr", "num_samples")


@dataclass(frozen=True)
class LearningRateCurve(Result, kind="learning_rate_curve", saved=(*_READINGS, *_SAVED, "gradients", "seconds", "converged", "findings")):
    """The largest stable learning rate and the batch curvature against the batch size.

    Attributes:
        batch_sizes: those asked for, ascending.
        optimizer: name of its class.
        rule: by which curvature bounds its rate.
        curvature: full-data curvature and its noise at :attr:`point`; preconditioned for an adaptive optimizer, at the smallest batch size.
        limits: (batch size, rate) by the mean-square condition on the curvature measured, on a fine grid; empty where batch statistics tie
            samples together.
        anchors: short runs from the present parameters that fix the level; empty without.
        sharpness: lambda_max at the starting point and after the pilot, of H for an adaptive optimizer, else of the matrix of its limit.
        lr: the optimizer's present rate.
        num_samples: N.
        gradients, seconds: cost in full-data gradients (products count two), and wall time.
        pilot_steps: steps between the present parameters and the point where curvature was measured.
        one_start: why repeated searches began at the present parameters and not at other initialisations too; empty if they did not.
        converged: whether all searches ended before ``max_seconds``.
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
    pilot_steps: int = 0
    one_start: str = ""
    converged: bool = True

    @property
    def sharpness_at_start(self) -> float:
        """lambda_max at the starting point."""
        return self.sharpness[0]

    @property
    def sharpness_after_pilot(self) -> float:
        """lambda_max after the pilot; that of the starting point without one."""
        return self.sharpness[1]

    @property
    def point(self) -> str:
        """Where the curvature was measured, in words."""
        return f"after a pilot of {self.pilot_steps} steps" if self.pilot_steps else "at the present parameters"

    @property
    def matrix(self) -> str:
        """Name of the matrix whose lambda_max :meth:`lambda_max` is, of a batch."""
        return self.rule.operator.replace("H", "H_B")

    # -- reading it -------------------------------------------------------------------------------------------------------
    def lambda_max(self, batch_size: float) -> Bounded:
        """The expected largest eigenvalue of a batch Hessian."""
        return self.curvature.lambda_max_of(self._checked(batch_size))

    def lambda_min(self, batch_size: float) -> Bounded:
        """The expected smallest eigenvalue of a batch Hessian."""
        return self.curvature.lambda_min_of(self._checked(batch_size))

    def by_curvature(self, batch_size: float) -> float:
        """The mean-square limit on the curvature measured, without calibrating runs; below the sizes measured by the simple rule.

        NaN where batch statistics tie samples together, for which no such limit is known.
        """
        at = math.log(self._checked(batch_size))
        if not self.limits:
            return math.nan
        x, y = (np.log([point[j] for point in self.limits]) for j in (0, 1))
        # noise decides there, so that the limit falls on as the rule says; above, it rises no further than where it was measured
        return float(np.exp(np.interp(at, x, y) + self.exponent * min(at - x[0], 0.0)))

    def max_lr(self, batch_size: float) -> Bounded:
        """The largest stable learning rate at a batch size, with an interval.

        The mean-square condition makes 1 / rate linear in 1 / b (adaptive optimizers, whose small-batch rates go as sqrt(B): 1 / rate^2):
        rate = r (1 + c / b)^-p with p = 1 (1/2). The level r, the batch size c where it bends and the power p, near that one, are fitted to
        the rates at which short runs broke: the rate is the geometric mean over all c up to N and p, weighted by how well they fit. What
        the runs miss of that by more than their scatter is added, interpolated between them, and widens the interval.

        Warns:
            SharpkitWarning: outside of the batch sizes asked for, where the curve is extrapolated.
        """
        first, last = self.batch_sizes[0], self.batch_sizes[-1]
        if not first <= self._checked(batch_size) <= last:
            text = f"B = {batch_size:g} lies outside of the batch sizes measured, {first} to {last}: the curve is extrapolated there"
            warnings.warn(f"{text}; measure it with batch_sizes= that reach so far", SharpkitWarning, stacklevel=2)
        theory = self.by_curvature(batch_size)
        if self._law is None:
            return Bounded(theory, theory / _MODEL_SPREAD, theory * _MODEL_SPREAD)
        mean, deviation = self._law.at(batch_size, 1 / self.curvature.effective(batch_size))
        return Bounded(math.exp(mean), math.exp(mean - 1.96 * deviation), math.exp(mean + 1.96 * deviation))

    @cached_property
    def _law(self) -> RateLaw | None:
        return _law_of(self.anchors, power=self.exponent, num_samples=self.num_samples) if self.anchors else None

    @property
    def misfit(self) -> float:
        """Root mean square of the log rates that the law misses of the searches, beyond their scatter; 0 without searches."""
        return self._law.misfit if self._law is not None else 0.0

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
        name = f"lambda_max({self.matrix})"
        lines = [f"{'batch':>7}  {name:>24}  {'largest stable lr':>26}  {'by curvature alone':>18}"]
        lines += [f"{b:>7}  {self.lambda_max(b)!s:>24}  {self.max_lr(b)!s:>26}  {self.by_curvature(b):>18.3g}" for b in self.batch_sizes]
        start = "from the present parameters on" if self.one_start else "from the present parameters and other initialisations on"
        ground = f"by short runs {start}" if self.anchors else f"by curvature {self.point}"
        return "\n".join([*lines, f"lambda_max and the rate by curvature alone: {self.point}; largest stable lr: {ground}."])

    def findings(self) -> list[str]:
        """What the curve says, in sentences."""
        name = "square-root scaling" if self.rule.adaptive else "linear scaling"
        first, last, cross = self.batch_sizes[0], self.batch_sizes[-1], self.crossover
        plateau = f"{float(self.max_lr(last)):.2g}"
        shape = f"{name} still holds at B = {last}, where the limit is {plateau}."
        if cross < last:
            reached = f"{name} reaches the plateau at B = {float(cross):.0f} ({cross.lower:.0f}-{cross.upper:.0f})"
            shape = f"{reached}; at B = {last} the limit is {plateau}."
        picked = sorted({first, self.batch_sizes[len(self.batch_sizes) // 2], last})  # both ends and the middle say the shape
        return [
            f"{self.optimizer}: {shape} From B = {first}, it is off by more than 10 % beyond B = {self.rule_holds_to():.0f}.",
            "; ".join(f"at B = {b} stay below {self.max_lr(b)}" for b in picked) + ".",
            self._said_of_curvature(),
            *self._said_of_runs(),
        ]

    def _said_of_curvature(self) -> str:
        before, after = self.sharpness
        where = f"lambda_max is {before:.3g} at the present parameters"
        where += f" and {after:.3g} after the pilot of {self.pilot_steps} steps" if self.pilot_steps else ""
        said = f"{where}. For batches ({self.matrix}, {self.point}): {self.curvature.choose()[1]}."
        if not self.limits:
            said += " Batch statistics tie the samples of a batch together: the rates come from runs alone, in train mode."
        return said

    def _said_of_runs(self) -> list[str]:
        ended = [] if self.converged else ["max_seconds ended the calibrating runs early: fewer searches than planned fix the rates."]
        if not self.anchors:
            where = f"rates are those at which training from the point measured ({self.point}) is stable, not from scratch"
            return [f"No calibrating runs were made: {where}.", *ended]
        sizes = ", ".join(str(a.batch_size) for a in self.anchors)
        said = [f"The level is calibrated by short training runs from the present parameters at B = {sizes}."]
        if any(a.repeats > 1 for a in self.anchors):
            other = f"with other orders of the data alone, since {self.one_start}" if self.one_start else ""
            said += [f"Searches were repeated {other or 'from other initialisations as well, whose scatter is in the interval'}."]
        if kept := [str(a.batch_size) for a in self.anchors if a.keeps]:
            rule = "a rate counts as stable if a run loses nothing: it stays finite and ends no more than a tenth above where it began"
            said += [f"Little is left to improve from this trained point at B = {', '.join(kept)}: there {rule}."]
        if self.misfit > _MISSED:
            factor = f"{math.exp(self.misfit):.2g}"
            said += [f"The searches miss the law by a factor of {factor} beyond their scatter: the curve follows them and is wider."]
        return said + ended

    def __str__(self) -> str:
        return "\n".join(self.findings())

    def plot(self, ax: Axes | None = None) -> Axes:
        """The largest rate against B with its interval, the anchors, the limit by curvature and the simple rule."""
        from sharpkit.plots.spectrum import plot_learning_rate_curve

        return plot_learning_rate_curve(self.to_dict(), ax=ax)


@public_call
@resumable(objective_call)
def learning_rate_curve(
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    *,
    batch_sizes: Sequence[int] | None = None,
    pilot: int = 100,
    steps: int | None = None,
    calibrate: bool | Sequence[int] = True,
    max_samples: int = _MAX_POOL,
    max_seconds: float | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    seed: int = 0,
    callback: ProgressCallback | None = None,
    name: str = "",
) -> LearningRateCurve:
    """The largest stable learning rate for every batch size.

    A pilot run on a private copy reaches settled curvature; there the spectrum, its mini-batch noise and lambda_max of drawn batches are
    measured, which gives the mean-square limit of the optimizer's kind at every batch size. Sharpness grows until it meets the limit of
    whatever rate is used, so that says how the limit depends on the batch size, but not the rate at which training from the present point
    breaks: the constants of the limit are fitted to short runs at a few batch sizes, repeated with other orders of the data, and from
    other initialisations where the present point is one that the modules' ``reset_parameters`` draw. A run counts as trained if it makes at
    least half of the best improvement over the untrained baseline, the lower of the initial loss and the best constant output's. From a
    trained point where no run halves the loss, it is one that loses nothing: it ends no more than a tenth above where it began.

    Batch norm in train mode (``Objective(..., mode="train")``) ties samples together, so no limit by curvature is known: the curve is that
    of runs alone, and lambda_max that of drawn batches in train mode.

    Args:
        objective: at the point to train from, freshly initialised or trained. Only read.
        optimizer: SGD (with momentum), Adam, AdamW, NAdam, RAdam, RMSprop, Adagrad or ASGD, over the objective's parameters; only read.
            Of its rates the groups' ratios count. Runs start with an empty state.
        batch_sizes: where to evaluate; by default powers of two from 4 to all samples.
        pilot: steps of the pilot; 0 measures curvature at the present parameters. A pilot that diverges begins anew at a lower rate.
        steps: of each calibrating run; by default as many as the pilot's, without one 100.
        calibrate: whether to make calibrating runs, or the batch sizes to make them at (the cost grows with them).
        max_samples: use at most so many samples, drawn at random.
        max_seconds: ends the pilot and the calibrating runs early; measuring curvature is not cut short. The result says so
            (``converged=False``).
        checkpoint: a folder from which the call goes on if it is killed and made again (docs/guide.md): after the last training run that
            ended, and after the last product of the curvature's.
        seed: seeds the draws and the random probes.
        callback: called with a :class:`sharpkit.Progress` in full-data gradients before each stage and after each run.
        name: of the result, which pages and comparisons show.

    Raises:
        ValueError: batch sizes out of range, pilot or runs shorter than 10 steps.
        ObjectiveError: the loss is no mean or sum over samples, or no run trains; batch norm in train mode without calibrating runs.
        UnsupportedError: an optimizer whose limit is not known, or whose divisor does not follow from the gradient's moments.
        DocumentError: the checkpoint is of another call, or of other parameters or data.

    Example:
        >>> import torch, sharpkit as sk
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
        >>> x = torch.randn(256, 4, dtype=torch.float64)
        >>> objective = sk.Objective(model, (x, x[:, :1]), loss=torch.nn.functional.mse_loss)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> curve = sk.learning_rate_curve(objective, optimizer, batch_sizes=[4, 16, 64], pilot=0, calibrate=False)  # curvature alone
        >>> bool(curve.max_lr(4) < curve.max_lr(16) < curve.max_lr(64))
        True

    References:
        Granziol, Zohren and Roberts (2022), arXiv 2006.09092; the mean-square condition: docs/mathematics.md.
    """
    started = clock()
    check_objective(objective, "learning_rate_curve")
    optimizer = unwrap_optimizer(optimizer)
    check_trains(optimizer, objective.model)
    pilot, max_samples, seed = _checked_steps("pilot", pilot, zero=True), whole("max_samples", max_samples, least=2), as_seed(seed)
    steps = (pilot or _STEPS) if steps is None else _checked_steps("steps", steps)
    budget = math.inf if max_seconds is None else real("max_seconds", max_seconds, above=0, infinite=True)
    check_callback(callback)
    rule = limit_rule(optimizer, objective.layout)
    check_settles(optimizer)
    pool = SamplePool(objective, coupled=True).limited(max_samples, seed=seed)
    sizes = _checked_sizes(batch_sizes, pool.size)
    if objective.couples_samples and sizes[0] < 2:
        raise ValueError("batch norm in train mode has no statistics of a batch of 1: give batch_sizes of 2 or more")
    plans, largest = plans_for(calibrate, sizes, pool.size, steps=steps)
    if not plans and objective.couples_samples:
        remedy = "leave calibrate=True, or make the Objective with mode='eval'"
        raise ObjectiveError(f"with batch norm in train mode rates come from runs alone: {remedy}")
    size = min(max(pool.size // _PILOT_SHARE, _PILOT_BATCH[0]), _PILOT_BATCH[1], pool.size)
    searches = [*plans, *([largest] if largest is not None else [])]
    forecast = _MEASURING + (pilot * size + sum(plan.samples for plan in searches)) / pool.size
    stage = f"learning-rate curve over {pool.size} samples: about {forecast:.0f} full-data gradients, in some "
    stage += f"{sum(plan.runs for plan in searches) + bool(pilot):.0f} short runs"

    ledger, available = Ledger(deadline=started + budget), pool.size  # all that is told: a trainer in it would be a cycle

    def say() -> None:
        done, elapsed = ledger.samples / available, clock() - started
        expected = max(forecast, done)
        left = elapsed / done * (expected - done) if done else math.nan
        progress = Progress(round(done), round(expected), elapsed, left, stage, unit="gradients")
        logger.info("%s", progress)
        if callback is not None:
            callback(progress)

    trainer = Trainer(pool, optimizer, seed, ledger, say)
    say()
    settled = trainer.settle(steps=pilot, batch_size=size, rule=rule)
    stage = f"{_pilot_in_words(settled)}; measuring curvature and its noise"
    say()
    there = SamplePool(settled.run.objective, coupled=True)

    def measured() -> tuple[BatchCurvature, tuple[tuple[float, float], ...]]:
        return limits_for(there, settled.run.optimizer, rule, sizes=sizes, seed=seed, ledger=ledger)

    curvature, limits = ledger.step("curvature and its noise", measured, whole=False)
    anchors, converged = list[Anchor](), pilot in (0, settled.steps) or settled.attempts > 0
    exponent = 0.5 if rule.adaptive else 1.0
    try:
        for plan in searches:
            if plan is largest and _is_foretold(anchors, plan.batch_size, power=exponent, num_samples=pool.size):
                continue
            stage = f"calibrating at B = {plan.batch_size}"
            say()
            # begin at the last anchor's rate, which is a safe guess for the next larger size; first at the pilot's, scaled by sqrt(B)
            begin = anchors[-1].trained if anchors else settled.rate * (plan.batch_size / size) ** 0.5
            anchors.append(plan.search(trainer, begin))
            converged = converged and anchors[-1].repeats == plan.repeats
    except TimeIsUp:
        converged = False
    if not anchors and not limits:
        raise ObjectiveError("max_seconds ended before the first search, and with batch norm in train mode rates come from runs: raise it")
    readings = (
        curvature,
        limits,
        tuple(anchors),
        _sharpness(settled, rule, curvature.lambda_max),
        learning_rate(optimizer, objective.layout),
        pool.size,
    )
    cost = (trainer.ledger.samples / pool.size, clock() - started)
    one_start = trainer.one_start if anchors else ""
    return LearningRateCurve(sizes, type(optimizer).__name__, rule, *readings, *cost, settled.steps, one_start, converged)


def _sharpness(settled: Settled, rule: UpdateRule, measured: float) -> tuple[float, float]:
    """lambda_max at the present parameters and after the pilot; of an adaptive optimizer the matrix measured anyway is not H."""
    if rule.adaptive:
        return settled.before, settled.after
    return (settled.before, measured) if settled.steps else (measured, measured)


def _pilot_in_words(settled: Settled) -> str:
    losses = settled.run.losses
    if not losses:
        return "no pilot held: the point is the present one" if settled.attempts else "no pilot"
    again = f", after {settled.attempts} that went astray at higher rates" if settled.attempts else ""
    return f"pilot done (loss {losses[0]:.3g} -> {losses[-1]:.3g}{again})"


def _law_of(anchors: Sequence[Anchor], *, power: float, num_samples: int) -> RateLaw:
    sizes = np.array([a.batch_size for a in anchors], dtype=float)
    scatters, repeats = (np.array([getattr(a, name) for a in anchors], dtype=float) for name in ("scatter", "repeats"))
    errors = search_errors(scatters, repeats, keeping=any(a.keeps for a in anchors))
    inverse, rates = 1 / sizes - 1 / num_samples, np.log([a.rate for a in anchors])
    return RateLaw.fit(sizes, inverse, rates, errors, power=power, num_samples=num_samples)


def _is_foretold(anchors: Sequence[Anchor], batch_size: int, *, power: float, num_samples: int) -> bool:
    """Whether the law through the anchors says that the rate at a larger batch size is that of the last."""
    law, last = _law_of(anchors, power=power, num_samples=num_samples), anchors[-1].batch_size
    (here, _), (there, _) = (law.at(b, 1 / b - 1 / num_samples) for b in (last, batch_size))
    return abs(there - here) < _FORETOLD


def _checked_steps(name: str, value: int, *, zero: bool = False) -> int:
    steps = whole(name, value, least=0)
    if steps < _LEAST_STEPS and not (zero and steps == 0):
        raise ValueError(f"{name} must be {'0 or ' if zero else ''}at least {_LEAST_STEPS} steps, got {steps}: fewer show nothing")
    return steps


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
