"""Pictures of transfer: coordinate check, loss against learning rate by size, sharpness over time by size, the verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from sharpkit._results import number
from sharpkit.plots import BLUE, GREEN, GREY, OCHRE, ORANGE, PINK, PURPLE, _stack, axes_for, finish

if TYPE_CHECKING:
    from matplotlib.axes import Axes


_COLOURS = {"stable": BLUE, "grows": ORANGE, "vanishes": PURPLE, "unclear": GREY}
_NAMED = (PINK, OCHRE, GREEN)  # the worst ones, so that each can be found


def plot_coordinates(
    check: Any, *, ax: Axes | None = None, what: Literal["update", "initial"] = "update", step: int | None = None, title: str | None = None
) -> Axes:
    """RMS of each judged coordinate's update against width, a line each, mean over seeds; level lines are expected.

    Lines that grow are orange, those that vanish purple; the worst have a colour and a name with the exponent of the points shown, which is
    that of one step, where the check's is over all steps. Unjudged coordinates are left out.

    Args:
        check: a :class:`sharpkit.transfer.CoordinateCheck`.
        ax, title: where to draw (by default a new figure), and the title of those axes, which are returned.
        what: ``"update"`` for RMS(x_t - x_0), ``"initial"`` for RMS(x_0).
        step: t of the updates, by default the last step.

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
    ax = axes_for(ax, (6.4, 4.2))
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
    ax.set_title(title or f"coordinate check {'passed' if check.passed else 'failed'}: level lines are expected", fontsize="medium")
    return finish(ax, x=check.dimension, y=f"RMS of {f'x_{step} - x_0' if what == 'update' else 'x_0'} on a fixed batch")


def _group(verdict: str, coordinates: list[Any]) -> str:
    """For the legend, which a line of its own for every coordinate would flood: how many of the unnamed share the verdict."""
    return f"{verdict} ({sum(c.verdict == verdict for c in coordinates)})"


def _means(values: dict[int, list[list[float]]], step: int) -> dict[int, float]:
    """size -> geometric mean over seeds, where positive."""
    logs = {size: [math.log(run[step]) for run in runs if math.isfinite(run[step]) and run[step] > 0] for size, runs in values.items()}
    return {size: float(np.exp(np.mean(each))) for size, each in logs.items() if each}


Document = Mapping[str, Any]
_SHADES = ((0.56, 0.71, 0.90), (0.20, 0.13, 0.42))  # by judgement; narrow to wide: light to dark blue
_MOST_SHARE = 4.0  # of the limit, by judgement: early spikes beyond it are cut


def size_colours(count: int) -> list[tuple[float, float, float]]:
    """From light (the smallest size) to dark."""
    low, high = (np.array(c) for c in _SHADES)
    return [tuple(low + (high - low) * t) for t in (np.linspace(0, 1, count) if count > 1 else [0.5])]


def plot_learning_rate_transfer(document: Document, *, ax: Axes | None = None, title: str | None = None) -> Axes:
    """Loss against the factor on all learning rates, log-log, one curve for each size; bars below: each optimum with its 95 % interval.

    Args:
        document: ``LearningRateTransfer.to_dict()``.
        ax, title: where to draw (by default a new figure), and the title of those axes, which are returned.

    Example:
        >>> import matplotlib; matplotlib.use("Agg")
        >>> points = [{"log2": x, "losses": [1.0 + x * x], "diverged": 0} for x in (-1.0, 0.0, 1.0)]
        >>> best = {"log2": 0.0, "lower": -0.2, "upper": 0.2, "loss": 1.0}
        >>> document = {"dimension": "width", "steps": 10, "curves": [{"size": 64, "initial": 5.0, "points": points}], "optima": [best],
        ...             "drift": {"value": None, "half_width": None}}
        >>> plot_learning_rate_transfer(document).get_xlabel()
        'factor on all learning rates'
    """
    ax = axes_for(ax, (6.0, 4.2))
    curves, optima = document["curves"], document["optima"]
    colours = size_colours(len(curves))
    for curve, colour in zip(curves, colours, strict=True):
        x = [2.0 ** p["log2"] for p in curve["points"]]
        losses = [[number(v) for v in p["losses"]] for p in curve["points"]]
        mean = [float(np.mean(v)) for v in losses]
        ax.plot(x, mean, color=colour, linewidth=1.4, marker="o", markersize=3, label=f"{document['dimension']} {curve['size']}")
        for at, values in zip(x, losses, strict=True):
            ax.plot([at] * len(values), values, ".", color=colour, markersize=2.5, alpha=0.5)
        # a mean over runs of which one diverged is not comparable with its neighbours: the point is marked
        broke = [(at, m) for at, m, p in zip(x, mean, curve["points"], strict=True) if p["diverged"]]
        if broke:
            ax.plot(*zip(*broke, strict=True), "x", color=ORANGE, markersize=6, zorder=4)
    if any(p["diverged"] for c in curves for p in c["points"]):
        ax.plot([], [], "x", color=ORANGE, label="a run diverged")
    ax.set_xscale("log", base=2)
    if min(number(v) for c in curves for p in c["points"] for v in p["losses"]) > 0:
        ax.set_yscale("log")
    _draw_optima(ax, optima, colours)
    if ax.get_yscale() == "log":
        _plain_ticks(ax)  # after the strip, which has changed the limits that decide on the ticks
    drift, half = number(document["drift"]["value"]), number(document["drift"]["half_width"])
    if math.isfinite(drift):
        span = f" ± {half:.2f}" if math.isfinite(half) else ""
        text = f"drift {drift:+.2f}{span} octaves per doubling"
        ax.text(0.5, 1.01, text, transform=ax.transAxes, ha="center", va="bottom", fontsize="small", color=GREY)
    if title:
        ax.set_title(title, pad=18)  # points: above the line on the drift
    return finish(ax, x="factor on all learning rates", y=f"training loss, last quarter of {document['steps']} steps")


def _plain_ticks(ax: Axes) -> None:
    """Losses as plain numbers, between decades too where the axis spans little more than one."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = ax.get_ylim()
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    # by judgement: within a factor 1.6 steps of a fifth, else 2, 3 and 5 of a decade, unlabelled where there is more than 30
    between = np.arange(1.2, 10.0, 0.2).tolist() if high < 1.6 * low else [2.0, 3.0, 5.0]
    ax.yaxis.set_minor_locator(LogLocator(subs=between, numticks=50))
    ax.yaxis.set_minor_formatter(FuncFormatter(lambda v, _: f"{v:.3g}") if high < 30 * low else NullFormatter())


def _draw_optima(ax: Axes, optima: Sequence[Document], colours: Sequence[Any]) -> None:
    """Each optimum as a dot with its interval, stacked in a strip under the curves."""
    low, high = ax.get_ylim()
    strip = 0.045  # of the height for each size, by judgement
    if ax.get_yscale() == "log":
        ax.set_ylim(low / (high / low) ** (strip * (len(optima) + 1)), high)
    else:
        ax.set_ylim(low - (high - low) * strip * (len(optima) + 1), high)
    transform = ax.get_xaxis_transform()  # x as data, y as a share of the height, whatever the scale of the losses
    for i, (best, colour) in enumerate(zip(optima, colours, strict=True)):
        y = strip * (len(optima) - i) * 0.85
        ends = [2.0 ** number(best["lower"]), 2.0 ** number(best["upper"])]
        ax.plot(ends, [y, y], color=colour, linewidth=2.2, alpha=0.6, transform=transform, solid_capstyle="butt")
        ax.plot(2.0 ** number(best["log2"]), y, "D", color=colour, markersize=4, transform=transform)


def plot_sharpness_transfer(document: Document, *, ax: Axes | None = None, title: str | None = None) -> Axes:
    """Sharpness as a share of the stability limit over steps, one curve for each size; the limit dashed; the loss below.

    Args:
        document: ``SharpnessTransfer.to_dict()``.
        ax, title: whose place to take (the loss goes under it; by default a new figure), and the title of those axes, which are returned.

    Example:
        >>> import matplotlib; matplotlib.use("Agg")
        >>> document = {"dimension": "width", "sizes": [8], "steps": [0, 5], "warmup": 2, "matrix": "lambda_max of H",
        ...             "condition": "2 / lr", "limit": {"8": 2.0}, "lambda_max": {"8": [[0.5, 1.0]]}, "loss": {"8": [[1.0, 0.5]]}}
        >>> plot_sharpness_transfer(document).get_ylabel()
        'lambda_max of H / stability limit'
    """
    ax = axes_for(ax, (6.0, 5.0))
    upper, lower = _stack(ax, [3.0, 1.3])
    steps, sizes = np.array(document["steps"]), [str(s) for s in document["sizes"]]
    known = bool(document["condition"])
    for size, colour in zip(sizes, size_colours(len(sizes)), strict=True):
        scale = number(document["limit"][size]) if known else 1.0
        shares = np.array([[number(v) for v in run] for run in document["lambda_max"][size]]) / scale
        losses = np.array([[number(v) for v in run] for run in document["loss"][size]])
        upper.plot(steps, shares.mean(0), color=colour, linewidth=1.5, label=f"{document['dimension']} {size}")
        if len(shares) > 1:  # lowest to highest of the seeds: with two or three a standard deviation says less
            upper.fill_between(steps, shares.min(0), shares.max(0), color=colour, alpha=0.15, linewidth=0)
        lower.plot(steps, losses.mean(0), color=colour, linewidth=1.2)
    lines: list[Any] = [np.asarray(line.get_ydata(), dtype=float) for line in upper.get_lines()]
    shown = np.concatenate(lines)
    shown = shown[np.isfinite(shown)]
    if known:
        upper.axhline(1.0, color=ORANGE, linestyle="--", linewidth=1.4, label="stability limit")
        _set_share_limits(upper, shown)
    else:
        upper.set_ylim(bottom=0)
    upper.axvspan(steps[0], min(max(document["warmup"], steps[0]), steps[-1]), color=GREY, alpha=0.08, linewidth=0)
    upper.set_ylabel(f"{document['matrix']}{' / stability limit' if known else ''}")  # an unknown optimizer's limit is none
    upper.tick_params(labelbottom=False)
    lower.set_yscale("log" if np.nanmin(np.concatenate([np.ravel(line.get_ydata()) for line in lower.get_lines()])) > 0 else "linear")
    finish(lower, x="optimizer steps (grey: warm-up)", y="loss")
    return finish(upper, title=title)


def _set_share_limits(ax: Axes, shown: Any) -> None:
    """From zero; logarithmic where spikes of an adaptive optimizer's matrix go far beyond the limit, and cut there."""
    if not len(shown) or shown.max() <= _MOST_SHARE or shown.min() <= 0:
        ax.set_ylim(min(0.0, *shown.tolist()), min(_MOST_SHARE, max(1.1, 1.05 * float(shown.max()))) if len(shown) else 1.1)
        return
    ax.set_yscale("log")
    ax.set_ylim(0.6 * float(shown.min()), min(1.3 * float(shown.max()), 10.0))  # by judgement: a decade above the limit is off anyway


def plot_transfer_verdict(document: Document, *, ax: Axes | None = None, title: str | None = None) -> Axes:
    """All measurements of a verdict side by side.

    Args:
        document: ``Verdict.to_dict()``.
        ax: whose place to take; by default a new figure.
        title: of the first axes, which are returned; by default the verdict in short.

    Raises:
        ValueError: nothing was measured.

    Example:
        >>> import matplotlib; matplotlib.use("Agg")
        >>> points = [{"log2": x, "losses": [1.0 + x * x], "diverged": 0} for x in (-1.0, 0.0, 1.0)]
        >>> best = {"log2": 0.0, "lower": -0.2, "upper": 0.2, "loss": 1.0}
        >>> part = {"kind": "learning_rate_transfer", "dimension": "width", "steps": 10, "optima": [best],
        ...         "curves": [{"size": 64, "initial": 5.0, "points": points}], "drift": {"value": None, "half_width": None}}
        >>> plot_transfer_verdict({"passed": True, "parts": [part]}).get_title()
        'transfers'
    """
    parts = [part for part in document["parts"] if part["kind"] in _DRAW]
    if not parts:
        raise ValueError("the verdict holds no measurements: nothing to draw")
    ax = axes_for(ax, verdict_size(document))
    for place, part in zip(_row(ax, len(parts)), parts, strict=True):
        _DRAW[part["kind"]](part, place)
    ax.set_title(title or {True: "transfers", False: "does not transfer", None: "undecided"}[document["passed"]], pad=18)
    return ax


def verdict_size(document: Document) -> tuple[float, float]:
    """Inches that a verdict's picture asks for: by judgement, as wide a panel as those of single figures."""
    return max(5.8, 5.2 * sum(part["kind"] in _DRAW for part in document["parts"])), 4.6


def _row(ax: Axes, count: int) -> list[Axes]:
    """Axes beside ``ax``; together they take its place."""
    figure: Any = ax.figure
    spec = ax.get_subplotspec()
    if count == 1:
        return [ax]
    if spec is None:
        raise ValueError("axes made by hand have no place to share: pass axes of figure.add_subplot or of plt.subplots")
    inner = spec.subgridspec(1, count)  # within the given axes' own place: a subplot among others stays one
    ax.set_subplotspec(inner[0])
    return [ax, *(figure.add_subplot(inner[i]) for i in range(1, count))]


def _draw_coordinates(part: Document, ax: Axes) -> None:
    """The exponent of each coordinate's update with its error; the band is what counts as no change."""
    shown = [c for c in part["coordinates"] if math.isfinite(number(c["update"]["value"]))]
    colours = {"stable": GREEN, "grows": ORANGE, "vanishes": ORANGE}
    for row, c in enumerate(shown):
        half = number(c["update"]["half_width"])
        error = half if math.isfinite(half) else 0.0
        ax.errorbar(number(c["update"]["value"]), row, xerr=error, fmt="o", color=colours.get(c["verdict"], GREY), markersize=4, capsize=2)
    ax.axvspan(-part["tolerance"], part["tolerance"], color=GREEN, alpha=0.12, linewidth=0)
    # by judgement: the last 28 characters of a name tell modules apart, its first ones are shared
    ax.set_yticks(range(len(shown)), labels=[c["name"][-28:] for c in shown], fontsize="x-small" if len(shown) > 12 else "small")
    ax.invert_yaxis()  # the first module on top, as one reads a network
    finish(ax, x=f"a in RMS of update ~ {part['dimension']}^a (green band: no change)")


_DRAW: dict[str, Any] = {
    "coordinate_check": _draw_coordinates,
    "sharpness_transfer": lambda part, ax: plot_sharpness_transfer(part, ax=ax),
    "learning_rate_transfer": lambda part, ax: plot_learning_rate_transfer(part, ax=ax),
}
