"""A batch-size warm-up: when to double the batch as the critical batch size grows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sharpkit._arguments import choice, real, reals, shown, whole
from sharpkit._calls import public_call
from sharpkit._results import Result
from sharpkit.batch_size.branching import RULES, BatchBranching
from sharpkit.batch_size.scaling import scale_learning_rate
from sharpkit.fits import PowerLaw, power_law

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LEAST_POINTS = 3  # that a power law and its error need


@dataclass(frozen=True)
class WarmupStage(Result):
    """From when on to train at one batch size.

    Attributes:
        start: samples seen when it begins.
        batch_size: of each step from then on.
        lr: rate that goes with it; a schedule, if there is one, multiplies it.
        steps: of the stage.
    """

    start: int
    batch_size: int
    lr: float
    steps: int


@dataclass(frozen=True)
class BatchSizeWarmup(Result, kind="batch_size_warmup"):
    """When to double the batch, so that it stays below the critical batch size.

    Attributes:
        stages: batch sizes, each twice the one before, with the samples seen at which they begin.
        law: critical batch size against samples seen.
        samples: of the whole run.
        rule: how the rate follows the batch size.
        bounds: samples seen at those measurements that know the critical size from below alone.
    """

    stages: tuple[WarmupStage, ...]
    law: PowerLaw
    samples: int
    rule: str
    bounds: tuple[float, ...] = ()

    def at(self, samples: float) -> WarmupStage:
        """The stage after so many samples.

        Example:
            >>> plan = batch_size_warmup({1e3: 32.0, 4e3: 64.0, 16e3: 128.0}, batch_size=16, lr=0.1, samples=32_000)
            >>> plan.at(0).batch_size, plan.at(8_000).batch_size
            (16, 64)
        """
        samples = real("samples", samples, least=0)
        return [stage for stage in self.stages if stage.start <= samples][-1]

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return sum(stage.steps for stage in self.stages)

    @property
    def steps_saved(self) -> int:
        """Fewer steps than at the first batch size throughout."""
        return math.ceil(self.samples / self.stages[0].batch_size) - self.steps

    def findings(self) -> list[str]:
        """What to do, in sentences."""
        first, last, reach = self.stages[0], self.stages[-1], max(self.law.x)
        exponent = self.law.exponent
        said = [
            f"The critical batch size grows as samples^{exponent.value:.2g} (95 %: {exponent.lower:.2g} to {exponent.upper:.2g}). From "
            f"{first.batch_size} to {last.batch_size} the batch doubles {len(self.stages) - 1} times within {self.samples} samples: "
            f"{self.steps} steps, {self.steps_saved} fewer than at {first.batch_size} throughout."
        ]
        if exponent.lower <= 0:
            said.append("The interval of the exponent contains 0: that the critical batch size grows is not shown.")
        below = (first.batch_size / self.law.amplitude.value) ** (1 / exponent.value) if exponent > 0 else 0.0
        if below >= min(self.law.x):
            said.append(f"Up to {below:.3g} samples the law lies below B = {first.batch_size}: begin with a smaller batch.")
        if last.start > reach:
            said.append(f"Doublings after {reach:.3g} samples are extrapolated: nothing was measured there.")
        if self.bounds:
            where = ", ".join(f"{at:g}" for at in self.bounds)
            said.append(f"At {where} samples no batch size tried was too large: the plan is careful there, not the best.")
        return said

    def __str__(self) -> str:
        rows = [["from sample", "batch size", "rate", "steps"]]
        rows += [[str(s.start), str(s.batch_size), f"{s.lr:.3g}", str(s.steps)] for s in self.stages]
        widths = [max(len(row[j]) for row in rows) for j in range(4)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, "", *(f"* {finding}" for finding in self.findings())])

    def plot(self, ax: Axes | None = None) -> Axes:
        """Measured sizes, their law and the plan against samples seen."""
        from sharpkit.plots.branching import plot_batch_size_warmup

        return plot_batch_size_warmup(self, ax=ax)


@public_call
def batch_size_warmup(
    critical: Sequence[BatchBranching] | Mapping[float, float],
    *,
    batch_size: int,
    lr: float,
    samples: int,
    max_batch_size: int | None = None,
    rule: str | None = None,
    seed: int = 0,
    name: str = "",
) -> BatchSizeWarmup:
    """When to double the batch size: as soon as the law of the critical batch size over samples seen allows twice the present one.

    The law B*(n) = a n^p is a power law through the critical sizes at several points of training; the batch becomes 2^j B once
    a n^p >= 2^j B, at n = (2^j B / a)^(1 / p), at the next whole step. The rate goes with it by the rule.

    Args:
        critical: at least three results of :func:`sharpkit.branch_batch_sizes` with different ``seen``, or critical sizes by samples seen.
        batch_size: to begin with.
        lr: rate at ``batch_size``.
        samples: of the whole run.
        max_batch_size: where to end; by default the law alone decides.
        rule: ``"linear"`` or ``"sqrt"``; by default that of the branchings, else ``"sqrt"``.
        seed: seeds the resampling behind the law's intervals.
        name: of the result, which pages and comparisons show.

    Raises:
        TypeError: neither branchings nor a mapping.
        ValueError: fewer than three different points after the start of training, or branchings under different rules.

    Example:
        >>> import sharpkit as sk
        >>> plan = sk.batch_size_warmup({1e3: 32.0, 4e3: 64.0, 16e3: 128.0}, batch_size=16, lr=0.1, samples=32_000)  # B* = n^0.5 (about)
        >>> [(stage.start, stage.batch_size, round(stage.lr, 3)) for stage in plan.stages]
        [(0, 16, 0.1), (1008, 32, 0.141), (4016, 64, 0.2), (16048, 128, 0.283)]

    References:
        Merrill, Arora, Groeneveld and Hajishirzi (2025), arXiv 2505.23971; Smith et al. (2018), arXiv 1711.00489, who double the batch
        instead of lowering the rate.
    """
    points, bounds, rules = _points(critical)
    if rule is None and len(rules) > 1:
        raise ValueError(f"the branchings follow different rules, {' and '.join(sorted(rules))}: measure them under one, or give rule=")
    rule = choice("rule", rule, RULES) if rule is not None else next(iter(rules), "sqrt")
    batch_size, samples, lr = whole("batch_size", batch_size), whole("samples", samples), real("lr", lr, above=0)
    end = None if max_batch_size is None else whole("max_batch_size", max_batch_size, least=batch_size)
    law = power_law(list(points), list(points.values()), seed=seed)
    starts, sizes = [0], [batch_size]
    while law.exponent > 0 and (end is None or 2 * sizes[-1] <= end):
        log_wanted = math.log(2 * sizes[-1] / law.amplitude.value) / law.exponent.value  # as n itself it could overflow
        if log_wanted >= math.log(samples):
            break
        # at the next whole step, a hair past a boundary being rounding
        left = max(math.exp(log_wanted) - starts[-1], 0.0) / sizes[-1]
        starts.append(starts[-1] + math.ceil(left - 1e-9) * sizes[-1])
        sizes.append(2 * sizes[-1])
    kept = [j for j, start in enumerate(starts) if start < samples and (j + 1 == len(starts) or starts[j + 1] > start)]
    ends = [*(starts[j] for j in kept[1:]), samples]
    rates = [float(scale_learning_rate(lr, batch_size, sizes[j], rule=rule)) for j in kept]
    stages = [
        WarmupStage(starts[j], sizes[j], rate, math.ceil((stop - starts[j]) / sizes[j]))
        for j, rate, stop in zip(kept, rates, ends, strict=True)
    ]
    return BatchSizeWarmup(tuple(stages), law, samples, rule, bounds)


def _points(critical: Sequence[BatchBranching] | Mapping[float, float]) -> tuple[dict[float, float], tuple[float, ...], set[str]]:
    """Critical sizes by samples seen, where they are known from below alone, and the rules they were measured under."""
    bounds: tuple[float, ...] = ()
    rules: set[str] = set()
    if isinstance(critical, Mapping):
        sizes = reals("critical sizes", list(critical.values()), above=0)
        points = dict(zip(reals("samples seen", list(critical), above=0), sizes, strict=True))
    else:
        if isinstance(critical, BatchBranching) or not all(isinstance(each, BatchBranching) for each in critical):
            raise TypeError(f"critical must be results of branch_batch_sizes or a dict of sizes by samples seen, got {shown(critical)}")
        later = [each for each in critical if each.seen > 0]  # a power law is 0 at 0
        points = {float(each.seen): each.critical.value for each in later}
        bounds, rules = tuple(float(each.seen) for each in later if each.is_bound), {each.rule for each in later}
    if len(points) < _LEAST_POINTS:
        raise ValueError(
            f"a law of the critical batch size needs at least {_LEAST_POINTS} points after the start of training, got {len(points)}: "
            "branch at more checkpoints, each with seen= the samples up to there"
        )
    return points, bounds, rules
