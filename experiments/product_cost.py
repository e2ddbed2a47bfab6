"""What one exact product costs in time and memory, in gradients on the same batch.

Time: the gradient, the bare double backward over a retained graph, and sharpkit's Hessian and Gauss-Newton products take turns in one
process, on one thread; medians of processor time. Memory: each case in a fresh process, the peak of resident memory over what the model
and data held before.

    python -m experiments.product_cost      # results/product_cost.jsonl, figures/product_cost.png
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import sharpkit as sk
from experiments._common import Row, interleaved_times, run_as_script, threads
from experiments._models import GPT, Case, RetainedProduct, conv_net, images, mlp, seeded, text

ROADS = ("gradient", "bare", "hessian", "gauss_newton")
PLATFORM = {"MLP": 1.6, "conv": 2.2, "GPT": 2.2}  # the retained double backward in gradients, as measured before sharpkit was written


def cases(quick: bool = False) -> list[Case]:
    """Untrained: the values do not change the cost."""
    x, y, data = images(64 if quick else 512)
    tokens, following, corpus = text(4 if quick else 16, 64)
    few = 16 if quick else 128
    return [
        Case("MLP", seeded(lambda: mlp((784, 512, 512, 10))).eval(), x, y, data),
        Case("conv", seeded(lambda: conv_net(16, side=28)).eval(), x[:few], y[:few], data),
        Case("GPT", seeded(lambda: GPT(width=64 if quick else 128)).eval(), tokens, following, corpus),
    ]


def road(case: Case, name: str) -> Any:
    """A callable that makes one gradient or one product."""
    if name == "gradient":

        def gradient() -> object:
            with sdpa_kernel(SDPBackend.MATH):
                return torch.autograd.grad(case.loss(), case.params)

        return gradient
    generator = torch.Generator().manual_seed(0)
    if name == "bare":
        product = RetainedProduct(case)
        vectors = [torch.randn(p.shape, generator=generator) for p in case.params]
        return lambda: product.pieces(vectors)
    kind = {"hessian": sk.HessianOperator, "gauss_newton": sk.GaussNewtonOperator}[name]
    operator = kind(sk.Objective(case.model, (case.x, case.y), loss=F.cross_entropy))
    vector = operator.random_vectors(1, generator=generator)[:, 0].contiguous()
    return lambda: operator @ vector


def time_rows(case: Case, *, rounds: int) -> list[Row]:
    """One thread and the median of its processor time, which other work on the machine hardly disturbs; wall time beside it."""
    with threads(1):
        times = interleaved_times({name: road(case, name) for name in ROADS}, rounds=rounds)
    cpu = {name: float(np.median(found.cpu)) for name, found in times.items()}
    wall = {name: float(np.median(found.wall)) for name, found in times.items()}
    return [
        {
            "kind": "time",
            "case": case.name,
            "road": name,
            "parameters": case.size,
            "cpu_ms": 1e3 * cpu[name],
            "wall_ms": 1e3 * wall[name],
            "rounds": rounds,
            "in_gradients": cpu[name] / cpu["gradient"],
            "in_bare": cpu[name] / cpu["bare"],
            "wall_in_gradients": wall[name] / wall["gradient"],
            "wall_in_bare": wall[name] / wall["bare"],
            "fastest_in_bare": min(times[name].cpu) / min(times["bare"].cpu),
        }
        for name in ROADS
    ]


def resident(field: str) -> float:
    """MiB, from the kernel: VmRSS now, VmHWM the peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def peak_of(number: int, name: str, quick: bool) -> float:
    """In this process: the peak over the model of three gradients or products, set-up included, in MiB."""
    torch.set_num_threads(1)
    small = cases(True)[number]
    road(small, name)()  # libraries and kernels loaded
    del small
    case = cases(quick)[number]
    base = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    work = road(case, name)
    for _ in range(3):
        work()
    return resident("VmHWM") - base


def memory_rows(quick: bool) -> list[Row]:
    rows = []
    for number, case in enumerate(cases(True)):
        peaks = {}
        for name in ROADS:
            # Small thresholds make the allocator hand freed tensors back, so that resident memory is what is really held.
            environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
            code = f"from experiments.product_cost import peak_of; import json; print(json.dumps(peak_of({number}, {name!r}, {quick})))"
            run = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True, cwd=Path(__file__).parent.parent
            )
            peaks[name] = float(json.loads(run.stdout.splitlines()[-1]))
        rows += [
            {"kind": "memory", "case": case.name, "road": name, "peak_mib": peaks[name], "in_gradients": peaks[name] / peaks["gradient"]}
            for name in ROADS
        ]
    return rows


def measure(quick: bool) -> list[Row]:
    rounds = 5 if quick else 31
    return [row for case in cases(quick) for row in time_rows(case, rounds=rounds)] + memory_rows(quick)


def draw(rows: list[Row], figure: Any) -> None:
    left, right = figure.subplots(1, 2)
    for axes, kind, label in (
        (left, "time", "time of one product / of a gradient"),
        (right, "memory", "peak memory over the model / of a gradient"),
    ):
        found = [row for row in rows if row["kind"] == kind and row["road"] != "gradient"]
        names = list(dict.fromkeys(row["case"] for row in found))
        for shift, name in enumerate(ROADS[1:]):
            heights = [next(row["in_gradients"] for row in found if row["case"] == case and row["road"] == name) for case in names]
            bars = axes.bar(
                np.arange(len(names)) + 0.27 * (shift - 1),
                heights,
                0.25,
                label={"bare": "bare double backward"}.get(name, f"sharpkit {name}"),
            )
            axes.bar_label(bars, fmt="%.2f", fontsize=7)
        axes.set_xticks(range(len(names)), names)
        axes.set(ylabel=label)
        axes.margins(y=0.3)
    right.axhline(3, color="0.5", lw=0.8, ls="--")
    left.legend(fontsize=7, loc="upper left")


if __name__ == "__main__":
    run_as_script("product_cost", measure, draw)
