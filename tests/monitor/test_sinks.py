"""Records reach their places whole, survive a kill, outlive a full disk, and come back as they were."""

from __future__ import annotations

import csv
import errno
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

import sharpkit as sk
from sharpkit._errors import SharpkitWarning
from sharpkit.monitor import sinks
from sharpkit.monitor.runs import RunFollower

ROOT = Path(__file__).parents[2]
HEADER = {"kind": "monitor_run", "version": 1, "model": "Sequential", "optimizer": "SGD", "budget": 0.05, "seed": 0}


def record(step: int, **changes: Any) -> dict[str, Any]:
    entry = {"value": 21.0 + step, "stderr": 0.2, "limit": 38.0, "num_matvecs": 3, "seconds": 0.01, "converged": True, "method": "Lanczos"}
    values = {"lambda_max": entry, "trace": {**entry, "limit": None}}
    plain = {"kind": "monitor_record", "version": 1, "step": step, "loss": 0.43, "lr": 0.1, "values": values, "failed": {}, "events": []}
    return {**plain, "overhead": 0.04, **changes}


def write_all(sink: Any, steps: Iterable[int], *, close: bool = False) -> None:
    for step in steps:
        sink.write(record(step))
    if close:
        sink.close()


def steps_in(path: Path) -> list[int]:
    return [r["step"] for r in sk.sinks.read_run(path).records]


# -- JSON lines and reading them back ---------------------------------------------------------------


def test_what_was_written_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    with sk.sinks.jsonl(path) as sink:
        sink.open_run(HEADER)
        for step in (0, 5):
            sink.write(record(step))
    run = sk.sinks.read_run(path)
    assert run.headers == (HEADER,)
    assert run.records == (record(0), record(5))
    assert run.notes == ()


def test_a_record_is_in_the_file_as_soon_as_it_is_written(tmp_path: Path) -> None:
    sink = sk.sinks.jsonl(tmp_path / "run.jsonl")
    sink.write(record(0))
    assert steps_in(sink.path) == [0]
    sink.close()


def test_numbers_that_json_lacks_become_null_and_words(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    with sk.sinks.jsonl(path) as sink:
        sink.write(record(0, loss=math.nan, values={"lambda_max": {"value": math.inf, "stderr": math.nan, "limit": 20.0}}))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    (line,) = path.read_text().splitlines()
    document = json.loads(line, parse_constant=refuse)
    assert document["loss"] is None
    assert document["values"]["lambda_max"] == {"value": "inf", "stderr": None, "limit": 20.0}


def test_a_killed_process_loses_at_most_the_last_line(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    code = f"""
import itertools, sys
sys.path.insert(0, {str(ROOT)!r})
import sharpkit as sk
sink = sk.sinks.jsonl({str(path)!r})
sink.open_run({HEADER!r})
for step in itertools.count():
    sink.write({{"kind": "monitor_record", "version": 1, "step": step, "values": {{}}, "padding": "x" * 3000}})
    print(step, flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while int(process.stdout.readline()) < 200:
            pass
        process.send_signal(signal.SIGKILL)
        acknowledged = [int(line) for line in process.stdout.read().split() if line][-1:] or [200]
    assert process.returncode == -signal.SIGKILL
    steps = steps_in(path)
    assert steps == list(range(len(steps)))
    assert len(steps) > acknowledged[0]  # every record whose write had returned is there


@pytest.mark.parametrize("cut", [1, 20, 150])
def test_a_torn_last_line_is_left_out_with_a_note_and_mended_before_appending(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "run.jsonl"
    with sk.sinks.jsonl(path) as sink:
        sink.open_run(HEADER)
        for step in (0, 5, 10):
            sink.write(record(step))
    path.write_bytes(path.read_bytes()[: -1 - cut])
    run = sk.sinks.read_run(path)
    assert [r["step"] for r in run.records] == [0, 5]
    assert "run.jsonl is incomplete" in run.notes[0]
    with pytest.warns(SharpkitWarning, match="torn"):
        sink = sk.sinks.jsonl(path)
    sink.open_run({**HEADER, "resumed_at": 5})
    write_all(sink, [9], close=True)
    run = sk.sinks.read_run(path)
    assert [r["step"] for r in run.records] == [0, 5, 9]
    assert not any("incomplete" in note for note in run.notes)


def test_a_last_line_that_lacks_only_its_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(json.dumps(HEADER) + "\n" + json.dumps(record(3)))
    assert steps_in(path) == [3]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with sk.sinks.jsonl(path) as sink:
            sink.write(record(4))
    assert steps_in(path) == [3, 4]


def test_a_torn_line_longer_than_a_block_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(json.dumps(HEADER) + "\n" + '{"kind": "monitor_record", "padding": "' + "x" * 200_000)
    with pytest.warns(SharpkitWarning, match="torn"):
        sk.sinks.jsonl(path).close()
    assert path.read_text() == json.dumps(HEADER) + "\n"


def test_other_garbage_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(json.dumps(HEADER) + "\nhello\n" + json.dumps(record(0)) + "\n")
    with pytest.raises(ValueError, match=r"run\.jsonl, line 2: not JSON .*'hello'"):
        sk.sinks.read_run(path)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([1], "expected a JSON object, got list"),
        ({"kind": "estimate"}, "got kind 'estimate'"),
        ({"kind": "monitor_record", "values": {}}, "a record needs a whole number 'step'"),
        ({**HEADER, "version": 2}, "written by a newer sharpkit"),
    ],
)
def test_lines_that_are_no_monitored_run_are_refused(tmp_path: Path, document: Any, message: str) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(json.dumps(document) + "\n")
    with pytest.raises(ValueError, match=f"line 1: .*{message}"):
        sk.sinks.read_run(path)


def test_a_resumed_run_replaces_what_it_repeats(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    with sk.sinks.jsonl(path) as sink:
        sink.open_run(HEADER)
        for step in (0, 10, 20, 30):
            sink.write(record(step))
        sink.open_run({**HEADER, "resumed_at": 15})
        for step in (17, 30):
            sink.write(record(step, loss=0.1))
    run = sk.sinks.read_run(path)
    assert [(r["step"], r["loss"]) for r in run.records] == [(0, 0.43), (10, 0.43), (17, 0.1), (30, 0.1)]
    assert "2 records that it repeated were replaced" in run.notes[0]


def test_of_two_runs_in_a_file_the_last_is_read(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    for first in (0, 7):
        with sk.sinks.jsonl(path) as sink:
            sink.open_run({**HEADER, "seed": first})
            sink.write(record(first))
    run = sk.sinks.read_run(path)
    assert [r["step"] for r in run.records] == [7]
    assert run.header["seed"] == 7
    assert "holds 2 runs" in run.notes[0]


def test_a_file_of_another_kind_is_not_written_into(tmp_path: Path) -> None:
    for name, content in (("notes.jsonl", "my thesis\n"), ("short.jsonl", "my thesis"), ("other.csv", "a,b\n"), ("o.csv", "a")):
        path = tmp_path / name
        path.write_text(content)
        with pytest.raises(ValueError, match="name another file"):
            sk.sinks.as_sink(path)
        assert path.read_text() == content


def test_a_missing_folder_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing does not exist; make it first"):
        sk.sinks.jsonl(tmp_path / "missing" / "run.jsonl")
    with pytest.raises(IsADirectoryError, match="it is a folder"):
        sk.sinks.jsonl(tmp_path)


# -- a disk that takes nothing ------------------------------------------------------------------------


class Full:
    """A file whose disk holds a number of bytes."""

    closed = False

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = int(self.file.write(data[: self.room]))
        self.room -= taken
        return taken

    def fileno(self) -> int:
        return int(self.file.fileno())

    def close(self) -> None:
        self.file.close()


def test_a_full_disk_is_said_once_and_what_it_did_not_take_follows_later(tmp_path: Path) -> None:
    sink = sk.sinks.jsonl(tmp_path / "run.jsonl")
    sink.open_run(HEADER)
    full = sink._file = Full(sink._file, room=1000)
    with pytest.warns(SharpkitWarning) as caught:
        write_all(sink, range(10))
    (warning,) = caught
    assert "run.jsonl: No space left on device" in str(warning.message)
    assert "Training goes on. Make room" in str(warning.message)
    assert sink.num_waiting > 0
    full.room = 10**6
    sink.write(record(10))
    assert (sink.num_waiting, sink.num_dropped) == (0, 0)
    assert steps_in(sink.path) == list(range(11))
    sink.close()


def test_what_waits_is_bounded_and_what_is_lost_is_counted(tmp_path: Path) -> None:
    sink = sk.sinks.jsonl(tmp_path / "run.jsonl", max_waiting=3)
    full = sink._file = Full(sink._file, room=len(json.dumps(record(0))) // 2)
    with pytest.warns(SharpkitWarning, match="No space left"):
        write_all(sink, range(10))
    assert (sink.num_waiting, sink.num_dropped) == (3, 7)
    full.room = 10**6
    with pytest.warns(SharpkitWarning, match="7 writes to .*run.jsonl were lost"):
        sink.close()
    assert steps_in(sink.path) == [0, 8, 9]  # the first had been begun, so it was not given up


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("make", [sk.sinks.jsonl, sk.sinks.csv])
def test_a_device_that_is_always_full_stops_nothing(make: Callable[..., Any]) -> None:
    with pytest.warns(SharpkitWarning) as caught:
        write_all(make("/dev/full"), range(3), close=True)
    assert [("No space left" in str(w.message), "were lost" in str(w.message)) for w in caught] == [(True, False), (False, True)]


def test_the_disk_is_forced_rarely_and_on_close(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forced: list[int] = []
    monkeypatch.setattr(os, "fsync", forced.append)
    clock = [0.0]
    monkeypatch.setattr(sinks.time, "monotonic", lambda: clock[0])
    sink = sk.sinks.jsonl(tmp_path / "run.jsonl", sync_seconds=5.0)
    for step in range(10):
        clock[0] = float(step)
        sink.write(record(step))
    assert len(forced) == 1  # at second 5
    sink.close()
    assert len(forced) == 2


def test_closing_twice_and_writing_after_it_stop_nothing(tmp_path: Path) -> None:
    sink = sk.sinks.jsonl(tmp_path / "run.jsonl")
    sink.close()
    sink.close()
    with pytest.warns(SharpkitWarning, match="failed"):
        sink.write(record(0))


# -- CSV ----------------------------------------------------------------------------------------------


def test_csv_has_one_row_for_each_step_and_metric(tmp_path: Path) -> None:
    path = tmp_path / "run.csv"
    for step in (0, 5):  # opened twice: one head
        with sk.sinks.csv(path) as sink:
            sink.open_run(HEADER)
            sink.write(record(step))
    with open(path, newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(r["step"], r["metric"], r["value"]) for r in rows] == [
        ("0", "lambda_max", "21.0"),
        ("0", "trace", "21.0"),
        ("5", "lambda_max", "26.0"),
        ("5", "trace", "26.0"),
    ]
    assert (rows[0]["limit"], rows[1]["limit"], rows[0]["loss"]) == ("38.0", "", "0.43")


def test_csv_names_failures_and_events(tmp_path: Path) -> None:
    path = tmp_path / "run.csv"
    event = {"kind": "loss_spike", "step": 3, "text": "it jumped, high"}
    with sk.sinks.csv(path) as sink:
        sink.write(record(3, values={}, failed={"trace": "OutOfMemoryError:\nno room"}, events=[event]))
    with open(path, newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(r["metric"], r["note"]) for r in rows] == [
        ("trace", "failed: OutOfMemoryError: no room"),
        ("event/loss_spike", "it jumped, high"),
    ]


# -- loggers and callables ----------------------------------------------------------------------------


class Writer:
    """Remembers as a SummaryWriter would be told."""

    def __init__(self) -> None:
        self.scalars: dict[tuple[str, int], float] = {}
        self.texts: list[tuple[str, str, int]] = []
        self.flushed = False

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars[tag, step] = value

    def add_text(self, tag: str, text: str, step: int) -> None:
        self.texts.append((tag, text, step))

    def flush(self) -> None:
        self.flushed = True


def test_tensorboard_gets_values_limits_ratios_and_events() -> None:
    writer = Writer()
    event = {"kind": "loss_spike", "step": 2, "text": "it jumped"}
    with sk.sinks.tensorboard(writer) as sink:
        sink.open_run(HEADER)
        sink.write(record(2, loss=math.nan, events=[event]))
    assert writer.scalars["sharpkit/lambda_max", 2] == 23.0
    assert writer.scalars["sharpkit/lambda_max_limit", 2] == 38.0
    assert writer.scalars["sharpkit/lambda_max_over_limit", 2] == pytest.approx(23 / 38)
    assert ("sharpkit/loss", 2) not in writer.scalars
    assert ("sharpkit/trace_limit", 2) not in writer.scalars
    assert ("sharpkit/events", "step 2: it jumped", 2) in writer.texts
    assert writer.flushed


def test_tensorboard_writes_real_event_files(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with sk.sinks.tensorboard(tmp_path) as sink:
        for step in (0, 5):
            sink.write(record(step))
    read = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in read.Scalars("sharpkit/lambda_max")] == [(0, 21.0), (5, 26.0)]


class Run:
    """Remembers what a duck-typed experiment tracker is told."""

    def __init__(self) -> None:
        self.logged: list[tuple[dict[str, float], dict[str, Any]]] = []

    def log(self, values: dict[str, float], **how: Any) -> None:
        self.logged.append((values, how))


class WandbRun:
    """Keeps rows as a Weights & Biases run does: one for each step of its own, merged until committed; steps never go back."""

    def __init__(self) -> None:
        self.axes: dict[str, Any] = {}
        self.step = 0
        self.open: dict[str, Any] = {}
        self.rows: list[dict[str, Any]] = []

    def define_metric(self, name: str, step_metric: str | None = None, hidden: bool = False) -> None:
        self.axes[name] = step_metric

    def log(self, values: dict[str, Any], step: int | None = None, commit: bool | None = None) -> None:
        if step is not None and step < self.step:
            return  # with a warning, in the real one
        if step is not None and step > self.step:
            self.finish()
            self.step = step
        self.open.update(values)
        if commit or (commit is None and step is None):
            self.finish()
            self.step += 1

    def finish(self) -> None:
        self.rows += [self.open] if self.open else []
        self.open = {}

    def column(self, name: str) -> list[Any]:
        return [row[name] for row in self.rows if name in row]


def test_anything_with_log_gets_scalars_at_their_step() -> None:
    run = Run()
    with sk.sinks.wandb(run) as sink:
        sink.open_run(HEADER)
        sink.write(record(4))
    ((values, how),) = run.logged
    assert values["sharpkit/lambda_max"] == 25.0
    assert how == {"step": 4}


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("named", [True, False], ids=["owner names steps", "owner counts"])
def test_a_wandb_run_loses_neither_its_owners_values_nor_ours(named: bool, every: int) -> None:
    run = WandbRun()
    with sk.sinks.wandb(run) as sink:
        for step in range(9):
            sink.write(record(step))
            if step % every == 0:
                run.log({"loss": step}, **({"step": step} if named else {}))
    run.finish()
    assert run.axes["sharpkit/*"] == "sharpkit/step"
    assert run.column("sharpkit/step") == list(range(9))
    assert run.column("loss") == list(range(0, 9, every))


class Trackio:
    """The module's functions and the run's methods that are called, with the signatures of trackio 0.43."""

    class Image:
        def __init__(self, value: Any, caption: str | None = None) -> None:
            self.value = value

    def __init__(self) -> None:
        self.logged: list[tuple[dict[str, Any], int | None]] = []

    def log(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self.logged.append((metrics, step))


class MLflow:
    """Those of the module mlflow 3.17, which refuses some names."""

    def __init__(self) -> None:
        self.metrics: dict[tuple[str, int | None], float] = {}
        self.files: dict[str, Any] = {}
        self.images: dict[tuple[str | None, int | None], Any] = {}

    def log_metrics(
        self,
        metrics: dict[str, float],
        step: int | None = None,
        synchronous: bool | None = None,
        run_id: str | None = None,
        timestamp: int | None = None,
        model_id: str | None = None,
        dataset: Any = None,
    ) -> None:
        assert all(re.match(r"^[/\w.\- ]*$", name) for name in metrics)
        self.metrics |= {(name, step): value for name, value in metrics.items()}

    def log_dict(self, dictionary: dict[str, Any], artifact_file: str, run_id: str | None = None) -> None:
        self.files[artifact_file] = dictionary

    def log_image(
        self,
        image: Any,
        artifact_file: str | None = None,
        key: str | None = None,
        step: int | None = None,
        timestamp: int | None = None,
        synchronous: bool | None = False,
    ) -> None:
        self.images[key, step] = image


class Aim(dict[str, Any]):
    """Those of aim.Run of 3.29."""

    class Image:
        def __init__(self, image: Any, caption: str = "", format: Any = None, quality: int = 90, optimize: bool = False) -> None:
            self.value = image

    def __init__(self) -> None:
        super().__init__()
        self.tracked: dict[tuple[str | None, int | None], Any] = {}

    def track(self, value: Any, name: str | None = None, step: int | None = None, epoch: int | None = None, *, context: Any = None) -> None:
        self.tracked[name, step] = value


def spectrum() -> dict[str, Any]:
    matrix = torch.diag(torch.linspace(-1.0, 5.0, 40, dtype=torch.float64))
    return sk.spectral_density(matrix, num_probes=2, num_steps=10).to_dict()


def test_mlflow_gets_metrics_under_names_that_it_takes_the_header_and_pictures() -> None:
    target = MLflow()
    with sk.sinks.mlflow(target) as sink:
        sink.open_run(HEADER)
        sink.write(record(2, density=spectrum()))
        sink.write({"kind": "monitor_record", "step": 3, "values": {"<lambda>: 0": {"value": 1.5}}})
    assert sink.num_failed == 0
    assert target.metrics["sharpkit/lambda_max", 2] == 23.0
    assert target.metrics["sharpkit/lambda_max_over_limit", 2] == pytest.approx(23 / 38)
    assert target.metrics["sharpkit/_lambda__ 0", 3] == 1.5
    assert target.files["sharpkit/run.json"]["kind"] == "monitor_run"
    ((key, step),) = target.images
    assert (key, step) == ("sharpkit/density", 2) and target.images[key, step].size == (640, 400)


def test_trackio_gets_scalars_and_pictures_at_their_step() -> None:
    run = Trackio()
    with sk.sinks.trackio(run) as sink:
        sink.open_run(HEADER)
        sink.write(record(1))
        sink.write(record(4, density=spectrum()))
    (first, at_first), (second, at_second) = run.logged
    assert (at_first, at_second) == (1, 4) and sink.num_failed == 0
    assert first["sharpkit/lambda_max"] == 22.0 and "sharpkit/density" not in first
    assert isinstance(second["sharpkit/density"], Trackio.Image) and second["sharpkit/density"].value.mode == "RGB"


def test_aim_gets_metrics_the_header_and_pictures() -> None:
    run = Aim()
    with sk.sinks.aim(run) as sink:
        sink.open_run(HEADER)
        sink.write(record(4, density=spectrum()))
    assert sink.num_failed == 0
    assert run.tracked["sharpkit/lambda_max", 4] == 25.0 and isinstance(run.tracked["sharpkit/density", 4], Aim.Image)
    assert run["sharpkit"]["kind"] == "monitor_run" and None not in run["sharpkit"].values()


def test_the_picture_shows_the_spectrum_and_a_sink_without_images_is_spared_it() -> None:
    (picture,) = sinks.pictures_of(record(4, density=spectrum())).values()
    colours = {tuple(colour) for _, colour in picture.getcolors(maxcolors=10**6)}
    assert len(colours) > 10  # not an empty canvas
    assert sinks.pictures_of(record(4)) == {}
    run = Run()  # nothing that is called Image
    sk.sinks.wandb(run).write(record(4, density=spectrum()))
    assert all(isinstance(value, float) for value in run.logged[0][0].values())


def test_the_real_mlflow_keeps_it_in_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real: Any = pytest.importorskip("mlflow")
    monkeypatch.setenv("GIT_PYTHON_REFRESH", "quiet")
    real.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = real.create_experiment("sharpkit", artifact_location=(tmp_path / "artifacts").as_uri())
    with real.start_run(experiment_id=experiment) as run, sk.sinks.mlflow(real) as sink:
        sink.open_run(HEADER)
        for step in (0, 5):
            sink.write(record(step, density=spectrum()))
    assert sink.num_failed == 0
    client = real.MlflowClient()
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "sharpkit/lambda_max")] == [(0, 21.0), (5, 26.0)]
    assert [file.path for file in client.list_artifacts(run.info.run_id, "sharpkit")] == ["sharpkit/run.json"]
    pictures = [file.path for file in client.list_artifacts(run.info.run_id, "images") if file.path.endswith(".png")]
    assert len(pictures) == 2 and all("density" in path for path in pictures)


def test_the_real_aim_reads_it_back(tmp_path: Path) -> None:
    real: Any = pytest.importorskip("aim")
    run = real.Run(repo=str(tmp_path), system_tracking_interval=None, capture_terminal_logs=False)
    with sk.sinks.aim(run) as sink:
        sink.open_run(HEADER)
        for step in (0, 5):
            sink.write(record(step, density=spectrum()))
    assert sink.num_failed == 0
    (metric,) = [each for each in run.metrics() if each.name == "sharpkit/lambda_max"]
    assert metric.values.values_list() == [21.0, 26.0] and run["sharpkit"]["kind"] == "monitor_run"
    run.close()


def test_the_real_trackio_reads_it_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    real: Any = pytest.importorskip("trackio")
    run = real.init(project="sharpkit", name="one", embed=False)
    with sk.sinks.trackio(run) as sink:
        sink.open_run(HEADER)
        for step in (0, 5):
            sink.write(record(step, density=spectrum()))
    run.finish()
    assert sink.num_failed == 0
    from trackio.sqlite_storage import SQLiteStorage  # its public Api reads no values

    rows = SQLiteStorage.get_logs("sharpkit", "one")
    assert [(row["step"], row["sharpkit/lambda_max"]) for row in rows] == [(0, 21.0), (5, 26.0)]
    assert len(list(tmp_path.rglob("*.png"))) == 2


def test_tensorboard_shows_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with sk.sinks.tensorboard(tmp_path) as sink:
        sink.write(record(5, density=spectrum()))
    assert sink.num_failed == 0
    ((image,),) = [EventAccumulator(str(tmp_path)).Reload().Images("sharpkit/density")]
    assert (image.step, image.width, image.height) == (5, 640, 400)


@pytest.mark.parametrize("make", [sk.sinks.tensorboard, sk.sinks.wandb, sk.sinks.mlflow, sk.sinks.trackio, sk.sinks.aim])
def test_what_is_no_logger_is_refused(make: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match="got int"):
        make(3)


def test_a_callable_gets_records_and_no_header() -> None:
    seen: list[Any] = []
    sink = sk.sinks.as_sink(seen.append)
    sink.open_run(HEADER)
    sink.write(record(1))
    sink.close()
    assert seen == [record(1)]


def test_a_sink_that_fails_is_said_once_counted_and_tried_again() -> None:
    seen: list[int] = []

    def failing(document: dict[str, Any]) -> None:
        if document["step"] < 3:
            raise ConnectionError("the server is away")
        seen.append(document["step"])

    sink = sk.sinks.as_sink(failing)
    with pytest.warns(SharpkitWarning) as caught:
        write_all(sink, range(5))
    assert len(caught) == 1
    assert "ConnectionError: the server is away. Training goes on" in str(caught[0].message)
    assert sink.num_failed == 3
    assert seen == [3, 4]


def test_an_interrupt_passes_through_a_sink() -> None:
    def interrupted(document: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sk.sinks.as_sink(interrupted).write(record(0))


def test_paths_and_sinks_are_taken_as_they_are_and_anything_else_is_refused(tmp_path: Path) -> None:
    sink = sk.sinks.as_sink(tmp_path / "run.jsonl")
    assert sk.sinks.as_sink(sink) is sink
    sink.close()
    with pytest.raises(ValueError, match=r"\.jsonl or \.csv"):
        sk.sinks.as_sink("run.txt")
    with pytest.raises(TypeError, match="got int"):
        sk.sinks.as_sink(3)


# -- following a file that grows ------------------------------------------------------------------------


def test_following_gives_each_record_once_and_only_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    follower = RunFollower(path)
    assert follower.poll() is None
    line = json.dumps(record(0)) + "\n"
    path.write_text(json.dumps(HEADER) + "\n" + line[:30])
    assert [d["kind"] for d in follower.poll() or ()] == ["monitor_run"]
    assert follower.poll() == []
    with open(path, "a") as stream:
        stream.write(line[30:])
    assert follower.poll() == [record(0)]
    assert not follower.was_replaced


@pytest.mark.parametrize("how", ["other file", "shorter", "longer"])
def test_following_begins_anew_when_the_file_is_replaced(tmp_path: Path, how: str) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text("".join(json.dumps(d) + "\n" for d in (HEADER, record(0), record(1))))
    follower = RunFollower(path)
    assert len(follower.poll() or ()) == 3
    documents = [{**HEADER, "seed": 1}, record(50), *(record(s) for s in range(51, 55) if how == "longer")]
    text = "".join(json.dumps(d) + "\n" for d in documents)
    if how == "other file":
        (tmp_path / "new").write_text(text)
        os.replace(tmp_path / "new", path)
    else:
        path.write_text(text)
    assert follower.poll() == documents
    assert follower.was_replaced


def test_a_write_takes_far_less_than_a_training_step(tmp_path: Path) -> None:
    with sk.sinks.jsonl(tmp_path / "run.jsonl") as sink:
        started = time.perf_counter()
        for step in range(200):
            sink.write(record(step))
        each = (time.perf_counter() - started) / 200
    assert each < 5e-3  # measured: 0.14 ms


# -- two writers -------------------------------------------------------------------------------------------------------------------
def test_a_second_writer_of_a_run_file_waits_is_warned_of_and_mixes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    first, second = sk.sinks.jsonl(path), sk.sinks.jsonl(path)
    first.write({"kind": "monitor_run", "version": 1})
    with pytest.warns(sk.SharpkitWarning, match=r"another run writes it .* Name another file for this run"):
        second.write({"kind": "monitor_run", "version": 1})
    second.write(record(0))
    first.write(record(1))
    assert [r["step"] for r in sk.sinks.read_run(path).records] == [1]
    first.close()
    second.write(record(2))
    assert second.num_waiting == 0
    second.close()
    run = sk.sinks.read_run(path)
    assert [r["step"] for r in run.records] == [0, 2], "whole runs, one after the other"


def test_a_second_process_does_not_cut_off_the_line_that_the_first_is_writing(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    first = sk.sinks.jsonl(path)
    first.write({"kind": "monitor_run", "version": 1})
    with open(path, "ab") as stream:
        stream.write(b'{"kind": "monitor_rec')  # half a line, as seen from outside in the midst of a write
    code = (
        "import sys, warnings, sharpkit as sk\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    with sk.sinks.jsonl(sys.argv[1]) as sink: sink.write({'kind': 'monitor_run', 'version': 1})\n"
        "print([str(w.message) for w in caught])"
    )
    said = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True).stdout
    assert "another run writes it" in said
    assert "1 writes to" in said
    assert path.read_bytes().endswith(b'{"kind": "monitor_rec')
    first.close()


def test_ranks_that_make_the_same_sink_leave_it_to_the_one_that_writes(tmp_path: Path) -> None:
    sinks = [sk.sinks.csv(tmp_path / "run.csv") for _ in range(3)]
    sinks[0].write(record(3))
    for sink in sinks:
        sink.close()
    assert (tmp_path / "run.csv").read_text().count("step,metric") == 1
