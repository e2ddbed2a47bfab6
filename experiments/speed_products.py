"""What products cost around the double backward: the fixed part, several vectors at once, small batches joined; all in gradients.

Processor time on one thread, the roads taking turns in one process. A gradient is one of all samples at once.

    python -m experiments.speed_products      # results/speed_products.jsonl, figures/speed_products.png

Rows of kind "fixed": a product of a small model over the bare double backward that it needs. "width": a product, of so many made at once.
"batches": the same samples in batches of 32, joined or one by one. "algorithm": a product of a whole call, with several at once or not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

import sharpkit as sk
from experiments._common import Row, interleaved_times, run_as_script, threads
from experiments._models import GPT, Case, RetainedProduct, images, mlp, seeded, text
from sharpkit.operators import blocks

WIDTHS = (1, 4, 8, 16, 32, 64)


def cases(quick: bool) -> list[Case]:
    """Small models on small batches, where what is around the products weighs most; untrained, since values do not change the cost."""
    x, y, data = images(32 if quick else 64, side=8)
    tokens, following, corpus = text(2 if quick else 4, 32)
    hidden = (64, 32) if quick else (256, 32)
    return [
        Case("MLP, batch 64", seeded(lambda: mlp((64, *hidden, 10))).eval(), x, y, data),
        Case("GPT, 4 x 32 tokens", seeded(lambda: GPT(width=32)).eval(), tokens, following, corpus),
    ]


def hessian(case: Case, **settings: Any) -> sk.HessianOperator:
    operator = sk.HessianOperator(sk.Objective(case.model, (case.x, case.y), loss=F.cross_entropy, **settings))
    operator @ torch.ones(operator.size)
    return operator


def gradient_of(case: Case) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(case.loss(), case.params)


def cpu_seconds(roads: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The lower quartile of each road's processor time: other work on the machine only adds."""
    return {name: float(np.quantile(times.cpu, 0.25)) for name, times in interleaved_times(roads, rounds=rounds).items()}


def fixed_rows(case: Case, rounds: int) -> list[Row]:
    operator, bare = hessian(case), RetainedProduct(case)
    vector = torch.randn(operator.size, generator=torch.Generator().manual_seed(0))
    vectors = operator.layout.split(vector)
    roads = {"gradient": gradient_of(case), "bare": lambda: bare.pieces(vectors), "product": lambda: operator @ vector}
    took = cpu_seconds(roads, rounds)
    row = {"parameters": operator.size, "over_bare": took["product"] / took["bare"], "in_gradients": took["product"] / took["gradient"]}
    return [{"kind": "fixed", "case": case.name, **row}]


def width_rows(case: Case, rounds: int) -> list[Row]:
    roads: dict[str, Callable[[], Any]] = {"gradient": gradient_of(case)}
    operator = hessian(case)
    (product,) = operator._kept.values()
    for width in WIDTHS:
        vectors = operator.layout.split(torch.randn(width, operator.size, generator=torch.Generator().manual_seed(0)).T)
        roads[str(width)] = lambda vectors=vectors: product.multiply(vectors, True)  # type: ignore[misc]
    took = cpu_seconds(roads, rounds)
    return [
        {"kind": "width", "case": case.name, "width": width, "in_gradients": took[str(width)] / took["gradient"] / width}
        for width in WIDTHS
    ]


def batches_rows(samples: int, rounds: int) -> list[Row]:
    x, y, _ = images(samples, side=8)
    model = seeded(lambda: mlp((64, 256, 32, 10))).eval()
    batches = list(zip(x.split(32), y.split(32), strict=True))
    counts: dict[str, int] = {}

    def measured(name: str, size: str | None) -> Callable[[], Any]:
        def call() -> None:
            objective = sk.Objective(model, batches, loss=F.cross_entropy, micro_batch_size=size)
            counts[name] = sk.measure(objective).num_matvecs

        return call

    params = list(model.parameters())
    roads = {
        "gradient": lambda: torch.autograd.grad(F.cross_entropy(model(x), y), params),
        "joined": measured("joined", "auto"),
        "one by one": measured("one by one", None),
    }
    took = cpu_seconds(roads, rounds)
    return [
        {"kind": "batches", "road": name, "call": "measure", "products": counts[name], "in_gradients": took[name] / took["gradient"]}
        for name in counts
    ]


def algorithm_rows(case: Case, rounds: int, quick: bool) -> list[Row]:
    calls: dict[str, Callable[[sk.HessianOperator], Any]] = {
        "trace": lambda operator: sk.trace(operator, num_matvecs=40 if quick else 200, method="hutchinson"),
        "spectral_density": lambda operator: sk.spectral_density(operator, num_probes=10, num_steps=10 if quick else 80),
        "diagonal": lambda operator: sk.diagonal(operator, num_probes=20 if quick else 100),
    }
    rows = []
    for name, call in calls.items():
        products = 0

        def run(widest: int, call: Callable[[sk.HessianOperator], Any] = call) -> None:
            nonlocal products
            before, blocks._WIDEST = blocks._WIDEST, widest
            try:
                operator = hessian(case)
                before_call = operator.num_matvecs
                call(operator)
                products = operator.num_matvecs - before_call
            finally:
                blocks._WIDEST = before

        roads = {"gradient": gradient_of(case), "at once": lambda run=run: run(32), "one by one": lambda run=run: run(1)}  # type: ignore[misc]
        took = cpu_seconds(roads, rounds)
        for road in ("at once", "one by one"):
            cost = took[road] / took["gradient"] / products
            rows.append({"kind": "algorithm", "case": case.name, "call": name, "road": road, "products": products, "in_gradients": cost})
    return rows


def measure(quick: bool) -> list[Row]:
    rows: list[Row] = []
    with threads(1):
        for case in cases(quick):
            rows += fixed_rows(case, 5 if quick else 200)
            rows += width_rows(case, 3 if quick else 40)
            rows += algorithm_rows(case, 2 if quick else 5, quick)
        rows += batches_rows(64 if quick else 512, 2 if quick else 5)
    return rows


def draw(rows: list[Row], figure: Any) -> None:
    left, right = figure.subplots(1, 2)
    for name in dict.fromkeys(row["case"] for row in rows if row["kind"] == "width"):
        own = [row for row in rows if row["kind"] == "width" and row["case"] == name]
        left.plot([row["width"] for row in own], [row["in_gradients"] for row in own], "o-", label=name)
    left.set(xscale="log", xlabel="products at once", ylabel="gradients a product", ylim=(0, None), title="Several vectors at once")
    left.set_xticks(WIDTHS, [str(width) for width in WIDTHS])
    left.minorticks_off()
    left.legend()
    own = [row for row in rows if row["kind"] == "algorithm"]
    names = list(dict.fromkeys(f"{row['call'].replace('_', chr(10))}\n{row['case'].split(',')[0]}" for row in own))
    for shift, road in ((-0.2, "one by one"), (0.2, "at once")):
        heights = [row["in_gradients"] for row in own if row["road"] == road]
        right.bar(np.arange(len(names)) + shift, heights, 0.4, label=road)
    right.set_xticks(range(len(names)), names, fontsize=7)
    right.set(ylabel="gradients a product", title="Whole calls")
    right.legend()


if __name__ == "__main__":
    run_as_script("speed_products", measure, draw)
