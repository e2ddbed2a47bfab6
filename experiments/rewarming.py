"""Going on from an annealed checkpoint with other text: how high may the learning rate go again, and how fast?

    python -m experiments.rewarming          # results/rewarming.jsonl, figures/rewarming.png

A char transformer is trained on Python's source (AdamW, warm-up, linear decay to 0), then goes on with Python's documentation in English,
to several peaks and with climbs of several lengths: at once, by `sk.laws.rewarming` at three speeds, and linearly over a tenth of the run.
Each then decays linearly to 0. Losses are those of windows that neither run trained on.
"""

from __future__ import annotations

import copy
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import sharpkit as sk
from experiments._common import Row, run_as_script
from experiments._models import GPT, seeded, text

PEAK, BATCH, TIME, SAMPLES = 0.01, 16, 32, 256
PEAKS = (0.01, 0.03, 0.1)
CLIMBS = ("at once", "5 steps a doubling", "20 steps a doubling", "80 steps a doubling", "a tenth of the run")
SEEDS = (0, 1, 2)


@cache
def windows(source: str) -> tuple[Tensor, Tensor]:
    """4500 windows of 32 characters and of those that follow; the last 500 are for judging."""
    if source == "code":
        x, y, _ = text(4500, TIME, seed=1)
        return x, y
    raw = (Path(os.__file__).parent / "pydoc_data" / "topics.py").read_text(encoding="utf-8").encode("ascii", "replace")
    tokens = torch.tensor(list(raw)).sub(31).clamp(0, 95)
    starts = torch.randint(len(tokens) - TIME - 1, (4500,), generator=torch.Generator().manual_seed(2))
    rows = torch.stack([tokens[s : s + TIME + 1] for s in starts.tolist()])
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def held_out(model: Any, source: str) -> float:
    x, y = windows(source)
    with torch.no_grad():
        return float(F.cross_entropy(model(x[-500:]), y[-500:]))


def run(model: Any, optimizer: torch.optim.Optimizer, schedule: Any, source: str, *, steps: int, seed: int) -> list[float]:
    """Batch losses."""
    x, y = windows(source)
    generator, losses = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        chosen = torch.randint(4000, (BATCH,), generator=generator)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[chosen]), y[chosen])
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return losses


def measure(quick: bool) -> list[Row]:
    """One row for each seed, peak and climb."""
    torch.set_num_threads(1)
    rows = list[Row]()
    before, after = (150, 100) if quick else (1000, 500)
    for seed in SEEDS[: 1 if quick else None]:
        model = seeded(lambda: GPT(time=TIME, width=48, layers=1, heads=4), seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, weight_decay=0.01)
        schedule = sk.laws.scheduler(optimizer, sk.laws.linear, total_steps=before, warmup=before // 10)
        run(model, optimizer, schedule, "code", steps=before, seed=seed)
        x, y = windows("prose")
        objective = sk.Objective(model, (x[:SAMPLES], y[:SAMPLES]), loss=F.cross_entropy)
        start = {"seed": seed, "code before": held_out(model, "code"), "prose before": held_out(model, "prose")}
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"]
        for peak in PEAKS:
            for climb in CLIMBS:
                speed = 20 if not climb[0].isdigit() else int(climb.split()[0])
                advice = sk.laws.rewarming(objective, optimizer, peak=peak, steps_per_doubling=speed)
                twin = copy.deepcopy(model)
                other = torch.optim.AdamW(twin.parameters(), lr=peak, weight_decay=0.01)
                other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
                for group in other.param_groups:
                    group["lr"] = peak
                    group.pop("initial_lr", None)
                if climb == "at once":
                    schedule = sk.laws.scheduler(other, sk.laws.linear, total_steps=after)
                elif climb == "a tenth of the run":
                    schedule = sk.laws.scheduler(other, sk.laws.linear, total_steps=after, warmup=after // 10)
                elif advice.steps < after:
                    schedule = advice.scheduler(other, total_steps=after, schedule=sk.laws.linear)
                else:
                    continue
                losses = run(twin, other, schedule, "prose", steps=after, seed=100 + seed)
                smooth = np.convolve(losses, np.ones(5) / 5, mode="valid")
                row = {**start, "peak": peak, "climb": climb, "limit": float(advice.limit), "steps": advice.steps}
                ends = {"prose": held_out(twin, "prose"), "code": held_out(twin, "code")}
                rows.append({**row, **ends, "highest": float(smooth.max()), "losses": smooth[:100:2].round(3).tolist()})
    return rows


def draw(rows: list[Row], canvas: Any) -> None:
    """The first steps of the first seed at the highest peak; final losses by climb and peak."""
    left, middle, right = canvas.subplots(1, 3)
    peak, climbs = max(row["peak"] for row in rows), [c for c in CLIMBS if any(row["climb"] == c for row in rows)]
    for row in rows:
        if row["seed"] == rows[0]["seed"] and row["peak"] == peak:
            left.plot(np.arange(len(row["losses"])) * 2, row["losses"], label=row["climb"], linewidth=1.2)
    left.set(xlabel="steps", ylabel="batch loss, mean of 5 (nats)", title=f"going on at a peak of {peak:g}")
    left.legend(frameon=False, fontsize=7)
    for ax, what in ((middle, "prose"), (right, "code")):
        for own in sorted({row["peak"] for row in rows}):
            means = [np.mean([r[what] for r in rows if r["peak"] == own and r["climb"] == c] or [np.nan]) for c in climbs]
            ax.plot(range(len(climbs)), means, "o-", label=f"peak {own:g}")
        ax.axhline(np.mean([row[f"{what} before"] for row in rows]), color="#888", linestyle="--", label="before going on")
        ax.set_xticks(range(len(climbs)), labels=climbs, rotation=30, ha="right", fontsize=7)
        ax.set(ylabel="held-out loss (nats a character)", title=f"{what} afterwards")
    middle.legend(frameon=False, fontsize=7)


if __name__ == "__main__":
    run_as_script("rewarming", measure, draw)
