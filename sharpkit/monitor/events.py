"""Events of a training run, in words: what the curvature, its limit and the loss did together."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean, median
from typing import Any, ClassVar

from sharpkit._results import Parts, Result, State, format_with_error, number
from sharpkit.monitor.schema import CURVATURES, Reading, in_words, reading

# Memory is bounded, by judgement: the scatter, a median of absolute differences, is known to about a fifth from so many.
MAX_READINGS, MAX_LOSSES = 32, 48
_TO_SIGMA = 1.4826  # median absolute deviation to standard deviation of a normal distribution: 1 / 0.6745 (Hampel 1974)

Readings = deque[Reading]
Losses = deque[tuple[int, float]]  # (step, loss), finite ones only
Rates = deque[tuple[int, float]]  # (step, learning rate) from each step at which it changed


# -- statistics of a course -----------------------------------------------------------------------------------------------------
def spread_of_differences(values: Sequence[float], *, about_trend: bool = True) -> float:
    """Standard deviation of independent scatter about a smooth course, from successive differences; 0 for fewer than five values.

    The differences are taken ``about_trend``, their median, so that a steady trend does not count.

    Example:
        >>> spread_of_differences([1.0, 2.0, 3.0, 4.0, 5.0])
        0.0
    """
    if len(values) < 5:
        return 0.0
    differences = [later - earlier for earlier, later in pairwise(values)]
    middle = median(differences) if about_trend else 0.0
    # a difference of two independent values has sqrt(2) times the deviation of one; the median ignores single jumps, which are events
    return _TO_SIGMA * median(abs(d - middle) for d in differences) / math.sqrt(2)


def blows_up(losses: Sequence[float]) -> bool:
    """Whether losses, fewer than three never, run away: they end well above where they began, or every one is above the one before.

    Example:
        >>> blows_up([1.0, 1.1, 1.2, 1.3, 1.4]), blows_up([1.0, 1.1, 0.9, 1.2, 0.8])
        (True, False)
    """
    finite = [loss for loss in losses if math.isfinite(loss)]
    if len(finite) < 3:
        return False
    start = max(finite[: max(1, len(finite) // 3)])
    return finite[-1] > start + 0.5 * abs(start) or all(b > a for a, b in pairwise(finite))


def _up_to(readings: Readings, step: int, count: int) -> list[Reading]:
    """The last ``count`` readings at or before a step."""
    return [r for r in readings if r.step <= step][-count:]


def _shown(reading: Reading) -> str:
    return format_with_error(reading.value, reading.stderr)


# -- detectors of the curvature's events ------------------------------------------------------------------------------------------
# Each is a state of a few numbers, told of every reading (and, further below, of every loss); it returns a sentence when its event begins.
# Thresholds without another source are by judgement: tests/monitor/test_events.py holds them against gradient descent with known Hessians,
# where the events occur, and against noise, decays and quadratics, where they must not.
@dataclass
class ProgressiveSharpening(State):
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
        if len(readings) < 3:
            return None
        last = list(readings)[-3:]
        value = median(r.value for r in last)
        error = max(spread_of_differences([r.value for r in readings]), *(r.stderr for r in last))
        self.age += 1
        if self.active:
            self.peak = max(self.peak, value)
            if value + error < self.peak / self.factor:  # the episode is over when it fell by what it must rise to begin
                self.active, self.low = False, math.inf
        if value < self.low:
            self.low, self.low_error, self.low_step, self.age = value, error, last[1].step, 0
        limit = last[-1].limit
        # for three readings the two levels would have readings in common
        if self.active or self.age < 3 or value >= limit:
            return None
        clear = value - self.low > self.num_errors * math.hypot(error, max(error, self.low_error))
        if not clear or self.low <= 0 or value < self.factor * self.low:
            return None
        self.active, self.peak = True, value
        below = f", still below the limit {limit:.4g}" if math.isfinite(limit) else ""
        return (
            f"Progressive sharpening: {name} rose from {format_with_error(self.low, self.low_error)} (step {self.low_step}) to "
            f"{format_with_error(value, error)} (step {last[1].step}), a factor of {value / self.low:.2g}{below}."
        )


@dataclass
class EdgeOfStability(State):
    """The curvature came to the limit, has stayed near it over five readings and touched it, and the loss does not run away."""

    kind: ClassVar[str] = "edge_of_stability"
    count: ClassVar[int] = 5
    # experiments/monitor_edge.py: over the last third of full-batch runs the mean is 1.00 to 1.02 of the limit (gradient descent) and 0.97
    # to 0.98 (Adam); single readings oscillate about it
    band: ClassVar[tuple[float, float]] = (0.9, 1.15)
    released: ClassVar[tuple[float, float]] = (0.8, 1.3)  # wider, so that a run on the rim of the band is one episode

    active: bool = False
    came: bool = False  # whether it was ever clearly outside of the band: what is near the limit from the first step on went nowhere

    def on_reading(self, name: str, readings: Readings) -> str | None:
        self.came = self.came or readings[-1].is_below(self.band[0]) or readings[-1].is_above(self.band[1])
        last = [r for r in list(readings)[-self.count :] if math.isfinite(r.ratio)]
        if len(last) < self.count:
            return None
        mean = fmean(r.ratio for r in last)
        if self.active:
            self.active = self.released[0] <= mean <= self.released[1]
            return None
        error = math.sqrt(sum(r.ratio_error**2 for r in last)) / len(last)
        low, high = self.band
        near = all(low - r.ratio_error <= r.ratio <= high + r.ratio_error for r in last)
        # an error above 0.05 would let values far from the limit pass for near; a divergence also passes through the band
        if not (near and low <= mean <= high and error <= 0.05) or blows_up([r.loss for r in last]):
            return None
        # Adam settles a little below the limit and touches it now and then; a curvature that has not moved must lie at the limit itself
        if not any(r.touches for r in last) or not (self.came or mean >= 1 - 2 * error):
            return None
        self.active = True
        return (
            f"Edge of stability: over {len(last)} measurements, steps {last[0].step} to {last[-1].step}, {name} has stayed at "
            f"{mean:.2f} +- {max(error, 0.01):.1g} of the limit, now {last[-1].limit:.4g}."
        )


@dataclass
class SelfStabilisation(State):
    """The curvature crosses the limit again and again, both ways and beyond its errors, while the loss does not run away."""

    kind: ClassVar[str] = "self_stabilisation"
    count: ClassVar[int] = 4
    memory: ClassVar[int] = 128  # readings within which they must come
    margin: ClassVar[float] = 0.01
    num_errors: ClassVar[float] = 3.0  # four times in turn by chance: below one in a million records

    side: int = 0  # of the limit: 1 above, -1 below, 0 before it was clearly on either
    # readings since, step, loss, lowest and highest limit since the crossing before
    crossings: list[tuple[int, int, float, float, float]] = field(default_factory=list)
    limits: list[float] = field(default_factory=list)  # lowest and highest since the last crossing
    active: bool = False

    def on_reading(self, name: str, readings: Readings) -> str | None:
        last = readings[-1]
        above = last.is_above(1 + self.margin, num_errors=self.num_errors)
        below = last.is_below(1 - self.margin, num_errors=self.num_errors)
        side = 1 if above else -1 if below else self.side
        lowest, highest = min([last.limit, *self.limits]), max([last.limit, *self.limits])
        self.limits = [lowest, highest]
        self.crossings = [(age + 1, *rest) for age, *rest in self.crossings if age + 1 < self.memory]  # type: ignore[misc]
        if side * self.side < 0:
            self.crossings = [*self.crossings[1 - self.count :], (0, last.step, last.loss, lowest, highest)]
            self.limits = []
        self.side = side
        if self.active or len(self.crossings) < self.count:
            self.active = self.active and bool(self.crossings)
            return None
        _, steps, losses, lows, highs = zip(*self.crossings, strict=True)
        if max(highs) > 1.2 * min(lows) or blows_up([*losses, last.loss]):
            return None  # a schedule moved the limit, or training is leaving
        self.active = True
        loss = f", while the loss went from {losses[0]:.4g} to {last.loss:.4g}" if math.isfinite(losses[0] + last.loss) else ""
        return (
            f"Self-stabilisation: {name} crossed the limit, {last.limit:.4g}, {len(steps)} times, up and down in turn, between "
            f"steps {steps[0]} and {steps[-1]}{loss}; it is {_shown(last)} now."
        )


@dataclass
class LimitCrossed(State):
    """The curvature is above the limit by more than twice its error and its scatter, for several readings in a row."""

    kind: ClassVar[str] = "limit_crossed"
    count: ClassVar[int] = 3  # a single reading above may be one unusual batch
    released: ClassVar[float] = 0.95

    above: int = 0
    below: int = 0
    since: int = -1
    active: bool = False

    def on_reading(self, name: str, readings: Readings) -> str | None:
        last = readings[-1]
        error = max(last.stderr, spread_of_differences([r.value for r in readings])) if last.value > last.limit else last.stderr
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
            f"Limit crossed: {name} has been above the limit for {self.above} measurements, {last.step - self.since} steps from "
            f"step {self.since} on; it is {_shown(last)} against {last.limit:.4g}."
        )


# -- detectors of the loss's events -------------------------------------------------------------------------------------------------
@dataclass
class Catapult(State):
    """The loss rises steeply, then falls below where it was, and the curvature is clearly lower afterwards."""

    kind: ClassVar[str] = "catapult"
    share: ClassVar[float] = 0.5  # a steep rise: this share of the level, and six times the scatter
    flatter: ClassVar[float] = 0.9
    memory: ClassVar[int] = 24  # losses; the level before the rise is the lowest of the last one to two times as many

    lows: list[tuple[float, int]] = field(default_factory=list)  # (loss, step), lowest of the last stretch and of the present one
    seen: int = 0
    recent: list[float] = field(default_factory=list)  # the last three losses: their median is the level, so that one batch decides nothing
    phase: str = "calm"  # "calm", "up", "fallen"
    low: float = math.inf
    low_step: int = -1
    peak: float = -math.inf
    peak_step: int = -1
    fallen_step: int = -1
    before: list[float] = field(default_factory=list)  # the sharpest reading before the peak
    waited: int = 0

    def on_loss(self, step: int, loss: float, name: str, readings: Readings, losses: Losses, rates: Rates) -> str | None:
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
        return None  # whether it was a catapult is known with the next reading

    def _watch(self, step: int, smooth: float, readings: Readings, losses: Losses) -> None:
        """Keep the lowest level of the last stretches until the loss rises steeply above it."""
        low, low_step = min(self.lows) if self.lows else (math.inf, -1)
        rise = smooth - low
        if self.lows and rise > self.share * abs(low) and rise > 6 * spread_of_differences([value for _, value in losses]):
            candidates = _up_to(readings, low_step, 1) + [r for r in readings if low_step < r.step <= step]
            sharpest = max(candidates, key=lambda r: r.value, default=None)
            if sharpest is None:
                return
            self.phase, self.waited = "up", 0
            self.low, self.low_step, self.peak, self.peak_step = low, low_step, max(self.recent), step
            self.before = [float(x) for x in sharpest]
            return
        if self.seen % self.memory == 0:
            self.lows = [*self.lows[-1:], (smooth, step)]
        self.lows[-1] = min(self.lows[-1], (smooth, step))
        self.seen += 1

    def on_reading(self, name: str, readings: Readings) -> str | None:
        if self.phase == "calm":
            return None
        self.waited += 1
        last = readings[-1]
        if self.phase == "up" and self.waited > MAX_READINGS:  # a new level, from which there is no way back
            self._calm()
        if self.phase != "fallen" or last.step < self.fallen_step:
            return None
        before = Reading(int(self.before[0]), *self.before[1:])
        text = None
        if last.value + 2 * last.stderr < self.flatter * (before.value - 2 * before.stderr):
            text = (
                f"Catapult: the loss rose from {self.low:.4g} (step {self.low_step}) to {self.peak:.4g} (step {self.peak_step}) and was "
                f"back below by step {self.fallen_step}; {name} fell from {_shown(before)} to {_shown(last)}, a flatter place."
            )
        self._calm()
        return text

    def _calm(self) -> None:
        self.phase, self.lows, self.seen, self.before = "calm", [], 0, []


@dataclass
class LossSpike(State):
    """The loss jumps above its recent level by many times its scatter; it says whether the curvature was above the limit just before."""

    kind: ClassVar[str] = "loss_spike"
    least: ClassVar[int] = 12  # losses before anything can be called unusual
    num_spreads: ClassVar[float] = 8.0  # many: losses of small batches have heavier tails than a normal distribution
    num_log_spreads: ClassVar[float] = 6.0
    share: ClassVar[float] = 0.3  # of the level
    patience: ClassVar[int] = 16  # losses after which a high level is the new level

    ceiling: float = math.inf  # where the spike is over
    length: int = 0
    active: bool = False
    lost: bool = False  # whether a loss of the spike was not finite, which is an event of its own

    def on_loss(self, step: int, loss: float, name: str, readings: Readings, losses: Losses, rates: Rates) -> str | None:
        if not math.isfinite(loss):
            fresh = not self.lost
            self.ceiling = self.ceiling if self.active else losses[-1][1] if losses else math.inf
            self.active, self.lost, self.length = True, True, 0
            return f"{NOT_FINITE} {loss} at step {step}. {self._explain(step, name, readings, rates)}" if fresh else None
        if self.active:
            self.length += 1
            self.active = loss > self.ceiling and self.length < self.patience
            self.lost = self.lost and self.active
            if not self.active and loss > self.ceiling:
                losses.clear()
            return None
        values = [value for _, value in losses]
        if len(values) < self.least or loss <= values[-1]:
            return None
        level = median(values[-9:])
        if loss - level < self.share * abs(level):  # first, since it is cheap: this runs at every training step
            return None
        # a floor of 0.1 % of the level: a loss that hardly scatters would make every wiggle a spike
        spread = max(spread_of_differences(values, about_trend=False), 1e-3 * abs(level), 1e-300)
        if loss - level < self.num_spreads * spread or not self._unusual_factor(loss, values):
            return None
        self.active, self.length = True, 0
        self.ceiling = level + max(3 * spread, 0.1 * abs(level))
        factor = (loss - level) / spread
        times = f"{factor:.0f} times" if factor < 1000 else "more than 1000 times"
        return (
            f"Loss spike: the loss jumped from about {level:.4g} to {loss:.4g} at step {step}, {times} its usual scatter. "
            f"{self._explain(step, name, readings, rates)}"
        )

    def _unusual_factor(self, loss: float, values: list[float]) -> bool:
        """Whether the jump is unusual as a factor as well: losses of small batches scatter in proportion to their size."""
        if min(values) <= 0:
            return True
        logs = [math.log(value) for value in values]
        return math.log(loss) - median(logs[-9:]) > self.num_log_spreads * spread_of_differences(logs)

    def _explain(self, step: int, name: str, readings: Readings, rates: Rates) -> str:
        recent = [r for r in _up_to(readings, step, 3) if math.isfinite(r.ratio)]
        spacing = (readings[-1].step - readings[0].step) / (len(readings) - 1) if len(readings) > 1 else math.inf
        if not recent or step - recent[-1].step > 3 * spacing:
            return "No curvature with a limit was measured just before, so it stays unexplained."
        worst = max(reversed(recent), key=lambda r: r.ratio)
        fact = f"{name} was {_shown(worst)} at step {worst.step}"
        if worst.is_above():
            return f"Explained by a crossing: {fact}, above the limit {worst.limit:.4g}, so steps along the sharpest direction overshot."
        # the steps since the last reading may have been made at a higher rate, whose limit is lower than the one read then
        last, before = recent[-1], ""
        in_force = [rate for (since, rate), (until, _) in pairwise([*rates, (step, 0.0)]) if since < step and last.step < until]
        if in_force and max(in_force) > _RAISED * last.lr > 0:
            now = last._replace(limit=last.limit * last.lr / max(in_force))
            fact = f"{name} was {_shown(last)} at step {last.step}"
            before = (
                f"the learning rate was raised from {last.lr:.3g} to {max(in_force):.3g} after that, where the limit is {now.limit:.4g}"
            )
            if now.is_above():
                return f"Explained by the learning rate: {fact}, and {before}, so steps along the sharpest direction overshot."
            worst, before = now, f"even though {before}; "
        return (
            f"Not explained by the limit: {fact}, not above {worst.limit:.4g}; {before}look at the data of that step, or at the precision."
        )


NOT_FINITE = "The loss is"  # how the text of such a loss begins; the findings look for it
_RAISED = 1.01  # by judgement: a schedule's creep from step to step explains nothing
EVENT_KINDS = tuple(d.kind for d in (ProgressiveSharpening, EdgeOfStability, SelfStabilisation, LimitCrossed, Catapult, LossSpike))


# -- the events of a run --------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Event(Result):
    """Something a run did, noticed at a step.

    Example:
        >>> Event("loss_spike", 7, "Loss spike: ...").to_dict()
        {'kind': 'loss_spike', 'step': 7, 'text': 'Loss spike: ...'}
    """

    kind: str  # one of EVENT_KINDS
    step: int  # optimizer steps done when it was noticed
    text: str  # what happened, with its numbers

    def __str__(self) -> str:
        return f"step {self.step}: {self.text}"


_SAVED = ("metric=_metric", "last_step=_last_step", "last_loss_step=_last_loss_step", "pending=_pending", "readings=_readings")


# version 2 since the limit follows the rate between readings
class EventDetector(State, version=2, strict=True, saved=(*_SAVED, "losses=_losses", "rates=_rates", "detectors=_detectors")):
    """Finds the events of one run as its records come in; memory and work for each are bounded.

    An event is reported once, when it begins; it can come again after its episode is over. The curvature is the most telling one that the
    run measures: ``preconditioned_lambda_max``, else ``lambda_max``, else ``probe_lambda_max``, each held against its own limit, and no
    change counts that lies within the errors or the scatter of the readings. The run's header, if given, names its matrix.

    ===========================  ====================================================================================================
    ``progressive_sharpening``   rose by half or more above its lowest level, still below the limit
    ``edge_of_stability``        came to the limit, five readings near it (0.9 to 1.15), some touching, the loss not running away
    ``self_stabilisation``       crossed the limit four times, up and down in turn, the loss not running away
    ``limit_crossed``            three readings in a row above the limit by more than twice their error
    ``catapult``                 the loss rose steeply and fell below where it was; the curvature is clearly lower afterwards
    ``loss_spike``               the loss jumped, or is NaN; explained where the curvature was above the limit at the rate in force
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

    _pending: list[Event]  # begun in the losses since the last record
    _last_step: int
    _last_loss_step: int
    _readings: Readings
    _losses: Losses
    _rates: Rates
    _catapult: Catapult
    _spike: LossSpike

    def __init__(self, header: Mapping[str, Any] | None = None) -> None:
        self._metric, self._pending, self._header = "", [], header
        self._forget()

    def update(self, record: Mapping[str, Any]) -> list[Event]:
        """Take the next ``monitor_record``; returns the events that began here, or in the losses since the last record.

        Its loss counts unless :meth:`update_loss` had that step.
        """
        step = int(record["step"])
        if step < self._last_step:  # the run went back to an earlier state
            self._forget()
        self._last_step = step
        events = self._update_curvature(record)  # before the loss, so that a spike of this step is explained by this step's curvature
        loss, lr = number(record.get("loss")), number(record.get("lr"))
        if not math.isnan(loss):  # NaN in a record says that the loss is unknown
            self.update_loss(step, loss)
        self.note_rate(step, lr)  # after the loss, which the steps before it made
        begun, self._pending = [*self._pending, *events], []
        return sorted(begun, key=lambda event: event.step)

    def note_rate(self, step: int, lr: float) -> None:
        """Take the learning rate that is in force from a step on; NaN is unknown."""
        if not (math.isnan(lr) or (self._rates and self._rates[-1][1] == lr)):
            self._rates.append((step, lr))

    def update_loss(self, step: int, loss: float) -> None:
        """Take the loss of a step that may have no record, so that what happens between measurements is seen; costs microseconds.

        What begins here comes with the next :meth:`update`.
        """
        if step < self._last_step:
            self._forget()
            self._last_step = step
        if step <= self._last_loss_step:
            return
        self._last_loss_step = step
        name = in_words(self._metric, self._header) or "the curvature"
        # the catapult first: a spike that turns out to be the new level empties the losses
        texts = [(d.kind, d.on_loss(step, loss, name, self._readings, self._losses, self._rates)) for d in (self._catapult, self._spike)]
        if math.isfinite(loss) and not self._spike.active:  # losses within a spike would raise the level it is compared with
            self._losses.append((step, loss))
        self._pending += [Event(kind, step, text) for kind, text in texts if text]

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
            self._begin_course()
        self._readings.append(seen)
        name = in_words(metric, self._header)
        texts = [(d.kind, d.on_reading(name, self._readings)) for d in (*self._on_curvature, self._catapult)]
        return [Event(kind, seen.step, text) for kind, text in texts if text]

    def _begin_course(self) -> None:
        self._readings = deque(maxlen=MAX_READINGS)
        self._on_curvature = (ProgressiveSharpening(), EdgeOfStability(), SelfStabilisation(), LimitCrossed())

    def _forget(self) -> None:
        """Begin anew; what was noticed and not yet handed out stays."""
        self._last_step = self._last_loss_step = -1
        self._losses, self._rates = deque(maxlen=MAX_LOSSES), deque(maxlen=MAX_LOSSES)
        self._catapult, self._spike = Catapult(), LossSpike()
        self._begin_course()

    @property
    def _detectors(self) -> Parts[State]:
        return Parts(parts={d.kind: d for d in (*self._on_curvature, self._catapult, self._spike)})
