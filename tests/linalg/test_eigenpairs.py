"""eigenpairs against prescribed spectra: right values, honest residuals, few products, nothing missed."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from problems_linalg import network_like, operator_with, rotated, true_residuals

import sharpkit as sk
from sharpkit._errors import ConvergenceWarning, NonFiniteError, NotSymmetricError
from sharpkit.linalg.krylov import BasisRows, KrylovSpace
from sharpkit.linalg.lanczos import _Iteration, chance_missed
from sharpkit.linalg.results import Budget
from sharpkit.operators.base import CallableOperator

TOL = 1e-3
BULK = np.linspace(-1, 1, 194)
SPECTRA = {
    "separated": np.concatenate([[9.0, 7, 5, 4, 3, 2], BULK]),
    "clustered": np.concatenate([[5.0, 4.99, 4.98, 4.97, 3, 2], BULK]),
    "multiple": np.concatenate([[5.0, 5, 3, 3, 3, 2], BULK]),
    "indefinite": np.concatenate([[5.0, -9, 4, -8, 3, -2], BULK]),
    "plus-minus pairs": np.concatenate([[5.0, -5, 4, -4, 3, -3], BULK]),
    "rank-deficient": np.concatenate([[5.0, 4, 3], np.zeros(197)]),
    "identity": np.ones(50),
    "zero": np.zeros(50),
    "all equal but one": np.concatenate([[3.0], np.ones(60)]),
    "network-like": network_like(400),
}


def wanted(spectrum: np.ndarray, k: int, which: str) -> np.ndarray:
    """The true answer in the documented order."""
    if which == "magnitude":
        return spectrum[np.argsort(-np.abs(spectrum), kind="stable")][:k]
    ascending = np.sort(spectrum)
    return ascending[::-1][:k] if which == "largest" else ascending[:k][::-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("which", ["largest", "smallest", "magnitude"])
@pytest.mark.parametrize("name", SPECTRA)
def test_values_vectors_and_residuals_are_right(name: str, which: str, dtype: torch.dtype) -> None:
    spectrum, k = SPECTRA[name], 4
    # wanted pairs inside a continuous bulk are told apart only up to the tolerance: the error is bounded by the residual
    operator = operator_with(spectrum, dtype=dtype)
    pairs = sk.eigenpairs(operator, k, which=which, tol=TOL)
    scale = float(np.abs(spectrum).max())
    rounding = 100 * torch.finfo(dtype).eps * scale
    expected = wanted(spectrum, k, which)
    compare = np.abs if which == "magnitude" else np.asarray  # +5 and -5 may come in either order
    np.testing.assert_allclose(compare(pairs.values.numpy()), compare(expected), atol=2 * TOL * scale + rounding)
    assert bool(pairs.converged.all()) and pairs.outcome == "converged"
    assert pairs.values.dtype == torch.float64 and pairs.vectors.dtype == dtype and pairs.vectors.shape == (len(spectrum), k)
    truth = true_residuals(operator, pairs.vectors, pairs.values)
    below = 20 * np.finfo(np.float64).eps * scale  # the two products that are compared round differently
    assert np.all(truth <= 1.1 * pairs.residuals.numpy() + below), "a reported residual is below the true one"
    assert np.all(truth <= TOL * scale + rounding)
    gram = (pairs.vectors.T @ pairs.vectors).double()
    torch.testing.assert_close(gram, torch.eye(k, dtype=torch.float64), atol=200 * torch.finfo(dtype).eps, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("factor", [1e-7, 1e7])
def test_the_scale_of_the_matrix_changes_nothing(factor: float, dtype: torch.dtype) -> None:
    spectrum = network_like(300)
    plain = sk.eigenpairs(operator_with(spectrum, dtype=dtype), 8)
    scaled = sk.eigenpairs(operator_with(factor * spectrum, dtype=dtype), 8)
    assert abs(scaled.num_matvecs - plain.num_matvecs) <= 1  # the rounding differs
    np.testing.assert_allclose(scaled.values.numpy() / factor, plain.values.numpy(), rtol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 3, 20])
def test_all_n_pairs_of_a_small_matrix_are_exact(n: int) -> None:
    spectrum = np.arange(n) - n / 3
    pairs = sk.eigenpairs(operator_with(spectrum), n)
    np.testing.assert_allclose(pairs.values.numpy(), np.sort(spectrum)[::-1], atol=1e-12 * n)
    assert bool(pairs.converged.all()) and pairs.num_matvecs <= n


@pytest.mark.parametrize("name", ["identity", "zero", "rank-deficient"])
def test_k_equal_to_n_works_where_every_start_breaks_down(name: str) -> None:
    spectrum = SPECTRA[name][:30]
    pairs = sk.eigenpairs(operator_with(spectrum), 30)
    np.testing.assert_allclose(pairs.values.numpy(), np.sort(spectrum)[::-1], atol=1e-12)
    assert bool(pairs.converged.all())


def test_every_copy_of_a_multiple_eigenvalue_is_found() -> None:
    spectrum = np.concatenate([[5.0] * 4, [3.0] * 2, [2.0], np.linspace(-1, 1, 193)])
    for seed in range(5):
        pairs = sk.eigenpairs(operator_with(spectrum), 6, seed=seed)
        np.testing.assert_allclose(pairs.values.numpy(), [5, 5, 5, 5, 3, 3], atol=5 * TOL**2 * 5 + 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_outlier_is_missed_in_50_starts_and_products_stay_few(dtype: torch.dtype) -> None:
    spectrum = network_like(400)
    truth, operator, counts = np.sort(spectrum)[::-1][:10], operator_with(spectrum, dtype=dtype), []
    for seed in range(50):
        pairs = sk.eigenpairs(operator, 10, seed=seed)
        assert np.abs(pairs.values.numpy() / truth - 1).max() <= 1e-3, f"seed {seed}"
        counts.append(pairs.num_matvecs)
    assert max(counts) <= 38 and np.median(counts) <= 30


def test_a_clustered_outlier_is_never_missed_in_50_starts() -> None:
    spectrum = np.concatenate([[1.0, 0.98, 0.96, 0.6, 0.59, 0.3], 0.05 * np.linspace(-1, 1, 294)])
    operator = operator_with(spectrum)
    for seed in range(50):
        found = sk.eigenpairs(operator, 6, seed=seed).values.numpy()
        np.testing.assert_allclose(found, spectrum[:6], atol=1e-3, err_msg=f"seed {seed}")


def test_top_1_needs_about_ten_products() -> None:
    operator = operator_with(network_like(400))
    counts = [sk.eigenpairs(operator, seed=seed).num_matvecs for seed in range(20)]
    assert max(counts) <= 14


@pytest.mark.parametrize("which", ["largest", pytest.param("smallest", marks=pytest.mark.slow)])
def test_top_1_beside_a_close_second_is_never_missed_in_100_starts(which: str) -> None:
    """The second passes for the first over several checks: what the start can have passed over tells that there may be a better one."""
    spectrum = np.concatenate([[1.0, 0.98, 0.97], np.linspace(-0.9, 0.9, 497)]) * (-1 if which == "smallest" else 1)
    operator = operator_with(spectrum)
    made = [sk.eigenpairs(operator, which=which, seed=seed) for seed in range(100)]  # type: ignore[arg-type]
    assert max(abs(abs(float(pairs.values)) - 1) for pairs in made) <= 3e-3
    assert np.median([pairs.num_matvecs for pairs in made]) <= 34, "three checks in a row took as many"


def test_what_leads_out_of_a_run_narrows_the_chance_of_passing_over_an_eigenvalue() -> None:
    """As a step more does, whose diagonal entry does not matter outside the range."""
    lanczos = np.diag([0.1, 0.0, -0.1, 0.2]) + 0.2 * (np.eye(4, k=1) + np.eye(4, k=-1))
    first = lanczos[:3, :3]
    assert chance_missed(first, 1.5, 100, 0.2) == chance_missed(lanczos, 1.5, 100) < chance_missed(first, 1.5, 100)


def test_float32_shows_no_ghost_after_200_steps() -> None:
    outliers = np.array([10.0, 3, 2, 1, 0.5])
    spectrum = np.concatenate([outliers, 1e-3 * np.linspace(0, 1, 595)])
    density = sk.spectral_density(operator_with(spectrum, dtype=torch.float32), num_probes=1, num_steps=200, distribution="normal")
    above = np.sort(density.nodes.numpy().ravel()[density.nodes.numpy().ravel() > 0.01])[::-1]
    distinct = above[np.concatenate([[True], np.diff(above) != 0])]
    np.testing.assert_allclose(distinct, outliers, rtol=1e-5)


def test_thick_restart_gives_the_same_pairs_in_a_small_basis() -> None:
    spectrum = np.concatenate([np.linspace(2, 3, 12), np.linspace(-1, 1.9, 388)])
    operator = operator_with(spectrum)
    small, large = (sk.eigenpairs(operator, 3, tol=1e-6, basis_size=size) for size in (16, 300))
    assert small.num_matvecs > 16, "the small basis must have been restarted for this test to mean anything"
    np.testing.assert_allclose(small.values.numpy(), large.values.numpy(), atol=1e-8)
    assert np.all(true_residuals(operator, small.vectors, small.values) <= 3e-6 * 3)


def test_offloading_the_basis_changes_nothing() -> None:
    operator = operator_with(network_like(300))
    torch.testing.assert_close(sk.eigenpairs(operator, 5, offload=True).values, sk.eigenpairs(operator, 5).values)


def test_half_precision_operators_recur_in_float32() -> None:
    matrix = rotated(SPECTRA["separated"], dtype=torch.float32)
    half = CallableOperator(lambda v: matrix.to(v.dtype) @ v, len(matrix), dtype=torch.bfloat16, device=torch.device("cpu"))
    pairs = sk.eigenpairs(half, 2, tol=0.05)
    assert pairs.vectors.dtype == torch.bfloat16
    np.testing.assert_allclose(pairs.values.numpy(), [9, 7], rtol=2e-2)  # bfloat16 carries 8 bits


def test_the_same_seed_gives_the_same_bits_and_the_global_generator_is_left_alone() -> None:
    operator = operator_with(network_like(200))
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first, second, other = (sk.eigenpairs(operator, 3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.values, second.values) and torch.equal(first.vectors, second.vectors)
    assert not torch.equal(first.vectors, other.vectors)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_warm_start_needs_few_products() -> None:
    old, change = rotated(network_like(500)), rotated(np.linspace(-1, 1, 500), seed=1)
    new = sk.as_operator(old + 0.02 * change)  # moves the matrix by 2 % of its norm
    start = torch.linalg.eigh(old).eigenvectors.flip(1)
    truth = torch.linalg.eigvalsh(new.matrix).flip(0)  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        after_two = sk.eigenpairs(new, initial=start[:, 0], max_matvecs=2)
    assert abs(float(after_two.values[0] / truth[0]) - 1) <= 2e-3
    cold, warm = sk.eigenpairs(new), sk.eigenpairs(new, initial=start[:, 0])
    assert warm.num_matvecs <= 5 < cold.num_matvecs
    assert sk.eigenpairs(new, 5, initial=start[:, :5]).num_matvecs < sk.eigenpairs(new, 5).num_matvecs
    assert abs(float(warm.values[0] / truth[0]) - 1) <= 1e-4


def test_an_exact_eigenvector_of_a_wrong_eigenvalue_is_no_trap() -> None:
    matrix = torch.diag(torch.from_numpy(network_like(300)))
    unit = torch.eye(300, dtype=torch.float64)
    for seed in range(10):
        for wrong in (1, 2, 5):
            assert abs(float(sk.eigenpairs(matrix, initial=unit[:, wrong], seed=seed).values[0]) - 1) <= 1e-3
    two = sk.eigenpairs(matrix, 2, initial=unit[:, 3:5])
    np.testing.assert_allclose(two.values.numpy(), [1, 0.75], atol=1e-3)


def test_a_budget_gives_a_flagged_partial_result() -> None:
    operator = operator_with(network_like(300))
    with pytest.warns(ConvergenceWarning, match="products"):
        pairs = sk.eigenpairs(operator, 5, max_matvecs=8)
    assert pairs.num_matvecs == 8 and not bool(pairs.converged.all()) and "budget" in pairs.outcome
    assert np.all(true_residuals(operator, pairs.vectors, pairs.values) <= 1.1 * pairs.residuals.numpy())


def test_fewer_products_than_pairs_says_so() -> None:
    with pytest.warns(ConvergenceWarning):
        pairs = sk.eigenpairs(operator_with(network_like(100)), 5, max_matvecs=3)
    assert pairs.vectors.shape == (100, 5) and pairs.values.shape == (5,)
    assert bool(torch.isfinite(pairs.values[:3]).all()) and bool(torch.isnan(pairs.values[3:]).all())
    assert bool(torch.isinf(pairs.residuals[3:]).all())
    torch.testing.assert_close(pairs.vectors.T @ pairs.vectors, torch.eye(5, dtype=torch.float64))


def test_a_time_budget_ends_it() -> None:
    with pytest.warns(ConvergenceWarning, match="time"):
        pairs = sk.eigenpairs(operator_with(network_like(100)), 3, max_seconds=1e-9)
    assert pairs.num_matvecs == 0 and not bool(pairs.converged.any())


def test_progress_counts_up_to_the_end() -> None:
    seen: list[sk.Progress] = []
    pairs = sk.eigenpairs(operator_with(network_like(200)), 4, callback=seen.append)
    assert [p.num_matvecs for p in seen] == list(range(1, pairs.num_matvecs + 1))
    assert all(p.expected_matvecs >= p.num_matvecs and p.remaining >= 0 for p in seen)
    assert seen[-1].stage == "search for missed eigenvalues"


def test_a_tolerance_below_rounding_ends_and_says_so() -> None:
    with pytest.warns(ConvergenceWarning, match="rounding"):
        pairs = sk.eigenpairs(operator_with(network_like(200), dtype=torch.float32), 3, tol=1e-9)
    assert not bool(pairs.converged.any()) and "out of reach" in pairs.outcome
    np.testing.assert_allclose(pairs.values.numpy(), [1, 0.75, 0.5625], rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "between 1 and n = 20"),
        ({"k": 21}, "between 1 and n = 20"),
        ({"which": "LA"}, "which must be one of"),
        ({"tol": 0.0}, "tol"),
        ({"initial": torch.ones(7, dtype=torch.float64)}, "20 rows"),
        ({"basis_size": 5}, "basis_size must be at least"),
        ({"max_matvecs": 0}, "max_matvecs"),
        ({"initial": torch.ones(2, 3, 4)}, "shape"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sk.eigenpairs(operator_with(np.arange(20.0)), **arguments)


def test_nan_products_raise() -> None:
    broken = CallableOperator(lambda v: v * float("nan"), 5, dtype=torch.float64, device=torch.device("cpu"))
    with pytest.raises(NonFiniteError, match="NaN"):
        sk.eigenpairs(broken)


def test_products_that_are_not_symmetric_raise_during_the_iteration() -> None:
    generator = np.random.default_rng(0)
    matrix = torch.from_numpy(generator.standard_normal((40, 40)))
    crooked = CallableOperator(lambda v: matrix @ v, 40, dtype=torch.float64, device=torch.device("cpu"))
    with pytest.raises(NotSymmetricError, match="contradict"):
        sk.eigenpairs(crooked, 3)


def test_values_agree_with_scipy() -> None:
    from scipy.sparse.linalg import eigsh

    operator = operator_with(SPECTRA["clustered"])
    reference = eigsh(operator.to_scipy(), 4, which="LA", return_eigenvectors=False)
    np.testing.assert_allclose(sk.eigenpairs(operator, 4, tol=1e-8).values.numpy(), np.sort(reference)[::-1], rtol=1e-10)


# -- the search for missed eigenvalues: long enough, and no longer ------------------------------------------------------------
def searched(spectrum: np.ndarray, k: int, seed: int = 0) -> tuple[np.ndarray, int]:
    """The values, and the products that the search for missed eigenvalues made."""
    seen: list[sk.Progress] = []
    values = sk.eigenpairs(operator_with(spectrum), k, seed=seed, callback=seen.append).values.numpy()
    return values, sum(p.text == "search for missed eigenvalues" for p in seen)


def test_where_little_can_be_missed_the_search_makes_seven_or_eight_products() -> None:
    """One for the vector left over, one for what grew from that, and from a random start until 2.9 or 2 would hardly be passed over."""
    for spectrum, k, searches in (
        (np.concatenate([[3.0, 2, 2], np.linspace(-1, 1, 297)]), 3, 6),
        (np.concatenate([[3.0, 2.9], np.linspace(-1, 1, 298)]), 2, 5),
    ):
        for seed in range(10):
            values, products = searched(spectrum, k, seed)
            np.testing.assert_allclose(values, spectrum[:k], atol=3e-3)
            assert products == searches + 2
    assert searched(np.concatenate([[3.0], np.linspace(-1, 1, 299)]), 1)[1] == 0, "a single pair is not searched for"


@pytest.mark.parametrize(
    "bulk",
    [0.1 / 3 * np.random.default_rng(0).standard_normal(297), pytest.param(np.linspace(-1, 1, 297), marks=pytest.mark.slow)],
    ids=["Gaussian", "uniform"],
)
def test_a_second_copy_just_above_the_bulk_is_not_missed_in_20_starts(bulk: np.ndarray) -> None:
    """A search that stopped when the complement's best Ritz value and its residual are clear of the wanted would miss one."""
    double = 2.0 * float(bulk.max()) if float(bulk.max()) < 0.5 else 1.2
    top = 10 * double if float(bulk.max()) > 0.5 else 5 * double
    spectrum = np.concatenate([[top, double, double], bulk])
    for seed in range(20):
        values, _ = searched(spectrum, 3, seed)
        np.testing.assert_allclose(values, spectrum[:3], atol=2e-3 * top, err_msg=f"seed {seed}")


def test_where_the_complement_reaches_the_wanted_the_search_makes_six_products_from_its_start_at_least() -> None:
    """Half of the products made so far would be two or three: too few to tell."""
    seen: list[sk.Progress] = []
    sk.eigenpairs(operator_with(np.linspace(0, 1, 300)), 2, tol=0.99, callback=seen.append)
    assert sum(p.text == "search for missed eigenvalues" for p in seen) == 1 + 6 + 1


def test_where_it_stays_unclear_the_search_makes_three_quarters_of_the_products_so_far() -> None:
    for tol in (0.05, 0.02, 0.01):
        seen: list[sk.Progress] = []
        sk.eigenpairs(operator_with(np.linspace(0, 1, 300)), 2, tol=tol, callback=seen.append)
        texts = [p.text == "search for missed eigenvalues" for p in seen]
        before = texts.index(True)
        assert before > 12 and sum(texts) == 1 + 3 * before // 4 + 1


def test_the_last_vector_of_a_complete_basis_is_multiplied_too() -> None:
    """Six rows: the two wanted are settled after five products, and what is left may still hold one."""
    assert sk.eigenpairs(operator_with(np.array([100.0, 50, 4e-3, 3e-3, 2e-3, 1e-3])), 2, tol=1e-2).num_matvecs == 6


# -- when the iteration stops -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("k", "warm", "products"), [(1, False, 3), (1, True, 4), (2, False, 5), (3, False, 6), (3, True, 6)])
def test_two_looks_in_a_row_with_two_pairs_in_reserve_and_one_for_a_single_cold_pair(k: int, warm: bool, products: int) -> None:
    """With a tolerance that everything meets, only these rules keep the iteration going: k + 2 products, and one more.

    A single cold pair needs one look, as the run cannot have passed over a value that is larger by three tolerances.
    """
    operator, seen = operator_with(np.concatenate([[3.0, 2.9, 2.8], np.linspace(2.5, 2.7, 297)])), []
    initial = torch.linalg.eigh(operator.matrix).eigenvectors[:, -k:] if warm else None  # type: ignore[attr-defined]
    sk.eigenpairs(operator, k, tol=0.99, initial=initial, callback=seen.append)
    assert sum(p.text.startswith("Lanczos") for p in seen) == products


def test_progress_expects_two_products_a_pair_and_says_how_many_are_accepted() -> None:
    for k, expected in ((1, 12), (4, 22)):
        seen: list[sk.Progress] = []
        pairs = sk.eigenpairs(operator_with(network_like(200)), k, callback=seen.append)
        assert seen[0].expected == expected and seen[0].text == f"Lanczos, 0 of {k} pairs"
        accepted = [int(p.text.split()[1]) for p in seen if p.text.startswith("Lanczos")]
        assert accepted[-1] == k and accepted == sorted(accepted)
        assert all(p.expected <= max(expected, p.done + 2 * k + 4) for p in seen) and seen[-1].expected >= pairs.num_matvecs


def test_slow_convergence_ends_after_1000_products_and_50_a_pair() -> None:
    diagonal = torch.linspace(0, 1, 3000, dtype=torch.float64)
    operator = CallableOperator(lambda v: diagonal * v, 3000, dtype=torch.float64, device=torch.device("cpu"))
    with pytest.warns(ConvergenceWarning, match=r"0 of 1 eigenpairs converged after 1050 products"):
        pairs = sk.eigenpairs(operator, tol=1e-12, basis_size=11)
    assert pairs.num_matvecs == 1050 and pairs.tol == 1e-12


def test_a_thousandth_seed_0_and_the_largest_unless_asked_otherwise() -> None:
    operator = operator_with(network_like(200))
    plain = sk.eigenpairs(operator, 2)
    for options in ({"tol": 1e-3}, {"seed": 0}, {"which": "largest"}, {"max_matvecs": 1100}):
        assert torch.equal(sk.eigenpairs(operator, 2, **options).values, plain.values)  # type: ignore[arg-type]
    assert plain.which == "largest" and plain.tol == 1e-3 and len(sk.eigenpairs(operator).values) == 1


# -- the memory of the basis --------------------------------------------------------------------------------------------------
@pytest.fixture
def rows_kept(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The most basis vectors ever in memory."""
    most, append = [0], BasisRows.append

    def counted(self: BasisRows, vector: torch.Tensor) -> None:
        append(self, vector)
        most[0] = max(most[0], self.size)

    monkeypatch.setattr(BasisRows, "append", counted)
    return most


@pytest.mark.parametrize(("k", "asked", "kept"), [(1, None, 80), (3, 16, 16), (3, 13, 13), (40, None, 100), (3, 10**6, None)])
def test_no_more_vectors_are_kept_than_asked_for(k: int, asked: int | None, kept: int | None, rows_kept: list[int]) -> None:
    operator = operator_with(np.linspace(0, 1, 400))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        sk.eigenpairs(operator, k, tol=1e-9, basis_size=asked, max_matvecs=180)
    assert rows_kept[0] == kept or (kept is None and rows_kept[0] > 150)


def test_half_the_free_memory_bounds_the_basis_but_not_below_ten_more_than_wanted(rows_kept: list[int]) -> None:
    class Small(CallableOperator):
        rows = 0

        def free_memory(self, *, host: bool = False) -> float:
            return 2.0 * self.rows * 400 * 8

    matrix = rotated(np.linspace(0, 1, 400))
    operator = Small(lambda v: matrix @ v, 400, dtype=torch.float64, device=torch.device("cpu"))
    for Small.rows, kept in ((30, 30), (7, 13)):
        rows_kept[0] = 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            sk.eigenpairs(operator, 3, tol=1e-9, max_matvecs=100)
        assert rows_kept[0] == kept
    Small.rows = 6  # and memory for twelve
    with pytest.raises(
        sk.OutOfMemoryError, match=r"a basis of 13 vectors takes 40\.6 KiB, and 37\.5 KiB may be taken for it on cpu: ask for"
    ):
        sk.eigenpairs(operator, 3)


@pytest.mark.parametrize(("size", "kept"), [(16, 9), (40, 17), (13, 8)])
def test_a_restart_keeps_the_wanted_two_in_reserve_and_a_third_of_the_rest(size: int, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, compress = [], KrylovSpace.compress

    def watched(self: KrylovSpace, values: np.ndarray, coordinates: np.ndarray) -> None:
        assert self.size <= size
        sizes.append(len(values))
        compress(self, values, coordinates)

    monkeypatch.setattr(KrylovSpace, "compress", watched)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        sk.eigenpairs(operator_with(np.linspace(0, 1, 400)), 3, tol=1e-9, basis_size=size, max_matvecs=100)
    assert len(sizes) > 2 and set(sizes) == {kept}, f"3 + 2 + ({size} - 3) // 3"


def test_the_search_for_missed_pairs_restarts_into_what_leaves_room_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 13 rows 3 wanted and 2 in reserve are kept, one vector is pending and the search needs 2 to start with: 5 are left for it."""
    sizes, compress = [], KrylovSpace.compress

    def watched(self: KrylovSpace, values: np.ndarray, coordinates: np.ndarray) -> None:
        compress(self, values, coordinates)
        sizes.append((len(values), self.size))

    monkeypatch.setattr(KrylovSpace, "compress", watched)
    spectrum = np.concatenate([[9.0, 8, 7], np.linspace(0, 1, 197)])
    assert bool(sk.eigenpairs(operator_with(spectrum), 3, basis_size=13).converged.all()) and sizes == [(5, 6)]


@pytest.mark.parametrize("first", [0, 1])
def test_of_two_pending_vectors_the_one_that_carries_the_residuals_is_multiplied(first: int) -> None:
    """One start spans the space of the wanted pairs, the other two rows that nothing else is coupled to."""
    matrix = torch.diag(torch.tensor([9.0, 8.0, 7.0, 6.0, 0.2, 0.1], dtype=torch.float64))
    starts = [torch.tensor([1.0, 1, 1, 1, 0, 0]).double(), torch.tensor([0.0, 0, 0, 0, 1, 1]).double()]
    space = KrylovSpace(sk.as_operator(matrix))
    for start in starts[first:] + starts[:first]:
        space.add_start(start)
    wanted = first  # its index in the basis
    iteration = _Iteration(space, Budget(space.operator), 1, "largest", 1e-3, torch.Generator(), 6, warm=True)
    space.expand(wanted)
    iteration._update()
    assert iteration._most_useful() == 2, "what grew from it, not the other start"


@pytest.mark.parametrize(("k", "n", "least"), [(3, 50, 13), (3, 12, 12)])
def test_a_basis_too_small_to_restart_from_is_refused(k: int, n: int, least: int) -> None:
    operator = operator_with(np.arange(float(n)))
    with pytest.raises(ValueError, match=f"basis_size must be at least {least}"):
        sk.eigenpairs(operator, k, basis_size=least - 1)
    assert bool(sk.eigenpairs(operator, k, basis_size=least).converged.all())


# -- warm starts --------------------------------------------------------------------------------------------------------------
def test_a_warm_start_is_the_sum_of_the_given_directions_with_a_fifth_of_noise() -> None:
    """Of diag(1, 1, 0, ...) the first Ritz value is the share of the start along these axes: 1 / (1 + 0.2^2), but for chance overlap."""
    n = 20_000
    operator = sk.as_operator(torch.diag(torch.tensor([1.0, 1.0] + [0.0] * 98, dtype=torch.float64)))
    big = CallableOperator(lambda v: v * (torch.arange(n) < 2), n, dtype=torch.float64, device=torch.device("cpu"))
    e = torch.zeros(n, 2, dtype=torch.float64)
    e[0, 0], e[1, 1] = 1e6, 1e-3
    for initial in (e[:, 0], e[:, :1], e):
        with pytest.warns(ConvergenceWarning):
            pairs = sk.eigenpairs(big, initial=initial, max_matvecs=1)
        assert float(pairs.values[0]) == pytest.approx(1 / 1.04, abs=0.01)
    both = sk.eigenpairs(operator, initial=torch.zeros(100, dtype=torch.float64))
    assert float(both.values[0]) == pytest.approx(1.0), "a start of zeros is replaced by a random one"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [({"k": True}, TypeError), ({"k": 2.0}, TypeError), ({"tol": 1.0}, ValueError), ({"initial": torch.ones(0, 2)}, ValueError)],
)
def test_arguments_of_the_wrong_kind_are_named(arguments: dict, error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(arguments))):
        sk.eigenpairs(operator_with(np.arange(20.0)), **arguments)


def test_a_budget_ended_search_for_the_smallest_keeps_the_order_and_the_missing_last() -> None:
    with pytest.warns(ConvergenceWarning, match="0 of 5 eigenpairs"):
        pairs = sk.eigenpairs(operator_with(network_like(100)), 5, which="smallest", max_matvecs=3)
    assert pairs.values[0] > pairs.values[1] > pairs.values[2] and bool(torch.isnan(pairs.values[3:]).all())
    assert np.all(
        true_residuals(operator_with(network_like(100)), pairs.vectors[:, :3], pairs.values[:3]) <= 1.01 * pairs.residuals[:3].numpy()
    )
    torch.testing.assert_close(pairs.vectors.T @ pairs.vectors, torch.eye(5, dtype=torch.float64))


def test_time_that_ends_before_the_first_product_leaves_vectors_alone() -> None:
    for which in ("largest", "smallest", "magnitude"):
        with pytest.warns(ConvergenceWarning, match="time budget used up"):
            pairs = sk.eigenpairs(operator_with(network_like(100)), 3, which=which, max_seconds=1e-9)  # type: ignore[arg-type]
        assert pairs.values.shape == pairs.residuals.shape == pairs.converged.shape == (3,)
        assert bool(torch.isnan(pairs.values).all()) and bool(torch.isinf(pairs.residuals).all())
        torch.testing.assert_close(pairs.vectors.T @ pairs.vectors, torch.eye(3, dtype=torch.float64))


def test_a_budget_that_ends_during_the_search_says_so() -> None:
    operator = operator_with(network_like(300))
    full = sk.eigenpairs(operator, 4).num_matvecs
    with pytest.warns(ConvergenceWarning, match="before the search for missed eigenvalues ended"):
        pairs = sk.eigenpairs(operator, 4, max_matvecs=full - 2)
    assert not bool(pairs.converged.any()) and pairs.num_matvecs == full - 2


def test_warnings_point_at_the_call() -> None:
    with pytest.warns(ConvergenceWarning) as caught:
        sk.eigenpairs(operator_with(network_like(100)), max_matvecs=2)
    assert [w.filename for w in caught] == [__file__]


def test_a_start_from_another_matrix_changes_the_cost_and_not_the_answer() -> None:
    spectrum = np.concatenate([[30.0, 20.0, 12.0], np.linspace(4, -1, 197)])
    matrix = operator_with(spectrum)
    nearby = operator_with(spectrum * (1 + 0.01 * np.cos(np.arange(200))))  # the same eigenvectors, other values
    for k in (1, 3):
        plain, two = sk.eigenpairs(matrix, k), sk.eigenpairs(matrix, k, start_from=nearby)
        np.testing.assert_allclose(two.values, spectrum[:k], rtol=1e-3)  # tol, its default
        residuals = (matrix @ two.vectors - two.vectors * two.values).norm(dim=0)
        assert bool((residuals <= two.residuals + 1e-9).all() and two.converged.all()), "residuals are those of the matrix itself"
        assert k > 1 or (two.num_matvecs < plain.num_matvecs and "may have been passed over" in two.outcome)
    far = operator_with(spectrum[::-1].copy())  # its top pairs are this one's lowest
    np.testing.assert_allclose(sk.eigenpairs(matrix, 2, start_from=far).values, spectrum[:2], rtol=1e-3)  # tol


def test_a_start_from_what_does_not_fit_is_refused() -> None:
    matrix = operator_with(np.linspace(1, 0, 20))
    with pytest.raises(ValueError, match="start_from must be a matrix of the same size: 20 rows are asked for, it has 19"):
        sk.eigenpairs(matrix, start_from=operator_with(np.linspace(1, 0, 19)))
    with pytest.raises(ValueError, match="either initial= or start_from="):
        sk.eigenpairs(matrix, start_from=matrix, initial=torch.ones(20).double())
    with pytest.raises(TypeError):
        sk.eigenpairs(matrix, start_from="a part")
