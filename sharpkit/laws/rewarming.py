"""How high, and how fast, the learning rate may go again where training continues from an annealed checkpoint."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from sharpkit._arguments import as_seed, check_callback, real, whole
from sharpkit._calls import public_call
from sharpkit._results import ProgressCallback, Result
from sharpkit.learner.schedules import Schedule
from sharpkit.linalg.lanczos import eigenpairs
from sharpkit.measuring.sharpness import end_of
from sharpkit.measuring.stability import StableLearningRate, rate_under
from sharpkit.objective.objective import Objective, check_objective
from sharpkit.operators.hessian import HessianOperator
from sharpkit.operators.preconditioned import optimizer_curvature
from sharpkit.optimizers import begin_rates, check_trains, unwrap_optimizer

__all__ = ["Rewarming", "rewarming"]

# Steps for each doubling of the rate beyond where it is stable at once: of 5, 20 and 80 the best in experiments/rewarming.py.
_STEPS_PER_DOUBLING = 80
# Of the largest stable rate, where the climb begins, by judgement: training makes the loss sharper, and batches are sharper than the data.
_START = 0.5


@dataclass(frozen=True)
class Rewarming(Result, kind="rewarming"):
    """A climb of the learning rate from where it is stable at a checkpoint to the peak wanted.

    Attributes:
        optimizer: whose rate it is.
        limit: the largest rate that is stable at the checkpoint.
        start: the rate to begin with.
        peak: the rate wanted.
        steps: of the climb; 0 where the peak is stable at once.
        num_matvecs: products spent.
    """

    optimizer: str
    limit: StableLearningRate
    start: float
    peak: float
    steps: int
    num_matvecs: int

    def rate(self, step: int) -> float:
        """The rate of a step, counted from 0: from start to peak by a constant factor a step, the peak from then on."""
        return self.peak if step >= self.steps else self.start * (self.peak / self.start) ** (step / self.steps)

    def scheduler(
        self, optimizer: torch.optim.Optimizer, *, total_steps: int, schedule: Schedule | None = None
    ) -> torch.optim.lr_scheduler.LambdaLR:
        """A torch scheduler of the climb, then of a schedule of the share of the steps left (a constant rate by default).

        Args:
            optimizer: the one that continues; its rates are set to the peak first, groups keeping their ratios.
            total_steps: of the continued run.
            schedule: as those of ``sk.laws``.

        Raises:
            ValueError: a run that ends before the climb does.
        """
        if total_steps <= self.steps:
            raise ValueError(f"the climb takes {self.steps} steps, and the run has {total_steps}: choose a lower peak or a longer run")
        after: Schedule = schedule if schedule is not None else lambda z: 1.0
        begin_rates(optimizer, self.peak)

        def factor(step: int) -> float:
            if step < self.steps:
                return self.rate(step) / self.peak
            return float(after(min((step - self.steps) / (total_steps - self.steps), 1.0)))

        return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

    def findings(self) -> list[str]:
        """What to do, in sentences."""
        if not self.steps:
            return [f"A rate of {self.peak:.3g} is stable here at once: the limit is {float(self.limit):.3g}, and no climb is needed."]
        return [
            f"Here {self.optimizer} is stable up to {float(self.limit):.3g}, and the peak of {self.peak:.3g} is "
            f"{self.peak / float(self.limit):.3g} times that: begin at {self.start:.3g} and climb over {self.steps} steps, as fast as "
            "sharpness comes down.",
            "A peak of half the limit needs no climb; where it was tried, such a peak forgot less and ended lower.",
        ]

    def __str__(self) -> str:
        return " ".join(self.findings())


@public_call
def rewarming(
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    *,
    peak: float,
    steps_per_doubling: int = _STEPS_PER_DOUBLING,
    seed: int = 0,
    callback: ProgressCallback | None = None,
    name: str = "",
) -> Rewarming:
    """How fast the learning rate may climb to a peak again, from the sharpness at the point where training continues.

    After annealing, the loss may be sharper than the peak rate can stand: at once, it would undo what was learned. The climb begins at
    half of the largest stable rate and doubles every 80 steps, in which training at the edge brings the sharpness down;
    docs/reference/laws.md has what that was worth.

    Args:
        objective: on the data to go on with, at the checkpoint.
        optimizer: with its state from the checkpoint, if it is adaptive.
        peak: rate wanted, of the first group that trains; that of the run before is one that training could stand.
        steps_per_doubling: how fast the rate climbs.
        seed: seeds the starting vector.
        callback: called with a :class:`sharpkit.Progress` after each product.
        name: of the result, as pages show it.

    Raises:
        UnsupportedError: an optimizer whose stability limit is not known.
        ValueError: an adaptive one that has not stepped: load its state, or make a few steps at a low rate first.

    Example:
        >>> import torch, sharpkit as sk
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> objective = sk.Objective(model, (torch.eye(2), torch.zeros(2, 1)), loss=torch.nn.functional.mse_loss)
        >>> advice = sk.laws.rewarming(objective, torch.optim.SGD(model.parameters(), lr=0.01), peak=4.0)
        >>> round(advice.start, 3), advice.steps, round(advice.rate(80), 3), advice.rate(160)
        (1.0, 160, 2.0, 4.0)

    References:
        Gupta et al. (2023), arXiv 2308.04014, and Ibrahim et al. (2024), arXiv 2403.08763, who warm up again by a fixed share of the run.
    """
    check_objective(objective, "rewarming")
    check_callback(callback)
    check_trains(optimizer, objective.model)
    peak, per_doubling = real("peak", peak, above=0), whole("steps_per_doubling", steps_per_doubling, least=0)
    hessian = HessianOperator(objective)
    matrix, rule = optimizer_curvature(hessian, optimizer)
    limit = rate_under(rule, end_of(eigenpairs(matrix, k=1, tol=1e-2, seed=as_seed(seed), callback=callback)))
    kind = type(unwrap_optimizer(optimizer)).__name__
    start = min(peak, _START * float(limit))
    if peak <= start:
        return Rewarming(kind, limit, peak, peak, 0, hessian.num_matvecs)
    steps = math.ceil(per_doubling * math.log2(peak / start) - 1e-3)
    return Rewarming(kind, limit, start, peak, steps, hessian.num_matvecs)
