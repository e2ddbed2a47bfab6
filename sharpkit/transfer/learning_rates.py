"""Does the best learning rate stay where it is when the network grows? Loss against rate at each width, and the drift of the optimum."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sharpkit._errors import SharpkitError
from sharpkit._results import json_ready
from sharpkit.objective.batches import Batch
from sharpkit.objective.batches import fingerprint as batch_fingerprint
from sharpkit.optimizers import held_parameters, learning_rate, plain_settings
from sharpkit.transfer.fits import Curve, Evaluate, Optimum, Slope, log_slope, loss_at, optimum, search, sensitivity
from sharpkit.transfer.setup import Build, Family, FamilyRun, MakeOptimizer, check_sizes

if TYPE_CHECKING:
    from matplotlib.axes import Axes


KIND = "transfer_run"
Document = dict[str, Any]


class RunStore:
    """Documents by key, in memory and, with a path, in a file to which each new one is appended and flushed at once.

    A last line torn by a kill is left out and the next begins on a line of its own.

    Attributes:
        path: of the file; None for memory alone.
        found: how many runs the file held at the start.

    Args:
        path: an existing file of runs, or where to begin one; its folder must exist.

    Raises:
        SharpkitError: the file holds something else than runs.

    Example:
        >>> store = RunStore(None)
        >>> store.add("a", {"loss": 1.0})
        >>> store.get("a")["loss"], store.get("b")
        (1.0, None)
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self.path = Path(path) if path is not None else None
        self._documents: dict[str, Document] = {}
        if self.path is not None and self.path.exists():
            self._read(self.path)
        self.found = len(self._documents)

    def _read(self, path: Path) -> None:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        for i, line in enumerate(lines):
            if not line.strip():
                continue
            try:
                document = json.loads(line)
                key, right = document["key"], document["kind"] == KIND
            except (ValueError, KeyError, TypeError):
                document, key, right = {}, "", i == len(lines) - 1  # only the last line may be torn
            if not right:
                raise SharpkitError(f"line {i + 1} of {path} is no finished run of a sweep: pass a file that a sweep wrote, or a new name")
            if key:
                self._documents[key] = document

    def get(self, key: str) -> Document | None:
        """The run with this key, if it is there."""
        return self._documents.get(key)

    def add(self, key: str, document: Mapping[str, Any]) -> None:
        """Keep a finished run.

        Raises:
            OSError: the file cannot be written.
        """
        whole = {"kind": KIND, "version": 1, "key": key, **document}
        self._documents[key] = whole
        if self.path is None:
            return
        with open(self.path, "ab+") as stream:
            if stream.tell():
                stream.seek(-1, os.SEEK_END)
                if stream.read(1) != b"\n":
                    self._end_torn_line(stream)
            stream.write((json.dumps(json_ready(whole), allow_nan=False) + "\n").encode())
            stream.flush()
            os.fsync(stream.fileno())

    @staticmethod
    def _end_torn_line(stream: Any) -> None:
        """Cut the file after its last whole line."""
        stream.seek(0)
        stream.truncate(stream.read().rfind(b"\n") + 1)


def fingerprint(run: FamilyRun, *, data: str, first_loss: float, **settings: Any) -> str:
    """What determines a run, as a short key: the model's shapes and first loss, the optimizer's settings, the data and ``settings``.

    Args:
        run: not trained yet.
        data: of :func:`data_fingerprint`.
        first_loss: of this model on the first batch; a changed model or loss shows here.
        settings: the rest: steps, seed, factor, criterion.

    Example:
        >>> from torch import nn, optim, zeros
        >>> from sharpkit.transfer.setup import Family
        >>> family = Family(lambda w: nn.Linear(2, w), lambda m, w: optim.SGD(m.parameters(), lr=0.1), (zeros(1, 2), zeros(1, 4)),
        ...                 loss=nn.functional.mse_loss)
        >>> one, two = (fingerprint(family.start(4, lr_factor=f), data="", first_loss=1.0) for f in (1.0, 2.0))
        >>> one == two
        False
    """
    shapes = [(name, tuple(p.shape), p.requires_grad) for name, p in run.model.named_parameters()]
    groups, counts = plain_settings(run.optimizer), [len(params) for params in held_parameters(run.optimizer)]
    parts = (type(run.optimizer).__name__, groups, counts, shapes, data, f"{first_loss:.5e}", run.size, run.seed, sorted(settings.items()))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def data_fingerprint(batches: Iterable[Batch]) -> str:
    """A short key of all batches together."""
    return hashlib.sha256("".join(map(batch_fingerprint, batches)).encode()).hexdigest()[:16]


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
        self.rates[curve.size] = learning_rate(run.optimizer) / 2.0**x
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

    def _train(self, run: FamilyRun) -> float:
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


def first_loss(run: FamilyRun) -> float:
    """Loss on the run's first batch before any step; the run is left as if it had not been asked."""
    fresh = FamilyRun(run.family, run.model, run.optimizer, run.size, run.seed)
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


Say = Callable[[str], None]
TOLERANCE = 0.15  # octaves per doubling: what still counts as no drift
PRECISION = 0.3  # octaves per doubling within which the whole interval must lie for "no drift" to be said


@dataclass(frozen=True)
class LearningRateTransfer:
    """What :func:`learning_rate_transfer` found.

    Attributes:
        dimension: ``"width"`` or ``"depth"``.
        sizes: that were measured, ascending.
        steps: of each run.
        num_seeds: runs at each point around an optimum.
        curves: all losses, by size.
        optima: by size.
        rates: by size, the first group's learning rate at factor 1.
        drift: slope of log2 optimum against log2 size: octaves per doubling.
        sensitivity: by size: mean loss above the best over two octaves to each side of the optimum.
        penalty: loss at the largest size with the smallest size's optimum over its lowest loss, minus 1; (value, lower, upper).
        num_runs: made by this call; ``num_reused``: read from the store.
        complete: False where ``max_runs`` ended the search.
        seconds: wall time.
    """

    dimension: str
    sizes: tuple[int, ...]
    steps: int
    num_seeds: int
    curves: tuple[Curve, ...] = field(repr=False)
    optima: tuple[Optimum, ...]
    rates: tuple[float, ...]
    drift: Slope
    sensitivity: tuple[float, ...]
    penalty: tuple[float, float, float]
    num_runs: int
    num_reused: int
    complete: bool
    seconds: float

    @property
    def passed(self) -> bool | None:
        """True where the drift is small and known to be, False where it surely is not small, None where the runs cannot tell."""
        return decide(self.drift, self.optima)

    def findings(self) -> list[str]:
        """What the numbers say, in sentences."""
        low, high = self.drift.interval
        span = f"{self.drift.value:+.2f} octaves per doubling of {self.dimension} (95 % interval {low:+.2f} to {high:+.2f})"
        known = math.isfinite(self.drift.value)
        found = [f"The best learning rate drifts by {span}."] if known else ["The drift of the best learning rate is not known."]
        first, last = self.sizes[0], self.sizes[-1]
        value, low, high = self.penalty
        if math.isfinite(value):
            found.append(
                f"Training {self.dimension} {last} with the best rate of {self.dimension} {first} costs {value:.1%} of loss "
                f"({low:.1%} to {high:.1%}) against its own best."
            )
        edge = ", ".join(str(o.size) for o in self.optima if not o.interior)
        if edge:
            found.append(f"At {self.dimension} {edge} the lowest loss lies at the edge of what was run: that optimum is a bound only.")
        if not self.complete:
            found.append("max_runs ended the search before it was done; with a store, a further call goes on from here.")
        if known and self.passed is None:
            real = self.drift.value and not self.drift.contains(0.0)
            small = "That drift is real but small: it hardly matters over one doubling and adds up over many."
            found.append(small if real else "More seeds, more steps or a further size would narrow the interval enough to judge the drift.")
        return found

    def __str__(self) -> str:
        return " ".join(self.findings())

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        curves = []
        for curve in self.curves:
            points = [
                {"log2": x, "losses": list(runs.values()), "diverged": sum((x, s) in curve.diverged for s in runs)}
                for x, runs in sorted(curve.losses.items())
            ]
            curves.append({"size": curve.size, "initial": curve.start_loss, "points": points})
        plain = ("dimension", "steps", "num_seeds", "num_runs", "num_reused", "complete", "seconds", "passed")
        return {
            "kind": "learning_rate_transfer",
            "version": 1,
            **{name: getattr(self, name) for name in plain},
            "sizes": list(self.sizes),
            "curves": curves,
            "optima": [o.to_dict() for o in self.optima],
            "rates": list(self.rates),
            "drift": self.drift.to_dict(),
            "sensitivity": list(self.sensitivity),
            "penalty": list(self.penalty),
            "findings": self.findings(),
        }

    def plot(self, ax: Axes | None = None) -> Axes:
        """Loss against learning rate, one curve for each size, with the optima."""
        from sharpkit.plots.transfer import plot_learning_rate_transfer

        return plot_learning_rate_transfer(self.to_dict(), ax=ax)


def decide(drift: Slope, optima: Sequence[Optimum]) -> bool | None:
    """True: |drift| <= 0.15 octaves per doubling and its 95 % interval within +-0.3. False: the whole interval beyond +-0.15.

    Anything else, or an optimum at the edge of what was run, is None; an edge does not save a drift that is beyond doubt.
    """
    low, high = drift.interval
    if not math.isfinite(drift.value) or not math.isfinite(drift.half_width):
        return None
    if low > TOLERANCE or high < -TOLERANCE:
        return False
    sure = abs(drift.value) <= TOLERANCE and low >= -PRECISION and high <= PRECISION
    return True if sure and all(o.interior for o in optima) else None


def learning_rate_transfer(
    build: Build,
    widths: Sequence[int],
    *,
    optimizer: MakeOptimizer,
    data: Any,
    loss: Callable[[Any, Any], torch.Tensor] | None = None,
    closure: Callable[..., torch.Tensor] | None = None,
    steps: int = 100,
    seeds: int = 3,
    factors: Sequence[float] | None = None,
    store: str | os.PathLike[str] | RunStore | None = None,
    dimension: str = "width",
    until_certain: bool = False,
    max_runs: int | None = None,
    callback: Say | None = None,
) -> LearningRateTransfer:
    """Measure loss against learning rate at each width, spending runs where the optimum is.

    The rate is varied as one factor on the rates of all parameter groups, so any parametrisation works. The loss of a run is the mean
    training loss of its last quarter: an average over many iterates, on batches that are the same for every rate and width of a seed. A
    run that diverges, or ends a tenth above the loss it started from, counts as that loss. At each width one seed steps by 4, 2 and sqrt 2
    towards the lowest loss, then all seeds run seven rates around it, and a parabola in log rate gives the optimum.

    Args:
        build: width -> freshly initialised model.
        widths: at least two.
        optimizer: (model, width) -> optimizer with the rates its parametrisation gives this width.
        data, loss, closure: as of :class:`~sharpkit.transfer.setup.Family`.
        steps: of each run: long enough that the loss has fallen well, the optimum depends on it.
        seeds: initialisations and orders of the data.
        factors: run these factors with every seed and no others.
        store: file to which every finished run is added; a killed sweep called again continues where it stopped.
        dimension: ``"depth"`` where the sizes are depths.
        until_certain: smallest and largest width first, then those between, and stop once :attr:`LearningRateTransfer.passed` is decided.
        max_runs: end after so many new runs; what is there comes back.
        callback: called with words: a forecast of the cost, then a line for each width.

    Raises:
        ValueError: fewer than two widths, or other arguments out of range.
        SharpkitError: the store holds something else, or ``max_runs`` was too few for two widths.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> x, y = torch.eye(4), torch.ones(4, 1)
        >>> found = learning_rate_transfer(  # a "family" that is the same linear model at every width
        ...     lambda width: nn.Linear(4, 1, bias=False), [8, 16], data=[(x, y)], loss=nn.functional.mse_loss, steps=8,
        ...     optimizer=lambda model, width: torch.optim.SGD(model.parameters(), lr=1.0))
        >>> found.passed, abs(found.drift.value) < 1e-9
        (True, True)

    References:
        Yang et al., "Tensor Programs V: tuning large neural networks via zero-shot hyperparameter transfer" (2022), arXiv 2203.03466.
        Wortsman et al. (2023), arXiv 2309.14322, for the sensitivity.
    """
    sizes = check_sizes(widths, dimension=dimension)
    if steps < 4 or seeds < 1:
        raise ValueError(f"steps must be at least 4 and seeds at least 1, got {steps} and {seeds}")
    if factors is not None and (len(set(factors)) < 3 or min(factors) <= 0):
        raise ValueError(f"factors must be at least three different positive numbers, got {list(factors)}")
    started = time.perf_counter()
    family = Family(build, optimizer, data, loss, closure, dimension)
    sweep = Sweep(family, store if isinstance(store, RunStore) else RunStore(store), steps=steps, max_runs=max_runs)
    say: Say = callback if callback is not None else lambda line: None
    say(sweep.forecast(sizes, seeds=seeds, points=len(factors) if factors is not None else None))
    work = _Work(sweep, seeds, factors, say)
    order = sizes if not until_certain else (sizes[0], sizes[-1], *sizes[1:-1])
    for i, size in enumerate(order):
        if not work.measure(size):
            break
        if until_certain and i and len(order) > i + 1 and work.decided() is not None:
            say(f"the drift is certain after {i + 1} of {len(order)} {dimension}s: the others are left out")
            break
    return work.result(time.perf_counter() - started)


class _Work:
    """Curves as they are found."""

    def __init__(self, sweep: Sweep, seeds: int, factors: Sequence[float] | None, say: Say) -> None:
        self.sweep, self.seeds, self.factors, self.say = sweep, seeds, factors, say
        self.curves: dict[int, Curve] = {}
        self.optima: dict[int, Optimum] = {}
        self.complete = True

    def measure(self, size: int) -> bool:
        """Search one size; False once the runs are used up."""
        curve = Curve(size)
        near = min(self.optima, key=lambda s: abs(math.log(s / size)), default=None)
        try:
            if self.factors is None:
                search(curve, self.sweep.on(curve), start=self.optima[near].log2 if near is not None else 0.0, seeds=self.seeds)
            else:
                self._run_all(curve)
        except BudgetEnded:
            self.complete = False
            return False
        found = optimum(curve, seeds=self.seeds)
        self.curves[size], self.optima[size] = curve, found
        where = "" if found.interior else ", at the edge of what was run"
        self.say(f"{self.sweep.family.dimension} {size}: best factor {2**found.log2:.3g}, loss {found.loss:.4g}{where}")
        return True

    def _run_all(self, curve: Curve) -> None:
        run = self.sweep.on(curve)
        points = sorted(math.log2(f) for f in set(self.factors or ()))
        for x in points:
            curve.losses[x] = {s: run(x, s) for s in range(self.seeds)}
        curve.interior = points[0] < curve.best(range(self.seeds)) < points[-1]

    def drift(self) -> Slope:
        return log_slope({size: [2**x for x in o.per_seed] for size, o in self.optima.items()})

    def decided(self) -> bool | None:
        return decide(self.drift(), list(self.optima.values()))

    def _penalty(self, sizes: Sequence[int]) -> tuple[float, float, float]:
        """At the largest size; its curve gets a point where the smallest size's optimum is, if it has none near."""
        small, large = self.optima[sizes[0]], self.optima[sizes[-1]]
        curve = self.curves[large.size]
        wanted = (small.lower, small.log2, small.upper)
        if not min(curve.losses) <= small.log2 <= max(curve.losses):
            try:
                curve.losses[small.log2] = {0: self.sweep.on(curve)(small.log2, 0)}
            except BudgetEnded:
                self.complete = False
        losses = [self._above(curve, large, x) for x in wanted]
        low = 0.0 if small.lower <= large.upper and large.lower <= small.upper else min(losses)
        return losses[1], low, max(losses)

    @staticmethod
    def _above(curve: Curve, large: Optimum, x: float) -> float:
        """Relative loss above the lowest: by the parabola near it, between the points that were run further off."""
        if abs(x - large.log2) <= 1.0 and large.curvature > 0:
            return math.expm1(large.curvature * (x - large.log2) ** 2)
        return max(loss_at(curve, x) / large.loss - 1, 0.0) if large.loss > 0 else math.nan

    def result(self, seconds: float) -> LearningRateTransfer:
        sizes = tuple(sorted(self.optima))
        if not sizes:
            raise SharpkitError("max_runs ended the sweep before the first size was done: allow more runs; with a store they are kept")
        family, sweep = self.sweep.family, self.sweep
        penalty = self._penalty(sizes) if len(sizes) > 1 else (math.nan,) * 3
        return LearningRateTransfer(
            dimension=family.dimension,
            sizes=sizes,
            steps=sweep.steps,
            num_seeds=self.seeds,
            curves=tuple(self.curves[s] for s in sizes),
            optima=tuple(self.optima[s] for s in sizes),
            rates=tuple(sweep.rates[s] for s in sizes),
            drift=self.drift(),
            sensitivity=tuple(sensitivity(self.curves[s], self.optima[s].log2) for s in sizes),
            penalty=penalty,
            num_runs=sweep.made,
            num_reused=sweep.reused,
            complete=self.complete,
            seconds=seconds,
        )
