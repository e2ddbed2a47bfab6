"""Power iteration: right where it can be, honest where it can not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from problems_linalg import network_like, operator_with, true_residuals

import sharpkit as sk
from sharpkit._errors import ConvergenceWarning

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
