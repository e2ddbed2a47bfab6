"""The critical batch size by branching: train on at several batch sizes over the same samples, and see which end alike."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from sharpkit._arguments import as_seed, check_callback, choice, real, whole, wholes
from sharpkit._calls import public_call
from sharpkit._checkpoint import Subject, clock, resumable
from sharpkit._errors import NonFiniteError, ObjectiveError
from sharpkit._results import Bounded, Progress, ProgressCallback, Result, format_with_error, student_factor
from sharpkit.batch_size.pilot import Ledger, PilotRun, Trainer
from sharpkit.batch_size.scaling import scale_learning_rate
from sharpkit.fits import bootstrap_interval
from sharpkit.linalg.results import Estimate
from sharpkit.objective.batches import Batch, BatchSource, fingerprint
from sharpkit.objective.objective import Objective, check_objective, objective_call
from sharpkit.objective.samples import SamplePool
from sharpkit.optimizers import check_trains, is_adaptive, learning_rate, unwrap_optimizer
from sharpkit.training_run import as_seeds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RULES = ("linear", "sqrt")  # of :func:`sharpkit.scale_learning_rate`
_TOLERANCE = 0.01  # of the loss, as in arXiv 2505.23971
_LEAST_STEPS = 8  # of a run at a default batch size, by judgement: fewer say how a run begins, not where it leads


@dataclass(frozen=True)
class BatchBranching(Result, kind="batch_branching"):
    """Losses after training on over the same samples at several batch sizes, and the critical batch size that follows.

    Attributes:
        critical: the batch size at which the loss leaves the tolerance, between two tried by a straight line in log B, with a 95 % interval
            by resampling the seeds, widened for their small number. Where no size tried was too large, it is the largest of them and the
            interval has no upper end.
        largest: the largest size tried that ends within the tolerance of the best, as all between it and the best do.
        batch_sizes: (k,) those tried, ascending.
        rates: (k,) rate at each.
        losses: (k, seeds) loss at the end; infinite where a run diverged.
        initial: loss where the runs branch off.
        tolerance: in units of the loss.
        rule: how the rate follows the batch size.
        batch_size, lr: the rate at one size, which the rule starts from.
        samples: that each run saw.
        seen: samples that training had seen before.
        seeds: of the orders of the data.
        cost: gradients of single samples in all; a forward pass counts a third.
        seconds: wall time.
    """

    critical: Bounded
    largest: int
    batch_sizes: tuple[int, ...]
    rates: tuple[float, ...]
    losses: tuple[tuple[float, ...], ...]
    initial: float
    tolerance: float
    rule: str
    batch_size: int
    lr: float
    samples: int
    seen: int
    seeds: tuple[int, ...]
    cost: float
    seconds: float

    @property
    def means(self) -> tuple[float, ...]:
        """(k,) loss of each size, averaged over seeds; infinite if any run diverged."""
        return tuple(float(np.mean(row)) for row in self.losses)

    @property
    def excess(self) -> tuple[Estimate, ...]:
        """(k,) loss above that of the best size, taken seed by seed, with standard errors: what a seed adds to all sizes cancels."""
        best = np.array(self.losses[int(np.argmin(self.means))])
        out = []
        for row in self.losses:
            above, finite = np.array(row) - best, bool(np.isfinite(row).all())
            error = float(above.std(ddof=1)) / math.sqrt(len(row)) if finite and len(row) > 1 else math.inf
            out.append(Estimate(float(above.mean()), error, len(row)))
        return tuple(out)

    @property
    def is_bound(self) -> bool:
        """Whether no size tried was too large, so that the critical one is known from below alone."""
        return self.largest == self.batch_sizes[-1]

    def disagreement(self, noise_scale: Estimate) -> Bounded:
        """A noise scale over the critical batch size, with a 95 % interval from those of both, their logarithms' errors added in squares.

        Args:
            noise_scale: ``sk.gradient_noise_scale(objective).noise_scale``, or its ``curvature_noise_scale``.

        Example:
            >>> import sharpkit as sk
            >>> rows = ((1.0, 1.0), (1.0, 1.0), (1.1, 1.1))
            >>> told = (2.0, 0.01, "sqrt", 2, 0.1, 64, 0, (0, 1), 1.0, 1.0)
            >>> four = BatchBranching(sk.Bounded(4.0, 4.0, 4.0), 4, (2, 4, 8), (0.1, 0.14, 0.2), rows, *told)
            >>> print(four.disagreement(sk.Estimate(40.0, 2.0)))
            10 (9.07-11)
        """
        if not (noise_scale.value > 0 and math.isfinite(noise_scale.value)):
            return Bounded(math.nan, 0.0, math.inf)
        ratio, relative = noise_scale.value / self.critical.value, 1.96 * noise_scale.stderr / noise_scale.value
        below = math.log(self.critical.upper / self.critical.value)  # a larger critical size is a smaller ratio
        above = math.log(self.critical.value / self.critical.lower) if self.critical.lower > 0 else math.inf
        return Bounded(ratio, ratio * math.exp(-math.hypot(below, relative)), ratio * math.exp(math.hypot(above, relative)))

    def findings(self) -> list[str]:
        """What came out, in sentences."""
        means, above = self.means, self.excess
        best = int(np.argmin(means))
        lowest, scale = format_with_error(means[best], 0), "k" if self.rule == "linear" else "sqrt(k)"
        said = [
            f"Over the next {self.samples} samples, batches of up to {self.largest} end within {self.tolerance:g} of the best loss "
            f"({lowest}, at B = {self.batch_sizes[best]}), with the rate x {scale}: the critical batch size is {self.critical}."
        ]
        if self.is_bound:
            said = [
                f"Over the next {self.samples} samples, every batch size from {self.batch_sizes[best]} to {self.largest} ends within "
                f"{self.tolerance:g} of the best loss ({lowest}), with the rate x {scale}: the critical batch size is at least "
                f"{self.largest}. Try larger ones."
            ]
        if poor := [size for size, e in zip(self.batch_sizes[:best], above, strict=False) if e.value > self.tolerance]:
            said.append(
                f"B = {', '.join(map(str, poor))} {'ends' if len(poor) == 1 else 'end'} above the best by more than the tolerance: the "
                f"rate of {self.lr:.3g} at B = {self.batch_size} is not the best there, and the critical size is that of these rates."
            )
        near = [e.stderr for size, e in zip(self.batch_sizes, above, strict=True) if size <= 2 * self.largest and math.isfinite(e.stderr)]
        if near and max(near) > self.tolerance:
            said.append(
                f"Losses above the best are known to a standard error of {max(near):.2g}, more than the tolerance: give more seeds, or a "
                "larger tolerance."
            )
        if not means[best] < self.initial:
            said.append(f"No size lowered the loss of {self.initial:.4g}: at these rates, training has nothing to gain here.")
        said.append(f"This took {self.cost:.3g} gradients of single samples.")
        return said

    def __str__(self) -> str:
        rows = [["batch size", "rate", "steps", "loss", "above the best"]]
        for size, rate, mean, above in zip(self.batch_sizes, self.rates, self.means, self.excess, strict=True):
            over = format_with_error(above.value, above.stderr) if above.value else "0"
            rows.append([str(size), f"{rate:.3g}", str(self.samples // size), f"{mean:.4g}", over])
        widths = [max(len(row[j]) for row in rows) for j in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, "", *(f"* {finding}" for finding in self.findings())])

    def plot(self, ax: Axes | None = None) -> Axes:
        """Losses above the best against the batch size, the tolerance and the critical size with its interval."""
        from sharpkit.plots.branching import plot_batch_branching

        return plot_batch_branching(self, ax=ax)


def _branching_call(call: str, objective: Any, arguments: Mapping[str, Any]) -> tuple[Objective, Subject]:
    known, subject = objective_call(call, objective, arguments)
    held = _held_out(known, arguments.get("validation"))
    sums = hashlib.sha256("".join(map(fingerprint, held)).encode()).hexdigest()[:16]
    return known, subject._replace(texts={**subject.texts, "validation": sums})


@public_call
@resumable(_branching_call)
def branch_batch_sizes(
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    *,
    batch_size: int,
    samples: int,
    lr: float | None = None,
    batch_sizes: Sequence[int] | None = None,
    rule: str | None = None,
    validation: Any = None,
    tolerance: float = _TOLERANCE,
    seen: int = 0,
    seeds: int | Sequence[int] = 3,
    checkpoint: str | None = None,
    seed: int = 0,
    callback: ProgressCallback | None = None,
    name: str = "",
) -> BatchBranching:
    """The critical batch size from here on: the largest at which training on over the same samples ends as low as at smaller ones.

    From the present parameters and the optimizer's present state, private copies train on over ``samples`` samples at each batch size and
    seed; the rate follows the batch size by the rule. A seed is an order of the data: runs of one seed see the same samples in the same
    order where batch sizes divide the number of samples in the data. The critical size is where the loss exceeds that of the best size by
    ``tolerance``. It belongs to this point, these rates and this number of samples.

    Args:
        objective: at the checkpoint, over the training samples; runs and judgements are in its mode, so give it ``mode="train"`` where
            dropout or batch norm should act as they do in training. Only read.
        optimizer: with its state from the checkpoint; only read.
        batch_size: the one that ``lr`` belongs to.
        samples: that each run sees; a multiple of every batch size.
        lr: rate at ``batch_size``, of the first group that trains; by default the optimizer's own.
        batch_sizes: those to try; by default ``batch_size`` and its doublings that leave 8 steps.
        rule: ``"linear"`` or ``"sqrt"``; by default sqrt for adaptive optimizers and linear for others.
        validation: held-out data to judge on, as an Objective takes it; by default the objective's own.
        tolerance: how far above the best a loss may lie, in units of the loss.
        seen: samples that training has seen up to here; only written down, for :func:`sharpkit.batch_size_warmup`.
        seeds: number of orders of the data, or their seeds; at least two.
        checkpoint: a folder from which the call goes on if it is killed and made again, after the last run that ended.
        seed: seeds the resampling behind the interval, and dropout masks.
        callback: called with a :class:`sharpkit.Progress` after each run.
        name: of the result, which pages and comparisons show.

    Returns:
        the critical size with its interval, and all losses. Costs samples x sizes x seeds gradients of single samples.

    Raises:
        ValueError: fewer than two sizes or seeds, sizes larger than the data, or samples that are no multiple of a size.
        ObjectiveError: the loss is no mean or sum over samples, or every size diverged.
        UnsupportedError: no rule is known for the optimizer and none was given.

    Example:
        >>> import torch, sharpkit as sk
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> data = (torch.ones(64, 1), torch.zeros(64, 1))
        >>> objective = sk.Objective(model, data, loss=torch.nn.functional.mse_loss)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        >>> branching = sk.branch_batch_sizes(objective, optimizer, batch_size=4, samples=128, batch_sizes=[4, 8, 16, 32, 64])
        >>> branching.largest, [f"{loss:.1e}" for loss in branching.means]  # w = (1 - 2 lr)^steps, and the loss is w^2
        (32, ['1.2e-03', '7.9e-04', '2.8e-04', '2.6e-06', '1.3e-01'])

    References:
        Merrill, Arora, Groeneveld and Hajishirzi (2025), arXiv 2505.23971; McCandlish et al. (2018), arXiv 1812.06162, for what it is
        compared with.
    """
    started = clock()
    check_objective(objective, "branch_batch_sizes")
    optimizer = unwrap_optimizer(optimizer)
    check_trains(optimizer, objective.model)
    check_callback(callback)
    seed, orders, seen = as_seed(seed), as_seeds(seeds), whole("seen", seen, least=0)
    if len(orders) < 2:
        raise ValueError(f"seeds must be at least two, from whose scatter the interval comes, got {seeds!r}")
    batch_size, samples = whole("batch_size", batch_size), whole("samples", samples)
    lr = real("lr", learning_rate(optimizer, objective.layout) if lr is None else lr, above=0)
    rule = ("sqrt" if is_adaptive(optimizer) else "linear") if rule is None else choice("rule", rule, RULES)
    tolerance = real("tolerance", tolerance, above=0)
    pool, held = SamplePool(objective, coupled=True), _held_out(objective, validation)
    sizes = _checked_sizes(batch_sizes, batch_size, samples, pool.size)
    ledger = Ledger()
    trainer = Trainer(pool, optimizer, seed, ledger)
    rates = tuple(float(scale_learning_rate(lr, batch_size, size, rule=rule)) for size in sizes)
    initial = ledger.step("loss before", lambda: _judged(trainer.start(sizes[0], keep_state=True), held, ledger))
    rows = []
    for done, (size, rate) in enumerate(zip(sizes, rates, strict=True)):
        row = []
        for number, order in enumerate(orders):

            def train(size: int = size, rate: float = rate, order: int = order) -> float:
                run = trainer.start(size, order=order, keep_state=True)
                run.follow(rate for _ in range(samples // size))
                return math.inf if run.diverged else _judged(run, held, ledger)

            row.append(ledger.step(f"{samples} samples at B = {size}, order {order}", train))
            if callback is not None:
                count, total, elapsed = done * len(orders) + number + 1, len(sizes) * len(orders), clock() - started
                text = f"B = {size}: loss {row[-1]:.4g}"
                callback(Progress(count, total, elapsed, elapsed * (total / count - 1), text, unit="runs"))
        rows.append(tuple(row))
    losses = np.array(rows)
    if not np.isfinite(losses.mean(axis=1)).any():
        raise ObjectiveError(f"runs diverged at every batch size from {sizes[0]} to {sizes[-1]}: give a rate lower than lr={lr:.3g}")
    critical, largest = _critical(losses, sizes, tolerance, seed=seed)
    told = (initial, tolerance, rule, batch_size, lr, samples, seen, orders)
    return BatchBranching(critical, largest, sizes, rates, tuple(rows), *told, ledger.samples, clock() - started)


def _checked_sizes(batch_sizes: Sequence[int] | None, batch_size: int, samples: int, available: int) -> tuple[int, ...]:
    if batch_sizes is None:
        powers = (batch_size * 2**j for j in range(31))
        sizes = tuple(size for size in powers if size <= min(available, samples // _LEAST_STEPS) and samples % size == 0)
    else:
        sizes = tuple(sorted({*wholes("batch_sizes", batch_sizes)}))
    if len(sizes) < 2:
        given = f"got {list(sizes)}" if batch_sizes is not None else f"and samples={samples} leave {list(sizes)}: give more samples"
        raise ValueError(f"branching needs at least two different batch sizes, {given}")
    if sizes[-1] > available:
        raise ValueError(
            f"batch size {sizes[-1]} is larger than the objective's {available} samples: give more data or smaller batch_sizes"
        )
    if odd := [size for size in sizes if samples % size]:
        common = math.lcm(*sizes)
        raise ValueError(
            f"samples={samples} is no multiple of B = {odd[0]}, so runs would see different numbers of samples: choose a multiple of "
            f"{common}"
        )
    return sizes


def _held_out(objective: Objective, validation: Any) -> list[Batch]:
    """Batches to judge on; none where the objective's own do."""
    return [] if validation is None else list(BatchSource(validation, pair=objective.loss is not None))


def _judged(run: PilotRun, held: list[Batch], ledger: Ledger) -> float:
    """Loss at the end of a run; infinite where it is not finite."""
    judge = run.objective.with_data(held) if held else run.objective
    ledger.spend(judge.num_samples / 3)  # a forward pass is a third of a gradient
    if callable(turn := getattr(run.optimizer, "eval", None)):
        turn()  # schedule-free optimizers train at one point and end at another
    try:
        return judge.value()
    except NonFiniteError:
        return math.inf


def _critical(losses: NDArray[np.float64], sizes: Sequence[int], tolerance: float, *, seed: int) -> tuple[Bounded, int]:
    """The critical size with its interval, and the largest tried that is within the tolerance."""
    logs = np.log(np.array(sizes, dtype=float))

    def crossing(drawn: NDArray[np.int64]) -> float:
        means = losses[:, drawn].mean(axis=1)
        index = _last_within(means, tolerance)
        if index == len(sizes) - 1:
            return float(logs[-1])
        allowed = means.min() + tolerance
        share = (allowed - means[index]) / (means[index + 1] - means[index])  # 0 where the next one diverged
        return float(logs[index] + share * (logs[index + 1] - logs[index]))

    everyone = np.arange(losses.shape[1])
    value, (low, high) = crossing(everyone), bootstrap_interval(crossing, losses.shape[1], seed=seed)
    wider = student_factor(losses.shape[1])  # of a handful of seeds, percentiles alone would cover too little
    low, high = value - wider * (value - low), value + wider * (high - value)
    # beyond the sizes tried nothing is known: of a batch size, that is 1 and infinity
    lower = math.exp(low) if low >= logs[0] - 1e-12 else 1.0
    upper = math.exp(high) if high < logs[-1] - 1e-12 else math.inf
    return Bounded(math.exp(value), lower, upper), sizes[_last_within(losses.mean(axis=1), tolerance)]


def _last_within(means: NDArray[np.float64], tolerance: float) -> int:
    """The last size, going up from the best, before one that exceeds the best by more than the tolerance."""
    index = int(np.argmin(means))
    while index + 1 < len(means) and means[index + 1] <= means.min() + tolerance:
        index += 1
    return index
