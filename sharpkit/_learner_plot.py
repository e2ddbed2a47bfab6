"""The picture of a learner's run: the rate in use, the peak rate it learned and the stability limit, decisions marked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sharpkit._axes import BLUE, GREY, ORANGE, PINK, finish, new_axes
from sharpkit._json import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_learner(document: Mapping[str, Any], *, ax: Axes | None = None) -> Axes:
    """The learned rate and the limit against the steps, logarithmic.

    Args:
        document: of a learner's history.
        ax: axes to draw on; new ones by default.

    Example:
        >>> decision = {"step": 1, "lr": 0.1, "lr_in_use": 0.1, "max_lr": 0.4, "reason": "grows"}
        >>> plot_learner({"decisions": [decision]}).get_xlabel()
        'optimizer step'
    """
    ax = new_axes((6.4, 3.8)) if ax is None else ax
    rows = document["decisions"]
    steps = [int(row["step"]) for row in rows]
    limits = [(s, number(row["max_lr"])) for s, row in zip(steps, rows, strict=True) if math.isfinite(number(row["max_lr"]))]
    ax.plot(*zip(*limits, strict=True), "--", color=GREY, marker="_", label="stability limit on the batch") if limits else None
    ax.plot(steps, [number(row["lr"]) for row in rows], color=BLUE, marker="o", markersize=3, label="learned rate, before decay")
    ax.plot(steps, [number(row["lr_in_use"]) for row in rows], color=ORANGE, linewidth=1, label="rate of the next step")
    back = [(s, number(row["lr"])) for s, row in zip(steps, rows, strict=True) if "the loss rose" in row["reason"]]
    if back:
        ax.plot(*zip(*back, strict=True), "v", color=PINK, label="went back")
    if any(number(row["lr"]) > 0 for row in rows):
        ax.set_yscale("log")
    ax.set_xlabel("optimizer step")
    ax.set_ylabel("learning rate")
    return finish(ax)
