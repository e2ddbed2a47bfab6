"""Ground truth: the largest learning rate at which training from scratch works, by bisection, for each batch size; no part of sharpkit.

A run is plain torch: 300 steps, every sample once an epoch. A rate is stable if its run makes at least half of the best improvement of the
full-data loss that any run of the same network, optimizer, batch size and seed made. The improvement counts from what needs no training:
the initial loss, or that of the best constant output (the entropy of the label frequencies) where that is lower. Divergence and dead
networks fail that. Rates lie on a grid of factor 2^(1/4).
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from experiments._batch_models import OPTIMIZERS, PROBLEMS, SIZES, Problem
from experiments._common import HERE, circumstances, rounded

NAME = "batch_sweep"
STEPS = 300
_COARSE = 4  # grid points to a factor of 2
_MAX_RUNS = 18
_FIRST_GUESS = {"SGD": -3.0, "momentum": -6.0, "Adam": -6.0}  # log2 of the rate at the smallest batch size


def batches(problem: Problem, batch_size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Every sample once an epoch, the last short batch left out."""
    while True:
        order = torch.randperm(problem.size, generator=generator)
        for i in range(problem.size // batch_size):
            chosen = order[i * batch_size : (i + 1) * batch_size]
            yield problem.x[chosen], problem.y[chosen]


def full_loss(problem: Problem, model: torch.nn.Module) -> float:
    with torch.no_grad():
        return float(F.cross_entropy(model(problem.x), problem.y))


def label_entropy(problem: Problem) -> float:
    """Loss of the best output that does not look at the input: nats of the label frequencies."""
    shares = torch.bincount(problem.y.flatten()).double() / problem.y.numel()
    return float(-torch.xlogy(shares, shares).sum())


def train(problem: Problem, optimizer: str, *, rate: float, batch_size: int, seed: int, steps: int) -> tuple[float, int]:
    """(full-data loss after the run, single-sample gradients spent); inf where it blew up, which ends the run."""
    model = problem.make(seed)
    stepper = OPTIMIZERS[optimizer](model.parameters(), rate)
    first, spent = math.nan, 0
    for step, (x, y) in zip(range(steps), batches(problem, batch_size, torch.Generator().manual_seed(seed)), strict=False):
        stepper.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        stepper.step()
        spent += batch_size
        now = float(loss.detach())
        first = now if step == 0 else first
        if not now < 1e3 * first:
            return math.inf, spent
    end = full_loss(problem, model)
    return (end if math.isfinite(end) else math.inf), spent


class Search:
    """The largest stable rate 2^(j/4) of one setting; every run is made once and remembered."""

    def __init__(self, problem: Problem, optimizer: str, *, batch_size: int, seed: int, steps: int) -> None:
        self.problem, self.optimizer, self.batch_size, self.seed, self.steps = problem, optimizer, batch_size, seed, steps
        self.initial, self.constant = full_loss(problem, problem.make(seed)), label_entropy(problem)
        self.start = min(self.initial, self.constant)
        self.losses: dict[int, float] = {}
        self.spent = 0

    def at(self, j: int) -> float:
        if j not in self.losses:
            self.losses[j], spent = train(
                self.problem, self.optimizer, rate=2 ** (j / 4), batch_size=self.batch_size, seed=self.seed, steps=self.steps
            )
            self.spent += spent
        return self.losses[j]

    @property
    def best(self) -> int:
        return min(self.losses, key=lambda j: (self.losses[j], j))

    def stable(self, j: int) -> bool:
        loss, best = self.at(j), self.losses[self.best]
        return best < self.start and self.start - loss >= 0.5 * (self.start - best)

    def largest(self, guess: int) -> int | None:
        """None where the bound on runs was met before the answer."""
        self.at(guess)
        while self.best == min(self.losses) or not self.losses[self.best] < self.start:  # the best must not be the lowest tried
            if len(self.losses) >= _MAX_RUNS:
                return None
            self.at(min(self.losses) - _COARSE)
        low = self.best
        high = low + _COARSE
        while self.stable(high):
            if len(self.losses) >= _MAX_RUNS:
                return None
            low, high = high, high + _COARSE
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.stable(middle) else (low, middle)
        return low


def sweep(problem: Problem, sizes: list[int], seeds: int, steps: int, path: Path, optimizers: list[str]) -> None:
    """One line per setting, appended as found; settings already there are skipped."""
    done = {}
    for line in path.read_text().splitlines()[1:]:
        row = json.loads(line)
        done[row["model"], row["optimizer"], row["batch_size"], row["seed"]] = row
    for optimizer in optimizers:
        known: dict[int, float] = {}
        for size in sizes:
            for seed in range(seeds):
                key = (problem.name, optimizer, size, seed)
                if key not in done:
                    near = min(known, key=lambda b: abs(math.log(b / size))) if known else None
                    guess = (
                        _FIRST_GUESS[optimizer] * 4 if near is None else known[near] + (0 if near == size else 2 * math.log2(size / near))
                    )
                    began = time.perf_counter()
                    search = Search(problem, optimizer, batch_size=size, seed=seed, steps=steps)
                    found = search.largest(round(guess))
                    done[key] = {
                        "model": problem.name,
                        "optimizer": optimizer,
                        "batch_size": size,
                        "seed": seed,
                        "rate": None if found is None else 2 ** (found / 4),
                        "initial": search.initial,
                        "constant": search.constant,
                        "runs": len(search.losses),
                        "gradients": search.spent / problem.size,
                        "tried": [[2 ** (j / 4), loss if math.isfinite(loss) else None] for j, loss in sorted(search.losses.items())],
                        "num_samples": problem.size,
                        "steps": steps,
                        "seconds": time.perf_counter() - began,
                    }
                    with path.open("a") as stream:
                        stream.write(json.dumps(rounded(done[key])) + "\n")
                    print(*key, done[key]["rate"], done[key]["runs"], f"{done[key]['seconds']:.0f} s", flush=True)
                if done[key]["rate"]:
                    known[size] = 4 * math.log2(done[key]["rate"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="one seed, two batch sizes, 40 steps, into a temporary folder")
    parser.add_argument("--models", nargs="+", default=list(PROBLEMS))
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS))
    parser.add_argument("--sizes", nargs="+", type=int, default=[*SIZES, 0], help="0 stands for all the data")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = (Path(tempfile.gettempdir()) / "sharpkit-experiments" if options.quick else HERE / "results") / f"{NAME}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.write_text(json.dumps(circumstances(NAME, quick=options.quick, seconds=0.0)) + "\n")
    for name in options.models:
        problem = PROBLEMS[name]()
        sizes = [16, 64] if options.quick else sorted({size or problem.size for size in options.sizes})
        sweep(problem, sizes, 1 if options.quick else options.seeds, 40 if options.quick else STEPS, path, options.optimizers)


if __name__ == "__main__":
    main()
