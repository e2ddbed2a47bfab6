"""Every example runs, with --quick, in a folder of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path.name for path in (ROOT / "examples").glob("[!_]*.py"))
DEFAULT: set[str] = set()  # the tutorial shows the same in the default suite, which has no time for them
SAYS = {
    "train_with_monitor.py": "page:",
    "rate_and_curve.py": "train with a peak rate of",
    "learner.py": "test loss",
    "two_checkpoints.py": "of the path's squared distances",
    "adamw_and_muon.py": "of its limit",
    "mup_check.py": "parametrised: ",
    "landscape.py": "page:",
    "lora.py": "B: lambda_max",
}


def test_every_example_is_in_the_table() -> None:
    table = (ROOT / "examples" / "README.md").read_text()
    assert sorted(SAYS) == SCRIPTS
    assert all(f"[{name}]({name})" in table for name in SCRIPTS)


@pytest.mark.parametrize("name", [name if name in DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in SCRIPTS])
def test_it_runs(name: str, tmp_path: Path) -> None:
    if name == "lora.py":
        pytest.importorskip("transformers")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(ROOT / "examples" / name), "--quick"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert SAYS[name] in done.stdout
