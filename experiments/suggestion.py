"""The rate that ``suggest_learning_rate`` gives, against a grid of 13: test loss at the end of a run over the best of the grid's.

    python -m experiments.suggestion      # results/suggestion.jsonl, figures/suggestion.png

Ten tasks, three optimizers, 1000 steps under a cosine; rates a factor of 10^(1/3) apart, test losses averaged over a task's seeds. The
suggested rate is used as it is, not rounded to the grid. The rules of :mod:`sharpkit.learner.suggest` were chosen while looking at those
marked as seen.
"""

from __future__ import annotations

import math
from collections import defaultdict
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

import sharpkit as sk
from experiments import _heldout_tasks
from experiments._batch_models import PROBLEMS
from experiments._common import Row
from experiments._heldout_tasks import HeldOutTask
from experiments._learner_tasks import SCHEDULES, run_and_draw
from experiments._learner_tasks import task_of as learner_task
from experiments._models import images, mlp, seeded

NAME, STEPS, POINTS = "suggestion", 1000, 13
OPTIMIZERS = {
    "SGD": (torch.optim.SGD, {}, 3e-3),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}, 1e-3),
    "AdamW": (torch.optim.AdamW, {"weight_decay": 0.01}, 1e-5),
}  # class, settings, lowest rate of the grid
# Batch size, seeds, and whether a choice has seen it.
TASKS: dict[str, tuple[int, int, bool]] = {
    "wine": (32, 3, True),
    "breast cancer": (32, 3, True),
    "diabetes": (32, 3, True),
    "mnist1d": (64, 1, True),
    "fashion, batch norm": (64, 1, False),
    "digits MLP": (32, 3, True),
    "image MLP": (64, 3, True),
    "conv": (32, 1, False),
    "transformer": (32, 1, True),
    "char transformer": (16, 1, False),
}
KEYS = ("kind", "task", "optimizer", "seed", "point")


@cache
def task_of(name: str) -> HeldOutTask:
    """Made once a process."""
    if name in _heldout_tasks.TASKS:
        return _heldout_tasks.task_of(name)
    if name == "char transformer":
        text = learner_task("text")
        return HeldOutTask(name, text.make, F.cross_entropy, text.train, text.test)
    if name == "image MLP":
        x, y, _ = images(6000, side=14)
        x = x.reshape(len(x), -1)
        make = lambda seed: seeded(lambda: mlp((196, 64, 64, 10)), seed)  # noqa: E731
        return HeldOutTask(name, make, F.cross_entropy, (x[:4000], y[:4000]), (x[4000:], y[4000:]))
    problem = PROBLEMS[{"digits MLP": "mlp"}.get(name, name)]()
    count, order = int(0.8 * problem.size), torch.randperm(problem.size, generator=torch.Generator().manual_seed(5))
    x, y = problem.x[order], problem.y[order]
    return HeldOutTask(name, problem.make, F.cross_entropy, (x[:count], y[:count]), (x[count:], y[count:]))


def test_loss(name: str, optimizer: str, rate: float, seed: int, steps: int) -> float:
    """Of one run; infinite where it diverged."""
    task, (kind, settings, _) = task_of(name), OPTIMIZERS[optimizer]
    model, (x, y), size = task.make(seed), task.train, TASKS[name][0]
    made, generator, order, first = kind(model.parameters(), lr=rate, **settings), torch.Generator().manual_seed(seed + 1000), [], None
    for step in range(steps):
        if len(order) < size:
            order = torch.randperm(len(x), generator=generator).tolist()
        chosen, order = order[:size], order[size:]
        made.param_groups[0]["lr"] = rate * SCHEDULES["cosine"](step / steps)
        made.zero_grad()
        loss = task.loss(model(x[chosen]), y[chosen])
        value = float(loss.detach())
        first = first or value
        if not value <= 1e4 * max(first, 1e-3):
            return math.inf
        loss.backward()
        made.step()
    model.eval()
    with torch.no_grad():
        parts = zip(task.test[0].split(1000), task.test[1].split(1000), strict=True)
        mean = sum(float(task.loss(model(a), b)) * len(b) for a, b in parts) / len(task.test[1])
    return mean if math.isfinite(mean) else math.inf


def evaluate(job: Row) -> Row:
    """One run of the grid, or a suggestion and the run at its rate."""
    name, optimizer, seed, steps = job["task"], job["optimizer"], job["seed"], job.get("steps", STEPS)
    kind, settings, lowest = OPTIMIZERS[optimizer]
    if job["kind"] == "grid":
        rate = lowest * 10 ** (job["point"] / 3)
        return {"rate": rate, "test": test_loss(name, optimizer, rate, seed, steps)}
    task = task_of(name)
    model = task.make(seed)
    objective = sk.Objective(model, task.train, loss=task.loss)
    made = kind(model.parameters(), lr=1e-3, **settings)
    found = sk.suggest_learning_rate(objective, made, batch_size=TASKS[name][0], steps=steps, schedule="cosine", seed=seed)
    shown = {"rate": float(found), "lower": found.lower, "upper": found.upper, "bound": found.bound, "gradients": found.gradients}
    return {**shown, "seconds": found.seconds, "test": test_loss(name, optimizer, float(found), seed, steps)}


def jobs(quick: bool) -> list[Row]:
    """The suggestions first: they are few."""
    some = {"diabetes": (32, 1, True)} if quick else TASKS
    cut = {"steps": 200} if quick else {}
    every = [(task, optimizer, seed) for task, (_, seeds, _) in some.items() for optimizer in OPTIMIZERS for seed in range(seeds)]
    # three splits of the data and orders of the batches even where the grid has one
    asked = [(task, optimizer, seed) for task in some for optimizer in OPTIMIZERS for seed in range(1 if quick else 3)]
    rows: list[Row] = [{"kind": "suggestion", "task": t, "optimizer": o, "seed": s, "point": None, **cut} for t, o, s in asked]
    points = range(0, POINTS, 4 if quick else 1)
    return rows + [{"kind": "grid", "task": t, "optimizer": o, "seed": s, "point": p, **cut} for t, o, s in every for p in points]


def compared(rows: list[Row]) -> list[Row]:
    """For each task and optimizer: the suggestions' loss over the best of the grid, and whether the intervals hold the best rate."""
    out = []
    for task in dict.fromkeys(row["task"] for row in rows):
        for optimizer in OPTIMIZERS:
            mine = [row for row in rows if (row["task"], row["optimizer"]) == (task, optimizer)]
            by_point: dict[int, list[float]] = defaultdict(list)
            for row in mine:
                if row["kind"] == "grid":
                    by_point[row["point"]].append(float(row["test"]))
            suggested = [row for row in mine if row["kind"] == "suggestion"]
            if not by_point or not suggested:
                continue
            means = {point: float(np.mean(losses)) for point, losses in by_point.items()}
            best = min(means, key=means.__getitem__)
            rate = OPTIMIZERS[optimizer][2] * 10 ** (best / 3)
            seeds = len(by_point[best])
            losses = [float(row["test"]) for row in suggested if row["seed"] < seeds]
            out.append(
                {
                    "task": task,
                    "optimizer": optimizer,
                    "ratio": float(np.mean(losses)) / means[best],
                    "worst_seed": max(losses) / means[best],
                    "best_rate": rate,
                    "rates": [row["rate"] for row in suggested],
                    "held": float(np.mean([row["lower"] <= rate <= row["upper"] for row in suggested])),
                    "cost": max(row["gradients"] for row in suggested) / STEPS,
                    "seen": TASKS[task][2],
                }
            )
    return out


def table(rows: list[Row]) -> list[str]:
    """One line for each task and optimizer, and what they come to."""
    found = compared(rows)
    lines = [f"{'task':>20}  {'optimizer':>9}  {'loss/best':>9}  {'worst':>6}  {'best rate':>9}  suggested"]
    for row in found:
        rates = ", ".join(f"{rate:.2g}" for rate in row["rates"])
        numbers = f"{row['ratio']:>9.3f}  {row['worst_seed']:>6.2f}  {row['best_rate']:>9.2g}"
        lines.append(f"{row['task']:>20}  {row['optimizer']:>9}  {numbers}  {rates}{'' if row['seen'] else '  (not seen)'}")
    for name, part in (("all", found), ("not seen", [row for row in found if not row["seen"]])):
        if part:
            ratios = [row["ratio"] for row in part]
            held, cost = np.mean([row["held"] for row in part]), max(row["cost"] for row in part)
            lines.append(f"{name}: median {np.median(ratios):.3f}, worst {max(ratios):.3f}; intervals hold {held:.0%}; cost {cost:.1%}")
    return lines


def draw(rows: list[Row], path: Path) -> None:
    """The loss against the rate for each task and optimizer, the suggestions in it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(row["task"] for row in rows))
    canvas = Figure(figsize=(13, 2.3 * ((len(tasks) + 4) // 5) + 0.6), layout="constrained")
    panels = np.atleast_1d(canvas.subplots((len(tasks) + 4) // 5, min(5, len(tasks)), squeeze=False)).flatten()
    colours = dict(zip(OPTIMIZERS, ("#2563a8", "#d1662b", "#2c8a57"), strict=True))
    for ax, task in zip(panels, tasks, strict=False):
        for optimizer, colour in colours.items():
            mine = [row for row in rows if (row["task"], row["optimizer"]) == (task, optimizer)]
            by_rate: dict[float, list[float]] = defaultdict(list)
            for row in mine:
                if row["kind"] == "grid" and math.isfinite(float(row["test"])):
                    by_rate[row["rate"]].append(float(row["test"]))
            if not by_rate:
                continue
            rates = sorted(by_rate)
            means = [float(np.mean(by_rate[rate])) for rate in rates]
            ax.plot(rates, np.array(means) / min(means), color=colour, linewidth=1.3, label=optimizer)
            for row in mine:
                if row["kind"] == "suggestion" and math.isfinite(float(row["test"])):
                    ax.plot(row["rate"], row["test"] / min(means), marker="o", markersize=4, color=colour, markeredgecolor="white")
        ax.set(xscale="log", yscale="log", ylim=(0.85, 6), title=task)
        ax.set_yticks([1, 2, 4], labels=["1", "2", "4"])
        ax.minorticks_off()
    for ax in panels[len(tasks) :]:
        ax.set_visible(False)
    panels[0].legend(fontsize=7, frameon=False)
    canvas.supxlabel("learning rate (peak of a cosine over 1000 steps); dots: suggested", fontsize=9)
    canvas.supylabel("test loss / best of the grid", fontsize=9)
    canvas.savefig(path, dpi=120, metadata={"Software": f"python -m experiments.{NAME}"})


if __name__ == "__main__":
    run_and_draw(NAME, __doc__, evaluate=evaluate, jobs=jobs, keys=KEYS, table=table, draw=draw)
