"""What each command of the command line does: arguments in, result documents out. Printing is :mod:`sharpkit.cli`'s.

Every command returns (result documents, further fields of the answer, exit code). Heavy modules are imported when a command runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sharpkit.objective import Objective

Document = dict[str, Any]
Answer = tuple[list[Document], Document, int]
OK, FAILED, USAGE, NOT_CONVERGED, INTERRUPTED = 0, 1, 2, 3, 130


def run_measure_command(arguments: argparse.Namespace) -> Answer:
    from sharpkit.analysis.sharpness import measure
    from sharpkit.reporting import to_document

    objective, optimizer = _objective(arguments, expected_matvecs=arguments.probes * arguments.steps)
    with _bar(arguments) as bar:
        sharpness = measure(
            objective,
            optimizer=optimizer,
            num_probes=arguments.probes,
            num_steps=arguments.steps,
            tol=arguments.tol,
            seed=arguments.seed,
            max_seconds=arguments.max_seconds,
            callback=bar,
        )
    return _finish(arguments, [to_document(sharpness)])


def run_spectrum_command(arguments: argparse.Namespace) -> Answer:
    from sharpkit.linalg.lanczos import eigenpairs
    from sharpkit.linalg.slq import spectral_density
    from sharpkit.operators.hessian import HessianOperator

    objective, _ = _objective(arguments, expected_matvecs=arguments.probes * arguments.steps + 20 + 3 * arguments.k)
    started = time.perf_counter()
    operator = HessianOperator(objective)
    steps = min(arguments.steps, operator.size)
    budget = arguments.max_seconds
    with _bar(arguments) as bar:
        pairs = eigenpairs(
            operator, k=min(arguments.k, operator.size), tol=arguments.tol, seed=arguments.seed, max_seconds=budget, callback=bar
        )
        left = max(budget - (time.perf_counter() - started), 1e-3) if budget is not None else None
        density = spectral_density(
            operator, num_probes=arguments.probes, num_steps=steps, seed=arguments.seed, max_seconds=left, callback=bar
        )
    return _finish(arguments, [pairs.to_dict(), density.to_dict()])


def run_doctor_command(arguments: argparse.Namespace) -> Answer:
    from sharpkit._cli_output import say
    from sharpkit.analysis.doctor import examine
    from sharpkit.reporting import to_document

    objective, _ = _objective(arguments, forecast=False)
    diagnosis = examine(objective, seed=arguments.seed, callback=None if arguments.quiet else lambda check: say(f"  {check} ..."))
    documents, extra, _ = _finish(arguments, [to_document(diagnosis)])
    extra["text"] = str(diagnosis)
    return documents, extra, OK if diagnosis.passed else FAILED


def run_batch_command(arguments: argparse.Namespace) -> Answer:
    from sharpkit._cli_output import say
    from sharpkit._cli_target import UsageError
    from sharpkit.analysis.batch import learning_rate_curve

    objective, optimizer = _objective(arguments, forecast=False)
    if optimizer is None:
        raise UsageError(f"{arguments.target} returned no optimizer, and the limit depends on its kind: return (objective, optimizer)")
    curve = learning_rate_curve(
        objective,
        optimizer,
        batch_sizes=arguments.batch_sizes,
        pilot=arguments.pilot,
        calibrate=not arguments.no_calibration,
        seed=arguments.seed,
        callback=None if arguments.quiet else say,
    )
    documents, extra, code = _finish(arguments, [curve.to_dict()])
    extra["text"] = f"{curve.table()}\n\n{curve}\ncost: {curve.gradients:.0f} full-data gradients, {curve.seconds:.3g} s"
    return documents, extra, code


def run_report_command(arguments: argparse.Namespace) -> Answer:
    from sharpkit._cli_target import UsageError
    from sharpkit.reporting import report

    sources = [Path(name) for name in arguments.sources]
    if len(sources) == 1 and ":" in sources[0].name and ".py:" in arguments.sources[0]:
        return _report_target(arguments)
    results, notes, machine, seeds = [], [], None, set()
    for source in sources:
        run = _read_run(source)
        seeds.add(run.get("seed"))
        machine = machine or run.get("environment")
        notes += [f"{source.name}: {shlex.join(run['command'])}"] if run.get("command") else []
        notes += run.get("notes", [])
        for document in run["results"]:
            heading = document.get("title", "")
            results.append((f"{source.stem}: {heading}" if heading and len(sources) > 1 else heading, document))
    if not results:
        raise UsageError(f"there are no results in {', '.join(map(str, sources))}")
    seed = next(iter(seeds)) if len(seeds) == 1 else None
    page = report(
        arguments.html or "sharpkit-report.html",
        results,
        title=arguments.title,
        notes=notes,
        machine=machine,
        seed=seed,
        command=shlex.join(arguments.argv),
    )
    return [], {"page": str(page)}, OK


def _report_target(arguments: argparse.Namespace) -> Answer:
    """Measure everything about a TARGET and write the page."""
    from sharpkit.analysis.doctor import examine
    from sharpkit.analysis.layers import per_layer
    from sharpkit.analysis.sharpness import measure
    from sharpkit.reporting import to_document

    arguments.target = arguments.sources[0]
    arguments.html = arguments.html or "sharpkit-report.html"
    objective, optimizer = _objective(arguments)
    with _bar(arguments) as bar:
        sharpness = measure(objective, optimizer=optimizer, seed=arguments.seed, callback=bar)
        layers = per_layer(objective, seed=arguments.seed, name=type(objective.model).__name__, callback=bar)
    diagnosis = examine(objective, seed=arguments.seed)
    documents, extra, code = _finish(arguments, [to_document(sharpness), layers.to_dict(), to_document(diagnosis)])
    return documents, extra, code if diagnosis.passed else NOT_CONVERGED


def run_demo_command(arguments: argparse.Namespace) -> Answer:
    from sharpkit._cli_output import all_converged, say
    from sharpkit.demo import run_demo
    from sharpkit.reporting import report, to_document

    _check_folder(arguments.out)
    result = run_demo(
        dataset=arguments.dataset,
        folder=arguments.data_folder,
        quick=arguments.quick,
        device=arguments.device,
        seed=arguments.seed,
        say=(lambda line: None) if arguments.quiet else say,
    )
    documents = [{**to_document(measured), "title": heading} for heading, measured in result.sections]
    page = report(
        arguments.out,
        documents,
        title="sharpkit demo: curvature of two networks in training",
        command=shlex.join(arguments.argv),
        seed=arguments.seed,
        notes=result.notes,
    )
    findings = [sentence for document in documents for sentence in document.get("findings", [])]
    extra = {"notes": list(result.notes), "findings": findings, "seconds": result.seconds, "page": str(page)}
    return documents, extra, OK if all_converged(documents) else NOT_CONVERGED


# -- parts the commands share ----------------------------------------------------------------------------------------------------


def _objective(arguments: argparse.Namespace, *, expected_matvecs: int | None = None, forecast: bool = True) -> tuple[Objective, Any]:
    """The target's objective, restricted as asked, with a forecast of the cost on stderr."""
    from sharpkit._cli_output import say
    from sharpkit._cli_target import UsageError, load_target

    if arguments.html:
        _check_folder(arguments.html)
    objective, optimizer = load_target(arguments.target)
    if arguments.params:
        try:
            objective = objective.with_params(arguments.params)
        except ValueError as error:
            raise UsageError(str(error)) from error
    if not arguments.quiet:
        say(str(objective))
    if forecast and not arguments.quiet:
        say(_forecast(objective, expected_matvecs))
    return objective, optimizer


def _forecast(objective: Objective, expected_matvecs: int | None) -> str:
    """What one Hessian product takes, timed, and what that makes in all."""
    import torch

    from sharpkit.operators.hessian import HessianOperator

    operator = HessianOperator(objective)
    vector = torch.ones(operator.size, dtype=operator.dtype, device=operator.device)
    operator.multiply(vector)  # builds the graph
    started = time.perf_counter()
    float(operator.dot(operator.multiply(vector), vector))  # waits for the device
    each = time.perf_counter() - started
    if expected_matvecs is None:
        return f"one Hessian product takes {each:.3g} s"
    return f"one Hessian product takes {each:.3g} s; about {expected_matvecs} products, {each * expected_matvecs:.3g} s in all"


def _finish(arguments: argparse.Namespace, documents: list[Document]) -> Answer:
    """Write the page where one was asked for, and find the exit code."""
    from sharpkit._cli_output import all_converged
    from sharpkit.reporting import report

    extra: Document = {"target": arguments.target}
    if arguments.html:
        page = report(
            arguments.html, documents, title=f"Curvature of {arguments.target}", command=shlex.join(arguments.argv), seed=arguments.seed
        )
        extra["page"] = str(page)
    return documents, extra, OK if all_converged(documents) else NOT_CONVERGED


def _bar(arguments: argparse.Namespace) -> Any:
    from sharpkit._cli_output import ProgressBar

    return ProgressBar(quiet=arguments.quiet)


def _check_folder(path: str) -> None:
    """Before any work: a page that cannot be written is a usage error now, not a loss at the end."""
    from sharpkit._cli_target import UsageError

    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise UsageError(f"cannot write {path}: the folder {target.parent} does not exist; make it first or name another place")
    if target.is_dir():
        raise UsageError(f"cannot write {path}: it is a folder; name a file in it")


def _read_run(source: Path) -> Document:
    """A file saved by ``--json``, a bare result document, or a monitor's JSON lines, as a run."""
    from sharpkit._cli_target import UsageError
    from sharpkit.integrations.runs import is_run_file, read_run

    if is_run_file(source):
        try:
            monitored = read_run(source).to_dict()
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot read {source} as the JSON lines of a monitored run: {error}") from error
        return {"results": [monitored], "seed": monitored["header"].get("seed")}
    try:
        document = json.loads(source.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(
            f"the file {source} does not exist; report takes files saved by --json, a monitor's run.jsonl, or one file.py:function"
        ) from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UsageError(f"cannot read {source} as a JSON document saved by --json: {error}") from error
    kind = document.get("kind") if isinstance(document, dict) else None
    if kind == "error":
        raise UsageError(f"{source} holds the error of a run that failed: {document.get('message')}")
    if kind is None or (kind == "run" and not isinstance(document.get("results"), list)):
        raise UsageError(f"{source} is JSON, but no results of sharpkit: expected a document saved by --json")
    return document if kind == "run" else {"results": [document]}
