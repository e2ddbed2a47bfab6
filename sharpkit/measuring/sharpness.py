"""How sharp a loss is, in one call: ends of the Hessian spectrum, trace, norm, effective rank and the stable learning rate."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from sharpkit._arguments import as_seed
from sharpkit._calls import public_call
from sharpkit._checkpoint import clock, resumable, step
from sharpkit._results import ProgressCallback, Result, percent
from sharpkit.linalg.krylov import Offload
from sharpkit.linalg.lanczos import eigenpairs
from sharpkit.linalg.overview import SpectralOverview, spectral_overview
from sharpkit.linalg.results import Eigenpairs, Estimate, SpectralDensity
from sharpkit.measuring.stability import StableLearningRate, rate_under
from sharpkit.objective.memory import keeps_memory_limit
from sharpkit.objective.objective import Objective, objective_call
from sharpkit.operators.base import SymmetricOperator
from sharpkit.operators.hessian import HessianOperator
from sharpkit.operators.preconditioned import optimizer_curvature
from sharpkit.optimizers import UpdateRule, check_trains, learning_rate, operator_in, unwrap_optimizer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# What a document holds, in its order: plain numbers, then numbers with errors.
_PLAIN = ("loss", "grad_norm", "lr", "num_parameters", "num_samples", "mode", "num_matvecs", "seconds", "seed", "converged")
_NESTED = ("lambda_max", "lambda_min", "trace", "frobenius_norm", "effective_rank", "negative_mass", "stable_lr", "density")


@dataclass(frozen=True)
class Sharpness(Result, kind="sharpness", saved=(*_PLAIN, *_NESTED, "preconditioned_lambda_max", "findings")):
    """The numbers of :func:`measure`. Eigenvalue errors are residual bounds; errors of sums are standard errors over random probes.

    Attributes:
        lambda_max, lambda_min: largest and smallest eigenvalue of the Hessian.
        trace, frobenius_norm: its trace and Frobenius norm.
        effective_rank: sum |lambda_i| / max |lambda_i|: how many directions are about as curved as the sharpest.
        negative_mass: share of eigenvalues clearly below zero.
        loss, grad_norm: f(w) and ||grad f(w)||.
        stable_lr: largest stable learning rate of the optimizer (of plain gradient descent without one): that of its first group that
            trains, the others keeping their ratios to it.
        lr: that group's present rate, None without an optimizer.
        preconditioned_lambda_max: largest eigenvalue of the matrix that the optimizer's limit is about, where that is not H: D^-1 H for an
            adaptive one, R^1/2 (H + decay) R^1/2 for groups whose rates R (momenta, decays) differ.
        eigenpairs: the top pair, with its vector.
        density: the spectral density from the same products.
        num_parameters, num_samples: what the objective holds.
        mode: ``"eval"`` or ``"train"``: how dropout and batch statistics were set.
        num_matvecs, seconds: Hessian products in all, and wall time.
        seed: what seeded the probes.
    """

    lambda_max: Estimate
    lambda_min: Estimate
    trace: Estimate
    frobenius_norm: Estimate
    effective_rank: Estimate
    negative_mass: Estimate
    loss: float
    grad_norm: float
    stable_lr: StableLearningRate
    lr: float | None
    preconditioned_lambda_max: Estimate | None
    eigenpairs: Eigenpairs = field(repr=False)
    density: SpectralDensity = field(repr=False)
    num_parameters: int
    num_samples: int
    mode: str
    num_matvecs: int
    seconds: float
    seed: int

    @property
    def converged(self) -> bool:
        """Whether every number reached its tolerance."""
        # those with a tolerance to reach; norm, rank and negative mass come with whatever error the probes leave
        parts = (self.lambda_max, self.lambda_min, self.trace, self.preconditioned_lambda_max)
        return all(part.converged for part in parts if part is not None)

    def __repr__(self) -> str:
        names = ("lambda_max", "preconditioned_lambda_max", "lambda_min", "trace", "frobenius_norm", "effective_rank")
        shown = ("lambda_max", f"lambda_max {operator_in(self.stable_lr.rule)}", "lambda_min", "trace", "Frobenius norm", "effective rank")
        estimates = [(label, getattr(self, name)) for label, name in zip(shown, names, strict=True) if getattr(self, name) is not None]
        rows = [(label, f"{estimate}{'' if estimate.converged else '  (not converged)'}") for label, estimate in estimates]
        rows += [("loss", f"{self.loss:.5g}"), ("gradient norm", f"{self.grad_norm:.4g}")]
        rows += [("stable lr", f"{self.stable_lr}   [here, full batch: {self.stable_lr.rule}]")]
        rows += [("present lr", f"{self.lr:.4g}")] if self.lr is not None else []
        head = f"Sharpness of {self.num_parameters:,} parameters on {self.num_samples:,} samples, {self.mode} mode"
        cost = f"  {self.num_matvecs} Hessian products, {self.seconds:.1f} s"
        width = max(16, *(len(label) for label, _ in rows))
        return "\n".join([head, *(f"  {label:<{width}} {text}" for label, text in rows), cost])

    def findings(self) -> list[str]:
        """What the numbers say, in sentences."""
        sentences = [self._about_learning_rate(), self._about_shape(), self._about_negative_curvature()]
        if self.mode == "train":
            varying = "dropout masks are fixed and batch statistics depend on the batches"
            sentences.append(f"Measured in train mode: {varying}; eval mode may differ widely.")
        if not self.converged:
            sentences.append("Not every number reached its tolerance; the flagged ones are bounds so far. Allow more products or time.")
        return sentences

    def _about_learning_rate(self) -> str:
        if math.isinf(self.stable_lr):
            return "No positive curvature was found, so curvature sets no limit on the learning rate here."
        limit = f"{self.stable_lr.value:.3g}"
        if self.lr is None or self.lr == 0:
            return f"Full-batch gradient descent is stable here up to a learning rate of {limit}; small batches allow less."
        ratio = self.lr / self.stable_lr.value
        # within 5 to 10 % of the limit counts as at it: that far sharpness oscillates at the edge of stability (docs/monitor_results.md)
        rate = f"The learning rate {self.lr:.3g} is"
        if ratio > 1.05:
            grow = "steps along the sharpest direction grow until the loss flattens or diverges"
            return f"{rate} {ratio:.2f} times the stable limit {limit}: {grow}."
        if ratio > 0.9:
            return f"{rate} at the full-batch stable limit {limit}: at the edge of stability, where full-batch training settles."
        return f"{rate} {percent(ratio)} of the full-batch stable limit {limit}; small batches lower that limit."

    def _about_shape(self) -> str:
        share = self.effective_rank.value / self.num_parameters
        spread = f"about {self.effective_rank.value:.3g} of {self.num_parameters:,} directions ({share:.2g} of all)"
        return f"The curvature is spread over {spread}; {len(self.density.outliers)} eigenvalues stand clear of the bulk."

    def _about_negative_curvature(self) -> str:
        if self.lambda_max.value <= 0:
            remedy = "more training (or another starting point) comes first"
            return f"Every direction measured curves downwards or is flat: this is no minimum, and {remedy}."
        low = self.lambda_min
        # judged by its own error, however large the largest is; a Ritz value lies above the smallest eigenvalue, so a negative one is proof
        if low.value + low.stderr >= 0:
            if low.converged:
                return f"There is no negative curvature to speak of (lambda_min is {low}): to this accuracy, the region is convex."
            return f"Whether there is negative curvature is not known: lambda_min is {low} so far."
        of_largest = f"lambda_min is {low}, {-low.value / self.lambda_max.value:.2g} of the largest eigenvalue in size"
        if -low.value < 0.05 * self.lambda_max.value:  # by judgement
            return f"There is slight negative curvature: {of_largest}."
        return f"There is negative curvature: {of_largest}, so the point is a saddle-like region, not a minimum."

    def plot(self, ax: Axes | None = None) -> Axes:
        """The spectral density with the stability limit of the present rate drawn in."""
        from sharpkit.plots.spectrum import plot_density

        # the limit 2 / lr is one of H; that of an adaptive optimizer belongs to another spectrum
        return plot_density(self.density, ax=ax, lr=self.lr if self.preconditioned_lambda_max is None else None)


@public_call
@keeps_memory_limit
@resumable(objective_call)
def measure(
    objective: Objective,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    num_probes: int = 6,
    num_steps: int = 32,
    tol: float = 1e-3,
    seed: int = 0,
    max_matvecs: int | None = None,
    max_seconds: float | None = None,
    memory_limit: float | None = None,
    offload: Offload = False,
    checkpoint: str | os.PathLike[str] | None = None,
    product: str = "exact",
    callback: ProgressCallback | None = None,
    name: str = "",
) -> Sharpness:
    """Measure the sharpness of an objective: one shared pass of about num_probes x num_steps Hessian products.

    An adaptive optimizer, or groups with rates, momenta or decays of their own, add about 15 products, for the top eigenvalue of the matrix
    that the stable rate depends on.

    Args:
        objective: the function.
        optimizer: decides, with the rate, momentum and weight decay of each group, which stability limit is meant; only read. Parameters
            that it does not hold rest.
        num_probes: random probes; the error of trace and norm falls as their square root.
        num_steps: Lanczos steps per probe, which give the density its resolution.
        tol: tolerance of the extreme eigenvalues, relative to each.
        seed: seeds the random probes.
        max_matvecs, max_seconds: stop the measurement when exhausted; partial results are returned with ``converged=False``.
        memory_limit: bytes that may be taken on the model's device, besides model and data; by default half of what is free for graphs and
            half for vectors. num_steps + 1 vectors of the model's size must fit; :func:`sharpkit.plan` tells what a call takes.
        offload: True keeps the vectors in host memory, the path of a folder in a file there.
        checkpoint: a folder from which the call goes on if it is killed and made again (docs/guide.md); until it ends it takes
            a vector of disk for each product of the runs under way.
        product: as for :class:`sharpkit.HessianOperator`.
        callback: called with a :class:`sharpkit.Progress` after each product, or several made at once.
        name: of the result, which pages and comparisons show.

    Raises:
        NonFiniteError, UnsupportedError: from the products.
        OutOfMemoryError: a single sample, or num_steps + 1 vectors, do not fit.
        UnsupportedError: an optimizer whose stability limit is not known, or which trains more than the objective's model.
        ValueError: an optimizer of another model.
        DocumentError: the checkpoint is of another call, or of other parameters or data.

    Example:
        >>> import torch, sharpkit as sk
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> objective = sk.Objective(model, (torch.eye(2), torch.zeros(2, 1)), loss=torch.nn.functional.mse_loss)
        >>> s = sk.measure(objective)
        >>> round(s.lambda_max.value, 4), round(s.stable_lr, 4)
        (1.0, 2.0)
    """
    start = clock()
    hessian, rule, seed = HessianOperator(objective, product=product), UpdateRule(), as_seed(seed)
    matrix: SymmetricOperator = hessian
    if optimizer is not None:
        check_trains(optimizer, objective.model)
        matrix, rule = optimizer_curvature(hessian, optimizer)
    loss, grad_norm = step("loss and gradient", lambda: _loss_and_norm(objective, hessian))
    budget: Any = {"max_matvecs": max_matvecs, "max_seconds": max_seconds, "callback": callback, "offload": offload}
    # ends, trace, norm and density come from the same products
    overview = spectral_overview(hessian, num_probes=num_probes, num_steps=num_steps, tol=tol, seed=seed, **budget)
    top, preconditioned = end_of(overview.largest), None
    if matrix is not hessian:  # a matrix with a spectrum of its own: D^-1 H, or H scaled by the groups' rates
        # what is left of the time, at least a moment: an estimate flagged as unconverged is worth more than none
        left = None if max_seconds is None else step("time left", lambda: max(max_seconds - clock() + start, 1e-3))
        preconditioned = end_of(eigenpairs(matrix, k=1, tol=tol, seed=seed, max_seconds=left, offload=offload, callback=callback))
    return Sharpness(
        lambda_max=top,
        lambda_min=end_of(overview.smallest),
        trace=overview.trace.rounded(objective.rounding),
        frobenius_norm=overview.frobenius_norm.rounded(objective.rounding),
        effective_rank=_effective_rank(overview).rounded(objective.rounding),
        negative_mass=overview.density.negative_mass,
        loss=loss,
        grad_norm=grad_norm,
        # `or`: an Estimate has no truth value of its own, so only None falls through
        stable_lr=rate_under(rule, preconditioned or top),
        lr=learning_rate(unwrap_optimizer(optimizer), objective.layout) if optimizer is not None else None,
        preconditioned_lambda_max=preconditioned,
        eigenpairs=overview.largest,
        density=overview.density,
        num_parameters=objective.num_parameters,
        num_samples=objective.num_samples,
        mode=objective.mode,
        num_matvecs=hessian.num_matvecs,
        seconds=clock() - start,
        seed=seed,
    )


def _loss_and_norm(objective: Objective, hessian: HessianOperator) -> tuple[float, float]:
    loss, gradient = objective.gradient()
    return loss, float(hessian.dot(gradient, gradient)) ** 0.5  # the gradient itself is not kept


def end_of(pairs: Eigenpairs) -> Estimate:
    """The first eigenvalue as a number with its residual bound."""
    value, residual, method = float(pairs.values[0]), float(pairs.residuals[0]), "Lanczos, residual bound"
    return Estimate(value, residual, pairs.num_matvecs, pairs.seconds, method, bool(pairs.converged[0]), error_kind="residual bound")


def _effective_rank(overview: SpectralOverview) -> Estimate:
    # in size: a saddle may be curved most downwards
    largest = max(abs(float(overview.largest.values[0])), abs(float(overview.smallest.values[0])))
    total = overview.absolute_trace
    scale = 1 / largest if largest > 0 else 0.0
    return replace(total, value=total.value * scale, stderr=total.stderr * scale)
