"""Events of a training run, in words: what the curvature, its limit and the loss did together."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from statistics import fmean, median
from typing import Any, ClassVar

from sharpkit._results import format_with_error, json_ready, number
from sharpkit.monitor.schema import CURVATURES, Reading, in_words, reading

MAX_READINGS, MAX_LOSSES = 32, 48
_TO_SIGMA = 1.4826  # median absolute deviation to standard deviation, for a normal distribution


def spread_of_differences(values: Sequence[float], *, about_trend: bool = True) -> float:
    """Standard deviation of independent scatter about a smooth course, from successive differences; 0 for fewer than five values.

    Args:
        values: in the order of time.
        about_trend: take differences about their median, so that a steady trend does not count.

    Example:
        >>> spread_of_differences([1.0, 2.0, 3.0, 4.0, 5.0])
        0.0
    """
    if len(values) < 5:
        return 0.0
    differences = [later - earlier for earlier, later in pairwise(values)]
    middle = statistics.median(differences) if about_trend else 0.0
    return _TO_SIGMA * statistics.median(abs(d - middle) for d in differences) / math.sqrt(2)


class Readings:
    """The last curvature readings, no more than ``MAX_READINGS``."""

    def __init__(self) -> None:
        self.items: deque[Reading] = deque(maxlen=MAX_READINGS)

    def add(self, reading: Reading) -> None:
        self.items.append(reading)

    def last(self, count: int) -> list[Reading]:
        """The last ``count`` readings, or fewer."""
        return list(self.items)[-count:]

    def smooth(self) -> tuple[float, float] | None:
        """Median of the last three values and the largest of their errors and the scatter in memory; None for fewer than three."""
        if len(self.items) < 3:
            return None
        last = self.last(3)
        return statistics.median(r.value for r in last), max(self.scatter(), *(r.stderr for r in last))

    def scatter(self) -> float:
        """Standard deviation of the values about their course; 0 for fewer than five."""
        return spread_of_differences([r.value for r in self.items])

    def before(self, step: int, count: int) -> list[Reading]:
        """The last ``count`` readings at or before a step."""
        return [r for r in self.items if r.step <= step][-count:]

    def state(self) -> list[Any]:
        return [json_ready(list(r)) for r in self.items]

    def load(self, state: list[Any]) -> None:
        self.items = deque((Reading(int(step), *map(number, rest)) for step, *rest in state), MAX_READINGS)


class Losses:
    """The last finite losses with their steps, no more than ``MAX_LOSSES``."""

    def __init__(self) -> None:
        self.items: deque[tuple[int, float]] = deque(maxlen=MAX_LOSSES)

    def add(self, step: int, loss: float) -> None:
        self.items.append((step, loss))

    def values(self) -> list[float]:
        return [loss for _, loss in self.items]

    def since(self, step: int) -> list[float]:
        """Losses at or after a step."""
        return [loss for at, loss in self.items if at >= step]

    def state(self) -> list[Any]:
        return [list(item) for item in self.items]

    def load(self, state: list[Any]) -> None:
        self.items = deque(((int(step), float(loss)) for step, loss in state), MAX_LOSSES)


def blows_up(losses: Sequence[float]) -> bool:
    """Whether losses run away: they end well above where they began, or every one is above the one before.

    Args:
        losses: in the order of time; fewer than three never do.

    Example:
        >>> blows_up([1.0, 1.1, 1.2, 1.3, 1.4]), blows_up([1.0, 1.1, 0.9, 1.2, 0.8])
        (True, False)
    """
    finite = [loss for loss in losses if math.isfinite(loss)]
    if len(finite) < 3:
        return False
    start = max(finite[: max(1, len(finite) // 3)])
    return finite[-1] > start + 0.5 * abs(start) or all(b > a for a, b in pairwise(finite))


@dataclass
class ProgressiveSharpening:
    """The curvature rose by half or more, beyond its errors and its scatter, while it is below the limit.

    It is compared with the lowest level since the last episode, three readings each, so a slow rise counts as well as a fast one.
    """

    kind: ClassVar[str] = "progressive_sharpening"
    factor: ClassVar[float] = 1.5
    num_errors: ClassVar[float] = 4.0  # standard errors of the difference; the lowest of many noisy levels lies about three below

    low: float = math.inf
    low_error: float = math.inf
    low_step: int = -1
    age: int = 0  # readings since the lowest level
    peak: float = -math.inf
    active: bool = False

    def on_reading(self, name: str, readings: Readings) -> str | None:
        smooth = readings.smooth()
        if smooth is None:
            return None
        (value, error), last = smooth, readings.last(3)
        self.age += 1
        if self.active:
            self.peak = max(self.peak, value)
            if value + error < self.peak / self.factor:
                self.active, self.low = False, math.inf
        if value < self.low:
            self.low, self.low_error, self.low_step, self.age = value, error, last[1].step, 0
        if self.active or self.age < 3 or value >= last[-1].limit:
            return None
        clear = value - self.low > self.num_errors * math.hypot(error, max(error, self.low_error))
        if not clear or self.low <= 0 or value < self.factor * self.low:
            return None
        self.active, self.peak = True, value
        return self._text(name, value, error, last)

    def _text(self, name: str, value: float, error: float, last: list[Reading]) -> str:
        limit = last[-1].limit
        below = f", still below the limit {limit:.4g}" if math.isfinite(limit) else ""
        return (
            f"Progressive sharpening: {in_words(name)} rose from {format_with_error(self.low, self.low_error)} (step {self.low_step}) to "
            f"{format_with_error(value, error)} (step {last[1].step}), a factor of {value / self.low:.2g}{below}."
        )


@dataclass
class EdgeOfStability:
    """The curvature has stayed near the limit over five readings, known well enough to say so, and the loss does not run away."""

    kind: ClassVar[str] = "edge_of_stability"
    count: ClassVar[int] = 5
    band: ClassVar[tuple[float, float]] = (0.9, 1.15)
    released: ClassVar[tuple[float, float]] = (0.8, 1.3)

    active: bool = False

    def on_reading(self, name: str, readings: Readings) -> str | None:
        last = [r for r in readings.last(self.count) if math.isfinite(r.ratio)]
        if len(last) < self.count:
            return None
        mean = fmean(r.ratio for r in last)
        if self.active:
            self.active = self.released[0] <= mean <= self.released[1]
            return None
        error = math.sqrt(sum(r.ratio_error**2 for r in last)) / len(last)
        low, high = self.band
        near = all(low - r.ratio_error <= r.ratio <= high + r.ratio_error for r in last)
        if not (near and low <= mean <= high and error <= 0.05) or blows_up([r.loss for r in last]):
            return None
        self.active = True
        return (
            f"Edge of stability: over {len(last)} measurements, steps {last[0].step} to {last[-1].step}, {in_words(name)} has stayed at "
            f"{mean:.2f} +- {max(error, 0.01):.1g} of the limit, now {last[-1].limit:.4g}."
        )


@dataclass
class SelfStabilisation:
    """The curvature crosses the limit again and again, both ways and beyond its errors, while the loss does not run away."""

    kind: ClassVar[str] = "self_stabilisation"
    count: ClassVar[int] = 4
    memory: ClassVar[int] = 128  # readings within which they must come
    margin: ClassVar[float] = 0.01
    num_errors: ClassVar[float] = 3.0  # four times in turn by chance: below one in a million records

    side: int = 0
    crossings: list[list[float]] = field(default_factory=list)  # (readings since, step, loss, lowest and highest limit on the way)
    limits: list[float] = field(default_factory=list)  # lowest and highest since the last one
    active: bool = False

    def on_reading(self, name: str, readings: Readings) -> str | None:
        last = readings.last(1)[0]
        above = last.is_above(1 + self.margin, num_errors=self.num_errors)
        below = last.is_below(1 - self.margin, num_errors=self.num_errors)
        side = 1 if above else -1 if below else self.side
        self.limits = [min([last.limit, *self.limits]), max([last.limit, *self.limits])]
        self.crossings = [[age + 1, *rest] for age, *rest in self.crossings if age + 1 < self.memory]
        if side * self.side < 0:
            self.crossings = [*self.crossings[1 - self.count :], [0, last.step, last.loss, *self.limits]]
            self.limits = []
        self.side = side
        if self.active or len(self.crossings) < self.count:
            self.active = self.active and bool(self.crossings)
            return None
        _, steps, losses, lowest, highest = zip(*self.crossings, strict=True)
        if max(highest) > 1.2 * min(lowest) or blows_up([*losses, last.loss]):
            return None  # a schedule moved the limit, or training is leaving
        self.active = True
        loss = f", while the loss went from {losses[0]:.4g} to {last.loss:.4g}" if math.isfinite(losses[0] + last.loss) else ""
        return (
            f"Self-stabilisation: {in_words(name)} crossed the limit, {last.limit:.4g}, {len(steps)} times, up and down in turn, between "
            f"steps {steps[0]} and {steps[-1]}{loss}; it is {format_with_error(last.value, last.stderr)} now."
        )


@dataclass
class LimitCrossed:
    """The curvature is above the limit by more than twice its error and its scatter, for several readings on end."""

    kind: ClassVar[str] = "limit_crossed"
    count: ClassVar[int] = 3
    released: ClassVar[float] = 0.95

    above: int = 0
    below: int = 0
    since: int = -1
    active: bool = False

    def on_reading(self, name: str, readings: Readings) -> str | None:
        last = readings.last(1)[0]
        error = max(last.stderr, readings.scatter()) if last.value > last.limit else last.stderr
        self.below = self.below + 1 if last.value < self.released * last.limit else 0
        self.active = self.active and self.below < self.count
        if not last._replace(stderr=error).is_above():
            self.above = 0
            return None
        self.above += 1
        self.since = last.step if self.above == 1 else self.since
        if self.active or self.above < self.count:
            return None
        self.active = True
        return (
            f"Limit crossed: {in_words(name)} has been above the limit for {self.above} measurements, {last.step - self.since} steps from "
            f"step {self.since} on; it is {format_with_error(last.value, last.stderr)} against {last.limit:.4g}."
        )


def _shown(reading: Reading) -> str:
    return format_with_error(reading.value, reading.stderr)


@dataclass
class LossSpike:
    """The loss jumps above its recent level by many times its scatter; it says whether the curvature was above the limit just before."""

    kind: ClassVar[str] = "loss_spike"
    least: ClassVar[int] = 12  # losses before anything can be called unusual
    num_spreads: ClassVar[float] = 8.0
    num_log_spreads: ClassVar[float] = 6.0
    share: ClassVar[float] = 0.3  # of the level
    patience: ClassVar[int] = 16  # losses after which a high level is the new level

    ceiling: float = math.inf  # where the spike is over
    length: int = 0
    active: bool = False

    def on_loss(self, step: int, loss: float, name: str, readings: Readings, losses: Losses) -> str | None:
        if not math.isfinite(loss):
            fresh, self.active, self.length, self.ceiling = not self.active, True, 0, losses.items[-1][1] if losses.items else math.inf
            return f"The loss is {loss} at step {step}. {self._explain(step, name, readings)}" if fresh else None
        if self.active:
            self.length += 1
            self.active = loss > self.ceiling and self.length < self.patience
            if not self.active and loss > self.ceiling:
                losses.items.clear()
            return None
        values = losses.values()
        if len(values) < self.least or loss <= values[-1]:
            return None
        level = median(values[-9:])
        if loss - level < self.share * abs(level):
            return None
        spread = max(spread_of_differences(values, about_trend=False), 1e-3 * abs(level), 1e-300)
        if loss - level < self.num_spreads * spread or not self._unusual_factor(loss, values):
            return None
        self.active, self.length = True, 0
        self.ceiling = level + max(3 * spread, 0.1 * abs(level))
        return (
            f"Loss spike: the loss jumped from about {level:.4g} to {loss:.4g} at step {step}, {_times((loss - level) / spread)} its usual "
            f"scatter. {self._explain(step, name, readings)}"
        )

    def _unusual_factor(self, loss: float, values: list[float]) -> bool:
        """Whether the jump is unusual as a factor as well: losses of small batches scatter in proportion to their size."""
        if min(values) <= 0:
            return True
        logs = [math.log(value) for value in values]
        return math.log(loss) - median(logs[-9:]) > self.num_log_spreads * spread_of_differences(logs)

    def _explain(self, step: int, name: str, readings: Readings) -> str:
        recent = [r for r in readings.before(step, 3) if math.isfinite(r.ratio)]
        if not recent or step - recent[-1].step > 3 * _spacing(readings):
            return "No curvature with a limit was measured just before, so it stays unexplained."
        worst = max(reversed(recent), key=lambda r: r.ratio)
        fact = f"{in_words(name)} was {_shown(worst)} at step {worst.step}"
        if worst.is_above():
            return f"Explained by a crossing: {fact}, above the limit {worst.limit:.4g}, so steps along the sharpest direction overshot."
        return f"Not explained by the limit: {fact}, not above {worst.limit:.4g}; look at the data of that step, or at the precision."


def _times(factor: float) -> str:
    return f"{factor:.0f} times" if factor < 1000 else "more than 1000 times"


def _spacing(readings: Readings) -> float:
    """Mean number of steps between readings; infinite for fewer than two."""
    items = readings.items
    return (items[-1].step - items[0].step) / (len(items) - 1) if len(items) > 1 else math.inf


@dataclass
class Catapult:
    """The loss rises steeply, then falls below where it was, and the curvature is clearly lower afterwards."""

    kind: ClassVar[str] = "catapult"
    share: ClassVar[float] = 0.5  # a steep rise: this share of the level, and six times the scatter
    flatter: ClassVar[float] = 0.9
    memory: ClassVar[int] = 24  # losses; the level before the rise is the lowest of the last one to two times as many

    lows: list[list[float]] = field(default_factory=list)  # (loss, step) of the present and the last stretch
    seen: int = 0
    recent: list[float] = field(default_factory=list)
    phase: str = "calm"  # "calm", "up", "fallen"
    low: float = math.inf
    low_step: int = -1
    peak: float = -math.inf
    peak_step: int = -1
    fallen_step: int = -1
    before: list[float] = field(default_factory=list)  # the reading before the rise
    waited: int = 0

    def on_loss(self, step: int, loss: float, name: str, readings: Readings, losses: Losses) -> str | None:
        if not math.isfinite(loss):
            self._calm()
            return None
        self.recent = [*self.recent[-2:], loss]
        smooth = sorted(self.recent)[(len(self.recent) - 1) // 2]
        if self.phase == "calm":
            self._watch(step, smooth, readings, losses)
        elif self.phase == "up":
            if loss > self.peak:
                self.peak, self.peak_step = loss, step
            if smooth <= self.low:
                self.phase, self.fallen_step = "fallen", step
        return None

    def _watch(self, step: int, smooth: float, readings: Readings, losses: Losses) -> None:
        low, low_step = min(self.lows) if self.lows else (math.inf, -1)
        rise = smooth - low
        if self.lows and rise > self.share * abs(low) and rise > 6 * spread_of_differences(losses.values()):
            candidates = readings.before(int(low_step), 1) + [r for r in readings.items if low_step < r.step <= step]
            sharpest = max(candidates, key=lambda r: r.value, default=None)
            if sharpest is None:
                return
            self.phase, self.waited = "up", 0
            self.low, self.low_step, self.peak, self.peak_step = low, int(low_step), max(self.recent), step
            self.before = [float(x) for x in sharpest]
            return
        if self.seen % self.memory == 0:
            self.lows = [*self.lows[-1:], [smooth, step]]
        self.lows[-1] = min(self.lows[-1], [smooth, step])
        self.seen += 1

    def on_reading(self, name: str, readings: Readings) -> str | None:
        if self.phase == "calm":
            return None
        self.waited += 1
        last = readings.last(1)[0]
        if self.phase == "up" and self.waited > MAX_READINGS:
            self._calm()
        if self.phase != "fallen" or last.step < self.fallen_step:
            return None
        before = Reading(int(self.before[0]), *self.before[1:])
        text = None
        if last.value + 2 * last.stderr < self.flatter * (before.value - 2 * before.stderr):
            loss = f"rose from {self.low:.4g} (step {self.low_step}) to {self.peak:.4g} (step {self.peak_step})"
            text = (
                f"Catapult: the loss {loss} and was back below by step {self.fallen_step}; {in_words(name)} fell from {_shown(before)} "
                f"to {_shown(last)}, a flatter place."
            )
        self._calm()
        return text

    def _calm(self) -> None:
        self.phase, self.lows, self.seen, self.before = "calm", [], 0, []


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
