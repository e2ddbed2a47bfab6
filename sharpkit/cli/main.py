"""The command line: ``sharpkit demo | measure | spectrum | batch | lr | doctor | ...``; ``sharpkit --help`` lists every command.

Exit codes: 0 done; 1 failed, or the doctor found that measurements cannot be trusted; 2 wrong usage; 3 done, but something did not
reach its tolerance, or hyperparameters do not transfer; 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import sharpkit
from sharpkit._calls import no_bars
from sharpkit.cli.commands import (
    FAILED,
    INTERRUPTED,
    USAGE,
    Answer,
    Document,
    add_race_arguments,
    run_batch_command,
    run_compare_command,
    run_completion_command,
    run_demo_command,
    run_doctor_command,
    run_init_command,
    run_landscape_command,
    run_lr_command,
    run_measure_command,
    run_race_command,
    run_report_command,
    run_spectrum_command,
    run_transfer_command,
)
from sharpkit.cli.completion import SHELLS
from sharpkit.cli.watch import run_watch_command

_CODES = """\
exit codes: 0 done; 1 failed or not to be trusted; 2 wrong usage; 3 done but not
converged (transfer: does not, or undecided); 130 interrupted"""

# One line that works for each command, at the end of its help. job.py is what `sharpkit init` writes.
_EXAMPLES = {
    "demo": "sharpkit demo --quick",
    "init": "sharpkit init job.py --kind loop",
    "measure": "sharpkit measure job.py:job --html sharpness.html",
    "spectrum": "sharpkit spectrum job.py:job --k 5 --html spectrum.html",
    "doctor": "sharpkit doctor job.py:job",
    "batch": "sharpkit batch job.py:job --batch-sizes 8 32 128",
    "lr": "sharpkit lr job.py:job --batch-size 32 --steps 1000 --schedule cosine",
    "landscape": "sharpkit landscape job.py:job --dimensions 1 --html landscape.html",
    "compare": "sharpkit compare before.json after.json     # of: sharpkit measure job.py:job --json > before.json",
    "report": "sharpkit report run.jsonl --html run.html",
    "watch": "sharpkit watch run.jsonl --once",
    "transfer": "sharpkit transfer family.py:build --widths 32,64,128",
    "race": "sharpkit race training.py:setup --quick",
    "completion": 'eval "$(sharpkit completion bash)"     # in ~/.bashrc',
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments after the program's name; by default those of this process.

    Returns:
        The exit code.

    Example:
        >>> main(["--version"])  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        SystemExit: 0
    """
    given = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    if not given:  # argparse would only say that a command is missing; who types the bare name wants to see which there are
        parser.print_help(sys.stderr)
        return USAGE
    arguments = parser.parse_args(given)
    arguments.argv, arguments.stdout = ["sharpkit", *given], sys.stdout
    try:
        # Whatever user code prints goes to stderr: stdout carries the answer alone.
        bars = no_bars() if arguments.quiet else contextlib.nullcontext()
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings(), bars:
            warnings.showwarning = _show_warning
            documents, extra, code = arguments.run(arguments)
        return _to_stdout(lambda: _print_answer(arguments, documents, extra), int(code))
    except KeyboardInterrupt:
        print("\nsharpkit: interrupted; no result", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # from a command that writes to stdout while it runs
        return _to_stdout(lambda: None, FAILED)
    except Exception as error:
        return _explain(error, arguments)


def _to_stdout(write: Callable[[], None], code: int) -> int:
    """Write the answer; the exit code says whether stdout took it."""
    try:
        write()
        print(end="", flush=True)
        return code
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # a reader that went away (sharpkit ... | head) has seen what it wanted
            print(f"sharpkit: cannot write the answer to stdout: {error.strerror or error}", file=sys.stderr)
        # Python flushes stdout once more as it ends: into nothing, or it would report the same error again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def _explain(error: Exception, arguments: argparse.Namespace) -> int:
    """One clear message; above it the user's own lines where they took part, and sharpkit's where they are asked for."""
    from sharpkit._errors import SharpkitError
    from sharpkit._results import to_json
    from sharpkit.cli.target import TargetError, UsageError, users_traceback

    speaks = isinstance(error, (UsageError, TargetError, SharpkitError, OSError, ImportError))
    target, message = str(getattr(arguments, "target", "")), str(error)
    lines = users_traceback(error, target) if target else ""
    if arguments.debug:
        traceback.print_exception(error)
    elif lines:
        print(lines, end="", file=sys.stderr)
    if lines:
        said = message if isinstance(error, TargetError) else f"{target} raised {type(error).__name__}: {message}"
        message = said.splitlines()[0]  # the rest stands above
    elif not speaks:
        # a bare error may come from torch or from a fault of ours; the checks of arguments raise ValueError and TypeError with a sentence
        kind = "" if isinstance(error, (ValueError, TypeError)) else f"{type(error).__name__}: "
        message = f"{kind}{message}" + ("" if arguments.debug else "  (--debug shows where)")
    print(f"sharpkit: {message}", file=sys.stderr)
    if arguments.json:  # a program that reads stdout gets one document whatever happened
        document = to_json({"kind": "error", "error": type(error).__name__, "message": str(error)})
        _to_stdout(lambda: print(document), FAILED)
    return USAGE if isinstance(error, UsageError) else FAILED


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None, line: str | None = None
) -> None:
    print(f"sharpkit: {category.__name__}: {message}", file=sys.stderr)


def _print_answer(arguments: argparse.Namespace, documents: list[Document], extra: Document) -> None:
    from sharpkit._results import RUN_VERSION, to_json
    from sharpkit.cli.output import render_text
    from sharpkit.reporting import environment

    text, group = extra.pop("text", None), sys.modules.get("torch.distributed")
    if group is not None and group.is_available() and group.is_initialized() and group.get_rank() != 0:
        return  # under torchrun, where the TARGET has joined its processes: all have the same answer, and the first one says it
    if arguments.json:
        head = {"kind": "run", "version": RUN_VERSION, "command": arguments.argv, "seed": getattr(arguments, "seed", None)}
        print(to_json({**head, "environment": environment(), **extra, "results": documents}), flush=True)
        return
    if "findings" in extra:  # the demo: its tables are on the page
        print("\n".join([*extra["notes"], "", *(f"* {finding}" for finding in extra["findings"])]), flush=True)
    elif documents or text is not None:
        print(text if text is not None else render_text(documents), flush=True)
    if page := extra.get("page"):
        print(f"\nPage: {page}\nOpen it in a browser: {Path(page).as_uri()}", flush=True)


# -- arguments -------------------------------------------------------------------------------------------------------------------


def _positive(convert: Callable[[str], Any], what: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = convert(text)
        except ValueError:
            value = 0
        if not 0 < value < float("inf"):  # refuses nan too, which compares false with everything
            raise argparse.ArgumentTypeError(f"expected a positive {what}, got {text!r}")
        return value

    return parse


_count, _amount = _positive(int, "whole number"), _positive(float, "number")


def _size(text: str) -> float:
    """Bytes of "8GiB", "500 MB" or a plain number."""
    match = re.fullmatch(r"\s*([0-9.]+)\s*(?:([kmgt])(i?)b?)?\s*", text, flags=re.IGNORECASE)
    try:
        number, prefix, binary = match.groups() if match else ("", "", "")
        unit = 1024 if binary else 1000
        size = float(number) * float(unit ** " kmgt".index((prefix or " ").lower()))
    except ValueError:
        size = 0.0
    if size <= 0:
        raise argparse.ArgumentTypeError(f"expected a size such as 8GiB, 500MB or a number of bytes, got {text!r}")
    return size


def _steps(text: str) -> int:
    return 0 if text.strip() == "0" else int(_count(text))


def _sizes(text: str) -> list[int]:
    return [int(_count(part.strip())) for part in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sharpkit",
        description="Curvature of any PyTorch loss: sharpness, spectrum, stable learning rates.",
        epilog=f"{_CODES}\n\nexample:\n  sharpkit init && sharpkit measure job.py:job",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"sharpkit {sharpkit.__version__}")
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    summary = "train two small networks on real images and show their curvature on one page"
    _add_demo(_command(subparsers, "demo", run_demo_command, summary))
    begin = _command(subparsers, "init", run_init_command, "a commented job file to start from")
    begin.add_argument("file", metavar="FILE", nargs="?", default="job.py", help="where to write it (default: %(default)s)")
    what = "your own loop, Hugging Face or Lightning (default: %(default)s)"
    begin.add_argument("--kind", default="loop", choices=("loop", "huggingface", "lightning"), help=what)
    measure = _command(subparsers, "measure", run_measure_command, "sharpness of a model: lambda_max, trace, stable learning rate ...")
    spectrum = _command(subparsers, "spectrum", run_spectrum_command, "largest eigenvalues and spectral density of the Hessian")
    doctor = _command(subparsers, "doctor", run_doctor_command, "can measurements of this model, loss and data be trusted?")
    batch = _command(subparsers, "batch", run_batch_command, "the largest stable learning rate for every batch size")
    batch.add_argument("--batch-sizes", type=_count, nargs="+", metavar="B", help="where to evaluate (default: powers of two from 4 on)")
    what = "steps of the pilot run; 0 measures curvature at the present parameters (default: %(default)s)"
    batch.add_argument("--pilot", type=_steps, default=100, metavar="STEPS", help=what)
    batch.add_argument("--steps", type=_count, help="of each short run (default: as many as the pilot's, 100 without one)")
    batch.add_argument("--max-seconds", type=_amount, help="ends the short runs early; the result says so")
    batch.add_argument("--no-calibration", action="store_true", help="curvature only: no short training runs")
    rate = _command(subparsers, "lr", run_lr_command, "one learning rate to train with, from two short runs on a copy")
    rate.add_argument("--batch-size", type=_count, required=True, metavar="B", help="samples in a batch")
    rate.add_argument("--steps", type=_count, required=True, metavar="T", help="of the run that the rate is for")
    rate.add_argument("--schedule", default="linear", choices=("linear", "cosine", "constant", "wsd"), help="(default: %(default)s)")
    what = "share of the run's gradients that may be spent, at least 100 of them (default: %(default)s)"
    rate.add_argument("--budget", type=_amount, default=0.1, metavar="SHARE", help=what)
    shown = _command(subparsers, "landscape", run_landscape_command, "the loss on a line or a plane through the present parameters")
    kinds = ("eigenvectors", "filter", "gradient", "update")
    shown.add_argument("--directions", default="eigenvectors", choices=kinds, help="(default: %(default)s)")
    what = "files of state dicts, in the order of training: their path instead"
    shown.add_argument("--checkpoints", nargs="+", metavar="FILE", help=what)
    shown.add_argument("--dimensions", type=int, default=2, choices=(1, 2), help="a line or a plane (default: %(default)s)")
    shown.add_argument(
        "--span", type=_amount, help="half the length of an axis, in lengths of its direction (default: where the loss doubles)"
    )
    shown.add_argument("--points", type=_count, help="on each axis (default: 41 on a line, 21 on a plane)")
    shown.add_argument("--max-seconds", type=_amount, help="stop after so many seconds; points that are missing are left out")
    for command in (measure, spectrum, doctor, batch, rate, shown):
        command.add_argument("target", metavar="TARGET", help="file.py:function that returns an sk.Objective, or (objective, optimizer)")
        _add_common(command)
    spectrum.add_argument("--k", type=_count, default=10, help="how many of the largest eigenvalues (default: %(default)s)")
    # by judgement: a density to look at takes more probes and steps than the trace and norm that measure makes of it
    for command, probes, steps in ((measure, 6, 32), (spectrum, 10, 80)):
        command.add_argument("--tol", type=_amount, default=1e-3, help="relative tolerance of the eigenvalues (default: %(default)s)")
        command.add_argument("--probes", type=_count, default=probes, help="random probes of the density (default: %(default)s)")
        command.add_argument("--steps", type=_count, default=steps, help="Lanczos steps for each probe (default: %(default)s)")
        command.add_argument("--max-seconds", type=_amount, help="stop after so many seconds; a partial result is marked as not converged")
        command.add_argument("--memory-limit", type=_size, metavar="SIZE", help="take no more memory than this, such as 8GiB or 500MB")
        command.add_argument("--offload", metavar="FOLDER", default=False, help="keep the vectors in a file in this folder")
        command.add_argument("--checkpoint", metavar="FOLDER", help="go on from here if the same command was killed")
    beside = _command(subparsers, "compare", run_compare_command, "saved results side by side: what differs by more than its error?")
    beside.add_argument("files", nargs="+", metavar="FILE", help="at least two, saved by --json or by a monitor (run.jsonl)")
    beside.add_argument("--html", metavar="OUT", help="also write a self-contained page")
    summary = "one HTML page from results saved by --json, from a monitor's run.jsonl, or from everything measurable about a TARGET"
    report = _command(subparsers, "report", run_report_command, summary)
    what = "files saved by --json or by a monitor (run.jsonl), or one file.py:function"
    report.add_argument("sources", nargs="+", metavar="FILE|TARGET", help=what)
    report.add_argument("--title", default="Curvature report", help="title of the page (default: %(default)s)")
    _add_common(report)
    _add_watch(_command(subparsers, "watch", run_watch_command, "follow a monitored run in the terminal; Ctrl-C ends it"))
    summary = "do hyperparameters transfer from narrow to wide networks? exit code 0: they do, 3: they do not, or it is undecided"
    _add_transfer(_command(subparsers, "transfer", run_transfer_command, summary))
    summary = "the learner against grid, range test, Bayesian search and others, from scratch with the same number of gradients"
    add_race_arguments(_command(subparsers, "race", run_race_command, summary), count=_count, amount=_amount)
    shell = _command(subparsers, "completion", run_completion_command, "the script that makes your shell complete this command line")
    shell.add_argument("shell", choices=SHELLS, help="whose script to print")
    shell.set_defaults(parser=parser)
    return parser


def _command(subparsers: Any, name: str, run: Callable[[argparse.Namespace], Answer], summary: str) -> argparse.ArgumentParser:
    about: Any = {"help": summary, "description": summary, "epilog": f"{_CODES}\n\nexample:\n  {_EXAMPLES[name]}"}
    command: argparse.ArgumentParser = subparsers.add_parser(name, **about, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.set_defaults(run=run)
    command.add_argument("--json", action="store_true", help="print exactly one JSON document on stdout")
    command.add_argument("--seed", type=int, default=0, help="seeds the random vectors (default: %(default)s)")
    command.add_argument("--quiet", action="store_true", help="no remarks and no progress bar on stderr")
    command.add_argument("--debug", action="store_true", help="show where in sharpkit an error came from")
    return command


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument("--params", metavar="PATTERN", help="only the parameters whose names match, such as 'blocks.*.attn.*'")
    command.add_argument("--html", metavar="OUT", help="also write a self-contained page")


def _add_demo(command: argparse.ArgumentParser) -> None:
    command.add_argument("--quick", action="store_true", help="fewer images, steps and checkpoints")
    command.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where to train and measure (default: %(default)s)")
    command.add_argument("--dataset", default="digits", choices=("digits", "fashion-mnist"), help="(default: %(default)s)")
    command.add_argument("--data-folder", type=Path, metavar="FOLDER", help="holds Fashion-MNIST's four *-ubyte.gz files")
    command.add_argument("--out", metavar="OUT", help="where the page goes (default: demo.html)")


def _add_watch(command: argparse.ArgumentParser) -> None:
    command.add_argument("run_file", metavar="run.jsonl", type=Path, help="written by sk.sinks.jsonl; may not exist yet")
    command.add_argument("--once", action="store_true", help="show how the run stands now, and end")
    command.add_argument("--interval", type=_amount, default=2.0, metavar="SECONDS", help="between two looks (default: %(default)s)")
    command.add_argument("--last", type=_count, default=10, metavar="N", help="records shown at the start (default: %(default)s)")


def _add_transfer(command: argparse.ArgumentParser) -> None:
    command.add_argument("target", metavar="TARGET", help="file.py:function that returns (build, optimizer, data, loss), or a Family")
    command.add_argument("--widths", type=_sizes, required=True, metavar="64,128,...", help="at least three, ascending or not")
    what = "also over depths: build(width, depth=...), at the smallest width"
    command.add_argument("--depths", type=_sizes, metavar="2,4,...", help=what)
    how = command.add_mutually_exclusive_group()  # --quick changes nothing: it is there to be written down in a script
    how.add_argument("--quick", action="store_true", help="end as soon as the verdict is certain (default)")
    how.add_argument("--full", action="store_true", help="measure everything, longer")
    command.add_argument("--seeds", type=_count, default=3, help="runs of each size (default: %(default)s)")
    command.add_argument("--store", metavar="FILE", help="file for finished training runs (JSON lines): a killed sweep goes on from it")
    command.add_argument("--html", metavar="OUT", help="also write a self-contained page")
