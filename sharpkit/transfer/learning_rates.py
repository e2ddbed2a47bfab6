"""Does the best learning rate stay where it is when the network grows? Loss against rate at each width, and the drift of the optimum."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

from sharpkit._arguments import as_path, flag, reals, whole
from sharpkit._calls import public_call
from sharpkit._checkpoint import resumable, step
from sharpkit._errors import NonFiniteError, SharpkitError
from sharpkit._results import ProgressCallback, Result, percent, to_json
from sharpkit.fits import Slope, log_slope
from sharpkit.objective.batches import Batch
from sharpkit.objective.batches import fingerprint as batch_fingerprint
from sharpkit.objective.guard import random_states_kept
from sharpkit.optimizers import held_parameters, learning_rate, plain_settings
from sharpkit.training_run import as_seeds
from sharpkit.transfer.optimum import Curve, Optimum, optimum, penalty_between, search, sensitivity
from sharpkit.transfer.setup import Build, Family, FamilyRun, MakeOptimizer, RunProgress, check_sizes, duration, family_call

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Of the loss: what carrying the smallest size's best rate to the largest may cost, and the upper end of its interval. By judgement: in
# experiments/transfer_rates.py it costs 0 to 6 % in correct muP over three or four doublings, 31 % and 265 % with one rate for all widths.
TOLERANCE, PRECISION = 0.1, 0.2
# Of the initial loss, by judgement: below it the data are fitted, and the best rate is the one that wins a race to zero, which no width
# decides; where transfer was measured (docs/transfer_rates.md) the lowest loss was 1.4 to 54 % of the initial one.
FITTED = 0.01

_KIND = "transfer_run"
_CRITERION = "mean training loss of the last quarter"
# Rates tried with one seed at the first and at each further size, and with the other seeds: as experiments/transfer_rates.py needed (22 to
# 27 runs a size with three seeds). For forecasts only.
_FIRST_POINTS, _NEXT_POINTS, _LAST_POINTS = 10, 8, 7
_WORSE = 0.1  # a loss this share above the initial one counts as diverged, by judgement: less is what batches differ by

Document = dict[str, Any]


@dataclass(frozen=True)
class LearningRateTransfer(
    Result,
    kind="learning_rate_transfer",
    saved=(
        *("dimension", "steps", "num_seeds", "num_runs", "num_reused", "complete", "seconds", "passed", "sizes", "curves", "optima"),
        *("rates", "drift", "sensitivity", "penalty", "findings"),
    ),
):
    """What :func:`learning_rate_transfer` measured."""

    dimension: str  # "width" or "depth"
    sizes: tuple[int, ...]  # those that were measured, ascending
    steps: int  # optimizer steps of each run
    num_seeds: int  # runs at each point around an optimum
    curves: tuple[Curve, ...] = field(repr=False)  # all losses, by size
    optima: tuple[Optimum, ...]  # by size
    rates: tuple[float, ...]  # by size, the first group's learning rate at factor 1
    drift: Slope  # slope of log2 optimum against log2 size: octaves per doubling
    sensitivity: tuple[float, ...]  # by size: mean loss above the best over two octaves to each side of the optimum
    # loss at the largest size with the smallest size's optimum over its lowest loss, minus 1; (value, lower, upper)
    penalty: tuple[float, float, float]
    num_runs: int  # made by this call; num_reused: read from the store
    num_reused: int
    complete: bool  # False if max_runs ended the search
    seconds: float  # wall time

    @property
    def passed(self) -> bool | None:
        """Whether the smallest size's best rate may be carried to the largest, by what it costs there; see :func:`decide`."""
        return decide(self.penalty, self.drift, self.optima, fitted=bool(self.undetermined))

    @property
    def undetermined(self) -> str:
        """Why this task does not determine a best rate, and which would; empty if it does."""
        fitted = [c.size for c, best in zip(self.curves, self.optima, strict=True) if is_fitted(c, best)]
        if not fitted:
            return ""
        share = max(best.loss / c.start_loss for c, best in zip(self.curves, self.optima, strict=True) if c.size in fitted)
        return (
            f"This task does not determine a best rate: within {self.steps} steps the loss of {self.dimension} {fitted[0]} falls to "
            f"{percent(share)} of where it began, so that the data are fitted and the rates only race to zero. "
            "Use more samples than the network can fit in these steps, noisier targets, or fewer steps."
        )

    def findings(self) -> list[str]:
        """What the numbers say, in sentences."""
        low, high = self.drift.interval
        known = math.isfinite(self.drift.value)
        sentences = ["The drift of the best learning rate is not known."]
        if known:
            span = f"{self.drift.value:+.2f} octaves per doubling of {self.dimension} (95 % interval {low:+.2f} to {high:+.2f})"
            sentences = [f"The best learning rate drifts by {span}."]
        value, low, high = self.penalty
        if math.isfinite(value):
            sentences.append(
                f"Training {self.dimension} {self.sizes[-1]} with the best rate of {self.dimension} {self.sizes[0]} gives a loss "
                f"{percent(value)} ({percent(low)} to {percent(high)}) above that of its own best rate."
            )
        if self.undetermined:
            sentences.append(self.undetermined)
        edge = ", ".join(str(o.size) for o in self.optima if not o.interior)
        if edge:
            sentences.append(f"At {self.dimension} {edge} the lowest loss lies at the edge of the rates that were run: it is only a bound.")
        if not self.complete:
            sentences.append("max_runs ended the search early; with a store, a further call continues it.")
        if known and self.passed is None and not edge and not self.undetermined:
            sentences.append(
                "More seeds, more steps or a further size would narrow the interval of that cost enough to judge it."
                if not self.penalty[1] > TOLERANCE
                else "That is too much, but it is not certain that the best rate drifts: more sizes or seeds would decide."
            )
        return sentences

    def __str__(self) -> str:
        return " ".join(self.findings())

    def plot(self, ax: Axes | None = None) -> Axes:
        """Loss against learning rate, one curve for each size, with the optima."""
        from sharpkit.plots.transfer import plot_learning_rate_transfer

        return plot_learning_rate_transfer(self.to_dict(), ax=ax)


def decide(penalty: tuple[float, float, float], drift: Slope, optima: Sequence[Optimum], *, fitted: bool = False) -> bool | None:
    """By the cost (value, lower, upper) of carrying the smallest size's best rate to the largest, relative to the lowest loss there.

    True: at most 10 %, its 95 % interval at most 20 %, no optimum at the edge of what was run. False: the whole interval above 10 %, and
    over three sizes or more, as two are no line, the 95 % interval of the drift excludes 0. Anything else is None, and so is fitted data.
    """
    value, low, high = penalty
    if fitted or not math.isfinite(value):
        return None
    if value <= TOLERANCE and high <= PRECISION and all(o.interior for o in optima):
        return True
    return False if low > TOLERANCE and len(optima) > 2 and drift.known and not drift.contains(0.0) else None


def is_fitted(curve: Curve, best: Optimum) -> bool:
    """Whether the lowest loss is next to nothing of the initial one."""
    return 0 <= best.loss < FITTED * curve.start_loss


@public_call
@resumable(family_call)
def learning_rate_transfer(
    build: Build,
    widths: Sequence[int],
    *,
    optimizer: MakeOptimizer,
    data: Any,
    loss: Callable[[Any, Any], torch.Tensor] | None = None,
    closure: Callable[..., torch.Tensor] | None = None,
    steps: int = 100,
    seeds: int | Sequence[int] = 3,
    factors: Sequence[float] | None = None,
    store: str | os.PathLike[str] | RunStore | None = None,
    dimension: str = "width",
    until_certain: bool = False,
    max_runs: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    callback: ProgressCallback | None = None,
    name: str = "",
) -> LearningRateTransfer:
    """Measure loss against learning rate at each width, with most runs near the optimum.

    The rate is varied as one factor on the rates of all parameter groups, so any parametrisation works. The loss of a run is the mean
    training loss of its last quarter: an average over many iterates, on batches that are the same for every rate and width of a seed. A
    run that diverges, or ends a tenth above the loss it started from, counts as that loss. At each width one seed steps by 4, 2 and sqrt 2
    towards the lowest loss, then all seeds run seven rates around it, and a parabola in log rate gives the optimum.

    Args:
        build: width -> freshly initialised model.
        widths: at least two.
        optimizer: (model, width) -> optimizer with the rates its parametrisation gives this width.
        data, loss, closure: as for :class:`~sharpkit.transfer.setup.Family`.
        steps: optimizer steps of each run: long enough that the loss has fallen well, as the optimum depends on it.
        seeds: how many initialisations and orders of the data, or their seeds.
        factors: run these factors with every seed and no others.
        store: file to which every finished run is added; a killed sweep called again continues where it stopped.
        checkpoint: a folder from which the sweep goes on if it is killed and made again; unlike a store it belongs to this one call, and
            keeps the result too.
        dimension: ``"depth"`` if the sizes are depths.
        until_certain: smallest and largest width first, then those between while they may decide :attr:`LearningRateTransfer.passed`; one
            width alone where the data are fitted.
        max_runs: stop after so many new runs; what was measured until then is returned with ``complete=False``.
        callback: called with a :class:`sharpkit.Progress`: a forecast of the cost first, then a sentence for each width.
        name: of the result, which pages and comparisons show.

    Raises:
        ValueError: fewer than two widths, or other arguments out of range.
        SharpkitError: the store holds something else, or ``max_runs`` was too few for one width.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> x, y = torch.eye(4).repeat(2, 1), torch.tensor([[1.0]] * 4 + [[0.0]] * 4)  # targets that cannot be fitted
        >>> transfer = learning_rate_transfer(  # a "family" that is the same linear model at every width
        ...     lambda width: nn.Linear(4, 1, bias=False), [8, 16], data=[(x, y)], loss=nn.functional.mse_loss, steps=8,
        ...     optimizer=lambda model, width: torch.optim.SGD(model.parameters(), lr=1.0))
        >>> transfer.passed, abs(transfer.drift.value) < 1e-9
        (True, True)

    References:
        Yang et al., "Tensor Programs V: tuning large neural networks via zero-shot hyperparameter transfer" (2022), arXiv 2203.03466.
        Wortsman et al. (2023), arXiv 2309.14322, for the sensitivity.
    """
    sizes, chosen = check_sizes(widths, dimension=dimension), as_seeds(seeds)
    steps = whole("steps", steps, least=4, hint="a run is judged by its last quarter")
    factors = None if factors is None else reals("factors", factors, above=0)
    if factors is not None and len(set(factors)) < 3:
        raise ValueError(f"factors must be at least three different positive numbers, got {list(factors)}")
    until_certain, max_runs = flag("until_certain", until_certain), None if max_runs is None else whole("max_runs", max_runs)
    family = Family(build, optimizer, data, loss, closure, dimension)
    # the forecast comes before any run, so that a sweep that takes too long can be stopped at once
    runs = expected_runs(len(sizes), len(chosen), points=len(factors) if factors is not None else None)
    progress = RunProgress(callback, sum(runs))
    kept = store if isinstance(store, RunStore) else RunStore(store)
    sweep = _Sweep(family, kept, steps=steps, seeds=chosen, factors=factors, max_runs=max_runs)
    progress.tell(sweep.forecast(sizes, runs))
    # the two ends determine most of the slope, so that they come first if the sizes between may be left out
    middle = sorted(sizes[1:-1], key=lambda s: round(abs(math.log(s / math.sqrt(sizes[0] * sizes[-1]))), 9))
    order = sizes if not until_certain else (sizes[0], sizes[-1], *middle)
    for i, size in enumerate(order):
        before = sweep.num_runs + sweep.num_reused
        if not sweep.measure(size):
            break
        best = sweep.optima[size]
        where = "" if best.interior else ", at the edge of the rates that were run"
        text = f"{dimension} {size}: best factor {2**best.log2:.3g}, loss {best.loss:.4g}{where}"
        progress.tell(text, runs=sweep.num_runs + sweep.num_reused - before)
        left_out = f"after {i + 1} of {len(order)} {dimension}s: the others are left out"
        if until_certain and len(order) > i + 1 and is_fitted(sweep.curves[size], best):
            progress.tell(f"the data are fitted, no best rate is determined {left_out}")
            break
        if until_certain and i and len(order) > i + 1 and sweep.settled:
            progress.tell(f"further {dimension}s would not decide what carrying the rate over costs {left_out}")
            break
    return sweep.result(progress)


def expected_runs(sizes: int, seeds: int, *, points: int | None = None) -> list[int]:
    """How many runs each of so many sizes will take, the first one first; ``points`` is the number of given factors."""
    if points is not None:
        return [points * seeds] * sizes
    around = _LAST_POINTS * (seeds - 1)
    return [_FIRST_POINTS + around] + [_NEXT_POINTS + around] * (sizes - 1)


class _OutOfRuns(Exception):
    """max_runs have been made."""


class _Sweep:
    """Curves and optima as they are measured, each run made or taken from the store.

    Attributes:
        num_runs, num_reused: runs so far, made and taken from the store.
        curves, optima: by size, of those that are done.
    """

    def __init__(
        self, family: Family, store: RunStore, *, steps: int, seeds: tuple[int, ...], factors: Sequence[float] | None, max_runs: int | None
    ) -> None:
        self.family, self.store, self.steps, self.seeds = family, store, steps, seeds
        self._points = None if factors is None else sorted(math.log2(f) for f in set(factors))
        self._max_runs, self._complete = max_runs, True
        self._data = data_fingerprint(family.batches)
        self.num_runs = self.num_reused = 0
        self.curves: dict[int, Curve] = {}
        self.optima: dict[int, Optimum] = {}
        self._rates: dict[int, float] = {}  # size -> the first group's rate at factor 1

    def measure(self, size: int) -> bool:
        """Search one size; False once the runs are used up."""
        curve = Curve(size)
        near = min(self.optima, key=lambda s: abs(math.log(s / size)), default=None)
        try:
            if self._points is None:
                # if the rate transfers, the optimum of the nearest size is a guess that saves the coarse steps
                search(curve, partial(self._run, curve), start=self.optima[near].log2 if near is not None else 0.0, seeds=self.seeds)
            for x in self._points or ():
                curve.losses[x] = {s: self._run(curve, x, s) for s in self.seeds}
        except _OutOfRuns:
            self._complete = False
            return False
        self.curves[size], self.optima[size] = curve, optimum(curve, seeds=self.seeds)
        return True

    def _run(self, curve: Curve, x: float, seed: int) -> float:
        """The loss of one run; its initial loss and whether it diverged are noted on the curve."""
        run = self.family.start(curve.size, seed=seed, lr_factor=2.0**x)
        self._rates[curve.size] = learning_rate(run.optimizer) / 2.0**x
        # the store is asked with the model at hand: a changed model or loss shows in its first loss, not in any name
        initial = first_loss(run)
        if not math.isfinite(initial):
            raise NonFiniteError(
                f"the loss before the first step is {initial} at {self.family.dimension} {curve.size}: look at the data and at build"
            )
        key = fingerprint(run, data=self._data, first_loss=initial, steps=self.steps, log2_factor=x, criterion=_CRITERION)
        known = self.store.get(key)
        if known is None:
            if self._max_runs is not None and self.num_runs >= self._max_runs:
                raise _OutOfRuns
            began = time.perf_counter()
            reached = step(f"{self.family.dimension} {curve.size}, factor 2^{x!r}, seed {seed}", partial(self._train, run), whole=True)
            self.num_runs += 1
            known = {"size": curve.size, "seed": seed, "log2_factor": x, "steps": self.steps, "initial": initial, "loss": reached}
            self.store.add(key, known | {"diverged": not math.isfinite(reached), "seconds": time.perf_counter() - began})
        else:
            self.num_reused += 1
        curve.initial[seed] = initial
        # JSON has no infinity: the loss of a diverged run is a string or null there
        reached = float(known["loss"]) if known["loss"] is not None else math.inf
        if not reached <= initial + _WORSE * abs(initial):  # NaN too
            curve.diverged.add((x, seed))
            return initial
        return reached

    def _train(self, run: FamilyRun) -> float:
        """Mean training loss of the last quarter; infinite if the run diverged."""
        for _ in range(self.steps):
            run.step()
            if run.diverged:
                return math.inf
        # single iterates bounce at the best rates, and a loss on held-out data after the last step would judge one of them
        tail = run.losses[-max(self.steps // 4, 1) :]
        return sum(tail) / len(tail)

    def forecast(self, sizes: Sequence[int], runs: Sequence[int]) -> str:
        """Time a step at each size and say what the sweep will take."""
        each = self.family.step_seconds(sizes)
        seconds = sum(n * t * self.steps for n, t in zip(runs, each, strict=True))
        steps = ", ".join(f"{1e3 * t:.3g} ms at {self.family.dimension} {s}" for s, t in zip(sizes, each, strict=True))
        held = f"; the store holds {self.store.num_read} runs" if self.store.num_read else ""
        return f"about {sum(runs)} runs of {self.steps} steps, {duration(seconds)} in all (one step: {steps}){held}"

    @property
    def drift(self) -> Slope:
        """Over the sizes that are done."""
        # each seed's own optimum is a point, so that the scatter between seeds enters the interval
        return log_slope({size: [2**x for x in o.per_seed] for size, o in self.optima.items()})

    @property
    def settled(self) -> bool:
        """Whether sizes between would change nothing: they tell a cost that is certain from a drift, and do not narrow its interval."""
        optima = [self.optima[s] for s in sorted(self.optima)]
        penalty = self._penalty(optima[0], optima[-1])
        return not penalty[1] > TOLERANCE or decide(penalty, self.drift, optima) is not None

    def _penalty(self, small: Optimum, large: Optimum) -> tuple[float, float, float]:
        """What the small size's rate costs at the large one, whose curve gets a point there if it has none near."""
        curve = self.curves[large.size]
        if not min(curve.losses) <= small.log2 <= max(curve.losses):
            try:
                curve.losses[small.log2] = {self.seeds[0]: self._run(curve, small.log2, self.seeds[0])}
            except _OutOfRuns:
                self._complete = False
        return penalty_between(self.curves[small.size], curve, seeds=self.seeds)

    def result(self, progress: RunProgress) -> LearningRateTransfer:
        """Of the sizes that are done.

        Raises:
            SharpkitError: none is.
        """
        sizes = tuple(sorted(self.optima))
        if not sizes:
            raise SharpkitError("max_runs ended the sweep before the first size was done: allow more runs; with a store they are kept")
        optima, curves = tuple(self.optima[s] for s in sizes), tuple(self.curves[s] for s in sizes)
        penalty = self._penalty(optima[0], optima[-1]) if len(sizes) > 1 else (math.nan,) * 3
        return LearningRateTransfer(
            dimension=self.family.dimension,
            sizes=sizes,
            steps=self.steps,
            num_seeds=len(self.seeds),
            curves=curves,
            optima=optima,
            rates=tuple(self._rates[s] for s in sizes),
            drift=self.drift,
            sensitivity=tuple(sensitivity(curve, best.log2) for curve, best in zip(curves, optima, strict=True)),
            penalty=penalty,
            num_runs=self.num_runs,
            num_reused=self.num_reused,
            complete=self._complete,
            seconds=progress.seconds,
        )


def first_loss(run: FamilyRun) -> float:
    """Loss on the run's first batch before any step; the run is left as if it had not been asked."""
    fresh = FamilyRun(run.family, run.model, run.optimizer, run.size, run.seed)
    run.model.train()
    buffers = {name: b.detach().clone() for name, b in run.model.named_buffers()}  # batch norm's running means move in train mode
    # gradients on, as in a training step: the loss may take one inside (a gradient penalty, a physics-informed residual)
    with torch.enable_grad(), random_states_kept():
        torch.manual_seed(run.seed)
        loss = float(run.family.loss_of(run.model, fresh.next_batch()).detach())
    for name, b in run.model.named_buffers():
        b.data.copy_(buffers[name])
    return loss


# -- finished runs ------------------------------------------------------------------------------------------------------------
class RunStore:
    """Documents by key, in memory and, with a path, in a file to which each new one is appended and flushed at once; its folder must exist.

    Raises:
        SharpkitError: the file holds something else than runs.

    Example:
        >>> store = RunStore(None)
        >>> store.add("a", {"loss": 1.0})
        >>> store.get("a")["loss"], store.get("b")
        (1.0, None)
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self.path = Path(as_path("store", path)) if path is not None else None
        self._documents: dict[str, Document] = {}
        if self.path is not None and self.path.exists():
            self._read(self.path)
        self.num_read = len(self._documents)

    def _read(self, path: Path) -> None:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        for i, line in enumerate(lines):
            if not line.strip():
                continue
            try:
                document = json.loads(line)
                key, right = document["key"], document["kind"] == _KIND
            except (ValueError, KeyError, TypeError):
                document, key, right = {}, "", i == len(lines) - 1  # only the last line may have been torn by a kill
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
        whole = {"kind": _KIND, "version": 1, "key": key, **document}
        self._documents[key] = whole
        if self.path is None:
            return
        with open(self.path, "ab+") as stream:
            _cut_torn_line(stream)
            stream.write((to_json(whole) + "\n").encode())
            stream.flush()
            os.fsync(stream.fileno())  # a run may have taken hours: it must be there after a power failure too


def _cut_torn_line(stream: BinaryIO) -> None:
    """End the file after its last whole line, so that the next begins on a line of its own."""
    if stream.tell():
        stream.seek(-1, os.SEEK_END)
        if stream.read(1) != b"\n":
            stream.seek(0)
            stream.truncate(stream.read().rfind(b"\n") + 1)


def fingerprint(run: FamilyRun, *, data: str, first_loss: float, **settings: Any) -> str:
    """What determines a run, as a short key: the model's shapes and first loss, the optimizer's settings, the data and ``settings``.

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
    # six digits of the loss, as another number of threads may change the seventh
    # the class by name, as no object survives the process; counts, since groups may swap parameters at equal settings
    parts = (type(run.optimizer).__name__, groups, counts, shapes, data, f"{first_loss:.5e}", run.size, run.seed, sorted(settings.items()))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def data_fingerprint(batches: Iterable[Batch]) -> str:
    """A short key of all batches together."""
    return hashlib.sha256("".join(map(batch_fingerprint, batches)).encode()).hexdigest()[:16]
