"""Benign oscillation: a rate at which training oscillates learns the weak feature, a small rate only the strong one.

    python -m experiments.claim_benign_oscillation  # results/claim_benign_oscillation.jsonl, figures/claim_benign_oscillation.png

The claim is that of Lu, Wu, Yang and Zou (2024), arXiv 2310.17074. Data after the description in their abstract, sizes of our own choice: a
sample has three patches in 200 dimensions, y u with |u| = 1 in every sample, y v with |v| = 4 in 38 of 40 and noise in the others, and
noise of length 2.1; tested on samples without v. The network has 10 filters for each class, ReLU squared, summed over patches and averaged
over filters, class +1 less class -1; half the squared error, batches of 8, small random weights. Rate times steps is 600 in all runs.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sharpkit as sk
from experiments._common import Row, run_as_script

DIMENSION, SAMPLES, WITHOUT, FILTERS, BATCH = 200, 40, 2, 10, 8
WEAK, STRONG, NOISE, INITIAL = 1.0, 4.0, 0.15, 0.05
RATES = (0.02, 0.1, 0.3, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8)
LENGTH = 600.0  # rate times steps
SEEDS = (0, 1, 2, 3, 4)
LOOKS = 16


class Patches(nn.Module):
    """f(x) = mean over filters of sum over patches of relu(w . p)^2, class +1 less class -1."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(INITIAL * torch.randn(2, FILTERS, DIMENSION, generator=generator))
        self.register_buffer("signs", torch.tensor([1.0, -1.0]))

    def answers(self, x: Tensor) -> Tensor:
        """(samples, classes, patches)."""
        return F.relu(torch.einsum("cfd,npd->ncfp", self.weight, x)).square().mean(dim=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.answers(x).sum(dim=2) @ self.signs


def half_square(output: Tensor, target: Tensor) -> Tensor:
    """Half the mean squared error."""
    return F.mse_loss(output, target) / 2


def drawn(count: int, without: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(count, 3, dimension) samples, the first ``without`` of them without the strong feature, and +1 or -1."""
    y = 2.0 * torch.randint(2, (count,), generator=generator) - 1
    x = torch.zeros(count, 3, DIMENSION)
    x[:, 0, 0] = WEAK * y
    x[without:, 1, 1] = STRONG * y[without:]
    x[:without, 1, 2:] = NOISE * torch.randn(without, DIMENSION - 2, generator=generator)
    x[:, 2, 2:] = NOISE * torch.randn(count, DIMENSION - 2, generator=generator)
    return x, y


def shares(model: Patches) -> tuple[float, float]:
    """What the weak and the strong feature alone give, y f, averaged over both classes; 1 is the target."""
    given = []
    for axis, size in ((0, WEAK), (1, STRONG)):
        x = torch.zeros(2, 1, DIMENSION)
        x[:, 0, axis] = torch.tensor([size, -size])
        with torch.no_grad():
            given.append(float((model(x) * torch.tensor([1.0, -1.0])).mean()))
    return given[0], given[1]


def trained(rate: float, seed: int, length: float) -> Row:
    """One run, with looks on the way."""
    generator = torch.Generator().manual_seed(seed)
    x, y = drawn(SAMPLES, WITHOUT, generator)
    test_x, test_y = drawn(2000, 2000, generator)
    model = Patches(generator)
    objective = sk.Objective(model, (x, y), loss=half_square)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    steps, curve, rises, before = round(length / rate), list[Row](), 0, math.inf
    at = {max(1, round(steps * (j / LOOKS) ** 2)) for j in range(1, LOOKS + 1)}
    for step in range(1, steps + 1):
        chosen = torch.randperm(SAMPLES, generator=generator)[:BATCH]
        optimizer.zero_grad()
        half_square(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
        if step not in at:
            continue
        with torch.no_grad():
            loss = float(half_square(model(x), y))
        if not loss < 1e6:
            return {"rate": rate, "seed": seed, "steps": steps, "loss": math.inf, "curve": curve}
        weak, strong = shares(model)
        sharpness = rate * float(sk.eigenpairs(sk.HessianOperator(objective), k=1, tol=1e-3).values[0])
        curve.append({"done": step * rate, "loss": loss, "weak": weak, "strong": strong, "sharpness": sharpness})
        rises, before = rises + (loss > before), loss
    with torch.no_grad():
        accuracy = float(((model(test_x) * test_y) > 0).float().mean())
    end = curve[-1]
    row = {
        "rate": rate,
        "seed": seed,
        "steps": steps,
        "loss": end["loss"],
        "accuracy": accuracy,
        "weak": end["weak"],
        "strong": end["strong"],
    }
    return {**row, "sharpness": end["sharpness"], "rises": rises / (len(curve) - 1), "curve": curve}


def measure(quick: bool) -> list[Row]:
    """One row for each rate and seed."""
    torch.set_num_threads(1)
    rates, seeds, length = ((0.3, 0.7), (0,), 60.0) if quick else (RATES, SEEDS, LENGTH)
    return [trained(rate, seed, length) for rate in rates for seed in seeds]


def draw(rows: list[Row], canvas: Any) -> None:
    """What the features give along a small and a large rate, and accuracy without the strong feature by rate."""
    axes = canvas.subplots(1, 3)
    rates = sorted({row["rate"] for row in rows})
    large = max((row["rate"] for row in rows if math.isfinite(row["loss"])), default=rates[-1])
    for ax, rate in zip(axes, (0.3, large), strict=False):
        row = next(row for row in rows if row["rate"] == rate and math.isfinite(row["loss"]))
        done = [look["done"] for look in row["curve"]]
        for what, colour, label in (
            ("weak", "#4b8b3b", "from the weak feature"),
            ("strong", "#2563a8", "from the strong feature"),
            ("sharpness", "#d1662b", "rate times lambda_max"),
        ):
            ax.plot(done, [look[what] for look in row["curve"]], "o-", ms=3, color=colour, label=label)
        ax.axhline(2, color="#888888", linestyle=":")
        ax.set(title=f"rate {rate:g}", xlabel="rate times steps", xscale="log", ylim=(-0.1, 3.5))
    axes[0].legend(frameon=False, fontsize=8)
    for rate in rates:
        own = [row["accuracy"] for row in rows if row["rate"] == rate and math.isfinite(row["loss"])]
        axes[2].plot([rate] * len(own), own, "o", ms=4, color="#2563a8", alpha=0.5)
        if own:
            axes[2].plot([rate], [np.mean(own)], "_", ms=14, color="#d1662b")
    axes[2].set(xlabel="rate", ylabel="accuracy without the strong feature", ylim=(0.4, 1.03))


if __name__ == "__main__":
    run_as_script("claim_benign_oscillation", measure, draw)
