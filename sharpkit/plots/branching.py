"""Pictures of batch sizes: losses after branching, and the plan of a batch-size warm-up."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from sharpkit.plots import BLUE, GREEN, GREY, ORANGE, axes_for, finish

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from sharpkit.batch_size.branching import BatchBranching
    from sharpkit.batch_size.warmup import BatchSizeWarmup


def plot_batch_branching(branching: BatchBranching, *, ax: Axes | None = None, label: str = "") -> Axes:
    """Losses above the best size's with two standard errors, the tolerance, and the critical size with its interval.

    Args:
        branching: from :func:`sharpkit.branch_batch_sizes`.
        ax: where to draw; by default a new figure. Call it again with the same axes to compare.
        label: of the losses, in the legend.

    Example:
        >>> import matplotlib; matplotlib.use("Agg")
        >>> import sharpkit as sk
        >>> rows = ((1.0, 1.0), (1.0, 1.0), (1.1, 1.1))
        >>> told = (2.0, 0.01, "sqrt", 2, 0.1, 64, 0, (0, 1), 1.0, 1.0)
        >>> result = sk.BatchBranching(sk.Bounded(4.2, 4.0, 4.5), 4, (2, 4, 8), (0.1, 0.14, 0.2), rows, *told)
        >>> plot_batch_branching(result).get_xlabel()
        'batch size'
    """
    ax = axes_for(ax)
    kept = [(size, e) for size, e in zip(branching.batch_sizes, branching.excess, strict=True) if math.isfinite(e.value)]
    errors = [2 * e.stderr if math.isfinite(e.stderr) else 0.0 for _, e in kept]
    sizes, above = [size for size, _ in kept], [e.value for _, e in kept]
    ax.errorbar(
        sizes, above, yerr=errors, color=BLUE, marker="o", markersize=4, linewidth=1.5, capsize=2, label=label or "loss above the best"
    )
    ax.axhline(branching.tolerance, color=ORANGE, linestyle="--", linewidth=1.2, label=f"tolerance {branching.tolerance:g}")
    ax.axvline(branching.critical, color=GREEN, linewidth=1.4, label=f"critical batch size {branching.critical}")
    ax.axvspan(branching.critical.lower, min(branching.critical.upper, 2 * branching.batch_sizes[-1]), color=GREEN, alpha=0.15, linewidth=0)
    ax.set_xscale("log", base=2)
    ax.set_yscale("symlog", linthresh=branching.tolerance)
    ax.set_xlim(branching.batch_sizes[0] / 1.3, branching.batch_sizes[-1] * 1.3)
    ax.set_xticks(branching.batch_sizes, labels=list(map(str, branching.batch_sizes)))
    return finish(ax, x="batch size", y="loss above the best")


def plot_batch_size_warmup(plan: BatchSizeWarmup, *, ax: Axes | None = None) -> Axes:
    """The critical batch sizes, their law with its interval, and the steps of the plan, against samples seen.

    Args:
        plan: from :func:`sharpkit.batch_size_warmup`.
        ax: where to draw; by default a new figure.

    Example:
        >>> import matplotlib; matplotlib.use("Agg")
        >>> import sharpkit as sk
        >>> plan = sk.batch_size_warmup({1e3: 32.0, 4e3: 64.0, 16e3: 128.0}, batch_size=16, lr=0.1, samples=32_000)
        >>> plot_batch_size_warmup(plan).get_ylabel()
        'batch size'
    """
    ax, law = axes_for(ax), plan.law
    grid = np.geomspace(min(*law.x, plan.samples / 1e3), max(*law.x, plan.samples), 100)
    values = [law.at(x) for x in grid.tolist()]
    ax.fill_between(grid, [v.lower for v in values], [v.upper for v in values], color=BLUE, alpha=0.2, linewidth=0)
    ax.plot(grid, [v.value for v in values], color=BLUE, linewidth=1.5, label="law of the critical batch size, with 95 %")
    ax.plot(law.x, law.y, "o", color=ORANGE, markersize=5, label="measured")
    starts = [max(stage.start, grid[0]) for stage in plan.stages]
    ax.step(
        [*starts, plan.samples], [*(s.batch_size for s in plan.stages), plan.stages[-1].batch_size], where="post", color=GREEN, label="plan"
    )
    ax.axvline(max(law.x), color=GREY, linestyle=":", linewidth=1.2, label="extrapolated beyond")
    ax.set_xscale("log")
    ax.set_yscale("log", base=2)
    sizes = [v.value for v in values] + [s.batch_size for s in plan.stages] + list(law.y)
    ax.set_ylim(min(sizes) / 2, max(sizes) * 2)
    return finish(ax, x="samples seen", y="batch size")
