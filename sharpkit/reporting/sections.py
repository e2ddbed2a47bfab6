"""One result as one section of the report page: key numbers, figure, table, findings. Works on ``to_dict()`` documents alone.

So a page made from results saved as JSON is the page made from the live objects. Each kind of result has one function here;
:func:`register_section` adds one for a kind of your own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from sharpkit._errors import DocumentError
from sharpkit._results import decimals, format_with_error, number, percent
from sharpkit.batch_size.branching import BatchBranching
from sharpkit.batch_size.warmup import BatchSizeWarmup
from sharpkit.fits import PowerLaw, Slope
from sharpkit.layerwise import RULES, LayerRates
from sharpkit.learner.baselines import LEARNER
from sharpkit.learner.race import COUNTING, RaceResult
from sharpkit.learner.rollback import tells_of_return
from sharpkit.linalg.results import Estimate, SpectralDensity
from sharpkit.measures.nearby import MSharpness
from sharpkit.measures.rounding import LayerSensitivity
from sharpkit.measuring.history import CurvatureHistory
from sharpkit.measuring.landscape import Landscape
from sharpkit.measuring.layers import LayerSharpness
from sharpkit.monitor.findings import run_findings
from sharpkit.monitor.schema import HISTORY, Reading, in_words, main_curvature, reading
from sharpkit.optimizers import operator_in
from sharpkit.reporting.documents import Document
from sharpkit.transfer.coordinates import CoordinateCheck


@dataclass
class Section:
    """What the report page, and the command line as text, show of one result.

    Attributes:
        title: the heading; a title given to :func:`sharpkit.report` takes its place.
        intro: one or two sentences under the heading.
        tiles: key numbers, each (name, value, remark).
        draw: draws the figure on the axes it is given.
        figure_label: what the figure shows, for readers who cannot see it.
        figure_size: width and height in inches.
        figure: the figure as inline SVG; the page fills it in.
        columns, rows: headings and cells of the table.
        findings: what the numbers say, in sentences.
        lists: further numbered lists, each (heading, sentences).
        cost: products and seconds spent.
        wide: whether the section takes the page's whole width.
    """

    title: str
    intro: str = ""
    tiles: list[tuple[str, str, str]] = field(default_factory=list)
    draw: Callable[[Any], Any] | None = None
    figure_label: str = ""
    figure_size: tuple[float, float] = (5.8, 3.6)  # by judgement: half the page, so that two sections stand side by side
    figure: str = ""
    columns: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    lists: list[tuple[str, list[str]]] = field(default_factory=list)
    cost: str = ""
    wide: bool = False


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:  # a bool first: it is an int too
        return {True: "yes", False: "no", None: "unknown"}[value]
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _flag(converged: bool) -> str:
    return "yes" if converged else "NO"


def _flagged(estimate: Estimate) -> str:
    return f"{estimate}" if estimate.converged else f"{estimate} (not converged)"


def _cost(document: Document) -> str:
    products = f"{document['num_matvecs']} matrix-vector products" if document.get("num_matvecs") is not None else ""
    seconds = f"{number(document['seconds']):.3g} s" if document.get("seconds") else ""
    return ", ".join(filter(None, (products, seconds)))


# -- one function per kind ----------------------------------------------------------------------------------------------------


def _estimate_section(document: Document) -> Section:
    estimate = Estimate.from_dict(document)
    section = Section(estimate.method or "Estimate", tiles=[("value", f"{estimate.value:.4g}", f"+- {estimate.stderr:.2g}")])
    section.columns = ["value +- standard error", "method", "products", "converged"]
    section.rows = [[str(estimate), estimate.method, str(estimate.num_matvecs), _flag(estimate.converged)]]
    return section


def _eigenpairs_section(document: Document) -> Section:
    section = Section(f"Eigenvalues ({document['which']})", "A true eigenvalue lies within the residual of each value.")
    section.columns = ["#", "eigenvalue", "residual", "converged"]
    triples = zip(document["values"], document["residuals"], document["converged"], strict=True)
    for i, (value, residual, converged) in enumerate(triples, start=1):
        section.rows.append([str(i), f"{number(value):.6g}", f"{number(residual):.2g}", _flag(converged)])
    if not all(document["converged"]):
        section.findings.append(f"Not every pair reached tolerance {document['tol']:g}: {document['outcome']}.")
    return section


def _listed(values: list[float]) -> str:
    shown = ", ".join(f"{v:.4g}" for v in values[:4]) or "none"  # four fit a cell, by judgement
    return shown if len(values) <= 4 else f"{shown} ... ({len(values)} in all)"


def _density_section(document: Document, *, lr: float | None = None, limit: float | None = None) -> Section:
    from sharpkit.plots.spectrum import plot_density

    density = SpectralDensity.from_dict(document)
    limit = limit if limit is not None else document.get("limit")
    label = "Spectral density"
    intro = "How the Hessian's eigenvalues are distributed: the bulk as a smoothed density on a log scale, the outliers one by one."
    if limit is not None or lr is not None:
        intro += " An outlier beyond the dashed limit is a direction in which full-batch steps grow."
    section = Section(label, intro, draw=lambda ax: plot_density(density, ax=ax, lr=lr, limit=limit), figure_label=label)
    section.columns = ["quantity", "value +- standard error"]
    section.rows = [
        ["trace", str(density.trace)],
        ["Frobenius norm", str(density.frobenius_norm)],
        ["share of eigenvalues clearly below zero", str(density.negative_mass)],
        ["outliers", _listed(density.outliers.tolist())],
        ["rows n, probes x steps", f"{density.size}, {density.num_probes} x {density.nodes.shape[1]}"],
    ]
    return section


_QUANTITIES = {
    "lambda_max": "lambda_max",
    "lambda_min": "lambda_min",
    "preconditioned_lambda_max": "preconditioned lambda_max",
    "trace": "trace",
    "frobenius_norm": "Frobenius norm",
    "effective_rank": "effective rank",
}


def _sharpness_section(document: Document) -> Section:
    stable, top = document["stable_lr"], Estimate.from_dict(document["lambda_max"])
    section = Section("Sharpness", str(stable["rule"]))
    section.tiles.append(("lambda_max", f"{top.value:.4g}", f"+- {top.stderr:.2g}"))
    rate, low, high = (number(stable[name]) for name in ("value", "lower", "upper"))
    if math.isfinite(rate):
        span = f"{low:.4g} to {high:.4g}" if f"{low:.4g}" != f"{high:.4g}" else ""  # compared as shown: "5 to 5" says nothing
        section.tiles.append(("largest stable rate, here, full batch", f"{rate:.4g}", span))
    else:
        section.tiles.append(("largest stable rate, here, full batch", "unbounded", "no positive curvature"))
    lr = number(document["lr"]) if document["lr"] is not None else None
    if lr is not None:
        section.tiles.append(("learning rate in use", f"{lr:.4g}", f"{percent(lr / rate)} of the limit" if math.isfinite(rate) else ""))
    section.columns = ["quantity", "value +- error", "method"]
    for name, words in _QUANTITIES.items():
        if document.get(name) is not None:
            estimate = Estimate.from_dict(document[name])
            matrix = operator_in(str(stable["rule"])) if name == "preconditioned_lambda_max" else ""
            section.rows.append([f"lambda_max of {matrix}" if matrix else words, _flagged(estimate), estimate.method])
    for name, words in (("loss", "loss"), ("grad_norm", "gradient norm"), ("mode", "mode of the model")):
        section.rows.append([words, _text(document[name]), ""])
    if document["density"] is not None:
        # The Hessian's own limit; an adaptive optimizer's limit is on another matrix and has no place in this picture.
        plain = lr and math.isfinite(rate) and document["preconditioned_lambda_max"] is None
        limit = top.value * rate / lr if plain and lr else None
        section.draw, section.figure_label = _density_section(document["density"], limit=limit).draw, "Spectral density of the Hessian"
    return section


def _history_section(document: Document) -> Section:
    from sharpkit.plots.spectrum import plot_curvature

    history = CurvatureHistory.from_dict(document)
    section = Section(
        f"Curvature over training: {history.name}",
        "lambda_max of the full-batch loss at checkpoints. Above the dashed limit, gradient descent diverges along the sharpest direction.",
        draw=lambda ax: plot_curvature(history, ax=ax),
        figure_label=f"lambda_max over training, {history.name}",
        columns=["step", "loss", "lambda_max +- residual", "limit", "lambda_max / limit"],
    )
    rows = zip(history.steps, history.loss, history.lambda_max, history.residual, history.limit, history.ratios(), strict=True)
    section.rows = [[str(s), f"{loss:.4g}", format_with_error(v, e), f"{lim:.4g}", decimals(r)] for s, loss, v, e, lim, r in rows]
    return section


def _layers_section(document: Document) -> Section:
    from sharpkit.plots.spectrum import plot_layers

    layers = LayerSharpness.from_dict(document)
    height = max(2.6, 1.3 + 0.42 * len(layers.names))  # inches, by judgement: axis and legend, and two bars a layer
    section = Section(
        f"Layer by layer: {layers.name}",
        "Each layer's own block of the Hessian. The traces add up to the whole trace; no block is sharper than the whole.",
        draw=lambda ax: plot_layers(layers, ax=ax),
        figure_size=(5.8, height),
        figure_label=f"Layers of {layers.name}",
        columns=["layer", "parameters", "lambda_max +- residual", "trace +- standard error"],
    )
    rows = zip(layers.names, layers.num_parameters, layers.lambda_max, layers.trace, strict=True)
    for name, size, top, total in rows:
        section.rows.append([name, str(size), _flagged(top), _flagged(total)])
    return section


def _m_sharpness_section(document: Document) -> Section:
    from sharpkit.plots.measures import plot_m_sharpness

    sharpness = MSharpness.from_dict(document)
    case = "Worst case" if sharpness.is_worst_case else "Average case"
    section = Section(
        f"{case} near the weights: {'adaptive ' if sharpness.adaptive else ''}{sharpness.perturbation}",
        f"How far the loss of {sharpness.m} samples rises within rho of the weights, from {sharpness.loss:.4g}.",
        draw=lambda ax: plot_m_sharpness(sharpness, ax=ax),
        figure_label="Rise of the loss over rho",
        columns=["rho", "rise +- standard error"],
        cost=f"{sharpness.num_gradients} gradients and {sharpness.num_evaluations} forward passes of {sharpness.m} samples, "
        f"{sharpness.seconds:.1f} s",
    )
    section.rows = [[f"{rho:g}", str(value)] for rho, value in zip(sharpness.rho, sharpness.values, strict=True)]
    return section


def _layer_sensitivity_section(document: Document) -> Section:
    from sharpkit.plots.measures import plot_layer_sensitivity

    layers = LayerSensitivity.from_dict(document)
    section = Section(
        "Rounding each layer",
        "The rise of the loss if one weight tensor alone is rounded: foretold by its mean trace and by the quadratic form, and measured.",
        draw=lambda ax: plot_layer_sensitivity(layers, ax=ax),
        figure_label="Measured against foretold rises",
        columns=[
            "layer",
            "lambda_max",
            "mean trace",
            *(f"{bits} bits, {what}" for bits in layers.bits for what in ("foretold", "measured")),
        ],
        cost=f"{layers.num_matvecs} products and {layers.num_evaluations} forward passes, {layers.seconds:.1f} s",
        wide=True,
    )
    for i, name in enumerate(layers.names):
        rises = [
            _text(value)
            for j in range(len(layers.bits))
            for value in (layers.predicted[i][j], None if layers.measured is None else layers.measured[i][j])
        ]
        section.rows.append([name, _flagged(layers.lambda_max[i]), f"{layers.mean_trace[i]:.4g}", *rises])
    return section


def _branching_section(document: Document) -> Section:
    found = BatchBranching.from_dict(document)
    section = Section(
        "Critical batch size by branching",
        f"Training on over the same {found.samples} samples at several batch sizes, the rate by the {found.rule} rule.",
        draw=lambda ax: found.plot(ax=ax),
        figure_label="Loss above the best against the batch size",
        cost=f"{found.cost:.3g} gradients of single samples, {found.seconds:.3g} s",
        columns=["batch size", "rate", "loss", "above the best +- standard error"],
    )
    for size, rate, mean, above in zip(found.batch_sizes, found.rates, found.means, found.excess, strict=True):
        section.rows.append([str(size), f"{rate:.3g}", f"{mean:.4g}", str(above)])
    return section


def _warmup_section(document: Document) -> Section:
    plan = BatchSizeWarmup.from_dict(document)
    section = Section(
        "Batch-size warm-up",
        f"When to double the batch, so that it stays below the critical batch size; the rate by the {plan.rule} rule.",
        draw=lambda ax: plan.plot(ax=ax),
        figure_label="Critical batch size and plan against samples seen",
        columns=["from sample", "batch size", "rate", "steps"],
    )
    section.rows = [[str(stage.start), str(stage.batch_size), f"{stage.lr:.3g}", str(stage.steps)] for stage in plan.stages]
    return section


def _power_law_section(document: Document) -> Section:
    law = PowerLaw.from_dict(document)
    section = Section(
        "Power law",
        "y = offset + amplitude x^exponent, fitted robustly in logarithms; intervals by resampled residuals.",
        draw=lambda ax: law.plot(ax=ax),
        figure_label="Power law through the points",
        columns=["quantity", "value", "95 %"],
    )
    numbers = [("exponent", law.exponent), ("amplitude", law.amplitude), *([("offset", law.offset)] if law.has_offset else [])]
    section.rows = [[name, f"{float(v):.4g}", f"{v.lower:.4g} to {v.upper:.4g}"] for name, v in numbers]
    section.rows.append(["scatter of a point", percent(law.scatter), ""])
    return section


def _layer_rates_section(document: Document) -> Section:
    rates = LayerRates.from_dict(document)
    section = Section(
        f"Rates by layer, {rates.optimizer}",
        "Each layer's rate over the base rate, of geometric mean 1, held to a factor of 10; its largest stable rate alone.",
        draw=lambda ax: rates.plot(ax=ax),
        figure_size=(11.0, max(3.0, 1.5 + 0.36 * len(rates.names))),  # inches, by judgement: axis and legend, and a line for each layer
        figure_label="Rates by layer",
        wide=True,
        cost=f"{rates.num_matvecs} products, {rates.seconds:.3g} s",
        columns=["layer", "parameters", "alone", *RULES],
    )
    ratios = [rates.ratios(rule) for rule in RULES]
    for name, size, alone in zip(rates.names, rates.num_parameters, rates.alone, strict=True):
        section.rows.append([name, str(size), f"{float(alone):.3g}", *(f"{own[name]:.3g}" for own in ratios)])
    together = [f"{float(rates.together[rule]):.3g}" for rule in RULES]
    section.rows.append(["largest stable base rate", str(sum(rates.num_parameters)), f"{float(rates.one_rate):.3g} (one rate)", *together])
    return section


def _diagnosis_section(document: Document) -> Section:
    section = Section("Doctor", str(document.get("objective", "")), wide=True)  # remedies are long: half a page would break every line
    section.columns = ["check", "status", "what was found", "what to do"]
    section.rows = [[c["name"], c["status"], c["message"], c["remedy"]] for c in document["checks"]]
    return section


def _curve_section(document: Document) -> Section:
    from sharpkit.plots.spectrum import plot_learning_rate_curve

    # what earlier documents do not say
    point, matrix = document.get("point", "after the pilot"), document.get("matrix", "H_B")
    section = Section(
        f"Largest learning rate against batch size, {document['optimizer']}",
        f"{document['condition']}. lambda_max of H {document['sharpness_at_start']:.3g} at the present parameters, "
        f"{document['sharpness_after_pilot']:.3g} {point}.",
        draw=lambda ax: plot_learning_rate_curve(document, ax=ax),
        figure_label="Largest stable learning rate against batch size",
        cost=f"{document['gradients']:.0f} full-data gradients, {document['seconds']:.3g} s",
        columns=[
            *("batch size", "largest stable rate (interval)", f"by curvature alone, {point}"),
            *(f"lambda_max of {matrix} (interval)", f"lambda_min of {matrix}"),
        ],
    )
    for row in document["rows"]:
        rate = f"{row['max_lr']:.3g} ({row['max_lr_lower']:.3g} - {row['max_lr_upper']:.3g})"
        top = f"{row['lambda_max']:.3g} ({row['lambda_max_lower']:.3g} - {row['lambda_max_upper']:.3g})"
        alone = "-" if row["by_curvature"] is None or math.isnan(row["by_curvature"]) else f"{row['by_curvature']:.3g}"
        section.rows.append([str(row["batch_size"]), rate, alone, top, f"{row['lambda_min']:.3g}"])
    return section


def _suggestion_section(document: Document) -> Section:
    from sharpkit.plots.runs import plot_suggestion

    return Section(
        f"The learning rate to train with, {document['optimizer']}",
        f"Peak of the rate for {document['steps']} steps at batch size {document['batch_size']}, {document['schedule']}.",
        tiles=[
            ("suggested rate", f"{document['value']:.3g}", f"{document['lower']:.3g} to {document['upper']:.3g}"),
            ("lost at", f"{document['limit']:.3g}", "where a growing rate loses what it had trained"),
            ("the optimizer's own", f"{document['present']:.3g}", ""),
        ],
        draw=lambda ax: plot_suggestion(document, ax=ax),
        figure_label="Loss against a growing learning rate, with the suggested rate and its interval",
        findings=[document["reason"]],
        cost=f"{document['gradients']:.0f} gradients for a run of {document['steps']}; {document['seconds']:.3g} s",
    )


def _landscape_section(document: Document) -> Section:
    from sharpkit.plots.landscape import plot_landscape

    shown = Landscape.from_dict(document)
    kind = "line" if len(shown.axes) == 1 else "plane"
    section = Section(f"Loss landscape: a {kind} through the present parameters", f"Along {' and '.join(shown.names)}.")
    section.draw, section.findings = lambda ax: plot_landscape(shown, ax=ax), shown.findings()
    section.figure_label = f"The loss on a {kind} through the present parameters, with its quadratic model"
    section.figure_size = (5.8, 3.6 if kind == "line" else 5.0)  # by judgement: a plane is near to a square
    section.columns = ["direction", "length", "slope", "curvature", "largest stable curvature"]
    for i, name in enumerate(shown.names):
        limit = "-" if shown.limits is None else f"{shown.limits[i]:.4g}"
        numbers = (f"{float(x):.4g}" for x in (shown.norms[i], shown.slope[i], shown.curvature[i, i]))
        section.rows.append([name, *numbers, limit])
    section.cost = f"{shown.num_evaluations} evaluations, {shown.num_matvecs} matrix-vector products, {shown.seconds:.3g} s"
    return section


def _comparison_section(document: Document) -> Section:
    from sharpkit.reporting.compare import Comparison

    comparison = Comparison.from_dict(document)
    section = Section(f"Side by side: {', '.join(comparison.names)}", f"Against {comparison.names[0]}.", wide=True)
    section.draw, section.findings = comparison.plot, comparison.findings()
    section.figure_label = f"Every quantity over that of {comparison.names[0]}, with errors"
    section.figure_size = (9.0, 1.4 + 0.32 * min(len(comparison.quantities), 24))
    section.columns = ["quantity", *comparison.names]
    section.rows = comparison.cells()
    return section


# -- a monitored run, a learner's run, a race -------------------------------------------------------------------------------------

_MOST_EVENTS = 60  # on a page, by judgement: the run's file holds them all


def describe(header: Document) -> str:
    """A run's header as one sentence; empty for an empty header.

    Example:
        >>> describe({"model": "Sequential", "num_parameters": 12345, "optimizer": "SGD", "condition": "lambda_max(H) <= 2/lr",
        ...           "budget": 0.05, "every": "auto", "mode": "train"})
        'Sequential with 12,345 parameters, trained by SGD. Limit: lambda_max(H) <= 2/lr. Measured in train mode, within 5 % of the time.'
    """
    if not header:
        return ""
    size = header.get("num_parameters")
    model = f"{header.get('model', 'model')}" + (f" with {int(size):,} parameters" if size is not None else "")
    every, budget = header.get("every"), header.get("budget")
    pace = f", every {every} steps" if isinstance(every, int) else f", within {100 * float(budget):.3g} % of the time" if budget else ""
    parts = [f"{model}, trained by {header.get('optimizer', 'an optimizer that is not named')}."]
    if header.get("condition"):
        parts.append(f"Limit: {header['condition']}.")
    parts.append(f"Measured in {header.get('mode', 'train')} mode{pace}.")
    return " ".join(parts)


def last_readings(records: Sequence[Document]) -> dict[str, tuple[Reading, Document]]:
    """The last finite reading of every metric of ``monitor_record`` documents (steps increasing), with its entry in the record."""
    last: dict[str, tuple[Reading, Document]] = {}
    for record in records:  # not every metric is measured every time, so the last record alone would miss some
        for name, entry in record["values"].items():
            if (one := reading(record, name)) is not None:
                last[name] = (one, entry)
    return last


def tiles_of(header: Document, records: Sequence[Document]) -> list[tuple[str, str, str]]:
    """Where a run of at least one record stands: curvature, limit, their ratio, overhead; (name, value, remark) each."""
    tiles: list[tuple[str, str, str]] = []
    main, last = main_curvature(records), last_readings(records)
    if main in last:
        now, _ = last[main]
        remark = f"+- {now.stderr:.2g} at step {now.step}" if math.isfinite(now.stderr) else f"error unknown, step {now.step}"
        tiles.append((in_words(main, header), f"{now.value:.4g}", remark))
        if now.limit > 0:
            lr = number(records[-1].get("lr"))
            tiles.append(("stability limit", f"{now.limit:.4g}", f"at learning rate {lr:.4g}" if math.isfinite(lr) else ""))
            tiles.append(("share of the limit", decimals(now.ratio), _verdict(now)))
    overhead = number(records[-1].get("overhead"))
    if math.isfinite(overhead):
        tiles.append(("overhead", percent(overhead), "of training time"))
    return tiles


def _verdict(now: Reading) -> str:
    if now.is_above():
        return "above it, beyond the error"
    return "below it, beyond the error" if now.is_below() else "at it, within the error"


def rows_of(header: Document, records: Sequence[Document]) -> list[list[str]]:
    """The last value of each metric, for a table: metric, value, limit, share, step, how."""
    rows = []
    for name, (now, entry) in last_readings(records).items():
        flag = "" if entry.get("converged", True) else " (not converged)"
        limit, share = (f"{now.limit:.4g}", decimals(now.ratio)) if now.limit > 0 else ("", "")
        method = str(entry.get("method", ""))
        products = entry.get("num_matvecs")
        how = f"{method}, {products} product{'s' if products > 1 else ''}" if method and products else method
        rows.append([in_words(name, header), format_with_error(now.value, now.stderr) + flag, limit, share, str(now.step), how])
    return rows


def _monitor_section(document: Document) -> Section:
    """A monitored run: ``to_dict()`` of a monitor's history, or of a file read by ``sk.sinks.read_run``."""
    from sharpkit.plots.runs import figure_size, plot_monitor

    header, records = document.get("header", {}), document["records"]
    section = Section(f"Monitored run{': ' + document['name'] if document.get('name') else ''}", describe(header), wide=True)
    # a history taken from a live monitor holds no findings yet: they are made when they are asked for
    section.findings = list(document["findings"] if "findings" in document else run_findings(header, records))
    if resumed := document.get("resumed_at"):
        section.intro += f" Resumed at step {', '.join(map(str, resumed))}."
    if not records:
        return section
    section.tiles = tiles_of(header, records)
    section.draw = lambda ax: plot_monitor(document, ax=ax)
    section.figure_size = figure_size(document)
    section.figure_label = "Curvature against the stability limit, other metrics and loss over optimizer steps"
    events = [event for record in records for event in record.get("events", ())]
    if events:
        shown = [f"Step {event['step']}: {event['text']}" for event in events[:_MOST_EVENTS]]
        rest = len(events) - len(shown)
        shown += [f"{rest} more: see the file."] if rest else []
        section.lists.append(("Events, numbered as in the figure", shown))
    if failures := _failures(header, records):
        section.lists.append(("Measurements that failed", failures))
    section.columns = ["metric", "last value +- error", "limit", "share of limit", "step", "method"]
    section.rows = rows_of(header, records)
    seconds = sum(number(record.get("seconds", 0.0)) for record in records)
    section.cost = f"{len(records)} measurements, {seconds:.3g} s"
    return section


def runs_together(runs: Mapping[str, Document]) -> Section | None:
    """Several monitored runs on the same axes, and the last value of each in a table; None unless two of them hold a curvature.

    Args:
        runs: ``to_dict()`` of monitors' histories, by the names that the page shows.
    """
    from sharpkit.plots.runs import plot_runs_together

    rows = []
    for name, document in runs.items():
        records = document["records"]
        last = last_readings(records).get(main := main_curvature(records))
        if last is not None:
            now, loss = last[0], number(records[-1].get("loss"))
            limit, share = (f"{now.limit:.4g}", decimals(now.ratio)) if now.limit > 0 else ("", "")
            value = format_with_error(now.value, now.stderr)
            said = in_words(main, document.get("header", {}))
            rows.append([name, said, value, limit, share, str(now.step), f"{loss:.4g}" if math.isfinite(loss) else ""])
    if len(rows) < 2:
        return None
    section = Section("Runs together", "Each run in one colour; dashed, the limit of its learning rate.", wide=True)
    section.draw = lambda ax: plot_runs_together(runs, ax=ax)
    section.figure_size = (10.5, 5.2)  # by judgement, as high as a run of two panels
    section.figure_label = "Curvature of each run against its stability limit, and losses, over optimizer steps"
    section.columns = ["run", "metric", "last value +- error", "limit", "share of limit", "step", "last loss"]
    section.rows = rows
    return section


def _failures(header: Document, records: Sequence[Document]) -> list[str]:
    """Each kind of failure once, with the steps: one cause fails at every measurement."""
    steps: dict[str, list[int]] = {}
    for record in records:
        for name, reason in record.get("failed", {}).items():
            steps.setdefault(f"{in_words(name, header)}: {reason}", []).append(record["step"])
    return [f"{what} ({len(at)} x, steps {at[0]} to {at[-1]})" if len(at) > 1 else f"{what} (step {at[0]})" for what, at in steps.items()]


_MOST_ROWS = 60  # decisions on a page, the last ones, by judgement


def _learner_section(document: Document) -> Section:
    from sharpkit.plots.runs import plot_learner

    rows = document["decisions"]
    intro = "The rate grows until it meets its share of the batch's stability limit, is held there, and decays."
    section = Section("Learned learning rate", intro)
    if not rows:
        section.findings = ["No decision was made yet."]
        return section
    last, back = rows[-1], [row for row in rows if tells_of_return(row["reason"])]
    section.tiles = [("learned rate", f"{number(last['lr']):.3g}", f"at step {last['step']}")]
    if math.isfinite(limit := number(last["max_lr"])):
        section.tiles.append(("stability limit", f"{limit:.3g}", f"on a batch of {last['batch_size']}"))
    section.tiles.append(("products", str(sum(int(row["num_matvecs"]) for row in rows)), f"in {len(rows)} decisions"))
    section.findings = [f"Step {row['step']}: {row['reason']}." for row in back] or ["The run never had to go back."]
    section.columns = ["step", "rate", "lambda_max", "limit", "loss", "reason"]
    shown = ("lr", "lambda_max", "max_lr", "loss")
    for row in rows[-_MOST_ROWS:]:
        numbers = [f"{number(row[name]):.3g}" if math.isfinite(number(row[name])) else "" for name in shown]
        section.rows.append([str(row["step"]), *numbers, str(row["reason"])])
    section.draw, section.figure_label = lambda ax: plot_learner(document, ax=ax), section.title
    return section


def _race_section(document: Document) -> Section:
    result = RaceResult.from_dict(document)
    count = len(result.seeds)
    section = Section(
        "Learning rates raced",
        f"The same problem trained from scratch in every way, with {result.max_gradients} gradients each, "
        f"{count} seed{'' if count == 1 else 's'}. {COUNTING}",
    )
    section.findings = [*result.findings(), *(f"Not started: {name} ({why})." for name, why in result.skipped.items())]
    section.columns = list(result.columns)
    section.rows = [finish.cells() for finish in result.finishes]
    best = result.finishes[0]  # they are sorted
    kind = "test" if best.test_losses else "training"
    section.tiles = [(f"lowest {kind} loss", f"{best.ranked_by:.3g}", best.name)]
    mine = [f for f in result.finishes if f.name == LEARNER]  # a diverged learner has no place worth a tile
    if mine and math.isfinite(mine[0].train_loss):
        place = result.finishes.index(mine[0]) + 1
        section.tiles.append(("the learner", f"{mine[0].ranked_by:.3g}", f"place {place} of {len(result.finishes)}"))
    section.draw, section.figure_label = lambda ax: result.plot(ax=ax), "Training loss against gradients spent"
    section.wide, section.figure_size = True, (9.0, 4.6)
    section.cost = f"{number(document['seconds']):.3g} s"
    return section


# -- transfer across sizes ----------------------------------------------------------------------------------------------------

_MOST_COORDINATES = 40  # of a table, by judgement: the document holds them all
_PASSED = {True: "yes", False: "NO", None: "undecided"}
_VERDICTS = {True: "transfers", False: "does not transfer", None: "undecided"}


def _transfer_verdict_section(document: Document) -> Section:
    """The verdict with its culprits; the picture only where the measurements are in the same document."""
    section = Section(f"Do hyperparameters transfer? {_VERDICTS[document['passed']].capitalize()}")
    section.intro = f"The rule ({document['mode']} mode): {document['rule']}."
    section.wide = True
    section.findings = [*document["findings"], *(sentence for part in document.get("parts", ()) for sentence in part["findings"])]
    section.tiles = [("verdict", _VERDICTS[document["passed"]], f"widths {document['widths'][0]} to {document['widths'][-1]}")]
    if reach := document["reach"]:
        value, low, cap = (number(reach[key]) for key in ("value", "lower", "cap"))
        remark = f"95 %: at least {low:.0f}" + (f"; no claim beyond {cap:.0f}" if value >= cap else "")
        section.tiles.append(("learning rate transfers up to width", f"{value:.0f}{' or more' if value >= cap else ''}", remark))
    section.tiles.append(("broken rules", str(len(document["culprits"])), ""))
    if document["culprits"]:
        # four places are enough to find a rule by, by judgement; the document names them all
        section.columns = ["broken rule", "exponent", "expected", "confidence", "where"]
        for c in document["culprits"]:
            slope = str(Slope.from_dict(c["slope"]))
            section.rows.append([c["rule"], slope, f"{c['expected']:g}", f"{c['confidence']:.1%}", ", ".join(c["where"][:4])])
    if document.get("parts"):
        from sharpkit.plots.transfer import plot_transfer_verdict, verdict_size

        section.draw, section.figure_size = lambda ax: plot_transfer_verdict(document, ax=ax), verdict_size(document)
        section.figure_label = "Coordinates, sharpness and learning rates across sizes"
    return section


def _coordinates_section(document: Document) -> Section:
    """Exponents of every module's output."""
    check = CoordinateCheck.from_dict(document)
    size = check.dimension
    section = Section(f"Coordinate check over {size}s")
    section.intro = (
        f"How the outputs of modules, and their changes in the first {check.num_steps} steps, grow with {size} {check.sizes[0]} to "
        f"{check.sizes[-1]} ({check.num_seeds} seeds): exponents with standard errors. Where rates transfer, all are 0; outputs and "
        "attention logits may be smaller at initialisation."
    )
    section.findings = [f"{s[0].upper()}{s[1:]}{'' if s.endswith('.') else '.'}" for s in document["findings"]]
    section.draw = lambda ax: check.plot(ax=ax)
    section.figure_label, section.wide, section.figure_size = f"Updates of coordinates against {size}", True, (9.0, 3.8)
    section.columns = ["coordinate", "at initialisation", "while training", "its updates", "verdict"]
    # what is wrong first, in the network's own order: sorted() keeps it
    shown = sorted(check.coordinates, key=lambda c: c.verdict not in ("grows", "vanishes", "unclear"))
    section.rows = [[c.name, str(c.initial), str(c.level), str(c.update), c.verdict] for c in shown[:_MOST_COORDINATES]]
    if len(shown) > _MOST_COORDINATES:
        section.findings.append(f"{len(shown) - _MOST_COORDINATES} further coordinates are in the document only.")
    return section


def _transferred_rates_section(document: Document) -> Section:
    """Optimum and sensitivity at each size."""
    from sharpkit.plots.transfer import plot_learning_rate_transfer

    size = document["dimension"]
    section = Section(f"Best learning rate across {size}s")
    section.intro = (
        f"Loss against one factor on all learning rates. Loss: mean training loss of the last quarter of {document['steps']} steps, "
        f"{document['num_seeds']} seeds around each optimum; diverged runs count as the loss they started from."
    )
    section.draw = lambda ax: plot_learning_rate_transfer(document, ax=ax)
    section.figure_label = f"Loss against learning rate by {size}"
    section.tiles = [("transfers", _PASSED[document["passed"]], "")]
    drift, half = number(document["drift"]["value"]), number(document["drift"]["half_width"])
    section.tiles.append(("drift, octaves per doubling", f"{drift:+.2f}", f"+- {half:.2f} (95 %)" if math.isfinite(half) else ""))
    section.columns = [size, "best factor", "95 % interval", "rate of the first group", "lowest loss", "sensitivity"]
    for best, rate, sensitivity in zip(document["optima"], document["rates"], document["sensitivity"], strict=True):
        factor, low, high = (2.0 ** number(best[key]) for key in ("log2", "lower", "upper"))
        edge = "" if best["interior"] else " (edge)"  # the lowest loss lies at the end of the grid: the true optimum may lie beyond
        cells = [str(best["size"]), f"{factor:.3g}{edge}", f"{low:.3g} - {high:.3g}", f"{factor * number(rate):.3g}"]
        section.rows.append([*cells, f"{number(best['loss']):.4g}", f"{number(sensitivity):.3g}"])
    section.cost = f"{document['num_runs']} runs ({document['num_reused']} more from the store), {number(document['seconds']):.3g} s"
    return section


def _transferred_sharpness_section(document: Document) -> Section:
    """Sharpness at each size at the end."""
    from sharpkit.plots.transfer import plot_sharpness_transfer

    size = document["dimension"]
    section = Section(f"Sharpness across {size}s")
    share = ", as a share of the stability limit" if document["condition"] else ""
    section.intro = f"{document['matrix']} on a fixed batch along training{share}."
    section.draw, section.figure_size = lambda ax: plot_sharpness_transfer(document, ax=ax), (5.8, 4.6)
    section.figure_label = f"Sharpness over time by {size}"
    section.tiles = [("spread after warm-up", f"{number(document['spread_after']):.1%}", f"from step {document['warmup']} on")]
    section.columns = [size, f"lambda_max at step {document['steps'][-1]}", "limit", "loss"]
    for name in map(str, document["sizes"]):
        top, loss = (_last_mean(document[key][name]) for key in ("lambda_max", "loss"))
        section.rows.append([name, f"{top:.4g}", f"{number(document['limit'][name]):.4g}", f"{loss:.4g}"])
    return section


def _last_mean(runs: list[list[Any]]) -> float:
    return sum(number(run[-1]) for run in runs) / len(runs)


# -- the table ------------------------------------------------------------------------------------------------------------------


def _generic_section(document: Document) -> Section:
    scalars = {k: v for k, v in document.items() if k not in ("kind", "version", "findings") and not isinstance(v, (dict, list))}
    title = str(document["kind"]).replace("_", " ").capitalize()  # a kind of another version, or of the user's own: what it has shows
    return Section(title, columns=["quantity", "value"], rows=[[k, _text(v)] for k, v in scalars.items()])


_SECTIONS: dict[str, Callable[[Document], Section]] = {
    "estimate": _estimate_section,
    "eigenpairs": _eigenpairs_section,
    "spectral_density": _density_section,
    "sharpness": _sharpness_section,
    "curvature_history": _history_section,
    "layer_sharpness": _layers_section,
    "m_sharpness": _m_sharpness_section,
    "layer_sensitivity": _layer_sensitivity_section,
    "layer_rates": _layer_rates_section,
    "power_law": _power_law_section,
    "batch_branching": _branching_section,
    "batch_size_warmup": _warmup_section,
    "diagnosis": _diagnosis_section,
    "learning_rate_curve": _curve_section,
    "suggested_learning_rate": _suggestion_section,
    "landscape": _landscape_section,
    "comparison": _comparison_section,
    HISTORY: _monitor_section,
    "learner_history": _learner_section,
    "learning_rate_race": _race_section,
    "transfer_verdict": _transfer_verdict_section,
    "coordinate_check": _coordinates_section,
    "learning_rate_transfer": _transferred_rates_section,
    "sharpness_transfer": _transferred_sharpness_section,
}


def register_section(kind: str, make: Callable[[Document], Section]) -> None:
    """Tell the report page, and the tables of the command line, how to show one kind of result, for this process.

    Args:
        kind: what ``to_dict()["kind"]`` of the result says. A kind that sharpkit knows already is shown by ``make`` from now on.
        make: a result's ``to_dict()``, perhaps read back from JSON -> its :class:`Section`.

    Raises:
        TypeError: make is no function.
        ValueError: kind is empty or no string.

    Example:
        >>> import sharpkit as sk
        >>> def coin_section(document):
        ...     return sk.Section("A coin", tiles=[("heads", str(document["heads"]), f"of {document['throws']}")])
        >>> sk.register_section("coin", coin_section)
        >>> section_for({"kind": "coin", "heads": 4, "throws": 10}, title="My coin")
        Section(title='My coin', intro='', tiles=[('heads', '4', 'of 10')], ...)
    """
    if not isinstance(kind, str) or not kind:
        raise ValueError(f"kind must be the text that to_dict()['kind'] of the result holds, got {kind!r}")
    if not callable(make):
        raise TypeError(f"make must be a function of a document that returns a Section, got {type(make).__name__}")
    _SECTIONS[kind] = make


# What reading a field raises where a file was written by another version, edited by hand, or made up.
_MALFORMED = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


@contextmanager
def _as_document_error(kind: str, errors: tuple[type[Exception], ...]) -> Iterator[None]:
    try:
        yield
    except errors as error:
        what = str(error) if isinstance(error, DocumentError) else repr(error)
        raise DocumentError(f"the {kind!r} document is not as this version of sharpkit writes it: {what}") from error


def section_for(document: Document, *, title: str = "") -> Section:
    """The section of one result document.

    Args:
        document: a result's ``to_dict()``.
        title: heading in place of the section's own.

    Raises:
        DocumentError: a field that this kind of result must have is missing or malformed.
        TypeError: a registered function returned something else than a section.
    """
    kind = document["kind"]
    if not isinstance(kind, str):
        raise DocumentError(f"the field 'kind' of a result's document must be text, got {type(kind).__name__}")
    make = _SECTIONS.get(kind, _generic_section)
    own = make.__module__ == __name__
    with _as_document_error(kind, (DocumentError, *_MALFORMED) if own else (DocumentError, KeyError, TypeError)):
        section = make(document)
        if own:  # a registered function says all by itself
            section.findings = section.findings or list(document.get("findings", ()))
            section.cost = section.cost or _cost(document)
    if not isinstance(section, Section):  # from a registered function
        raise TypeError(f"the function registered for {kind!r} must return a sharpkit.Section, got {type(section).__name__}")
    if own and (draw := section.draw) is not None:

        def checked(ax: Any) -> Any:
            with _as_document_error(kind, _MALFORMED):
                return draw(ax)

        section.draw = checked
    if heading := title or str(document.get("title", "")):
        # a figure labelled by the heading follows it: a reader who cannot see it hears the same words
        section.figure_label = heading if section.figure_label == section.title else section.figure_label
        section.title = heading
    return section
