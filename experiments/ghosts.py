"""Float32 Lanczos of 200 steps on five outliers and a bulk of 1e-3: with and without re-orthogonalisation.

A ghost is an extra copy of an eigenvalue. The matrix has each outlier once, so any second value near one is a ghost.

    python -m experiments.ghosts      # results/ghosts.jsonl, figures/ghosts.png
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import sharpkit as sk
from experiments._common import Row, run_as_script

OUTLIERS = (10.0, 5.0, 3.0, 2.0, 1.0)
BULK = 1e-3


def matrix(size: int, seed: int) -> sk.SymmetricOperator:
    """A float32 operator Q diag Q^T with Q a product of two reflections, so that no coordinate is special."""
    generator = torch.Generator().manual_seed(seed)
    eigenvalues = torch.cat([torch.tensor(OUTLIERS), BULK * torch.rand(size - len(OUTLIERS), generator=generator)])
    mirrors = [torch.nn.functional.normalize(torch.randn(size, generator=generator), dim=0) for _ in range(2)]

    def reflect(v: torch.Tensor, order: int) -> torch.Tensor:
        for u in mirrors[::order]:
            v = v - 2 * u * (u @ v)
        return v

    return sk.as_operator(lambda v: reflect(eigenvalues * reflect(v, 1), -1), size=size, dtype=torch.float32)


def lanczos_without_orthogonalisation(operator: sk.SymmetricOperator, *, steps: int, seed: int) -> np.ndarray:
    """Ritz values of the three-term recurrence, for contrast."""
    v = torch.nn.functional.normalize(torch.randn(operator.size, generator=torch.Generator().manual_seed(seed)), dim=0)
    before, beta, alphas, betas = torch.zeros_like(v), torch.tensor(0.0), [], []
    for _ in range(steps):
        w = operator @ v - beta * before
        alpha = w @ v
        w = w - alpha * v
        beta = w.norm()
        alphas.append(float(alpha))
        betas.append(float(beta))
        before, v = v, w / beta
    return np.linalg.eigvalsh(np.diag(alphas) + np.diag(betas[:-1], 1) + np.diag(betas[:-1], -1))


def count_ghosts(values: np.ndarray) -> int:
    """Values outside the bulk beyond one for each outlier."""
    return max(0, int((np.asarray(values) > 10 * BULK).sum()) - len(OUTLIERS))


def measure(quick: bool) -> list[Row]:
    rows = []
    for seed in range(2 if quick else 10):
        operator = matrix(1000 if quick else 5000, seed)
        density = sk.spectral_density(operator, num_probes=1, num_steps=200, seed=seed)
        plain = lanczos_without_orthogonalisation(operator, steps=200, seed=seed)
        pairs = sk.eigenpairs(operator, k=8, seed=seed)
        ours = density.nodes[0].numpy()
        for road, values in (
            ("sharpkit, 200 steps", ours),
            ("no re-orthogonalisation, 200 steps", plain),
            ("sharpkit.eigenpairs, k = 8", pairs.values.numpy()),
        ):
            outside = np.sort(values[values > 10 * BULK])[::-1]
            error = float(np.abs(outside / OUTLIERS - 1).max()) if len(outside) == len(OUTLIERS) else None
            rows.append(
                {
                    "seed": seed,
                    "road": road,
                    "size": operator.size,
                    "ghosts": count_ghosts(values),
                    "outlier_error": error,
                    "outside_bulk": outside.tolist(),
                }
            )
    return rows


def draw(rows: list[Row], figure: Any) -> None:
    axes = figure.subplots()
    for position, road in enumerate(dict.fromkeys(row["road"] for row in rows)):
        row = next(row for row in rows if row["road"] == road)
        total = [r["ghosts"] for r in rows if r["road"] == road]
        axes.plot(row["outside_bulk"], position + np.linspace(-0.2, 0.2, len(row["outside_bulk"])), "o", ms=4)
        axes.text(10.6, position, f"ghosts: {min(total)} to {max(total)}", va="center", fontsize=8)
    for value in OUTLIERS:
        axes.axvline(value, color="0.8", lw=0.8, zorder=0)
    roads = list(dict.fromkeys(row["road"] for row in rows))
    axes.set_yticks(range(len(roads)), roads)
    axes.set(xlabel="eigenvalue estimates above the bulk (first seed; true ones as lines; spread vertically)", xlim=(0, 12.8))


if __name__ == "__main__":
    run_as_script("ghosts", measure, draw)
