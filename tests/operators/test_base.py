"""A subclass of SymmetricOperator writes one public method and gets everything else."""

from __future__ import annotations

import pytest
import torch
from contracts.operator_contract import check_operator
from torch import Tensor

import sharpkit as sk


class Reflection(sk.SymmetricOperator):
    """I - 2 u u^T for a unit vector u: eigenvalues 1 (n - 1 times) and -1."""

    def __init__(self, u: Tensor) -> None:
        super().__init__(len(u), dtype=u.dtype, device=u.device)
        self.u = u / u.norm()

    def matvec(self, vector: Tensor) -> Tensor:
        return vector - 2 * (self.u @ vector) * self.u


class Answering(sk.SymmetricOperator):
    """Answers every product with what it was given."""

    def __init__(self, answer: object) -> None:
        super().__init__(4)
        self.answer = answer

    def matvec(self, vector: Tensor) -> Tensor:
        return self.answer(vector) if callable(self.answer) else self.answer  # type: ignore[return-value]


def test_one_method_is_enough_for_the_contract_the_algorithms_and_the_algebra() -> None:
    u = torch.arange(1.0, 7.0, dtype=torch.float64)
    operator = Reflection(u)
    dense = torch.eye(6, dtype=torch.float64) - 2 * torch.outer(u, u) / (u @ u)
    check_operator(operator, dense)
    assert sk.eigenpairs(operator, k=1, which="smallest").values.item() == pytest.approx(-1)
    assert sk.trace(operator, num_matvecs=6).value == pytest.approx(4)
    check_operator(2 * operator + 1, 2 * dense + torch.eye(6, dtype=torch.float64))


def test_the_one_method_is_public() -> None:
    assert sk.SymmetricOperator.__abstractmethods__ == {"matvec"}


def test_products_are_counted_one_a_column_and_asking_matvec_itself_counts_none() -> None:
    operator = Reflection(torch.ones(5, dtype=torch.float64))
    operator @ torch.ones(5, 3, dtype=torch.float64)
    operator.multiply(torch.ones(5, dtype=torch.float64))
    operator.matvec(torch.ones(5, dtype=torch.float64))
    assert operator.num_matvecs == 4


@pytest.mark.parametrize("answer", [lambda v: v, lambda v: v.flip(0).flip(0), lambda v: v[0].expand(4), lambda v: v.float()])
@pytest.mark.parametrize("shape", [(4,), (4, 2)])
def test_a_product_may_be_written_to_whatever_a_subclass_returns(answer: object, shape: tuple[int, ...]) -> None:
    vectors = torch.ones(shape, dtype=torch.float64)
    product = Answering(answer) @ vectors
    product.zero_()
    assert product.dtype == torch.float64
    assert torch.equal(vectors, torch.ones(shape, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(4,), (4, 2)])
@pytest.mark.parametrize(
    ("answer", "came"), [(1.0, "float"), (torch.ones(1), r"shape \(1,\)"), (torch.ones(4, 1), r"shape \(4, 1\)"), (None, "None")]
)
def test_a_product_of_the_wrong_shape_is_refused(answer: object, came: str, shape: tuple[int, ...]) -> None:
    """Also where broadcasting would hide it."""
    with pytest.raises(ValueError, match=rf"vector's shape \(4,\), but that of Answering was {came}"):
        Answering(answer) @ torch.ones(shape, dtype=torch.float64)
