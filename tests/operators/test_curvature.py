"""Graphs kept, dropped and rebuilt; pieces cut when memory is short; vectors and blocks checked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import built, conv, dense_empirical_fisher, dense_hessian, gaussian, labels, mlp, relative_error, tied
from torch import nn
from torch.nn import functional as F
from traces import untouched

import sharpkit as sk
from sharpkit.objective.memory import graph_bytes, human_bytes, is_out_of_memory
from sharpkit.operators.curvature import CurvatureOperator


def hessian(problem: Any, **settings: Any) -> sk.HessianOperator:
    return sk.HessianOperator(sk.Objective(problem.model, problem.batches, loss=problem.loss), **settings)


def forwards(model: nn.Module) -> list[int]:
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_graphs_are_built_once_and_reused() -> None:
    problem = mlp()
    calls = forwards(problem.model)
    H = hessian(problem)
    calls.clear()
    H.to_dense()
    assert len(calls) == len(problem.batches)


def test_a_write_that_changes_no_value_rebuilds_the_graph() -> None:
    """An optimizer step at rate 0, as in a warm-up: autograd refuses the older graph although the values are equal."""
    problem = mlp()
    H = hessian(problem)
    before = H.to_dense()
    with torch.no_grad():
        for p in problem.model.parameters():
            p.add_(0.0)
    assert torch.equal(H.to_dense(), before)


def test_a_small_memory_limit_keeps_no_graph_and_changes_no_answer() -> None:
    problem = mlp()
    calls = forwards(problem.model)
    H, free = hessian(problem, memory_limit=0), hessian(problem)
    v = gaussian(H.size)
    calls.clear()
    assert torch.equal(H @ v, free @ v)
    H @ v
    assert not H._kept
    assert len(calls) == 3 * len(problem.batches)


def test_a_limit_for_some_graphs_keeps_those_and_rebuilds_the_rest() -> None:
    problem = mlp()
    free = hessian(problem)
    v = gaussian(free.size)
    expected = free @ v
    H = hessian(problem, memory_limit=max(p.bytes_held for p in free._kept.values()))
    for _ in range(3):
        assert relative_error(H @ v, expected) < 1e-13
    assert 0 < len(H._kept) < len(problem.batches)


def test_graphs_kept_for_whole_batches_are_not_mixed_with_pieces_cut_later() -> None:
    problem = mlp()
    free = hessian(problem)
    v = gaussian(free.size)
    expected = free @ v
    H = hessian(problem, memory_limit=max(p.bytes_held for p in free._kept.values()))
    H @ v
    assert 0 < len(H._kept) < len(problem.batches)
    H.objective.micro_batch_size = 2  # as another operator of the same objective does when it runs out of memory
    assert relative_error(H @ v, expected) < 1e-12


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("can't allocate memory: 3 bytes")]
)
def test_out_of_memory_halves_the_pieces_and_answers_the_same(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    problem = mlp()
    expected = dense_hessian(problem.value, problem.params)
    build = sk.HessianOperator._build

    def limited(self: sk.HessianOperator, piece: Any) -> Any:
        if len(piece.batch[1]) > 1:
            raise error
        return build(self, piece)

    monkeypatch.setattr(sk.HessianOperator, "_build", limited)
    H = hessian(problem)
    with untouched(problem.model):
        assert relative_error(H.to_dense(), expected) < 1e-10
    assert H.objective.micro_batch_size == 1


def test_a_single_sample_that_does_not_fit_is_reported_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = mlp()
    H = hessian(problem)

    def never(self: Any, piece: Any) -> Any:
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(sk.HessianOperator, "_build", never)
    with (
        untouched(problem.model),
        pytest.raises(sk.OutOfMemoryError, match=r"iB free on cpu, 43 parameters, pieces of 1 sample that cannot be cut"),
    ):
        H @ gaussian(H.size)


def test_out_of_memory_where_cutting_would_change_the_function_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = conv()
    H = sk.HessianOperator(sk.Objective(problem.model, problem.batches, loss=problem.loss, mode="train"))
    monkeypatch.setattr(sk.HessianOperator, "_build", lambda self, piece: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
    with pytest.raises(sk.OutOfMemoryError, match="pieces of 4 samples that may not be cut"):
        H @ gaussian(H.size)


def test_a_batch_forecast_not_to_fit_is_cut_before_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    model = built(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    x, y = gaussian(128, 4), labels(128)
    expected = sk.HessianOperator(sk.Objective(model, (x, y), loss=F.cross_entropy)) @ gaussian(43)
    seen: list[int] = []
    build = sk.HessianOperator._build
    monkeypatch.setattr(sk.HessianOperator, "_build", lambda self, piece: (seen.append(len(piece.batch[1])), build(self, piece))[1])
    monkeypatch.setattr("sharpkit.operators.base.available_memory", lambda device: 20_000.0)
    H = sk.HessianOperator(sk.Objective(model, (x, y), loss=F.cross_entropy))
    assert relative_error(H @ gaussian(43), expected) < 1e-12
    assert max(seen) < 128
    assert H.objective.micro_batch_size is not None


def test_the_bytes_of_a_graph_are_those_of_the_tensors_it_saves() -> None:
    x = torch.randn(1000, requires_grad=True, dtype=torch.float64)
    saved: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kept = x.exp().sin().tanh().sum()
    saved.pop(x.untyped_storage().data_ptr(), None)
    plain = x.exp().sin().tanh().sum()
    assert graph_bytes([plain], exclude=[x]) == sum(saved.values())
    del kept


def test_bytes_held_grow_with_the_batch() -> None:
    model = built(lambda: nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 3)))
    held = []
    for n in (50, 500):
        H = sk.HessianOperator(sk.Objective(model, (gaussian(n, 16), labels(n)), loss=F.cross_entropy))
        H @ gaussian(H.size)
        held.append(H.bytes_kept())
    assert 5 < held[1] / held[0] < 11
    assert held[1] > 500 * 64 * 8, "at least the hidden activations"


def test_memory_words() -> None:
    assert human_bytes(512) == "512 B"
    assert human_bytes(1536) == "1.5 KiB"
    assert human_bytes(2**41) == "2 TiB"
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(ValueError("out of memory"))


@pytest.mark.parametrize(
    ("vector", "error", "match"),
    [
        (torch.ones(42, dtype=torch.float64), ValueError, r"expected shape \(43,\)"),
        (torch.ones(43), ValueError, r"float64 vectors, got torch.float32"),
        (torch.ones(43, dtype=torch.float64, device="meta"), ValueError, "lives on cpu, the vector on meta"),
        (torch.ones(43, 2, 2, dtype=torch.float64), ValueError, "expected shape"),
        ([1.0] * 43, TypeError, "got list"),
        (torch.full((43,), torch.nan, dtype=torch.float64), sk.NonFiniteError, "the vector itself"),
    ],
)
def test_vectors_of_the_wrong_kind_are_named(vector: Any, error: type[Exception], match: str) -> None:
    problem = mlp()
    H = hessian(problem)
    with untouched(problem.model), pytest.raises(error, match=match):
        H @ vector


def test_vectors_that_need_gradients_and_no_columns_at_all() -> None:
    H = hessian(mlp())
    v = gaussian(H.size).requires_grad_()
    assert not (H @ v).requires_grad
    assert torch.equal(H @ v, H @ v.detach())
    assert (H @ torch.zeros(H.size, 0, dtype=torch.float64)).shape == (43, 0)


def test_a_point_without_second_derivative_is_reported() -> None:
    model = nn.Linear(3, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    H = sk.HessianOperator(
        sk.Objective(model, gaussian(4, 3), closure=lambda m, x: m.weight.norm() + (m.weight**2).sum().sqrt() + m(x).mean())
    )
    with pytest.raises(sk.NonFiniteError, match="no second derivative"):
        H @ gaussian(3)


@pytest.mark.parametrize(
    "kind", [sk.HessianOperator, sk.GaussNewtonOperator, sk.EmpiricalFisherOperator, sk.GradientCovarianceOperator, sk.FisherOperator]
)
def test_blocks_are_diagonal_blocks(kind: Any) -> None:
    problem = mlp()
    A = kind(sk.Objective(problem.model, problem.batches, loss=problem.loss))
    dense = A.to_dense()
    for pattern in ("0.*", lambda name, p: p.ndim == 1):
        block = A.block(pattern)
        where = A.layout.indices(block.layout.names)
        assert relative_error(block.to_dense(), dense[where][:, where]) < 1e-10
    where = A.layout.indices(["2.bias"])
    derived = (2 * A + 0.5).block("2.bias")
    assert relative_error(derived.to_dense(), 2 * dense[where][:, where] + 0.5 * torch.eye(3, dtype=torch.float64)) < 1e-10
    with pytest.raises(ValueError, match="picks no parameter"):
        A.block("nothing.*")


def test_settings_of_operators_are_checked() -> None:
    problem = mlp()
    objective = sk.Objective(problem.model, problem.batches, loss=problem.loss)
    with pytest.raises(ValueError, match="retain must be"):
        sk.HessianOperator(objective, retain="always")
    with pytest.raises(TypeError, match="Objective"):
        sk.HessianOperator(problem.model)  # type: ignore[arg-type]
    assert issubclass(sk.FisherOperator, CurvatureOperator)
    assert hessian(problem, memory_limit=7.0).block("0.*")._memory_limit == 7.0


def test_per_sample_gradients_by_closure_equal_those_by_loss() -> None:
    problem = tied()
    closure = lambda m, b: F.cross_entropy(m(b[0]).flatten(0, 1), b[1].flatten())  # noqa: E731
    objective = sk.Objective(problem.model, problem.batches, closure=closure)
    for settings in ({}, {"retain": False}):
        F_hat = sk.EmpiricalFisherOperator(objective, **settings)  # type: ignore[arg-type]
        assert relative_error(F_hat.to_dense(), dense_empirical_fisher(problem)) < 1e-10
