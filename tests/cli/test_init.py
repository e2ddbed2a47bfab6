"""`sharpkit init`: what it writes runs, by the other commands and by itself; what exists is left as it is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sharpkit.cli.main import main

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "kind", ["loop", pytest.param("huggingface", marks=pytest.mark.slow), pytest.param("lightning", marks=pytest.mark.slow)]
)
def test_what_it_writes_runs(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if kind != "loop":
        pytest.importorskip({"huggingface": "transformers"}.get(kind, kind))
    monkeypatch.chdir(tmp_path)
    assert main(["init", "mine.py", "--kind", kind]) == 0
    said = capsys.readouterr().out
    assert "sharpkit doctor mine.py:job" in said and "python mine.py" in said
    assert "sharpkit doctor mine.py:job" in (tmp_path / "mine.py").read_text()
    assert main(["measure", "mine.py:job", "--probes", "3", "--steps", "6", "--quiet"]) in (0, 3)
    assert "lambda_max" in capsys.readouterr().out
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "mine.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert '"monitor_record"' in (tmp_path / "run.jsonl").read_text()


def test_what_exists_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.py").write_text("mine")
    assert main(["init"]) == 2
    assert (tmp_path / "job.py").read_text() == "mine"
    assert "job.py exists and is left as it is" in capsys.readouterr().err
    assert main(["init", "job.txt"]) == 2
    assert main(["init", "nowhere/job.py"]) == 2
