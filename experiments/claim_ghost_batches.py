"""Large batches with ghost batch norm, the square-root rule and as many steps as small ones, against plain large batches.

    python -m experiments.claim_ghost_batches       # results/claim_ghost_batches.jsonl, figures/claim_ghost_batches.png

The claim is that of Hoffer, Hubara and Soudry (2017), arXiv 1705.08741: large batches generalise worse at equal epochs; a rate that grows
as the square root of the batch and statistics of small "ghost" batches reduce the gap, and training for as many steps closes it. A small
conv net with batch norm, SGD with momentum 0.9 and a cosine decay, Fashion-MNIST averaged to 14 x 14. The small batch's rate is the best of
a grid on validation images and a seed of its own; the large batch's rates follow by rule.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

import sharpkit as sk
from experiments._common import Row, run_as_script
from experiments._models import conv_net, images, seeded
from sharpkit import laws

TRAIN, VALIDATION, TEST = 2048, 2000, 6000
SMALL, LARGE, EPOCHS = 32, 512, 20
RATES = (0.01, 0.02, 0.05, 0.1, 0.2)
SEEDS, TUNING_SEED = (0, 1, 2, 3, 4), 100
# name: batch size, rate over the small batch's, ghost batches, as many steps as with the small batch
SETTINGS: dict[str, tuple[int, float, bool, bool]] = {
    "small": (SMALL, 1.0, False, False),
    "large, same rate": (LARGE, 1.0, False, False),
    "large, square root": (LARGE, math.sqrt(LARGE / SMALL), False, False),
    "large, linear": (LARGE, LARGE / SMALL, False, False),
    "large, square root, ghosts": (LARGE, math.sqrt(LARGE / SMALL), True, False),
    "large, linear, ghosts": (LARGE, LARGE / SMALL, True, False),
    "large, square root, as many steps": (LARGE, math.sqrt(LARGE / SMALL), False, True),
    "large, square root, ghosts, as many steps": (LARGE, math.sqrt(LARGE / SMALL), True, True),
}


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
    """The grid's rows, and one for each setting and seed."""
    torch.set_num_threads(1)
    x, y, _ = images(TRAIN + VALIDATION + TEST, side=14)
    data, (valid_x, test_x), (valid_y, test_y) = (
        (x[:TRAIN], y[:TRAIN]),
        x[TRAIN:].split([VALIDATION, TEST]),
        y[TRAIN:].split([VALIDATION, TEST]),
    )
    epochs = 1 if quick else EPOCHS
    rows = []
    for rate in RATES[2:3] if quick else RATES:
        model, _ = trained(data, rate=rate, batch_size=SMALL, ghosts=False, steps=epochs * TRAIN // SMALL, seed=TUNING_SEED)
        rows.append({"grid": rate, "validation": accuracy(model, valid_x, valid_y)})
    best = max(rows, key=lambda row: row["validation"])["grid"]
    for name, (size, factor, ghosts, as_many) in SETTINGS.items():
        steps = epochs * TRAIN // (SMALL if as_many and not quick else size)
        for seed in SEEDS[: 1 if quick else None]:
            began = time.perf_counter()
            model, last = trained(data, rate=factor * best, batch_size=size, ghosts=ghosts, steps=steps, seed=seed)
            row = {"setting": name, "seed": seed, "rate": factor * best, "steps": steps, "last_loss": last}
            row |= {"train": accuracy(model, *data), "test": accuracy(model, test_x, test_y), "seconds": time.perf_counter() - began}
            objective = sk.Objective(model.eval(), (x[:1024], y[:1024]), loss=F.cross_entropy)
            rows.append({**row, "lambda_max": float(sk.eigenpairs(sk.HessianOperator(objective), k=1, tol=0.01).values[0])})
    return [*rows, *summary(rows)]


def summary(rows: list[Row]) -> list[Row]:
    """Mean test accuracy of each setting, and its difference to the small batch's by seed, with 95 % intervals."""
    small, found = {row["seed"]: row["test"] for row in rows if row.get("setting") == "small"}, []
    for name in SETTINGS:
        own = [row for row in rows if row.get("setting") == name]
        tests, gaps = [row["test"] for row in own], [row["test"] - small[row["seed"]] for row in own]
        t = stats.t.ppf(0.975, len(own) - 1) / math.sqrt(len(own)) if len(own) > 1 else math.nan
        half = {key: t * float(np.std(values, ddof=1)) if len(own) > 1 else math.nan for key, values in (("test", tests), ("gap", gaps))}
        row = {
            "summary": name,
            "test": float(np.mean(tests)),
            "test_half": half["test"],
            "gap": float(np.mean(gaps)),
            "gap_half": half["gap"],
        }
        found.append(
            {**row, "train": float(np.mean([r["train"] for r in own])), "lambda_max": float(np.median([r["lambda_max"] for r in own]))}
        )
    return found


def draw(rows: list[Row], canvas: Any) -> None:
    """Test accuracies with intervals."""
    ax = canvas.subplots()
    shown = [row for row in rows if "summary" in row][::-1]
    for height, row in enumerate(shown):
        own = [100 * one["test"] for one in rows if one.get("setting") == row["summary"]]
        ax.plot(own, [height] * len(own), "o", ms=4, color="#2563a8", alpha=0.4)
        ax.errorbar(100 * row["test"], height, xerr=100 * row["test_half"], fmt="|", ms=12, color="#d1662b", capsize=3)
    ax.set_yticks(range(len(shown)), [row["summary"] for row in shown])
    ax.set(xlabel=f"test accuracy (%), batches of {SMALL} and {LARGE}")


if __name__ == "__main__":
    run_as_script("claim_ghost_batches", measure, draw)
