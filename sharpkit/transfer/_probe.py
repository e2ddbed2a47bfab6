"""What is measured on a fixed batch at one time of one run: the top eigenvalues, the loss, on request trace and NTK."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from sharpkit._batches import Batch, batch_length, slice_batch
from sharpkit._errors import NonFiniteError, UnsupportedError
from sharpkit.analysis.sharpness import preconditioned_hessian
from sharpkit.analysis.stability import UpdateRule, update_rule
from sharpkit.linalg.lanczos import eigenpairs
from sharpkit.linalg.trace import trace
from sharpkit.linalg.tracking import EigenvalueTracker
from sharpkit.objective import Objective
from sharpkit.operators.base import SymmetricOperator
from sharpkit.operators.gauss_newton import GaussNewtonOperator
from sharpkit.operators.hessian import HessianOperator
from sharpkit.operators.preconditioned import PreconditionedOperator
from sharpkit.transfer.setup import Family, Run

_NTK_SAMPLES, _TRACE_MATVECS = 32, 12


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

    def matrix(self, run: Run) -> SymmetricOperator:
        """H or D^-1 H at the run's present parameters."""
        hessian = HessianOperator(run.objective(self.batches))
        if not self.preconditioned:
            return hessian
        return preconditioned_hessian(hessian, run.optimizer) if self.adaptive else PreconditionedOperator(hessian, run.optimizer)

    def ntk(self, run: Run) -> float:
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

    def measure(self, run: Run) -> None:
        """Add what holds now; NaN once the run has diverged."""
        try:
            now = {"loss": math.nan, "lambda_max": math.nan, "error": math.nan} if run.diverged else self._values(run)
        except NonFiniteError:
            now = {}
        for name in dict.fromkeys([*now, *self.series, "loss", "lambda_max", "error"]):
            self.series.setdefault(name, []).append(now.get(name, math.nan))

    def _values(self, run: Run) -> dict[str, float]:
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


def known_rule(optimizer: Optimizer) -> UpdateRule | None:
    """The optimizer's update rule, None where its stability limit is not known."""
    try:
        return update_rule(optimizer)
    except UnsupportedError:
        return None


def scales(family: Family, sizes: Sequence[int], rule: UpdateRule | None) -> bool:
    """Whether the optimizer divides its gradients by something, or gives its groups different rates."""
    if rule is None:
        return False
    groups = [family.start(size).optimizer.param_groups for size in sizes]
    return rule.adaptive or any(len({float(g["lr"]) for g in found}) > 1 for found in groups)
