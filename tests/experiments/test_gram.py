"""Gram resampling: exact on every subset, and its interval tells the truth about fresh batches."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sharpkit as sk
from experiments import _gram as gram_module
from experiments._gram import gram_resampling
from sharpkit.objective.samples import SamplePool


def _network(kind: str, samples: int, *, classes: int = 3) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A float64 network after some steps of training, so that outputs are neither uniform nor certain."""
    g = torch.Generator().manual_seed(4)
    x = torch.randn(samples, 1, 6, 6, generator=g, dtype=torch.float64)
    y = (x.flatten(1) @ torch.randn(36, classes, generator=g, dtype=torch.float64) / 6 + torch.randn(samples, classes, generator=g)).argmax(
        1
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = {
            "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Tanh(), nn.Linear(8, classes)),
            "relu": lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, classes)),
            "conv": lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, classes)),
        }[kind]().double()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model, x, y


def _top(objective: sk.Objective) -> float:
    return float(np.linalg.eigvalsh(sk.GaussNewtonOperator(objective).to_dense().numpy())[-1])


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_every_subset_has_the_gauss_newton_eigenvalue(kind: str) -> None:
    model, x, y = _network(kind, 24)
    gram = gram_resampling(sk.Objective(model, (x, y), loss=F.cross_entropy))
    for chosen in ([0], [3, 7, 11], list(range(24))):
        expected = _top(sk.Objective(model, (x[chosen], y[chosen]), loss=F.cross_entropy))
        assert gram.of_subset(np.array(chosen)) == pytest.approx(expected, rel=1e-9)
    assert float(gram.lambda_max(24)) == pytest.approx(_top(sk.Objective(model, (x, y), loss=F.cross_entropy)), rel=1e-9)


def test_squared_error_with_several_outputs_and_batches_cut_otherwise() -> None:
    """A mean over samples and outputs; two batches make the same pool as one."""
    model, x, _ = _network("mlp", 12)
    target = torch.randn(12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one = sk.Objective(model, (x, target), loss=F.mse_loss)
    two = sk.Objective(model, [(x[:5], target[:5]), (x[5:], target[5:])], loss=F.mse_loss)
    assert gram_resampling(two).of_subset(np.arange(12)) == pytest.approx(_top(one), rel=1e-9)


def test_samples_classified_with_certainty_in_float32() -> None:
    """Their output Hessian is rounding: neither a refusal nor a contribution."""
    model, x, y = _network("mlp", 16)
    with torch.no_grad():
        model[-1].weight.mul_(40)
    objective = sk.Objective(model.float(), (x.float(), y), loss=F.cross_entropy)
    assert gram_resampling(objective).of_subset(np.arange(16)) == pytest.approx(_top(objective), rel=1e-4)


def test_a_part_of_the_parameters() -> None:
    model, x, y = _network("mlp", 16)
    objective = sk.Objective(model, (x, y), loss=F.cross_entropy, params="3.*")
    assert float(gram_resampling(objective).lambda_max(16)) == pytest.approx(_top(objective), rel=1e-9)


@pytest.mark.slow
def test_the_interval_covers_the_mean_over_fresh_batches() -> None:
    """In at least 90 % of (network, B), the pool being a third of the data; fresh batches come from all of it."""
    inside = []
    for kind in ("mlp", "relu", "conv"):
        model, x, y = _network(kind, 900)
        objective = sk.Objective(model, (x, y), loss=F.cross_entropy)
        gram = gram_resampling(objective, max_samples=300, seed=1)
        for size in (2, 4, 8, 16, 32, 64, 128):
            fresh = SamplePool(objective).draws(size, generator=torch.Generator().manual_seed(99))
            mean = np.mean([_lanczos_top(batch) for _, batch in zip(range(40), fresh, strict=False)])
            bound = gram.lambda_max(size)
            inside.append(bound.lower <= mean <= bound.upper)
    assert np.mean(inside) >= 0.9, inside


def _lanczos_top(batch: sk.Objective) -> float:
    return float(sk.eigenpairs(sk.GaussNewtonOperator(batch), k=1, tol=1e-4).values[0])


def test_draws_quantiles_and_seeds() -> None:
    model, x, y = _network("mlp", 40)
    objective = sk.Objective(model, (x, y), loss=F.cross_entropy)
    gram, again = gram_resampling(objective, seed=2), gram_resampling(objective, seed=2)
    assert np.array_equal(gram.draws(8), again.draws(8)) and len(gram.draws(8)) == 30 and len(gram.draws(40)) == 1
    low, middle, high = gram.quantiles(8, [0.1, 0.5, 0.9])
    assert low < middle < high
    means = [float(gram.lambda_max(b)) for b in (1, 4, 16, 40)]
    assert means == sorted(means, reverse=True), "smaller batches are sharper on average"
    with pytest.raises(ValueError, match="40 samples"):
        gram.draws(41)


def test_the_pool_shrinks_to_the_memory_there_is(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    model, x, y = _network("mlp", 64)
    objective = sk.Objective(model, (x, y), loss=F.cross_entropy)
    rows = gram_module._bytes(32 * 3, objective.num_parameters, 8)
    monkeypatch.setattr(gram_module, "available_memory", lambda device: rows / gram_module._MEMORY_SHARE)
    with caplog.at_level(logging.INFO, logger="experiments"):
        assert 24 <= gram_resampling(objective).num_samples <= 32
    assert "samples of 3 outputs" in caplog.text
    monkeypatch.setattr(gram_module, "available_memory", lambda device: 1000.0)
    with pytest.raises(MemoryError, match="params="):
        gram_resampling(objective)


def test_what_it_cannot_do_is_refused() -> None:
    model, x, y = _network("mlp", 16)
    with pytest.raises(sk.ObjectiveError, match="loss="):
        gram_resampling(sk.Objective(model, (x, y), closure=lambda m, b: F.cross_entropy(m(b[0]), b[1])))
    with pytest.raises(sk.ObjectiveError, match="sum"):
        gram_resampling(sk.Objective(model, (x, y), loss=nn.CrossEntropyLoss(reduction="sum")))
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 9.0], dtype=torch.float64))
    with pytest.raises(sk.ObjectiveError, match="count alike"):
        gram_resampling(sk.Objective(model, (x, y), loss=weighted))
    with pytest.raises(sk.ObjectiveError, match="shape"):
        gram_resampling(sk.Objective(nn.Conv2d(1, 3, 1).double(), (x, torch.zeros(16, 6, 6, dtype=torch.long)), loss=F.cross_entropy))
    with pytest.raises(sk.ObjectiveError, match="not convex"):
        gram_resampling(sk.Objective(model, (x, y), loss=lambda z, t: -F.cross_entropy(z, t)))
    with pytest.raises(ValueError, match="at least 2"):
        gram_resampling(sk.Objective(model, (x, y), loss=F.cross_entropy), max_samples=1)
