"""Hessian products as compiled code: how long compiling takes, what a product then costs, and after how many products that pays.

Processor time on one thread, compiled and plain products taking turns in one process, lower quartile; compiling by the clock, with nothing
cached.

    python -m experiments.compiled_products      # results/compiled_products.jsonl, figures/compiled_products.png

"pays_after" is the number of products whose savings make up for compiling; none where compiled products are slower, and so not used.
"""

from __future__ import annotations

import functools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

import sharpkit as sk
from experiments._common import Row, interleaved_times, run_as_script, threads
from experiments._models import GPT, Case, conv_net, images, mlp, seeded, text


def cases(quick: bool) -> Iterator[Case]:
    """Untrained, since values do not change the cost."""
    x, y, data = images(64, side=8)
    yield Case("MLP, batch 64", seeded(lambda: mlp((64, 32, 10) if quick else (64, 256, 32, 10))).eval(), x, y, data)
    if quick:
        return
    tokens, following, corpus = text(4, 32)
    yield Case("GPT of width 32, 4 x 32 tokens", seeded(lambda: GPT(width=32)).eval(), tokens, following, corpus)
    tokens, following, corpus = text(16, 64)
    yield Case("GPT of width 128, 16 x 64 tokens", seeded(lambda: GPT(width=128)).eval(), tokens, following, corpus)
    x, y, data = images(128, side=16)
    yield Case("conv net, batch 128", seeded(lambda: conv_net(16, side=16)).eval(), x, y, data)


def row_of(case: Case) -> Row:
    objective = sk.Objective(case.model, (case.x, case.y), loss=F.cross_entropy)
    plain, compiled = sk.HessianOperator(objective), sk.HessianOperator(objective, compile=True)
    v = torch.randn(plain.size, generator=torch.Generator().manual_seed(0))
    compiled @ v
    began = time.perf_counter()
    gap = float((compiled @ v - plain @ v).norm() / (plain @ v).norm())
    seconds = time.perf_counter() - began
    roads: dict[str, Callable[[], Any]] = {
        "gradient": lambda: torch.autograd.grad(case.loss(), case.params),
        "plain": functools.partial(plain.multiply, v),
        "compiled": functools.partial(compiled.multiply, v),
    }
    took = {name: float(np.quantile(times.cpu, 0.25)) for name, times in interleaved_times(roads, rounds=30).items()}
    saved = took["plain"] - took["compiled"] if compiled.choices()["compiled"].startswith("yes") else 0.0
    return {
        "case": case.name,
        "parameters": plain.size,
        "outcome": compiled.choices()["compiled"],
        "relative_gap": gap,
        "compile_seconds": seconds,
        "plain_in_gradients": took["plain"] / took["gradient"],
        "compiled_in_gradients": took["compiled"] / took["gradient"],
        "pays_after": round(seconds / saved) if saved > 0 else None,
    }


def measure(quick: bool) -> list[Row]:
    with tempfile.TemporaryDirectory() as empty, threads(1):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = empty
        return [row_of(case) for case in cases(quick)]


def draw(rows: list[Row], figure: Any) -> None:
    axes = figure.subplots()
    for place, kind in ((-0.2, "plain"), (0.2, "compiled")):
        axes.bar(np.arange(len(rows)) + place, [row[f"{kind}_in_gradients"] for row in rows], 0.4, label=f"{kind} product")
    for place, row in enumerate(rows):
        pays = "not faster, not used" if row["pays_after"] is None else f"pays after {row['pays_after']:,}"
        axes.text(place, 0.05, pays, ha="center", color="white")
    axes.set_xticks(range(len(rows)), [row["case"].replace(", ", "\n") for row in rows])
    axes.set_ylabel("processor time, in gradients")
    axes.legend(frameon=False)


if __name__ == "__main__":
    run_as_script("compiled_products", measure, draw)
