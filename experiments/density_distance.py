"""How far the estimated spectral density is from the whole dense spectrum, beside PyHessian's with as many products.

1-Wasserstein distance between the nodes with their weights and all eigenvalues, relative to the spectral width. PyHessian's density calls
torch.eig, which PyTorch has removed; a stand-in of the same meaning is put in its place while it runs. One seed gives both libraries the
same probes, so the comparison is paired: what differs is the recurrence, not the luck.

    python -m experiments.density_distance      # results/density_distance.jsonl, figures/density_distance.png
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from scipy.stats import wasserstein_distance
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import sharpkit as sk
from experiments._common import Row, run_as_script
from experiments._models import Case, dense_cases, dense_hessian

SETTINGS = ((5, 80), (10, 40))  # probes, steps: 400 products


@contextmanager
def removed_eig() -> Iterator[None]:
    """torch.eig(T, eigenvectors=True) of a symmetric T, as it once was: real parts in column 0."""

    def eig(matrix: torch.Tensor, eigenvectors: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        values, vectors = torch.linalg.eigh(matrix)
        return torch.stack([values, torch.zeros_like(values)], dim=1), vectors

    before = torch.__dict__.get("eig")
    torch.eig = eig
    try:
        yield
    finally:
        if before is None:
            del torch.eig
        else:
            torch.eig = before


def pyhessian_density(case: Case, *, probes: int, steps: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights, weights summing to 1."""
    import pyhessian

    for p in case.params:
        p.grad = None
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings(), torch.random.fork_rng(), removed_eig():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        nodes, weights = pyhessian.hessian(case.model, nn.CrossEntropyLoss(), data=(case.x, case.y), cuda=False).density(
            iter=steps, n_v=probes
        )
    for p in case.params:
        p.grad = None
    nodes, weights = np.array(nodes).reshape(-1), np.array(weights).reshape(-1)
    return nodes, weights / weights.sum()


def measure(quick: bool) -> list[Row]:
    rows = []
    for case in dense_cases(quick=quick):
        matrix = dense_hessian(case)
        spectrum = torch.linalg.eigvalsh(matrix).numpy()
        width = float(np.ptp(spectrum))
        for probes, steps in SETTINGS[:1] if quick else SETTINGS:
            ours, theirs = [], []
            for seed in range(3 if quick else 20):
                density = sk.spectral_density(matrix, num_probes=probes, num_steps=steps, seed=seed)
                ours.append(wasserstein_distance(density.nodes.numpy().ravel(), spectrum, density.weights.numpy().ravel()) / width)
            for seed in range(2 if quick else 4):
                nodes, weights = pyhessian_density(case, probes=probes, steps=steps, seed=seed)
                theirs.append(wasserstein_distance(nodes, spectrum, weights) / width)
            paired = np.array(ours[: len(theirs)]) / np.array(theirs)
            rows.append(
                {
                    "case": case.name,
                    "n": matrix.shape[0],
                    "data": case.data,
                    "probes": probes,
                    "steps": steps,
                    "width": width,
                    "seeds": len(ours),
                    "pyhessian_seeds": len(theirs),
                    "sharpkit_mean": float(np.mean(ours)),
                    "sharpkit_max": max(ours),
                    "pyhessian_mean": float(np.mean(theirs)),
                    "pyhessian_max": max(theirs),
                    "worst_ratio": float(paired.max()),
                    "mean_ratio": float(paired.mean()),
                    "sharpkit": ours,
                    "pyhessian": theirs,
                }
            )
    return rows


def draw(rows: list[Row], figure: Any) -> None:
    axes = figure.subplots()
    for position, row in enumerate(rows):
        for shift, name, color in ((-0.15, "sharpkit", "C2"), (0.15, "pyhessian", "0.5")):
            label = {"sharpkit": "sharpkit", "pyhessian": "PyHessian"}[name] if position == 0 else None
            axes.plot([position + shift] * len(row[name]), row[name], "o", ms=3, color=color, label=label)
            axes.plot(position + shift, row[f"{name}_mean"], "_", ms=18, color=color)
    axes.axhline(0.01, color="0.7", lw=0.8, ls="--")
    labels = [row["case"].split(",")[0] + f"\n{row['probes']} probes x {row['steps']} steps" for row in rows]
    axes.set_xticks(range(len(rows)), labels, fontsize=8)
    axes.set(ylabel="1-Wasserstein distance to the dense\nspectrum / spectral width", yscale="log")
    axes.legend()


if __name__ == "__main__":
    run_as_script("density_distance", measure, draw)
