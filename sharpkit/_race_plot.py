"""The picture of a race: training loss against gradients spent, the learner in front, given rates in the background."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sharpkit._axes import BLUE, GREEN, GREY, OCHRE, ORANGE, PINK, PURPLE, TEAL, finish, new_axes
from sharpkit._json import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = (ORANGE, GREEN, PURPLE, PINK, TEAL, OCHRE)


def plot_race(document: Mapping[str, Any], *, ax: Axes | None = None) -> Axes:
    """Batch losses of the first seed, averaged over stretches; a gap is what was spent on finding a rate.

    Args:
        document: of a race.
        ax: axes to draw on; new ones by default.

    Example:
        >>> finish = {"name": "learner", "given": False, "curve": [[1, 2.0], [2, 1.0]], "train_losses": [1.0]}
        >>> plot_race({"finishes": [finish]}).get_xlabel()
        'gradients spent, with those on finding the rate'
    """
    ax = new_axes((7.2, 4.4)) if ax is None else ax
    finishes = document["finishes"]
    others = [f for f in finishes if not f["given"] and f["name"] != "learner"]
    given = [f for f in finishes if f["given"] and all(math.isfinite(number(v)) for v in f["train_losses"])]
    for position, found in enumerate(given):
        best = position == 0
        label = f"{found['name']} (given, the best of them)" if best else "other given rates" if position == 1 else None
        _draw(ax, found, color="#30343b" if best else GREY, linewidth=1.4 if best else 0.6, alpha=1 if best else 0.5, label=label)
    for found, colour in zip(others, _COLOURS, strict=False):
        _draw(ax, found, color=colour, linewidth=1.3, label=found["name"])
    for found in finishes:
        if found["name"] == "learner":
            _draw(ax, found, color=BLUE, linewidth=2.4, label="learner")
    lows, highs = _range(finishes)
    if lows > 0:
        ax.set_yscale("log")
        ax.set_ylim(lows / 1.3, highs * 1.3)
    ax.set_xlabel("gradients spent, with those on finding the rate")
    ax.set_ylabel("training loss of the batch")
    return finish(ax)


def _draw(ax: Axes, found: Mapping[str, Any], **style: Any) -> None:
    points = [(number(x), number(y)) for x, y in found["curve"] if math.isfinite(number(y))]
    if points:
        ax.plot(*zip(*points, strict=True), **style)


def _range(finishes: Any) -> tuple[float, float]:
    """Of the losses shown; a loss far above all first ones is off the picture."""
    curves = [[number(y) for _, y in f["curve"] if math.isfinite(number(y))] for f in finishes]
    curves = [curve for curve in curves if curve]
    if not curves:
        return 0.0, 1.0
    return min(map(min, curves)), max(curve[0] for curve in curves if curve[0] <= 3 * min(c[0] for c in curves))
