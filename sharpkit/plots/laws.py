"""Pictures of learning-rate schedules, of rates by layer and of power laws."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sharpkit._results import Bounded
from sharpkit.plots import BLUE, GREEN, OCHRE, ORANGE, PINK, PURPLE, TEAL, axes_for, finish

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_RATIO_TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10)  # by convention; ratios lie within a factor of 10
_COLOURS = (BLUE, GREEN, PURPLE, PINK, TEAL, OCHRE)


def draw_schedules(schedules: Mapping[str, Callable[[float], float]], *, peak: float, limit: float | None, ax: Axes | None) -> Axes:
    """Rates over the share of the run, and the limit as a dashed line."""
    ax, z = axes_for(ax), np.linspace(0, 1, 500)
    for number, (name, schedule) in enumerate(schedules.items()):
        ax.plot(z, [peak * schedule(float(at)) for at in z], color=_COLOURS[number % len(_COLOURS)], linewidth=1.5, label=name)
    if limit is not None:
        ax.axhline(limit, color=ORANGE, linestyle="--", linewidth=1.4, label=f"largest stable rate {limit:.3g}")
    ax.set_ylim(bottom=0)
    return finish(ax, x="share of the run", y="learning rate")


def draw_power_law(
    points: Sequence[float], values: Sequence[float], grid: NDArray[np.float64], law: Sequence[Bounded], *, x: str, y: str, ax: Axes | None
) -> Axes:
    """Points, the law and the 95 % interval of it."""
    ax = axes_for(ax)
    ax.fill_between(grid, [v.lower for v in law], [v.upper for v in law], color=BLUE, alpha=0.2, linewidth=0, label="95 % of the law")
    ax.plot(grid, [float(v) for v in law], color=BLUE, linewidth=1.5, label="power law")
    ax.plot(points, values, "o", color=ORANGE, markersize=4, label="measured")
    ax.set(xscale="log", yscale="log")
    return finish(ax, x=x, y=y)


def draw_layer_rates(names: Sequence[str], ratios: Mapping[str, Sequence[float]], *, ax: Axes | None) -> Axes:
    """A mark for each rule and layer, the first layer on top; 1 is the base rate."""
    ax = axes_for(ax, (6.4, max(2.6, 1.2 + 0.32 * len(names))))  # inches, by judgement: axis, legend and a line for each layer
    rows = np.arange(len(names))
    shifts = np.linspace(-0.25, 0.25, len(ratios))
    for (label, values), shift, colour, mark in zip(ratios.items(), shifts, _COLOURS, "osD^vP", strict=False):
        ax.plot(values, rows + shift, mark, color=colour, markersize=5, label=label)
    ax.axvline(1.0, color=ORANGE, linestyle="--", linewidth=1.2)
    ax.set_xscale("log")
    span = [value for values in ratios.values() for value in values]
    shown = [tick for tick in _RATIO_TICKS if 0.7 * min(span) <= tick <= 1.4 * max(span)]  # a little beyond the marks, by judgement
    ax.set_xticks(shown, labels=[f"{tick:g}" for tick in shown])
    ax.xaxis.minorticks_off()
    ax.set_yticks(rows, labels=list(names))
    ax.invert_yaxis()
    return finish(ax, x="rate of the layer / base rate")
