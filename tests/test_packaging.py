"""The package as installed: light to import, complete, typed, and consistent with its metadata."""

from __future__ import annotations

import ast
import doctest
import os
import re
import subprocess
import sys
import tomllib
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import sharpkit as sk

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def modules_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_import_loads_nothing_heavy() -> None:
    loaded = modules_after("import sharpkit")
    assert not loaded & {"torch", "numpy", "scipy", "matplotlib", "jinja2", "tqdm", "sklearn", "transformers", "lightning", "wandb"}


def test_measuring_loads_no_plots_templates_or_trainers() -> None:
    loaded = modules_after("import sharpkit as sk; sk.measure; sk.examine; sk.eigenpairs; sk.Objective; sk.per_layer")
    assert "torch" in loaded
    assert not loaded & {"matplotlib", "jinja2", "sklearn", "transformers", "lightning", "tensorboard", "wandb"}


@pytest.mark.parametrize("name", sk.__all__)
def test_every_public_name_exists_and_is_documented(name: str) -> None:
    value = getattr(sk, name)
    if name == "METRICS":  # a table, by name of the metric: its comment says what it holds
        assert all(type(metric).__module__.startswith("sharpkit.") for metric in value.values())
        return
    assert value.__name__.rpartition(".")[2] == name
    assert value.__doc__
    assert (value.__name__ if isinstance(value, ModuleType) else value.__module__).startswith("sharpkit.")


def test_the_sinks_are_there_without_torch_or_loggers() -> None:
    loaded = modules_after("import sharpkit as sk; sk.sinks.jsonl; sk.sinks.read_run")
    assert not loaded & {"torch", "numpy", "matplotlib", "tensorboard", "wandb"}


def test_an_unknown_name_is_an_attribute_error_and_dir_lists_the_public_ones() -> None:
    with pytest.raises(AttributeError, match="no attribute 'lambda_maxx'"):
        sk.lambda_maxx  # noqa: B018
    assert set(sk.__all__) <= set(dir(sk))


def test_the_lazy_table_matches_the_imports_that_type_checkers_read() -> None:
    tree = ast.parse((ROOT / "sharpkit" / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {alias.asname: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert typed == sk._HOME


def test_versions_agree(pyproject: dict[str, Any]) -> None:
    citation = (ROOT / "CITATION.cff").read_text()
    assert pyproject["project"]["version"] == sk.__version__
    assert f"version: {sk.__version__}" in citation


def test_package_data_is_there() -> None:
    files = resources.files("sharpkit")
    assert files.joinpath("py.typed").is_file()
    assert files.joinpath("reporting/templates/report.html.j2").is_file()


def test_torch_has_a_floor_and_no_cap(pyproject: dict[str, Any]) -> None:
    requirement = next(r for r in pyproject["project"]["dependencies"] if r.startswith("torch"))
    assert requirement.startswith("torch>=")
    assert "<" not in requirement
    assert "==" not in requirement


def test_only_the_command_line_prints() -> None:
    printing = {
        path.name
        for path in (ROOT / "sharpkit").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    }
    assert printing <= {"main.py", "output.py"}


FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


@pytest.mark.parametrize("form", [path for path in FORMS if path.stem != "config"], ids=lambda path: path.stem)
def test_an_issue_form_has_what_a_form_needs(form: Path) -> None:
    yaml = pytest.importorskip("yaml")
    document = yaml.safe_load(form.read_text())
    assert set(document) == {"name", "description", "labels", "body"} and document["labels"]
    asked = [item for item in document["body"] if item["type"] != "markdown"]
    names = [item["id"] for item in asked]
    assert len(names) == len(set(names)) and all(item["attributes"]["label"] for item in asked)
    assert any(item.get("validations", {}).get("required") for item in asked)


@pytest.mark.parametrize("path", [*FORMS, ROOT / "SECURITY.md"], ids=lambda path: path.name)
def test_no_address_is_invented(path: Path) -> None:
    assert not re.search(r"https?://|\w@\w", path.read_text())


def test_the_foot_of_the_documentation_says_which_version_it_is_of() -> None:
    from tools import docs_site

    assert doctest.testmod(docs_site).failed == 0
    line = docs_site.version_line((ROOT / "sharpkit" / "__init__.py").read_text(), (ROOT / "CHANGELOG.md").read_text())
    assert sk.__version__ in line and "not released" in line
