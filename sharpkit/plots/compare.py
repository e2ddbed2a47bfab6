"""A picture of results side by side: every quantity over the first result's."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sharpkit.plots import BLUE, GREEN, GREY, OCHRE, ORANGE, PINK, PURPLE, TEAL, axes_for, finish

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from sharpkit.reporting.compare import Comparison

_COLOURS = (ORANGE, BLUE, GREEN, PURPLE, PINK, TEAL, OCHRE)
_MOST = 24  # quantities, by judgement: more do not fit a page


def plot_comparison(comparison: Comparison, *, ax: Axes | None = None) -> Axes:
    """Dots with two errors at value / value of the first result; hollow where they do not differ by more than the errors."""
    rows = [i for i, values in enumerate(comparison.values) if values[0] > 0 and any(v > 0 for v in values[1:])][:_MOST]
    ax = axes_for(ax, (6.4, 1.2 + 0.32 * max(len(rows), 3)))
    ax.axvline(1, color=GREY, linewidth=1, label=comparison.names[0])
    count = len(comparison.names) - 1
    for number in range(1, count + 1):
        colour, named = _COLOURS[(number - 1) % len(_COLOURS)], False
        for at, row in enumerate(rows):
            first, value = comparison.values[row][0], comparison.values[row][number]
            if not (math.isfinite(value) and value > 0 and math.isfinite(first)):
                continue
            ratio = value / first
            errors = (comparison.errors[row][0] / first, comparison.errors[row][number] / value)
            spread = ratio * 2 * math.hypot(*errors)
            height = -at + (number - (count + 1) / 2) * 0.6 / max(count, 1)
            label = None if named else comparison.names[number]
            filled = colour if comparison.differs[row][number] else "none"
            low = min(spread, 0.95 * ratio)  # a logarithmic axis has no place for less than nothing
            ax.errorbar(
                ratio,
                height,
                xerr=[[low], [spread]],
                fmt="o",
                color=colour,
                markerfacecolor=filled,
                markersize=5.5,
                linewidth=1,
                label=label,
            )
            named = True
    ax.set_xscale("log")
    ax.set_yticks([-i for i in range(len(rows))], labels=[comparison.quantities[row] for row in rows])
    ax.set_ylim(-len(rows) + 0.4, 0.6)
    finish(ax, x=f"over that of {comparison.names[0]} (hollow: no difference beyond the errors)")
    ax.legend(frameon=False, fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4)
    return ax
