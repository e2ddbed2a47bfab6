"""Top eigenvalues of mini-batch Hessians: four estimators and Gram resampling against means over fresh batches, on trained networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sharpkit as sk
from experiments._batch_models import PROBLEMS, Problem
from experiments._common import Row, run_as_script, threads
from experiments._gram import gram_resampling
from experiments._models import mlp, seeded
from sharpkit._results import standard_error
from sharpkit.batch_size.curvature import BatchCurvature, measure_batch_curvature
from sharpkit.batch_size.pilot import Ledger
from sharpkit.objective.samples import SamplePool

DRAWS = 12
GRAM_DRAWS = 60  # so that the measured mean is known better than the interval it is to lie in
ESTIMATORS: dict[str, Callable[[BatchCurvature, int], float]] = {
    "automatic": lambda c, b: float(c.lambda_max_of(b)),
    "directional": lambda c, b: c.directional_estimate(b),
    "isotropic": lambda c, b: c.isotropic_estimate(b),
    "calibrated": lambda c, b: c.calibrated_estimate(b),
}


@dataclass(frozen=True)
class Network:
    """A network trained by SGD."""

    title: str
    model: nn.Module
    x: Tensor
    y: Tensor
    per_class: bool  # output (samples, classes), which Gram resampling asks for

    def objective(self) -> sk.Objective:
        return sk.Objective(self.model, (self.x, self.y), loss=F.cross_entropy)


def trained(problem: Problem, title: str, rate: float, *, model: nn.Module | None = None, steps: int = 300) -> Network:
    """Some steps of SGD at batch size 64."""
    model, generator = model or problem.make(0), torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for _ in range(steps):
        chosen = torch.randint(problem.size, (64,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(problem.x[chosen]), problem.y[chosen]).backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return Network(title, model, problem.x, problem.y, problem.name != "transformer")


def networks(quick: bool) -> list[Network]:
    digits = PROBLEMS["mlp"]()
    steps = 60 if quick else 300
    tanh = seeded(lambda: mlp((64, 64, 64, 10), nn.Tanh))
    found = [trained(digits, "MLP, ReLU", 0.2, steps=steps)]
    if not quick:
        found += [
            trained(digits, "MLP, tanh", 0.2, model=tanh),
            trained(PROBLEMS["conv"](), "conv net", 0.2),
            trained(PROBLEMS["transformer"](), "transformer", 0.3),
        ]
    return found


def fresh(pool: SamplePool, operator: Callable[..., Any], size: int, draws: int) -> tuple[float, float]:
    """(mean, standard error) of lambda_max over batches drawn with a seed of their own."""
    batches = pool.draws(size, generator=torch.Generator().manual_seed(777 + size))
    tops = [float(sk.eigenpairs(operator(b), k=1, tol=1e-2, seed=9).values[0]) for _, b in zip(range(draws), batches, strict=False)]
    return float(np.mean(tops)), standard_error(np.array(tops))


def measure(quick: bool) -> list[Row]:
    rows: list[Row] = []
    with threads(1):
        for network in networks(quick):
            objective = network.objective()
            pool, ledger = SamplePool(objective), Ledger()
            sizes = [b for b in (8, 16, 32, 64, 128, 256, 512) if b <= pool.size // 2]
            anchors = [b for b in (4, 32, 128) if b <= pool.size // 8]  # other batches, other seeds than the measured means
            curvature = measure_batch_curvature(pool, sizes=anchors, seed=0, ledger=ledger)
            gram = gram_resampling(objective, max_samples=600, num_draws=40) if network.per_class else None
            for size in [16, 64] if quick else sizes:
                mean, error = fresh(pool, sk.HessianOperator, size, 4 if quick else DRAWS)
                row: Row = {
                    "network": network.title,
                    "num_samples": pool.size,
                    "batch_size": size,
                    "anchors": anchors,
                    "measured": mean,
                    "stderr": error,
                    "full": curvature.lambda_max,
                    "estimates": {name: estimate(curvature, size) for name, estimate in ESTIMATORS.items()},
                    "why": curvature.choose()[0],
                    "cost": ledger.samples / pool.size,
                }
                row["relative"] = {name: value / mean - 1 for name, value in row["estimates"].items()}
                if gram is not None and size <= gram.num_samples:
                    bound = gram.lambda_max(size)
                    ggn, ggn_error = fresh(pool, sk.GaussNewtonOperator, size, 4 if quick else GRAM_DRAWS)
                    row["gram"] = {"mean": float(bound), "lower": bound.lower, "upper": bound.upper, "samples": gram.num_samples}
                    row["gram"] |= {"measured": ggn, "stderr": ggn_error, "inside": bool(bound.lower <= ggn <= bound.upper)}
                    half = max(bound.upper - float(bound), 1e-12)
                    row["gram"]["consistent"] = abs(ggn - float(bound)) <= float(np.hypot(half, 1.96 * ggn_error))  # the mean scatters too
                rows.append(row)
                print(row["network"], size, row["measured"], row["relative"], row.get("gram"), flush=True)
    return rows


def draw(rows: list[Row], figure: Any) -> None:
    names = list(dict.fromkeys(row["network"] for row in rows))
    figure.set_size_inches(3.2 * len(names), 3.4)
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    for ax, name in zip(axes, names, strict=True):
        chosen = [row for row in rows if row["network"] == name]
        sizes = [row["batch_size"] for row in chosen]
        for (estimator, style), color in zip(
            (("automatic", "-"), ("directional", "--"), ("isotropic", ":"), ("calibrated", "-.")), ["C0", "C1", "C2", "C3"], strict=True
        ):
            ax.plot(sizes, [row["estimates"][estimator] for row in chosen], style, color=color, label=estimator, lw=1.3)
        ax.errorbar(
            sizes, [r["measured"] for r in chosen], yerr=[2 * r["stderr"] for r in chosen], fmt="ko", ms=3.5, capsize=2, label="measured"
        )
        with_gram = [row for row in chosen if "gram" in row]
        if with_gram:
            at = [row["batch_size"] for row in with_gram]
            ax.fill_between(
                at, [r["gram"]["lower"] for r in with_gram], [r["gram"]["upper"] for r in with_gram], color="C4", alpha=0.3, lw=0
            )
            ax.plot(at, [row["gram"]["mean"] for row in with_gram], color="C4", label="Gram resampling (GGN)", lw=1.3)
            ax.plot(at, [row["gram"]["measured"] for row in with_gram], "x", color="C4", ms=5, label="measured GGN")
        ax.axhline(chosen[0]["full"], color="grey", lw=0.7)
        ax.set(xscale="log", yscale="log", title=name, xlabel="batch size")
    axes[0].set_ylabel("E lambda_max(H_B)")
    axes[0].legend(fontsize=6)


if __name__ == "__main__":
    run_as_script("batch_lambda", measure, draw)
