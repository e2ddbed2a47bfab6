"""Following the top eigenvalue of a changing matrix: within its stated error, cheaply, and not fooled by another one rising."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import sharpkit as sk
from sharpkit.linalg.tracking import EigenvalueTracker

N = 120


def orthogonal(seed: int = 0) -> Tensor:
    return torch.linalg.qr(torch.randn(N, N, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))).Q


def turned(angle: float) -> Tensor:
    """An orthogonal basis whose first ten vectors turn into the next ten."""
    Q = orthogonal()
    c, s = math.cos(angle), math.sin(angle)
    first, second = Q[:, :10].clone(), Q[:, 10:20].clone()
    Q[:, :10], Q[:, 10:20] = c * first + s * second, -s * first + c * second
    return Q


def bulk_with_outliers(outliers: list[float]) -> Tensor:
    spectrum = torch.linspace(-1, 1, N, dtype=torch.float64)
    spectrum[: len(outliers)] = torch.tensor(outliers, dtype=torch.float64)
    return spectrum


def moving(step: int, scale: float = 1.0, outliers: tuple[float, ...] = (10.0, 7.0, 5.0)) -> tuple[sk.SymmetricOperator, float]:
    spectrum = scale * bulk_with_outliers([x * (1 + 0.01 * step) for x in outliers])
    Q = turned(0.02 * step)
    return sk.as_operator((Q * spectrum) @ Q.T), float(spectrum.max())


@pytest.mark.parametrize("scale", [1e-7, 1.0, 1e7])
def test_a_turning_and_growing_top_pair_is_followed_within_the_stated_error(scale: float) -> None:
    tracker, products = EigenvalueTracker(tol=0.01), 0
    for step in range(40):
        matrix, truth = moving(step, scale)
        found = tracker.update(matrix)
        assert found.converged
        assert abs(found.value - truth) <= 0.01 * truth
        assert abs(found.value - truth) <= 1.01 * found.stderr + 1e-12 * truth
        products += found.num_matvecs if step else 0
    assert products <= 2 * 39, "a start turned by 1.1 degrees needs at most two products"


def test_products_are_counted_as_the_operator_counts_them() -> None:
    tracker = EigenvalueTracker(tol=0.01)
    for step in range(3):
        matrix, _ = moving(step)
        assert tracker.update(matrix).num_matvecs == matrix.num_matvecs


def test_an_eigenvalue_that_overtakes_the_one_followed_is_found() -> None:
    """Diagonal matrices: nothing of the other eigenvector ever enters the products of the one followed."""
    tracker = EigenvalueTracker(tol=0.01, check_every=8)
    spectrum = bulk_with_outliers([10.0])
    for _ in range(4):
        tracker.update(sk.as_operator(torch.diag(spectrum)))
    spectrum[50] = 15.0
    found = [tracker.update(sk.as_operator(torch.diag(spectrum))).value for _ in range(8)]
    assert found[-1] == pytest.approx(15.0, rel=0.01)


def test_a_short_budget_shows_as_a_wide_error_and_no_convergence() -> None:
    matrix, truth = moving(0, outliers=(10.0, 9.8, 9.5))
    found = EigenvalueTracker(tol=1e-6).update(matrix, max_matvecs=3)
    assert found.num_matvecs == 3
    assert not found.converged
    assert found.value <= truth + 1e-9, "Ritz values are lower bounds"
    assert found.stderr > 0.01 * truth


@pytest.mark.parametrize("spectrum", [[-3.0, -1.0], [0.0, 0.0], [2.0, 2.0]], ids=["negative", "zero", "identity"])
def test_degenerate_matrices_end(spectrum: list[float]) -> None:
    matrix = torch.diag(torch.tensor(spectrum * 10, dtype=torch.float64))
    tracker = EigenvalueTracker(tol=0.01)
    for _ in range(3):
        assert tracker.update(sk.as_operator(matrix)).value == pytest.approx(max(spectrum), abs=0.02)


def test_extrapolation_comes_only_after_it_has_held_and_stays_within_the_tolerance() -> None:
    tracker, skipped, worst = EigenvalueTracker(tol=0.01), 0, 0.0
    for step in range(60):
        matrix, truth = moving(step)
        found = tracker.extrapolate(step)
        if found is None:
            found = tracker.update(matrix, step=step)
        else:
            skipped += 1
            assert found.num_matvecs == 0 and found.stderr == pytest.approx(0.01 * found.value)
        worst = max(worst, abs(found.value / truth - 1))
    assert skipped > 20
    assert worst < 0.01
    jump, _ = moving(200)
    tracker.update(jump, step=61)
    assert tracker.extrapolate(62) is None, "after a jump nothing is extrapolated"


def test_values_that_jump_about_are_not_extrapolated_because_one_guess_was_right() -> None:
    scales = 1 + 0.04 * torch.randn(300, generator=torch.Generator().manual_seed(0)).double()
    spectrum = torch.cat([torch.linspace(0.0, 5.0, 30), torch.tensor([10.0])]).double()
    tracker, worst = EigenvalueTracker(tol=0.01), 0.0
    for step, scale in enumerate(scales.tolist()):
        found = tracker.extrapolate(step) or tracker.update(sk.as_operator(torch.diag(scale * spectrum)), step=step)
        worst = max(worst, abs(found.value / (10 * scale) - 1))
    assert worst < 0.01


def test_a_saved_tracker_goes_on_exactly() -> None:
    whole, first = EigenvalueTracker(seed=3), EigenvalueTracker(seed=3)
    expected = [whole.update(moving(step)[0], step=step).value for step in range(8)]
    for step in range(4):
        first.update(moving(step)[0], step=step)
    second = EigenvalueTracker(seed=3)
    second.load_state_dict(first.state_dict())
    assert [second.update(moving(step)[0], step=step).value for step in range(4, 8)] == expected[4:]
