"""The learner on tasks that its rule was not chosen on, by curvature alone and to a suggested peak: test loss over the best of a grid.

    python -m experiments.suggestion           # the grid, first
    python -m experiments.learner_heldout      # results/learner_heldout.jsonl, figures/learner_heldout.png

1000 steps, linear decay; the suggestion's hundred gradients come on top. *Validated* runs get a fifth of the training data as
``validation`` and train on the rest. The grid is that of :mod:`experiments.suggestion`, 13 rates under a cosine, on all of it. The *late
spike* is the highest batch loss after the first one below 2 % of the first, over the first; of twenty seeds, and of short runs as well.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

import sharpkit as sk
from experiments._common import Row, read_rows
from experiments._learner_tasks import results_path, run_and_draw
from experiments.suggestion import OPTIMIZERS, TASKS, task_of

NAME, STEPS = "learner_heldout", 1000
CHOSEN = ("wine", "breast cancer", "diabetes", "mnist1d", "fashion, batch norm")
MODES = ("by curvature", "to a suggested peak", "by curvature, validated", "to a peak, validated")
COLOURS = ("#d1662b", "#2563a8", "#e3a47f", "#8fb0d9")
KEYS = ("task", "optimizer", "seed", "mode", "steps")
SEEDS, SPIKE_SEEDS, SHORT = range(3), range(20), 200
SPIKE_TASKS = ("wine", "breast cancer", "diabetes", "mnist1d")
_FITTED = 0.02  # of the first batch loss


def evaluate(job: Row) -> Row:
    """One run."""
    name, steps = job["task"], job.get("steps", STEPS)
    task, size = task_of(name), TASKS[name][0]
    kind, settings, _ = OPTIMIZERS[job["optimizer"]]
    model, (x, y) = task.make(job["seed"]), task.train
    optimizer = kind(model.parameters(), lr=1e-3, **settings)
    more: Row = {}
    if "validated" in job["mode"]:
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(job["seed"]))
        held, rest = order[: len(x) // 5], order[len(x) // 5 :]
        more["validation"], (x, y) = (x[held], y[held]), (x[rest], y[rest])
    if "peak" in job["mode"]:
        objective = sk.Objective(model, (x, y), loss=task.loss)
        more["peak"] = float(sk.suggest_learning_rate(objective, optimizer, batch_size=size, steps=steps, seed=job["seed"]))
    learner = sk.CurvatureLearner(optimizer, model=model, loss=task.loss, total_steps=steps, **more)
    generator, order, losses = torch.Generator().manual_seed(job["seed"] + 1000), list[int](), list[float]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sk.SharpkitWarning)
        for _ in range(steps):
            if len(order) < size:
                order = torch.randperm(len(x), generator=generator).tolist()
            chosen, order = order[:size], order[size:]
            optimizer.zero_grad()
            loss = task.loss(model(x[chosen]), y[chosen])
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            learner.step((x[chosen], y[chosen]), loss=loss)
    model.eval()
    with torch.no_grad():
        test = float(task.loss(model(task.test[0]), task.test[1]))
    fitted = next((step for step, value in enumerate(losses) if value < _FITTED * losses[0]), None)
    spike = max(losses[fitted:]) / losses[0] if fitted is not None else 0.0
    back = sum("the loss" in decision.reason and "back to" in decision.reason for decision in learner.history)
    return {"test": test if math.isfinite(test) else math.inf, "rate": learner.lr, "spike": spike, "rolled_back": back}


def jobs(quick: bool) -> list[Row]:
    """Momentum and AdamW, three seeds in all modes; then the other seeds and the short runs, by curvature."""
    names, seeds, cut = (("diabetes",), (0,), {"steps": 100}) if quick else (CHOSEN, SEEDS, {})
    kinds = [(name, optimizer) for name in names for optimizer in ("momentum", "AdamW")]
    out = [{"task": t, "optimizer": o, "seed": s, "mode": m, **cut} for t, o in kinds for s in seeds for m in MODES]
    for task, optimizer in [] if quick else [kind for kind in kinds if kind[0] in SPIKE_TASKS]:
        of = {"task": task, "optimizer": optimizer, "mode": MODES[0]}
        out += [{**of, "seed": s} for s in SPIKE_SEEDS if s not in SEEDS] + [{**of, "seed": s, "steps": SHORT} for s in SPIKE_SEEDS]
    return out


def grid(task: str, optimizer: str) -> list[float]:
    """Mean test losses of the grid's rates."""
    by_point: dict[int, list[float]] = defaultdict(list)
    for row in read_rows(results_path("suggestion", quick=False)):
        if (row["kind"], row["task"], row["optimizer"]) == ("grid", task, optimizer):
            by_point[row["point"]].append(float(row["test"]))
    return [float(np.mean(losses)) for losses in by_point.values()]


def compared(rows: list[Row]) -> list[Row]:
    """For each task, optimizer and mode."""
    out = []
    for task, optimizer, mode in dict.fromkeys((row["task"], row["optimizer"], row["mode"]) for row in rows):
        mine = [row for row in rows if (row["task"], row["optimizer"], row["mode"]) == (task, optimizer, mode)]
        mine = [row for row in mine if row["seed"] in SEEDS and row.get("steps") != SHORT]
        losses, tests = grid(task, optimizer), [float(row["test"]) for row in mine]
        ratios = [test / min(losses) for test in tests]
        row = {"task": task, "optimizer": optimizer, "mode": mode, "ratio": float(np.mean(ratios)), "worst": max(ratios)}
        rates = [row["rate"] for row in mine]
        out.append({**row, "median_point": float(np.median(losses) / min(losses)), "rates": rates, "spike": max(r["spike"] for r in mine)})
    return out


def table(rows: list[Row]) -> list[str]:
    """One line for each task, optimizer and mode, and the geometric means."""
    found = compared(rows)
    lines = [f"{'task':>20}  {'optimizer':>9}  {'':>20}  {'test/best':>9}  {'worst':>6}  {'median point':>12}  {'spike':>6}  rates"]
    for row in found:
        numbers = f"{row['ratio']:>9.2f}  {row['worst']:>6.2f}  {row['median_point']:>12.2f}  {row['spike']:>6.2f}"
        rates = ", ".join(f"{rate:.2g}" for rate in row["rates"])
        lines.append(f"{row['task']:>20}  {row['optimizer']:>9}  {row['mode']:>20}  {numbers}  {rates}")
    for mode in MODES:
        ratios = [row["ratio"] for row in found if row["mode"] == mode]
        if ratios:
            lines.append(f"{mode}: geometric mean {math.exp(float(np.mean(np.log(ratios)))):.3f}, worst task {max(ratios):.2f}")
    for steps in (SHORT, None):
        mine = [row for row in rows if row["mode"] == MODES[0] and row["task"] in SPIKE_TASKS and row.get("steps") == steps]
        above = [row for row in mine if row["spike"] > 1]
        kept = [row for row in above if not row["rolled_back"]]
        worst = max((row["spike"] for row in kept), default=0.0)
        said = f"{len(above)} with a late spike above the first loss, of which {len(kept)} did not go back (worst {worst:.3g})"
        lines.append(f"{len(mine)} runs of {steps or STEPS} steps by curvature: {said}")
    return lines


def draw(rows: list[Row], path: Path) -> None:
    """Every run's test loss over the grid's best."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(9, 3.6), layout="constrained")
    ax = canvas.subplots()
    kinds = list(dict.fromkeys((row["task"], row["optimizer"]) for row in rows))
    for shift, mode, colour in zip((-0.27, -0.09, 0.09, 0.27), MODES, COLOURS, strict=True):
        points = [
            (position + shift, float(row["test"]) / min(grid(*kind)))
            for position, kind in enumerate(kinds)
            for row in rows
            if (row["task"], row["optimizer"], row["mode"]) == (*kind, mode) and row["seed"] in SEEDS and row.get("steps") != SHORT
        ]
        ax.plot(*zip(*points, strict=True), linestyle="", marker="o", markersize=5, color=colour, alpha=0.8, label=f"learner {mode}")
    for position, kind in enumerate(kinds):
        losses = grid(*kind)
        middle = float(np.median(losses)) / min(losses)
        ax.hlines(middle, position - 0.4, position + 0.4, color="#8a8f98", linewidth=1.5, label=None if position else "median of the grid")
    ax.axhline(1, color="#30343b", linewidth=0.8)
    ax.set(yscale="log", ylabel="test loss / best of 13 rates")
    ax.set_yticks([0.5, 1, 2, 4], labels=["0.5", "1", "2", "4"])
    ax.minorticks_off()
    ax.set_xticks(range(len(kinds)), labels=["\n".join([*task.split(", "), optimizer]) for task, optimizer in kinds], fontsize=7)
    ax.legend(fontsize=8, frameon=False)
    canvas.savefig(path, dpi=120, metadata={"Software": f"python -m experiments.{NAME}"})


if __name__ == "__main__":
    run_and_draw(NAME, __doc__, evaluate=evaluate, jobs=jobs, keys=KEYS, table=table, draw=draw)
