"""A long call with `checkpoint=` that is killed and made again goes on, to the same numbers; of anything else it is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import gaussian, labels
from torch import Tensor, nn
from torch.nn import functional as F

import sharpkit as sk
from sharpkit import _checkpoint
from sharpkit._errors import DocumentError
from sharpkit.linalg.overview import spectral_overview
from sharpkit.training_run import TrainingRun

ROOT = Path(__file__).parents[1]


def objective(*, shift: float = 0.0, data_seed: int = 3, **settings: Any) -> sk.Objective:
    """Of an MLP of 293 parameters."""
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 5)).double()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(gaussian(p.numel(), seed=i).view_as(p) * 0.4 + shift)
    data = gaussian(40, 12, seed=data_seed), labels(40, classes=5)
    return sk.Objective(model, data, loss=F.cross_entropy, **settings)


def hessian(**settings: Any) -> sk.HessianOperator:
    return sk.HessianOperator(objective(**settings))


CALLS: dict[str, Callable[..., Any]] = {
    "eigenpairs": lambda **given: sk.eigenpairs(hessian(), k=4, **given),
    "eigenpairs restarted": lambda **given: sk.eigenpairs(hessian(), k=3, basis_size=15, tol=1e-8, **given),
    "deflated, scaled and shifted": lambda **given: sk.eigenpairs(
        2 * hessian().deflate(torch.eye(293).double()[:, :2], torch.ones(2).double()) + 1.0, k=2, **given
    ),
    "trace": lambda **given: sk.trace(hessian(), rtol=0.15, **given),
    "hutchinson": lambda **given: sk.trace(hessian(), method="hutchinson", num_matvecs=60, **given),
    "hutch++": lambda **given: sk.trace(hessian(), method="hutch++", num_matvecs=40, **given),
    "xtrace": lambda **given: sk.trace(hessian(), method="xtrace", num_matvecs=30, **given),
    "density": lambda **given: sk.spectral_density(hessian(), num_probes=3, num_steps=12, **given),
    "one after another": lambda **given: sk.spectral_density(hessian(), num_probes=3, num_steps=8, max_seconds=1e6, **given),
    "overview": lambda **given: spectral_overview(hessian(), num_probes=3, num_steps=12, **given),
    "frobenius norm": lambda **given: sk.frobenius_norm(hessian(), rtol=0.01, **given),
    "diagonal": lambda **given: sk.diagonal(hessian(), num_probes=30, **given),
    "measure": lambda **given: sk.measure(objective(), num_probes=3, num_steps=10, **given),
    "per layer": lambda **given: sk.per_layer(objective(), **given),
    "measure with Adam": lambda **given: measured_with_adam(**given),
}
ONE_BY_ONE = ("eigenpairs", "eigenpairs restarted", "deflated, scaled and shifted", "xtrace", "one after another")
FAST = ("eigenpairs", "trace", "density", "measure with Adam")  # the others by `pytest -m slow`
FEW_REPORTS = ("hutchinson", "frobenius norm", "diagonal")  # many products at once


def measured_with_adam(**given: Any) -> sk.Sharpness:
    it = objective()
    optimizer = torch.optim.Adam(it.model.parameters(), lr=1e-3)
    gradient = it.gradient()[1]
    before = [p.detach().clone() for p in it.model.parameters()]
    for p, g in zip(it.layout.params, it.layout.split(gradient), strict=True):
        p.grad = g
    optimizer.step()
    with torch.no_grad():
        for p, was in zip(it.model.parameters(), before, strict=True):
            p.copy_(was)
            p.grad = None
    return sk.measure(it, optimizer=optimizer, num_probes=3, num_steps=10, **given)


class Killed(Exception):
    pass


class KilledAfter:
    """A callback that ends the call at a report, as a signal would."""

    def __init__(self, reports: int) -> None:
        self.left = reports

    def __call__(self, progress: sk.Progress) -> None:
        self.left -= 1
        if self.left < 0:
            raise Killed


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is written at once, whatever it costs."""
    monkeypatch.setattr(_checkpoint, "_SHARE", 1e9)
    monkeypatch.setattr(_checkpoint, "_WORTH", 0.0)


def numbers(result: Any) -> dict[str, np.ndarray[Any, Any]]:
    """All tensors and numbers of a result by their path, without its seconds."""
    if isinstance(result, Tensor):
        return {"": result.double().numpy()}
    if isinstance(result, bool | int | float):
        return {"": np.array(float(result))}
    if not dataclasses.is_dataclass(result):
        return {}
    fields = [f.name for f in dataclasses.fields(result) if f.name != "seconds"]
    return {f"{name}.{path}": array for name in fields for path, array in numbers(getattr(result, name)).items()}


def largest_difference(one: Any, other: Any) -> float:
    a, b = numbers(one), numbers(other)
    assert a.keys() == b.keys() and a
    gaps = []
    for key in a:
        if "shares" in key or "vectors" in key or not a[key].size:
            continue
        scale = max(1e-3, float(np.abs(a[key][np.isfinite(a[key])]).max(initial=0.0)))
        np.testing.assert_array_equal(np.isfinite(a[key]), np.isfinite(b[key]))
        gaps.append(float(np.abs(np.nan_to_num(a[key] - b[key])).max()) / scale)
    return max(gaps)


@pytest.mark.parametrize("name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CALLS])
def test_a_call_that_was_killed_twice_ends_with_the_numbers_of_one_that_was_not(name: str, tmp_path: Path, eager: None) -> None:
    call, made, before = CALLS[name], list[int](), None
    multiply = sk.HessianOperator._product

    def counting(self: Any, vectors: Tensor) -> Tensor:
        made[-1] += 1 if vectors.ndim == 1 else vectors.shape[1]
        return multiply(self, vectors)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sk.HessianOperator, "_product", counting)
        made.append(0)
        plain = call()
        for reports in (3, 5) if name not in FEW_REPORTS else (1, 2):
            made.append(0)
            with pytest.raises(Killed):
                call(checkpoint=tmp_path / "kept", callback=KilledAfter(reports))
        before = sorted(path.name for path in (tmp_path / "kept").iterdir())
        made.append(0)
        resumed = call(checkpoint=tmp_path / "kept")
        made.append(0)
        again = call(checkpoint=tmp_path / "kept")
    # products that are made several at once may be made in another way, by the clock, as in two calls that nobody ended
    assert largest_difference(plain, resumed) <= (0.0 if name in ONE_BY_ONE else 1e-12)
    assert largest_difference(resumed, again) == 0.0
    if hasattr(resumed, "to_dict"):
        assert json.dumps(resumed.to_dict()) == json.dumps(again.to_dict()) and repr(resumed) == repr(again)
    known = 0 if name.startswith(("measure", "per")) else 1  # the product by which the matrix is known again; an objective is by its loss
    assert made[4] == known, "a finished call is not made again"
    assert made[3] < made[0], "what was kept is not made again"
    assert sum(made[1:4]) <= made[0] + 3 * known + 2 * 32, (
        "each kill costs no more than what was under way, and the products that are known"
    )
    assert len(before) > 3 or name == "diagonal"
    after = sorted(path.name for path in (tmp_path / "kept").iterdir())
    assert len(after) == 3, "of a finished call its result alone is left"


def refusals() -> dict[str, tuple[Callable[..., Any], str]]:
    return {
        "another call": (lambda **given: sk.trace(hessian(), **given), "holds a call of eigenpairs, this one is of trace"),
        "other arguments": (lambda **given: sk.eigenpairs(hessian(), k=5, **given), "k was 4 and is 5"),
        "a start": (lambda **given: sk.eigenpairs(hessian(), k=4, initial=gaussian(293), **given), "initial was None and is a tensor"),
        "other parameters": (lambda **given: sk.eigenpairs(hessian(shift=1e-9), k=4, **given), "parameters and buffers: check sum"),
        "other data": (lambda **given: sk.eigenpairs(hessian(data_seed=4), k=4, **given), "was begun with a product"),
        "another mode": (lambda **given: sk.eigenpairs(hessian(mode="train"), k=4, **given), "train mode"),
        "another matrix": (
            lambda **given: sk.eigenpairs(sk.GaussNewtonOperator(objective()), k=4, **given),
            "GaussNewtonOperator of 293 rows",
        ),
        "a multiple": (lambda **given: sk.eigenpairs(2 * hessian(), k=4, **given), "ScaledOperator of HessianOperator"),
    }


def test_a_folder_of_anything_else_is_refused(tmp_path: Path, eager: None) -> None:
    kept = tmp_path / "kept"
    with pytest.raises(Killed):
        CALLS["eigenpairs"](checkpoint=kept, callback=KilledAfter(4))
    for name, (call, said) in refusals().items():
        with pytest.raises(DocumentError, match=said):
            call(checkpoint=kept)
        assert name
    with pytest.raises(DocumentError, match="in use by another call"):
        CALLS["eigenpairs"](checkpoint=kept, callback=lambda progress: CALLS["eigenpairs"](checkpoint=kept))
    CALLS["eigenpairs"](checkpoint=str(kept), memory_limit=1e9, offload=True)  # what changes no number may differ
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(DocumentError, match=r"holds other things \('notes.txt'\)"):
        CALLS["eigenpairs"](checkpoint=tmp_path / "other")
    with pytest.raises(ValueError, match="is a file"):
        CALLS["eigenpairs"](checkpoint=tmp_path / "other" / "notes.txt")
    with pytest.raises(TypeError, match="checkpoint must be a path"):
        CALLS["eigenpairs"](checkpoint=3)
    with pytest.raises(TypeError, match="takes an Objective"):
        sk.measure(nn.Linear(1, 1), checkpoint=tmp_path / "new")  # type: ignore[arg-type]


def test_a_damaged_file_is_refused_whatever_byte_is_wrong(tmp_path: Path, eager: None) -> None:
    with pytest.raises(Killed):
        CALLS["eigenpairs"](checkpoint=tmp_path / "kept", callback=KilledAfter(4))
    for name in ("checkpoint.json", "steps-000002.npz"):
        whole = (tmp_path / "kept" / name).read_bytes()
        for change in (whole[: len(whole) // 2], b"", whole[:90] + bytes([whole[90] ^ 255]) + whole[91:]):
            shutil.rmtree(tmp_path / "copy", ignore_errors=True)
            shutil.copytree(tmp_path / "kept", tmp_path / "copy")
            (tmp_path / "copy" / name).write_bytes(change)
            with pytest.raises(DocumentError, match=r"damaged|begun on another|begun with"):
                CALLS["eigenpairs"](checkpoint=tmp_path / "copy")
    (tmp_path / "kept" / "steps-000099.npz.tmp").write_bytes(b"torn")  # a write that a kill ended is none
    assert bool(CALLS["eigenpairs"](checkpoint=tmp_path / "kept").converged.all())


def test_a_step_that_is_missing_is_made_again(tmp_path: Path, eager: None) -> None:
    plain = CALLS["eigenpairs"]()
    with pytest.raises(Killed):
        CALLS["eigenpairs"](checkpoint=tmp_path, callback=KilledAfter(8))
    (tmp_path / "steps-000003.npz").unlink()
    assert largest_difference(plain, CALLS["eigenpairs"](checkpoint=tmp_path)) == 0.0


def test_steps_of_another_course_are_made_again(tmp_path: Path, eager: None, caplog: pytest.LogCaptureFixture) -> None:
    plain = CALLS["eigenpairs"]()
    with pytest.raises(Killed):
        CALLS["eigenpairs"](checkpoint=tmp_path, callback=KilledAfter(8))
    entries = sorted(tmp_path.glob("steps-*.npz"))
    with np.load(entries[2]) as archive:
        members = dict(archive)
    members["a1"] = members["a1"] * (1 + 1e-9 * np.sign(members["a1"]))  # an earlier product changes all vectors after it
    np.savez(entries[2], **members)
    resumed = CALLS["eigenpairs"](checkpoint=tmp_path)
    assert "belong to another course" in caplog.text
    assert float((plain.values - resumed.values).abs().max()) < 1e-8


def test_writing_takes_no_more_than_its_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, wrote = [0.0], list[float]()
    write = _checkpoint._write

    def slow(path: Path, content: Any) -> int:
        wrote.append(now[0])
        now[0] += 0.1
        return write(path, content)

    def product(v: Tensor) -> Tensor:
        now[0] += 0.05
        return torch.linspace(0, 1, 300).double() * v

    monkeypatch.setattr(_checkpoint.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(_checkpoint, "_write", slow)
    sk.eigenpairs(sk.as_operator(product, size=300), k=5, checkpoint=tmp_path)
    assert len(wrote) > 2, "it is written before the end"
    inside = len(wrote) - 2  # without the arguments before, and the result after
    assert inside * 0.1 <= _checkpoint._SHARE * now[0] + 0.1


def test_a_disk_that_is_full_costs_the_checkpoint_and_not_the_numbers(tmp_path: Path, eager: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: Any) -> int:
        if path.name.startswith("steps"):
            raise OSError(28, "No space left on device")
        return write(path, content)

    write = _checkpoint._write
    monkeypatch.setattr(_checkpoint, "_write", full)
    with pytest.warns(sk.SharpkitWarning, match="No space left on device"):
        pairs = CALLS["eigenpairs"](checkpoint=tmp_path)
    assert largest_difference(CALLS["eigenpairs"](), pairs) == 0.0


def test_seconds_are_those_of_all_attempts(tmp_path: Path, eager: None) -> None:
    def product(v: Tensor) -> Tensor:
        now[0] += 1.0
        return torch.linspace(0, 1, 200).double() * v

    now = [0.0]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(_checkpoint.time, "perf_counter", lambda: now[0])
        with pytest.raises(Killed):
            sk.spectral_density(
                sk.as_operator(product, size=200), num_probes=3, num_steps=6, max_seconds=12.5, checkpoint=tmp_path, callback=KilledAfter(7)
            )
        now[0] = 1000.0
        with pytest.warns(sk.ConvergenceWarning):
            density = sk.spectral_density(
                sk.as_operator(product, size=200), num_probes=3, num_steps=6, max_seconds=12.5, checkpoint=tmp_path
            )
    assert density.num_matvecs == 13 and density.num_probes == 2, "the time that is allowed is that of all attempts together"
    assert density.seconds == 13.0


def killed(moments: int) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "experiments.scale_resume", "--moments", str(moments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def check_killed(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if row["kind"] == "one":
            assert row["seconds"] < 30
            assert all("connection to another process was lost" in error or "it had ended" in error for error in row["errors"]), row
        else:
            assert row["difference on 3"] <= (0.0 if row["call"] == "eigenpairs" else 1e-12), row
            assert row["difference on 2"] <= 1e-9, row


@pytest.mark.slow
@pytest.mark.distributed
def test_kill_9_of_one_process_ends_the_others_and_of_all_costs_no_numbers() -> None:
    check_killed(killed(1))


@pytest.mark.slow
@pytest.mark.distributed
def test_kill_9_at_more_moments() -> None:
    check_killed(killed(8))


# -- calls that train ---------------------------------------------------------------------------------------------------------
def task(*, seed: int = 0) -> tuple[Tensor, Tensor]:
    x = gaussian(64, 6, seed=seed).float()
    return x, (x[:, 0] > 0).long()


def network(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 2))


def sgd(model: nn.Module, width: int) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.2)


def drawn(seed: int) -> nn.Module:
    return network(8)


def curve(optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD, **given: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = network(8)
    it = sk.Objective(model, task(), loss=F.cross_entropy)
    return sk.learning_rate_curve(it, optimizer(model.parameters(), lr=0.1), pilot=10, steps=10, batch_sizes=[8, 16, 64], **given)


TRAINING: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "curve": (curve, (1, 3, 12)),
    "curve, adaptive": (lambda **given: curve(torch.optim.Adam, **given), (2, 9)),
    "race": (
        lambda **given: sk.race(
            sk.RaceProblem(drawn, torch.optim.SGD, [task()], F.cross_entropy), max_gradients=100, seeds=2, rates=[0.1, 1.0], **given
        ),
        (2, 5),
    ),
    "learning rates": (
        lambda **given: sk.transfer.learning_rate_transfer(
            network, [4, 8], optimizer=sgd, data=[task()], loss=F.cross_entropy, steps=4, seeds=2, **given
        ),
        (1,),
    ),
    "sharpness": (
        lambda **given: sk.transfer.sharpness_transfer(
            network, [4, 8], optimizer=sgd, data=[task()], loss=F.cross_entropy, steps=4, every=2, seeds=2, **given
        ),
        (1, 3),
    ),
    "verdict": (
        lambda **given: sk.transfer.diagnose(
            network, widths=[32, 64, 128], optimizer=sgd, data=[task()], loss=F.cross_entropy, mode="full", seeds=1, **given
        ),
        (2, 6),
    ),
}


def without_time(document: Any) -> Any:
    if isinstance(document, dict):
        return {key: without_time(value) for key, value in document.items() if key not in ("seconds", "num_reused")}
    return [without_time(item) for item in document] if isinstance(document, list) else document


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ("learning rates", "sharpness") else pytest.mark.slow) for name in TRAINING]
)
def test_a_call_that_trains_and_was_killed_ends_with_the_same_document(name: str, tmp_path: Path, eager: None) -> None:
    call, kills = TRAINING[name]
    steps, step = list[int](), TrainingRun._step

    def counting(self: Any, batch: Any) -> float:
        steps[-1] += 1
        return step(self, batch)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(TrainingRun, "_step", counting)
        steps.append(0)
        plain = call()
        for reports in kills:
            steps.append(0)
            with pytest.raises(Killed):
                call(checkpoint=tmp_path / "kept", callback=KilledAfter(reports))
        steps.append(0)
        resumed = call(checkpoint=tmp_path / "kept")
        steps.append(0)
        again = call(checkpoint=tmp_path / "kept")
    assert json.dumps(without_time(plain.to_dict())) == json.dumps(without_time(resumed.to_dict()))
    assert json.dumps(resumed.to_dict()) == json.dumps(again.to_dict())
    assert steps[-1] == 0 and steps[-2] < steps[0]


def test_training_anything_else_is_refused(tmp_path: Path, eager: None) -> None:
    def rates(data: Any, build: Callable[[int], nn.Module] = network, loss: Any = F.cross_entropy, **given: Any) -> Any:
        return sk.transfer.learning_rate_transfer(build, [4, 8], optimizer=sgd, data=data, loss=loss, steps=4, seeds=1, **given)

    def other(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 2))

    def smoothed(z: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(z, t, label_smoothing=0.1)

    with pytest.raises(Killed):
        rates([task()], checkpoint=tmp_path / "rates", callback=KilledAfter(1))
    with pytest.raises(DocumentError, match=r"data: [0-9a-f]* then, [0-9a-f]* now"):
        rates([task(seed=1)], checkpoint=tmp_path / "rates")
    with pytest.raises(DocumentError, match="was begun with the first loss"):
        rates([task()], build=other, checkpoint=tmp_path / "rates")
    with pytest.raises(DocumentError, match=r"loss was cross_entropy and is .*smoothed"):
        rates([task()], loss=smoothed, checkpoint=tmp_path / "rates")
    with pytest.raises(Killed):
        curve(checkpoint=tmp_path / "curve", callback=KilledAfter(0))
    with pytest.raises(DocumentError, match=r"optimizer was SGD .* and is Adam"):
        curve(torch.optim.Adam, checkpoint=tmp_path / "curve")
    with pytest.raises(TypeError, match="race takes a RaceProblem"):
        sk.race(network(4), checkpoint=tmp_path / "race")  # type: ignore[arg-type]
