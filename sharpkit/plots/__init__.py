"""What all pictures share: colours that read on a light and on a dark page, fresh axes, a finish."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from sharpkit._results import number
from sharpkit.monitor.schema import Reading, in_words, main_curvature, reading

if TYPE_CHECKING:
    from matplotlib.axes import Axes


BLUE, ORANGE, GREEN, GREY = "#3f88c5", "#e4713a", "#3f9c6b", "#8b919b"
PURPLE, PINK, TEAL, OCHRE = "#8f6fc4", "#c2548d", "#3a9fa3", "#b08a2e"


def new_axes(size: tuple[float, float] | None = None) -> Axes:
    """Axes of a new figure.

    Args:
        size: width and height in inches.
    """
    import matplotlib.pyplot as plt

    return plt.subplots(layout="constrained", figsize=size)[1]


def finish(ax: Axes, *, legend: Literal["best", "upper center", "upper left"] = "best") -> Axes:
    """Grid, spines and, where anything is labelled, a legend."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(True, color=GREY, alpha=0.25, linewidth=0.6)
    ax.set_axisbelow(True)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False, fontsize="small", loc=legend)
    return ax


# -- panels ---------------------------------------------------------------------------------------------------------------------


def _stack(ax: Axes, heights: list[float]) -> list[Axes]:
    """Axes under ``ax`` that share its steps; together they take its place."""
    figure: Any = ax.figure
    if len(heights) == 1:
        return [ax]
    spec = ax.get_subplotspec()
    if spec is not None:
        inner = spec.subgridspec(len(heights), 1, height_ratios=heights)
        ax.set_subplotspec(inner[0])
        return [ax, *(figure.add_subplot(inner[i], sharex=ax) for i in range(1, len(heights)))]
    place, gap = ax.get_position(), 0.03
    each = (place.height - gap * (len(heights) - 1)) / sum(heights)
    axes, top = [], place.y1
    for i, height in enumerate(heights):
        box = (place.x0, top - each * height, place.width, each * height)
        top -= each * height + gap
        if i == 0:
            ax.set_position(box)
        axes.append(ax if i == 0 else figure.add_axes(box, sharex=ax))
    return axes
