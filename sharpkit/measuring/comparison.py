"""Several optimizers at one point of one loss: each one's own sharpness, and how far its rate is from its limit."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from sharpkit._arguments import as_seed, whole
from sharpkit._calls import public_call
from sharpkit._errors import UnsupportedError
from sharpkit._results import Progress, ProgressCallback, Result
from sharpkit.measuring.geometry import GeneralizedSharpness, generalized_sharpness
from sharpkit.objective.objective import Objective
from sharpkit.objective.samples import SamplePool
from sharpkit.optimizers import check_settles, has_geometry, has_stepped, is_adaptive, settled_preconditioner, unwrap_optimizer

_MOST_BATCHES = 32  # whose gradients tell where second moments settle: by judgement, their mean is known to a third, D to a sixth


@dataclass(frozen=True)
class OptimizerComparison(Result, kind="optimizer_comparison", saved=("rows", "settled", "batch_size", "seconds", "finding")):
    """What each of several optimizers feels at the same point.

    Attributes:
        rows: each one's sharpness with its limit, in the order given.
        settled: whether the second moments are those it would settle to here, for each; else they are its live ones, or it has none.
        batch_size: whose gradients the moments settle to; None where none had to.
        seconds: wall time.
    """

    rows: tuple[GeneralizedSharpness, ...]
    settled: tuple[bool, ...]
    batch_size: int | None
    seconds: float

    @property
    def finding(self) -> str:
        """What it means, in a sentence: the first optimizer, and the others beside it."""
        first, *others = self.rows

        def at(row: GeneralizedSharpness, verb: str) -> str:
            if row.share is None:
                return f"{row.optimizer} has rate 0 and is stable up to {row.stable_lr:.3g}"
            return f"{row.optimizer} {verb} at {row.share:.2g} of its limit (stable up to a rate of {row.stable_lr:.3g})"

        return "; ".join([at(first, "is"), *(at(row, "would be") for row in others)]) + "."

    def table(self) -> str:
        """One line for each optimizer."""
        head = f"{'optimizer':>20}  {'sharpness':>10}  {'in':>16}  {'limit':>10}  {'share':>7}  {'largest lr':>10}"
        lines = [head]
        for row, settled in zip(self.rows, self.settled, strict=True):
            limit, share = (f"{v:.4g}" if v is not None else "-" for v in (row.limit, row.share))
            settles = f"  second moments as they settle at batches of {self.batch_size}" if settled else ""
            lines.append(
                f"{row.optimizer:>20}  {row.value:>10.4g}  {row.norm:>16}  {limit:>10}  {share:>7}  {row.stable_lr:>10.3g}{settles}"
            )
        return "\n".join(lines)

    def __str__(self) -> str:
        return f"{self.table()}\n{self.finding}"


@public_call
def compare_optimizers(
    objective: Objective,
    optimizers: Sequence[Optimizer],
    *,
    batch_size: int | None = None,
    seed: int = 0,
    callback: ProgressCallback | None = None,
    name: str = "",
) -> OptimizerComparison:
    """Each optimizer's own sharpness at the present parameters, with the limit at its rate, by :func:`sharpkit.generalized_sharpness`.

    An optimizer that has stepped is measured with its live state. One that divides gradients by a state and has not stepped, such as the
    AdamW that one thinks of changing to, gets the second moments that it would settle to at these parameters: the mean square gradient of
    up to 32 mini-batches.

    Args:
        objective: the function, at the point in question.
        optimizers: over its parameters, each with the rate and settings meant; only read.
        batch_size: samples in a mini-batch; by default those of the objective's first batch.
        seed: seeds start vectors and mini-batches.
        callback: called with a :class:`sharpkit.Progress` after each optimizer.
        name: of the result, which pages and comparisons show.

    Raises:
        ValueError, TypeError: no optimizer, an argument out of range, or an optimizer without state whose D does not follow from mean
            squares (Adadelta, Adagrad): let it step first.
        UnsupportedError: an optimizer that sharpkit does not know.
        ObjectiveError: mini-batches are needed and the loss is no mean or sum over samples.

    Example:
        >>> import torch, sharpkit as sk
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> objective = sk.Objective(model, (torch.eye(2), torch.zeros(2, 1)), loss=torch.nn.functional.mse_loss)  # H = I
        >>> rates = (0.5, 1.0)
        >>> print(sk.compare_optimizers(objective, [torch.optim.SGD(model.parameters(), lr=lr) for lr in rates]).finding)
        SGD is at 0.25 of its limit (stable up to a rate of 2); SGD would be at 0.5 of its limit (stable up to a rate of 2).
    """
    began, seed = time.perf_counter(), as_seed(seed)
    if isinstance(optimizers, Optimizer) or not isinstance(optimizers, Sequence) or not optimizers:
        raise TypeError(f"optimizers must be a list of at least one optimizer, got {type(optimizers).__name__}")
    inner = [unwrap_optimizer(optimizer) for optimizer in optimizers]
    settled = tuple(map(_must_settle, inner))
    size = whole("batch_size", batch_size) if batch_size is not None else next(iter(objective.batch_lengths)) if any(settled) else None
    moments = _moments(objective, size, seed) if any(settled) and size is not None else None
    rows: list[GeneralizedSharpness] = []
    for optimizer, settles in zip(inner, settled, strict=True):
        diagonal = None
        if settles and moments is not None:
            diagonal = settled_preconditioner(optimizer, objective.layout, moments[1], mean=moments[0])
        rows.append(generalized_sharpness(objective, optimizer, seed=seed, diagonal=diagonal))
        if callback is not None:
            elapsed = time.perf_counter() - began
            left = elapsed / len(rows) * (len(inner) - len(rows))
            callback(Progress(len(rows), len(inner), elapsed, left, str(rows[-1]), "checks"))
    return OptimizerComparison(tuple(rows), settled, size if any(settled) else None, time.perf_counter() - began)


def _must_settle(optimizer: Optimizer) -> bool:
    if has_geometry(optimizer) or not is_adaptive(optimizer, unknown=False) or has_stepped(optimizer):
        return False
    with suppress(UnsupportedError):  # then the measurement refuses it until it has stepped
        check_settles(optimizer)
        return True
    return False


def _moments(objective: Objective, batch_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """(n,) mean and mean square, in float64, of mini-batch gradients."""
    pool = SamplePool(objective)
    groups = pool.groups(min(batch_size, pool.size), generator=torch.Generator().manual_seed(seed), max_groups=_MOST_BATCHES)
    mean = square = torch.zeros(objective.layout.size, dtype=torch.float64, device=objective.device)
    for group in groups:  # one after another: a gradient of each at once could take more memory than the model
        gradient = group.gradient()[1].double()
        mean, square = mean + gradient / len(groups), square + gradient.square() / len(groups)
    return mean, square
