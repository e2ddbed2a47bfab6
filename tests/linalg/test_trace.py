"""trace, diagonal and frobenius_norm: right within the standard error they report, at a cost that is counted."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from problems_linalg import network_like, operator_with, rotated

import sharpkit as sk
from sharpkit._errors import ConvergenceWarning, NonFiniteError
from sharpkit.operators.base import CallableOperator

METHODS = ["auto", "hutchinson", "hutch++", "xtrace"]
NETWORK = np.abs(network_like(400))
FLAT = np.random.default_rng(0).uniform(-1, 1, 400) + 0.4


def scores(spectrum: np.ndarray, method: str, seeds: int, **options: float) -> tuple[np.ndarray, np.ndarray]:
    """(value - truth) / stderr and the products of each seed."""
    operator = operator_with(spectrum)
    estimates = [sk.trace(operator, method=method, seed=seed, **options) for seed in range(seeds)]  # type: ignore[arg-type]
    found = np.array([(e.value - spectrum.sum()) / e.stderr for e in estimates])
    return found, np.array([e.num_matvecs for e in estimates])


@pytest.mark.parametrize("method", METHODS)
def test_the_asked_error_is_reached_and_true(method: str) -> None:
    found, _ = scores(NETWORK, method, 20, rtol=0.02)
    assert np.mean(np.abs(found) <= 2) >= 0.8  # 95 % expected; fewer than 16 of 20 has probability 3e-4
    estimate = sk.trace(operator_with(NETWORK), method=method, rtol=0.02)
    assert estimate.converged and estimate.stderr <= 0.02 * abs(estimate.value)


@pytest.mark.slow
@pytest.mark.parametrize("spectrum", [NETWORK, FLAT, 1 / np.arange(1.0, 401) ** 2], ids=["network", "flat", "decaying"])
def test_auto_is_calibrated_over_100_seeds(spectrum: np.ndarray) -> None:
    found, _ = scores(spectrum, "auto", 100)
    assert 0.89 <= np.mean(np.abs(found) <= 2) <= 1.0
    assert abs(found.mean()) <= 0.4


@pytest.mark.parametrize(("spectrum", "at_most"), [(NETWORK, 0.5), (FLAT, 1.15)], ids=["network", "flat"])
def test_auto_costs_no_more_than_the_plain_estimator(spectrum: np.ndarray, at_most: float) -> None:
    """On a flat spectrum there is nothing to deflate: finding that out must cost little."""
    plain, auto = (scores(spectrum, method, 12)[1].mean() for method in ("hutchinson", "auto"))
    assert auto <= at_most * plain


@pytest.mark.parametrize("method", METHODS)
def test_a_fixed_number_of_products_is_kept_to(method: str) -> None:
    estimate = sk.trace(operator_with(NETWORK), method=method, num_matvecs=40)
    assert 36 <= estimate.num_matvecs <= 40
    assert abs(estimate.value - NETWORK.sum()) <= 5 * estimate.stderr


@pytest.mark.parametrize("method", ["auto", "xtrace"])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_a_small_matrix_is_exact(n: int, method: str) -> None:
    spectrum = np.arange(1.0, n + 1)
    estimate = sk.trace(operator_with(spectrum), method=method)
    assert estimate.stderr == 0 and estimate.num_matvecs == n
    np.testing.assert_allclose(estimate.value, spectrum.sum(), rtol=1e-12)


@pytest.mark.parametrize("rank", [1, 3])
def test_low_rank_costs_few_products(rank: int) -> None:
    spectrum = np.concatenate([np.arange(1.0, rank + 1), np.zeros(200)])
    for method in ("auto", "xtrace"):
        estimate = sk.trace(operator_with(spectrum), method=method)
        assert estimate.num_matvecs <= 20
        np.testing.assert_allclose(estimate.value, spectrum.sum(), rtol=1e-8)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spectrum", [np.zeros(30), np.ones(30)], ids=["zero", "identity"])
def test_zero_and_identity_are_exact(spectrum: np.ndarray, method: str) -> None:
    estimate = sk.trace(operator_with(spectrum), method=method)
    # Hutch++ spends two products on a basis vector and learns only from probes that it does not pay off here
    assert estimate.converged and estimate.num_matvecs <= (90 if method == "hutch++" else 31)
    np.testing.assert_allclose(estimate.value, spectrum.sum(), atol=1e-9)


def test_a_trace_that_cancels_ends_and_is_flagged() -> None:
    spectrum = np.concatenate([np.linspace(0.1, 1, 1500), -np.linspace(0.1, 1, 1500)])
    diagonal = torch.from_numpy(spectrum)
    signs = torch.from_numpy(np.random.default_rng(0).choice([-1.0, 1.0], 3000))

    def multiply(v: torch.Tensor) -> torch.Tensor:  # Householder rotation of the diagonal matrix
        u = signs / 3000**0.5
        rotated_vector = v - 2 * u * (u @ v)
        image = diagonal * rotated_vector
        return image - 2 * u * (u @ image)

    operator = CallableOperator(multiply, 3000, dtype=torch.float64, device=torch.device("cpu"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        estimate = sk.trace(operator, max_matvecs=60)
    assert estimate.num_matvecs <= 60
    assert estimate.converged == (not any(issubclass(w.category, ConvergenceWarning) for w in caught))
    assert sk.trace(operator, atol=30.0).converged


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("factor", [1e-7, 1e7])
def test_the_scale_of_the_matrix_changes_nothing(factor: float, dtype: torch.dtype) -> None:
    plain, scaled = (sk.trace(operator_with(c * NETWORK, dtype=dtype)) for c in (1.0, factor))
    np.testing.assert_allclose(scaled.value / factor, plain.value, rtol=2e-2)
    assert abs(scaled.num_matvecs - plain.num_matvecs) <= 3


def test_seeds_budgets_and_progress() -> None:
    operator, seen = operator_with(NETWORK), []
    first, again = (sk.trace(operator, seed=3, callback=seen.append) for _ in range(2))
    assert first.value == again.value and first.value != sk.trace(operator, seed=4).value
    assert seen[-1].num_matvecs == first.num_matvecs
    with pytest.warns(ConvergenceWarning, match="standard error"):
        partial = sk.trace(operator, rtol=1e-4, max_matvecs=12)
    assert partial.num_matvecs <= 12 and not partial.converged and partial.stderr > 0


@pytest.mark.parametrize(
    "arguments", [{"rtol": -1.0}, {"rtol": 0.0}, {"method": "exact"}, {"num_matvecs": 1}, {"max_matvecs": -3}], ids=str
)
def test_bad_arguments_are_refused(arguments: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        sk.trace(operator_with(NETWORK), **arguments)


def test_nan_products_raise() -> None:
    broken = CallableOperator(lambda v: v * float("nan"), 50, dtype=torch.float64, device=torch.device("cpu"))
    for method in METHODS:
        with pytest.raises(NonFiniteError):
            sk.trace(broken, method=method)  # type: ignore[arg-type]


@pytest.mark.parametrize("spectrum", [NETWORK, FLAT, network_like(400)], ids=["network", "flat", "indefinite"])
def test_frobenius_norm_is_right_within_its_error(spectrum: np.ndarray) -> None:
    operator, truth = operator_with(spectrum), np.linalg.norm(spectrum)
    estimates = [sk.frobenius_norm(operator, seed=seed) for seed in range(20)]
    assert all(e.converged and e.stderr <= 0.01 * e.value for e in estimates)
    assert np.mean([abs(e.value - truth) <= 2 * e.stderr for e in estimates]) >= 0.75  # 95 % expected
    assert np.median([e.num_matvecs for e in estimates]) <= 30


@pytest.mark.parametrize("factor", [0.0, 1.0, 1e-7])
def test_frobenius_norm_of_a_multiple_of_the_identity_is_exact(factor: float) -> None:
    np.testing.assert_allclose(sk.frobenius_norm(operator_with(np.full(30, factor))).value, factor * 30**0.5, atol=1e-12 * factor)


def test_the_diagonal_is_right_within_its_error() -> None:
    matrix = rotated(network_like(300), seed=2)
    estimate = sk.diagonal(matrix, num_probes=60)
    off = (estimate.value - matrix.diagonal()) / estimate.stderr
    assert estimate.num_matvecs == 60 and estimate.value.shape == (300,)
    assert 0.9 <= float((off.abs() <= 2).double().mean()) <= 0.99  # 95 % expected over 300 entries


def test_the_diagonal_is_exact_where_n_products_suffice() -> None:
    matrix = rotated(np.arange(20.0))
    estimate = sk.diagonal(matrix)
    torch.testing.assert_close(estimate.value, matrix.diagonal())
    assert estimate.num_matvecs == 20 and float(estimate.stderr.max()) == 0


def test_a_diagonal_matrix_has_no_error() -> None:
    matrix = torch.diag(torch.arange(200.0))
    estimate = sk.diagonal(matrix, num_probes=2)
    torch.testing.assert_close(estimate.value, matrix.diagonal())
    assert float(estimate.stderr.max()) == 0


def test_a_budget_flags_the_diagonal() -> None:
    with pytest.warns(ConvergenceWarning):
        estimate = sk.diagonal(rotated(NETWORK), num_probes=50, max_matvecs=5)
    assert estimate.num_matvecs == 5 and not estimate.converged
    with pytest.raises(ValueError, match="num_probes"):
        sk.diagonal(rotated(NETWORK), num_probes=1)
