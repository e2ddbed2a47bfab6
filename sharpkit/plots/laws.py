"""A picture of learning-rate schedules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

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
