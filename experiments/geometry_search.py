"""How often the search for the generalized sharpness ends within 1 % of the best there is, by products.

    python -m experiments.geometry_search      # results/geometry_search.jsonl, figures/geometry_search.png

100 quadratics of four kinds of spectra (a half-normal bulk, graded over four decades, three outliers over a bulk of both signs, one over
both signs evenly): 60 in l-inf with 8 to 18 entries, where all sign vectors are tried; 40 of 20 to 60 entries, two matrices and a vector,
in the spectral, row, column and block norms, where the best of 10,000 random starts counts, each climbed to its end with H itself.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import sharpkit as sk
from experiments._common import Row, run_as_script, threads
from sharpkit.measuring.geometry import Ball

SETTINGS = ((3, 8), (4, 10), (5, 12), (8, 18), (12, 26))  # directions to begin with, most products
KINDS = ("bulk", "graded", "outliers", "both signs")
OTHERS = ("spectral", "rows", "columns", "blocks")


class Quadratic(nn.Module):
    """w^T H w / 2 over parameters of given shapes."""

    def __init__(self, matrix: Tensor, shapes: tuple[tuple[int, ...], ...], seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.parts = nn.ParameterList(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
        self.matrix = matrix

    def forward(self, x: Tensor) -> Tensor:
        w = torch.cat([p.reshape(-1) for p in self.parts])
        return w @ self.matrix @ w / 2 * x.mean()


def matrix_of(kind: str, n: int, rng: np.random.Generator) -> Tensor:
    bulk = rng.normal(size=n)
    spectra = {
        "bulk": np.abs(bulk),
        "graded": np.logspace(1, -3, n),
        "outliers": np.r_[10.0, 5.0, 3.0, 0.3 * bulk[3:]],
        "both signs": np.r_[10.0, np.linspace(1, -1, n - 1)],
    }
    q = np.linalg.qr(rng.normal(size=(n, n)))[0]
    matrix = torch.from_numpy((q * spectra[kind]) @ q.T)
    return (matrix + matrix.T) / 2


def best_signs(matrix: Tensor) -> float:
    """Over all sign vectors, the first entry 1."""
    n, best = len(matrix), -np.inf
    low = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=min(n - 1, 12))), dtype=torch.float64)
    for rest in itertools.product((-1.0, 1.0), repeat=n - 1 - low.shape[1]):
        signs = torch.cat([torch.ones(len(low), 1 + len(rest)).double() * torch.tensor([1.0, *rest]).double(), low], dim=1)
        best = max(best, float(((signs @ matrix) * signs).sum(dim=1).max()))
    return best


def best_climb(matrix: Tensor, ball: Ball, starts: int, seed: int) -> float:
    """Over random starts, each moved to where the slope points furthest until it ends; shifted by the lowest eigenvalue it never falls."""
    shift = max(0.0, -float(torch.linalg.eigvalsh(matrix)[0]))
    points = ball.furthest(torch.randn(len(matrix), starts, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))
    for _ in range(60):
        points = ball.furthest(matrix @ points + shift * points)
    return float(((matrix @ points) * points).sum(dim=0).max())


def problems(quick: bool) -> list[tuple[str, str, sk.Objective, float]]:
    """(norm, kind of spectrum, quadratic, the best known value)."""
    rng, made = np.random.default_rng(0), []
    for number in range(6 if quick else 100):
        kind, signs = KINDS[number % 4], number % 5 < 3
        if signs:
            n = int(rng.integers(8, 13 if quick else 19))
            shapes: tuple[tuple[int, ...], ...] = ((n,),)
        else:
            rows = rng.integers(3, 6, size=4)
            shapes = ((int(rows[0]), int(rows[1])), (int(rows[2]), int(rows[3])), (int(rng.integers(2, 11)),))
            n = sum(int(np.prod(shape)) for shape in shapes)
        matrix = matrix_of(kind, n, rng)
        objective = sk.Objective(Quadratic(matrix, shapes, number), torch.ones(1, 1, dtype=torch.float64), closure=lambda m, x: m(x))
        norm: Any = "linf" if signs else OTHERS[number // 5 % 4]
        best = best_signs(matrix) if signs else best_climb(matrix, Ball(norm, objective.layout), 200 if quick else 10_000, number)
        made.append((norm, kind, objective, best))
    return made


def measure(quick: bool) -> list[Row]:
    rows = []
    with threads(1):
        every = problems(quick)
        for starts, most in SETTINGS:
            for number, (norm, kind, objective, best) in enumerate(every):
                made = sk.generalized_sharpness(objective, norm, seed=number, num_starts=starts, max_matvecs=most)
                row = {"norm": norm, "spectrum": kind, "n": objective.num_parameters, "starts": starts, "most": most}
                rows.append(row | {"products": made.num_matvecs, "share": made.value / best})
    return rows


def draw(rows: list[Row], figure: Any) -> None:
    axes = figure.subplots(1, 1)
    for signs, label in ((True, "l-inf, all sign vectors tried"), (False, "other norms, 10,000 starts")):
        shares = []
        for starts, most in SETTINGS:
            own = [row["share"] for row in rows if (row["starts"], row["most"]) == (starts, most) and (row["norm"] == "linf") == signs]
            shares.append(100 * float(np.mean([share >= 0.99 for share in own])))
        axes.plot([most for _, most in SETTINGS], shares, "o", label=label)
    for starts, most in SETTINGS:
        axes.annotate(f"{starts} starts", (most, 60), fontsize=7, ha="center", rotation=90)
    axes.axhline(95, color="0.5", lw=0.8, ls="--")
    axes.set(xlabel="most products", ylabel="% of problems within 1 % of the best", ylim=(50, 102))
    axes.legend(fontsize=8)


if __name__ == "__main__":
    run_as_script("geometry_search", measure, draw)
