"""Products by compiled code: those of the graph they were traced from, or plain ones and the reason."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import Problem, attention, conv, dense_hessian, mlp, relative_error
from torch import Tensor

import sharpkit as sk
from sharpkit.operators.compiled import Compiling


def compiled_hessian(problem: Problem, **settings: Any) -> sk.HessianOperator:
    return sk.HessianOperator(sk.Objective(problem.model, problem.batches, loss=problem.loss, micro_batch_size=None), **settings)


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Traced programs that were given to a compiler which hands them back, and takes them to be fast: the real one takes a minute."""
    seen: list[Any] = []

    def compiled(program: Any, given: list[Tensor]) -> Any:
        seen.append(program)
        return program

    def seconds(self: Compiling, multiply: Callable[..., Any], vectors: Any) -> float:
        return 1.0 if "_compiled" in multiply.__qualname__ else 2.0

    monkeypatch.setattr("torch._inductor.compile", compiled)
    monkeypatch.setattr(Compiling, "_seconds", seconds)
    return seen


@pytest.mark.parametrize("make", [mlp, attention, conv])
def test_traced_products_are_the_hessian(make: Callable[[], Problem], programs: list[Any]) -> None:
    problem = make()
    H = compiled_hessian(problem, compile=True)
    expected = dense_hessian(problem.value, problem.params)
    assert relative_error(H.to_dense(), expected) < 1e-9
    assert H.choices()["compiled"].startswith("not yet")
    assert relative_error(H.to_dense(), expected) < 1e-9
    v = torch.ones(H.size, dtype=torch.float64)
    assert relative_error(H @ v, expected @ v) < 1e-9
    assert H.choices()["compiled"].startswith("yes: products take 0.5 of the time")
    assert programs


def test_code_is_made_once_for_pieces_of_one_form_and_again_used_when_parameters_have_moved(programs: list[Any]) -> None:
    problem = mlp()
    x = torch.cat([x for x, _ in problem.batches])
    y = torch.cat([y for _, y in problem.batches])
    half = len(x) // 2
    problem.batches = [(x[:half], y[:half]), (x[half : 2 * half], y[half : 2 * half])]
    H = compiled_hessian(problem, compile=True)
    v = torch.ones(H.size, dtype=torch.float64)
    H @ v, H @ v
    with torch.no_grad():
        for p in problem.params:
            p.mul_(1.2)
    expected = dense_hessian(problem.value, problem.params) @ v
    for _ in range(3):
        assert relative_error(H @ v, expected) < 1e-9
    assert len(programs) == 1


def test_a_compiler_that_fails_leaves_plain_products_and_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(program: Any, given: list[Tensor]) -> Any:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr("torch._inductor.compile", failing)
    _stays_plain("no: RuntimeError: no C++ compiler")


def test_wrong_code_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.compile", lambda program, given: lambda *inputs: [2 * t for t in program(*inputs)])
    _stays_plain("no: compiled products differ by 1")


def test_slow_code_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def slowed(program: Any, given: list[Tensor]) -> Any:
        def run(*inputs: Tensor) -> Any:
            until = time.thread_time() + 0.05  # processor time is what counts
            while time.thread_time() < until:
                pass
            return program(*inputs)

        return run

    monkeypatch.setattr("torch._inductor.compile", slowed)
    _stays_plain("no: compiled products take ")


def _stays_plain(reason: str) -> None:
    problem = mlp()
    H = compiled_hessian(problem, compile=True)
    v = torch.ones(H.size, dtype=torch.float64)
    expected = dense_hessian(problem.value, problem.params) @ v
    for _ in range(3):
        assert relative_error(H @ v, expected) < 1e-9
    assert H.choices()["compiled"].startswith(reason)


def test_nothing_is_compiled_unless_asked_for(programs: list[Any]) -> None:
    H = compiled_hessian(mlp())
    v = torch.ones(H.size, dtype=torch.float64)
    H @ v, H @ v
    assert not programs
    assert "compiled" not in H.choices()


def test_blocks_are_compiled_too_and_other_values_refused(programs: list[Any]) -> None:
    H = compiled_hessian(mlp(), compile=True)
    assert "compiled" in H.block("*bias").choices()
    with pytest.raises(TypeError, match="compile"):
        compiled_hessian(mlp(), compile="reduce-overhead")


@pytest.mark.slow
def test_inductor_compiles_a_small_network() -> None:
    problem = mlp()
    H = compiled_hessian(problem, compile=True)
    v = torch.ones(H.size, dtype=torch.float64)
    expected = dense_hessian(problem.value, problem.params) @ v
    for _ in range(3):
        assert relative_error(H @ v, expected) < 1e-9
    assert H.choices()["compiled"].startswith(("yes", "no: compiled products take"))
