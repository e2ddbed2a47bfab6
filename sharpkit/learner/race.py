"""A race: the learner against rates that were given and ways to find one, all with the same number of gradients."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median, stdev
from typing import TYPE_CHECKING, Any

from sharpkit._results import format_with_error, number
from sharpkit.learner.baselines import LEARNER, Entrant, entrants, has_adaptive_optimizer
from sharpkit.training_run import RaceProblem, RaceRun

if TYPE_CHECKING:
    from matplotlib.axes import Axes


KIND = "learning_rate_race"
COUNTING = (
    "One gradient is a forward and a backward pass over one batch. A training step costs one, in trials as well; a measurement of the "
    "learner costs one for its graph and two for each product. The losses shown are computed once at the end, for all alike."
)
_RATES = {True: (1e-5, 1e-1), False: (1e-3, 10.0)}  # adaptive or not: half decades around what is in use
_CURVE_POINTS = 60


@dataclass(frozen=True)
class Finish:
    """How one entrant did, over the seeds.

    Attributes:
        name: of the entrant.
        given: its rate was given; finding it would have cost the runs with the other rates.
        rates: used, one a seed; the peak where it changes.
        train_losses, test_losses: at the end, one a seed; infinite where the run was lost. No test losses without test data.
        spent: gradients, one a seed; fewer than the budget where the run was lost.
        searched: of them on finding the rate.
        curve: (gradients spent, batch loss) of the first seed, averaged over stretches.
    """

    name: str
    given: bool
    rates: list[float]
    train_losses: list[float]
    test_losses: list[float]
    spent: list[int]
    searched: list[int]
    curve: list[tuple[float, float]]

    @property
    def train_loss(self) -> float:
        """Mean over seeds; infinite where any was lost."""
        return fmean(self.train_losses) if self.train_losses else math.inf

    @property
    def test_loss(self) -> float:
        """Mean over seeds; NaN without test data."""
        return fmean(self.test_losses) if self.test_losses else math.nan

    @property
    def lost(self) -> int:
        """Seeds whose run was lost."""
        return sum(not math.isfinite(loss) for loss in self.train_losses)

    @property
    def typical_rate(self) -> float:
        """Geometric mean over seeds."""
        positive = [rate for rate in self.rates if rate > 0]
        return math.exp(fmean(map(math.log, positive))) if positive else 0.0

    def cells(self) -> list[str]:
        """Of a table: name, training loss, test loss, rate, gradients, of them searching, lost."""
        searched = "the rate was given" if self.given else f"{fmean(self.searched or [0]):.0f}"
        found = [self.name, _with_error(self.train_losses), _with_error(self.test_losses), f"{self.typical_rate:.3g}"]
        return [*found, f"{fmean(self.spent or [0]):.0f}", searched, f"{self.lost} lost" if self.lost else ""]

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Finish:
        """Back from its document."""
        floats: dict[str, Any] = {name: [number(v) for v in document[name]] for name in ("rates", "train_losses", "test_losses")}
        ints: dict[str, Any] = {name: [int(v) for v in document[name]] for name in ("spent", "searched")}
        curve = [(number(x), number(y)) for x, y in document["curve"]]
        return cls(str(document["name"]), bool(document["given"]), **floats, **ints, curve=curve)


@dataclass(frozen=True)
class RaceResult:
    """Who trained how far with the same number of gradients.

    Attributes:
        finishes: by training loss, the lowest first.
        budget: gradients that each could spend.
        seeds: of the runs.
        skipped: entrant -> why it did not start.
        seconds: that all took.
    """

    finishes: list[Finish]
    budget: int
    seeds: list[int]
    skipped: dict[str, str]
    seconds: float

    columns = ("entrant", "training loss", "test loss", "rate", "gradients", "of them searching", "")

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
        best, found = self.finishes[0], [f for f in self.finishes if not f.given and f.name != LEARNER]
        said = [f"Lowest training loss: {best.name}, {_with_error(best.train_losses)}{' (its rate was given)' if best.given else ''}."]
        mine = next((f for f in self.finishes if f.name == LEARNER), None)
        if mine is None:
            return said
        given = [f.train_loss for f in self.finishes if f.given]
        if given:
            said.append(
                f"The learner's training loss is {_times(mine.train_loss, min(given))} the best of {len(given)} given rates and "
                f"{_times(mine.train_loss, median(given))} their median."
            )
        if found:
            rival = min(found, key=lambda f: f.train_loss)
            ratio = _times(mine.train_loss, rival.train_loss)
            said.append(f"Of the others that were given no rate, {rival.name} did best: the learner's loss is {ratio} that.")
        if tested := [f for f in self.finishes if f.test_losses]:
            winner = min(tested, key=lambda f: f.test_loss)
            said.append(f"Lowest test loss: {winner.name}, {_with_error(winner.test_losses)}; the learner's is {mine.test_loss:.3g}.")
        return said

    def __str__(self) -> str:
        rows = [list(self.columns), *(finish.cells() for finish in self.finishes)]
        keep = [j for j in range(len(self.columns)) if any(row[j] for row in rows[1:])]
        widths = {j: max(len(row[j]) for row in rows) for j in keep}
        lines = [f"{self.budget} gradients each, {len(self.seeds)} seed{'' if len(self.seeds) == 1 else 's'}"]
        lines += ["  ".join(row[j].ljust(widths[j]) for j in keep).rstrip() for row in rows]
        lines += [f"not started: {name} ({why})" for name, why in self.skipped.items()]
        return "\n".join([*lines, "", *(f"* {finding}" for finding in self.findings()), "", COUNTING])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready but for NaN and infinities."""
        rest = {name: getattr(self, name) for name in ("budget", "seeds", "skipped", "seconds")}
        return {"kind": KIND, "version": 1, **rest, "finishes": [asdict(f) for f in self.finishes], "findings": self.findings()}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> RaceResult:
        """Back from its document."""
        finishes = [Finish.from_dict(f) for f in document["finishes"]]
        skipped = {str(name): str(why) for name, why in document["skipped"].items()}
        return cls(finishes, int(document["budget"]), [int(s) for s in document["seeds"]], skipped, number(document["seconds"]))

    def plot(self, ax: Axes | None = None) -> Axes:
        """Losses against gradients spent."""
        from sharpkit.plots.runs import plot_race

        return plot_race(self.to_dict(), ax=ax)


def race(
    problem: RaceProblem,
    *,
    steps: int = 1000,
    seeds: Sequence[int] = (0, 1, 2),
    rates: Sequence[float] | None = None,
    callback: Callable[[str], None] | None = None,
) -> RaceResult:
    """Train the same problem from scratch in every way, each with ``steps`` gradients including what finding the rate costs.

    Entrants: :class:`sharpkit.CurvatureLearner`; constant and cosine at each rate of the grid (whose rate is given: finding it costs the
    other runs); a grid search in short trials; an LR range test by two rules; Bayesian search in stages as in AutoLRS (needs optuna);
    schedule-free and Prodigy where their packages are installed.

    Args:
        problem: what to train.
        steps: gradients that each entrant may spend, a seed; at least 100.
        seeds: of initialisations and of the order of batches.
        rates: the grid, at least two; by default nine from 1e-3 to 10, for adaptive optimizers from 1e-5 to 0.1.
        callback: told each entrant's result.

    Raises:
        ValueError: too few steps or rates, or no seed.
        UnsupportedError: an optimizer that the learner does not know.

    Example:
        >>> import torch, sharpkit as sk
        >>> batch = (torch.eye(4), torch.ones(4, 1))
        >>> problem = RaceProblem(lambda seed: torch.nn.Linear(4, 1), torch.optim.SGD, [batch], torch.nn.functional.mse_loss)
        >>> result = race(problem, steps=100, seeds=[0], rates=[0.01, 0.1, 1.0])
        >>> result["learner"].train_loss < result["constant, lr 0.01"].train_loss
        True
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 100:
        raise ValueError(f"steps must be a whole number from 100 on: a search in fewer gradients says nothing; got {steps!r}")
    if not seeds:
        raise ValueError("seeds must be at least one whole number, got none")
    grid = sorted({float(r) for r in (default_rates(problem) if rates is None else rates)})
    if len(grid) < 2 or not grid[0] > 0 or not math.isfinite(grid[-1]):
        raise ValueError(f"rates must be at least two different positive numbers, got {rates!r}")
    began = time.perf_counter()
    started, skipped = entrants(problem, grid)
    finishes = []
    for entrant in started:
        try:
            finishes.append(_finish(problem, entrant, steps=steps, seeds=seeds))
        except Exception as error:
            if not entrant.foreign:
                raise
            skipped[entrant.name] = f"it raised {type(error).__name__}: {error}"
            continue
        if callback is not None:
            callback(f"{entrant.name}: training loss {_with_error(finishes[-1].train_losses)}")
    finishes.sort(key=lambda f: (f.train_loss, f.name))
    return RaceResult(finishes, steps, [int(s) for s in seeds], skipped, time.perf_counter() - began)


def default_rates(problem: RaceProblem, *, points: int = 9) -> list[float]:
    """A log grid that suits the problem's optimizer.

    Args:
        problem: whose optimizer decides.
        points: at least two.

    Raises:
        UnsupportedError: an optimizer that the learner does not know.

    Example:
        >>> import torch
        >>> default_rates(RaceProblem(lambda seed: torch.nn.Linear(1, 1), torch.optim.Adam, [torch.ones(1, 1)]), points=3)
        [1e-05, 0.001, 0.1]
    """
    low, high = _RATES[has_adaptive_optimizer(problem)]
    return [float(f"{low * (high / low) ** (i / (points - 1)):.3g}") for i in range(points)]


def _finish(problem: RaceProblem, entrant: Entrant, *, steps: int, seeds: Sequence[int]) -> Finish:
    found = Finish(entrant.name, entrant.given, [], [], [], [], [], [])
    for seed in seeds:
        run = RaceRun(problem, seed=seed, budget=steps, optimizer=entrant.optimizer)
        found.rates.append(entrant.run(run))
        lost = run.diverged
        found.train_losses.append(math.inf if lost else run.final_loss(problem.data))
        if problem.test_data is not None:
            found.test_losses.append(math.inf if lost else run.final_loss(problem.test_data))
        found.spent.append(run.spent)
        found.searched.append(run.searched)
        if seed == seeds[0]:
            found.curve.extend(_thinned(run.curve))
    return found


def _thinned(curve: list[tuple[int, float]]) -> list[tuple[float, float]]:
    """Means over stretches of equal length."""
    width = max(1, math.ceil(len(curve) / _CURVE_POINTS))
    pieces = [curve[i : i + width] for i in range(0, len(curve), width)]
    return [(fmean(x for x, _ in piece), fmean(y for _, y in piece)) for piece in pieces]


def _with_error(losses: list[float]) -> str:
    if not losses:
        return ""
    mean = fmean(losses)
    if not math.isfinite(mean):
        return "inf"
    return format_with_error(mean, stdev(losses) / math.sqrt(len(losses))) if len(losses) > 1 else f"{mean:.4g}"


def _times(one: float, other: float) -> str:
    """One loss as a multiple of another."""
    return f"{one / other:.3g} times" if math.isfinite(one) and 0 < other < math.inf else f"{one:.3g}, against {other:.3g},"
