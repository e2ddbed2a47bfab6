"""What a person waits for: importing, --help and the doctor against `import torch`, and how well a landscape foretells its time.

python -m experiments.waiting [--quick]

Starts are processes of one thread that take turns, compiled files in place, as after an installation; processor time counts, which other
work on the machine hardly moves. The job is the one that `sharpkit init` writes, with its optimizer and without: the first optimizer that
is made loads a second's worth of torch's own modules, in a plain script too. A landscape's forecast is what its callback tells.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import sharpkit as sk
from experiments._common import Row, run_as_script

ROOT = Path(__file__).parents[1]
SHARES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)  # of the points, after which the forecast is read; 0 is after the first


def measure(quick: bool) -> list[Row]:
    """Starts, then forecasts."""
    with tempfile.TemporaryDirectory() as folder:
        rows = starts(Path(folder), rounds=2 if quick else 9)
    return rows + [row for name in ("MLP", "conv net") for row in forecasts(name, repeats=1 if quick else 5)]


def starts(folder: Path, *, rounds: int) -> list[Row]:
    """Processor time of each kind of process, median over the rounds."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONPYCACHEPREFIX": str(folder / "compiled")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    sharpkit = ["-m", "sharpkit"]
    subprocess.run(
        [sys.executable, *sharpkit, "init", "job.py", "--quiet"], cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL
    )
    text = (folder / "job.py").read_text(encoding="utf-8")
    (folder / "plain.py").write_text(
        text.replace("return objective, optimizer", "return objective").replace("    optimizer = ", "    # "), "utf-8"
    )
    calls = {
        "python": ["-c", "pass"],
        "import sharpkit": ["-c", "import sharpkit"],
        "import torch": ["-c", "import torch"],
        "import torch, sharpkit": ["-c", "import torch, sharpkit"],
        "import torch; sk.Objective, sk.measure": ["-c", "import torch, sharpkit as sk; sk.Objective, sk.measure"],
        "sharpkit --help": [*sharpkit, "--help"],
        "job without optimizer": ["-c", "import plain; plain.job()"],
        "doctor, job without optimizer": [*sharpkit, "doctor", "plain.py:job", "--quiet"],
        "job with optimizer": ["-c", "import job; job.job()"],
        "doctor, job with optimizer": [*sharpkit, "doctor", "job.py:job", "--quiet"],
    }
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(rounds + 1):
        for name, arguments in calls.items():
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            if index:  # the first round compiles the files
                taken[name].append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return [
        {"part": "start", "what": name, "seconds": statistics.median(t), "least": min(t), "most": max(t), "rounds": rounds}
        for name, t in taken.items()
    ]


def problem(name: str) -> sk.Objective:
    """An untrained network on random data."""
    torch.manual_seed(0)
    model: nn.Module
    if name == "MLP":
        model, inputs = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 10)), torch.randn(1024, 64)
    else:
        layers = [nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 10)]
        model, inputs = nn.Sequential(*layers), torch.randn(256, 1, 12, 12)
    return sk.Objective(model, (inputs, torch.randint(10, (len(inputs),))), loss=F.cross_entropy)


def forecasts(name: str, *, repeats: int) -> list[Row]:
    """Elapsed and remaining time as told after a share of the points, over the time it took in the end."""
    rows: list[Row] = []
    for directions, dimensions in (("eigenvectors", 2), ("filter", 2), ("eigenvectors", 1)):
        for repeat in range(repeats):
            told: list[Any] = []
            began = time.perf_counter()
            sk.landscape(problem(name), directions, dimensions=dimensions, seed=repeat, callback=told.append)
            seconds = time.perf_counter() - began
            at = [told[min(int(share * len(told)), len(told) - 1)] for share in SHARES]
            ratios = [(p.elapsed + p.remaining) / seconds for p in at]
            head = {"part": "landscape", "network": name, "directions": directions, "dimensions": dimensions, "points": len(told)}
            rows.append({**head, "repeat": repeat, "seconds": seconds, "shares": list(SHARES), "forecast over time": ratios})
    return rows


def draw(rows: list[Row], figure: Any) -> None:
    """Starts as bars, forecasts as curves."""
    bars, curves = figure.subplots(1, 2, width_ratios=[1.15, 1])
    start = [row for row in rows if row["part"] == "start"]
    torch_alone = next(row["seconds"] for row in start if row["what"] == "import torch")
    ours = ("doctor", "sharpkit", "sk.")
    colours = ["#b8432f" if any(word in row["what"] for word in ours) else "#8a94a0" for row in start]
    bars.barh([row["what"] for row in start], [row["seconds"] for row in start], color=colours)
    bars.axvline(torch_alone, color="0.3", lw=0.8, ls=":")
    for index, row in enumerate(start):
        bars.text(row["seconds"] + 0.03, index, f"{row['seconds']:.2f} s", va="center", fontsize=8)
    bars.invert_yaxis()
    bars.set(xlabel="processor time (s)", xlim=(0, 1.18 * max(row["seconds"] for row in start)))
    bars.tick_params(axis="y", labelsize=8)
    landscape = [row for row in rows if row["part"] == "landscape"]
    for row in landscape:
        colour = {"MLP": "#2c6fa8", "conv net": "#d08a1d"}[row["network"]]
        style = {("eigenvectors", 2): "-", ("filter", 2): "--", ("eigenvectors", 1): ":"}[row["directions"], row["dimensions"]]
        curves.plot([100 * s for s in row["shares"]], row["forecast over time"], style, color=colour, alpha=0.7, lw=1.2)
    for label, colour, style in (
        ("MLP", "#2c6fa8", "-"), ("conv net", "#d08a1d", "-"), ("plane, eigenvectors", "0.4", "-"), ("plane, filter", "0.4", "--"),
        ("line, eigenvectors", "0.4", ":"),
    ):  # fmt: skip
        curves.plot([], [], style, color=colour, label=label)
    curves.axhspan(0.7, 1.3, color="0.5", alpha=0.12, lw=0)
    curves.set(xlabel="share of the points done (%)", ylabel="forecast / time it took", xscale="symlog", ylim=(0, 2))
    curves.set_xlim(0, 50)
    curves.set_xticks([0, 1, 2, 5, 10, 20, 50], ["first", "1", "2", "5", "10", "20", "50"])
    curves.legend(fontsize=8, frameon=False)


if __name__ == "__main__":
    run_as_script("waiting", measure, draw)
