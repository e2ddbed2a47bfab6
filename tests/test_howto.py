"""Every how-to page runs as it stands, and what it says can go wrong goes wrong with the message that it quotes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import sharpkit as sk
from sharpkit.optimizers import kinds

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs" / "howto").glob("*.md"))
NEEDS = {"huggingface.md": "transformers", "lightning.md": "lightning"}
PROCESSES = "torchrun.md"  # runs on two
_FAULT = re.compile(r"```py\n(.*?)```\n\n```text\n(.*?)```", flags=re.DOTALL)


def _slow(path: Path) -> Any:
    return pytest.param(path, marks=pytest.mark.slow if path.name in NEEDS else (), id=path.stem)


@pytest.mark.parametrize("path", [_slow(path) for path in PAGES if path.name != PROCESSES])
def test_it_runs_and_fails_as_it_says(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if path.name in NEEDS:
        pytest.importorskip(NEEDS[path.name])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(kinds, "_KINDS", dict(kinds._KINDS))
    names: dict[str, Any] = {}
    text = path.read_text()
    examples, faults = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL), _FAULT.findall(text)
    assert examples and len(faults) == text.count("```py\n") == text.count("```text\n") and faults
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        if path.name in NEEDS:
            warnings.simplefilter("ignore")  # the trainers' own
        for example in examples:
            exec(compile(example, path.name, "exec"), names)
        assert capsys.readouterr().out
        for source, message in faults:
            with pytest.raises((sk.SharpkitError, ValueError, TypeError)) as caught:
                exec(compile(source, path.name, "exec"), names)
            assert " ".join(message.split()) in " ".join(str(caught.value).split())


@pytest.mark.slow
def test_the_page_on_torchrun_gives_the_same_numbers_on_one_process_and_on_two(tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "howto" / PROCESSES).read_text(), flags=re.DOTALL)
    (tmp_path / "script.py").write_text(example)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    values = []
    for processes in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "script.py"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        values.append([float(re.search(rf"{name} +(\S+)", done.stdout)[1]) for name in ("lambda_max", "loss")])  # type: ignore[index]
    assert values[0] == pytest.approx(values[1], rel=1e-4)


def test_each_page_asks_one_question_and_is_in_the_index_and_the_navigation() -> None:
    index, site = (ROOT / "docs" / "guide.md").read_text(), (ROOT / "mkdocs.yml").read_text()
    assert len(PAGES) >= 12
    for path in PAGES:
        text = path.read_text()
        assert len(re.findall(r"^# ", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)) == 1, path.name
        assert "## What can go wrong" in text, path.name
        assert f"](howto/{path.name})" in index, path.name
        assert f"- howto/{path.name}\n" in site, path.name
