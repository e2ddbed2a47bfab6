"""One learning rate to train with: two short runs on a copy say where training breaks and when it stops to generalise."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sharpkit._arguments import as_seed, check_callback, choice, real, whole
from sharpkit._calls import public_call
from sharpkit._errors import NonFiniteError, ObjectiveError, UnsupportedError
from sharpkit._results import Bounded, Progress, ProgressCallback, percent
from sharpkit.learner.schedules import DECAYS, Schedule
from sharpkit.learner.validation import held_out_losses
from sharpkit.measuring.critical import critical_learning_rate
from sharpkit.objective.batches import BatchSource
from sharpkit.objective.distributed import Ranks
from sharpkit.objective.guard import grad_mode_kept, modules_in_eval, random_states_kept
from sharpkit.objective.objective import Objective, check_objective
from sharpkit.objective.samples import SamplePool
from sharpkit.optimizers import (
    check_takes_rate,
    check_trains,
    copy_optimizer,
    current_momentum,
    has_heavy_ball,
    has_stepped,
    known_rule,
    learning_rate,
    relative_rates,
    set_learning_rates,
    unwrap_optimizer,
)
from sharpkit.training_run import TrainingRun

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# -- what is spent
_LEAST_BUDGET = 100.0  # gradients, by judgement: with fewer, neither run says anything
# -- the ramp
_FROM, _GROWTH = 1 / 400, 1.38  # of the critical rate of the first step; a factor for each step: by judgement, about 20 steps in all
_MOST_RAMP = 40  # steps, by judgement: a factor of 4e5
_SMOOTH = 0.4  # weight of the newest batch loss in the running mean, by judgement
_LOST = 4.0  # times the first loss, above the starting point's, that ends the ramp: by judgement
_IDLE, _GIVEN_BACK = 6, 0.25  # steps without a new minimum and the share of the gain given back that end it as well: by judgement
# -- the long run
_HELD_LEAST, _HELD_MOST, _HELD_BATCHES = 64, 512, 4  # samples that judge, and how many batches of them: by judgement
_GROUPS = 8  # that they are judged in, for the standard error: by judgement
_LEAST_PART = 48  # samples of the part that the long run trains on, by judgement
_MOST_DIVISOR = 8.0  # that the data is divided by, by judgement
_LOOKS = 10  # looks at the held-out loss, by judgement
_LEAST_LONG = 12  # steps, by judgement
_RETREAT = 3.0  # factor by which a rate that does not train is lowered, by judgement
_KEEPS = 1.2  # times the first loss, by judgement: a trained model that stays below has lost nothing
# Times the batch loss of the lowest look, below which it has fallen on: over-fitting was .02 to .76 of it in experiments/suggestion.py, and
# where steps had become too long it was 0.97 and more.
_FITS_ON = 0.9
_FALLS_ON = 0.5  # times the batch loss where a plateau begins, by judgement
_PLATEAUS = 3.0  # divisor up to which a plateau counts as well, by judgement: a run on a small part comes to one of its own
_SEEN_OFTEN = 160  # epochs over the divisor, by judgement: experiments/suggestion.py has tasks on either side
_RISE = 0.01  # of the held-out loss over its minimum, by judgement: less is no rise
# experiments/suggestion.py: the ramp's loss is lowest at twice the rate that trains well for longer, times a power of the steps that
# momentum remembers.
_RAMP_LEAD, _REMEMBERED, _AVERAGED = 2.0, 0.5, 0.25
_CONSTANT = 0.6  # of that rate for schedules that do not end low, whose noise stays: chosen on the tasks seen by experiments/suggestion.py
_LONG_FROM = 0.1  # of its last rate that the long run begins with, by judgement: what turns early is seen while steps are short
_ENDS_LOW = 0.2  # of the peak, by judgement
# Factors to the ends of the interval, from experiments/suggestion.py: below where the data is seen often, below otherwise, above.
_FAR_BELOW, _BELOW, _ABOVE = 10.0, 5.0, 8.0
_OFTEN = 50  # epochs, by judgement

Bound = Literal["stability", "generalization"]


class SuggestedLearningRate(
    Bounded,
    kind="suggested_learning_rate",
    saved=(
        "value", "lower", "upper", "optimizer", "bound", "limit", "present", "batch_size", "steps", "schedule", "num_samples", "ramp",
        "run_rate", "part", "held_out", "gradients", "seconds", "reason",
    ),
):  # fmt: skip
    """A learning rate to train with (usable as a plain number): the peak of the schedule, for the first group that trains.

    Attributes:
        lower, upper: between them lay the best of a grid's rates for 88 % of the suggestions of experiments/suggestion.py; losses between
            are often alike.
        optimizer: name of its class.
        bound: what keeps the rate from being larger: ``"stability"``, or ``"generalization"`` where the held-out loss turns first.
        limit: the rate at which the ramp lost what it had trained.
        present: the optimizer's rate.
        batch_size, steps, schedule: the run that it is for.
        num_samples: of the data that is trained on.
        ramp: (rate, running mean of the batch loss less that of the starting point) of the ramp.
        run_rate: the last and largest rate of the long run.
        part: samples that the long run was made on.
        held_out: (sum of the rates so far, held-out loss) of the long run.
        gradients, seconds: cost, in gradients of a batch (a forward pass is a third of one), and wall time.
    """

    optimizer: str
    bound: Bound
    limit: float
    present: float
    batch_size: int
    steps: int
    schedule: str
    num_samples: int
    ramp: tuple[tuple[float, float], ...]
    run_rate: float
    part: int
    held_out: tuple[tuple[float, float], ...]
    gradients: float
    seconds: float

    def __new__(cls, value: float, *, lower: float, upper: float, **more: Any) -> SuggestedLearningRate:
        self = super().__new__(cls, value, lower, upper)
        more.pop("reason", None)  # it follows from the others
        for name, each in more.items():
            setattr(self, name, each)
        return self

    @property
    def cost(self) -> float:
        """Gradients of a batch that it took."""
        return self.gradients

    @property
    def reason(self) -> str:
        """Which limit the rate comes from, in a sentence."""
        ends = f"Short runs train best at about {self.run_rate:.3g} and lose all at {self.limit:.3g}"
        if self.bound == "stability":
            return f"{ends}; the loss on other samples does not turn, so that stability decides."
        return f"{ends}; but the loss on other samples turns early, where {self.steps} steps at the suggested rate end."

    def __str__(self) -> str:
        return f"{float(self):.3g} ({self.lower:.3g} to {self.upper:.3g})"

    def __repr__(self) -> str:
        return f"SuggestedLearningRate({self}: {self.reason})"

    def findings(self) -> list[str]:
        """What was found, in sentences."""
        share = percent(self.gradients / self.steps)
        return [
            f"{self.optimizer}, batch size {self.batch_size}, {self.steps} steps, {self.schedule}: train with a peak rate of {self}.",
            self.reason,
            f"It took {self.gradients:.0f} gradients, {share} of the run.",
        ]

    def plot(self, ax: Axes | None = None) -> Axes:
        """The loss against the rate in the ramp, with the limit, the suggestion and its interval."""
        from sharpkit.plots.runs import plot_suggestion

        return plot_suggestion(self.to_dict(), ax=ax)


@public_call
def suggest_learning_rate(
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    *,
    batch_size: int,
    steps: int,
    schedule: str | Schedule = "linear",
    validation: Any = None,
    num_samples: int | None = None,
    budget: float = 0.1,
    seed: int = 0,
    callback: ProgressCallback | None = None,
    name: str = "",
) -> SuggestedLearningRate:
    """One rate to train with, from two short runs on a private copy.

    First a ramp: the rate grows by a constant factor a step, from far below the critical rate of the first step until the loss is lost. A
    little below its lowest point lies the rate that trains best in few steps. Then a run at that rate on a part of the data, judged on
    samples that it does not see. Where their loss turns, training longer over-fits: as long as no step is too long, what a run does depends
    on the sum of its rates, and the sum at which it turns is in proportion to the samples, so that the rate follows at which the whole run
    ends at its turn. Where it does not turn, stability decides: the rate is the ramp's, lowered where that run has not come as far as the
    whole one will.

    Args:
        objective: the loss on the training data, at the point to train from. Only read; the copies train in train mode, in the order and
            the size of batches that a loader would draw.
        optimizer: any that steps without a closure, over the objective's parameters, with the settings to train with; only read. Its own
            rates say the ratios of its groups alone.
        batch_size: samples in a batch.
        steps: of the run that the rate is for.
        schedule: ``"linear"``, ``"cosine"``, ``"constant"``, ``"wsd"`` (constant, then linear over the last fifth), or a function of the
            share of steps done; a warm-up that is short changes nothing.
        validation: data to judge on, as an Objective takes it; by default samples that the run on a part leaves out, unless the optimizer
            has stepped: a trained model knows them, and stability alone decides.
        num_samples: of the data that will be trained on, where the objective holds only some of it.
        budget: share of the run's gradients that may be spent, at least 100.
        seed: of batches and parts.
        callback: called with a :class:`sharpkit.Progress` on the way.
        name: of the result, which pages and comparisons show.

    Raises:
        ValueError, TypeError: arguments out of range, or an optimizer of other parameters.
        UnsupportedError: an optimizer that steps by a closure, or maximizes; data on several processes.
        ObjectiveError: the loss is no mean or sum over samples, or nothing trains at any rate.

    Example:
        >>> import torch, sharpkit as sk
        >>> x = torch.linspace(-1, 1, 256)[:, None]
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
        >>> objective = sk.Objective(model, (x, x**2), loss=torch.nn.functional.mse_loss)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> rate = sk.suggest_learning_rate(objective, optimizer, batch_size=32, steps=1000)
        >>> 0.001 < rate < 0.1, rate.bound, rate.gradients < 110
        (True, 'stability', True)
    """
    began = time.perf_counter()
    check_objective(objective, "suggest_learning_rate")
    batch_size, steps, seed = whole("batch_size", batch_size), whole("steps", steps), as_seed(seed)
    budget = real("budget", budget, above=0)
    check_callback(callback)
    name, shape = _schedule(schedule)
    inner = unwrap_optimizer(optimizer)
    check_trains(inner, objective.model)
    check_takes_rate(inner)
    work = _Work(SamplePool(objective.by_samples()), inner, batch_size, max(_LEAST_BUDGET, budget * steps), seed, callback, began)
    size = work.pool.size if num_samples is None else whole("num_samples", num_samples, least=work.pool.size)
    ramp = work.ramp()
    rule = known_rule(inner)
    first = min(ramp.best / _lead(inner), math.inf if rule is None else rule.ceiling)  # beyond that no rate does more
    long = work.long_run(first, steps=steps, num_samples=size, validation=validation)
    decays = shape(1.0) <= _ENDS_LOW
    value: float = long.rate * (1.0 if decays else _CONSTANT)
    bound: Bound = "stability"
    # the peak at which the whole run ends where the long run had come to
    worth = size / long.part / (_mean(shape) * steps)
    if long.turn is not None and long.turn * worth < value:
        value, bound = long.turn * worth, "generalization"
    elif long.judged and (seen := long.held_out[-1][0] * worth) < value:
        value = math.sqrt(seen * value)  # nobody knows whether it turns between the two
    return SuggestedLearningRate(
        value,
        lower=value / (_FAR_BELOW if steps * batch_size > _OFTEN * size else _BELOW),
        upper=max(min(value * _ABOVE, ramp.limit), value),
        optimizer=type(inner).__name__,
        bound=bound,
        limit=ramp.limit,
        present=learning_rate(inner, objective.layout),
        batch_size=batch_size,
        steps=steps,
        schedule=name,
        num_samples=size,
        ramp=ramp.rows,
        run_rate=long.rate,
        part=long.part,
        held_out=long.held_out,
        gradients=work.spent,
        seconds=time.perf_counter() - began,
    )


def _lead(optimizer: torch.optim.Optimizer) -> float:
    """How far the ramp runs ahead: by more where momentum makes what a rate does show later."""
    momentum = current_momentum(optimizer)
    remembered = 1 / (1 - min(momentum, 0.999)) if momentum > 0 else 1.0  # NaN where there is none
    accelerates = known_rule(optimizer) is not None and has_heavy_ball(optimizer)
    return float(_RAMP_LEAD * remembered ** (_REMEMBERED if accelerates else _AVERAGED))


def _schedule(schedule: str | Schedule) -> tuple[str, Schedule]:
    if callable(schedule):
        return getattr(schedule, "__name__", type(schedule).__name__), schedule
    shapes: dict[str, Schedule] = {**DECAYS, "wsd": lambda z: min(1.0, 5 * (1 - z))}
    choice("schedule", schedule, shapes, other="a function of the share of steps done")
    return f"{schedule} schedule", shapes[schedule]


def _mean(shape: Schedule) -> float:
    count = 200  # points, by judgement: to half a percent
    return max(sum(shape((i + 0.5) / count) for i in range(count)) / count, 1e-3)


# -- the runs ----------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Ramp:
    best: float  # rate at the lowest running mean
    limit: float  # rate at the end
    rows: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class _Long:
    rate: float
    part: int
    held_out: tuple[tuple[float, float], ...]
    turn: float | None  # sum of rates
    judged: bool  # by samples that it does not know


@dataclass(frozen=True)
class _Look:
    total: float  # sum of the rates so far
    trained: float  # mean batch loss since the last look
    held_out: NDArray[np.float64]  # loss of each group


class _Draws:
    """Mini-batches of a copy's data, and their gradients as training has them: in train mode, by the user's own loss.

    Attributes:
        gains: each batch's loss less that at the starting point, where a copy that stays there is given.
    """

    def __init__(self, pool: SamplePool, batch_size: int, *, seed: int, still: Objective | None = None) -> None:
        self._draws, self._seed = pool.epochs(min(batch_size, pool.size), generator=torch.Generator().manual_seed(seed)), seed
        self._still, self.gains = still, list[float]()

    def batch_at(self, number: int) -> Objective:
        """Drawn one after another: no run here makes trials."""
        return next(self._draws)

    def backward(self, batch: Objective, number: int) -> float:
        """With the global random state as it was afterwards."""
        total = before = 0.0
        batch.seed = self._seed + number
        with random_states_kept(), torch.enable_grad():
            for piece in batch.pieces():
                loss = batch.unchecked_loss(piece.batch, piece.key[0]) * piece.weight
                loss.backward()  # type: ignore[no-untyped-call]
                total += float(loss.detach())
                if self._still is not None:
                    self._still.seed = batch.seed  # the same masks
                    with torch.no_grad():
                        before += float(self._still.unchecked_loss(piece.batch, piece.key[0])) * piece.weight
        total = total if math.isfinite(total) else math.inf
        self.gains.append(total - before)
        return total


@dataclass
class _Work:
    """Runs on copies, and what they cost."""

    pool: SamplePool
    optimizer: torch.optim.Optimizer
    batch_size: int
    most: float
    seed: int
    callback: ProgressCallback | None
    began: float
    spent: float = 0.0
    _order: Tensor = field(init=False)

    def __post_init__(self) -> None:
        if self.batch_size > self.pool.size:
            raise ValueError(f"batch_size must be at most the {self.pool.size} samples of the objective, got {self.batch_size}")
        self._order = torch.randperm(self.pool.size, generator=torch.Generator().manual_seed(self.seed))
        self._ratios = relative_rates(self.optimizer, self.pool.parent.layout)
        self._in_eval = modules_in_eval(self.pool.parent.model)

    def start(self, indices: Tensor, *, paired: bool = False) -> tuple[TrainingRun, Objective, _Draws]:
        """A run on some samples from the present parameters and the optimizer's present state, the copy that it trains, its batches."""
        with grad_mode_kept():  # copies of tensors are made under no_grad
            twin, *still = (self._copy() for _ in range(2 if paired else 1))
            pairs = zip(self.pool.parent.model.parameters(), twin.model.parameters(), strict=True)
            optimizer = copy_optimizer(self.optimizer, {id(p): t for p, t in pairs})
        set_learning_rates(optimizer, self._ratios)
        part = SamplePool(SamplePool(twin).objective(indices))
        draws = _Draws(part, self.batch_size, seed=self.seed, still=still[0] if paired else None)
        return TrainingRun(twin.model, optimizer, draws), twin, draws

    def _copy(self) -> Objective:
        twin = self.pool.parent.copy(self.pool.batches)
        for name, module in twin.model.named_modules():
            module.training = name not in self._in_eval
        return twin

    def tell(self, text: str) -> None:
        """Progress, in gradients."""
        if self.callback is not None:
            elapsed = time.perf_counter() - self.began
            left = elapsed * max(self.most / max(self.spent, 1.0) - 1, 0.0)
            self.callback(Progress(round(self.spent), round(self.most), elapsed, left, text, "gradients"))

    # -- the ramp -------------------------------------------------------------------------------------------------------------
    def ramp(self) -> _Ramp:
        """The rate at which the loss is lowest while the rate grows, against the loss of the starting point on the same batches."""
        run, _, draws = self.start(self._order, paired=True)
        rates, means = list[float](), list[float]()

        def rising(rate: float) -> Iterator[float]:
            while len(rates) < _MOST_RAMP and not self._ramp_ended(run, draws.gains, means):
                rates.append(rate)
                yield rate
                rate *= _GROWTH

        run.follow(rising(self._lowest_rate()))
        self._ramp_ended(run, draws.gains, means)  # takes in the last step's loss
        self.spent += run.spent * 4 / 3
        self.tell("a run whose rate grows")
        lowest = min(range(len(means)), key=means.__getitem__)
        return _Ramp(rates[max(lowest - 1, 0)], rates[-1], tuple(zip(rates, means, strict=False)))

    def _ramp_ended(self, run: TrainingRun, gains: Sequence[float], means: list[float]) -> bool:
        for gain in gains[len(means) :]:
            means.append(gain if not means else (1 - _SMOOTH) * means[-1] + _SMOOTH * gain)
        if not means:
            return False
        lowest = min(range(len(means)), key=means.__getitem__)
        lost = not gains[-1] <= _LOST * max(abs(run.losses[0]), 1e-12)
        return lost or (len(means) - lowest > _IDLE and means[-1] > (1 - _GIVEN_BACK) * means[lowest])

    def _lowest_rate(self) -> float:
        """Far below where the first step's own update raises the loss of a batch."""
        batch = self.pool.objective(self._order[: self.batch_size])
        own = learning_rate(self.optimizer, self.pool.parent.layout)
        try:
            critical = critical_learning_rate(batch, self.optimizer, rtol=0.5, guess=own if own > 0 else 1e-3)
        except (NonFiniteError, UnsupportedError):
            return (own or 1e-3) / 100
        self.spent += 1 + critical.num_evaluations / 3
        return critical.value * _FROM if 0 < critical.value < math.inf else (own or 1e-3) / 100

    # -- the long run -------------------------------------------------------------------------------------------------------
    def long_run(self, rate: float, *, steps: int, num_samples: int, validation: Any) -> _Long:
        """A run at a rate, lower where it does not train; its held-out loss.

        Args:
            rate: to begin with.
            steps: of the whole run.
            num_samples: of the whole data.
            validation: to judge on, instead of samples left out.
        """
        most = min(max(_HELD_LEAST, _HELD_BATCHES * self.batch_size), _HELD_MOST)
        look_cost = most / self.batch_size / 3
        length = max(_LEAST_LONG, int(self.most - self.spent - (_LOOKS + 1) * look_cost))
        # what is seen many times turns early, and is judged best on nearly all of it
        divisor = min(max(_SEEN_OFTEN * num_samples / (steps * self.batch_size), 1.0), _MOST_DIVISOR)
        part = min(max(round(num_samples / divisor), _LEAST_PART, 2 * self.batch_size), self.pool.size * 3 // 4)
        chosen = self._order[:part]
        if validation is None:
            others = SamplePool(self.pool.objective(self._order[part : part + most]))
        else:
            parent = self.pool.parent
            others = SamplePool(parent.with_data(list(BatchSource(validation, pair=parent.loss is not None)))).limited(most, seed=self.seed)
        groups = torch.tensor_split(torch.arange(others.size), min(_GROUPS, others.size))
        data = [list(others.objective(indices).batches()) for indices in groups]
        # a model that has been trained knows them all
        judged = validation is not None or not has_stepped(self.optimizer)
        while True:
            run, twin, _ = self.start(chosen)
            looks = self._looks(run, [twin.with_data(batches, ranks=Ranks()) for batches in data], rate, length)
            self.spent += run.spent + len(looks) * others.size / self.batch_size / 3
            self.tell(f"a run at {rate:.3g}")
            held_out = tuple((look.total, float(look.held_out.mean())) for look in looks)
            allowed = held_out[0][1] * (1.0 if judged else _KEEPS)
            if not run.diverged and len(looks) > 1 and min(loss for _, loss in held_out[1:]) < allowed:
                turn = _turn(looks[1:], plateaus=divisor <= _PLATEAUS) if judged else None
                return _Long(rate, part, held_out, turn, judged)
            length = int(self.most - self.spent - (_LOOKS + 1) * look_cost)
            if length < _LEAST_LONG:
                what = "the batch loss diverges" if run.diverged else "the loss on other samples rises from the first steps on"
                remedy = "allow more by budget=, or look whether the starting point trains at all"
                raise ObjectiveError(f"no rate that trains was seen in {self.spent:.0f} gradients: at {rate:.3g} {what}; {remedy}")
            rate /= _RETREAT

    def _looks(self, run: TrainingRun, judges: Sequence[Objective], rate: float, length: int) -> list[_Look]:
        """What the run had come to as the rate grew to its last value."""
        looks, growth = (
            [_Look(0.0, math.nan, held_out_losses(judges, run.optimizer, stepped=bool(run.losses)))],
            _LONG_FROM ** (-1 / max(length - 1, 1)),
        )
        rates = [rate * growth ** (step - length + 1) for step in range(length)]
        for mark in sorted({round(length * (i + 1) / _LOOKS) for i in range(_LOOKS)}):
            losses = run.follow(rates[len(run.losses) : mark])
            if run.diverged:
                break
            looks.append(
                _Look(sum(rates[:mark]), sum(losses) / len(losses), held_out_losses(judges, run.optimizer, stepped=bool(run.losses)))
            )
        return looks


def _turn(looks: Sequence[_Look], *, plateaus: bool) -> float | None:
    """The sum of rates at which the held-out loss has come to its lowest, within a standard error; None where it does not turn.

    With ``plateaus``, it need not rise again, if meanwhile the loss of the batches falls on: where neither moves, training itself is at a
    plateau, which says nothing of over-fitting.
    """
    means = [float(look.held_out.mean()) for look in looks]
    lowest = min(range(len(means)), key=means.__getitem__)

    def as_low(index: int) -> bool:
        gap = looks[index].held_out - looks[lowest].held_out
        error = float(gap.std(ddof=1)) / math.sqrt(len(gap)) if len(gap) > 1 else 0.0
        return float(gap.mean()) <= error

    first = next(index for index in range(len(looks)) if as_low(index))
    # one look may be high by chance; over-fitting lowers the loss of the batches, and where that rises too, steps have become too long
    turned = len(means) - lowest >= 3 and min(means[lowest + 1 :]) > means[lowest] and means[-1] > (1 + _RISE) * means[lowest]
    turned = turned and looks[-1].trained <= _FITS_ON * looks[lowest].trained
    level = plateaus and len(means) - first >= 3 and looks[-1].trained <= _FALLS_ON * looks[first].trained
    return looks[first].total if turned or level else None
