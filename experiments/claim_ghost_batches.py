"""Large batches with ghost batch norm, the square-root rule and as many steps as small ones, against plain large batches.

    python -m experiments.claim_ghost_batches       # results/claim_ghost_batches.jsonl, figures/claim_ghost_batches.png

The claim is that of Hoffer, Hubara and Soudry (2017), arXiv 1705.08741: large batches generalise worse at equal epochs; a rate that grows
as the square root of the batch and statistics of small "ghost" batches reduce the gap, and training for as many steps closes it. A small
conv net with batch norm, SGD with momentum 0.9 and a cosine decay, Fashion-MNIST averaged to 14 x 14. Small batches, large ones and large
ones with ghosts are trained at each rate of a grid, so that rules can be told from the best rate; the small batch's rate, from which the
rules start, is the best on validation images. Without warm-up and without clipping.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sharpkit as sk
from experiments._common import Row, interval, run_as_script
from experiments._models import conv_net, images, seeded
from sharpkit import laws

TRAIN, VALIDATION, TEST = 2048, 2000, 6000
SMALL, LARGE, EPOCHS = 32, 512, 15  # 16 times the batch: the rules multiply the rate by 4 and by 16
RATES = tuple(0.00625 * 2**j for j in range(9))  # up to 1.6; small batches up to 0.2
SEEDS = (0, 1, 2, 3, 4)
KINDS = ("small", "large", "large, ghosts")
AS_MANY = ("large, as many steps", "large, ghosts, as many steps")  # at the square-root rule's rate


class GhostBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that in training takes the statistics of each 32 samples by themselves; running ones average over them."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or len(x) <= SMALL:
            return super().forward(x)
        ghosts, shape = len(x) // SMALL, x.shape
        assert self.running_mean is not None and self.running_var is not None
        mean, variance = self.running_mean.repeat(ghosts), self.running_var.repeat(ghosts)
        folded = x.view(ghosts, SMALL, *shape[1:]).transpose(0, 1).reshape(SMALL, ghosts * shape[1], *shape[2:])
        out = F.batch_norm(
            folded, mean, variance, self.weight.repeat(ghosts), self.bias.repeat(ghosts), True, self.momentum or 0.1, self.eps
        )
        self.running_mean.copy_(mean.view(ghosts, -1).mean(dim=0))
        self.running_var.copy_(variance.view(ghosts, -1).mean(dim=0))
        return out.view(SMALL, ghosts, *shape[1:]).transpose(0, 1).reshape(shape)


def network(seed: int, *, ghosts: bool) -> nn.Module:
    """Two convolutions with batch norm of either kind, the same parameters."""
    model = seeded(lambda: conv_net(8, side=14), seed)
    if ghosts:
        for name, module in list(model.named_children()):
            if isinstance(module, nn.BatchNorm2d):
                setattr(model, name, GhostBatchNorm2d(module.num_features))
    return model


def batches(x: Tensor, y: Tensor, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Every sample once an epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for chosen in torch.randperm(len(x), generator=generator).split(size):
            yield x[chosen], y[chosen]


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """In eval mode."""
    model.eval()
    with torch.no_grad():
        right = sum(int((model(a).argmax(dim=1) == b).sum()) for a, b in zip(x.split(1000), y.split(1000), strict=True))
    model.train()
    return right / len(x)


def trained(data: tuple[Tensor, Tensor], *, rate: float, batch_size: int, ghosts: bool, steps: int, seed: int) -> tuple[nn.Module, float]:
    """The network after all steps, and its last loss."""
    model = network(seed, ghosts=ghosts)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    schedule = laws.scheduler(optimizer, laws.cosine, total_steps=steps)
    loss = torch.tensor(math.nan)
    for _, (inputs, targets) in zip(range(steps), batches(*data, batch_size, seed), strict=False):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        schedule.step()
    return model, float(loss.detach())


def measure(quick: bool) -> list[Row]:
    """One row for each kind of run, rate and seed, and a summary of the rules."""
    torch.set_num_threads(1)
    seeds, epochs = (SEEDS[:2], 1) if quick else (SEEDS, EPOCHS)
    rates = {kind: [rate for rate in RATES if kind != "small" or rate <= 0.2] for kind in KINDS}
    if quick:
        rates = {kind: [0.05 if kind == "small" else 0.2] for kind in KINDS}
    rows = [run(kind, rate, seed, epochs=epochs) for kind in KINDS for rate in rates[kind] for seed in seeds]
    base = best_rate(rows, "small")
    rows += [run(kind, rule_rates(base)["square root"], seed, epochs=epochs) for kind in AS_MANY for seed in seeds]
    return [*rows, *summary(rows, base)]


def run(kind: str, rate: float, seed: int, *, epochs: int) -> Row:
    """Accuracies and lambda_max on 1024 training images at the end of a run."""
    data, validation, test = splits()
    size = SMALL if kind == "small" else LARGE
    steps, began = epochs * TRAIN // (SMALL if kind in AS_MANY else size), time.perf_counter()
    model, last = trained(data, rate=rate, batch_size=size, ghosts="ghosts" in kind, steps=steps, seed=seed)
    row = {"kind": kind, "rate": rate, "seed": seed, "steps": steps, "last_loss": last, "train": accuracy(model, *data)}
    row |= {"validation": accuracy(model, *validation), "test": accuracy(model, *test), "seconds": time.perf_counter() - began}
    sharpness = math.nan
    if math.isfinite(last):
        objective = sk.Objective(model.eval(), (data[0][:1024], data[1][:1024]), loss=F.cross_entropy)
        sharpness = float(sk.eigenpairs(sk.HessianOperator(objective), k=1, tol=0.01).values[0])
    return {**row, "lambda_max": sharpness}


@cache
def splits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training, validation and test images with their classes."""
    x, y, _ = images(TRAIN + VALIDATION + TEST, side=14)
    first, second, third = zip(x.split([TRAIN, VALIDATION, TEST]), y.split([TRAIN, VALIDATION, TEST]), strict=True)
    return first, second, third


def rule_rates(base: float) -> dict[str, float]:
    """What the rules say for the large batch."""
    return {"same rate": base, "square root": base * math.sqrt(LARGE / SMALL), "linear": base * LARGE / SMALL}


def best_rate(rows: list[Row], kind: str) -> float:
    """Of the highest mean validation accuracy."""
    own = [row for row in rows if row["kind"] == kind]
    return max({row["rate"] for row in own}, key=lambda rate: float(np.mean([row["validation"] for row in own if row["rate"] == rate])))


def summary(rows: list[Row], base: float) -> list[Row]:
    """Mean test accuracy and its difference to the small batch's on the same seed, with 95 % intervals."""
    chosen = {"small, best": ("small", base)}
    for kind in KINDS[1:]:
        chosen |= {f"{kind}, {rule}": (kind, rate) for rule, rate in rule_rates(base).items()}
        chosen[f"{kind}, best"] = (kind, best_rate(rows, kind))
    chosen |= {f"{kind}, square root": (kind, rule_rates(base)["square root"]) for kind in AS_MANY}
    small = {row["seed"]: row["test"] for row in rows if (row["kind"], row["rate"]) == ("small", base)}
    found = []
    for name, (kind, rate) in chosen.items():
        own = [row for row in rows if row["kind"] == kind and math.isclose(row["rate"], rate)]
        if len(own) < 2:
            continue  # beyond the grid
        row = {"summary": name, "rate": rate}
        row["test"], row["test_half"] = interval([one["test"] for one in own])
        row["gap"], row["gap_half"] = interval([one["test"] - small[one["seed"]] for one in own])
        row |= {"train": float(np.mean([one["train"] for one in own])), "lambda_max": float(np.median([one["lambda_max"] for one in own]))}
        found.append(row)
    return found


def draw(rows: list[Row], canvas: Any) -> None:
    """Test accuracy by rate, and of the rules with intervals."""
    canvas.set_size_inches(10, 4)
    by_rate, by_rule = canvas.subplots(1, 2)
    for kind, colour in zip(KINDS, ("#4b8b3b", "#2563a8", "#d1662b"), strict=True):
        rates = sorted({row["rate"] for row in rows if row.get("kind") == kind})
        tests = [[100 * row["test"] for row in rows if row.get("kind") == kind and row["rate"] == rate] for rate in rates]
        by_rate.plot(rates, [np.mean(t) for t in tests], "o-", ms=3, color=colour, label=kind)
        by_rate.fill_between(rates, [min(t) for t in tests], [max(t) for t in tests], color=colour, alpha=0.15, linewidth=0)
    by_rate.set(xscale="log", xlabel="rate", ylabel="test accuracy (%)", ylim=(70, 85))
    by_rate.legend(frameon=False, fontsize=8)
    shown = [row for row in rows if "summary" in row][::-1]
    for height, row in enumerate(shown):
        by_rule.errorbar(100 * row["gap"], height, xerr=100 * row["gap_half"], fmt="o", ms=4, color="#2563a8", capsize=3)
    by_rule.axvline(0, color="#888888", linestyle=":")
    by_rule.set_yticks(range(len(shown)), [row["summary"] for row in shown], fontsize=8)
    by_rule.set(xlabel="test accuracy less the small batch's (points)", xlim=(-12, 3))


if __name__ == "__main__":
    run_as_script("claim_ghost_batches", measure, draw)
