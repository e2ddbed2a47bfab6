"""The critical learning rate: how far along the optimizer's own next step the loss first rises. Forward passes only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sharpkit._arguments import real
from sharpkit._errors import NonFiniteError
from sharpkit._results import Result
from sharpkit.objective.objective import Objective, check_objective
from sharpkit.objective.params import moved
from sharpkit.optimizers import check_one_way, check_trains, learning_rate, next_update, unwrap_optimizer

_PRECISION = 15 / 16  # lower over upper end, by judgement: three bisections from a factor sqrt(2), so six forward passes in all
_MAX_DOUBLINGS = 60  # a factor of 1e18 either way, by judgement: further, float32 has no step or no parameters left


@dataclass(frozen=True)
class CriticalLearningRate(Result, kind="critical_learning_rate"):
    """min{eta > 0: f(w - eta u) > f(w)}, u the optimizer's next update at rate 1.

    Attributes:
        value: geometric middle of the bracket; inf where the loss never rose, 0 where the loss rises however small the step.
        lower, upper: the loss has not risen at ``lower``, it has at ``upper``.
        sharpness: the critical sharpness 2 / value.
        num_evaluations: forward passes over the data.
        outcome: ``"found"``, ``"unbounded"`` or ``"ascent"``.
    """

    value: float
    lower: float
    upper: float
    sharpness: float
    num_evaluations: int
    outcome: str

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        rate = f"{self.value:.4g} ({self.lower:.4g} to {self.upper:.4g})"
        unbounded, ascent = "unbounded: the loss does not rise along this direction", "0: the next update is no descent direction"
        return {"found": rate, "unbounded": unbounded}.get(self.outcome, ascent)


def critical_learning_rate(
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    *,
    guess: float | None = None,
    gradient: Tensor | None = None,
    rtol: float = 1 - _PRECISION,
) -> CriticalLearningRate:
    """Find the critical learning rate by doubling or halving from a guess, then bisecting.

    From a good guess (the last answer) it takes 6 forward passes, after one gradient. Optimizer and parameters are not touched, also when
    interrupted. A loss that is NaN or infinite counts as risen. On a quadratic it is 2 / directional sharpness, up to the bracket's width.

    Args:
        objective: the function; both losses are over the same data.
        optimizer: a torch optimizer holding the objective's parameters.
        guess: where to begin; by default the optimizer's present rate.
        gradient: (n,) the objective's gradient at the present point, if known; else it is computed.
        rtol: width of the final bracket relative to its upper end.

    Returns:
        the rate with its bracket; where the update goes uphill, or the loss does not rise within 60 doublings, ``outcome`` says so.

    Raises:
        ValueError: a guess or rtol that is not positive, or an optimizer over other parameters.
        UnsupportedError: an optimizer that trains more than the objective's model, whose step is not proportional to its rate, or some
            groups of which maximize while others minimize.
        NonFiniteError: the loss, gradient or update at the present point is not finite.

    Example:
        >>> import torch, sharpkit as sk
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> objective = sk.Objective(model, (torch.ones(1, 1), torch.zeros(1, 1)), loss=torch.nn.functional.mse_loss)
        >>> critical = sk.critical_learning_rate(objective, torch.optim.SGD(model.parameters(), lr=0.3))
        >>> critical.lower <= 1.0 <= critical.upper
        True

    References:
        arXiv 2601.16979, for the critical sharpness 2 / eta_c.
    """
    check_objective(objective, "critical_learning_rate")
    check_trains(optimizer, objective.model)
    check_one_way(optimizer, objective.layout)
    rtol = real("rtol", rtol, above=0, below=1)
    start = learning_rate(unwrap_optimizer(optimizer), objective.layout) if guess is None else real("guess", guess, above=0)
    if not (math.isfinite(start) and start > 0):
        raise ValueError(f"the search begins at the optimizer's rate, which is {start}: pass guess=, a positive rate, to begin there")
    if gradient is None:
        _, gradient = objective.gradient()
    gradient = objective.layout.checked(gradient, "gradient")
    update = next_update(optimizer, objective.layout, gradient)
    slope = float(update @ gradient)
    if not math.isfinite(slope):
        raise NonFiniteError("the gradient or the optimizer's next update contains NaN or infinity: there is no step to measure")
    if slope < 0:  # the loss rises from the first: no search could tell that from a tiny rate
        return CriticalLearningRate(0.0, 0.0, 0.0, math.inf, 0, "ascent")
    if not bool(update.any()):
        return CriticalLearningRate(math.inf, math.inf, math.inf, 0.0, 0, "unbounded")
    search = _LineSearch(objective, objective.layout.split(update))
    lower, upper = search.bracket(start)
    while lower > 0 and math.isfinite(upper) and lower / upper < 1 - rtol:
        middle = math.sqrt(lower * upper)  # halves the bracket in log, as its width is asked for
        lower, upper = (lower, middle) if search.rises(middle) else (middle, upper)
    outcome = "unbounded" if math.isinf(upper) else "ascent" if lower == 0 else "found"
    value = math.sqrt(lower * upper)  # inf and 0 come out as they are, since the other end is a step that was tried
    return CriticalLearningRate(value, lower, upper, 2 / value if value > 0 else math.inf, search.num_evaluations, outcome)


class _LineSearch:
    """The loss along one direction, against the loss at its beginning."""

    def __init__(self, objective: Objective, direction: Sequence[Tensor]) -> None:
        self.objective, self.direction = objective, direction
        self.num_evaluations = 1
        self.start = objective.value()

    def rises(self, step: float) -> bool:
        """Whether f(w - step u) > f(w)."""
        self.num_evaluations += 1
        with moved(self.objective.layout, self.direction, -step):
            try:  # with `not ... <=` NaN counts as risen
                return not self.objective.value() <= self.start
            except NonFiniteError:
                return True

    def bracket(self, guess: float) -> tuple[float, float]:
        """(no rise, rise) around a crossing near a guess, by a factor of sqrt(2), then of two; 0 or inf where there is none."""
        step, risen, factor = guess, self.rises(guess), math.sqrt(2.0)
        for _ in range(_MAX_DOUBLINGS):
            # outwards from the guess, in the direction in which the answer changes
            following = step / factor if risen else step * factor
            if self.rises(following) != risen:
                return (following, step) if risen else (step, following)
            step, factor = following, 2.0  # the guess was bad: larger steps from here
        return (0.0, step) if risen else (step, math.inf)
