"""The basis and the Krylov space against dense algebra: A Q = Q H, residuals, restarts, breakdowns, noise, memory."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from problems_linalg import operator_with, rotated
from torch import Tensor

import sharpkit as sk
from sharpkit._errors import NonFiniteError, NotSymmetricError
from sharpkit.linalg.krylov import BasisRows, KrylovSpace, affordable_rows, lanczos_run, working_dtype
from sharpkit.linalg.results import Budget
from sharpkit.operators.base import CallableOperator

N = 60
SPECTRUM = np.concatenate([[9.0, 7.0, -5.0], np.linspace(-1, 1, N - 3)])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def orthonormal(count: int, n: int = N, seed: int = 0) -> Tensor:
    """(count, n)."""
    return torch.linalg.qr(torch.randn(n, count, dtype=torch.float64, generator=generator(seed)))[0].T.contiguous()


def basis(space: KrylovSpace | BasisRows) -> Tensor:
    """(n, size)."""
    rows = space if isinstance(space, BasisRows) else space.rows
    return torch.stack([rows.row(j) for j in range(rows.size)], dim=1)


def grown(products: int, *, starts: int = 1, dtype: torch.dtype = torch.float64, spectrum: np.ndarray = SPECTRUM) -> KrylovSpace:
    space = KrylovSpace(operator_with(spectrum, dtype=dtype))
    for seed in range(starts):
        assert space.add_random(generator(seed))
    for _ in range(products):
        space.expand(space.pending[0])
    return space


def check(space: KrylovSpace, tol: float = 1e-12) -> None:
    """Q is orthonormal, A Q_E = Q H, and H is what the space says of it."""
    Q, A = basis(space).double(), space.operator.matrix.double()  # type: ignore[attr-defined]
    torch.testing.assert_close(Q.T @ Q, torch.eye(space.size, dtype=torch.float64), atol=tol, rtol=0)
    H = torch.from_numpy(space.outward())
    torch.testing.assert_close(A @ Q[:, space.expanded], Q @ H, atol=10 * tol, rtol=0)
    torch.testing.assert_close(
        torch.from_numpy(space.projected()), Q[:, space.expanded].T @ A @ Q[:, space.expanded], atol=10 * tol, rtol=0
    )
    assert sorted(space.expanded + space.pending) == list(range(space.size))


# -- vectors in memory --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("count", [1, 15, 16, 17, 33, 50])
def test_rows_hold_what_was_appended_whatever_the_chunks(count: int, offload: bool) -> None:
    vectors = orthonormal(count)
    rows = BasisRows(operator_with(SPECTRUM), offload=offload)
    for vector in vectors:
        rows.append(vector)
    assert rows.size == count and rows.storage_device == torch.device("cpu")
    assert all(torch.equal(rows.row(j), vectors[j]) for j in range(count))
    assert torch.equal(torch.cat(list(rows.parts())), vectors)
    assert [len(chunk) for chunk in rows._chunks] == [16, 16, 32][: len(rows._chunks)], "chunks double the size"
    few, several = torch.randn(N, dtype=torch.float64), torch.randn(N, 3, dtype=torch.float64)
    for x in (few, several):
        torch.testing.assert_close(rows.coefficients(x), vectors @ x)
        torch.testing.assert_close(rows.combine(vectors @ x), vectors.T @ (vectors @ x))
        rest, removed = rows.orthogonalise(x)
        torch.testing.assert_close(rest, x - vectors.T @ (vectors @ x))
        torch.testing.assert_close(removed, vectors @ x)
    with pytest.raises(IndexError):
        rows.row(64)


def test_an_empty_basis_removes_nothing_and_combines_nothing() -> None:
    rows, x = BasisRows(operator_with(SPECTRUM)), torch.randn(N, 2, dtype=torch.float64)
    rest, removed = rows.orthogonalise(x)
    assert torch.equal(rest, x) and removed.shape == (0, 2) and rows.coefficients(x).shape == (0, 2) and list(rows.parts()) == []
    with pytest.raises(ValueError, match="empty"):
        rows.combine(torch.zeros(0))


def test_two_passes_leave_nothing_of_the_basis_in_a_vector_that_lies_almost_in_it() -> None:
    rows = BasisRows(operator_with(SPECTRUM))
    *inside, outside = orthonormal(21)
    for vector in inside:
        rows.append(vector)
    x = basis(rows) @ torch.ones(20, dtype=torch.float64) + 1e-9 * outside
    rest, _ = rows.orthogonalise(x)
    assert float(rows.coefficients(rest).norm()) < 1e-12 * float(rest.norm())  # one pass leaves the rounding of x, 1e-7 of the rest
    torch.testing.assert_close(rest / 1e-9, outside, atol=1e-5, rtol=0)


def test_two_passes_are_made_and_no_third() -> None:
    class Counted(CallableOperator):
        dots = 0

        def dot(self, left: Tensor, right: Tensor) -> Tensor:
            self.dots += 1
            return super().dot(left, right)

    operator = Counted(lambda v: v, N, dtype=torch.float64, device=torch.device("cpu"))
    rows = BasisRows(operator)
    for vector in orthonormal(3):
        rows.append(vector)
    rows.orthogonalise(torch.ones(N, dtype=torch.float64))
    assert operator.dots == 2


@pytest.mark.parametrize(("options", "where"), [({}, "meta"), ({"offload": False}, "meta"), ({"offload": True}, "cpu")], ids=str)
def test_vectors_stay_on_the_operators_device_unless_offloaded(options: dict[str, bool], where: str) -> None:
    operator = CallableOperator(lambda v: v, N, dtype=torch.float64, device=torch.device("meta"))
    assert BasisRows(operator, **options).storage_device.type == where
    assert KrylovSpace(operator, **options).rows.storage_device.type == where


@pytest.mark.parametrize("kept", [1, 5, 16, 20])
@pytest.mark.parametrize("count", [5, 20, 40])
def test_replacing_the_basis_mixes_it(count: int, kept: int) -> None:
    rows, vectors = BasisRows(operator_with(SPECTRUM)), orthonormal(count)
    for vector in vectors:
        rows.append(vector)
    mixing = orthonormal(min(kept, count), n=count, seed=1).T.numpy()
    rows.replace(mixing)
    assert rows.size == min(kept, count)
    torch.testing.assert_close(basis(rows), vectors.T @ torch.from_numpy(mixing))


def test_a_wide_basis_is_replaced_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    import sharpkit.linalg.krylov as module

    monkeypatch.setattr(module, "_MIXING_BLOCK", 100)  # 5 columns at a time for 20 rows
    rows, vectors = BasisRows(operator_with(np.arange(33.0))), orthonormal(20, n=33)
    for vector in vectors:
        rows.append(vector)
    mixing = orthonormal(18, n=20, seed=1).T.numpy()
    rows.replace(mixing)
    torch.testing.assert_close(basis(rows), vectors.T @ torch.from_numpy(mixing))


@pytest.mark.parametrize(
    ("dtype", "working"), [(torch.float64,) * 2, (torch.float32,) * 2, (torch.bfloat16, torch.float32), (torch.float16, torch.float32)]
)
def test_recurrences_run_in_float32_at_least(dtype: torch.dtype, working: torch.dtype) -> None:
    operator = CallableOperator(lambda v: v, 5, dtype=dtype, device=torch.device("cpu"))
    assert working_dtype(operator) == working == BasisRows(operator).dtype
    space = KrylovSpace(operator)
    space.add_random(generator())
    assert space.rows.row(0).dtype == working and space.vectors(np.zeros((0, 1))).dtype == dtype


def test_half_the_free_memory_is_for_the_basis() -> None:
    class Small(CallableOperator):
        free = 8e6

        def free_memory(self, *, host: bool = False) -> float:
            return 2 * self.free if host else self.free

    def fitting(dtype: torch.dtype, **options: Any) -> int:
        return affordable_rows(Small(lambda v: v, 1000, dtype=dtype, device=torch.device("cpu")), **options)

    assert (fitting(torch.float64), fitting(torch.float32), fitting(torch.float64, host=True)) == (500, 1000, 1000)
    Small.free = float("inf")
    assert fitting(torch.float64) == 250_000, "4 GB where the system does not tell"


# -- the space ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("starts", [1, 3])
@pytest.mark.parametrize("products", [0, 1, 2, 10, 20, 40])
def test_the_products_in_the_basis_are_h(products: int, starts: int) -> None:
    space = grown(products, starts=starts)
    assert space.size == products + starts and space.operator.num_matvecs == products
    check(space)


def test_ritz_pairs_have_the_residuals_they_say() -> None:
    space = grown(12, starts=2)
    A, ritz = space.operator.matrix, space.ritz()  # type: ignore[attr-defined]
    x = space.vectors(ritz.coordinates)
    theta = torch.from_numpy(ritz.values)
    np.testing.assert_allclose(ritz.outward, (A @ x - x * theta).norm(dim=0).numpy(), atol=1e-12)
    np.testing.assert_allclose(ritz.residuals, np.sqrt(ritz.outward**2 + space.floor() ** 2))
    assert np.all(np.diff(ritz.values) > 0) and ritz.scale == pytest.approx(np.abs(ritz.values).max())
    some = ritz.pick(np.array([-1, 0]))
    assert some.values.tolist() == [ritz.values[-1], ritz.values[0]] and some.outward.tolist() == [ritz.outward[-1], ritz.outward[0]]
    np.testing.assert_array_equal(some.coordinates, ritz.coordinates[:, [-1, 0]])
    part = space.expanded[3:7]
    Q = basis(space)[:, part]
    np.testing.assert_allclose(space.ritz(part).values, np.linalg.eigvalsh((Q.T @ A @ Q).numpy()), atol=1e-12)
    np.testing.assert_allclose(space.projected(part), (Q.T @ A @ Q).numpy(), atol=1e-12)


def test_couplings_lead_from_the_multiplied_vectors_to_the_pending_ones() -> None:
    space = grown(5, starts=3)
    Q, A = basis(space), space.operator.matrix  # type: ignore[attr-defined]
    assert len(space.pending) == 3
    np.testing.assert_allclose(space.couplings(), (Q[:, space.pending].T @ A @ Q[:, space.expanded]).numpy(), atol=1e-12)


def test_a_restart_keeps_ritz_pairs_and_pending_vectors_and_the_space_goes_on() -> None:
    space = grown(20, starts=2)
    ritz = space.ritz()
    order = np.argsort(-ritz.values)[:6]
    kept, pending = space.vectors(ritz.coordinates[:, order]), basis(space)[:, space.pending]
    space.compress(ritz.values[order], ritz.coordinates[:, order])
    assert space.size == 8 and space.expanded == list(range(6)) and space.pending == [6, 7]
    torch.testing.assert_close(basis(space), torch.cat([kept, pending], dim=1))
    np.testing.assert_allclose(space.projected(), np.diag(ritz.values[order]), atol=1e-12)
    np.testing.assert_allclose(space.ritz().outward[::-1], ritz.outward[order], atol=1e-12)
    for _ in range(5):
        space.expand(space.pending[0])
    check(space)


def test_a_start_is_normalised_and_one_that_adds_nothing_is_refused() -> None:
    space, e = KrylovSpace(operator_with(SPECTRUM)), torch.eye(N, dtype=torch.float64)
    assert not space.add_start(0 * e[0])
    assert space.add_start(1e-200 * e[0] * 1e100) and space.add_start(7 * e[0] + 2 * e[1])
    torch.testing.assert_close(basis(space), e[:, :2])
    assert not space.add_start(3 * e[0] - e[1]), "it lies in the span"
    assert not space.add_start(e[0] + 1e-16 * e[2]), "what is left is rounding"
    assert space.add_start(e[0] + 0.1 * e[2])
    torch.testing.assert_close(basis(space), e[:, :3])
    assert space.pending == [0, 1, 2] and space.expanded == []
    with pytest.raises(NonFiniteError, match="start vector"):
        space.add_start(e[3] * float("nan"))


def test_a_remainder_of_a_few_roundings_is_nothing_and_of_many_is_something() -> None:
    eps = float(np.finfo(np.float64).eps)
    for size, added in ((10 * eps, False), (40 * eps, True)):
        space, e = KrylovSpace(operator_with(SPECTRUM)), torch.eye(N, dtype=torch.float64)
        space.add_start(e[0])
        assert space.add_start(e[0] + size * e[2]) is added


def test_a_complete_basis_takes_no_more() -> None:
    space = grown(5, starts=1, spectrum=np.arange(5.0))
    assert space.is_complete and not space.pending and space.size == 5
    assert not space.add_random(generator()) and not space.add_start(torch.ones(5, dtype=torch.float64))
    np.testing.assert_allclose(space.ritz().values, np.arange(5.0), atol=1e-12)
    assert not grown(3, spectrum=np.arange(5.0)).is_complete
    two = KrylovSpace(operator_with(np.arange(2.0)))
    assert two.add_random(generator(0)) and two.add_random(generator(1)) and two.is_complete
    assert not two.expand(0), "it spans everything: nothing new can come out"


def test_an_invariant_subspace_ends_in_a_breakdown() -> None:
    matrix = torch.diag(torch.tensor([3.0, 3.0, 1.0, 0.0], dtype=torch.float64))
    space = KrylovSpace(sk.as_operator(matrix))
    space.add_start(torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64))
    assert not space.expand(0) and space.pending == [] and space.expanded == [0]
    assert space.ritz().values.tolist() == pytest.approx([3.0]) and space.ritz().outward.tolist() == [0.0]
    space.add_start(torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64))
    assert space.expand(1) and space.pending == [2]


def test_what_a_breakdown_drops_is_part_of_the_floor() -> None:
    """Off-diagonal of 10 roundings: dropped, and said; of 40: kept as a vector."""
    eps = float(np.finfo(np.float64).eps)
    for size, kept in ((10 * eps, False), (40 * eps, True)):
        matrix = torch.tensor([[1.0, size, 0.0], [size, 0.5, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
        space = KrylovSpace(sk.as_operator(matrix))
        space.add_start(torch.eye(3, dtype=torch.float64)[0])
        assert space.expand(0) is kept
        assert space.floor() == pytest.approx(2 * eps if kept else 10 * eps, rel=1e-6, abs=0)


def test_the_floor_grows_with_the_size_of_the_matrix_and_the_root_of_the_products() -> None:
    eps = float(np.finfo(np.float64).eps)
    for products in (1, 4, 9):
        space = grown(products)
        Q, A = basis(space), space.operator.matrix  # type: ignore[attr-defined]
        scale = float((A @ Q[:, space.expanded]).norm(dim=0).max())
        assert space.scale == pytest.approx(scale)
        rounding = 2 * eps * scale * products**0.5
        assert space.floor() == pytest.approx(max(rounding, space.asymmetry), rel=1e-6, abs=0) and space.asymmetry < rounding
    assert grown(0).floor() == 0.0


# -- products that contradict each other --------------------------------------------------------------------------------------
def skew(size: float, dtype: torch.dtype) -> KrylovSpace:
    """A symmetric matrix of norm about 9, plus an antisymmetric part with u.(A v) - v.(A u) = 2 size on the first two vectors."""
    matrix = torch.diag(torch.tensor([9.0, 8.0, 7.0, 1.0], dtype=torch.float64))
    matrix[0, 1], matrix[1, 0] = size, -size
    operator = CallableOperator(lambda v: (matrix @ v.double()).to(v.dtype), 4, dtype=dtype, device=torch.device("cpu"))
    space, e = KrylovSpace(operator), torch.eye(4, dtype=dtype)
    space.add_start(e[0])
    space.add_start(e[1])
    space.expand(0)
    return space


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float32, 2e-2)])
def test_noise_of_the_products_is_measured_and_beyond_what_rounding_leaves_refused(dtype: torch.dtype, tolerance: float) -> None:
    space = skew(0.4 * tolerance * 9, dtype)
    assert space.asymmetry == 0.0
    space.expand(1)
    assert space.asymmetry == pytest.approx(0.8 * tolerance * 9, rel=1e-3) and space.floor() == space.asymmetry
    with pytest.raises(NotSymmetricError, match="contradict"):
        skew(0.6 * tolerance * 9, dtype).expand(1)


def test_the_contradiction_is_told_in_numbers() -> None:
    message = "u.(A v) = 2 but v.(A u) = -2 where ||A v|| reaches 9.21954"  # sqrt(81 + 4)
    with pytest.raises(NotSymmetricError, match=re.escape(message)):
        skew(2.0, torch.float64).expand(1)


def test_of_several_contradictions_the_worst_is_told() -> None:
    matrix = torch.tensor([[1.0, 0.0, 0.1], [0.0, 1.0, 0.5], [0.0, 0.0, 1.0]], dtype=torch.float64)
    space, e = (
        KrylovSpace(CallableOperator(lambda v: matrix @ v, 3, dtype=torch.float64, device=torch.device("cpu"))),
        torch.eye(3).double(),
    )
    for j in range(3):
        space.add_start(e[j])
    space.expand(0)
    space.expand(1)
    with pytest.raises(NotSymmetricError, match=re.escape("u.(A v) = 0.5 but v.(A u) = 0")):
        space.expand(2)


def test_a_product_that_is_not_finite_is_refused() -> None:
    space = KrylovSpace(CallableOperator(lambda v: v / 0, 3, dtype=torch.float64, device=torch.device("cpu")))
    space.add_random(generator())
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        space.expand(0)


# -- sketches forget what is pending ------------------------------------------------------------------------------------------
def test_forgotten_pending_vectors_leave_a_basis_of_what_was_multiplied() -> None:
    space = KrylovSpace(operator_with(SPECTRUM))
    for seed in range(20):
        known = space.size
        space.add_random(generator(seed))
        space.expand(known)
        space.forget_pending()
        assert space.size == seed + 1 and space.pending == []
    Q, A = basis(space), space.operator.matrix  # type: ignore[attr-defined]
    torch.testing.assert_close(torch.from_numpy(space.projected()), Q.T @ A @ Q)
    other = grown(3, starts=2)
    assert other.pending == [3, 4]
    other.pending = [1, 4]  # one that is not the last stays
    other.forget_pending()
    assert other.pending == [1] and other.size == 4


# -- the run ------------------------------------------------------------------------------------------------------------------
def run(space: KrylovSpace, **options: Any) -> tuple[bool, list[int]]:
    seen: list[int] = []
    limits = {"max_matvecs": options.pop("max_matvecs", None)}
    budget = Budget(space.operator, callback=lambda p: seen.append(p.done), **limits)
    wanted = options.pop("wanted", 100)
    return lanczos_run(space, budget, lambda: len(space.expanded) >= wanted, lambda: (wanted, "run"), **options), seen


def test_a_run_multiplies_until_it_is_enough_or_the_budget_or_the_space_ends() -> None:
    assert run(grown(0), wanted=7) == (True, [1, 2, 3, 4, 5, 6, 7])
    assert run(grown(0), wanted=7, max_matvecs=3) == (False, [1, 2, 3])
    assert run(grown(0, spectrum=np.arange(4.0)), wanted=7) == (True, [1, 2, 3, 4])
    space = grown(0)
    space.operator.num_matvecs = 0
    assert run(space, wanted=7, max_matvecs=1, least=3) == (False, [1, 2, 3]), "the least is made whatever the budget says"


def test_a_run_can_choose_and_refill() -> None:
    space = grown(0, starts=3)
    run(space, wanted=2, choose=lambda: space.pending[-1])
    assert space.expanded == [2, 3]
    eye = KrylovSpace(sk.as_operator(torch.eye(6, dtype=torch.float64)))
    source = generator()
    assert run(eye, wanted=4, refill=lambda: eye.add_random(source)) == (True, [1, 2, 3, 4]), "each start breaks down at once"
    assert run(eye, refill=lambda: eye.add_random(source))[1] == [1, 2] and eye.is_complete


def test_offloading_stores_on_the_host() -> None:
    space = KrylovSpace(operator_with(SPECTRUM), offload=True)
    space.add_random(generator())
    for _ in range(5):
        space.expand(space.pending[0])
    check(space)


def test_the_random_start_follows_the_distribution() -> None:
    space = KrylovSpace(operator_with(SPECTRUM))
    space.add_random(generator(), "rademacher")
    torch.testing.assert_close(space.rows.row(0).abs(), torch.full((N,), N**-0.5, dtype=torch.float64))
    normal = KrylovSpace(operator_with(SPECTRUM))
    normal.add_random(generator())
    assert float(normal.rows.row(0).abs().std()) > 0.05


def test_dense_reference_is_the_matrix_meant() -> None:
    np.testing.assert_allclose(np.linalg.eigvalsh(rotated(SPECTRUM).numpy()), np.sort(SPECTRUM), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "spectrum",
    {
        "flat": torch.linspace(0, 1, 900, dtype=torch.float64),
        "outliers": torch.cat([torch.logspace(1, 4, 20, dtype=torch.float64), torch.linspace(-0.1, 0.1, 880, dtype=torch.float64)]),
        "power law": torch.arange(1, 901, dtype=torch.float64) ** -2.0,
        "cluster": torch.cat([torch.full((10,), 100.0, dtype=torch.float64), torch.linspace(0.99, 1.01, 890, dtype=torch.float64)]),
    }.items(),
    ids=lambda pair: pair[0],
)
def test_one_pass_of_gram_schmidt_keeps_a_long_basis_orthonormal(
    spectrum: tuple[str, torch.Tensor], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a product is known to lead back to is taken off first; a second pass comes only where the first took off much."""
    passes: list[int] = []
    coefficients = BasisRows.coefficients
    monkeypatch.setattr(BasisRows, "coefficients", lambda self, vectors: (passes.append(1), coefficients(self, vectors))[1])
    diagonal = spectrum[1].to(dtype)
    space = KrylovSpace(sk.as_operator(lambda v: diagonal * v, size=900, dtype=dtype, check=False))
    space.add_random(torch.Generator().manual_seed(1))
    passes.clear()
    while space.pending and len(space.expanded) < 500:
        space.expand(space.pending[0])
    basis = torch.cat(list(space.rows.parts())).double()
    assert float((basis @ basis.T - torch.eye(len(basis))).abs().max()) < (2e-6 if dtype == torch.float32 else 2e-14)
    assert len(passes) <= 1.1 * len(space.expanded)
    assert float(space.ritz().values[-1]) == pytest.approx(float(diagonal.max()), rel=1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize(("steps", "noise"), [(1, 0.5), (4, 0.25)])
def test_a_value_is_uncertain_by_the_part_of_the_noise_along_one_vector(steps: int, noise: float) -> None:
    space = KrylovSpace(operator_with(SPECTRUM))
    space.add_random(generator())
    for _ in range(steps):
        space.expand(space.pending[0])
    space.asymmetry = 0.5
    assert space.ritz().noise == pytest.approx(noise)


def test_what_is_left_to_go_is_at_least_what_the_next_product_gains() -> None:
    space = KrylovSpace(operator_with(SPECTRUM))
    values = np.array([-2.0, 0.0, 2.0])
    space._made, space._course[5] = 8, values  # none has moved in the last three products
    errors = space._drift(values, np.full(3, 2.0))
    assert errors[[0, 2]] == pytest.approx(2.0**2 / 4.0) and np.isinf(errors[1])
