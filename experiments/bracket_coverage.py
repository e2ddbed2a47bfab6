"""Does the sharpness bracket hold the full-data value as often as it says? Repeated draws on networks trained on the digits.

python -m experiments.bracket_coverage [--quick]
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sharpkit as sk
from experiments._common import Row, run_as_script
from experiments._models import mlp, seeded, train

_SIZES, _RTOL = (256, 512, 1024), 0.4


def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32), torch.tensor(data.target)
    return (x - x.mean()) / x.std(), y


def networks(*, quick: bool) -> Iterator[tuple[str, nn.Module, Tensor, Tensor]]:
    x, y = digits()
    for hidden, steps in ((16, 100), (24, 60)) if quick else ((16, 100), (24, 60), (32, 400)):
        model = train(seeded(lambda hidden=hidden: mlp((64, hidden, hidden, 10))), x, y, steps=steps, lr=5e-3)
        yield f"64-{hidden}-{hidden}-10, {steps} steps", model, x, y


def measure(quick: bool) -> list[Row]:
    rows: list[Row] = []
    repeats = 10 if quick else 200
    for name, model, x, y in networks(quick=quick):
        objective = sk.Objective(model, (x, y), loss=F.cross_entropy)
        truth = float(sk.eigenpairs(sk.HessianOperator(objective), tol=1e-5).values[0])
        histories = []
        crossed: list[int] = []
        for seed in range(repeats):
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always", sk.ConvergenceWarning)
                histories.append(sk.sharpness_bracket(objective, rtol=1e-9, start=_SIZES[0], max_samples=_SIZES[-1], seed=seed).history)
            crossed += [seed] * any("crossed" in str(w.message) for w in said)
        for i, n in enumerate(_SIZES):
            rows.append({"network": name, "truth": truth, "rule": f"n = {n}", "samples": n, **_summary([h[i] for h in histories], truth)})
        # what rtol = 0.4 would have returned: the first step narrow enough, else all samples and the truth
        ended = [
            next((step for step in h if step[2] - step[1] <= _RTOL * (step[1] + step[2]) / 2), (len(x), truth, truth)) for h in histories
        ]
        used = float(np.mean([n for n, _, _ in ended]))
        rows.append(
            {
                "network": name,
                "truth": truth,
                "rule": f"rtol = {_RTOL}",
                "samples": used,
                "crossed_seeds": crossed,
                **_summary(ended, truth),
            }
        )
    return rows


def _summary(steps: list[tuple[int, float, float]], truth: float) -> Row:
    _, lower, upper = np.array(steps).T
    return {
        "repeats": len(steps),
        "covered": float(np.mean((lower <= truth * (1 + 1e-3)) & (upper >= truth * (1 - 1e-3)))),
        "lower_holds": float(np.mean(lower <= truth * (1 + 1e-3))),
        "upper_holds": float(np.mean(upper >= truth * (1 - 1e-3))),
        "lower_mean": float(lower.mean()),
        "upper_mean": float(upper.mean()),
        "lower_spread": float(lower.std()),
        "upper_spread": float(upper.std()),
    }


def draw(rows: list[Row], figure: Any) -> None:
    names = list(dict.fromkeys(row["network"] for row in rows))
    for axes, name in zip(np.atleast_1d(figure.subplots(1, len(names))), names, strict=True):
        chosen = [row for row in rows if row["network"] == name]
        for i, row in enumerate(chosen):
            axes.plot([i, i], [row["lower_mean"], row["upper_mean"]], color="tab:blue", linewidth=5, alpha=0.5)
            for end in ("lower", "upper"):
                axes.errorbar(i, row[f"{end}_mean"], yerr=row[f"{end}_spread"], fmt="_", color="black", capsize=3)
            axes.annotate(f"{row['covered']:.1%}", (i, row["upper_mean"] + row["upper_spread"]), ha="center", va="bottom", fontsize=8)
        axes.axhline(chosen[0]["truth"], color="tab:red", linewidth=1)
        axes.set_xticks(range(len(chosen)), [row["rule"] for row in chosen], fontsize=8)
        axes.set_title(f"{name} ({chosen[0]['repeats']} draws)", fontsize=9)
        axes.margins(x=0.15, y=0.15)
    figure.axes[0].set_ylabel("mean bounds, true lambda_max (red)")


if __name__ == "__main__":
    run_as_script("bracket_coverage", measure, draw)
