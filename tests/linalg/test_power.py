"""Power iteration: right where it can be, honest where it can not."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from problems_linalg import network_like, operator_with, true_residuals

import sharpkit as sk
from sharpkit._errors import ConvergenceWarning, NonFiniteError
from sharpkit.operators.base import CallableOperator

BULK = np.linspace(-1, 1, 96)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_magnitudes_come_with_their_sign(dtype: torch.dtype) -> None:
    operator = operator_with(np.concatenate([[-9.0, 6, -4, 2], BULK]), dtype=dtype)
    pairs = sk.power_iteration(operator, 3)
    np.testing.assert_allclose(pairs.values.numpy(), [-9, 6, -4], atol=9e-3)
    assert bool(pairs.converged.all()) and pairs.which == "magnitude"
    assert np.all(true_residuals(operator, pairs.vectors, pairs.values) <= 1.1 * pairs.residuals.numpy() + 9e-3 * 2e-1)


def test_a_plus_minus_pair_is_flagged() -> None:
    with pytest.warns(ConvergenceWarning, match="tie"):
        pairs = sk.power_iteration(operator_with(np.concatenate([[5.0, -5], BULK])))
    assert not bool(pairs.converged.any()) and "tie in magnitude" in pairs.outcome
    assert pairs.num_matvecs < 200, "the tie must be seen long before the budget ends"


@pytest.mark.parametrize("value", [0.0, 2.0])
def test_multiples_of_the_identity_converge_at_once(value: float) -> None:
    pairs = sk.power_iteration(operator_with(np.full(20, value)), 3)
    np.testing.assert_allclose(pairs.values.numpy(), [value] * 3, atol=1e-12)
    assert pairs.num_matvecs == 3


@pytest.mark.parametrize("n", [1, 2])
def test_all_pairs_of_tiny_matrices(n: int) -> None:
    pairs = sk.power_iteration(operator_with(np.array([3.0, 1.0])[:n]), n)
    np.testing.assert_allclose(pairs.values.numpy(), [3.0, 1.0][:n], atol=3e-3)


def test_it_needs_several_times_more_products_than_lanczos() -> None:
    operator = operator_with(network_like(300))
    assert sk.power_iteration(operator, 5).num_matvecs > 4 * sk.eigenpairs(operator, 5).num_matvecs


def test_budget_start_and_progress() -> None:
    operator, seen = operator_with(np.concatenate([[5.0, 4.5], BULK])), []
    with pytest.warns(ConvergenceWarning, match="budget"):
        pairs = sk.power_iteration(operator, max_matvecs=4, callback=seen.append)
    assert pairs.num_matvecs == 4 == seen[-1].num_matvecs and not bool(pairs.converged.any())
    exact = torch.linalg.eigh(operator.matrix).eigenvectors[:, -1]  # type: ignore[attr-defined]
    assert sk.power_iteration(operator, initial=exact).num_matvecs == 1
    with pytest.raises(ValueError, match="rows"):
        sk.power_iteration(operator, initial=torch.ones(3))


# -- product by product -------------------------------------------------------------------------------------------------------
def diagonal(*entries: float) -> sk.SymmetricOperator:
    return sk.as_operator(torch.diag(torch.tensor(entries, dtype=torch.float64)))


def start(*entries: float) -> torch.Tensor:
    return torch.tensor(entries, dtype=torch.float64)


@pytest.mark.parametrize("products", [1, 2, 5])
def test_each_product_is_a_step_of_the_power_method(products: int) -> None:
    """After m products x = A^(m - 1) x_0: its Rayleigh quotient and residual."""
    A, x = np.diag([2.0, 1.9, -0.5]), np.array([1.0, 2.0, 3.0])
    with pytest.warns(
        ConvergenceWarning, match=f"0 of 1 pairs converged after {products} products of power iteration: product or time budget"
    ):
        pairs = sk.power_iteration(diagonal(2.0, 1.9, -0.5), initial=torch.from_numpy(x), max_matvecs=products, tol=1e-9)
    for _ in range(products - 1):
        x = A @ x
    x /= np.linalg.norm(x)
    theta = x @ A @ x
    assert float(pairs.values[0]) == pytest.approx(theta) and float(pairs.residuals[0]) == pytest.approx(np.linalg.norm(A @ x - theta * x))
    assert pairs.num_matvecs == products


@pytest.mark.parametrize("tol", [0.3, 0.03])
def test_it_stops_as_soon_as_the_residual_is_below_the_tolerance(tol: float) -> None:
    """diag(2, 1) from (1, 1): the angle's tangent halves with each product, and r = sin cos of it, relative to 2."""
    tangent, products = 1.0, 1
    scale = 0.0
    while True:
        scale = max(scale, np.sqrt((4 + tangent**2) / (1 + tangent**2)))  # the largest ||A v|| so far
        if tangent / (1 + tangent**2) <= tol * scale:
            break
        tangent, products = tangent / 2, products + 1
    pairs = sk.power_iteration(diagonal(2.0, 1.0), initial=start(1.0, 1.0), tol=tol)
    assert pairs.num_matvecs == products and bool(pairs.converged) and pairs.outcome == "converged" and pairs.tol == tol


def test_several_pairs_come_by_magnitude_with_orthonormal_vectors() -> None:
    pairs = sk.power_iteration(diagonal(1.0, -3.0, 2.0, 0.1), 3, tol=1e-6)
    assert pairs.values.tolist() == pytest.approx([-3.0, 2.0, 1.0], abs=1e-5)
    torch.testing.assert_close(pairs.vectors.abs(), torch.eye(4).double()[:, [1, 2, 0]], atol=1e-5, rtol=0)
    torch.testing.assert_close(pairs.vectors.T @ pairs.vectors, torch.eye(3).double())
    assert pairs.values.dtype == pairs.residuals.dtype == torch.float64


def test_pairs_that_come_out_of_order_are_sorted() -> None:
    """The first start has nothing of the largest: its pair is found second."""
    starts = torch.eye(3, dtype=torch.float64)[:, [1, 0]]
    pairs = sk.power_iteration(diagonal(5.0, 2.0, 1.0), 2, initial=starts)
    assert pairs.values.tolist() == pytest.approx([5.0, 2.0]) and pairs.num_matvecs == 2
    torch.testing.assert_close(pairs.vectors.abs(), torch.eye(3, dtype=torch.float64)[:, :2])


def test_a_start_that_lies_in_the_pairs_before_is_replaced_by_a_random_one() -> None:
    first = torch.eye(3, dtype=torch.float64)[:, [0, 0]]
    pairs = sk.power_iteration(diagonal(5.0, 2.0, 1.0), 2, initial=first, tol=1e-6)
    assert pairs.values.tolist() == pytest.approx([5.0, 2.0], abs=1e-5) and pairs.num_matvecs > 2
    fewer = sk.power_iteration(diagonal(5.0, 2.0, 1.0), 2, initial=first[:, :1], tol=1e-6)
    assert fewer.values.tolist() == pytest.approx([5.0, 2.0], abs=1e-5), "pairs without a start of their own take random ones"


def test_budgets_are_a_thousand_products_a_pair_and_missing_pairs_come_last() -> None:
    close = diagonal(1.0, 1.0 - 1e-7, 0.5)
    with pytest.warns(ConvergenceWarning, match="of 2 pairs converged after 2000 products"):
        sk.power_iteration(close, 2, tol=1e-9)
    with pytest.warns(ConvergenceWarning, match="0 of 2 pairs"):
        pairs = sk.power_iteration(diagonal(2.0, 1.9, 1.0), 2, tol=1e-9, max_matvecs=3)
    assert pairs.num_matvecs == 3 and bool(torch.isnan(pairs.values[1])) and bool(torch.isinf(pairs.residuals[1])) and pairs.values[0] > 1


def test_a_tie_is_flagged_after_thirty_products_at_least_and_named_by_its_size() -> None:
    with pytest.warns(ConvergenceWarning, match=r"eigenvalues near \+5 and -5 tie in magnitude"):
        pairs = sk.power_iteration(diagonal(5.0, -5.0, 1.0), initial=start(1.0, 2.0, 0.5))
    assert 30 <= pairs.num_matvecs <= 32 and not bool(pairs.converged)
    assert float(pairs.values[0]) == pytest.approx(5 * (1 - 4) / 5), "the Rayleigh quotient of the mixture (1, 2)"


def test_slow_convergence_is_no_tie() -> None:
    """Norm and quotient draw together, slowly: diag(1, -0.99) comes to its end."""
    pairs = sk.power_iteration(diagonal(1.0, -0.99), initial=start(1.0, 1.0), tol=1e-4)
    assert bool(pairs.converged) and float(pairs.values[0]) == pytest.approx(1.0, abs=1e-6) and pairs.num_matvecs > 500


def test_residuals_hold_the_rounding_of_the_type() -> None:
    pairs = sk.power_iteration(sk.as_operator(torch.diag(torch.tensor([3.0, 1.0]))), initial=torch.tensor([1.0, 0.0]), tol=1e-9)
    eps = torch.finfo(torch.float32).eps
    assert bool(pairs.converged) and float(pairs.residuals[0]) == pytest.approx(4 * eps * 3), "a tolerance below rounding means rounding"


def test_products_that_are_not_finite_and_half_precision() -> None:
    broken = CallableOperator(lambda v: v * float("nan"), 5, dtype=torch.float64, device=torch.device("cpu"))
    with pytest.raises(NonFiniteError, match="NaN"):
        sk.power_iteration(broken)
    matrix = torch.diag(torch.tensor([4.0, 1.0, 0.5]))
    half = CallableOperator(lambda v: matrix.to(v.dtype) @ v, 3, dtype=torch.bfloat16, device=torch.device("cpu"))
    pairs = sk.power_iteration(half, 2, tol=0.05)
    assert pairs.vectors.dtype == torch.bfloat16 and pairs.values.tolist() == pytest.approx([4.0, 1.0], abs=0.2), "0.05 of 4"


def test_progress_names_the_pair_and_a_thousandth_and_seed_0_are_the_defaults() -> None:
    seen: list[sk.Progress] = []
    operator = operator_with(np.concatenate([[5.0, 4.0], BULK]))
    pairs = sk.power_iteration(operator, 2, callback=seen.append)
    assert list(dict.fromkeys(p.text for p in seen)) == ["power iteration, pair 1 of 2", "power iteration, pair 2 of 2"]
    assert all(p.expected == p.done + 10 for p in seen)
    for options in ({"tol": 1e-3}, {"seed": 0}):
        assert torch.equal(sk.power_iteration(operator, 2, **options).values, pairs.values)  # type: ignore[arg-type]
    assert not torch.equal(sk.power_iteration(operator, 2, seed=1).vectors, pairs.vectors)
    assert len(sk.power_iteration(operator).values) == 1 and pairs.seconds > 0


def test_warnings_point_at_the_call() -> None:
    with pytest.warns(ConvergenceWarning) as caught:
        sk.power_iteration(operator_with(network_like(100)), max_matvecs=2)
    assert [w.filename for w in caught] == [__file__]


def test_both_the_residual_and_what_leads_out_must_be_small() -> None:
    """The second pair of diag(4, 1, 0.9): orthogonal to the first to rounding, it converges by its own size, slowly."""
    pairs = sk.power_iteration(diagonal(4.0, 1.0, 0.9), 2, tol=1e-3, seed=1)
    assert bool(pairs.converged.all()) and pairs.values.tolist() == pytest.approx([4.0, 1.0], abs=1e-4)
    first, second = pairs.vectors.T
    rest = torch.diag(start(4.0, 1.0, 0.9)) @ second - pairs.values[1] * second
    assert float((rest - first * (first @ rest)).norm()) <= 1e-3, "of the second, not of the largest"


def test_a_value_far_below_rounding_has_not_converged_unless_it_is_zero() -> None:
    """float32 beside 4: 1e-6 is below the rounding of products, and 0 is 0 to it."""
    for last, reached in ((0.0, True), (2e-5, False)):
        operator = sk.as_operator(torch.diag(torch.tensor([4.0, last])))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            pairs = sk.power_iteration(operator, 2, tol=1e-3)
        assert pairs.converged.tolist() == [True, reached]
        assert reached or "stopped at the rounding of torch.float32: tol=0.001 is out of reach" in pairs.outcome


def test_a_tie_is_the_gap_of_the_last_norm_and_quotient() -> None:
    from sharpkit.linalg.power import _is_tie

    settled = [(5.0, -3.0)] * 40
    assert _is_tie(settled, 1e-3)
    assert _is_tie([(9.0, -3.0), (3.0, -3.0)] * 5 + settled, 1e-3), "by the last ones alone"
    assert not _is_tie([(5.0, -5.0)] * 40, 1e-3) and not _is_tie(settled[:20], 1e-3)
    assert not _is_tie([(5.0 + 0.1 * (j % 2), -3.0) for j in range(40)], 1e-3), "still moving"
