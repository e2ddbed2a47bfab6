"""``sharpkit transfer``: exit codes, the page, the store, and what is said about targets that are none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sharpkit.cli.commands import load_family
from sharpkit.cli.main import main

TARGET = """
import torch
from torch import nn
from sharpkit.transfer.setup import Family

x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
data = [(x, (x[:, 0] > 0).long())]

def model(width):
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))

def adam(model, width):
    return torch.optim.Adam(model.parameters(), lr=1e-3)

def standard():
    print("a user's own print")
    return model, adam, data, nn.functional.cross_entropy

class Same(nn.Module):
    # the same linear model at every width: whatever is best for one is best for all
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 2)
    def forward(self, x):
        return self.inner(x)

def same():
    return {"build": lambda width: Same(), "optimizer": lambda m, width: torch.optim.SGD(m.parameters(), lr=0.1), "data": data,
            "loss": lambda output, y: (output - nn.functional.one_hot(y)).square().mean()}

family = Family(model, adam, data, nn.functional.cross_entropy)

def returns_family():
    return family

def over_depths():
    return Family(model, adam, data, nn.functional.cross_entropy, dimension="depth")

def returns_number():
    return 3

def forgets_data():
    return {"build": model, "optimizer": adam}

def fails():
    raise RuntimeError("no data today")

def needs(width):
    return model
"""


@pytest.fixture
def target(tmp_path: Path) -> str:
    path = tmp_path / "nets.py"
    path.write_text(TARGET)
    return str(path)


def test_one_rate_for_all_widths_exits_with_3_and_names_the_rule(target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "out.html"
    code = main(["transfer", f"{target}:standard", "--widths", "64,128,256", "--quick", "--html", str(page)])
    out, err = capsys.readouterr()
    assert code == 3
    assert out.startswith("Hyperparameters DO NOT TRANSFER from width 64 to 256: ")
    assert "hidden learning rate" in out and "a user's own print" not in out
    assert "cost over widths" in err
    text = page.read_text(encoding="utf-8")
    assert "Does not transfer" in text and "Coordinate check over widths" in text and "<svg" in text


@pytest.mark.slow
def test_a_family_without_width_transfers_with_0_and_one_json_document(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "runs.jsonl"
    arguments = ["transfer", f"{target}:same", "--widths", "8,16,32", "--json", "--quiet", "--store", str(store)]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    run = json.loads(out)
    verdict, *parts = run["results"]
    assert verdict["kind"] == "transfer_verdict" and verdict["passed"] is True and "parts" not in verdict
    assert [part["kind"] for part in parts] == ["coordinate_check", "sharpness_transfer", "learning_rate_transfer"]
    assert "TRANSFER" not in err
    rows = len(store.read_text().splitlines())
    assert rows == parts[-1]["num_runs"]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["results"][-1]["num_runs"] == 0
    assert len(store.read_text().splitlines()) == rows


def test_saved_json_makes_the_page_later(target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["transfer", f"{target}:standard", "--widths", "64,128,256", "--json", "--quiet"])
    saved = tmp_path / "saved.json"
    saved.write_text(capsys.readouterr().out)
    page = tmp_path / "later.html"
    assert main(["report", str(saved), "--html", str(page)]) == 0
    assert "Do hyperparameters transfer? Does not transfer" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["standard", "same", "family", "returns_family"])
def test_targets_may_be_tuples_dicts_and_families(target: str, name: str) -> None:
    found = load_family(f"{target}:{name}")
    assert callable(found["build"]) and callable(found["optimizer"]) and found["data"] is not None


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("returns_number", 2, "returned int"),
        ("forgets_data", 2, "a dict with the keys build, optimizer"),
        ("over_depths", 2, "a Family over depths"),
        ("needs", 2, "needs the arguments width"),
        ("nothing", 2, "has no function 'nothing'"),
        ("fails", 1, "no data today"),
    ],
)
def test_other_targets_are_refused_with_an_example(
    target: str, name: str, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["transfer", f"{target}:{name}", "--widths", "8,16,32"]) == code
    err = capsys.readouterr().err
    assert message in err
    assert code == 1 or "return make_model, make_optimizer, data, loss" in err
    assert "sk.Objective" not in err


def test_usage_is_checked_before_any_work(target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["transfer", f"{target}:same", "--widths", "8,16"]) == 2
    assert "--widths needs at least three" in capsys.readouterr().err
    assert main(["transfer", f"{target}:same", "--widths", "8,16,32", "--html", str(tmp_path / "no" / "page.html")]) == 2
    assert "does not exist" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["transfer", f"{target}:same", "--widths", "8,x"])
    assert "whole number" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["transfer", f"{target}:same", "--widths", "8,16,32", "--quick", "--full"])


def test_a_store_that_is_another_file_is_refused_and_kept(target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "notes.txt"
    other.write_text("notes\nmore\n")
    assert main(["transfer", f"{target}:same", "--widths", "8,16,32", "--store", str(other), "--quiet"]) == 1
    assert "no finished run of a sweep" in capsys.readouterr().err
    assert other.read_text() == "notes\nmore\n"
