"""Every operator on every problem against dense float64 references made without the package."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from contracts.operator_contract import check_operator
from problems import PROBLEMS, Problem, dense_covariance, dense_empirical_fisher, dense_gauss_newton, dense_hessian
from torch import Tensor

import sharpkit as sk
from sharpkit.operators.base import SymmetricOperator


def objective_of(problem: Problem, **settings: object) -> sk.Objective:
    return sk.Objective(problem.model, problem.batches, loss=problem.loss, **settings)  # type: ignore[arg-type]


def hessian_reference(problem: Problem) -> Tensor:
    return dense_hessian(problem.value, problem.params)


CURVATURE: dict[str, tuple[Callable[[sk.Objective], SymmetricOperator], Callable[[Problem], Tensor]]] = {
    "hessian": (sk.HessianOperator, hessian_reference),
    "gauss_newton": (sk.GaussNewtonOperator, dense_gauss_newton),
    "empirical_fisher": (sk.EmpiricalFisherOperator, dense_empirical_fisher),
    "covariance": (sk.GradientCovarianceOperator, dense_covariance),
}


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("operator", CURVATURE)
def test_equals_the_dense_reference_and_keeps_the_contract(operator: str, problem: str) -> None:
    instance = PROBLEMS[problem]()
    make, reference = CURVATURE[operator]
    check_operator(make(objective_of(instance)), reference(instance), model=instance.model)


@pytest.mark.parametrize("problem", ["mlp", "conv", "tied", "weighted"])
@pytest.mark.parametrize("operator", CURVATURE)
def test_cutting_batches_into_pieces_changes_nothing(operator: str, problem: str) -> None:
    instance = PROBLEMS[problem]()
    make, reference = CURVATURE[operator]
    check_operator(make(objective_of(instance, micro_batch_size=2)), reference(instance), model=instance.model)


@pytest.mark.parametrize("operator", CURVATURE)
def test_graphs_rebuilt_at_each_product_give_the_same_matrix(operator: str) -> None:
    instance = PROBLEMS["tied"]()
    make, reference = CURVATURE[operator]
    check_operator(make(objective_of(instance), retain=False), reference(instance), model=instance.model)  # type: ignore[call-arg]


@pytest.mark.parametrize("problem", ["mlp", "conv", "tied"])
def test_diagonal_scalings_and_algebra_keep_the_contract(problem: str) -> None:
    instance = PROBLEMS[problem]()
    H, dense = sk.HessianOperator(objective_of(instance)), hessian_reference(instance)
    n = len(dense)
    w = torch.cat([p.detach().reshape(-1) for p in instance.params])
    d = torch.linspace(0.5, 2, n, dtype=torch.float64)
    V = torch.linalg.qr(torch.randn(n, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    values = torch.tensor([2.0, -1.0], dtype=torch.float64)
    eye = torch.eye(n, dtype=torch.float64)
    check_operator(sk.AdaptiveOperator(H), w.abs()[:, None] * dense * w.abs(), model=instance.model)
    check_operator(sk.PreconditionedOperator(H, diagonal=d), dense / (d[:, None] * d).sqrt(), model=instance.model)
    check_operator(H + 0.1, dense + 0.1 * eye, model=instance.model)
    check_operator(0.3 - 2 * H / 4, 0.3 * eye - dense / 2, model=instance.model)
    check_operator(H - sk.GaussNewtonOperator(objective_of(instance)), dense - dense_gauss_newton(instance), model=instance.model)
    check_operator(H.deflate(V, values), dense - V @ torch.diag(values) @ V.T, model=instance.model)
    check_operator(-H, -dense, model=instance.model)
