"""Which safety, warm-up and decay the learner should have: one setting for all tasks.

Every loss is divided by the best of a grid of learning rates under a linear decay, averaged over the same seeds.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from experiments._common import Row
from experiments._learner_tasks import TASKS, baseline, learn, run_and_draw, task_of

NAME = "learner_ablation"
SEEDS = tuple(range(10))
SEEDS_OF = {"digits": SEEDS, "fashion": SEEDS[:5], "text": SEEDS[:3]}
SAFETIES = (0.2, 0.25, 0.3, 0.4, 0.5)
WARMUPS = (0.05, 0.1, 0.2)
PAIRS = [{"safety": a, "warmup": w} for w in WARMUPS for a in SAFETIES]
OTHERS: list[dict[str, Any]] = [{"decay": "cosine"}, {"decay": "constant"}, {"decay": "schedule-free"}, {"rollback": False}]
FREE = {"decay": "schedule-free"}  # of SGD
# indices into the nine rates of each task's grid, around the best
GRID = {"digits": range(3, 8), "fashion": range(4, 7), "text": range(4, 7)}
PLAIN = {"decay": "linear", "rollback": True}
CHOICE = {"safety": 0.25, "warmup": 0.1}
KEYS = ("kind", "task", "seed", "safety", "warmup", "decay", "rollback", "rate", "schedule")


def evaluate(job: Row) -> Row:
    """One run of either kind."""
    task = task_of(job["task"])
    if job["kind"] == "grid":
        began = time.perf_counter()
        training, test = baseline(task, job["rate"], job["schedule"], job["seed"])
        return {"train": training, "test": test, "seconds": time.perf_counter() - began}
    return learn(task, job["seed"], **{k: job[k] for k in ("safety", "warmup", "decay", "rollback")})


def jobs(quick: bool) -> list[Row]:
    """Safety x warm-up first, then the grid, then what else can be chosen, at the chosen pair."""
    tasks = ["digits"] if quick else list(TASKS)
    runs = [{"task": t, "seed": s} for s in SEEDS for t in tasks if s in SEEDS_OF[t]]
    found = [{"kind": "learner", **run, **pair, **PLAIN} for run in runs for pair in PAIRS]
    for run in runs:
        rates = [task_of(run["task"]).grid[j] for j in GRID[run["task"]]]
        found += [{"kind": "grid", **run, "rate": r, "schedule": "linear"} for r in rates]
    for other in OTHERS:
        found += [{"kind": "learner", **run, **CHOICE, **PLAIN, **other} for run in runs if other != FREE or run["task"] != "text"]
    return found


def mean_loss(rows: list[Row], which: str, **fixed: Any) -> float:
    """Over the seeds; NaN where there are none."""
    found = [row[which] for row in rows if all(row.get(k) == v for k, v in fixed.items())]
    return float(np.mean(found)) if found else math.nan


def best_of_grid(rows: list[Row], task: str, which: str, seeds: set[int]) -> float:
    """Lowest mean loss over the rates, on these seeds."""
    grid = [row for row in rows if row["kind"] == "grid" and row["task"] == task and row["seed"] in seeds]
    return min((mean_loss(grid, which, rate=rate) for rate in {row["rate"] for row in grid}), default=math.nan)


def ratio(rows: list[Row], task: str, which: str, **setting: Any) -> float:
    """Mean loss with the learner over the best of the grid on the same seeds; NaN where it was not run."""
    wanted = {"kind": "learner", "task": task, **PLAIN, **CHOICE, **setting}
    mine = [row for row in rows if all(row.get(k) == v for k, v in wanted.items())]
    return mean_loss(mine, which) / best_of_grid(rows, task, which, {row["seed"] for row in mine})


def score(rows: list[Row], *, digits: str = "test", **setting: Any) -> float:
    """Geometric mean over the tasks of the ratios."""
    found = [ratio(rows, task, digits if task == "digits" else "test", **setting) for task in TASKS]
    found = [value for value in found if not math.isnan(value)]
    return math.exp(float(np.mean(np.log(found)))) if found else math.nan


def table(rows: list[Row]) -> list[str]:
    """Ratios of every setting, one line each."""
    lines = []
    for setting in [*PAIRS, *OTHERS]:
        cells = [f"{t} {ratio(rows, t, 'test', **setting):.3f} (train {ratio(rows, t, 'train', **setting):.2f})" for t in TASKS]
        words = " ".join(f"{k} {v}" for k, v in setting.items())
        lines.append(
            f"{words}: {'; '.join(cells)}; mean {score(rows, **setting):.3f}, with digits' training loss "
            f"{score(rows, digits='train', **setting):.3f}"
        )
    return lines


def draw(rows: list[Row], path: Path) -> None:
    """Ratios to the best grid point: against the safety, one line a task and warm-up; as bars for what else can be chosen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(13, 6.4), layout="constrained")
    axes = canvas.subplots(2, 4, width_ratios=[1, 1, 1, 1])
    for row, which in enumerate(("test", "train")):
        for ax, warmup in zip(axes[row, :3], WARMUPS, strict=True):
            for j, task in enumerate(TASKS):
                values = [ratio(rows, task, which, safety=a, warmup=warmup) for a in SAFETIES]
                ax.plot(SAFETIES, values, "o-", color=f"C{j}", ms=4, lw=1.2, label=task_of(task).name)
            if which == "test":
                ax.plot(SAFETIES, [score(rows, safety=a, warmup=warmup) for a in SAFETIES], "ks--", ms=4, lw=1, label="geometric mean")
            _frame(ax, which, f"warm-up {warmup:g} T")
            ax.set(xlabel="safety")
        _bars(axes[row, 3], rows, which)
        axes[row, 0].set_ylabel(f"{'test' if which == 'test' else 'training'} loss / best of the grid")
        low, high = (0.9, 1.4) if which == "test" else (0.3, 30)
        for ax in axes[row]:
            ax.set_ylim(low, high)
    axes[0, 0].legend(fontsize=7)
    canvas.suptitle(f"python -m experiments.{NAME}; dashed: target", fontsize=9)
    canvas.savefig(path, dpi=110, metadata={"Software": f"python -m experiments.{NAME}"})


def _frame(ax: Any, which: str, title: str) -> None:
    ax.axhline(1.02 if which == "test" else 1.2, color="C3", ls="--", lw=0.9)
    ax.set_title(title, fontsize=9)
    if which == "train":
        ax.set_yscale("log")


def _bars(ax: Any, rows: list[Row], which: str) -> None:
    settings: list[dict[str, Any]] = [{}, *OTHERS]
    for j, task in enumerate(TASKS):
        values = [ratio(rows, task, which, **setting) for setting in settings]
        ax.plot([x + 0.12 * (j - 1) for x in range(len(settings))], values, "o", color=f"C{j}", ms=6)
    words = ["as chosen", *("no roll-back" if "rollback" in o else f"{next(iter(o))}\n{next(iter(o.values()))}" for o in OTHERS)]
    ax.set_xticks(range(len(words)), words, fontsize=8)
    _frame(ax, which, f"safety {CHOICE['safety']:g}, warm-up {CHOICE['warmup']:g} T, and one change")


if __name__ == "__main__":
    run_and_draw(NAME, __doc__, evaluate=evaluate, jobs=jobs, keys=KEYS, table=table, draw=draw)
