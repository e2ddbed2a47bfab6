"""What kill -9 does to a long analysis: of one process of three, and of all, with the same call run again on three and on two.

    python -m experiments.scale_resume      # results/scale_resume.jsonl, figures/scale_resume.png

Rows of kind "one": a process of three is killed at a random moment; how long until the other two have ended, and with which error.
Rows of kind "all": all three are killed; the same call then ends on three and on two processes from copies of the folder: the largest
difference from the numbers of an uninterrupted call (relative to the largest), and products computed again. Rows of kind "cost": seconds of
the call with and without `checkpoint=`, in one process. gloo processes, forked, which have a core or less each; float64.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

import sharpkit as sk
from experiments._common import Row, run_as_script
from sharpkit.operators.curvature import CurvatureOperator

CALLS: dict[str, Callable[..., Any]] = {
    "eigenpairs": lambda H, **given: sk.eigenpairs(H, k=6, **given),
    "trace": lambda H, **given: sk.trace(H, rtol=0.02, **given),
    "spectral_density": lambda H, **given: sk.spectral_density(H, num_probes=4, num_steps=24, **given),
    "measure": lambda H, **given: sk.measure(H.objective, num_probes=4, num_steps=16, **given),
}
BATCHES = [12]  # of the data; a test has fewer
PATIENCE = 60.0  # seconds after which a process that has not ended is said to hang
FORK = multiprocessing.get_context("fork")  # importing torch anew would take longer than the call


def hessian(rank: int, size: int) -> sk.HessianOperator:
    """Of a small MLP on some batches, which the processes share."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 8)).double()
    for p in model.parameters():
        nn.init.normal_(p, std=p.shape[-1] ** -0.5, generator=generator)
    batches = [(torch.randn(48, 16, generator=generator).double(), torch.randint(8, (48,), generator=generator)) for _ in range(BATCHES[0])]
    return sk.HessianOperator(sk.Objective(model, batches[rank::size], loss=F.cross_entropy), retain=False)


def numbers(result: Any) -> list[float]:
    """All that a result says."""
    if isinstance(result, sk.Eigenpairs):
        return [*result.values.tolist(), *result.residuals.tolist(), *result.vectors.abs().sum(dim=0).tolist()]
    if isinstance(result, sk.SpectralDensity):
        return [*result.nodes.flatten().tolist(), *result.weights.flatten().tolist()]
    if isinstance(result, sk.Estimate):
        return [result.value, result.stderr]
    parts = (result.lambda_max, result.lambda_min, result.trace, result.frobenius_norm, result.effective_rank, result.negative_mass)
    return [x for part in parts for x in (part.value, part.stderr)]


def _process(rank: int, size: int, call: str, folder: Path, checkpoint: Path | None) -> None:
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=size)
    made = [0]
    try:
        H, multiply = hessian(rank, size), CurvatureOperator._product

        def counting(operator: CurvatureOperator, vectors: torch.Tensor) -> torch.Tensor:
            made[0] += 1 if vectors.ndim == 1 else vectors.shape[1]
            return multiply(operator, vectors)

        CurvatureOperator._product = counting  # type: ignore[method-assign]
        (folder / f"ready{rank}").touch()
        result = CALLS[call](H, checkpoint=checkpoint)
        said: Any = {"numbers": numbers(result), "made": made[0]}
    except Exception as error:
        said = {"error": f"{type(error).__name__}: {error}"}
    (folder / f"{rank}.json").write_text(json.dumps(said))
    os._exit(0)  # gloo's threads wait for those that were killed


class Run:
    """A call on some processes."""

    def __init__(self, size: int, call: str, checkpoint: Path | None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="sharpkit-resume-"))
        arguments = [(rank, size, call, self.folder, checkpoint) for rank in range(size)]
        self.processes = [FORK.Process(target=_process, args=given) for given in arguments]
        for process in self.processes:
            process.start()
        while not all((self.folder / f"ready{rank}").exists() for rank in range(size)):
            time.sleep(0.005)
        self.began = time.perf_counter()

    def kill(self, ranks: Sequence[int]) -> None:
        """kill -9."""
        for rank in ranks:
            pid = self.processes[rank].pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)

    def wait(self) -> list[dict[str, Any]]:
        """What each process has said; nothing of one that was killed."""
        for process in self.processes:
            process.join(PATIENCE)
            if process.is_alive():
                process.kill()
                process.join()
        paths = [self.folder / f"{rank}.json" for rank in range(len(self.processes))]
        said = [json.loads(path.read_text()) if path.exists() else {} for path in paths]
        shutil.rmtree(self.folder)
        return said


def without_interruption(call: str) -> tuple[dict[str, Any], float]:
    """What three processes say, and the seconds they take."""
    run = Run(3, call, None)
    said = run.wait()
    return said[0], time.perf_counter() - run.began


def kill_one(call: str, victim: int, moment: float) -> Row:
    """One of three processes killed after so many seconds."""
    run = Run(3, call, None)
    time.sleep(moment)
    run.kill([victim])
    killed = time.perf_counter()
    said = run.wait()
    errors = [
        each.get("error", "none: it had ended" if "numbers" in each else "none: it hangs")
        for rank, each in enumerate(said)
        if rank != victim
    ]
    return {"kind": "one", "call": call, "rank": victim, "moment": moment, "seconds": time.perf_counter() - killed, "errors": errors}


def kill_all(call: str, moment: float, expected: dict[str, Any]) -> Row:
    """All of three processes killed, and the call run again on three and on two."""
    place = Path(tempfile.mkdtemp(prefix="sharpkit-checkpoint-"))
    run = Run(3, call, place / "3")
    time.sleep(moment)
    run.kill(range(3))
    run.wait()
    if not (place / "3").exists():  # killed before the folder was made
        (place / "3").mkdir()
    shutil.copytree(place / "3", place / "2")
    row: Row = {"kind": "all", "call": call, "moment": moment, "products": expected["made"]}
    scale = max(map(abs, expected["numbers"]))
    for size in (3, 2):
        said = Run(size, call, place / str(size)).wait()
        differences = (
            [abs(a - b) for each in said for a, b in zip(each["numbers"], expected["numbers"], strict=True)]
            if "error" not in said[0]
            else []
        )
        row |= {
            f"difference on {size}": max(differences) / scale if differences else said[0]["error"],
            f"products on {size}": said[0].get("made"),
        }
    shutil.rmtree(place)
    return row


def cost(call: str) -> Row:
    """Seconds with and without a checkpoint, in turns."""
    times: dict[bool, list[float]] = {False: [], True: []}
    for kept in (False, True, False, True, False, True):
        H, place = hessian(0, 1), tempfile.mkdtemp(prefix="sharpkit-checkpoint-")
        began = time.process_time()
        CALLS[call](H, checkpoint=place if kept else None)
        times[kept].append(time.process_time() - began)
        shutil.rmtree(place)
    return {"kind": "cost", "call": call, "without": min(times[False]), "with": min(times[True])}


def measure(quick: bool, moments: int | None = None) -> list[Row]:
    """``moments`` random moments of each kind."""
    torch.set_num_threads(1)
    sk.measure(hessian(0, 1).objective, num_probes=3, num_steps=2)  # loads what PyTorch loads when it is first used, before the forks
    choose = random.Random(0)
    names, rows = list(CALLS), list[Row]()
    count = moments or (4 if quick else 20)
    for name in names[:count]:
        expected, seconds = without_interruption(name)
        for _ in range(names.index(name), count, len(names)):
            rows.append(kill_one(name, choose.randrange(3), choose.uniform(0, seconds)))
            rows.append(kill_all(name, choose.uniform(0, seconds), expected))
            print(rows[-2:], file=sys.stderr)
    return rows + [cost(name) for name in names[: 0 if moments else count]]


def draw(rows: list[Row], figure: Any) -> None:
    """Seconds until the others have ended; products that were not made again."""
    left, right = figure.subplots(1, 2)
    one, every = ([row for row in rows if row["kind"] == kind] for kind in ("one", "all"))
    left.plot([row["moment"] for row in one], [row["seconds"] for row in one], "o")
    left.set(xlabel="killed after (s)", ylabel="the others have ended after (s)", title="one process of three killed")
    for size in (3, 2):
        left_over = [row[f"products on {size}"] / row["products"] for row in every]
        right.plot([row["moment"] for row in every], left_over, "ox"[3 - size], label=f"on {size} processes")
    right.set(xlabel="killed after (s)", ylabel="share of the products made again", title="all killed, run again")
    right.legend()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--moments"]:
        BATCHES[0] = 6
        print(json.dumps(measure(True, int(sys.argv[2]))))
    else:
        run_as_script("scale_resume", measure, draw)
