"""spectral_density against dense spectra: moments within their error, small transport distance, outliers apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from problems_linalg import network_like, operator_with
from scipy.stats import wasserstein_distance

import sharpkit as sk
from sharpkit._errors import ConvergenceWarning
from sharpkit.linalg import slq
from sharpkit.linalg.results import Budget
from sharpkit.linalg.slq import Quadrature, density_from
from sharpkit.operators.base import MatrixOperator

UNIFORM = np.random.default_rng(0).random(500)
NETWORK = network_like(500)


def distance(spectrum: np.ndarray, density: sk.SpectralDensity) -> float:
    """1-Wasserstein distance to the true spectrum relative to its width."""
    nodes, weights = density.nodes.numpy().ravel(), density.weights.numpy().ravel()
    return float(wasserstein_distance(spectrum, nodes, None, weights) / np.ptp(spectrum))


@pytest.mark.parametrize("spectrum", [NETWORK, UNIFORM, network_like(500, bulk=0.3)], ids=["network", "uniform", "wide bulk"])
def test_400_products_come_within_a_hundredth_of_the_width(spectrum: np.ndarray) -> None:
    operator = operator_with(spectrum)
    distances = []
    for seed in range(4):
        density = sk.spectral_density(operator, num_probes=10, num_steps=40, seed=seed)
        assert density.num_matvecs == 400
        distances.append(distance(spectrum, density))
    assert np.mean(distances) <= 0.01


@pytest.mark.slow
def test_moments_are_right_within_their_errors() -> None:
    operator = operator_with(NETWORK)
    floor = -1e-3 * np.abs(NETWORK).max()  # what counts as clearly negative
    truth = {"trace": NETWORK.sum(), "frobenius_norm": np.linalg.norm(NETWORK), "negative_mass": np.mean(floor > NETWORK)}
    # Quadrature itself is off where f jumps: half a node's weight, about 1 / (2 x 40), for the mass below the floor.
    slack = {"trace": 0.0, "frobenius_norm": 0.0, "negative_mass": 0.0125}
    densities = [sk.spectral_density(operator, num_steps=40, seed=seed) for seed in range(10)]
    for name, expected in truth.items():
        estimates = [getattr(density, name) for density in densities]
        inside = [abs(e.value - expected) <= 3 * e.stderr + slack[name] for e in estimates]
        assert sum(inside) >= 8, name  # 3 standard errors: 99 % expected


def test_functions_of_arrays_and_of_tensors_give_the_same_expectation() -> None:
    density = sk.spectral_density(operator_with(NETWORK), num_probes=2, num_steps=20)
    assert density.expectation(torch.exp).value == pytest.approx(density.expectation(np.exp).value)  # type: ignore[arg-type]


def test_a_complete_run_reproduces_the_spectrum() -> None:
    spectrum = np.linspace(1, 5, 12)
    density = sk.spectral_density(operator_with(spectrum), num_probes=3, num_steps=12)
    for row in density.nodes.numpy():
        np.testing.assert_allclose(np.sort(row), spectrum, atol=1e-10)


@pytest.mark.parametrize(
    "spectrum", [np.ones(40), np.zeros(40), np.array([3.0]), np.array([1.0, 2.0])], ids=["identity", "zero", "n=1", "n=2"]
)
def test_breakdown_is_padded_with_weight_0(spectrum: np.ndarray) -> None:
    density = sk.spectral_density(operator_with(spectrum), num_probes=4, num_steps=10)
    assert density.nodes.shape == (4, min(10, len(spectrum))) and density.num_matvecs <= 8
    np.testing.assert_allclose(density.weights.sum(dim=1).numpy(), 0.25)
    if len(np.unique(spectrum)) == 1:  # every probe is exact
        np.testing.assert_allclose(density.frobenius_norm.value, np.linalg.norm(spectrum), atol=1e-9)
    else:
        np.testing.assert_allclose(np.sort(density.nodes.numpy()), np.tile(spectrum, (4, 1)), atol=1e-10)
    assert len(density.outliers) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("factor", [1e-7, 1.0, 1e7])
def test_outliers_stand_apart_from_the_bulk_at_any_scale(factor: float, dtype: torch.dtype) -> None:
    spectrum = np.concatenate([[5.0, 4, 3, -2], np.random.default_rng(0).uniform(-0.2, 0.2, 396)])
    density = sk.spectral_density(operator_with(factor * spectrum, dtype=dtype), num_probes=5, num_steps=40)
    np.testing.assert_allclose(density.outliers.numpy() / factor, [5, 4, 3, -2], rtol=1e-4)


def test_a_multiple_of_the_identity_has_no_outliers_in_its_rounding() -> None:
    spectrum = np.concatenate([[9.0], np.random.default_rng(0).uniform(-1, 1, 199)])
    spread, tight = (sk.spectral_density(operator_with(1 + factor * spectrum), num_probes=3, num_steps=30) for factor in (1e-4, 1e-8))
    assert len(spread.outliers) == 1 and len(tight.outliers) == 0


def test_a_bulk_without_outliers_shows_none() -> None:
    assert len(sk.spectral_density(operator_with(UNIFORM), num_probes=5, num_steps=40).outliers) == 0


def test_the_smoothed_density_integrates_to_1_and_follows_the_truth() -> None:
    density = sk.spectral_density(operator_with(UNIFORM), num_probes=10, num_steps=40)
    grid = np.linspace(-1, 2, 3001)
    values = density.density(grid)
    np.testing.assert_allclose(values.sum() * (grid[1] - grid[0]), 1, rtol=1e-6)
    assert abs(values[(grid > 0.2) & (grid < 0.8)].mean() - 1) <= 0.1  # uniform on [0, 1]: density 1
    with pytest.raises(ValueError, match="bandwidth"):
        density.density(grid, bandwidth=0.0)


def test_a_far_outlier_does_not_widen_the_bandwidth() -> None:
    near, far = (
        sk.spectral_density(operator_with(np.concatenate([[top], UNIFORM[:399]])), num_probes=4, num_steps=40) for top in (3.0, 300.0)
    )
    assert far.bandwidth <= 1.2 * near.bandwidth
    assert 0.5 / 40 <= far.bandwidth <= 1.2 / 40


def test_the_same_seed_gives_the_same_density() -> None:
    operator = operator_with(NETWORK)
    a, b, c = (sk.spectral_density(operator, num_probes=2, num_steps=10, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(a.nodes, b.nodes) and torch.equal(a.weights, b.weights) and not torch.equal(a.nodes, c.nodes)


def test_a_budget_keeps_the_finished_probes() -> None:
    with pytest.warns(ConvergenceWarning, match="2 of 10 probes"):
        density = sk.spectral_density(operator_with(NETWORK), num_steps=20, max_matvecs=50)
    assert density.num_probes == 2 and not density.converged and density.num_matvecs == 50
    np.testing.assert_allclose(float(density.weights.sum()), 1)


def test_a_budget_below_one_probe_still_gives_a_density() -> None:
    with pytest.warns(ConvergenceWarning):
        density = sk.spectral_density(operator_with(NETWORK), num_steps=20, max_matvecs=5)
    assert density.num_probes == 1 and not density.converged and np.isinf(density.trace.stderr)


def test_progress_is_reported_for_every_product() -> None:
    seen: list[sk.Progress] = []
    sk.spectral_density(operator_with(NETWORK), num_probes=2, num_steps=5, callback=seen.append)
    assert [p.num_matvecs for p in seen] == list(range(2, 11, 2)) and seen[-1].remaining == 0, "both probes a step at once"
    seen.clear()
    sk.spectral_density(operator_with(NETWORK), num_probes=2, num_steps=5, max_seconds=60, callback=seen.append)
    assert [p.num_matvecs for p in seen] == list(range(1, 11)), "one after another where time is short"


def test_probes_a_step_at_once_give_what_they_give_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    together = sk.spectral_density(operator_with(NETWORK), num_probes=4, num_steps=20)
    monkeypatch.setattr("sharpkit.linalg.slq.abreast", lambda *_: 2)
    half = sk.spectral_density(operator_with(NETWORK), num_probes=4, num_steps=20)
    alone = sk.spectral_density(operator_with(NETWORK), num_probes=4, num_steps=20, max_seconds=60)
    for other in (half, alone):
        assert torch.allclose(together.nodes, other.nodes, rtol=0, atol=1e-8)
        assert other.num_matvecs == together.num_matvecs == 80


@pytest.mark.parametrize("name", ["num_probes", "num_steps"])
def test_at_least_one_probe_and_step(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        sk.spectral_density(operator_with(NETWORK), **{name: 0})


# -- what counts as an outlier, on nodes made by hand -------------------------------------------------------------------------
def rule(
    *, top: tuple[float, ...] = (), bottom: tuple[float, ...] = (), bulk: int = 20, residuals: dict[float, float] | None = None
) -> Quadrature:
    """Bulk nodes 0, 1, 2, ... with others beyond either end; converged unless a residual is given."""
    nodes = np.sort(np.concatenate([bottom, np.arange(float(bulk)), top]))
    off = np.array([(residuals or {}).get(float(node), 0.0) for node in nodes])
    return Quadrature(nodes, np.full(len(nodes), 1 / len(nodes)), off)


def outliers(*rules: Quadrature) -> list[float]:
    budget = Budget(operator_with(np.arange(3.0)))
    return density_from(list(rules), max(len(r.nodes) for r in rules), 100, budget, True).outliers.tolist()


@pytest.mark.parametrize(("gap", "apart"), [(1.0, False), (2.9, False), (3.1, True), (30.0, True)])
def test_an_outlier_stands_three_spacings_of_the_bulk_apart(gap: float, apart: bool) -> None:
    assert outliers(rule(top=(19 + gap,))) == ([19 + gap] if apart else [])
    assert outliers(rule(bottom=(-gap,))) == ([-gap] if apart else [])


def test_the_spacing_of_the_bulk_is_that_of_the_middle_half_of_its_gaps() -> None:
    """Of 19 gaps the 5th to the 14th from the top are five of 3 and five of 1: their median is 2, and 6 is three times that."""
    nodes = np.cumsum([0.0] + [1.0] * 10 + [3.0] * 8 + [5.9])
    wider = np.append(nodes[:-1], nodes[-2] + 6.1)
    assert [outliers(Quadrature(n, np.full(20, 0.05), np.zeros(20))) for n in (nodes, wider)] == [[], [wider[-1]]]


def test_outliers_at_both_ends_come_in_descending_order_with_those_that_stand_together() -> None:
    assert outliers(rule(top=(40.0, 41.0, 60.0), bottom=(-20.0, -21.0))) == [60.0, 41.0, 40.0, -20.0, -21.0]


def test_a_gap_counts_only_if_it_is_wider_than_a_hundredth_of_the_spectrum() -> None:
    assert outliers(rule(top=(1900.0, 19 + 10.0))) == [1900.0] and outliers(rule(top=(1900.0, 19 + 30.0))) == [1900.0, 49.0]


@pytest.mark.parametrize(("residual", "seen"), [(0.009, [60.0, 40.0]), (0.01, [60.0, 40.0]), (0.011, [])])
def test_an_outlier_has_converged_to_a_hundredth_of_the_width(residual: float, seen: list[float]) -> None:
    assert outliers(rule(top=(40.0, 60.0), residuals={60.0: residual * 60})) == seen, (
        "nothing is an outlier behind one that has not converged"
    )
    assert outliers(rule(top=(40.0, 60.0), residuals={40.0: residual * 60})) == (seen or [60.0])


def test_the_inner_half_of_the_nodes_is_bulk() -> None:
    """The gap is looked for in the outer half: with 20 nodes on either side there is no telling which is the bulk."""
    assert outliers(rule(top=tuple(np.arange(100.0, 119.0)))) == list(np.arange(100.0, 119.0))[::-1]
    assert outliers(rule(top=tuple(np.arange(100.0, 122.0)))) == list(np.arange(20.0))[::-1], "then the smaller part is"


@pytest.mark.parametrize(("bulk", "seen"), [(6, []), (7, [50.0])])
def test_of_fewer_than_eight_nodes_none_is_an_outlier(bulk: int, seen: list[float]) -> None:
    assert outliers(rule(top=(50.0,), bulk=bulk)) == seen


@pytest.mark.parametrize(("without", "seen"), [(0, True), (1, True), (2, False)])
def test_nine_of_ten_probes_must_see_an_outlier(without: int, seen: bool) -> None:
    rules = [rule(top=(50.0 + 0.1 * j,)) for j in range(10 - without)] + [rule() for _ in range(without)]
    expected = [50.0 + 0.05 * (9 - without)]
    assert outliers(*rules) == (pytest.approx(expected) if seen else []), "the mean of what they see"


@pytest.mark.parametrize(("off", "agree"), [(0.9, True), (1.2, False)])
def test_probes_agree_within_a_fiftieth_of_the_width(off: float, agree: bool) -> None:
    assert (len(outliers(rule(top=(50.0,)), rule(top=(50.0 + off,)))) == 1) is agree


def test_the_probe_that_sees_most_is_the_measure() -> None:
    assert outliers(*[rule(top=(40.0,))] * 10, rule(top=(40.0, 60.0))) == [40.0]
    assert outliers(*[rule(top=(40.0, 60.0))] * 10, rule(top=(40.0,))) == [60.0, 40.0]


def test_rows_are_padded_with_their_last_node_and_no_weight() -> None:
    rules = [Quadrature(np.array([1.0, 2.0]), np.array([1.0, 3.0]), np.zeros(2)), Quadrature(np.arange(3.0), np.ones(3), np.zeros(3))]
    made = density_from(rules, 4, 10, Budget(operator_with(np.arange(3.0))), False)
    assert made.nodes.tolist() == [[1, 2, 2, 2], [0, 1, 2, 2]]
    np.testing.assert_allclose(made.weights.numpy(), [[0.125, 0.375, 0, 0], [1 / 6, 1 / 6, 1 / 6, 0]])
    assert made.size == 10 and made.num_matvecs == 0 and not made.converged


def test_the_quadrature_of_a_probe_is_exact_for_polynomials_up_to_twice_the_steps() -> None:
    """z^T A^p z / n for p <= 2 m - 1, from the probe of the same seed."""
    operator = operator_with(NETWORK)
    z = operator.random_vectors(1, generator=torch.Generator().manual_seed(4), distribution="rademacher")[:, 0]
    made, image = sk.spectral_density(operator, num_probes=1, num_steps=4, seed=4), z
    for power in range(1, 9):
        image = operator.matrix @ image  # type: ignore[attr-defined]
        exact, quadrature = float(z @ image) / len(z), float((made.nodes**power * made.weights).sum())
        assert (abs(quadrature / exact - 1) < 1e-9) is (power <= 7)


def test_ten_probes_of_eighty_steps_with_seed_0_unless_asked_otherwise() -> None:
    operator = operator_with(NETWORK)
    made = sk.spectral_density(operator)
    assert made.nodes.shape == (10, 80) and made.num_matvecs == 800 and made.converged and made.size == 500
    assert torch.equal(made.nodes, sk.spectral_density(operator, seed=0, distribution="rademacher").nodes)


def test_the_distribution_of_the_probes_can_be_chosen() -> None:
    operator = operator_with(NETWORK)
    signs, normal = (sk.spectral_density(operator, num_probes=1, num_steps=5, distribution=name) for name in ("rademacher", "normal"))
    assert not torch.equal(signs.nodes, normal.nodes)
    z = operator.random_vectors(1, generator=torch.Generator().manual_seed(0), distribution="normal")[:, 0]
    assert float((normal.nodes * normal.weights).sum()) == pytest.approx(float(z @ operator.matrix @ z / (z @ z)))  # type: ignore[attr-defined]


def test_a_budget_that_ends_with_a_probe_warns_of_the_next_one() -> None:
    with pytest.warns(ConvergenceWarning, match="2 of 3 probes"):
        made = sk.spectral_density(operator_with(NETWORK), num_probes=3, num_steps=20, max_matvecs=40)
    assert made.num_probes == 2 and not made.converged and made.num_matvecs == 40


def test_a_basis_that_the_memory_does_not_hold_is_refused_or_kept_in_a_file(tmp_path: Path) -> None:
    class Small(MatrixOperator):
        def free_memory(self, *, host: bool = False) -> float:
            return 10.0 * 500 * 8

    operator = Small(operator_with(NETWORK).matrix)  # type: ignore[attr-defined]
    sk.spectral_density(operator, num_probes=1, num_steps=9)
    with pytest.raises(
        sk.OutOfMemoryError, match=r"a basis of 11 vectors takes 43 KiB, and 39\.1 KiB may be taken for it on cpu: ask for fewer"
    ):
        sk.spectral_density(operator, num_probes=1, num_steps=10)
    there = sk.spectral_density(operator, num_probes=3, num_steps=10, offload=tmp_path)
    assert torch.equal(there.nodes, sk.spectral_density(operator_with(NETWORK), num_probes=3, num_steps=10, max_seconds=60).nodes)


def test_probes_are_drawn_again_as_they_were() -> None:
    operator = operator_with(np.arange(70.0))
    for distribution in ("rademacher", "normal"):
        generator, probes = torch.Generator().manual_seed(3), slq.Probes(operator, 3, distribution)
        drawn = [operator.random_vectors(1, generator=generator, distribution=distribution)[:, 0] for _ in range(4)]
        assert all(torch.equal(probes[number], drawn[number]) for number in (2, 0, 3, 3, 1))


def test_shares_are_those_of_good_vectors_in_the_other_probes() -> None:
    """Of two exact eigenvectors: (v.z)^2 / ||z||^2, those of the second run in the first probe."""
    operator = operator_with(np.concatenate([[50.0, -40.0], np.linspace(-1, 1, 98)]))
    made = sk.spectral_density(operator, num_probes=3, num_steps=25, distribution="normal", seed=2)
    eigenvalues, vectors = torch.linalg.eigh(operator.matrix)  # type: ignore[attr-defined]
    probes = slq.Probes(operator, 2, "normal")
    for number in range(3):
        z = probes[number]
        for column, which in ((0, -1), (1, 0)):
            assert float(made.controls[number, column]) == pytest.approx(float(eigenvalues[which]))
            assert float(made.shares[number, column]) == pytest.approx(float((vectors[:, which] @ z) ** 2 / (z @ z)))


def test_progress_names_the_probe() -> None:
    seen: list[sk.Progress] = []
    sk.spectral_density(operator_with(NETWORK), num_probes=2, num_steps=3, callback=seen.append)
    assert [p.text for p in seen] == ["probes 1 to 2 of 2"] * 3 and {p.expected for p in seen} == {6}
    seen.clear()
    with pytest.warns(ConvergenceWarning):
        sk.spectral_density(operator_with(NETWORK), num_probes=2, num_steps=3, max_matvecs=5, callback=seen.append)
    assert [p.text for p in seen] == ["probe 1 of 2"] * 3 + ["probe 2 of 2"] * 2


def test_warnings_point_at_the_call() -> None:
    with pytest.warns(ConvergenceWarning) as caught:
        sk.spectral_density(operator_with(NETWORK), max_matvecs=2)
    assert [w.filename for w in caught] == [__file__]


def test_a_single_probe_has_no_control_vectors() -> None:
    made = sk.spectral_density(operator_with(NETWORK), num_probes=1, num_steps=20)
    assert made.controls.shape == made.shares.shape == (0, 0)


def test_over_a_complete_basis_every_vector_is_known_else_one_in_four_rows() -> None:
    """Five rows, five steps: all eigenvectors are exact, and leave nothing to the probes."""
    spectrum = np.array([7.0, 3.0, 1.0, -2.0, -4.0])
    made = sk.spectral_density(operator_with(spectrum), num_probes=3, num_steps=5)
    assert made.controls.shape == (3, 5) and sorted(made.controls[0].tolist()) == pytest.approx(sorted(spectrum))
    assert made.shares.sum(dim=1).tolist() == pytest.approx([1.0] * 3) and made.trace.stderr < 1e-9
    short = sk.spectral_density(operator_with(np.array([90.0, 50.0, 20.0, *np.linspace(0, 0.1, 5)])), num_probes=3, num_steps=6)
    assert short.controls.shape == (3, 2), "two of eight"


def test_the_warning_of_a_budget_names_products_and_probes() -> None:
    with pytest.warns(ConvergenceWarning, match=r"the budget ended after 30 of about 60 products: the density rests on 1 of 3 probes"):
        sk.spectral_density(operator_with(NETWORK), num_probes=3, num_steps=20, max_matvecs=30)
