"""How far a step that trains one source of text may go before the loss of another rises: critical rates against a fine scan.

    python -m experiments.geometry_relative      # results/geometry_relative.jsonl, figures/geometry_relative.png

A small GPT of characters, trained by AdamW on Python's standard library. The sources are the library, the same with its letters turned to
upper case, and the same read backwards, so that some steps help another source and some harm it. After 40, 120 and 360 steps the table of
all pairs is measured, and each pair's loss scanned at 200 rates up to twice the answer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import sharpkit as sk
from experiments._common import Row, run_as_script, threads
from experiments._models import GPT, seeded, text
from sharpkit.objective.params import moved
from sharpkit.optimizers import next_update

STEPS = (40, 120, 360)


def sources(count: int, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Windows of 32 characters and those that follow, of each source."""
    x, y, _ = text(count, 32, seed=seed)
    windows = torch.cat([x, y[:, -1:]], dim=1)
    small = (windows >= 66) & (windows <= 91)  # a to z, less 31
    turned = {"library": windows, "upper case": torch.where(small, windows - 32, windows), "backwards": windows.flip(1)}
    return {name: (w[:, :-1].contiguous(), w[:, 1:].contiguous()) for name, w in turned.items()}


def scanned(objective: sk.Objective, update: Tensor, rate: float, points: int) -> float:
    """The first rate of a fine grid at which the loss has risen, with its line from the one before; inf where none has."""
    start, last = objective.value(), (0.0, 0.0)
    for step in np.linspace(0, 2 * rate, points + 1)[1:]:
        with moved(objective.layout, objective.layout.split(update), -float(step)):
            rise = objective.value() - start
        if rise > 0:
            return float(last[0] + (step - last[0]) * last[1] / (last[1] - rise)) if last[0] else float(step)
        last = float(step), rise
    return float("inf")


def measure(quick: bool) -> list[Row]:
    rows: list[Row] = []
    with threads(1):
        model, held = seeded(lambda: GPT(width=16 if quick else 32, time=32)), sources(4 if quick else 16, seed=3)
        objectives = {name: sk.Objective(model, batch, loss=F.cross_entropy) for name, batch in held.items()}
        optimizer, trained = torch.optim.AdamW(model.parameters(), lr=3e-3), sources(64 if quick else 512, seed=1)["library"]
        generator = torch.Generator().manual_seed(0)
        for step in range(1, (3 if quick else max(STEPS)) + 1):
            chosen = torch.randint(len(trained[0]), (16,), generator=generator)
            optimizer.zero_grad()
            F.cross_entropy(model(trained[0][chosen]), trained[1][chosen]).backward()
            optimizer.step()
            if step in STEPS or (quick and step == 3):
                rows += table_rows(objectives, optimizer, step, 20 if quick else 200)
    return rows


def table_rows(objectives: dict[str, sk.Objective], optimizer: torch.optim.Optimizer, step: int, points: int) -> list[Row]:
    rows: list[Row] = []
    table = sk.relative_critical_rates(objectives, optimizer)
    for i, (along, followed) in enumerate(objectives.items()):
        update = next_update(optimizer, followed.layout, followed.gradient()[1])
        for j, (name, objective) in enumerate(objectives.items()):
            rate = float(table.rates[i, j])
            single = sk.critical_learning_rate(objective, optimizer, along=followed)
            row = {"step": step, "along": along, "rises": name, "rate": rate, "lr": table.lr, "forwards": single.num_evaluations}
            finite = 0 < rate < float("inf")
            rows.append(row | {"scan": scanned(objective, update, rate, points) if finite else rate, "outcome": single.outcome})
    rows.append({"step": step, "forwards_of_table": table.num_evaluations, "pairs": len(objectives) ** 2})
    return rows


def draw(rows: list[Row], figure: Any) -> None:
    left, right = figure.subplots(1, 2)
    pairs = [row for row in rows if "scan" in row and row["outcome"] == "found"]
    left.plot([row["scan"] for row in pairs], [row["rate"] / row["scan"] for row in pairs], "o", ms=4)
    left.axhline(1.0, color="0.5", lw=0.8)
    left.set(xscale="log", xlabel="critical rate by a scan of 200 rates", ylabel="critical rate over the scan's", ylim=(0.9, 1.1))
    for along in dict.fromkeys(row["along"] for row in rows if "along" in row):
        for name in dict.fromkeys(row["rises"] for row in rows if "rises" in row):
            own = [row for row in rows if row.get("along") == along and row.get("rises") == name]
            right.plot([row["step"] for row in own], [row["rate"] / row["lr"] for row in own], "o-", label=f"along {along}: {name}")
    right.axhline(1.0, color="0.5", lw=0.8)
    right.set(xscale="log", yscale="symlog", xlabel="steps of AdamW on the library", ylabel="critical rate / rate in use")
    right.set_ylim(bottom=-0.2)
    right.set_xticks(STEPS, [str(step) for step in STEPS])
    right.minorticks_off()
    right.legend(fontsize=5, loc="upper left", bbox_to_anchor=(1.0, 1.0))


if __name__ == "__main__":
    run_as_script("geometry_relative", measure, draw)
