"""Converged means right to the tolerance of the value that was asked for, whatever else is in the spectrum; and no spectrum is a crash."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from problems_linalg import operator_with, rotated

import sharpkit as sk
from experiments import eigen_torture
from sharpkit._errors import ConvergenceWarning
from sharpkit.linalg.krylov import KrylovSpace, Products, value_errors
from sharpkit.linalg.lanczos import chance_missed
from sharpkit.linalg.overview import both_ends, spectral_overview
from sharpkit.operators.base import CallableOperator

FAR = np.concatenate([[100.0, 60, 30, 20, 10], np.linspace(0, 1, 286) ** 4 * 3, [-0.1, -0.05, -0.03, -0.02, -0.01]])


def diagonal(values: np.ndarray, dtype: torch.dtype = torch.float64) -> sk.SymmetricOperator:
    entries = torch.from_numpy(values).to(dtype)
    return CallableOperator(lambda v: entries * v, len(values), dtype=dtype, device=torch.device("cpu"))


# -- the tolerance is that of the wanted value ----------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_smallest_is_right_to_its_own_tolerance_beside_a_top_a_thousand_times_as_large(dtype: torch.dtype) -> None:
    for seed in range(4):
        pairs = sk.eigenpairs(diagonal(FAR, dtype), which="smallest", seed=seed)
        assert bool(pairs.converged) and float(pairs.values) == pytest.approx(-0.1, rel=2e-3)


def test_the_largest_is_right_beside_a_far_larger_negative_one() -> None:
    for seed in range(4):
        pairs = sk.eigenpairs(diagonal(np.concatenate([[-1000.0], np.linspace(0, 1.5, 499)])), seed=seed)
        assert bool(pairs.converged) and float(pairs.values) == pytest.approx(1.5, rel=2e-3) and pairs.num_matvecs <= 90


def test_both_ends_of_one_run_have_tolerances_of_their_own() -> None:
    for top, bottom in (both_ends(diagonal(FAR)), (spectral_overview(diagonal(FAR)).largest, spectral_overview(diagonal(FAR)).smallest)):
        assert bool(top.converged) and float(top.values) == pytest.approx(100, rel=1e-6)
        assert bool(bottom.converged) and float(bottom.values) == pytest.approx(-0.1, rel=2e-3)


def test_what_rounding_hides_has_not_converged_but_what_is_0_to_rounding_has() -> None:
    spectrum = np.concatenate([[1.0], np.zeros(49)])
    zero = sk.eigenpairs(operator_with(spectrum, dtype=torch.float32), 3, which="smallest")
    assert bool(zero.converged.all()) and float(zero.values.abs().max()) < 1e-6
    spectrum[1] = -1e-5  # 80 roundings of float32: known to a few per cent
    with pytest.warns(ConvergenceWarning, match="rounding"):
        hidden = sk.eigenpairs(diagonal(spectrum, torch.float32), which="smallest")
    assert not bool(hidden.converged) and float(hidden.values) == pytest.approx(-1e-5, rel=0.1)


def test_power_iteration_holds_each_pair_to_its_own_magnitude() -> None:
    pairs = sk.power_iteration(diagonal(np.concatenate([[100.0, 1.0], np.linspace(0, 0.9, 48)])), 2)
    assert bool(pairs.converged.all()) and float(pairs.values[1]) == pytest.approx(1.0, rel=2e-3)
    with pytest.warns(ConvergenceWarning, match="rounding"):
        lost = sk.power_iteration(diagonal(np.concatenate([[1.0, 1e-5], np.zeros(48)]), torch.float32), 2)
    assert lost.converged.tolist() == [True, False]


# -- the error of a value -----------------------------------------------------------------------------------------------------
def test_an_error_is_the_residual_or_its_square_over_the_gap_to_all_other_intervals() -> None:
    values, residuals = np.array([0.0, 1.0, 1.1, 3.0]), np.array([0.1, 0.1, 0.2, 0.01])
    # 1.1 - 0.2 and 1 - 0.1 overlap, and so keep their residuals; 0 + 0.1 and 0.9 leave a gap of 0.8, 1.3 and 2.99 one of 1.69
    np.testing.assert_allclose(value_errors(values, residuals), [0.01 / 0.8, 0.1, 0.2, 1e-4 / 1.69])
    assert value_errors(values[:1], residuals[:1]).tolist() == [0.1], "alone, a value has nothing to be apart from"
    np.testing.assert_allclose(value_errors(np.array([0.0, 0.3]), np.array([0.1, 0.15])), [0.1, 0.15], err_msg="a gap below the residual")
    wide = np.array([0.0, 1.0, 3.0]), np.array([0.1, 5.0, 0.01])
    np.testing.assert_allclose(value_errors(*wide), wide[1], err_msg="one wide interval covers the others")


def test_errors_that_are_told_from_gaps_hold_on_a_spectrum_with_gaps() -> None:
    spectrum = np.concatenate([[9.0, 7, 5, -4], np.linspace(-1, 1, 196)])
    for seed in range(5):
        space = KrylovSpace(operator_with(spectrum))
        space.add_random(torch.Generator().manual_seed(seed))
        for _ in range(14):
            space.expand(space.pending[0])
        ritz = space.ritz()
        known = ritz.errors < 0.3 * ritz.outward  # told by a gap
        off = np.abs(ritz.values[known, None] - spectrum).min(axis=1, initial=np.inf)
        assert np.all(off <= ritz.errors[known] + 1e-12) and known[[0, -3, -2, -1]].all()


# -- clusters, copies, null spaces ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("copies", "k"), [(7, 5), pytest.param(20, 20, marks=pytest.mark.slow)])
def test_members_of_a_cluster_are_all_found(copies: int, k: int) -> None:
    spectrum = np.concatenate([np.ones(copies), np.linspace(0, 0.95, 193)])
    for seed in range(3):
        np.testing.assert_allclose(sk.eigenpairs(diagonal(spectrum), k, seed=seed).values.numpy(), np.ones(k), atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_near_doubles_of_wilkinsons_matrix_are_found(dtype: torch.dtype) -> None:
    spectrum = eigen_torture.wilkinson(201)
    for seed in range(2):
        pairs = sk.eigenpairs(diagonal(spectrum, dtype), 20, seed=seed)
        np.testing.assert_allclose(pairs.values.numpy(), np.sort(spectrum)[::-1][:20], rtol=1e-3)  # the default tol
        assert bool(pairs.converged.all())


TORTURE = (
    "even from 0",
    "all equal but the largest",
    "two values",
    "rank 3",
    "rank 10, both signs",
    "smallest -8.7 beside 9791",
    "triples",
)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in ("even from 0", "triples") else name for name in TORTURE]
    + ["near doubles, 1e-10", "Wilkinson 21", "0.5^i", "1/i^2, both signs", "1e-30", "1e30"],
)
def test_an_excerpt_of_the_torture_shows_no_crash_and_no_lie(name: str) -> None:
    spectrum = eigen_torture.spectra()[name]
    for setting in eigen_torture.SETTINGS:
        row = eigen_torture.torture(name, spectrum, *setting)
        assert row["crash"] == "" and row["lies"] == 0, row


@pytest.mark.parametrize(
    ("name", "which", "k", "seed"),
    [
        ("network-like", "largest", 20, 0),
        ("network-like", "smallest", 20, 3),
        ("Marchenko and Pastur", "largest", 20, 4),
        ("triples", "largest", 10, 1),
    ],
)
def test_two_values_some_tolerances_apart_are_not_taken_for_each_other_deep_in_a_bulk(name: str, which: str, k: int, seed: int) -> None:
    """The eigenvector passed over lay for the most part in the vector left over by the first run, to which the search is orthogonal."""
    row = eigen_torture.torture(name, eigen_torture.spectra()[name], which, k, "float64", seed)
    assert row["lies"] == row["wrong"] == 0 and row["converged"] == k, row


@pytest.mark.parametrize("steps", [1, 5, 12])
@pytest.mark.parametrize("end", [1.05, -1.3])
def test_the_chance_of_passing_over_an_eigenvalue_follows_from_the_largest_share_of_the_start_it_can_have(steps: int, end: float) -> None:
    """Gauss-Radau with a node prescribed at the end has the weight of the Christoffel number there (Golub and Meurant, 2010)."""
    space = KrylovSpace(operator_with(np.linspace(-1, 1, 200)))
    space.add_random(torch.Generator().manual_seed(0))
    for _ in range(steps + 1):
        space.expand(space.pending[0])
    lanczos = space.projected(space.expanded[:steps])
    radau = space.projected()
    # the last entry such that end is an eigenvalue: beta^2 / (end - x) summed over the inner pairs
    inner, vectors = np.linalg.eigh(lanczos)
    radau[-1, -1] = end - radau[-2, -1] ** 2 * np.sum(vectors[-1] ** 2 / (end - inner))
    nodes, coordinates = np.linalg.eigh(radau)
    share = float(coordinates[0, np.argmin(np.abs(nodes - end))] ** 2)
    chance = chance_missed(radau, nodes[-1] + 1e-9 if end > 0 else nodes[0] - 1e-9, 200)
    assert chance == pytest.approx(min(1.0, float(np.sqrt(2 * 200 * share / np.pi))), rel=1e-4)
    assert chance_missed(lanczos, float(inner[0]), 200) == 1.0, "an eigenvalue of the matrix has come in"
    assert chance_missed(np.diag([1.0, 2.0]), 3.0, 200) == 0.0, "an invariant space holds all of the start"


def test_the_chance_of_passing_over_an_eigenvalue_holds_over_random_starts() -> None:
    """Of the starts that see nothing of an isolated eigenvalue in seven steps, there are no more than is said at the time."""
    spectrum, generator = np.append(np.linspace(-1, 1, 99), 1.6), np.random.default_rng(0)
    missed, said = [], []
    for _ in range(500):
        start = generator.standard_normal(100)
        basis = np.linalg.qr(start[:, None] * spectrum[:, None] ** np.arange(7))[0]
        lanczos = basis.T @ (spectrum[:, None] * basis)
        missed.append(np.linalg.eigvalsh(lanczos)[-1] < 1.5)
        said.append(chance_missed(np.triu(np.tril(lanczos, 1), -1), 1.6, 100) if missed[-1] else 0.0)
    assert any(missed) and np.mean(missed) <= max(said)


# -- scales, and what is no real symmetric matrix ---------------------------------------------------------------------------------
@pytest.mark.parametrize("scale", [1e-37, 1e-30, 1e-12, 1e12, 1e30, 1e37])
def test_scales_up_to_the_ends_of_float32_change_nothing(scale: float) -> None:
    values = np.linspace(1, 3, 40)
    matrix = rotated(values).mul(scale).float()
    for pairs in (sk.eigenpairs(matrix, 2), sk.power_iteration(matrix, 1, tol=1e-4)):
        assert bool(pairs.converged.all()) and float(pairs.values[0]) == pytest.approx(3 * scale, rel=1e-3)
    density = sk.spectral_density(matrix, num_probes=3, num_steps=10)
    assert density.trace.value == pytest.approx(80 * scale, rel=0.1)


def test_the_smallest_numbers_are_never_said_to_have_converged() -> None:
    """Around 1e-43 float32 has two digits, and its products fewer."""
    matrix = torch.diag(torch.linspace(1, 3, 40) * 1e-43)
    with pytest.warns(ConvergenceWarning, match="rounding"):
        pairs = sk.eigenpairs(matrix)
    assert not bool(pairs.converged) and float(pairs.residuals) > 1e-44


def test_products_are_in_units_of_the_matrix_only_where_squares_would_be_lost() -> None:
    for size, unit in ((1.0, 1.0), (1e5, 1.0), (1e-5, 1.0), (2.0**40, 2.0**40), (2.0**-40, 2.0**-40), (1e-45, 2.0**-126)):
        products, ones = Products(diagonal(np.full(3, size), torch.float32)), torch.ones(3)
        # 1e-6: ten roundings of float32
        np.testing.assert_allclose((products(ones).double() * products.unit).numpy(), np.full(3, np.float32(size)), rtol=1e-6)
        assert products.unit == unit and (products.underflow > 0) is (unit != 1)
    silent = Products(CallableOperator(lambda v: v * (2.0**40 if v[0] > 1 else 0.0), 3, dtype=torch.float32, device=torch.device("cpu")))
    assert float(silent(torch.ones(3)).abs().max()) == 0 and silent.unit == 1.0
    silent(2 * torch.ones(3))
    assert silent.unit == 2.0**41, "a product of 0 tells nothing about the size of the others"


def test_complex_operators_are_refused() -> None:
    from scipy.sparse import csr_matrix
    from scipy.sparse.linalg import aslinearoperator

    hermitian = np.array([[1.0, 2j], [-2j, 1.0]])
    given: list[tuple[Any, dict[str, Any]]] = [(each, {}) for each in (hermitian, torch.from_numpy(hermitian), csr_matrix(hermitian))]
    given += [(aslinearoperator(hermitian), {}), (lambda v: v * 1j, {"size": 2}), (lambda v: v, {"size": 2, "dtype": torch.complex64})]
    for matrix, options in given:
        with pytest.raises(ValueError, match=r"real"):
            sk.eigenpairs(sk.as_operator(matrix, **options))


@pytest.mark.parametrize("matrix", [np.diag([1.0, 2.0, 3.0]), np.diag([1.0, 2.0, 3.0]) + 1e-20 * (np.eye(3, k=1) + np.eye(3, k=-1))])
def test_an_exhausted_space_has_passed_over_nothing(matrix: np.ndarray) -> None:
    assert chance_missed(matrix, 4.0, 200) == 0.0
