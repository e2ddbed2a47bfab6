"""The critical learning rate: how far along the optimizer's own next step the loss first rises. Forward passes only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sharpkit._arguments import real, shown
from sharpkit._calls import public_call
from sharpkit._errors import NonFiniteError
from sharpkit._results import Result
from sharpkit.objective.objective import Objective, check_objective
from sharpkit.objective.params import moved
from sharpkit.optimizers import check_one_way, check_trains, learning_rate, next_update, unwrap_optimizer

_WIDTH = 1 / 16  # of the bracket, over its upper end, by judgement: three to five forward passes from near
_FURTHEST = 1e18  # from the guess, by judgement: further, float32 has no step or no parameters left
_JUMP = 16.0  # most that a step grows or shrinks at once, by judgement: a first crossing far below the model's would be passed over
_STRAIGHT = 0.2  # of the slope at the beginning, by judgement: a quotient further from the line's makes way for halving
_MOST_EVALUATIONS = 60  # by judgement: 1e18 takes 15


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


@public_call
def critical_learning_rate(
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    *,
    along: Objective | None = None,
    guess: float | None = None,
    gradient: Tensor | None = None,
    rtol: float = _WIDTH,
    name: str = "",
) -> CriticalLearningRate:
    """Find the critical learning rate by following the loss along the next update to where it has risen.

    From a guess within a tenth (the last answer) it takes 3 to 5 forward passes, after one gradient, more where the loss bends sharply.
    Optimizer and parameters are not touched, also when interrupted. A loss that is NaN or infinite counts as risen. On a quadratic it is
    2 / directional sharpness, up to the bracket's width. With ``along`` the update is the one for another loss: how far a step of
    fine-tuning may go before the loss of pre-training rises; 2 over that rate is the relative critical sharpness. It takes the gradients
    of both.

    Args:
        objective: the function whose rise is looked for; both losses are over the same data.
        optimizer: a torch optimizer holding the objective's parameters.
        along: the function whose gradient makes the update, of the same parameters; the objective itself by default.
        guess: where to begin; by default the optimizer's present rate.
        gradient: (n,) the gradient that makes the update, at the present point, if known; else it is computed.
        rtol: width of the final bracket relative to its upper end.
        name: of the result, which pages and comparisons show.

    Returns:
        the rate with its bracket; where the update goes uphill, or the loss does not rise within 1e18 times the guess, ``outcome`` says so.

    Raises:
        ValueError: a guess or rtol that is not positive, an optimizer over other parameters, or ``along`` of another model.
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
        arXiv 2601.16979, for the critical sharpness 2 / eta_c and the relative one.
    """
    check_objective(objective, "critical_learning_rate", sharded=True)
    followed = _same_parameters(objective, along)
    start, rtol = _start(objective, optimizer, guess), real("rtol", rtol, above=0, below=1)
    gradient = objective.layout.checked(followed.gradient()[1] if gradient is None else gradient, "gradient")
    update = next_update(optimizer, objective.layout, gradient)
    own = gradient if along is None else objective.gradient()[1]
    return _critical(objective, update, own, start=start, rtol=rtol)


@dataclass(frozen=True)
class RelativeCriticalRates(Result, kind="relative_critical_rates"):
    """How far the step that trains each loss may go before each of the others rises.

    Attributes:
        names: of the losses.
        rates: (k, k) critical learning rates: row i along the update for loss i, column j where loss j has risen. 0 where loss j rises from
            the first, inf where it never does.
        lower, upper: (k, k) the brackets' ends.
        lr: the optimizer's present rate.
        num_evaluations: forward passes, of all data of one loss each.
    """

    names: tuple[str, ...]
    rates: Tensor
    lower: Tensor
    upper: Tensor
    lr: float
    num_evaluations: int

    @property
    def sharpness(self) -> Tensor:
        """(k, k) the relative critical sharpness 2 / rate."""
        return 2 / self.rates

    def __str__(self) -> str:
        width = max(10, *(len(name) for name in self.names)) + 2
        head = "along \\ rises".ljust(width) + "".join(name.rjust(width) for name in self.names)
        rows = (
            name.ljust(width) + "".join(f"{rate:.4g}".rjust(width) for rate in row)
            for name, row in zip(self.names, self.rates.tolist(), strict=True)
        )
        return "\n".join([head, *rows])


@public_call
def relative_critical_rates(
    objectives: Mapping[str, Objective],
    optimizer: torch.optim.Optimizer,
    *,
    guess: float | None = None,
    rtol: float = _WIDTH,
    name: str = "",
) -> RelativeCriticalRates:
    """Critical learning rates of several losses of one model, such as data sources, along the updates for each of them.

    One gradient of each loss, and some 4 to 10 forward passes for each pair. A row tells what a step on one source does to the others:
    where a rate is below the optimizer's, that step makes the other loss rise.

    Args:
        objectives: names and functions of the same parameters.
        optimizer: a torch optimizer holding them; its state makes the updates.
        guess: where to begin; by default the optimizer's present rate.
        rtol: width of the final brackets relative to their upper ends.
        name: of the result, which pages and comparisons show.

    Raises:
        ValueError: fewer than two objectives, or of different models.
        TypeError, UnsupportedError, NonFiniteError: as :func:`critical_learning_rate`.

    Example:
        >>> import torch, sharpkit as sk
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> first, second = (sk.Objective(model, (x, torch.zeros(1, 1)), loss=torch.nn.functional.mse_loss) for x in torch.eye(2).split(1))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        >>> sk.relative_critical_rates({"a": first, "b": second}, optimizer).rates.isinf().tolist()  # each leaves the other's weight alone
        [[False, True], [True, False]]

    References:
        arXiv 2601.16979.
    """
    if not isinstance(objectives, Mapping) or len(objectives) < 2 or not all(isinstance(o, Objective) for o in objectives.values()):
        raise ValueError(f"objectives must be a mapping from names to at least two Objectives of one model, got {shown(objectives)}")
    names, every = tuple(map(str, objectives)), list(objectives.values())
    first = every[0]
    for other in every[1:]:
        _same_parameters(first, other)
    start, rtol = _start(first, optimizer, guess), real("rtol", rtol, above=0, below=1)
    gradients = [objective.gradient()[1] for objective in every]
    table = []
    for gradient in gradients:
        update, near = next_update(optimizer, first.layout, gradient), start
        for j, objective in enumerate(every):
            critical = _critical(objective, update, gradients[j], start=near, rtol=rtol)
            near = critical.value if critical.outcome == "found" else start  # along one update rates are of one size, more than not
            table.append(critical)
    rates, lower, upper = (torch.tensor([getattr(c, end) for c in table], dtype=torch.float64) for end in ("value", "lower", "upper"))
    k, lr = len(every), learning_rate(unwrap_optimizer(optimizer), first.layout)
    passes = sum(c.num_evaluations for c in table)
    return RelativeCriticalRates(names, rates.view(k, k), lower.view(k, k), upper.view(k, k), lr, passes)


def _same_parameters(objective: Objective, along: Objective | None) -> Objective:
    if along is None:
        return objective
    check_objective(along, "along", sharded=True)
    if [id(p) for p in along.layout.live] != [id(p) for p in objective.layout.live]:
        raise ValueError("both objectives must be of the same parameters of one model: make them from it with the same params=")
    return along


def _start(objective: Objective, optimizer: torch.optim.Optimizer, guess: float | None) -> float:
    check_trains(optimizer, objective.model)
    check_one_way(optimizer, objective.layout)
    start = learning_rate(unwrap_optimizer(optimizer), objective.layout) if guess is None else real("guess", guess, above=0)
    if not (math.isfinite(start) and start > 0):
        raise ValueError(f"the search begins at the optimizer's rate, which is {start}: pass guess=, a positive rate, to begin there")
    return start


def _critical(objective: Objective, update: Tensor, gradient: Tensor, *, start: float, rtol: float) -> CriticalLearningRate:
    """Along one update, with the gradient of the loss that may rise."""
    slope = objective.dot(update, gradient)
    if not math.isfinite(slope):
        raise NonFiniteError("the gradient or the optimizer's next update contains NaN or infinity: there is no step to measure")
    if slope < 0:  # the loss rises from the first: no search could tell that from a tiny rate
        return CriticalLearningRate(0.0, 0.0, 0.0, math.inf, 0, "ascent")
    moves = (update != 0).to(update)
    if not objective.dot(moves, moves):
        return CriticalLearningRate(math.inf, math.inf, math.inf, 0.0, 0, "unbounded")
    search = _LineSearch(objective, objective.layout.split(update), slope)
    lower, upper = search.bracket(start, rtol)
    outcome = "unbounded" if math.isinf(upper) else "ascent" if lower == 0 else "found"
    value = math.sqrt(lower * upper)  # inf and 0 come out as they are, since the other end is a step that was tried
    return CriticalLearningRate(value, lower, upper, 2 / value if value > 0 else math.inf, search.num_evaluations, outcome)


class _LineSearch:
    """The loss along one direction u, against the loss f at its beginning.

    (f(w - eta u) - f) / eta is -slope at 0 and nearly a straight line in eta, on a quadratic exactly: it is followed to its zero, which is
    then bracketed from both sides.

    Args:
        objective: f.
        direction: u, a tensor for each parameter.
        slope: u . g, not negative.
    """

    def __init__(self, objective: Objective, direction: Sequence[Tensor], slope: float) -> None:
        self.objective, self.direction, self.slope = objective, direction, slope
        self.num_evaluations = 1
        self.start = objective.value()
        # the ends, and the quotient there: nothing is known of an end at infinity
        self._lower, self._upper, self._least = (0.0, -slope), (math.inf, math.inf), 1.0

    def _rise(self, step: float) -> float:
        """f(w - step u) - f; NaN counts as infinitely risen."""
        self.num_evaluations += 1
        with moved(self.objective.layout, self.direction, -step):
            try:
                rise = self.objective.value() - self.start
            except NonFiniteError:
                return math.inf
        return math.inf if math.isnan(rise) else rise

    def bracket(self, guess: float, rtol: float) -> tuple[float, float]:
        """(no rise, rise) around the crossing, as wide as asked, relative to the upper end; 0 or inf where there is none."""
        step, foretold, last = guess, math.nan, None
        for _ in range(_MOST_EVALUATIONS):
            quotient = self._rise(step) / step
            risen, kept = quotient > 0, 1.0
            if risen == last and self._lower[0]:
                kept = 0.5  # the other end, staying once more, counts half, or the line's zero would creep up from one side (Illinois)
            self._lower = (self._lower[0], kept * self._lower[1]) if risen else (step, quotient)
            self._upper = (step, quotient) if risen else (self._upper[0], kept * self._upper[1])
            last = risen
            lower, upper = self._lower[0], self._upper[0]
            if lower >= (1 - rtol) * upper or not guess / _FURTHEST <= step <= guess * _FURTHEST:
                break
            straight = abs(quotient - foretold) <= _STRAIGHT * self.slope
            halve = bool(lower) and math.isfinite(upper) and not straight
            step = math.sqrt(lower * upper) if halve else self._next(rtol)
            foretold = self._line(step)
        return self._lower[0], self._upper[0]

    def _line(self, step: float) -> float:
        """The quotient on the line through both ends, or on through the beginning and the lower end; NaN where there is none."""
        (lower, below), (upper, above) = self._lower, self._upper
        if math.isinf(upper):
            return -self.slope + (below + self.slope) * step / lower
        return below + (above - below) * (step - lower) / (upper - lower) if math.isfinite(above) else math.nan

    def _next(self, rtol: float) -> float:
        """A little beyond the zero of the line, on the side that is further from it."""
        (lower, below), (upper, above) = self._lower, self._upper
        if math.isinf(upper):
            curvature = (below + self.slope) / lower
            ahead = self.slope / curvature if curvature > 0 else math.inf
            step, self._least = max(ahead * (1 + 0.4 * rtol), lower * self._least), 2.0  # a second time, the first was too short
            return min(step, _JUMP * lower)
        if math.isinf(above):
            return math.sqrt(lower * upper) if lower else upper / _JUMP
        zero = lower - (upper - lower) * below / (above - below)
        if not lower:  # a line that leads nowhere, as where the loss saturates, is followed once: from a good guess it leads near
            step = zero * (1 - 0.4 * rtol)
            return max(step, upper / _JUMP) if step < upper / 2 or self.num_evaluations == 2 else upper / _JUMP
        step = zero * (1 + 0.4 * rtol) if upper * lower > zero**2 else zero * (1 - 0.4 * rtol)
        return step if lower < step < upper else math.sqrt(lower * upper)
