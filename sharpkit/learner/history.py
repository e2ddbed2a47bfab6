"""What a learner decided, when and why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sharpkit._results import Result, format_with_error
from sharpkit.learner.rollback import tells_of_return

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Decision(Result):
    """One measurement and what followed from it."""

    step: int  # optimizer steps done
    lr: float  # the peak rate from here on, before decay
    lr_in_use: float  # the first group's rate for the next step, with decay
    momentum: float  # momentum of the first group; NaN if the optimizer has none
    lambda_max: float  # largest eigenvalue of the batch's (preconditioned) Hessian; NaN if nothing was measured
    stderr: float  # error of lambda_max, a residual bound
    max_lr: float  # the optimizer's stability limit at that curvature
    batch_size: int  # number of samples that were measured
    num_matvecs: int  # number of products that the measurement took
    loss: float  # mean of the recent losses; NaN if unknown
    reason: str  # why, in words

    def __str__(self) -> str:
        curvature = "" if math.isnan(self.lambda_max) else f", lambda_max {format_with_error(self.lambda_max, self.stderr)}"
        return f"step {self.step}: lr {self.lr:.3g}{curvature}: {self.reason}"


@dataclass(eq=False, repr=False)
class LearnerHistory(Result, Sequence[Decision], kind="learner_history"):
    """All decisions of a learner, in order; a sequence."""

    decisions: list[Decision] = field(default_factory=list)

    def append(self, decision: Decision) -> None:
        """Add the next decision."""
        self.decisions.append(decision)

    def __len__(self) -> int:
        return len(self.decisions)

    def __getitem__(self, index: int) -> Decision:  # type: ignore[override]
        return self.decisions[index]

    def __repr__(self) -> str:
        return f"LearnerHistory({len(self)} decisions; last: {self[-1]})" if self.decisions else "LearnerHistory(no decision yet)"

    def __str__(self) -> str:
        return "\n".join(map(str, self.decisions)) or "no decision yet"

    def findings(self) -> list[str]:
        """What was decided, in sentences."""
        if not self.decisions:
            return ["No decision was made yet."]
        last, back = self.decisions[-1], sum(tells_of_return(d.reason) for d in self.decisions)
        went = f"the run went back to an earlier point {back} time{'' if back == 1 else 's'}" if back else "the run never had to go back"
        return [f"The learned rate is {last.lr:.3g} after {last.step} steps and {len(self)} decisions; {went}."]

    def plot(self, ax: Axes | None = None) -> Axes:
        """The rate in use and the stability limit over the steps, decisions marked."""
        from sharpkit.plots.runs import plot_learner

        return plot_learner(self.to_dict(), ax=ax)
