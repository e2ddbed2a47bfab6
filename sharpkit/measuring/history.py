"""Curvature over training: lambda_max with its error against the stability limit, one row per checkpoint."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sharpkit._results import Result, decimals

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SERIES = ("steps", "loss", "lambda_max", "residual", "limit", "lr")


@dataclass(frozen=True)
class CurvatureHistory(
    Result,
    kind="curvature_history",
    saved=(*_SERIES, "name", "limit_rule", "full_batch", "converged", "num_matvecs", "seconds", "findings"),
):
    """lambda_max of one training run at checkpoints; every series has one entry per checkpoint.

    Attributes:
        steps: optimizer steps done, increasing.
        loss: the loss that was differentiated.
        lambda_max: its largest Hessian eigenvalue.
        residual: error bound of ``lambda_max``.
        limit: largest lambda_max at which the optimizer is stable on the full batch (2/lr for plain gradient descent).
        lr: learning rate in use.
        name: what was trained.
        limit_rule: the limit as a formula, for legends.
        full_batch: whether each step used all of the data; with minibatches the run may settle below the limit.
        converged: whether every ``lambda_max`` reached its tolerance.
        num_matvecs: products spent over all checkpoints.
        seconds: time spent measuring.

    Raises:
        ValueError: no checkpoint, series of different lengths, or steps that do not increase.

    Example:
        >>> import sharpkit as sk
        >>> run = sk.CurvatureHistory(
        ...     steps=(0, 100, 200), loss=(2.3, 0.5, 0.2), lambda_max=(5.0, 15.0, 20.1), residual=(0.01, 0.01, 0.02),
        ...     limit=(20.0, 20.0, 20.0), lr=(0.1, 0.1, 0.1), name="MLP",
        ... )
        >>> run.first_at_limit
        200
        >>> print(run.findings()[0])
        MLP: lambda_max rose from 5 to 20.1 and reached the stability limit 2/lr = 20 by step 200.
    """

    steps: tuple[int, ...]
    loss: tuple[float, ...]
    lambda_max: tuple[float, ...]
    residual: tuple[float, ...]
    limit: tuple[float, ...]
    lr: tuple[float, ...]
    name: str = "training run"
    limit_rule: str = "2/lr"
    full_batch: bool = True
    converged: bool = True
    num_matvecs: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        lengths = {name: len(getattr(self, name)) for name in _SERIES}
        if len(set(lengths.values())) != 1 or not self.steps:
            raise ValueError(f"every series needs the same number of checkpoints, at least one; got {lengths}")
        # repeated or falling steps are two runs in one series
        if any(later <= earlier for earlier, later in zip(self.steps, self.steps[1:], strict=False)):
            raise ValueError(f"steps must increase, got {self.steps}")

    def ratios(self) -> tuple[float, ...]:
        """lambda_max / limit at each checkpoint; above 1 the top direction oscillates and grows."""
        # a limit of 0 is that of a decay so strong that nothing is stable
        return tuple(value / limit if limit else math.nan for value, limit in zip(self.lambda_max, self.limit, strict=True))

    @property
    def first_at_limit(self) -> int | None:
        """The first checkpoint's step at which lambda_max, within its error, was at or above the limit; None if it never was."""
        series = zip(self.steps, self.lambda_max, self.residual, self.limit, strict=True)
        # the residual bounds the eigenvalue from above
        return next((step for step, value, error, limit in series if value + error >= limit), None)

    def settled_ratio(self) -> tuple[float, float] | None:
        """Mean and standard deviation of lambda_max / limit over the last half of the checkpoints; None for fewer than four."""
        tail = self.ratios()[len(self.steps) // 2 :]
        # four checkpoints leave a tail of two, the fewest that have a standard deviation
        if len(self.steps) < 4 or not all(math.isfinite(r) for r in tail):
            return None
        mean = sum(tail) / len(tail)
        return mean, math.sqrt(sum((r - mean) ** 2 for r in tail) / (len(tail) - 1))

    def findings(self) -> list[str]:
        """What the run showed, in plain sentences."""
        start, end, peak = self.lambda_max[0], self.lambda_max[-1], max(self.lambda_max)
        rose = peak > 1.05 * start  # 5 % by judgement: what an eigenvalue wanders by without a trend
        limit = f"the stability limit {self.limit_rule} = {self.limit[-1]:.3g}"
        reached = self.first_at_limit
        if reached is not None:
            movement = f"rose from {start:.3g} to {peak:.3g}" if rose else f"started at {start:.3g}"
            sentences = [f"{self.name}: lambda_max {movement} and reached {limit} by step {reached}."]
        else:
            movement = f"rose from {start:.3g} to at most {peak:.3g}" if rose else f"did not rise above its start, {start:.3g}"
            sentences = [f"{self.name}: lambda_max {movement} and stayed below {limit}; it ended at {end:.3g}."]
        if (settled := self.settled_ratio()) is not None:
            at = f"{decimals(settled[0])} +- {decimals(settled[1])}"
            sentences.append(f"{self.name}: over the last half of the checkpoints it lay at {at} of the limit.")
        if not self.full_batch:
            sentences.append(
                f"{self.name}: trained on minibatches. The limit is that of the full batch; with gradient noise lambda_max may settle "
                "below it, so staying below is no sign that a larger learning rate is safe."
            )
        if not self.converged:
            sentences.append(f"{self.name}: some lambda_max did not reach its tolerance; trust them only to within the error bars.")
        return sentences

    def plot(self, ax: Axes | None = None) -> Axes:
        """lambda_max and the limit over steps; see :func:`sharpkit.plots.plot_curvature`."""
        from sharpkit.plots.spectrum import plot_curvature

        return plot_curvature(self, ax=ax)

    def __repr__(self) -> str:
        return (
            f"CurvatureHistory({self.name}: {len(self.steps)} checkpoints, steps {self.steps[0]} to {self.steps[-1]}, "
            f"lambda_max {self.lambda_max[0]:.4g} to {self.lambda_max[-1]:.4g}, limit {self.limit[-1]:.4g}, {self.num_matvecs} products)"
        )
