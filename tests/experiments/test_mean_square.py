"""The mean-square limits are where the exact second-moment maps of SGD stop contracting."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import brentq

from experiments._mean_square import equal_norm_trace_limit, gaussian_limit
from sharpkit.batch_size.limits import crossover_batch_size, short_form

SPECTRA = {"one": [1.0], "flat": [1.0] * 6, "outlier": [10.0, 1.0, 0.5, 0.2, 0.1], "decaying": [4.0 / i for i in range(1, 9)]}


def second_moment_radius(eigenvalues: list[float], eta: float, batch_size: float, beta: float) -> float:
    """Spectral radius of one step of E[z z^T], z = (error, velocity), by Gaussian inputs x ~ N(0, diag(lam)), loss (x . w)^2 / 2.

    Per direction i the unknowns are a = E w^2, c = E w v, d = E v^2. With g = H_B w, E[g_i^2] = lam_i^2 a_i + (lam_i^2 a_i + lam_i
    sum_j lam_j a_j) / B by Isserlis' theorem, and v' = beta v + g, w' = w - eta v'.
    """
    lam = np.array(eigenvalues)
    count = len(lam)
    diagonal, zero, identity = np.diag(lam), np.zeros((count, count)), np.eye(count)
    squared = np.diag(lam**2) * (1 + 1 / batch_size) + np.outer(lam, lam) / batch_size  # E g^2 from a
    new_d = np.hstack([squared, 2 * beta * diagonal, beta**2 * identity])  # E v'^2
    with_old = np.hstack([diagonal, beta * identity, zero])  # E w v'
    new_a = np.hstack([identity, zero, zero]) - 2 * eta * with_old + eta**2 * new_d
    new_c = with_old - eta * new_d
    return float(np.abs(np.linalg.eigvals(np.vstack([new_a, new_c, new_d]))).max())


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("batch_size", [1, 4, 64, 1000])
@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
def test_the_gaussian_limit_is_where_the_second_moment_map_reaches_one(spectrum: list[float], batch_size: int, beta: float) -> None:
    limit = gaussian_limit(spectrum, np.ones(len(spectrum)), batch_size, momentum=beta)
    # the radius is 1 at eta = 0, falls, and rises through 1 at the limit; near it it is a smooth function
    assert second_moment_radius(spectrum, 0.98 * limit, batch_size, beta) < 1
    crossing = brentq(lambda eta: second_moment_radius(spectrum, eta, batch_size, beta) - 1, 0.9 * limit, 1.1 * limit, xtol=1e-12)
    assert limit == pytest.approx(crossing, rel=1e-6)


def test_the_second_moment_map_of_the_test_is_that_of_simulated_steps() -> None:
    """One step of E[w^2] against a Monte Carlo mean; 200000 draws, spread of the mean about 0.5 %."""
    rng, lam, batch, eta = np.random.default_rng(0), np.array([2.0, 0.5]), 3, 0.4
    x = rng.standard_normal((200_000, batch, 2)) * np.sqrt(lam)
    start = np.array([1.0, -1.0])
    gradient = np.einsum("nbi,nbj,j->ni", x, x, start) / batch
    simulated = ((start - eta * gradient) ** 2).mean(axis=0)
    squared = np.diag(lam**2) * (1 + 1 / batch) + np.outer(lam, lam) / batch
    exact = (1 - 2 * eta * lam) * start**2 + eta**2 * squared @ start**2
    assert simulated == pytest.approx(exact, rel=0.03)


def test_counts_weigh_nodes_and_negative_ones_are_left_out() -> None:
    merged = gaussian_limit([3.0, 1.0, -2.0, 0.0], [1, 4, 7, 100], 5)
    assert merged == pytest.approx(gaussian_limit([3.0, 1.0, 1.0, 1.0, 1.0], np.ones(5), 5), rel=1e-9)
    assert gaussian_limit([-1.0, 0.0], [1, 1], 5) == math.inf


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_the_full_batch_limits_are_the_classical_ones(beta: float) -> None:
    assert gaussian_limit([4.0, 1.0], [1, 1], math.inf, momentum=beta) == pytest.approx(2 * (1 + beta) / 4)
    assert short_form(4.0, 9.0, math.inf, momentum=beta) == 2 * (1 + beta) / 4


@pytest.mark.parametrize("beta", [0.0, 0.9])
@pytest.mark.parametrize("spectrum", [SPECTRA["outlier"], SPECTRA["decaying"]])
def test_the_short_form_is_close_to_the_exact_limit(spectrum: list[float], beta: float) -> None:
    """2 (1 + beta) / (lam_1 + k tr H): within a factor of two everywhere, exact in both ends' leading order."""
    trace = sum(spectrum)
    for batch_size in (1, 8, 64, 512, 1e6):
        exact = gaussian_limit(spectrum, np.ones(len(spectrum)), batch_size, momentum=beta)
        assert 0.5 < short_form(spectrum[0], trace, batch_size, momentum=beta) / exact < 2
    assert short_form(spectrum[0], trace, 1e9, momentum=beta) == pytest.approx(2 * (1 + beta) / spectrum[0], rel=1e-6)
    small = short_form(spectrum[0], 1e6, 1, momentum=beta)
    assert small == pytest.approx(2 * (1 - beta) / 1e6, rel=1e-3), "noise dominates: 2 (1 - beta) B / noise"


def test_the_crossover_halves_the_full_batch_rate_and_momentum_moves_it() -> None:
    for beta in (0.0, 0.9):
        at = crossover_batch_size(2.0, 30.0, momentum=beta)
        assert short_form(2.0, 30.0, at, momentum=beta) == pytest.approx(0.5 * short_form(2.0, 30.0, math.inf, momentum=beta))
    assert crossover_batch_size(2.0, 30.0, momentum=0.9) / crossover_batch_size(2.0, 30.0) == pytest.approx(19)


def test_nothing_curved_has_no_limit() -> None:
    assert short_form(0.0, 0.0, 8) == math.inf
    assert short_form(-3.0, 0.0, 8) == math.inf
    assert crossover_batch_size(0.0, 5.0) == math.inf
    assert equal_norm_trace_limit(0.0, 0.0, 8) == math.inf


def interpolating_radius(inputs: np.ndarray, eta: float, batch_size: int) -> float:
    """Spectral radius of C -> E[(I - eta H_B) C (I - eta H_B)], samples drawn with replacement, on the span of the inputs."""
    count, dim = inputs.shape
    pieces = [np.outer(x, x) for x in inputs]
    mean = sum(pieces) / count
    identity = np.eye(dim)
    pair = sum(np.kron(h, h) for h in pieces) / count
    step = np.kron(identity, identity) - eta * (np.kron(mean, identity) + np.kron(identity, mean))
    step += eta**2 * (pair / batch_size + (1 - 1 / batch_size) * np.kron(mean, mean))
    return float(np.abs(np.linalg.eigvals(step)).max())


def equal_norm_inputs(kind: str) -> np.ndarray:
    """Rows of norm sqrt(3)."""
    if kind == "orthogonal":
        x = np.eye(5)
    else:
        x = np.random.default_rng(4).standard_normal((7, 4)) + (1.5 if kind == "correlated" else 0.0)
    return math.sqrt(3) * x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 50])
@pytest.mark.parametrize("kind", ["orthogonal", "random", "correlated"])
def test_below_the_equal_norm_trace_limit_an_interpolating_minimum_is_stable(kind: str, batch_size: int) -> None:
    """Where all curvatures are equal (orthogonal inputs), and at B = 1, it is exactly where stability ends; else stability ends later."""
    x = equal_norm_inputs(kind)
    values = np.linalg.eigvalsh(x.T @ x / len(x))
    limit = equal_norm_trace_limit(float(values[-1]), float(values.sum()), batch_size)
    assert interpolating_radius(x, 0.999 * limit, batch_size) < 1
    crossing = brentq(lambda eta: interpolating_radius(x, eta, batch_size) - 1, 0.99 * limit, 3 * limit)
    assert crossing <= 2 / values[-1] * (1 + 1e-6), "never beyond the full-batch limit"
    if kind == "orthogonal" or batch_size == 1:
        assert crossing == pytest.approx(limit, rel=1e-6)
    else:
        assert crossing > 1.005 * limit
