"""Is the trace's stated error right, and is its way of computing it never much dearer than the cheaper of two simple ones?

Three Hessians of trained networks, made dense in float64 once, traces asked to a standard error of 1 % from 100 seeds each. "plain" is
Hutchinson's estimator stopped by the same rule; "deflated" takes the twelve leading eigenpairs out first (their products counted) and then
does the same; "XTrace" (Epperly, Tropp and Webber, arXiv 2301.07825) is sharpkit's, 50 seeds. A share of 95 % of the answers should lie
within two stated standard errors of the truth.

    python -m experiments.trace_calibration      # results/trace_calibration.jsonl, figures/trace_calibration.png
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch

import sharpkit as sk
from experiments._common import Row, run_as_script
from experiments._models import dense_cases, dense_hessian

RTOL = 0.01
DEFLATED = 12
MOST = 20000


def plain(matrix: torch.Tensor, seed: int) -> sk.Estimate:
    return sk.trace(matrix, rtol=RTOL, method="hutchinson", seed=seed, max_matvecs=MOST)


def deflated(matrix: torch.Tensor, seed: int) -> tuple[float, float, int]:
    """Value, standard error and products of the estimator that deflates a fixed number of eigenpairs by magnitude."""
    operator = sk.as_operator(matrix)
    pairs = sk.eigenpairs(operator, k=DEFLATED, which="magnitude", tol=0.05, seed=seed)
    Q = pairs.vectors
    known = float(torch.trace(Q.T @ matrix @ Q))
    rest = matrix - Q @ (Q.T @ matrix)
    rest = rest - (rest @ Q) @ Q.T
    # An absolute tolerance that is 1 % of the whole trace, which a user would not know; it favours this road.
    estimate = sk.trace(
        rest, rtol=0.0, atol=RTOL * abs(float(torch.trace(matrix))), method="hutchinson", seed=seed + 1000, max_matvecs=MOST
    )
    return known + estimate.value, estimate.stderr, pairs.num_matvecs + estimate.num_matvecs


def measure(quick: bool) -> list[Row]:
    rows = []
    for case in dense_cases(quick=quick):
        matrix = dense_hessian(case)
        truth = float(torch.trace(matrix))
        off = matrix - torch.diag(matrix.diagonal())
        ideal = 2 * float((off**2).sum()) / (RTOL * truth) ** 2
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", sk.ConvergenceWarning)
            runs = [sk.trace(matrix, rtol=RTOL, seed=seed) for seed in range(10 if quick else 100)]
            simple = [plain(matrix, seed).num_matvecs for seed in range(3 if quick else 10)]
            shared = [sk.trace(matrix, rtol=RTOL, method="xtrace", seed=seed) for seed in range(5 if quick else 50)]
            lowered = [deflated(matrix, seed)[2] for seed in range(5 if quick else 50)]
        z = [(run.value - truth) / run.stderr if run.stderr else math.nan for run in runs]
        within = [run.stderr >= 0 and abs(run.value - truth) <= 2 * run.stderr + 1e-9 * abs(truth) for run in runs]
        costs = [run.num_matvecs for run in runs]
        cheaper = min(float(np.mean(simple)), float(np.mean(lowered)), matrix.shape[0])
        rows.append(
            {
                "case": case.name,
                "n": matrix.shape[0],
                "data": case.data,
                "trace": truth,
                "share_within_2_stderr": float(np.mean(within)),
                "converged": sum(run.converged for run in runs),
                "worst_relative_error": max(abs(run.value / truth - 1) for run in runs),
                "methods": {name: sum(run.method == name for run in runs) for name in {run.method for run in runs}},
                "seeds": len(runs),
                "cost_mean": float(np.mean(costs)),
                "cost_min": min(costs),
                "cost_max": max(costs),
                "rms_error": math.sqrt(np.mean([(run.value / truth - 1) ** 2 for run in runs])),
                "xtrace_mean": float(np.mean([run.num_matvecs for run in shared])),
                "xtrace_rms_error": math.sqrt(np.mean([(run.value / truth - 1) ** 2 for run in shared])),
                "cost_over_xtrace": float(np.mean(costs) / np.mean([run.num_matvecs for run in shared])),
                "plain_mean": float(np.mean(simple)),
                "deflated_mean": float(np.mean(lowered)),
                "plain_theory": ideal,
                "cost_over_cheaper": float(np.mean(costs)) / cheaper,
                "cost_stderr": float(np.std(costs) / math.sqrt(len(costs)) / cheaper),
                "z": z,
                "costs": costs,
            }
        )
    return rows


def draw(rows: list[Row], figure: Any) -> None:
    left, right = figure.subplots(1, 2)
    for row in rows:
        z = np.sort([value for value in row["z"] if value is not None and math.isfinite(value)])
        if len(z):
            left.plot(z, np.arange(1, len(z) + 1) / len(z), label=f"{row['case']}: {row['share_within_2_stderr']:.0%} within 2", lw=1.2)
    grid = np.linspace(-3.5, 3.5, 200)
    left.plot(grid, [0.5 * (1 + math.erf(x / math.sqrt(2))) for x in grid], "k--", lw=0.8, label="standard normal")
    left.set(xlabel="(estimate - trace) / stated standard error", ylabel="share of seeds below", xlim=(-3.5, 3.5))
    left.legend(fontsize=7)
    ways = {"plain_mean": "plain", "deflated_mean": f"{DEFLATED} pairs deflated", "xtrace_mean": "XTrace", "cost_mean": "sharpkit.trace"}
    for shift, (key, label) in enumerate(ways.items()):
        bars = right.bar(np.arange(len(rows)) + 0.21 * (shift - 1.5), [row[key] for row in rows], 0.2, label=label)
        right.bar_label(bars, fmt="%.0f", fontsize=7)
    right.plot(np.arange(len(rows)), [row["n"] for row in rows], "k_", ms=40, mew=1.5)
    right.text(0, rows[0]["n"] * 1.15, "n products: exact", ha="center", fontsize=7)
    right.set_xticks(range(len(rows)), [row["case"].split(",")[0] for row in rows], fontsize=8)
    right.set(ylabel="mean products to 1 %", yscale="log")
    right.margins(y=0.2)
    right.set_ylim(top=8000)
    right.legend(fontsize=7, ncols=2, loc="upper center")


if __name__ == "__main__":
    run_as_script("trace_calibration", measure, draw)
