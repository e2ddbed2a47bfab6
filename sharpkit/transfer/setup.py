"""A family of networks of growing width or depth, with its optimizer, data and loss: what every transfer check trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sharpkit._errors import NonFiniteError, ObjectiveError
from sharpkit.objective.batches import Batch, BatchSource, to_device
from sharpkit.objective.loss import call_model, own_loss
from sharpkit.objective.objective import Closure, Objective
from sharpkit.optimizers import learning_rates, set_learning_rates

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
    _batches: list[Batch] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        if not callable(self.build):
            raise TypeError(f"build must be a function from {self.dimension} to a model, got {type(self.build).__name__}")
        if not callable(self.optimizer):
            raise TypeError(
                f"optimizer must be a function (model, {self.dimension}) -> torch optimizer, got {type(self.optimizer).__name__}: "
                "parametrisations differ in the rates they give each width, so one optimizer object would not do"
            )
        if self.loss is not None and self.closure is not None:
            raise ValueError("pass loss= for (input, target) batches or closure= for everything else, not both")
        self._batches.extend(BatchSource(self.data, pair=self.loss is not None))
        if not self._batches:
            raise ObjectiveError("data gave no batch: pass a batch, a list of batches or a re-iterable loader")

    @property
    def batches(self) -> list[Batch]:
        """All batches, in the order of training."""
        return self._batches

    def start(self, size: int, *, seed: int = 0, lr_factor: float = 1.0) -> Run:
        """A model of this size with its optimizer, not trained yet; the global random state is left as found.

        Args:
            size: width or depth.
            seed: of the initialisation and of the order of batches.
            lr_factor: multiplies the learning rate of every parameter group.

        Raises:
            TypeError: build or optimizer returned something else.
        """
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self.build(size)
            if not isinstance(model, nn.Module):
                raise TypeError(f"build({size}) must return a torch module, got {type(model).__name__}")
            optimizer = self.optimizer(model, size)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer(model, {size}) must return a torch optimizer, got {type(optimizer).__name__}")
        set_learning_rates(optimizer, [rate * lr_factor for rate in learning_rates(optimizer)])
        return Run(self, model, optimizer, size, seed)

    def loss_of(self, model: nn.Module, batch: Batch) -> Tensor:
        """The scalar loss of a batch, with its graph."""
        if self.closure is not None:
            return self.closure(model, batch)
        if self.loss is None:
            return own_loss(model, batch)
        return self.loss(call_model(model, batch[0]), batch[1])


class Run:
    """One training run of a family, step by step.

    Attributes:
        family: where it comes from.
        model, optimizer: its own.
        size: width or depth.
        seed: of this run.
        losses: before each step made.
    """

    def __init__(self, family: Family, model: nn.Module, optimizer: torch.optim.Optimizer, size: int, seed: int) -> None:
        self.family, self.model, self.optimizer, self.size, self.seed = family, model, optimizer, size, seed
        self.losses: list[float] = []
        self._order = _epochs(len(family.batches), seed)
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))

    @property
    def diverged(self) -> bool:
        """Whether the loss became NaN, infinite, or a thousand times the first."""
        return bool(self.losses) and not self.losses[-1] <= 1e3 * max(abs(self.losses[0]), 1e-12)

    def next_batch(self) -> Batch:
        """The batch of the next step, on the model's device; it advances the order."""
        return to_device(self.family.batches[next(self._order)], self._device)

    def step(self, batch: Batch | None = None) -> float:
        """One optimizer step; the loss before it. After divergence nothing is done any more."""
        if self.diverged:
            return math.inf
        batch = self.next_batch() if batch is None else batch
        self.model.train()
        self.optimizer.zero_grad()
        with torch.random.fork_rng():
            torch.manual_seed(self.seed + 7919 * len(self.losses))  # dropout masks
            loss = self.family.loss_of(self.model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
        self.losses.append(float(loss.detach()))
        if not self.diverged:
            self.optimizer.step()
        return self.losses[-1]

    def objective(self, batch: Any = None, *, mode: str = "eval") -> Objective:
        """The loss over given data (default: all the family's batches) as an objective at the present parameters."""
        data = self.family.batches if batch is None else batch
        return Objective(self.model, data, loss=self.family.loss, closure=self.family.closure, mode=mode, process_group=False)

    def final_loss(self, batches: Sequence[Batch] | None = None) -> float:
        """Mean loss over batches in eval mode; infinite where it diverged."""
        if self.diverged:
            return math.inf
        chosen = self.family.batches if batches is None else batches
        try:
            return self.objective(list(chosen)).value()
        except NonFiniteError:
            return math.inf


def _epochs(count: int, seed: int) -> Iterator[int]:
    """Every batch once an epoch; the first epoch of every seed in its own order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


def check_sizes(sizes: Sequence[int], *, dimension: str = "width", least: int = 2) -> tuple[int, ...]:
    """Ascending sizes without repetition.

    Raises:
        ValueError: too few, or not positive.
    """
    found = tuple(sorted({int(s) for s in sizes}))
    if len(found) < least or found[0] < 1:
        raise ValueError(f"{dimension}s must be at least {least} different positive numbers, got {list(sizes)}")
    return found
