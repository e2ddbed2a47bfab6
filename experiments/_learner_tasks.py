"""The three tasks of the learner's experiments, runs under a schedule and runs with the learner, and a driver that keeps finished rows."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn

import sharpkit as sk
from experiments._batch_models import digits
from experiments._common import HERE, Row, circumstances, read_rows, rounded
from experiments._models import GPT, images, mlp, seeded, text

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda z: 1.0,
    "cosine": lambda z: 0.5 * (1 + math.cos(math.pi * z)),
    "linear": lambda z: 1 - z,
}

GRAPH, PRODUCT = 1.3, 2.0  # gradients that a measurement's graph and each of its products are counted as


class PreActivation(nn.Module):
    """A small pre-activation residual network with batch norm: stem, two blocks, average, linear."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(4))
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(4))
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for j in (0, 2):
            y = self.convs[j](F.relu(self.norms[j](x)))
            x = x + self.convs[j + 1](F.relu(self.norms[j + 1](y)))
        return self.head(F.relu(x).mean(dim=(2, 3)))


@dataclass(frozen=True)
class Task:
    """What is trained for how long.

    Attributes:
        make: seed -> network.
        optimizer: (parameters, rate) -> optimizer.
        train, test: (inputs, targets).
        grid: nine learning rates, a factor of about 3 apart.
    """

    name: str
    make: Callable[[int], nn.Module]
    optimizer: Callable[..., torch.optim.Optimizer]
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    batch_size: int
    steps: int
    grid: tuple[float, ...]

    def batches(self, seed: int, batch_size: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Every sample once an epoch."""
        x, y = self.train
        generator, size = torch.Generator().manual_seed(seed), batch_size or self.batch_size
        while True:
            order = torch.randperm(len(x), generator=generator)
            for i in range(len(x) // size):
                chosen = order[i * size : (i + 1) * size]
                yield x[chosen], y[chosen]

    def losses(self, model: nn.Module) -> tuple[float, float]:
        """(training, test) loss in eval mode; infinite where not finite."""
        model.eval()
        with torch.no_grad():
            found = [
                sum(float(F.cross_entropy(model(a), b, reduction="sum")) for a, b in zip(x.split(500), y.split(500), strict=True))
                / y.numel()
                for x, y in (self.train, self.test)
            ]
        model.train()
        return tuple(v if math.isfinite(v) else math.inf for v in found)  # type: ignore[return-value]


def _sgd(parameters: object, rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=rate, momentum=0.9)  # type: ignore[arg-type]


def _adamw(parameters: object, rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)  # type: ignore[arg-type]


def digits_task() -> Task:
    x, y, _ = digits()
    grid = tuple(1e-4 * 10 ** (j / 2) for j in range(9))
    return Task(
        "digits MLP",
        lambda seed: seeded(lambda: mlp((64, 64, 64, 10)), seed),
        _sgd,
        (x[:1400], y[:1400]),
        (x[1400:], y[1400:]),
        32,
        1000,
        grid,
    )


def fashion_task() -> Task:
    x, y, _ = images(8000, side=7)
    grid = tuple(3e-4 * 10 ** (j / 2) for j in range(9))
    return Task(
        "Fashion-MNIST conv", lambda seed: seeded(PreActivation, seed), _sgd, (x[:4000], y[:4000]), (x[4000:], y[4000:]), 64, 1000, grid
    )


def text_task() -> Task:
    x, y, _ = text(6000, 32, seed=1)
    grid = tuple(1e-5 * 10 ** (j / 2) for j in range(9))
    make = lambda seed: seeded(lambda: GPT(time=32, width=48, layers=1, heads=4), seed)  # noqa: E731
    return Task("char transformer", make, _adamw, (x[:4000], y[:4000]), (x[4000:], y[4000:]), 16, 1000, grid)


TASKS: dict[str, Callable[[], Task]] = {"digits": digits_task, "fashion": fashion_task, "text": text_task}


@cache
def task_of(name: str) -> Task:
    """Made once a process."""
    return TASKS[name]()


def baseline(task: Task, rate: float, schedule: str, seed: int) -> tuple[float, float]:
    """(training, test) loss of a run under a schedule; infinite where it diverged."""
    model = task.make(seed)
    optimizer = task.optimizer(model.parameters(), rate)
    for step, (x, y) in zip(range(task.steps), task.batches(seed), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = rate * SCHEDULES[schedule](step / task.steps)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        if not math.isfinite(float(loss.detach())):
            return math.inf, math.inf
        loss.backward()
        optimizer.step()
    return task.losses(model)


def learn(
    task: Task,
    seed: int,
    *,
    lr: float = 1e-3,
    steps: int | None = None,
    rollback: bool = True,
    change: Callable[[sk.CurvatureLearner], object] | None = None,
    **settings: Any,
) -> Row:
    """One run with the learner, with what its measurements cost in gradients of a batch.

    Args:
        task: what is trained.
        seed: of the network and the order of the batches.
        lr: given to the optimizer, without effect.
        steps: of the whole run; the task's without.
        rollback: whether the learner may go back to an earlier point.
        change: done to the learner before training.
        settings: of the learner; the decay "schedule-free" is a constant rate of SGDScheduleFree.
    """
    steps = steps or task.steps
    model = task.make(seed)
    optimizer = task.optimizer(model.parameters(), lr)
    free = settings.get("decay") == "schedule-free"
    if free:
        from schedulefree import SGDScheduleFree

        optimizer = SGDScheduleFree(model.parameters(), lr=lr, momentum=0.9)
        optimizer.train()
        settings["decay"] = "constant"
    learner = sk.CurvatureLearner(optimizer, model=model, loss=F.cross_entropy, total_steps=steps, **settings)
    if not rollback:
        learner._rollbacks = 10**6
    if change is not None:
        change(learner)
    losses, began = [], time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sk.SharpkitWarning)
        for _, batch in zip(range(steps), task.batches(seed), strict=False):
            losses.append(train_step(model, optimizer, learner, batch))
    if free:
        optimizer.eval()  # type: ignore[attr-defined]  # from here on the parameters are the average, and so must the batch norms be
        update_bn((x for x, _ in itertools.islice(task.batches(seed), 50)), model)
    training, test = task.losses(model)
    return {"train": training, "test": test, "steps": steps, "seconds": time.perf_counter() - began, **summary(learner, losses)}


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, learner: sk.CurvatureLearner, batch: tuple[Tensor, Tensor]) -> float:
    """One step of the optimizer and of the learner; the loss before it."""
    optimizer.zero_grad()
    loss = F.cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    optimizer.step()
    learner.step(batch, loss=loss)
    return float(loss.detach())


def summary(learner: sk.CurvatureLearner, losses: list[float]) -> Row:
    """What a run settled at, what its measurements cost, and whether it was lost on the way."""
    products = sum(d.num_matvecs for d in learner.history)
    measured = sum(d.num_matvecs > 0 for d in learner.history)
    return {
        "lr": learner.lr,
        "last_momentum": learner.history[-1].momentum,
        "measurements": measured,
        "products": products,
        "cost": GRAPH * measured + PRODUCT * products,
        "rollbacks": sum("back to" in d.reason or "no point to go" in d.reason for d in learner.history),
        "not_measured": sum("not measured" in d.reason for d in learner.history),
        "highest_loss": max(losses) if all(map(math.isfinite, losses)) else math.inf,
        "first_loss": losses[0],
        "last_loss": sum(losses[-16:]) / 16,
    }


# -- the driver -----------------------------------------------------------------------------------------------------------
def key_of(row: Row, names: tuple[str, ...]) -> str:
    """What tells a run from the others."""
    return json.dumps(rounded({name: row.get(name) for name in names}))


def results_path(name: str, *, quick: bool) -> Path:
    """Where the rows of an experiment are kept."""
    folder = Path(tempfile.gettempdir()) / "sharpkit-experiments" if quick else HERE / "results"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}.jsonl"


def figure_path(name: str, *, quick: bool) -> Path:
    """Where its figure goes."""
    return results_path(name, quick=True).with_suffix(".png") if quick else HERE.parent / "figures" / f"{name}.png"


def arguments(description: str | None) -> argparse.Namespace:
    """The command line all of them share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a few short runs, into a temporary folder")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--figure-only", action="store_true", help="draw anew from the results there are")
    return parser.parse_args()


def collect(name: str, evaluate: Callable[[Row], Row], jobs: list[Row], *, keys: tuple[str, ...], options: argparse.Namespace) -> list[Row]:
    """The rows of all jobs; those in the results file already are kept, new ones are written as they come.

    Args:
        name: of the experiment.
        evaluate: job -> what was found; a function of a module.
        jobs: what to run.
        keys: entries of a job that tell it from the others.
        options: of the command line.
    """
    path = results_path(name, quick=options.quick)
    rows = read_rows(path) if path.exists() else []
    known = {key_of(row, keys) for row in rows}
    missing = [job for job in jobs if key_of(job, keys) not in known]
    if missing and not options.figure_only:
        with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn"), _one_thread) as pool:
            futures = {pool.submit(evaluate, job): job for job in missing}
            for future in as_completed(futures):
                rows.append(rounded({**futures[future], **future.result()}))
                _write(path, name, rows, options)
    return rows


def run_and_draw(
    name: str,
    description: str | None,
    *,
    evaluate: Callable[[Row], Row],
    jobs: Callable[[bool], list[Row]],
    keys: tuple[str, ...],
    table: Callable[[list[Row]], list[str]],
    draw: Callable[[list[Row], Path], None],
) -> None:
    """An experiment's command: what is missing is run, the table printed, the figure drawn."""
    options = arguments(description)
    rows = collect(name, evaluate, jobs(options.quick), keys=keys, options=options)
    print("\n".join(table(rows)))
    draw(rows, figure_path(name, quick=options.quick))


def _one_thread() -> None:
    torch.set_num_threads(1)


def _write(path: Path, name: str, rows: list[Row], options: argparse.Namespace) -> None:
    head = circumstances(name, quick=options.quick, seconds=sum(row.get("seconds", 0.0) for row in rows))
    head["torch_threads"] = 1
    path.write_text("".join(json.dumps(rounded(row)) + "\n" for row in [head, *rows]))
