"""Diagonal and Frobenius norm: values and standard errors are those of the samples, budgets and tolerances mean what they say."""

from __future__ import annotations

import json
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from problems_linalg import network_like, operator_with, rotated
from torch import Tensor

import sharpkit as sk
from sharpkit._errors import ConvergenceWarning
from sharpkit._results import student_factor
from sharpkit.linalg.leave_one_out import LeaveOneOut
from sharpkit.operators.base import CallableOperator

MATRIX = rotated(network_like(200), seed=2)


def samples(count: int, seed: int = 0) -> Tensor:
    """z * (A z) for the Rademacher probes of this seed, (count, n)."""
    generator = torch.Generator().manual_seed(seed)
    operator = sk.as_operator(MATRIX)
    probes = [operator.random_vectors(1, generator=generator, distribution="rademacher")[:, 0] for _ in range(count)]
    return torch.stack([z * (MATRIX @ z) for z in probes])


@pytest.mark.parametrize("count", [2, 3, 7, 15])
def test_the_estimate_is_the_mean_of_the_samples_and_its_error_their_standard_error(count: int) -> None:
    made, drawn = sk.diagonal(MATRIX, num_probes=count, seed=5), samples(count, seed=5)
    torch.testing.assert_close(made.value, drawn.mean(dim=0))
    torch.testing.assert_close(made.stderr, drawn.std(dim=0) / count**0.5 * student_factor(count))
    assert made.converged and made.num_matvecs == count and made.seconds > 0


def probes_of(seed: int, count: int, size: int = 200) -> Tensor:
    """(size, count) signs, those that a diagonal of this seed draws first."""
    generator, operator = torch.Generator().manual_seed(seed), sk.as_operator(torch.eye(size).double())
    return torch.cat([operator.random_vectors(1, generator=generator, distribution="rademacher") for _ in range(count)], dim=1)


def relative_error(value: Tensor, matrix: Tensor) -> float:
    return float((value - matrix.diagonal()).norm() / matrix.diagonal().norm())


def xdiag(matrix: Tensor, z: Tensor) -> Tensor:
    """Epperly, Tropp and Webber, written out: for each i a basis of the other images, and the rest left to probe i."""
    estimates = []
    for i in range(z.shape[1]):
        basis = torch.linalg.qr(matrix @ z[:, [j for j in range(z.shape[1]) if j != i]])[0]
        rest = matrix @ z[:, i] - basis @ (basis.T @ (matrix @ z[:, i]))
        estimates.append((basis * (matrix @ basis)).sum(dim=1) + z[:, i] * rest)
    return torch.stack(estimates).mean(dim=0)


@pytest.mark.parametrize("kind", ["near the identity", "diagonal"])
def test_a_matrix_that_no_range_tells_of_is_left_to_plain_probes(kind: str) -> None:
    spectrum = np.linspace(1, 1.1, 200)
    matrix, z = rotated(spectrum) if kind == "near the identity" else torch.diag(torch.from_numpy(spectrum)), probes_of(0, 60)
    made = sk.diagonal(matrix, num_probes=60)
    torch.testing.assert_close(made.value, (z * (matrix @ z)).mean(dim=1))
    assert made.num_matvecs == 60


def test_a_flat_spectrum_of_both_signs_gets_no_worse_than_by_plain_probes() -> None:
    matrix = rotated(np.linspace(-1, 1, 200))
    made = [relative_error(sk.diagonal(matrix, num_probes=60, seed=seed).value, matrix) for seed in range(8)]
    plain = [relative_error((z * (matrix @ z)).mean(dim=1), matrix) for z in (probes_of(seed, 60) for seed in range(8))]
    assert np.mean(made) <= np.mean(plain)


@pytest.mark.parametrize("shift", [1e-6, 0.3, 5.0])
def test_leave_one_out_is_the_shifted_nystrom_approximation_of_the_others_and_what_it_leaves(shift: float) -> None:
    spectrum = np.concatenate([[6.0, -4, 3, 2], 0.1 * np.random.default_rng(2).standard_normal(196)])
    matrix, m = rotated(spectrum), 9
    z = probes_of(4, m)
    y = matrix @ z
    expected = []
    for i in range(m):
        others = [j for j in range(m) if j != i]
        inner = (z[:, others].T @ y[:, others]).numpy() + 1j * shift * np.eye(m - 1)
        approximation = y[:, others] @ torch.from_numpy(np.linalg.inv(inner).real) @ y[:, others].T
        expected.append(approximation.diagonal() + z[:, i] * (y[:, i] - approximation @ z[:, i]))
    made = LeaveOneOut((z.T @ y).numpy(), (y.T @ y).numpy()).diagonals(z, y, shift)
    # with a shift of 1e-6 the inverses divide by what rounding makes of nearly singular minors: some ten digits are left
    torch.testing.assert_close(made, torch.stack(expected, dim=1), rtol=1e-6, atol=1e-8)


def test_the_shift_is_the_one_of_least_spread_and_infinite_where_none_is_smaller() -> None:
    matrix = rotated(np.concatenate([[6.0, -4, 3, 2], 0.1 * np.random.default_rng(2).standard_normal(196)]))
    z = probes_of(4, 30)
    others = LeaveOneOut((z.T @ matrix @ z).numpy(), (z.T @ matrix @ matrix @ z).numpy())

    def spread(shift: float) -> float:
        return float(others.diagonals(z, matrix @ z, shift).var(dim=1).sum())

    best = others.best_shift(spread, 1e-16)
    assert spread(best) <= 1.01 * min(spread(others.unit * 10**power) for power in np.linspace(-4, 1, 51))
    assert math.isinf(others.best_shift(lambda shift: 1.0 if math.isinf(shift) else 1.1, 1e-16))


@pytest.mark.parametrize("spectrum", ["outliers", "power law", "network"])
def test_where_directions_dominate_the_error_is_three_quarters_of_xdiags_at_most(spectrum: str) -> None:
    values = {
        "outliers": np.concatenate([[100.0, 60, 40, 20, 10], 0.05 * np.random.default_rng(2).random(195)]),
        "power law": 1 / np.arange(1.0, 201) ** 1.2,
        "network": network_like(200),
    }[spectrum]
    matrix = rotated(values)
    made = [relative_error(sk.diagonal(matrix, num_probes=60, seed=seed).value, matrix) for seed in range(6)]
    assert np.mean(made) <= 0.75 * np.mean([relative_error(xdiag(matrix, probes_of(seed, 30)), matrix) for seed in range(6)])


def test_a_budget_below_the_probes_is_planned_with() -> None:
    matrix = rotated(np.concatenate([[100.0, 60, 40, 20, 10], 0.05 * np.random.default_rng(2).random(195)]))
    with pytest.warns(ConvergenceWarning, match="after 40 of 100"):
        made = sk.diagonal(matrix, seed=4, max_matvecs=40)
    assert made.num_matvecs == 40 and torch.equal(made.value, sk.diagonal(matrix, seed=4, num_probes=40).value)


@pytest.mark.parametrize("rows", [107, 108])
def test_vectors_are_kept_only_where_memory_allows(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two for each of 50 probes, and 8 to work with; else probes are averaged one by one."""
    monkeypatch.setattr("sharpkit.linalg.diagonal.affordable_rows", lambda operator: rows)
    plain = samples(50).mean(dim=0)
    assert torch.allclose(sk.diagonal(MATRIX, num_probes=50).value, plain) is (rows < 108)


def test_two_stated_errors_of_the_diagonal_hold_93_of_100_entries() -> None:
    spectrum = np.concatenate([[50.0, 20, 10, 5, 3], 0.05 * (np.random.default_rng(3).random(195) - 0.3)])
    matrix = rotated(spectrum)
    made = [sk.diagonal(matrix, num_probes=60, seed=seed) for seed in range(5)]
    assert np.mean([float(((d.value - matrix.diagonal()).abs() <= 2 * d.stderr).double().mean()) for d in made]) >= 0.93


def test_the_diagonal_of_low_rank_is_exact() -> None:
    matrix = rotated(np.concatenate([[5.0, -4, 3], np.zeros(97)]))
    made = sk.diagonal(matrix, num_probes=20)
    torch.testing.assert_close(made.value, matrix.diagonal())
    assert float(made.stderr.max()) == 0 and made.num_matvecs <= 20


def test_a_hundred_probes_and_seed_0_unless_asked_otherwise() -> None:
    made = sk.diagonal(MATRIX)
    assert made.num_matvecs == 100 and torch.equal(made.value, sk.diagonal(MATRIX, num_probes=100, seed=0).value)


@pytest.mark.parametrize(("count", "products"), [(19, 19), (20, 20), (50, 20)])
def test_it_is_exact_as_soon_as_the_probes_are_as_many_as_the_rows(count: int, products: int) -> None:
    matrix, seen = rotated(np.arange(20.0)), []
    made = sk.diagonal(matrix, num_probes=count, callback=seen.append)
    exact = count >= 20
    assert made.num_matvecs == products and bool((made.stderr == 0).all()) is exact
    assert (float((made.value - matrix.diagonal()).abs().max()) < 1e-12) is exact
    assert [p.done for p in seen] == sorted(p.done for p in seen) and (seen[-1].done, seen[0].expected) == (products, products)
    assert {p.text for p in seen} == {"diagonal, exact" if exact else "diagonal"}


def test_a_budget_below_n_products_is_spent_on_probes() -> None:
    with pytest.warns(ConvergenceWarning, match="after 19 of 50 probes"):
        made = sk.diagonal(rotated(np.arange(20.0)), num_probes=50, max_matvecs=19)
    assert made.num_matvecs == 19 and not made.converged and float(made.stderr.min()) > 0
    with pytest.warns(ConvergenceWarning, match="after 1 of 50 probes"):
        one = sk.diagonal(MATRIX, num_probes=50, max_matvecs=1)
    assert bool(torch.isinf(one.stderr).all()) and torch.equal(one.value, samples(1)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sk.diagonal(MATRIX, num_probes=5, max_matvecs=5).converged


def test_a_time_budget_that_ends_before_the_first_product_is_an_error() -> None:
    with pytest.raises(ValueError, match="before the first product"):
        sk.diagonal(MATRIX, num_probes=5, max_seconds=1e-12)


class Ticking(CallableOperator):
    """Each product takes a second of the clock that all processes agree on."""

    def agree(self, value: float) -> float:
        return float(self.num_matvecs)


def ticking(matrix: Tensor, dtype: torch.dtype = torch.float64) -> Ticking:
    return Ticking(lambda v: (matrix @ v.double()).to(v.dtype), len(matrix), dtype=dtype, device=torch.device("cpu"))


def test_time_that_ends_during_the_exact_diagonal_leaves_what_is_known() -> None:
    with pytest.raises(ValueError, match="before the first product"):
        sk.diagonal(ticking(rotated(np.arange(20.0))), max_seconds=3.5)


def test_two_probes_at_least() -> None:
    for count in (1, 0):
        with pytest.raises(ValueError, match="at least 2"):
            sk.diagonal(MATRIX, num_probes=count)


def test_half_precision_comes_back_in_the_operators_type() -> None:
    matrix = rotated(np.arange(1.0, 21.0))
    made = sk.diagonal(ticking(matrix, torch.bfloat16))
    assert made.value.dtype == torch.bfloat16
    torch.testing.assert_close(made.value.double(), matrix.diagonal(), rtol=0.05, atol=0.3)


def test_the_document_holds_everything() -> None:
    made = sk.diagonal(torch.tensor([[2.0, 1.0], [1.0, 3.0]]).double())
    document = json.loads(json.dumps(made.to_dict()))
    assert document["kind"] == "diagonal" and document["version"] == 1 and document["value"] == pytest.approx([2.0, 3.0])
    assert document["stderr"] == [0.0, 0.0] and document["num_matvecs"] == 2 and document["converged"] is True and document["seconds"] >= 0
    assert "tensor" not in repr(made)


# -- the Frobenius norm -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rtol", [0.1, 0.03, 0.01])
def test_the_norms_error_is_relative_to_the_norm(rtol: float) -> None:
    spectrum = np.random.default_rng(0).uniform(-1, 1, 400)
    costs = []
    for seed in range(10):
        made = sk.frobenius_norm(operator_with(spectrum), rtol=rtol, seed=seed)
        assert made.converged and made.stderr <= rtol * made.value and abs(made.value - np.linalg.norm(spectrum)) <= 4 * made.stderr
        costs.append(made.num_matvecs)
    # one probe's ||A z||^2 is off by sqrt(2 sum x^4) of sum x^2, the norm by half of that: 4.7 % over 400 rows
    alone = math.sqrt(2 * (spectrum**4).sum()) / (spectrum**2).sum() / 2
    assert np.mean(costs) <= max(14, 3 * (alone / rtol) ** 2 + 6)


def test_the_norm_of_two_rows_is_exact_and_signs_do_not_matter() -> None:
    made = sk.frobenius_norm(torch.diag(torch.tensor([3.0, -4.0]).double()))
    assert made.value == pytest.approx(5.0) and made.stderr == 0 and made.num_matvecs == 2 and made.method == "exact"
    assert sk.frobenius_norm(torch.zeros(3, 3)).value == 0 and sk.frobenius_norm(torch.zeros(3, 3)).converged


def test_a_budget_flags_the_norm_and_the_message_names_the_numbers() -> None:
    spectrum = 1 / np.arange(1.0, 301.0)
    with pytest.warns(ConvergenceWarning, match=r"standard error of .* after 12 products"):
        made = sk.frobenius_norm(operator_with(spectrum), rtol=1e-5, max_matvecs=12)
    assert made.num_matvecs == 12 and not made.converged and made.stderr > 1e-5 * made.value


def test_the_norm_goes_by_a_hundredth_and_seed_0_unless_asked_otherwise() -> None:
    operator = operator_with(network_like(300))
    values = [sk.frobenius_norm(operator, **options).value for options in ({}, {"rtol": 0.01}, {"seed": 0}, {"seed": 1}, {"rtol": 0.05})]
    assert values[0] == values[1] == values[2] and values[0] not in values[3:]


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_the_norm_of_low_rank_is_exact_once_the_range_is_exhausted(rank: int) -> None:
    spectrum = np.concatenate([np.arange(1.0, rank + 1), np.zeros(200)])
    for seed in range(4):
        assert sk.frobenius_norm(operator_with(spectrum), seed=seed).value == pytest.approx(np.linalg.norm(spectrum), rel=1e-2)
        root = torch.randn(60, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert sk.frobenius_norm(torch.outer(root, root), seed=seed).value == pytest.approx(float(root @ root), rel=1e-2)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_norm_and_trace_are_right_at_scales_whose_squares_float32_cannot_hold(scale: float) -> None:
    matrix = rotated(np.linspace(1, 3, 40)).mul(scale).float()
    assert sk.frobenius_norm(matrix).value == pytest.approx(scale * np.linalg.norm(np.linspace(1, 3, 40)), rel=0.03)
    for method in ("auto", "hutchinson", "hutch++", "xtrace"):
        assert sk.trace(matrix, method=method).value == pytest.approx(80 * scale, rel=0.03)  # type: ignore[arg-type]


@pytest.mark.parametrize("rtol", [0.0, -1.0])
def test_a_tolerance_that_is_not_positive_is_refused(rtol: Any) -> None:
    with pytest.raises(ValueError, match="rtol must be a positive number"):
        sk.frobenius_norm(MATRIX, rtol=rtol)


def test_warnings_point_at_the_call() -> None:
    with pytest.warns(ConvergenceWarning) as of_diagonal:
        sk.diagonal(MATRIX, num_probes=5, max_matvecs=2)
    with pytest.warns(ConvergenceWarning) as of_norm:
        sk.frobenius_norm(MATRIX, rtol=1e-9, max_matvecs=20)
    assert [w.filename for w in (*of_diagonal, *of_norm)] == [__file__] * 2


@pytest.mark.parametrize("factor", [1e-4, 1e4])
@pytest.mark.parametrize("kind", ["flat", "outliers"])
def test_whether_a_subspace_pays_does_not_depend_on_the_units(kind: str, factor: float) -> None:
    spectrum = np.linspace(-1, 1, 200) if kind == "flat" else np.concatenate([[100.0, 60, 40, 20, 10], np.linspace(0, 0.05, 195)])
    matrix = rotated(spectrum)
    plain, scaled = sk.diagonal(matrix, num_probes=40), sk.diagonal(factor * matrix, num_probes=40)
    # rounding alone: the factor is no power of 2, and errors are differences of estimates that nearly agree
    torch.testing.assert_close(scaled.value, factor * plain.value, rtol=1e-8, atol=1e-10 * factor)
    torch.testing.assert_close(scaled.stderr, factor * plain.stderr, rtol=1e-6, atol=1e-10 * factor)
