"""A plan tells what a call will take, without leaving a trace of having tried it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sharpkit as sk


def objective(size: int = 64, batch: int = 16, width: int = 30) -> sk.Objective:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, width), nn.Tanh(), nn.Linear(width, 3))
    x, y = torch.randn(size, 10), torch.randint(3, (size,))
    batches = [(x[i : i + batch], y[i : i + batch]) for i in range(0, size, batch)]
    return sk.Objective(model, batches, loss=F.cross_entropy)


@pytest.mark.parametrize(
    ("call", "arguments", "close"),
    [
        ("measure", {}, 1.3),
        ("measure", {"num_probes": 3, "num_steps": 8}, 3.0),
        ("eigenpairs", {"k": 5}, 2.0),
        ("spectral_density", {"num_probes": 4, "num_steps": 20}, 1.0),
        ("trace", {"rtol": 0.05}, 3.0),
        ("trace", {"num_matvecs": 60}, 1.0),
        ("diagonal", {"num_probes": 80}, 1.0),
        ("frobenius_norm", {"rtol": 0.02}, 3.0),
    ],
)
def test_the_products_of_a_plan_are_those_of_the_call(call: str, arguments: dict[str, Any], close: float) -> None:
    f = objective()
    made = sk.plan(f, call, **arguments)
    result = getattr(sk, call)(f if call == "measure" else sk.HessianOperator(f), **arguments)
    assert result.num_matvecs / close <= made.num_matvecs <= result.num_matvecs * close
    assert made.call == call and made.seconds > 0 and made.peak_bytes > 0 and 0 < made.tried <= max(70, made.num_matvecs)
    assert str(made).startswith(f"{call}: about {made.num_matvecs} products, ")


def test_the_memory_is_that_of_the_vectors_and_of_the_graphs() -> None:
    f = objective()
    vector = f.num_parameters * 4
    made = sk.plan(f, "spectral_density", num_probes=1, num_steps=40)
    kept = sk.HessianOperator(f)
    kept @ torch.ones(f.num_parameters)
    around = made.peak_bytes - 41 * vector - kept.bytes_kept()
    assert 2 * vector <= around <= 6 * vector + 1.5 * kept.bytes_kept()
    assert made.choices["graphs"].startswith("all kept") and made.choices["basis"].startswith("41 vectors, ")
    assert made.choices["batches"] == f"joined to {f.joining.size} samples at most" and made.choices["products"] == "one by one"


def test_choices_tell_what_is_done_where_memory_is_short(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sharpkit.objective.memory.used_memory", lambda device: 0.0)  # a test process breathes by more than these limits
    f = objective(size=256, batch=256)
    roomy = sk.plan(f, "measure")
    assert roomy.choices["batches"] == "as they come"
    tight = sk.plan(f, "measure", memory_limit=60 * f.num_parameters * 4)
    assert tight.choices["batches"].startswith("in pieces of") and tight.peak_bytes < roomy.peak_bytes
    filed = sk.plan(objective(), "measure", offload=tmp_path)
    assert filed.choices["basis"].endswith(f", in a file in {tmp_path}") and filed.peak_bytes < roomy.peak_bytes / 3
    with pytest.raises(sk.OutOfMemoryError, match="a basis of 33 vectors"):
        sk.plan(f, "measure", memory_limit=30 * f.num_parameters * 4)


def test_a_plan_leaves_everything_as_it_was() -> None:
    f = objective()
    state, rng = copy.deepcopy(f.model.state_dict()), torch.get_rng_state()
    for call in ("measure", "trace"):
        sk.plan(f, call)
    assert all(torch.equal(value, state[name]) for name, value in f.model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng) and all(p.grad is None for p in f.model.parameters()) and f.model.training


def test_a_matrix_can_be_planned_for_and_a_call_that_ends_at_once_too() -> None:
    made = sk.plan(torch.eye(3), "trace")
    assert (made.num_matvecs, made.call) == (3, "trace")
    assert sk.plan(torch.eye(40), "eigenpairs", k=2).num_matvecs > 2
    assert sk.measuring.plan.Plan.from_dict(made.to_dict()) == made


def test_what_cannot_be_planned_is_refused() -> None:
    with pytest.raises(ValueError, match="call must be one of 'measure', 'eigenpairs'"):
        sk.plan(torch.eye(3), "race")
    with pytest.raises(TypeError, match="eigenpairs has no argument 'num_probes' to plan with; it has k, which, tol"):
        sk.plan(torch.eye(3), "eigenpairs", num_probes=3)
    with pytest.raises(ValueError, match="k must be between 1 and n = 3"):
        sk.plan(torch.eye(3), "eigenpairs", k=7)


def test_the_first_progress_of_a_long_call_tells_its_memory_and_choices() -> None:
    f, seen = objective(), list[sk.Progress]()
    sk.measure(f, callback=seen.append)
    assert seen[0].peak_bytes > 33 * f.num_parameters * 4 and set(seen[0].choices) == {"batches", "graphs", "products", "basis"}
    assert seen[0].expected == 192


def test_a_checkpoint_is_planned_with_its_disk_and_not_written(tmp_path: Path) -> None:
    matrix = torch.diag(torch.linspace(0, 1, 500).double())
    planned = sk.plan(matrix, "spectral_density", num_probes=4, num_steps=20, checkpoint=tmp_path / "kept")
    assert planned.choices["checkpoint"] == f"up to 312 KiB in {str(tmp_path / 'kept')!r}"  # 80 products of 500 numbers
    assert not (tmp_path / "kept").exists()
