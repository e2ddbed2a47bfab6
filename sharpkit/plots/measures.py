"""Pictures of sharpness measures: the rise of the loss near the weights, and of rounding each layer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sharpkit.plots import BLUE, GREEN, GREY, OCHRE, ORANGE, PURPLE, axes_for, finish

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from sharpkit.measures.nearby import MSharpness
    from sharpkit.measures.rounding import LayerSensitivity

_COLOURS = (ORANGE, BLUE, GREEN, PURPLE, OCHRE)


def plot_m_sharpness(sharpness: MSharpness, *, ax: Axes | None = None, title: str | None = None) -> Axes:
    """The rise of the loss over rho with two standard errors, and of a worst case what the slope alone would do.

    Args:
        sharpness: from :func:`sharpkit.measures.m_sharpness`.
        ax: where to draw; by default a new figure. Call it again with the same axes to compare.
        title: of those axes, which are returned.

    Example:
        >>> import matplotlib; matplotlib.use("Agg")
        >>> import sharpkit as sk
        >>> values = (sk.Estimate(0.1, 0.01), sk.Estimate(0.4, 0.02))
        >>> result = sk.measures.MSharpness("l2", True, 0.0, False, 128, 8, 0.3, (0.5, 1.0), values, (), 20, 320, 0)
        >>> plot_m_sharpness(result).get_ylabel()
        'rise of the loss'
    """
    ax = axes_for(ax)
    kept = [i for i, value in enumerate(sharpness.values) if math.isfinite(value.value)]
    rho, values = [sharpness.rho[i] for i in kept], [sharpness.values[i] for i in kept]
    errors = [2 * v.stderr if math.isfinite(v.stderr) else 0.0 for v in values]  # an unknown error gets no whisker
    case = "worst case" if sharpness.is_worst_case else "average case"
    label = f"{'adaptive ' if sharpness.adaptive else ''}{sharpness.perturbation}, {case}, m = {sharpness.m}"
    ax.errorbar(rho, [v.value for v in values], yerr=errors, color=BLUE, marker="o", markersize=4, linewidth=1.5, capsize=2, label=label)
    if sharpness.slopes:
        ax.plot(rho, [sharpness.slopes[i] for i in kept], color=GREY, linestyle=":", linewidth=1.3, label="the slope alone")
    if len(rho) > 1:
        ax.set_xscale("log", base=2)
        if all(v.value > 0 for v in values):
            ax.set_yscale("log")
        ax.set_xticks(rho, labels=[f"{each:g}" for each in rho], minor=False)
        ax.minorticks_off()
    return finish(ax, x="rho" + (", relative to each weight" if sharpness.adaptive else ""), y="rise of the loss", title=title)


def plot_layer_sensitivity(layers: LayerSensitivity, *, ax: Axes | None = None, title: str | None = None) -> Axes:
    """Measured against foretold rises, a point for each layer and bit width; foretold rises by layer where none was measured.

    Args:
        layers: from :func:`sharpkit.measures.layer_sensitivity`.
        ax, title: where to draw (by default a new figure), and the title of those axes, which are returned.

    Example:
        >>> import matplotlib; matplotlib.use("Agg")
        >>> import sharpkit as sk
        >>> one, table = (sk.Estimate(1.0, 0.1),) * 2, ((0.2,), (0.1,))
        >>> layers = sk.measures.LayerSensitivity(("a", "b"), (4, 4), one, one, one, (4,), table, table, table, table, table, 1.0, 10, 3)
        >>> plot_layer_sensitivity(layers).get_xlabel()
        'foretold rise of the loss'
    """
    ax = axes_for(ax)
    if layers.measured is None:
        rows = range(len(layers.names))
        for j, bits in enumerate(layers.bits):
            foretold = [row[j] for row in layers.predicted]
            ax.plot(foretold, list(rows), color=_COLOURS[j % len(_COLOURS)], marker="o", linestyle="none", label=f"{bits} bits")
        if all(value > 0 for row in layers.predicted for value in row):
            ax.set_xscale("log")
        ax.set_yticks(list(rows), labels=list(layers.names))
        ax.invert_yaxis()
        return finish(ax, x="foretold rise of the loss", title=title)
    shown = [
        abs(v) for table in (layers.predicted, layers.quadratic, layers.measured) for row in table for v in row if v and math.isfinite(v)
    ]
    for j, bits in enumerate(layers.bits):
        colour, actual = _COLOURS[j % len(_COLOURS)], [row[j] for row in layers.measured]
        ax.plot([row[j] for row in layers.predicted], actual, color=colour, marker="o", linestyle="none", label=f"{bits} bits, mean trace")
        ax.plot(
            [row[j] for row in layers.quadratic], actual, color=colour, marker="x", linestyle="none", label=f"{bits} bits, quadratic form"
        )
    if shown:
        least = max(min(shown), 1e-8 * max(shown))  # by judgement: smaller rises are rounding of the loss
        ends = [min(shown), max(shown)]
        ax.plot(ends, ends, color=GREY, linestyle="--", linewidth=1)
        ax.set_xscale("symlog", linthresh=least)
        ax.set_yscale("symlog", linthresh=least)
    return finish(ax, x="foretold rise of the loss", y="measured rise of the loss", title=title)
