"""How far is the diagonal off after 100 products, beside plain probes and XDiag, and do its stated errors hold?

Three Hessians of trained networks, made dense in float64 once. ``error`` is the norm of the error relative to the diagonal's, root mean
square over 100 seeds; XDiag (Epperly, Tropp and Webber, arXiv 2301.07825, 50 probes and 50 basis vectors) is written out here. ``share``:
of all entries of all seeds, how many lie within two stated standard errors. ``bound`` is what plain probes of the remaining products would
leave if the leading eigenvectors were known exactly for one product each, as many as serve best. "no basis", "basis of an eighth" and
"basis of half" are sharpkit with another share of the products spent on a Krylov basis than the quarter that it takes.

    python -m experiments.diagonal_error      # results/diagonal_error.jsonl, figures/diagonal_error.png
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

import sharpkit as sk
from experiments._common import Row, run_as_script
from experiments._models import dense_cases, dense_hessian

PRODUCTS = 100


def signs(n: int, count: int, seed: int) -> Tensor:
    """(n, count) of +-1."""
    return torch.randint(0, 2, (n, count), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1


def xdiag(matrix: Tensor, probes: Tensor) -> Tensor:
    """The mean over i of diag(Q_i Q_i^T A) + z_i * ((1 - Q_i Q_i^T) A z_i), Q_i a basis of all images but the i-th."""
    basis, triangle = torch.linalg.qr(matrix @ probes)
    dual = torch.linalg.inv(triangle).T
    dual = dual / dual.norm(dim=0)
    product, outer = matrix @ basis, basis @ dual
    known = (basis * product).sum(dim=1)
    return known + (outer * (probes * (dual * triangle).sum(dim=0) - product @ dual)).mean(dim=1)


def relative_error(value: Tensor, truth: Tensor) -> float:
    return float((value - truth).norm() / truth.norm())


def bound(matrix: Tensor) -> float:
    """Relative error with the best number of leading eigenvectors for a product each."""
    values, vectors = torch.linalg.eigh(matrix)
    order = values.abs().argsort(descending=True)
    best, rest = float("inf"), matrix.clone()
    for count in range(PRODUCTS - 2):
        off = rest.square().sum() - rest.diagonal().square().sum()
        best = min(best, float((off / (PRODUCTS - count)).sqrt() / matrix.diagonal().norm()))
        vector = vectors[:, order[count]]
        rest -= values[order[count]] * torch.outer(vector, vector)
    return best


def with_basis(matrix: Tensor, seeds: Sequence[int], **constants: float) -> list[Tensor]:
    """sharpkit's values with other constants."""
    with patch.multiple("sharpkit.linalg.diagonal", **constants):
        return [sk.diagonal(matrix, num_probes=PRODUCTS, seed=seed).value for seed in seeds]


def measure(quick: bool) -> list[Row]:
    rows = []
    for case in dense_cases(quick=quick):
        matrix = dense_hessian(case)
        truth = matrix.diagonal()
        error = partial(relative_error, truth=truth)
        runs = [sk.diagonal(matrix, num_probes=PRODUCTS, seed=seed) for seed in range(5 if quick else 100)]
        seeds = range(5 if quick else 30)
        probes = [signs(len(truth), PRODUCTS, seed) for seed in seeds]
        shares = [float(((run.value - truth).abs() <= 2 * run.stderr).double().mean()) for run in runs]
        errors = {
            "sharpkit": [error(run.value) for run in runs],
            "plain": [error((z * (matrix @ z)).mean(dim=1)) for z in probes],
            "xdiag": [error(xdiag(matrix, z[:, : PRODUCTS // 2])) for z in probes],
            "no basis": [error(value) for value in with_basis(matrix, seeds, _WORTH=0.0)],
            "basis of an eighth": [error(value) for value in with_basis(matrix, seeds, _BASIS_SHARE=8)],
            "basis of half": [error(value) for value in with_basis(matrix, seeds, _BASIS_SHARE=2)],
        }
        rows.append(
            {
                "case": case.name,
                "n": len(truth),
                "data": case.data,
                "products": {run.num_matvecs for run in runs}.pop(),
                "seeds": len(runs),
                "error": {name: float(np.sqrt(np.mean(np.square(values)))) for name, values in errors.items()},
                "worst": {name: max(values) for name, values in errors.items()},
                "bound": bound(matrix),
                "share": float(np.mean(shares)),
                "least_share_of_a_seed": min(shares),
            }
        )
    return rows


def draw(rows: list[Row], figure: Any) -> None:
    axes, places = figure.subplots(), np.arange(len(rows))
    for shift, (key, label) in enumerate((("plain", "plain probes"), ("xdiag", "XDiag"), ("sharpkit", "sharpkit.diagonal"))):
        bars = axes.bar(places + 0.27 * (shift - 1), [row["error"][key] for row in rows], 0.25, label=label)
        axes.bar_label(bars, fmt="%.3f", fontsize=7)
    axes.hlines([row["bound"] for row in rows], places - 0.42, places + 0.42, "k", lw=1.5, label="leading eigenvectors known")
    axes.set_xticks(places, [f"{row['case'].split(',')[0]}\n{row['share']:.1%} within 2" for row in rows], fontsize=8)
    axes.set(ylabel=f"relative error after {PRODUCTS} products", yscale="log")
    axes.margins(y=0.2)
    axes.legend(fontsize=7)


if __name__ == "__main__":
    run_as_script("diagonal_error", measure, draw)
