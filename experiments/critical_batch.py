"""The critical batch size by branching against the gradient noise scale, on two tasks at three points of training.

    python -m experiments.critical_batch          # results/critical_batch.jsonl, figures/critical_batch.png

An MLP on digits with plain SGD (linear rule) and a char transformer with AdamW (square-root rule), three initialisations each. After some
samples at a small batch, training branches into several batch sizes over equal numbers of samples, three orders of the data each. The loss
on the training samples decides for digits, on 500 held-out windows for text. At the same points both noise scales are measured on the
training samples, the one with curvature on 256 of them.
"""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

import sharpkit as sk
from experiments._common import Row, run_as_script
from experiments._learner_tasks import Task, task_of

# task -> base batch size, its rate, batch sizes, samples seen where runs branch, samples of a branch
SETTINGS: dict[str, tuple[int, float, tuple[int, ...], tuple[int, ...], int]] = {
    "digits": (8, 0.02, (2, 4, 8, 16, 32, 64, 128, 256), (512, 2048, 8192), 4096),
    "text": (8, 0.003, (4, 8, 16, 32, 64, 128), (512, 2048, 8192), 2048),
}
QUICK = {"digits": (8, 0.02, (8, 32, 128), (256, 512, 1024), 512), "text": (8, 0.003, (8, 32, 128), (256,), 256)}
SEEDS, ORDERS = (0, 1, 2), 3
HELD_OUT, CURVED, GROUPS = 500, 256, 32  # samples that judge, samples and groups of the noise scale with curvature


def optimizer_of(task: Task, model: torch.nn.Module, rate: float) -> torch.optim.Optimizer:
    """The task's own for text, plain SGD for digits: with momentum, a large batch's average reaches back over most of a branch."""
    return torch.optim.SGD(model.parameters(), lr=rate) if task.name.startswith("digits") else task.optimizer(model.parameters(), rate)


def checkpoints(task: Task, batch_size: int, rate: float, points: tuple[int, ...], seed: int) -> Any:
    """(samples seen, model, optimizer) at each point of one run at the base batch size."""
    model = task.make(seed)
    optimizer = optimizer_of(task, model, rate)
    seen, batches = 0, task.batches(seed, batch_size)
    for point in points:
        model.train()
        while seen < point:
            x, y = next(batches)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            seen += batch_size
        yield seen, model, optimizer


def measure(quick: bool) -> list[Row]:
    """One row for each task, initialisation and point."""
    torch.set_num_threads(1)
    rows = []
    for name, (batch_size, rate, sizes, points, samples) in (QUICK if quick else SETTINGS).items():
        task = task_of(name)
        for seed in SEEDS[: 1 if quick else None]:
            for seen, model, optimizer in checkpoints(task, batch_size, rate, points, seed):
                began = time.perf_counter()
                objective = sk.Objective(model, task.train, loss=F.cross_entropy)
                held = tuple(t[:HELD_OUT] for t in task.test) if name == "text" else None
                found = sk.branch_batch_sizes(
                    objective,
                    optimizer,
                    batch_size=batch_size,
                    lr=rate,
                    batch_sizes=sizes,
                    samples=samples,
                    validation=held,
                    seen=seen,
                    seeds=ORDERS,
                )
                took = time.perf_counter() - began
                row: Row = {
                    "task": name,
                    "seed": seed,
                    "seen": seen,
                    "initial": found.initial,
                    "batch_sizes": sizes,
                    "losses": found.losses,
                }
                row |= {"critical": found.critical.to_dict(), "largest": found.largest, "cost": found.cost, "seconds": took}
                for kind, (scale, cost) in scales(objective, task).items():
                    ratio = found.disagreement(scale)
                    row[kind] = {"value": scale.value, "stderr": scale.stderr, "ratio": ratio.to_dict(), "cost": cost}
                rows.append(row)
                shown = [f"{kind} {row[kind]['value']:.3g} +- {row[kind]['stderr']:.2g}" for kind in KINDS]
                print(name, seed, seen, found.critical, *shown, f"{took:.0f} s", flush=True)
    return rows


KINDS = ("simple", "curved")


def scales(objective: sk.Objective, task: Task) -> dict[str, tuple[sk.Estimate, int]]:
    """tr Sigma / |G|^2 and tr(H Sigma) / (G^T H G), each with its cost in gradients of single samples; a product counts two."""
    simple = sk.gradient_noise_scale(objective)
    part = sk.Objective(objective.model, tuple(t[:CURVED] for t in task.train), loss=F.cross_entropy)
    curved = sk.gradient_noise_scale(part, with_curvature=True, max_groups=GROUPS).curvature_noise_scale
    assert curved is not None
    return {"simple": (simple.noise_scale, simple.num_groups * simple.group_size), "curved": (curved, CURVED + 2 * GROUPS * CURVED)}


def draw(rows: list[Row], canvas: Any) -> None:
    """By task: losses above the best at each point, means over initialisations; the three batch sizes against samples seen."""
    axes = canvas.subplots(1, 4)
    for number, name in enumerate(dict.fromkeys(row["task"] for row in rows)):
        left, right = axes[2 * number : 2 * number + 2]
        own = [row for row in rows if row["task"] == name]
        points = sorted({row["seen"] for row in own})
        for seen, colour in zip(points, ("#9ec4e6", "#2563a8", "#0b2545"), strict=False):
            losses = np.array([row["losses"] for row in own if row["seen"] == seen], dtype=float)  # (initialisations, sizes, orders)
            means = losses.mean(axis=(0, 2))
            left.plot(own[0]["batch_sizes"], means - means.min(), "o-", color=colour, markersize=3, label=f"{seen} seen")
        left.axhline(0.01, color="#888", linestyle="--", linewidth=1, label="tolerance")
        left.set(xscale="log", xlabel="batch size", title=TITLES[name])
        left.set_yscale("symlog", linthresh=0.01)
        left.set_xticks(own[0]["batch_sizes"], labels=list(map(str, own[0]["batch_sizes"])), fontsize=7)
        left.minorticks_off()
        left.set_ylabel("loss above the best (nats)")
        left.legend(frameon=False, fontsize=7, loc="upper left" if name == "digits" else "upper center")
        left.set_ylim(-0.002, 2 if name == "digits" else 1)
        for label, colour, read in (
            ("branching", "#3f9c6b", lambda row: row["critical"]["value"]),
            ("tr Sigma / |G|^2", "#d1662b", lambda row: row["simple"]["value"]),
            ("tr H Sigma / G^T H G", "#8f6fc4", lambda row: row["curved"]["value"]),
        ):
            for seed in sorted({row["seed"] for row in own}):
                some = sorted((row["seen"], float(read(row))) for row in own if row["seed"] == seed)
                kept = [(seen, value) for seen, value in some if math.isfinite(value) and value > 0]
                right.plot(*zip(*kept, strict=True), "o-", color=colour, markersize=3, linewidth=1, label=label if not seed else None)
        right.set(xscale="log", xlabel="samples seen", ylabel="samples in a batch", title=TITLES[name])
        right.set_yscale("log", base=2)
        right.set_ylim(4, 1024)
        right.set_xticks(points, labels=list(map(str, points)))
        right.minorticks_off()
        right.legend(frameon=False, fontsize=7, loc="upper left")
    canvas.set_size_inches(13, 3.6)


TITLES = {"digits": "digits MLP, SGD", "text": "char transformer, AdamW"}


if __name__ == "__main__":
    run_as_script("critical_batch", measure, draw)
