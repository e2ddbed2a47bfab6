"""What all experiments share: the command line, the results file with its circumstances, the figure."""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

Row = dict[str, Any]
HERE = Path(__file__).parent
_PACKAGES = (
    *("torch", "numpy", "scipy", "transformers", "curvlinops-for-pytorch", "pyhessian", "hessian-eigenthings"),
    *("schedulefree", "prodigyopt", "lion-pytorch", "pytorch-optimizer"),
)


def run_as_script(name: str, measure: Callable[[bool], list[Row]], draw: Callable[[list[Row], Any], None]) -> None:
    """Measure, write ``results/NAME.jsonl``, draw ``figures/NAME.png``; with ``--quick`` smaller, into a temporary folder.

    Args:
        name: of the experiment.
        measure: from "quick" to the rows.
        draw: rows and an empty matplotlib figure.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a small version, written to a temporary folder")
    parser.add_argument("--figure-only", action="store_true", help="draw the figure anew from the results file")
    options = parser.parse_args()
    scratch = Path(tempfile.gettempdir()) / "sharpkit-experiments"
    results = (scratch if options.quick else HERE / "results") / f"{name}.jsonl"
    figure = (scratch if options.quick else HERE.parent / "figures") / f"{name}.png"
    for path in (results, figure):
        path.parent.mkdir(parents=True, exist_ok=True)
    if not options.figure_only:
        began = time.perf_counter()
        rows = measure(options.quick)
        head = circumstances(name, quick=options.quick, seconds=time.perf_counter() - began)
        results.write_text("".join(json.dumps(rounded(row)) + "\n" for row in [head, *rows]))
    rows = read_rows(results)
    for row in rows:
        print({key: value for key, value in row.items() if not isinstance(value, list) or len(value) < 12})
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(9, 3.6), layout="constrained")
    draw(rows, canvas)
    canvas.savefig(figure, dpi=120, metadata={"Software": f"python -m experiments.{name}"})
    print(f"{results.name} and {figure.name} written to {results.parent} and {figure.parent}")


def read_rows(path: Path) -> list[Row]:
    """The rows of a results file, without its head."""
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


def circumstances(name: str, *, quick: bool, seconds: float) -> Row:
    """Command, versions and machine."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "command": f"python -m experiments.{name}{' --quick' if quick else ''}",
        "date": time.strftime("%Y-%m-%d"),
        "seconds": seconds,
        "python": platform.python_version(),
        "versions": versions,
        "cpu": _cpu(),
        "torch_threads": torch.get_num_threads(),
    }


def _cpu() -> str:
    model = platform.machine()
    cores = 0
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model, cores = line.split(":", 1)[1].strip(), cores + 1
    except OSError:
        pass
    return f"{model}, {cores or 'unknown'} cores"


def rounded(value: Any) -> Any:
    """Five significant digits everywhere, so that the files stay small."""
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(entry) for entry in value]
    if isinstance(value, (float, np.floating)):
        return float(f"{float(value):.5g}")
    return int(value) if isinstance(value, np.integer) else value


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean of at least two values, and half the width of its 95 % interval by Student's t."""
    from scipy.stats import t as student

    half = float(student.ppf(0.975, len(values) - 1)) * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return float(np.mean(values)), half


@dataclass(frozen=True)
class Times:
    """Seconds of repeated calls.

    Attributes:
        wall: by the clock.
        cpu: of this process's processors; with one thread, what the clock would say on an idle machine.
    """

    wall: list[float]
    cpu: list[float]


def interleaved_times(functions: dict[str, Callable[[], Any]], *, rounds: int) -> dict[str, Times]:
    """Seconds of each call, ``rounds`` of each, taking turns in an order that reverses every round; one warm-up call each before."""
    for function in functions.values():
        function()
    found = {name: Times([], []) for name in functions}
    for turn in range(rounds):
        for name in list(functions)[:: 1 if turn % 2 == 0 else -1]:
            wall, cpu = time.perf_counter(), time.process_time()
            functions[name]()
            found[name].wall.append(time.perf_counter() - wall)
            found[name].cpu.append(time.process_time() - cpu)
    return found


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads inside torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def searched(loss_of: Callable[[float], float], grid: Sequence[float], *, reach: int) -> dict[float, float]:
    """Losses on a grid, a factor of 2 apart, that moves on while its best lies at an end, by at most ``reach`` points."""
    losses: dict[float, float] = {}
    asked = list(grid)
    while asked:
        point = asked.pop()
        losses[point] = loss_of(point)
        best = min(losses, key=losses.__getitem__)
        if not asked and len(losses) < len(grid) + reach:
            asked = [best / 2] if best == min(losses) else [best * 2] if best == max(losses) else []
    return losses
