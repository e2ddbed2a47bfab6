"""Estimates, eigenpairs and densities as numbers and words; budgets count what they say."""

from __future__ import annotations

import importlib
import math
import pkgutil
from dataclasses import is_dataclass
from typing import Any

import numpy as np
import pytest
import torch

import sharpkit as sk
import sharpkit.linalg
from sharpkit._results import format_with_error, standard_error, student_factor
from sharpkit.linalg.results import Budget, Eigenpairs, Estimate, SpectralDensity, probe_error
from sharpkit.operators.base import MatrixOperator


def operator(n: int = 3) -> sk.SymmetricOperator:
    return sk.as_operator(torch.eye(n, dtype=torch.float64))


# -- estimates ----------------------------------------------------------------------------------------------------------------
def test_an_estimate_reads_as_a_number_with_its_error_cost_and_kind() -> None:
    estimate = Estimate(2.0, 0.25, 7, 1.0, "Hutchinson")
    assert float(estimate) == 2.0 and str(estimate) == "2 +- 0.25" and estimate.interval == (1.5, 2.5)
    assert repr(estimate) == "Estimate(2 +- 0.25, 7 products, Hutchinson)"
    assert repr(Estimate(2.0, 0.25, 7, converged=False)) == "Estimate(2 +- 0.25, 7 products, NOT converged)"
    assert repr(Estimate(2.0, 0.25, 7, error_kind="residual bound")) == "Estimate(2 +- 0.25 (residual bound), 7 products)"
    plain = Estimate(2.0, 0.25)
    assert (plain.num_matvecs, plain.seconds, plain.method, plain.converged) == (0, 0.0, "", True)


@pytest.mark.parametrize(
    ("value", "stderr", "root", "error"), [(9.0, 0.6, 3.0, 0.1), (0.0, 0.04, 0.0, 0.2), (-1.0, 0.04, 0.0, 0.2), (0.25, 0.1, 0.5, 0.1)]
)
def test_the_root_has_its_error_by_the_delta_method(value: float, stderr: float, root: float, error: float) -> None:
    made = Estimate(value, stderr, 5, method="m").root()
    assert (made.value, made.stderr) == pytest.approx((root, error)) and (made.num_matvecs, made.method) == (5, "m")


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (1.23456, 0.005, "1.235 +- 0.005"),
        (123456.0, 0.5, "123456 +- 0.5"),
        (1.23456789, 1e-9, "1.234568 +- 1e-09"),
        (1.0, 3.0, "1 +- 3 (not resolved)"),
        (2e3, 2e4, "2e+03 +- 2e+04 (not resolved)"),
        (0.0, 0.1, "0 +- 0.1"),
        (1.23456789, 0.0, "1.23457"),
        (1.23456789, -1.0, "1.23457"),
        (1.23456789, math.inf, "1.235 (error unknown)"),
        (100.0, 1.0, "100 +- 1"),
        (-9.87654, 0.1, "-9.88 +- 0.1"),
    ],
)
def test_digits_are_those_that_the_error_supports(value: float, error: float, text: str) -> None:
    assert format_with_error(value, error) == text


def test_the_standard_error_is_widened_for_few_samples() -> None:
    """t(0.975) quantiles of 1, 2 and 9 degrees of freedom over the normal one."""
    assert [student_factor(n) for n in (2, 3, 10)] == pytest.approx([12.7062 / 1.95996, 4.30265 / 1.95996, 2.26216 / 1.95996], rel=1e-5)
    assert student_factor(1) == math.inf
    assert standard_error(np.array([1.0, 3.0])) == pytest.approx(1.0 * 12.7062 / 1.95996, rel=1e-5)
    assert standard_error(np.array([1.0])) == math.inf


def test_results_cannot_be_changed() -> None:
    """All dataclasses of linalg but the tracker, which has a state."""
    modules = [importlib.import_module(f"sharpkit.linalg.{m.name}") for m in pkgutil.iter_modules(sharpkit.linalg.__path__)]
    classes = {c for module in modules for c in vars(module).values() if isinstance(c, type) and is_dataclass(c)}
    assert len(classes) > 6
    assert {c.__name__ for c in classes if not c.__dataclass_params__.frozen} == {"EigenvalueTracker"}  # type: ignore[attr-defined]


def test_documents_name_their_kind_and_the_first_version() -> None:
    pairs = Eigenpairs(torch.zeros(1), torch.zeros(3, 1), torch.zeros(1), torch.ones(1, dtype=torch.bool), 1)
    for result, kind in ((Estimate(1.0, 0.1), "estimate"), (pairs, "eigenpairs"), (density(), "spectral_density")):
        document = result.to_dict()
        assert list(document)[:2] == ["kind", "version"] and (document["kind"], document["version"]) == (kind, 1)


def test_the_kind_of_an_error_is_given_by_name() -> None:
    with pytest.raises(TypeError, match="positional"):
        Estimate(1.0, 0.1, 0, 0.0, "", True, "residual bound")  # type: ignore[misc]


# -- eigenpairs ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("k", "more"), [(2, ""), (10, ""), (11, ", ... 11 in all")])
def test_eigenpairs_show_ten_values_at_most(k: int, more: str) -> None:
    flags = torch.arange(k) != 1
    pairs = Eigenpairs(torch.arange(k).double(), torch.eye(k), torch.full((k,), 0.5).double(), flags, 9)
    text = repr(pairs)
    assert text.startswith("Eigenpairs(largest: 0 +- 0.5, 1 +- 0.5 (not converged)") and text.endswith(f"{more}; 9 products, converged)")
    assert text.count("+-") == min(k, 10) and "torch" not in text
    assert (pairs.seconds, pairs.which, pairs.tol, pairs.outcome) == (0.0, "largest", 1e-3, "converged")


# -- densities ----------------------------------------------------------------------------------------------------------------
def density(**changes: Any) -> SpectralDensity:
    """Two probes of three nodes over a matrix of 10 rows; the last node of the second is padding."""
    settings: dict[str, Any] = {
        "nodes": torch.tensor([[-1.0, 0.0, 4.0], [-2.0, 3.0, 3.0]]).double(),
        "weights": torch.tensor([[0.1, 0.3, 0.1], [0.2, 0.3, 0.0]]).double(),
        "size": 10,
        "num_matvecs": 6,
    }
    return SpectralDensity(**{**settings, **changes})


def test_sums_over_the_spectrum_are_means_over_the_probes_with_their_spread() -> None:
    """Per probe: mean of x 0.6 and 1.0, of x^2 3.4 and 7.0, of the mass below 0 0.2 and 0.4; their spread, a tenth wider."""
    made, factor = density(), 1.1 * 12.7062 / 1.95996 / 2
    assert made.num_probes == 2 and made.converged and made.seconds == 0 and made.outliers.shape == (0,)
    for estimate, value, spread in (
        (made.expectation(lambda x: x), 0.8, 0.4),
        (made.trace, 8.0, 4.0),
        (made.total(np.square), 52.0, 36.0),
        (made.negative_mass, 0.3, 0.2),
    ):
        assert (estimate.value, estimate.stderr) == pytest.approx((value, spread * factor), rel=1e-5)
        assert estimate.num_matvecs == 6 and estimate.method == "stochastic Lanczos quadrature"
    norm = made.frobenius_norm
    assert (norm.value, norm.stderr) == pytest.approx((52**0.5, 36 * factor / (2 * 52**0.5)), rel=1e-5)
    assert repr(made).startswith("SpectralDensity(n = 10, from -2 to 4, trace 8 +-") and repr(made).endswith(
        "0 outliers, 2 probes, 6 products)"
    )
    assert not density(converged=False).trace.converged


def test_flat_directions_are_no_negative_mass() -> None:
    """Up to a thousandth of the largest magnitude, here 4e-3 of -4."""
    for value, mass in ((-3.9e-3, 0.2), (-4.1e-3, 0.4)):
        nodes = torch.tensor([[-4.0, value, 1.0]]).double()
        assert density(nodes=nodes, weights=torch.tensor([[0.2, 0.2, 0.6]]).double()).negative_mass.value == pytest.approx(mass)


def test_a_function_of_tensors_is_taken_as_well() -> None:
    made = density()
    assert made.expectation(torch.exp).value == pytest.approx(made.expectation(np.exp).value)  # type: ignore[arg-type]


def test_the_bandwidth_is_the_width_of_the_bulk_over_the_steps() -> None:
    assert density().bandwidth == pytest.approx(6 / 3)
    outlier = torch.tensor([4.0]).double()
    assert density(outliers=outlier).bandwidth == pytest.approx(5 / 3), "the outlier is left out, from -2 to 3"
    padded = density(nodes=torch.tensor([[-1.0, 0.0, 4.0], [-2.0, 3.0, 99.0]]).double())
    assert padded.bandwidth == pytest.approx(6 / 3), "padding is no node"
    for off, inner in ((0.119, 5.0), (0.121, 6.121)):  # a fiftieth of the width apart it is another node
        near = density(outliers=torch.tensor([4.0 + off]).double(), nodes=torch.tensor([[-1.0, 0.0, 4.0], [-2.0, 3.0, 3.0]]).double())
        assert near.bandwidth == pytest.approx(5 / 3 if inner == 5.0 else 6 / 3)
    equal = density(nodes=torch.full((2, 3), 5.0).double())
    assert equal.bandwidth == pytest.approx(5e-6) and density(nodes=torch.zeros(2, 3).double()).bandwidth == pytest.approx(1e-6)
    both = density(nodes=torch.tensor([[0.0, 9.0, 9.0], [0.0, 9.0, 9.0]]).double(), outliers=torch.tensor([9.0]).double())
    assert both.bandwidth == pytest.approx(9e-6), "a bulk of equal nodes has no width"
    lone = density(
        nodes=torch.tensor([[0.0, 4.0, 9.0]]).double(),
        weights=torch.full((1, 3), 1 / 3).double(),
        outliers=torch.tensor([9.0, 0.0]).double(),
    )
    assert lone.bandwidth == pytest.approx(9 / 3), "of a single node the whole width counts"


def test_the_smoothed_density_is_a_gaussian_on_every_node() -> None:
    made = density()
    grid = np.linspace(-4, 6, 7)
    expected = sum(
        w * np.exp(-0.5 * ((grid - x) / 0.7) ** 2) / (0.7 * math.sqrt(2 * math.pi))
        for x, w in zip(made.nodes.ravel().tolist(), made.weights.ravel().tolist(), strict=True)
    )
    np.testing.assert_allclose(made.density(grid, 0.7), expected, rtol=1e-12)
    np.testing.assert_allclose(made.density(torch.from_numpy(grid)), made.density(grid, 2.0), rtol=1e-12)
    many = density(nodes=torch.linspace(0, 1, 700).double().reshape(1, -1), weights=torch.full((1, 700), 1 / 700).double())
    fine = np.linspace(-1, 2, 301)
    assert many.density(fine, 0.1).sum() * 0.01 == pytest.approx(1, rel=1e-6), "every block of nodes counts"
    for width in (0.0, -1.0):
        with pytest.raises(ValueError, match="bandwidth must be a positive number"):
            made.density(grid, width)


# -- budgets ------------------------------------------------------------------------------------------------------------------
def test_a_budget_counts_the_products_made_since_it_was_opened() -> None:
    matrix = operator()
    matrix @ torch.ones(3, dtype=torch.float64)
    budget = Budget(matrix, max_matvecs=3)
    matrix @ torch.ones(3, 2, dtype=torch.float64)
    assert budget.num_matvecs == 2 and budget.seconds >= 0
    assert budget.allows() and budget.allows(1) and not budget.allows(2)
    matrix @ torch.ones(3, dtype=torch.float64)
    assert not budget.allows() and budget.allows(0)
    assert Budget(matrix).allows(10**9)


def test_a_budget_of_seconds_is_decided_by_one_process_for_all() -> None:
    class Agreeing(MatrixOperator):
        seconds = 0.0

        def agree(self, value: float) -> float:
            return self.seconds

    matrix = Agreeing(torch.eye(3).double())
    budget = Budget(matrix, max_seconds=2.0)
    for seconds, allowed in ((1.9, True), (2.0, False), (2.1, False)):
        Agreeing.seconds = seconds
        assert budget.allows() is allowed


@pytest.mark.parametrize("limits", [{"max_matvecs": 0}, {"max_matvecs": -1}, {"max_seconds": 0.0}, {"max_seconds": -1.0}])
def test_a_budget_of_nothing_is_refused(limits: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(limits))):
        Budget(operator(), **limits)
    Budget(operator(), max_matvecs=1, max_seconds=1e-9)


def test_progress_tells_what_is_done_expected_and_left() -> None:
    seen: list[sk.Progress] = []
    matrix = operator()
    budget = Budget(matrix, max_matvecs=8, callback=seen.append)
    budget.report(5, "before")
    for expected in (5, 1, 20):
        matrix @ torch.ones(3, dtype=torch.float64)
        budget.report(expected, "running")
    assert [(p.done, p.expected, p.text) for p in seen] == [(0, 5, "before"), (1, 5, "running"), (2, 2, "running"), (3, 8, "running")]
    assert math.isnan(seen[0].remaining) and seen[2].remaining == 0
    for p in (seen[1], seen[3]):
        assert p.remaining == pytest.approx(p.elapsed / p.done * (p.expected - p.done))
    Budget(matrix).report(5, "without a callback nothing happens")
    wide: list[sk.Progress] = []
    spent = Budget(matrix, max_matvecs=1, callback=wide.append)
    matrix @ torch.ones(3, 4, dtype=torch.float64)
    spent.report(2, "over")
    assert (wide[0].done, wide[0].expected, wide[0].remaining) == (4, 4, 0.0)


@pytest.mark.parametrize("count", [6, 20, 60])
def test_two_stated_errors_of_skewed_forms_hold_the_truth_in_92_of_100_cases(count: int) -> None:
    """The forms of a matrix of rank one are chi-square with one degree of freedom; the normal ones are what many eigenvalues give."""
    generator = np.random.default_rng(0)
    normal, skewed = generator.standard_normal((1000, count)), generator.standard_normal((1000, count)) ** 2 - 1
    for samples, at_least in ((normal, 0.95), (skewed, 0.86 if count == 6 else 0.92)):
        errors = np.array([probe_error(row) for row in samples])
        share = np.mean(np.abs(samples.mean(axis=1)) <= 2 * errors)
        needed = np.quantile(np.abs(samples.mean(axis=1)) / (2 * errors), 0.95)
        assert share >= at_least and needed >= 0.5


def test_a_probe_error_is_students_widened_by_a_tenth_and_by_skewness_and_its_square_at_any_scale() -> None:
    samples = np.array([0.0, 0, 0, 4])
    plain, shift = samples.std(ddof=1) / 2 * student_factor(4), (24 / 4) / 3**1.5 / 2  # deviations -1, -1, -1, 3
    assert probe_error(samples) == pytest.approx(plain * (1.1 + 0.6 * shift + 3.5 * shift**2))
    for scale in (1e-100, 1e100):
        assert probe_error(samples * scale) == pytest.approx(probe_error(samples) * scale)
    assert probe_error(np.ones(5)) == 0 and math.isinf(probe_error(np.ones(1))) and math.isinf(probe_error(np.ones(0)))


def test_a_density_far_away_is_nothing() -> None:
    density = sk.spectral_density(torch.diag(torch.arange(1.0, 6.0)), num_probes=2, num_steps=5)
    near, far, infinite = density.density([3.0, 1e6, math.inf])
    assert near > 0 and far == infinite == 0
