"""Pictures of runs: a monitored run, a learner's run, a race, the runs behind a suggested rate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from sharpkit._results import number
from sharpkit.learner.rollback import tells_of_return
from sharpkit.monitor.schema import Reading, in_words, limit_matrix, main_curvature, reading
from sharpkit.plots import BLUE, GREEN, GREY, OCHRE, ORANGE, PINK, PURPLE, TEAL, _stack, axes_for, finish

if TYPE_CHECKING:
    from matplotlib.axes import Axes


Document = Mapping[str, Any]
Array = np.ndarray[Any, Any]

_MOST_PANELS = 6  # by judgement: more are too flat to read on a page
_MOST_POINTS = 600  # of a line, by judgement about one a pixel; beyond it the lowest and highest of each stretch are drawn
_MOST_BARS = 80  # error bars, by judgement; more run into each other, and a band is drawn
_RUN_COLOURS = (BLUE, GREEN, PURPLE, PINK, TEAL, OCHRE)  # without the orange of limits
_RUN_MARKS = ("o", "s", "^", "D")  # of the seventh run on: colours come again, marks tell them apart
_ON_STEPS = ("critical_sharpness", "directional_sharpness", "batch_sharpness")  # along the optimizer's own steps
_PLAIN = ("lambda_max", "probe_lambda_max", "gradient_noise_interaction", "lambda_min")


def metrics_of(records: Sequence[Document]) -> list[str]:
    """Every metric of the records, in the order they first came.

    Example:
        >>> metrics_of([{"values": {"trace": {}}}, {"values": {"lambda_max": {}, "trace": {}}}])
        ['trace', 'lambda_max']
    """
    return list(dict.fromkeys(name for record in records for name in record["values"]))


def panels_of(document: Document) -> list[tuple[str, list[str]]]:
    """Which metrics share axes: (label of the axis, metrics) from top to bottom, without the loss.

    The first holds the curvature that the limit is one on, with everything in its units.

    Args:
        document: of a monitored run.
    """
    records = document["records"]
    names, main = metrics_of(records), main_curvature(records)
    # An adaptive optimizer's limit is on D^-1 H, which has no units, one of groups that differ on R H, one in the steps' own norm on
    # d^T H d: none of them shares axes with H.
    preconditioned = main in ("generalized_sharpness", "preconditioned_lambda_max")
    plain = [n for n in names if n in _PLAIN or _is_ranked(n)]
    along = [n for n in names if n in _ON_STEPS]
    first = [main] if preconditioned else [*along, *plain]
    first = sorted(first, key=lambda n: n != main) if main in first else first
    layers = [n for n in names if "/" in n]
    matrix = limit_matrix(document.get("header"))
    own = f"curvature of {matrix}" if matrix else "preconditioned curvature"
    own = "sharpness in\nthe steps' norm" if main == "generalized_sharpness" else own
    panels = [(own, first)] if preconditioned else []
    panels = panels or [("curvature (loss / parameter²)", first)]
    panels += [("along the steps", along), ("Hessian\n(loss / parameter²)", plain)] if preconditioned else []
    panels.append(("by layer\n(loss / parameter²)", layers))
    units = {"trace": "trace\n(loss / parameter²)", "noise_scale": "noise scale\n(samples)"}
    panels += [(units.get(n, n), [n]) for n in names if n not in (*first, *along, *plain, *layers)]
    return [(label, members) for label, members in panels if members][:_MOST_PANELS]


def figure_size(document: Document) -> tuple[float, float]:
    """Inches that the panels of a run ask for."""
    return 10.5, 3.6 + 1.7 * len(panels_of(document))


def plot_monitor(document: Document, *, ax: Axes | None = None, title: str | None = None) -> Axes:
    """Curvature over steps with error bars and the dashed limit of the learning rate in use; other metrics and the loss on axes below.

    Events are numbered in the order of the report's list; a metric that failed is marked at the lower edge.

    Args:
        document: ``history.to_dict()`` of a monitor, or of a file read by ``sk.sinks.read_run``.
        ax: whose place to take; it becomes the uppermost axes (those of the curvature, which are returned), the others go under it. By
            default a new figure.
        title: of those axes.

    Raises:
        ValueError: no records.

    Example:
        >>> import matplotlib; matplotlib.use("Agg")
        >>> entry = {"value": 19.0, "stderr": 0.5, "limit": 20.0}
        >>> records = [{"step": step, "loss": 1.0, "values": {"lambda_max": entry}} for step in (0, 10)]
        >>> plot_monitor({"kind": "monitor_history", "records": records}).get_ylabel()
        'curvature (loss / parameter²)'
    """
    records = document["records"]
    if not records:
        raise ValueError("the run has no records yet: nothing to draw")
    panels = panels_of(document)
    ax = axes_for(ax, figure_size(document))
    losses = [(int(r["step"]), number(r.get("loss"))) for r in records]
    losses = [(step, loss) for step, loss in losses if math.isfinite(loss)]
    # by judgement: the curvature, which is what the run is judged by, more than twice as high as what goes with it
    axes = _stack(ax, [3.0, *[1.3] * (len(panels) - 1), *[1.3] * bool(losses)] if panels else [1.0])
    for below, (label, names) in zip(axes, panels, strict=False):
        _draw_panel(below, document, names, label)
    if losses:
        _draw_loss(axes[-1], losses)
    _mark_failures(ax, records)
    _mark_events(axes, [event for record in records for event in record.get("events", ())])
    axes[-1].set_xlabel("optimizer steps")
    figure: Any = ax.figure
    figure.align_ylabels(axes)  # or each panel's label stands as far out as its own tick labels are wide
    for upper in axes[:-1]:
        upper.tick_params(labelbottom=False)
    if title:
        ax.set_title(title, pad=18)  # points: above the numbers of the events
    return ax


def plot_runs_together(documents: Mapping[str, Document], *, ax: Axes | None = None) -> Axes:
    """Several monitored runs on the same axes: the curvature each is judged by with its dashed limit, and the losses below.

    A run has one colour throughout, by its place: a run added at the end leaves the others' as they are. Where runs are judged by different
    metrics, which share no units, the shares of their limits are drawn instead.

    Args:
        documents: ``history.to_dict()`` of each monitored run, by the name in the legend.
        ax: as for :func:`plot_monitor`.

    Raises:
        ValueError: none of the runs holds a curvature.

    Example:
        >>> import matplotlib; matplotlib.use("Agg")
        >>> def run(value):
        ...     entry = {"value": value, "stderr": 0.5, "limit": 20.0}
        ...     return {"kind": "monitor_history", "records": [{"step": step, "values": {"lambda_max": entry}} for step in (0, 10)]}
        >>> plot_runs_together({"slow": run(19.0), "fast": run(8.0)}).get_ylabel()
        'lambda_max'
    """
    mains = {name: main_curvature(document["records"]) for name, document in documents.items()}
    judged = {name: main for name, main in mains.items() if main}
    if not judged:
        raise ValueError("none of the runs holds a curvature: nothing to draw")
    same = len(set(judged.values())) == 1
    losses = {
        name: [(int(r["step"]), loss) for r in document["records"] if math.isfinite(loss := number(r.get("loss")))]
        for name, document in documents.items()
    }
    ax = axes_for(ax, (10.5, 5.2))
    axes = _stack(ax, [3.0, 1.6] if any(losses.values()) else [1.0])  # by judgement, nearly as for one run
    drawn: list[float] = []
    for place, (name, document) in enumerate(documents.items()):
        colour, look = _RUN_COLOURS[place % len(_RUN_COLOURS)], _RUN_MARKS[place // len(_RUN_COLOURS) % len(_RUN_MARKS)]
        readings = [r for record in document["records"] if (r := reading(record, judged.get(name, ""))) is not None]
        steps, values, limits = (np.array([getattr(r, part) for r in readings], dtype=float) for part in ("step", "value", "limit"))
        shown = values if same else values / limits
        axes[0].plot(*_thinned(steps, shown), color=colour, linewidth=1.4, marker=look, markersize=3.5, label=name)
        drawn += [float(v) for v in shown if math.isfinite(v)]
        if same and np.isfinite(limits).any():
            axes[0].plot(*_held(steps, limits), color=colour, linewidth=1.0, linestyle="--")
            drawn += [float(v) for v in limits if math.isfinite(v)]
        if losses[name]:
            at, fell = (np.array(column) for column in zip(*losses[name], strict=True))
            axes[-1].plot(*_thinned(at, fell), color=colour, linewidth=1.3, marker=look, markersize=3)
    if not same:
        axes[0].axhline(1, color=ORANGE, linewidth=1.5, linestyle="--")
    axes[0].set_ylabel(next(iter(judged.values())) if same else "share of the limit")
    _scale(axes[0], drawn)
    finish(axes[0])
    if len(axes) > 1:
        every = [loss for series in losses.values() for _, loss in series]
        if min(every) > 0 and max(every) > 20 * min(every):  # by judgement, as for one run
            axes[-1].set_yscale("log")
        axes[-1].set_ylabel("loss")
        axes[0].tick_params(labelbottom=False)
        finish(axes[-1])
    axes[-1].set_xlabel("optimizer steps")
    figure: Any = ax.figure
    figure.align_ylabels(axes)
    return ax


def _is_ranked(name: str) -> bool:
    """lambda_1, lambda_2, ... of the top k."""
    return name.startswith("lambda_") and name[7:].isdigit()


def _draw_panel(ax: Axes, document: Document, names: list[str], label: str) -> None:
    colours = cycle((BLUE, GREEN, PURPLE, PINK, TEAL, OCHRE))
    limits: list[tuple[str, str, dict[int, float]]] = []  # metric in words, colour, limit by step
    drawn: list[float] = []
    for name in names:
        readings = [r for r in (reading(record, name) for record in document["records"]) if r is not None]
        if not readings:
            continue
        said = in_words(name, document.get("header"))
        ranked, layer = _is_ranked(name), "/" in name  # many lines of one kind: thin, and the ranks share one colour and one label
        colour = GREY if ranked else next(colours)
        text = said if not ranked else ("largest eigenvalues" if name == min(filter(_is_ranked, names)) else "_")
        drawn += _draw_series(ax, readings, colour, text, thin=ranked or layer)
        own = {r.step: r.limit for r in readings}
        if np.isfinite([*own.values()]).any() and not (ranked or layer):
            limits.append((said, colour, own))
    _draw_limits(ax, limits)
    _scale(ax, [*drawn, *(x for *_, own in limits for x in own.values() if math.isfinite(x))])
    ax.set_ylabel(label)
    finish(ax)
    handles, labels = ax.get_legend_handles_labels()
    if len(handles) > 5:  # by judgement: a longer column would cover the lines
        ax.legend(handles, labels, frameon=False, fontsize="x-small", ncols=2)


def _draw_limits(ax: Axes, limits: list[tuple[str, str, dict[int, float]]]) -> None:
    """The limit of the first metric in the limits' colour; those that differ from it in the colours of their metrics."""
    others = [entry for entry in limits[1:] if not _agree(entry[2], limits[0][2])]  # the same line twice would only hide the first
    for i, (name, colour, own) in enumerate([*limits[:1], *others]):
        look = {"color": colour, "linewidth": 1.0} if i else {"color": ORANGE, "linewidth": 1.5}
        text = f"limit of {name}" if others else "stability limit"
        ax.plot(*_held(np.array([*own]), np.array([*own.values()])), linestyle="--", label=text, **look)  # type: ignore[arg-type]


def _agree(one: dict[int, float], other: dict[int, float]) -> bool:
    # Metrics may be measured at different steps. 1e-3: closer ones lie on one another in the picture, by judgement.
    common = [step for step in one.keys() & other.keys() if math.isfinite(one[step] + other[step])]
    if not common:
        return math.isclose(float(np.nanmedian([*one.values()])), float(np.nanmedian([*other.values()])), rel_tol=1e-3)
    return all(math.isclose(one[step], other[step], rel_tol=1e-3) for step in common)


def _draw_series(ax: Axes, readings: list[Reading], colour: str, label: str, *, thin: bool) -> list[float]:
    """One metric; returns the values that the axis must hold."""
    steps, values = np.array([r.step for r in readings]), np.array([r.value for r in readings])
    errors = np.array([r.stderr if math.isfinite(r.stderr) else 0.0 for r in readings])
    if thin:
        ax.plot(*_thinned(steps, values), color=colour, linewidth=0.9, alpha=0.8, label=label)
    elif len(steps) <= _MOST_BARS:
        ax.errorbar(steps, values, yerr=errors, color=colour, marker="o", markersize=3, linewidth=1.4, capsize=2, label=label)
    else:
        x, y = _thinned(steps, values)
        ax.plot(x, y, color=colour, linewidth=1.3, label=label)
        if errors.max() > 0:  # both ends are thinned by themselves, so that the widest error of a stretch is not lost
            _, low = _thinned(steps, values - errors)
            at, high = _thinned(steps, values + errors)
            ax.fill_between(at, np.interp(at, _, low), high, color=colour, alpha=0.22, linewidth=0)
    return [float(v) for v in values]


def _draw_loss(ax: Axes, losses: list[tuple[int, float]]) -> None:
    steps, values = (np.array(column) for column in zip(*losses, strict=True))
    ax.plot(*_thinned(steps, values), color=GREY, linewidth=1.3, marker="o" if len(steps) <= _MOST_BARS else "", markersize=2.5)
    if values.min() > 0 and values.max() > 20 * values.min():  # by judgement: more and the end of a linear curve lies on the axis
        ax.set_yscale("log")
    ax.set_ylabel("loss")
    finish(ax)


def _scale(ax: Axes, values: list[float]) -> None:
    if not values:
        return
    if min(values) > 0 and max(values) > 30 * min(values):  # by judgement, as for the loss; from 0 where the distance to a limit shows
        ax.set_yscale("log")
    else:
        ax.set_ylim(bottom=min(0.0, 1.1 * min(values)))


def _held(steps: Array, limits: Array) -> tuple[Array, Array]:
    """A limit as steps: it holds until the next measurement says otherwise. Only its corners, so that long runs stay small."""
    keep = np.ones(len(steps), dtype=bool)
    keep[1:-1] = (limits[1:-1] != limits[:-2]) | (limits[1:-1] != limits[2:])
    return _thinned(steps[keep], limits[keep])


def _thinned(steps: Array, values: Array) -> tuple[Array, Array]:
    """The lowest and highest of each stretch of a long series, so that no spike is lost."""
    if len(steps) <= _MOST_POINTS:
        return steps, values
    kept: set[int] = {0, len(steps) - 1}
    for part in np.array_split(np.arange(len(steps)), _MOST_POINTS // 2):  # two points from each stretch
        known = part[np.isfinite(values[part])] if np.isfinite(values[part]).any() else part[:1]
        kept |= {int(known[np.argmin(values[known])]), int(known[np.argmax(values[known])])}
    index = sorted(kept)
    return steps[index], values[index]


# -- marks ----------------------------------------------------------------------------------------------------------------------


def _mark_failures(ax: Axes, records: Sequence[Document]) -> None:
    steps = [record["step"] for record in records if record.get("failed")]
    if steps:
        ax.plot(steps, [0.02] * len(steps), "x", color=ORANGE, markersize=5, transform=ax.get_xaxis_transform(), label="a metric failed")
        ax.legend(frameon=False, fontsize="small", loc="best")


def _mark_events(axes: list[Axes], events: Sequence[Document]) -> None:
    """A dotted line through all axes at each event and its number above; numbers that would collide share one label."""
    if not events:
        return
    low, high = axes[0].get_xlim()
    groups: list[tuple[float, list[int]]] = []
    for index, event in enumerate(events, start=1):
        step = float(event["step"])
        if not groups or step - groups[-1][0] > 0.022 * (high - low):  # by judgement: two digits in the page's type
            groups.append((step, []))
        groups[-1][1].append(index)
    for step, members in groups:
        for ax in axes:
            ax.axvline(step, color=GREY, linestyle=":", linewidth=0.9, zorder=0.5)  # under every curve
        text = str(members[0]) if len(members) == 1 else f"{members[0]}-{members[-1]}"
        place: dict[str, Any] = {"xycoords": axes[0].get_xaxis_transform(), "ha": "center", "va": "bottom", "fontsize": 8}
        axes[0].annotate(text, (step, 1.02), **place, bbox={"boxstyle": "round,pad=0.2", "fc": "none", "ec": GREY, "lw": 0.8})


def plot_learner(document: Mapping[str, Any], *, ax: Axes | None = None) -> Axes:
    """The learned rate and the limit against the steps of a learner's history, logarithmic; ``ax`` is a new figure's by default.

    Example:
        >>> decision = {"step": 1, "lr": 0.1, "lr_in_use": 0.1, "max_lr": 0.4, "reason": "grows"}
        >>> plot_learner({"decisions": [decision]}).get_xlabel()
        'optimizer step'
    """
    ax = axes_for(ax, (6.4, 3.8))
    rows = document["decisions"]
    steps = [int(row["step"]) for row in rows]
    limits = [(s, number(row["max_lr"])) for s, row in zip(steps, rows, strict=True) if math.isfinite(number(row["max_lr"]))]
    ax.plot(*zip(*limits, strict=True), "--", color=GREY, marker="_", label="stability limit on the batch") if limits else None
    ax.plot(steps, [number(row["lr"]) for row in rows], color=BLUE, marker="o", markersize=3, label="learned rate, before decay")
    ax.plot(steps, [number(row["lr_in_use"]) for row in rows], color=ORANGE, linewidth=1, label="rate of the next step")
    back = [(s, number(row["lr"])) for s, row in zip(steps, rows, strict=True) if tells_of_return(row["reason"])]
    if back:
        ax.plot(*zip(*back, strict=True), "v", color=PINK, label="went back")
    if any(number(row["lr"]) > 0 for row in rows):
        ax.set_yscale("log")
    return finish(ax, x="optimizer step", y="learning rate")


_COLOURS = (ORANGE, GREEN, PURPLE, PINK, TEAL, OCHRE)


def plot_race(document: Mapping[str, Any], *, ax: Axes | None = None) -> Axes:
    """Batch losses of a race's first seed, averaged over stretches; a gap is what was spent on finding a rate.

    Example:
        >>> finish = {"name": "learner", "given": False, "curve": [[1, 2.0], [2, 1.0]], "train_losses": [1.0]}
        >>> plot_race({"finishes": [finish]}).get_xlabel()
        'gradients spent, with those on finding the rate'
    """
    ax = axes_for(ax, (7.2, 4.4))
    finishes = document["finishes"]
    others = [f for f in finishes if not f["given"] and f["name"] != "learner"]
    given = [f for f in finishes if f["given"] and all(math.isfinite(number(v)) for v in f["train_losses"])]
    for position, entrant in enumerate(given):  # finishes are sorted: the first is the best, which nobody knows before having run all
        best = position == 0
        label = f"{entrant['name']} (given, the best of them)" if best else "other given rates" if position == 1 else None
        _draw(ax, entrant, color="#30343b" if best else GREY, linewidth=1.4 if best else 0.6, alpha=1 if best else 0.5, label=label)
    for entrant, colour in zip(others, _COLOURS, strict=False):
        _draw(ax, entrant, color=colour, linewidth=1.3, label=entrant["name"])
    for entrant in finishes:
        if entrant["name"] == "learner":  # last, so that no other line covers it
            _draw(ax, entrant, color=BLUE, linewidth=2.4, label="learner")
    lows, highs = _range(finishes)
    if lows > 0:
        ax.set_yscale("log")
        ax.set_ylim(lows / 1.3, highs * 1.3)  # by judgement: a margin on a log axis is a factor
    return finish(ax, x="gradients spent, with those on finding the rate", y="training loss of the batch")


def _draw(ax: Axes, entrant: Mapping[str, Any], **style: Any) -> None:
    points = [(number(x), number(y)) for x, y in entrant["curve"] if math.isfinite(number(y))]
    if points:
        ax.plot(*zip(*points, strict=True), **style)


def _range(finishes: Any) -> tuple[float, float]:
    """Of the losses shown; a loss far above all first ones is off the picture."""
    curves = [[number(y) for _, y in f["curve"] if math.isfinite(number(y))] for f in finishes]
    curves = [curve for curve in curves if curve]
    if not curves:
        return 0.0, 1.0
    # a search averages over rates that diverge: 3 times the lowest first loss is no start, by judgement
    return min(map(min, curves)), max(curve[0] for curve in curves if curve[0] <= 3 * min(c[0] for c in curves))


def plot_suggestion(document: Mapping[str, Any], *, ax: Axes | None = None) -> Axes:
    """What a growing rate did to the loss, with the rate at which it was lost, the suggested rate and its interval.

    Example:
        >>> ends = {"value": 0.1, "lower": 0.02, "upper": 0.5, "limit": 1.0, "present": 0.01, "optimizer": "SGD"}
        >>> plot_suggestion({**ends, "ramp": [[0.01, -0.1], [0.1, -0.5], [1.0, 3.0]]}).get_xscale()
        'log'
    """
    ax = axes_for(ax)
    points = [(number(x), number(y)) for x, y in document["ramp"] if math.isfinite(number(y))]
    rates, gains = zip(*points, strict=True)
    ax.axvspan(document["lower"], document["upper"], color=GREEN, alpha=0.12, linewidth=0, label="interval of the best rate")
    ax.plot(rates, gains, color=BLUE, linewidth=1.6, marker="o", markersize=3, label="loss of a batch, less the starting point's")
    ax.axhline(0, color=GREY, linewidth=0.8)
    ax.axvline(document["limit"], color=ORANGE, linestyle="--", linewidth=1.4, label=f"lost at {document['limit']:.3g}")
    ax.axvline(document["value"], color=GREEN, linewidth=2, label=f"suggested: {document['value']:.3g}")
    if document["present"] > 0:
        ax.axvline(document["present"], color=GREY, linestyle=":", linewidth=1.2, label=f"the optimizer's own: {document['present']:.3g}")
    ax.set_xscale("log")
    deepest = min(gains)
    ax.set_ylim(1.15 * deepest if deepest < 0 else -1.0, -0.8 * deepest if deepest < 0 else 1.0)  # by judgement: what is lost is far above
    return finish(ax, x=f"learning rate, {document['optimizer']}, growing from step to step", y="change of the loss (running mean)")
