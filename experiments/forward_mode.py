"""What is gained by recorded forward mode in Gauss-Newton products, and by several samples' gradients at a time; all in gradients.

Processor time on one thread, the roads taking turns in one process; medians. A gradient is one of all samples at once.

    python -m experiments.forward_mode      # results/forward_mode.jsonl, figures/forward_mode.png

Rows of kind "product": a Gauss-Newton product by the double-backward trick, by recorded forward mode, and as sharpkit chooses; MiB held;
the product with the trial. "peak": memory of a graph and two products over the model, each in a fresh process. "samples":
`batch_size_tests` with single samples' gradients one by one and several at a time. "bytes": the same by MiB of gradients at a time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sharpkit as sk
from experiments._common import Row, interleaved_times, run_as_script, threads
from experiments._models import GPT, Case, conv_net, images, mlp, seeded, text
from experiments.product_cost import resident
from sharpkit.objective import sample_gradients
from sharpkit.operators.forward_mode import ForwardMode
from sharpkit.operators.gauss_newton import OutputJacobian

ROADS = ("double backward", "recorded")


class Residual(nn.Module):
    """Two 3 x 3 convolutions with norms around a skip connection."""

    def __init__(self, width: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        layers = [nn.Conv2d(width, width, 3, padding=1, bias=False), norm(width), nn.ReLU(inplace=True)]
        self.body = nn.Sequential(*layers, nn.Conv2d(width, width, 3, padding=1, bias=False), norm(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x))


def residual_net(norm: Callable[[int], nn.Module], width: int = 16) -> nn.Module:
    stem = (nn.Conv2d(1, width, 3, padding=1), norm(width), nn.ReLU(inplace=True), nn.MaxPool2d(2))
    return nn.Sequential(*stem, Residual(width, norm), Residual(width, norm), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def depthwise_net(width: int = 24) -> nn.Module:
    def block() -> list[nn.Module]:
        return [
            nn.Conv2d(width, width, 7, padding=3, groups=width),
            nn.Conv2d(width, 4 * width, 1),
            nn.GELU(),
            nn.Conv2d(4 * width, width, 1),
        ]

    return nn.Sequential(nn.Conv2d(1, width, 4, stride=4), *block(), *block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def cases(quick: bool) -> dict[str, Case]:
    """Untrained: the values do not change the cost."""
    x, y, data = images(16 if quick else 128)
    tokens, following, corpus = text(2 if quick else 16, 64)
    models = {
        "conv": lambda: conv_net(16, side=28),
        "ResNet, BatchNorm": lambda: residual_net(nn.BatchNorm2d),
        "ResNet, GroupNorm": lambda: residual_net(lambda width: nn.GroupNorm(4, width)),
        "depthwise": depthwise_net,
        "MLP": lambda: mlp((784, 512, 512, 10)),
    }
    found = {name: Case(name, seeded(make).eval(), x, y, data) for name, make in models.items()}
    return {**found, "GPT": Case("GPT", seeded(lambda: GPT(width=128)).eval(), tokens, following, corpus)}


def operator_of(case: Case, recorded: bool | None) -> sk.GaussNewtonOperator:
    """After three products; ``recorded`` None as a user has it, True untried."""
    operator = sk.GaussNewtonOperator(sk.Objective(case.model, (case.x, case.y), loss=F.cross_entropy))
    operator.forward_mode.used = recorded
    if recorded:
        operator.forward_mode.covers = lambda recording: True  # type: ignore[method-assign]
    for _ in range(3):
        operator @ torch.ones(operator.size)
    return operator


def trial(case: Case) -> float:
    """Seconds of the product that tries recording."""
    operator = sk.GaussNewtonOperator(sk.Objective(case.model, (case.x, case.y), loss=F.cross_entropy))
    operator @ torch.ones(operator.size)
    operator.forward_mode._products = 2
    began = time.process_time()
    operator @ torch.ones(operator.size)
    return time.process_time() - began


def product_rows(case: Case, rounds: int) -> list[Row]:
    operators = {"double backward": operator_of(case, False), "recorded": operator_of(case, True), "sharpkit": operator_of(case, None)}
    vector = torch.randn(case.size, generator=torch.Generator().manual_seed(0))
    roads: dict[str, Callable[[], Any]] = {"gradient": lambda: torch.autograd.grad(case.loss(), case.params)}
    roads |= {name: lambda operator=operator: operator @ vector for name, operator in operators.items()}  # type: ignore[misc]
    expected = operators["double backward"] @ vector
    took = {name: float(np.median(times.cpu)) for name, times in interleaved_times(roads, rounds=rounds).items()}
    return [
        {
            "kind": "product",
            "case": case.name,
            "road": name,
            "parameters": case.size,
            "in_gradients": took[name] / took["gradient"],
            "mib": operator.bytes_kept() / 2**20,
            "recorded": bool(operator.forward_mode.used),
            "gap": float((operator @ vector - expected).norm() / expected.norm()),
            "trial": trial(case) / took["gradient"] if name == "recorded" else None,
        }
        for name, operator in operators.items()
    ]


def peak_of(name: str, recorded: bool, quick: bool) -> tuple[float, float]:
    """In this process: MiB held, and the peak over the model of making a graph and two products with J and J^T."""
    torch.set_num_threads(1)
    for small in (True, quick):  # first the small one: libraries and kernels loaded
        case = cases(small)[name]
        objective, mode = sk.Objective(case.model, (case.x, case.y), loss=F.cross_entropy, check=False), ForwardMode()
        mode.used = recorded
        mode.covers = lambda recording: True  # type: ignore[method-assign]
        with objective.undisturbed():
            piece = next(objective.pieces())
            vectors = [torch.ones_like(p, requires_grad=False) for p in case.params]
            base = resident("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
            jacobian = OutputJacobian(objective, piece, mode)
            for _ in range(2):
                jacobian.transpose(jacobian.forward(vectors))
            peak = resident("VmHWM") - base
    return jacobian.cost.nbytes / 2**20, peak


def peak_rows(quick: bool) -> list[Row]:
    rows = []
    # small thresholds make the allocator hand freed tensors back, so that resident memory is what is really held
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    for name in ("conv", "ResNet, BatchNorm", "ResNet, GroupNorm", "depthwise"):
        for road in ROADS:
            call = f"peak_of({name!r}, {road == 'recorded'}, {quick})"
            code = f"from experiments.forward_mode import peak_of; import json; print(json.dumps({call}))"
            command, here = [sys.executable, "-c", code], Path(__file__).parent.parent
            run = subprocess.run(command, capture_output=True, text=True, env=environment, check=True, cwd=here)
            held, peak = json.loads(run.stdout.splitlines()[-1])
            rows.append({"kind": "peak", "case": name, "road": road, "held_mib": held, "peak_mib": peak})
    return rows


def sample_cases(quick: bool) -> list[Case]:
    x, y, data = images(100 if quick else 1000, side=8)
    large, classes, _ = images(32 if quick else 128)
    tokens, following, corpus = text(16 if quick else 64, 32)
    return [
        Case("MLP 64-64-10, 1000 samples", seeded(lambda: mlp((64, 64, 10))).eval(), x, y, data),
        Case("MLP 64-256-32-10, 1000", seeded(lambda: mlp((64, 256, 32, 10))).eval(), x, y, data),
        Case("MLP 784-64-10, 128", seeded(lambda: mlp((784, 64, 10))).eval(), large, classes, data),
        Case("conv net, 128", seeded(lambda: conv_net(8, side=28)).eval(), large, classes, data),
        Case("GPT, 64 x 32 tokens", seeded(lambda: GPT(width=32)).eval(), tokens, following, corpus),
    ]


def sample_rows(case: Case, rounds: int, megabytes: tuple[float, ...]) -> list[Row]:
    objective = sk.Objective(case.model, (case.x, case.y), loss=F.cross_entropy)

    def tests(fewest: int, rows: int) -> None:
        before = sample_gradients._FEWEST, sample_gradients._ROWS
        sample_gradients._FEWEST, sample_gradients._ROWS = fewest, rows
        try:
            sk.batch_size_tests(objective)
        finally:
            sample_gradients._FEWEST, sample_gradients._ROWS = before

    usual, own = sample_gradients._FEWEST, sample_gradients._ROWS
    roads: dict[str, Callable[[], Any]] = {
        "gradient": lambda: torch.autograd.grad(case.loss(), case.params),
        "one by one": lambda: tests(10**9, own),
        "several": lambda: tests(usual, own),
    }
    roads |= {str(size): lambda size=size: tests(usual, int(size * 2**20)) for size in megabytes}  # type: ignore[misc]
    took = {name: float(np.median(times.cpu)) for name, times in interleaved_times(roads, rounds=rounds).items()}
    head = {"case": case.name, "parameters": case.size, "samples": len(case.x)}
    rows = [{"kind": "samples", **head, "road": name, "in_gradients": took[name] / took["gradient"]} for name in ("one by one", "several")]
    return rows + [{"kind": "bytes", **head, "mib": size, "in_gradients": took[str(size)] / took["gradient"]} for size in megabytes]


def measure(quick: bool) -> list[Row]:
    rows: list[Row] = []
    with threads(1):
        for case in cases(quick).values():
            rows += product_rows(case, 3 if quick else 21)
        for case in sample_cases(quick):
            rows += sample_rows(case, 1 if quick else 5, (1.0, 4.0, 16.0))
    return rows + peak_rows(quick)


def draw(rows: list[Row], figure: Any) -> None:
    left, right = figure.subplots(1, 2)
    for axes, kind, roads in ((left, "product", ROADS), (right, "samples", ("one by one", "several"))):
        own = [row for row in rows if row["kind"] == kind]
        names = list(dict.fromkeys(row["case"] for row in own))
        for shift, road in zip((-0.2, 0.2), roads, strict=True):
            heights = [next(row["in_gradients"] for row in own if row["case"] == name and row["road"] == road) for name in names]
            bars = axes.bar(np.arange(len(names)) + shift, heights, 0.4, label=road)
            axes.bar_label(bars, fmt="%.3g", fontsize=6)
        axes.set_xticks(range(len(names)), [name.replace(", ", "\n").replace(" 64-", "\n64-") for name in names], fontsize=6)
        axes.legend(fontsize=7)
    left.set(ylabel="gradients", title="A Gauss-Newton product, by how J v is made")
    right.set(yscale="log", ylabel="gradients", title="batch_size_tests, single samples' gradients")


if __name__ == "__main__":
    run_as_script("forward_mode", measure, draw)
