"""The sharpness bracket holds the full-data value, from a part of the data, as often as it says."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from problems import built, gaussian
from torch import nn
from torch.nn import functional as F
from traces import untouched

import sharpkit as sk
from sharpkit.batch_size.bracket import _BracketWork
from sharpkit.objective.samples import SamplePool


def least_squares(variances: list[float], samples: int, *, seed: int = 0, loss: Any = F.mse_loss) -> tuple[sk.Objective, float]:
    """Hessian 2 X^T X / N of Gaussian inputs, and its top eigenvalue."""
    x = gaussian(samples, len(variances), seed=seed) * torch.tensor(variances, dtype=torch.float64).sqrt()
    model = built(lambda: nn.Linear(len(variances), 1, bias=False))
    top = float(torch.linalg.eigvalsh(2 * x.T @ x)[-1])
    objective = sk.Objective(model, (x, gaussian(samples, 1, seed=seed + 1)), loss=loss)
    return objective, top / samples if objective.reduction == "mean" else top


DECAYING = [4.0, 2.5, 2.0, 1.0, 0.5, 0.3, 0.2, 0.1]


@pytest.mark.slow
def test_the_bounds_hold_and_the_samples_are_few() -> None:
    """95 % intended; fewer than 17 of 20 would come with a probability of 2 % at 95 %."""
    objective, truth = least_squares(DECAYING, 2000)
    with untouched(objective.model):
        found = [sk.sharpness_bracket(objective, rtol=0.8, start=128, k=3, seed=seed) for seed in range(20)]
    assert sum(f.lower <= truth <= f.upper for f in found) >= 17
    assert all(f.converged for f in found)
    assert np.mean([f.num_samples for f in found]) < 700
    assert all(f.upper - f.lower <= 0.8 * f.midpoint for f in found)


def test_directions_judged_on_other_samples_read_too_low_not_too_high_even_where_all_are_alike() -> None:
    """With equal population eigenvalues a subspace judged by the samples that choose within it would read above lambda_max."""
    objective, _ = least_squares([1.0] * 5, 20_000)
    expected = 2.0  # of the population
    work = _BracketWork(SamplePool(objective), 5, seed=0)
    span = torch.eye(5, dtype=torch.float64)
    order = torch.randperm(20_000, generator=torch.Generator().manual_seed(1))
    held_out, naive = [], []
    for chunk in order.split(128)[:40]:
        quarters = [[work.pool.objective(part) for part in half.tensor_split(4)] for half in chunk.tensor_split(2)]
        held_out.append(work._held_out(quarters, span).mean())
        naive.append(float(torch.linalg.eigvalsh(sk.HessianOperator(work.pool.objective(chunk)).to_dense())[-1]))
    error = np.std(held_out) / math.sqrt(len(held_out))
    assert abs(np.mean(held_out) - expected) < 4 * error < 0.2 * expected
    assert np.mean(naive) > 1.2 * expected


def test_equal_samples_need_no_more_than_the_first() -> None:
    model = built(lambda: nn.Linear(1, 1, bias=False))
    x = torch.full((400, 1), 3.0, dtype=torch.float64)
    found = sk.sharpness_bracket(sk.Objective(model, (x, 0 * x), loss=F.mse_loss), start=64)
    assert (found.lower, found.upper) == pytest.approx((18.0, 18.0))
    assert found.num_samples == 64 and found.pool_size == 400 and len(found.history) == 1
    assert str(found) == "18 to 18 from 64 of 400 samples"


def test_asked_for_more_than_a_part_can_tell_it_computes_the_whole() -> None:
    objective, truth = least_squares(DECAYING, 500)
    seen: list[sk.Progress] = []
    found = sk.sharpness_bracket(objective, rtol=0.01, start=64, callback=seen.append)
    assert [n for n, _, _ in found.history] == [64, 128, 256, 500]
    assert found.converged and found.num_samples == 500
    assert found.lower <= truth <= found.upper
    assert found.midpoint == pytest.approx(truth, rel=2e-3)
    assert len(seen) == 4 and seen[-1].num_matvecs == found.num_matvecs and "from 500 samples" in seen[-1].stage
    assert found.to_dict()["history"][-1] == [500, found.lower, found.upper]
    assert found.sample_gradients > 0


def test_a_limit_on_samples_is_kept_and_said() -> None:
    objective, truth = least_squares(DECAYING, 500)
    found = sk.sharpness_bracket(objective, rtol=0.01, start=64, max_samples=100)
    assert [n for n, _, _ in found.history] == [64, 100] and not found.converged
    assert "not as narrow as asked" in str(found)
    assert found.lower < truth < found.upper


def test_bounds_draw_together_as_samples_grow() -> None:
    objective, _ = least_squares(DECAYING, 4000)
    history = sk.sharpness_bracket(objective, rtol=1e-6, start=128, max_samples=1024, k=3).history
    widths = [upper - lower for _, lower, upper in history]
    assert widths[-1] < 0.5 * widths[0]


def test_a_summed_loss_is_bounded_as_the_sum_over_all_samples() -> None:
    objective, truth = least_squares(DECAYING, 1000, loss=nn.MSELoss(reduction="sum"))
    found = sk.sharpness_bracket(objective, rtol=0.8, start=128, k=3)
    assert found.num_samples < 1000
    assert found.lower <= truth <= found.upper


def test_the_seed_is_all_the_randomness() -> None:
    objective, _ = least_squares(DECAYING, 400)
    a, b, c = (sk.sharpness_bracket(objective, rtol=0.9, start=64, k=2, seed=seed).history for seed in (0, 0, 1))
    assert a == b != c


@pytest.mark.parametrize("wrong", [{"start": 8}, {"k": 0}, {"rtol": 0.0}, {"max_samples": 100}, {"rtol": math.nan}])
def test_arguments_are_checked(wrong: dict[str, Any]) -> None:
    objective, _ = least_squares([1.0, 0.5], 300)
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be a (whole number of at least|positive number)"):
        sk.sharpness_bracket(objective, **wrong)


def test_crossed_bounds_are_said_and_no_reason_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, truth = least_squares(DECAYING, 100)
    monkeypatch.setattr(_BracketWork, "bounds", lambda *_: (3.01, 3.0))
    with pytest.warns(sk.ConvergenceWarning, match=r"from 64 samples the bounds crossed \(3.01 below, 3 above\)"):
        found = sk.sharpness_bracket(objective, start=64)
    assert found.history[0] == (64, 3.0, 3.01)
    assert found.num_samples == 100 and found.lower <= truth <= found.upper
