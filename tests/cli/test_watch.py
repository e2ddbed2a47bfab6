"""``sharpkit watch``: what is there at once, what comes as it comes, and a clean end."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sharpkit.cli.main import main
from sharpkit.cli.watch import bar

HEADER = {"kind": "monitor_run", "version": 1, "model": "Sequential", "num_parameters": 12345, "optimizer": "SGD", "every": 10, "seed": 3}
EVENT = {"kind": "edge_of_stability", "step": 20, "text": "Edge of stability: lambda_max has stayed there."}


def record(step: int, value: float = 10.0, **changes: Any) -> dict[str, Any]:
    values = {"lambda_max": {"value": value, "stderr": 0.2, "limit": 20.0}}
    return {"kind": "monitor_record", "version": 1, "step": step, "loss": 0.43, "lr": 0.1, "values": values, "overhead": 0.041, **changes}


def write(path: Path, *documents: dict[str, Any], mode: str = "a") -> None:
    with open(path, mode) as stream:
        stream.writelines(json.dumps(document) + "\n" for document in documents)


def test_once_shows_head_values_limit_bar_overhead_and_events(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.jsonl"
    write(path, HEADER, record(10), record(20, 21.0, events=[EVENT], failed={"trace": "OutOfMemoryError: no room"}))
    assert main(["watch", str(path), "--once"]) == 0
    out, err = capsys.readouterr()
    head, first, second, failure, event = out.splitlines()
    assert head.split()[:3] == ["step", "loss", "lr"]
    assert "lambda_max +-" in head
    assert first.split() == ["10", "0.43", "0.1", "10", "+-", "0.2", "20", "0.50", "[=====.....|.....]", "4.1%"]
    assert "1.05 [==========|.....]" in second
    assert failure == "  ! trace failed: OutOfMemoryError: no room"
    assert event == "  * step 20: Edge of stability: lambda_max has stayed there."
    assert "Sequential with 12,345 parameters, trained by SGD" in err


def test_once_shows_the_last_records_and_counts_the_earlier_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.jsonl"
    write(path, HEADER, *(record(s, events=[EVENT] if s < 3 else []) for s in range(50)))
    assert main(["watch", str(path), "--once", "--last", "4"]) == 0
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == ["step", "46", "47", "48", "49"]
    assert "46 earlier records with 3 events are not shown" in err


def test_a_record_without_curvature_or_limit_has_dashes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.jsonl"
    write(path, record(0), record(5, values={}, loss=None, overhead=None))
    assert main(["watch", str(path), "--once"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["5", "-", "0.1", "-", "-", "-", "-"]


def test_json_prints_the_run_as_one_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.jsonl"
    write(path, HEADER, record(10), record(20, 21.0))
    assert main(["watch", str(path), "--once", "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    (result,) = json.loads(line)["results"]
    assert result["kind"] == "monitor_history"
    assert [r["step"] for r in result["records"]] == [10, 20]


def test_quiet_shows_the_table_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.jsonl"
    write(path, HEADER, record(10))
    assert main(["watch", str(path), "--once", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2
    assert err == ""


def test_once_needs_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(tmp_path / "no.jsonl"), "--once"]) == 2
    assert "does not exist; without --once, watch waits for it" in capsys.readouterr().err


def test_a_file_that_is_no_run_is_refused_with_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(json.dumps(HEADER) + "\nhello\n")
    assert main(["watch", str(path), "--once"]) == 2
    assert "line 2: not JSON" in capsys.readouterr().err


def test_an_interval_must_be_positive() -> None:
    with pytest.raises(SystemExit) as caught:
        main(["watch", "run.jsonl", "--interval", "0"])
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("ratio", "drawn"),
    [
        (-1.0, "[..........|.....]"),
        (0.99, "[=========.|.....]"),
        (1.0, "[==========|.....]"),
        (1.5, "[==========|=====]"),
        (9.0, "[==========|====>]"),
    ],
)
def test_the_bar_reaches_its_mark_at_the_limit(ratio: float, drawn: str) -> None:
    assert bar(ratio) == drawn


class Watching:
    """The command in a process of its own, its output line by line."""

    def __init__(self, path: Path) -> None:
        command = [sys.executable, "-m", "sharpkit", "watch", str(path), "--interval", "0.05"]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        self.out: queue.Queue[str] = queue.Queue()
        self.err: queue.Queue[str] = queue.Queue()
        for stream, lines in ((self.process.stdout, self.out), (self.process.stderr, self.err)):
            threading.Thread(target=self._read, args=(stream, lines), daemon=True).start()

    @staticmethod
    def _read(stream: Any, lines: queue.Queue[str]) -> None:
        for line in stream:
            lines.put(line.rstrip("\n"))

    def expect(self, lines: queue.Queue[str], text: str) -> str:
        """The next line that holds the text."""
        seen: list[str] = []
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                seen.append(lines.get(timeout=max(deadline - time.monotonic(), 0.01)))
            except queue.Empty:
                break
            if text in seen[-1]:
                return seen[-1]
        raise AssertionError(f"no line with {text!r} came; these did: {seen}")


@pytest.fixture
def watching(tmp_path: Path, ctrl_c_reaches_what_is_started: None) -> Iterator[Watching]:
    started = Watching(tmp_path / "run.jsonl")
    yield started
    started.process.kill()
    started.process.wait()


def test_it_waits_for_the_file_follows_it_notices_another_and_ends_cleanly(watching: Watching, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    watching.expect(watching.err, "which does not exist yet (Ctrl-C ends)")
    write(path, HEADER, record(10))
    watching.expect(watching.err, "trained by SGD")
    watching.expect(watching.out, "lambda_max +-")
    assert watching.expect(watching.out, "0.43").split()[0] == "10"
    line = json.dumps(record(20, 21.0, events=[EVENT])) + "\n"
    with open(path, "a") as stream:  # half a line is not shown before the rest of it is there
        stream.write(line[:50])
        stream.flush()
        time.sleep(0.3)
        stream.write(line[50:])
    assert watching.expect(watching.out, "0.43").split()[0] == "20"
    watching.expect(watching.out, "* step 20: Edge of stability")
    write(path, {**HEADER, "resumed_at": 20}, record(30))
    watching.expect(watching.err, "resumed at step 20")
    assert watching.expect(watching.out, "0.43").split()[0] == "30"
    write(tmp_path / "other.jsonl", HEADER, record(7))
    os.replace(tmp_path / "other.jsonl", path)
    watching.expect(watching.err, "was replaced: a new run")
    assert watching.expect(watching.out, "0.43").split()[0] == "7"
    watching.process.send_signal(signal.SIGINT)
    watching.expect(watching.err, "no longer watching")
    assert watching.process.wait(timeout=30) == 0
    assert watching.err.empty()
