"""The notebooks of examples/ are valid, name only public names, and run from their first cell to their last."""

from __future__ import annotations

import ast
import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import sharpkit as sk

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
names = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def _code(path: Path) -> list[str]:
    return ["".join(cell["source"]) for cell in _read(path)["cells"] if cell["cell_type"] == "code"]


def _chains(tree: ast.AST) -> list[list[str]]:
    """Attribute chains that begin with sk: sk.laws.wsd as [laws, wsd]."""
    chains = []
    for node in ast.walk(tree):
        chain, inner = [], node
        while isinstance(inner, ast.Attribute):
            chain.insert(0, inner.attr)
            inner = inner.value
        if chain and isinstance(inner, ast.Name) and inner.id == "sk":
            chains.append(chain)
    return chains


def test_there_are_three_and_the_table_lists_them() -> None:
    table = (ROOT / "examples" / "README.md").read_text()
    assert len(NOTEBOOKS) == 3
    assert all(f"[{path.name}](notebooks/{path.name})" in table for path in NOTEBOOKS)


@names
def test_it_has_the_form_of_nbformat_4_5_and_holds_no_outputs(path: Path) -> None:
    notebook = _read(path)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["language"] == "python"
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[A-Za-z0-9_-]{1,64}", each) for each in ids)
    for cell in notebook["cells"]:
        assert isinstance(cell["source"], list) and cell["metadata"] == {}
        keys = {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            assert set(cell) == keys | {"execution_count", "outputs"}
            assert cell["outputs"] == [] and cell["execution_count"] is None
        else:
            assert cell["cell_type"] == "markdown" and set(cell) == keys


@names
def test_its_code_is_python_without_magics_and_names_only_public_names(path: Path) -> None:
    chains = []
    for source in _code(path):
        chains += _chains(ast.parse(source))
    assert chains
    for chain in chains:
        value: Any = sk
        for part in chain:
            if inspect.ismodule(value):
                assert part in value.__all__, f"sk.{'.'.join(chain)}"
            value = getattr(value, part)


@pytest.mark.slow
@names
def test_it_runs_and_what_its_cells_end_in_can_be_shown(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    from matplotlib import pyplot

    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {"__name__": "__main__"}
    shown = []
    with torch.random.fork_rng(devices=[]):
        for number, source in enumerate(_code(path), 1):
            tree = ast.parse(source, f"{path.name}, code cell {number}")
            last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
            exec(compile(tree, path.name, "exec"), space)
            if isinstance(last, ast.Expr):  # as a notebook does, but without IPython
                value = eval(compile(ast.Expression(last.value), path.name, "eval"), space)
                if hasattr(value, "_repr_html_"):
                    shown.append(value._repr_html_())
    pyplot.close("all")
    assert shown and all(html and ("<table" in html or "<svg" in html) for html in shown)
    assert [page for page in tmp_path.glob("*.html") if "<svg" in page.read_text()]
