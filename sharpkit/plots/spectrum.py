"""Pictures of measurements: spectral density, curvature over training, layers, learning rate against batch size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from sharpkit.plots import BLUE, GREEN, GREY, ORANGE, axes_for, finish

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from sharpkit.linalg.results import SpectralDensity
    from sharpkit.measuring.history import CurvatureHistory
    from sharpkit.measuring.layers import LayerSharpness


_FAR = 2.0  # widths of the spectrum beyond its end where a limit is off the picture, by judgement
_MOST_LABELS = 6  # outliers with their value, by judgement: more overlap


def plot_density(
    density: SpectralDensity, *, ax: Axes | None = None, lr: float | None = None, limit: float | None = None, title: str | None = None
) -> Axes:
    """The bulk of the spectrum as a log density, its outliers as separate stems with their values.

    Args:
        density: from :func:`sharpkit.spectral_density`.
        ax, title: where to draw (by default a new figure), and the title of those axes, which are returned.
        lr: learning rate of plain gradient descent; draws its stability limit 2/lr.
        limit: the stability limit itself, where it is not 2/lr (momentum); wins over ``lr``.

    Raises:
        ValueError: ``lr`` or ``limit`` is not positive.

    Example:
        >>> import matplotlib; matplotlib.use("Agg")
        >>> import torch, sharpkit as sk
        >>> A = sk.as_operator(torch.diag(torch.cat([torch.linspace(0, 1, 99), torch.tensor([8.0])])).double())
        >>> ax = plot_density(sk.spectral_density(A, num_probes=4, num_steps=30), lr=0.2)
        >>> ax.get_yscale()
        'log'
    """
    for name, value in (("lr", lr), ("limit", limit)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    ax = axes_for(ax)
    grid, heights, bandwidth = _bulk(density)
    floor = 0.1 / (density.size * bandwidth * math.sqrt(2 * math.pi))  # a tenth of one single eigenvalue's peak
    shown = np.maximum(heights, floor)
    ax.fill_between(grid, floor, shown, color=BLUE, alpha=0.25, linewidth=0)
    ax.plot(grid, shown, color=BLUE, linewidth=1.4, label="bulk")
    ax.set_yscale("log")
    ax.set_ylim(floor, max(float(shown.max()), floor * 10) * 4)  # by judgement: at least a decade, and room for the legend
    ax.axvline(0.0, color=GREY, linewidth=0.8)  # what is left of it is negative curvature
    bound = limit if limit is not None else (2 / lr if lr is not None else None)
    outliers = [float(x) for x in density.outliers]
    _draw_outliers(ax, outliers)
    if bound is not None:
        _draw_limit(ax, bound, min(0.0, float(grid[0]), *outliers), max(0.0, float(grid[-1]), *outliers))
    # outliers stand at both sides, and the legend over the bulk hides none of their values
    return finish(ax, x="eigenvalue (loss / parameter²)", y="density (share / unit eigenvalue)", title=title, legend="upper center")


def _bulk(density: SpectralDensity) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], float]:
    """Grid (m,), density on it with the outliers' own peaks cut away, and the bandwidth."""
    nodes, outliers = density.nodes.numpy().ravel(), density.outliers.numpy()
    nodes = nodes[density.weights.numpy().ravel() > 0]  # probes that ended early are padded with nodes of weight 0
    width = float(nodes.max() - nodes.min())
    inner = nodes[np.all(np.abs(nodes[:, None] - outliers[None, :]) > 1e-3 * width, axis=1)] if width else nodes
    inner = inner if len(inner) else nodes  # every node an outlier (low rank): their peaks are the bulk
    bandwidth = density.bandwidth
    # three bandwidths: a Gaussian's visible end; 800 points: about one a pixel, by judgement
    grid = np.linspace(float(inner.min()) - 3 * bandwidth, float(inner.max()) + 3 * bandwidth, 800)
    return grid, density.density(grid, bandwidth=bandwidth), bandwidth


def _draw_limit(ax: Axes, limit: float, low: float, high: float) -> None:
    """The limit as a line, or, far beyond a spectrum from ``low`` to ``high``, as a mark at the edge: else the spectrum would be a line."""
    words = f"stability limit {limit:.3g}"
    if limit - high <= _FAR * (high - low):
        ax.axvline(limit, color=ORANGE, linestyle="--", linewidth=1.4, label=words)
        return
    ax.plot([], [], color=ORANGE, linestyle="--", linewidth=1.4, label=f"{words}, {limit / high:.3g} times as far" if high > 0 else words)
    place: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "axes fraction", "ha": "right", "va": "center"}
    ax.annotate("", (1.0, 0.5), (0.93, 0.5), arrowprops={"color": ORANGE, "arrowstyle": "-|>"}, **place)
    ax.annotate(f"{limit:.3g}", (0.93, 0.5), (0.92, 0.5), color=ORANGE, fontsize="small", **place)


def _draw_outliers(ax: Axes, outliers: list[float]) -> None:
    """Stems of fixed height in axes units: an outlier is one eigenvalue, its height carries no number."""
    if not outliers:
        return
    transform = ax.get_xaxis_transform()
    ax.vlines(outliers, 0, 0.3, colors=GREEN, linewidth=1.2, transform=transform)
    ax.plot(outliers, [0.3] * len(outliers), "o", color=GREEN, markersize=4, transform=transform, label=f"outliers ({len(outliers)})")
    low, high = min(ax.get_xlim()[0], *outliers), max(ax.get_xlim()[1], *outliers)
    labelled: list[float] = []
    for value in sorted(outliers, key=abs, reverse=True):
        crowded = any(abs(value - other) < 0.025 * (high - low) for other in labelled)  # a line of x-small text, by judgement
        if crowded or len(labelled) == _MOST_LABELS:
            continue
        labelled.append(value)
        place: dict[str, Any] = {"xytext": (0, 5), "textcoords": "offset points", "ha": "center", "va": "bottom"}
        ax.annotate(f"{value:.3g}", (value, 0.3), xycoords=transform, rotation=90, fontsize="x-small", **place)


def plot_curvature(history: CurvatureHistory, *, ax: Axes | None = None, title: str | None = None) -> Axes:
    """lambda_max with its error over training steps, and the stability limit as a dashed line.

    Args:
        history: one training run.
        ax: where to draw; by default a new figure. Call it again with the same axes to lay runs over each other.
        title: of those axes, which are returned.

    Example:
        >>> import matplotlib; matplotlib.use("Agg")
        >>> import sharpkit as sk
        >>> run = sk.CurvatureHistory((0, 10), (1.0, 0.5), (3.0, 19.0), (0.1, 0.1), (20.0, 20.0), (0.1, 0.1))
        >>> plot_curvature(run).get_xlabel()
        'optimizer steps'
    """
    ax = axes_for(ax)
    look: dict[str, Any] = {"color": BLUE, "marker": "o", "markersize": 3.5, "linewidth": 1.5, "capsize": 2}
    ax.errorbar(history.steps, history.lambda_max, yerr=history.residual, label=f"lambda_max, {history.name}", **look)
    ax.plot(history.steps, history.limit, color=ORANGE, linestyle="--", linewidth=1.4, label=f"stability limit {history.limit_rule}")
    values = [v for v in (*history.lambda_max, *history.limit) if math.isfinite(v)]
    # by judgement: up to two decades a linear axis from 0 shows how far the limit is; beyond them the low part would be flat
    if values and min(values) > 0 and max(values) > 100 * min(values):
        ax.set_yscale("log")
    else:
        ax.set_ylim(bottom=min(0.0, *values) if values else 0.0)
    return finish(ax, x="optimizer steps", y="lambda_max (loss / parameter²)", title=title)


def plot_layers(layers: LayerSharpness, *, ax: Axes | None = None, title: str | None = None) -> Axes:
    """Bars of lambda_max and trace for each layer, with their errors; logarithmic where the values span more than a decade and a half.

    Args:
        layers: from :func:`sharpkit.per_layer`.
        ax, title: where to draw (by default a new figure), and the title of those axes, which are returned; the first layer is on top.

    Example:
        >>> import matplotlib; matplotlib.use("Agg")
        >>> import sharpkit as sk
        >>> one, two = sk.Estimate(1.0, 0.1), sk.Estimate(2.0, 0.1)
        >>> layers = sk.LayerSharpness(("conv", "head"), (10, 20), (one, two), (two, two), num_matvecs=40)
        >>> [label.get_text() for label in plot_layers(layers).get_yticklabels()]
        ['conv', 'head']
    """
    ax = axes_for(ax)
    rows = np.arange(len(layers.names))
    for offset, estimates, color, label in ((-0.2, layers.lambda_max, BLUE, "lambda_max"), (0.2, layers.trace, GREEN, "trace")):
        errors = [e.stderr if math.isfinite(e.stderr) else 0.0 for e in estimates]  # an unknown error gets no whisker
        look: dict[str, Any] = {"height": 0.36, "color": color, "label": label, "error_kw": {"ecolor": GREY, "capsize": 2}}
        ax.barh(rows + offset, [e.value for e in estimates], xerr=errors, **look)
    values = np.array([e.value for e in (*layers.lambda_max, *layers.trace)])
    sizes = np.abs(values[values != 0])
    if len(sizes) and sizes.max() > 30 * sizes.min():
        if (values > 0).all():
            ax.set_xscale("log")
        else:  # traces may be negative; linear within a thousandth of the largest, by judgement
            ax.set_xscale("symlog", linthresh=float(sizes.max()) / 1000)
    ax.set_yticks(rows, labels=list(layers.names))
    ax.invert_yaxis()
    return finish(ax, x="curvature of the layer's block (loss / parameter²)", title=title)


def plot_learning_rate_curve(document: Mapping[str, Any], *, ax: Axes | None = None, title: str | None = None) -> Axes:
    """Largest stable learning rate against batch size, log-log: curve with interval, calibrating runs, limit by curvature, rule.

    Args:
        document: ``LearningRateCurve.to_dict()``.
        ax, title: where to draw (by default a new figure), and the title of those axes, which are returned.

    Example:
        >>> import matplotlib; matplotlib.use("Agg")
        >>> row = {"max_lr": 0.1, "max_lr_lower": 0.05, "max_lr_upper": 0.2, "by_curvature": 0.1}
        >>> rows = [{"batch_size": b, **row} for b in (8, 64)]
        >>> document = {"rows": rows, "anchors": [], "crossover": {"value": 8}, "exponent": 1.0, "optimizer": "SGD"}
        >>> plot_learning_rate_curve(document).get_xscale()
        'log'
    """
    ax = axes_for(ax)
    rows = document["rows"]
    sizes = np.array([row["batch_size"] for row in rows], dtype=float)
    names = ("max_lr", "max_lr_lower", "max_lr_upper", "by_curvature")
    rates, lower, upper, theory = (np.array([row[name] for row in rows], dtype=float) for name in names)
    ax.fill_between(sizes, lower, upper, color=BLUE, alpha=0.15, linewidth=0, label="95 % interval")
    ax.plot(sizes, rates, color=BLUE, linewidth=1.8, marker="o", markersize=3.5, label=f"largest stable rate, {document['optimizer']}")
    if np.isfinite(theory).any():  # with batch norm in train mode there is none
        label = f"mean-square limit {document.get('point', 'after the pilot')}"
        ax.plot(sizes, theory, color=GREY, linestyle=":", linewidth=1.4, label=label)
    for anchor in document["anchors"]:
        ax.vlines(anchor["batch_size"], anchor["trained"], anchor["broke"], color=GREEN, linewidth=4, alpha=0.7)
    if document["anchors"]:
        ax.plot([], [], color=GREEN, linewidth=4, alpha=0.7, label="short runs: trained to broke")
    rule = rates[0] * (sizes / sizes[0]) ** document["exponent"]
    name = "square-root" if document["exponent"] == 0.5 else "linear"
    shown = rule <= 3 * upper.max()  # by judgement: a rule that has left the curve would only press it flat
    ax.plot(sizes[shown], rule[shown], color=ORANGE, linestyle="--", linewidth=1.2, label=f"{name} rule")
    cross = float(document["crossover"]["value"])
    if sizes[0] < cross < sizes[-1]:  # one outside the sizes measured is an extrapolation
        ax.axvline(cross, color=GREY, linewidth=0.8)
        ax.annotate(f"B* = {cross:.0f}", (cross, lower.min()), xytext=(4, 4), textcoords="offset points", color=GREY, fontsize=8)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    return finish(ax, x="batch size (samples)", y="largest stable learning rate", title=title)
