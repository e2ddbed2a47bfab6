"""The seven jobs run as they stand, and their table counts its lines and, nearly, its words, within what a person's path may take."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGE = (ROOT / "docs" / "jobs.md").read_text()
SECTIONS = {section.splitlines()[0]: section for section in PAGE.split("\n## ")[1:]}
SLOW = {"The limit at each batch size"}
MOST_LINES, MOST_MINUTES, WORDS_A_MINUTE = 10, 3, 200
SLACK = 30  # words that README.md may gain or lose before the table is counted anew


def _code(section: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    return str(code)


def _lines_of_sharpkit(code: str) -> int:
    """Lines that name sk, or what a line naming it assigned."""
    names, count = {"sk"}, 0
    for line in code.splitlines():
        if names & set(re.findall(r"\w+", line)):
            count += 1
            if assigned := re.match(r"(\w+) = ", line):
                names.add(assigned[1])
    return count


def test_the_table_counts_lines_and_words_and_each_job_is_short() -> None:
    rows = re.findall(r"^\| \[.*?\]\(#.*?\) \| (\d+) \| (\d+) \| (\d+) \| `(.*?)` \|", PAGE, flags=re.MULTILINE)
    assert len(rows) == len(SECTIONS) == 7
    before = len(README.partition("\n## While training")[0].split())
    for (own, lines, words, script), section in zip(rows, SECTIONS.values(), strict=True):
        code = _code(section)
        assert int(own) == _lines_of_sharpkit(code) <= MOST_LINES, section.splitlines()[0]
        assert int(lines) == len([line for line in code.splitlines() if line.strip()]), section.splitlines()[0]
        counted = before + len(section.split())
        assert abs(int(words) - counted) <= SLACK and counted <= MOST_MINUTES * WORDS_A_MINUTE, section.splitlines()[0]
        assert (ROOT / "examples" / script).exists()


@pytest.mark.parametrize("title", [pytest.param(each, marks=pytest.mark.slow if each in SLOW else ()) for each in SECTIONS])
@pytest.mark.filterwarnings("ignore:the learner at step")
def test_it_runs_by_itself_in_an_empty_folder(
    title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]):
        exec(compile(_code(SECTIONS[title]), title, "exec"), {})
    assert capsys.readouterr().out
