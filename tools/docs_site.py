"""What the documentation site needs besides docs/: figures, experiments and the changelog, in the places that the pages link to.

A hook of mkdocs, which `make docs` runs. The pages lie in docs/ and link to ../figures, ../experiments and ../CHANGELOG.md, as a reader
of the repository needs them to; on the site these lie beside the pages.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_BESIDE = {"figures": "*.png", "experiments": "*.py", "experiments/results": "*.jsonl"}
_SINGLE = ("CONTRIBUTING.md", "README.md", "SECURITY.md", "LICENSE")


def on_config(config: Any) -> Any:
    """Say at the foot of every page which version it is about."""
    config.copyright = version_line(
        (ROOT / "sharpkit" / "__init__.py").read_text(encoding="utf-8"), (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    )
    return config


def version_line(package: str, changes: str) -> str:
    """The version of the package's source, with the day of its release as the changelog has it.

    Example:
        >>> version_line('__version__ = "0.2.0"', "## [0.2.0] - 2027-01-15")
        'sharpkit 0.2.0, released 2027-01-15'
        >>> version_line('__version__ = "0.2.0"', "## [Unreleased] ## [0.2.0] - 2027-01-15")
        'sharpkit after 0.2.0, not released'
    """
    version = re.search(r'^__version__ = "(.+)"$', package, flags=re.MULTILINE)
    number = version[1] if version is not None else "of unknown version"
    released = re.search(rf"## \[{re.escape(number)}\] - (\S+)", changes)
    if "## [Unreleased]" in changes:
        return f"sharpkit {'after ' if released else ''}{number}, not released"
    return f"sharpkit {number}" + (f", released {released[1]}" if released else ", not released")


def on_files(files: Any, config: Any) -> Any:
    """Put them among the site's files."""
    from mkdocs.structure.files import File

    for folder, pattern in _BESIDE.items():
        for path in sorted((ROOT / folder).glob(pattern)):
            files.append(File.generated(config, f"{folder}/{path.name}", abs_src_path=str(path)))
    for name in _SINGLE:  # as text: they are pages of the repository, not of the site
        files.append(File.generated(config, f"repository/{name}.txt", content=(ROOT / name).read_text(encoding="utf-8")))
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").replace("](docs/", "](")
    files.append(File.generated(config, "changelog.md", content=changes))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links out of docs/ become links beside it."""
    up = "../" * page.file.src_uri.count("/")
    markdown = re.sub(r"\]\((?:\.\./)+((?:figures|experiments)/[^)#]+)", rf"]({up}\1", markdown)
    markdown = re.sub(r"\]\((?:\.\./)+CHANGELOG\.md", f"]({up}changelog.md", markdown)
    return re.sub(r"\]\((?:\.\./)+(CONTRIBUTING\.md|README\.md|SECURITY\.md|LICENSE)", rf"]({up}repository/\1.txt", markdown)
