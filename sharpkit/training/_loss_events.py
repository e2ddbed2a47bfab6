"""Events that show in the loss, with the curvature as their explanation: spikes and catapults. Constant work for each loss."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import median
from typing import ClassVar

from sharpkit._run_schema import Reading, in_words
from sharpkit.linalg.results import format_with_error
from sharpkit.training._windows import MAX_READINGS, Losses, Readings, spread_of_differences


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
