"""Does the second-order prediction tell what the next real step does to the loss? Nine optimizers on a small transformer.

Each trains on text at a customary rate. Now and then the slope and curvature along its next update predict the change of the batch's loss,
and the real optimizer makes that step: at its own rate, and at shares of the length 2 / directional at which the loss would rise.

python -m experiments.geometry_one_step [--quick]
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sharpkit as sk
from experiments._common import Row, run_as_script
from experiments._models import GPT, seeded, text

_LOOKS = (1, 3, 10, 30, 60, 100)  # steps after which the next one is predicted
_SHARES = (0.1, 0.25, 0.5, 0.75)
_CONTEXT, _BATCH, _WIDTH = 32, 8, 32
# By convention: rates at which each of them is used on small transformers.
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD momentum": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
    "Adam": lambda params: torch.optim.Adam(params, lr=1e-3),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-3, weight_decay=0.1),
    "NAdam": lambda params: torch.optim.NAdam(params, lr=1e-3),
    "RAdam": lambda params: torch.optim.RAdam(params, lr=1e-3),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=1e-3),
    "Adafactor": lambda params: torch.optim.Adafactor(params, lr=1e-2),
    "Muon": lambda params: torch.optim.Muon([p for p in params if p.dim() == 2], lr=0.01),  # which takes matrices alone
    "Lion": lambda params: importlib.import_module("lion_pytorch").Lion(params, lr=1e-4, weight_decay=0.1),
}


def batches(count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Of text, drawn anew for each step."""
    x, y, _ = text(_BATCH * count, _CONTEXT, seed=seed)
    return list(zip(x.split(_BATCH), y.split(_BATCH), strict=True))


def changed_by(model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor], factor: float) -> float:
    """By how much the real optimizer's next step on this batch, its rates multiplied, changes the batch's loss; undone afterwards."""
    kept = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    for group in optimizer.param_groups:
        group["lr"] *= factor
    optimizer.zero_grad()
    before = loss_of(model, batch)
    before.backward()
    optimizer.step()
    with torch.no_grad():
        change = float(loss_of(model, batch) - before)
    model.load_state_dict(kept[0])
    optimizer.load_state_dict(kept[1])
    return change


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def rows_of(name: str, looks: tuple[int, ...], seed: int) -> list[Row]:
    """One row a look and a share: the change predicted and the real one."""
    try:
        model = seeded(lambda: GPT(width=_WIDTH, time=_CONTEXT).double(), seed)
        optimizer = OPTIMIZERS[name]([*model.parameters()])
    except (ImportError, AttributeError) as error:
        return [{"optimizer": name, "outcome": "not installed", "why": str(error)}]
    rows: list[Row] = []
    for step, batch in enumerate(batches(max(looks) + 1, seed), start=0):
        if step in looks:
            met = sk.update_curvature(sk.Objective(model, batch, loss=F.cross_entropy), optimizer, layers=False)
            limit = 2 / met.directional  # negative where the curvature along the update is: nothing bounds the rate then
            shares = _SHARES if met.slope > 0 and limit > 0 else ()
            for share in (met.share, *shares):
                lr = share * limit
                predicted = lr * (lr * met.curvature / 2 - met.slope)
                real = changed_by(model, optimizer, batch, lr / met.lr)
                row = {"optimizer": name, "seed": seed, "step": step, "share": share, "own": share == met.share, "lr": lr}
                rows.append({**row, "predicted": predicted, "real": real, "error": predicted / real - 1})
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    return rows


def summary(rows: list[Row]) -> list[Row]:
    """Median and 90 % quantile of the relative error, at the own rate and at each share."""
    answer = []
    for name in OPTIMIZERS:
        own = [row for row in rows if row["optimizer"] == name and "error" in row]
        for label, chosen in [("own rate", [r for r in own if r["own"] and 0 < r["share"] < 1])] + [
            (f"share {share:g}", [r for r in own if not r["own"] and r["share"] == share]) for share in _SHARES
        ]:
            errors = np.abs([row["error"] for row in chosen])
            if len(errors):
                spread = {"median": float(np.median(errors)), "at most, in 90 %": float(np.quantile(errors, 0.9))}
                answer.append({"summary": label, "optimizer": name, **spread, "looks": len(errors)})
    return answer


def measure(quick: bool) -> list[Row]:
    names, looks, seeds = (("Adam", "Muon"), (1, 3), (0,)) if quick else (tuple(OPTIMIZERS), _LOOKS, (0, 1, 2))
    rows = [row for name in names for seed in seeds for row in rows_of(name, looks, seed)]
    return [*summary(rows), *rows]


def draw(rows: list[Row], figure: Any) -> None:
    axes, known = figure.subplots(), [row for row in rows if "error" in row and not row["own"]]
    for name in dict.fromkeys(row["optimizer"] for row in known):
        medians = [np.median([abs(r["error"]) for r in known if r["optimizer"] == name and r["share"] == share]) for share in _SHARES]
        axes.plot(_SHARES, [100 * m for m in medians], ".-", label=name)
    axes.axhline(10, color="grey", lw=0.6)
    axes.set(xlabel="rate over the one at which the loss would rise", ylabel="error of the change predicted, %", yscale="log")
    axes.legend(fontsize=7, ncols=2)


if __name__ == "__main__":
    run_as_script("geometry_one_step", measure, draw)
