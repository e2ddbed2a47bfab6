"""A race: the learner against rates that were given and ways to find one, all with the same number of gradients."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from statistics import fmean, median, stdev
from typing import TYPE_CHECKING, Any, ClassVar

from sharpkit._arguments import check_callback, reals, shown, whole
from sharpkit._calls import public_call
from sharpkit._checkpoint import Subject, clock, resumable, step
from sharpkit._results import Progress, ProgressCallback, Result, format_with_error
from sharpkit.learner.baselines import LEARNER, SUGGESTED, Entrant, entrants, has_adaptive_optimizer
from sharpkit.training_run import RaceProblem, RaceRun, as_seeds

if TYPE_CHECKING:
    from matplotlib.axes import Axes


COUNTING = (
    "One gradient is a forward and a backward pass over one batch. A training step costs one, in trials as well; a measurement of the "
    "learner costs one for its graph and two for each product. The losses shown are computed once at the end, for all alike."
)
# First and last rate of the default grid for adaptive and other optimizers; by judgement: two decades to either side of common choices.
_RATES = {True: (1e-5, 1e-1), False: (1e-3, 10.0)}
_OURS = (LEARNER, SUGGESTED)
_CURVE_POINTS = 60  # of a curve in a result, by judgement: as many as a figure shows
_LEAST_GRADIENTS = 100  # by judgement: a search for a rate in fewer says nothing


@dataclass(frozen=True)
class Finish(Result):
    """How one entrant did, over the seeds."""

    name: str  # name of the entrant
    given: bool  # whether its rate was given; finding it would have cost the runs with the other rates
    rates: list[float]  # rate used, for each seed; the peak if it changes
    train_losses: list[float]  # losses at the end, for each seed; infinite if the run diverged. No test losses without test data
    test_losses: list[float]
    spent: list[int]  # gradients spent, for each seed; fewer than allowed if the run diverged
    searched: list[int]  # how many of them were spent on finding the rate
    curve: list[tuple[float, float]]  # (gradients spent, batch loss) of the first seed, averaged over stretches
    spikes: list[float] = field(default_factory=list)  # highest batch loss of the second half over the first of all, for each seed

    @property
    def train_loss(self) -> float:
        """Mean over seeds; infinite if any run diverged."""
        return fmean(self.train_losses) if self.train_losses else math.inf

    @property
    def test_loss(self) -> float:
        """Mean over seeds; NaN without test data."""
        return fmean(self.test_losses) if self.test_losses else math.nan

    @property
    def ranked_by(self) -> float:
        """The test loss, without test data the training loss."""
        return self.test_loss if self.test_losses else self.train_loss

    @property
    def lost(self) -> int:
        """Number of seeds whose run diverged."""
        return sum(not math.isfinite(loss) for loss in self.train_losses)

    @property
    def typical_rate(self) -> float:
        """Geometric mean of the rates over seeds."""
        positive = [rate for rate in self.rates if rate > 0]
        return math.exp(fmean(map(math.log, positive))) if positive else 0.0

    def cells(self) -> list[str]:
        """A row of the table, in the order of :attr:`RaceResult.columns`."""
        searched = "the rate was given" if self.given else f"{fmean(self.searched or [0]):.0f}"
        results = [self.name, _with_error(self.train_losses), _with_error(self.test_losses), f"{self.typical_rate:.3g}"]
        spike = f"{max(self.spikes):.2g}" if self.spikes else ""
        return [*results, f"{fmean(self.spent or [0]):.0f}", searched, spike, f"{self.lost} lost" if self.lost else ""]


_SAVED = ("budget=max_gradients", "seeds", "skipped", "seconds", "finishes", "findings")


@dataclass(frozen=True)
class RaceResult(Result, kind="learning_rate_race", saved=_SAVED):
    """Who trained how far with the same number of gradients."""

    finishes: list[Finish]  # results of the entrants by test loss, without test data by training loss, the lowest first
    max_gradients: int  # gradients that each could spend, for each seed
    seeds: list[int]  # seeds of the runs
    skipped: dict[str, str]  # why an entrant did not start, by its name
    seconds: float  # time that all took

    columns: ClassVar[tuple[str, ...]] = (
        "entrant",
        "training loss",
        "test loss",
        "rate",
        "gradients",
        "of them searching",
        "late spike",
        "",
    )

    def __getitem__(self, name: str) -> Finish:
        """The entrant of this name.

        Raises:
            KeyError: it did not start.
        """
        for finish in self.finishes:
            if finish.name == name:
                return finish
        raise KeyError(f"no entrant {name!r}; there are {', '.join(f.name for f in self.finishes)}")

    def findings(self) -> list[str]:
        """What came out, in sentences."""
        best, rivals = self.finishes[0], [f for f in self.finishes if not f.given and f.name not in _OURS]
        tested = [f for f in self.finishes if f.test_losses]
        kind, losses = ("test", best.test_losses) if tested else ("training", best.train_losses)
        said = [f"Lowest {kind} loss: {best.name}, {_with_error(losses)}{' (its rate was given)' if best.given else ''}."]
        mine = next((f for f in self.finishes if f.name == LEARNER), None)
        if mine is None:
            return said
        given = [f.ranked_by for f in self.finishes if f.given]
        if given:
            said.append(
                f"The learner's {kind} loss is {_times(mine.ranked_by, min(given))} the best of {len(given)} given rates and "
                f"{_times(mine.ranked_by, median(given))} their median."
            )
        if rivals:
            rival = min(rivals, key=lambda f: f.ranked_by)
            ratio = _times(mine.ranked_by, rival.ranked_by)
            said.append(f"Of the others that were given no rate, {rival.name} did best: the learner's loss is {ratio} that.")
        if tested:
            winner = min(tested, key=lambda f: f.train_loss)
            said.append(f"Lowest training loss: {winner.name}, {_with_error(winner.train_losses)}; the learner's is {mine.train_loss:.3g}.")
        if mine.spikes and max(mine.spikes) > 1:
            said.append(f"In the second half of a run the learner's batch loss rose to {max(mine.spikes):.2g} times the first.")
        return said

    def __str__(self) -> str:
        rows = [list(self.columns), *(finish.cells() for finish in self.finishes)]
        # columns that nobody fills, such as the test loss without test data, are left out
        keep = [j for j in range(len(self.columns)) if any(row[j] for row in rows[1:])]
        widths = {j: max(len(row[j]) for row in rows) for j in keep}
        lines = [f"{self.max_gradients} gradients each, {len(self.seeds)} seed{'' if len(self.seeds) == 1 else 's'}"]
        lines += ["  ".join(row[j].ljust(widths[j]) for j in keep).rstrip() for row in rows]
        lines += [f"not started: {name} ({why})" for name, why in self.skipped.items()]
        return "\n".join([*lines, "", *(f"* {finding}" for finding in self.findings()), "", COUNTING])

    def plot(self, ax: Axes | None = None) -> Axes:
        """Losses against gradients spent."""
        from sharpkit.plots.runs import plot_race

        return plot_race(self.to_dict(), ax=ax)


def _race_call(call: str, problem: Any, arguments: Mapping[str, Any]) -> tuple[Any, Subject]:
    if not isinstance(problem, RaceProblem):
        raise TypeError(f"{call} takes a RaceProblem(model, optimizer, data, loss), got {shown(problem)}")
    return problem, problem.subject(as_seeds(arguments["seeds"])[0])


@public_call
@resumable(_race_call)
def race(
    problem: RaceProblem,
    *,
    max_gradients: int = 1000,
    seeds: int | Sequence[int] = 3,
    rates: Sequence[float] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    callback: ProgressCallback | None = None,
    name: str = "",
) -> RaceResult:
    """Train the same problem from scratch in every way, each with ``max_gradients`` gradients including what finding the rate costs.

    Entrants: :class:`sharpkit.CurvatureLearner`, by curvature alone and, from 300 gradients on, to a suggested peak; constant and cosine at
    each rate of the grid (whose rate is given: finding it costs the other runs); a grid search in short trials; an LR range test by two
    rules; Bayesian search in stages as in AutoLRS (needs optuna); schedule-free and Prodigy where their packages are installed.

    Args:
        problem: what to train.
        max_gradients: gradients that each entrant may spend, for each seed; at least 100.
        seeds: number of runs of each entrant (seeds 0, 1, ...), or their seeds, which determine initialisation and order of batches.
        rates: the grid, at least two rates; by default nine from 1e-3 to 10, for adaptive optimizers from 1e-5 to 0.1.
        checkpoint: a folder from which the race goes on if it is killed and made again, after the last run of an entrant that ended.
        callback: receives :class:`sharpkit.Progress` after each entrant, with its result as text; counts runs.
        name: of the result, which pages and comparisons show.

    Raises:
        TypeError: seeds that are no whole numbers.
        ValueError: too few gradients or rates, or no seed.
        UnsupportedError: an optimizer that the learner does not know.
        DocumentError: the checkpoint is of another call, or of another problem.

    Example:
        >>> import torch, sharpkit as sk
        >>> batch = (torch.eye(4), torch.ones(4, 1))
        >>> problem = RaceProblem(lambda seed: torch.nn.Linear(4, 1), torch.optim.SGD, [batch], torch.nn.functional.mse_loss)
        >>> result = race(problem, max_gradients=100, seeds=1, rates=[0.01, 0.1, 1.0])
        >>> result["learner"].train_loss < result["constant, lr 0.01"].train_loss
        True
    """
    if not isinstance(problem, RaceProblem):
        raise TypeError(f"race takes a RaceProblem(model, optimizer, data, loss), got {shown(problem)}")
    max_gradients = whole("max_gradients", max_gradients, least=_LEAST_GRADIENTS)
    check_callback(callback)
    chosen_seeds = as_seeds(seeds)
    grid = sorted({*reals("rates", default_rates(problem) if rates is None else rates, above=0)})
    if len(grid) < 2:
        raise ValueError(f"rates must be at least two different positive numbers, got {rates!r}")
    began = clock()
    started, skipped = entrants(problem, grid)
    finishes = []
    for done, entrant in enumerate(started, start=1):
        try:
            finish = _finish(problem, entrant, max_gradients=max_gradients, seeds=chosen_seeds)
        except Exception as error:
            if not entrant.foreign:  # an error of the problem or of sharpkit is the user's to see
                raise
            skipped[entrant.name] = f"it raised {type(error).__name__}: {error}"
            continue
        finishes.append(finish)
        if callback is not None:
            text = f"{entrant.name}: training loss {_with_error(finish.train_losses)}"
            elapsed, each = clock() - began, len(chosen_seeds)
            callback(Progress(done * each, len(started) * each, elapsed, elapsed * (len(started) / done - 1), text, unit="runs"))
    finishes.sort(key=lambda f: (f.ranked_by, f.name))  # the name decides between those that all diverged
    return RaceResult(finishes, max_gradients, list(chosen_seeds), skipped, clock() - began)


def default_rates(problem: RaceProblem, *, points: int = 9) -> list[float]:
    """A log grid of at least two rates that suits the problem's optimizer.

    Raises:
        UnsupportedError: an optimizer that the learner does not know.

    Example:
        >>> import torch
        >>> default_rates(RaceProblem(lambda seed: torch.nn.Linear(1, 1), torch.optim.Adam, [torch.ones(1, 1)]), points=3)
        [1e-05, 0.001, 0.1]
    """
    low, high = _RATES[has_adaptive_optimizer(problem)]
    return [float(f"{low * (high / low) ** (i / (points - 1)):.3g}") for i in range(points)]


def _finish(problem: RaceProblem, entrant: Entrant, *, max_gradients: int, seeds: Sequence[int]) -> Finish:
    parts = [step(f"{entrant.name}, seed {seed}", partial(_finish_of, problem, entrant, max_gradients, seed), whole=True) for seed in seeds]
    lists = {
        f.name: [x for part in parts for x in getattr(part, f.name)] for f in fields(Finish) if f.name not in ("name", "given", "curve")
    }
    # a mean over seeds would hide the spikes that a curve is looked at for
    return Finish(entrant.name, entrant.given, curve=parts[0].curve, **lists)


def _finish_of(problem: RaceProblem, entrant: Entrant, max_gradients: int, seed: int) -> Finish:
    """How it did with one seed."""
    run = RaceRun(problem, seed=seed, max_gradients=max_gradients, optimizer=entrant.optimizer)
    rate, diverged = entrant.run(run), run.diverged
    late = [loss for spent, loss in run.curve if spent > max_gradients / 2]
    return Finish(
        entrant.name,
        entrant.given,
        [rate],
        [math.inf if diverged else run.final_loss(problem.data)],
        [] if problem.test_data is None else [math.inf if diverged else run.final_loss(problem.test_data)],
        [run.spent],
        [run.searched],
        _thinned(run.curve),
        [max(late) / run.curve[0][1] if late and run.curve[0][1] > 0 else math.nan],
    )


def _thinned(curve: list[tuple[int, float]]) -> list[tuple[float, float]]:
    """Means over stretches of equal length."""
    width = max(1, math.ceil(len(curve) / _CURVE_POINTS))
    pieces = [curve[i : i + width] for i in range(0, len(curve), width)]
    return [(fmean(x for x, _ in piece), fmean(y for _, y in piece)) for piece in pieces]


def _with_error(losses: list[float]) -> str:
    if not losses:
        return ""
    mean = fmean(losses)
    # one diverged seed decides the mean: a method that fails one time in three is not better for its other two
    if not math.isfinite(mean):
        return "inf"
    return format_with_error(mean, stdev(losses) / math.sqrt(len(losses))) if len(losses) > 1 else f"{mean:.4g}"


def _times(one: float, other: float) -> str:
    """One loss as a multiple of another."""
    return f"{one / other:.3g} times" if math.isfinite(one) and 0 < other < math.inf else f"{one:.3g}, against {other:.3g},"
