"""Where the records of a monitored run go: JSON lines, CSV, TensorBoard, Weights & Biases, MLflow, Trackio, Aim, any callable.

    monitor = sk.Monitor(..., sinks=[sk.sinks.jsonl("run.jsonl"), sk.sinks.tensorboard(writer), print])

No sink stops a training run: what cannot be written is kept or counted, and warned about once.
"""

from __future__ import annotations

import contextlib
import csv as _csv
import errno
import io
import json
import math
import os
import re
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, cast

from sharpkit._arguments import as_path, real, shown, whole
from sharpkit._errors import SharpkitWarning
from sharpkit._results import json_ready, number, to_json
from sharpkit.monitor.runs import RunFile as RunFile
from sharpkit.monitor.runs import read_run as read_run
from sharpkit.monitor.schema import RUN

__all__ = ["FileSink", "RunFile", "Sink", "aim", "as_sink", "csv", "jsonl", "mlflow", "read_run", "tensorboard", "trackio", "wandb"]


def _mend_tail(path: Path, is_whole: Callable[[bytes], bool]) -> None:
    """Cut off a last line that a killed process left incomplete, or end it if only its newline is missing."""
    with open(path, "rb+") as stream:
        start = end = stream.seek(0, os.SEEK_END)
        while start == end and end > 0:  # backwards, piece by piece, since a file of a long run is large
            begin = max(0, end - 65536)
            stream.seek(begin)
            newline = stream.read(end - begin).rfind(b"\n")
            start, end = (begin, begin) if newline < 0 else (begin + newline + 1, -1)
        stream.seek(start)
        tail = stream.read()
        if not tail:
            return
        if is_whole(tail):
            stream.write(b"\n")
            return
        stream.truncate(start)
    warnings.warn(f"the last line of {path} was torn ({len(tail)} bytes of it were there): it was cut off", SharpkitWarning, stacklevel=4)


Document = Mapping[str, Any]

_MLFLOW = re.compile(r"[^\w\-. /]")  # what MLflow refuses in a name, on Windows too, where it takes no colon
_PICTURE = (6.4, 4.0)  # inches at 100 dots each, by judgement: a tile of a dashboard

# one row a metric, so that a spreadsheet filters by name, and metrics that come later need no column
_COLUMNS = ("step", "metric", "value", "stderr", "limit", "loss", "lr", "num_matvecs", "seconds", "converged", "method", "note")


class Sink:
    """Takes the header and the records of a run; made by the functions of this module.

    A context manager that closes itself. What the place behind it raises is warned about once and counted in ``num_failed``, never raised
    again: training goes on.
    """

    def __init__(self, name: str, write: Callable[[Document], Any], close: Callable[[], Any] | None = None) -> None:
        self.name, self.num_failed = name, 0
        self._write, self._close = write, close

    def open_run(self, header: Document) -> None:
        """Take the header of a run that begins or resumes."""
        self.write(header)

    def write(self, document: Document) -> None:
        """Take one record, or a header."""
        self._try(lambda: self._write(json_ready(document)))

    def close(self) -> None:
        """Write what waits and release the place; closing twice does nothing."""
        close, self._close = self._close, None  # first, so that a close that fails is not tried twice
        if close is not None:
            self._try(close)

    # Exception, not OSError: behind a sink stands foreign code, and none of its errors may end a training run.
    def _try(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:
            self.num_failed += 1
            if self.num_failed == 1:
                warnings.warn(
                    f"the sink {self.name} failed: {type(error).__name__}: {error}. Training goes on; each later record is tried again, "
                    "and further failures are counted in num_failed without another warning.",
                    SharpkitWarning,
                    stacklevel=4,
                )

    def __enter__(self) -> Sink:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Sink({self.name})"


class FileSink(Sink):
    """A text file that only grows, whole lines at a time; an existing one is continued, after a torn last line is cut off.

    Each piece is handed to the operating system in one write, so it survives the process; it is forced to the disk every few seconds and on
    close. When the disk is full, or while another run writes the same file, the pieces wait, bounded in number, and are written afterwards.

    Attributes:
        path: the file it writes.
        num_dropped: writes that were lost because too many waited.
    """

    def __init__(
        self,
        name: str,
        path: str | os.PathLike[str],
        to_text: Callable[[Document], str],
        *,
        is_whole: Callable[[bytes], bool],
        head: str = "",
        sync_seconds: float,
        max_waiting: int,
    ) -> None:
        self.path, self.num_dropped = Path(path), 0
        sync_seconds, max_waiting = real("sync_seconds", sync_seconds, least=0, infinite=True), whole("max_waiting", max_waiting)
        super().__init__(f"{name}({str(path)!r})", lambda document: self.append(to_text(document)), self._finish)
        folder = self.path.absolute().parent
        if not folder.is_dir():
            raise FileNotFoundError(f"cannot write {self.path}: the folder {folder} does not exist; make it first or name another place")
        if self.path.is_dir():
            raise IsADirectoryError(f"cannot write {self.path}: it is a folder; name a file in it")
        self._waiting: deque[bytes] = deque()
        self._max_waiting, self._sync_seconds = max_waiting, sync_seconds
        self._synced, self._warned = time.monotonic(), False
        self._head, self._is_whole = head, is_whole
        # unbuffered: a line handed over is the operating system's and survives the process
        self._file: Any = open(self.path, "ab", buffering=0)  # noqa: SIM115 - it stays open for the whole run
        self._owned = False
        with contextlib.suppress(BlockingIOError):  # said with the first write: of several processes that make the same sink, one writes
            self._own()
            _lock(self._file, self.path, unlock=True)
            self._owned = False

    def _own(self) -> None:
        """Lock the file for this run, and mend it: before that the torn last line may be one that another run is writing.

        Raises:
            BlockingIOError: another run writes it.
        """
        if self.path.is_file() and not self._owned:  # of a pipe or a terminal each run is one of several, as with any program
            _lock(self._file, self.path)
            _mend_tail(self.path, self._is_whole)
        self._owned = True

    @property
    def num_waiting(self) -> int:
        """Writes that a full disk has not taken yet; they are tried again with the next record."""
        return len(self._waiting)

    def append(self, text: str) -> None:
        """Write whole lines, after any that still wait; never raises for lack of space."""
        if not text:
            return
        self._waiting.append(text.encode())  # always through the queue: the order of lines is that of the steps
        while len(self._waiting) > self._max_waiting:
            del self._waiting[1]  # the first may be written in part
            self.num_dropped += 1
        self._flush()

    def _flush(self, *, sync: bool = False) -> None:
        try:
            if self._waiting and not self._owned:
                self._own()
                if self._head and not (self.path.is_file() and self.path.stat().st_size):
                    self._waiting.appendleft(self._head.encode())
            while self._waiting:
                piece = self._waiting[0]
                done = self._file.write(piece) or 0
                if done < len(piece):  # what a full disk did not take stays in its place and follows later
                    self._waiting[0] = piece[done:]
                    if not done:
                        raise OSError(errno.ENOSPC, "the file takes no more bytes")
                else:
                    self._waiting.popleft()
        except OSError as error:
            self._explain(error)
            if not sync:
                return
        try:
            if sync or time.monotonic() - self._synced >= self._sync_seconds:
                self._synced = time.monotonic()
                if self.path.is_file():  # pipes and devices have nothing to force
                    os.fsync(self._file.fileno())
        except OSError as error:
            self._explain(error)

    def _explain(self, error: OSError) -> None:
        if self._warned:
            return
        self._warned = True
        remedy = "Name another file for this run" if isinstance(error, BlockingIOError) else "Make room"
        warnings.warn(
            f"cannot write {self.path}: {error.strerror or error}. Training goes on. {remedy}: up to {self._max_waiting} writes "
            "are kept in memory and tried again with every new one; beyond that the oldest are lost.",
            SharpkitWarning,
            stacklevel=2,
        )

    def _finish(self) -> None:
        """Write what waits, force it to the disk, and say what was lost, if anything."""
        self._flush(sync=True)
        # the file is closed even if it cannot be synced: an open descriptor would outlive the run
        lost = self.num_dropped + len(self._waiting)
        with contextlib.suppress(OSError):
            if self._owned:  # by hand too: a worker process that was forked meanwhile keeps the file, and with it the lock, open
                _lock(self._file, self.path, unlock=True)
            self._file.close()
        if lost:
            why = "the disk did not take them" if self._owned else "another run was writing it"
            warnings.warn(f"{lost} writes to {self.path} were lost: {why}", SharpkitWarning, stacklevel=2)


def _lock(stream: Any, path: Path, *, unlock: bool = False) -> None:
    """Lock a file until it is closed or unlocked, for this process and this opening of it.

    Raises:
        BlockingIOError: it is locked already.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        return
    try:
        fcntl.flock(stream, fcntl.LOCK_UN if unlock else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        reason = "another run writes it (another process, or a sink of this one that was not closed)"
        raise BlockingIOError(error.errno, reason, str(path)) from None
    except OSError:  # some network file systems know no locks: no protection, as before
        return


def jsonl(path: str | os.PathLike[str], *, sync_seconds: float = 5.0, max_waiting: int = 1000) -> FileSink:
    """One JSON document a line: what ``sharpkit report`` and ``sharpkit watch`` read.

    A killed process loses at most the last line, which is cut off when the file is opened again. A full disk is warned about once, and
    what it did not take is tried again with every record.

    Args:
        path: the file to write, conventionally ``run.jsonl``; its folder must exist. An existing run is continued.
        sync_seconds: longest time between two forced writes to the disk.
        max_waiting: documents kept while the disk takes none.

    Raises:
        ValueError: the file holds something else than sharpkit's JSON lines.
        FileNotFoundError: the folder does not exist.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, jsonl(f"{folder}/run.jsonl") as sink:
        ...     sink.open_run({"kind": "monitor_run", "version": 1})
        ...     sink.write({"kind": "monitor_record", "version": 1, "step": 0, "values": {}})
        ...     len(read_run(sink.path).records)
        1
    """
    _refuse_foreign(Path(as_path("path", path)), lambda line: "kind" in json.loads(line), '{"kind": ', "JSON lines of sharpkit")
    return FileSink(
        "jsonl", path, lambda record: to_json(record) + "\n", is_whole=_is_json, sync_seconds=sync_seconds, max_waiting=max_waiting
    )


def csv(path: str | os.PathLike[str], *, sync_seconds: float = 5.0, max_waiting: int = 1000) -> FileSink:
    """A table with one row for each step and metric; the header of the run is not in it.

    Args:
        path, sync_seconds, max_waiting: as for :func:`jsonl`; an existing table is continued.

    Raises:
        ValueError: the file is another table.
        FileNotFoundError: the folder does not exist.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, csv(f"{folder}/run.csv") as sink:
        ...     sink.write({"kind": "monitor_record", "step": 3, "values": {"trace": {"value": 7.5}}})
        ...     print(sink.path.read_text().splitlines()[1])
        3,trace,7.5,,,,,,,,,
    """
    head = ",".join(_COLUMNS)
    _refuse_foreign(Path(as_path("path", path)), lambda line: line.strip() == head, head, f"the columns {head}")
    return FileSink(
        "csv",
        path,
        _rows,
        is_whole=lambda tail: tail.decode(errors="replace") == head,
        head=head + "\n",
        sync_seconds=sync_seconds,
        max_waiting=max_waiting,
    )


def tensorboard(target: Any) -> Sink:
    """Scalars ``sharpkit/<metric>`` with their errors, limits and ratios, events as text, and pictures of densities.

    Args:
        target: a ``SummaryWriter``, or anything with ``add_scalar``; or the folder of a new one.

    Raises:
        ImportError: a folder was named and the tensorboard package is missing.
        TypeError: neither a folder nor a writer.

    Example:
        >>> from types import SimpleNamespace
        >>> writer = SimpleNamespace(add_scalar=lambda tag, value, step: print(tag, value, step))
        >>> tensorboard(writer).write({"kind": "monitor_record", "step": 3, "values": {"trace": {"value": 7.5}}})
        sharpkit/trace 7.5 3
    """
    if isinstance(target, (str, os.PathLike)):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(f"sinks.tensorboard needs the tensorboard package: pip install tensorboard ({error})") from error
        writer: Any = SummaryWriter(os.fspath(target))  # type: ignore[no-untyped-call]
        return Sink(f"tensorboard({str(target)!r})", lambda document: _to_tensorboard(writer, document), writer.close)
    if not callable(getattr(target, "add_scalar", None)):
        raise TypeError(f"expected a SummaryWriter, anything with add_scalar(tag, value, step), or a folder; got {type(target).__name__}")
    return Sink(f"tensorboard({type(target).__name__})", lambda document: _to_tensorboard(target, document), getattr(target, "flush", None))


def wandb(run: Any) -> Sink:
    """Scalars ``sharpkit/<metric>``, and pictures of densities, to a Weights & Biases run.

    A run with ``define_metric`` gets the steps as the axis of these metrics and keeps its own step count; any other object is called as
    ``run.log(scalars, step=step)``. The caller finishes the run.

    Args:
        run: ``wandb.init(...)``, or anything with ``log(dict, step=...)``.

    Raises:
        TypeError: it has no ``log``.

    Example:
        >>> from types import SimpleNamespace
        >>> run = SimpleNamespace(log=lambda scalars, step: print(scalars, step))
        >>> wandb(run).write({"kind": "monitor_record", "step": 3, "values": {"trace": {"value": 7.5}}})
        {'sharpkit/trace': 7.5} 3
    """
    if not callable(getattr(run, "log", None)):
        raise TypeError(f"expected a Weights & Biases run, or anything with log(dict, step=...); got {type(run).__name__}")
    own_axis = callable(getattr(run, "define_metric", None))
    held_at: list[Any] = [None]  # the run's own step at which our last record waits for company
    if own_axis:
        run.define_metric("sharpkit/step", hidden=True)
        run.define_metric("sharpkit/*", step_metric="sharpkit/step")

    def write(document: Document) -> None:
        if document.get("kind") == RUN:
            return
        step = int(document["step"])
        scalars = _logged(run, document)
        if not own_axis:
            run.log(scalars, step=step)
            return
        if held_at[0] is not None and held_at[0] == getattr(run, "step", None):
            run.log({}, commit=True)  # nobody logged in between: without this the next record would replace the last
        # committing each would advance the run's own count, and it would then refuse the steps that its owner names
        run.log({"sharpkit/step": step, **scalars}, commit=False)
        held_at[0] = getattr(run, "step", None)

    return Sink(f"wandb({type(run).__name__})", write)


def trackio(run: Any) -> Sink:
    """Scalars ``sharpkit/<metric>``, and pictures of densities, to a Trackio run.

    Args:
        run: ``trackio.init(...)``, the module ``trackio`` itself, or anything with ``log(dict, step=...)``. The caller finishes the run.

    Raises:
        TypeError: it has no ``log``.

    Example:
        >>> from types import SimpleNamespace
        >>> run = SimpleNamespace(log=lambda scalars, step: print(scalars, step))
        >>> trackio(run).write({"kind": "monitor_record", "step": 3, "values": {"trace": {"value": 7.5}}})
        {'sharpkit/trace': 7.5} 3
    """
    if not callable(getattr(run, "log", None)):
        raise TypeError(f"expected a Trackio run, or anything with log(dict, step=...); got {type(run).__name__}")

    def write(document: Document) -> None:
        if document.get("kind") != RUN:
            run.log(_logged(run, document), step=int(document["step"]))

    return Sink(f"trackio({type(run).__name__})", write)


def mlflow(target: Any) -> Sink:
    """Metrics ``sharpkit/<metric>`` to the active MLflow run; the header as ``sharpkit/run.json``, and pictures of densities.

    Characters that MLflow does not take in names, as those of a function's name, become underscores.

    Args:
        target: the module ``mlflow``, or anything with ``log_metrics(dict, step=...)``. The caller starts and ends the run.

    Raises:
        TypeError: it has no ``log_metrics``.

    Example:
        >>> from types import SimpleNamespace
        >>> target = SimpleNamespace(log_metrics=lambda metrics, step: print(metrics, step))
        >>> mlflow(target).write({"kind": "monitor_record", "step": 3, "values": {"trace": {"value": 7.5}}})
        {'sharpkit/trace': 7.5} 3
    """
    if not callable(getattr(target, "log_metrics", None)):
        raise TypeError(f"expected the module mlflow, or anything with log_metrics(dict, step=...); got {type(target).__name__}")

    def write(document: Document) -> None:
        if document.get("kind") == RUN:
            if callable(getattr(target, "log_dict", None)):
                target.log_dict(dict(document), "sharpkit/run.json")
            return
        step = int(document["step"])
        target.log_metrics({_MLFLOW.sub("_", f"sharpkit/{name}"): value for name, value in scalars_of(document).items()}, step=step)
        if callable(getattr(target, "log_image", None)):
            for name, picture in pictures_of(document).items():
                target.log_image(picture, key=f"sharpkit/{name}", step=step)

    return Sink(f"mlflow({getattr(target, '__name__', type(target).__name__)})", write)


def aim(run: Any) -> Sink:
    """Metrics ``sharpkit/<metric>``, and pictures of densities, to an Aim run; the header as its parameter ``sharpkit``.

    Args:
        run: ``aim.Run(...)``, or anything with ``track(value, name=..., step=...)``. The caller closes the run.

    Raises:
        TypeError: it has no ``track``.

    Example:
        >>> from types import SimpleNamespace
        >>> run = SimpleNamespace(track=lambda value, name, step: print(name, value, step))
        >>> aim(run).write({"kind": "monitor_record", "step": 3, "values": {"trace": {"value": 7.5}}})
        sharpkit/trace 7.5 3
    """
    if not callable(getattr(run, "track", None)):
        raise TypeError(f"expected an Aim run, or anything with track(value, name=..., step=...); got {type(run).__name__}")

    def write(document: Document) -> None:
        if document.get("kind") == RUN:
            if hasattr(run, "__setitem__"):
                run["sharpkit"] = {name: value for name, value in document.items() if value is not None}  # Aim stores no null
            return
        for name, value in _logged(run, document).items():
            run.track(value, name=name, step=int(document["step"]))

    return Sink(f"aim({type(run).__name__})", write)


class SinkLike(Protocol):
    """What a monitor writes to: a :class:`Sink`, or any object with these three methods."""

    def open_run(self, header: Document, /) -> None: ...
    def write(self, document: Document, /) -> None: ...
    def close(self) -> None: ...


SinkPlace = SinkLike | str | os.PathLike[str] | Callable[[Document], Any]


def as_sink(place: SinkPlace) -> SinkLike:
    """What a user may pass as a sink, as a sink.

    Args:
        place: a sink; a path that ends in ``.jsonl`` or ``.csv``; a callable, which gets each record as a dictionary, but no header.

    Raises:
        TypeError: none of these.
        ValueError: a path with another ending.

    Example:
        >>> seen = []
        >>> as_sink(seen.append).write({"kind": "monitor_record", "step": 1})
        >>> seen
        [{'kind': 'monitor_record', 'step': 1}]
    """
    if all(callable(getattr(place, name, None)) for name in ("open_run", "write", "close")):
        return cast(SinkLike, place)
    if isinstance(place, (str, os.PathLike)):
        makers = {".jsonl": jsonl, ".csv": csv}
        if (ending := Path(place).suffix) not in makers:
            raise ValueError(f"cannot tell what to write to {place}: expected a name that ends in .jsonl or .csv, or an sk.sinks sink")
        return makers[ending](place)
    if callable(place):
        return Sink(getattr(place, "__qualname__", repr(place)), lambda document: None if document.get("kind") == RUN else place(document))
    raise TypeError(f"expected a sink of sk.sinks, a path or a callable that takes one record, got {type(place).__name__}")


def as_sinks(places: SinkPlace | Iterable[SinkPlace] | None) -> list[SinkLike]:
    """One place, several, or None for nowhere, as sinks."""
    single = callable(places) or hasattr(places, "write") or isinstance(places, (str, os.PathLike))
    if places is not None and not single and (isinstance(places, Mapping) or not isinstance(places, Iterable)):
        raise TypeError(f"sinks must be a sink of sk.sinks, a path, a function of one record, or a list of these, got {shown(places)}")
    return [as_sink(place) for place in cast(Iterable[SinkPlace], [places] if single else places or ())]


# -- what the places are given ------------------------------------------------------------------------------------------------------
def scalars_of(document: Document) -> dict[str, float]:
    """The finite numbers of a record by name: metrics with their errors, limits and ratios, loss, learning rate, overhead."""
    values: dict[str, float] = {name: number(document.get(name)) for name in ("loss", "lr", "overhead")}
    for name, entry in document["values"].items():
        value, limit = number(entry["value"]), number(entry.get("limit"))
        values |= {name: value, f"{name}_stderr": number(entry.get("stderr")), f"{name}_limit": limit}
        values[f"{name}_over_limit"] = value / limit if limit > 0 else math.nan
    return {name: value for name, value in values.items() if math.isfinite(value)}  # dashboards draw NaN as 0 or refuse it


def pictures_of(document: Document) -> dict[str, Any]:
    """The pictures of a record by name, as PIL images: its density, where it has one."""
    if document.get("density") is None:
        return {}
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    from sharpkit.linalg.results import SpectralDensity  # here, since the sinks load without torch

    figure = Figure(figsize=_PICTURE, dpi=100, layout="constrained")  # not pyplot's: nothing stays open, no backend is chosen
    canvas: Any = FigureCanvasAgg(figure)
    axes = SpectralDensity.from_dict(document["density"]).plot(figure.add_subplot())
    axes.set_title(f"step {document['step']}")
    canvas.draw()
    return {"density": Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])}


def _logged(run: Any, document: Document) -> dict[str, Any]:
    """What a run is given at one step: scalars, and pictures in the class Image of the library that made it, where there is one."""
    logged: dict[str, Any] = {f"sharpkit/{name}": value for name, value in scalars_of(document).items()}
    library = sys.modules.get(type(run).__module__.partition(".")[0])  # wandb, trackio and aim have theirs at the top
    wrap = getattr(run, "Image", None) or getattr(library, "Image", None)
    if callable(wrap):
        logged |= {f"sharpkit/{name}": wrap(picture) for name, picture in pictures_of(document).items()}
    return logged


def _to_tensorboard(writer: Any, document: Document) -> None:
    if document.get("kind") == RUN:
        if callable(getattr(writer, "add_text", None)):
            writer.add_text("sharpkit/run", "\n\n".join(f"{name}: {value}" for name, value in document.items()), 0)
        return
    step = int(document["step"])
    for name, value in scalars_of(document).items():
        writer.add_scalar(f"sharpkit/{name}", value, step)
    if callable(getattr(writer, "add_image", None)):
        import numpy as np

        for name, picture in pictures_of(document).items():
            writer.add_image(f"sharpkit/{name}", np.asarray(picture), step, dataformats="HWC")
    if callable(getattr(writer, "add_text", None)):
        for event in document.get("events", ()):
            writer.add_text("sharpkit/events", f"step {event['step']}: {event['text']}", step)


def _rows(document: Document) -> str:
    """The rows of one record; nothing for a header."""
    if document.get("kind") == RUN:
        return ""
    common = {name: document.get(name) for name in ("step", "loss", "lr")}
    rows: list[dict[str, Any]] = [{**entry, **common, "metric": name} for name, entry in document["values"].items()]
    for name, text in document.get("failed", {}).items():
        rows.append({**common, "metric": name, "note": f"failed: {' '.join(text.split())}"})
    for event in document.get("events", ()):
        rows.append({**common, "step": event["step"], "metric": f"event/{event['kind']}", "note": " ".join(event["text"].split())})
    buffer = io.StringIO()
    _csv.DictWriter(buffer, _COLUMNS, extrasaction="ignore", lineterminator="\n").writerows(rows)
    return buffer.getvalue()


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _refuse_foreign(path: Path, is_ours: Callable[[str], bool], begins: str, expected: str) -> None:
    """An existing file of another kind is not written into."""
    if not path.is_file():
        return
    with open(path, encoding="utf-8", errors="replace") as stream:
        line = stream.readline()
    try:
        ours = is_ours(line) if line.endswith("\n") else line.startswith(begins) or begins.startswith(line)  # one torn line, or empty
    except (ValueError, TypeError):
        ours = False
    if not ours:
        raise ValueError(f"{path} exists and does not begin with {expected}; name another file, or move that one away")
