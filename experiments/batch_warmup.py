"""The batch-size warm-up that branching advises, against constant batch sizes over as many samples.

    python -m experiments.critical_batch      # first: the critical sizes
    python -m experiments.batch_warmup        # results/batch_warmup.jsonl, figures/batch_warmup.png

The plan follows from the critical sizes in results/critical_batch.jsonl, geometric means over initialisations. Rates go with the batch size
by the task's rule. Initialisations and orders of the data are other ones than there.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

import sharpkit as sk
from experiments._common import HERE, Row, read_rows, run_as_script
from experiments._learner_tasks import Task, task_of
from experiments.critical_batch import SETTINGS, TITLES, optimizer_of

SAMPLES, RULES, SEEDS = 16384, {"digits": "linear", "text": "sqrt"}, (10, 11, 12)


def plan_for(name: str, samples: int) -> sk.BatchSizeWarmup:
    """From the geometric mean of the critical size at each point."""
    rows = [row for row in read_rows(HERE / "results" / "critical_batch.jsonl") if row["task"] == name]
    critical = {seen: [row["critical"]["value"] for row in rows if row["seen"] == seen] for seen in {row["seen"] for row in rows}}
    means = {float(seen): math.exp(float(np.mean(np.log(values)))) for seen, values in sorted(critical.items())}
    size, rate = SETTINGS[name][:2]
    return sk.batch_size_warmup(means, batch_size=size, lr=rate, samples=samples, rule=RULES[name])


def trained(task: Task, stages: list[tuple[int, int, float]], samples: int, seed: int) -> tuple[float, float, int]:
    """(training, test) loss and steps of a run through (start, batch size, rate)."""
    model = task.make(seed)
    optimizer = optimizer_of(task, model, stages[0][2])
    order, seen, steps = torch.Generator().manual_seed(seed), 0, 0
    x, y = task.train
    waiting = torch.empty(0, dtype=torch.int64)
    while seen < samples:
        _, size, rate = [stage for stage in stages if stage[0] <= seen][-1]
        while len(waiting) < size:  # the same samples in the same order, whatever the batch size
            waiting = torch.cat([waiting, torch.randperm(len(x), generator=order)])
        chosen, waiting = waiting[:size], waiting[size:]
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        F.cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
        seen, steps = seen + size, steps + 1
    return *task.losses(model), steps


def measure(quick: bool) -> list[Row]:
    """One row for each task, way and seed."""
    torch.set_num_threads(1)
    samples, rows = (512 if quick else SAMPLES), []
    for name in RULES:
        task, plan = task_of(name), plan_for(name, samples)
        size, rate = SETTINGS[name][:2]
        last = max(plan.stages[-1].batch_size, 2 * size)
        ways = {"warm-up": [(stage.start, stage.batch_size, stage.lr) for stage in plan.stages]}
        for constant in (size, last, 4 * last):
            ways[f"B = {constant}"] = [(0, constant, float(sk.scale_learning_rate(rate, size, constant, rule=RULES[name])))]
        for way, stages in ways.items():
            for seed in SEEDS[: 1 if quick else None]:
                training, test, steps = trained(task, stages, samples, seed)
                rows.append({"task": name, "way": way, "seed": seed, "train": training, "test": test, "steps": steps, "stages": stages})
    return rows


def draw(rows: list[Row], canvas: Any) -> None:
    """Losses against steps."""
    for ax, name in zip(canvas.subplots(1, 2), RULES, strict=True):
        own = [row for row in rows if row["task"] == name]
        for way, colour in zip(dict.fromkeys(row["way"] for row in own), ("#3f9c6b", "#2563a8", "#d1662b", "#8b919b"), strict=False):
            some = [row for row in own if row["way"] == way]
            key = "train" if name == "digits" else "test"
            ax.plot([row["steps"] for row in some], [row[key] for row in some], "o", color=colour, markersize=5, label=way)
        ax.set(xscale="log", xlabel="steps", ylabel=f"{'training' if name == 'digits' else 'test'} loss (nats)", title=TITLES[name])
        ax.legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    run_as_script("batch_warmup", measure, draw)
