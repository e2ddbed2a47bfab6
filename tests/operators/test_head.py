"""Gauss-Newton and Fisher matrices of large vocabularies, from some tokens' logits at a time: those from whole logits."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contracts.operator_contract import check_operator
from problems import Largest, Problem, built, dense_empirical_fisher, dense_gauss_newton, labels, relative_error
from problems_logits import CLASSES, HEADS, LOSSES, WHOLE, WIDTH, Tagger, cut_small_logits, marks, rows, tokens
from torch import Tensor
from torch.nn import functional as F

import sharpkit as sk
from sharpkit.operators import fisher, gauss_newton, head


@pytest.fixture
def in_chunks(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each product built was one in chunks; small logits are, here."""
    cut_small_logits(monkeypatch)
    built_so: list[bool] = []

    def noted(*args: Any) -> Any:
        product = head.product_in_chunks(*args)
        built_so.append(product is not None)
        return product

    def noted_samples(*args: Any, **settings: Any) -> Any:
        product = head.sample_product_in_chunks(*args, **settings)
        built_so.append(product is not None)
        return product

    for module in (gauss_newton, fisher):
        monkeypatch.setattr(module, "product_in_chunks", noted)
    monkeypatch.setattr(fisher, "sample_product_in_chunks", noted_samples)
    return built_so


def one_batch(loss: Callable[[Tensor, Tensor], Tensor], model: Any) -> sk.Objective:
    return sk.Objective(model, (tokens(), marks()), loss=loss)


BENT = {"capped in the loss": lambda z, y: rows(z.tanh(), y)}  # curvature of the loss, and not of the model
CASES = {name: loss for name, loss in {**LOSSES, **WHOLE, **BENT}.items() if name != "class probabilities"}  # whose target moves


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("name", CASES)
def test_gauss_newton_is_the_dense_one_whatever_lies_between_head_and_loss(name: str, kind: str, in_chunks: list[bool]) -> None:
    model, loss = built(HEADS[kind]), CASES[name]
    G = sk.GaussNewtonOperator(one_batch(loss, model))
    expected = dense_gauss_newton(Problem(name, model, [(tokens(), marks())], loss, loss, lambda t: 1.0))
    check_operator(G, expected, model=model)
    assert in_chunks[0] == (name in LOSSES and name != "looked at besides")


def fisher_of(objective: sk.Objective) -> Tensor:
    return sk.FisherOperator(objective, num_draws=2, likelihood="categorical", seed=3).to_dense()


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("name", ["rows", "transposed", "picked", "as a module"])
def test_the_fisher_matrix_draws_the_same_labels_as_from_whole_logits(name: str, kind: str, in_chunks: list[bool]) -> None:
    model = built(HEADS[kind])
    chunked, whole = one_batch(LOSSES[name], model), one_batch(LOSSES[name], model)
    whole.chunking.allowed = False
    assert relative_error(fisher_of(chunked), fisher_of(whole)) < 1e-12
    assert in_chunks[0]
    chunked.micro_batch_size = 1
    assert relative_error(fisher_of(chunked), fisher_of(whole)) < 1e-12, "a piece draws the labels of the whole"


@pytest.mark.parametrize(
    "name", ["shifted by one, summed", "permuted", "moved", "another ignored label", "scaled", "cut classes", "one by one, squared"]
)
def test_what_is_no_likelihood_of_the_output_is_refused(name: str, in_chunks: list[bool]) -> None:
    with pytest.raises(sk.ObjectiveError, match="not the negative log-likelihood"):
        fisher_of(one_batch(LOSSES[name], built(Tagger)))
    assert not in_chunks[0]


def test_its_mean_over_draws_is_the_gauss_newton_matrix(in_chunks: list[bool]) -> None:
    objective = one_batch(rows, built(Tagger))
    v = torch.randn(objective.num_parameters, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = sk.GaussNewtonOperator(objective) @ v
    draws = torch.stack([sk.FisherOperator(objective, likelihood="categorical", seed=seed) @ v for seed in range(100)])
    assert bool(((draws.mean(0) - expected).abs() < 5 * draws.std(0) / 10 + 1e-12).all())
    assert all(in_chunks)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("name", ["rows", "transposed", "picked", "permuted"])
def test_the_empirical_fisher_is_the_dense_one(name: str, kind: str, in_chunks: list[bool]) -> None:
    model, loss = built(HEADS[kind]), LOSSES[name]
    problem = Problem(
        name, model, [(tokens(), marks())], loss, lambda z, y: loss(z, y) * (y != -100).sum(), lambda y: float((y != -100).sum())
    )
    check_operator(sk.EmpiricalFisherOperator(one_batch(loss, model)), dense_empirical_fisher(problem), model=model)
    assert in_chunks[0]


@pytest.mark.parametrize("make", [sk.GaussNewtonOperator, sk.FisherOperator, sk.EmpiricalFisherOperator])
def test_no_tensor_of_the_size_of_the_logits_is_made(make: Callable[..., sk.SymmetricOperator], in_chunks: list[bool]) -> None:
    classes = 300
    x, y = labels(4, 16, classes=classes), labels(4, 16, classes=classes, seed=1)

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z.mT, y)

    settings = {"likelihood": "categorical"} if make is sk.FisherOperator else {}
    operator = make(sk.Objective(built(lambda: Tagger(classes=classes)), (x, y), loss=loss), **settings)
    with Largest() as seen:
        operator @ torch.ones(operator.size, dtype=torch.float64)
    assert seen.entries < 64 * classes


def test_blocks_of_parameters_are_blocks_of_the_matrix(in_chunks: list[bool]) -> None:
    G = sk.GaussNewtonOperator(one_batch(rows, built(Tagger)))
    dense = G.to_dense()
    head_and_bias = WIDTH * CLASSES + CLASSES
    assert relative_error(G.block("head*").to_dense(), dense[-head_and_bias:, -head_and_bias:]) < 1e-12
    assert relative_error(G.block("hidden*").to_dense(), dense[WIDTH * CLASSES : -head_and_bias, WIDTH * CLASSES : -head_and_bias]) < 1e-12
    assert all(in_chunks)


@pytest.mark.parametrize("make", [sk.HessianOperator, sk.GaussNewtonOperator, sk.FisherOperator, sk.EmpiricalFisherOperator])
def test_graphs_and_data_go_with_the_operator(make: Callable[..., sk.SymmetricOperator], in_chunks: list[bool]) -> None:
    x, settings = tokens(), {"likelihood": "categorical"} if make is sk.FisherOperator else {}
    gc.disable()  # no cycle may keep them until it is collected
    try:
        operator = make(sk.Objective(built(Tagger), (x, marks()), loss=rows), **settings)
        operator @ torch.ones(operator.size, dtype=torch.float64)
        kept = weakref.ref(x)
        del operator, x
        assert kept() is None
    finally:
        gc.enable()
