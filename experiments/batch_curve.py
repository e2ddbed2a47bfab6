"""learning_rate_curve against the sweep by real training: rates at every batch size, crossovers, exponents, cost.

The curve starts from an initialisation that the sweep did not use; with --repeat, from another one yet, compared but not drawn. Needs the
results of experiments.batch_sweep.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

import sharpkit as sk
from experiments._batch_models import OPTIMIZERS, PROBLEMS, SIZES
from experiments._common import HERE, Row, circumstances, read_rows, rounded
from sharpkit.batch_size.learning_rate_curve import learning_rate_curve

NAME = "batch_curve"
SEED, REPEAT_SEED = 3, 4  # the sweep trained from 0, 1, 2
_PAPER_GRID = 3  # batch sizes a decade at which 2 (1 + beta) / E lambda_max(H_B) is drawn


def measured(model: str, optimizer: str) -> dict[int, list[Row]]:
    """Batch size -> the sweep's rows of all seeds."""
    found: dict[int, list[Row]] = {}
    for row in read_rows(HERE / "results" / "batch_sweep.jsonl"):
        if (row["model"], row["optimizer"]) == (model, optimizer) and row["rate"]:
            found.setdefault(row["batch_size"], []).append(row)
    return dict(sorted(found.items()))


def predict(model: str, optimizer: str, seed: int = SEED) -> Row:
    """One curve."""
    problem = PROBLEMS[model]()
    network = problem.make(seed)
    objective = sk.Objective(network, (problem.x, problem.y), loss=F.cross_entropy)
    sizes = [*SIZES, problem.size]
    curve = learning_rate_curve(objective, OPTIMIZERS[optimizer](network.parameters(), 1e-3), batch_sizes=sizes, seed=seed)
    labels = {"kind": "curve", "model": model, "optimizer": optimizer, "title": problem.title, "beta": curve.rule.momentum}
    return {**curve.to_dict(), **labels}


def geometric(values: list[float]) -> float:
    return math.exp(float(np.mean(np.log(values))))


def crossover(rates: dict[int, float], exponent: float) -> float:
    """Where the power law through the smallest two batch sizes meets the largest rate."""
    sizes = sorted(rates)
    level = geometric([rates[b] / b**exponent for b in sizes[:2]])
    return (max(rates.values()) / level) ** (1 / exponent)


def slope(rates: dict[int, float]) -> float:
    """Of log rate over log B, where the rate is below 0.7 of the largest."""
    rising = [b for b in sorted(rates) if rates[b] <= 0.7 * max(rates.values())]
    rising = rising if len(rising) >= 2 else sorted(rates)[:2]
    return float(np.polyfit(np.log(rising), np.log([rates[b] for b in rising]), 1)[0])


def compare(curve: Row) -> Row:
    """Predicted over measured at the sweep's batch sizes; the same definitions of crossover and slope on both."""
    truth = measured(curve["model"], curve["optimizer"])
    rows = {row["batch_size"]: row for row in curve["rows"]}
    sizes = [b for b in truth if b in rows]
    real = {b: geometric([row["rate"] for row in truth[b]]) for b in sizes}
    said, theory = ({b: rows[b][key] for b in sizes} for key in ("max_lr", "by_curvature"))
    paper = {b: 2 * (1 + curve["beta"]) / rows[b]["lambda_max"] for b in sizes} if curve["optimizer"] != "Adam" else None
    ratios = [said[b] / real[b] for b in sizes]
    spent = {b: float(np.mean([row["gradients"] for row in truth[b]])) for b in sizes}
    cost = 3 * 10 * float(np.mean([math.exp(np.interp(x, np.log(sizes), np.log([spent[b] for b in sizes]))) for x in _ten(sizes)]))
    return {
        "kind": "comparison",
        "model": curve["model"],
        "optimizer": curve["optimizer"],
        "batch_sizes": sizes,
        "measured": [real[b] for b in sizes],
        "measured_range": [[min(r["rate"] for r in truth[b]), max(r["rate"] for r in truth[b])] for b in sizes],
        "seeds": [len(truth[b]) for b in sizes],
        "predicted": [said[b] for b in sizes],
        "ratio": ratios,
        "worst_factor": max(max(r, 1 / r) for r in ratios),
        "share_within_1.5": float(np.mean([max(r, 1 / r) <= 1.5 for r in ratios])),
        "inside_interval": float(np.mean([rows[b]["max_lr_lower"] <= real[b] <= rows[b]["max_lr_upper"] for b in sizes])),
        "by_curvature_ratio": [theory[b] / real[b] for b in sizes],
        "paper_ratio": [paper[b] / real[b] for b in sizes] if paper else None,
        "crossover_measured": crossover(real, curve["exponent"]),
        "crossover_predicted": crossover(said, curve["exponent"]),
        "exponent_measured": slope(real),
        "exponent_predicted": slope(said),
        "cost_curve": curve["gradients"],
        "cost_sweep": cost,
        "times_cheaper": cost / curve["gradients"],
    }


def _ten(sizes: list[int]) -> Any:
    """Logarithms of ten batch sizes, evenly spread from the smallest to the largest."""
    return np.linspace(math.log(sizes[0]), math.log(sizes[-1]), 10)


def draw(curves: list[Row], comparisons: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(c["model"] for c in curves))
    figure = Figure(figsize=(11, 3.2 * len(models)), layout="constrained")
    axes = figure.subplots(len(models), len(OPTIMIZERS), squeeze=False)
    for curve, found in zip(curves, comparisons, strict=True):
        ax = axes[models.index(curve["model"]), list(OPTIMIZERS).index(curve["optimizer"])]
        sizes = [row["batch_size"] for row in curve["rows"]]
        ax.fill_between(
            sizes, [r["max_lr_lower"] for r in curve["rows"]], [r["max_lr_upper"] for r in curve["rows"]], color="C0", alpha=0.15, lw=0
        )
        ax.plot(sizes, [r["max_lr"] for r in curve["rows"]], color="C0", label="predicted")
        ax.plot(sizes, [r["by_curvature"] for r in curve["rows"]], color="grey", ls=":", label="curvature alone")
        if found["paper_ratio"]:
            ax.plot(sizes, [2 * (1 + curve["beta"]) / r["lambda_max"] for r in curve["rows"]], color="C1", ls="--", label="2(1+β)/λ(H_B)")
        low, high = np.array(found["measured_range"]).T
        real = np.array(found["measured"])
        ax.errorbar(
            found["batch_sizes"],
            real,
            yerr=np.maximum([real - low, high - real], 0),
            fmt="o",
            color="black",
            ms=4,
            capsize=2,
            label="by training",
        )
        ax.set(xscale="log", yscale="log", title=f"{curve['title']}: {curve['optimizer']}")
        ax.title.set_fontsize(9)
        ax.set_xticks([4, 16, 64, 256, sizes[-1]], ["4", "16", "64", "256", str(sizes[-1])])
    for ax in axes[-1]:
        ax.set_xlabel("batch size")
    for ax in axes[:, 0]:
        ax.set_ylabel("largest stable rate")
    axes[0, 0].legend(fontsize=7)
    figure.savefig(path, dpi=110, metadata={"Software": f"python -m experiments.{NAME}"})


def write(path: Path, head: Row, curves: dict[tuple[str, str], Row], repeats: dict[tuple[str, str], Row]) -> tuple[list[Row], list[Row]]:
    """The curves in order and how they compare, written to the results."""
    ordered = [curves[m, o] for m in PROBLEMS for o in OPTIMIZERS if (m, o) in curves]
    comparisons = [compare(row) for row in ordered]
    head["seconds"] = sum(row["seconds"] for row in ordered)
    path.write_text("".join(json.dumps(rounded(row)) + "\n" for row in [head, *ordered, *comparisons, *repeats.values()]))
    return ordered, comparisons


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="one pair, into a temporary folder")
    parser.add_argument("--models", nargs="+", default=list(PROBLEMS), help="curves of the others are kept as they are")
    parser.add_argument("--figure-only", action="store_true", help="compare and draw anew, with the curves there are")
    parser.add_argument("--repeat", action="store_true", help="curves from another initialisation beside those there are")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results, figure = HERE / "results" / f"{NAME}.jsonl", HERE.parent / "figures" / f"{NAME}.png"
    if options.quick:
        folder = Path(tempfile.gettempdir()) / "sharpkit-experiments"
        folder.mkdir(parents=True, exist_ok=True)
        results, figure = folder / results.name, folder / figure.name
    head = circumstances(NAME, quick=options.quick, seconds=0.0)
    known = read_rows(results) if results.exists() else []
    curves = {(row["model"], row["optimizer"]): row for row in known if row["kind"] == "curve"}
    repeats = {(row["model"], row["optimizer"]): row for row in known if row["kind"] == "repeat"}
    pairs = [("mlp", "SGD")] if options.quick else [(m, o) for m in options.models for o in OPTIMIZERS]
    if options.figure_only:
        head = json.loads(results.read_text().splitlines()[0])
    for pair in [] if options.figure_only else pairs:
        if options.repeat:
            repeats[pair] = {**compare(predict(*pair, seed=REPEAT_SEED)), "kind": "repeat"}
        else:
            curves[pair] = predict(*pair)
        print(json.dumps(rounded(repeats[pair] if options.repeat else compare(curves[pair]))), flush=True)
        write(results, head, curves, repeats)  # as they come
    ordered, comparisons = write(results, head, curves, repeats)
    draw(ordered, comparisons, figure)


if __name__ == "__main__":
    main()
