"""Operators out of matrices, functions and other operators."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch
from contracts.operator_contract import check_operator
from problems import mlp, relative_error

import sharpkit as sk

M = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
A = M + M.T


@pytest.mark.parametrize(
    "matrix",
    [
        A,
        A.numpy(),
        A.numpy().tolist,
        scipy.sparse.csr_matrix(A.numpy()),
        scipy.sparse.linalg.aslinearoperator(A.numpy()),
        lambda v: A @ v,
        A.clone().requires_grad_(),
    ],
    ids=["tensor", "array", "skip", "sparse", "linear operator", "function", "tensor with gradient"],
)
def test_anything_that_multiplies_a_vector_is_an_operator(matrix: Any) -> None:
    if getattr(matrix, "__name__", "") == "tolist":
        with pytest.raises(TypeError, match="got list"):
            sk.as_operator(matrix())
        return
    operator = sk.as_operator(matrix, size=6)
    assert operator.num_matvecs == 0
    check_operator(operator, A)


@pytest.mark.parametrize(
    ("matrix", "settings", "error", "match"),
    [
        (M, {}, sk.NotSymmetricError, "not symmetric"),
        (lambda v: M @ v, {"size": 6}, sk.NotSymmetricError, r"\(A \+ A\^T\) / 2"),
        (lambda v: A @ v, {}, ValueError, "size=n"),
        (A[:5], {}, ValueError, "square"),
        (A, {"size": 7}, ValueError, r"\(7, 7\)"),
        (A.to(torch.complex128), {}, ValueError, "complex"),
        (A.numpy() * 1j, {}, ValueError, "complex"),
        (lambda v: v[:2], {"size": 6}, ValueError, "shape"),
        (lambda v: 1.0, {"size": 6}, ValueError, "float"),
        (A, {"dtype": torch.int32}, ValueError, "floating-point"),
        ("A", {}, TypeError, "str"),
        (lambda v: v * float("nan"), {"size": 6}, sk.NonFiniteError, "NaN"),
        (lambda v: v, {"size": 0}, ValueError, "size must be a whole number of at least 1"),
    ],
)
def test_what_is_no_symmetric_operator_is_refused(matrix: Any, settings: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        sk.as_operator(matrix, **settings)


def test_a_function_that_hands_its_argument_back_gives_a_new_vector() -> None:
    for function in (lambda v: v, lambda v: v.view(-1), lambda v: v[:]):
        v = torch.ones(4, dtype=torch.float64)
        product = sk.as_operator(function, size=4) @ v
        product.zero_()
        assert v.sum() == 4


def test_algebra_is_that_of_matrices() -> None:
    B = A @ A
    a, b, eye = sk.as_operator(A), sk.as_operator(B), torch.eye(6, dtype=torch.float64)
    for operator, expected in (
        (a + b, A + B),
        (a - b, A - B),
        (2 * a, 2 * A),
        (a * np.float32(2), 2 * A),
        (a / 4, A / 4),
        (-a, -A),
        (a + 0.1, A + 0.1 * eye),
        (1 - a, eye - A),
        (a - 2, A - 2 * eye),
        (torch.tensor(3.0) * a, 3 * A),
        (a + b - 2 * (a - 1), B - A + 2 * eye),
        (sum([a, b], start=0 * a), A + B),
    ):
        check_operator(operator, expected)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda a: a + sk.as_operator(torch.eye(5).double()), ValueError, "different size"),
        (lambda a: a + sk.as_operator(torch.eye(6)), ValueError, "dtype"),
        (lambda a: a * "x", TypeError, r"got 'x' \(str\)"),
        (lambda a: a * float("inf"), ValueError, "finite"),
        (lambda a: a + True, TypeError, "bool"),
        (lambda a: a.deflate(torch.ones(5, 1), torch.ones(1)), ValueError, "deflation"),
        (lambda a: a.block("x"), TypeError, "no named parameters"),
    ],
)
def test_mistakes_in_algebra_are_named(make: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make(sk.as_operator(A))


def test_scipy_multiplies_and_diagonalises_a_hessian() -> None:
    problem = mlp()
    H = sk.HessianOperator(sk.Objective(problem.model, problem.batches, loss=problem.loss))
    dense, linear = H.to_dense().numpy(), H.to_scipy()
    v = np.random.default_rng(0).standard_normal((43, 2))
    for found, expected in ((linear @ v, dense @ v), (linear @ v[:, 0], dense @ v[:, 0]), (linear.T @ v[:, :1], dense @ v[:, :1])):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    top = scipy.sparse.linalg.eigsh(linear, k=2, which="LA", return_eigenvectors=False)
    np.testing.assert_allclose(np.sort(top), np.linalg.eigvalsh(dense)[-2:], rtol=1e-9)
    back = sk.as_operator(linear)
    assert relative_error(back.to_dense(), torch.from_numpy(dense)) < 1e-12


def test_curvlinops_finds_the_same_matrices() -> None:
    curvlinops = pytest.importorskip("curvlinops")
    problem = mlp()
    theirs = {p: (torch.nn.CrossEntropyLoss(), list(problem.model.parameters())) for p in ("data",)}["data"]
    even = [(torch.cat([x for x, _ in problem.batches]), torch.cat([y for _, y in problem.batches]))]
    objective = sk.Objective(problem.model, problem.batches, loss=problem.loss)
    named = dict(problem.model.named_parameters())
    for kind, ours in (("HessianLinearOperator", sk.HessianOperator), ("GGNLinearOperator", sk.GaussNewtonOperator)):
        make = getattr(curvlinops, kind)
        try:
            other = make(problem.model, theirs[0], named, even)
        except (TypeError, AttributeError, ValueError):
            other = make(problem.model, theirs[0], theirs[1], even)
        dense = torch.as_tensor(other @ torch.eye(43, dtype=torch.float64))
        assert relative_error(ours(objective).to_dense(), dense) < 1e-9
