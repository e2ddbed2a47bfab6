"""A problem to race on, and one model trained on it from scratch within a budget of gradients."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sharpkit._errors import NonFiniteError, ObjectiveError
from sharpkit.objective.batches import Batch, BatchSource, to_device
from sharpkit.objective.loss import call_model, own_loss
from sharpkit.objective.objective import Closure, Objective
from sharpkit.optimizers import learning_rates, set_learning_rates

MakeOptimizer = Callable[..., torch.optim.Optimizer]
_LOST = 1e3  # times the first loss


@dataclass(frozen=True)
class RaceProblem:
    """What all entrants train.

    Attributes:
        model: seed -> a new model.
        optimizer: (params, lr) -> the optimizer whose rate is in question; a list of groups keeps their ratios.
        data: training batches: one, a list or a re-iterable loader.
        loss: of (output, target).
        closure: of (model, batch), instead of loss; without both, the model's own loss.
        test_data: batches for the test loss.

    Raises:
        TypeError: model or optimizer are not functions.
        ValueError: both loss and closure.
        ObjectiveError: no batch.
    """

    model: Callable[[int], nn.Module]
    optimizer: MakeOptimizer
    data: Any
    loss: Callable[[Any, Any], Tensor] | None = None
    closure: Closure | None = None
    test_data: Any = None
    batches: list[Batch] = field(init=False, default_factory=list, repr=False)

    def __post_init__(self) -> None:
        for name, kind in (("model", "seed"), ("optimizer", "params, lr")):
            if not callable(getattr(self, name)):
                raise TypeError(f"{name} must be a function of ({kind}), got {type(getattr(self, name)).__name__}")
        if self.loss is not None and self.closure is not None:
            raise ValueError("pass loss= for (input, target) batches or closure= for everything else, not both")
        self.batches.extend(BatchSource(self.data, pair=self.loss is not None))
        if not self.batches:
            raise ObjectiveError("data gave no batch: pass a batch, a list of batches or a re-iterable loader")

    def loss_of(self, model: nn.Module, batch: Batch) -> Tensor:
        """The scalar loss of a batch, with its graph."""
        if self.closure is not None:
            return self.closure(model, batch)
        return own_loss(model, batch) if self.loss is None else self.loss(call_model(model, batch[0]), batch[1])

    def make_optimizer(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        """A new optimizer for all parameters of a model.

        Raises:
            TypeError: it is none.
        """
        made = self.optimizer(model.parameters(), lr)
        if not isinstance(made, torch.optim.Optimizer):
            raise TypeError(f"optimizer(params, lr) must return a torch optimizer, got {type(made).__name__}")
        return made


class RaceRun:
    """One model, trained from the initialisation of a seed; every gradient is counted.

    Attributes:
        model, optimizer: its own.
        budget: gradients it may spend.
        spent, searched: gradients spent so far, and those of them on finding a rate.
        curve: (gradients spent, batch loss) of every step that counts as training.
        position: number of the next batch; the order is the same for all entrants of a seed.
    """

    def __init__(self, problem: RaceProblem, *, seed: int, budget: int, optimizer: MakeOptimizer | None = None) -> None:
        self.problem, self.seed, self.budget = problem, seed, budget
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = problem.model(seed)
            if not isinstance(self.model, nn.Module):
                raise TypeError(f"model({seed}) must return a torch module, got {type(self.model).__name__}")
            self.optimizer = problem.make_optimizer(self.model, 1.0) if optimizer is None else optimizer(self.model.parameters())
        self._ratios = learning_rates(self.optimizer)
        self._device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        self._order: list[int] = []
        self._generator = torch.Generator().manual_seed(seed)
        self._searching = False
        self.position, self.spent, self.searched = 0, 0, 0
        self.first, self.last = math.nan, math.nan
        self.curve: list[tuple[int, float]] = []

    @property
    def own_rate(self) -> float:
        """That the optimizer was made with."""
        return self._ratios[0]

    @property
    def remaining(self) -> int:
        """Gradients left."""
        return self.budget - self.spent

    @property
    def is_lost(self) -> bool:
        """Whether the last loss is not finite or a thousand times the first."""
        return self.spent > 0 and not self.last <= _LOST * max(abs(self.first), 1e-12)

    def set_rate(self, rate: float) -> None:
        """Of all groups, in the ratios that the optimizer was made with."""
        set_learning_rates(self.optimizer, [rate * ratio for ratio in self._ratios])

    def charge(self, gradients: int) -> None:
        """Count what was spent on anything but a step."""
        self.spent += gradients
        self.searched += gradients

    def next_batch(self) -> Batch:
        """That the next step is made on."""
        while self.position >= len(self._order):
            self._order += torch.randperm(len(self.problem.batches), generator=self._generator).tolist()
        return to_device(self.problem.batches[self._order[self.position]], self._device)

    def step(self) -> float:
        """One optimizer step: one gradient; the loss before it."""
        batch = self.next_batch()
        self.model.train()
        self.optimizer.zero_grad()
        with torch.random.fork_rng():
            torch.manual_seed(self.seed + 7919 * self.position)  # dropout masks
            loss = self.problem.loss_of(self.model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
        self.position, self.spent, self.last = self.position + 1, self.spent + 1, float(loss.detach())
        if math.isnan(self.first):
            self.first = self.last
        if self._searching:
            self.searched += 1
        else:
            self.curve.append((self.spent, self.last))
        self.optimizer.step()
        return self.last

    def train(self, rate: float, steps: int, *, schedule: Callable[[float], float]) -> list[float]:
        """Steps with ``rate * schedule(share done)``; ends early when lost.

        Returns:
            the losses.
        """
        losses: list[float] = []
        for done in range(steps):
            self.set_rate(rate * schedule(done / steps))
            losses.append(self.step())
            if self.is_lost:
                break
        return losses

    @contextlib.contextmanager
    def trial(self) -> Iterator[None]:
        """Steps within are spent on finding a rate; afterwards model, optimizer and data are where they were."""
        snapshot, before = Snapshot(self.model, self.optimizer), (self.position, self.last)
        self._searching = True
        try:
            yield
        finally:
            self._searching = False
            snapshot.restore(self.model, self.optimizer)
            self.position, self.last = before

    def final_loss(self, data: Any) -> float:
        """Mean loss over batches in eval mode; infinite where the run is lost. Not charged: all entrants have it once."""
        if callable(turn := getattr(self.optimizer, "eval", None)):
            turn()  # schedule-free optimizers train at one point and end at another
        batches: Sequence[Batch] = list(BatchSource(data, pair=self.problem.loss is not None))
        settings: dict[str, Any] = {"loss": self.problem.loss, "closure": self.problem.closure}
        try:
            return float(Objective(self.model, batches, **settings, mode="eval", process_group=False).value())
        except NonFiniteError:
            return math.inf


class Snapshot:
    """Copies of parameters, buffers and optimizer state, to go back to."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.tensors = {name: t.detach().clone() for name, t in _tensors(model).items()}
        self.state = copy.deepcopy(optimizer.state_dict()["state"])

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Write the copies back in place; learning rates and other settings of the optimizer stay as they are."""
        with torch.no_grad():
            for name, t in _tensors(model).items():
                t.copy_(self.tensors[name])
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": copy.deepcopy(self.state), "param_groups": groups})

    def state_dict(self) -> dict[str, Any]:
        """The copies themselves."""
        return {"tensors": self.tensors, "state": self.state}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Snapshot:
        """Back from saved copies."""
        found = cls.__new__(cls)
        found.tensors, found.state = dict(state["tensors"]), state["state"]
        return found


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **{f"buffer {name}": b for name, b in model.named_buffers()}}
