"""Is a wide network as sharp as a narrow one at the same time of training? lambda_max along training at each width against its limit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from sharpkit._errors import NonFiniteError
from sharpkit.linalg.lanczos import eigenpairs
from sharpkit.linalg.trace import trace
from sharpkit.linalg.tracking import EigenvalueTracker
from sharpkit.measuring.sharpness import preconditioned_hessian
from sharpkit.objective.batches import Batch, batch_length, slice_batch
from sharpkit.objective.objective import Objective
from sharpkit.operators.base import SymmetricOperator
from sharpkit.operators.gauss_newton import GaussNewtonOperator
from sharpkit.operators.hessian import HessianOperator
from sharpkit.operators.preconditioned import PreconditionedOperator
from sharpkit.optimizers import UpdateRule, known_rule, learning_rate, learning_rates
from sharpkit.transfer.fits import Slope, log_slope
from sharpkit.transfer.setup import Build, Family, FamilyRun, MakeOptimizer, check_sizes

if TYPE_CHECKING:
    from matplotlib.axes import Axes


_NTK_SAMPLES, _TRACE_MATVECS = 32, 12  # by judgement: enough for a curve over time, at the cost of a few training steps


class Probe:
    """What to measure, the same for every run.

    Args:
        family: of networks.
        batches: to measure on; None is the family's first batch.
        preconditioned: D^-1 H in place of H.
        adaptive: D is known only after a step.
        top_k, with_trace, with_ntk, tol: as of :func:`sharpkit.transfer.sharpness_transfer`.
    """

    def __init__(
        self, family: Family, batches: Any, preconditioned: bool, adaptive: bool, top_k: int, with_trace: bool, with_ntk: bool, tol: float
    ) -> None:
        self.batches: Sequence[Batch] = [family.batches[0]] if batches is None else batches if isinstance(batches, list) else [batches]
        self.preconditioned, self.adaptive = preconditioned, preconditioned and adaptive
        self.top_k, self.with_trace, self.with_ntk, self.tol = top_k, with_trace, with_ntk, tol

    def matrix(self, run: FamilyRun) -> SymmetricOperator:
        """H or D^-1 H at the run's present parameters."""
        hessian = HessianOperator(run.objective(self.batches))
        if not self.preconditioned:
            return hessian
        return preconditioned_hessian(hessian, run.optimizer) if self.adaptive else PreconditionedOperator(hessian, run.optimizer)

    def ntk(self, run: FamilyRun) -> float:
        """Top eigenvalue of J J^T / n, that of the Gauss-Newton matrix of half the squared outputs."""
        first = self.batches[0]
        length = batch_length(first) or 0
        few = slice_batch(first, 0, min(_NTK_SAMPLES, length), length=length)
        matrix = GaussNewtonOperator(Objective(run.model, [few], loss=_half_square, process_group=False))
        return float(eigenpairs(matrix, k=1, tol=self.tol).values[0])


def _half_square(output: Tensor, target: Any) -> Tensor:
    return 0.5 * output.pow(2).sum() / len(output)


class Track:
    """One run's series, grown by one value at each measurement.

    Attributes:
        series: by name.
        num_matvecs: products so far.
    """

    def __init__(self, probe: Probe) -> None:
        self.probe = probe
        self.series: dict[str, list[float]] = {}
        self.num_matvecs = 0
        self._tracker = EigenvalueTracker(tol=probe.tol)

    def measure(self, run: FamilyRun) -> None:
        """Add what holds now; NaN once the run has diverged."""
        try:
            now = {"loss": math.nan, "lambda_max": math.nan, "error": math.nan} if run.diverged else self._values(run)
        except NonFiniteError:
            now = {}
        for name in dict.fromkeys([*now, *self.series, "loss", "lambda_max", "error"]):
            self.series.setdefault(name, []).append(now.get(name, math.nan))

    def _values(self, run: FamilyRun) -> dict[str, float]:
        probe = self.probe
        matrix = probe.matrix(run)
        now: dict[str, float] = {"loss": run.final_loss(probe.batches)}
        if probe.top_k == 1:
            top = self._tracker.update(matrix)
            now |= {"lambda_max": top.value, "error": top.stderr}
            self.num_matvecs += top.num_matvecs
        else:
            pairs = eigenpairs(matrix, k=min(probe.top_k, matrix.size), tol=probe.tol)
            values = [float(v) for v in pairs.values]
            now |= {"lambda_max": values[0], "error": float(pairs.residuals[0])}
            now |= {f"lambda_{i}": value for i, value in enumerate(values[1:], start=2)}
            self.num_matvecs += pairs.num_matvecs
        if probe.with_trace:
            found = trace(matrix, num_matvecs=_TRACE_MATVECS)
            now["trace"] = found.value
            self.num_matvecs += found.num_matvecs
        if probe.with_ntk:
            now["ntk"] = probe.ntk(run)
        return now


def scales(family: Family, sizes: Sequence[int], rule: UpdateRule | None) -> bool:
    """Whether the optimizer divides its gradients by something, or gives its groups different rates."""
    if rule is None:
        return False
    return rule.adaptive or any(len(set(learning_rates(family.start(size).optimizer))) > 1 for size in sizes)


SAME, DIFFERENT = 0.15, 0.5  # spread after warm-up: up to the first the sizes agree, from the second on they do not
STEEP = 0.2  # nor do they where the exponent is surely beyond this
BLURRED = 2.0  # times the limit
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class SharpnessTransfer:
    """What :func:`sharpness_transfer` found. Sharpness is compared as a share of its stability limit, which has no unit.

    Attributes:
        dimension, sizes: what was trained.
        steps: at which everything was measured.
        warmup: step from which :meth:`typical` and what comes of it counts.
        num_seeds: runs of each size.
        matrix: the matrix whose largest eigenvalue it is, in words.
        condition: the stability limit in words; empty where the optimizer's is not known.
        lambda_max: size -> (seeds, steps), NaN after divergence.
        error: the same for its error bounds.
        limit: size -> the largest stable lambda_max; NaN where not known (sharpness itself is compared then).
        loss: size -> (seeds, steps), training loss.
        extra: further series by name (``"trace"``, ``"ntk"``, ``"lambda_2"`` ...), as lambda_max.
        spread: at each step, standard deviation over mean of the sizes' shares (means over seeds).
        extent: at each step, (largest - smallest) / mean of them: grows with the number of sizes.
        exponents: at each step, a in share ~ size^a.
        num_matvecs, seconds: the cost.
    """

    dimension: str
    sizes: tuple[int, ...]
    steps: tuple[int, ...]
    warmup: int
    num_seeds: int
    matrix: str
    condition: str
    lambda_max: Mapping[int, Array]
    error: Mapping[int, Array]
    limit: Mapping[int, float]
    loss: Mapping[int, Array]
    extra: Mapping[str, Mapping[int, Array]]
    spread: tuple[float, ...]
    extent: tuple[float, ...]
    exponents: tuple[Slope, ...]
    num_matvecs: int
    seconds: float

    def shares(self, size: int) -> Array:
        """(seeds, steps): lambda_max over its limit; lambda_max itself where no limit is known."""
        limit = self.limit[size]
        return self.lambda_max[size] / limit if math.isfinite(limit) else self.lambda_max[size]

    def typical(self, size: int) -> Array:
        """(seeds,) median share over the time after the warm-up: single spikes of an adaptive optimizer's matrix do not count."""
        late = [i for i, t in enumerate(self.steps) if t >= self.warmup]
        found: Array = np.median(self.shares(size)[:, late], axis=1)
        return found

    @property
    def spread_after(self) -> float:
        """Standard deviation over mean of the sizes' :meth:`typical` shares."""
        means = np.array([self.typical(size).mean() for size in self.sizes])
        return float(means.std() / means.mean())

    @property
    def exponent_after(self) -> Slope:
        """a in share ~ size^a, from :meth:`typical`."""
        return log_slope({size: self.typical(size).tolist() for size in self.sizes})

    @property
    def blurred(self) -> bool:
        """Whether a size stands beyond twice its limit while it trains: an adaptive optimizer's D is then all but zero somewhere, where
        recent batches gave no gradient, and the top eigenvalue speaks of those parameters alone.
        """
        return bool(self.condition) and max(float(self.typical(s).max()) for s in self.sizes) > BLURRED

    @property
    def passed(self) -> bool | None:
        """True where the sizes agree (spread <= 15 %); False where they do not: spread >= 50 %, a run diverged, or the 95 % interval of the
        exponent lies beyond 0.2; None in between, and where the sharpness is :attr:`blurred`.
        """
        if any(np.isnan(v).any() for v in self.lambda_max.values()):
            return False
        spread, slope = self.spread_after, self.exponent_after
        steep = abs(slope.value) - slope.half_width > STEEP
        if self.blurred:
            return None
        return False if spread >= DIFFERENT or steep else True if spread <= SAME else None

    def findings(self) -> list[str]:
        """What the numbers say, in sentences."""
        lost = [size for size in self.sizes if np.isnan(self.lambda_max[size]).any()]
        found = []
        if lost:
            found.append(f"Training diverged at {self.dimension} {', '.join(map(str, lost))}: sharpness there ends before the last step.")
        if math.isfinite(self.spread_after):
            verdict = {True: "agree", False: "do not agree", None: "agree only roughly"}[self.passed]
            what = "share of the stability limit" if self.condition else "size"
            found.append(
                f"From step {self.warmup} on, sharpness ({self.matrix}, as a {what}) has a relative spread of {self.spread_after:.1%} over "
                f"{self.dimension}s {self.sizes[0]} to {self.sizes[-1]}"
                + ("." if self.blurred else f" and goes as {self.dimension}^({self.exponent_after}): the curves {verdict}.")
            )
        top = max((float(v) for s in self.sizes for v in self.typical(s) if math.isfinite(v)), default=math.nan)
        if self.condition and math.isfinite(top):
            found.append(f"The sharpest of the runs stands there at {top:.0%} of the limit ({self.condition}).")
        if self.blurred:
            found.append(
                "That is far beyond the limit, and yet training goes on: somewhere the optimizer divides by all but zero, where recent "
                "batches gave no gradient. Larger batches or a larger eps would make sharpness comparable; here it says nothing."
            )
        return found

    def __str__(self) -> str:
        return " ".join(self.findings())

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready but for NaN."""

        def plain(series: Mapping[int, Array]) -> dict[str, Any]:
            return {str(size): values.tolist() for size, values in series.items()}

        same = ("dimension", "warmup", "num_seeds", "matrix", "condition", "spread_after", "passed", "num_matvecs", "seconds")
        return {
            "kind": "sharpness_transfer",
            "version": 1,
            **{name: getattr(self, name) for name in same},
            "sizes": list(self.sizes),
            "steps": list(self.steps),
            "lambda_max": plain(self.lambda_max),
            "error": plain(self.error),
            "limit": {str(size): value for size, value in self.limit.items()},
            "loss": plain(self.loss),
            "extra": {name: plain(series) for name, series in self.extra.items()},
            "spread": list(self.spread),
            "extent": list(self.extent),
            "exponents": [slope.to_dict() for slope in self.exponents],
            "exponent_after": self.exponent_after.to_dict(),
            "findings": self.findings(),
        }

    def plot(self, ax: Axes | None = None) -> Axes:
        """Share of the limit over steps, one curve for each size; the limit dashed, the loss below."""
        from sharpkit.plots.transfer import plot_sharpness_transfer

        return plot_sharpness_transfer(self.to_dict(), ax=ax)


def sharpness_transfer(
    build: Build,
    widths: Sequence[int],
    *,
    optimizer: MakeOptimizer,
    data: Any,
    loss: Callable[[Any, Any], torch.Tensor] | None = None,
    closure: Callable[..., torch.Tensor] | None = None,
    steps: int = 200,
    every: int = 10,
    seeds: int = 1,
    probe: Any = None,
    warmup: int | None = None,
    lr_factor: float = 1.0,
    top_k: int = 1,
    preconditioned: bool | Literal["auto"] = "auto",
    with_trace: bool = False,
    with_ntk: bool = False,
    dimension: str = "width",
    tol: float = 0.01,
    callback: Callable[[str], None] | None = None,
) -> SharpnessTransfer:
    """Follow the largest eigenvalue of the (preconditioned) Hessian on a fixed batch while networks of several widths train.

    Where optimizers scale their groups' rates, the matrix is D^-1 H with the rates' ratios in D, and the limit that of the first group's
    rate; the share of the limit is the same whichever group comes first, and is what widths are compared by.

    Args:
        build, widths, optimizer, data, loss, closure, dimension: as of :func:`sharpkit.transfer.learning_rate_transfer`.
        steps: of training.
        every: steps between measurements.
        seeds: runs of each width.
        probe: the batch (or batches) measured on; by default the first batch of the data.
        warmup: step from which the spread counts; by default half of the steps.
        lr_factor: on all learning rates.
        top_k: eigenvalues to follow; beyond one, by a cold Lanczos run each time.
        preconditioned: by default where the optimizer is adaptive or its groups have different rates.
        with_trace: also the trace of the same matrix (twelve products).
        with_ntk: also the top eigenvalue of J J^T / n on up to 32 samples of the probe; needs ``loss=``.
        tol: of the eigenvalues, relative.
        callback: called with a line for each run.

    Raises:
        ValueError: arguments out of range, or ``with_ntk`` with a closure.
        UnsupportedError: a preconditioner that is not known.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> found = sharpness_transfer(
        ...     lambda width: nn.Linear(4, 1, bias=False), [8, 16], data=[(torch.eye(4), torch.ones(4, 1))], loss=nn.functional.mse_loss,
        ...     optimizer=lambda model, width: torch.optim.SGD(model.parameters(), lr=1.0), steps=4, every=2)
        >>> found.passed, round(float(found.shares(8)[0, 0]), 3)  # mean of four squares: H = I / 2, the limit 2 / lr
        (True, 0.25)

    References:
        Noci et al., "Super consistency of neural network landscapes and learning rate transfer" (2024), arXiv 2402.17457.
    """
    sizes = check_sizes(widths, dimension=dimension)
    if steps < 1 or every < 1 or seeds < 1 or top_k < 1:
        raise ValueError(f"steps, every, seeds and top_k must be positive, got {steps}, {every}, {seeds}, {top_k}")
    if with_ntk and loss is None:
        raise ValueError("the NTK needs the model's output: pass (input, target) batches and loss=, not closure=")
    started = time.perf_counter()
    family = Family(build, optimizer, data, loss, closure, dimension)
    rule = known_rule(family.start(sizes[0]).optimizer)
    scaled = scales(family, sizes, rule) if preconditioned == "auto" else preconditioned
    what = Probe(family, probe, scaled, rule is not None and rule.adaptive, top_k, with_trace, with_ntk, tol)
    times = tuple(t for t in range(steps + 1) if t % every == 0 or (t == 1 and what.adaptive))
    times = times[1:] if what.adaptive else times
    tracks: dict[int, list[Track]] = {size: [] for size in sizes}
    limits = {}
    for size in sizes:
        for seed in range(seeds):
            run = family.start(size, seed=seed, lr_factor=lr_factor)
            limits[size] = rule.max_curvature(learning_rate(run.optimizer)) if rule is not None else math.nan
            tracks[size].append(_follow(run, what, times))
            last = tracks[size][-1].series["lambda_max"][-1]
            if callback is not None:
                callback(f"{dimension} {size}, seed {seed}: lambda_max {last:.4g} after {steps} steps, limit {limits[size]:.4g}")
    return _collected(family, tracks, limits, times, steps // 2 if warmup is None else warmup, what, rule, time.perf_counter() - started)


def _follow(run: FamilyRun, what: Probe, times: Sequence[int]) -> Track:
    track = Track(what)
    for t in range(times[-1] + 1):
        if t in times:
            track.measure(run)
        run.step()
    return track


def _collected(
    family: Family,
    tracks: Mapping[int, Sequence[Track]],
    limits: Mapping[int, float],
    times: tuple[int, ...],
    warmup: int,
    what: Probe,
    rule: UpdateRule | None,
    seconds: float,
) -> SharpnessTransfer:
    sizes = tuple(tracks)
    names = list(dict.fromkeys(name for found in tracks.values() for track in found for name in track.series))
    series = {name: {size: np.array([track.series[name] for track in tracks[size]]) for size in sizes} for name in names}
    share = {s: series["lambda_max"][s] / (limits[s] if math.isfinite(limits[s]) else 1.0) for s in sizes}
    means = np.array([share[s].mean(0) for s in sizes])  # (sizes, steps)
    middle = means.mean(0)
    exponents = [log_slope({s: share[s][:, i].tolist() for s in sizes}) for i in range(len(times))]
    return SharpnessTransfer(
        dimension=family.dimension,
        sizes=sizes,
        steps=times,
        warmup=warmup,
        num_seeds=len(tracks[sizes[0]]),
        matrix="lambda_max of D^-1 H" if what.preconditioned else "lambda_max of H",
        condition=rule.condition if rule is not None else "",
        lambda_max=series["lambda_max"],
        error=series["error"],
        limit=dict(limits),
        loss=series["loss"],
        extra={name: found for name, found in series.items() if name not in ("lambda_max", "error", "loss")},
        spread=tuple((means.std(0) / middle).tolist()),
        extent=tuple(((means.max(0) - means.min(0)) / middle).tolist()),
        exponents=tuple(exponents),
        num_matvecs=sum(track.num_matvecs for found in tracks.values() for track in found),
        seconds=seconds,
    )
