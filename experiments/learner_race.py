"""The learner against a grid of nine learning rates under three schedules, at equal budget: its measurements are paid for in steps.

Seeds that the learner's settings were not chosen on. The best grid point is the one of lowest mean loss over these same seeds, which
favours the grid. On the two larger tasks, points whose first seed ends above FAILED times the best are not run on other seeds.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from experiments._common import Row
from experiments._learner_tasks import SCHEDULES, TASKS, arguments, baseline, collect, figure_path, learn, task_of
from experiments.learner_ablation import CHOICE

NAME = "learner_race"
SEEDS = tuple(range(10, 20))
MORE_SEEDS = tuple(range(10, 30))  # of the small task
FORECAST = 0.05  # of the steps, given up for the measurements: their budget
NEAR = 1.4  # times the best of the first seed: beyond it other schedules than linear come last
FAILED = {"fashion": 1.1, "text": 1.05}  # and beyond these other seeds are left out; seeds differ less in text
KEYS = ("kind", "task", "seed", "rate", "schedule")
_COLOURS = {"constant": "C0", "cosine": "C2", "linear": "C1"}


def evaluate(job: Row) -> Row:
    """One run: of the grid, or of the learner with fewer steps."""
    task = task_of(job["task"])
    if job["kind"] == "grid":
        began = time.perf_counter()
        training, test = baseline(task, job["rate"], job["schedule"], job["seed"])
        return {"train": training, "test": test, "seconds": time.perf_counter() - began}
    steps = round((1 - FORECAST) * task.steps)
    return {**CHOICE, **learn(task, job["seed"], steps=steps, **CHOICE)}


def grid_jobs(names: list[str], seeds: tuple[int, ...]) -> list[Row]:
    """Every rate and schedule."""
    return [
        {"kind": "grid", "task": name, "seed": seed, "rate": rate, "schedule": schedule}
        for seed in seeds
        for name in names
        for rate in task_of(name).grid
        for schedule in SCHEDULES
    ]


def measure(options: argparse.Namespace) -> list[Row]:
    """The learner's runs and the small task's grid; then the larger tasks' grids, seed by seed of what did not fail."""
    names, seeds = (["digits"], SEEDS[:1]) if options.quick else (list(TASKS), SEEDS)
    large = [name for name in names if name != "digits"]
    more = seeds if options.quick else MORE_SEEDS
    jobs = [{"kind": "learner", "task": t, "seed": s} for s in more for t in names if t == "digits" or s in seeds]
    jobs += grid_jobs(["digits"], more)
    jobs += [job for job in grid_jobs(large, seeds[:1]) if job["schedule"] == "linear"]
    rows = collect(NAME, evaluate, jobs, keys=KEYS, options=options)
    for tolerated, some in (({}, seeds[:1]), (FAILED, seeds[1:]), (dict.fromkeys(large, math.inf), seeds[:1])):
        jobs += [job for job in grid_jobs(large, some) if not has_failed(rows, job, tolerated.get(job["task"], NEAR)) and job not in jobs]
        rows = collect(NAME, evaluate, jobs, keys=KEYS, options=options)
    return rows


def has_failed(rows: list[Row], job: Row, tolerated: float) -> bool:
    """Whether the point's first seed ended above ``tolerated`` times the best; before it was run, the linear decay at that rate tells."""
    mine = [r for r in rows if r["kind"] == "grid" and r["task"] == job["task"] and r["seed"] == SEEDS[0]]
    at = {r["schedule"]: r["test"] for r in mine if math.isclose(r["rate"], job["rate"], rel_tol=1e-3)}
    found = at.get(job["schedule"], at.get("linear", math.inf))
    return found > tolerated * min(r["test"] for r in mine)


def points(rows: list[Row], task: str) -> list[Row]:
    """Mean losses of every grid point, with the number of its seeds."""
    found: dict[tuple[float, str], list[Row]] = {}
    for row in rows:
        if row["kind"] == "grid" and row["task"] == task:
            found.setdefault((row["rate"], row["schedule"]), []).append(row)
    return [{"rate": r, "schedule": s, "seeds": len(f), **means(f)} for (r, s), f in sorted(found.items())]


def means(rows: list[Row]) -> dict[str, float]:
    """Of the two losses."""
    return {which: float(np.mean([row[which] for row in rows])) for which in ("train", "test")}


def compare(rows: list[Row], task: str) -> Row:
    """The learner's mean losses over those of the best and of the median grid point."""
    mine = [row for row in rows if row["kind"] == "learner" and row["task"] == task]
    grid, found = points(rows, task), means(mine)
    full = [p for p in grid if p["seeds"] == max(q["seeds"] for q in grid)]
    best, trained = (min(full, key=lambda p: p[which]) for which in ("test", "train"))
    median = {which: float(np.median([p[which] for p in grid])) for which in ("train", "test")}
    spread = [row["test"] for row in mine]
    spent = [(row["steps"] + row["cost"]) / task_of(task).steps for row in mine]
    return {
        "task": task,
        "seeds": len(mine),
        **found,
        "test_range": [min(spread), max(spread)],
        "lr": [min(row["lr"] for row in mine), max(row["lr"] for row in mine)],
        "best": f"{best['rate']:.3g} {best['schedule']}",
        "best_test": best["test"],
        "best_test_train": best["train"],
        "best_train": trained["train"],
        "best_train_point": f"{trained['rate']:.3g} {trained['schedule']}",
        "test_over_best": found["test"] / best["test"],
        "train_over_its_train": found["train"] / best["train"],
        "train_over_best_train": found["train"] / trained["train"],
        "median_test": median["test"],
        "test_over_median": found["test"] / median["test"],
        "train_over_median": found["train"] / median["train"],
        "points": len(grid),
        "points_run_once": sum(p["seeds"] == 1 for p in grid),
        "points_better": sum(p["test"] < found["test"] for p in grid),
        "overhead": [max(r["cost"] / r["steps"] for r in mine), float(np.mean([r["cost"] / r["steps"] for r in mine]))],
        "spent": max(spent),
    }


def draw(rows: list[Row], path: Path) -> None:
    """Loss against the rate, one line a schedule; the learner's mean and range across."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    names = [name for name in TASKS if any(row["task"] == name for row in rows)]
    canvas = Figure(figsize=(11, 6), layout="constrained")
    axes = canvas.subplots(2, len(names), squeeze=False, sharex="col")
    for column, name in enumerate(names):
        for ax, which in zip(axes[:, column], ("test", "train"), strict=True):
            _panel(ax, rows, name, which)
        axes[0, column].set_title(task_of(name).name, fontsize=10)
        axes[1, column].set_xlabel("learning rate of the grid (peak)")
    axes[0, 0].set_ylabel("test loss")
    axes[1, 0].set_ylabel("training loss")
    canvas.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=7, fontsize=8)
    seeds = f"mean of {len(SEEDS)} seeds (digits: {len(MORE_SEEDS)}; larger tasks: one where clearly worse)"
    canvas.suptitle(f"python -m experiments.{NAME}: equal budget, {seeds}", fontsize=9)
    canvas.savefig(path, dpi=110, metadata={"Software": f"python -m experiments.{NAME}"})


def _panel(ax: Any, rows: list[Row], name: str, which: str) -> None:
    grid = points(rows, name)
    for schedule, colour in _COLOURS.items():
        line = [(p["rate"], p[which]) for p in grid if p["schedule"] == schedule and math.isfinite(p[which])]
        ax.plot(*zip(*line, strict=True), "o-", color=colour, ms=3, lw=1, label=schedule)
    mine = [row for row in rows if row["kind"] == "learner" and row["task"] == name]
    values = [row[which] for row in mine]
    ax.axhline(float(np.mean(values)), color="black", lw=1.4, label="learner")
    ax.axhspan(min(values), max(values), color="black", alpha=0.12, lw=0)
    ax.axvspan(min(row["lr"] for row in mine), max(row["lr"] for row in mine), color="C3", alpha=0.25, lw=0, label="rate it settled at")
    ax.axhline(float(np.median([p[which] for p in grid])), color="grey", ls=":", lw=1, label="median of the grid")
    best = min(p[which] for p in grid if p["seeds"] == max(q["seeds"] for q in grid))
    limit = 1.02 if which == "test" else 1.2
    ax.axhline(limit * best, color="C3", ls="--", lw=0.9, label="target: 1.02 (training 1.2) x best")
    ax.set(xscale="log", yscale="log")


def main() -> None:
    options = arguments(__doc__)
    rows = measure(options)
    for name in [n for n in TASKS if any(row["task"] == n for row in rows)]:
        print(compare(rows, name))
    draw(rows, figure_path(NAME, quick=options.quick))


if __name__ == "__main__":
    main()
