"""Spend products where they help: on probes or on the leading subspace, until a tolerance in standard error is reached."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from sharpkit.linalg.basis import affordable_rows
from sharpkit.linalg.deflation import DeflatedProbes
from sharpkit.linalg.progress import Budget
from sharpkit.linalg.xtrace import xtrace
from sharpkit.operators.base import SymmetricOperator

_PILOT = {False: 6, True: 10}  # probes to begin with, for the trace and for the skewed squares
_KEPT = 16  # probes that are kept for a larger basis
_PATIENCE = 3  # products spent on the leading subspace without the forecast falling,
_SHARE = 0.04  # or this share of it
_WORTH = 0.75  # the fall in the forecast, from spreads of a few probes, that is taken for real
_PERSISTENCE = {False: 4, True: 6}  # steps with enough probes in a row; squares are more skewed: a few samples look better than they are
_SURPRISE = 1.5  # probes needed, relative to the forecast, that reopen the choice
_HOPELESS = 4.0  # give up where the forecast exceeds the budget this many times
_HOPELESS_AFTER = 100


@dataclass(frozen=True)
class Tolerance:
    """The asked standard error: the looser of ``rtol`` times the estimate and ``atol``."""

    rtol: float
    atol: float = 0.0

    def __call__(self, value: float) -> float:
        return max(self.atol, self.rtol * abs(value))


class AdaptiveEstimate:
    """tr A, or ||A||_F^2, to a tolerance.

    Args:
        operator: A.
        target: the asked standard error, given the estimate.
        budget: ends it.
        seed: of the probes.
        limit: the product budget as a number.
        fixed: spend the whole budget instead of stopping at the tolerance.
        squared: ||A||_F^2 instead of tr A.
    """

    def __init__(
        self,
        operator: SymmetricOperator,
        target: Tolerance,
        budget: Budget,
        *,
        seed: int,
        limit: int,
        fixed: bool = False,
        squared: bool = False,
    ) -> None:
        self.operator, self.target, self.budget, self.limit, self.fixed = operator, target, budget, limit, fixed
        self.may_give_up = False
        self.pilot = _PILOT[squared]
        self.generator = torch.Generator().manual_seed(seed)
        self.probes = DeflatedProbes(operator, self.generator, squared=squared)

    def estimate(self, method: str) -> tuple[float, float, str]:
        """Value, standard error and the way it was made."""
        n = self.operator.size
        if n <= self.limit and (n <= self.pilot or self.fixed):
            complete = self._fill()
            return self.probes.known, 0.0 if complete else math.inf, "exact" if complete else "incomplete"
        if method == "xtrace":
            return xtrace(self.operator, self.target, self.budget, self.generator, fixed=self.fixed)
        if method == "hutch++":
            self._sketch()
            if not self.fixed and self._forecast() > n - len(self.probes.space.expanded) and self._can_complete():
                complete = self._fill()
                return self.probes.known, 0.0 if complete else math.inf, "exact" if complete else "incomplete"
            return self._probe("Hutch++", adapt=False)
        for _ in range(self.pilot):
            if self.budget.allows():
                self.probes.draw(keep=method == "auto")
                self.budget.report(self.pilot, "pilot probes")
        return self._probe("Hutchinson", adapt=method == "auto")

    def _fill(self) -> bool:
        """Expand until the basis is complete; whether the budget allowed it."""
        space = self.probes.space
        while space.pending or space.add_random(self.generator):
            if not self.budget.allows():
                return False
            space.expand(space.pending[0])
            self.budget.report(self.operator.size, "all basis vectors")
        return True

    def _forecast(self) -> float:
        """Probes the tolerance will need in all with the present basis."""
        value, spread = self.probes.mean_and_spread()
        target = self.target(value)
        if spread == 0.0:
            return 2.0
        return (spread / target) ** 2 + 2.0 if target > 0 else math.inf

    def _can_complete(self) -> bool:
        n = self.operator.size
        return n <= 4 * self.limit and n <= self._most_rows()

    def _most_rows(self) -> int:
        space = self.probes.space
        return affordable_rows(self.operator, len(space.rows.row(0))) if space.size else self.operator.size

    def _deflate(self) -> None:
        """Grow the basis while that lowers the forecast: of the cost, or of the error where the cost is fixed."""
        probes, space, n = self.probes, self.probes.space, self.operator.size
        made = probes.num_kept
        best, best_at, enough, start = math.inf, 0, 0, math.inf
        while self.budget.allows(1 + self.pilot) and (space.pending or space.add_random(self.generator)):
            steps, needed = len(space.expanded), self._forecast()
            score = probes.mean_and_spread()[1] ** 2 / max(1, self.limit - steps) if self.fixed else steps + needed
            start = min(start, score) if start == math.inf else start
            if score < 0.995 * best and (best == math.inf or score < _WORTH * start):
                best, best_at = score, steps
            patience = max(_PATIENCE, _SHARE * (self.limit if self.fixed else best))
            enough = enough + 1 if needed <= made and not self.fixed else 0
            finish = needed >= n - steps and self._can_complete()
            if enough >= _PERSISTENCE[probes.squared] or (not finish and steps - best_at >= patience) or space.size >= self._most_rows():
                return
            probes.deflate_one()
            self.budget.report(int(min(steps + needed, self.limit)), "leading subspace")

    def _sketch(self) -> None:
        """A third of the products sketch the range, a third multiply it, a third probe the complement."""
        probes = self.probes
        while self.budget.num_matvecs < self.limit * 2 // 3 and self.budget.allows(4):
            sketched = len(probes.space.expanded)
            if not self.fixed and sketched >= 4 and sketched % 2 == 0:
                while len(probes) < min(_KEPT, max(4, sketched // 2)) and self.budget.allows():
                    probes.draw(keep=True)
                if self._forecast() <= max(4, sketched):
                    return
            if not probes.sketch_one():
                return
            self.budget.report(min(self.limit, 3 * sketched + 12), "range sketch")

    def _probe(self, how: str, *, adapt: bool) -> tuple[float, float, str]:
        """Probes until the tolerance is reached; where they disappoint the forecast, the basis is looked at again."""
        probes, space = self.probes, self.probes.space
        expected = 2.0 * self.pilot if not self.fixed else 0.0
        while True:
            sunk = probes.num_late
            if adapt and (needed := self._forecast()) > expected and needed - len(probes) > 2 * sunk:
                self._deflate()
                expected = max(_SURPRISE * self._forecast(), needed if not space.expanded else 0.0) + self.pilot
                adapt = not self.fixed
            if space.is_complete and not space.pending and space.expanded:
                return probes.known, 0.0, "exact"
            value, stderr = probes.estimate()
            settled = not self.fixed and len(probes) >= self.pilot and stderr <= self.target(value)
            hopeless = self.may_give_up and len(probes) >= _HOPELESS_AFTER and self._forecast() > _HOPELESS * self.limit
            if settled or hopeless or not self.budget.allows():
                return value, stderr, f"{how}, deflated" if space.expanded and how == "Hutchinson" else how
            probes.draw(keep=adapt and probes.num_kept < _KEPT)
            done = self.budget.num_matvecs
            self.budget.report(int(min(self.limit, max(done, done + self._forecast() - len(probes)))), "probes")
