"""Following the top eigenvalue of a changing matrix: within its stated error, cheaply, and not fooled by another one rising."""

from __future__ import annotations

import copy
import math

import numpy as np
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


# -- the numbers of one update, in closed form on 2 x 2 matrices --------------------------------------------------------------
def diagonal(*entries: float) -> sk.SymmetricOperator:
    return sk.as_operator(torch.diag(torch.tensor(entries, dtype=torch.float64)))


def unit(angle: float) -> Tensor:
    return torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)


@pytest.mark.parametrize(
    ("second", "angle", "by"),
    [(0.5, 0.05, "gap"), (math.inf, 0.05, "residual"), (0.5, 0.75, "residual"), (0.9, 0.05, "gap"), (0.9, 0.2, "residual")],
)
def test_the_error_is_the_smaller_of_the_residual_and_its_square_over_the_gap(second: float, angle: float, by: str) -> None:
    """One product at the angle a from the top of diag(10, 4): theta = 10 c^2 + 4 s^2, r = 6 s c, gap = theta - second theta - r."""
    tracker = EigenvalueTracker(tol=1e-9, check_every=0, vector=unit(angle), second=second)
    found = tracker.update(diagonal(10.0, 4.0), max_matvecs=1)
    c, s = math.cos(angle), math.sin(angle)
    theta, residual = 10 * c * c + 4 * s * s, 6 * s * c
    gap = theta - second * theta - residual
    by_gap = residual**2 / gap if gap > 0 else math.inf
    assert (by_gap < residual) is (by == "gap"), "the case is the one it is named for"
    assert found.value == pytest.approx(theta)
    assert found.stderr == pytest.approx(min(residual, by_gap))
    assert 10 - theta <= found.stderr, "the top lies within the error"


@pytest.mark.parametrize("entries", [(-0.5, -0.8), (-3.0, -5.0)])
def test_of_a_matrix_without_positive_curvature_the_error_is_the_residual(entries: tuple[float, float]) -> None:
    a, b = entries
    tracker = EigenvalueTracker(tol=1e-9, check_every=0, vector=unit(0.3))
    found = tracker.update(diagonal(a, b), max_matvecs=1)
    c, s = math.cos(0.3), math.sin(0.3)
    assert found.stderr == pytest.approx((a - b) * s * c)
    assert float(tracker.vector @ unit(0.3)) == pytest.approx(float(tracker.vector.norm())), "a power step would lead to the other end"


@pytest.mark.parametrize(("entries", "angle"), [((10.0, 4.0), 0.3), ((1.0, -1.0), 0.7)], ids=["theta above r", "r above theta"])
def test_the_vector_kept_is_moved_along_its_residual(entries: tuple[float, float], angle: float) -> None:
    """x + r / max(theta, ||r||), which for theta above ||r|| is a power step A x / theta."""
    matrix, x = torch.tensor(entries, dtype=torch.float64), unit(angle)
    tracker = EigenvalueTracker(tol=1e-9, check_every=0, vector=x)
    tracker.update(diagonal(*entries), max_matvecs=1)
    theta = float(x @ (matrix * x))
    r = matrix * x - theta * x
    expected = x + r / max(theta, float(r.norm()))
    torch.testing.assert_close(tracker.vector / tracker.vector.norm(), expected / expected.norm())
    if theta > float(r.norm()):
        torch.testing.assert_close(expected, matrix * x / theta)


def test_the_second_eigenvalue_is_learned_from_long_runs_and_only_raised_by_short_ones() -> None:
    spectrum = torch.cat([torch.linspace(0, 1, 40), torch.tensor([8.0, 10.0])]).double()
    for products, shown in ((5, False), (6, True)):
        tracker = EigenvalueTracker(tol=1e-9, check_every=0)
        tracker.update(sk.as_operator(torch.diag(spectrum)), max_matvecs=products)
        assert math.isfinite(tracker.second) is shown, "six products show it"
    tracker = EigenvalueTracker(tol=1e-9, check_every=0)
    tracker.update(sk.as_operator(torch.diag(spectrum)), max_matvecs=12)
    assert tracker.second == pytest.approx(0.8, abs=1e-6)
    for entry, kept in ((8.0, 0.9), (9.5, 0.95)):
        tracker.second, tracker.vector = 0.9, torch.tensor([1.0, 0.0, 0.3, 0.3], dtype=torch.float64)
        tracker.update(diagonal(10.0, 0.1, entry, entry), max_matvecs=2)  # two products end in its span of two vectors
        assert tracker.second == pytest.approx(kept, abs=1e-6)
    spectrum[-2] = 2.0
    tracker = EigenvalueTracker(tol=1e-9, check_every=0)
    tracker.update(sk.as_operator(torch.diag(spectrum)))
    assert tracker.second == 0.5, "never taken to be below half"
    tracker.update(diagonal(10.0, 8.0), max_matvecs=1)
    assert math.isinf(tracker.second), "of a matrix of another size nothing is known"


def test_the_second_eigenvalue_of_the_run_itself_sets_the_gap() -> None:
    """Two products from v: the Ritz pairs of diag(10, 8, 1) on the span of v and A v, whose second lies nearer than the one remembered."""
    matrix, v = np.diag([10.0, 8.0, 1.0]), np.array([1.0, 0.5, 0.05])
    tracker = EigenvalueTracker(tol=1e-9, check_every=0, vector=torch.from_numpy(v), second=0.5)
    found = tracker.update(diagonal(10.0, 8.0, 1.0), max_matvecs=2)
    basis, _ = np.linalg.qr(np.stack([v, matrix @ v], axis=1))
    values, coordinates = np.linalg.eigh(basis.T @ matrix @ basis)
    top = basis @ coordinates[:, -1]
    residual = np.linalg.norm(matrix @ top - values[-1] * top)
    assert 0.5 < values[0] / values[-1] < 0.9
    assert found.value == pytest.approx(values[-1]) and found.stderr == pytest.approx(residual**2 / (values[-1] - values[0] - residual))


def test_a_cold_start_wants_two_looks_in_a_row_within_the_tolerance() -> None:
    spectrum = torch.cat([torch.linspace(-1, 1, 60), torch.tensor([10.0])]).double()

    def cold(allowed: int | None) -> sk.Estimate:
        return EigenvalueTracker(tol=0.01).update(sk.as_operator(torch.diag(spectrum)), max_matvecs=allowed)

    made = cold(None).num_matvecs
    assert made > 3
    assert cold(made - 1).converged and not cold(made - 2).converged


# -- how many products an update makes ----------------------------------------------------------------------------------------
HARD = torch.linspace(0.9, 1.0, 200, dtype=torch.float64)


def counts(updates: int, spectrum: Tensor = HARD, **settings: float) -> list[int]:
    tracker = EigenvalueTracker(**settings)  # type: ignore[arg-type]
    return [tracker.update(sk.as_operator(torch.diag(spectrum))).num_matvecs for _ in range(updates)]


def test_updates_that_do_not_converge_make_the_products_allowed() -> None:
    assert counts(2, tol=1e-12) == [24, 8]
    assert counts(6, tol=1e-12, cold_matvecs=7, max_matvecs=3, check_every=3) == [7, 3, 7, 3, 3, 7], "every third looks for another top"
    assert counts(4, tol=1e-12, cold_matvecs=7, max_matvecs=3, check_every=0) == [7, 3, 3, 3]
    for updates, products in ((30, 8), (31, 24), (32, 8), (63, 24)):
        tracker = EigenvalueTracker(tol=1e-12, vector=torch.ones(200, dtype=torch.float64), updates=updates)
        assert tracker.update(sk.as_operator(torch.diag(HARD))).num_matvecs == products, "by default every 32nd looks for another top"
    tracker = EigenvalueTracker(tol=1e-12)
    matrix = sk.as_operator(torch.diag(HARD))
    assert [tracker.update(matrix, max_matvecs=limit).num_matvecs for limit in (5, 0, 6, 100)] == [5, 1, 6, 8]


def test_converged_updates_stop_at_two_products_cold_one_warm_and_ten_searching() -> None:
    assert counts(5, tol=0.9, check_every=4) == [2, 1, 1, 10, 1]


@pytest.mark.parametrize(("moved", "products"), [(-0.052, 2), (-0.048, 1), (0.048, 1), (0.052, 2)])
def test_after_a_move_of_more_than_five_tolerances_one_look_is_not_enough(moved: float, products: int) -> None:
    tracker = EigenvalueTracker(tol=0.01, check_every=0, vector=torch.tensor([1.0, 0.003, 0.003, 0.003], dtype=torch.float64))
    tracker.points = [(0, 10.0)]
    made = tracker.update(diagonal(10.0 / (1 - moved), 3.0, 2.0, 1.0), step=1)
    assert made.num_matvecs == products and made.converged


def test_with_one_product_even_a_search_keeps_to_the_vector_followed() -> None:
    spectrum = torch.cat([torch.linspace(-1, 1, 60), torch.tensor([10.0])]).double()
    tracker = EigenvalueTracker(tol=0.01, check_every=2)
    matrix = sk.as_operator(torch.diag(spectrum))
    tracker.update(matrix)
    assert tracker.update(matrix, max_matvecs=1).value == pytest.approx(10.0, rel=0.01)


def test_the_tolerance_is_one_in_a_hundred_unless_asked_otherwise() -> None:
    assert counts(3, tol=0.01) == counts(3) != counts(3, tol=0.001)


def test_an_update_says_how_it_was_made() -> None:
    tracker = EigenvalueTracker(tol=0.5)
    first, second = (tracker.update(diagonal(10.0, 4.0, 1.0)) for _ in range(2))
    assert (first.method, second.method) == ("Lanczos", "Lanczos from the last vector")
    assert first.seconds >= 0 and tracker.updates == 2 and not tracker.points, "without a step nothing is kept to extrapolate from"


# -- extrapolation ------------------------------------------------------------------------------------------------------------
def followed(values: list[float], *, tol: float = 0.01) -> EigenvalueTracker:
    """A tracker that has seen these values at the steps 0, 1, 2, ..."""
    tracker = EigenvalueTracker(tol=tol)
    for step, value in enumerate(values):
        tracker.update(diagonal(value, 1.0), step=step)
    return tracker


def reach(tracker: EigenvalueTracker) -> int:
    """How many steps ahead it extrapolates."""
    last = tracker.points[-1][0]
    return sum(tracker.extrapolate(last + ahead) is not None for ahead in range(-1, 20))


def test_three_guesses_in_a_row_earn_one_step_and_each_further_one_another_up_to_four() -> None:
    line = [10 + 0.1 * step for step in range(12)]
    assert [reach(followed(line[:n])) for n in range(1, 12)] == [0, 0, 0, 0, 1, 2, 3, 4, 4, 4, 4]
    tracker = followed(line[:8])
    for ahead in (1, 4):
        guess = tracker.extrapolate(7 + ahead)
        assert guess is not None and guess.value == pytest.approx(10 + 0.1 * (7 + ahead))
        assert guess.stderr == pytest.approx(0.01 * guess.value) and guess.converged and guess.num_matvecs == 0 and guess.seconds == 0
    assert tracker.extrapolate(7) is None and tracker.extrapolate(6) is None and tracker.extrapolate(12) is None


@pytest.mark.parametrize(("off", "left"), [(0.004, 4), (-0.004, 4), (0.007, 1), (-0.007, 1), (0.013, 0), (-0.013, 0)])
def test_a_guess_off_by_more_than_half_the_tolerance_costs_half_the_trust_and_beyond_the_tolerance_all(off: float, left: int) -> None:
    assert reach(followed([10.0] * 10 + [10.0 / (1 - off)])) == left


def test_an_update_that_did_not_converge_earns_nothing() -> None:
    tracker = followed([10.0] * 10)
    tracker.vector = torch.tensor([1.0, 1.0], dtype=torch.float64)
    tracker.second = math.inf
    assert not tracker.update(diagonal(10.0, 1.0), step=10, max_matvecs=1).converged
    assert reach(tracker) == 0 and tracker.hits == 0


def test_steps_need_not_be_one_apart_but_must_grow() -> None:
    tracker = EigenvalueTracker(tol=0.01)
    for step in (0, 5, 20, 30, 32, 34):
        tracker.update(diagonal(100.0 + step, 1.0), step=step)
    guess = tracker.extrapolate(36)
    assert guess is not None and guess.value == pytest.approx(136.0)
    tracker.update(diagonal(140.0, 1.0), step=34)
    assert tracker.extrapolate(35) is None, "two values of one step give no line"


def test_a_saved_state_holds_all_that_the_next_update_depends_on() -> None:
    tracker = followed([10 + 0.1 * step for step in range(8)])
    tracker.second = 0.7
    other = EigenvalueTracker(tol=0.01)
    other.load_state_dict(tracker.state_dict())
    assert (other.second, other.updates, other.hits, other.points) == (0.7, 8, tracker.hits, tracker.points)
    assert torch.equal(other.vector, tracker.vector) and reach(other) == 4
    assert [step for step, _ in other.points] == [5, 6, 7], "three are kept"


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_the_error_in_half_precision_holds_its_rounding(half: torch.dtype) -> None:
    """Against float64, along training."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(128, 16, generator=g), torch.randint(0, 4, (128,), generator=g)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.ReLU(), torch.nn.Linear(24, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(121):
        loss = torch.nn.functional.cross_entropy(model(x), y)
        if step % 30 == 0:
            setting = {"loss": torch.nn.functional.cross_entropy}
            exact = copy.deepcopy(model).double()
            right = float(sk.eigenpairs(sk.HessianOperator(sk.Objective(exact, (x.double(), y), **setting)), k=1, tol=1e-8).values[0])
            rough = sk.HessianOperator(sk.Objective(model, (x, y), autocast=half, **setting))
            followed, pairs = EigenvalueTracker(tol=0.02).update(rough), sk.eigenpairs(rough, k=1, tol=0.02)
            assert abs(followed.value - right) < 2 * followed.stderr < 0.1 * right
            assert abs(float(pairs.values[0]) - right) < 2 * float(pairs.residuals[0]) < 0.1 * right
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_a_tolerance_below_the_rounding_of_half_precision_is_said_to_be_out_of_reach() -> None:
    model, data = torch.nn.Linear(3, 1), (torch.randn(8, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(8, 1))
    for autocast, reached in ((None, True), (torch.bfloat16, False)):
        hessian = sk.HessianOperator(sk.Objective(model, data, loss=torch.nn.functional.mse_loss, autocast=autocast))
        assert bool(sk.eigenpairs(hessian, k=1, tol=1e-4).converged[0]) is reached
