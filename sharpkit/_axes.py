"""What all pictures share: colours that read on a light and on a dark page, fresh axes, a finish."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

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
