"""Coordinate check: does every module's output, and its change while training, keep its size as the network grows?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sharpkit._results import json_ready, number
from sharpkit.objective.objective import Closure
from sharpkit.transfer.fits import Slope, log_slope
from sharpkit.transfer.observing import Callback, Numbers, Observations, Track, at, check_counts, observe, over_steps
from sharpkit.transfer.setup import Build, Family, MakeOptimizer, check_sizes

if TYPE_CHECKING:
    from matplotlib.axes import Axes


TOLERANCE = 0.25  # half of what the mildest broken rule makes; correct networks of widths 64 to 512 show up to about 0.2
_ERRORS = 3.0  # standard errors: a check judges dozens of exponents, so that 95 % would not do
_MOST_FINDINGS = 6  # by judgement: a reader goes through so many sentences
_JUDGED = ("module", "output", "attention logits")


@dataclass(frozen=True)
class Coordinate:
    """One tensor of the network over widths, seeds and steps.

    Attributes:
        name: of the module (``"output"`` is the whole model's), or ``"MODULE: attention logits"``.
        kind: ``"module"``, ``"output"``, ``"attention logits"``; ``"before output"`` and ``"inside a block"`` are shown, not judged.
        initial: exponent of RMS(x_0).
        level: exponent of RMS(x_t), geometric mean over steps after 0.
        mean_abs: exponent of mean |x_t|, likewise.
        update: exponent of RMS(x_t - x_0), likewise.
        verdict: ``"stable"``, ``"grows"``, ``"vanishes"``, ``"unclear"`` or ``"not judged"``.
        rms, updates: the values: width -> for each seed a list over steps 0 .. num_steps.
    """

    name: str
    kind: str
    initial: Slope
    level: Slope
    mean_abs: Slope
    update: Slope
    verdict: str
    rms: Numbers
    updates: Numbers

    @property
    def repeats_output(self) -> bool:
        """Whether it is the last module's, whose numbers the model's output repeats."""
        return self.kind == "output" and not self.name.startswith("output")

    def level_at(self, step: int) -> Slope:
        """Exponent of RMS(x_t) at one step."""
        return log_slope(at(self.rms, step))

    def update_at(self, step: int) -> Slope:
        """Exponent of RMS(x_t - x_0) at one step after 0."""
        return log_slope(at(self.updates, step))

    def finding(self, *, dimension: str, tolerance: float) -> str:
        """What is wrong, in a sentence."""
        name = f"attention logits ({self.name.partition(':')[0]})" if self.kind == "attention logits" else self.name
        for what, slope in (
            ("at initialisation", self.initial),
            ("updates while training", self.update),
            ("size while training", self.level),
        ):
            low = -0.5 if self.kind != "module" and what != "updates while training" else 0.0
            change = _departure(slope, low=low, tolerance=tolerance)
            if change:
                verb = "grow" if slope.value > 0 else "fall"
                subject = f"{name}: {what}" if what != "at initialisation" else f"{name}: size at initialisation"
                ending = "" if subject.endswith("updates while training") else "s"
                return f"{subject} {verb}{ending} as {dimension}^{slope} (asked for: no change)"
        return f"{name}: the exponent of its updates is not known well enough ({self.update}): more seeds or more {dimension}s"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        slopes = {key: getattr(self, key).to_dict() for key in ("initial", "level", "mean_abs", "update")}
        values = {"rms": self.rms, "updates": self.updates}
        found: dict[str, Any] = json_ready({"name": self.name, "kind": self.kind, "verdict": self.verdict, **slopes, **values})
        return found

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Coordinate:
        """Back from :meth:`to_dict`, also after JSON."""
        slopes = {key: Slope.from_dict(document[key]) for key in ("initial", "level", "mean_abs", "update")}
        rms, updates = (
            {int(size): [[number(v) for v in run] for run in runs] for size, runs in document[key].items()} for key in ("rms", "updates")
        )
        return cls(document["name"], document["kind"], verdict=document["verdict"], rms=rms, updates=updates, **slopes)


@dataclass(frozen=True)
class CoordinateCheck:
    """Sizes of all coordinates over widths.

    Attributes:
        dimension: ``"width"`` or ``"depth"``.
        sizes: ascending.
        num_seeds, num_steps: of each run.
        tolerance: exponents within it count as no change.
        coordinates: in the order of computing.
        diverged: (width, seed) of runs whose loss left the finite.
    """

    dimension: str
    sizes: tuple[int, ...]
    num_seeds: int
    num_steps: int
    tolerance: float
    coordinates: tuple[Coordinate, ...]
    diverged: tuple[tuple[int, int], ...] = ()

    @property
    def failed(self) -> tuple[Coordinate, ...]:
        """Those that grow or vanish."""
        return tuple(c for c in self.coordinates if c.verdict in ("grows", "vanishes"))

    @property
    def unclear(self) -> tuple[Coordinate, ...]:
        """Those whose exponent is not known well enough."""
        return tuple(c for c in self.coordinates if c.verdict == "unclear")

    @property
    def passed(self) -> bool:
        """Every coordinate keeps its size and no run diverged."""
        return not self.failed and not self.unclear and not self.diverged

    def __getitem__(self, name: str) -> Coordinate:
        found = next((c for c in self.coordinates if c.name == name), None)
        if found is None:
            raise KeyError(f"no coordinate {name!r}; there are {', '.join(c.name for c in self.coordinates)}")
        return found

    def findings(self) -> list[str]:
        """Plain sentences, the worst first; one sentence where all is well."""
        found = []
        if self.diverged:
            runs = ", ".join(f"{self.dimension} {size} seed {seed}" for size, seed in self.diverged[:4])
            found.append(f"{len(self.diverged)} runs diverged within {self.num_steps} steps ({runs}): lower the learning rate")
        bad = sorted(
            (c for c in self.failed if not c.repeats_output),
            key=lambda c: -max(abs(s.value) for s in (c.initial, c.update, c.level) if math.isfinite(s.value)),
        )
        sentences = [c.finding(dimension=self.dimension, tolerance=self.tolerance) for c in (*bad, *self.unclear)]
        found += sentences[:_MOST_FINDINGS]
        if len(sentences) > _MOST_FINDINGS:
            found.append(f"and {len(sentences) - _MOST_FINDINGS} more coordinates")
        return found or [self._all_well()]

    def _all_well(self) -> str:
        judged = [c for c in self.coordinates if c.verdict == "stable"]
        if not judged:
            return f"no coordinate could be judged: no module has an output of floating numbers at every {self.dimension}"
        worst = max(judged, key=lambda c: abs(c.update.value) if math.isfinite(c.update.value) else 0.0)
        span = f"{self.dimension}s {self.sizes[0]} to {self.sizes[-1]}"
        return (
            f"all {len(judged)} coordinates keep their size over {span}; the largest exponent of an update is {worst.update} ({worst.name})"
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

    def to_dict(self) -> dict[str, Any]:
        """Versioned, JSON-ready."""
        return {
            "kind": "coordinate_check",
            "version": 1,
            "dimension": self.dimension,
            "sizes": list(self.sizes),
            "num_seeds": self.num_seeds,
            "num_steps": self.num_steps,
            "tolerance": self.tolerance,
            "passed": self.passed,
            "findings": self.findings(),
            "diverged": [list(pair) for pair in self.diverged],
            "coordinates": [c.to_dict() for c in self.coordinates],
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> CoordinateCheck:
        """Back from :meth:`to_dict`, also after JSON."""
        coordinates = tuple(Coordinate.from_dict(c) for c in document["coordinates"])
        plain = {key: document[key] for key in ("dimension", "num_seeds", "num_steps", "tolerance")}
        diverged = tuple((int(size), int(seed)) for size, seed in document["diverged"])
        return cls(sizes=tuple(document["sizes"]), coordinates=coordinates, diverged=diverged, **plain)

    def plot(self, *, ax: Axes | None = None, title: str | None = None) -> Axes:
        """Size of each coordinate's update against width; see :func:`sharpkit.plots.plot_coordinates`."""
        from sharpkit.plots.transfer import plot_coordinates

        return plot_coordinates(self, ax=ax, title=title)


def coordinate_check(
    build: Build,
    widths: Sequence[int],
    *,
    optimizer: MakeOptimizer,
    data: Any,
    loss: Callable[[Any, Any], Tensor] | None = None,
    closure: Closure | None = None,
    steps: int = 4,
    seeds: int = 3,
    dimension: str = "width",
    tolerance: float = TOLERANCE,
    callback: Callback | None = None,
) -> CoordinateCheck:
    """Train briefly at each width and fit how every module's output, and its change, grows with width.

    In a parametrisation whose optimum transfers, nothing grows and nothing vanishes: RMS(x_t) and RMS(x_t - x_0) on a fixed batch have
    exponent 0. The output and attention logits alone may be smaller in wide networks as long as their updates are not. Every output is
    recorded, once for each call, in eval mode and without gradients; the softmax of any attention is seen too. Random states, gradients
    and hooks are left as found.

    Args:
        build: width -> a fresh model (depth -> model with ``dimension="depth"``).
        widths: at least two; with three or more the error of the exponent accounts for curvature.
        optimizer: (model, width) -> its optimizer.
        data: batches, as for :class:`sharpkit.Objective`; the first 64 samples are also the fixed batch.
        loss: ``loss(output, target)``.
        closure: ``closure(model, batch)``, instead of loss. Without both, ``model(**batch).loss``.
        steps: optimizer steps of each run.
        seeds: runs at each width.
        dimension: ``"width"`` or ``"depth"``. Over depths, blocks are compared as the first and the last, and only what lies outside of
            them and the last one's output is judged.
        tolerance: a coordinate fails when its exponent is further than this, and than three standard errors, from what is asked for.
        callback: called with (width, seed) after each run.

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
    check_counts(steps=steps, seeds=seeds)
    if not tolerance > 0:
        raise ValueError(f"tolerance must be positive, got {tolerance}: it is the exponent that still counts as no change")
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
    low = 0.0 if kind == "module" else -0.5
    slow = -0.2 if kind == "attention logits" else 0.0  # their limit is one of the heads' dimension, far smaller than the width
    found = [
        _departure(initial, low=low, tolerance=tolerance),
        _departure(level, low=low, tolerance=tolerance),
        _departure(update, low=slow, tolerance=tolerance),
    ]
    if 1 in found or -1 in found:
        return "grows" if 1 in found else "vanishes"
    known = math.isfinite(update.value) and update.half_width <= max(2 * tolerance, 0.5)
    return "stable" if known or not math.isfinite(update.value) else "unclear"


def _departure(slope: Slope, *, low: float, tolerance: float) -> int:
    """1 where the exponent is above 0, -1 where it is below ``low``: by more than the tolerance and three standard errors."""
    if not math.isfinite(slope.value):
        return 0
    needed = max(tolerance, _ERRORS * slope.stderr)
    return 1 if slope.value > needed else -1 if slope.value < low - needed else 0
