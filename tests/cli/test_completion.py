"""`sharpkit completion`: what a shell offers is what the parser takes, asked of the shells themselves."""

from __future__ import annotations

import argparse
import shutil
import subprocess
from pathlib import Path

import pytest

from sharpkit.cli.completion import SHELLS
from sharpkit.cli.main import _parser, main

COMMANDS: dict[str, argparse.ArgumentParser] = next(a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction)).choices


def script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["completion", shell]) == 0
    return capsys.readouterr().out


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "job.py").write_text("def job():\n    pass\n\n\ndef typed() -> int:\n    return 1\n\n\ndef takes(x):\n    pass\n")
    (tmp_path / "notes.txt").touch()
    (tmp_path / "with blank").mkdir()
    return tmp_path


def ask_bash(lines: list[list[str]], folder: Path, text: str) -> list[list[str]]:
    """What bash offers for the last word of each line, with the words as bash parts them."""
    (folder / ".script").write_text(text)
    ask = 'ask() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); _sharpkit; (IFS=";"; printf "%s\\n" "${COMPREPLY[*]}"); }\n'
    calls = "".join("ask " + " ".join(f"'{word}'" for word in line) + "\n" for line in lines)
    done = subprocess.run(["bash", "-c", f"set -u; source .script; {ask}{calls}"], cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return [sorted(line.split(";")) if line else [] for line in done.stdout.splitlines()]


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_bash_offers_every_command_and_option_of_the_parser(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = script("bash", capsys)
    names, *options = ask_bash([["sharpkit", ""], *(["sharpkit", name, "-"] for name in COMMANDS)], folder, text)
    assert set(COMMANDS) < set(names)
    for command, offered in zip(COMMANDS.values(), options, strict=True):
        assert offered == sorted(option for action in command._actions for option in action.option_strings)


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_bash_offers_files_for_a_target_its_functions_and_the_choices_of_options(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = {
        ("measure", ""): ["job.py", "with blank"],  # folders lead to files
        ("measure", "job.py", ":"): ["job", "typed"],  # those that take no arguments; bash parts words at the colon
        ("measure", "job.py", ":", "ty"): ["typed"],
        ("measure", "job.py", ":", "job", "--html", ""): ["job.py", "notes.txt", "with blank"],
        ("spectrum", "job.py", ":", "job", "--offload", ""): ["with blank"],
        ("spectrum", "job.py", ":", "job", "--tol", ""): [],
        ("init", "--kind", ""): ["huggingface", "lightning", "loop"],
        ("init", "--kind", "=", "h"): ["huggingface"],
        ("completion", ""): sorted(SHELLS),
        ("compare", "no"): ["notes.txt"],
    }
    offered = ask_bash([["sharpkit", *line] for line in cases], folder, script("bash", capsys))
    visible = [[name for name in each if name != ".script"] for each in offered]
    assert dict(zip(cases, visible, strict=True)) == cases


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish here")
def test_fish_offers_the_same(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / ".script").write_text(script("fish", capsys))
    lines = ["sharpkit ", "sharpkit init --kind ", "sharpkit measure job.py:", "sharpkit measure --ch"]
    command = "source .script; " + "; ".join(f"complete -C '{line}'; echo @@@" for line in lines)
    done = subprocess.run(["fish", "-c", command], cwd=folder, capture_output=True, text=True, timeout=60)
    offered = [[line.partition("\t")[0] for line in part.split("\n") if line] for part in done.stdout.split("@@@\n")]
    assert set(COMMANDS) <= set(offered[0])
    assert sorted(offered[1]) == ["huggingface", "lightning", "loop"] and sorted(offered[2]) == ["job.py:job", "job.py:typed"]
    assert offered[3] == ["--checkpoint"]


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_is_sound_and_names_every_command_and_long_option(
    shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = script(shell, capsys)
    for name, command in COMMANDS.items():
        assert name in text
        for action in command._actions:
            for option in (option for option in action.option_strings if option.startswith("--")):
                assert (f" -l {option[2:]}" if shell == "fish" else option) in text
    if shutil.which(shell) is not None:
        (tmp_path / "script").write_text(text)
        done = subprocess.run([shell, "-n", "script"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
