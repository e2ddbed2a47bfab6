"""Do the tests notice a changed line? Runs mutants of the numerical core, made by cosmic-ray, against the tests of each module.

    make mutants                            the planted mutants and a fixed sample of each module (about 20 minutes on two cores)
    make mutants MUTANTS="--seed 1"         another sample; it tells whether the tests only fit the first
    make mutants MUTANTS="--per-module all"    every mutant of every module (hours)
    make mutants MUTANTS="--only tracking --list"    the mutants of one module, without running them

cosmic-ray writes its mutants into the source files, and starts a process for each. Here they never touch the disk: torch and pytest
are imported once, every mutant runs in a fork of that process, and there the mutated text takes the place of the file when the module
is imported. That saves about five seconds a mutant, and an interrupted run leaves nothing to mend.

tools/mutants.toml names the modules with their tests, the planted mutants, and the survivors that no test should catch, with the reason.
Exit status: 0 if every planted mutant is caught, no survivor is unexplained and the share caught reaches the target; else 1.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import re
import resource
import signal
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread a mutant, and no thread pool that a fork would lose
os.environ.setdefault("MPLBACKEND", "Agg")

import parso.tree
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "tools" / "mutants.toml"
# Shifts and bit masks of floats raise TypeError, `is` between numbers is never meant, a removed @property or @dataclass cannot be imported
# or called: such mutants are caught by any test, and would only make the share caught look better.
LEFT_OUT = re.compile(
    r"Shift|Bit|RemoveDecorator|_Invert|_(Eq|NotEq|Lt|LtE|Gt|GtE)_Is|_Is_(Eq|NotEq|Lt|LtE|Gt|GtE)|_IsNot_(Eq|NotEq|Lt|LtE|Gt|GtE)|Variable"
)
TEST_SECONDS = 60.0  # the slowest test takes ten; a mutant that takes longer loops
MEMORY = 6 * 2**30  # bytes of data a mutant may hold; the tests need about one


@dataclass(frozen=True)
class Mutant:
    """One change of one module."""

    path: str
    name: str  # the operator, or "planted"
    line: int
    before: str
    after: str
    code: str = field(repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.path}:{self.line} [{self.name}]\n    - {self.before}\n    + {self.after}"


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant."""

    mutant: Mutant
    caught: bool
    by: str  # the test that failed, "time", or "memory or crash"
    seconds: float
    why: str = ""  # a survivor's explanation


# -- making mutants -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Change:
    """What one operator can do at one place of a module; the mutant itself is made when it is needed, which takes a tenth of a second."""

    place: tuple[int, int]  # line and column
    operator: str
    occurrence: int  # of the operator in the module
    variant: int  # of the operator at the place: a number goes up or down by 1

    def mutant(self, path: str, source: str) -> Mutant | None:
        """None where the changed text is no Python."""
        code = mutate_code(source, get_operator(self.operator)(), self.occurrence)
        if code is None or not _compiles(code):
            return None
        return Mutant(path, self.operator.rpartition("/")[2], self.place[0], *_changed(source, code), code)


def changes(source: str, within: str = "") -> dict[tuple[int, int], list[Change]]:
    """All that can be changed in a module, by place.

    Args:
        source: text of the module.
        within: regular expression for the names of the classes and functions at the top level to change; by default the whole module.
    """
    nodes = list(ast_nodes(get_ast(source)))
    by_place: dict[tuple[int, int], list[Change]] = {}
    for name in operator_names():
        operator_class = get_operator(name)
        if LEFT_OUT.search(name) or operator_class.arguments():
            continue
        operator = operator_class()
        places = [(node, start) for node in nodes for start, _ in operator.mutation_positions(node)]
        seen: Counter[tuple[int, int]] = Counter()
        for occurrence, (node, place) in enumerate(places):
            seen[place] += 1
            if not _is_syntax(node) and (not within or re.fullmatch(within, _definition(node))):
                by_place.setdefault(place, []).append(Change(place, name, occurrence, seen[place]))
    return by_place


def _is_syntax(node: parso.tree.NodeOrLeaf) -> bool:
    """The bare * of a parameter list, which cosmic-ray takes for a product."""
    return node.parent is not None and node.parent.type == "parameters"


def _definition(node: parso.tree.NodeOrLeaf) -> str:
    """The class or function at the top level that a node stands in."""
    while node.parent is not None and node.parent.type not in ("file_input", "decorated"):
        node = node.parent
    return node.name.value if node.type in ("classdef", "funcdef") else ""


def _compiles(code: str) -> bool:
    try:
        ast.parse(code)
    except SyntaxError:
        return False
    return True


def _changed(source: str, code: str) -> tuple[str, str]:
    """The lines that differ, bare."""
    lines = list(difflib.ndiff(source.splitlines(), code.splitlines()))
    before, after = (" ".join(_bare(line[2:]) for line in lines if line.startswith(sign)) for sign in ("- ", "+ "))
    return before, after


def _bare(line: str) -> str:
    """Without indentation and comment, which may change while the mutant stays the same."""
    return re.sub(r"\s+# .*", "", line).strip()


def sample(path: str, count: int | None, seed: int, within: str = "") -> list[Mutant]:
    """A fixed choice: ``count`` places of the module and one mutant at each, or everything.

    The order is that of a hash of the line's text, so that edits elsewhere in the file, and of comments, leave the choice as it is.
    """
    source = (ROOT / path).read_text()
    lines, by_place, seen, chosen = source.splitlines(), changes(source, within), Counter[str](), []
    for place, here in sorted(by_place.items()):
        line = lines[place[0] - 1]
        text = f"{path}|{_bare(line)}|{place[1] - len(line) + len(line.lstrip())}"
        seen[text] += 1
        chosen.append((_digest(f"{seed}|{text}|{seen[text]}"), here))
    made: list[Mutant] = []
    for key, here in sorted(chosen, key=lambda pair: pair[0]):
        if len(made) == count:
            break
        mutants = (c.mutant(path, source) for c in sorted(here, key=lambda c: _digest(f"{key}|{c.operator}|{c.variant}")))
        valid = (mutant for mutant in mutants if mutant is not None)
        made += valid if count is None else islice(valid, 1)
    return made


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def planted(entry: dict[str, str]) -> Mutant:
    """A mutant written down by hand: one piece of text for another."""
    source = (ROOT / entry["path"]).read_text()
    if source.count(entry["before"]) != 1:
        raise SystemExit(f"planted mutant: {entry['before']!r} is {source.count(entry['before'])} times in {entry['path']}, expected once")
    line = source[: source.index(entry["before"])].count("\n") + 1
    return Mutant(entry["path"], "planted", line, entry["before"], entry["after"], source.replace(entry["before"], entry["after"]))


# -- running them -------------------------------------------------------------------------------------------------------------
class _Replacement(importlib.abc.MetaPathFinder, importlib.machinery.SourceFileLoader):
    """Imports one module from a text instead of its file."""

    def __init__(self, mutant: Mutant) -> None:
        name = mutant.path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        importlib.machinery.SourceFileLoader.__init__(self, name, str(ROOT / mutant.path))
        self._code = mutant.code

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.util.spec_from_file_location(fullname, self.path, loader=self) if fullname == self.name else None

    def get_code(self, fullname: str) -> Any:
        return compile(self._code, self.path, "exec", dont_inherit=True)


class _Plugin:
    """What pytest does besides: it imports the mutant, and fails a test that takes too long."""

    def __init__(self, mutant: Mutant | None) -> None:
        self._mutant = mutant

    def pytest_sessionstart(self) -> None:
        if self._mutant is not None:  # not before: pytest's own hook, which rewrites assert, would stand ahead of it
            sys.meta_path.insert(0, _Replacement(self._mutant))

    def pytest_runtest_setup(self, item: Any) -> None:
        signal.signal(signal.SIGALRM, self._expired)
        signal.setitimer(signal.ITIMER_REAL, TEST_SECONDS)

    def pytest_runtest_teardown(self, item: Any) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)

    @staticmethod
    def _expired(*_: Any) -> None:
        raise TimeoutError(f"the test took longer than {TEST_SECONDS:g} s")


def _start(mutant: Mutant | None, tests: Sequence[str]) -> tuple[int, Any]:
    """Fork a process that runs the tests on a mutant (None: on the original); its number and the file it writes to."""
    import pytest

    output = tempfile.TemporaryFile("w+")  # noqa: SIM115  # read and closed where the process is waited for
    process = os.fork()
    if process:
        return process, output
    os.setsid()
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    code = 3
    with contextlib.suppress(BaseException):
        options = ["-x", "-q", "--no-header", "--tb=line", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", str(ROOT)]
        code = int(pytest.main([*options, *tests], plugins=[_Plugin(mutant)]))
    sys.stdout.flush()
    os._exit(code)


def run(jobs: Sequence[tuple[Mutant | None, Sequence[str], float]], workers: int) -> Iterator[tuple[int, bool, str, float]]:
    """Run jobs (mutant, tests, seconds allowed) side by side; yields (index, passed, what failed, seconds) as they end."""
    waiting, running = list(enumerate(jobs)), {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                index, (mutant, tests, allowed) = waiting.pop(0)
                process, output = _start(mutant, tests)
                running[process] = index, output, time.monotonic(), allowed
            for process, (index, output, started, allowed) in list(running.items()):
                ended, status = os.waitpid(process, os.WNOHANG)
                seconds = time.monotonic() - started
                if not ended and seconds > allowed:
                    os.killpg(process, signal.SIGKILL)
                    os.waitpid(process, 0)
                if ended or seconds > allowed:
                    del running[process]
                    output.seek(0)
                    text = output.read()
                    output.close()
                    code = os.waitstatus_to_exitcode(status) if ended else None
                    if code in (4, 5):  # pytest: wrong usage, or no tests
                        raise SystemExit(f"pytest could not run {jobs[index][1]}:\n{text}")
                    yield index, code == 0, "time" if code is None else _failure(text), seconds
            time.sleep(0.02)
    finally:
        for process in running:
            os.killpg(process, signal.SIGKILL)


def _failure(text: str) -> str:
    match = re.search(r"^(?:FAILED|ERROR) (.*?)(?: - (.*))?$", text, re.MULTILINE)
    return f"{match[1]} ({match[2] or ''})" if match else "memory or crash"


def _preload() -> None:
    """Import what all tests need, but nothing of sharpkit: that is imported anew with each mutant."""
    import hypothesis
    import numpy
    import pytest
    import scipy.optimize
    import scipy.signal
    import scipy.sparse.linalg
    import scipy.stats
    import torch
    import torch.func
    import torch.nn.utils.stateless

    torch.set_num_threads(1)
    del hypothesis, numpy, pytest, scipy
    assert not any(name.partition(".")[0] == "sharpkit" for name in sys.modules)


# -- the report ---------------------------------------------------------------------------------------------------------------
def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, help="chooses the sample (default: that of tools/mutants.toml)")
    parser.add_argument("--per-module", help="places changed in each module, or 'all'")
    parser.add_argument("--only", default="", help="modules whose path contains this text")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--list", action="store_true", help="show the mutants and run nothing")
    parser.add_argument("--output", type=Path, help="write every outcome to this JSON lines file")
    options = parser.parse_args()
    config = tomllib.loads(CONFIG.read_text())
    seed = config["seed"] if options.seed is None else options.seed
    asked = options.per_module or config["per_module"]
    chosen = [m for m in config["modules"] if options.only in m["path"]]
    modules = {m["path"]: m["tests"] for m in chosen}
    explained = {(e["path"], e["before"], e["after"]): e["why"] for e in config.get("explained", [])}
    mutants = [planted(entry) for entry in config["planted"] if entry["path"] in modules]
    for m in chosen:
        mutants += sample(m["path"], None if asked == "all" else int(asked), seed, m.get("within", ""))
    if options.list:
        print(*mutants, f"{len(mutants)} mutants", sep="\n")
        return 0

    os.chdir(ROOT)
    _preload()
    started = time.monotonic()
    suites = sorted({tuple(tests) for tests in modules.values()})
    allowed = {}
    for index, passed, what, seconds in run([(None, suite, 1200.0) for suite in suites], options.workers):
        if not passed:
            raise SystemExit(f"the tests fail without any mutant: {what}")
        allowed[suites[index]] = 3 * seconds + 60
    broken = [Mutant(path, "broken", 1, "", "", "raise ImportError") for path in modules]
    for index, passed, _, _ in run([(mutant, modules[mutant.path], 600.0) for mutant in broken], options.workers):
        if passed:
            raise SystemExit(f"the tests listed for {broken[index].path} pass even where it cannot be imported")
    print(f"{len(mutants)} mutants of {len(modules)} modules, seed {seed}; the unchanged code passes in {time.monotonic() - started:.0f} s")

    outcomes = []
    jobs = [(mutant, modules[mutant.path], allowed[tuple(modules[mutant.path])]) for mutant in mutants]
    for index, passed, what, seconds in run(jobs, options.workers):
        mutant = mutants[index]
        why = explained.get((mutant.path, mutant.before, mutant.after), "") if passed else ""
        outcomes.append(Outcome(mutant, not passed, what, seconds, why))
        if passed:
            print(f"SURVIVED {mutant}" + (f"\n    explained: {why}" if why else ""), flush=True)
        if options.output:
            with options.output.open("a") as file:
                entry = {"path": mutant.path, "line": mutant.line, "operator": mutant.name, "before": mutant.before, "after": mutant.after}
                file.write(json.dumps({**entry, "caught": not passed, "by": what, "seconds": round(seconds, 1), "why": why}) + "\n")
    return report(outcomes, modules, config["target"], time.monotonic() - started)


def report(outcomes: Sequence[Outcome], modules: Sequence[str] | dict[str, Any], target: float, seconds: float) -> int:
    """Print the shares caught; the exit status."""
    print(f"\n{'module':<40} {'mutants':>8} {'caught':>7} {'explained':>10} {'survived':>9}")
    for path in modules:
        here = [o for o in outcomes if o.mutant.path == path]
        lost = [o for o in here if not o.caught]
        print(
            f"{path:<40} {len(here):>8} {len(here) - len(lost):>7} {sum(bool(o.why) for o in lost):>10} {sum(not o.why for o in lost):>9}"
        )
    caught = sum(o.caught for o in outcomes)
    share = caught / len(outcomes)
    unexplained = [o for o in outcomes if not o.caught and not o.why]
    hand = [o for o in outcomes if o.mutant.name == "planted"]
    why = sum(bool(o.why) for o in outcomes)
    print(
        f"\n{caught} of {len(outcomes)} caught ({share:.1%}; target {target:.0%}), {why} survivors explained, {len(unexplained)} not; "
        f"{sum(o.caught for o in hand)} of {len(hand)} planted ones caught; {seconds / 60:.0f} minutes"
    )
    return int(share < target or bool(unexplained) or not all(o.caught for o in hand))


if __name__ == "__main__":
    sys.exit(main())
