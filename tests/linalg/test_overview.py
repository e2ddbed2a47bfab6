"""The shared pass: both ends, density, trace and norms of one set of runs agree with the dense spectrum, within their errors and costs."""

from __future__ import annotations

import math
import warnings
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems_linalg import operator_with, true_residuals

import sharpkit as sk
from sharpkit._errors import ConvergenceWarning
from sharpkit.linalg.krylov import BasisRows
from sharpkit.linalg.overview import both_ends, spectral_overview
from sharpkit.operators.base import MatrixOperator

SPECTRUM = np.concatenate([[10.0, 6.0, -4.0], np.random.default_rng(0).uniform(-0.5, 0.5, 197)])
TRUTH = {"trace": SPECTRUM.sum(), "frobenius_norm": np.linalg.norm(SPECTRUM), "absolute_trace": np.abs(SPECTRUM).sum()}


def overview(spectrum: np.ndarray = SPECTRUM, **options: Any) -> Any:
    return spectral_overview(operator_with(spectrum), **options)


def test_both_ends_are_right_within_residuals_that_are_true() -> None:
    operator = operator_with(SPECTRUM)
    for top, bottom in (both_ends(operator), (overview().largest, overview().smallest)):
        for pair, value, which in ((top, 10.0, "largest"), (bottom, -4.0, "smallest")):
            assert float(pair.values) == pytest.approx(value, abs=1e-5) and pair.which == which
            assert bool(pair.converged) and pair.outcome == "converged" and float(pair.residuals) <= 1e-3 * 10
            truth = true_residuals(operator, pair.vectors, pair.values)
            assert truth[0] <= 1.01 * float(pair.residuals) + 1e-12 and truth[0] >= 0.9 * float(pair.residuals) - 1e-12
            assert pair.vectors.shape == (200, 1) and pair.tol == 1e-3


@pytest.mark.slow
def test_sums_are_right_within_their_errors_which_the_outliers_do_not_widen() -> None:
    """The noise of a probe is that of the 197 eigenvalues of the bulk alone: sqrt(2 sum x^2) for the trace, 7.7."""
    bulk = SPECTRUM[3:]
    spread = {"trace": bulk, "absolute_trace": np.abs(bulk)}
    seen: dict[str, list[float]] = {name: [] for name in TRUTH}
    for seed in range(30):
        made = overview(seed=seed, num_probes=8)
        for name, truth in TRUTH.items():
            estimate = getattr(made, name)
            seen[name].append((estimate.value - truth) / estimate.stderr)
            assert estimate.method == "stochastic Lanczos quadrature, outliers taken out" and estimate.converged
            if name in spread:
                # Student's factor of 7 probes is 1.25; a spread from 7 samples is off by a factor of 2 at most, but for one in a thousand
                plain = math.sqrt(2 * (spread[name] ** 2).sum() / 7) * 1.25
                assert estimate.stderr < 2.2 * 1.3 * plain, "1.3: what the error of seven skewed probes is widened by"
    for name, scores in seen.items():
        assert np.mean(np.abs(scores) <= 2) >= 0.8, name
        assert abs(np.mean(scores)) <= 0.6, f"{name} has no bias"


def test_the_density_is_that_of_all_probes() -> None:
    made = overview(num_probes=5)
    assert made.density.num_probes == 5 and made.density.converged and made.density.size == 200
    np.testing.assert_allclose(made.density.weights.sum(dim=1).numpy(), 0.2)
    np.testing.assert_allclose(made.density.outliers.numpy(), [10, 6, -4], atol=1e-3)


def test_the_cost_is_that_of_the_probes_and_of_what_the_first_needs_for_both_ends() -> None:
    operator = operator_with(SPECTRUM)
    made = spectral_overview(operator, num_probes=4, num_steps=20)
    assert made.num_matvecs == operator.num_matvecs == made.trace.num_matvecs
    assert 80 <= made.num_matvecs <= 82, "the first run checks twice"
    flat = np.linspace(-1, 1, 300)  # whose ends converge slowly
    long = overview(flat, num_probes=3, num_steps=10, tol=1e-9)
    assert long.num_matvecs == 60 + 2 * 10, "the first run goes on to six times the steps at most"
    assert not bool(long.largest.converged) and long.largest.outcome == "ended before convergence"
    assert overview(np.arange(5.0), num_probes=3).num_matvecs == 15, "no more steps than rows"
    default = overview()
    assert 6 * 32 <= default.num_matvecs <= 6 * 32 + 2 and default.density.num_probes == 6


def test_ends_want_two_checks_in_a_row_and_no_fewer_products_than_asked() -> None:
    for steps in (5, 12, 25):
        assert both_ends(operator_with(SPECTRUM), tol=0.9, num_steps=steps)[0].num_matvecs == steps + 1
    loose, usual, tight = (both_ends(operator_with(SPECTRUM), tol=tol, num_steps=3)[0].num_matvecs for tol in (0.9, 1e-3, 1e-6))
    assert loose == 4 < usual < tight
    assert both_ends(operator_with(SPECTRUM), tol=0.9)[0].num_matvecs == 13, "12 products by default"
    assert both_ends(operator_with(np.arange(4.0)), tol=0.9)[0].num_matvecs == 4


def test_one_end_alone_is_not_enough() -> None:
    """The top is alone and converges at once, the bottom is the edge of a bulk."""
    operator = operator_with(np.concatenate([[10.0], np.linspace(-1, 1, 299)]))
    _, bottom = both_ends(operator, tol=1e-3)
    assert bool(bottom.converged) and float(bottom.residuals) <= 1e-3 * 10 and float(bottom.values) == pytest.approx(-1, abs=1e-2)


def test_where_no_pair_has_converged_the_sums_are_those_of_the_plain_probes() -> None:
    """Two steps a probe, and twelve for the first: no end of an even spectrum is known to a hundredth by then."""
    made = overview(np.linspace(-1, 1, 300) + 0.3, num_probes=5, num_steps=2)
    plain = float((made.density.nodes * made.density.weights).sum()) * 300
    assert made.trace.value == pytest.approx(plain) and abs(made.trace.value - 90) <= 3 * made.trace.stderr
    assert not bool(made.largest.converged) and not bool(made.smallest.converged) and made.num_matvecs == 12 + 4 * 2


def test_a_small_matrix_is_known_exactly() -> None:
    spectrum = np.array([3.0, 1.0, -2.0, 0.5])
    made = overview(spectrum, num_probes=4)
    for name, truth in (("trace", 2.5), ("frobenius_norm", np.linalg.norm(spectrum)), ("absolute_trace", 6.5)):
        estimate = getattr(made, name)
        assert estimate.value == pytest.approx(truth, abs=1e-9) and estimate.stderr < 1e-9
    zero = overview(np.zeros(20))
    assert zero.trace.value == 0 and zero.frobenius_norm.value == 0 and zero.frobenius_norm.stderr == 0


@pytest.mark.parametrize(("budget", "probes", "known"), [(10, 1, False), (45, 2, True), (65, 3, True), (75, 3, True)])
def test_a_budget_leaves_the_finished_probes(budget: int, probes: int, known: bool) -> None:
    with pytest.warns(ConvergenceWarning, match=f"{probes} of 6 probes"):
        made = overview(num_steps=20, max_matvecs=budget)
    assert made.density.num_probes == probes and not made.density.converged and made.num_matvecs <= budget
    assert not made.trace.converged and math.isinf(made.trace.stderr) is (probes == 1)
    assert made.trace.method == ("stochastic Lanczos quadrature, outliers taken out" if known else "stochastic Lanczos quadrature")
    assert math.isfinite(made.trace.value)


def test_no_warning_where_all_probes_were_made() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        overview(num_probes=3)


def test_progress_tells_which_part_runs() -> None:
    seen: list[sk.Progress] = []
    made = overview(num_probes=3, num_steps=20, callback=seen.append)
    assert [p.done for p in seen] == sorted(p.done for p in seen) and seen[-1].done == made.num_matvecs
    texts = list(dict.fromkeys(p.text for p in seen))
    assert texts == ["both ends of the spectrum", "probes 2 to 3 of 3"] and seen[0].expected == 60


def test_seeds_are_all_the_randomness() -> None:
    first, again, other = (overview(seed=seed, num_probes=3) for seed in (4, 4, 5))
    assert first.trace.value == again.trace.value != other.trace.value
    assert overview(num_probes=3).trace.value == overview(num_probes=3, seed=0).trace.value
    ends = [both_ends(operator_with(SPECTRUM), **seed)[0].vectors for seed in ({}, {"seed": 0}, {"seed": 1})]
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


@pytest.mark.parametrize("arguments", [{"num_probes": 2}, {"num_steps": 1}])
def test_fewer_than_three_probes_or_two_steps_are_refused(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"num_(probes|steps) must be a whole number of at least [32]"):
        overview(**arguments)
    overview(np.arange(5.0), num_probes=3, num_steps=2)


def test_warnings_point_at_the_call() -> None:
    with pytest.warns(ConvergenceWarning) as caught:
        spectral_overview(operator_with(SPECTRUM), max_matvecs=50)
    assert [w.filename for w in caught] == [__file__]


# -- memory -------------------------------------------------------------------------------------------------------------------
class Counting(MatrixOperator):
    """A matrix whose vectors alive are counted, in a machine that has room for so many."""

    rows = math.inf

    def free_memory(self, *, host: bool = False) -> float:
        return self.rows * self.size * 8


@pytest.fixture
def rows_alive(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The most basis vectors that were kept at a time, over all bases."""
    alive: weakref.WeakSet[BasisRows] = weakref.WeakSet()
    most, append = [0], BasisRows.append

    def counted(self: BasisRows, vector: torch.Tensor) -> None:
        alive.add(self)
        append(self, vector)
        most[0] = max(most[0], sum(rows.size for rows in alive))

    monkeypatch.setattr(BasisRows, "append", counted)
    return most


FLAT = np.linspace(-1, 1, 300)  # whose ends converge after 80 products


def test_one_basis_is_kept_at_a_time_and_nothing_of_the_runs_before(rows_alive: list[int]) -> None:
    operator = Counting(operator_with(FLAT).matrix)  # type: ignore[attr-defined]
    made = spectral_overview(operator, num_steps=20, max_seconds=60)
    first = made.num_matvecs - 5 * 20
    assert first > 40 and rows_alive[0] == first + 1, "the first run's, which ends later than the others"


def test_where_memory_is_short_the_first_run_restarts_and_tells_the_same(rows_alive: list[int]) -> None:
    matrix = operator_with(FLAT).matrix  # type: ignore[attr-defined]
    plain = spectral_overview(Counting(matrix), num_steps=20)
    rows_alive[0] = 0
    short = Counting(matrix)
    short.rows = 42
    made = spectral_overview(short, num_steps=20)
    assert rows_alive[0] == 21, "half of 42 rows, and as many as 20 steps take"
    for one, other in ((made.largest, plain.largest), (made.smallest, plain.smallest)):
        assert bool(one.converged) and float(one.values) == pytest.approx(float(other.values), abs=2e-3)
        residual = float((matrix @ one.vectors[:, 0] - one.values * one.vectors[:, 0]).norm())
        assert residual == pytest.approx(float(one.residuals), rel=1e-6, abs=1e-12)
    for name in ("trace", "frobenius_norm"):  # Gauss quadrature of either length is exact for these
        assert getattr(made, name).value == pytest.approx(getattr(plain, name).value, abs=1e-3 * plain.frobenius_norm.value)
    assert made.density.nodes.shape == (6, 20)


def test_what_does_not_fit_is_refused_before_any_product_or_kept_in_a_file(tmp_path: Path) -> None:
    small = Counting(operator_with(FLAT).matrix)  # type: ignore[attr-defined]
    small.rows = 20
    with pytest.raises(sk.OutOfMemoryError, match="a basis of 21 vectors"):
        spectral_overview(small, num_steps=20)
    assert small.num_matvecs == 0
    there, here = spectral_overview(small, num_steps=20, offload=tmp_path), overview(FLAT, num_steps=20, max_seconds=60)
    assert there.trace.value == here.trace.value and torch.equal(there.largest.values, here.largest.values)


def test_the_limit_of_a_call_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sharpkit.objective.memory.used_memory", lambda device: 0.0)  # a test process breathes by more than this limit
    operator = operator_with(FLAT)
    with pytest.raises(sk.OutOfMemoryError, match="a basis of 33 vectors"):
        spectral_overview(operator, memory_limit=33 * 300 * 8)


def test_each_end_is_judged_by_itself() -> None:
    """One end stands alone and converges at once, the other is the edge of a bulk and does not."""
    bulk = np.linspace(-1, 1, 299)
    for spectrum, quick, slow in ((np.append(bulk, 10.0), "largest", "smallest"), (np.append(bulk, -10.0), "smallest", "largest")):
        made = overview(spectrum, num_probes=3, num_steps=2, tol=1e-6)
        assert bool(getattr(made, quick).converged) and not bool(getattr(made, slow).converged)
        assert made.num_matvecs == 12 + 2 * 2, "the first run goes on for the end that has not converged"
        assert (getattr(made, quick).outcome, getattr(made, slow).outcome) == ("converged", "ended before convergence")


@pytest.mark.parametrize("tol", [0.0, -0.5, 1.0])
def test_a_tolerance_lies_between_0_and_1(tol: float) -> None:
    with pytest.raises(ValueError, match="tol must be a number between 0 and 1"):
        overview(tol=tol)
