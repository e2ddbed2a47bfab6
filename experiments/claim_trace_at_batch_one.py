"""SGD on single samples stops where eta tr(H) <= 2, full-batch gradient descent at the same rate only where eta lambda_max <= 2.

    python -m experiments.claim_trace_at_batch_one    # results/claim_trace_at_batch_one.jsonl, figures/claim_trace_at_batch_one.png

The claim is that of Wu and Su (2023), arXiv 2305.17490: an interpolating minimum that is linearly stable for SGD at B = 1 has
tr(H) <= 2 / eta. A two-layer ReLU network is trained on half the squared error until it interpolates 100 digits, odd or even; the third
kind of run starts where gradient descent ended and goes on with single samples at the same rate.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sharpkit as sk
from experiments._batch_models import digits
from experiments._common import Row, run_as_script
from experiments._models import mlp, seeded

SAMPLES, WIDTH = 100, 60
RATES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.6)  # at 0.25 some runs on single samples diverge, at 0.6 all; gradient descent does not
SEEDS = (0, 1, 2)
STEPS = {"gradient descent": 10_000, "single samples": 20_000, "single samples, from there": 20_000}
LOOKS = 12  # a run


def half_square(output: Tensor, target: Tensor) -> Tensor:
    """Its Hessian where the data are interpolated is the mean of the samples' gradients' outer products."""
    return F.mse_loss(output, target) / 2


def problem() -> tuple[Tensor, Tensor]:
    """(100, 64) centred images of length 3, and +1 or -1."""
    x, y, _ = digits()
    x = x[:SAMPLES].flatten(1)
    x = x - x.mean(dim=0)
    return 3 * x / x.norm(dim=1, keepdim=True), (2.0 * (y[:SAMPLES] % 2) - 1)[:, None]


def look(model: nn.Module, x: Tensor, y: Tensor, *, rate: float, rtol: float) -> Row:
    """Loss, and rate times trace and largest eigenvalue; infinite where the run diverged."""
    with torch.no_grad():
        loss = float(half_square(model(x), y))
    if not loss < 1e6:
        return {"loss": math.inf, "trace": math.inf, "trace_error": math.nan, "sharpness": math.inf}
    hessian = sk.HessianOperator(sk.Objective(model, (x, y), loss=half_square))
    trace = sk.trace(hessian, rtol=rtol)
    sharpness = float(sk.eigenpairs(hessian, k=1, tol=1e-4).values[0])
    return {"loss": loss, "trace": rate * trace.value, "trace_error": rate * trace.stderr, "sharpness": rate * sharpness}


def batches(x: Tensor, y: Tensor, *, single: bool, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """All the data each time, or a random sample of it."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        if not single:
            yield x, y
            continue
        for i in torch.randint(len(x), (1000,), generator=generator).tolist():
            yield x[i : i + 1], y[i : i + 1]


def trained(model: nn.Module, kind: str, *, rate: float, seed: int, steps: int) -> Row:
    """The run, with some looks on the way and a closer one at the end."""
    x, y = problem()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    at = sorted({round(steps ** (j / (LOOKS - 1))) for j in range(LOOKS)})
    curve = [{"step": 0, **look(model, x, y, rate=rate, rtol=0.01)}]
    stream = batches(x, y, single=kind != "gradient descent", seed=seed)
    for step, (inputs, targets) in enumerate(itertools.islice(stream, steps), start=1):
        optimizer.zero_grad()
        half_square(model(inputs), targets).backward()
        optimizer.step()
        if step in at:
            curve.append({"step": step, **look(model, x, y, rate=rate, rtol=0.005 if step == steps else 0.01)})
            if curve[-1]["loss"] == math.inf:
                break
    end = curve[-1]
    return {"kind": kind, "rate": rate, "seed": seed, **{k: v for k, v in end.items() if k != "step"}, "curve": curve}


def measure(quick: bool) -> list[Row]:
    """One row for each rate, seed and kind of run."""
    torch.set_num_threads(1)
    rows = []
    for rate, seed in itertools.product(RATES[3:4] if quick else RATES, SEEDS[: 1 if quick else None]):
        descended = seeded(lambda: mlp((64, WIDTH, 1)), seed)
        starts = {"single samples": seeded(lambda: mlp((64, WIDTH, 1)), seed)}
        for kind, steps in STEPS.items():  # the last kind goes on with the network that the first has trained
            model = starts.get(kind, descended)
            rows.append(trained(model, kind, rate=rate, seed=seed, steps=steps // 20 if quick else steps))
    return rows


def draw(rows: list[Row], canvas: Any) -> None:
    """One rate over the steps (top), and the ends of all runs that did not diverge (bottom)."""
    canvas.set_size_inches(9, 6)
    axes = canvas.subplots(2, 2)
    colours = dict(zip(STEPS, ("#2563a8", "#d1662b", "#4b8b3b"), strict=True))
    shown = 0.2

    def label_of(row: Row) -> str:
        return str(row["kind"]).replace("from there", "from where gradient descent ended")

    for column, (what, label) in enumerate((("trace", "rate times trace"), ("sharpness", "rate times lambda_max"))):
        over, ends = axes[:, column]
        for row in rows:
            looks = row["curve"][1:]
            if row["rate"] == shown and row["seed"] == 0:
                over.plot([one["step"] for one in looks], [one[what] for one in looks], color=colours[row["kind"]], label=label_of(row))
            if math.isfinite(row["loss"]):
                ends.plot(row["rate"], row[what], "o", ms=4, color=colours[row["kind"]], alpha=0.7)
        over.set(title=f"rate {shown}", xlabel="steps", ylabel=label, xscale="log", ylim=(0, None))
        ends.set(title="ends of all runs", xlabel="rate", ylabel=label, ylim=(0, None))
        for ax in (over, ends):
            ax.axhline(2, color="#888888", linestyle=":")
    canvas.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)


if __name__ == "__main__":
    run_as_script("claim_trace_at_batch_one", measure, draw)
