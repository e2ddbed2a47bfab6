"""The law of learning-rate annealing on a char transformer: fitted to one run or two, it foretells other schedules.

    python -m experiments.annealing_law          # results/annealing_law.jsonl, figures/annealing_law.png

The law is fitted to the smoothed batch losses of a cosine run (after 100 steps of warm-up, which are left out), and predicts the end of a
WSD and of a linear run at the same peak, whose losses it has not seen; then to each two of the three, to predict the third. Errors are
relative, of the mean loss of the last 100 steps.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from experiments._common import Row, run_as_script
from experiments._learner_tasks import task_of
from sharpkit import laws

SCHEDULES = {"cosine": laws.cosine, "wsd": laws.wsd(0.2), "linear": laws.linear}
WARMUP, PEAK, WINDOW = 100, 0.01, 100
SEEDS = (0, 1, 2)


def trained(name: str, seed: int, steps: int) -> tuple[list[float], list[float]]:
    """Losses and rates of each step."""
    task = task_of("text")
    model = task.make(seed)
    optimizer = task.optimizer(model.parameters(), PEAK)
    schedule = laws.scheduler(optimizer, SCHEDULES[name], total_steps=steps, warmup=min(WARMUP, steps // 10))
    batches, losses, rates = task.batches(seed), [], []
    for _ in range(steps):
        x, y = next(batches)
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.zero_grad()
        output = model(x)
        loss = F.cross_entropy(output, y)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return losses, rates


def smoothed(losses: list[float], width: int) -> np.ndarray[Any, Any]:
    """The mean of the last ``width`` losses, NaN before."""
    sums = np.cumsum([0.0, *losses])
    out = np.full(len(losses), np.nan)
    out[width - 1 :] = (sums[width:] - sums[:-width]) / width
    return out


def measure(quick: bool) -> list[Row]:
    """One row for each schedule and seed."""
    torch.set_num_threads(1)
    steps, rows = (200 if quick else 2000), []
    width = min(WINDOW, steps // 5)
    for seed in SEEDS[: 1 if quick else None]:
        runs = {name: trained(name, seed, steps) for name in SCHEDULES}
        skip = min(WARMUP, steps // 10)
        # one run foretells the others, and itself; two foretell the third
        pairs = [(pair, memory) for pair in itertools.combinations(SCHEDULES, 2) for memory in (0.999, "fit")]
        for known, memory in ((("cosine",), 0.999), *pairs):
            told = [(smoothed(runs[name][0], width)[skip:], runs[name][1][skip:]) for name in known]
            law = laws.fit_annealing_law([losses for losses, _ in told], [rates for _, rates in told], memory=memory)
            for name, (seen, used) in runs.items():
                if len(known) > 1 and name in known:
                    continue
                foretold = law.predict(used[skip:])
                end, predicted = float(np.mean(seen[-width:])), float(np.mean(foretold[-width:]))
                curve = [round(float(v), 4) for v in smoothed(seen, width)[skip :: steps // 50]]
                row = {"known": "+".join(known), "schedule": name, "seed": seed, "steps": steps, "loss": end, "predicted": predicted}
                row |= {
                    "error": predicted / end - 1,
                    "alpha": law.alpha,
                    "C": law.C,
                    "memory": law.memory,
                    "fitted memory": memory == "fit",
                }
                rows.append({**row, "curve": curve, "law": foretold[:: steps // 50].round(4).tolist()})
    return rows


def draw(rows: list[Row], canvas: Any) -> None:
    """Losses of the first seed, and what the law says of them."""
    axes = canvas.subplots(1, 3, sharey=True)
    for ax, row in zip(axes, [row for row in rows if row["seed"] == rows[0]["seed"] and row["known"] == "cosine"], strict=True):
        at = np.arange(len(row["curve"])) * row["steps"] / 50
        ax.plot(at, row["curve"], color="#2563a8", label="loss")
        ax.plot(at[: len(row["law"])], row["law"][: len(at)], color="#d1662b", linestyle="--", label="law, fitted to the cosine")
        ax.set(title=f"{row['schedule']}: {100 * row['error']:+.1f} %", xlabel="steps")
        ax.legend(frameon=False, fontsize=8)
    axes[0].set_ylabel("smoothed batch loss (nats a character)")


if __name__ == "__main__":
    run_as_script("annealing_law", measure, draw)
