"""What each command of the command line does: arguments in, result documents out. Printing is :mod:`sharpkit.cli.main`'s."""

from __future__ import annotations

import argparse
import itertools
import os
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sharpkit as sk  # its names load what they need when they are used: --help and --version never wait for torch
from sharpkit._errors import DocumentError
from sharpkit._results import MAX_JSON, parse_json
from sharpkit.cli.output import all_converged, say, tell
from sharpkit.cli.target import UsageError, load_target, returned_by

if TYPE_CHECKING:
    from sharpkit.training_run import RaceProblem


Document = dict[str, Any]
Answer = tuple[list[Document], Document, int]
# Exit codes: 1 and 2 by convention, 130 as shells report an interrupt (128 + SIGINT); 3 is ours, for done but not converged.
OK, FAILED, USAGE, NOT_CONVERGED, INTERRUPTED = 0, 1, 2, 3, 130


def run_measure_command(arguments: argparse.Namespace) -> Answer:
    """``sharpkit measure``: the sharpness of a target."""
    probes, steps, tol, seed, budget = (getattr(arguments, name) for name in ("probes", "steps", "tol", "seed", "max_seconds"))
    objective, optimizer = _objective(arguments, expected_matvecs=probes * steps)
    sharpness = sk.measure(
        objective,
        optimizer=optimizer,
        num_probes=probes,
        num_steps=steps,
        tol=tol,
        seed=seed,
        max_seconds=budget,
        memory_limit=arguments.memory_limit,
        offload=arguments.offload,
        checkpoint=arguments.checkpoint,
    )
    return _finish(arguments, [sharpness])


def run_spectrum_command(arguments: argparse.Namespace) -> Answer:
    """``sharpkit spectrum``: the largest eigenvalues and the spectral density of a target."""
    probes, steps, tol, seed, budget = (getattr(arguments, name) for name in ("probes", "steps", "tol", "seed", "max_seconds"))
    # 20 + 3 k products for k pairs: by judgement what a spectrum with outliers takes; it is a forecast, not a limit
    objective, _ = _objective(arguments, expected_matvecs=probes * steps + 20 + 3 * arguments.k)
    started = time.perf_counter()
    operator = sk.HessianOperator(objective)
    # a matrix of n rows has no more than n pairs or steps: the default of ten must not fail on a tiny model
    k, steps = min(arguments.k, operator.size), min(steps, operator.size)
    memory: Any = {"memory_limit": arguments.memory_limit, "offload": arguments.offload}
    folder = arguments.checkpoint
    kept = [None if folder is None else os.path.join(folder, name) for name in ("eigenpairs", "density")]
    pairs = sk.eigenpairs(operator, k=k, tol=tol, seed=seed, max_seconds=budget, checkpoint=kept[0], **memory)
    # One budget for both; a budget of 0 is refused by the library, and a millisecond still gives a flagged partial result. With a
    # checkpoint each has the whole: what is left would be another argument each time.
    left = max(budget - (time.perf_counter() - started), 1e-3) if budget is not None and folder is None else budget
    given: Any = {"num_probes": probes, "num_steps": steps, "seed": seed, "max_seconds": left, "checkpoint": kept[1], **memory}
    density = sk.spectral_density(operator, **given)
    return _finish(arguments, [pairs, density])


def run_doctor_command(arguments: argparse.Namespace) -> Answer:
    """``sharpkit doctor``: whether measurements of a target can be trusted."""
    objective, _ = _objective(arguments, forecast=False)
    diagnosis = sk.examine(objective, seed=arguments.seed, callback=None if arguments.quiet else tell)
    documents, extra, _ = _finish(arguments, [diagnosis])
    extra["text"] = str(diagnosis)
    return documents, extra, OK if diagnosis.passed else FAILED


def run_batch_command(arguments: argparse.Namespace) -> Answer:
    """``sharpkit batch``: the largest stable learning rate at every batch size."""
    objective, optimizer = _objective_and_optimizer(arguments, "the limit")
    curve = sk.learning_rate_curve(
        objective,
        optimizer,
        batch_sizes=arguments.batch_sizes,
        pilot=arguments.pilot,
        steps=arguments.steps,
        calibrate=not arguments.no_calibration,
        max_seconds=arguments.max_seconds,
        seed=arguments.seed,
        callback=None if arguments.quiet else tell,
    )
    documents, extra, code = _finish(arguments, [curve])
    extra["text"] = f"{curve.table()}\n\n{curve}\ncost: {curve.gradients:.0f} full-data gradients, {curve.seconds:.3g} s"
    return documents, extra, code


def run_lr_command(arguments: argparse.Namespace) -> Answer:
    """``sharpkit lr``: one learning rate to train with."""
    objective, optimizer = _objective_and_optimizer(arguments, "the rate")
    rate = sk.suggest_learning_rate(
        objective,
        optimizer,
        batch_size=arguments.batch_size,
        steps=arguments.steps,
        schedule=arguments.schedule,
        budget=arguments.budget,
        seed=arguments.seed,
        callback=None if arguments.quiet else tell,
    )
    documents, extra, code = _finish(arguments, [rate])
    extra["text"] = "\n".join(rate.findings())
    return documents, extra, code


def run_landscape_command(arguments: argparse.Namespace) -> Answer:
    """``sharpkit landscape``: the loss on a line or a plane through the present parameters."""
    objective, optimizer = _objective(arguments, forecast=False)
    shown = sk.landscape(
        objective,
        arguments.checkpoints or arguments.directions,
        dimensions=arguments.dimensions,
        optimizer=optimizer,
        span=arguments.span,
        points=arguments.points,
        seed=arguments.seed,
        max_seconds=arguments.max_seconds,
    )
    documents, extra, code = _finish(arguments, [shown])
    extra["text"] = "\n".join([str(shown), *shown.findings()])
    return documents, extra, code


def run_compare_command(arguments: argparse.Namespace) -> Answer:
    """``sharpkit compare``: saved results side by side, each kind that all files hold."""
    _check_folder(arguments.html)
    files = [Path(name) for name in arguments.files]
    if len(files) < 2:
        raise UsageError(f"a comparison needs at least two files, got {arguments.files[0]}")
    stems = [file.stem for file in files]
    names = stems if len(set(stems)) == len(stems) else list(map(str, files))
    if len(set(names)) < len(names):
        raise UsageError(f"the same file is given twice: {', '.join(names)}")
    held = [{(d.get("kind"), d.get("title", "")): d for d in _read_run(file)["results"]} for file in files]
    shared = [key for key in held[0] if all(key in other for other in held[1:])]
    if not shared:
        kinds = "; ".join(
            f"{name}: {', '.join(str(kind) for kind, _ in each) or 'nothing'}" for name, each in zip(names, held, strict=True)
        )
        raise UsageError(f"the files hold no results of the same kind ({kinds})")
    results = []
    for key in shared:
        try:
            results.append(sk.compare({name: each[key] for name, each in zip(names, held, strict=True)}))
        except ValueError as error:  # a kind without numbers to compare
            if len(shared) == 1:
                raise UsageError(str(error)) from error
    arguments.target = ", ".join(names)
    documents, extra, _ = _finish(arguments, results)
    extra["text"] = "\n\n".join(map(str, results))
    return documents, extra, OK


def run_init_command(arguments: argparse.Namespace) -> Answer:
    """``sharpkit init``: a commented job file to start from."""
    target = Path(arguments.file)
    if target.suffix != ".py":
        raise UsageError(f"a job is a Python file: give a name that ends in .py, got {str(target)!r}")
    if target.exists():
        raise UsageError(f"{target} exists and is left as it is: give another name")
    if not target.parent.is_dir():
        raise UsageError(f"the folder {target.parent} does not exist")
    template = files("sharpkit.cli") / "templates" / f"{arguments.kind}.py.in"
    target.write_text(template.read_text(encoding="utf-8").replace("{file}", target.name), encoding="utf-8")
    lines = [f"{target} written: put in your model, loss, data and optimizer, then", ""]
    lines += [f"    sharpkit {command}" for command in (f"doctor {target}:job", f"measure {target}:job --html sharpness.html")]
    lines += [f"    sharpkit lr {target}:job --batch-size 32 --steps 1000", f"    python {target}"]
    return [], {"written": str(target.resolve()), "text": "\n".join(lines)}, OK


def run_completion_command(arguments: argparse.Namespace) -> Answer:
    """``sharpkit completion``: the script that makes a shell complete this command line."""
    from sharpkit.cli.completion import completion_script

    script = completion_script(arguments.parser, arguments.shell)
    return [], {"text": script.rstrip(), "script": script}, OK


def run_report_command(arguments: argparse.Namespace) -> Answer:
    """``sharpkit report``: a page from saved results, a run file or a target."""
    sources = [Path(name) for name in arguments.sources]
    # a target ends in file.py:function; a folder such as a.py:b/ may hold saved results
    if len(sources) == 1 and ":" in sources[0].name and ".py:" in arguments.sources[0]:
        return _report_target(arguments)
    results, notes, machine, seeds = [], [], None, set()
    for source in sources:
        run = _read_run(source)
        seeds.add(run.get("seed"))
        machine = machine or run.get("environment")  # where the numbers were measured, not where the page is made
        notes += [f"{source.name}: {shlex.join(run['command'])}"] if run.get("command") else []
        notes += run.get("notes", [])
        for document in run["results"]:
            heading = document.get("title", "")
            results.append((f"{source.stem}: {heading}" if heading and len(sources) > 1 else heading, document))
    if not results:
        raise UsageError(f"there are no results in {', '.join(map(str, sources))}")
    seed = next(iter(seeds)) if len(seeds) == 1 else None  # the footer has room for one: none is better than a wrong one
    arguments.html = arguments.html or _unnamed_page(arguments, "sharpkit-report.html")
    return [], {"page": _page(arguments, results, title=arguments.title, seed=seed, notes=notes, machine=machine)}, OK


def _report_target(arguments: argparse.Namespace) -> Answer:
    """Measure everything about a TARGET and write the page."""
    arguments.target = arguments.sources[0]
    arguments.html = arguments.html or _unnamed_page(arguments, "sharpkit-report.html")
    objective, optimizer = _objective(arguments)
    sharpness = sk.measure(objective, optimizer=optimizer, seed=arguments.seed)
    layers = sk.per_layer(objective, seed=arguments.seed, name=type(objective.model).__name__)
    diagnosis = sk.examine(objective, seed=arguments.seed)
    documents, extra, code = _finish(arguments, [sharpness, layers, diagnosis])
    return documents, extra, code if diagnosis.passed else NOT_CONVERGED


def run_demo_command(arguments: argparse.Namespace) -> Answer:
    """``sharpkit demo``: train two small networks and show their curvature."""
    from sharpkit.cli.demo import run_demo
    from sharpkit.reporting import to_document

    arguments.html = arguments.out or _unnamed_page(arguments, "demo.html")
    _check_folder(arguments.html)
    result = run_demo(
        dataset=arguments.dataset,
        folder=arguments.data_folder,
        quick=arguments.quick,
        device=arguments.device,
        seed=arguments.seed,
        say=(lambda line: None) if arguments.quiet else say,
    )
    documents = [{**to_document(measured), "title": heading} for heading, measured in result.sections]
    title = "sharpkit demo: curvature of two networks in training"
    page = _page(arguments, documents, title=title, seed=arguments.seed, notes=result.notes)
    findings = [sentence for document in documents for sentence in document.get("findings", [])]
    extra = {"notes": list(result.notes), "findings": findings, "seconds": result.seconds, "page": page}
    return documents, extra, OK if all_converged(documents) else NOT_CONVERGED


# -- parts the commands share ----------------------------------------------------------------------------------------------------


def _objective_and_optimizer(arguments: argparse.Namespace, what: str) -> tuple[sk.Objective, Any]:
    """Those of a target that must bring both; ``what`` depends on the kind of optimizer."""
    objective, optimizer = _objective(arguments, forecast=False)
    if optimizer is None:
        raise UsageError(f"{arguments.target} returned no optimizer, and {what} depends on its kind: return (objective, optimizer)")
    return objective, optimizer


def _objective(arguments: argparse.Namespace, *, expected_matvecs: int | None = None, forecast: bool = True) -> tuple[sk.Objective, Any]:
    """The target's objective, restricted as asked, with a forecast of the cost on stderr."""
    _check_folder(arguments.html)
    objective, optimizer = load_target(arguments.target)
    if arguments.params:
        try:
            objective = objective.with_params(arguments.params)
        except ValueError as error:  # the pattern came from the command line: exit code 2, as for any wrong argument
            raise UsageError(str(error)) from error
    if not arguments.quiet:
        say(str(objective))
        if forecast:
            say(_forecast(objective, expected_matvecs))
    return objective, optimizer


def _forecast(objective: sk.Objective, expected_matvecs: int | None) -> str:
    """What one Hessian product takes, timed, and what that makes in all."""
    import torch

    operator = sk.HessianOperator(objective)
    vector = torch.ones(operator.size, dtype=operator.dtype, device=operator.device)
    operator.multiply(vector)  # builds the graph, which later products reuse
    started = time.perf_counter()
    float(operator.dot(operator.multiply(vector), vector))  # waits for the device
    each = time.perf_counter() - started
    whole = f"; about {expected_matvecs} products, {each * expected_matvecs:.3g} s in all" if expected_matvecs is not None else ""
    return f"one Hessian product takes {each:.3g} s{whole}"


def _finish(arguments: argparse.Namespace, results: list[Any]) -> Answer:
    """Write the page where one was asked for, and find the exit code."""
    from sharpkit.reporting import to_document

    documents, extra = [to_document(result) for result in results], {"target": arguments.target}
    if arguments.html:
        extra["page"] = _page(arguments, documents, title=f"Curvature of {arguments.target}", seed=arguments.seed)
    return documents, extra, OK if all_converged(documents) else NOT_CONVERGED


def _page(
    arguments: argparse.Namespace,
    results: list[Any],
    *,
    title: str,
    seed: int | None = None,
    notes: Sequence[str] = (),
    machine: Any = None,
) -> str:
    """The absolute path of a page that says how to make it again."""
    command = shlex.join(arguments.argv)
    return str(sk.report(arguments.html, results, title=title, command=command, seed=seed, notes=notes, machine=machine))


def _unnamed_page(arguments: argparse.Namespace, name: str) -> str:
    """Where a page goes that was given no name: an earlier page of sharpkit is replaced, and any other file left as it is; both are said.

    A name that was given is written to without a word: who names a file means it.
    """
    from sharpkit.reporting import is_page

    if not os.path.lexists(name):
        return name
    if is_page(name):
        remark, chosen = f"{name}, written {_ago(time.time() - os.stat(name).st_mtime)}, will be replaced", name
    else:
        stem, ending = os.path.splitext(name)
        chosen = next(other for i in itertools.count(2) if not os.path.lexists(other := f"{stem}-{i}{ending}"))
        remark = f"{name} exists and is no page of sharpkit: the page will be {chosen}"
    if not arguments.quiet:
        say(remark)
    return chosen


def _ago(seconds: float) -> str:
    """A time in the past in words.

    Example:
        >>> _ago(5), _ago(100), _ago(3 * 3600), _ago(3 * 86400 + 7)
        ('a moment ago', '2 minutes ago', '3 hours ago', '3 days ago')
    """
    for unit, size in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if count := round(seconds / size):
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return "a moment ago"


def _check_folder(path: str | None) -> None:
    """Before any work: a page that cannot be written is a usage error now, not a loss at the end."""
    from sharpkit.reporting import page_place

    try:
        if path:
            page_place(path)
    except OSError as error:
        raise UsageError(str(error)) from error


def _read_run(source: Path) -> Document:
    """A file saved by ``--json``, a bare result document, or a monitor's JSON lines, as a run."""
    from sharpkit.monitor.runs import is_run_file, read_run

    # Asked of the content, since the file may have any name: the first line of a run file is a JSON document too.
    if is_run_file(source):
        try:
            monitored = read_run(source).to_dict()
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot read {source} as the JSON lines of a monitored run: {error}") from error
        return {"results": [monitored], "seed": monitored["header"].get("seed")}
    try:
        with open(source, "rb") as stream:  # a pipe is welcome too; no more of it than a document can be
            document = parse_json(stream.read(MAX_JSON + 1), str(source))
    except FileNotFoundError as error:
        raise UsageError(
            f"the file {source} does not exist; report takes files saved by --json, a monitor's run.jsonl, or one file.py:function"
        ) from error
    except (OSError, DocumentError) as error:
        raise UsageError(f"cannot read {source} as a JSON document saved by --json: {error}") from error
    kind = document.get("kind") if isinstance(document, dict) else None
    if kind == "error":  # a pipeline saved what a failed command printed: its own message helps, "no results" would not
        raise UsageError(f"{source} holds the error of a run that failed: {document.get('message')}")
    if not isinstance(kind, str) or (kind == "run" and not isinstance(document.get("results"), list)):
        raise UsageError(f"{source} is JSON, but no results of sharpkit: expected a document saved by --json")
    run = document if kind == "run" else {"results": [document]}
    for name, expected in _RUN_FIELDS.items():
        value = run.get(name)
        texts = value if isinstance(value, list) else ()
        if value is not None and not (isinstance(value, expected) and all(isinstance(text, str) for text in texts)):
            raise UsageError(f"{source}: field {name!r} of a run must be a {expected.__name__}, got {str(value)[:60]!r}")
    for index, result in enumerate(run["results"]):
        if not (isinstance(result, dict) and isinstance(result.get("kind"), str)):
            raise UsageError(f"{source}: results[{index}] is no document of a result: it has no text 'kind'")
    return run


_RUN_FIELDS = {"seed": int, "command": list, "notes": list, "environment": dict}


def _parts_of(returned: Any, keys: tuple[str, ...], target: str, example: str) -> dict[str, Any]:
    """What a function returned, by name: a mapping with some of ``keys``, or a tuple in their order. The first three are required."""
    if isinstance(returned, Mapping):
        if set(keys[:3]) <= set(returned) <= set(keys):
            return dict(returned)
        came = f"a dict with the keys {', '.join(map(str, returned))}"
    # three or four parts, since a model may make its own loss; the first two are factories, which a batch of tensors is not
    elif isinstance(returned, tuple) and len(returned) in (3, 4) and all(map(callable, returned[:2])):
        return dict(zip(keys, returned, strict=False))
    else:
        came = f"a tuple of {', '.join(type(x).__name__ for x in returned)}" if isinstance(returned, tuple) else type(returned).__name__
    raise UsageError(f"{target} returned {came}.\n{example}")


_RACE_EXAMPLE = """a TARGET of race is file.py:function, where the function takes no arguments and returns what to train, for example
    def setup():
        return make_model, make_optimizer, data, loss      # make_model(seed), make_optimizer(params, lr), batches, loss(output, target)
or a dict with the keys model, optimizer, data, loss or closure, and test_data, or a sharpkit.training_run.RaceProblem"""
_RACE_KEYS = ("model", "optimizer", "data", "loss", "closure", "test_data")
# By judgement: three seeds show the scatter of a race; a quick one shows within minutes on a laptop that the problem runs.
_STEPS, _QUICK_STEPS = 1000, 200
_SEEDS, _QUICK_SEEDS = 3, 1  # by judgement, as above
_RATES, _QUICK_RATES = 9, 5  # in a grid, by judgement: half decades, and whole ones


def add_race_arguments(command: argparse.ArgumentParser, *, count: Callable[[str], Any], amount: Callable[[str], Any]) -> None:
    """The command's own arguments.

    Args:
        command: its parser.
        count, amount: parse a positive whole number, a positive number.
    """
    add, what = command.add_argument, "file.py:function that returns (make_model, make_optimizer, data, loss), or a dict"
    add("target", metavar="TARGET", help=what)
    add("--steps", type=count, help=f"gradients that each way may spend, a seed (default: {_STEPS}; quick: {_QUICK_STEPS})")
    add("--seeds", type=count, help=f"runs of each way (default: {_SEEDS}; quick: {_QUICK_SEEDS})")
    add("--rates", type=amount, nargs="+", metavar="LR", help="the grid (default: half decades that suit the optimizer)")
    add("--quick", action="store_true", help=f"fewer steps and seeds, {_QUICK_RATES} rates")
    add("--html", metavar="OUT", help="also write a self-contained page")


def run_race_command(arguments: argparse.Namespace) -> Answer:
    """Race, and give the table; exit code 0."""
    from sharpkit.learner.race import default_rates

    _check_folder(arguments.html)
    problem = load_problem(arguments.target)
    steps, seeds, points = (_QUICK_STEPS, _QUICK_SEEDS, _QUICK_RATES) if arguments.quick else (_STEPS, _SEEDS, _RATES)
    result = sk.race(
        problem,
        max_gradients=arguments.steps or steps,
        seeds=range(arguments.seed, arguments.seed + (arguments.seeds or seeds)),
        rates=arguments.rates or default_rates(problem, points=points),
        callback=None if arguments.quiet else tell,
    )
    document, extra = result.to_dict(), {"target": arguments.target, "text": str(result)}
    if arguments.html:
        extra["page"] = _page(arguments, [document], title=f"Ways to a learning rate, raced on {arguments.target}")
    return [document], extra, OK


def load_problem(target: str) -> RaceProblem:
    """Import the file, call the function, check what it returns.

    Args:
        target: ``"file.py:function"``.

    Raises:
        UsageError: no such file or function, or it returned something else.
        TargetError: the file or the function raised; the original error is its cause.
    """
    returned = returned_by(target, _RACE_EXAMPLE)
    return returned if isinstance(returned, sk.RaceProblem) else sk.RaceProblem(**_parts_of(returned, _RACE_KEYS, target, _RACE_EXAMPLE))


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
    for path in (arguments.html, arguments.store):
        _check_folder(path)
    family = load_family(arguments.target)
    for name in ("widths", "depths"):
        sizes = getattr(arguments, name)
        if sizes is not None and len(set(sizes)) < 3:
            raise UsageError(f"--{name} needs at least three different sizes: two give no error of a slope; got {sizes}")
    verdict = sk.transfer.diagnose(
        **family,
        widths=arguments.widths,
        depths=arguments.depths,
        mode="full" if arguments.full else "quick",
        seeds=arguments.seeds,
        store=arguments.store,
        callback=None if arguments.quiet else tell,
    )
    whole = verdict.to_dict()
    # each measurement is a result of its own in the answer, so the verdict does not hold it a second time
    documents = [{key: value for key, value in whole.items() if key != "parts"}, *whole["parts"]]
    extra: Document = {"target": arguments.target, "text": str(verdict)}
    if arguments.html:
        extra["page"] = _page(arguments, documents, title=f"Do hyperparameters of {arguments.target} transfer?")
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
    family = sk.transfer.Family
    returned = returned_by(target, _TRANSFER_EXAMPLE, instead=family)
    if not isinstance(returned, family):
        return _parts_of(returned, _TRANSFER_KEYS, target, _TRANSFER_EXAMPLE)
    if returned.dimension != "width":  # depths come from --depths, by the same build
        came = f"a Family over {returned.dimension}s; transfer starts from one over widths"
        raise UsageError(f"{target} returned {came}.\n{_TRANSFER_EXAMPLE}")
    return {key: getattr(returned, key) for key in _TRANSFER_KEYS}
