"""The command line as its user meets it: answers, exit codes, messages, one JSON document on stdout."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sharpkit.cli.main import _EXAMPLES, _parser, main

COMMANDS: dict[str, argparse.ArgumentParser] = next(a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction)).choices

TARGET = """
import torch
import sharpkit as sk

print("a user's own print")

def build():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2)).double()
    data = torch.randn(12, 4).double(), torch.randint(2, (12,))
    return model, sk.Objective(model, data, loss=torch.nn.functional.cross_entropy)

def objective():
    return build()[1]

def with_optimizer():
    model, objective = build()
    return objective, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

def returns_a_model():
    return build()[0]

def digits():
    from sklearn.datasets import load_digits
    data = load_digits()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 16), torch.nn.ReLU(), torch.nn.Linear(16, 10))
    inputs, targets = torch.tensor(data.data / 16).float(), torch.tensor(data.target)
    objective = sk.Objective(model, (inputs, targets), loss=torch.nn.functional.cross_entropy)
    return objective, torch.optim.AdamW(model.parameters())

def needs_arguments(width):
    return build()[1]

def fails():
    raise RuntimeError("the data are not there")

def fails_deeper():
    def closure(model, batch):
        return torch.nn.functional.mse_loss(model(batch), torch.zeros(3, 3, 3) @ batch)
    return sk.Objective(torch.nn.Linear(4, 3), torch.randn(5, 4), closure=closure)

def fails_later():
    cache = {"there": 1}
    def closure(model, batch):
        if not cache:
            raise KeyError("the cache is gone")
        return model(batch).square().mean()
    objective = sk.Objective(torch.nn.Linear(4, 3), torch.randn(5, 4), closure=closure)
    cache.clear()
    return objective

def wrong_loss():
    return sk.Objective(torch.nn.Linear(4, 3), (torch.randn(5, 4), torch.randn(5, 3)), loss=3)

def shuffled():
    model = torch.nn.Linear(4, 2)
    data = torch.utils.data.TensorDataset(torch.randn(32, 4), torch.randint(2, (32,)))
    loader = torch.utils.data.DataLoader(data, batch_size=8, shuffle=True)
    return sk.Objective(model, loader, loss=torch.nn.functional.cross_entropy)

def slow():
    import time
    model = torch.nn.Linear(4, 2)
    def closure(model, batch):
        print("ready", flush=True)
        time.sleep(2)
        return model(batch).square().mean()
    return sk.Objective(model, torch.randn(8, 4), closure=closure)

number = 3
"""


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "mymodel.py"
    path.write_text(TARGET)
    return path


def dense_hessian(target: Path) -> np.ndarray[Any, Any]:
    """The target's Hessian by torch.autograd.functional, without sharpkit's operators."""
    space: dict[str, Any] = {}
    exec(target.read_text(), space)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2)).double()
    x, y = torch.randn(12, 4).double(), torch.randint(2, (12,))
    params = dict(model.named_parameters())
    flat = torch.cat([p.detach().reshape(-1) for p in params.values()])

    def loss(vector: torch.Tensor) -> torch.Tensor:
        pieces = torch.split(vector, [p.numel() for p in params.values()])
        named = {n: v.view(p.shape) for (n, p), v in zip(params.items(), pieces, strict=True)}
        return torch.nn.functional.cross_entropy(torch.func.functional_call(model, named, (x,)), y)

    hessian: torch.Tensor = torch.autograd.functional.hessian(loss, flat)  # type: ignore[assignment, no-untyped-call]
    return hessian.numpy()


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any], str]:
    code = main([*arguments, "--json"])
    out, err = capsys.readouterr()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    document = json.loads(out, parse_constant=refuse)
    assert out.count("\n") == 1
    return code, document, err


def test_measure_prints_one_json_document_with_the_true_lambda_max_and_trace(target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = dense_hessian(target)
    capsys.readouterr()
    code, document, err = run_json(capsys, "measure", f"{target}:objective")
    assert code == 0
    sharpness = document["results"][0]
    top = np.linalg.eigvalsh(dense)[-1]
    assert abs(sharpness["lambda_max"]["value"] - top) <= sharpness["lambda_max"]["stderr"] + 1e-9
    assert abs(sharpness["trace"]["value"] - np.trace(dense)) <= 5 * sharpness["trace"]["stderr"] + 1e-9
    assert document["kind"] == "run"
    assert document["environment"]["torch"] == torch.__version__
    assert "a user's own print" in err


def test_spectrum_lists_the_largest_eigenvalues(target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = np.linalg.eigvalsh(dense_hessian(target))[::-1][:3]
    capsys.readouterr()
    code, document, _ = run_json(capsys, "spectrum", f"{target}:objective", "--k", "3", "--probes", "2", "--steps", "10", "--tol", "1e-6")
    pairs, density = document["results"]
    assert code == 0
    np.testing.assert_allclose(pairs["values"], expected, atol=2e-6 * expected[0])
    assert density["kind"] == "spectral_density"


@pytest.mark.parametrize("command", ["measure", "spectrum"])
def test_the_same_command_again_goes_on_from_its_checkpoint(
    command: str, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = (command, f"{target}:objective", "--probes", "3", "--steps", "6", "--checkpoint", str(tmp_path / "kept"))
    first, again = (run_json(capsys, *given) for _ in range(2))
    assert first[0] == 0 and first[:2] == again[:2]
    code, _, err = run_json(capsys, command, f"{target}:objective", "--steps", "7", "--checkpoint", str(tmp_path / "kept"))
    assert code != 0 and "was begun with other arguments" in err


def test_the_optimizer_of_the_target_sets_the_limit(target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    top = np.linalg.eigvalsh(dense_hessian(target))[-1]
    capsys.readouterr()
    _, document, _ = run_json(capsys, "measure", f"{target}:with_optimizer")
    sharpness = document["results"][0]
    assert sharpness["lr"] == 0.1
    assert sharpness["stable_lr"]["value"] == pytest.approx(2 * 1.9 / top, rel=2e-3)  # heavy ball, 2 (1 + beta) / lambda_max; tol 1e-3


def test_params_restrict_the_measurement(target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    block = dense_hessian(target)[15:, 15:]  # the last layer's 3 x 2 weights and 2 biases follow 15 others
    capsys.readouterr()
    _, document, _ = run_json(capsys, "measure", f"{target}:objective", "--params", "2.*")
    assert document["results"][0]["lambda_max"]["value"] == pytest.approx(np.linalg.eigvalsh(block)[-1], rel=2e-3)


def test_measure_without_json_prints_a_table_and_keeps_stdout_clean(target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["measure", f"{target}:objective"]) == 0
    out, err = capsys.readouterr()
    assert "lambda_max" in out
    assert "user's own print" not in out
    assert "one Hessian product takes" in err


def test_a_budget_that_ends_too_early_gives_exit_code_3(target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, document, _ = run_json(capsys, "spectrum", f"{target}:objective", "--max-seconds", "1e-9", "--tol", "1e-12", "--quiet")
    assert code == 3
    assert not all(document["results"][0]["converged"])


def test_lr_names_one_rate_and_says_where_it_comes_from(target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["lr", f"{target}:digits", "--batch-size", "32", "--steps", "1000", "--schedule", "cosine"]
    assert main(arguments) == 0
    first, reason, cost = capsys.readouterr().out.strip().splitlines()
    assert first.startswith("AdamW, batch size 32, 1000 steps, cosine schedule: train with a peak rate of 0.0")
    assert reason.startswith("Short runs train best at about") and cost.endswith("of the run.")
    code, document, _ = run_json(capsys, *arguments)
    assert code == 0 and f"{document['results'][0]['value']:.3g}" in first and document["results"][0]["gradients"] <= 100
    assert main(["lr", f"{target}:objective", "--batch-size", "4", "--steps", "1000"]) == 2
    assert "returned no optimizer" in capsys.readouterr().err


def test_doctor_passes_a_sound_objective(target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, document, _ = run_json(capsys, "doctor", f"{target}:objective")
    assert (code, document["results"][0]["passed"]) == (0, True)


def test_doctor_gives_exit_code_1_where_no_function_is_defined(target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, document, err = run_json(capsys, "doctor", f"{target}:shuffled")
    assert code == 1
    assert document["kind"] == "error"
    assert "shuffle" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("suffix", "fragment"),
    [
        (":nothing", "has no function 'nothing'; it defines build, digits, fails, fails_deeper, fails_later, needs_arguments, objective"),
        (":number", "is a int, not a function"),
        (":needs_arguments", "needs the arguments width"),
        (":returns_a_model", "returned Sequential; expected an sk.Objective, or a tuple"),
        ("", "has no ':function' at its end"),
    ],
)
def test_a_wrong_target_is_a_usage_error_that_says_what_is_expected(
    target: Path, capsys: pytest.CaptureFixture[str], suffix: str, fragment: str
) -> None:
    assert main(["measure", f"{target}{suffix}"]) == 2
    assert fragment in capsys.readouterr().err


def test_a_missing_file_is_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["measure", f"{tmp_path}/no.py:f"]) == 2
    assert "does not exist" in capsys.readouterr().err


def without_tracebacks_marks(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if set(line.strip()) - set("^~")]


def test_an_error_in_the_users_code_shows_their_traceback_alone_and_one_line_of_reason(
    target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["measure", f"{target}:fails"]) == 1
    err = without_tracebacks_marks(capsys.readouterr().err)
    line = next(i for i, text in enumerate(TARGET.splitlines(), 1) if "the data are not there" in text)
    assert err[-5:] == [
        "Traceback (most recent call last):",
        f'File "{target}", line {line}, in fails',
        'raise RuntimeError("the data are not there")',
        "RuntimeError: the data are not there",
        f"sharpkit: {target}:fails raised RuntimeError: the data are not there",
    ]


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("fails_deeper", "return torch.nn.functional.mse_loss(model(batch), torch.zeros(3, 3, 3) @ batch)"),
        ("fails_later", 'raise KeyError("the cache is gone")'),
        ("wrong_loss", "return sk.Objective(torch.nn.Linear(4, 3), (torch.randn(5, 4), torch.randn(5, 3)), loss=3)"),
    ],
)
def test_the_users_line_is_shown_wherever_their_code_is_called_from_and_ours_only_with_debug(
    name: str, theirs: str, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = f"{os.sep}sharpkit{os.sep}objective{os.sep}"
    assert main(["measure", f"{target}:{name}", "--quiet"]) == 1
    err = capsys.readouterr().err
    first, *_ = [line for line in err.splitlines() if line.startswith('  File "')]
    assert str(target) in first and theirs in err and ours not in err and "cli/main.py" not in err
    assert err.splitlines()[-1].startswith(f"sharpkit: {target}:{name} raised ")
    assert main(["measure", f"{target}:{name}", "--quiet", "--debug"]) == 1
    err = capsys.readouterr().err
    assert theirs in err and ours in err


def test_a_file_that_python_cannot_read_shows_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.py").write_text("def job():\n    return (\n")
    assert main(["measure", f"{tmp_path}/broken.py:job"]) == 1
    err = capsys.readouterr().err
    assert err.splitlines()[0].strip() == f'File "{tmp_path}/broken.py", line 2'
    assert "return (" in err and "sharpkit/cli" not in err


@pytest.mark.parametrize("command", list(COMMANDS))
def test_the_help_of_a_command_ends_with_an_example_that_its_parser_takes(command: str) -> None:
    *_, heading, example = COMMANDS[command].format_help().rstrip().splitlines()
    assert heading == "example:"
    words = shlex.split(example.replace('eval "$(', "").replace(')"', ""), comments=True)
    assert words[:2] == ["sharpkit", command]
    arguments = _parser().parse_args(words[1:])
    assert arguments.run is COMMANDS[command].get_default("run")


@pytest.mark.slow
def test_the_examples_of_the_commands_help_do_what_they_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in ("init", "measure", "spectrum", "doctor", "batch", "lr", "landscape"):
        assert main(shlex.split(_EXAMPLES[command])[1:]) == 0, command
    for name in ("before", "after"):
        capsys.readouterr()
        assert main(["measure", "job.py:job", "--json"]) == 0
        (tmp_path / f"{name}.json").write_text(capsys.readouterr().out)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "job.py"], env=environment, check=True, capture_output=True, timeout=300)
    for command in ("compare", "report", "watch"):
        assert main(shlex.split(_EXAMPLES[command], comments=True)[1:]) == 0, command
    assert all((tmp_path / f"{page}.html").exists() for page in ("sharpness", "spectrum", "landscape", "run"))


def test_a_page_without_a_name_replaces_an_earlier_page_and_says_so_but_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "saved.json").write_text('{"kind": "estimate", "value": 1.0, "stderr": 0.1}')
    page = tmp_path / "sharpkit-report.html"
    assert main(["report", "saved.json"]) == 0
    assert "replaced" not in capsys.readouterr().err
    written = page.stat().st_mtime - 3 * 86400
    os.utime(page, (written, written))
    assert main(["report", "saved.json"]) == 0
    assert "sharpkit-report.html, written 3 days ago, will be replaced" in capsys.readouterr().err
    assert page.stat().st_mtime > written and list(tmp_path.glob("*.html")) == [page]

    page.write_text("<p>my own notes</p>")
    for number in (2, 3):
        other = tmp_path / f"sharpkit-report-{number}.html"
        assert main(["report", "saved.json"]) == 0
        out, err = capsys.readouterr()
        assert f"sharpkit-report.html exists and is no page of sharpkit: the page will be {other.name}" in err
        assert page.read_text() == "<p>my own notes</p>" and str(other) in out and "<svg" not in other.read_text()[:10]
    assert main(["report", "saved.json", "--html", "sharpkit-report.html"]) == 0  # who names a file means it
    assert page.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize("arguments", [["dance"], ["measure", "a.py:f", "--tol", "-1"], ["spectrum", "a.py:f", "--k", "0"]])
def test_a_wrong_command_line_exits_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    err = capsys.readouterr().err
    assert all(command in err for command in ("demo", "measure", "spectrum", "doctor", "report"))


def test_a_pattern_that_picks_nothing_is_a_usage_error(target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["measure", f"{target}:objective", "--params", "nope.*"]) == 2
    assert "0.weight" in capsys.readouterr().err


def test_a_page_that_cannot_be_written_is_refused_before_the_work(target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["measure", f"{target}:objective", "--html", f"{target.parent}/missing/out.html"]) == 2
    err = capsys.readouterr().err
    assert "does not exist; make it first" in err
    assert "user's own print" not in err


def test_report_makes_the_page_of_a_saved_run(target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["measure", f"{target}:objective", "--json", "--html", str(tmp_path / "live.html")]) == 0
    saved = tmp_path / "run.json"
    saved.write_text(capsys.readouterr().out)
    assert main(["report", str(saved), "--html", str(tmp_path / "saved.html")]) == 0
    live, again = ((tmp_path / name).read_text() for name in ("live.html", "saved.html"))

    def sections(page: str) -> str:
        return page[page.index("<main>") : page.index("</main>")]

    assert sections(live) == sections(again)


@pytest.mark.parametrize("content", ["{", "[1, 2]", '{"a": 1}', '{"kind": "error", "message": "x"}', '{"kind": "run", "results": []}'])
def test_report_refuses_what_is_no_saved_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str) -> None:
    (tmp_path / "x.json").write_text(content)
    assert main(["report", str(tmp_path / "x.json"), "--html", str(tmp_path / "out.html")]) == 2
    assert "x.json" in capsys.readouterr().err
    assert not (tmp_path / "out.html").exists()


def test_report_of_a_target_measures_and_examines(target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, document, _ = run_json(capsys, "report", f"{target}:with_optimizer", "--html", str(tmp_path / "all.html"))
    assert code == 0
    assert [r["kind"] for r in document["results"]] == ["sharpness", "layer_sharpness", "diagnosis"]
    assert (tmp_path / "all.html").stat().st_size > 10_000


@pytest.mark.usefixtures("ctrl_c_reaches_what_is_started")
def test_ctrl_c_exits_130_without_a_traceback(target: Path) -> None:
    command = [sys.executable, "-m", "sharpkit", "spectrum", f"{target}:slow"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "ready" in line:
                break
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert "interrupted" in err
    assert "Traceback" not in err


@pytest.mark.slow  # the commands around the suite make the quick demo anyway, twice; this looks at what it says
def test_quick_demo_meets_the_stability_limit_and_writes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    code, document, err = run_json(capsys, "demo", "--quick", "--out", str(tmp_path / "demo.html"))
    assert code == 0
    assert "step" in err
    histories = [r for r in document["results"] if r["kind"] == "curvature_history"]
    mlp = histories[0]
    assert mlp["full_batch"]
    assert mlp["lambda_max"][0] < 0.7 * mlp["limit"][0]  # it starts well below the limit ...
    assert max(mlp["lambda_max"]) > 0.9 * mlp["limit"][0]  # ... and training carries it there
    assert mlp["loss"][-1] < 0.5 * mlp["loss"][0]
    assert len(histories) == 2
    assert Path(document["page"]).read_text().count("<svg ") >= 8


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("arguments", [["report", "saved.json", "--html", "page.html"], ["measure", "nothing.py:f", "--json"]])
def test_a_full_stdout_is_one_sentence_on_stderr_and_exit_code_1(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "saved.json").write_text('{"kind": "estimate", "value": 1.0, "stderr": 0.1}')
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(arguments) in (1, 2)
        monkeypatch.undo()
    err = capsys.readouterr().err
    assert "cannot write the answer to stdout: No space left on device" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_page_in_place_of_a_pipe_or_device_is_refused_before_any_work(
    kind: str, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = "/dev/null"
    if kind == "pipe":
        place = str(tmp_path / "page.html")
        os.mkfifo(place)
    assert main(["measure", f"{target}:objective", "--html", place]) == 2
    assert f"cannot write {place}: it is a pipe, a socket or a device" in capsys.readouterr().err
    assert not os.path.isfile(place)


@pytest.mark.parametrize(("text", "size"), [("8GiB", 8 * 2**30), ("500 MB", 5e8), ("1.5g", 1.5e9), ("64KiB", 65536), ("1000", 1000)])
def test_sizes_are_read_as_people_write_them(text: str, size: float) -> None:
    from sharpkit.cli.main import _size

    assert _size(text) == size
    for wrong in ("", "much", "-1GB", "0", "8GiB please", "1.2.3"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected a size such as 8GiB"):
            _size(wrong)
