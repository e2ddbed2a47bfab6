"""What measuring curvature costs on a GPU: products in gradients, five eigenpairs, the trace, and memory, in float32 and bfloat16 autocast.

    make gpu                                    # the gpu tests, then this: results/gpu_CARD.jsonl, figures/gpu_CARD.png
    python -m experiments.gpu_benchmark         # this alone
    python -m experiments.gpu_benchmark --device cpu --quick        # tiny models, into a temporary folder: to try it out

The networks are trained for a few steps on random data. Each quantity is measured on its own, with what the one before it held freed, so
that peaks of memory are its own; times are wall times with the device waited for, medians of repeated calls. A quantity that fails, for
instance for want of memory, is written into its row, and the next one goes on.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import sharpkit as sk
from experiments._common import HERE, Row, circumstances, read_rows, rounded
from experiments._gpu_models import Subject, prepared, subjects

PRECISIONS: dict[str, torch.dtype | None] = {"float32": None, "bf16 autocast": torch.bfloat16}
TEST_SHARE = 0.4  # of the time may go to the tests: they take about as long as on one core of a processor, 40 to 100 s
SHARES = {"times": 0.3, "top-5": 0.55, "trace": 1.0}  # of what a row has left when each begins: about equal parts for the three
TRACE_RTOL = 0.02  # the default 0.01 takes four times the probes and shows nothing more about the cost of one
WARM_UP, FEWEST, MOST = 2, 3, 50  # calls: the first builds the graph, the second finds the allocator warm; of the rest the median
GIB = 2**30
NO_MEMORY, NO_TIME = "out of memory", "no time was left"


# -- measuring ------------------------------------------------------------------------------------------------------------------
@dataclass
class Clock:
    """A deadline."""

    seconds: float
    began: float = field(default_factory=time.perf_counter)

    @property
    def left(self) -> float:
        return self.seconds - (time.perf_counter() - self.began)


@dataclass
class Bench:
    """One network on one device, in one precision.

    Attributes:
        row: what has been measured so far; ``row["failed"]`` says what could not be, and why.
    """

    subject: Subject
    model: nn.Module
    batch: tuple[Tensor, Tensor]
    autocast: torch.dtype | None
    device: torch.device
    clock: Clock
    row: Row

    def measure(self) -> None:
        share = SHARES["times"] * self.clock.left / 6
        for name, make in (
            ("gradient", self._gradient),
            ("training_gradient", lambda: self._gradient(math_attention=False)),
            ("bare", self._bare_product),
            ("product", lambda: self._product(sk.HessianOperator)),
            ("gauss_newton", lambda: self._product(sk.GaussNewtonOperator)),
            ("gradient_again", self._gradient),
        ):
            self._attempt(name, lambda name=name, make=make: self._time(name, make(), seconds=share))
        again = {name: self.row.pop(name) for name in list(self.row) if name.startswith("gradient_again")}
        first = self.row.get("gradient_ms")
        if "gradient_again_ms" in again and first is not None:
            self.row["drift"] = again["gradient_again_ms"] / first  # far from 1: the clock of the card changed in between
        for unit, ending in (("gradient", "in_gradients"), ("training_gradient", "in_training_gradients")):
            for name in ("bare", "product", "gauss_newton"):
                if f"{unit}_ms" in self.row and f"{name}_ms" in self.row:
                    self.row[f"{name}_{ending}"] = self.row[f"{name}_ms"] / self.row[f"{unit}_ms"]
        self._attempt("top5", lambda: self._top5(max(1.0, SHARES["top-5"] * self.clock.left)))
        self._attempt("trace", lambda: self._trace(max(1.0, SHARES["trace"] * self.clock.left)))

    def _time(self, name: str, work: Callable[[], Any], *, seconds: float) -> None:
        """Median of as many calls as the time allows, after the warm-up."""
        clock, durations = Clock(seconds), []
        for call in range(1, WARM_UP + MOST + 1):
            began = self._now()
            work()
            durations.append(self._now() - began)
            if call >= WARM_UP + FEWEST and clock.left < durations[-1]:
                break
        self.row[f"{name}_ms"] = 1e3 * statistics.median(durations[WARM_UP:])
        self.row[f"{name}_first_ms"] = 1e3 * durations[0]
        self.row[f"{name}_calls"] = len(durations) - WARM_UP

    def _gradient(self, *, math_attention: bool = True) -> Callable[[], Any]:
        """A gradient with the attention kernel of the products, or with the one that training would run."""
        params = list(self.model.parameters())

        def work() -> object:
            with sdpa_kernel(SDPBackend.MATH) if math_attention else nullcontext():
                return torch.autograd.grad(self._loss(), params)

        return work

    def _bare_product(self) -> Callable[[], Any]:
        """Double backward over a retained graph and nothing else: what sharpkit adds shows against it."""
        params = list(self.model.parameters())
        with sdpa_kernel(SDPBackend.MATH):
            gradients = torch.autograd.grad(self._loss(), params, create_graph=True)
        vectors = [torch.randn_like(p) for p in params]

        def work() -> object:
            with sdpa_kernel(SDPBackend.MATH):
                return torch.autograd.grad(gradients, params, grad_outputs=vectors, retain_graph=True)

        return work

    def _product(self, kind: Callable[[sk.Objective], sk.SymmetricOperator]) -> Callable[[], Any]:
        objective = self._objective()
        operator = kind(objective)
        began = self._now()
        vector = operator.random_vectors(1, generator=torch.Generator().manual_seed(0))[:, 0].contiguous()
        self.row["random_vector_ms"] = 1e3 * (self._now() - began)  # drawn on the host, so that a seed means the same everywhere

        def work() -> None:
            operator @ vector
            if (size := objective.micro_batch_size) is not None:  # the batch did not fit as a whole
                self.row["micro_batch_size"] = size

        return work

    def _top5(self, seconds: float) -> None:
        pairs = sk.eigenpairs(sk.HessianOperator(self._objective()), k=5, max_seconds=seconds)
        self.row |= {"top5_products": pairs.num_matvecs, "top5_s": pairs.seconds, "top5_converged": bool(pairs.converged.all())}
        self.row |= {"top5": finite(pairs.values.tolist()), "top5_residuals": finite(pairs.residuals.tolist())}

    def _trace(self, seconds: float) -> None:
        estimate = sk.trace(sk.HessianOperator(self._objective()), rtol=TRACE_RTOL, max_seconds=seconds)
        self.row |= {"trace_products": estimate.num_matvecs, "trace_s": estimate.seconds, "trace_converged": estimate.converged}
        value, error = finite([estimate.value, estimate.stderr])
        self.row |= {"trace": value, "trace_stderr": error, "trace_method": estimate.method}

    # -- small parts --------------------------------------------------------------------------------------------------------
    def _loss(self) -> Tensor:
        x, y = self.batch
        with torch.autocast(self.device.type, dtype=self.autocast) if self.autocast is not None else nullcontext():
            return self.subject.loss(self.model(x), y)

    def _objective(self) -> sk.Objective:
        return sk.Objective(self.model, self.batch, loss=self.subject.loss, autocast=self.autocast)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _attempt(self, name: str, work: Callable[[], None]) -> None:
        """Note the peak of memory over what model and data hold, or why it failed."""
        if self.clock.left <= 0:
            self.row["failed"][name] = NO_TIME
            return
        free_memory()
        on_gpu = self.device.type == "cuda"
        held = torch.cuda.memory_allocated(self.device) if on_gpu else 0
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", sk.ConvergenceWarning)  # the row says whether it converged
                work()
        except Exception as error:
            self.row["failed"][name] = in_words(error)
            return
        self.row[f"{name}_peak_gib"] = (torch.cuda.max_memory_allocated(self.device) - held) / GIB if on_gpu else None


def finite(numbers: list[float]) -> list[float | None]:
    """None, which JSON has, in place of NaN and infinity, which stand for what was not reached in time."""
    return [number if math.isfinite(number) else None for number in numbers]


def in_words(error: Exception) -> str:
    """One line; want of memory is told apart, since it says something about the card rather than about the code."""
    signs = ("out of memory", "ALLOC_FAILED")  # the latter from the libraries that multiply matrices
    if isinstance(error, (sk.OutOfMemoryError, torch.OutOfMemoryError, MemoryError)) or any(sign in str(error) for sign in signs):
        return NO_MEMORY
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def full_float32() -> Iterator[None]:
    """TF32 off, so that float32 means float32; it is on for convolutions by default."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def warm_up(device: torch.device) -> None:
    """Load what is loaded at first use, so that the first network does not pay for it."""
    x, y = torch.randn(8, 3, device=device), torch.randn(8, 2, device=device)
    operator = sk.HessianOperator(sk.Objective(nn.Linear(3, 2).to(device), (x, y), loss=nn.functional.mse_loss))
    sk.eigenpairs(operator, k=2)
    sk.trace(operator)


def measure(device: torch.device, clock: Clock, *, quick: bool, finished: Callable[[list[Row]], None]) -> list[Row]:
    """All rows; ``finished`` is called after each with those there are, so that a run cut short leaves its results."""
    warm_up(device)
    rows: list[Row] = []
    everything = subjects(quick)
    weight_left = sum(len(PRECISIONS) * subject.weight for subject in everything)
    for subject in everything:
        model, batch, failure = None, None, None
        try:
            model, batch = prepared(subject, device)
        except Exception as error:
            failure = in_words(error)
        for precision, autocast in PRECISIONS.items():
            row: Row = {"case": subject.name, "precision": precision, "failed": {}}
            if model is None or batch is None:
                row["failed"]["model"] = failure
            else:
                row |= {"parameters": sum(p.numel() for p in model.parameters()), "batch": list(batch[0].shape)}
                share = Clock(clock.left * subject.weight / weight_left)
                Bench(subject, model, batch, autocast, device, share, row).measure()
            weight_left -= subject.weight
            rows.append(row)
            finished(rows)
        del model, batch
        free_memory()
    return rows


# -- what comes out -----------------------------------------------------------------------------------------------------------
def card_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def file_name(card: str) -> str:
    """``"NVIDIA H100 80GB HBM3"`` -> ``"gpu_h100_80gb_hbm3"``."""
    words = re.sub(r"[^a-z0-9]+", "_", card.lower()).strip("_")
    return "gpu_" + words.removeprefix("nvidia_")


def header(device: torch.device, *, quick: bool, seconds: float, tests: Row | None, complete: bool) -> Row:
    head = circumstances("gpu_benchmark", quick=quick, seconds=seconds)
    head |= {"card": card_of(device), "complete": complete, "tf32": False, "cuda": torch.version.cuda, "gpu_tests": tests}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        head |= {"memory_gib": properties.total_memory / GIB, "capability": f"{properties.major}.{properties.minor}"}
        head |= {"cudnn": torch.backends.cudnn.version(), "driver": driver_version()}
    return head


def driver_version() -> str | None:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def table(rows: list[Row]) -> str:
    """One line a row, products in gradients with the attention kernel of the products and as trained; a dash where something failed."""

    def number(row: Row, name: str, form: str) -> str:
        return "-" if row.get(name) is None else format(row[name], form)

    def cost(row: Row, name: str) -> str:
        if f"{name}_s" not in row:
            return "-"
        return f"{row[f'{name}_products']} / {row[f'{name}_s']:.2f} s" + ("" if row[f"{name}_converged"] else " *")

    lines = [
        ["case", "precision", "parameters", "gradient", "H v", "H v", "bare H v", "G v", "5 eigenpairs", "trace", "", "GiB:", "", ""],
        [*[""] * 3, "ms", "gradients", "trained", *["gradients"] * 2, *["products / time"] * 2, "error", "gradient", "H v", "5 pairs"],
    ]
    for row in rows:
        error = f"{100 * row['trace_stderr'] / abs(row['trace']):.1f} %" if row.get("trace") and row["trace_stderr"] is not None else "-"
        lines.append(
            [row["case"], row["precision"], number(row, "parameters", ","), number(row, "gradient_ms", ".2f")]
            + [number(row, name, ".2f") for name in ("product_in_gradients", "product_in_training_gradients")]
            + [number(row, f"{name}_in_gradients", ".2f") for name in ("bare", "gauss_newton")]
            + [cost(row, "top5"), cost(row, "trace"), error]
            + [number(row, f"{name}_peak_gib", ".2f") for name in ("gradient", "product", "top5")]
        )
    widths = [max(len(line[j]) for line in lines) for j in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text += ["* not converged"] if any("*" in line for line in text) else []
    for row in rows:
        for why in dict.fromkeys(row["failed"].values()):
            names = ", ".join(name for name, reason in row["failed"].items() if reason == why)
            text.append(f"{row['case']}, {row['precision']}: not measured: {names}: {why}")
    return "\n".join(text)


def write(path: Path, head: Row, rows: list[Row]) -> None:
    """Whole or not at all: the file is replaced in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text("".join(json.dumps(rounded(row)) + "\n" for row in [head, *rows]))
    unfinished.replace(path)


def draw(rows: list[Row], figure: Any) -> None:
    """Cost of a product, where the time of an eigenpair goes, and memory, by case and precision."""
    names = [f"{row['case']}\n{row['precision'].replace(' autocast', '')}" for row in rows]
    time_axes, product_axes, memory_axes = figure.subplots(1, 3)
    bars: tuple[tuple[Any, list[str], str, str, list[str]], ...] = (
        (time_axes, ["bare", "product", "gauss_newton"], "_in_gradients", "time / gradient", ["bare H v", "H v", "G v"]),
        (product_axes, ["top5", "trace"], "_products", "products", ["five eigenpairs", f"trace to {100 * TRACE_RTOL:g} %"]),
        (
            memory_axes,
            ["gradient", "product", "top5"],
            "_peak_gib",
            "peak memory over the model, GiB",
            ["gradient", "H v", "five eigenpairs"],
        ),
    )
    for axes, quantities, ending, label, legend in bars:
        width = 0.8 / len(quantities)
        for j, quantity in enumerate(quantities):
            heights = [row.get(quantity + ending) or 0.0 for row in rows]
            places = [i + (j - (len(quantities) - 1) / 2) * width for i in range(len(rows))]
            drawn = axes.bar(places, heights, width, label=legend[j])
            axes.bar_label(drawn, fmt=lambda value: f"{value:.3g}" if value else "", fontsize=5)
        axes.set_xticks(range(len(names)), names, fontsize=6)
        axes.set(ylabel=label)
        axes.margins(y=0.35)
        axes.legend(fontsize=6, loc="upper left")


def draw_file(results: Path, figure: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(12, 3.6), layout="constrained")
    card = json.loads(results.read_text().splitlines()[0])["card"]
    canvas.suptitle(card, fontsize=9)
    draw(read_rows(results), canvas)
    figure.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(figure, dpi=120, metadata={"Software": "python -m experiments.gpu_benchmark"})
    print(f"{figure} drawn")


# -- the tests ------------------------------------------------------------------------------------------------------------------
def run_tests(seconds: float) -> Row:
    """Run the gpu tests in a process of their own, shown as they run; what they came to is part of the results' first line."""
    root = HERE.parent
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/test_gpu.py", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
        began = time.perf_counter()
        process = subprocess.Popen(command, cwd=root, env={**os.environ, "PYTHONPATH": path})
        try:
            code = process.wait(seconds)
            in_time = True
        except subprocess.TimeoutExpired:
            in_time = False
            process.send_signal(signal.SIGINT)  # pytest then still says what it has seen
            try:
                code = process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                code = process.wait()
        found: Row = {"exit_code": code, "seconds": time.perf_counter() - began, "in_time": in_time}
        suites = list(ElementTree.parse(report).getroot().iter("testsuite")) if report.exists() else []
        for name in ("tests", "failures", "errors", "skipped"):
            found[name] = sum(int(suite.get(name, 0)) for suite in suites)
        cases = [
            case
            for suite in suites
            for case in suite.iter("testcase")
            if case.find("failure") is not None or case.find("error") is not None
        ]
        return {**found, "failed": [str(case.get("name")) for case in cases]}


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Cost of curvature on a GPU.")
    parser.add_argument("--device", default="cuda", help="where to measure (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny models, written to a temporary folder")
    parser.add_argument("--tests", action="store_true", help="run the gpu tests first")
    parser.add_argument("--max-seconds", type=float, default=240.0, help="for everything, tests included (default: %(default)s)")
    parser.add_argument("--results", type=Path, help="folder of the results and the figure (default: experiments/results and figures)")
    parser.add_argument("--figure-only", type=Path, metavar="FILE", help="draw the figure of a results file anew")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """0 if all went well, 1 if a test or a quantity failed for another reason than memory or time, 2 without the device."""
    options = parsed(arguments)
    if options.figure_only is not None:
        file = options.figure_only
        draw_file(file, (HERE.parent / "figures" if file.resolve().parent == HERE / "results" else file.parent) / f"{file.stem}.png")
        return 0
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print(f"This needs an NVIDIA GPU, and torch {torch.__version__} of {sys.executable} sees none.", file=sys.stderr)
        return 2
    device, clock = torch.device(options.device), Clock(options.max_seconds)
    scratch = Path(tempfile.gettempdir()) / "sharpkit-experiments" if options.quick else None
    folder = options.results or scratch
    name = file_name(card_of(device))
    results = (folder or HERE / "results") / f"{name}.jsonl"
    figure = (folder or HERE.parent / "figures") / f"{name}.png"
    tests = run_tests(TEST_SHARE * clock.left) if options.tests else None

    def save(rows: list[Row], *, complete: bool = False) -> None:
        head = header(device, quick=options.quick, seconds=time.perf_counter() - clock.began, tests=tests, complete=complete)
        write(results, head, rows)
        if not complete:
            print(f"{clock.left:4.0f} s left after {rows[-1]['case']}, {rows[-1]['precision']}", flush=True)

    with full_float32():
        rows = measure(device, clock, quick=options.quick, finished=save)
    save(rows, complete=True)
    print(f"\n{card_of(device)}, torch {torch.__version__}\n{table(rows)}\n\n{results} written", flush=True)
    try:
        draw_file(results, figure)
    except Exception as error:  # the numbers are safe by now
        print(f"The figure could not be drawn: {in_words(error)}", file=sys.stderr)
    reasons = [why for row in rows for why in row["failed"].values()]
    broken = [why for why in reasons if why not in (NO_MEMORY, NO_TIME)]
    if tests is not None and tests["exit_code"] != 0:
        how = ", ".join(tests["failed"]) or ("see above" if tests["in_time"] else f"they were stopped after {tests['seconds']:.0f} s")
        print(f"The gpu tests did not pass: {how}.", file=sys.stderr)
    return 1 if broken or (tests is not None and tests["exit_code"] != 0) else 0


if __name__ == "__main__":
    sys.exit(main())
