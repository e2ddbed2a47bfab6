"""What the monitor's default metrics cost with Muon and with Lion, against the budget.

    python -m experiments.geometry_cost      # results/geometry_cost.jsonl, figures/geometry_cost.png

As in `experiments.monitor_overhead`: two copies of one run take turns, one monitored, one not, and must end with the same weights. Muon
holds the matrices alone. "error" is how far the recorded sharpness lies from what a search from random starts finds at the same step.
"""

from __future__ import annotations

from typing import Any

import torch

from experiments._common import Row, run_as_script, threads
from experiments._models import conv_net, images, mlp
from experiments.geometry_edge import Lion
from experiments.monitor_overhead import Workload, overhead

BUDGET = 0.05


def muon(params: Any) -> torch.optim.Optimizer:
    """Torch's Muon of the matrices among them."""
    return torch.optim.Muon([p for p in params if p.ndim == 2], lr=0.005, weight_decay=0.0)


WORKLOADS = (
    Workload("MLP 784-64-10, Muon", lambda: mlp((784, 64, 10)), lambda: images(2000), muon, 64, 2500),
    Workload(
        "conv net + BatchNorm, Lion",
        lambda: conv_net(8, side=14),
        lambda: images(2000, side=14),
        lambda p: Lion(p, lr=3e-4, betas=(0.9, 0.99)),
        64,
        5000,
    ),
)


def measure(quick: bool) -> list[Row]:
    with threads(1):
        return [overhead(workload, BUDGET, 200 if quick else workload.steps) for workload in (WORKLOADS[:1] if quick else WORKLOADS)]


def draw(rows: list[Row], figure: Any) -> None:
    axes = figure.subplots(1, 1)
    bars = axes.barh([row["workload"] for row in rows], [row["overhead_cpu"] for row in rows])
    axes.bar_label(bars, fmt="%.3f")
    axes.axvline(BUDGET, color="0.5", ls="--", lw=0.8)
    axes.set(xlabel="time spent measuring over time spent training")


if __name__ == "__main__":
    run_as_script("geometry_cost", measure, draw)
