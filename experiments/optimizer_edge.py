"""Where does training settle? The rate over the stated limit along full-batch training, a dozen optimizers on handwritten digits.

Sharpness grows until it meets the limit of whatever rate is used (Cohen et al., arXiv 2103.00065 and 2207.14484): if the rule is right,
lr / limit comes to 1 and stays.

python -m experiments.optimizer_edge [--quick]
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import sharpkit as sk
from experiments._batch_models import digits
from experiments._common import Row, run_as_script
from experiments._models import seeded

_STEPS, _EVERY, _SAMPLES = 1500, 50, 300
_BETAS = (0.9, 0.99)  # a second moment that follows within the run
Make = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def _of(package: str, name: str, **settings: Any) -> Make:
    return lambda params: getattr(importlib.import_module(package), name)(params, **settings)


# Rates by a look at single runs: so high that the limit is met within the run, and no higher than that the loss still falls.
OPTIMIZERS: dict[str, Make] = {
    "SGD": _of("torch.optim", "SGD", lr=1.0),
    "ASGD": _of("torch.optim", "ASGD", lr=1.0),
    "Adam": _of("torch.optim", "Adam", lr=3e-3, betas=_BETAS),
    "AdamW": _of("torch.optim", "AdamW", lr=3e-3, betas=_BETAS, weight_decay=0.1),
    "NAdam": _of("torch.optim", "NAdam", lr=1.5e-3, betas=_BETAS),
    "RAdam": _of("torch.optim", "RAdam", lr=3e-3, betas=_BETAS),
    "Adamax": _of("torch.optim", "Adamax", lr=5e-3, betas=_BETAS),
    "RMSprop momentum": _of("torch.optim", "RMSprop", lr=5e-4, momentum=0.5),
    "Adadelta": _of("torch.optim", "Adadelta", lr=1.5, rho=0.99),
    "Adafactor": _of("torch.optim", "Adafactor", lr=1e-2),
    "AdamWScheduleFree": _of("schedulefree", "AdamWScheduleFree", lr=3e-3, betas=_BETAS),
    "Prodigy": _of("prodigyopt", "Prodigy", lr=1.0, betas=_BETAS),
}


def rows_of(name: str, seed: int, *, steps: int, every: int) -> list[Row]:
    """One row a look."""
    x, y, _ = digits()
    x, y = x[:_SAMPLES].flatten(1), F.one_hot(y[:_SAMPLES], 10).float()
    model = seeded(lambda: nn.Sequential(nn.Linear(x.shape[1], 24), nn.Tanh(), nn.Linear(24, 10)), seed)
    try:
        optimizer = OPTIMIZERS[name](model.parameters())
    except ImportError as error:
        return [{"optimizer": name, "outcome": "not installed", "why": str(error)}]
    if hasattr(optimizer, "train"):
        optimizer.train()
    objective, rows = sk.Objective(model, (x, y), loss=F.mse_loss), list[Row]()
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        if step % every == 0:
            sharpness = sk.measure(objective, optimizer=optimizer, num_probes=3, num_steps=8)
            share = float(sharpness.lr or 0.0) / float(sharpness.stable_lr)
            rows.append({"optimizer": name, "seed": seed, "step": step, "share": share, "loss": float(loss.detach())})
    return rows


def measure(quick: bool) -> list[Row]:
    names, seeds, steps, every = (("Adam", "NAdam"), (0,), 200, 50) if quick else (tuple(OPTIMIZERS), (0, 1), _STEPS, _EVERY)
    rows = [row for name in names for seed in seeds for row in rows_of(name, seed, steps=steps, every=every)]
    summary = []
    for name in names:
        last = [row["share"] for row in rows if row["optimizer"] == name and row.get("step", 0) > 2 * steps / 3]
        if last:
            summary.append({"summary": name, "mean of the last third": float(np.mean(last)), "least": min(last), "most": max(last)})
    return [*summary, *rows]


def draw(rows: list[Row], figure: Any) -> None:
    axes, known = figure.subplots(), [row for row in rows if "share" in row and row["seed"] == 0]
    for index, name in enumerate(dict.fromkeys(row["optimizer"] for row in known)):
        own = [row for row in known if row["optimizer"] == name]
        axes.plot([r["step"] for r in own], [r["share"] for r in own], "-" if index < 6 else "--", lw=1, label=name)
    axes.axhline(1, color="grey", lw=0.8)
    axes.set(xlabel="step", ylabel="lr / limit", ylim=(0, 1.6))
    axes.legend(fontsize=7, ncols=3)


if __name__ == "__main__":
    run_as_script("optimizer_edge", measure, draw)
