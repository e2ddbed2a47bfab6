"""What each command of the command line does: arguments in, result documents out. Printing is :mod:`sharpkit.cli.main`'s."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sharpkit.objective.objective import Objective
    from sharpkit.training_run import RaceProblem
    from sharpkit.transfer.setup import Family


Document = dict[str, Any]
Answer = tuple[list[Document], Document, int]
# Exit codes: 1 and 2 by convention, 130 as shells report an interrupt (128 + SIGINT); 3 is ours, for done but not converged.
OK, FAILED, USAGE, NOT_CONVERGED, INTERRUPTED = 0, 1, 2, 3, 130


def run_measure_command(arguments: argparse.Namespace) -> Answer:
    """``sharpkit measure``: the sharpness of a target."""
    from sharpkit.measuring.sharpness import measure
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
    """``sharpkit spectrum``: the largest eigenvalues and the spectral density of a target."""
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
    """``sharpkit doctor``: whether measurements of a target can be trusted."""
    from sharpkit.cli.output import tell
    from sharpkit.measuring.doctor import examine
    from sharpkit.reporting import to_document

    objective, _ = _objective(arguments, forecast=False)
    diagnosis = examine(objective, seed=arguments.seed, callback=None if arguments.quiet else tell)
    documents, extra, _ = _finish(arguments, [to_document(diagnosis)])
    extra["text"] = str(diagnosis)
    return documents, extra, OK if diagnosis.passed else FAILED


def run_batch_command(arguments: argparse.Namespace) -> Answer:
    """``sharpkit batch``: the largest stable learning rate at every batch size."""
    from sharpkit.batch_size.learning_rate_curve import learning_rate_curve
    from sharpkit.cli.output import tell
    from sharpkit.cli.target import UsageError

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
        callback=None if arguments.quiet else tell,
    )
    documents, extra, code = _finish(arguments, [curve.to_dict()])
    extra["text"] = f"{curve.table()}\n\n{curve}\ncost: {curve.gradients:.0f} full-data gradients, {curve.seconds:.3g} s"
    return documents, extra, code


def run_report_command(arguments: argparse.Namespace) -> Answer:
    """``sharpkit report``: a page from saved results, a run file or a target."""
    from sharpkit.cli.target import UsageError
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
    from sharpkit.measuring.doctor import examine
    from sharpkit.measuring.layers import per_layer
    from sharpkit.measuring.sharpness import measure
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
    """``sharpkit demo``: train two small networks and show their curvature."""
    from sharpkit.cli.demo import run_demo
    from sharpkit.cli.output import all_converged, say
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
    from sharpkit.cli.output import say
    from sharpkit.cli.target import UsageError, load_target

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
    from sharpkit.cli.output import all_converged
    from sharpkit.reporting import report

    extra: Document = {"target": arguments.target}
    if arguments.html:
        page = report(
            arguments.html, documents, title=f"Curvature of {arguments.target}", command=shlex.join(arguments.argv), seed=arguments.seed
        )
        extra["page"] = str(page)
    return documents, extra, OK if all_converged(documents) else NOT_CONVERGED


def _bar(arguments: argparse.Namespace) -> Any:
    from sharpkit.cli.output import ProgressBar

    return ProgressBar(quiet=arguments.quiet)


def _check_folder(path: str) -> None:
    """Before any work: a page that cannot be written is a usage error now, not a loss at the end."""
    from sharpkit.cli.target import UsageError

    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise UsageError(f"cannot write {path}: the folder {target.parent} does not exist; make it first or name another place")
    if target.is_dir():
        raise UsageError(f"cannot write {path}: it is a folder; name a file in it")


def _read_run(source: Path) -> Document:
    """A file saved by ``--json``, a bare result document, or a monitor's JSON lines, as a run."""
    from sharpkit.cli.target import UsageError
    from sharpkit.monitor.runs import is_run_file, read_run

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


_RACE_EXAMPLE = """a TARGET of race is file.py:function, where the function takes no arguments and returns what to train, for example
    def setup():
        return make_model, make_optimizer, data, loss      # make_model(seed), make_optimizer(params, lr), batches, loss(output, target)
or a dict with the keys model, optimizer, data, loss or closure, and test_data, or a sharpkit.training_run.RaceProblem"""
_RACE_KEYS = ("model", "optimizer", "data", "loss", "closure", "test_data")
# By judgement: three seeds show the scatter of a race; a quick one shows within minutes on a laptop that the problem runs.
_STEPS, _QUICK_STEPS = 1000, 200
_SEEDS, _QUICK_SEEDS = 3, 1  # by judgement, as above
_QUICK_RATES = 5  # in a grid, by judgement


def add_race_arguments(command: argparse.ArgumentParser, *, count: Callable[[str], Any], amount: Callable[[str], Any]) -> None:
    """The command's own arguments.

    Args:
        command: its parser.
        count, amount: parse a positive whole number, a positive number.
    """
    command.add_argument(
        "target", metavar="TARGET", help="file.py:function that returns (make_model, make_optimizer, data, loss), or a dict"
    )
    command.add_argument(
        "--steps", type=count, help=f"gradients that each way may spend, a seed (default: {_STEPS}; quick: {_QUICK_STEPS})"
    )
    command.add_argument("--seeds", type=count, help=f"runs of each way (default: {_SEEDS}; quick: {_QUICK_SEEDS})")
    command.add_argument("--rates", type=amount, nargs="+", metavar="LR", help="the grid (default: half decades that suit the optimizer)")
    command.add_argument("--quick", action="store_true", help=f"fewer steps and seeds, {_QUICK_RATES} rates")
    command.add_argument("--html", metavar="OUT", help="also write a self-contained page")


def run_race_command(arguments: argparse.Namespace) -> Answer:
    """Race, and give the table; exit code 0."""
    from sharpkit.cli.output import tell
    from sharpkit.learner.race import default_rates, race
    from sharpkit.reporting import report

    if arguments.html:
        _check_folder(arguments.html)
    problem = load_problem(arguments.target)
    quick = arguments.quick
    seeds = arguments.seeds or (_QUICK_SEEDS if quick else _SEEDS)
    rates = arguments.rates or default_rates(problem, points=_QUICK_RATES if quick else 9)
    result = race(
        problem,
        max_gradients=arguments.steps or (_QUICK_STEPS if quick else _STEPS),
        seeds=range(arguments.seed, arguments.seed + seeds),
        rates=rates,
        callback=None if arguments.quiet else tell,
    )
    document, extra = result.to_dict(), {"target": arguments.target, "text": str(result)}
    if arguments.html:
        title = f"Ways to a learning rate, raced on {arguments.target}"
        extra["page"] = str(report(arguments.html, [document], title=title, command=shlex.join(arguments.argv)))
    return [document], extra, 0


def load_problem(target: str) -> RaceProblem:
    """Import the file, call the function, check what it returns.

    Args:
        target: ``"file.py:function"``.

    Raises:
        UsageError: no such file or function, or it returned something else.
        TargetError: the file or the function raised; the original error is its cause.
    """
    from sharpkit.cli.target import returned_by

    return _checked_race(returned_by(target, _RACE_EXAMPLE), target)


def _checked_race(returned: Any, target: str) -> RaceProblem:
    from sharpkit.cli.target import UsageError
    from sharpkit.training_run import RaceProblem

    if isinstance(returned, RaceProblem):
        return returned
    if isinstance(returned, Mapping):
        if set(returned) <= set(_RACE_KEYS) and set(_RACE_KEYS[:3]) <= set(returned):
            return RaceProblem(**returned)
        came = f"a dict with the keys {', '.join(map(str, returned))}"
    elif isinstance(returned, tuple) and len(returned) in (3, 4) and all(map(callable, returned[:2])):
        return RaceProblem(*returned)
    else:
        came = f"a tuple of {', '.join(type(x).__name__ for x in returned)}" if isinstance(returned, tuple) else type(returned).__name__
    raise UsageError(f"{target} returned {came}.\n{_RACE_EXAMPLE}")


# Exit codes: a negative verdict is an answer, not a failure, so by convention of this command line it is 3, not 1.
TRANSFERS, DOES_NOT = 0, 3

_TRANSFER_EXAMPLE = """a TARGET of transfer is file.py:function, where the function takes no arguments and returns a family of networks,
for example
    def build():
        return make_model, make_optimizer, data, loss  # make_model(width), make_optimizer(model, width), batches, loss(output, target)
or a dict with the keys build, optimizer, data and loss or closure, or a sk.transfer.Family"""
_TRANSFER_KEYS = ("build", "optimizer", "data", "loss", "closure")


def run_transfer_command(arguments: argparse.Namespace) -> Answer:
    """Diagnose the family; exit code 0 where hyperparameters transfer, 3 where they do not or where it is undecided."""
    from sharpkit.cli.output import tell
    from sharpkit.cli.target import UsageError
    from sharpkit.reporting import report
    from sharpkit.transfer.verdict import diagnose

    for path in filter(None, (arguments.html, arguments.store)):
        _check_folder(path)
    family = load_family(arguments.target)
    for name in ("widths", "depths"):
        sizes = getattr(arguments, name)
        if sizes is not None and len(set(sizes)) < 3:
            raise UsageError(f"--{name} needs at least three different sizes: two give no error of a slope; got {sizes}")
    verdict = diagnose(
        family["build"],
        widths=arguments.widths,
        depths=arguments.depths,
        optimizer=family["optimizer"],
        data=family["data"],
        loss=family.get("loss"),
        closure=family.get("closure"),
        mode="full" if arguments.full else "quick",
        seeds=arguments.seeds,
        store=arguments.store,
        callback=None if arguments.quiet else tell,
    )
    whole = verdict.to_dict()
    documents = [{key: value for key, value in whole.items() if key != "parts"}, *whole["parts"]]
    extra: Document = {"target": arguments.target, "text": str(verdict)}
    if arguments.html:
        title = f"Do hyperparameters of {arguments.target} transfer?"
        extra["page"] = str(report(arguments.html, documents, title=title, command=shlex.join(arguments.argv)))
    return documents, extra, TRANSFERS if verdict.passed else DOES_NOT


def load_family(target: str) -> Mapping[str, Any]:
    """Import the file, call the function, check what it returns.

    Args:
        target: ``"file.py:function"``; the name may also be that of a Family.

    Returns:
        build, optimizer, data, loss and closure, as far as given.

    Raises:
        UsageError: no such file or function, or it returned something else.
        TargetError: the file or the function raised; the original error is its cause.
    """
    from sharpkit.cli.target import returned_by
    from sharpkit.transfer.setup import Family

    return _checked_family(returned_by(target, _TRANSFER_EXAMPLE, instead=Family), target)


def _fields(family: Family) -> Mapping[str, Any]:
    return {key: getattr(family, key) for key in _TRANSFER_KEYS}


def _checked_family(returned: Any, target: str) -> Mapping[str, Any]:
    from sharpkit.cli.target import UsageError
    from sharpkit.transfer.setup import Family

    if isinstance(returned, Family):
        if returned.dimension != "width":
            raise UsageError(
                f"{target} returned a Family over {returned.dimension}s; transfer starts from one over widths.\n{_TRANSFER_EXAMPLE}"
            )
        return _fields(returned)
    if isinstance(returned, Mapping):
        unknown, missing = set(returned) - set(_TRANSFER_KEYS), [key for key in _TRANSFER_KEYS[:3] if key not in returned]
        if not unknown and not missing:
            return dict(returned)
        came = f"a dict with the keys {', '.join(map(str, returned))}"
    elif isinstance(returned, tuple) and len(returned) in (3, 4) and all(map(callable, returned[:2])):
        return dict(zip(_TRANSFER_KEYS, returned, strict=False))
    else:
        came = f"a tuple of {', '.join(type(x).__name__ for x in returned)}" if isinstance(returned, tuple) else type(returned).__name__
    raise UsageError(f"{target} returned {came}.\n{_TRANSFER_EXAMPLE}")
