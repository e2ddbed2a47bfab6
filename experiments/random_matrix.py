"""Outliers and bulk edges of sampled random matrices against the formulas, on both sides of the transition.

python -m experiments.random_matrix [--quick]
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy.sparse.linalg import eigsh, svds

from experiments._common import Row, run_as_script
from experiments._random_matrix import additive_overlap, covariance_outlier, marchenko_pastur_edges, semicircle_edge
from sharpkit.batch_size.curvature import additive_outlier

_RADIUS, _RATIO = 2.0, 0.5


def additive(size: int, draws: int, rng: np.random.Generator) -> list[Row]:
    """lambda u u^T + E, E symmetric with independent entries and bulk edge 2 r."""
    found: dict[float, list[tuple[float, float]]] = {}
    edges = []
    for _ in range(draws):
        entries = rng.standard_normal((size, size))
        noise = (entries + entries.T) * (_RADIUS / math.sqrt(2 * size))
        edges.append(float(eigsh(noise, k=1, which="LA", tol=1e-6, return_eigenvectors=False)[0]))
        u = rng.standard_normal(size)
        u /= np.linalg.norm(u)
        for ratio in (-4, -1.5, -0.5, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2, 3, 5):
            lam = ratio * _RADIUS
            value, vector = eigsh(noise + lam * np.outer(u, u), k=1, which="LA" if lam > 0 else "SA", tol=1e-6)
            found.setdefault(lam, []).append((float(value[0]), float(vector[:, 0] @ u) ** 2))
    rows = [
        _row("additive", lam, np.array(v), float(additive_outlier(lam, _RADIUS)), float(additive_overlap(lam, _RADIUS)))
        for lam, v in found.items()
    ]
    edge = np.array(edges)
    return [*rows, {"model": "semicircle edge", **_compared(edge, float(semicircle_edge(_RADIUS)))}]


def covariance(size: int, draws: int, rng: np.random.Generator) -> list[Row]:
    """Sample covariance of n = size / q columns, population I but for one eigenvalue l."""
    samples = round(size / _RATIO)
    found: dict[float, list[float]] = {}
    edges = []
    for _ in range(draws):
        data = rng.standard_normal((size, samples)) / math.sqrt(samples)
        values = np.linalg.svd(data, compute_uv=False) ** 2
        edges.append((float(values.min()), float(values.max())))
        for place, lam in enumerate((1.1, 1.4, 1.7, 2.0, 2.5, 3.0, 5.0, 10.0)):
            for row in range(3 * place, 3 * place + 3):  # each eigenvalue in directions of its own: independent errors
                spiked = data.copy()
                spiked[row] *= math.sqrt(lam)
                found.setdefault(lam, []).append(float(svds(spiked, k=1, return_singular_vectors=False, random_state=0)[0]) ** 2)
    rows = [_row("covariance", lam, np.array(v)[:, None], float(covariance_outlier(lam, 1.0, _RATIO)), None) for lam, v in found.items()]
    lower, upper = marchenko_pastur_edges(1.0, _RATIO)
    ends = np.array(edges)
    return [
        *rows,
        {"model": "Marchenko-Pastur lower edge", **_compared(ends[:, 0], float(lower))},
        {"model": "Marchenko-Pastur upper edge", **_compared(ends[:, 1], float(upper))},
    ]


def _compared(values: np.ndarray, formula: float) -> Row:
    return {
        "measured": float(values.mean()),
        "spread": float(values.std()),
        "formula": formula,
        "relative_error": float(values.mean() / formula - 1),
    }


def _row(model: str, lam: float, values: np.ndarray, formula: float, overlap: float | None) -> Row:
    row = {"model": model, "eigenvalue": lam, **_compared(values[:, 0], formula)}
    return row if overlap is None else {**row, "overlap": float(values[:, 1].mean()), "overlap_formula": overlap}


def measure(quick: bool) -> list[Row]:
    size, draws = (600, 2) if quick else (1500, 6)
    rng = np.random.default_rng(0)
    return [{**row, "n": size, "draws": draws} for row in [*additive(size, draws, rng), *covariance(size, draws, rng)]]


def draw(rows: list[Row], figure: Any) -> None:
    left, middle, right = figure.subplots(1, 3)
    panels = (
        (left, "additive", 4 * _RADIUS, lambda lam: additive_outlier(lam, _RADIUS), "H + E", _RADIUS),
        (right, "covariance", 6.0, lambda lam: covariance_outlier(lam, 1.0, _RATIO), "sample covariance", 1 + math.sqrt(_RATIO)),
    )
    for axes, model, far, formula, title, transition in panels:
        chosen = [row for row in rows if row["model"] == model and abs(row["eigenvalue"]) <= far]
        x = np.linspace(min(row["eigenvalue"] for row in chosen), max(row["eigenvalue"] for row in chosen), 600)
        y = np.asarray(formula(x))
        axes.plot(x, np.where(np.abs(x) < 1e-2, np.nan, y), color="tab:blue", label="formula")
        axes.plot(x, x, color="gray", linewidth=0.7, linestyle=":", label="no noise")
        axes.errorbar(
            [row["eigenvalue"] for row in chosen],
            [row["measured"] for row in chosen],
            yerr=[row["spread"] for row in chosen],
            fmt="o",
            markersize=4,
            color="black",
            label="sampled",
        )
        axes.axvline(transition, color="tab:red", linewidth=0.7)
        axes.set_xlabel("true eigenvalue")
        axes.set_title(f"{title}: where it appears", fontsize=9)
    left.legend(fontsize=7)
    chosen = [row for row in rows if row["model"] == "additive" and row["eigenvalue"] > 0]
    x = np.linspace(0.1, 4 * _RADIUS, 400)
    middle.plot(x, additive_overlap(x, _RADIUS), color="tab:blue")
    middle.plot([row["eigenvalue"] for row in chosen], [row["overlap"] for row in chosen], "o", markersize=4, color="black")
    middle.set_xlim(0, 4 * _RADIUS)
    middle.set_xlabel("true eigenvalue")
    middle.set_title("H + E: squared overlap of eigenvectors", fontsize=9)


if __name__ == "__main__":
    run_as_script("random_matrix", measure, draw)
