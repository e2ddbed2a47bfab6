"""The search for the largest rate that trains, over the losses of runs: what counts as trained, which rate to try next."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

STRIDE = math.sqrt(2.0)  # one search scatters by a factor of 1.5 to 2 (docs/batch_size.md), so a finer grid would resolve its noise
_MAX_RUNS = 24  # by judgement: from 2^-12 times the guess, downwards in factors of 2; a search takes about 7 runs
# Steps of sqrt(2) down from a best run that a constant output outdoes, in search of better: a factor of 8, by judgement.
_FAR_BELOW = 6

# -- from a trained point
_TRAINED = 0.9  # of the best constant output's loss, by judgement: no initialisation begins as far below it
_NOISE = 0.1  # how far above the first loss a run may end that lost nothing, of that loss, by judgement: what one order of data does to it
_STILL = 0.05  # of the first loss, by judgement: at a rate that changes less, lower ones show nothing new


def is_trained(initial: float, constant: float) -> bool:
    """Whether a loss is far below the best constant output's; False where that is NaN."""
    return 0 < initial < _TRAINED * constant


@dataclass
class RateSearch:
    """Rates by powers of sqrt(2), each run made once and remembered.

    A rate trains if its run makes at least half of the best improvement that any run made. The improvement counts from the best constant
    output where a run got below that, else from the loss before training. From a trained point where no run halves the loss, half an
    improvement is noise: there a rate trains if its run loses nothing, ending no more than a tenth above where it began.

    Attributes:
        run: power -> loss at the end.
        initial: loss before training.
        constant: loss of the best constant output; NaN if it is not known.
        known: the best loss of runs elsewhere.
        losses: at the end, by power.
    """

    run: Callable[[int], float]
    initial: float
    constant: float
    known: float = math.inf
    losses: dict[int, float] = field(default_factory=dict)

    def at(self, power: int) -> float:
        """The loss of a run at this power."""
        if power not in self.losses:
            self.losses[power] = self.run(power)
        return self.losses[power]

    @property
    def best(self) -> int:
        """Power of the lowest loss."""
        return min(self.losses, key=lambda power: (self.losses[power], power))

    @property
    def best_loss(self) -> float:
        """The lowest loss of all runs, here or elsewhere."""
        return min(self.known, self.losses[self.best])

    @property
    def keeping(self) -> bool:
        """Whether a rate trains if it loses nothing, since little is left to improve from this trained point."""
        if math.isnan(self.constant):  # whether this is a trained point is not known: it is where no rate tried lowers the loss
            return self.best_loss >= self.initial
        return is_trained(self.initial, self.constant) and self.best_loss > 0.5 * self.initial

    @property
    def bar(self) -> float:
        """The highest loss of a run that lost nothing."""
        return self.initial + _NOISE * abs(self.initial)

    def trained(self, power: int) -> bool:
        """Whether this rate trains; the bar moves with the best run so far, so an answer holds once the best was passed on both sides."""
        loss, best = self.at(power), self.best_loss
        if self.keeping:
            return loss <= self.bar
        # on text, any run that gets the frequencies right has made most of the way from the first loss, whatever else it has ruined
        start = min(self.initial, self.constant) if best < self.constant else self.initial
        return best < start and start - loss >= 0.5 * (start - best)

    def from_below(self) -> int | None:
        """The largest power that trained, next to one that did not; None if the runs allowed do not contain it."""
        self.at(0)
        while len(self.losses) < _MAX_RUNS and self._must_go_down():
            self.at(min(self.losses) - 2)
        if self._hopeless():
            return None
        # where noise decides whether anything is lost, the first loss from below: from the best run on, answers came out twice as high
        low = min(power for power in self.losses if self.trained(power)) if self.keeping else self.best
        # Upwards by 2 as well: by single steps the search ended at its bound for Adam, whose range of rates is wide.
        while self.trained(low + 2):
            low += 2
            if len(self.losses) >= _MAX_RUNS:
                return None
        return low + self.trained(low + 1)

    def _hopeless(self) -> bool:
        return self.best_loss > self.bar if self.keeping else self.best_loss >= self.initial

    def _must_go_down(self) -> bool:
        """The best is the lowest tried, or no better than a constant output; where nothing is to be lost, until a rate loses nothing."""
        below = self.best - min(self.losses)
        if self.keeping:
            moved = abs(self.losses[min(self.losses)] - self.initial) > _STILL * abs(self.initial)
            return self.best_loss > self.bar or (below == 0 and moved)
        return self.best_loss >= self.initial or below == 0 or (self.best_loss >= self.constant and below < _FAR_BELOW)

    def near(self) -> int | None:
        """The same by single steps up or down from 0."""
        low, step = 0, 1 if self.trained(0) else -1
        while len(self.losses) < _MAX_RUNS:
            if self.trained(low + step) != (step > 0):
                return low if step > 0 else low - 1
            low += step
        return None
