"""Coordinate check: does every module's output, and its change while training, keep its size as the network grows?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sharpkit._arguments import real
from sharpkit._calls import public_call
from sharpkit._results import ProgressCallback, Result
from sharpkit.fits import Slope, log_slope
from sharpkit.objective.objective import Closure
from sharpkit.transfer.observing import Numbers, Observations, Track, at, observe, over_steps
from sharpkit.transfer.setup import Build, Family, MakeOptimizer, check_sizes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The mildest broken rule shifts an exponent by 1/2: half of that. Of 40 correct networks of docs/transfer.md two failed at 0.2 with 95 %
# intervals, none of 40 on new seeds at 0.25 with three standard errors.
TOLERANCE = 0.25
_ERRORS = 3.0  # standard errors, from that experiment: a check judges dozens of exponents, so that 95 % would not do
_UPDATES_OF_LOGITS = -0.2  # lowest exponent, by judgement: their limit is one of the heads' dimension, far smaller than the width
_MOST_FINDINGS = 6  # by judgement: as many sentences as are read; the table has all
_JUDGED = ("module", "output", "attention logits")


@dataclass(frozen=True)
class Coordinate(Result, strict=True, saved=("name", "kind", "verdict", "initial", "level", "mean_abs", "update", "rms", "updates")):
    """One tensor of the network over widths, seeds and steps."""

    name: str  # name of the module ("output" is the whole model's), or "MODULE: attention logits"
    kind: str  # "module", "output", "attention logits"; "before output" and "inside a block" are shown, not judged
    initial: Slope  # exponent of RMS(x_0)
    level: Slope  # exponent of RMS(x_t), geometric mean over steps after 0
    mean_abs: Slope  # exponent of mean |x_t|, likewise
    update: Slope  # exponent of RMS(x_t - x_0), likewise
    verdict: str  # "stable", "grows", "vanishes", "unclear" or "not judged"
    rms: Numbers  # the values: width -> for each seed a list over steps 0 .. num_steps
    updates: Numbers

    @property
    def repeats_output(self) -> bool:
        """Whether it is the last module's, whose numbers the model's output repeats."""
        return self.kind == "output" and not self.name.startswith("output")

    def update_at(self, step: int) -> Slope:
        """Exponent of RMS(x_t - x_0) at one step after 0."""
        return log_slope(at(self.updates, step))

    def finding(self, *, dimension: str, tolerance: float) -> str:
        """What is wrong, in a sentence."""
        name = f"attention logits ({self.name.partition(':')[0]})" if self.kind == "attention logits" else self.name
        # the first departure in this order is the one to name: a wrong start shows while training too
        low = 0.0 if self.kind == "module" else -0.5
        for subject, slope, least in (
            ("size at initialisation", self.initial, low),
            ("updates while training", self.update, 0.0),
            ("size while training", self.level, low),
        ):
            if _departure(slope, low=least, tolerance=tolerance):
                verb = ("grow" if slope.value > 0 else "fall") + ("" if subject.startswith("updates") else "s")
                return f"{name}: {subject} {verb} as {dimension}^{slope} (expected exponent 0)"
        return f"{name}: the exponent of its updates is too uncertain ({self.update}): use more seeds or more {dimension}s"


@dataclass(frozen=True)
class CoordinateCheck(
    Result,
    kind="coordinate_check",
    saved=("dimension", "sizes", "num_seeds", "num_steps", "tolerance", "passed", "findings", "diverged", "coordinates"),
):
    """Sizes of all coordinates over widths."""

    dimension: str  # "width" or "depth"
    sizes: tuple[int, ...]  # ascending
    num_seeds: int  # runs at each size, and optimizer steps of each run
    num_steps: int
    tolerance: float  # exponents within it count as no change
    coordinates: tuple[Coordinate, ...]  # in the order of computing
    diverged: tuple[tuple[int, int], ...] = ()  # (width, seed) of runs whose loss became NaN or infinite

    @property
    def failed(self) -> tuple[Coordinate, ...]:
        """Those that grow or vanish."""
        return tuple(c for c in self.coordinates if c.verdict in ("grows", "vanishes"))

    @property
    def unclear(self) -> tuple[Coordinate, ...]:
        """Those whose exponent is too uncertain."""
        return tuple(c for c in self.coordinates if c.verdict == "unclear")

    @property
    def passed(self) -> bool:
        """Every coordinate keeps its size and no run diverged."""
        return not self.failed and not self.unclear and not self.diverged

    def __getitem__(self, name: str) -> Coordinate:
        for coordinate in self.coordinates:
            if coordinate.name == name:
                return coordinate
        raise KeyError(f"no coordinate {name!r}; there are {', '.join(c.name for c in self.coordinates)}")

    def findings(self) -> list[str]:
        """Plain sentences, the worst first; one sentence where all is well."""
        sentences = []
        if self.diverged:
            runs = ", ".join(f"{self.dimension} {size} seed {seed}" for size, seed in self.diverged[:4])
            sentences.append(f"{len(self.diverged)} runs diverged within {self.num_steps} steps ({runs}): lower the learning rate")
        # the last module's own entry would repeat the output's
        bad = sorted(
            (c for c in self.failed if not c.repeats_output),
            key=lambda c: -max(abs(s.value) for s in (c.initial, c.update, c.level) if math.isfinite(s.value)),
        )
        wrong = [c.finding(dimension=self.dimension, tolerance=self.tolerance) for c in (*bad, *self.unclear)]
        sentences += wrong[:_MOST_FINDINGS]
        if len(wrong) > _MOST_FINDINGS:
            sentences.append(f"and {len(wrong) - _MOST_FINDINGS} more coordinates")
        return sentences or [self._all_well()]

    def _all_well(self) -> str:
        judged = [c for c in self.coordinates if c.verdict == "stable"]
        if not judged:
            return f"no coordinate could be judged: no module has an output of floating numbers at every {self.dimension}"
        worst = max(judged, key=lambda c: abs(c.update.value) if math.isfinite(c.update.value) else 0.0)
        return (
            f"all {len(judged)} coordinates keep their size over {self.dimension}s {self.sizes[0]} to {self.sizes[-1]}; "
            f"the largest exponent of an update is {worst.update} ({worst.name})"
        )

    def table(self) -> str:
        """One line for each coordinate."""
        head = f"{'coordinate':40s} {'RMS(x_0)':>15s} {'RMS(x_t)':>15s} {'RMS(x_t - x_0)':>15s}  verdict"
        lines = [f"{c.name[-40:]:40s} {c.initial!s:>15s} {c.level!s:>15s} {c.update!s:>15s}  {c.verdict}" for c in self.coordinates]
        return "\n".join([head, *lines])

    def __str__(self) -> str:
        word = "passed" if self.passed else "failed" if self.failed or self.diverged else "unclear"
        runs = f"{self.num_seeds} seeds, {self.num_steps} steps"
        lines = [f"coordinate check {word}: {self.dimension}s {', '.join(map(str, self.sizes))}; {runs}", *self.findings()]
        return "\n  ".join(lines)

    def plot(self, *, ax: Axes | None = None, title: str | None = None) -> Axes:
        """Size of each coordinate's update against width; see :func:`sharpkit.plots.plot_coordinates`."""
        from sharpkit.plots.transfer import plot_coordinates

        return plot_coordinates(self, ax=ax, title=title)


@public_call
def coordinate_check(
    build: Build,
    widths: Sequence[int],
    *,
    optimizer: MakeOptimizer,
    data: Any,
    loss: Callable[[Any, Any], Tensor] | None = None,
    closure: Closure | None = None,
    steps: int = 4,
    seeds: int | Sequence[int] = 3,
    dimension: str = "width",
    tolerance: float = TOLERANCE,
    callback: ProgressCallback | None = None,
    name: str = "",
) -> CoordinateCheck:
    """Train briefly at each width and fit how every module's output, and its change, grows with width.

    In a parametrisation whose optimum transfers, nothing grows and nothing vanishes: RMS(x_t) and RMS(x_t - x_0) on a fixed batch have
    exponent 0. The output and attention logits alone may be smaller in wide networks as long as their updates are not. Every output is
    recorded, once for each call, in eval mode, and so are the logits of any attention. Random states, gradients and hooks are left as
    they were.

    Args:
        build: width -> a fresh model (depth -> model with ``dimension="depth"``).
        widths: at least two; with three or more the error of the exponent accounts for curvature.
        optimizer: (model, width) -> its optimizer.
        data: batches, as for :class:`sharpkit.Objective`; the first 64 samples are also the fixed batch.
        loss: ``loss(output, target)``.
        closure: ``closure(model, batch)``, instead of loss. Without both, ``model(**batch).loss``.
        steps: optimizer steps of each run.
        seeds: how many runs at each width, or their seeds.
        dimension: ``"width"`` or ``"depth"``. Over depths, blocks are compared as the first and the last, and only what lies outside of
            them and the last one's output is judged.
        tolerance: a coordinate fails when its exponent is further than this, and than three standard errors, from the expected one.
        callback: called with a :class:`sharpkit.Progress` after each run.
        name: of the result, which pages and comparisons show.

    Raises:
        ValueError, TypeError: arguments of the wrong kind.

    Example:
        >>> import torch; from torch import nn
        >>> build = lambda n: nn.Sequential(nn.Linear(8, n), nn.ReLU(), nn.Linear(n, n), nn.ReLU(), nn.Linear(n, 2))
        >>> adam = lambda model, n: torch.optim.Adam(model.parameters(), lr=1e-3)  # one rate for all widths
        >>> x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        >>> data = (x, (x[:, 0] > 0).long())
        >>> check = coordinate_check(build, [64, 128, 256], optimizer=adam, data=data, loss=nn.functional.cross_entropy)
        >>> check.passed, check["2"].verdict
        (False, 'grows')

    References:
        G. Yang, E. J. Hu et al., Tensor Programs V, 2022, arXiv:2203.03466, Section D.1.
    """
    family = Family(build, optimizer, data, loss=loss, closure=closure, dimension=dimension)
    sizes = check_sizes(widths, dimension=dimension)
    tolerance = real("tolerance", tolerance, above=0, hint="it is the exponent that still counts as no change")
    return check_of(observe(family, sizes, steps=steps, seeds=seeds, effects=False, callback=callback), tolerance=tolerance)


def check_of(seen: Observations, *, tolerance: float = TOLERANCE) -> CoordinateCheck:
    """The check on observations already made."""
    coordinates = tuple(_coordinate(track, tolerance) for track in seen.coordinates.values())
    return CoordinateCheck(seen.dimension, seen.sizes, seen.num_seeds, seen.num_steps, tolerance, coordinates, tuple(seen.diverged))


def _coordinate(track: Track, tolerance: float) -> Coordinate:
    initial, level = log_slope(at(track.rms, 0)), log_slope(over_steps(track.rms))
    mean_abs, update = log_slope(over_steps(track.mean_abs)), log_slope(over_steps(track.update))
    verdict = _verdict(track.kind, initial, level, update, tolerance)
    return Coordinate(track.name, track.kind, initial, level, mean_abs, update, verdict, track.rms, track.update)


def _verdict(kind: str, initial: Slope, level: Slope, update: Slope, tolerance: float) -> str:
    if kind not in _JUDGED:
        return "not judged"
    # three tests, as a rate that is too small leaves levels as they are, and a wrong initialisation leaves updates;
    # a random readout's logits fall as width^-1/2, and so do products of random queries and keys: the limit does not mind
    low = 0.0 if kind == "module" else -0.5
    departures = (
        _departure(initial, low=low, tolerance=tolerance),
        _departure(level, low=low, tolerance=tolerance),
        _departure(update, low=_UPDATES_OF_LOGITS if kind == "attention logits" else 0.0, tolerance=tolerance),
    )
    if any(departures):
        return "grows" if 1 in departures else "vanishes"  # what grows blows up first, whatever else vanishes
    # an update that is 0 or diverged at too many widths has no exponent at all, which other findings tell
    sure = not math.isfinite(update.value) or update.half_width <= max(2 * tolerance, 0.5)
    return "stable" if sure else "unclear"


def _departure(slope: Slope, *, low: float, tolerance: float) -> int:
    """1 if the exponent is above 0, -1 if it is below ``low``: by more than the tolerance and three standard errors."""
    if not math.isfinite(slope.value):
        return 0
    # both, since errors known from a dozen points are themselves uncertain, and a small exponent does no harm
    needed = max(tolerance, _ERRORS * slope.stderr)
    return 1 if slope.value > needed else -1 if slope.value < low - needed else 0
