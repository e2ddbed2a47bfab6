"""Does training in a norm end at the edge of its own sharpness? Steepest descent in l-inf and the spectral norm; Muon and Lion as they are.

Full batch, real images (the GPT: characters), half the squared error (cross-entropy), float32.

    python -m experiments.geometry_edge      # results/geometry_edge.jsonl, figures/geometry_edge.png

Rows of kind "steepest": w <- w - eta ||g||_* d*, at three rates each, which begin at given shares of the edge. S is the largest d^T H d
over the unit ball, a lower bound, each time from the last direction and three others, with 12 products; S eta / 2 is 1 at the edge, and
"along", d*^T H d* eta / 2, is the same along the step itself. Rows of kind "optimizer": torch's Muon, and Lion, whose steps have a fixed
length, without momentum and with; S beside 2 ||g||_* / lr. Means are over the last third of the measurements.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import sharpkit as sk
from experiments._common import Row, run_as_script, threads
from experiments._models import GPT, conv_net, images, mlp, seeded, text
from sharpkit.measuring.geometry import Ball

PRODUCTS, STARTS = 12, 4
# Shares of the edge at which the three rates begin, and steps: by trial, the MLP sharpens slowly.
BEGIN = {"MLP": (0.4, 0.6, 0.8), "conv net": (0.2, 0.3, 0.4)}
STEPS = {"MLP": 4000, "conv net": 1600, "GPT": 500}
RATES = {"Lion": 1e-3, "Muon": 0.02}


class Lion(torch.optim.Optimizer):
    """Chen et al. (2023), arXiv 2302.06675; sharpkit knows it by its name."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float]) -> None:
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            first, second = group["betas"]
            for p in group["params"]:
                mean = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.sub_(torch.sign(first * mean + (1 - first) * p.grad), alpha=group["lr"])
                mean.lerp_(p.grad, 1 - second)


def half_square(output: Tensor, target: Tensor) -> Tensor:
    """Half the squared error of each sample, on average over them."""
    return (output - target).square().sum(dim=1).mean() / 2


def tasks(quick: bool) -> dict[str, tuple[nn.Module, Tensor, Tensor, Callable[[Tensor, Tensor], Tensor]]]:
    x, y, _ = images(100 if quick else 500, side=8)
    small, labels, _ = images(50 if quick else 200, side=12)
    one_hot = nn.functional.one_hot(y, 10).float()
    return {
        "MLP": (seeded(lambda: mlp((64, 24, 24, 10), nn.Tanh)), x, one_hot, half_square),
        "GPT": (seeded(lambda: GPT(width=16, time=16)), *text(2 if quick else 8, 16)[:2], nn.functional.cross_entropy),
        "conv net": (seeded(lambda: conv_net(6, side=12, batch_norm=False)), small, nn.functional.one_hot(labels, 10).float(), half_square),
    }


class Follower:
    """S along a run, from the last direction on."""

    def __init__(self, objective: sk.Objective) -> None:
        self.objective, self.last = objective, None

    def __call__(self, geometry: Any, step: int) -> sk.GeneralizedSharpness:
        made = sk.generalized_sharpness(self.objective, geometry, seed=step, num_starts=STARTS, max_matvecs=PRODUCTS, initial=self.last)
        self.last = made.direction
        return made


def steepest(name: str, norm: Any, begin: float, *, quick: bool, steps: int, every: int) -> Row:
    """One run of steepest descent."""
    model, x, y, loss = tasks(quick)[name]
    objective = sk.Objective(model, (x, y), loss=loss)
    ball, follow, series = Ball(norm, objective.layout), Follower(objective), []
    rate = begin * 2 / sk.generalized_sharpness(objective, norm, num_starts=10).value
    for step in range(steps + 1):
        value = loss(model(x), y)
        gradient = objective.layout.flatten(torch.autograd.grad(value, objective.layout.params))
        direction = ball.furthest(gradient[:, None])[:, 0]
        dual = float(direction @ gradient)
        if step % every == 0:
            made = follow(norm, step)
            along = float(direction @ (sk.HessianOperator(objective) @ direction))
            series.append([step, value.item(), made.value * rate / 2, along * rate / 2])
        with torch.no_grad():
            for p, d in zip(objective.layout.params, objective.layout.split(rate * dual * direction), strict=True):
                p.sub_(d)
    tail = np.array(series[-(len(series) // 3) :])
    row = {"kind": "steepest", "case": name, "norm": norm, "rate": rate, "steps": step, "first": series[0][2], "loss": tail[-1, 1]}
    return row | {"sharpness": tail[:, 2].mean(), "spread": tail[:, 2].std(), "along": tail[:, 3].mean(), "series": series}


def optimizer_run(
    name: str, made_by: Callable[[list[Tensor]], torch.optim.Optimizer], label: str, *, quick: bool, steps: int, every: int
) -> Row:
    """One run of a real optimizer; of Muon, which takes matrices alone, the other parameters rest."""
    model, x, y, loss = tasks(quick)[name]
    held = [p for p in model.parameters() if p.ndim == 2 or not label.startswith("Muon")]
    for p in model.parameters():
        p.requires_grad_(any(p is q for q in held))
    objective, optimizer = sk.Objective(model, (x, y), loss=loss), made_by(held)
    follow, series = Follower(objective), []
    for step in range(steps + 1):
        optimizer.zero_grad()
        value = loss(model(x), y)
        value.backward()
        if step % every == 0:
            made = follow(optimizer, step)
            series.append([step, value.item(), made.value, made.limit])
        optimizer.step()
    tail = np.array(series[-(len(series) // 3) :])
    share = tail[:, 2] / tail[:, 3]
    row = {"kind": "optimizer", "case": name, "optimizer": label, "lr": optimizer.param_groups[0]["lr"], "loss": float(tail[-1, 1])}
    return row | {"share": float(np.median(share)), "ratio_of_means": float(tail[:, 2].mean() / tail[:, 3].mean()), "series": series}


OPTIMIZERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "Lion, no momentum": lambda p: Lion(p, lr=RATES["Lion"], betas=(0.0, 0.0)),
    "Lion, betas .9 .99": lambda p: Lion(p, lr=RATES["Lion"], betas=(0.9, 0.99)),
    "Muon, no momentum": lambda p: torch.optim.Muon(p, lr=RATES["Muon"], momentum=0.0, nesterov=False, weight_decay=0.0),
    "Muon, momentum .95": lambda p: torch.optim.Muon(p, lr=RATES["Muon"], momentum=0.95, nesterov=True, weight_decay=0.0),
}


def measure(quick: bool) -> list[Row]:
    rows, most = [], 10 if quick else 24
    with threads(1):
        for case, begins in BEGIN.items():
            for norm in ("linf", "spectral"):
                for begin in begins[:1] if quick else begins:
                    steps = 20 if quick else STEPS[case]
                    rows.append(steepest(case, norm, begin, quick=quick, steps=steps, every=max(1, steps // most)))
                    print({key: value for key, value in rows[-1].items() if key != "series"}, flush=True)
        for case in ("MLP",) if quick else STEPS:
            for label, made_by in OPTIMIZERS.items():
                steps = 20 if quick else min(1600, STEPS[case])
                rows.append(optimizer_run(case, made_by, label, quick=quick, steps=steps, every=max(1, steps // most)))
                print({key: value for key, value in rows[-1].items() if key != "series"}, flush=True)
    return rows


def draw(rows: list[Row], figure: Any) -> None:
    left, right = figure.subplots(1, 2)
    for row in (row for row in rows if row["kind"] == "steepest"):
        series = np.array(row["series"])
        line = "-" if row["norm"] == "linf" else "--"
        left.plot(series[:, 0] / series[-1, 0], series[:, 2], line, lw=1, label=f"{row['case']}, {row['norm']}, {row['rate']:.2g}")
    left.axhline(1.0, color="0.5", lw=0.8)
    left.set(xlabel="share of the run", ylabel="S eta / 2", title="Steepest descent")
    for row in (row for row in rows if row["kind"] == "optimizer"):
        series = np.array(row["series"])
        line = "-" if "no momentum" in row["optimizer"] else "--"
        right.plot(series[:, 0] / series[-1, 0], series[:, 2] / series[:, 3], line, lw=1, label=f"{row['case']}, {row['optimizer']}")
    right.axhline(1.0, color="0.5", lw=0.8)
    right.set(xlabel="share of the run", ylabel="S / (2 ||g||_* / lr)", yscale="log", title="Steps of a fixed length")
    for axes in (left, right):
        axes.legend(fontsize=5, loc="upper left", bbox_to_anchor=(1.0, 1.0))


if __name__ == "__main__":
    run_as_script("geometry_edge", measure, draw)
