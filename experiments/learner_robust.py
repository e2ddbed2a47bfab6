"""The learner over many seeds and starting rates, over a change of the batch size in mid-run, and over a resumed run."""

from __future__ import annotations

import copy
import hashlib
import math
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import sharpkit as sk
from experiments._common import Row
from experiments._learner_tasks import TASKS, Task, learn, run_and_draw, summary, task_of, train_step
from experiments.learner_ablation import CHOICE

NAME = "learner_robust"
SEEDS = tuple(range(20, 40))
STARTS = tuple(10.0**e for e in range(-6, 4))
SWITCH_SEEDS = (20, 21, 22, 23, 24)
SMALL, LARGE = 16, 256
SWITCH_STEPS, LATE = 400, 2000  # the batch size changes half-way: while there is much to learn, or once the data are fitted
KEYS = ("kind", "task", "seed", "start", "length")
_SHORT = {"digits": 1000, "fashion": 200, "text": 200}  # steps of the runs that are compared bit by bit


def evaluate(job: Row) -> Row:
    """One row of any kind."""
    began = time.perf_counter()
    found = _KINDS[job["kind"]](task_of(job["task"]), job)
    return {**CHOICE, **found, "seconds": time.perf_counter() - began}


def fingerprint(model: nn.Module) -> str:
    """Of all parameters and buffers, to the last bit."""
    found = hashlib.sha256()
    for tensor in model.state_dict().values():
        found.update(tensor.detach().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def diverged(task: Task, job: Row) -> Row:
    """A whole run; diverged where a loss is not finite or the last losses are not below the first."""
    row = learn(task, job["seed"], **CHOICE)
    row["diverged"] = not (np.isfinite([row["highest_loss"], row["train"], row["test"]]).all() and row["last_loss"] < row["first_loss"])
    return row


class Run:
    """A network in training with its learner."""

    def __init__(self, task: Task, seed: int, *, lr: float, steps: int) -> None:
        self.model = task.make(seed)
        self.optimizer = task.optimizer(self.model.parameters(), lr)
        self.learner = sk.CurvatureLearner(self.optimizer, model=self.model, loss=F.cross_entropy, total_steps=steps, **CHOICE)
        self.losses: list[float] = []

    def train(self, batches: Any, steps: int) -> None:
        """So many steps on."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", sk.SharpkitWarning)
            for _ in range(steps):
                self.losses.append(train_step(self.model, self.optimizer, self.learner, next(batches)))


def started(task: Task, job: Row) -> Row:
    """A run whose optimizer was given another rate."""
    steps = _SHORT[job["task"]]
    run = Run(task, job["seed"], lr=job["start"], steps=steps)
    run.train(task.batches(job["seed"]), steps)
    return {"steps": steps, "fingerprint": fingerprint(run.model), **summary(run.learner, run.losses)}


def resumed(task: Task, job: Row) -> Row:
    """A run stopped half-way, saved to bytes, and gone on with by new objects, against one that was not stopped."""
    steps, seed = _SHORT[job["task"]], job["seed"]
    whole = Run(task, seed, lr=1e-3, steps=steps)
    whole.train(task.batches(seed), steps)
    batches = task.batches(seed)
    early = Run(task, seed, lr=1e-3, steps=steps)
    early.train(batches, steps // 2)
    saved = copy.deepcopy([early.model.state_dict(), early.optimizer.state_dict(), early.learner.state_dict()])
    late = Run(task, seed + 1, lr=7.0, steps=steps)
    for part, state in zip((late.model, late.optimizer, late.learner), saved, strict=True):
        part.load_state_dict(state)  # type: ignore[attr-defined]
    late.train(batches, steps - steps // 2)
    return {
        "steps": steps,
        "identical": fingerprint(whole.model) == fingerprint(late.model),
        "history_identical": str(whole.learner.history) == str(late.learner.history),
        "lr": whole.learner.lr,
        "lr_resumed": late.learner.lr,
    }


def switched(task: Task, job: Row) -> Row:
    """The batch size changed half-way; the learned rate at every step, and what curvature and the curve say of the two batch sizes."""
    seed, half = job["seed"], job["length"] // 2
    run = Run(task, seed, lr=1e-3, steps=job["length"])
    before, after = (LARGE, SMALL) if job["start"] == LARGE else (SMALL, LARGE)
    found = {"curve": curve(task, run), "sizes": [before, after], "steps": job["length"]}
    rates: list[float] = []
    for size in (before, after):
        if size == after:
            found["limits_at_switch"] = {str(b): mean_limit(task, run.model, b) for b in (SMALL, LARGE)}
        batches = task.batches(seed, size)
        for _ in range(half):
            run.train(batches, 1)
            rates.append(run.learner.lr)
    decisions = list(run.learner.history)
    ends = [d.step - half for d in decisions if d.step > half and "settles" in d.reason]
    return {
        **found,
        "before": rates[half - 1],
        "after": rates[-1],
        "settled_after": ends[0] if ends else None,
        "measured_at": [d.step - half for d in decisions if d.step > half],
        "rates": rates[:: job["length"] // 200],
        "decisions": [[d.step, d.max_lr] for d in decisions if np.isfinite(d.max_lr)],
        "reasons": [str(d) for d in decisions],
        **summary(run.learner, run.losses),
    }


def curve(task: Task, run: Run) -> list[float]:
    """Largest stable rates at batch sizes SMALL and LARGE, from the initialisation."""
    objective = sk.Objective(copy.deepcopy(run.model), task.train, loss=F.cross_entropy)
    optimizer = task.optimizer(objective.layout.params, 1e-3)
    found = sk.learning_rate_curve(objective, optimizer, batch_sizes=[SMALL, LARGE], max_samples=len(task.train[0]))
    return [row["max_lr"] for row in found.to_dict()["rows"]]


def mean_limit(task: Task, model: nn.Module, size: int, draws: int = 10) -> float:
    """Geometric mean of 2 (1 + beta) / lambda_max over drawn batches."""
    batches = task.batches(0, size)
    tops = [
        sk.eigenpairs(sk.HessianOperator(sk.Objective(model, next(batches), loss=F.cross_entropy)), k=1).values[0] for _ in range(draws)
    ]
    return 2 * 1.9 / math.exp(float(np.mean(np.log([float(top) for top in tops]))))


def ratios(row: Row) -> dict[str, float]:
    """Rate at LARGE over that at SMALL: learned, by the curve, by curvature where the size changed."""
    learned = row["after"] / row["before"]
    limits = row["limits_at_switch"]
    return {
        "learned": learned if row["sizes"][0] == SMALL else 1 / learned,
        "curve": row["curve"][1] / row["curve"][0],
        "curvature at the switch": limits[str(LARGE)] / limits[str(SMALL)],
    }


def met_after(row: Row) -> int | None:
    """Steps from the change of the batch size until the rate met its share of the limit, or its bound."""
    half = row["steps"] // 2
    found = [int(r.split(":")[0].removeprefix("step ")) - half for r in row["reasons"] if "reached" in r or "gained" in r]
    return next((step for step in found if step > 0), None)


_KINDS = {"seeds": diverged, "start": started, "resume": resumed, "switch": switched}


def jobs(quick: bool) -> list[Row]:
    """The cheap kinds first; fewer starting rates of the two larger tasks."""
    names = ["digits"] if quick else list(TASKS)
    switch = {"kind": "switch", "task": "digits"}
    found: list[Row] = [{**switch, "seed": s, "start": SMALL, "length": SWITCH_STEPS} for s in SWITCH_SEEDS[: 1 if quick else None]]
    if not quick:
        found += [{**switch, "seed": s, "start": LARGE, "length": SWITCH_STEPS} for s in SWITCH_SEEDS[:2]]
        found += [{**switch, "seed": SWITCH_SEEDS[0], "start": SMALL, "length": LATE}]
    found += [{"kind": "resume", "task": t, "seed": SEEDS[0]} for t in names]
    found += [{"kind": "start", "task": t, "seed": SEEDS[0], "start": lr} for t in names for lr in STARTS[:: 1 if t == "digits" else 3]]
    return found + [{"kind": "seeds", "task": t, "seed": s} for t in names for s in SEEDS[: 2 if quick else None]]


def table(rows: list[Row]) -> list[str]:
    """One line for every kind and task."""
    lines = []
    for task in TASKS:
        mine = {kind: [r for r in rows if r["kind"] == kind and r["task"] == task] for kind in _KINDS}
        if runs := mine["seeds"]:
            lost, back, failed = (sum(r[name] for r in runs) for name in ("diverged", "rollbacks", "not_measured"))
            span = {name: f"{min(r[name] for r in runs):.3g} to {max(r[name] for r in runs):.3g}" for name in ("test", "lr")}
            lines.append(f"{task}: {lost} of {len(runs)} seeds diverged, gone back {back} times, not measured {failed} times; {span}")
        if runs := mine["start"]:
            lines.append(f"{task}: {len({r['fingerprint'] for r in runs})} different result(s) of {len(runs)} starting rates")
        if runs := mine["resume"]:
            lines.append(f"{task}: {sum(r['identical'] and r['history_identical'] for r in runs)} of {len(runs)} resumed runs identical")
        for r in mine["switch"]:
            words = ", ".join(f"{name} x {value:.2f}" for name, value in ratios(r).items())
            when = f"met its share after {met_after(r)} steps, settled after {r['settled_after']}, measured at {r['measured_at']}"
            lines.append(f"{r['sizes']}, {r['steps']} steps: rate {r['before']:.3g} -> {r['after']:.3g} ({words}); {when}")
    return lines


def draw(rows: list[Row], path: Path) -> None:
    """The learned rate against the step, and its ratio across the switch beside the curve's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    both = sorted((r for r in rows if r["kind"] == "switch" and r["steps"] == SWITCH_STEPS), key=lambda r: r["seed"])
    runs, back = ([row for row in both if row["sizes"][0] == size] for size in (SMALL, LARGE))
    canvas = Figure(figsize=(11, 3.6), layout="constrained")
    axes = canvas.subplots(1, 3)
    for ax, mine in zip(axes, (runs, back), strict=False):
        for j, row in enumerate(mine):
            steps = np.arange(len(row["rates"])) * row["steps"] / len(row["rates"])
            ax.plot(steps, row["rates"], color=f"C{j}", lw=1.2, label=f"seed {row['seed']}")
            where, limits = np.array([d for d in row["decisions"] if d[1] is not None and np.isfinite(d[1])]).T
            ax.plot(where, limits, ".", color=f"C{j}", ms=4)
        if mine:
            first, second = mine[0]["sizes"]
            for j, span in ((first == LARGE, (0, 0.5)), (second == LARGE, (0.5, 1))):
                level = math.exp(float(np.mean([math.log(row["curve"][j]) for row in mine])))
                ax.plot(
                    [x * SWITCH_STEPS for x in span], [level, level], color="black", ls=":", lw=1.4, label=None if j else "by the curve"
                )
            ax.axvline(SWITCH_STEPS / 2, color="black", ls="--", lw=0.9)
            ax.set(yscale="log", xlabel="step", title=f"B = {first}, then {second}")
    axes[0].set_ylabel("peak rate; dots: stability limit measured")
    axes[0].legend(fontsize=7, loc="lower right")
    for mine, shift, style in ((runs, 0.0, "oC0"), (back, 0.15, "sC3")):
        for row in mine:
            values = ratios(row)
            axes[2].plot(np.arange(3) + shift, list(values.values()), style, mfc="none" if shift else None, ms=5)
            axes[2].set_xticks(range(3), [name.replace(" at", "\nat") for name in values])
    for words, style in ((f"{SMALL}, then {LARGE}", "oC0"), (f"{LARGE}, then {SMALL}", "sC3")):
        axes[2].plot([], [], style, label=words)
    axes[2].set(ylabel=f"rate at {LARGE} / rate at {SMALL}", yscale="log", title="ratio of rates")
    axes[2].legend(fontsize=7)
    canvas.suptitle(f"python -m experiments.{NAME}: {task_of('digits').name}, batch size changed in mid-run", fontsize=9)
    canvas.savefig(path, dpi=110, metadata={"Software": f"python -m experiments.{NAME}"})


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_and_draw(NAME, __doc__, evaluate=evaluate, jobs=jobs, keys=KEYS, table=table, draw=draw)
