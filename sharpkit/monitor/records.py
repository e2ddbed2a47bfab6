"""What a monitored run leaves behind: one record a measurement, and the series of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sharpkit._results import Result, format_with_error, percent
from sharpkit.linalg.results import Estimate, SpectralDensity
from sharpkit.monitor.events import Event
from sharpkit.monitor.findings import run_findings
from sharpkit.monitor.schema import HISTORY, RECORD, VERSION, in_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes


Array = np.ndarray[Any, Any]


# `limit` stands beside the error it is to be read with; the order is that of the files written so far
@dataclass(frozen=True)
class Measurement(Estimate, saved=("value", "stderr", "limit", "num_matvecs", "seconds", "converged", "method", "error_kind")):
    """An estimate beside the value from which training is unstable.

    Attributes:
        limit: what ``value`` is to be compared with at the learning rate in use; None where there is no such limit.
    """

    limit: float | None = None

    @classmethod
    def of(cls, estimate: Estimate, *, limit: float | None = None, method: str = "") -> Measurement:
        """An estimate with its limit."""
        e = estimate
        return cls(e.value, e.stderr, e.num_matvecs, e.seconds, method or e.method, e.converged, limit, error_kind=e.error_kind)

    @property
    def ratio(self) -> float:
        """value / limit; NaN without a limit."""
        return self.value / self.limit if self.limit else math.nan


# in the order of the files written so far, which put what a reader looks for first
_RECORD_FIELDS = ("step", "loss", "lr", "values", "failed", "events", "num_samples", "seconds", "overhead", "density")


@dataclass(frozen=True)
class Record(Result, kind=RECORD, version=VERSION, saved=_RECORD_FIELDS):
    """Everything measured at one step; ``record["lambda_max"].value``, ``.stderr``, ``.limit``."""

    step: int  # optimizer steps done before it
    values: dict[str, Measurement]  # the measurements by name
    failed: dict[str, str] = field(default_factory=dict)  # what could not be measured, with the error in words
    loss: float = math.nan  # loss of the batch; NaN if unknown
    lr: float = math.nan  # learning rate of the first parameter group
    events: tuple[Event, ...] = ()  # what was noticed, in words
    num_samples: int = 0  # number of samples that were measured
    seconds: float = 0.0  # time that the record took
    overhead: float = 0.0  # time spent measuring so far, divided by the time spent training so far
    density: SpectralDensity | None = None  # the whole spectrum, where the metric "density" was measured

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary, without the density where there is none: nearly all records have none."""
        document = super().to_dict()
        if self.density is None:
            del document["density"]
        return document

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
        # a notebook shows this after every step(): what matters in one line
        parts = [f"{in_words(name)} {_against_limit(m)}" for name, m in self.values.items()]
        parts += [f"{in_words(name)} failed ({reason})" for name, reason in self.failed.items()]
        parts += [event.text for event in self.events]
        return f"Record(step {self.step}: {'; '.join(parts) or 'nothing'})"


def _against_limit(m: Measurement) -> str:
    shown = format_with_error(m.value, m.stderr) + ("" if m.converged else ", not converged")
    return f"{shown} ({percent(m.ratio)} of the limit {m.limit:.4g})" if m.limit else shown


class Series(NamedTuple):
    """One metric over a run, arrays of equal length; NaN where there was no limit."""

    steps: Array
    values: Array
    stderr: Array
    limits: Array


@dataclass(eq=False, repr=False)
class MonitorHistory(Result, Sequence[Record], kind=HISTORY, version=VERSION):
    """The records of one run, in order; a sequence.

    Attributes:
        header: what was monitored, and how.
        records: all records so far.
    """

    header: dict[str, Any] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:  # type: ignore[override]
        return self.records[index]

    def append(self, record: Record) -> None:
        """Add the next record."""
        self.records.append(record)

    @property
    def names(self) -> tuple[str, ...]:
        """All metrics measured at least once."""
        return tuple(dict.fromkeys(name for record in self.records for name in record))

    def series(self, name: str) -> Series:
        """One metric over the run.

        Raises:
            KeyError: it was never measured.
        """
        measured = [(r.step, r[name]) for r in self.records if name in r]
        if not measured:
            raise KeyError(f"{name!r} was never measured; measured were {', '.join(self.names) or 'none'}")
        # NaN, not None: figures leave a gap there
        columns = [(step, m.value, m.stderr, math.nan if m.limit is None else m.limit) for step, m in measured]
        steps, values, stderr, limits = (np.array(column) for column in zip(*columns, strict=True))
        return Series(steps, values, stderr, limits)

    @property
    def events(self) -> tuple[Event, ...]:
        """Everything noticed, in order."""
        return tuple(event for record in self.records for event in record.events)

    def findings(self) -> list[str]:
        """What the run showed, in sentences; its events say more."""
        return run_findings(self.header, [r.to_dict() for r in self.records])

    def __repr__(self) -> str:
        if not self.records:
            return "MonitorHistory(no record yet)"
        first, last = self.records[0], self.records[-1]
        return f"MonitorHistory({len(self)} records, steps {first.step} to {last.step}; last: {last!r})"

    def plot(self, ax: Axes | None = None) -> Axes:
        """The curvature with its errors against the stability limit, events marked."""
        from sharpkit.plots.runs import plot_monitor

        return plot_monitor(self.to_dict(), ax=ax)
