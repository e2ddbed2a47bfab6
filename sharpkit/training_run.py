"""One problem, one run: the only training loop, which the pilot of a learning-rate curve, transfer checks and races all use."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sharpkit._arguments import as_seed, called, check_callable, whole, wholes
from sharpkit._checkpoint import Subject, checksum, in_words, known_again
from sharpkit._errors import NonFiniteError, ObjectiveError
from sharpkit._results import State
from sharpkit.objective.batches import Batch, BatchSource, fingerprint, to_device
from sharpkit.objective.counting import LossWatch
from sharpkit.objective.guard import grad_mode_kept, random_states_kept, seed_everything
from sharpkit.objective.loss import call_model, check_axes, check_functions, check_loss, check_loss_form, own_loss, recognise_loss
from sharpkit.objective.mistakes import refuse_own_backward, refuse_unrelated, telling
from sharpkit.objective.objective import Closure, Objective
from sharpkit.objective.params import select_params
from sharpkit.objective.reduction import check_batch
from sharpkit.optimizers import learning_rates, set_learning_rates

Loss = Callable[[Any, Any], Tensor]
MakeOptimizer = Callable[..., torch.optim.Optimizer]
_DIVERGED = 1e3  # times the first loss, by judgement: spikes that training recovers from stay far below
# By judgement the 1000th prime: the dropout masks of one seed do not repeat those of a neighbouring seed a step later.
_MASK_STRIDE = 7919


def as_seeds(seeds: int | Sequence[int]) -> tuple[int, ...]:
    """The seeds of several runs: an int n means 0, 1, ..., n - 1; a sequence is taken as it is.

    Raises:
        TypeError: a seed that is no whole number.
        ValueError: no seed, or a negative one.

    Example:
        >>> as_seeds(3), as_seeds([7, 11])
        ((0, 1, 2), (7, 11))
    """
    several = isinstance(seeds, Iterable) and not (isinstance(seeds, (str, bytes)) or getattr(seeds, "ndim", 1) == 0)
    numbers = (
        tuple(wholes("seeds", seeds, least=None))
        if several
        else tuple(range(whole("seeds", seeds, least=None, other="a sequence of seeds")))
    )
    if not numbers or min(numbers) < 0:
        raise ValueError(f"seeds must be at least one: a positive number of runs or a sequence of numbers from 0 on, got {seeds!r}")
    return tuple(as_seed(number, name="each of seeds") for number in numbers)


# -- data and loss ---------------------------------------------------------------------------------------------------------------
def training_batches(data: Any, *, loss: Loss | None, closure: Closure | None) -> list[Batch]:
    """All batches of a problem (one, a list or a re-iterable loader), in the order of the data; loss and closure as in training_loss.

    Raises:
        ValueError: both loss and closure.
        ObjectiveError: no batch, or data that can be gone through only once.
    """
    check_functions(loss, closure)
    batches = list(BatchSource(data, pair=loss is not None))
    if not batches:
        raise ObjectiveError("data gave no batch: pass a batch, a list of batches or a re-iterable loader")
    for index, batch in enumerate(batches):
        check_batch(batch, index, pair=loss is not None)
    return batches


def training_loss(model: nn.Module, batch: Batch, *, loss: Loss | None, closure: Closure | None) -> Tensor:
    """The scalar loss of a batch, with its graph: ``closure(model, batch)``, ``loss(output, target)``, or else ``model(**batch).loss``."""
    if closure is not None:
        with telling("closure(model, batch)", model, model, batch):
            return check_loss_form(closure(model, batch))
    if loss is None:
        with telling("model(**batch)", model, batch):
            return check_loss_form(own_loss(model, batch))
    with telling("model(input)", model, batch[0]):
        output = call_model(model, batch[0])
    with telling("loss(output, target)", model, output, batch[1]):
        if (known := recognise_loss(loss)) is not None:
            check_axes(known.function, output, batch[1])
        return check_loss_form(loss(output, batch[1]))


def mean_loss(model: nn.Module, batches: Sequence[Batch], *, loss: Loss | None, closure: Closure | None) -> float:
    """Mean loss over batches in eval mode; infinite where it is not finite."""
    with contextlib.suppress(NonFiniteError):
        return float(Objective(model, list(batches), loss=loss, closure=closure, mode="eval", process_group=False).value())
    return math.inf


class GradientSource(Protocol):
    """Where a run's gradients come from."""

    def batch_at(self, number: int) -> Any:
        """The batch at a position of the run's order; positions are asked for one after another, some again."""

    def backward(self, batch: Any, number: int) -> float:
        """The loss of a batch at step ``number``, its gradient left in the parameters' ``.grad``; infinite where there is none."""


class ShuffledBatches:
    """The gradients of a model's loss on given batches in train mode, each once an epoch; the seed decides their order and all masks."""

    def __init__(self, model: nn.Module, loss_of: Callable[[nn.Module, Batch], Tensor], batches: Sequence[Batch], *, seed: int) -> None:
        self._model, self._loss_of, self._batches, self._seed = model, loss_of, batches, seed
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._generator = torch.Generator().manual_seed(seed)
        self._order: list[int] = []  # kept, so that a trial can be repeated on the same batches

    def batch_at(self, number: int) -> Batch:
        """On the model's device."""
        while number >= len(self._order):
            self._order += torch.randperm(len(self._batches), generator=self._generator).tolist()
        return to_device(self._batches[self._order[number]], self._device)

    def backward(self, batch: Batch, number: int) -> float:
        """With the global random state as it was afterwards."""
        self._model.train()
        with random_states_kept():
            seed_everything(self._seed + _MASK_STRIDE * number, self._device)  # dropout masks
            with LossWatch(batch) if number == 0 else contextlib.nullcontext():
                loss = self._loss_of(self._model, batch)
            params = [p for p in self._model.parameters() if p.requires_grad]
            refuse_own_backward(loss, params)
            if number == 0:
                refuse_unrelated(loss, params)
                check_loss(loss, number)
            loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())


# -- the loop --------------------------------------------------------------------------------------------------------------------
class TrainingRun:
    """A model and its optimizer, stepped from batch to batch; every gradient is counted.

    Attributes:
        losses: each step's loss on its batch, before the step; without those of trials.
        position: in the order of batches.
        spent, searched: gradients spent so far, and those of them in trials.
        curve: (gradients spent, batch loss) of every step outside trials.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, source: GradientSource, *, halts: bool = True, reference: float = 0.0
    ) -> None:
        self.model, self.optimizer, self._reference = model, optimizer, reference
        # With halts, a run that diverged stays where it is, so that what is measured on it is not NaN throughout. A race's runs go on: the
        # learner may go back to an earlier point.
        self._source, self._halts, self._in_trial = source, halts, False
        self._ratios = learning_rates(optimizer)
        self.losses: list[float] = []
        self.position, self.spent, self.searched = 0, 0, 0
        self.curve: list[tuple[int, float]] = []

    @property
    def diverged(self) -> bool:
        """Whether the last loss is NaN, infinite, or more than a thousand times the first, or a higher reference that was given."""
        # written with `not ... <=` so that NaN counts; the floor is for a first loss of 0, at a point that was fitted already
        return bool(self.losses) and not self.losses[-1] <= _DIVERGED * max(abs(self.losses[0]), self._reference, 1e-12)

    def set_rate(self, rate: float) -> None:
        """Multiply the rates that the optimizer was made with, which keeps the ratios of its groups."""
        set_learning_rates(self.optimizer, [rate * ratio for ratio in self._ratios])

    def next_batch(self) -> Any:
        """The batch of the next step; the position advances."""
        self.position += 1
        return self._source.batch_at(self.position - 1)

    def step(self, batch: Any = None) -> float:
        """One optimizer step, on the next batch if none is given; the loss before it, infinite if the run had halted."""
        if self._halts and self.diverged:
            return math.inf
        with grad_mode_kept():
            return self._step(batch)

    def _step(self, batch: Any) -> float:
        batch = self.next_batch() if batch is None else batch
        self.optimizer.zero_grad()  # before, not after: what the user's model held would be added to the first gradient
        # numbered by steps and not by batches, so that a batch looked at beforehand changes no mask
        loss = self._source.backward(batch, len(self.losses))
        self.losses.append(loss)
        self.spent += 1
        if self._in_trial:
            self.searched += 1
        else:
            self.curve.append((self.spent, loss))
        if not (self._halts and self.diverged):
            self.optimizer.step()
        return loss

    def follow(self, rates: Iterable[float]) -> list[float]:
        """A step at each rate, as for :meth:`set_rate`; ends early when it diverges, and gives the losses."""
        before = len(self.losses)
        for rate in rates:  # each is asked for after the step before it was made, so it may depend on the model
            self.set_rate(rate)
            self.step()
            if self.diverged:
                break
        return self.losses[before:]

    @contextlib.contextmanager
    def trial(self) -> Iterator[None]:
        """Steps within count as searching; afterwards model, optimizer and data are where they were."""
        snapshot, position, steps = Snapshot(self.model, self.optimizer), self.position, len(self.losses)
        self._in_trial = True
        try:
            yield
        finally:  # what was spent stays spent
            self._in_trial, self.position = False, position
            snapshot.restore(self.model, self.optimizer)
            del self.losses[steps:]


class Snapshot(State, saved=("tensors", "state")):
    """Copies of parameters, buffers and optimizer state, to go back to."""

    tensors: dict[str, Tensor]
    state: dict[Any, Any]

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.tensors = {name: t.detach().clone() for name, t in _tensors(model).items()}
        self.state = copy.deepcopy(optimizer.state_dict()["state"])

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Write the copies back in place; learning rates and other settings of the optimizer stay as they are."""
        with grad_mode_kept():
            for name, t in _tensors(model).items():
                t.detach().copy_(self.tensors[name])
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": copy.deepcopy(self.state), "param_groups": groups})  # it would keep the copies themselves


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **{f"buffer {name}": b for name, b in model.named_buffers()}}


# -- races -----------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class RaceProblem:
    """What all entrants of :func:`sharpkit.race` train.

    Attributes:
        model: seed -> a new model.
        optimizer: (params, lr) -> the optimizer whose rate is in question; a list of groups keeps their ratios.
        data: training batches: one, a list or a re-iterable loader.
        loss: ``loss(output, target)`` on (input, target) batches.
        closure: ``closure(model, batch)``, instead of loss; without both, the model's own loss.
        test_data: batches for the test loss.

    Raises:
        TypeError: model or optimizer are not functions.
        ValueError: both loss and closure.
        ObjectiveError: no batch.
    """

    model: Callable[[int], nn.Module]
    optimizer: MakeOptimizer
    data: Any
    loss: Loss | None = None
    closure: Closure | None = None
    test_data: Any = None
    batches: list[Batch] = field(init=False, default_factory=list, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.model, nn.Module):
            raise TypeError("model must be a function of (seed) that makes a new model for each run, got a module")
        for name, form in (("model", "model(seed)"), ("optimizer", "optimizer(params, lr)")):
            check_callable(name, getattr(self, name), form)
        self.batches.extend(training_batches(self.data, loss=self.loss, closure=self.closure))

    def loss_of(self, model: nn.Module, batch: Batch) -> Tensor:
        """The scalar loss of a batch, with its graph."""
        return training_loss(model, batch, loss=self.loss, closure=self.closure)

    def make_model(self, seed: int) -> nn.Module:
        """A new model, drawn from the present global random state; TypeError if it is none."""
        made = called("model", self.model, seed)
        if not isinstance(made, nn.Module):
            raise TypeError(f"model({seed}) must return a torch module, got {type(made).__name__}")
        return made

    def make_optimizer(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        """A new optimizer for all parameters of a model; TypeError if it is none."""
        select_params(model)  # refuses a model without parameters to train
        made = called("optimizer", self.optimizer, model.parameters(), lr)
        if not isinstance(made, torch.optim.Optimizer):
            raise TypeError(f"optimizer(params, lr) must return a torch optimizer, got {type(made).__name__}")
        return made

    def subject(self, seed: int) -> Subject:
        """This problem as the subject of a call that may be resumed: known again by a new model, its first loss, and the data."""
        run = RaceRun(self, seed=seed, max_gradients=1)
        return subject_of_run(run, self.loss_of, {"data": self.batches, "test data": [] if self.test_data is None else self._tests()})

    def _tests(self) -> list[Batch]:
        return training_batches(self.test_data, loss=self.loss, closure=self.closure)


def subject_of_run(run: TrainingRun, loss_of: Callable[[nn.Module, Batch], Tensor], data: Mapping[str, Sequence[Batch]]) -> Subject:
    """What is about to be trained, known again by a new model, its optimizer, its loss on the first batch and all data."""
    sums = {name: hashlib.sha256("".join(map(fingerprint, batches)).encode()).hexdigest()[:16] for name, batches in data.items()}
    tensors = _tensors(run.model)
    device = next((t.device for t in tensors.values()), torch.device("cpu"))
    batch = to_device(next(iter(data.values()))[0], device)
    twin = copy.deepcopy(run.model)  # a pass in train mode moves batch norm's running means
    with random_states_kept():
        seed_everything(0, device)
        loss = float(loss_of(twin, batch).detach())
    texts = {"model": f"{type(run.model).__name__} of {len(tensors)} tensors with the check sum {checksum(tensors.values())}"}
    texts |= {"optimizer": in_words(run.optimizer), **sums}
    rounding = known_again(max((float(torch.finfo(t.dtype).eps) for t in tensors.values() if t.is_floating_point()), default=0.0))
    return Subject(texts, {"the first loss": [loss]}, rounding, None, device)


class RaceRun(TrainingRun):
    """One entrant's run from the initialisation of a seed, within a budget of gradients; the order of batches is the same for all entrants.

    ``optimizer`` makes the entrant's own from parameters; by default it is the problem's, made with rate 1.
    """

    def __init__(self, problem: RaceProblem, *, seed: int, max_gradients: int, optimizer: MakeOptimizer | None = None) -> None:
        self.problem, self.seed, self.max_gradients = problem, seed, max_gradients
        with random_states_kept():  # the optimizer inside too: some draw random numbers when they are made
            torch.manual_seed(seed)
            model = problem.make_model(seed)
            made = problem.make_optimizer(model, 1.0) if optimizer is None else optimizer(model.parameters())
        super().__init__(model, made, ShuffledBatches(model, problem.loss_of, problem.batches, seed=seed), halts=False)

    @property
    def own_rate(self) -> float:
        """The rate that the optimizer was made with."""
        return self._ratios[0]

    @property
    def remaining(self) -> int:
        """Gradients left."""
        return self.max_gradients - self.spent

    def charge(self, gradients: int) -> None:
        """Count what was spent on anything but a step."""
        self.spent += gradients
        self.searched += gradients

    def train(self, rate: float, steps: int, *, schedule: Callable[[float], float]) -> list[float]:
        """Steps with ``rate * schedule(share done)``; ends early when it diverges, and gives the losses."""
        return self.follow(rate * schedule(done / steps) for done in range(steps))

    def final_loss(self, data: Any) -> float:
        """Mean loss over batches in eval mode; infinite where it is not finite. Not charged: all entrants have it once."""
        if callable(turn := getattr(self.optimizer, "eval", None)):
            turn()  # schedule-free optimizers train at one point and end at another
        batches = list(BatchSource(data, pair=self.problem.loss is not None))
        return mean_loss(self.model, batches, loss=self.problem.loss, closure=self.problem.closure)
