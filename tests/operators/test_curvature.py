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
from sharpkit.objective.memory import graph_cost, human_bytes, is_out_of_memory
from sharpkit.operators.curvature import CurvatureOperator


def hessian(problem: Any, *, join: bool = True, **settings: Any) -> sk.HessianOperator:
    objective = sk.Objective(problem.model, problem.batches, loss=problem.loss)
    objective.joining.allowed = join
    return sk.HessianOperator(objective, **settings)


def forwards(model: nn.Module) -> list[int]:
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_graphs_are_built_once_and_reused() -> None:
    problem = mlp()
    calls = forwards(problem.model)
    H = hessian(problem, join=False)
    calls.clear()
    H.to_dense()
    assert len(calls) == len(problem.batches)


def test_small_batches_are_joined_and_give_the_same_matrix() -> None:
    problem = mlp()
    assert len(problem.batches) > 1
    separate, joined = hessian(problem, join=False), hessian(problem)
    assert relative_error(joined.to_dense(), separate.to_dense()) < 1e-12
    assert (len(joined._kept), len(separate._kept)) == (1, len(problem.batches))
    (loss, gradient), (value, slope) = joined.objective.gradient(), separate.objective.gradient()
    assert relative_error(gradient, slope) < 1e-13
    assert abs(loss - value) + abs(joined.objective.value() - value) < 1e-13


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ragged_masked_batches_are_joined_where_their_sizes_allow_it(reduction: str) -> None:
    """Two batches of length 5 in a row, then one of 7, then two of 5 again, some targets masked."""
    model = built(lambda: nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 11)))
    batches = []
    for number, length in enumerate((5, 5, 7, 5, 5)):
        tokens = torch.randint(0, 11, (2 + number % 2, length), generator=torch.Generator().manual_seed(number))
        batches.append((tokens, tokens.masked_fill(tokens < number, -100)))

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(output.flatten(0, 1), target.flatten(), reduction=reduction)

    H, whole = (sk.HessianOperator(sk.Objective(model, batches, loss=loss, micro_batch_size=size)) for size in ("auto", None))
    assert relative_error(H.to_dense(), whole.to_dense()) < 1e-12
    assert (len(H._kept), len(whole._kept)) == (3, 5)


def test_batches_whose_joined_loss_is_another_are_not_joined() -> None:
    """Two batches look like one of four where a closure tells them apart; with check=False nothing was tried before."""
    model = built(lambda: nn.Linear(3, 2))
    batches = [(gaussian(4, 3, seed=seed), labels(4) % 2) for seed in range(3)]

    def closure(m: nn.Module, batch: Any) -> torch.Tensor:
        return F.cross_entropy(m(batch[0]), batch[1]) * (1.0 if len(batch[1]) == 4 else 2.0)

    settings: dict[str, Any] = {"closure": closure, "count": lambda batch: len(batch[1]), "reduction": "mean", "check": False}
    H, whole = (sk.HessianOperator(sk.Objective(model, batches, micro_batch_size=size, **settings)) for size in ("auto", None))
    assert relative_error(H.to_dense(), whole.to_dense()) < 1e-14
    assert len(H._kept) == 3


def test_several_products_at_once_are_those_of_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = mlp()
    clock = iter(range(10_000))  # each look at it is a second later: at once is k times as fast
    monkeypatch.setattr("sharpkit.operators.blocks.time.perf_counter", lambda: float(next(clock)))
    H, alone = hessian(problem), hessian(problem)
    V = gaussian(H.size, 40)
    expected = torch.stack([alone @ v.contiguous() for v in V.T], dim=1)
    for _ in range(3):
        assert relative_error(H @ V, expected) < 1e-13
    assert H.blocks.width == 32
    assert H.num_matvecs == 120


def test_what_has_no_rule_for_several_vectors_goes_one_by_one() -> None:
    model = built(lambda: nn.Linear(4, 3))

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
            (x,) = ctx.saved_tensors
            return 2 * x * g

    objective = sk.Objective(model, (gaussian(6, 4), labels(6)), loss=lambda z, y: F.cross_entropy(Square.apply(z), y))
    plain = sk.Objective(model, (gaussian(6, 4), labels(6)), loss=lambda z, y: F.cross_entropy(z * z, y))
    H = sk.HessianOperator(objective)
    assert relative_error(H @ gaussian(15, 12), sk.HessianOperator(plain) @ gaussian(15, 12)) < 1e-12
    assert H.blocks.width == 1


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("no batching rule")])
def test_products_at_once_that_fail_are_made_fewer_at_a_time(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    problem = mlp()
    H, widths = hessian(problem), list[int]()
    expected = hessian(problem) @ gaussian(H.size, 40)
    grad = torch.autograd.grad

    def limited(*args: Any, **settings: Any) -> Any:
        if settings.get("is_grads_batched"):
            widths.append(len(settings["grad_outputs"][0]))
            if widths[-1] > 8:
                raise error
        return grad(*args, **settings)

    monkeypatch.setattr(torch.autograd, "grad", limited)
    assert relative_error(H @ gaussian(H.size, 40), expected) < 1e-13
    assert widths[0] == 32
    assert (len(widths) == 1) == (not is_out_of_memory(error))


def test_a_rule_for_several_vectors_that_is_wrong_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = mlp()
    H, expected = hessian(problem), hessian(problem) @ gaussian(43, 12)
    grad = torch.autograd.grad

    def wrong(*args: Any, **settings: Any) -> Any:
        return (
            [g if g is None else 1.01 * g for g in grad(*args, **settings)] if settings.get("is_grads_batched") else grad(*args, **settings)
        )

    monkeypatch.setattr(torch.autograd, "grad", wrong)
    assert relative_error(H @ gaussian(H.size, 12), expected) < 1e-13
    assert H.blocks.width == 1


def test_a_product_over_kept_graphs_touches_no_state_of_the_model() -> None:
    """It needs no guard, which costs as much as the product of a small model; with hooks or inside inference_mode it takes one."""
    problem = mlp()
    H, guarded = hessian(problem), list[int]()
    v = gaussian(H.size)
    expected = H @ v
    undisturbed = H.objective.undisturbed
    H.objective.undisturbed = lambda: (guarded.append(1), undisturbed())[1]  # type: ignore[method-assign]
    assert torch.equal(H @ v, expected)
    assert not guarded
    handle = problem.params[0].register_hook(lambda g: 2 * g)
    assert torch.equal(H @ v, expected)
    handle.remove()
    with torch.inference_mode():
        assert not (H @ v).is_inference()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(H @ v, expected)
    assert len(guarded) == 3


def _scale(model: nn.Module) -> None:
    model[0].weight.data.mul_(2)  # behind autograd's back: no version tells


def _held(model: nn.Module) -> None:
    model[2].weight = nn.Parameter(2 * model[2].weight.detach(), requires_grad=False)


def _module(model: nn.Module) -> None:
    model[1] = nn.Sigmoid()


def _buffer(model: nn.Module) -> None:
    model[3].scale = torch.full((), 3.0, dtype=torch.float64)


@pytest.mark.parametrize("change", [_scale, _held, _module, _buffer])
def test_what_is_replaced_in_the_model_is_noticed(change: Any) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.ones((), dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.scale * x

    model = built(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), Scaled()))
    model[2].requires_grad_(False)
    objective = sk.Objective(model, (gaussian(6, 3), labels(6, classes=2)), loss=F.cross_entropy)
    H, v = sk.HessianOperator(objective), gaussian(16)
    before = H @ v
    change(model)
    expected = sk.HessianOperator(sk.Objective(model, (gaussian(6, 3), labels(6, classes=2)), loss=F.cross_entropy)) @ v
    assert relative_error(before, expected) > 1e-3
    assert relative_error(H @ v, expected) < 1e-12
    assert relative_error(H @ v, expected) < 1e-12, "and again, over the graph that was rebuilt"


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
    H, free = hessian(problem, join=False, memory_limit=0), hessian(problem, join=False)
    v = gaussian(H.size)
    calls.clear()
    assert torch.equal(H @ v, free @ v)
    H @ v
    assert not H._kept
    assert len(calls) == 3 * len(problem.batches)


def test_a_limit_for_some_graphs_keeps_those_and_rebuilds_the_rest() -> None:
    problem = mlp()
    free = hessian(problem, join=False)
    v = gaussian(free.size)
    expected = free @ v
    H = hessian(problem, join=False, memory_limit=max(p.cost.nbytes for p in free._kept.values()))
    for _ in range(3):
        assert relative_error(H @ v, expected) < 1e-13
    assert 0 < len(H._kept) < len(problem.batches)


def test_graphs_kept_for_whole_batches_are_not_mixed_with_pieces_cut_later() -> None:
    problem = mlp()
    free = hessian(problem, join=False)
    v = gaussian(free.size)
    expected = free @ v
    H = hessian(problem, join=False, memory_limit=max(p.cost.nbytes for p in free._kept.values()))
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


@pytest.mark.parametrize("columns", [(), (5,)], ids=["one vector", "several"])
def test_a_product_over_kept_graphs_that_does_not_fit_is_made_without_them(
    monkeypatch: pytest.MonkeyPatch, columns: tuple[int, ...]
) -> None:
    problem = mlp()
    H = hessian(problem)
    v = gaussian(H.size, *columns)
    expected, grad, failed = H @ v, torch.autograd.grad, list[int]()

    def full(*args: Any, **settings: Any) -> Any:
        if not settings.get("create_graph") and H._kept:
            failed.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return grad(*args, **settings)

    monkeypatch.setattr(torch.autograd, "grad", full)
    assert relative_error(H @ v, expected) < 1e-12
    assert failed and not H._kept and H._retain is False


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
    assert graph_cost([plain], exclude=[x]) == (sum(saved.values()), True)
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
