"""Pictures of learning-rate schedules and of power laws."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sharpkit._results import Bounded
from sharpkit.plots import BLUE, GREEN, OCHRE, ORANGE, PINK, PURPLE, TEAL, axes_for, finish

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
