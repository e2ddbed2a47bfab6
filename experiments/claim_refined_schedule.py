"""Schedules refined from a run's gradient norms against linear, cosine and WSD, each at its own best peak rate, on two tasks.

    python -m experiments.claim_refined_schedule    # results/claim_refined_schedule.jsonl, figures/claim_refined_schedule.png

The claim is that of Defazio, Cutkosky, Mehta and Mishchenko (2023), arXiv 2310.07831: linear decay is the schedule to beat, and one refined
from a run's gradient norms, w_t sum_{p > t} w_p with w_t = G_t^-2 (SGD) or 1 / G_t (Adam, l1 norms), is as good or better, and comes with
warm-up and annealing of its own. Norms are those of a linear run at its best peak, on a seed of its own; peaks are chosen on two others.
The refined schedule is run as it is, and after the same warm-up as the others.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

import sharpkit as sk
from experiments._common import Row, interval, run_as_script
from experiments._learner_tasks import Task, task_of
from sharpkit import laws

SEEDS, TUNING_SEEDS, NORM_SEED = (0, 1, 2, 3, 4), (100, 101), 200
GRIDS = {"fashion": (0.1, 0.2, 0.4, 0.8), "text": (0.0025, 0.005, 0.01, 0.02, 0.04)}
POWERS = {"fashion": 2, "text": 1}  # of the l2 norms of SGD, of the l1 norms of AdamW
FIXED: dict[str, Callable[[float], float]] = {"linear": laws.linear, "cosine": laws.cosine, "WSD": laws.wsd(0.2, shape="linear")}
REFINED = ("refined", "refined + warm-up")
WARMUP = 0.05  # of the run, for all but "refined"


def trained(task: Task, schedule: Callable[[float], float], peak: float, seed: int, *, steps: int, warmup: int, power: int) -> Row:
    """Losses at the end, and the gradient norm of every step."""
    model = task.make(seed)
    optimizer = task.optimizer(model.parameters(), peak)
    rates = laws.scheduler(optimizer, schedule, total_steps=steps, warmup=warmup)
    norms = []
    for _, (x, y) in zip(range(steps), task.batches(seed), strict=False):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        if not math.isfinite(float(loss.detach())):
            return {"train": math.inf, "test": math.inf, "norms": norms}
        loss.backward()
        parts = torch.stack([p.grad.norm(p=power) for p in model.parameters() if p.grad is not None])
        norms.append(float(parts.norm(p=power)))
        optimizer.step()
        rates.step()
    train, test = task.losses(model)
    return {"train": train, "test": test, "norms": norms}


def measure(quick: bool) -> list[Row]:
    """The grid's rows, the shape of each refined schedule, one row for each schedule and seed, and a summary."""
    torch.set_num_threads(1)
    return [row for key in GRIDS for row in rows_of(key, quick=quick)]


def rows_of(key: str, *, quick: bool) -> list[Row]:
    """All of one task."""
    task, grid = task_of(key), GRIDS[key][: 2 if quick else None]
    steps = 40 if quick else task.steps
    rows: list[Row] = []

    def run(name: str, schedule: Callable[[float], float], peak: float, seed: int) -> Row:
        warmup = 0 if name == "refined" else round(WARMUP * steps)
        return trained(task, schedule, peak, seed, steps=steps, warmup=warmup, power=POWERS[key])

    def best_peak(name: str, schedule: Callable[[float], float]) -> float:
        means = {}
        for peak in grid:
            means[peak] = float(np.mean([run(name, schedule, peak, seed)["train"] for seed in TUNING_SEEDS[: 1 if quick else None]]))
            rows.append({"task": key, "schedule": name, "grid": peak, "train": means[peak]})
        return min(means, key=means.__getitem__)

    peaks = {name: best_peak(name, schedule) for name, schedule in FIXED.items()}
    norms = run("linear", laws.linear, peaks["linear"], NORM_SEED)["norms"]
    refined = sk.refined_schedule(norms, power=POWERS[key])
    constant = sk.refined_schedule([1.0] * len(norms), power=POWERS[key])
    shares = np.linspace(0, 1, 101).tolist()
    shape = {"refined": [refined(z) for z in shares], "constant": [constant(z) for z in shares]}
    rows.append({"task": key, "norms": norms[:: max(1, steps // 200)], **shape})
    schedules = {**FIXED, **dict.fromkeys(REFINED, refined)}
    peaks |= {name: best_peak(name, refined) for name in REFINED}
    for name, seed in itertools.product(schedules, SEEDS[: 2 if quick else None]):
        found = run(name, schedules[name], peaks[name], seed)
        rows.append({"task": key, "schedule": name, "seed": seed, "peak": peaks[name], "train": found["train"], "test": found["test"]})
    return [*rows, *summary(key, rows)]


def summary(key: str, rows: list[Row]) -> list[Row]:
    """Means over seeds with 95 % intervals, and the mean ratio to the linear decay on the same seed with its interval."""
    runs = [row for row in rows if "seed" in row]
    linear = {row["seed"]: row for row in runs if row["schedule"] == "linear"}
    found = []
    for name in (*FIXED, *REFINED):
        own, row = [one for one in runs if one["schedule"] == name], {"task": key, "summary": name}
        row["peak"] = own[0]["peak"]
        for what in ("train", "test"):
            row[what], row[f"{what}_half"] = interval([one[what] for one in own])
            row[f"{what}_ratio"], row[f"{what}_ratio_half"] = interval([one[what] / linear[one["seed"]][what] for one in own])
        found.append(row)
    return found


def draw(rows: list[Row], canvas: Any) -> None:
    """Norms and the schedule made of them (top), final losses (bottom)."""
    canvas.set_size_inches(9, 6)
    axes = canvas.subplots(2, 2)
    for (upper, lower), key in zip(axes.T, GRIDS, strict=True):
        (shape,) = (row for row in rows if row["task"] == key and "norms" in row)
        shares = np.linspace(0, 1, len(shape["refined"]))
        upper.plot(shares, shape["refined"], color="#d1662b", label="refined")
        upper.plot(shares, shape["constant"], color="#2563a8", linestyle="--", label="of constant norms: linear")
        other = upper.twinx()
        norms = np.array(shape["norms"])
        other.plot(np.linspace(0, 1, len(norms)), norms / np.median(norms), color="#bbbbbb", lw=0.7, zorder=0)
        other.set(yscale="log", ylabel="gradient norm over its median")
        upper.set_zorder(other.get_zorder() + 1)
        upper.patch.set_visible(False)
        upper.set(title=task_of(key).name, xlabel="share of the run", ylabel="rate over its peak")
        ends = [row for row in rows if row["task"] == key and "summary" in row]
        for place, row in enumerate(ends):
            own = [one["train"] for one in rows if one["task"] == key and "seed" in one and one["schedule"] == row["summary"]]
            lower.plot([place] * len(own), own, "o", ms=4, color="#2563a8", alpha=0.4)
            lower.errorbar(place, row["train"], yerr=row["train_half"], fmt="_", ms=12, color="#d1662b", capsize=3)
        names = [row["summary"].replace(" + ", "\n+ ") for row in ends]
        lower.set_xticks(range(len(ends)), [f"{name}\npeak {row['peak']:g}" for name, row in zip(names, ends, strict=True)], fontsize=8)
        lower.set_ylabel("training loss at the end")
    axes[0, 0].legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    run_as_script("claim_refined_schedule", measure, draw)
