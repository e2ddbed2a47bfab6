"""Where training really breaks, on tasks held out: the largest rate of 300 steps by plain PyTorch, on a grid of factor sqrt(2), two seeds.

From scratch a rate trains if its run makes at least half of the best improvement that any run of the same seed made, counted from the loss
before training or the best constant output's, whichever is lower. At a trained point where no run halves the loss, a rate trains if its run
ends no more than a tenth above where it began.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from experiments._common import Row
from experiments._heldout_tasks import HeldOutTask, Pair, task_of

STEPS, SEEDS, MAX_RUNS = 300, (0, 1), 22
CHECKPOINT_STEPS, CHECKPOINT_SEED = 300, 2  # of Adam at 1e-3, batches of 32; one point, from which the seeds are orders of the data

OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer]] = {
    "SGD": lambda params, lr: torch.optim.SGD(params, lr=lr),
    "momentum": lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9),
    "Nesterov": lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9, nesterov=True),
    "Adam": lambda params, lr: torch.optim.Adam(params, lr=lr),
    "AdamW": lambda params, lr: torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.95), weight_decay=0.1),
}
# (rate at B = 1, power of B, highest): where a search begins, by judgement
_GUESS = {"SGD": (0.03, 0.8, 1.0), "momentum": (0.003, 0.9, 0.3), "Nesterov": (0.003, 0.9, 0.3), "Adam": (0.005, 0.5, 0.05)}


def batches(task: HeldOutTask, batch_size: int, seed: int) -> Iterator[Pair]:
    """Every sample once an epoch, the last short batch left out."""
    (x, y), generator = task.train, torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(task.size, generator=generator)
        for i in range(task.size // batch_size):
            chosen = order[i * batch_size : (i + 1) * batch_size]
            yield x[chosen], y[chosen]


def loss_on_all(task: HeldOutTask, model: nn.Module) -> float:
    """On the training data as one batch, in train mode; running statistics of a copy are the ones that move."""
    with torch.no_grad():
        value = float(task.loss(copy.deepcopy(model)(task.train[0]), task.train[1]))
    return value if math.isfinite(value) else math.inf


def constant_loss(task: HeldOutTask) -> float:
    """Loss of the best output that does not look at the input: the entropy of the labels, or the targets' variance."""
    y: Tensor = task.train[1]
    if y.is_floating_point():
        return float(y.var(correction=0))
    shares = torch.bincount(y).double() / len(y)
    return float(-torch.xlogy(shares, shares).sum())


def checkpoint(task: HeldOutTask, seed: int) -> nn.Module:
    """A trained network."""
    model = task.make(seed)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _, (x, y) in zip(range(CHECKPOINT_STEPS), batches(task, 32, seed + 100), strict=False):
        optimizer.zero_grad()
        task.loss(model(x), y).backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model


class Search:
    """The largest rate 2^(j/2) that trains, for one start, optimizer and batch size."""

    def __init__(self, task: HeldOutTask, optimizer: str, start: nn.Module, *, batch_size: int, seed: int, trained: bool) -> None:
        self.task, self.optimizer, self.start = task, optimizer, start
        self.batch_size, self.seed, self.from_checkpoint = batch_size, seed, trained
        self.initial = loss_on_all(task, start)
        self.constant = constant_loss(task)
        self.losses: dict[int, float] = {}

    def at(self, j: int) -> float:
        if j not in self.losses:
            self.losses[j] = self._train(2 ** (j / 2))
        return self.losses[j]

    def _train(self, rate: float) -> float:
        model = copy.deepcopy(self.start)
        optimizer = OPTIMIZERS[self.optimizer](model.parameters(), rate)
        for _, (x, y) in zip(range(STEPS), batches(self.task, self.batch_size, self.seed), strict=False):
            optimizer.zero_grad()
            loss = self.task.loss(model(x), y)
            if not float(loss.detach()) < 1e3 * max(self.initial, self.constant):
                return math.inf
            loss.backward()
            optimizer.step()
        return loss_on_all(self.task, model)

    @property
    def best(self) -> int:
        return min(self.losses, key=lambda j: (self.losses[j], j))

    @property
    def keeping(self) -> bool:
        """Whether nothing is left to improve by half, so that what counts is to lose nothing."""
        return self.from_checkpoint and self.losses[self.best] > 0.5 * self.initial

    def stable(self, j: int) -> bool:
        loss, begin = self.at(j), self.initial if self.from_checkpoint else min(self.initial, self.constant)
        if self.keeping:
            return loss <= 1.1 * self.initial
        best = self.losses[self.best]
        return best < begin and begin - loss >= 0.5 * (begin - best)

    def _deeper(self) -> bool:
        lowest = min(self.losses)
        if self.keeping and abs(self.losses[lowest] / self.initial - 1) < 0.05:
            return False
        begin = self.initial if self.from_checkpoint else min(self.initial, self.constant)
        return self.best == lowest or not self.losses[self.best] < begin

    def largest(self, guess: int) -> int | None:
        """None where the bound on runs was met before the answer."""
        self.at(guess)
        while self._deeper():
            if len(self.losses) >= MAX_RUNS:
                return None
            self.at(min(self.losses) - 2)
        low = self.best if not self.keeping else min(self.losses)
        while self.stable(low + 2):
            low += 2
            if len(self.losses) >= MAX_RUNS:
                return None
        return low + int(self.stable(low + 1))


def truth(job: Row) -> Row:
    """The largest rates of a task, optimizer and batch size from each seed's initialisation, or from one checkpoint."""
    task, size, began = task_of(job["task"]), job["batch_size"], time.perf_counter()
    first, power, most = _GUESS[job["optimizer"] if job["optimizer"] != "AdamW" else "Adam"]
    scale = 0.1 if job["start"] == "checkpoint" else 1.0
    guess, rates, keeping, runs = round(2 * math.log2(min(scale * first * size**power, most))), [], [], 0
    for seed in SEEDS:
        trained = job["start"] == "checkpoint"
        start = checkpoint(task, CHECKPOINT_SEED) if trained else task.make(seed)
        search = Search(task, job["optimizer"], start, batch_size=size, seed=seed, trained=trained)
        found = search.largest(guess)
        guess = guess if found is None else found
        rates.append(None if found is None else 2 ** (found / 2 + 0.25))  # the middle between what trained and what broke
        keeping.append(search.keeping)
        runs += len(search.losses)
    return {"rates": rates, "keeping": keeping, "runs": runs, "num_samples": task.size, "seconds": time.perf_counter() - began}
