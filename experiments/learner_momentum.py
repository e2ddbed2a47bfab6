"""Rules for learning rate and momentum from the two ends of the curvature, against a momentum that is kept: which is best on which task?

"Polyak" is ``CurvatureLearner(momentum="polyak")``: the momentum of his pair, the rate at a share (``safety``) of the stability limit that
this momentum makes, which is his rate but for a factor 1 + mu / L. Two other rules are those of the scripts published with arXiv
2006.09092, with no share taken: 2 / (L + mu) with the momentum kept, and sqrt(mu / L) with momentum
(sqrt L - sqrt mu) / (sqrt L + sqrt mu). mu is read from ten Lanczos steps in the ways of ``bulk``. Every loss is divided by the best of a
grid of rates under a linear decay with momentum 0.9 (or AdamW), on the same seeds; the products that read mu are not counted.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

import sharpkit as sk
from experiments._common import Row
from experiments._learner_tasks import TASKS, baseline, learn, run_and_draw, task_of
from experiments.learner_ablation import CHOICE, GRID, best_of_grid, mean_loss
from sharpkit.learner.gauge import bulk_curvature
from sharpkit.linalg.slq import spectral_density

NAME = "learner_momentum"
SEEDS = {"digits": range(5), "fashion": range(3), "text": range(2)}
BULKS: list[str | float] = ["median", "weighted median", "mean", 1e2, 1e3, 1e4]
KEPT, POLYAK, SUM, ROOT = "keep", "polyak", "2/(L+mu)", "sqrt(mu/L)"
BOLD = 0.9
RULES: list[dict[str, Any]] = [
    {"rule": KEPT, "bulk": None, "safety": CHOICE["safety"]},
    *({"rule": POLYAK, "bulk": b, "safety": s} for s in (CHOICE["safety"], BOLD) for b in BULKS),
    {"rule": SUM, "bulk": "median", "safety": 1.0},
    *({"rule": ROOT, "bulk": b, "safety": 1.0} for b in BULKS),
]
KEYS = ("kind", "task", "seed", "rule", "bulk", "safety", "rate", "schedule")
_STEPS = 10  # of Lanczos, as the learner takes


class Published:
    """Stands in for the learner's limit and sets its momentum: the whole rate that a rule gives, at a share of one."""

    def __init__(self, learner: sk.CurvatureLearner, rule: str, bulk: str | float) -> None:
        self._learner, self._measure, self._rule, self._bulk, self._mu = learner, learner._gauge.measure, rule, bulk, 0.0
        learner._limit_at, learner._gauge.measure = self.limit_at, self.measure  # type: ignore[method-assign]

    def measure(self, hessian: sk.HessianOperator, *, step: int) -> Any:
        """lambda_max as ever, and mu beside it."""
        found = self._measure(hessian, step=step)
        matrix = self._learner._gauge._matrix
        assert matrix is not None
        density = spectral_density(matrix, num_probes=1, num_steps=min(_STEPS, matrix.size), seed=step)
        nodes, weights = density.nodes.flatten().tolist(), density.weights.flatten().tolist()
        self._mu = bulk_curvature(nodes, weights, found.value, self._bulk) or 1e-12
        if self._rule == ROOT and found.value > 0:
            a, b = math.sqrt(found.value), math.sqrt(self._mu)
            for group in self._learner.optimizer.param_groups:
                group["momentum"] = (a - b) / (a + b)
        return found

    def limit_at(self, largest: float) -> float:
        """Such that the learner's share of it is the rule's rate."""
        rate = math.sqrt(min(self._mu / largest, 1.0)) if self._rule == ROOT else 2 / (largest + self._mu)
        return rate / self._learner.safety


def evaluate(job: Row) -> Row:
    """One run, of the grid or of a rule."""
    task = task_of(job["task"])
    if job["kind"] == "grid":
        training, test = baseline(task, job["rate"], job["schedule"], job["seed"])
        return {"train": training, "test": test}
    if job["rule"] in (SUM, ROOT):
        return learn(task, job["seed"], safety=CHOICE["safety"], change=lambda learner: Published(learner, job["rule"], job["bulk"]))
    settings = {"momentum": "polyak", "bulk": job["bulk"]} if job["rule"] == POLYAK else {}
    return learn(task, job["seed"], safety=job["safety"], **settings)


def jobs(quick: bool) -> list[Row]:
    """The grid around the best rate, then the rules; those that set a momentum are for SGD."""
    found: list[Row] = []
    for name in ["digits"] if quick else list(TASKS):
        for seed in list(SEEDS[name])[: 1 if quick else None]:
            run = {"task": name, "seed": seed}
            found += [{"kind": "grid", **run, "rate": task_of(name).grid[j], "schedule": "linear"} for j in GRID[name]]
            found += [{"kind": "rule", **run, **rule} for rule in RULES if name != "text" or rule["rule"] in (KEPT, SUM)]
    return found


def ratio(rows: list[Row], task: str, which: str, rule: Row) -> float:
    """Mean loss under a rule over the best of the grid; NaN where it was not run."""
    mine = [row for row in rows if row["kind"] == "rule" and row["task"] == task and all(row[k] == v for k, v in rule.items())]
    return mean_loss(mine, which) / best_of_grid(rows, task, which, {row["seed"] for row in mine}) if mine else math.nan


def label(rule: Row) -> str:
    """In a word or two."""
    if rule["rule"] in (KEPT, SUM):
        return {KEPT: "kept, 0.9", SUM: SUM}[rule["rule"]]
    bulk = rule["bulk"] if isinstance(rule["bulk"], str) else f"L / {rule['bulk']:g}"
    return f"{rule['rule']}, mu {bulk}" + (f", {rule['safety']:g}" if rule["rule"] == POLYAK else "")


def table(rows: list[Row]) -> list[str]:
    """One line a rule: ratios, momentum and rate in the end."""
    lines = []
    for rule in RULES:
        cells = []
        for task in TASKS:
            mine = [r for r in rows if r["kind"] == "rule" and r["task"] == task and all(r[k] == v for k, v in rule.items())]
            if mine:
                momenta = "/".join(f"{f([r['last_momentum'] for r in mine]):.2f}" for f in (min, max))
                rate = math.exp(float(np.mean(np.log([max(r["lr"], 1e-30) for r in mine]))))
                test, training = (ratio(rows, task, which, rule) for which in ("test", "train"))
                back = sum(r["rollbacks"] for r in mine)
                cells.append(f"{task} {test:.2f} ({training:.2f}), momentum {momenta}, lr {rate:.2g}, back {back}")
        lines.append(f"{label(rule)}: " + "; ".join(cells))
    return lines


def draw(rows: list[Row], path: Path) -> None:
    """Ratios to the best grid point, a row a rule."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(10, 5.6), layout="constrained")
    axes = canvas.subplots(1, 2, sharey=True)
    for ax, which in zip(axes, ("test", "train"), strict=True):
        for j, task in enumerate(TASKS):
            places = np.arange(len(RULES)) + 0.15 * (j - 1)
            ax.plot([ratio(rows, task, which, rule) for rule in RULES], places, "o", color=f"C{j}", ms=5, label=task_of(task).name)
        ax.axvline(1.02 if which == "test" else 1.2, color="C3", ls="--", lw=0.9)
        ax.set(xscale="log", xlabel=f"{'test' if which == 'test' else 'training'} loss / best of the grid")
        ax.grid(axis="y", lw=0.3)
    axes[0].set_yticks(range(len(RULES)), [label(rule) for rule in RULES], fontsize=8)
    axes[0].invert_yaxis()
    axes[1].legend(fontsize=8)
    canvas.suptitle(f"python -m experiments.{NAME}; dashed: target", fontsize=9)
    canvas.savefig(path, dpi=110, metadata={"Software": f"python -m experiments.{NAME}"})


if __name__ == "__main__":
    run_and_draw(NAME, __doc__, evaluate=evaluate, jobs=jobs, keys=KEYS, table=table, draw=draw)
