"""Pictures of a loss around a point: a line with its quadratic model and the stability limit, a plane's contours or surface."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from sharpkit.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, axes_for, finish

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from sharpkit.measuring.landscape import Landscape

_LEVELS = 14  # contours, by judgement
_WIDE = 30.0  # highest over lowest rise from which levels are logarithmic, by judgement
_SMOOTH = 400  # points of a curve that is known everywhere: about one a pixel, by judgement
_TOP = 1.3  # of the highest loss shown, by judgement: the model and the limit may leave the picture


def plot_landscape(shown: Landscape, *, ax: Axes | None = None, surface: bool = False) -> Axes:
    """A landscape.

    Args:
        shown: from :func:`sharpkit.landscape`.
        ax: where to draw, by default a new figure; of projection ``"3d"`` for a surface.
        surface: draw a plane in three dimensions.

    Raises:
        ValueError: a surface of a line, or on axes of two dimensions.
    """
    if surface and len(shown.axes) == 1:
        raise ValueError("a line has no surface: draw it without surface=True, or make the landscape with dimensions=2")
    if surface:
        return _surface(shown, ax)
    return _line(shown, axes_for(ax)) if len(shown.axes) == 1 else _plane(shown, axes_for(ax))


def _label(shown: Landscape, i: int) -> str:
    unit = "parameter distance" if abs(float(shown.norms[i]) - 1) < 1e-3 else "in lengths of it"
    return f"{shown.names[i]} ({unit})"


def _line(shown: Landscape, ax: Axes) -> Axes:
    x, losses = shown.axes[0].numpy(), shown.losses.numpy()
    finite = losses[np.isfinite(losses)]
    top = shown.loss + _TOP * max(float(finite.max()) - shown.loss, 1e-12) if len(finite) else shown.loss + 1
    ax.plot(x, np.where(np.isfinite(losses), losses, np.nan), color=BLUE, linewidth=1.8, label="loss")
    fine, curvature, slope = np.linspace(x[0], x[-1], _SMOOTH), float(shown.curvature[0, 0]), float(shown.slope[0])
    ax.plot(fine, shown.loss + slope * fine + curvature * fine**2 / 2, color=GREY, linewidth=1.2, linestyle="--", label="quadratic model")
    if shown.limits is not None and math.isfinite(shown.limits[0]):
        # from the model's own lowest point, where there is one: it is the width of the valley that the limit is about
        centre = -slope / curvature if curvature > 0 else 0.0
        floor = shown.loss + slope * centre + curvature * centre**2 / 2
        ax.plot(
            fine,
            floor + shown.limits[0] * (fine - centre) ** 2 / 2,
            color=ORANGE,
            linewidth=1.2,
            linestyle="--",
            label="as curved as is stable",
        )
    if shown.path is not None and shown.path_losses is not None:
        ax.plot(shown.path[:, 0], shown.path_losses, "o", color=PURPLE, markersize=4, label="checkpoints")
    ax.plot([0], [shown.loss], "o", color=GREEN, markersize=6, label="present parameters")
    low = min(float(finite.min()), shown.loss) if len(finite) else shown.loss
    ax.set_ylim(low - 0.05 * (top - low), top)
    return finish(ax, x=_label(shown, 0), y="loss")


def _plane(shown: Landscape, ax: Axes) -> Axes:
    x, y, losses = shown.axes[0].numpy(), shown.axes[1].numpy(), shown.losses.numpy().T
    losses = np.where(np.isfinite(losses), losses, np.nan)
    known = losses[np.isfinite(losses)]
    low, high = (float(known.min()), float(known.max())) if len(known) else (shown.loss, shown.loss)
    levels = _levels(low, high)
    if len(known):
        ax.contourf(x, y, losses, levels=levels, cmap="Blues", alpha=0.75, extend="both")
        lines = ax.contour(x, y, losses, levels=levels[::2], colors=BLUE, linewidths=0.7)
        ax.clabel(lines, fontsize="x-small", fmt="%.3g")
    _ellipses(shown, ax, high)
    if shown.path is not None:
        ax.plot(shown.path[:, 0], shown.path[:, 1], "o-", color=PURPLE, markersize=3.5, linewidth=1, label="checkpoints")
    ax.plot([0], [0], "*", color=GREEN, markersize=11, label="present parameters")
    ax.set(xlim=(x[0], x[-1]), ylim=(y[0], y[-1]))
    finish(ax, x=_label(shown, 0), y=_label(shown, 1))
    ax.legend(frameon=False, fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)  # beside what it would hide
    return ax


def _levels(low: float, high: float) -> Any:
    span = max(high - low, 1e-12 * max(abs(high), 1.0))
    steps = np.linspace(0, 1, _LEVELS + 1)
    # most of a valley lies near its floor: squares put more levels there, powers of ten where the walls are steep
    rises = steps**2 if span < _WIDE * max(abs(low), 1e-12) else (np.logspace(-3, 0, _LEVELS + 1) if low >= 0 else steps**2)
    return low + span * np.asarray(rises) if rises[0] == 0 else np.concatenate([[low], low + span * np.asarray(rises)])


def _ellipses(shown: Landscape, ax: Axes, high: float) -> None:
    """Where the quadratic model has risen by a quarter of what is shown, and where curvature at the limit would have."""
    rise, curvature = 0.25 * max(high - shown.loss, 1e-12), shown.curvature.numpy()
    angles = np.linspace(0, 2 * math.pi, 200)
    values, vectors = np.linalg.eigh(curvature)
    if values[0] > 0:
        centre = -np.linalg.solve(curvature, shown.slope.numpy())
        lowered = -0.5 * float(shown.slope.numpy() @ centre)
        radii = np.sqrt(2 * (rise + lowered) / values)
        points = centre[:, None] + vectors @ (radii[:, None] * np.stack([np.cos(angles), np.sin(angles)]))
        ax.plot(*points, color=GREY, linestyle="--", linewidth=1.2, label=f"quadratic model: +{rise:.2g}")
    if shown.limits is not None and all(math.isfinite(limit) and limit > 0 for limit in shown.limits):
        width, height = (math.sqrt(2 * rise / limit) for limit in shown.limits)
        circle = (width * np.cos(angles), height * np.sin(angles))
        ax.plot(*circle, color=ORANGE, linestyle="--", linewidth=1.2, label=f"as curved as is stable: +{rise:.2g}")


def _surface(shown: Landscape, ax: Axes | None) -> Axes:
    if ax is None:
        import matplotlib.pyplot as plt

        ax = plt.figure(layout="constrained").add_subplot(projection="3d")
    if ax.name != "3d":
        raise ValueError("a surface needs axes of three dimensions: fig.add_subplot(projection='3d')")
    axes: Any = ax
    x, y = np.meshgrid(shown.axes[0].numpy(), shown.axes[1].numpy(), indexing="ij")
    losses = shown.losses.numpy()
    axes.plot_surface(x, y, np.where(np.isfinite(losses), losses, np.nan), cmap="Blues", alpha=0.85, linewidth=0)
    if shown.path is not None and shown.path_losses is not None:
        axes.plot(shown.path[:, 0].numpy(), shown.path[:, 1].numpy(), shown.path_losses.numpy(), "o-", color=PURPLE, markersize=3)
    axes.plot([0], [0], [shown.loss], "*", color=GREEN, markersize=11)
    axes.set(xlabel=_label(shown, 0), ylabel=_label(shown, 1), zlabel="loss")
    return ax
