"""Reading a monitored run back from its JSON lines: whole, or as it grows."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sharpkit._arguments import as_path
from sharpkit._errors import DocumentError
from sharpkit._results import MAX_JSON, Result, parse_json
from sharpkit.monitor.findings import run_findings
from sharpkit.monitor.schema import HISTORY, RECORD, RUN, VERSION

Document = dict[str, Any]


@dataclass(frozen=True)
class RunFile(Result, kind=HISTORY, version=VERSION, saved=("name", "header", "resumed_at", "records", "findings")):
    """A monitored run as its file tells it; made by :func:`read_run`."""

    headers: tuple[Document, ...]  # headers of the run and of each time it was resumed, oldest first
    records: tuple[Document, ...]  # one for each step, steps increasing
    notes: tuple[str, ...] = ()  # what a reader should know about the file, in sentences
    name: str = ""  # the file's name without its folder

    @property
    def header(self) -> Document:
        """The header of the run as it began; empty if the file has none."""
        return self.headers[0] if self.headers else {}

    @property
    def resumed_at(self) -> list[int]:
        """Steps at which the run was resumed."""
        return [header["resumed_at"] for header in self.headers[1:]]

    @property
    def events(self) -> tuple[Document, ...]:
        """Every event of the records, in order."""
        return tuple(event for record in self.records for event in record.get("events", ()))

    def findings(self) -> list[str]:
        """What the run showed, in plain sentences."""
        return [*run_findings(self.header, self.records), *self.notes]

    def plot(self, ax: Any = None) -> Any:
        """Curvature against the limit, and the loss below; see :func:`sharpkit.plots.plot_monitor`."""
        from sharpkit.plots.runs import plot_monitor

        return plot_monitor(self.to_dict(), ax=ax)

    def __repr__(self) -> str:
        steps = f", steps {self.records[0]['step']} to {self.records[-1]['step']}" if self.records else ""
        return f"RunFile({self.name}: {len(self.records)} records{steps}, {len(self.events)} events)"


@dataclass
class RunBuilder:
    """Headers and records in the order of the file, to one series: a resumed run takes the place of what it repeats.

    Example:
        >>> builder = RunBuilder()
        >>> for document in ({"kind": "monitor_run"}, *({"kind": "monitor_record", "step": s} for s in (0, 5, 10)),
        ...                  {"kind": "monitor_run", "resumed_at": 5}, {"kind": "monitor_record", "step": 8}):
        ...     builder.add(document)
        >>> [record["step"] for record in builder.records]
        [0, 5, 8]
    """

    headers: list[Document] = field(default_factory=list)
    records: list[Document] = field(default_factory=list)
    num_replaced: int = 0
    num_earlier_runs: int = 0

    def add(self, document: Document) -> None:
        """Take the next document."""
        if document["kind"] == RUN:
            resumed_at = document.get("resumed_at")
            if resumed_at is None and (self.headers or self.records):  # another run appended to the same file
                self.num_earlier_runs += 1
                self.headers, self.records, self.num_replaced = [], [], 0
            elif resumed_at is not None:
                self._drop_after(int(resumed_at))
            self.headers.append(document)
        else:
            self._drop_after(int(document["step"]) - 1)
            self.records.append(document)

    def _drop_after(self, step: int) -> None:
        while self.records and self.records[-1]["step"] > step:
            self.records.pop()
            self.num_replaced += 1

    def notes(self) -> list[str]:
        """What was left out, in sentences."""
        notes = []
        if self.num_earlier_runs:
            notes.append(f"The file holds {self.num_earlier_runs + 1} runs; the last one is shown.")
        if self.records and not self.headers:
            notes.append("The file has no header, so the optimizer and its limit are not named.")
        if self.num_replaced:
            notes.append(f"The run was resumed: {self.num_replaced} records that it repeated were replaced by the later ones.")
        return notes


def read_run(path: str | os.PathLike[str]) -> RunFile:
    r"""Read a file that ``sk.sinks.jsonl`` wrote.

    A last line torn by a killed process is left out with a note. Where a resumed run repeats steps, the later records count; where the file
    holds several runs, the last one.

    Args:
        path: the file to read.

    Raises:
        FileNotFoundError: there is no such file.
        DocumentError: a line is not one of a monitored run; the message names it and the field.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "run.jsonl"
        ...     _ = path.write_text('{"kind": "monitor_run", "version": 1}\n{"kind": "monitor_record", "ver')
        ...     read_run(path).notes
        ('The last line of run.jsonl is incomplete and was left out: the run was killed, or is writing it.',)
    """
    path, builder, notes, line = Path(as_path("path", path)), RunBuilder(), [], b""
    with open(path, "rb") as stream:
        for index, line in enumerate(iter(lambda: stream.readline(MAX_JSON + 1), b""), start=1):
            try:
                documents = parse_lines([line], path, first=index)
            except DocumentError:
                if line.endswith(b"\n") or len(line) > MAX_JSON:  # written whole, and yet no document
                    raise
                notes.append(f"The last line of {path.name} is incomplete and was left out: the run was killed, or is writing it.")
                break
            for document in documents:
                builder.add(document)
    return RunFile(tuple(builder.headers), tuple(builder.records), (*builder.notes(), *notes), path.name)


def parse_lines(lines: Iterable[bytes], path: Path, *, first: int) -> list[Document]:
    """Documents of whole lines, blank ones skipped; the first of them is line ``first`` of the file, from 1.

    Raises:
        DocumentError: a line is not a header or record of a monitored run; a ValueError.

    Example:
        >>> parse_lines([b"{}"], Path("run.jsonl"), first=7)
        Traceback (most recent call last):
        sharpkit._errors.DocumentError: run.jsonl, line 7: expected a document of kind 'monitor_run' or 'monitor_record', got kind None
    """
    documents = []
    for index, line in enumerate(lines, start=first):
        if not line.strip():
            continue
        where = f"{path}, line {index}"
        document = parse_json(line, where)
        _check(document, where)
        documents.append(document)
    return documents


def _check(document: Any, where: str) -> None:
    if not isinstance(document, dict):
        raise DocumentError(f"{where}: expected a JSON object, got {type(document).__name__}")
    kind, version = document.get("kind"), document.get("version", VERSION)
    if kind not in (RUN, RECORD):
        raise DocumentError(f"{where}: expected a document of kind {RUN!r} or {RECORD!r}, got kind {repr(kind)[:60]}")
    if _is_whole(version) and version > VERSION:
        raise DocumentError(f"{where}: version {version} of the format was written by a newer sharpkit; update this one")
    # what all readers rely on; everything else may be missing from a record
    if kind == RECORD and not (_is_whole(document.get("step")) and isinstance(document.get("values"), dict)):
        raise DocumentError(
            f"{where}: a record needs a whole number 'step' and an object 'values', got the fields {', '.join(document)[:200]}"
        )
    for name, (is_right, expected) in _FIELDS.items():
        if name in document and not is_right(document[name]):
            raise DocumentError(f"{where}: field {name!r} must be {expected}, got {str(document[name])[:60]!r}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53  # beyond it a float, as a picture needs, rounds


def _is_number(value: Any) -> bool:
    return value is None or value in ("inf", "-inf") or isinstance(value, float) or _is_whole(value)


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or "value" not in entry or not _is_whole(entry.get("num_matvecs") or 0):
        return False
    return all(_is_number(entry.get(name)) for name in ("value", "stderr", "limit"))


def _is_event(event: Any) -> bool:
    return isinstance(event, dict) and _is_whole(event.get("step")) and isinstance(event.get("text"), str)


# What the readers of a run count on, where the field is there: whether a value will do, and what was expected.
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "version": (_is_whole, "a whole number"),
    **dict.fromkeys(("num_parameters", "resumed_at"), (lambda count: count is None or _is_whole(count), "a whole number")),
    "every": (lambda every: every in (None, "auto") or _is_whole(every), "a whole number or 'auto'"),
    **dict.fromkeys(("budget", "loss", "lr", "overhead", "seconds"), (_is_number, "a number")),
    "values": (lambda values: all(map(_is_entry, values.values())), "an object of metrics, each with the numbers value, stderr and limit"),
    "failed": (lambda failed: isinstance(failed, dict), "an object of reasons by metric"),
    "events": (lambda events: isinstance(events, list) and all(map(_is_event, events)), "a list of events, each with a step and a text"),
}


def is_run_file(path: Path) -> bool:
    """Whether any file begins as a monitored run does."""
    try:
        with open(path, "rb") as stream:
            begin = stream.readline(65536)  # the file may be anything, without a newline in the first gigabyte
        document = parse_json(begin, str(path))
    except (OSError, ValueError):  # a run of which not even the header was written whole
        return path.suffix == ".jsonl"
    return isinstance(document, dict) and document.get("kind") in (RUN, RECORD)


class RunFollower:
    """New documents of a file that grows, is replaced, or is not there yet.

    Attributes:
        was_replaced: whether the last :meth:`poll` began a file anew.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(as_path("path", path))
        self.was_replaced = False
        # A file may be replaced by another of the same name. Device and inode tell, unless the inode was given out again: then the new one
        # is shorter, or begins with other bytes.
        self._identity: tuple[int, int] | None = None
        self._head = b""
        self._offset = self._lines = 0

    def poll(self) -> list[Document] | None:
        """Documents whose lines were completed since the last call; None while the file does not exist.

        Raises:
            DocumentError: a line is not one of a monitored run.
        """
        try:
            stream = open(self.path, "rb")  # noqa: SIM115 - closed below
        except FileNotFoundError:
            return None
        with stream:
            status = os.fstat(stream.fileno())
            identity = (status.st_dev, status.st_ino)
            other = identity != self._identity or status.st_size < self._offset or stream.read(len(self._head)) != self._head
            self.was_replaced = self._identity is not None and other
            if other:
                self._offset = self._lines = 0
                self._head = b""
            self._identity = identity
            stream.seek(self._offset)
            fresh = stream.read()
        # the last line may be half written: it is read again with the next call
        whole = fresh[: fresh.rfind(b"\n") + 1]
        self._head = self._head or whole[:256]  # the beginning of the header, by which another file is told from this one grown
        self._offset += len(whole)
        lines = whole.splitlines()
        documents = parse_lines(lines, self.path, first=self._lines + 1)
        self._lines += len(lines)
        return documents
