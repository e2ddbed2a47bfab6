"""The largest stable learning rate as a function of the batch size: measured curvature, theory, and short calibrating runs."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from sharpkit.analysis.batch_limits import limits_for
from sharpkit.analysis.batch_rates import Anchor, LearningRateCurve
from sharpkit.analysis.pilot import Trainer
from sharpkit.analysis.pool import SamplePool
from sharpkit.analysis.stability import update_rule
from sharpkit.objective import Objective

logger = logging.getLogger(__name__)

_MAX_POOL = 4096
_PILOT_BATCH, _PILOT_SHARE = (16, 128), 8  # an eighth of the data, within these bounds
_RUNS, _MORE_RUNS = 7, 2.5  # a search takes about so many, each repeat so many more
_MEASURING = 70  # full-data gradients for curvature and its noise, about
_ANCHOR_STRIDE = 8  # calibrate at every eighth batch size ...
_ANCHOR_SHARE = 28  # ... up to this part of the data: runs at large batches cost most
_LAST_SHARE = 16  # ... and once more at this part of it
_MAX_LENGTH = 3.0  # times the pilot's steps, at the smallest batch sizes
_REPEATS = (4, 3)  # searches at each batch size, with other orders of the data, and at the last


def learning_rate_curve(
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    *,
    batch_sizes: Sequence[int] | None = None,
    pilot: int = 100,
    calibrate: bool | Sequence[int] = True,
    max_samples: int = _MAX_POOL,
    seed: int = 0,
    callback: Callable[[str], None] | None = None,
) -> LearningRateCurve:
    """The largest stable learning rate for every batch size.

    A pilot run on a private copy reaches settled curvature; there the spectrum, its mini-batch noise and lambda_max of drawn batches are
    measured, which gives the mean-square limit of the optimizer's kind at every batch size. Sharpness grows until it meets the limit of
    whatever rate is used, so curvature after a pilot says how the limit depends on the batch size, but not the rate at which training from
    the present point breaks: both constants of the limit are fitted to short runs at a few batch sizes up to a sixteenth of the data, where
    runs are cheap. One search scatters by a factor of 1.5 to 2 and is repeated with other orders of the data. A run counts as trained if it
    makes at least half of the best improvement over what needs no training, the initial loss or the best constant output's.

    Args:
        objective: at the point to train from, usually freshly initialised. Only read.
        optimizer: SGD (with momentum), Adam, AdamW, RMSprop or Adagrad, over the objective's parameters. Only read; its present rate does
        not matter.
        batch_sizes: where to evaluate; by default powers of two from 4 to all samples.
        pilot: steps of the pilot and of each calibrating run.
        calibrate: whether to make calibrating runs, or the batch sizes to make them at (the cost grows with them).
        max_samples: use at most so many samples, drawn at random.
        seed: of draws and probes.
        callback: told what is being done, with its forecast cost.

    Raises:
        ValueError: batch sizes out of range, pilot shorter than 10 steps.
        ObjectiveError: the loss does not fall apart into samples.
        UnsupportedError: an optimizer whose limit is not known.

    References:
        Granziol, Zohren and Roberts (2022), arXiv 2006.09092; the mean-square condition: docs/mathematics.md.
    """
    started, say = time.perf_counter(), callback or logger.info
    rule = update_rule(optimizer)
    pool = SamplePool(objective).limited(max_samples, seed=seed)
    sizes = _checked_sizes(batch_sizes, pool.size)
    if pilot < 10:
        raise ValueError(f"pilot must be at least 10 steps, got {pilot}")
    at = _anchor_sizes(calibrate, sizes, pool.size)
    plans = [_Plan.at(size, pilot, last=size == at[-1]) for size in at]
    trainer = Trainer(pool, optimizer, seed)
    size = min(max(pool.size // _PILOT_SHARE, _PILOT_BATCH[0]), _PILOT_BATCH[1], pool.size)
    forecast = _MEASURING + (pilot * size + sum(plan.runs * plan.samples for plan in plans)) / pool.size
    say(
        f"learning-rate curve over {pool.size} samples: about {forecast:.0f} full-data gradients, in some "
        f"{sum(plan.runs for plan in plans) + 1:.0f} short runs"
    )
    settled, rate, start_lambda = trainer.settle(steps=pilot, batch_size=size, rule=rule)
    say(f"pilot done (loss {settled.losses[0]:.3g} -> {settled.losses[-1]:.3g}); measuring curvature and its noise")
    curvature, limits = limits_for(SamplePool(settled.objective), optimizer, rule, sizes=sizes, seed=seed, ledger=trainer.ledger)
    anchors: list[Anchor] = []
    for plan in plans:
        say(f"calibrating at B = {plan.batch_size}")
        begin = anchors[-1].trained if anchors else rate * (plan.batch_size / size) ** 0.5
        anchors.append(plan.search(trainer, begin))
    return LearningRateCurve(
        sizes,
        type(optimizer).__name__,
        rule,
        curvature,
        limits,
        tuple(anchors),
        (start_lambda, curvature.lambda_max),
        float(optimizer.param_groups[0]["lr"]),
        pool.size,
        trainer.ledger.samples / pool.size,
        time.perf_counter() - started,
    )


def _checked_sizes(batch_sizes: Sequence[int] | None, available: int) -> tuple[int, ...]:
    if batch_sizes is None:
        powers = [2**j for j in range(2, 31) if 2**j < available]
        return (*powers, available)
    sizes = tuple(sorted({int(b) for b in batch_sizes}))
    if len(sizes) < 2 or sizes[0] < 1:
        raise ValueError(f"batch_sizes needs at least two different sizes of 1 or more, got {list(batch_sizes)}")
    if sizes[-1] > available:
        raise ValueError(
            f"batch size {sizes[-1]} is larger than the {available} samples of the objective; give it more data, or smaller batch_sizes"
        )
    return sizes


def _anchor_sizes(calibrate: bool | Sequence[int], sizes: tuple[int, ...], available: int) -> list[int]:
    if calibrate is False:
        return []
    if calibrate is not True:
        return sorted({int(b) for b in calibrate})
    wanted, cap = [], max(sizes[-1] // _ANCHOR_SHARE, sizes[0])
    size = sizes[0]
    while size <= cap and size < available:
        wanted.append(size)
        size *= _ANCHOR_STRIDE
    last = wanted[-1] if wanted else sizes[0]
    return [*wanted, min(max(available // _LAST_SHARE, 2 * last), available)]


@dataclass(frozen=True)
class _Plan:
    """A search for the rate that breaks training at one batch size.

    Attributes:
        batch_size: B.
        steps: of each run. Small batches need more of them to show what breaks, and cost less.
        repeats: searches.
    """

    batch_size: int
    steps: int
    repeats: int

    @classmethod
    def at(cls, batch_size: int, pilot: int, *, last: bool) -> _Plan:
        steps = pilot if last else round(pilot * min(max(math.sqrt(64 / batch_size), 1.0), _MAX_LENGTH))
        return cls(batch_size, steps, _REPEATS[last])

    @property
    def runs(self) -> float:
        """About so many."""
        return _RUNS + _MORE_RUNS * (self.repeats - 1)

    @property
    def samples(self) -> int:
        """Sample gradients of one run."""
        return self.batch_size * self.steps

    def search(self, trainer: Trainer, begin: float) -> Anchor:
        trained, broke = trainer.largest_stable_rate(begin, batch_size=self.batch_size, steps=self.steps, repeats=self.repeats)
        return Anchor(self.batch_size, trained, broke, self.repeats)
