"""The section of a monitored run on the report page: where it stands, the picture, its events and failures in words, the last values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sharpkit._json import number
from sharpkit._run_schema import Reading, in_words, main_curvature, reading
from sharpkit.linalg.results import format_with_error
from sharpkit.training.findings import run_findings

Document = Mapping[str, Any]
Tile = tuple[str, str, str]

_MOST_EVENTS = 60


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
    """The last finite reading of every metric, with its entry in the record.

    Args:
        records: ``monitor_record`` documents, steps increasing.
    """
    found: dict[str, tuple[Reading, Document]] = {}
    for record in records:
        for name, entry in record["values"].items():
            if (one := reading(record, name)) is not None:
                found[name] = (one, entry)
    return found


def tiles_of(records: Sequence[Document]) -> list[Tile]:
    """Where the run stands: curvature, limit, their ratio, overhead; (name, value, remark) each.

    Args:
        records: ``monitor_record`` documents, at least one.
    """
    tiles: list[Tile] = []
    main, last = main_curvature(records), last_readings(records)
    if main in last:
        now, _ = last[main]
        remark = f"+- {now.stderr:.2g} at step {now.step}" if math.isfinite(now.stderr) else f"error unknown, step {now.step}"
        tiles.append((in_words(main), f"{now.value:.4g}", remark))
        if now.limit > 0:
            lr = number(records[-1].get("lr"))
            tiles.append(("stability limit", f"{now.limit:.4g}", f"at learning rate {lr:.4g}" if math.isfinite(lr) else ""))
            tiles.append(("share of the limit", f"{now.ratio:.2f}", _verdict(now)))
    overhead = number(records[-1].get("overhead"))
    if math.isfinite(overhead):
        tiles.append(("overhead", f"{overhead:.1%}", "of training time"))
    return tiles


def _verdict(now: Reading) -> str:
    if now.is_above():
        return "above it, beyond the error"
    return "below it, beyond the error" if now.is_below() else "at it, within the error"


def rows_of(records: Sequence[Document]) -> list[list[str]]:
    """The last value of each metric, for a table: metric, value, limit, share, step, how.

    Args:
        records: ``monitor_record`` documents.
    """
    rows = []
    for name, (now, entry) in last_readings(records).items():
        flag = "" if entry.get("converged", True) else " (not converged)"
        limit, share = (f"{now.limit:.4g}", f"{now.ratio:.2f}") if now.limit > 0 else ("", "")
        method = str(entry.get("method", ""))
        products = entry.get("num_matvecs")
        how = f"{method}, {products} product{'s' if products > 1 else ''}" if method and products else method
        rows.append([in_words(name), format_with_error(now.value, now.stderr) + flag, limit, share, str(now.step), how])
    return rows


def fill_section(section: Any, document: Document) -> None:
    """Put a monitored run into an empty section.

    Args:
        section: of the report.
        document: ``to_dict()`` of a monitor's history, or of a file read by ``sk.sinks.read_run``.
    """
    from sharpkit._monitor_plot import figure_size, plot_monitor

    header, records = document.get("header", {}), document["records"]
    section.intro, section.wide = describe(header), True
    section.findings = list(document["findings"] if "findings" in document else run_findings(header, records))
    if resumed := document.get("resumed_at"):
        section.intro += f" Resumed at step {', '.join(map(str, resumed))}."
    if not records:
        return
    section.tiles = tiles_of(records)
    section.draw = lambda ax: plot_monitor(document, ax=ax)
    section.figure_size = figure_size(document)
    section.figure_label = "Curvature against the stability limit, other metrics and loss over optimizer steps"
    events = [event for record in records for event in record.get("events", ())]
    if events:
        shown = [f"Step {event['step']}: {event['text']}" for event in events[:_MOST_EVENTS]]
        rest = len(events) - len(shown)
        shown += [f"{rest} more: see the file."] if rest else []
        section.lists.append(("Events, numbered as in the figure", shown))
    if failures := _failures(records):
        section.lists.append(("Measurements that failed", failures))
    section.columns = ["metric", "last value +- error", "limit", "share of limit", "step", "method"]
    section.rows = rows_of(records)
    seconds = sum(number(record.get("seconds", 0.0)) for record in records)
    section.cost = f"{len(records)} measurements, {seconds:.3g} s"


def _failures(records: Sequence[Document]) -> list[str]:
    """Each kind of failure once, with the steps."""
    steps: dict[str, list[int]] = {}
    for record in records:
        for name, reason in record.get("failed", {}).items():
            steps.setdefault(f"{in_words(name)}: {reason}", []).append(record["step"])
    return [f"{what} ({len(at)} x, steps {at[0]} to {at[-1]})" if len(at) > 1 else f"{what} (step {at[0]})" for what, at in steps.items()]
