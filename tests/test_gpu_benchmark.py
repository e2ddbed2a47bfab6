"""The GPU benchmark's own parts, on the CPU with a network of a few hundred parameters: what fails is noted, and the rest goes on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from experiments import gpu_benchmark
from experiments._gpu_models import LanguageModel, Subject, prepared, resnet, subjects

ROOT = Path(__file__).parents[1]
SIZES = {"MLP": 4_206_602, "ResNet-18": 11_173_962, "GPT": 124_439_808}


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_benchmark, "TRACE_RTOL", 0.5)  # some ten products instead of hundreds
    monkeypatch.setattr(gpu_benchmark, "MOST", 3)
    monkeypatch.setattr(gpu_benchmark, "free_memory", lambda: None)  # of a GPU; among the objects of a whole test run it takes long


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Subject:
    """The MLP of --quick as the only network."""
    subject = subjects(quick=True)[0]
    monkeypatch.setattr(gpu_benchmark, "subjects", lambda quick: [subject])
    return subject


def run(folder: Path, *more: str) -> tuple[int, dict[str, Any], list[dict[str, Any]]]:
    code = gpu_benchmark.main(["--device", "cpu", "--quick", "--results", str(folder), *more])
    text = (folder / "gpu_cpu.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text  # which JSON does not have
    head, *rows = map(json.loads, text.splitlines())
    return code, head, rows


def test_a_run_writes_circumstances_rows_and_a_figure(small: Subject, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, head, rows = run(tmp_path, "--max-seconds", "300")
    assert (code, head["complete"], head["card"]) == (0, True, "CPU")
    assert {"versions", "python", "date", "cpu", "cuda", "tf32", "command"} <= set(head)
    assert [(row["case"], row["precision"]) for row in rows] == [("MLP", "float32"), ("MLP", "bf16 autocast")]
    for row in rows:
        assert row["failed"] == {}
        assert row["product_in_gradients"] > 0 and row["bare_in_gradients"] > 0 and row["gauss_newton_in_gradients"] > 0
        assert row["top5_products"] >= 5 and row["trace_products"] >= 2 and row["trace_stderr"] > 0
        assert row["product_peak_gib"] is None  # told by the GPU's allocator alone
    full, cast = (row["top5"] for row in rows)
    assert cast != full and cast == pytest.approx(full, rel=0.1)  # bfloat16 it was, and about the same curvature
    assert (tmp_path / "gpu_cpu.png").stat().st_size > 1000
    assert "bf16 autocast" in capsys.readouterr().out


def test_want_of_memory_is_noted_and_the_rest_goes_on(small: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(self: gpu_benchmark.Bench) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(gpu_benchmark.Bench, "_bare_product", too_large)
    monkeypatch.setattr(gpu_benchmark, "TRACE_RTOL", 2.0)  # what is measured besides is looked at above
    code, _, rows = run(tmp_path, "--max-seconds", "300")
    assert code == 0
    assert all(row["failed"] == {"bare": "out of memory"} and row["trace_products"] for row in rows)


def test_another_failure_is_noted_too_and_ends_in_an_exit_code_of_1(
    small: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise ValueError("something else")

    monkeypatch.setattr(gpu_benchmark.Bench, "_trace", broken)
    code, _, rows = run(tmp_path, "--max-seconds", "300")
    assert code == 1
    assert all(row["failed"] == {"trace": "ValueError: something else"} and row["top5_products"] for row in rows)


def test_a_network_that_cannot_be_made_has_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = subjects(quick=True)[:1] * 2
    failing = Subject("huge", lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("out of memory")), first.data, first.loss, 1)
    monkeypatch.setattr(gpu_benchmark, "subjects", lambda quick: [failing, second])
    _, _, rows = run(tmp_path, "--max-seconds", "300")
    assert [row["failed"] for row in rows] == [{"model": "out of memory"}] * 2 + [{}] * 2


def test_without_time_every_row_says_so(small: Subject, tmp_path: Path) -> None:
    code, _, rows = run(tmp_path, "--max-seconds", "0")
    assert code == 0
    assert all(set(row["failed"].values()) == {"no time was left"} for row in rows)


def test_the_figure_can_be_drawn_from_the_file_alone(small: Subject, tmp_path: Path) -> None:
    run(tmp_path, "--max-seconds", "0")
    (tmp_path / "gpu_cpu.png").unlink()
    assert gpu_benchmark.main(["--figure-only", str(tmp_path / "gpu_cpu.jsonl")]) == 0
    assert (tmp_path / "gpu_cpu.png").exists()


@pytest.mark.parametrize("subject", subjects(quick=False), ids=lambda subject: subject.name)
def test_the_networks_have_the_sizes_they_are_known_by(subject: Subject) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in subject.make().parameters()) == SIZES[subject.name]


@pytest.mark.parametrize("subject", subjects(quick=True), ids=lambda subject: subject.name)
def test_the_small_ones_are_networks_of_the_same_kind(subject: Subject) -> None:
    model, (x, y) = prepared(subject, torch.device("cpu"), steps=1)
    assert not model.training and all(p.grad is None for p in model.parameters())
    assert bool(torch.isfinite(subject.loss(model(x), y)))


def test_resnet_has_the_layers_of_resnet_18() -> None:
    """17 convolutions, 3 projections on the shortcuts and the linear layer."""
    modules = list(resnet(4).modules())
    assert sum(isinstance(m, nn.Conv2d) for m in modules) == 20 and sum(isinstance(m, nn.Linear) for m in modules) == 1


def test_output_and_input_embedding_are_one_tensor() -> None:
    model = LanguageModel(vocabulary=20, time=8, width=8, layers=1, heads=2)
    assert model.head.weight is model.token.weight
    assert tuple(model(torch.zeros(2, 5, dtype=torch.long)).shape) == (2, 5, 20)


@pytest.mark.parametrize(
    ("card", "name"),
    [("NVIDIA H100 80GB HBM3", "gpu_h100_80gb_hbm3"), ("Tesla T4", "gpu_tesla_t4"), ("NVIDIA A100-SXM4-40GB", "gpu_a100_sxm4_40gb")],
)
def test_the_card_names_the_file(card: str, name: str) -> None:
    assert gpu_benchmark.file_name(card) == name


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_benchmark.main(["--tests"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("This needs an NVIDIA GPU") and said.err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available() or shutil.which("make") is None, reason="there is a GPU, or no make")
@pytest.mark.parametrize(("python", "says"), [(sys.executable, "needs an NVIDIA GPU"), ("no-such-python", "has no torch")])
def test_make_gpu_without_a_gpu_or_torch_exits_with_2(python: str, says: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")}
    done = subprocess.run(["make", "gpu", f"PYTHON={python}"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert says in done.stderr


@pytest.fixture
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_benchmark, "HERE", tmp_path / "experiments")


def stand_in(folder: Path, tests: str) -> None:
    """A repository with gpu tests of its own."""
    (folder / "tests").mkdir()
    (folder / "pyproject.toml").write_text('[tool.pytest.ini_options]\nmarkers = ["gpu: needs a GPU"]\n')
    (folder / "tests" / "test_gpu.py").write_text(tests)


@pytest.mark.usefixtures("_folder")
def test_what_the_gpu_tests_came_to_is_counted(tmp_path: Path) -> None:
    stand_in(
        tmp_path,
        "import pytest\npytestmark = pytest.mark.gpu\n"
        "def test_passes(): pass\ndef test_fails(): assert False\n@pytest.mark.skip\ndef test_skipped(): pass\n",
    )
    found = gpu_benchmark.run_tests(60.0)
    assert (found["exit_code"], found["tests"], found["failures"], found["skipped"], found["in_time"]) == (1, 3, 1, 1, True)
    assert found["failed"] == ["test_fails"]


@pytest.mark.slow
@pytest.mark.usefixtures("_folder")
def test_gpu_tests_that_hang_are_ended(tmp_path: Path) -> None:
    stand_in(tmp_path, "import time, pytest\npytestmark = pytest.mark.gpu\ndef test_hangs(): time.sleep(600)\n")
    found = gpu_benchmark.run_tests(4.0)
    assert not found["in_time"] and found["exit_code"] != 0 and found["seconds"] < 30


def test_the_benchmark_needs_nothing_but_what_sharpkit_needs() -> None:
    """The machine with the GPU may have no more than torch, scipy, matplotlib and pytest."""
    code = "import sys; import experiments.gpu_benchmark; print(*{name.partition('.')[0] for name in sys.modules})"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, cwd=ROOT)
    assert not set(done.stdout.split()) & {"sklearn", "transformers", "lightning", "hypothesis", "curvlinops"}
