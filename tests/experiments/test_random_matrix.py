"""Formulas for bulk edges and outliers hold for sampled matrices, on both sides of the transition."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from scipy.sparse.linalg import eigsh, svds

from experiments._random_matrix import (
    additive_inverse,
    additive_overlap,
    covariance_outlier,
    covariance_outlier_general,
    marchenko_pastur_edges,
    semicircle_edge,
)
from sharpkit.batch_size.curvature import additive_outlier, effective_batch_size

SIZE, RADIUS = 1200, 2.0
# Outliers fluctuate as n^-1/2 r (1 % here for one matrix), edges as n^-2/3; 3 % is the accuracy asked of the formulas.
TOLERANCE = 0.03


def noise(rng: np.random.Generator, size: int = SIZE) -> np.ndarray:
    """Symmetric, independent entries, scaled so that the bulk ends at 2 r."""
    entries = rng.standard_normal((size, size))
    return (entries + entries.T) / math.sqrt(2 * size) * RADIUS


@pytest.fixture(scope="module")
def wigner() -> np.ndarray:
    return noise(np.random.default_rng(0))


@pytest.mark.parametrize("lam", [10.0, 4.0, 3.0, 2.4, 1.0, 0.3, -1.0, -3.0, -8.0])
def test_an_eigenvalue_appears_where_the_additive_formula_says(wigner: np.ndarray, lam: float) -> None:
    direction = np.random.default_rng(1).standard_normal(SIZE)
    direction /= np.linalg.norm(direction)
    seen, vector = eigsh(wigner + lam * np.outer(direction, direction), k=1, which="LA" if lam > 0 else "SA", tol=1e-6)
    assert seen[0] == pytest.approx(float(additive_outlier(lam, RADIUS)), rel=TOLERANCE)
    overlap = float(vector[:, 0] @ direction) ** 2
    if not 0.7 < abs(lam) / RADIUS < 1.4:  # at the transition itself the overlap has not converged at this size
        assert overlap == pytest.approx(float(additive_overlap(lam, RADIUS)), abs=0.05)


def test_the_bulk_ends_at_twice_the_radius_and_the_formula_is_continuous_there(wigner: np.ndarray) -> None:
    edge = float(eigsh(wigner, k=1, which="LA", tol=1e-6, return_eigenvectors=False)[0])
    assert edge == pytest.approx(float(semicircle_edge(RADIUS)), rel=TOLERANCE)
    below, above = additive_outlier([RADIUS * (1 - 1e-9), RADIUS * (1 + 1e-9)], RADIUS)
    assert below == pytest.approx(above, rel=1e-8)
    assert additive_overlap(RADIUS * (1 + 1e-9), RADIUS) == pytest.approx(0, abs=1e-8)


def test_a_probe_measures_the_radius_with_no_further_factor(wigner: np.ndarray) -> None:
    """r^2 = E ||E z||^2 for a unit probe z; relative spread about sqrt(2 / n) = 4 %, here over 20 probes."""
    probes = np.random.default_rng(2).standard_normal((SIZE, 20))
    probes /= np.linalg.norm(probes, axis=0)
    assert np.mean(np.sum((wigner @ probes) ** 2, axis=0)) == pytest.approx(RADIUS**2, rel=0.04)


@pytest.mark.parametrize("lam", [8.0, 3.0, -4.0])
def test_the_inverse_undoes_the_shift_and_admits_ignorance_inside_the_bulk(lam: float) -> None:
    assert float(additive_inverse(additive_outlier(lam, RADIUS), RADIUS)) == pytest.approx(lam, rel=1e-12)
    assert np.isnan(additive_inverse([3.9, 0.0, -2.0], RADIUS)).all()
    assert float(additive_inverse(lam, 0.0)) == lam


def test_no_noise_and_no_eigenvalue_are_harmless() -> None:
    assert additive_outlier([0.0, 5.0, -5.0], 0.0).tolist() == [0.0, 5.0, -5.0]
    assert float(additive_outlier(0.0, 1.0)) == 2.0
    assert float(additive_overlap(0.0, 1.0)) == 0.0


def sample_covariance_top(population: np.ndarray, samples: int, rng: np.random.Generator) -> np.ndarray:
    """Singular values squared over n of Gaussian columns: the covariance's spectrum, ends only."""
    data = rng.standard_normal((len(population), samples)) * np.sqrt(population)[:, None] / math.sqrt(samples)
    return np.sort(np.linalg.svd(data, compute_uv=False) ** 2)


@pytest.mark.parametrize("ratio", [0.25, 2.0])
def test_marchenko_pastur_edges(ratio: float) -> None:
    dimensions = 800 if ratio < 1 else 1600
    samples = round(dimensions / ratio)
    values = sample_covariance_top(np.full(dimensions, 1.5), samples, np.random.default_rng(3))
    lower, upper = marchenko_pastur_edges(1.5, dimensions / samples)
    assert values[-1] == pytest.approx(float(upper), rel=TOLERANCE)
    # in units of the bulk's width: the lower edge is a small number
    assert values[0] == pytest.approx(float(lower), abs=0.01 * float(upper - lower))


@pytest.mark.parametrize("lam", [12.0, 5.0, 3.0, 1.2])
def test_a_covariance_outlier_appears_where_the_formula_says(lam: float) -> None:
    """The transition is at 1 + sqrt(q) = 1.82 here; one outlier fluctuates by sqrt(2 / n) = 4 %, four draws by 2 % (one sigma)."""
    dimensions, samples = 800, 1200
    population = np.ones(dimensions)
    population[0] = lam
    draws = []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        data = rng.standard_normal((dimensions, samples)) * np.sqrt(population / samples)[:, None]
        data[0] *= math.sqrt(lam) / np.linalg.norm(data[0])  # the outlier's own sample variance is set to its mean
        draws.append(float(svds(data, k=1, return_singular_vectors=False, random_state=0)[0]) ** 2)
    assert np.mean(draws) == pytest.approx(float(covariance_outlier(lam, 1.0, dimensions / samples)), rel=TOLERANCE)


def test_a_decaying_bulk_lifts_the_outlier_by_its_trace_over_the_samples() -> None:
    rng, dimensions, samples = np.random.default_rng(5), 600, 64
    rest = 4.0 / np.arange(2, dimensions + 1)
    data = rng.standard_normal((dimensions, samples, 40)) * np.sqrt(np.concatenate([[30.0], rest]) / samples)[:, None, None]
    data[0] *= math.sqrt(30.0) / np.linalg.norm(data[0], axis=0)
    mean = np.mean([np.linalg.norm(data[:, :, i], 2) ** 2 for i in range(40)])
    predicted = covariance_outlier_general(30.0, rest, samples)
    excess = mean - 30.0
    assert excess == pytest.approx(predicted - 30.0, rel=0.06)
    assert predicted - 30.0 == pytest.approx(rest.sum() / samples, rel=0.1)
    with pytest.raises(ValueError, match="below the outlier"):
        covariance_outlier_general(1.0, [2.0], 10)


def test_the_flat_bulk_is_a_case_of_the_general_formula() -> None:
    assert covariance_outlier_general(5.0, np.full(300, 1.5), 400) == pytest.approx(float(covariance_outlier(5.0, 1.5, 300 / 400)))


def test_the_effective_batch_size_gives_the_variance_of_means_drawn_without_replacement() -> None:
    values = np.random.default_rng(6).standard_normal(12)
    for size in (1, 3, 6, 11):
        means = np.array([values[list(chosen)].mean() for chosen in combinations(range(12), size)])
        expected = values.var(ddof=1) / float(effective_batch_size(size, 12))
        assert means.var() == pytest.approx(expected, rel=1e-10)
    assert effective_batch_size([4, 12], 12) == pytest.approx([6.0, math.inf])
    assert float(effective_batch_size(7)) == 7.0


@pytest.mark.parametrize("size", [0, 13])
def test_impossible_batch_sizes_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="between 1 and the 12 samples"):
        effective_batch_size(size, 12)
