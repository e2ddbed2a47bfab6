"""``sharpkit watch run.jsonl``: a monitored run in the terminal, one line a record, events as they come."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from typing import Any

from sharpkit._results import decimals, format_with_error, number, percent
from sharpkit.cli.output import say
from sharpkit.cli.target import UsageError
from sharpkit.monitor.runs import RunBuilder, RunFile, RunFollower
from sharpkit.monitor.schema import CURVATURES, in_words, reading

Document = dict[str, Any]
Answer = tuple[list[Document], Document, int]

_HEAD_EVERY = 20  # rows, by judgement: fits a terminal of 24 lines
# Of the columns in characters, by judgement: a value with its error fits, and a row is 106 characters wide.
_WIDTHS = (8, 10, 10, 24, 10, 23, 9)


def run_watch_command(arguments: argparse.Namespace) -> Answer:
    """``sharpkit watch``: follow a monitored run in the terminal."""
    follower, builder = RunFollower(arguments.run_file), RunBuilder()
    remark: Callable[[str], None] = (lambda line: None) if arguments.quiet else say
    try:
        if arguments.once:
            documents = follower.poll()
            if documents is None:
                raise UsageError(f"the file {arguments.run_file} does not exist; without --once, watch waits for it")
            for document in documents:
                builder.add(document)
            _show_start(arguments, builder, remark)
        else:
            _follow(arguments, follower, builder, remark)
    except KeyboardInterrupt:
        remark("\nsharpkit: no longer watching; the run itself is not touched")
    except ValueError as error:
        raise UsageError(f"cannot read {arguments.run_file} as the JSON lines of a monitored run: {error}") from error
    return ([_history(arguments, builder)] if arguments.json else []), {}, 0


def _history(arguments: argparse.Namespace, builder: RunBuilder) -> Document:
    return RunFile(tuple(builder.headers), tuple(builder.records), tuple(builder.notes()), arguments.run_file.name).to_dict()


def _follow(arguments: argparse.Namespace, follower: RunFollower, builder: RunBuilder, remark: Callable[[str], None]) -> None:
    """Look again and again until Ctrl-C."""
    table, waiting, started = _Table(arguments), False, False
    while True:
        documents = follower.poll()
        if documents is None and not waiting:
            remark(f"waiting for {arguments.run_file}, which does not exist{' any more' if started else ' yet'} (Ctrl-C ends)")
        waiting = documents is None  # said once, not at every look
        if follower.was_replaced and not waiting:
            remark(f"{arguments.run_file} was replaced: a new run")
            builder.headers, builder.records, started = [], [], False
        for document in documents or ():  # before the first show these only fill the builder: the last few are shown at once
            builder.add(document)
            if started and document["kind"] == "monitor_run":
                _say_header(document, remark)
                table.header = document
            elif started:
                table.show(document)
        if documents and not started:
            started, table = True, _show_start(arguments, builder, remark)
        time.sleep(arguments.interval)


def _say_header(header: Document, remark: Callable[[str], None]) -> None:
    from sharpkit.reporting.sections import describe  # the first line of a run waits for torch to load, --help does not

    resumed = f"resumed at step {header['resumed_at']}: " if header.get("resumed_at") is not None else ""
    remark(f"{resumed}{describe(header)}")


def _show_start(arguments: argparse.Namespace, builder: RunBuilder, remark: Callable[[str], None]) -> _Table:
    """What is there already: the header, the last records, the count of what came before."""
    for header in builder.headers[-1:]:
        _say_header(header, remark)
    for note in builder.notes():
        remark(note)
    table = _Table(arguments)
    table.header = builder.headers[-1] if builder.headers else {}
    shown = builder.records[-arguments.last :]
    earlier = builder.records[: len(builder.records) - len(shown)]
    if earlier:
        events = sum(len(record.get("events", ())) for record in earlier)
        remark(f"{len(earlier)} earlier records with {events} events are not shown; the whole run: sharpkit report {arguments.run_file}")
    for record in earlier:
        table.learn(record)
    for record in shown:
        table.show(record)
    if not shown:
        by = table.header.get("first_by")
        remark(f"{arguments.run_file} holds no records yet" + (f"; the first one comes by step {by}" if isinstance(by, int) else ""))
    return table


class _Table:
    """Rows on stdout under a head that comes again now and then; remembers which curvature the run is judged by."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._stream, self._silent = arguments.stdout, arguments.json  # the real stdout: while a command runs sys.stdout is stderr
        self._name, self._rows = "", 0
        self.header: Document = {}  # of the run, which names the matrix

    def learn(self, record: Document) -> None:
        """See which curvature the record holds."""
        held = [name for name in CURVATURES if name in record["values"]]
        # a run may begin with a cheap metric and measure a better one later: the earlier in CURVATURES wins, under a new head
        if held and (not self._name or CURVATURES.index(held[0]) < CURVATURES.index(self._name)):
            self._name, self._rows = held[0], 0

    def show(self, record: Document) -> None:
        """One record as a row, its failures and events below."""
        self.learn(record)
        if self._rows % _HEAD_EVERY == 0:
            self._write(_head(self._name, self.header))
        self._rows += 1
        self._write(row(record, self._name))
        for name, reason in record.get("failed", {}).items():
            self._write(f"  ! {name} failed: {reason}")
        for event in record.get("events", ()):
            self._write(f"  * step {event['step']}: {event['text']}")

    def _write(self, line: str) -> None:
        if not self._silent:
            self._stream.write(line + "\n")
            self._stream.flush()  # a pipe is buffered by blocks, and a line that waits for 4 KiB is no live view


def _columns(cells: tuple[str, ...]) -> str:
    return "  ".join(cell.rjust(width) for cell, width in zip(cells, _WIDTHS, strict=True)).rstrip()


def _head(metric: str, header: Document) -> str:
    name = in_words(metric, header) if metric else "curvature"
    return _columns(("step", "loss", "lr", f"{name} +-", "limit", "share of the limit (|)", "overhead"))


def row(record: Document, metric: str) -> str:
    """One record as a line of the table.

    Args:
        record: a ``monitor_record``.
        metric: the curvature to show; a record without it gets a dash.

    Example:
        >>> row({"step": 120, "loss": 0.43, "lr": 0.1, "overhead": 0.04, "values": {"lambda_max": {"value": 10.0, "stderr": 0.2,
        ...      "limit": 20.0}}}, "lambda_max").split()
        ['120', '0.43', '0.1', '10', '+-', '0.2', '20', '0.50', '[=====.....|.....]', '4.0%']
    """
    now = reading(record, metric) if metric else None
    value = format_with_error(now.value, now.stderr) if now else "-"
    limit = f"{now.limit:.4g}" if now and now.limit > 0 else "-"
    share = f"{decimals(now.ratio)} {bar(now.ratio)}" if now and now.limit > 0 else "-"
    overhead = number(record.get("overhead"))
    last = percent(overhead) if math.isfinite(overhead) else "-"
    return _columns((str(record["step"]), _short(record.get("loss")), _short(record.get("lr")), value, limit, share, last))


def _short(value: Any) -> str:
    shown = number(value)
    return "-" if math.isnan(shown) else f"{shown:.4g}"


def bar(ratio: float, *, length: int = 15) -> str:
    """A share of the limit in plain characters, up to one and a half; the bar in it is the limit.

    Args:
        ratio: curvature over limit.
        length: characters between the brackets, without the limit's own.

    Example:
        >>> bar(0.5), bar(1.2), bar(7.0)
        ('[=====.....|.....]', '[==========|==...]', '[==========|====>]')
    """
    # 1e-9: a ratio of exactly 0.3 comes out of the product as 2.9999999999999996 cells
    filled = min(length, max(0, math.floor(ratio / 1.5 * length + 1e-9)))
    cells = "=" * filled + "." * (length - filled)
    if ratio > 1.5:
        cells = cells[:-1] + ">"
    at = round(length / 1.5)
    return f"[{cells[:at]}|{cells[at:]}]"
