"""What the README and the pages show runs as it stands."""

from __future__ import annotations

import copy
import doctest
import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import sharpkit as sk
from sharpkit.monitor import metrics
from sharpkit.optimizers import kinds
from sharpkit.reporting import sections

# What the examples register, they register for the test alone.
REGISTERED = ((metrics, "METRICS"), (kinds, "_KINDS"), (sections, "_SECTIONS"))
ROOT = Path(__file__).parents[1]
PAGES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))


def _python_blocks(path: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.DOTALL)


def test_the_readmes_examples_run_one_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in _python_blocks(ROOT / "README.md"):
        exec(compile(block, "README.md", "exec"), names)
    assert "lambda_max" in capsys.readouterr().out
    assert (tmp_path / "sharpness.html").read_text().lstrip().lower().startswith("<!doctype html>")


def test_the_tutorial_runs_from_its_first_block_to_its_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in _python_blocks(ROOT / "docs" / "tutorial.md"):
        exec(compile(block, "tutorial.md", "exec"), names)
    said = capsys.readouterr().out
    assert "after: " in said and "of the path's squared distances" in said
    assert "<svg" in (tmp_path / "tutorial.html").read_text()


def test_every_public_name_has_a_place_in_the_reference_and_an_example_if_it_is_called() -> None:
    pages = "".join(path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md"))
    shown = re.findall(r"^::: (\S+)$", pages, flags=re.MULTILINE)
    assert len(shown) == len(set(shown))
    for where in shown:
        module, _, name = where.rpartition(".")
        assert hasattr(importlib.import_module(module), name), where
    assert "`sk.METRICS`" in pages
    without = []
    for space in (sk, sk.transfer, sk.laws, sk.measures, sk.sinks):
        for name in space.__all__:
            value = getattr(space, name)
            if inspect.ismodule(value) or name == "METRICS":
                continue
            assert name in [where.rpartition(".")[2] for where in shown], name
            if inspect.isfunction(value) and ">>> " not in (value.__doc__ or ""):
                without.append(name)
    assert not without, "functions whose docstring shows no call"


def test_the_examples_for_those_who_come_from_elsewhere_run_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in _python_blocks(ROOT / "docs" / "coming_from.md"):
        exec(compile(block, "coming_from.md", "exec"), names)
    assert (tmp_path / "example.pdf").exists() and (tmp_path / "run.jsonl").exists()


def test_the_examples_of_the_page_on_extending_run_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for module, table in REGISTERED:
        monkeypatch.setattr(module, table, dict(getattr(module, table)))
    page = ROOT / "docs" / "extending.md"
    blocks = "\n".join(_python_blocks(page))
    examples = doctest.DocTestParser().get_doctest(blocks, {}, page.name, str(page), 0)
    assert len(examples.examples) == blocks.count(">>> ")
    said: list[str] = []
    failed, _ = doctest.DocTestRunner().run(examples, out=said.append)
    assert not failed, "".join(said)


def test_every_name_of_the_glossary_is_one_of_the_code() -> None:
    source = " ".join(path.read_text() for path in (ROOT / "sharpkit").rglob("*.py"))
    known = set(re.findall(r"\w+", source))
    cells = re.findall(r"^\| .*? \| (.*?) \|", (ROOT / "docs" / "glossary.md").read_text(), flags=re.MULTILINE)
    names = {name for cell in cells for code in re.findall(r"`([^`]+)`", cell) for name in re.findall(r"[A-Za-z]\w+", code)}
    assert len(names) > 50 and names - known == set()


@pytest.mark.parametrize("page", ["README.md", *PAGES])
def test_every_name_that_the_pages_mention_exists(page: str) -> None:
    names = set(re.findall(r"\bsk\.([A-Za-z_]\w*)", (ROOT / page).read_text()))
    assert not [name for name in names if not hasattr(sk, name)]


def test_every_call_of_the_table_of_ideas_exists() -> None:
    table = (ROOT / "docs" / "mathematics.md").read_text().partition("\n## From the literature to a name\n")[2]
    calls = re.findall(r"`sk\.([\w.]+)`", table)
    assert len(calls) > 30
    for call in calls:
        value = sk
        for part in call.split("."):
            assert hasattr(value, part), f"sk.{call}"
            value = getattr(value, part)
        assert callable(value), f"sk.{call}"
    rows = [row for row in table.splitlines() if row.startswith("| ")][1:]
    assert not [row for row in rows if "`sk." not in row], "ideas without a name"


@pytest.mark.parametrize("page", ["README.md", *PAGES])
def test_links_between_pages_lead_somewhere(page: str) -> None:
    source = ROOT / page
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", source.read_text()):
        assert (source.parent / target).exists(), f"{page} links to {target}"


def _guides_names() -> dict[str, object]:
    """What the guide's blocks take as given."""
    torch.manual_seed(0)
    sample = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    batches = [(torch.randn(8, 6), torch.randint(3, (8,))) for _ in range(45)]  # the monitor's first record comes by step 40
    data = torch.utils.data.TensorDataset(*batches[0])
    matrices, vectors = ([p for p in sample.parameters() if p.ndim == d] for d in (2, 1))
    sgd = torch.optim.SGD(sample.parameters(), lr=0.1, momentum=0.9)
    adamw = torch.optim.AdamW(vectors, lr=1e-3)
    checkpoints = [copy.deepcopy(sample.state_dict())]
    for optimizer in (sgd, adamw):
        F.cross_entropy(sample(batches[0][0]), batches[0][1]).backward()
        optimizer.step()
        checkpoints.append(copy.deepcopy(sample.state_dict()))
    names = {"sk": sk, "torch": torch, "F": F, "nn": torch.nn, "DataLoader": torch.utils.data.DataLoader, "model": sample, "data": data}
    names |= {"x": batches[0][0], "y": batches[0][1], "loader": batches, "T": 30, "optimizer": sgd, "sgd": sgd, "adamw": adamw}
    names |= {"x1": batches[1][0], "y1": batches[1][1], "x2": batches[2][0], "y2": batches[2][1], "checkpoints": checkpoints}
    names |= {"my_loss": lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])}
    names["objective"] = sk.Objective(sample, batches, loss=F.cross_entropy)
    if hasattr(torch.optim, "Muon"):
        names["muon"] = torch.optim.Muon(matrices, lr=0.005)
    return names


@pytest.mark.parametrize("page", ["guide.md", "monitor.md", "learner.md", "layerwise.md"])
def test_the_blocks_of_the_pages_that_take_a_model_as_given_run_with_one(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]):
        names = _guides_names()
        for block in _python_blocks(ROOT / "docs" / page):
            if "muon" in block and "muon" not in names:
                continue
            if any(trainer in block for trainer in ("pl.Trainer", "integrations.transformers")):
                continue  # tests/test_howto.py runs them
            here = "\n".join(line for line in block.splitlines() if '"input_ids"' not in line)  # of a Hugging Face model: there, too
            exec(compile(here, page, "exec"), names)
