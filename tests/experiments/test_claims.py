"""What the experiments on claims compute is what they say: against dense references, closed forms and the parts by themselves."""

from __future__ import annotations

import importlib
import math

import numpy as np
import pytest
import torch
from torch import nn

from experiments import claim_benign_oscillation as oscillation
from experiments import claim_double_descent as descent
from experiments import claim_ghost_batches as ghosts
from experiments import claim_trace_at_batch_one as batch_one
from experiments._common import interval
from experiments._models import FASHION_MNIST, mlp, seeded


def test_trace_and_sharpness_are_those_of_the_dense_hessian() -> None:
    x, y = batch_one.problem()
    x, y = x[:20, :6], y[:20]
    model = seeded(lambda: mlp((6, 5, 1)), 0)
    params = {name: p.detach() for name, p in model.named_parameters()}
    shapes = {name: p.shape for name, p in params.items()}

    def loss(flat: torch.Tensor) -> torch.Tensor:
        parts = flat.split([p.numel() for p in params.values()])
        named = {name: part.view(shapes[name]) for name, part in zip(params, parts, strict=True)}
        return (torch.func.functional_call(model, named, (x,)) - y).square().mean() / 2

    flat = torch.cat([p.reshape(-1) for p in params.values()])
    values = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, flat))
    seen = batch_one.look(model, x, y, rate=0.3, rtol=0.005)
    assert seen["trace"] == pytest.approx(0.3 * float(values.sum()), rel=0.02)
    assert seen["sharpness"] == pytest.approx(0.3 * float(values[-1]), rel=1e-3)
    assert seen["loss"] == pytest.approx(float(loss(flat)))


@pytest.mark.parametrize("count", [30, 100, 250])
def test_spectrum_ends_are_the_extreme_nonzero_eigenvalues_below_at_and_beyond_the_threshold(count: int) -> None:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(100, count, generator=generator, dtype=torch.float64)
    y = torch.randn(100, 1, generator=generator, dtype=torch.float64)
    largest, smallest, _ = descent.spectrum_ends(features, y)
    singular = np.linalg.svd(features.numpy(), compute_uv=False)
    assert largest == pytest.approx(singular[0] ** 2 / 100, rel=1e-4)
    assert smallest == pytest.approx(singular[-1] ** 2 / 100, rel=2e-3)


def test_fits_are_the_pseudo_inverses_and_the_ridges() -> None:
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(10, 25, generator=generator, dtype=torch.float64)
    y = torch.randn(10, 1, generator=generator, dtype=torch.float64)
    assert torch.allclose(descent.fitted(features, y, 0.0), torch.linalg.pinv(features) @ y)
    ridge = features.T @ torch.linalg.solve(features @ features.T + 10 * 0.3 * torch.eye(10, dtype=torch.float64), y)
    assert torch.allclose(descent.fitted(features, y, 0.3), ridge), "by the push-through identity"


def test_a_sample_of_the_feature_noise_model_has_its_features_where_it_says() -> None:
    x, y = oscillation.drawn(50, 10, torch.Generator().manual_seed(0))
    assert x.shape == (50, 3, oscillation.DIMENSION) and set(y.tolist()) == {-1.0, 1.0}
    assert torch.equal(x[:, 0, 0], oscillation.WEAK * y)
    assert torch.equal(x[10:, 1, 1], oscillation.STRONG * y[10:])
    assert (x[:10, 1, :2] == 0).all() and (x[:, 2, :2] == 0).all()
    assert float(x[:, 2].norm(dim=1).mean()) == pytest.approx(oscillation.NOISE * math.sqrt(oscillation.DIMENSION - 2), rel=0.05)


def test_what_a_feature_gives_is_the_filters_squared_answer() -> None:
    model = oscillation.Patches(torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.weight.zero_()
        model.weight[0, 0, 0] = 3.0  # one of ten filters of class +1 answers to y = +1 alone
        model.weight[1, :, 1] = -0.5  # all of class -1 to the strong feature of y = -1
    weak, strong = oscillation.shares(model)
    assert weak == pytest.approx(oscillation.WEAK**2 * 9 / 10 / 2)
    assert strong == pytest.approx((0.5 * oscillation.STRONG) ** 2 / 2)


def test_ghost_batch_norm_is_batch_norm_of_each_ghost_and_running_statistics_are_their_mean() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3 * ghosts.SMALL, 4, 5, 5, generator=generator)
    whole = ghosts.GhostBatchNorm2d(4)
    parts = [nn.BatchNorm2d(4) for _ in range(3)]
    with torch.no_grad():
        for norm in (whole, *parts):
            norm.weight.copy_(torch.tensor([1.0, 2.0, 0.5, -1.0]))
    out = whole(x)
    assert torch.allclose(out, torch.cat([norm(part) for norm, part in zip(parts, x.split(ghosts.SMALL), strict=True)]), atol=1e-5)
    for name in ("running_mean", "running_var"):
        assert torch.allclose(getattr(whole, name), torch.stack([getattr(norm, name) for norm in parts]).mean(dim=0), atol=1e-6)
    plain = nn.BatchNorm2d(4)
    plain.load_state_dict(whole.state_dict())
    assert torch.equal(whole.eval()(x), plain.eval()(x))


def test_networks_with_and_without_ghosts_start_alike() -> None:
    plain, ghost = (ghosts.network(7, ghosts=flag) for flag in (False, True))
    assert any(isinstance(m, ghosts.GhostBatchNorm2d) for m in ghost.modules())
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), ghost.parameters(), strict=True))


def test_the_interval_of_the_tables_is_students() -> None:
    from scipy import stats

    values = [1.0, 1.5, 0.7, 2.0]
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    mean, half = interval(values)
    assert (mean - half, mean + half) == pytest.approx((low, high))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trace_at_batch_one", "double_descent", "benign_oscillation", "ghost_batches", "refined_schedule"])
def test_the_quick_version_runs_and_its_figure_is_drawn(name: str) -> None:
    from matplotlib.figure import Figure

    if name in ("ghost_batches", "refined_schedule") and not FASHION_MNIST.is_dir():
        pytest.skip(f"needs {FASHION_MNIST}")  # images of a Debian package, which a machine need not have
    experiment = importlib.import_module(f"experiments.claim_{name}")
    rows = experiment.measure(True)
    canvas = Figure()
    experiment.draw(rows, canvas)
    assert rows and canvas.axes
