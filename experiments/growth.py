"""What `measure` takes as models and data grow: memory under a limit, and how much of the time is products.

    python -m experiments.growth      # results/growth.jsonl, figures/growth.png

Rows of kind "limit": the peak of the memory that `measure` takes beyond what the process holds before it, in a fresh process each, with
`memory_limit=` and without. The limit is 43 vectors of the model, as 8 GiB are for 5e7 float32 parameters. Rows of kind "share": processor
time of products over that of a Lanczos run of 32 steps (`spectral_density` of one probe), MLPs of n parameters on N samples.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import sharpkit as sk
from experiments._common import Row, run_as_script, threads
from sharpkit.objective.memory import used_memory

LIMIT = 8 * 2**30 / (4 * 5e7)  # vectors of the model
STEPS = 32
MOST = 2e9  # parameters times samples: a product of more takes half a minute, and hardly anything else takes time beside it


def problem(n: float, samples: int) -> sk.Objective:
    """An untrained MLP of about n parameters, at most n, three layers; random data and labels."""
    width = int((n / 2) ** 0.5)
    while 64 * width + 2 * width**2 + 10 * width + 3 * width + 10 > n:
        width -= 1
    torch.manual_seed(0)
    sizes = (64, width, width, width, 10)
    layers = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.Tanh())][:-1]
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(samples, 64, generator=generator), torch.randint(10, (samples,), generator=generator)
    return sk.Objective(nn.Sequential(*layers), data, loss=F.cross_entropy)


def measured_alone(n: float, limited: bool) -> None:
    """In a process of its own: print one row."""
    sk.measure(problem(1e4, 64))  # loads what PyTorch loads when it is first used, some 100 MB
    objective, cpu = problem(n, 64), torch.device("cpu")
    before, peak, done = used_memory(cpu), 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, used_memory(cpu) - before)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    vector, progress = 4.0 * objective.num_parameters, list[sk.Progress]()
    limit = LIMIT * vector if limited else None
    with threads(1):
        made = sk.measure(objective, memory_limit=limit, callback=progress.append)
    done.set()
    watcher.join()
    row = {"kind": "limit", "parameters": objective.num_parameters, "limit": limit, "peak": peak, "peak_vectors": peak / vector}
    row |= {"forecast": progress[0].peak_bytes, "products": made.num_matvecs, "seconds": made.seconds, "converged": made.converged}
    for name in ("lambda_max", "lambda_min", "trace", "frobenius_norm", "effective_rank"):
        estimate = getattr(made, name)
        row |= {name: estimate.value, f"{name}_error": estimate.stderr}
    print(json.dumps(row))


def share_row(n: float, samples: int) -> Row:
    objective = problem(n, samples)
    operator = sk.HessianOperator(objective)
    operator @ torch.ones(operator.size)  # builds the graph
    spent, multiply = 0.0, operator.multiply

    def timed(vectors: torch.Tensor) -> torch.Tensor:
        nonlocal spent
        began = time.process_time()
        product = multiply(vectors)
        spent += time.process_time() - began
        return product

    operator.multiply = timed  # type: ignore[method-assign]
    began = time.process_time()
    sk.spectral_density(operator, num_probes=1, num_steps=STEPS)
    total = time.process_time() - began
    row = {"kind": "share", "parameters": operator.size, "samples": samples, "seconds_a_product": spent / STEPS, "share": spent / total}
    print(row, flush=True)
    return row


def measure(quick: bool) -> list[Row]:
    rows: list[Row] = []
    for n in (1e6,) if quick else (5e5, 5e6, 5e7):
        for limited in (False, True):
            if n > 1e7 and not limited:  # more than the machine has
                continue
            command = [sys.executable, "-W", "ignore", "-m", "experiments.growth", "--alone", str(n), str(int(limited))]
            rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
    with threads(1):
        for n in (1e4, 1e5) if quick else (1e4, 1e5, 1e6, 1e7, 5e7):
            rows += [share_row(n, samples) for samples in (100, 1000, 10_000, 100_000) if n * samples <= (1e7 if quick else MOST)]
    return rows


def draw(rows: list[Row], figure: Any) -> None:
    left, right = figure.subplots(1, 2)
    own = [row for row in rows if row["kind"] == "limit"]
    for limited, label in ((False, "without a limit"), (True, "with memory_limit=")):
        here = [row for row in own if (row["limit"] is not None) is limited]
        left.plot([row["parameters"] for row in here], [row["peak"] / 2**30 for row in here], "o-", label=label)
    limits = [row for row in own if row["limit"] is not None]
    left.plot([row["parameters"] for row in limits], [row["limit"] / 2**30 for row in limits], "k--", label="the limit")
    left.set(xscale="log", yscale="log", xlabel="parameters", ylabel="GiB taken by measure", title="Memory")
    left.legend()
    for samples in sorted({row["samples"] for row in rows if row["kind"] == "share"}):
        here = [row for row in rows if row["kind"] == "share" and row["samples"] == samples]
        right.plot([row["parameters"] for row in here], [100 * row["share"] for row in here], "o-", label=f"{samples:,} samples")
    right.axhline(80, color="k", linestyle="--", linewidth=1)
    right.set(xscale="log", ylim=(0, 103), xlabel="parameters", ylabel="% of the time in products", title="A Lanczos run of 32 steps")
    right.legend()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--alone"]:
        measured_alone(float(sys.argv[2]), sys.argv[3] == "1")
    else:
        run_as_script("growth", measure, draw)
