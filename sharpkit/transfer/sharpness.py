"""Is a wide network as sharp as a narrow one at the same time of training? lambda_max along training at each width against its limit."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from sharpkit._arguments import flag, real, whole
from sharpkit._calls import public_call
from sharpkit._checkpoint import resumable, step
from sharpkit._errors import NonFiniteError
from sharpkit._results import ProgressCallback, Result, percent
from sharpkit.fits import Slope, log_slope
from sharpkit.linalg.lanczos import eigenpairs
from sharpkit.linalg.trace import trace
from sharpkit.linalg.tracking import EigenvalueTracker
from sharpkit.objective.batches import Batch, batch_length, slice_batch
from sharpkit.objective.objective import Objective
from sharpkit.operators.base import SymmetricOperator
from sharpkit.operators.gauss_newton import GaussNewtonOperator
from sharpkit.operators.hessian import HessianOperator
from sharpkit.operators.preconditioned import optimizer_curvature
from sharpkit.optimizers import groups_agree, known_rule, learning_rate
from sharpkit.training_run import as_seeds
from sharpkit.transfer.setup import Build, Family, FamilyRun, MakeOptimizer, RunProgress, check_sizes, family_call

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = np.ndarray[Any, Any]

# Spread after warm-up: up to the first the sizes agree, from the second on they do not. By judgement, as in
# experiments/transfer_sharpness.py muP has 4 %, and other parametrisations 12 % (where the edge of stability hides it), 43 % and 60 %.
SAME, DIFFERENT = 0.15, 0.5
STEEP = 0.2  # exponent from which sizes do not agree either, by judgement: in that experiment 0.02 to 0.13 where they do, 0.5 and 0.9 else
BLURRED = 2.0  # times the limit, by judgement: at the edge of stability the share hovers about 1, and beyond 2 no training goes on
_NTK_SAMPLES = 32  # by judgement: the top eigenvalue is compared between widths on the same samples, and few show it
_TRACE_MATVECS = 12  # products for each trace, by judgement: about what following lambda_max takes over a few measurements


@dataclass(frozen=True)
class SharpnessTransfer(
    Result,
    kind="sharpness_transfer",
    saved=(
        *("dimension", "warmup", "num_seeds", "matrix", "condition", "spread_after", "passed", "num_matvecs", "seconds", "sizes", "steps"),
        *("lambda_max", "error", "limit", "loss", "extra", "spread", "extent", "exponents", "exponent_after", "findings"),
    ),
):
    """What :func:`sharpness_transfer` measured. Sharpness is compared as a share of its stability limit, which has no unit."""

    dimension: str  # what was trained
    sizes: tuple[int, ...]
    steps: tuple[int, ...]  # those at which everything was measured
    warmup: int  # step from which :meth:`typical` and all that follows from it counts
    num_seeds: int  # runs of each size
    matrix: str  # the matrix whose largest eigenvalue it is, in words
    condition: str  # the stability limit in words; empty if the optimizer's is not known
    lambda_max: Mapping[int, Array]  # size -> (seeds, steps), NaN after divergence
    error: Mapping[int, Array]  # size -> (seeds, steps), the residual bound of each
    limit: Mapping[int, float]  # size -> the largest stable lambda_max; NaN if not known (sharpness itself is compared then)
    loss: Mapping[int, Array]  # size -> (seeds, steps), training loss
    extra: Mapping[str, Mapping[int, Array]]  # further series by name ("trace", "ntk", "lambda_2" ...), as lambda_max
    spread: tuple[float, ...]  # at each step, standard deviation over mean of the sizes' shares (means over seeds)
    extent: tuple[float, ...]  # at each step, (largest - smallest) / mean of them: grows with the number of sizes
    exponents: tuple[Slope, ...]  # at each step, a in share ~ size^a
    num_matvecs: int  # the cost; products of the NTK are not counted
    seconds: float

    def shares(self, size: int) -> Array:
        """(seeds, steps): lambda_max over its limit; lambda_max itself if no limit is known."""
        limit = self.limit[size]
        return self.lambda_max[size] / limit if math.isfinite(limit) else self.lambda_max[size]

    def typical(self, size: int) -> Array:
        """(seeds,) median share over the time after the warm-up."""
        late = [i for i, t in enumerate(self.steps) if t >= self.warmup]
        # not the mean: an adaptive optimizer's matrix has single spikes of many times the limit
        return np.asarray(np.median(self.shares(size)[:, late], axis=1))

    @property
    def spread_after(self) -> float:
        """Standard deviation over mean of the sizes' :meth:`typical` shares."""
        # of the sizes' means over seeds: scatter between seeds is no dependence on the size
        means = np.array([self.typical(size).mean() for size in self.sizes])
        return float(means.std() / means.mean())

    @property
    def exponent_after(self) -> Slope:
        """The a in share ~ size^a, from :meth:`typical`."""
        return log_slope({size: self.typical(size).tolist() for size in self.sizes})

    @property
    def blurred(self) -> bool:
        """Whether a size stands beyond twice its limit while it trains: an adaptive optimizer's D is then almost 0 somewhere, where recent
        batches gave no gradient, and the top eigenvalue speaks of those parameters alone.
        """
        return bool(self.condition) and max(float(self.typical(s).max()) for s in self.sizes) > BLURRED

    @property
    def passed(self) -> bool | None:
        """True if the sizes agree (spread <= 15 %); False if they do not: spread >= 50 %, a run diverged, or the 95 % interval of the
        exponent lies beyond 0.2; None in between, and if the sharpness is :attr:`blurred`.
        """
        if any(np.isnan(v).any() for v in self.lambda_max.values()):
            return False
        if self.blurred:
            return None
        spread, slope = self.spread_after, self.exponent_after
        # with many sizes a small exponent makes a large spread, with two a large one makes a small spread: either is enough
        steep = abs(slope.value) - slope.half_width > STEEP
        return False if spread >= DIFFERENT or steep else True if spread <= SAME else None

    def findings(self) -> list[str]:
        """What the numbers say, in sentences."""
        lost = [size for size in self.sizes if np.isnan(self.lambda_max[size]).any()]
        sentences = []
        if lost:
            sentences.append(
                f"Training diverged at {self.dimension} {', '.join(map(str, lost))}: sharpness there ends before the last step."
            )
        if math.isfinite(self.spread_after):
            verdict = {True: "agree", False: "do not agree", None: "agree only roughly"}[self.passed]
            unit = "share of the stability limit" if self.condition else "size"
            ending = "." if self.blurred else f" and goes as {self.dimension}^({self.exponent_after}): the curves {verdict}."
            sentences.append(
                f"From step {self.warmup} on, sharpness ({self.matrix}, as a {unit}) has a relative spread of "
                f"{percent(self.spread_after)} over {self.dimension}s {self.sizes[0]} to {self.sizes[-1]}{ending}"
            )
        top = max((float(v) for s in self.sizes for v in self.typical(s) if math.isfinite(v)), default=math.nan)
        if self.condition and math.isfinite(top):
            sentences.append(f"After warm-up the sharpest run is at {percent(top)} of the limit ({self.condition}).")
        if self.blurred:
            sentences.append(
                "That is far beyond the limit, and yet training continues: somewhere the optimizer divides by almost 0, where recent "
                "batches gave no gradient. Larger batches or a larger eps would make sharpness comparable; here it says nothing."
            )
        return sentences

    def __str__(self) -> str:
        return " ".join(self.findings())

    def plot(self, ax: Axes | None = None) -> Axes:
        """Share of the limit over steps, one curve for each size; the limit dashed, the loss below."""
        from sharpkit.plots.transfer import plot_sharpness_transfer

        return plot_sharpness_transfer(self.to_dict(), ax=ax)


@public_call
@resumable(family_call)
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
    seeds: int | Sequence[int] = 1,
    probe: Any = None,
    warmup: int | None = None,
    lr_factor: float = 1.0,
    top_k: int = 1,
    preconditioned: bool | Literal["auto"] = "auto",
    with_trace: bool = False,
    with_ntk: bool = False,
    dimension: str = "width",
    tol: float = 0.01,
    checkpoint: str | os.PathLike[str] | None = None,
    callback: ProgressCallback | None = None,
    name: str = "",
) -> SharpnessTransfer:
    """Follow the largest eigenvalue of the (preconditioned) Hessian on a fixed batch while networks of several widths train.

    Where groups have rates of their own, the matrix is R H, or R D^-1 H, R the rates over that of the first group, which the limit bounds.
    The share of the limit is the same whichever group comes first, and is what widths are compared by.

    Args:
        build, widths, optimizer, data, loss, closure, dimension: as for :func:`sharpkit.transfer.learning_rate_transfer`.
        steps: optimizer steps of each run.
        every: steps between measurements.
        seeds: how many runs of each width, or their seeds.
        probe: the batch (or batches) measured on; by default the first batch of the data.
        warmup: step from which the spread counts; by default half of the steps.
        lr_factor: multiplies all learning rates.
        top_k: eigenvalues to follow; more than one by a cold Lanczos run each time.
        preconditioned: by default if the optimizer is adaptive or its groups have different rates.
        with_trace: also the trace of the same matrix (twelve products).
        with_ntk: also the top eigenvalue of J J^T / n on up to 32 samples of the probe; needs ``loss=``.
        tol: relative tolerance of the eigenvalues.
        checkpoint: a folder from which the call goes on if it is killed and made again, after the last run that ended.
        callback: called with a :class:`sharpkit.Progress` after each run.
        name: of the result, which pages and comparisons show.

    Raises:
        ValueError: arguments out of range, or ``with_ntk`` with a closure.
        UnsupportedError: a preconditioner that is not known.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> transfer = sharpness_transfer(
        ...     lambda width: nn.Linear(4, 1, bias=False), [8, 16], data=[(torch.eye(4), torch.ones(4, 1))], loss=nn.functional.mse_loss,
        ...     optimizer=lambda model, width: torch.optim.SGD(model.parameters(), lr=1.0), steps=4, every=2)
        >>> transfer.passed, round(float(transfer.shares(8)[0, 0]), 3)  # mean of four squares: H = I / 2, the limit 2 / lr
        (True, 0.25)

    References:
        Noci et al., "Super consistency of neural network landscapes and learning rate transfer" (2024), arXiv 2402.17457.
    """
    sizes, chosen = check_sizes(widths, dimension=dimension), as_seeds(seeds)
    steps, every, top_k = whole("steps", steps), whole("every", every), whole("top_k", top_k)
    warmup = None if warmup is None else whole("warmup", warmup, least=0)
    lr_factor, tol = real("lr_factor", lr_factor, above=0), real("tol", tol, above=0, below=1)
    with_trace, with_ntk = flag("with_trace", with_trace), flag("with_ntk", with_ntk)
    if not isinstance(preconditioned, str) or preconditioned != "auto":
        preconditioned = flag("preconditioned", preconditioned, other="'auto'")
    if with_ntk and loss is None:
        raise ValueError("the NTK needs the model's output: pass (input, target) batches and loss=, not closure=")
    progress = RunProgress(callback, len(sizes) * len(chosen))
    family = Family(build, optimizer, data, loss, closure, dimension)
    # the limit has to be that of the optimizer itself; a model of the smallest size tells which one it is
    rule = known_rule(family.start(sizes[0]).optimizer)
    adaptive = rule is not None and rule.adaptive
    if preconditioned == "auto":
        # rates that differ between groups scale the steps as a preconditioner does
        preconditioned = rule is not None and (adaptive or not all(groups_agree(family.start(size).optimizer) for size in sizes))
    batches = [family.batches[0]] if probe is None else probe if isinstance(probe, list) else [probe]
    follower = _Follower(batches, preconditioned, preconditioned and adaptive, top_k, with_trace, with_ntk, tol)
    times = follower.times(steps, every)
    rows: dict[int, list[list[Row]]] = {size: [] for size in sizes}
    limits: dict[int, float] = {}
    for size in sizes:
        for seed in chosen:
            run = family.start(size, seed=seed, lr_factor=lr_factor)
            limits[size] = rule.max_curvature(learning_rate(run.optimizer)) if rule is not None else math.nan
            made, follower.num_matvecs = step(f"{dimension} {size}, seed {seed}", partial(follower.counted, run, times), whole=True)
            rows[size].append(made)
            last = rows[size][-1][-1].get("lambda_max", math.nan)
            progress.tell(f"{dimension} {size}, seed {seed}: lambda_max {last:.4g} after {steps} steps, limit {limits[size]:.4g}", runs=1)
    # a run that diverged early has no row of every kind: its numbers there are NaN
    names = dict.fromkeys(("lambda_max", "error", "loss"))
    names |= dict.fromkeys(name for runs in rows.values() for run in runs for row in run for name in row)
    series = {n: {s: np.array([[row.get(n, math.nan) for row in run] for run in rows[s]]) for s in sizes} for n in names}
    shares = {s: series["lambda_max"][s] / (limits[s] if math.isfinite(limits[s]) else 1.0) for s in sizes}
    means = np.array([shares[s].mean(0) for s in sizes])  # (sizes, steps)
    middle = means.mean(0)
    return SharpnessTransfer(
        dimension=dimension,
        sizes=sizes,
        steps=times,
        warmup=steps // 2 if warmup is None else warmup,
        num_seeds=len(chosen),
        matrix=f"lambda_max of {(rule.operator if rule is not None else 'D^-1 H') if preconditioned else 'H'}",
        condition=rule.condition if rule is not None else "",
        lambda_max=series.pop("lambda_max"),
        error=series.pop("error"),
        limit=limits,
        loss=series.pop("loss"),
        extra=series,
        spread=tuple((means.std(0) / middle).tolist()),
        extent=tuple(((means.max(0) - means.min(0)) / middle).tolist()),
        exponents=tuple(log_slope({s: shares[s][:, i].tolist() for s in sizes}) for i in range(len(times))),
        num_matvecs=follower.num_matvecs,
        seconds=progress.seconds,
    )


Row = dict[str, float]  # name -> value at one time of a run


@dataclass
class _Follower:
    """Trains one run after another and measures the same on each."""

    batches: Sequence[Batch]  # measured on
    preconditioned: bool  # the matrix of the optimizer's limit in place of H
    adaptive: bool  # D is the optimizer's own and known only after a step
    top_k: int  # as for :func:`sharpness_transfer`
    with_trace: bool
    with_ntk: bool
    tol: float
    num_matvecs: int = 0  # products so far

    def times(self, steps: int, every: int) -> tuple[int, ...]:
        """Steps to measure at; before the first step an adaptive optimizer has no second moment, so that the first is after it."""
        return tuple(t for t in range(steps + 1) if (t % every == 0 and not (self.adaptive and t == 0)) or (self.adaptive and t == 1))

    def follow(self, run: FamilyRun, times: Sequence[int]) -> list[Row]:
        """A row at each time; empty ones once the run has diverged."""
        tracker, rows = EigenvalueTracker(tol=self.tol), []  # one a run: each eigenvalue starts from the last one's vector
        for t in range(times[-1] + 1):
            if t in times:
                try:
                    rows.append({} if run.diverged else self._measure(run, tracker))
                except NonFiniteError:
                    rows.append({})
            run.step()
        return rows

    def counted(self, run: FamilyRun, times: Sequence[int]) -> tuple[list[Row], int]:
        """The same with the products so far."""
        return self.follow(run, times), self.num_matvecs

    def _measure(self, run: FamilyRun, tracker: EigenvalueTracker) -> Row:
        matrix: SymmetricOperator = HessianOperator(run.objective(self.batches))
        if self.preconditioned:
            matrix, _ = optimizer_curvature(matrix, run.optimizer)
        row = {"loss": run.final_loss(self.batches)}
        if self.top_k == 1:
            top = tracker.update(matrix)
            row |= {"lambda_max": top.value, "error": top.stderr}
            self.num_matvecs += top.num_matvecs
        else:
            # the tracker follows one vector: for several there is no warm start
            pairs = eigenpairs(matrix, k=min(self.top_k, matrix.size), tol=self.tol)
            values = [float(v) for v in pairs.values]
            row |= {"lambda_max": values[0], "error": float(pairs.residuals[0])}
            row |= {f"lambda_{i}": value for i, value in enumerate(values[1:], start=2)}
            self.num_matvecs += pairs.num_matvecs
        if self.with_trace:
            estimate = trace(matrix, num_matvecs=_TRACE_MATVECS)
            row["trace"] = estimate.value
            self.num_matvecs += estimate.num_matvecs
        if self.with_ntk:
            row["ntk"] = self._ntk(run)
        return row

    def _ntk(self, run: FamilyRun) -> float:
        """Top eigenvalue of J J^T / n, that of the Gauss-Newton matrix of half the squared outputs."""
        length = batch_length(self.batches[0]) or 0
        few = slice_batch(self.batches[0], 0, min(_NTK_SAMPLES, length), length=length)
        half_squares = Objective(run.model, [few], loss=lambda output, _: 0.5 * output.pow(2).sum() / len(output), process_group=False)
        return float(eigenpairs(GaussNewtonOperator(half_squares), k=1, tol=self.tol).values[0])
