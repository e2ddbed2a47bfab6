"""What a monitored run leaves behind: one record a measurement, and the series of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sharpkit._results import format_with_error, number
from sharpkit.linalg.results import Estimate
from sharpkit.monitor.events import Event
from sharpkit.monitor.findings import run_findings
from sharpkit.monitor.schema import HISTORY, RECORD, VERSION, in_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes


Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Measurement(Estimate):
    """An estimate beside the value from which training is unstable.

    Attributes:
        limit: what ``value`` is to be compared with at the learning rate in use; None where there is no such limit.
    """

    limit: float | None = None

    @classmethod
    def of(cls, estimate: Estimate, *, limit: float | None = None, method: str = "") -> Measurement:
        """An estimate with its limit."""
        e = estimate
        return cls(e.value, e.stderr, e.num_matvecs, e.seconds, method or e.method, e.converged, limit)

    @property
    def ratio(self) -> float:
        """value / limit; NaN without a limit."""
        return self.value / self.limit if self.limit else math.nan

    def to_dict(self) -> dict[str, Any]:
        names = ("value", "stderr", "limit", "num_matvecs", "seconds", "converged", "method")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Measurement:
        """The measurement back from its document."""
        limit = document.get("limit")
        return cls(
            number(document["value"]),
            number(document.get("stderr")),
            int(document.get("num_matvecs", 0)),
            number(document.get("seconds", 0.0)),
            str(document.get("method", "")),
            bool(document.get("converged", True)),
            None if limit is None else number(limit),
        )


@dataclass(frozen=True)
class Record:
    """Everything measured at one step; ``record["lambda_max"].value``, ``.stderr``, ``.limit``.

    Attributes:
        step: optimizer steps done before it.
        values: the measurements by name.
        failed: what could not be measured, with the error in words.
        loss: of the batch; NaN where unknown.
        lr: learning rate of the first parameter group.
        events: what was noticed, in words.
        num_samples: samples measured on.
        seconds: what it cost.
        overhead: time spent measuring so far over time spent training so far.
    """

    step: int
    values: dict[str, Measurement]
    failed: dict[str, str] = field(default_factory=dict)
    loss: float = math.nan
    lr: float = math.nan
    events: tuple[Event, ...] = ()
    num_samples: int = 0
    seconds: float = 0.0
    overhead: float = 0.0

    def __getitem__(self, name: str) -> Measurement:
        if name not in self.values:
            reason = f": {self.failed[name]}" if name in self.failed else f"; measured were {', '.join(self.values) or 'none'}"
            raise KeyError(f"{name!r} was not measured at step {self.step}{reason}")
        return self.values[name]

    def get(self, name: str) -> Measurement | None:
        """A measurement, None where it was not made."""
        return self.values.get(name)

    def __contains__(self, name: object) -> bool:
        return name in self.values

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)

    def __len__(self) -> int:
        return len(self.values)

    def __repr__(self) -> str:
        parts = [f"{in_words(name)} {_against_limit(m)}" for name, m in self.values.items()]
        parts += [f"{in_words(name)} failed ({reason})" for name, reason in self.failed.items()]
        parts += [event.text for event in self.events]
        return f"Record(step {self.step}: {'; '.join(parts) or 'nothing'})"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready but for NaN and infinities."""
        return {
            "kind": RECORD,
            "version": VERSION,
            "step": self.step,
            "loss": self.loss,
            "lr": self.lr,
            "values": {name: m.to_dict() for name, m in self.values.items()},
            "failed": dict(self.failed),
            "events": [event.to_dict() for event in self.events],
            "num_samples": self.num_samples,
            "seconds": self.seconds,
            "overhead": self.overhead,
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Record:
        """The record back from its document."""
        return cls(
            int(document["step"]),
            {name: Measurement.from_dict(m) for name, m in document["values"].items()},
            dict(document.get("failed", {})),
            number(document.get("loss")),
            number(document.get("lr")),
            tuple(Event(e["kind"], int(e["step"]), e["text"]) for e in document.get("events", [])),
            int(document.get("num_samples", 0)),
            number(document.get("seconds", 0.0)),
            number(document.get("overhead", 0.0)),
        )


def _against_limit(m: Measurement) -> str:
    shown = format_with_error(m.value, m.stderr)
    return f"{shown} ({m.ratio:.0%} of the limit {m.limit:.4g})" if m.limit else shown


class Series(NamedTuple):
    """One metric over a run, arrays of equal length; NaN where there was no limit."""

    steps: Array
    values: Array
    stderr: Array
    limits: Array


class MonitorHistory:
    """The records of one run, in order; a sequence.

    Attributes:
        header: what was monitored, and how.
    """

    def __init__(self, header: dict[str, Any] | None = None, records: list[Record] | None = None) -> None:
        self.header: dict[str, Any] = dict(header or {})
        self._records: list[Record] = list(records or [])

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records)

    def __getitem__(self, index: int) -> Record:
        return self._records[index]

    def append(self, record: Record) -> None:
        """Add the next record."""
        self._records.append(record)

    @property
    def names(self) -> tuple[str, ...]:
        """All metrics measured at least once."""
        return tuple(dict.fromkeys(name for record in self._records for name in record))

    def series(self, name: str) -> Series:
        """One metric over the run.

        Raises:
            KeyError: it was never measured.
        """
        found = [(r.step, r[name]) for r in self._records if name in r]
        if not found:
            raise KeyError(f"{name!r} was never measured; measured were {', '.join(self.names) or 'none'}")
        columns = [(step, m.value, m.stderr, math.nan if m.limit is None else m.limit) for step, m in found]
        steps, values, stderr, limits = (np.array(column) for column in zip(*columns, strict=True))
        return Series(steps, values, stderr, limits)

    @property
    def events(self) -> tuple[Event, ...]:
        """Everything noticed, in order."""
        return tuple(event for record in self._records for event in record.events)

    def findings(self) -> list[str]:
        """What the run showed, in sentences; its events say more."""
        return run_findings(self.header, [r.to_dict() for r in self._records])

    def __repr__(self) -> str:
        if not self._records:
            return "MonitorHistory(no record yet)"
        first, last = self._records[0], self._records[-1]
        return f"MonitorHistory({len(self)} records, steps {first.step} to {last.step}; last: {last!r})"

    def to_dict(self) -> dict[str, Any]:
        """Header and records."""
        return {"kind": HISTORY, "version": VERSION, "header": self.header, "records": [record.to_dict() for record in self._records]}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> MonitorHistory:
        """The history back from its document."""
        return cls(dict(document.get("header", {})), [Record.from_dict(r) for r in document["records"]])

    def plot(self, ax: Axes | None = None) -> Axes:
        """The curvature with its errors against the stability limit, events marked."""
        from sharpkit.plots.runs import plot_monitor

        return plot_monitor(self.to_dict(), ax=ax)
