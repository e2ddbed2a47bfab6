"""What sk.Monitor costs against its budget, how exact its values are, and what tracking lambda_max at every step takes.

Overhead: two copies of one training run take turns in blocks of steps, one monitored, one not; the second also recomputes, its clock
stopped, the recorded curvature to 1e-4 on the same samples at the same step. Both must end with the same weights, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sharpkit as sk
from experiments._common import HERE, Row, circumstances, read_rows, rounded
from experiments._models import GPT, conv_net, images, mlp, seeded, text
from experiments.monitor_edge import half_square, tanh_mlp
from sharpkit.operators.preconditioned import optimizer_curvature

NAME = "monitor_overhead"
PARTS = ("overhead", "tracking")
SEED = 0
BLOCK = 500  # steps at a turn: the monitor takes the gap between two turns for a pause, worth 5 steps at most
CHECK = 3  # steps between comparisons of the tracked eigenvalue with the exact one
BUDGETS = (0.05, 0.01)


@dataclass
class Workload:
    """A training run: network, data, optimizer, batch size; cross-entropy everywhere."""

    title: str
    make: Callable[[], nn.Module]
    data: Callable[[], tuple[Tensor, Tensor, str]]
    optimizer: Callable[[Any], torch.optim.Optimizer]
    batch: int
    steps: int = 3000


def digits() -> tuple[Tensor, Tensor, str]:
    from sklearn.datasets import load_digits

    found = load_digits()
    return torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(found.target), "scikit-learn digits, 1797 images"


WORKLOADS = (
    Workload("MLP 64-512-512-10", lambda: mlp((64, 512, 512, 10)), digits, lambda p: torch.optim.SGD(p, 0.05), 128),
    Workload("conv net + BatchNorm", lambda: conv_net(8, side=14), lambda: images(2000, side=14), lambda p: torch.optim.SGD(p, 0.05), 64),
    Workload("GPT", lambda: GPT(time=32), lambda: text(2000, 32), lambda p: torch.optim.AdamW(p, 1e-3), 8),
    Workload("MLP 784-512-10", lambda: mlp((784, 512, 10)), lambda: images(2000), lambda p: torch.optim.SGD(p, 0.01, momentum=0.9), 64),
    Workload("small MLP 64-32-10", lambda: mlp((64, 32, 10)), digits, lambda p: torch.optim.SGD(p, 0.05), 64, 6000),
)


@dataclass
class Run:
    """One copy of a training run and its clocks."""

    workload: Workload
    monitored: bool
    budget: float
    wall: float = 0.0
    cpu: float = 0.0
    inside: float = 0.0  # CPU seconds within monitor.step
    steps: int = 0

    def __post_init__(self) -> None:
        self.x, self.y, self.data = self.workload.data()
        self.model = seeded(self.workload.make, SEED)
        self.optimizer = self.workload.optimizer(self.model.parameters())
        self.monitor: sk.Monitor | None = None
        if self.monitored:
            self.monitor = sk.Monitor(self.model, self.optimizer, loss=F.cross_entropy, budget=self.budget, seed=SEED)
        self.generator = torch.Generator().manual_seed(SEED)

    def train(self, count: int, before: Callable[[int, Tensor, Tensor], None] | None = None) -> None:
        """So many steps; ``before`` is called between backward and update with the clocks stopped."""
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(count):
            chosen = torch.randint(len(self.x), (self.workload.batch,), generator=self.generator)
            xb, yb = self.x[chosen], self.y[chosen]
            loss = F.cross_entropy(self.model(xb), yb)
            self.optimizer.zero_grad()
            loss.backward()
            if self.monitor is not None:
                entered = time.process_time()
                self.monitor.step((xb, yb), loss=loss)
                self.inside += time.process_time() - entered
            if before is not None:
                self.wall, self.cpu = self.wall + time.perf_counter() - wall, self.cpu + time.process_time() - cpu
                before(self.steps, xb, yb)
                wall, cpu = time.perf_counter(), time.process_time()
            self.optimizer.step()
            self.steps += 1
        self.wall, self.cpu = self.wall + time.perf_counter() - wall, self.cpu + time.process_time() - cpu


def exact(run: Run, record: sk.Record, x: Tensor, y: Tensor, name: str) -> float:
    """The recorded eigenvalue to 1e-4: same samples, same mode, same seed, same optimizer state."""
    n = record.num_samples
    objective = sk.Objective(run.model, (x[:n], y[:n]), loss=F.cross_entropy, mode="train", seed=SEED + record.step)
    if name == "generalized_sharpness":  # of another search, a lower bound, too
        return sk.generalized_sharpness(objective, run.optimizer).value
    operator: Any = sk.HessianOperator(objective)
    if name == "preconditioned_lambda_max":
        operator, _ = optimizer_curvature(operator, run.optimizer)
    return float(sk.eigenpairs(operator, 1, tol=1e-4, max_matvecs=400, seed=1).values[0])


def overhead(workload: Workload, budget: float, steps: int) -> Row:
    """One workload at one budget."""
    began = time.perf_counter()
    watched, plain = Run(workload, True, budget), Run(workload, False, budget)
    monitor = watched.monitor
    assert monitor is not None
    main = next(iter(monitor.metrics))
    truth: dict[int, float] = {}

    def check(step: int, x: Tensor, y: Tensor) -> None:
        record = wanted.get(step)
        if record is not None and main in record:
            truth[step] = exact(plain, record, x, y, main)

    blocks: list[tuple[float, float]] = []
    while watched.steps < steps:
        count, cpu = min(BLOCK, steps - watched.steps), (watched.cpu, plain.cpu)
        watched.train(count)
        wanted = {record.step: record for record in monitor.history}
        plain.train(count, check)
        blocks.append((watched.cpu - cpu[0], plain.cpu - cpu[1]))
    records = [record for record in monitor.history if record.step in truth]
    errors = [abs(record[main].value / truth[record.step] - 1) for record in records]
    ratios = [a / b - 1 for a, b in blocks]
    same = all(bool(torch.equal(a, b)) for a, b in zip(watched.model.state_dict().values(), plain.model.state_dict().values(), strict=True))
    covered = [abs(r[main].value - truth[r.step]) <= r[main].stderr + 1e-4 * truth[r.step] for r in records]
    return {
        "part": "overhead",
        "workload": workload.title,
        "optimizer": type(watched.optimizer).__name__,
        "batch": workload.batch,
        "data": watched.data,
        "budget": budget,
        "train_steps": steps,
        "step_ms": plain.cpu / steps * 1e3,
        "overhead_monitor": monitor.overhead,
        "overhead_inside_cpu": watched.inside / (watched.cpu - watched.inside),
        "overhead_cpu": watched.cpu / plain.cpu - 1,
        "overhead_wall": watched.wall / plain.wall - 1,
        "overhead_cpu_blocks": ratios,
        "overhead_cpu_stderr": float(np.std(ratios, ddof=1) / np.sqrt(len(ratios))) if len(ratios) > 1 else None,
        "same_weights": same,
        "main": main,
        "records": len(monitor.history),
        "counts": {name: sum(name in r for r in monitor.history) for name in monitor.history.names},
        "record_steps": [r.step for r in records],
        "num_samples": [r.num_samples for r in records],
        "values": [r[main].value for r in records],
        "stated_errors": [r[main].stderr for r in records],
        "products": [r[main].num_matvecs for r in records],
        "exact": [truth[r.step] for r in records],
        "median_error": float(np.median(errors)) if errors else None,
        "worst_error": max(errors, default=None),
        "within_stated_error": float(np.mean(covered)) if covered else None,
        "failed": {name: reason for r in monitor.history for name, reason in r.failed.items()},
        "seconds": time.perf_counter() - began,
    }


# -- tracking -------------------------------------------------------------------------------------------------------------
def _batches(x: Tensor, y: Tensor, batch: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(SEED)
    while True:
        chosen = torch.randint(len(x), (batch,), generator=generator) if batch else slice(None)
        yield x[chosen], y[chosen]


def tracking(title: str, *, lr: float, skip: int, steps: int, batch: int | None, target: float | None) -> Row:
    """lambda_max to 1 % at every step from ``skip`` on: products and, against Lanczos to a tenth of that, the error."""
    began = time.perf_counter()
    x, y, data = images(500, side=14)
    model = seeded(tanh_mlp, SEED)
    optimizer = torch.optim.SGD(model.parameters(), lr)
    monitor = sk.Monitor(model, optimizer, loss=half_square, every=1, metrics=["lambda_max"], tol=0.01, seed=SEED)
    truth: list[float] = []
    for step, (xb, yb) in enumerate(_batches(x, y, batch)):
        if step == skip + steps:
            break
        loss = half_square(model(xb), yb)
        optimizer.zero_grad()
        loss.backward()
        if step >= skip:
            monitor.step((xb, yb), loss=loss)
        if step >= skip and (step - skip) % CHECK == 0:
            operator = sk.HessianOperator(sk.Objective(model, (xb, yb), loss=half_square))
            truth.append(float(sk.eigenpairs(operator, 1, tol=1e-3, max_matvecs=400, seed=1).values[0]))
        optimizer.step()
    found = [record["lambda_max"] for record in monitor.history]
    values = [m.value for m in found][::CHECK]
    errors = np.abs(np.array(values) / np.array(truth) - 1)
    matvecs = np.array([m.num_matvecs for m in found])
    moved = np.abs(np.diff(truth)) / np.array(truth[1:])
    return {
        "part": "tracking",
        "phase": title,
        "lr": lr,
        "batch": batch,
        "data": data,
        "first_step": skip,
        "train_steps": steps,
        "target": target,
        f"moved_in_{CHECK}_steps": float(np.median(moved)),
        "lambda_over_limit": [truth[0] * lr / 2, truth[-1] * lr / 2],
        "products_per_step": float(matvecs.mean()),
        "gradients_per_step": float(2 * matvecs.mean()),
        "extrapolated": float((matvecs == 0).mean()),
        "within_1_percent": float((errors <= 0.01).mean()),
        "median_error": float(np.median(errors)),
        "worst_error": float(errors.max()),
        "said_converged": float(np.mean([m.converged for m in found])),
        "checked_every": CHECK,
        "exact": truth,
        "values": values,
        "errors": errors.tolist(),
        "seconds": time.perf_counter() - began,
    }


def measure(part: str, quick: bool, names: list[str]) -> Iterator[Row]:
    """All rows of one part; of the overhead, for the workloads named."""
    short = 10 if quick else 1
    if part == "overhead":
        for budget in BUDGETS:
            for workload in WORKLOADS:
                if workload.title in names:
                    yield overhead(workload, budget, workload.steps // short)
    else:
        for title, skip, batch, target in (
            ("progressive sharpening", 50, None, 2.0),
            ("edge of stability", 2500, None, 5.0),
            ("SGD, B = 64: another matrix every step", 500, 64, None),
        ):
            yield tracking(title, lr=0.06, skip=skip // short, steps=300 // short, batch=batch, target=target)


def identity(row: Row) -> tuple[Any, ...]:
    """Of a row, in the order of the results file."""
    titles = [workload.title for workload in WORKLOADS]
    return (
        PARTS.index(row["part"]),
        titles.index(row["workload"]) if "workload" in row else 0,
        row.get("budget", 0),
        row.get("first_step", 0),
    )


# -- figures --------------------------------------------------------------------------------------------------------------
def draw(rows: list[Row], folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    for part, painter in (("overhead", draw_overhead), ("tracking", draw_tracking)):
        mine = [row for row in rows if row["part"] == part]
        if mine:
            canvas = Figure(figsize=(9, 3.6), layout="constrained")
            painter(mine, canvas)
            canvas.savefig(folder / f"monitor_{part}.png", dpi=110, metadata={"Software": f"python -m experiments.{NAME}"})


def draw_overhead(rows: list[Row], canvas: Any) -> None:
    left, right = canvas.subplots(1, 2)
    names = list(dict.fromkeys(row["workload"] for row in rows))
    for budget, allowed, colour in ((0.05, 0.055, "C0"), (0.01, 0.012, "C1")):
        mine = [row for row in rows if row["budget"] == budget]
        places = [names.index(row["workload"]) for row in mine]
        words = f"budget {budget:.0%}"
        left.plot([100 * row["overhead_monitor"] for row in mine], places, "o", color=colour, label=f"{words}: monitor's own clock")
        left.errorbar(
            [100 * row["overhead_cpu"] for row in mine],
            [p + (0.15 if budget == 0.05 else 0.3) for p in places],
            xerr=[100 * (row["overhead_cpu_stderr"] or 0) for row in mine],
            fmt="s",
            color=colour,
            mfc="white",
            ms=5,
            label=f"{words}: with over without",
        )
        left.axvline(100 * allowed, color=colour, ls="--", lw=0.9)
        for row, place in zip(mine, places, strict=True):
            errors = 100 * np.abs(np.array(row["values"]) / np.array(row["exact"]) - 1)
            shift = 0.15 if budget == 0.01 else -0.15
            right.plot(np.maximum(errors, 1e-3), np.full(len(errors), place + shift), ".", color=colour, ms=4, alpha=0.5)
            if len(errors):
                right.plot(max(np.median(errors), 1e-3), place + shift, "|", color=colour, ms=16, mew=2)
    right.axvline(5, color="black", ls="--", lw=0.9)
    for ax in (left, right):
        ax.set_yticks(range(len(names)), names, fontsize=8)
        ax.set_ylim(len(names) - 0.5, -0.5)
    right.tick_params(labelleft=False)
    left.set(xlabel="overhead, % of training (target dashed)", xlim=(0, None))
    right.set(xlabel="error of the recorded curvature, % (bar: median)", xscale="log")
    left.legend(fontsize=6)


def draw_tracking(rows: list[Row], canvas: Any) -> None:
    axes = canvas.subplots(2, len(rows), squeeze=False, height_ratios=[2, 1], sharex="col")
    for column, row in enumerate(rows):
        steps = row["first_step"] + row["checked_every"] * np.arange(len(row["exact"]))
        axes[0, column].plot(steps, row["exact"], color="black", lw=1.6, alpha=0.4, label="exact")
        axes[0, column].plot(steps, row["values"], color="C3", lw=0.8, label="tracked")
        axes[0, column].set_title(f"{row['phase'].split(':')[0]}\n{row['gradients_per_step']:.2f} gradients a step", fontsize=9)
        axes[1, column].plot(steps, 100 * np.maximum(row["errors"], 1e-6), ".", color="C3", ms=3)
        axes[1, column].axhline(1, color="black", ls="--", lw=0.9)
        axes[1, column].set(xlabel="step", yscale="log")
    axes[0, 0].set_ylabel(r"$\lambda_{\max}$")
    axes[1, 0].set_ylabel("error, %")
    axes[0, 0].legend(fontsize=7)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps, into a temporary folder")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS, help="rows of the other are kept as they are")
    parser.add_argument("--workloads", nargs="+", default=[w.title for w in WORKLOADS], help="of the overhead; others are kept as they are")
    parser.add_argument("--figure-only", action="store_true", help="draw anew from the results there are")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("default")
    results, figures = HERE / "results" / f"{NAME}.jsonl", HERE.parent / "figures"
    if options.quick:
        figures = Path(tempfile.gettempdir()) / "sharpkit-experiments"
        figures.mkdir(parents=True, exist_ok=True)
        results = figures / results.name
    rows = read_rows(results) if results.exists() else []
    for part in [] if options.figure_only else options.parts:
        for row in measure(part, options.quick, options.workloads):
            rows = sorted([*(r for r in rows if identity(r) != identity(row)), row], key=identity)
            head = circumstances(NAME, quick=options.quick, seconds=sum(r["seconds"] for r in rows))
            results.write_text("".join(json.dumps(rounded(r)) + "\n" for r in [head, *rows]))
            print({key: value for key, value in rounded(row).items() if not isinstance(value, list) or len(value) < 3}, flush=True)
    draw(rows, figures)


if __name__ == "__main__":
    main()
