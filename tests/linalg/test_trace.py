"""trace, diagonal and frobenius_norm: right within the standard error they report, at a cost that is counted."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
import torch
from problems_linalg import network_like, operator_with, rotated

import sharpkit as sk
from sharpkit._errors import ConvergenceWarning, NonFiniteError
from sharpkit.linalg.results import Budget, probe_error
from sharpkit.linalg.trace import AdaptiveEstimate, DeflatedProbes, Nystrom, Tolerance
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


@pytest.mark.slow
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


# -- the estimators, sample by sample, against dense algebra ------------------------------------------------------------------
def complement(operator: sk.SymmetricOperator, basis: torch.Tensor) -> torch.Tensor:
    """P A P with P = 1 - Q Q^T, for an orthonormal basis Q, (n, m)."""
    projector = torch.eye(operator.size, dtype=torch.float64) - basis @ basis.T
    return projector @ operator.matrix @ projector  # type: ignore[attr-defined]


def probes_of(seed: int, count: int, n: int) -> torch.Tensor:
    """(n, count) Rademacher probes of a seed, in the order they are drawn."""
    generator = torch.Generator().manual_seed(seed)
    identity = sk.as_operator(torch.eye(n, dtype=torch.float64))
    return torch.cat([identity.random_vectors(1, generator=generator, distribution="rademacher") for _ in range(count)], dim=1)


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("products", [0, 1, 2, 8])
def test_probes_kept_are_samples_of_the_complement_of_whatever_basis_there_is(products: int, squared: bool) -> None:
    """z^T P A P z, or ||A P z||^2, and what the basis holds: tr Q^T A Q, or ||A Q||_F^2."""
    operator = operator_with(NETWORK[:50])
    probes, z = DeflatedProbes(operator, torch.Generator().manual_seed(3), squared=squared), probes_of(3, 5, 50)
    for _ in range(3):
        probes.draw(keep=True)
    probes.space.add_start(torch.arange(50.0).double() - 20)
    for step in range(products):
        if step == 1:
            probes.draw(keep=True)
            probes.draw(keep=True)
        probes.deflate_one()
    z = z[:, : probes.num_kept]
    Q = torch.stack([probes.space.rows.row(j) for j in probes.space.expanded], dim=1) if products else torch.zeros(50, 0).double()
    A = operator.matrix  # type: ignore[attr-defined]
    rest = A @ (z - Q @ (Q.T @ z)) if squared else complement(operator, Q) @ z
    expected = (rest**2).sum(dim=0) if squared else (z * rest).sum(dim=0)
    np.testing.assert_allclose(probes.samples(), expected.numpy(), rtol=1e-9, atol=1e-12)
    known = float((A @ Q).square().sum()) if squared else float(torch.trace(Q.T @ A @ Q))
    assert probes.known == pytest.approx(known, abs=1e-12)
    assert len(probes) == probes.num_kept == (5 if products > 1 else 3) and probes.num_late == 0
    assert operator.num_matvecs == len(probes) + products, "a product a probe and a product a basis vector"
    spread, error = float(expected.std()), probe_error(expected.numpy())
    if not squared:
        spread, error = by_images(expected.numpy(), (rest**2).sum(dim=0).numpy(), 50)
    assert probes.value() == pytest.approx(known + float(expected.mean())) and probes.spread() == pytest.approx(spread)
    assert probes.estimate()[1] == pytest.approx(error)


def by_images(samples: np.ndarray, lengths: np.ndarray, n: int) -> tuple[float, float]:
    """Spread and error by 2 ||A - c||_F^2, of which every squared length of an image less (z^T A z)^2 / n is an estimate."""
    energies, m = lengths - samples**2 / n, len(samples)
    return math.sqrt(2 * energies.mean()), 1.05 * math.sqrt(2 * (energies.mean() + energies.std(ddof=1) / m**0.5) / m)


def test_samples_that_agree_far_better_than_images_allow_count_themselves() -> None:
    """A matrix that is nearly diagonal, whose variance is that of its few entries off the diagonal alone."""
    matrix = torch.diag(torch.arange(1.0, 201.0)).double() + 0.5 * rotated(np.random.default_rng(0).standard_normal(200))
    made = sk.trace(matrix, rtol=2e-3)
    assert made.num_matvecs <= 12 and abs(made.value - float(torch.trace(matrix))) <= 3 * made.stderr


def test_what_rounding_hides_is_not_taken_for_a_small_error() -> None:
    """In float32 the squared lengths of images lose what lies seven digits below, as after an outlier of 1e5."""
    spectrum = np.concatenate([[1e5], np.random.default_rng(0).standard_normal(299)])
    matrix = rotated(spectrum).float()
    for seed in range(10):
        made = sk.trace(matrix, rtol=0, atol=3.0, seed=seed)
        assert abs(made.value - spectrum.sum()) <= 4 * made.stderr + 1e-6 * 1e5


@pytest.mark.parametrize("squared", [False, True])
def test_probes_not_kept_are_drawn_in_the_complement_and_dropped_when_the_basis_grows(squared: bool) -> None:
    operator = operator_with(NETWORK[:50])
    probes = DeflatedProbes(operator, torch.Generator().manual_seed(3), squared=squared)
    probes.space.add_start(torch.arange(50.0).double())
    for _ in range(4):
        probes.deflate_one()
    probes.draw(keep=False)
    probes.draw(keep=True)
    probes.draw(keep=False)
    assert (len(probes), probes.num_kept, probes.num_late) == (3, 1, 2)
    z = probes_of(3, 3, 50)
    Q = torch.stack([probes.space.rows.row(j) for j in probes.space.expanded], dim=1)
    inside = z - Q @ (Q.T @ z)
    image = operator.matrix @ inside  # type: ignore[attr-defined]
    expected = (image**2 if squared else inside * image).sum(dim=0)
    np.testing.assert_allclose(probes.samples(), expected[[1, 0, 2]].numpy(), rtol=1e-9)
    probes.deflate_one()
    assert (len(probes), probes.num_late) == (1, 0)
    assert probes.spread() == math.inf and probes.value() == pytest.approx(probes.known + probes.samples()[0])


def test_without_probes_only_the_basis_is_known() -> None:
    probes = DeflatedProbes(operator_with(np.arange(5.0)), torch.Generator())
    assert probes.known == 0.0 and (probes.value(), probes.spread()) == (0.0, math.inf) and math.isinf(probes.estimate()[1])


def test_a_sketch_adds_a_direction_of_the_range() -> None:
    operator = operator_with(np.concatenate([[5.0, 3.0], np.zeros(20)]))
    probes = DeflatedProbes(operator, torch.Generator().manual_seed(0))
    probes.draw(keep=True)
    assert probes.sketch_one() and probes.sketch_one() and not probes.sketch_one(), "the range has two dimensions"
    assert operator.num_matvecs == 1 + 2 + 2 + 1
    assert probes.known == pytest.approx(8.0) and probes.samples() == pytest.approx([0.0], abs=1e-9)


@pytest.mark.parametrize("tests", [5, 12])
def test_xtrace_is_the_mean_of_the_estimates_that_leave_one_test_vector_out(tests: int) -> None:
    """Epperly, Tropp and Webber, section 2.2, written out: for each i an orthonormal basis of the other images, and the rest scaled."""
    n = 60
    operator = operator_with(np.abs(network_like(n)))
    A = operator.matrix  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(7)
    omegas = torch.cat([operator.random_vectors(1, generator=generator) for _ in range(tests)], dim=1)
    estimates = []
    for i in range(tests):
        others = [j for j in range(tests) if j != i]
        Q = torch.linalg.qr(A @ omegas[:, others])[0]
        rest = omegas[:, i] - Q @ (Q.T @ omegas[:, i])
        estimates.append(float(torch.trace(Q.T @ A @ Q) + (n - tests + 1) / (rest @ rest) * (rest @ A @ rest)))
    made = sk.trace(operator, method="xtrace", num_matvecs=2 * tests, seed=7)
    assert made.value == pytest.approx(np.mean(estimates), rel=1e-9)
    assert made.stderr == pytest.approx(1.25 * probe_error(np.array(estimates)), rel=1e-6)
    assert made.num_matvecs == operator.num_matvecs == 2 * tests and made.method == "XTrace"


def test_xtrace_needs_five_test_vectors_and_two_looks_within_the_tolerance() -> None:
    spectrum = np.concatenate([[100.0, 50.0], 1e-3 * np.ones(100)])
    assert sk.trace(operator_with(spectrum), method="xtrace", rtol=0.5).num_matvecs == 2 * 6
    with pytest.warns(ConvergenceWarning):
        short = sk.trace(operator_with(spectrum), method="xtrace", max_matvecs=9)
    assert short.num_matvecs == 8 and math.isinf(short.stderr) and math.isnan(short.value)


@pytest.mark.parametrize(("rank", "n"), [(0, 30), (3, 30), (30, 30)])
def test_xtrace_is_exact_where_the_range_is_exhausted(rank: int, n: int) -> None:
    spectrum = np.concatenate([np.arange(1.0, rank + 1), np.zeros(n - rank)])
    made = sk.trace(operator_with(spectrum), method="xtrace", rtol=1e-9)
    assert made.stderr == 0 and made.method == "XTrace, exact" and made.value == pytest.approx(spectrum.sum(), abs=1e-9)
    assert made.num_matvecs == (2 * rank + 1 if rank < n else 2 * n)


# -- what is spent, and on what -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("rtol", "atol", "target"), [(0.1, 0.0, 0.5), (0.1, 2.0, 2.0), (0.1, 0.3, 0.5), (0.0, 0.3, 0.3)])
def test_the_looser_of_the_two_tolerances_counts(rtol: float, atol: float, target: float) -> None:
    assert Tolerance(rtol, atol)(5.0) == Tolerance(rtol, atol)(-5.0) == pytest.approx(target)


def test_plain_probes_stop_at_the_tolerance_and_are_the_mean_of_their_samples() -> None:
    operator = operator_with(FLAT)
    made = sk.trace(operator, method="hutchinson", rtol=0.05, seed=2)
    z = probes_of(2, made.num_matvecs, 400)
    images = operator.matrix @ z  # type: ignore[attr-defined]
    drawn, lengths = (z * images).sum(dim=0).numpy(), (images**2).sum(dim=0).numpy()

    def error(count: int) -> float:
        return by_images(drawn[:count], lengths[:count], 400)[1]

    assert made.value == pytest.approx(drawn.mean()) and made.stderr == pytest.approx(error(len(drawn)))
    stops = [count for count in range(6, len(drawn) + 1) if error(count) <= 0.05 * abs(drawn[:count].mean())]
    assert stops[0] == made.num_matvecs, "as soon as the error is small enough, after six"
    assert made.method == "Hutchinson"


@pytest.mark.parametrize(("n", "products"), [(6, 6), (7, None)])
def test_a_matrix_of_six_rows_is_computed_exactly(n: int, products: int | None) -> None:
    seen: list[sk.Progress] = []
    made = sk.trace(operator_with(np.linspace(1, 2, n)), rtol=0.5, callback=seen.append)
    assert (made.method == "exact") is (products is not None)
    if products:
        assert made.num_matvecs == products and {p.text for p in seen} == {"all basis vectors"} and seen[0].expected == n
    else:
        assert made.num_matvecs == 6 and {p.text for p in seen} == {"pilot probes"} and seen[0].expected == 6


@pytest.mark.parametrize("method", METHODS)
def test_a_fixed_number_of_products_that_suffices_for_all_rows_is_exact(method: str) -> None:
    made = sk.trace(operator_with(NETWORK[:30]), method=method, num_matvecs=30)
    assert made.stderr == 0 and made.num_matvecs == 30 and made.value == pytest.approx(NETWORK[:30].sum())
    assert sk.trace(operator_with(NETWORK[:30]), method=method, num_matvecs=29).stderr > 0


def test_where_probes_would_cost_more_than_all_rows_the_trace_is_exact() -> None:
    for method, at_most in (("auto", 100 + 16), ("hutch++", 100 + 16 + 100)):  # 16 probes are kept; a sketch takes another product each
        made = sk.trace(operator_with(FLAT[:100]), method=method, rtol=1e-6)  # type: ignore[arg-type]
        assert made.method == "exact" and made.value == pytest.approx(FLAT[:100].sum()) and made.num_matvecs <= at_most


def test_hutch_plus_plus_spends_a_third_each_on_sketch_products_and_probes() -> None:
    operator = operator_with(NETWORK)
    seen: list[sk.Progress] = []
    made = sk.trace(operator, method="hutch++", num_matvecs=60, callback=seen.append)
    texts = [p.text for p in seen]
    assert texts.count("range sketch") == 20 and texts[20:] == ["probes"] and made.num_matvecs == 60 and made.method == "Hutch++"
    assert [p.done for p in seen] == [*range(2, 42, 2), 60], "all probes that are left at once"


def test_a_dominated_spectrum_is_deflated_and_said_to_be() -> None:
    spectrum = np.concatenate([[100.0, 80.0, 60.0, 40.0], np.full(300, 0.01)])
    made = sk.trace(operator_with(spectrum), rtol=0.01)
    assert made.method == "Hutchinson, deflated" and made.num_matvecs <= 6 + 12 and made.converged
    assert made.value == pytest.approx(spectrum.sum(), abs=4 * made.stderr + 1e-9)


def test_a_flat_spectrum_is_not_deflated_for_long() -> None:
    """The forecast does not fall: after a few products, 3 or 4 % of the forecast, probes go on."""
    seen: list[sk.Progress] = []
    made = sk.trace(operator_with(FLAT), rtol=0.05, callback=seen.append)
    texts = [p.text for p in seen]
    assert texts[0] == "pilot probes" and seen[0].done == 6 and made.converged
    assert texts.count("leading subspace") <= 3 + 0.05 * made.num_matvecs


def test_without_a_budget_of_its_own_a_hopeless_case_is_given_up_after_100_probes() -> None:
    diagonal = torch.from_numpy(np.concatenate([np.linspace(0.1, 1, 15000), -np.linspace(0.1, 1, 15000)]))

    def multiply(v: torch.Tensor) -> torch.Tensor:  # a reflection makes it dense: u has equal entries
        w = v - 2 * v.mean()
        image = diagonal * w
        return image - 2 * image.mean()

    operator = CallableOperator(multiply, 30000, dtype=torch.float64, device=torch.device("cpu"))
    for options, at_least, at_most in (({}, 100, 400), ({"max_matvecs": 450}, 450, 450)):
        with pytest.warns(ConvergenceWarning, match="was asked"):
            made = sk.trace(operator, method="hutchinson", **options)  # type: ignore[arg-type]
        assert at_least <= made.num_matvecs <= at_most and not made.converged


def test_a_hundredth_seed_0_and_auto_unless_asked_otherwise() -> None:
    operator = operator_with(NETWORK)
    plain = sk.trace(operator)
    for options in ({"rtol": 0.01}, {"seed": 0}, {"method": "auto"}, {"atol": 0.0}, {"max_matvecs": 2000}):
        assert sk.trace(operator, **options).value == plain.value
    assert sk.trace(operator, rtol=0.02).value != plain.value


def test_no_budget_of_products_is_exceeded_on_the_way() -> None:
    for method in METHODS:
        for limit in (3, 7, 11, 24):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                made = sk.trace(operator_with(NETWORK), method=method, max_matvecs=limit, rtol=1e-6)  # type: ignore[arg-type]
            assert made.num_matvecs <= limit and not made.converged


def test_an_exact_trace_that_the_budget_ends_is_incomplete() -> None:
    class Ticking(CallableOperator):
        def agree(self, value: float) -> float:
            return float(self.num_matvecs)

    matrix = rotated(np.arange(1.0, 6.0))
    operator = Ticking(lambda v: matrix @ v, 5, dtype=torch.float64, device=torch.device("cpu"))
    with pytest.warns(ConvergenceWarning):
        made = sk.trace(operator, max_seconds=2.5)
    assert made.method == "incomplete" and math.isinf(made.stderr) and made.num_matvecs == 3 and not made.converged


# -- the decisions, on forecasts made by hand -------------------------------------------------------------------------------------------
class Scripted:
    """Stands in for the probes: the forecast f of basis size and probes is given, and products are only counted.

    With an asked error of 1 the forecast is spread^2 + 2, so the spread is sqrt(f - 2).
    """

    def __init__(self, operator: sk.SymmetricOperator, forecast: Callable[[int, int], float], *, squared: bool = False) -> None:
        self.operator, self.forecast, self.squared = operator, forecast, squared
        self.expanded: list[int] = []
        self.num_kept = self.num_late = self.num_vectors = 0
        self.space = SimpleNamespace(
            expanded=self.expanded, pending=[0], is_complete=False, size=1, rows=SimpleNamespace(row=lambda j: torch.zeros(operator.size))
        )
        self.known = 0.0

    def __len__(self) -> int:
        return self.num_kept + self.num_late

    def deflate_one(self) -> None:
        self.operator.num_matvecs += 1
        self.expanded.append(len(self.expanded))
        self.space.size += 1
        self.num_late = 0

    def draw(self, count: int = 1, *, keep: bool) -> None:
        assert count == 1, "the decisions below are those of one probe after another"
        self.operator.num_matvecs += 1
        self.num_kept, self.num_late = self.num_kept + keep, self.num_late + (not keep)

    def value(self) -> float:
        return 0.0

    def spread(self) -> float:
        return math.sqrt(max(self.forecast(len(self.expanded), len(self)) - 2.0, 0.0))

    def estimate(self) -> tuple[float, float]:
        return 0.0, self.spread() / math.sqrt(len(self))


class Course(NamedTuple):
    """What a scripted estimate did."""

    basis: int
    kept: int
    late: int
    products: int
    how: str


class Memory(CallableOperator):
    rows = 0

    def free_memory(self, *, host: bool = False) -> float:
        return 2.0 * self.rows * self.size * 8


def decide(
    forecast: Callable[[int, int], float], *, limit: int = 2000, n: int = 10**6, rows: int = 10**6, method: str = "auto", **options: Any
) -> Course:
    squared, give_up = options.get("squared", False), options.pop("may_give_up", False)
    operator = Memory(lambda v: v, n, dtype=torch.float64, device=torch.device("cpu"))
    operator.rows = rows
    run = AdaptiveEstimate(operator, Tolerance(0.0, 1.0), Budget(operator, max_matvecs=limit), seed=0, limit=limit, **options)
    run.may_give_up = give_up
    probes = run.probes = Scripted(operator, forecast, squared=squared)  # type: ignore[assignment]
    with patch("sharpkit.linalg.trace._BLOCK", 1):
        _, _, how = run.estimate(method)
    return Course(len(probes.expanded), probes.num_kept, probes.num_late, operator.num_matvecs, how)


def steps(*forecasts: float) -> Callable[[int, int], float]:
    """The forecast for each size of the basis; the last one stays."""
    return lambda basis, probes: forecasts[min(basis, len(forecasts) - 1)]


@pytest.mark.parametrize(("forecast", "basis"), [(11.9, 0), (12.1, 3), (70.0, 3), (130.0, 6), (1000.0, 40)])
def test_a_forecast_above_twice_the_pilot_opens_the_choice_which_patience_closes(forecast: float, basis: int) -> None:
    """Three products without a fall of the forecast, or 4 % of it."""
    made = decide(steps(forecast))
    assert made.basis == basis and made.how == ("Hutchinson, deflated" if basis else "Hutchinson")
    assert made.products == made.basis + made.kept + made.late
    assert made.kept + made.late == math.ceil(forecast - 2), (
        "then probes until the error is the one asked for: their number is the forecast"
    )


@pytest.mark.parametrize(
    ("forecasts", "basis"),
    [
        ((150, 150, 150, 110), 6),  # 113 products in all are no fall by a quarter: given up after 4 % of 150
        ((150, 150, 150, 109), 8),  # 112 are: 4 % of them more, without another fall
        ((150, 150, 150, 109, 107), 9),  # one by more than half a percent
        ((150, 150, 150, 109, 107.6), 8),  # by less
        ((150, 100, 80, 60, 40, 30), 8),
    ],
)
def test_the_basis_grows_while_the_whole_cost_falls(forecasts: tuple[float, ...], basis: int) -> None:
    assert decide(steps(*forecasts)).basis == basis


@pytest.mark.parametrize(
    ("squared", "forecasts", "basis"),
    [(False, (100, 5.9, 4.8, 3.7, 2.6), 4), (False, (100, 6.1, 4.9, 3.8, 2.7), 5), (True, (100, 9.9, 8.8, 7.7, 6.6, 5.5, 4.4), 6)],
)
def test_it_stops_once_the_probes_there_are_suffice_at_four_steps_in_a_row_or_six_for_squares(
    squared: bool, forecasts: tuple[float, ...], basis: int
) -> None:
    made = decide(steps(*forecasts), squared=squared)
    assert made.basis == basis and made.kept == (10 if squared else 6) and made.late == 0, "no further probe is needed"


def test_products_are_left_for_a_pilot_on_the_larger_basis() -> None:
    made = decide(lambda basis, probes: 10_000.0 - 100 * basis, limit=60)
    assert made.basis == 60 - 6 - 6 and made.products == 60


@pytest.mark.parametrize(("surprise", "again"), [(1.49, False), (1.6, True)])
def test_probes_that_disappoint_the_forecast_by_half_and_a_pilot_reopen_the_choice(surprise: float, again: bool) -> None:
    """The basis grows to 3 at a forecast of 80, from 100; once 20 probes are drawn the forecast is found to be higher."""
    made = decide(lambda basis, probes: 100.0 if basis == 0 else 80.0 if probes < 20 else surprise * 80.0 + 6.0)
    assert (made.basis > 4) is again and made.kept == 16, "sixteen probes are kept for it"


@pytest.mark.parametrize(("forecast", "again"), [(230.0, False), (245.0, True)])
def test_probes_sunk_into_the_present_basis_keep_it(forecast: float, again: bool) -> None:
    """Found too low after 90 probes, 74 of which would be lost: what is still needed must be more than twice as many."""
    made = decide(lambda basis, probes: 100.0 if basis < 4 or probes < 90 else forecast)
    assert (made.basis > 4) is again


def test_a_fixed_number_of_products_is_spent_where_the_error_falls_most() -> None:
    """What counts is spread^2 over the products left. It may fall for 4 % of the products, here 8, without being seen to."""
    flat = decide(steps(50.0), limit=200, fixed=True)
    assert flat.basis == 8 and flat.products == 200 and flat.kept == 6, "after the one choice probes are not kept"
    halved = decide(steps(*[50.0] * 7, 20.0), limit=200, fixed=True)
    assert halved.basis == 15 and halved.products == 200
    small = decide(steps(50.0), limit=40, fixed=True)
    assert small.basis == 3


@pytest.mark.parametrize(("forecast", "may_give_up", "products"), [(8001.0, True, 100), (7999.0, True, 2000), (8001.0, False, 2000)])
def test_a_forecast_of_four_budgets_is_hopeless_after_a_hundred_probes(forecast: float, may_give_up: bool, products: int) -> None:
    assert decide(steps(forecast), method="hutchinson", may_give_up=may_give_up).products == products


def test_all_rows_are_multiplied_where_that_is_cheaper_and_the_budget_is_at_least_a_quarter_of_them() -> None:
    """Patience does not stop a basis that is to be completed; here the budget does, after products for a pilot are left."""
    assert decide(steps(1000.0), n=790, limit=200).basis == 200 - 12
    assert decide(steps(1000.0), n=810, limit=200).basis == 40, "four per cent of the forecast"
    assert decide(steps(1000.0), n=1200, limit=1100).basis == 40, "the rows are more than the probes needed"


@pytest.mark.parametrize(("rows", "basis"), [(20, 15), (100, 40)])
def test_memory_bounds_the_basis(rows: int, basis: int) -> None:
    assert decide(steps(1000.0), rows=rows).basis == basis, "with the vector that is pending, and four that products work with"


def test_progress_of_each_stage_expects_what_the_forecast_says() -> None:
    seen: list[sk.Progress] = []
    made = sk.trace(operator_with(FLAT), rtol=0.05, callback=seen.append)
    assert [p.done for p in seen] == sorted({p.done for p in seen}) and seen[-1].done == made.num_matvecs
    assert all(p.done <= p.expected <= 2000 for p in seen)
    late = [p for p in seen if p.text == "probes"][-20:]
    assert all(abs(p.expected - made.num_matvecs) <= 0.5 * made.num_matvecs for p in late)
    tests: list[sk.Progress] = []
    sk.trace(operator_with(NETWORK), method="xtrace", num_matvecs=20, callback=tests.append)
    assert [(p.done, p.expected) for p in tests] == [(2 * j, min(2 * j + 2, 20)) for j in range(1, 11)]
    plus: list[sk.Progress] = []
    sk.trace(operator_with(FLAT), method="hutch++", rtol=0.05, callback=plus.append)
    assert "leading subspace" not in {p.text for p in plus} and plus[0].expected == 12


def test_warnings_point_at_the_call() -> None:
    with pytest.warns(ConvergenceWarning) as caught:
        sk.trace(operator_with(NETWORK), rtol=1e-9, max_matvecs=20)
    assert [w.filename for w in caught] == [__file__]


# -- positive semi-definite matrices ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_xnystrace_is_the_mean_of_the_nystrom_traces_that_leave_one_vector_out_and_what_they_leave_of_it(
    dtype: torch.dtype, rtol: float
) -> None:
    operator, m = operator_with(NETWORK, dtype=dtype), 9
    tests = operator.random_vectors(m, generator=torch.Generator().manual_seed(0), distribution="rademacher")
    sketch = Nystrom(operator)
    for test in tests.T:
        sketch.add(test, operator @ test)
    matrix, estimates = operator.to_dense().double(), []
    for i in range(m):
        rest = torch.cat([tests[:, :i], tests[:, i + 1 :]], dim=1).double()
        image = matrix @ rest
        nystrom = image @ torch.linalg.solve(rest.T @ image, image.T)
        own = tests[:, i].double()
        estimates.append(float(nystrom.trace() + own @ (matrix - nystrom) @ own))
    made = sketch.estimate()
    assert made is not None
    assert made[0] == pytest.approx(np.mean(estimates), rel=rtol)
    assert made[1] == pytest.approx(1.9 * probe_error(np.array(estimates)), rel=100 * rtol)


def test_two_stated_errors_of_xnystrace_hold() -> None:
    found, _ = scores(NETWORK, "xnystrace", 40, rtol=0.03)
    assert np.mean(np.abs(found) <= 2) >= 0.85  # 95 % expected; fewer than 34 of 40 has a probability of 3e-3


def test_of_low_rank_little_more_than_the_rank_is_multiplied() -> None:
    spectrum = np.concatenate([np.arange(1.0, 9), np.zeros(392)])
    for seed in range(5):
        made = sk.trace(operator_with(spectrum), method="xnystrace", seed=seed)
        assert made.num_matvecs <= 12 and made.value == pytest.approx(36.0, rel=1e-9)


def test_all_rows_make_the_trace_of_a_positive_matrix_exact() -> None:
    spectrum = np.linspace(1, 2, 30)
    made = sk.trace(operator_with(spectrum), method="xnystrace", rtol=1e-8)
    assert made.num_matvecs == 30 and made.stderr == 0 and made.value == pytest.approx(45.0, rel=1e-9)


def test_xnystrace_of_a_matrix_that_is_not_positive_is_refused() -> None:
    spectrum = np.concatenate([[5.0, -4, -3], np.linspace(-1, 1, 397)])
    with pytest.raises(ValueError, match="positive semi-definite"):
        sk.trace(operator_with(spectrum), method="xnystrace")
