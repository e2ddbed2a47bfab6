"""``sharpkit race``: the table, the page, one JSON document, and what is said about targets that are none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sharpkit.cli.commands import load_problem
from sharpkit.cli.main import main
from sharpkit.training_run import RaceProblem

TARGET = """
import torch
from torch import nn

x = torch.randn(48, 4, generator=torch.Generator().manual_seed(0))
batches = [(x[i:i + 16], (x[i:i + 16, 0] > 0).long()) for i in (0, 16)]

def model(seed):
    return nn.Linear(4, 2)

def sgd(params, lr):
    return torch.optim.SGD(params, lr=lr)

def setup():
    print("a user's own print")
    return {"model": model, "optimizer": sgd, "data": batches, "loss": nn.functional.cross_entropy,
            "test_data": [(x[32:], (x[32:, 0] > 0).long())]}

def as_tuple():
    return model, sgd, batches, nn.functional.cross_entropy

def number():
    return 3

def forgets_data():
    return {"model": model, "optimizer": sgd}

def fails():
    raise RuntimeError("no data today")

def needs(width):
    return model
"""


@pytest.fixture
def target(tmp_path: Path) -> str:
    path = tmp_path / "small.py"
    path.write_text(TARGET)
    return str(path)


def test_a_race_prints_a_sorted_table_and_writes_the_page(target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "out.html"
    saved = ["race", f"{target}:setup", "--quick", "--steps", "100", "--rates", "0.01", "0.1", "--html", str(page)]
    assert main(saved) == 0
    out, err = capsys.readouterr()
    assert out.startswith("100 gradients each, 1 seed\n") and "a user's own print" not in out
    rows = {line.split("  ")[0]: line for line in out.splitlines()}
    assert {"entrant", "learner", "constant, lr 0.01", "cosine, lr 0.1", "grid search, then cosine"} <= set(rows)
    assert "test loss" in rows["entrant"] and "the rate was given" in rows["cosine, lr 0.1"]
    assert "One gradient is a forward and a backward pass" in out
    assert "learner: training loss" in err
    text = page.read_text(encoding="utf-8")
    assert "Ways to a learning rate, raced" in text and "grid search, then cosine" in text and "<svg" in text


def test_json_is_one_document(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["race", f"{target}:as_tuple", "--steps", "100", "--seeds", "1", "--rates", "0.01", "0.1", "--json", "--quiet"]) == 0
    out, err = capsys.readouterr()
    (document,) = json.loads(out)["results"]
    assert document["kind"] == "learning_rate_race" and document["budget"] == 100 and document["seeds"] == [0]
    assert "learner" in {finish["name"] for finish in document["finishes"]}
    assert "training loss" not in err


def test_targets(target: str) -> None:
    assert isinstance(load_problem(f"{target}:setup"), RaceProblem)
    assert load_problem(f"{target}:as_tuple").test_data is None


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("number", 2, "returned int.\na TARGET of race is"),
        ("forgets_data", 2, "a dict with the keys model, optimizer.\na TARGET of race is"),
        ("needs", 2, "needs the arguments width"),
        ("absent", 2, "has no function 'absent'"),
        ("fails", 1, "no data today"),
    ],
)
def test_what_is_no_target_is_named(name: str, code: int, said: str, target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["race", f"{target}:{name}"]) == code
    assert said in capsys.readouterr().err


def test_too_short_a_race_is_refused(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["race", f"{target}:setup", "--steps", "10"]) == 1
    assert "of at least 100" in capsys.readouterr().err
