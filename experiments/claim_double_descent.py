"""Double descent: test error and condition number of a random-feature regression both peak where features equal samples; ridge removes it.

    python -m experiments.claim_double_descent      # results/claim_double_descent.jsonl, figures/claim_double_descent.png

The claim: the test error of the least-norm fit rises towards the interpolation threshold and falls again beyond it (Belkin, Hsu, Ma and
Mandal 2019, arXiv 1812.11118), since the smallest non-zero eigenvalue of the features' Gram matrix comes close to 0 there (Poggio, Kur and
Banburski 2019, arXiv 1912.06190), and a ridge takes the peak away (Nakkiran, Venkat, Kakade and Ma 2021, arXiv 2003.01897). Features are
ReLUs of random weights; the Hessian of half the squared error in the weights of the last, linear, layer is that matrix.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sharpkit as sk
from experiments._common import Row, run_as_script
from experiments._heldout_tasks import task_of

SAMPLES = 100
RATIOS = (0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0)  # features over samples
RIDGES = (0.0, 1e-3, 1e-2)  # added to the matrix
SEEDS = (0, 1, 2, 3, 4)
TASKS = ("noisy teacher", "diabetes")


def half_square(output: Tensor, target: Tensor) -> Tensor:
    """Its Hessian in the last layer is the features' second moment."""
    return F.mse_loss(output, target) / 2


def data(task: str, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """100 training samples of the seed, others to test on; targets of variance about 1, float64."""
    generator = torch.Generator().manual_seed(seed)
    if task == "diabetes":
        known = task_of("diabetes")
        x, y = (torch.cat([a, b]).double() for a, b in zip(known.train, known.test, strict=True))
        order = torch.randperm(len(x), generator=generator)
        x, y = x[order], y[order]
    else:
        x = torch.randn(SAMPLES + 1000, 20, generator=generator, dtype=torch.float64)
        teacher = torch.randn(20, 1, generator=generator, dtype=torch.float64) / 20**0.5
        noise = torch.randn(len(x), 1, generator=generator, dtype=torch.float64)
        y = torch.tanh(2 * x @ teacher) + 0.3 * noise
    return x[:SAMPLES], y[:SAMPLES], x[SAMPLES:], y[SAMPLES:]


def fitted(features: Tensor, y: Tensor, ridge: float) -> Tensor:
    """Weights of the last layer: the least-norm fit, or with a ridge."""
    if not ridge:
        return torch.as_tensor(np.linalg.lstsq(features.numpy(), y.numpy(), rcond=1e-12)[0])
    matrix = features.T @ features / len(y) + ridge * torch.eye(features.shape[1], dtype=torch.float64)
    return torch.linalg.solve(matrix, features.T @ y / len(y))


def spectrum_ends(features: Tensor, y: Tensor) -> tuple[float, float, float]:
    """Largest eigenvalue of the Hessian, its smallest that is not 0 for certain, and the residual of the latter.

    With more features than samples the Hessian has the non-zero eigenvalues of the samples' Gram matrix, and the smallest is read there.
    """
    model = nn.Linear(features.shape[1], 1, bias=False, dtype=torch.float64)
    hessian = sk.HessianOperator(sk.Objective(model, (features, y), loss=half_square))
    largest = float(sk.eigenpairs(hessian, k=1, tol=1e-6).values[0])
    small: Any = hessian if features.shape[1] <= SAMPLES else features @ features.T / SAMPLES
    pairs = sk.eigenpairs(small, k=1, which="smallest", tol=1e-3, basis_size=SAMPLES)
    return largest, float(pairs.values[0]), float(pairs.residuals[0])


def measure(quick: bool) -> list[Row]:
    """One row for each task, number of features and seed."""
    torch.set_num_threads(1)
    rows = []
    for task in TASKS[: 1 if quick else None]:
        for seed in SEEDS[: 1 if quick else None]:
            x, y, test_x, test_y = data(task, seed)
            for ratio in (0.5, 1.0, 2.0) if quick else RATIOS:
                count = round(ratio * SAMPLES)
                generator = torch.Generator().manual_seed(1000 + seed)
                weights = torch.randn(x.shape[1], count, generator=generator, dtype=torch.float64) / x.shape[1] ** 0.5
                features, test_features = (F.relu(a @ weights) / count**0.5 for a in (x, test_x))
                largest, smallest, residual = spectrum_ends(features, y)
                for ridge in RIDGES:
                    solution = fitted(features, y, ridge)
                    row = {"task": task, "seed": seed, "features": count, "ratio": ratio, "ridge": ridge}
                    row["train"] = float(F.mse_loss(features @ solution, y))
                    row["test"] = float(F.mse_loss(test_features @ solution, test_y))
                    row["norm"] = float(solution.norm())
                    row |= {"largest": largest, "smallest": smallest, "residual": residual}
                    rows.append({**row, "condition": (largest + ridge) / (smallest + ridge)})
    return rows


def draw(rows: list[Row], canvas: Any) -> None:
    """Medians over seeds, and their range, of test error (top) and condition number (bottom)."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    canvas.set_size_inches(9, 5.4)
    axes = canvas.subplots(2, len(tasks), sharex=True, squeeze=False)
    for column, task in enumerate(tasks):
        for ridge, colour in zip(RIDGES, ("#2563a8", "#d1662b", "#4b8b3b"), strict=True):
            own = [row for row in rows if row["task"] == task and row["ridge"] == ridge]
            ratios = sorted({row["ratio"] for row in own})
            for ax, what in zip(axes[:, column], ("test", "condition"), strict=True):
                values = [[row[what] for row in own if row["ratio"] == ratio] for ratio in ratios]
                ax.plot(ratios, [np.median(v) for v in values], color=colour, label=f"ridge {ridge:g}" if ridge else "least norm")
                ax.fill_between(ratios, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.15, linewidth=0)
                ax.set(xscale="log", yscale="log")
                ax.axvline(1, color="#888888", linestyle=":")
        axes[0, column].set(title=task)
        axes[1, column].set(xlabel="features over samples")
    axes[0, 0].set_ylabel("test error (variance 1)")
    axes[1, 0].set_ylabel("condition number")
    axes[0, 0].legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    run_as_script("claim_double_descent", measure, draw)
