"""What a learner decided, when and why."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from sharpkit._results import format_with_error, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes


KIND = "learner_history"


@dataclass(frozen=True)
class Decision:
    """One measurement and what followed from it.

    Attributes:
        step: optimizer steps done.
        lr: the peak rate from here on, before decay.
        lr_in_use: the first group's rate for the next step, with decay.
        momentum: of the first group; NaN where the optimizer has none.
        lambda_max: of the batch's (preconditioned) Hessian; NaN where nothing was measured.
        stderr: its error.
        max_lr: the optimizer's stability limit at that curvature.
        batch_size: samples it was measured on.
        num_matvecs: products it took.
        loss: recent mean; NaN where unknown.
        reason: in words.
    """

    step: int
    lr: float
    lr_in_use: float
    momentum: float
    lambda_max: float
    stderr: float
    max_lr: float
    batch_size: int
    num_matvecs: int
    loss: float
    reason: str

    def __str__(self) -> str:
        curvature = "" if math.isnan(self.lambda_max) else f", lambda_max {format_with_error(self.lambda_max, self.stderr)}"
        return f"step {self.step}: lr {self.lr:.3g}{curvature}: {self.reason}"

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Decision:
        """The decision back from its document."""
        found: dict[str, Any] = {name: int(document[name]) for name in ("step", "batch_size", "num_matvecs")}
        found |= {name: number(document[name]) for name in ("lr", "lr_in_use", "momentum", "lambda_max", "stderr", "max_lr", "loss")}
        return cls(**found, reason=str(document["reason"]))


class LearnerHistory:
    """All decisions of a learner, in order; a sequence."""

    def __init__(self, decisions: list[Decision] | None = None) -> None:
        self._decisions = list(decisions or [])

    def append(self, decision: Decision) -> None:
        """Add the next decision."""
        self._decisions.append(decision)

    def __len__(self) -> int:
        return len(self._decisions)

    def __iter__(self) -> Iterator[Decision]:
        return iter(self._decisions)

    def __getitem__(self, index: int) -> Decision:
        return self._decisions[index]

    def __repr__(self) -> str:
        return f"LearnerHistory({len(self)} decisions; last: {self[-1]})" if self._decisions else "LearnerHistory(no decision yet)"

    def __str__(self) -> str:
        return "\n".join(map(str, self._decisions)) or "no decision yet"

    def findings(self) -> list[str]:
        """What was decided, in sentences."""
        if not self._decisions:
            return ["No decision was made yet."]
        last, back = self._decisions[-1], sum("the loss rose" in d.reason for d in self._decisions)
        went = f"went back {back} time{'' if back == 1 else 's'}" if back else "never had to go back"
        return [f"The learned rate is {last.lr:.3g} after {last.step} steps and {len(self)} decisions; the run {went}."]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready but for NaN and infinities."""
        return {"kind": KIND, "version": 1, "decisions": [asdict(d) for d in self._decisions]}

    def plot(self, ax: Axes | None = None) -> Axes:
        """The rate in use and the stability limit over the steps, decisions marked."""
        from sharpkit.plots.runs import plot_learner

        return plot_learner(self.to_dict(), ax=ax)
