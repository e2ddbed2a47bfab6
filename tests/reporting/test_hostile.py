"""Files that were cut, edited or made up: one typed error that names the place, never a traceback, never a hang."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import mlp

import sharpkit as sk
from sharpkit._results import json_ready, parse_json
from sharpkit.cli.main import main
from sharpkit.cli.output import render_text

DEEP = "[" * 100_000 + "]" * 100_000
HOSTILE: list[Any] = [None, True, -1, 10**400, float("inf"), "x", "", [], {}, [[]], [None], {"a": 1}, [["x"]], "9" * 100, [1.0, "y"]]
HEADER = {"kind": "monitor_run", "version": 1, "model": "Net", "num_parameters": 10, "optimizer": "SGD", "every": "auto", "budget": 0.05}
ENTRY = {"value": 2.0, "stderr": 0.1, "limit": 20.0, "num_matvecs": 3, "seconds": 0.1, "converged": True, "method": "Lanczos"}
RECORD = {"kind": "monitor_record", "version": 1, "step": 3, "loss": 0.4, "lr": 0.1, "values": {"lambda_max": ENTRY}, "failed": {}}
RECORD |= {"events": [{"kind": "spike", "step": 3, "text": "the loss rose"}], "seconds": 0.1, "overhead": 0.02, "batch_size": 8}


def documents() -> dict[str, dict[str, Any]]:
    problem = mlp()
    objective = sk.Objective(problem.model, problem.batches, loss=problem.loss)
    history = sk.CurvatureHistory((0, 10), (1.0, 0.5), (3.0, 19.0), (0.1, 0.1), (20.0, 20.0), (0.1, 0.1))
    results = [sk.measure(objective, num_probes=3, num_steps=4), sk.per_layer(objective), history, sk.Estimate(1.0, 0.1)]
    results.append(sk.eigenpairs(torch.diag(torch.tensor([1.0, 2.0, 5.0])), k=2))
    made = {result.to_dict()["kind"]: json_ready(result.to_dict()) for result in results}
    return made | {"monitor_history": {"kind": "monitor_history", "version": 1, "header": HEADER, "records": [RECORD]}}


def mutations(document: Any, *, depth: int = 3) -> Iterator[Any]:
    """The document with one part left out or replaced, for every part down to a depth."""
    if depth == 0 or not isinstance(document, (dict, list)):
        return
    keys = list(document) if isinstance(document, dict) else range(min(len(document), 2))
    for key in keys:
        for other in HOSTILE:
            changed = copy.copy(document)
            changed[key] = other
            yield changed
        if isinstance(document, dict):
            yield {k: v for k, v in document.items() if k != key}
        for inner in mutations(document[key], depth=depth - 1):
            changed = copy.copy(document)
            changed[key] = inner
            yield changed


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", documents())
def test_a_document_with_a_wrong_field_is_shown_or_refused_in_one_sentence(kind: str) -> None:
    for changed in mutations(documents()[kind]):
        if "kind" in changed:  # the command line refuses a document without one before
            with contextlib.suppress(sk.DocumentError):
                render_text([changed])


def test_a_line_with_a_wrong_field_is_read_or_refused_by_line_and_field(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    for number, good in ((1, HEADER), (2, RECORD)):
        for changed in mutations(good):
            lines = [HEADER, RECORD]
            lines[number - 1] = changed
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
            run, said = None, ""
            try:
                run = sk.sinks.read_run(path)
            except sk.DocumentError as error:
                said = str(error)
            if run is None:
                assert f"run.jsonl, line {number}: " in said
            else:
                render_text([json_ready(run.to_dict())])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (DEEP, "nested too deeply"),
        ('{"kind": "monitor_run", "version": "new"}', "field 'version' must be a whole number, got 'new'"),
        ('{"kind": "monitor_record", "step": 1, "values": {"trace": 3}}', "field 'values' must be an object of metrics"),
        ('{"kind": "monitor_record", "step": 1, "values": {}, "events": [{"step": 1}]}', "field 'events' must be a list of events"),
        ("9" * 5000, "not JSON"),
    ],
    ids=["deep", "version", "values", "events", "digits"],
)
def test_the_command_line_names_file_line_and_field(text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(text + "\n")
    for command in (["report", str(path), "--html", str(tmp_path / "page.html")], ["watch", str(path), "--once"]):
        assert main(command) == 2
        err = capsys.readouterr().err
        assert "run.jsonl, line 1: " in err
        assert said in err
        assert "Traceback" not in err


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"kind": "run", "results": [3]}, "results[0] is no document of a result"),
        ({"kind": "run", "results": [], "command": [1]}, "field 'command' of a run must be a list"),
        ({"kind": "run", "results": [], "seed": {"a": 1}}, "field 'seed' of a run must be a int"),
        ({"kind": ["run"]}, "no results of sharpkit"),
    ],
)
def test_a_saved_run_with_a_wrong_field_is_refused(document: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "saved.json"
    path.write_text(json.dumps(document))
    assert main(["report", str(path), "--html", str(tmp_path / "page.html")]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert "Traceback" not in err


def test_a_document_longer_than_any_is_refused_without_being_parsed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from sharpkit import _results
    from sharpkit.monitor import runs

    for module in (_results, runs):
        monkeypatch.setattr(module, "MAX_JSON", 1000)
    with pytest.raises(sk.DocumentError, match="here: longer than"):
        parse_json(" " * 1001, "here")
    path = tmp_path / "run.jsonl"
    path.write_text("x" * 5000)
    with pytest.raises(sk.DocumentError, match=r"run\.jsonl, line 1: longer than"):
        sk.sinks.read_run(path)


@pytest.mark.parametrize("value", [3, None, [], "estimate"])
def test_what_is_no_dictionary_is_no_document(value: Any) -> None:
    with pytest.raises(sk.DocumentError, match="Estimate is read from a dictionary"):
        sk.Estimate.from_dict(value)


def test_text_is_no_list_of_numbers() -> None:
    document = sk.CurvatureHistory((0,), (1.0,), (3.0,), (0.1,), (20.0,), (0.1,)).to_dict()
    with pytest.raises(sk.DocumentError, match=r"field 'loss' of CurvatureHistory cannot be read: expected a list, got '1'"):
        sk.CurvatureHistory.from_dict({**document, "loss": "1"})
    with pytest.raises(sk.DocumentError, match="the fields of CurvatureHistory do not go together"):
        sk.CurvatureHistory.from_dict({**document, "loss": [1.0, 2.0]})
