"""The held-out loss of a run that is being learned: when it is looked at, whether it has turned, and the best point to go back to."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from sharpkit._errors import NonFiniteError, ObjectiveError, UnsupportedError
from sharpkit._results import State
from sharpkit.objective.objective import Objective
from sharpkit.objective.samples import SamplePool
from sharpkit.training_run import Snapshot

_LEAST_LOOKS, _USUAL_LOOKS, _MOST_LOOKS = 10, 25, 100  # at a run's held-out loss, by judgement
_LEAST_SAMPLES = 64  # that judge, by judgement
_GROUPS = 8  # that samples are judged in, for a standard error: by judgement
_LATER, _RISE, _ERRORS = 3, 0.01, 1.0  # looks, share of the lowest, and standard errors that make a turn: by judgement


def held_out_losses(judges: Sequence[Objective], optimizer: torch.optim.Optimizer, *, stepped: bool) -> NDArray[np.float64]:
    """Loss of each objective at the point where the optimizer would end, infinite where one is not finite; (k,)."""
    turn = {name: getattr(optimizer, name, None) for name in ("eval", "train")}
    both = all(map(callable, turn.values())) and stepped  # schedule-free optimizers train at one point and end at another
    if both:
        turn["eval"]()  # type: ignore[misc]
    try:
        return np.array([judge.value() for judge in judges])
    except NonFiniteError:
        return np.full(len(judges), math.inf)
    finally:
        if both:
            turn["train"]()  # type: ignore[misc]


@dataclass
class Look(State):
    """One look at the held-out loss.

    Attributes:
        step: optimizer steps done.
        held_out: loss of each group of samples.
        trained: recent mean loss of the batches.
    """

    step: int = 0
    held_out: list[float] = field(default_factory=list)
    trained: float = math.nan

    @property
    def mean(self) -> float:
        """Over the groups."""
        return float(np.mean(self.held_out))


class Validation(State, saved=("last_loss", "every=_every", "best=_best", "point=_point", "later=_later")):
    """Looks at the held-out loss now and then, and keeps the best point.

    Args:
        objective: the loss on data that is not trained on.
        total_steps: of the run.
        budget: share of the run's gradients that the looks may take; a forward pass is a third of one.
    """

    _best: Look | None
    _point: Snapshot | None

    def __init__(self, objective: Objective, *, total_steps: int, budget: float, seed: int) -> None:
        self._whole, self._total, self._budget, self._seed = objective, total_steps, budget, seed
        self._judges: list[Objective] = []
        self._every, self._best, self._point = 0, None, None
        self._later = 0  # looks since the best
        self.last_loss = math.nan

    @property
    def best_step(self) -> int:
        """Of the best point; -1 without one."""
        return -1 if self._best is None else self._best.step

    @property
    def best_loss(self) -> float:
        """Held-out loss of the best point."""
        return math.nan if self._best is None else self._best.mean

    def is_due(self, step: int, batch_size: int) -> bool:
        """Whether to look after this step; ``batch_size`` is the samples of all processes' batches together, 0 if they are unknown."""
        if not self._judges:
            self._begin(max(batch_size, 1))
        return step % self._every == 0 or step == self._total

    def _begin(self, batch_size: int) -> None:
        affordable = 3 * self._budget * self._total * batch_size  # samples, in all looks together
        most = max(_LEAST_SAMPLES, int(affordable / _USUAL_LOOKS))
        samples, judges = sum(self._whole.batch_lengths), [self._whole]
        with contextlib.suppress(ObjectiveError, UnsupportedError):  # no mean over samples, or samples on several processes
            pool = SamplePool(self._whole).limited(most, seed=self._seed)
            groups = torch.tensor_split(torch.arange(pool.size), min(_GROUPS, pool.size))
            samples, judges = pool.size, [pool.objective(indices) for indices in groups]
        looks = min(max(int(affordable / max(samples, 1)), _LEAST_LOOKS), _MOST_LOOKS)
        self._judges, self._every = judges, self._every or max(1, self._total // looks)

    def look(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, step: int, trained: float) -> bool:
        """Judge the present point, and keep it if it is the best; whether the held-out loss has turned, or the run ends beyond its best."""
        losses = held_out_losses(self._judges, optimizer, stepped=True)
        now = Look(step, losses.tolist(), trained)
        self.last_loss = now.mean
        if self._best is None or now.mean < self._best.mean:
            self._best, self._point, self._later = now, Snapshot(model, optimizer), 0
            return False
        self._later += 1
        gaps = losses - np.array(self._best.held_out)
        with np.errstate(invalid="ignore"):
            error = float(gaps.std(ddof=1)) / math.sqrt(len(gaps)) if len(gaps) > 1 else 0.0
        risen = now.mean > self._best.mean + _RISE * abs(self._best.mean) or not math.isfinite(now.mean)
        if step == self._total:
            return risen
        beyond = risen and not now.mean <= self._best.mean + _ERRORS * error
        # where the batches' loss does not fall meanwhile, the rate may be too high, but nothing over-fits
        return beyond and self._later >= _LATER and trained < self._best.trained

    def go_back(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """To the best point."""
        self._later = 0
        if self._point is not None:
            self._point.restore(model, optimizer)

    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state)
        self._judges = []  # made anew at the next look
