"""Does sharpness go with the generalisation gap? Measures of nets trained to one loss at many rates, batch sizes and seeds.

    python -m experiments.measures_generalisation     # results/measures_generalisation.jsonl, figures/measures_generalisation.png

A ReLU MLP on 2000 Fashion-MNIST images of 14 x 14 is trained by SGD, at each rate and batch size from three seeds, until the loss on
all training images is at most 0.05 (looked at every 50 steps); runs that do not get there within the steps allowed are left out and
counted. The gap is the test loss (error) on 10,000 other images less that on the training images. Of each measure Kendall's rank
correlation with the gap over the runs, with a 95 % interval from resampled grid cells: runs of one cell differ by their seed alone and
are drawn together.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.stats import kendalltau
from torch import Tensor, nn
from torch.nn import functional as F

import sharpkit as sk
from experiments._common import Row, run_as_script
from experiments._models import images, mlp, seeded
from sharpkit import measures

RATES, BATCHES, SEEDS = (0.0125, 0.025, 0.05, 0.1, 0.2), (8, 32, 128), (0, 1, 2)
TRAIN, TEST, TARGET, MOST_STEPS, LOOK = 2000, 10_000, 0.05, 60_000, 50
DRAWS = 2000  # of the bootstrap

Pair = tuple[Tensor, Tensor]


def _nearby(perturbation: str, rho: float, **settings: Any) -> Callable[[sk.Objective], float]:
    return lambda objective: measures.m_sharpness(objective, perturbation=perturbation, rho=rho, **settings).values[0].value


# rho is the second of the paper's four for each perturbation, fixed before any run was looked at
MEASURES: dict[str, Callable[[sk.Objective], float]] = {
    "worst l2": _nearby("l2", 0.5, adaptive=False),
    "worst l2, adaptive": _nearby("l2", 0.5),
    "worst l2, adaptive, normalised logits": _nearby("l2", 0.5, logit_normalization=True),
    "worst l-inf": _nearby("linf", 0.001, adaptive=False),
    "worst l-inf, adaptive": _nearby("linf", 0.002),
    "worst l-inf, adaptive, normalised logits": _nearby("linf", 0.002, logit_normalization=True),
    "average": _nearby("gaussian", 0.1, adaptive=False),
    "average, adaptive": _nearby("gaussian", 0.1),
    "average, adaptive, normalised logits": _nearby("gaussian", 0.1, logit_normalization=True),
    "SAM": lambda o: measures.sam_sharpness(o, m=128).value,
    "ASAM": lambda o: measures.sam_sharpness(o, adaptive=True, m=128).value,
    "logit sharpness": lambda o: measures.logit_sharpness(o).value,
    "lambda_max": lambda o: float(sk.eigenpairs(sk.HessianOperator(o), k=1, tol=1e-2).values[0]),
    "trace": lambda o: sk.trace(sk.HessianOperator(o), rtol=0.05).value,
    "effective dimension, damping 0.01": lambda o: (
        measures.effective_dimension(sk.HessianOperator(o), 0.01, num_probes=4, num_steps=40).value
    ),
    "Fisher-Rao norm": lambda o: measures.fisher_rao_norm(o).value,
    "relative flatness, second layer": lambda o: measures.relative_flatness(o, "3.weight", rtol=0.1).value,
    "norm of the weights": lambda o: float(o.layout.current().norm()),
    "training loss": lambda o: o.value(),
}


def data(quick: bool) -> tuple[Pair, Pair, str]:
    """Training and test images with labels."""
    train, test = (300, 1000) if quick else (TRAIN, TEST)
    x, y, name = images(train + test, side=14)
    return (x[:train], y[:train]), (x[train:], y[train:]), name


@torch.no_grad()
def loss_and_error(model: nn.Module, pair: Pair) -> tuple[float, float]:
    """Mean cross-entropy, and the share of wrong labels."""
    z = model(pair[0])
    return float(F.cross_entropy(z, pair[1])), float((z.argmax(dim=1) != pair[1]).float().mean())


def trained(rate: float, batch: int, seed: int, train: Pair, *, most: int) -> tuple[nn.Module, int, float]:
    """The model, steps made, and the training loss it ended at: the first seen at most TARGET, if it came."""
    model = seeded(lambda: mlp((196, 64, 64, 10)), seed)
    optimizer, generator = torch.optim.SGD(model.parameters(), lr=rate), torch.Generator().manual_seed(seed)
    (x, y), steps, loss = train, 0, math.inf
    while steps < most:
        order = torch.randperm(len(x), generator=generator)
        for chosen in order.split(batch)[: len(x) // batch]:
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
            steps += 1
            if steps % LOOK == 0 and not (loss := loss_and_error(model, train)[0]) > TARGET:
                optimizer.zero_grad(set_to_none=True)
                return model.eval(), steps, loss
    optimizer.zero_grad(set_to_none=True)
    return model.eval(), steps, loss


def run(rate: float, batch: int, seed: int, train: Pair, test: Pair, *, quick: bool) -> Row:
    """One network: gaps, and every measure with the seconds it took."""
    model, steps, _ = trained(rate, batch, seed, train, most=3000 if quick else MOST_STEPS)
    loss, error = loss_and_error(model, train)
    row: Row = {"rate": rate, "batch": batch, "seed": seed, "steps": steps, "loss": loss, "reached": loss <= TARGET}
    if not row["reached"]:
        return row
    test_loss, test_error = loss_and_error(model, test)
    row |= {"test_loss": test_loss, "test_error": test_error, "gap": test_loss - loss, "seconds": {}}
    # rounded, since equal counts of errors are ties and no ranks of float32's last digits
    row["error_gap"] = round(test_error - error, 6)
    objective = sk.Objective(model, train, loss=F.cross_entropy)
    for name, measure in MEASURES.items():
        began = time.perf_counter()
        row[name] = measure(objective)
        row["seconds"][name] = time.perf_counter() - began
    return row


def correlation(rows: list[Row], name: str, gap: str) -> Row:
    """Kendall's tau of a measure with a gap, and a 95 % interval by resampling grid cells."""
    cells: dict[tuple[float, int], list[Row]] = {}
    for row in rows:
        cells.setdefault((row["rate"], row["batch"]), []).append(row)
    random, keys, taus = np.random.default_rng(0), list(cells), []

    def tau(some: list[Row]) -> float:
        return float(kendalltau([r[name] for r in some], [r[gap] for r in some]).statistic)

    for _ in range(DRAWS):
        picked = [row for i in random.integers(len(keys), size=len(keys)) for row in cells[keys[i]]]
        taus.append(tau(picked))
    low, high = np.nanpercentile(taus, [2.5, 97.5])
    same = {
        "tau_at_one_batch": float(np.mean([tau([r for r in rows if r["batch"] == b]) for b in sorted({r["batch"] for r in rows})])),
        "tau_at_one_rate": float(np.nanmean([tau([r for r in rows if r["rate"] == e]) for e in sorted({r["rate"] for r in rows})])),
    }
    return {"measure": name, "gap": gap, "tau": tau(rows), "low": float(low), "high": float(high), **same}


def measure(quick: bool) -> list[Row]:
    """A row for each run, then one for each measure and gap."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", sk.SharpkitWarning)
    train, test, name = data(quick)
    rates, batches, seeds = (RATES[2:4], BATCHES[:2], SEEDS[:1]) if quick else (RATES, BATCHES, SEEDS)
    rows = [run(rate, batch, seed, train, test, quick=quick) for rate in rates for batch in batches for seed in seeds]
    kept = [row | {"rate over batch size": row["rate"] / row["batch"]} for row in rows if row["reached"]]
    told = (*MEASURES, "rate over batch size")
    head = {"data": name, "runs": len(rows), "kept": len(kept), "target": TARGET}
    return [head, *rows, *(correlation(kept, each, gap) for gap in ("gap", "error_gap") for each in told)]


def draw(rows: list[Row], canvas: Any) -> None:
    """Correlations with their intervals, and two measures against the gap."""
    canvas.set_size_inches(12, 5)
    left, *right = canvas.subplots(1, 3, width_ratios=(1.5, 1, 1))
    told = [row for row in rows if row.get("gap") == "gap" and "tau" in row]
    errors = {row["measure"]: row for row in rows if row.get("gap") == "error_gap"}
    for i, row in enumerate(told):
        for shift, each, colour in ((-0.15, row, "#2563a8"), (0.15, errors[row["measure"]], "#d1662b")):
            left.plot([each["low"], each["high"]], [i + shift] * 2, color=colour, linewidth=1.5)
            left.plot(each["tau"], i + shift, color=colour, marker="o", markersize=4)
    left.plot([], [], color="#2563a8", marker="o", label="with the loss gap")
    left.plot([], [], color="#d1662b", marker="o", label="with the error gap")
    left.axvline(0, color="grey", linewidth=0.8)
    left.set_yticks(range(len(told)), [row["measure"] for row in told], fontsize=8)
    left.invert_yaxis()
    left.set(xlabel="Kendall's tau, 95 % interval", xlim=(-1, 1))
    left.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    runs = [row for row in rows if row.get("reached")]
    for ax, gap in zip(right, ("gap", "error_gap"), strict=True):
        for batch, marker in zip(sorted({row["batch"] for row in runs}), "os^", strict=False):
            some = [row for row in runs if row["batch"] == batch]
            points = ax.scatter(
                *([row[key] for row in some] for key in ("lambda_max", gap)), c=[math.log(row["rate"]) for row in some], marker=marker,
                s=28, cmap="viridis", vmin=math.log(RATES[0]), vmax=math.log(RATES[-1]),
            )  # fmt: skip
            ax.scatter([], [], color="grey", marker=marker, s=28, label=f"B = {batch}")
        ax.set(xlabel="lambda_max", ylabel={"gap": "loss gap", "error_gap": "error gap"}[gap], xscale="log")
        ax.legend(frameon=False, fontsize=8)
    bar = canvas.colorbar(points, ax=right[-1], label="rate")
    bar.set_ticks([math.log(rate) for rate in RATES], labels=[f"{rate:g}" for rate in RATES])


if __name__ == "__main__":
    run_as_script("measures_generalisation", measure, draw)
