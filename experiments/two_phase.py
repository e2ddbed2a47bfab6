"""Eigenpairs found on a part of the data, made exact on all of it: gradients against those of a plain call with the same certified error.

    python -m experiments.two_phase      # results/two_phase.jsonl, figures/two_phase.png

`eigenpairs(H, k, start_from=H_part)` at the default tolerance, two draws of the part and of the start each. A product counts two gradients;
one on a part of the data counts its share of the samples. The values are compared with those of the plain call.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

import sharpkit as sk
from experiments._batch_models import conv_problem, mlp_problem, transformer_problem
from experiments._common import Row, run_as_script
from experiments._models import images, text, train

DRAWS = 2


def rows_of(name: str, samples: int, part: int, ks: tuple[int, ...]) -> list[Row]:
    """A trained network on so many samples, the first phase on ``part`` of them."""
    make = {"MLP": mlp_problem, "conv net": conv_problem, "transformer": transformer_problem}[name]().make
    x, y, _ = text(samples, 16, seed=1) if name == "transformer" else images(samples, side=8)
    model = train(make(0), x, y, steps=200)

    def hessian(chosen: torch.Tensor) -> sk.HessianOperator:
        return sk.HessianOperator(sk.Objective(model, (x[chosen], y[chosen]), loss=F.cross_entropy))

    rows: list[Row] = []
    full = hessian(torch.arange(samples))
    for k in ks:
        plain, two, apart, residuals = [], [], [], []
        for seed in range(DRAWS):
            start = hessian(torch.randperm(samples, generator=torch.Generator().manual_seed(seed))[:part])
            one, other = sk.eigenpairs(full, k, seed=seed), sk.eigenpairs(full, k, seed=seed, start_from=start)
            assert bool(one.converged.all() and other.converged.all())
            plain.append(2 * one.num_matvecs)
            two.append(2 * (other.num_matvecs + start.num_matvecs * part / samples))
            apart.append(float((one.values / other.values - 1).abs().max()))
            residuals.append([float((pairs.residuals / pairs.values[0]).max()) for pairs in (one, other)])
        worst = np.max(residuals, axis=0)
        row: Row = {"model": name, "parameters": full.size, "samples": samples, "part": part, "k": k, "plain": float(np.mean(plain))}
        row |= {"two phases": float(np.mean(two)), "ratio": float(np.mean(plain) / np.mean(two)), "values apart": max(apart)}
        rows.append(row | {"residual, plain": float(worst[0]), "residual, two phases": float(worst[1])})
        print(rows[-1], file=sys.stderr)
    return rows


def measure(quick: bool) -> list[Row]:
    """All networks; the small samples show where nothing is gained."""
    torch.set_num_threads(1)
    if quick:
        return rows_of("MLP", 2048, 128, (1,))
    rows = [*rows_of("MLP", 8192, 512, (1, 3)), *rows_of("MLP", 512, 64, (1, 3))]
    return [*rows, *rows_of("conv net", 8192, 512, (1, 3)), *rows_of("transformer", 4096, 256, (1,))]


def draw(rows: list[Row], figure: Any) -> None:
    """Gradients of both."""
    ax = figure.subplots()
    at = np.arange(len(rows))
    ax.bar(at - 0.2, [row["plain"] for row in rows], 0.4, label="plain")
    ax.bar(at + 0.2, [row["two phases"] for row in rows], 0.4, label="two phases")
    ax.set_xticks(at, [f"{row['model']}\n{row['part']} of {row['samples']}\nk = {row['k']}" for row in rows])
    ax.set_ylabel("gradients")
    ax.legend()


if __name__ == "__main__":
    run_as_script("two_phase", measure, draw)
