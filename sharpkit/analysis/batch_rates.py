"""What a learning-rate curve says: the largest stable rate at any batch size, where the simple rule ends, in words and numbers."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sharpkit.analysis.batch_curvature import BatchCurvature
from sharpkit.analysis.bounded import Bounded
from sharpkit.analysis.stability import UpdateRule
from sharpkit.linalg.results import SCHEMA_VERSION

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_HALF_STEP = 2**0.25  # half of the factor between the largest rate that trained and the next, in log
_MODEL_SPREAD = 1.5  # what a rate read off curvature alone may be off by
_SCATTER = 0.25  # standard deviation of an anchor's log rate about the law, by chance and because the law is no more than that
_FIRST_BEND = 0.1  # the law may bend anywhere from this batch size to N, every octave alike


@dataclass(frozen=True)
class Anchor:
    """Where training really broke at one batch size, by short runs; geometric means where the search was repeated.

    Attributes:
        batch_size: B.
        trained: largest rate that trained.
        broke: smallest rate above it that did not.
        repeats: searches with other orders of the data.
    """

    batch_size: int
    trained: float
    broke: float
    repeats: int = 1

    @property
    def rate(self) -> float:
        """Geometric middle of the two."""
        return math.sqrt(self.trained * self.broke)


@dataclass(frozen=True)
class LearningRateCurve:
    """The largest stable learning rate and the batch curvature against the batch size.

    Attributes:
        batch_sizes: those asked for, ascending.
        optimizer: name of the kind.
        rule: its update rule.
        curvature: full-data curvature and its noise (preconditioned for an adaptive optimizer, at the smallest batch size).
        limits: (batch size, rate) by the mean-square condition on the curvature measured, on a fine grid.
        anchors: short runs that fix the level; empty without.
        sharpness: (lambda_max at the starting point, after the pilot).
        lr: the optimizer's present rate.
        num_samples: N.
        gradients: cost, in full-data gradients (products count two).
        seconds: wall time.
    """

    batch_sizes: tuple[int, ...]
    optimizer: str
    rule: UpdateRule
    curvature: BatchCurvature = field(repr=False)
    limits: tuple[tuple[float, float], ...] = field(repr=False)
    anchors: tuple[Anchor, ...]
    sharpness: tuple[float, float]
    lr: float
    num_samples: int
    gradients: float
    seconds: float

    # -- reading it -------------------------------------------------------------------------------------------------------
    def lambda_max(self, batch_size: float) -> Bounded:
        """The expected largest eigenvalue of a batch Hessian."""
        return self.curvature.lambda_max_of(self._checked(batch_size))

    def lambda_min(self, batch_size: float) -> Bounded:
        """The expected smallest eigenvalue of a batch Hessian."""
        return self.curvature.lambda_min_of(self._checked(batch_size))

    def by_curvature(self, batch_size: float) -> float:
        """The mean-square limit on the curvature measured, without calibrating runs."""
        x, y = (np.log([point[j] for point in self.limits]) for j in (0, 1))
        return float(np.exp(np.interp(math.log(self._checked(batch_size)), x, y)))

    def max_lr(self, batch_size: float) -> Bounded:
        """The largest stable learning rate at a batch size, with an interval.

        The mean-square condition makes 1 / rate linear in 1 / b (adaptive optimizers, whose small-batch rates go as sqrt(B): 1 / rate^2).
        That law's two constants, a level and the batch size c where it bends, are fitted to the rates at which short runs broke: the rate
        is the geometric mean over all c up to N, weighted by how well they fit. Real curves bend more sharply: beyond the largest batch
        size calibrated, the rate may stay as it is there or follow the law, which weigh alike. The interval takes in the spread of all.
        """
        theory = self.by_curvature(batch_size)
        if not self.anchors:
            return Bounded(theory, theory / _MODEL_SPREAD, theory * _MODEL_SPREAD)
        bends, levels, weights = self._laws
        logs = levels - self.exponent * np.log1p(bends / self.curvature.effective(batch_size))
        held = levels - self.exponent * np.log1p(bends / self.curvature.effective(min(batch_size, self.anchors[-1].batch_size)))
        mean = float(weights @ (logs + held) / 2)
        own = _SCATTER**2 / len(self.anchors)  # of the level, whatever c
        spread = 1.96 * math.sqrt(float(weights @ ((logs - mean) ** 2 + (held - mean) ** 2) / 2) + own) + math.log(_HALF_STEP)
        return Bounded(math.exp(mean), math.exp(mean - spread), math.exp(mean + spread))

    @cached_property
    def _laws(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """(c, log r, weight) of the laws rate = r (1 + c / b)^-exponent: for each c the best r, weighted by the anchors' likelihood."""
        x = np.array([1 / self.curvature.effective(a.batch_size) for a in self.anchors])
        rates = np.log([a.rate for a in self.anchors])
        bends = np.geomspace(_FIRST_BEND, self.num_samples, 400)
        levels = rates + self.exponent * np.log1p(bends[:, None] * x)  # as each anchor has it
        misfit = levels.var(axis=1) * len(rates)
        weights = np.exp(-(misfit - misfit.min()) / (2 * _SCATTER**2))
        return bends, levels.mean(axis=1), weights / weights.sum()

    @property
    def exponent(self) -> float:
        """The power of B in the simple rule of this optimizer: 1 for SGD (linear), 1/2 for adaptive ones (square root)."""
        return 0.5 if self.rule.adaptive else 1.0

    @property
    def crossover(self) -> Bounded:
        """B*: where the simple rule, drawn through the smallest batch sizes, meets the plateau (the largest rate of all).

        The smallest two batch sizes give the rule's level.
        """
        grid = np.array(self.batch_sizes, dtype=float)
        rates = np.array([float(self.max_lr(b)) for b in grid])
        level = float(np.exp(np.mean(np.log(rates[:2]) - self.exponent * np.log(grid[:2]))))
        value = float((rates.max() / level) ** (1 / self.exponent))
        spread = _MODEL_SPREAD ** (1 / self.exponent)
        return Bounded(value, value / spread, value * spread)

    def rule_holds_to(self, tolerance: float = 0.1) -> float:
        """The largest batch size up to which the simple rule, from the smallest one on, stays within a tolerance."""
        grid = np.geomspace(self.batch_sizes[0], self.batch_sizes[-1], 200)
        start, last = float(self.max_lr(grid[0])), float(grid[0])
        for b in grid[1:]:
            if abs(float(self.max_lr(b)) / (start * (b / grid[0]) ** self.exponent) - 1) > tolerance:
                break
            last = float(b)
        return last

    def _checked(self, batch_size: float) -> float:
        if not 1 <= batch_size <= self.num_samples:
            raise ValueError(f"batch_size must lie between 1 and the {self.num_samples} samples measured, got {batch_size}")
        return batch_size

    # -- showing it -------------------------------------------------------------------------------------------------------
    def rows(self) -> list[dict[str, float]]:
        """One row per batch size, plain numbers."""
        found = []
        for b in self.batch_sizes:
            top, rate = self.lambda_max(b), self.max_lr(b)
            found.append(
                {
                    "batch_size": b,
                    "lambda_max": float(top),
                    "lambda_max_lower": top.lower,
                    "lambda_max_upper": top.upper,
                    "lambda_min": float(self.lambda_min(b)),
                    "max_lr": float(rate),
                    "max_lr_lower": rate.lower,
                    "max_lr_upper": rate.upper,
                    "by_curvature": self.by_curvature(b),
                }
            )
        return found

    def table(self) -> str:
        """The curve as text."""
        lines = [f"{'batch':>7}  {'lambda_max(H_B)':>24}  {'largest stable lr':>26}  {'by curvature alone':>18}"]
        lines += [f"{b:>7}  {self.lambda_max(b)!s:>24}  {self.max_lr(b)!s:>26}  {self.by_curvature(b):>18.3g}" for b in self.batch_sizes]
        return "\n".join(lines)

    def findings(self) -> list[str]:
        """What the curve says, in sentences."""
        name = "square-root scaling" if self.rule.adaptive else "linear scaling"
        plateau, cross = float(self.max_lr(self.batch_sizes[-1])), self.crossover
        if cross < self.batch_sizes[-1]:
            shape = (
                f"{name} reaches the plateau at B = {float(cross):.0f} ({cross.lower:.0f}-{cross.upper:.0f}); at B = "
                f"{self.batch_sizes[-1]} the limit is {plateau:.2g}."
            )
        else:
            shape = f"{name} is not exhausted at B = {self.batch_sizes[-1]}, where the limit is {plateau:.2g}."
        found = [
            f"{self.optimizer}: {shape} From B = {self.batch_sizes[0]}, it is off by more than 10 % beyond B = {self.rule_holds_to():.0f}."
        ]
        found.append("; ".join(f"at B = {b} stay below {self.max_lr(b)}" for b in self._picked()) + ".")
        found.append(
            f"lambda_max is {self.sharpness[0]:.3g} at the start and {self.sharpness[1]:.3g} after the pilot. For batches: "
            f"{self.curvature.choose()[1]}."
        )
        if self.anchors:
            sizes = ", ".join(str(a.batch_size) for a in self.anchors)
            found.append(f"The level is calibrated by short training runs at B = {sizes}.")
        else:
            found.append(
                "No calibrating runs were made: rates are those at which training from the measured point is stable, not training "
                "from scratch."
            )
        return found

    def _picked(self) -> list[int]:
        middle = self.batch_sizes[len(self.batch_sizes) // 2]
        return sorted({self.batch_sizes[0], middle, self.batch_sizes[-1]})

    def __str__(self) -> str:
        return "\n".join(self.findings())

    def plot(self, ax: Axes | None = None) -> Axes:
        """The largest rate against B with its interval, the anchors, the limit by curvature and the simple rule."""
        from sharpkit.plots import plot_learning_rate_curve

        return plot_learning_rate_curve(self.to_dict(), ax=ax)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        cross = self.crossover
        return {
            "kind": "learning_rate_curve",
            "version": SCHEMA_VERSION,
            "optimizer": self.optimizer,
            "condition": self.rule.condition,
            "exponent": self.exponent,
            "rows": self.rows(),
            "crossover": cross.to_dict(),
            "rule_holds_to": self.rule_holds_to(),
            "curvature": self.curvature.to_dict(),
            "anchors": [asdict(anchor) for anchor in self.anchors],
            "sharpness_at_start": self.sharpness[0],
            "sharpness_after_pilot": self.sharpness[1],
            "lr": self.lr,
            "num_samples": self.num_samples,
            "gradients": self.gradients,
            "seconds": self.seconds,
            "findings": self.findings(),
        }
