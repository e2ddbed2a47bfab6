"""learning_rate_curve on tasks held out: rates at every batch size from scratch and from a checkpoint, pilots, lambda_max of batches.

The spread of the law's powers and the width of the intervals were chosen on wine and diabetes and on experiments.batch_sweep; breast
cancer, MNIST-1D and batch norm were looked at once, with everything fixed. Truth: experiments/_heldout_truth.py.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import sharpkit as sk
from experiments._common import Row
from experiments._heldout_tasks import HeldOutTask, task_of
from experiments._heldout_truth import CHECKPOINT_SEED, OPTIMIZERS, checkpoint, truth
from experiments._learner_tasks import run_and_draw
from sharpkit.batch_size.pilot import Trainer
from sharpkit.objective.samples import SamplePool
from sharpkit.optimizers import limit_rule

NAME = "batch_heldout"
CHOSEN_ON = ("wine", "diabetes")
KEYS = ("kind", "task", "optimizer", "start", "batch_size", "seed")
CURVE_SEED = CHECKPOINT_SEED  # from scratch truth trains from 0 and 1; from a checkpoint it is the same one
_BATCHES, _LANCZOS = 60, 40  # fresh batches whose lambda_max is averaged, steps for each

_ALL = tuple(OPTIMIZERS)
SCRATCH = {
    "wine": _ALL,
    "diabetes": _ALL,
    "breast cancer": _ALL,
    "mnist1d": ("SGD", "momentum", "Adam", "AdamW"),
    "breast cancer, batch norm": ("SGD", "momentum", "AdamW"),
}
TRAINED = dict.fromkeys(("wine", "diabetes", "breast cancer", "mnist1d"), ("SGD", "momentum", "AdamW"))


def sizes_of(task: str, start: str) -> tuple[int, ...]:
    """Batch sizes at which truth is sought."""
    if start == "checkpoint":
        return (4, 16, 64)
    return {"wine": (4, 16, 64, 128), "breast cancer, batch norm": (8, 32, 128)}.get(task, (4, 16, 64, 256))


def _start_of(task: HeldOutTask, start: str, seed: int) -> nn.Module:
    return checkpoint(task, seed) if start == "checkpoint" else task.make(seed)


def _objective_of(task: HeldOutTask, model: nn.Module) -> sk.Objective:
    mode = "train" if "batch norm" in task.name else "eval"
    return sk.Objective(model, task.train, loss=task.loss, mode=mode)


def curve(job: Row) -> Row:
    """One curve at the batch sizes of the truth."""
    task = task_of(job["task"])
    model = _start_of(task, job["start"], CURVE_SEED)
    optimizer, sizes = OPTIMIZERS[job["optimizer"]](model.parameters(), 1e-3), sizes_of(job["task"], job["start"])
    found = sk.learning_rate_curve(_objective_of(task, model), optimizer, seed=CURVE_SEED, batch_sizes=sizes)
    rows = [{key: row[key] for key in ("batch_size", "max_lr", "max_lr_lower", "max_lr_upper")} for row in found.rows()]
    own = {"anchors": [a.to_dict() for a in found.anchors], "misfit": found.misfit, "one_start": found.one_start}
    return {"rows": rows, **own, "gradients": found.gradients, "seconds": found.seconds}


def pilot(job: Row) -> Row:
    """A pilot of 100 steps: how often it had to begin anew, and the loss before and after."""
    task, began = task_of(job["task"]), time.perf_counter()
    model = _start_of(task, job["start"], job["seed"])
    objective, optimizer = _objective_of(task, model), OPTIMIZERS[job["optimizer"]](model.parameters(), 1e-3)
    trainer = Trainer(SamplePool(objective, coupled=True), optimizer, job["seed"])
    rule, size = limit_rule(optimizer, objective.layout), min(max(task.size // 8, 16), 128)
    settled = trainer.settle(steps=100, batch_size=size, rule=rule)
    losses = {"first": objective.value(), "last": settled.run.objective.value()}
    return {"attempts": settled.attempts, "steps": settled.steps, **losses, "seconds": time.perf_counter() - began}


def batches(job: Row) -> Row:
    """E lambda_max(H_B) at the present parameters of a trained network: plain torch on fresh batches, and what the curve says."""
    task, began = task_of(job["task"]), time.perf_counter()
    model = checkpoint(task, job["seed"])
    sizes = [size for size in (2**j for j in range(4, 12)) if size <= task.size // 4]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = sk.learning_rate_curve(_objective_of(task, model), optimizer, batch_sizes=[*sizes, task.size], pilot=0, calibrate=False)
    generator, rows = torch.Generator().manual_seed(12345), []
    for size in sizes:
        tops = [_lambda_max(task, model, torch.randperm(task.size, generator=generator)[:size]) for _ in range(_BATCHES)]
        error = float(np.std(tops, ddof=1) / math.sqrt(len(tops)))
        rows.append({"batch_size": size, "measured": float(np.mean(tops)), "error": error, "said": float(found.lambda_max(size))})
    return {"rows": rows, "seconds": time.perf_counter() - began}


def _lambda_max(task: HeldOutTask, model: nn.Module, chosen: Tensor) -> float:
    """Of a batch's Hessian, by Lanczos with full orthogonalisation."""
    params = list(model.parameters())
    gradients = torch.autograd.grad(task.loss(model(task.train[0][chosen]), task.train[1][chosen]), params, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in gradients])
    vector, basis, matrix = torch.randn(len(flat), generator=torch.Generator().manual_seed(0)), [], np.zeros((_LANCZOS, _LANCZOS))
    for j in range(_LANCZOS):
        for q in basis * 2:
            vector = vector - (q @ vector) * q
        basis.append(vector / vector.norm())
        pieces = torch.autograd.grad(flat @ basis[-1], params, retain_graph=True)
        vector = torch.cat([p.reshape(-1) for p in pieces])
        for i, q in enumerate(basis):
            matrix[i, j] = matrix[j, i] = float(q @ vector)
    return float(np.linalg.eigvalsh(matrix)[-1])


_KINDS = {"truth": truth, "curve": curve, "pilot": pilot, "batches": batches}


def evaluate(job: Row) -> Row:
    return _KINDS[job["kind"]](job)


def jobs(quick: bool) -> list[Row]:
    """Truth first; wine alone if quick."""
    found: list[Row] = []
    for start, tasks in (("scratch", SCRATCH), ("checkpoint", TRAINED)):
        for task, optimizers in tasks.items():
            for optimizer in optimizers:
                labels = {"task": task, "optimizer": optimizer, "start": start}
                found += [{"kind": "truth", **labels, "batch_size": size} for size in sizes_of(task, start)]
                found.append({"kind": "curve", **labels})
    for start in ("scratch", "checkpoint"):
        found += [
            {"kind": "pilot", "task": task, "optimizer": "momentum", "start": start, "seed": seed} for task in SCRATCH for seed in range(10)
        ]
    found += [{"kind": "batches", "task": task, "optimizer": "SGD", "start": "checkpoint", "seed": s} for task in TRAINED for s in range(2)]
    return [job for job in found if job["task"] == "wine" and job.get("optimizer") != "AdamW"][:12] if quick else found


def compare(rows: list[Row]) -> list[Row]:
    """Said over measured, one row a curve."""
    real = {(r["task"], r["optimizer"], r["start"], r["batch_size"]): r["rates"] for r in rows if r["kind"] == "truth"}
    found = []
    for row in (r for r in rows if r["kind"] == "curve"):
        points = []
        for said in row["rows"]:
            rates = real.get((row["task"], row["optimizer"], row["start"], said["batch_size"]), [None])
            if None in rates:
                continue
            rate = math.exp(float(np.mean(np.log(rates))))
            inside = said["max_lr_lower"] <= rate <= said["max_lr_upper"]
            points.append({**said, "measured": rate, "range": [min(rates), max(rates)], "ratio": said["max_lr"] / rate, "inside": inside})
        found.append({**row, "points": points})
    return found


def _shares(name: str, compared: list[Row]) -> str:
    points = [p for row in compared for p in row["points"]]
    if not points:
        return f"{name}: nothing yet"
    factors = [max(p["ratio"], 1 / p["ratio"]) for p in points]
    within, inside = np.mean([f <= 1.5 for f in factors]), np.mean([p["inside"] for p in points])
    width = np.median([p["max_lr_upper"] / p["max_lr_lower"] for p in points])
    counted = f"{len(points)} rates, {within:.0%} within 1.5x, worst {max(factors):.2f}, {inside:.0%} inside intervals x{width:.1f} wide"
    return f"{name}: {counted}; {np.median([r['gradients'] for r in compared]):.0f} gradients of N"


def table(rows: list[Row]) -> list[str]:
    """A line a curve, shares, pilots, lambda_max of batches."""
    compared, lines = compare(rows), []
    for row in compared:
        points = " ".join(f"{p['ratio']:.2f}{'' if p['inside'] else '!'}" for p in row["points"])
        lines.append(f"{row['start']:<11}{row['task']:<27}{row['optimizer']:<10}{points}  misfit {row['misfit']:.2f}")
    for start in ("scratch", "checkpoint"):
        for name, held in (("chosen on", False), ("held out", True)):
            some = [r for r in compared if r["start"] == start and (r["task"] not in CHOSEN_ON) == held]
            lines.append(_shares(f"{start}, {name}", some))
        pilots = [r for r in rows if r["kind"] == "pilot" and r["start"] == start]
        lost = sum(not r["steps"] for r in pilots)
        lines.append(f"pilots from {start}: {len(pilots)}, {sum(r['attempts'] > 0 for r in pilots)} began anew, {lost} ended at no step")
    for row in (r for r in rows if r["kind"] == "batches"):
        ratios = " ".join(f"{p['said'] / p['measured']:.2f}+-{p['error'] / p['measured']:.2f}" for p in row["rows"])
        lines.append(f"lambda_max of batches, said over measured, {row['task']}, seed {row['seed']}: {ratios}")
    return lines


def draw(rows: list[Row], path: Path) -> None:
    """Rates said and measured, a panel for each task and start."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    compared = compare(rows)
    panels = list(dict.fromkeys((r["task"], r["start"]) for r in compared))
    figure = Figure(figsize=(13, 3.1 * max(1, math.ceil(len(panels) / 3))), layout="constrained")
    for number, (task, start) in enumerate(panels):
        ax = figure.add_subplot(math.ceil(len(panels) / 3), 3, number + 1)
        for row in (r for r in compared if (r["task"], r["start"]) == (task, start)):
            color = f"C{_ALL.index(row['optimizer'])}"
            sizes = [p["batch_size"] for p in row["rows"]]
            ax.plot(sizes, [p["max_lr"] for p in row["rows"]], color=color, label=row["optimizer"])
            lower, upper = ([p[f"max_lr_{end}"] for p in row["rows"]] for end in ("lower", "upper"))
            ax.fill_between(sizes, lower, upper, color=color, alpha=0.12, linewidth=0)
            for p in row["points"]:
                ax.plot([p["batch_size"]] * 2, p["range"], color=color, linewidth=1)
                ax.plot(p["batch_size"], p["measured"], "o", color=color, markersize=4)
        ax.set(xscale="log", yscale="log", xlabel="batch size", ylabel="largest stable rate", title=f"{task}, from {start}")
        ax.set_xticks(sizes, [str(size) for size in sizes])
        ax.set_xticks([], minor=True)
        ax.legend(fontsize=7)
    figure.savefig(path, dpi=100, metadata={"Software": f"python -m experiments.{NAME}"})


def main() -> None:
    run_and_draw(NAME, __doc__, evaluate=evaluate, jobs=jobs, keys=KEYS, table=table, draw=draw)


if __name__ == "__main__":
    main()
