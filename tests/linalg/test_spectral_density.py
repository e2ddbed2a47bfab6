"""spectral_density against dense spectra: moments within their error, small transport distance, outliers apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from problems_linalg import network_like, operator_with
from scipy.stats import wasserstein_distance

import sharpkit as sk
from sharpkit._errors import ConvergenceWarning

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
    np.testing.assert_allclose(density.frobenius_norm.value, np.linalg.norm(spectrum), atol=1e-9)
    assert len(density.outliers) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("factor", [1e-7, 1.0, 1e7])
def test_outliers_stand_apart_from_the_bulk_at_any_scale(factor: float, dtype: torch.dtype) -> None:
    spectrum = np.concatenate([[5.0, 4, 3, -2], np.random.default_rng(0).uniform(-0.2, 0.2, 396)])
    density = sk.spectral_density(operator_with(factor * spectrum, dtype=dtype), num_probes=5, num_steps=40)
    np.testing.assert_allclose(density.outliers.numpy() / factor, [5, 4, 3, -2], rtol=1e-4)


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
    assert [p.num_matvecs for p in seen] == list(range(1, 11)) and seen[-1].remaining == 0


@pytest.mark.parametrize("name", ["num_probes", "num_steps"])
def test_at_least_one_probe_and_step(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        sk.spectral_density(operator_with(NETWORK), **{name: 0})
