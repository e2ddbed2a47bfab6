"""Training runs of a sweep over the learning rate: made once, kept in a store, counted and forecast."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch

from sharpkit._errors import SharpkitError
from sharpkit.transfer._grid import Curve, Evaluate
from sharpkit.transfer._store import RunStore, data_fingerprint, fingerprint
from sharpkit.transfer.setup import Family, Run

CRITERION = "mean training loss of the last quarter"
_FIRST_POINTS, _NEXT_POINTS, _LAST_POINTS = 10, 8, 7  # rates tried with one seed at the first and at the next sizes; with all seeds
_WORSE = 0.1  # a loss this share above the initial one counts as diverged; less is what batches differ by


class BudgetEnded(SharpkitError):
    """No further runs are allowed."""


class Sweep:
    """Makes runs or takes them from the store.

    Attributes:
        made, reused: runs so far.
        rates: size -> first group's rate at factor 1, of the sizes started.
    """

    def __init__(self, family: Family, store: RunStore, *, steps: int, max_runs: int | None) -> None:
        self.family, self.store, self.steps, self.max_runs = family, store, steps, max_runs
        self.made = self.reused = 0
        self.rates: dict[int, float] = {}
        self._data = data_fingerprint(family.batches)

    def on(self, curve: Curve) -> Evaluate:
        """(log2 factor, seed) -> loss at this curve's size; initial losses and divergence are noted on the curve."""

        def evaluate(x: float, seed: int) -> float:
            return self.run(curve, x, seed)

        return evaluate

    def run(self, curve: Curve, x: float, seed: int) -> float:
        """One run, or what the store knows of it.

        Raises:
            BudgetEnded: max_runs have been made.
        """
        run = self.family.start(curve.size, seed=seed, lr_factor=2.0**x)
        self.rates[curve.size] = float(run.optimizer.param_groups[0]["lr"]) / 2.0**x
        initial = first_loss(run)
        key = fingerprint(run, data=self._data, first_loss=initial, steps=self.steps, log2_factor=x, criterion=CRITERION)
        known = self.store.get(key)
        if known is None:
            if self.max_runs is not None and self.made >= self.max_runs:
                raise BudgetEnded("max_runs")
            began = time.perf_counter()
            reached = self._train(run)
            self.made += 1
            known = {"size": curve.size, "seed": seed, "log2_factor": x, "steps": self.steps, "initial": initial, "loss": reached}
            known |= {"diverged": not math.isfinite(reached), "seconds": time.perf_counter() - began}
            self.store.add(key, known)
        else:
            self.reused += 1
        curve.initial[seed] = initial
        reached = float(known["loss"]) if known["loss"] is not None else math.inf
        if not reached <= initial + _WORSE * abs(initial):
            curve.diverged.add((x, seed))
            return initial
        return reached

    def _train(self, run: Run) -> float:
        """The criterion; inf where the run diverged."""
        for _ in range(self.steps):
            run.step()
            if run.diverged:
                return math.inf
        tail = run.losses[-max(self.steps // 4, 1) :]
        return sum(tail) / len(tail)

    def forecast(self, sizes: Sequence[int], *, seeds: int, points: int | None) -> str:
        """Time a step at each size and say what the sweep will take."""
        each = step_seconds(self.family, sizes)
        if points is not None:
            runs = [points * seeds] * len(sizes)
        else:
            around = _LAST_POINTS * (seeds - 1)
            runs = [_FIRST_POINTS + around] + [_NEXT_POINTS + around] * (len(sizes) - 1)
        seconds = sum(n * t * self.steps for n, t in zip(runs, each, strict=True))
        steps = ", ".join(f"{1e3 * t:.3g} ms at {self.family.dimension} {s}" for s, t in zip(sizes, each, strict=True))
        held = f"; the store holds {self.store.found} runs" if self.store.found else ""
        return f"about {sum(runs)} runs of {self.steps} steps, {duration(seconds)} in all (one step: {steps}){held}"


def first_loss(run: Run) -> float:
    """Loss on the run's first batch before any step; the run is left as if it had not been asked."""
    fresh = Run(run.family, run.model, run.optimizer, run.size, run.seed)
    run.model.train()
    buffers = {name: b.detach().clone() for name, b in run.model.named_buffers()}
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(run.seed)
        loss = float(run.family.loss_of(run.model, fresh.next_batch()))
    for name, b in run.model.named_buffers():
        b.data.copy_(buffers[name])
    return loss


def step_seconds(family: Family, sizes: Sequence[int]) -> list[float]:
    """Seconds of one step at each size; the better of two after a first that warms up."""
    each = []
    for size in sizes:
        run, times = family.start(size), []
        for _ in range(3):
            began = time.perf_counter()
            run.step()
            times.append(time.perf_counter() - began)
        each.append(min(times[1:]))
    return each


def duration(seconds: float) -> str:
    """In seconds or minutes.

    Example:
        >>> duration(3.14), duration(600)
        ('3.1 s', '10 min')
    """
    return f"{seconds:.2g} s" if seconds < 99 else f"{seconds / 60:.2g} min"
