"""Gradient noise between mini-batches: the noise scale, and tests of whether a batch is large enough."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sharpkit._arguments import as_seed, flag, real, whole
from sharpkit._calls import public_call
from sharpkit._errors import NonFiniteError
from sharpkit._results import Result, format_with_error, student_factor
from sharpkit.linalg.krylov import BasisRows, Offload, affordable_rows, checked_offload, place_for
from sharpkit.linalg.results import Estimate
from sharpkit.objective.memory import keeps_memory_limit
from sharpkit.objective.objective import Objective
from sharpkit.objective.sample_gradients import SampleGradients
from sharpkit.objective.samples import SamplePool
from sharpkit.operators.hessian import HessianOperator

_GROUPS = 64  # by judgement: their spread is then known to 9 %, and 64 gradients fit where a product's graph does
_ENTRIES = 2**18  # of each gradient that are made float64 at a time, 128 MiB of 64: by judgement
_LEAST_GROUPS = 4  # by judgement: the jackknife and Student's factor (1.6 there) say little from fewer


@dataclass(frozen=True)
class GradientNoise(Result, kind="gradient_noise"):
    """Gradient noise of single samples against the gradient.

    Attributes:
        noise_scale: B_simple = tr Sigma / |G|^2, in samples: the batch size from which larger batches help little.
        trace: tr Sigma, unbiased.
        gradient_norm_squared: |G|^2 of the underlying gradient, unbiased: it can come out negative where noise hides it, and is then
            flagged as not converged, as is the noise scale.
        curvature_noise_scale: B_noise = tr(H Sigma) / (G^T H G), None unless asked for.
        num_groups, group_size: the disjoint groups of samples that it comes from.
        seconds: wall time.
    """

    noise_scale: Estimate
    trace: Estimate
    gradient_norm_squared: Estimate
    curvature_noise_scale: Estimate | None
    num_groups: int
    group_size: int
    seconds: float

    def __repr__(self) -> str:
        extra = f", with curvature {self.curvature_noise_scale}" if self.curvature_noise_scale is not None else ""
        return f"GradientNoise(scale {self.noise_scale} samples{extra}; tr Sigma {self.trace}, |G|^2 {self.gradient_norm_squared})"

    def optimal_fraction(self, batch_size: float) -> float:
        """eta_opt(B) / eta_max = 1 / (1 + B_noise / B), by B_noise where measured, else B_simple."""
        scale = self.curvature_noise_scale or self.noise_scale
        return 1 / (1 + max(scale.value, 0.0) / batch_size)


@public_call
@keeps_memory_limit
def gradient_noise_scale(
    objective: Objective,
    *,
    group_size: int | None = None,
    with_curvature: bool = False,
    max_groups: int = _GROUPS,
    seed: int = 0,
    memory_limit: float | None = None,
    offload: Offload = False,
    name: str = "",
) -> GradientNoise:
    """The gradient noise scale from one pass over the data in disjoint groups.

    With m samples a group, g_k its gradient: |G|^2 is the mean of g_j . g_k over distinct groups and tr Sigma = m (mean |g_k|^2 - |G|^2);
    both are unbiased for independent samples. Errors are by the jackknife over groups. ``group_size=1`` is the per-sample estimate.

    Args:
        objective: the samples that groups are drawn from.
        group_size: m; by default so that there are 64 groups.
        with_curvature: also B_noise = tr(H Sigma) / (G^T H G), by one Hessian product a group.
        max_groups: at most so many groups; their gradients, each as large as the model, are held.
        seed: seeds the grouping.
        memory_limit: bytes that may be taken on the model's device; by default half of what is free holds the gradients.
        offload: True keeps the gradients in host memory, the path of a folder in a file there.
        name: of the result, which pages and comparisons show.

    Raises:
        ValueError: fewer than 4 groups.
        OutOfMemoryError: the gradients fit nowhere.
        NonFiniteError: a gradient is NaN or infinite.

    References:
        McCandlish et al. (2018), arXiv 1812.06162, appendix A and equation 2.8.

    Example:
        >>> import torch, sharpkit as sk
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> objective = sk.Objective(model, (torch.ones(64, 1), torch.randn(64, 1)), loss=torch.nn.functional.mse_loss)
        >>> sk.gradient_noise_scale(objective).num_groups
        64
    """
    started, pool = time.perf_counter(), SamplePool(objective)
    with_curvature, max_groups = flag("with_curvature", with_curvature), whole("max_groups", max_groups, least=_LEAST_GROUPS)
    size = max(1, pool.size // max_groups) if group_size is None else whole("group_size", group_size)
    groups = pool.groups(size, generator=torch.Generator().manual_seed(as_seed(seed)), max_groups=max_groups)
    if len(groups) < _LEAST_GROUPS:
        few = f"{pool.size} samples make {len(groups)} groups of {size}"
        raise ValueError(f"{few}; at least {_LEAST_GROUPS} are needed: choose a smaller group_size")
    hessian = HessianOperator(objective)
    gradients = BasisRows(hessian, offload=place_for(hessian, len(groups), checked_offload(offload)), most=len(groups))
    for group in groups:
        gradients.append(_finite(group.gradient()[1]))
    counts = [group.num_targets for group in groups] if objective.reduction == "mean" else None  # of sums, each sample weighs as the next
    gram = torch.cat([_gram(gradients, part) for part in gradients.parts()], dim=1)
    noise, signal, scale = (e.rounded(objective.rounding) for e in _noise_and_signal(gram, size, counts))
    curvature = None
    if with_curvature:
        # as many products at once as fit, so that passes over the data are shared
        width = max(1, min(len(groups), affordable_rows(hessian) // 4))
        blocks = [range(start, min(start + width, len(groups))) for start in range(0, len(groups), width)]
        products = (hessian @ torch.stack([gradients.row(j) for j in block]).to(objective.dtype).T for block in blocks)
        turned = torch.cat([_gram(gradients, product.T) for product in products], dim=1)
        curvature = _noise_and_signal(turned, size, counts)[2].rounded(objective.rounding)
    return GradientNoise(scale, noise, signal, curvature, len(groups), size, time.perf_counter() - started)


def _gram(rows: BasisRows, others: Tensor) -> Tensor:
    """Inner products of all rows with (k, n) others, (rows, k) in float64: some entries of all at a time, so that no set is held twice."""
    total = torch.zeros(rows.size, len(others), dtype=torch.float64)
    for first in range(0, others.shape[1], _ENTRIES):
        entries = slice(first, first + _ENTRIES)
        here = torch.cat([part[:, entries] for part in rows.parts()]).double()
        total += (here @ others[:, entries].double().T).cpu()
    return total


def _group_gradients(groups: Sequence[Objective], *, whole: bool) -> Tensor:
    """(groups, n) in float64; ``whole`` where each group is one piece, and all are alike."""
    if not whole:
        return torch.stack([_finite(group.gradient()[1]) for group in groups]).double()
    with groups[0].undisturbed():
        pieces = [piece for group in groups for piece in group.pieces()]
        return torch.cat([_finite(rows).double() for _, rows in SampleGradients(groups[0]).of(pieces)])


def _finite(gradient: Tensor) -> Tensor:
    if not bool(torch.isfinite(gradient).all()):
        raise NonFiniteError("the gradient of a mini-batch contains NaN or infinity while its loss is finite (a square root at 0?)")
    return gradient


def _noise_and_signal(gram: Tensor, size: int, counts: Sequence[float] | None = None) -> tuple[Estimate, Estimate, Estimate]:
    """tr Sigma, |G|^2 and their ratio from the groups' Gram matrix g_j . g_k (or g_j . H g_k), errors by the jackknife.

    Groups of uneven counts c_k (tokens) have G = sum c_k g_k / sum c_k, and tr Sigma is that of the ratio's linearisation, the samples'
    c_i (g_i - G) / mean c: plain differences of group means would be larger for small groups.
    """
    matrix = gram.cpu().numpy()
    count, weights = len(matrix), np.ones(len(matrix)) if counts is None else np.asarray(counts, dtype=float)
    weighted = weights[:, None] * (matrix + matrix.T) / 2 * weights  # g_j . H g_k is symmetric up to rounding
    rows, diagonal = weighted.sum(axis=1), weighted.diagonal()

    def estimate(left: np.ndarray[Any, Any], total: float, rows: np.ndarray[Any, Any]) -> tuple[float, float]:
        """Of the groups ``left``, with the sums over them of all of c_j c_k g_j . g_k and of its rows."""
        k, mean = int(left.sum()), weights[left].mean()
        share = weights[left] / mean
        residuals = diagonal[left] / mean**2 - 2 * share * rows[left] / (k * mean**2) + share**2 * total / (k * mean) ** 2
        noise = size * float(residuals.sum()) / (k - 1)
        return noise, total / (k * mean) ** 2 - noise / (size * k)  # |mean|^2 is too large by its variance

    noise, signal = estimate(np.ones(count, dtype=bool), float(weighted.sum()), rows)
    everyone = ~np.eye(count, dtype=bool)
    left_out = np.array([estimate(everyone[j], weighted.sum() - 2 * rows[j] + diagonal[j], rows - weighted[j]) for j in range(count)])
    widened = (count - 1) * student_factor(count) ** 2  # the jackknife's variance is (K - 1) times that of the leave-one-out values
    spread = np.sqrt(widened * left_out.var(axis=0))
    resolved = signal > 2 * float(spread[1])  # below, the ratio's error is not that of a linear function any more
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio_error = float(np.sqrt(widened * (left_out[:, 0] / left_out[:, 1]).var()))
    # a signal lost in noise leaves no scale: any batch size could be the one from which larger ones help little
    scale = (noise / signal, ratio_error if math.isfinite(ratio_error) else math.inf) if signal > 0 else (math.inf, math.inf)
    rows = ((noise, float(spread[0]), True), (signal, float(spread[1]), resolved), (*scale, resolved))
    of_noise, of_signal, ratio = (Estimate(v, e, count, 0.0, f"{count} groups of {size}", ok) for v, e, ok in rows)
    return of_noise, of_signal, ratio


@dataclass(frozen=True)
class BatchSizeTest(Result, kind="batch_size_test"):
    """Whether a batch is large enough, and how large it should be.

    Attributes:
        name: which test.
        passed: whether the batch is large enough.
        statistic, bound: what is compared; passed where statistic <= bound.
        batch_size: the one tested.
        suggested_batch_size: the smallest that would pass (the tested one where it passes, or where the gradient is 0 and none would).
    """

    name: str
    passed: bool
    statistic: float
    bound: float
    batch_size: int
    suggested_batch_size: int

    def __str__(self) -> str:
        remedy = f"{self.suggested_batch_size} would do" if self.bound > 0 else "and no batch size passes: the mean gradient is 0"
        verdict = "large enough" if self.passed else f"too small, {remedy}"
        compared = f"{format_with_error(self.statistic, 0)} against {format_with_error(self.bound, 0)}"
        return f"{self.name} test: {self.batch_size} is {verdict} ({compared})"


def batch_size_tests(
    objective: Objective,
    *,
    norm: float = 0.5,
    inner_product: float = 0.5,
    orthogonality: float = 5.84,
    batch_size: int | None = None,
    seed: int = 0,
) -> list[BatchSizeTest]:
    """Three tests of whether the objective's samples are enough for a good step: norm, inner product, orthogonality.

    Over per-sample gradients g_i with mean g: sum Var(g_i) / b <= norm^2 |g|^2; Var(g_i . g) / b <= inner_product^2 |g|^4;
    Var(g_i - (g_i . g / |g|^2) g) / b <= orthogonality^2 |g|^2. On failure the suggestion is what would pass: the norm test asks for
    B_simple / norm^2. Samples that count more (more targets) weigh more. Costs b gradients of single samples, some at once.

    Args:
        objective: the samples that make the batch.
        norm, inner_product, orthogonality: thresholds eta_n, theta and nu.
        batch_size: b to test; by default all samples.
        seed: seeds the draw where ``batch_size`` is smaller than the data.

    Raises:
        ValueError: fewer than 2 samples, or thresholds that are not positive.
        NonFiniteError: a gradient is NaN or infinite.

    References:
        Bollapragada, Byrd and Nocedal (2018), arXiv 1710.11258; Lau, Liu and Kolar (2024), arXiv 2402.11215.

    Example:
        >>> import torch, sharpkit as sk
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> objective = sk.Objective(model, (torch.ones(2, 1), torch.tensor([[0.0], [1.0]])), loss=torch.nn.functional.mse_loss)
        >>> print(sk.batch_size_tests(objective)[0])  # gradients 2 and 0: mean 1, variance 2
        norm test: 2 is too small, 8 would do (1 against 0.25)
    """
    norm, inner_product = real("norm", norm, above=0), real("inner_product", inner_product, above=0)
    orthogonality = real("orthogonality", orthogonality, above=0)
    pool = SamplePool(objective)
    size = pool.size if batch_size is None else whole("batch_size", batch_size, least=None)
    if not 2 <= size <= pool.size:
        raise ValueError(f"the tests need 2 to {pool.size} samples, the objective's, got batch_size={size}")
    chosen = torch.randperm(pool.size, generator=torch.Generator().manual_seed(as_seed(seed)))[:size]
    variance, along, across, squared = _variances(pool.objective(chosen))
    return [
        _verdict("norm", variance, norm**2 * squared, size),
        _verdict("inner product", along, inner_product**2 * squared**2, size),
        _verdict("orthogonality", across, orthogonality**2 * squared, size),
    ]


def _variances(batch: Objective) -> tuple[float, float, float, float]:
    """sum Var(g_i), Var(g_i . g), the variance of the part of g_i across g, and |g|^2, from a few samples' gradients at a time."""
    mean = _finite(batch.gradient()[1]) / (1 if batch.reduction == "mean" else batch.num_samples)
    squared = float(mean.double().square().sum())
    per_sample = batch.num_targets / batch.num_samples
    total = inner = 0.0
    with batch.undisturbed():
        gradients = SampleGradients(batch)
        for piece in batch.pieces():
            samples = batch.samples_of(piece)
            for some, rows in gradients.of(samples):
                deviations = rows.sub_(mean)  # as exact as the rows themselves; from differences of sums of squares nothing might be left
                if batch.reduction == "mean":  # a sample with more targets has a larger gradient: it weighs as many samples
                    shares = torch.tensor(samples.counts[some], dtype=torch.float64) / per_sample
                    deviations *= shares.to(rows)[:, None]
                inner += float((deviations @ mean).double().square().sum())
                total += float(deviations.square_().sum())
    freedom = batch.num_samples - 1
    across = total - inner / squared if squared > 0 else total
    return total / freedom, inner / freedom, max(across, 0.0) / freedom, squared


def _verdict(name: str, variance: float, bound: float, size: int) -> BatchSizeTest:
    passed = variance / size <= bound
    needed = math.ceil(variance / bound) if bound > 0 else size  # Var / b <= bound, solved for b
    return BatchSizeTest(name, passed, variance / size, bound, size, size if passed else max(size, needed))
