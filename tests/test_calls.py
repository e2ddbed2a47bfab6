"""What public calls share: a bar where one lasts and somebody looks, and the name of a result."""

from __future__ import annotations

import inspect
import io
import re
import sys
import time
import typing
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import sharpkit as sk
from sharpkit import _calls
from sharpkit._results import Progress, Result
from sharpkit.cli.main import main

SPACES = [sk, *(module for name in sk.__all__ if inspect.ismodule(module := getattr(sk, name)))]
FUNCTIONS = {f"{space.__name__}.{name}": getattr(space, name) for space in SPACES for name in space.__all__}
FUNCTIONS = {name: function for name, function in FUNCTIONS.items() if inspect.isfunction(function)}
# A comparison has names=, a plan takes another call's arguments, a parametrisation is no measurement, and a file has a name.
UNNAMED = {"sharpkit.compare", "sharpkit.plan", "sharpkit.transfer.parametrize", "sharpkit.monitor.sinks.read_run"}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


Stream = typing.TypeVar("Stream", bound=io.StringIO)


def put(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> Stream:
    """In the place of stderr, as the bars see it: pytest changes sys.stderr itself between a fixture and its test."""
    monkeypatch.setattr(_calls, "sys", SimpleNamespace(stderr=stream, modules=sys.modules))
    return stream


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Stderr as a terminal, and bars that come at once."""
    monkeypatch.delenv(_calls.SWITCH, raising=False)
    monkeypatch.setattr(_calls, "SHOWN_AFTER", 0.0)
    return put(Terminal(), monkeypatch)


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[list[Progress]]:
    """What each bar that is made is told."""
    made: list[list[Progress]] = []

    class Recorded(_calls.ProgressBar):
        def __init__(self, *, after: float = 0.0) -> None:
            super().__init__(after=after)
            made.append([])

        def __call__(self, progress: Progress) -> None:
            made[-1].append(progress)
            super().__call__(progress)

    monkeypatch.setattr(_calls, "ProgressBar", Recorded)
    return made


def matrix() -> torch.Tensor:
    return torch.diag(torch.linspace(0.0, 1.0, 60, dtype=torch.float64))


def problem() -> tuple[sk.Objective, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
    objective = sk.Objective(model, (torch.randn(16, 3).double(), torch.randint(2, (16,))), loss=F.cross_entropy)
    return objective, torch.optim.SGD(model.parameters(), lr=0.1)


def test_a_call_on_a_terminal_shows_a_bar_that_counts_and_foretells_and_is_gone_afterwards(terminal: Terminal) -> None:
    sk.spectral_density(matrix(), num_probes=3, num_steps=10)
    drawn = terminal.getvalue()
    assert re.search(r"100%\|.*\| 30 of 30 products, \d+ s, about 0 s left", drawn)
    assert " 0 of" not in drawn  # nothing is drawn before it is known
    assert drawn.endswith("\r") and not drawn.split("\r")[-2].strip()  # the line is cleared


def test_a_bar_comes_after_five_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    stderr = put(Terminal(), monkeypatch)
    with _calls.ProgressBar(after=_calls.SHOWN_AFTER) as bar:
        for now[0], seen in ((104.9, False), (105.0, True)):
            bar(Progress(3, 12, now[0] - 100, 15.0, "search", unit="runs"))
            assert bool(stderr.getvalue()) == seen
    assert "search:  25%" in stderr.getvalue() and "3 of 12 runs, 5 s, about 15 s left" in stderr.getvalue()


@pytest.mark.parametrize(("switch", "on_terminal", "seen"), [("", False, False), ("1", False, True), ("0", True, False), ("", True, True)])
def test_without_a_terminal_there_is_no_bar_and_the_environment_decides_otherwise(
    switch: str, on_terminal: bool, seen: bool, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = terminal if on_terminal else io.StringIO()
    put(stream, monkeypatch)
    monkeypatch.setenv(_calls.SWITCH, switch)
    sk.eigenpairs(matrix(), k=1)
    assert bool(stream.getvalue()) == seen


def test_a_callback_takes_the_place_of_the_bar(terminal: Terminal) -> None:
    told: list[Progress] = []
    sk.eigenpairs(matrix(), k=1, callback=told.append)
    assert told and not terminal.getvalue()


@pytest.mark.usefixtures("terminal")
def test_calls_within_a_call_have_no_bar_of_their_own(bars: list[list[Progress]]) -> None:
    objective, optimizer = problem()
    sk.measure(objective, optimizer=optimizer)
    sk.per_layer(objective)
    sk.examine(objective)
    assert [bool(told) for told in bars] == [True] * 3
    assert [told[-1].unit for told in bars] == ["products", "products", "checks"]


def test_no_bar_enters_a_training_loop(terminal: Terminal, bars: list[list[Progress]]) -> None:
    objective, optimizer = problem()
    (batch,) = objective.batches()
    model, data = objective.model, (batch.data if hasattr(batch, "data") else batch)
    every: Any = {"every": 1, "metrics": ["lambda_max", "trace", "preconditioned_lambda_max"]}
    with sk.Monitor(model, optimizer, loss=F.cross_entropy, **every) as monitor:
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(data[0]), data[1]).backward()
            monitor.step(data)
            optimizer.step()
    assert monitor.history and not bars and not terminal.getvalue()


def test_a_bar_that_cannot_be_drawn_ends_no_call(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(text: str) -> int:
        raise BrokenPipeError("the terminal is gone")

    monkeypatch.setattr(terminal, "write", broken)
    assert float(sk.eigenpairs(matrix(), k=1).values[0]) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.usefixtures("terminal")
def test_the_numbers_are_the_same_with_and_without_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = sk.trace(matrix(), rtol=0.2)
    monkeypatch.setenv(_calls.SWITCH, "0")
    silent = sk.trace(matrix(), rtol=0.2)
    assert (shown.value, shown.stderr, shown.num_matvecs) == (silent.value, silent.stderr, silent.num_matvecs)


def test_an_interrupted_call_clears_its_bar(terminal: Terminal) -> None:
    calls = []

    def product(vector: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 20:
            raise KeyboardInterrupt
        return matrix() @ vector

    operator = sk.as_operator(product, size=60, dtype=torch.float64)
    with pytest.raises(KeyboardInterrupt):
        sk.spectral_density(operator, num_probes=4, num_steps=20)
    assert "%" in terminal.getvalue() and terminal.getvalue().endswith("\r")


def test_the_command_line_shows_the_same_bar_unless_it_is_to_be_quiet(terminal: Terminal, tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(
        "import torch, sharpkit as sk\n\ndef job():\n    torch.manual_seed(0)\n    model = torch.nn.Linear(4, 2)\n"
        "    return sk.Objective(model, (torch.randn(8, 4), torch.randn(8, 2)), loss=torch.nn.functional.mse_loss)\n"
    )
    assert main(["measure", f"{tmp_path}/job.py:job", "--json"]) == 0
    assert re.search(r"\d+ of \d+ products", terminal.getvalue())
    terminal.truncate(0)
    assert main(["measure", f"{tmp_path}/job.py:job", "--json", "--quiet"]) == 0
    assert "products" not in terminal.getvalue()


@pytest.mark.parametrize("name", [name for name, f in FUNCTIONS.items() if "callback" in inspect.signature(f).parameters])
def test_every_call_with_a_callback_shows_the_bar(name: str) -> None:
    assert FUNCTIONS[name].__code__.co_name == "calling"  # the outermost: what it wraps must not see name, and see the bar


def returned(function: Callable[..., Any]) -> Any:
    return typing.get_type_hints(function, localns={"Axes": object, **{name: getattr(sk, name) for name in sk.__all__}})["return"]


def test_every_call_that_returns_a_result_takes_its_name() -> None:
    without = []
    for name, function in FUNCTIONS.items():
        kind = returned(function)
        if isinstance(kind, type) and issubclass(kind, Result) and kind._layout.kind and name not in UNNAMED:
            asked = inspect.signature(function).parameters.get("name")
            if asked is None or asked.kind is not asked.KEYWORD_ONLY or function.__code__.co_name != "calling":
                without.append(name)
    assert not without, 'put @public_call above each, and name: str = "" last in its arguments (sharpkit/_calls.py)'


def test_a_name_travels_with_the_result_and_changes_no_number(tmp_path: Path) -> None:
    objective, optimizer = problem()
    for call in (
        lambda **name: sk.eigenpairs(matrix(), k=2, **name),
        lambda **name: sk.stable_learning_rate(4.0, **name),  # a float
        lambda **name: sk.critical_learning_rate(objective, optimizer, **name),
        lambda **name: sk.per_layer(objective, **name),  # a field of its own
    ):
        named, plain = call(name="after warm-up"), call()
        assert named.name == "after warm-up" and named.to_dict()["name"] == "after warm-up"
        assert plain.name in ("", "model")
        ignored = ("name", "seconds", "lambda_max", "trace", "findings")
        numbers = [{key: value for key, value in each.to_dict().items() if key not in ignored} for each in (named, plain)]
        assert str(numbers[0]) == str(numbers[1])
    assert float(sk.stable_learning_rate(4.0, name="a")) == 0.5
    with pytest.raises(TypeError, match="name"):
        sk.stable_learning_rate(4.0, name=3)  # type: ignore[arg-type]


def test_a_checkpoint_goes_on_under_another_name(tmp_path: Path) -> None:
    first, again = (sk.spectral_density(matrix(), num_probes=2, num_steps=8, checkpoint=tmp_path / "c", name=name) for name in "ab")
    assert (first.name, again.name) == ("a", "b") and first.seconds == again.seconds


def test_a_warning_names_the_line_that_made_the_call() -> None:
    objective, _ = problem()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sk.eigenpairs(matrix(), k=1, max_matvecs=3)
        sk.batch_sharpness(objective.by_samples(), batch_size=4, rtol=1e-9, max_batches=4)
    assert [Path(each.filename).name for each in caught] == [Path(__file__).name] * 2
