"""Rates of their own for LoRA's A and B, from the limits of their blocks, against one rate and LoRA+'s fixed ratio.

    python -m experiments.lora_rates          # results/lora_rates.jsonl, figures/lora_rates.png

A char transformer trained on Python's source code is frozen and goes on with English prose by low-rank factors (rank 4) on every linear
layer: y = W x + B A x, B from 0. After 20 steps `sk.layerwise.layer_rates` measures the largest stable rate of all A's and of all B's.
Ratios of B's rate to A's: 1, 4 and 16 (LoRA+, arXiv 2402.12354, advises about 16), 1/4, and the measured one. Each at the best of a grid of
the two rates' geometric mean, cosine to 0.
"""

from __future__ import annotations

import copy
import math
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sharpkit as sk
from experiments._common import Row, run_as_script, searched
from experiments._models import GPT, seeded
from experiments.rewarming import held_out, run, windows

RANK, WARM, SAMPLES, GRID = 4, 20, 256, (0.0025, 0.005, 0.01, 0.02)
RATIOS = {"one rate": 1.0, "B at 4 times A's": 4.0, "B at 16 times A's (LoRA+)": 16.0, "B at a quarter of A's": 0.25}
MEASURED = "by the blocks' limits"
SEEDS = (0, 1, 2, 3, 4)
_SEARCHED, _REACH = 2, 5  # seeds that the grid is searched with, and how many factors of 2 it may move on


class LoRA(nn.Module):
    """W x + B A x with W frozen."""

    def __init__(self, base: nn.Linear, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base
        self.A = nn.Parameter(torch.randn(RANK, base.in_features, generator=generator) / math.sqrt(base.in_features))
        self.B = nn.Parameter(torch.zeros(base.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.A.T @ self.B.T


@cache
def pretrained(steps: int) -> Any:
    model = seeded(lambda: GPT(time=32, width=48, layers=1, heads=4), 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.01)
    run(model, optimizer, sk.laws.scheduler(optimizer, sk.laws.linear, total_steps=steps, warmup=steps // 10), "code", steps=steps, seed=0)
    return model


@cache
def started(seed: int, before: int) -> tuple[Any, float, list[float]]:
    """The model with factors after the first steps, the measured ratio of B's rate to A's, and both limits."""
    model, generator = copy.deepcopy(pretrained(before)).requires_grad_(False), torch.Generator().manual_seed(seed)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and not isinstance(module, LoRA):
                setattr(module, name, LoRA(child, generator))
    own = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(own, lr=0.002, weight_decay=0.0)
    run(model, optimizer, sk.laws.scheduler(optimizer, lambda z: 1.0, total_steps=WARM), "prose", steps=WARM, seed=50 + seed)
    x, y = windows("prose")
    objective = sk.Objective(model, (x[:SAMPLES], y[:SAMPLES]), loss=F.cross_entropy)
    rates = sk.layerwise.layer_rates(objective, optimizer, group=lambda name: name[-1], tol=0.03)
    limits = dict(zip(rates.names, map(float, rates.alone), strict=True))
    return model, limits["B"] / limits["A"], [limits["A"], limits["B"]]


def trained(ratio: float, lr: float, seed: int, *, before: int, steps: int) -> float:
    """Held-out loss on prose."""
    model = copy.deepcopy(started(seed, before)[0])
    factors: dict[str, list[Any]] = {"A": [], "B": []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            factors[name[-1]].append(p)
    optimizer = torch.optim.AdamW([{"params": factors["A"], "lr": lr}, {"params": factors["B"], "lr": lr * ratio}], weight_decay=0.0)
    run(model, optimizer, sk.laws.scheduler(optimizer, sk.laws.cosine, total_steps=steps), "prose", steps=steps, seed=100 + seed)
    loss = held_out(model, "prose")
    return loss if math.isfinite(loss) else math.inf


def measure(quick: bool) -> list[Row]:
    """One row for each way and seed, at its best rate."""
    torch.set_num_threads(1)
    rows, before, steps = list[Row](), 100 if quick else 1000, 30 if quick else 300
    seeds = SEEDS[: 1 if quick else None]
    for way in (*RATIOS, MEASURED):

        def mean(lr: float, which: tuple[int, ...], way: str = way) -> list[float]:
            ratios = [RATIOS.get(way, started(seed, before)[1]) for seed in which]
            # at one geometric mean of the two rates, so that a grid serves all ratios
            return [trained(r, lr / math.sqrt(r), seed, before=before, steps=steps) for r, seed in zip(ratios, which, strict=True)]

        def searching(lr: float, mean: Any = mean) -> float:
            return float(np.mean(mean(lr, seeds[:_SEARCHED])))

        losses = searched(searching, GRID[:1] if quick else GRID, reach=0 if quick else _REACH)
        best = min(losses, key=losses.__getitem__)
        for seed, loss in zip(seeds, mean(best, seeds), strict=True):
            _, ratio, limits = started(seed, before)
            row = {"way": way, "seed": seed, "rate": best, "ratio": RATIOS.get(way, ratio), "loss": loss, "limits of A and B": limits}
            rows.append({**row, "searched": sorted(losses.items())})
    return rows


def draw(rows: list[Row], canvas: Any) -> None:
    """Held-out losses of all seeds by way, and their means."""
    ax = canvas.subplots()
    ways = list(dict.fromkeys(row["way"] for row in rows))
    for at, way in enumerate(ways):
        losses = [row["loss"] for row in rows if row["way"] == way]
        ax.plot(losses, [at] * len(losses), "o", color="#2563a8", alpha=0.5)
        ax.plot([np.mean(losses)] * 2, [at - 0.25, at + 0.25], color="#d1662b")
    ax.set_yticks(range(len(ways)), labels=ways)
    ax.invert_yaxis()
    ax.set_xlabel("held-out loss (nats a character)")


if __name__ == "__main__":
    run_as_script("lora_rates", measure, draw)
