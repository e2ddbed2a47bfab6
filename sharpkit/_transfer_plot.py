"""The picture of a coordinate check: how large the updates of every module's output are, against width."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from sharpkit._axes import BLUE, GREEN, GREY, OCHRE, ORANGE, PINK, PURPLE, finish, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {"stable": BLUE, "grows": ORANGE, "vanishes": PURPLE, "unclear": GREY}
_NAMED = (PINK, OCHRE, GREEN)  # the worst ones, so that each can be found


def plot_coordinates(
    check: Any, *, ax: Axes | None = None, what: Literal["update", "initial"] = "update", step: int | None = None, title: str | None = None
) -> Axes:
    """RMS of each judged coordinate's update against width, a line each, mean over seeds; what is asked for are level lines.

    Lines that grow are orange, those that vanish purple; the worst have a colour and a name with the exponent of the points shown, which is
    that of one step, where the check's is over all steps. Unjudged coordinates are left out.

    Args:
        check: a :class:`sharpkit.transfer.CoordinateCheck`.
        ax: where to draw; by default a new figure.
        what: ``"update"`` for RMS(x_t - x_0), ``"initial"`` for RMS(x_0).
        step: t of the updates, by default the last step.
        title: of the axes.

    Returns:
        The axes.

    Raises:
        ValueError: a step that was not made, or nothing to draw.

    Example:
        >>> import matplotlib; matplotlib.use("Agg")
        >>> import torch, sharpkit as sk
        >>> build = lambda n: torch.nn.Sequential(torch.nn.Linear(4, n), torch.nn.Linear(n, 1))
        >>> sgd = lambda model, n: torch.optim.SGD(model.parameters(), lr=0.01)
        >>> data = (torch.ones(8, 4), torch.ones(8, 1))
        >>> check = sk.transfer.coordinate_check(build, [8, 16], optimizer=sgd, data=data, loss=torch.nn.functional.mse_loss, seeds=2)
        >>> plot_coordinates(check).get_xlabel()
        'width'
    """
    step = (check.num_steps if step is None else step) if what == "update" else 0
    if not 0 <= step <= check.num_steps or (what == "update" and step == 0):
        raise ValueError(f"step must be one of 1 to {check.num_steps}, the steps that were made, got {step}")
    shown = [c for c in check.coordinates if c.verdict != "not judged" and not c.repeats_output]
    lines = [(c, _means(c.updates if what == "update" else c.rms, step)) for c in shown]
    lines = [(c, points) for c, points in lines if len(points) > 1]
    if not lines:
        raise ValueError("no coordinate was judged, or none changed: nothing to draw")
    ax = ax if ax is not None else new_axes((6.4, 4.2))
    slopes = {id(c): (c.update_at(step) if what == "update" else c.initial) for c, _ in lines}
    bad = sorted((c for c, _ in lines if c.verdict in ("grows", "vanishes")), key=lambda c: -abs(slopes[id(c)].value))
    named = {c.name: colour for c, colour in zip(bad, _NAMED, strict=False)}
    seen: set[str] = set()
    for c, points in sorted(lines, key=lambda line: (line[0].name in named, line[0].verdict != "stable")):
        if c.name in named:
            label = f"{c.name}: {check.dimension}^{slopes[id(c)]}"
        else:
            label = "_" if c.verdict in seen else _group(c.verdict, [other for other, _ in lines if other.name not in named])
            seen.add(c.verdict)
        look: dict[str, Any] = {"linewidth": 1.8 if c.name in named else 1.0, "alpha": 1.0 if c.name in named else 0.65, "markersize": 3.5}
        style = "--" if c.kind == "attention logits" else "-"
        ax.plot([*points], [*points.values()], style, marker="o", color=named.get(c.name, _COLOURS[c.verdict]), label=label, **look)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(check.sizes, labels=[str(s) for s in check.sizes])
    ax.minorticks_off()
    ax.set_xlabel(check.dimension)
    ax.set_ylabel(f"RMS of x_{step} - x_0 on a fixed batch" if what == "update" else "RMS of x_0 on a fixed batch")
    ax.set_title(title or f"coordinate check {'passed' if check.passed else 'failed'}: level lines are asked for", fontsize="medium")
    return finish(ax)


def _group(verdict: str, coordinates: list[Any]) -> str:
    """For the legend: how many of the unnamed coordinates share the verdict."""
    return f"{verdict} ({sum(c.verdict == verdict for c in coordinates)})"


def _means(values: dict[int, list[list[float]]], step: int) -> dict[int, float]:
    """size -> geometric mean over seeds, where positive."""
    found = {}
    for size, runs in values.items():
        logs = [math.log(run[step]) for run in runs if math.isfinite(run[step]) and run[step] > 0]
        if logs:
            found[size] = float(np.exp(np.mean(logs)))
    return found
