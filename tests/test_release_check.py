"""The release check finds what does not fit together."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FILES = ("pyproject.toml", "CHANGELOG.md", "CITATION.cff", "sharpkit/__init__.py")


@pytest.fixture
def check() -> Any:
    spec = importlib.util.spec_from_file_location("release_check", ROOT / "tools" / "release_check.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A checkout of version 0.1.0 that is fit to be released."""
    (tmp_path / "sharpkit").mkdir()
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path / name)
    text = (tmp_path / "CHANGELOG.md").read_text()
    if "## [0.1.0]" not in text:
        (tmp_path / "CHANGELOG.md").write_text(text.replace("## [Unreleased]", "## [0.1.0] - 2026-12-01"))
    return tmp_path


def test_what_fits_passes_and_every_misfit_is_named(check: Any, tree: Path) -> None:
    assert check.problems(tree, "v0.1.0") == []
    assert check.problems(tree, "0.1.0") == ["the tag is '0.1.0', and the version is 0.1.0: name it v0.1.0"]
    for name, before, after, says in (
        ("pyproject.toml", 'version = "0.1.0"', 'version = "0.2.0"', "pyproject.toml says version 0.2.0"),
        ("CITATION.cff", "version: 0.1.0", "version: 0.0.9", "CITATION.cff does not say version: 0.1.0"),
        ("CHANGELOG.md", "## [0.1.0] - 2026-12-01", "## [Unreleased]", "CHANGELOG.md has no heading"),
        ("CHANGELOG.md", "2026-12-01", "soon", "which is no day"),
        ("sharpkit/__init__.py", '__version__ = "0.1.0"', '__version__ = "one"', "has no __version__ of the form"),
    ):
        text = (tree / name).read_text()
        assert before in text
        (tree / name).write_text(text.replace(before, after))
        assert any(says in problem for problem in check.problems(tree)), says
        (tree / name).write_text(text)


def test_metadata_that_an_index_would_show_badly_is_named(check: Any) -> None:
    good = "Name: x\nVersion: 1\nSummary: s\nRequires-Python: >=3.11\nLicense-Expression: MIT\nDescription-Content-Type: text/markdown\n\n"
    assert check.metadata_problems(good + "a" * 600) == []
    assert check.metadata_problems(good.replace("Summary: s\n", "")) == ["the metadata has no Summary", "the description is not the README"]
