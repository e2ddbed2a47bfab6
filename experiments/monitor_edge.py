"""Where training settles, by sk.Monitor: gradient descent at 2/eta, Adam at 38/eta, SGD's batch sharpness, critical sharpness."""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sharpkit as sk
from experiments._common import HERE, Row, circumstances, read_rows, rounded
from experiments._models import images, mlp, seeded

NAME = "monitor_edge"
PARTS = ("gd", "adam", "sgd", "critical")
SEED = 0
_RECORDS = 160  # of a run
_COLOURS = ("C0", "C1", "C2")


def half_square(output: Tensor, target: Tensor) -> Tensor:
    """Square loss on one-hot targets, summed over classes, averaged over samples."""
    return 0.5 * (output - F.one_hot(target, 10)).square().sum(1).mean()


def tanh_mlp() -> nn.Module:
    return mlp((196, 64, 64, 10), nn.Tanh)


def tanh_conv() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(6, 12, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(48, 10)),
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {"tanh MLP": (tanh_mlp, 14), "tanh conv net": (tanh_conv, 8)}  # with image side


def adam(parameters: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr, betas=(0.9, 0.99), eps=1e-8)


def run(
    network: str,
    make: Callable[[Any, float], torch.optim.Optimizer],
    lr: float,
    *,
    metrics: list[str],
    steps: int,
    samples: int,
    batch: int | None = None,
) -> Row:
    """Train with a monitor; the series of every metric and of the loss, and the means over the last third of the steps.

    Args:
        network: a key of NETWORKS.
        make: optimizer from parameters and rate.
        lr: the rate.
        metrics: of the monitor, whose probe set is the training data where it needs one.
        steps: optimizer steps.
        samples: of training data.
        batch: batch size of SGD; None for all samples at once.
    """
    build, side = NETWORKS[network]
    x, y, data = images(samples, side=side)
    model = seeded(build, SEED)
    optimizer = make(model.parameters(), lr)
    monitor = sk.Monitor(
        model, optimizer, loss=half_square, every=max(1, steps // _RECORDS), metrics=metrics, probe=(x, y) if batch else None, seed=SEED
    )
    generator = torch.Generator().manual_seed(SEED)
    order: list[Tensor] = []
    began = time.perf_counter()
    for _ in range(steps):
        if batch and not order:
            order = [chosen for chosen in torch.randperm(samples, generator=generator).split(batch) if len(chosen) == batch]
        xb, yb = (x[chosen := order.pop()], y[chosen]) if batch else (x, y)
        loss = half_square(model(xb), yb)
        optimizer.zero_grad()
        loss.backward()
        monitor.step((xb, yb), loss=loss)
        optimizer.step()
    row: Row = {"network": network, "optimizer": type(optimizer).__name__, "lr": lr, "batch": batch, "samples": samples, "data": data}
    row |= {"train_steps": steps, "every": monitor.every, "seed": SEED, "seconds": time.perf_counter() - began, "series": {}}
    row["loss"] = [record.loss for record in monitor.history]
    row["loss_steps"] = [record.step for record in monitor.history]
    for name in monitor.history.names:
        steps_of, values, _, limits = monitor.history.series(name)
        late = steps_of >= 2 / 3 * steps
        mean = float(values[late].mean())
        row["series"][name] = {"steps": steps_of.tolist(), "values": values.tolist(), "limit": float(limits[-1])}
        row[f"{name} over limit"] = mean / float(limits[-1])
        row[f"{name} first"] = float(values[0])
    row["forward_passes"] = [n for record in monitor.history if (n := _forwards(record)) is not None]
    row["events"] = [event.text for event in monitor.history.events][:6]
    return row


def _forwards(record: sk.Record) -> int | None:
    found = record.get("critical_sharpness")
    match = re.match(r"(\d+) forward", found.method) if found is not None else None
    return int(match.group(1)) if match else None


# Network, rate, steps; all 2 / rate lie above the curvature at initialisation, 14 and 5.
GD_RUNS = (
    *(("tanh MLP", 0.03, 10000), ("tanh MLP", 0.06, 5000), ("tanh MLP", 0.12, 5000)),
    *(("tanh conv net", 0.1, 5000), ("tanh conv net", 0.2, 5000), ("tanh conv net", 0.3, 5000)),
)
SGD_RUNS = ((8, 0.2, 40000), (32, 0.2, 20000), (128, 0.1, 12000))  # batch size, rate, steps


def measure(part: str, quick: bool) -> list[Row]:
    """All runs of one part."""
    short = 10 if quick else 1
    rows: list[Row] = []
    if part == "gd":
        for net, lr, steps in GD_RUNS:
            rows.append(run(net, torch.optim.SGD, lr, metrics=["lambda_max"], steps=steps // short, samples=500))
    elif part == "adam":
        for net, lr in [("tanh MLP", 2e-4), ("tanh MLP", 5e-4), ("tanh MLP", 1e-3), ("tanh conv net", 5e-4), ("tanh conv net", 1e-3)]:
            rows.append(run(net, adam, lr, metrics=["preconditioned_lambda_max"], steps=4000 // short, samples=500))
    elif part == "sgd":
        for batch, lr, steps in SGD_RUNS:
            metrics = ["batch_sharpness", "probe_lambda_max"]
            rows.append(run("tanh MLP", torch.optim.SGD, lr, metrics=metrics, steps=steps // short, samples=2000, batch=batch))
    else:
        rows = [
            run("tanh MLP", torch.optim.SGD, 0.06, metrics=["lambda_max", "critical_sharpness"], steps=4000 // short, samples=500),
            run(
                "tanh MLP",
                torch.optim.SGD,
                0.06,
                metrics=["lambda_max", "critical_sharpness", "probe_lambda_max"],
                steps=6000 // short,
                samples=2000,
                batch=64,
            ),
        ]
    return [{"part": part, **row} for row in rows]


# -- figures --------------------------------------------------------------------------------------------------------------
def _loss_panel(ax: Any, rows: list[Row]) -> None:
    for row, colour in zip(rows, _COLOURS, strict=False):
        ax.plot(row["loss_steps"], row["loss"], color=colour, lw=0.8)
    ax.set(yscale="log", ylabel="loss")
    ax.tick_params(labelbottom=False)


def draw_rates(rows: list[Row], canvas: Any, name: str, words: str, factor: str) -> None:
    """One column a network: loss above, curvature below, one colour a rate, its limit dashed."""
    networks = list(dict.fromkeys(row["network"] for row in rows))
    axes = canvas.subplots(2, len(networks), squeeze=False, height_ratios=[1, 2], sharex="col")
    for column, network in enumerate(networks):
        mine = [row for row in rows if row["network"] == network]
        _loss_panel(axes[0, column], mine)
        axes[0, column].set_title(f"{network}, {mine[0]['data'].split(',')[0]}, {mine[0]['samples']} samples", fontsize=9)
        ax = axes[1, column]
        for row, colour in zip(mine, _COLOURS, strict=False):
            series = row["series"][name]
            ax.plot(series["steps"], series["values"], color=colour, lw=1.2, label=rf"$\eta$ = {row['lr']:g}")
            ax.axhline(series["limit"], color=colour, ls="--", lw=0.9)
        ax.plot([], [], color="black", ls="--", lw=0.9, label=f"{factor}/$\\eta$")
        ax.set(xlabel="step", ylabel=words, **({"yscale": "log"} if name != "lambda_max" else {"ylim": (0, None)}))
        ax.legend(fontsize=7, loc="lower right", ncols=2)


def draw_sgd(rows: list[Row], canvas: Any) -> None:
    axes = canvas.subplots(2, len(rows), squeeze=False, height_ratios=[1, 2], sharex="col")
    for column, row in enumerate(rows):
        _loss_panel(axes[0, column], [row])
        axes[0, column].set_title(f"B = {row['batch']}, $\\eta$ = {row['lr']:g}", fontsize=9)
        ax = axes[1, column]
        shown = (("batch_sharpness", "C0", "batch sharpness"), ("probe_lambda_max", "C3", r"$\lambda_{\max}$, all data"))
        for name, colour, words in shown:
            ax.plot(row["series"][name]["steps"], row["series"][name]["values"], color=colour, lw=0.9, label=words)
        ax.axhline(2 / row["lr"], color="black", ls="--", lw=0.9, label=r"2/$\eta$")
        ax.set(xlabel="step", ylim=(0, None))
        if not column:
            ax.set_ylabel("curvature")
            ax.legend(fontsize=7)


def draw_critical(rows: list[Row], canvas: Any) -> None:
    axes = canvas.subplots(1, len(rows), squeeze=False)[0]
    words = {
        "lambda_max": (r"$\lambda_{\max}$ of the batch", "C3"),
        "probe_lambda_max": (r"$\lambda_{\max}$ of all data", "C1"),
        "critical_sharpness": ("critical sharpness", "C0"),
    }
    for ax, row in zip(axes, rows, strict=True):
        for name, (label, colour) in words.items():
            if name in row["series"]:
                ax.plot(row["series"][name]["steps"], row["series"][name]["values"], color=colour, lw=0.9, label=label)
        ax.axhline(2 / row["lr"], color="black", ls="--", lw=0.9, label=r"2/$\eta$")
        what = f"SGD, B = {row['batch']}" if row["batch"] else "full batch"
        ax.set(xlabel="step", ylim=(0, None))
        ax.set_title(f"{what}, $\\eta$ = {row['lr']:g}; median of {np.median(row['forward_passes']):.0f} forward passes", fontsize=9)
    axes[0].set_ylabel("curvature")
    axes[-1].legend(fontsize=7)


def draw(rows: list[Row], folder: Path) -> None:
    """A figure for every part there are rows of."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    for part in PARTS:
        mine = [row for row in rows if row["part"] == part]
        if not mine:
            continue
        canvas = Figure(figsize=(9, 3.6 if part == "critical" else 5), layout="constrained")
        if part == "gd":
            draw_rates(mine, canvas, "lambda_max", r"$\lambda_{\max}(H)$", "2")
        elif part == "adam":
            draw_rates(mine, canvas, "preconditioned_lambda_max", r"$\lambda_{\max}(D^{-1} H)$", "38")
        elif part == "sgd":
            draw_sgd(mine, canvas)
        else:
            draw_critical(mine, canvas)
        canvas.savefig(folder / f"monitor_{part}.png", dpi=110, metadata={"Software": f"python -m experiments.{NAME}"})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps, into a temporary folder")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS, help="rows of the others are kept as they are")
    parser.add_argument("--figure-only", action="store_true", help="draw anew from the results there are")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results, figures = HERE / "results" / f"{NAME}.jsonl", HERE.parent / "figures"
    if options.quick:
        figures = Path(tempfile.gettempdir()) / "sharpkit-experiments"
        figures.mkdir(parents=True, exist_ok=True)
        results = figures / results.name
    rows = read_rows(results) if results.exists() else []
    for part in [] if options.figure_only else options.parts:
        rows = [row for row in rows if row["part"] != part] + measure(part, options.quick)
        rows.sort(key=lambda row: PARTS.index(row["part"]))
        head = circumstances(NAME, quick=options.quick, seconds=sum(row["seconds"] for row in rows))
        results.write_text("".join(json.dumps(rounded(row)) + "\n" for row in [head, *rows]))
    for row in rows:
        print({key: value for key, value in row.items() if not isinstance(value, (list, dict))})
    draw(rows, figures)


if __name__ == "__main__":
    main()
