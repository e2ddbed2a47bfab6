"""Events of a training run, in words: what the curvature, its limit and the loss did together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from sharpkit._json import json_ready, number
from sharpkit._run_schema import CURVATURES, reading
from sharpkit.training._curvature_events import EdgeOfStability, LimitCrossed, ProgressiveSharpening, SelfStabilisation
from sharpkit.training._loss_events import Catapult, LossSpike
from sharpkit.training._windows import Losses, Readings

EVENT_KINDS = tuple(d.kind for d in (ProgressiveSharpening, EdgeOfStability, SelfStabilisation, LimitCrossed, Catapult, LossSpike))


@dataclass(frozen=True)
class Event:
    """Something a run did, noticed at a step.

    Attributes:
        kind: one of ``EVENT_KINDS``.
        step: optimizer steps done when it was noticed.
        text: what happened, with its numbers.

    Example:
        >>> Event("loss_spike", 7, "Loss spike: ...").to_dict()
        {'kind': 'loss_spike', 'step': 7, 'text': 'Loss spike: ...'}
    """

    kind: str
    step: int
    text: str

    def __str__(self) -> str:
        return f"step {self.step}: {self.text}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, JSON-ready."""
        return asdict(self)


class EventDetector:
    """Finds the events of one run as its records come in; memory and work for each are bounded.

    An event is reported once, when it begins; it can come again after its episode is over. The curvature is the most telling one that the
    run measures: ``preconditioned_lambda_max``, else ``lambda_max``, else ``probe_lambda_max``, each held against its own limit, and no
    change counts that lies within the errors or the scatter of the readings.

    ===========================  ====================================================================================================
    ``progressive_sharpening``   rose by half or more above its lowest level, still below the limit
    ``edge_of_stability``        five readings near the limit (0.9 to 1.15 of it), the loss not running away
    ``self_stabilisation``       crossed the limit four times, up and down in turn, the loss not running away
    ``limit_crossed``            three readings on end above the limit by more than twice their error
    ``catapult``                 the loss rose steeply and fell below where it was; the curvature is clearly lower afterwards
    ``loss_spike``               the loss jumped; explained where the curvature was above the limit just before
    ===========================  ====================================================================================================

    Example:
        >>> detector = EventDetector()
        >>> for step in range(3):
        ...     values = {"lambda_max": {"value": 25.0, "stderr": 0.1, "limit": 20.0}}
        ...     events = detector.update({"step": 10 * step, "loss": 1.0, "values": values})
        >>> print(events[0])
        step 20: Limit crossed: lambda_max has been above the limit for 3 measurements, 20 steps from step 0 on; it is 25 +- 0.1 against 20.

    References:
        Cohen et al. 2021, 2103.00065 (progressive sharpening, edge of stability); Damian, Nichani, Lee 2022, 2209.15594
        (self-stabilisation); Lewkowycz et al. 2020, 2003.02218 (catapult).
    """

    def __init__(self) -> None:
        self._metric = ""
        self._pending: list[Event] = []  # begun in the losses since the last record
        self._last_step = self._last_loss_step = -1
        self._readings, self._losses = Readings(), Losses()
        self._begin()

    def _begin(self) -> None:
        self._on_curvature = (ProgressiveSharpening(), EdgeOfStability(), SelfStabilisation(), LimitCrossed())
        self._catapult, self._spike = Catapult(), LossSpike()

    def update(self, record: Mapping[str, Any]) -> list[Event]:
        """Take the next record.

        Args:
            record: a ``monitor_record`` with at least ``step`` and ``values``; its loss counts unless :meth:`update_loss` had that step.

        Returns:
            The events that began here, or in the losses since the last record.
        """
        step = int(record["step"])
        if step < self._last_step:  # the run went back to an earlier state
            self._forget()
        self._last_step = step
        events = self._update_curvature(record)
        loss = number(record.get("loss"))
        if not math.isnan(loss):  # NaN in a record says that the loss is unknown
            self.update_loss(step, loss)
        found, self._pending = [*self._pending, *events], []
        return sorted(found, key=lambda event: event.step)

    def update_loss(self, step: int, loss: float) -> None:
        """Take the loss of a step that may have no record, so that what happens between measurements is seen; costs microseconds.

        What begins here comes with the next :meth:`update`.

        Args:
            step: optimizer steps done.
            loss: of that step; NaN and infinity count as a spike.
        """
        if step < self._last_step:
            self._forget()
            self._last_step = step
        if step <= self._last_loss_step:
            return
        self._last_loss_step = step
        name = self._metric or "the curvature"
        found = [(d.kind, d.on_loss(step, loss, name, self._readings, self._losses)) for d in (self._catapult, self._spike)]
        if math.isfinite(loss) and not self._spike.active:
            self._losses.add(step, loss)
        self._pending += [Event(kind, step, text) for kind, text in found if text]

    def _update_curvature(self, record: Mapping[str, Any]) -> list[Event]:
        metric = next((name for name in CURVATURES if name in record["values"]), "")
        rank = CURVATURES.index
        if not metric or (self._metric and rank(metric) > rank(self._metric)):
            return []
        seen = reading(record, metric)
        if seen is None:
            return []
        if metric != self._metric:  # a more telling curvature: its course is another one
            self._metric = metric
            self._readings = Readings()
            self._on_curvature = (ProgressiveSharpening(), EdgeOfStability(), SelfStabilisation(), LimitCrossed())
        self._readings.add(seen)
        found = [(d.kind, d.on_reading(metric, self._readings)) for d in (*self._on_curvature, self._catapult)]
        return [Event(kind, seen.step, text) for kind, text in found if text]

    def _forget(self) -> None:
        self._last_step = self._last_loss_step = -1
        self._readings, self._losses = Readings(), Losses()
        self._begin()

    def state_dict(self) -> dict[str, Any]:
        """Everything a later process needs to go on, JSON-ready."""
        return {
            "version": 1,
            "metric": self._metric,
            "last_step": self._last_step,
            "last_loss_step": self._last_loss_step,
            "pending": [event.to_dict() for event in self._pending],
            "readings": self._readings.state(),
            "losses": self._losses.state(),
            "detectors": {d.kind: json_ready(asdict(d)) for d in (*self._on_curvature, self._catapult, self._spike)},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` saved.

        Raises:
            ValueError: it was written by another version.
        """
        if state.get("version") != 1:
            raise ValueError(f"expected the state of an EventDetector, version 1, got version {state.get('version')!r}")
        self._forget()
        self._metric = str(state["metric"])
        self._last_step, self._last_loss_step = int(state["last_step"]), int(state["last_loss_step"])
        self._pending = [Event(**event) for event in state["pending"]]
        self._readings.load(state["readings"])
        self._losses.load(state["losses"])
        for detector in (*self._on_curvature, self._catapult, self._spike):
            saved = state["detectors"][detector.kind]
            for each in fields(detector):
                setattr(detector, each.name, _restored(saved[each.name]))


def _restored(value: Any) -> Any:
    """What :func:`json_ready` made of a detector's field, back: null was NaN, and infinities were words."""
    if isinstance(value, list):
        return [_restored(item) for item in value]
    return number(value) if value in (None, "inf", "-inf") else value
