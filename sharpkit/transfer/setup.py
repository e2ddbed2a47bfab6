"""A family of networks of growing width or depth, with its optimizer, data and loss: what every transfer check trains."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sharpkit._arguments import called, check_callback, choice, shown, wholes
from sharpkit._checkpoint import Subject, clock
from sharpkit._results import Progress, ProgressCallback
from sharpkit.objective.batches import Batch
from sharpkit.objective.guard import random_states_kept
from sharpkit.objective.objective import Closure, Objective
from sharpkit.objective.params import select_params
from sharpkit.optimizers import check_trains, learning_rates, set_learning_rates
from sharpkit.training_run import ShuffledBatches, TrainingRun, as_seeds, mean_loss, subject_of_run, training_batches, training_loss

Build = Callable[[int], nn.Module]
MakeOptimizer = Callable[[nn.Module, int], torch.optim.Optimizer]


@dataclass(frozen=True)
class Family:
    """Networks by width (or by depth), each trained from scratch on the same data.

    Attributes:
        build: size -> a freshly initialised model; it may draw from the global random state, which is seeded for it and put back after.
        optimizer: (model, size) -> its optimizer, with the learning rates that the parametrisation gives this size.
        data: batches used one after another, again and again: a batch, a list of batches or a re-iterable loader.
        loss: ``loss(output, target)`` on (input, target) batches.
        closure: ``closure(model, batch)`` returning the loss, for everything else. Without both, ``model(**batch).loss``.
        dimension: ``"width"`` or ``"depth"``: what the size means, for messages.
    """

    build: Build
    optimizer: MakeOptimizer
    data: Any
    loss: Callable[[Any, Any], Tensor] | None = None
    closure: Closure | None = None
    dimension: str = "width"
    batches: list[Batch] = field(init=False, default_factory=list, repr=False)

    def __post_init__(self) -> None:
        choice("dimension", self.dimension, ("width", "depth"))
        if isinstance(self.build, nn.Module):
            raise TypeError(f"build must be a function that makes a new model for each {self.dimension}, got a module")
        if not callable(self.build):
            raise TypeError(f"build must be a function from {self.dimension} to a model, got {shown(self.build)}")
        if not callable(self.optimizer):
            # one object would hold the parameters of one model, and parametrisations differ in the rates that they give each size
            raise TypeError(
                f"optimizer must be a function (model, {self.dimension}) -> torch optimizer, got {type(self.optimizer).__name__}: "
                f"parametrisations differ in the rates they give each {self.dimension}, so one optimizer object would not do"
            )
        self.batches.extend(training_batches(self.data, loss=self.loss, closure=self.closure))

    def start(self, size: int, *, seed: int = 0, lr_factor: float = 1.0) -> FamilyRun:
        """A model of this size with its optimizer, not trained yet; the global random state is left as it was.

        Args:
            size: width or depth.
            seed: seeds the initialisation, the order of batches and the dropout masks.
            lr_factor: multiplies the learning rate of every parameter group.

        Raises:
            TypeError: build or optimizer returned something else.
        """
        # the optimizer inside too: some draw random numbers when they are made
        with random_states_kept():
            torch.manual_seed(seed)
            model = called("build", self.build, size)
            if not isinstance(model, nn.Module):
                raise TypeError(f"build({size}) must return a torch module, got {type(model).__name__}")
            select_params(model)  # refuses a model without parameters to train
            optimizer = called("optimizer", self.optimizer, model, size)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer(model, {size}) must return a torch optimizer, got {type(optimizer).__name__}")
        check_trains(optimizer, model)
        # every group by the same factor: their ratios are the parametrisation
        set_learning_rates(optimizer, [rate * lr_factor for rate in learning_rates(optimizer)])
        return FamilyRun(self, model, optimizer, size, seed)

    def step_seconds(self, sizes: Sequence[int]) -> list[float]:
        """Seconds of one optimizer step at each size; the better of two after a first that warms up."""
        each = []
        # timed and not reckoned from the number of parameters: small models wait for Python, not for arithmetic
        for size in sizes:
            run, times = self.start(size), []
            for _ in range(3):
                began = time.perf_counter()
                run.step()
                times.append(time.perf_counter() - began)
            each.append(min(times[1:]))
        return each

    def subject(self, sizes: Sequence[int], seed: int) -> Subject:
        """This family as the subject of a call that may be resumed: known again by its smallest and largest models, and all data."""
        first, last = (
            subject_of_run(self.start(size, seed=seed), self.loss_of, {"data": self.batches}) for size in (min(sizes), max(sizes))
        )
        numbers = {f"{name} of the largest": value for name, value in last.numbers.items()}
        texts = {f"{name} of the largest": text for name, text in last.texts.items() if name != "data"}
        return first._replace(texts={**first.texts, **texts}, numbers={**first.numbers, **numbers})

    def loss_of(self, model: nn.Module, batch: Batch) -> Tensor:
        """The scalar loss of a batch, with its graph."""
        return training_loss(model, batch, loss=self.loss, closure=self.closure)


def family_call(call: str, build: Any, arguments: Mapping[str, Any]) -> tuple[Any, Subject]:
    """What a call on a family is about, for :func:`sharpkit._checkpoint.resumable`."""
    dimension = arguments.get("dimension", "width")
    given = {name: arguments[name] for name in ("optimizer", "data", "loss", "closure")}
    family = Family(build, dimension=dimension, **given)
    return build, family.subject(check_sizes(arguments["widths"], dimension=dimension), as_seeds(arguments["seeds"])[0])


class FamilyRun(TrainingRun):
    """One training run of a family; once it has diverged, further steps do nothing."""

    def __init__(self, family: Family, model: nn.Module, optimizer: torch.optim.Optimizer, size: int, seed: int) -> None:
        super().__init__(model, optimizer, ShuffledBatches(model, family.loss_of, family.batches, seed=seed))
        self.family, self.size, self.seed = family, size, seed

    def objective(self, batch: Any = None, *, mode: str = "eval") -> Objective:
        """The loss over given data (default: all the family's batches) as an objective at the present parameters."""
        # the processes of a distributed job each run their own family: nothing is summed over them
        data = self.family.batches if batch is None else batch
        return Objective(self.model, data, loss=self.family.loss, closure=self.family.closure, mode=mode, process_group=False)

    def final_loss(self, batches: Sequence[Batch] | None = None) -> float:
        """Mean loss over batches in eval mode (default: all the family's); infinite if the run diverged."""
        if self.diverged:
            return math.inf
        chosen = self.family.batches if batches is None else batches
        return mean_loss(self.model, chosen, loss=self.family.loss, closure=self.family.closure)


class RunProgress:
    """Counts the training runs of one call, ``expected`` as far as known, and tells its callback, if any, where the call stands."""

    def __init__(self, callback: ProgressCallback | None, expected: int) -> None:
        check_callback(callback)
        self._callback, self.expected, self.done, self._started = callback, expected, 0, clock()

    def tell(self, text: str, *, runs: int = 0) -> None:
        """Count runs just finished and say what was done."""
        self.done += runs
        if self._callback is not None:
            # a search may need more runs than were forecast
            elapsed, expected = self.seconds, max(self.expected, self.done)
            left = elapsed / self.done * (expected - self.done) if self.done else math.nan
            self._callback(Progress(self.done, expected, elapsed, left, text, unit="runs"))

    def part(self) -> ProgressCallback:
        """The callback for a call inside this one: its runs are added to those done before it."""
        before = self.done

        def tell(progress: Progress) -> None:
            self.done = before + progress.done
            self.tell(progress.text)

        return tell

    @property
    def seconds(self) -> float:
        """Since it was made."""
        return clock() - self._started


def check_sizes(sizes: Sequence[int], *, dimension: str = "width", least: int = 2) -> tuple[int, ...]:
    """Ascending sizes without repetition.

    Raises:
        ValueError: too few, or not positive.
    """
    # a size given twice would enter the fits twice, with the very same runs
    different = tuple(sorted({*wholes(f"the {dimension}s", sizes)}))
    if len(different) < least:
        raise ValueError(f"{dimension}s must be at least {least} different positive numbers, got {list(sizes)}")
    return different


def duration(seconds: float) -> str:
    """In seconds or minutes.

    Example:
        >>> duration(3.14), duration(600)
        ('3.1 s', '10 min')
    """
    return f"{seconds:.2g} s" if seconds < 99 else f"{seconds / 60:.2g} min"
