"""Rates by layer against one rate for all, both tuned: digits with SGD and a char transformer with AdamW.

    python -m experiments.layerwise_rates          # results/layerwise_rates.jsonl, figures/layerwise_rates.png

Ratios are measured on 256 samples after 20 steps at a quarter of the grid's second rate (an adaptive optimizer must have stepped), and
held from there on. Each rule's base rate is the best of a grid, a factor of 2 apart, by the mean training loss of two seeds, then run with
five; a best at the end of the grid moves it on. Cosine to 0.
"""

from __future__ import annotations

import copy
import itertools
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

import sharpkit as sk
from experiments._common import Row, run_as_script, searched
from experiments._learner_tasks import task_of
from sharpkit.layerwise import RULES

TASKS = {"digits": ("SGD", 500, (0.04, 0.08, 0.16)), "text": ("AdamW", 300, (0.005, 0.01, 0.02))}
SEEDS, SEARCHED, SAMPLES, WARM = (0, 1, 2, 3, 4), (0, 1), 256, 20
_REACH = 5  # factors of 2 that a grid may move on


@cache
def warm_start(name: str, seed: int) -> tuple[Any, dict[str, dict[str, float]]]:
    """The network after the first steps, and each rule's ratios there."""
    task = task_of(name)
    model, lr = task.make(seed), TASKS[name][2][1] / 4
    optimizer = task.optimizer(model.parameters(), lr)
    _run(model, optimizer, task.batches(seed), WARM, decay=False)
    x, y = task.train
    rates = sk.layerwise.layer_rates(sk.Objective(model, (x[:SAMPLES], y[:SAMPLES]), loss=F.cross_entropy), optimizer, tol=0.03)
    groups = {rule: [group["lr"] for group in rates.param_groups(model, lr=1.0, rule=rule)] for rule in RULES}
    members = rates.parameters
    return model, {rule: {n: r for names, r in zip(members, own, strict=True) for n in names} for rule, own in groups.items()}


def trained(name: str, rule: str, lr: float, seed: int, steps: int) -> tuple[float, float]:
    """(training, test) loss; infinite where it diverged."""
    task, (start, ratios) = task_of(name), warm_start(name, seed)
    model, batches = copy.deepcopy(start), itertools.islice(task.batches(seed), WARM, None)
    own = ratios.get(rule, {})
    groups = [{"params": [p], "lr": lr * own.get(n, 1.0)} for n, p in model.named_parameters()]
    if _run(model, task.optimizer(groups, lr), batches, steps - WARM, decay=True):
        return task.losses(model)
    return float("inf"), float("inf")


def _run(model: Any, optimizer: torch.optim.Optimizer, batches: Any, steps: int, *, decay: bool) -> bool:
    schedule = sk.laws.scheduler(optimizer, sk.laws.cosine if decay else lambda z: 1.0, total_steps=steps)
    for _ in range(steps):
        x, y = next(batches)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        if not torch.isfinite(loss):
            return False
        loss.backward()
        optimizer.step()
        schedule.step()
    return True


def measure(quick: bool) -> list[Row]:
    """One row for each task, rule and seed at the best base rate, and one for each rate searched."""
    torch.set_num_threads(1)
    rows: list[Row] = []
    for name, (optimizer, steps, grid) in TASKS.items():
        length = 60 if quick else steps
        for rule in ("one rate", *RULES):

            def mean(lr: float, name: str = name, rule: str = rule, length: int = length) -> float:
                return float(np.mean([trained(name, rule, lr, seed, length)[0] for seed in SEARCHED[: 1 if quick else None]]))

            losses = searched(mean, grid[:1] if quick else grid, reach=0 if quick else _REACH)
            best = min(losses, key=losses.__getitem__)
            head = {"task": name, "optimizer": optimizer, "rule": rule, "lr": best, "searched": sorted(losses.items())}
            for seed in SEEDS[: 1 if quick else None]:
                train, test = trained(name, rule, best, seed, length)
                rows.append({**head, "seed": seed, "train": train, "test": test})
    return rows


def draw(rows: list[Row], canvas: Any) -> None:
    """Training losses of all seeds by rule, and their means."""
    axes = canvas.subplots(1, len(TASKS))
    for ax, name in zip(axes, TASKS, strict=True):
        own = [row for row in rows if row["task"] == name]
        rules = list(dict.fromkeys(row["rule"] for row in own))
        for at, rule in enumerate(rules):
            losses = [row["train"] for row in own if row["rule"] == rule]
            ax.plot([at] * len(losses), losses, "o", color="#2563a8", alpha=0.5, markersize=4)
            ax.plot([at - 0.25, at + 0.25], [np.mean(losses)] * 2, color="#d1662b")
        ax.set_xticks(range(len(rules)), labels=rules, rotation=30)
        ax.set(title=f"{name}, {own[0]['optimizer']}", ylabel="training loss at the end (nats)")


if __name__ == "__main__":
    run_as_script("layerwise_rates", measure, draw)
