"""A language model's loss over 128,000 classes: memory and time of products from whole logits and from some tokens' at a time.

Memory: each road in a fresh process, the peak of resident memory over the model, making the objective and two products included. Time:
processor time on one thread, the roads taking turns in one process, lower quartile. A gradient is PyTorch's own.

    python -m experiments.large_vocabulary      # results/large_vocabulary.jsonl, figures/large_vocabulary.png

Rows of kind "memory": peaks of a small GPT and of a Hugging Face Llama. "product": time of products of the GPT. "size": a Hessian product
with the head alone, in chunks over whole, by the size of the logits. "chunk": the same by the size of a chunk. "agreement": products in
chunks against whole ones in float64.
"""

from __future__ import annotations

import functools
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sharpkit as sk
from experiments._common import HERE, Row, interleaved_times, run_as_script, threads
from experiments._models import GPT, seeded
from experiments.product_cost import resident
from sharpkit.objective import logits

WIDTH = 64
OPERATORS: dict[str, Callable[[sk.Objective], sk.SymmetricOperator]] = {
    "Hessian": sk.HessianOperator,
    "Gauss-Newton": sk.GaussNewtonOperator,
    "Fisher": sk.FisherOperator,
}
ROADS = [f"{matrix}, {way}" for matrix in OPERATORS for way in ("whole", "chunks")]
MIB = 2**20


def shape(quick: bool) -> tuple[int, int, int]:
    """Classes, sequences, tokens of a sequence."""
    return (32_000, 4, 128) if quick else (128_000, 4, 128)


def drawn(quick: bool) -> tuple[Tensor, Tensor]:
    """Random tokens, and random ones to follow: their values do not change the cost."""
    classes, sequences, tokens = shape(quick)
    both = torch.randint(classes, (2, sequences, tokens), generator=torch.Generator().manual_seed(0))
    return both[0], both[1]


def gpt(quick: bool) -> nn.Module:
    classes, _, tokens = shape(quick)
    return seeded(lambda: GPT(vocabulary=classes, time=tokens, width=WIDTH, layers=1, heads=2, tied=True)).eval()


def llama(quick: bool) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    return seeded(lambda: LlamaForCausalLM(LlamaConfig(vocab_size=shape(quick)[0], **sizes, tie_word_embeddings=True))).eval()


def hold_whole() -> None:
    """From now on, no logits are cut into chunks in this process."""
    logits._LEAST_BYTES = math.inf  # type: ignore[assignment]


# -- memory -------------------------------------------------------------------------------------------------------------------
def calls(model: nn.Module, quick: bool) -> tuple[Callable[[], Any], Callable[[], sk.Objective]]:
    """A plain gradient, and the objective, of a GPT or of a Hugging Face model."""
    x, y = drawn(quick)
    params = list(model.parameters())
    if isinstance(model, GPT):
        return lambda: torch.autograd.grad(F.cross_entropy(model(x), y), params), lambda: sk.Objective(model, (x, y), loss=F.cross_entropy)
    batch = {"input_ids": x, "labels": y}
    return lambda: torch.autograd.grad(model(**batch).loss, params), lambda: sk.Objective(model, batch)


def peak_of(kind: str, road: str, quick: bool) -> float:
    """In this process: the peak over the model of two gradients or products, in MiB."""
    torch.set_num_threads(1)
    gradient, objective = calls({"gpt": gpt, "llama": llama}[kind](quick), quick)
    matrix, _, way = road.partition(", ")
    if way == "whole":
        hold_whole()
    base = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    if road == "gradient":
        gradient(), gradient()
    else:
        made = objective()
        operator = OPERATORS[matrix](made)
        v = torch.ones(operator.size)
        operator @ v, operator @ v
        if way == "chunks" and not made.chunking.in_use:
            raise RuntimeError("logits were held whole")
    return resident("VmHWM") - base


def fresh_peak(kind: str, road: str, quick: bool) -> float:
    """:func:`peak_of` in a process of its own."""
    # small thresholds make the allocator hand freed tensors back, so that resident memory is what is really held
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    code = f"from experiments.large_vocabulary import peak_of; print(peak_of({kind!r}, {road!r}, {quick}))"
    run = subprocess.run([sys.executable, "-c", code], cwd=HERE.parent, env=environment, capture_output=True, text=True, check=True)
    return float(run.stdout.splitlines()[-1])


def memory_rows(quick: bool) -> list[Row]:
    roads = [("gpt", road) for road in ("gradient", *ROADS)] + [
        ("llama", road) for road in ("gradient", "Hessian, whole", "Hessian, chunks")
    ]
    rows: list[Row] = []
    gradients: dict[str, float] = {}
    for kind, road in roads:
        peak = fresh_peak(kind, road, quick)
        gradients.setdefault(kind, peak)
        rows.append({"kind": "memory", "model": kind, "road": road, "peak_mib": peak, "in_gradients": peak / gradients[kind]})
    return rows


# -- time ---------------------------------------------------------------------------------------------------------------------
def quartile(roads: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    return {name: float(np.quantile(times.cpu, 0.25)) for name, times in interleaved_times(roads, rounds=rounds).items()}


def product_rows(quick: bool) -> list[Row]:
    model = gpt(quick)
    gradient, objective = calls(model, quick)
    roads: dict[str, Callable[[], Any]] = {"gradient": gradient}
    for road in ROADS:
        matrix, _, way = road.partition(", ")
        made = objective()
        made.chunking.allowed = way == "chunks"
        operator = OPERATORS[matrix](made)
        roads[road] = functools.partial(operator.multiply, torch.ones(operator.size))
    took = quartile(roads, 2 if quick else 3)
    return [{"kind": "product", "road": road, "in_gradients": took[road] / took["gradient"]} for road in ROADS]


def head_product(tokens: int, classes: int, width: int, *, chunked: bool) -> Callable[[], Any]:
    """A Hessian product of the cross-entropy in hidden states and a head's weight."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=g).requires_grad_()
    weight = torch.randn(classes, width, generator=g).div_(width**0.5).requires_grad_()
    labels = torch.randint(classes, (tokens,), generator=g)
    with logits.Chunked(least_bytes=0 if chunked else math.inf):
        loss = F.cross_entropy(F.linear(hidden, weight), labels)
    slopes = torch.autograd.grad(loss, [hidden, weight], create_graph=True)
    along = [torch.ones_like(hidden), torch.ones_like(weight)]
    return lambda: torch.autograd.grad(slopes, [hidden, weight], along, retain_graph=True)


def size_rows(quick: bool) -> list[Row]:
    rows: list[Row] = []
    for tokens, classes, width in ((64, 8_000, 64), (128, 8_000, 64)) if quick else SIZES:
        took = quartile({way: head_product(tokens, classes, width, chunked=way == "chunks") for way in ("whole", "chunks")}, 3)
        shapes = {"tokens": tokens, "classes": classes, "width": width, "logits_mib": tokens * classes * 4 / MIB}
        rows.append({"kind": "size", **shapes, "over_whole": took["chunks"] / took["whole"]})
    return rows


SIZES = (
    *((tokens, 32_000, 64) for tokens in (32, 64, 128, 256, 512)),
    (512, 128_000, 64),
    *((tokens, 32_000, 512) for tokens in (64, 256, 512)),
)


def chunk_rows(quick: bool) -> list[Row]:
    tokens, classes = (64, 8_000) if quick else (512, 128_000)
    product = head_product(tokens, classes, WIDTH, chunked=True)

    def of_size(mib: int) -> None:
        logits._CHUNK_BYTES["cpu"] = mib * MIB  # read when the product runs
        product()

    kept, sizes = dict(logits._CHUNK_BYTES), (2, 4, 8, 16, 32, 64)
    roads: dict[str, Callable[[], Any]] = {str(mib): functools.partial(of_size, mib) for mib in sizes}
    took = quartile({"whole": head_product(tokens, classes, WIDTH, chunked=False), **roads}, 2)
    logits._CHUNK_BYTES.update(kept)
    return [{"kind": "chunk", "chunk_mib": mib, "over_whole": took[str(mib)] / took["whole"]} for mib in sizes]


def agreement_rows(quick: bool) -> list[Row]:
    """In float64, over a vocabulary whose whole logits are large enough to be cut."""
    classes, tokens = 16_000, 300
    x, y = torch.randint(classes, (2, 1, tokens), generator=torch.Generator().manual_seed(1))
    y[0, -20:] = -100
    model = seeded(lambda: GPT(vocabulary=classes, time=tokens, width=16, layers=1, heads=2, tied=True)).eval().double()
    rows: list[Row] = []
    for matrix, make in OPERATORS.items():
        products = []
        for allowed in (True, False):
            objective = sk.Objective(model, (x, y), loss=F.cross_entropy)
            objective.chunking.allowed = allowed
            operator = make(objective)
            v = torch.randn(operator.size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
            products.append(operator @ v)
        gap = float((products[0] - products[1]).norm() / products[1].norm())
        rows.append({"kind": "agreement", "matrix": matrix, "relative_gap": gap})
    return rows


def measure(quick: bool) -> list[Row]:
    rows = memory_rows(quick)
    with threads(1):
        for part in (agreement_rows, product_rows, size_rows, chunk_rows):
            rows += part(quick)
    return rows


def draw(rows: list[Row], figure: Any) -> None:
    memory, time = figure.subplots(1, 2)
    bars = [row for row in rows if row["kind"] == "memory" and row["model"] == "gpt" and row["road"] != "gradient"]
    for axes, chosen, label in (
        (memory, bars, "peak memory, in those of a gradient"),
        (time, [row for row in rows if row["kind"] == "product"], "processor time, in gradients"),
    ):
        for place, way in ((-0.2, "whole"), (0.2, "chunks")):
            heights = [row["in_gradients"] for row in chosen if row["road"].endswith(way)]
            axes.bar(np.arange(len(heights)) + place, heights, 0.4, label="whole logits" if way == "whole" else "in chunks of tokens")
        axes.set_xticks(range(len(OPERATORS)), list(OPERATORS))
        axes.set_ylabel(label)
    memory.axhline(1.3, color="grey", linestyle="--", linewidth=1)
    memory.text(-0.42, 1.34, "target", color="white")
    time.legend(frameon=False)


if __name__ == "__main__":
    run_as_script("large_vocabulary", measure, draw)
