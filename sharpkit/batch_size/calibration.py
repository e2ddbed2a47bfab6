"""At which batch sizes the rate that breaks training is searched for, by how many runs of how many steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from sharpkit._arguments import flag, wholes
from sharpkit.batch_size.pilot import Anchor, Trainer

# At every eighth batch size up to N / 28, since runs at large batches cost most, and once more at N / 16: chosen on
# experiments/batch_curve.py. Parts of the data used whole instead of N / 16 scattered by a factor of 2.
_STRIDE, _SHARE, _LAST_SHARE = 8, 28, 16
_LEAST_LAST = 32  # of small data N / 16 is next to the smallest size, and a step costs little: by judgement
_MAX_LENGTH = 3.0  # times the pilot's steps, at the smallest batch sizes, by judgement: small batches need more to show what breaks
_REPEATS, _LAST_REPEATS = 4, 3  # searches at each batch size and at N / 16: one scatters by a factor of 1.5 to 2 (docs/batch_size.md)
_RUNS, _MORE_RUNS = 7, 2.5  # runs that a search took and each repeat added, about, in experiments/batch_curve.py: for the forecast
# The largest batch size has shorter runs, of this many steps or, on small data, so many samples in all; by judgement. On the breast-cancer
# network 40 steps of all the data gave 2.83 where 300 gave 3.36, and the law from smaller batches 1.75.
_LARGEST_STEPS, _LARGEST_SAMPLES, _LARGEST_REPEATS = 40, 51_200, 2


@dataclass(frozen=True)
class Plan:
    """A search for the rate that breaks training at one batch size, by runs of so many steps, repeated."""

    batch_size: int
    steps: int
    repeats: int

    @property
    def runs(self) -> float:
        """About so many."""
        return _RUNS + _MORE_RUNS * (self.repeats - 1)

    @property
    def samples(self) -> float:
        """Single-sample gradients of all runs, about."""
        return self.runs * self.batch_size * self.steps

    def search(self, trainer: Trainer, begin: float) -> Anchor:
        """Its answer, begun at a rate."""
        return trainer.largest_stable_rate(begin, batch_size=self.batch_size, steps=self.steps, repeats=self.repeats)


def plans_for(calibrate: Any, sizes: tuple[int, ...], available: int, *, steps: int) -> tuple[list[Plan], Plan | None]:
    """The searches to make, ascending in batch size, and one at the largest of all that is left out where the others foretell its answer.

    Args:
        calibrate: True or False, or the batch sizes.
        sizes: those of the curve.
        available: samples there are.
        steps: of a run at medium batch sizes.

    Raises:
        TypeError, ValueError: ``calibrate`` is none of these, or sizes out of range.
    """
    if not hasattr(calibrate, "__iter__"):
        if not flag("calibrate", calibrate, other="a sequence of batch sizes"):
            return [], None
        chosen, largest = _default_sizes(sizes, available)
    else:
        chosen, largest = sorted(set(wholes("calibrate", calibrate))), None
        if not chosen or chosen[-1] > available:
            raise ValueError(f"calibrate must be True, False or batch sizes from 1 to the {available} samples, got {list(calibrate)}")
    plans = [_plan(size, steps, last=size == chosen[-1]) for size in chosen]
    if largest is None:
        return plans, None
    length = max(min(_LARGEST_SAMPLES // largest, steps), min(_LARGEST_STEPS, steps))
    return plans, Plan(largest, length, _LARGEST_REPEATS)


def _default_sizes(sizes: tuple[int, ...], available: int) -> tuple[list[int], int | None]:
    cap = max(sizes[-1] // _SHARE, sizes[0])
    wanted = [size for size in (sizes[0] * _STRIDE**j for j in range(31)) if size <= cap and size < available]
    last = min(max(available // _LAST_SHARE, _LEAST_LAST, 2 * wanted[-1] if wanted else sizes[0]), sizes[-1])
    wanted += [last] if not wanted or last > wanted[-1] else []
    return wanted, sizes[-1] if sizes[-1] >= 2 * last else None


def _plan(size: int, steps: int, *, last: bool) -> Plan:
    # the last one is at a large batch, where a step costs most and shows what breaks soonest; small batches need more of them
    longer = 1.0 if last else min(max(math.sqrt(64 / size), 1.0), _MAX_LENGTH)
    return Plan(size, round(steps * longer), _LAST_REPEATS if last else _REPEATS)
