"""Is this checkout fit to be released? Version and changelog agree, wheel and sdist are built, and both work in a clean environment.

    make release-check            # after `make test lint types contracts docs`; needs no network but for the dependencies

A release is a commit whose tag is v and the version, such as v0.2.0.
"""

from __future__ import annotations

import argparse
import datetime
import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).parents[1]
TRIED = (
    "import sharpkit as sk, torch; [getattr(sk, name) for name in sk.__all__]; m = torch.nn.Linear(2, 1);"
    "o = sk.Objective(m, (torch.eye(2), torch.zeros(2, 1)), loss=torch.nn.functional.mse_loss); print(sk.measure(o).lambda_max)"
)


def problems(root: Path, tag: str | None = None) -> list[str]:
    """What in the sources does not fit together, in sentences."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    version = re.search(r'^__version__ = "(.+)"$', (root / "sharpkit" / "__init__.py").read_text(encoding="utf-8"), flags=re.MULTILINE)
    changes = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    citation = (root / "CITATION.cff").read_text(encoding="utf-8")
    found = []
    if version is None or not re.fullmatch(r"\d+\.\d+\.\d+([ab]\d+|rc\d+)?", version[1]):
        return ["sharpkit/__init__.py has no __version__ of the form 1.2.3"]
    number = version[1]
    if project.get("version", number) != number:
        found.append(f"pyproject.toml says version {project['version']}, sharpkit/__init__.py {number}")
    if f"\nversion: {number}" not in citation.replace('"', ""):
        found.append(f"CITATION.cff does not say version: {number}")
    dated = re.search(rf"^## \[{re.escape(number)}\] - (\S+)$", changes, flags=re.MULTILINE)
    if dated is None:
        found.append(f"CHANGELOG.md has no heading '## [{number}] - {datetime.date.today()}': rename [Unreleased] to it")
    elif not re.fullmatch(r"\d{4}-\d\d-\d\d", dated[1]):
        found.append(f"CHANGELOG.md dates {number} {dated[1]!r}, which is no day such as {datetime.date.today()}")
    if tag is not None and tag != f"v{number}":
        found.append(f"the tag is {tag!r}, and the version is {number}: name it v{number}")
    return found


def metadata_problems(metadata: str) -> list[str]:
    """What a package index would refuse or show badly."""
    fields = Parser().parsestr(metadata)
    wanted = ("Name", "Version", "Summary", "Requires-Python", "License-Expression", "Description-Content-Type")
    found = [
        f"the metadata has no {name}"
        for name in wanted
        if not (fields.get(name) or (name == "License-Expression" and fields.get("License")))
    ]
    return found + ([] if len(fields.get_payload() or "") > 500 else ["the description is not the README"])


def built(folder: Path) -> tuple[Path, Path]:
    """Wheel and sdist."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT)], check=True)
    script = f"import os; os.chdir({str(ROOT)!r}); from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)
    return next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))


def contents(wheel: Path, sdist: Path) -> list[str]:
    """What is missing in, or too much of, the archives."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
    with tarfile.open(sdist) as archive:
        sources = {name.partition("/")[2] for name in archive.getnames()}
    found = metadata_problems(metadata)
    needed = ("sharpkit/py.typed", "sharpkit/reporting/templates/report.html.j2", "sharpkit/cli/templates/loop.py.in")
    found += [f"{name} is not in the wheel" for name in needed if name not in names]
    found += [
        f"{name} is in the wheel and belongs to no package" for name in names if name.split("/")[0] in ("tests", "experiments", "tools")
    ]
    return found + [f"{name} is not in the sdist" for name in (*needed, "LICENSE", "README.md") if name not in sources]


def main(arguments: list[str] | None = None) -> int:
    """0 where everything fits."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tag", help="of the release, such as v0.2.0")
    parser.add_argument("--sources-only", action="store_true", help="build nothing")
    options = parser.parse_args(arguments)
    found = problems(ROOT, options.tag)
    if not options.sources_only:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            wheel, sdist = built(folder)
            found += contents(wheel, sdist)
            # torch and the rest are taken from here: what is tried is the archive
            venv.create(folder / "clean", with_pip=True)
            python = folder / "clean" / "bin" / "python"
            here = next(path for path in sys.path if path.endswith("site-packages"))
            for archive in (wheel, sdist):
                install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--force-reinstall"]
                subprocess.run([*install, str(archive)], check=True)
                paths = f"import sys; sys.path.append({here!r}); "
                done = subprocess.run([str(python), "-c", paths + TRIED], cwd=folder, capture_output=True, text=True)
                found += [] if done.returncode == 0 else [f"{archive.name} does not work: {done.stderr.strip().splitlines()[-1]}"]
    print("\n".join(f"- {problem}" for problem in found) or "fit to be released")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
