"""What all pictures share: colours that read on a light and on a dark page, fresh axes, a finish."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from sharpkit._arguments import shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes


# By judgement: of middle lightness, so that each keeps its contrast on white and on black; blue and orange, which carry the meaning
# (curvature, limit), stay apart for colour-blind readers too.
BLUE, ORANGE, GREEN, GREY = "#3f88c5", "#e4713a", "#3f9c6b", "#8b919b"
PURPLE, PINK, TEAL, OCHRE = "#8f6fc4", "#c2548d", "#3a9fa3", "#b08a2e"


def axes_for(ax: Axes | None, size: tuple[float, float] | None = None) -> Axes:
    """The given axes, or those of a new figure, of a width and a height in inches.

    Raises:
        TypeError: something else was given.
    """
    if ax is not None:
        if not hasattr(ax, "get_subplotspec"):
            raise TypeError(f"ax must be matplotlib Axes, as plt.subplots() makes them, got {shown(ax)}")
        return ax
    import matplotlib.pyplot as plt  # not at the top: import sharpkit stays free of matplotlib, and its backend is the user's choice

    return plt.subplots(layout="constrained", figsize=size)[1]


def finish(
    ax: Axes,
    *,
    x: str | None = None,
    y: str | None = None,
    title: str | None = None,
    legend: Literal["best", "upper center", "upper left"] = "best",
) -> Axes:
    """Grid, spines and, where given or where anything is labelled, the names of the axes, a title, a legend."""
    for text, show in ((x, ax.set_xlabel), (y, ax.set_ylabel), (title, ax.set_title)):
        if text:  # without one, what is there stays: several runs may be drawn on the same axes
            show(text)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(True, color=GREY, alpha=0.25, linewidth=0.6)
    ax.set_axisbelow(True)
    if ax.get_legend_handles_labels()[0]:  # matplotlib warns of a legend without entries
        ax.legend(frameon=False, fontsize="small", loc=legend)
    return ax


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
    # axes made by hand (figure.add_axes) have no grid to divide: their box is cut up, with gaps of 3 % of the figure by judgement
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
