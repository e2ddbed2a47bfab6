"""Noise scale, batch sharpness and batch size tests against problems whose gradient distribution is known, or small enough to exhaust."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import PROBLEMS, built, dense_hessian, flat, gaussian, sample_gradients
from torch import Tensor, nn
from torch.nn import functional as F
from traces import untouched

import sharpkit as sk
from sharpkit.batch_size.noise import _noise_and_signal

DIM = 4
H = torch.diag(torch.tensor([5.0, 2.0, 1.0, 0.2], dtype=torch.float64))
SIGMA = torch.tensor([0.5, 2.0, 1.0, 4.0], dtype=torch.float64)  # variances of the four entries
G = torch.tensor([1.0, -0.5, 0.8, 0.3], dtype=torch.float64)
SCALE = float(SIGMA.sum() / (G @ G))
CURVED_SCALE = float((H.diagonal() * SIGMA).sum() / (G @ H @ G))


def known(samples: int, seed: int) -> sk.Objective:
    """Per-sample gradients N(G, diag(SIGMA)), the same Hessian H in every sample."""
    model = built(lambda: nn.Linear(DIM, 1, bias=False), seed=3)
    a = gaussian(samples, DIM, seed=seed) * SIGMA.sqrt() + G - H @ model.weight.detach()[0]

    def closure(m: nn.Module, batch: Any) -> Tensor:
        w = m.weight[0]
        return 0.5 * w @ H @ w + (batch @ w).mean()

    return sk.Objective(model, a, closure=closure, count=len)


# -- the noise scale ------------------------------------------------------------------------------------------------------
def grams(repeats: int, groups: int, size: int, *, curved: bool = False) -> Iterator[Tensor]:
    """Gram matrices of independent group gradients, drawn directly."""
    for seed in range(repeats):
        g = gaussian(groups, DIM, seed=1000 + seed) * (SIGMA / size).sqrt() + G
        yield g @ (H if curved else torch.eye(DIM, dtype=torch.float64)) @ g.T


@pytest.mark.parametrize("curved", [False, True], ids=["plain", "with curvature"])
@pytest.mark.parametrize("size", [1, 8])
def test_trace_and_squared_norm_are_unbiased(size: int, curved: bool) -> None:
    found = np.array([[e.value for e in _noise_and_signal(gram, size)[:2]] for gram in grams(300, 16, size, curved=curved)])
    weights = H.diagonal() if curved else torch.ones(DIM, dtype=torch.float64)
    expected = [float((weights * SIGMA).sum()), float((weights * G * G).sum())]
    error = found.std(axis=0) / math.sqrt(len(found))
    assert np.all(np.abs(found.mean(axis=0) - expected) < 4 * error)
    assert np.all(error < 0.07 * np.abs(expected)), "precise enough to notice a wrong factor"


@pytest.mark.parametrize(("groups", "size"), [(64, 8), (24, 32)])
def test_jackknife_intervals_cover_the_truth(groups: int, size: int) -> None:
    """95 % intended; 400 draws, whose own spread is 1.1 %."""
    truth = [float(SIGMA.sum()), float(G @ G), SCALE]
    estimates = [_noise_and_signal(gram, size) for gram in grams(400, groups, size)]
    for place, expected in enumerate(truth):
        covered = np.mean([e[place].interval[0] <= expected <= e[place].interval[1] for e in estimates])
        assert 0.90 <= covered <= 0.99


def test_the_noise_scale_is_found_from_data_with_and_without_curvature() -> None:
    objective = known(4096, seed=5)
    with untouched(objective.model):
        noise = sk.gradient_noise_scale(objective, with_curvature=True)
    assert noise.num_groups == 64 and noise.group_size == 64
    assert noise.curvature_noise_scale is not None
    for estimate, expected in ((noise.noise_scale, SCALE), (noise.trace, float(SIGMA.sum())), (noise.curvature_noise_scale, CURVED_SCALE)):
        assert estimate.converged
        assert abs(estimate.value - expected) < 4 * estimate.stderr < 0.9 * expected
    assert noise.optimal_fraction(CURVED_SCALE) == pytest.approx(0.5, abs=0.1)
    assert noise.to_dict()["noise_scale"]["value"] == noise.noise_scale.value
    assert "samples" in repr(noise)


def test_single_samples_and_groups_agree_with_the_covariance_of_the_data() -> None:
    objective = known(128, seed=6)
    single = sk.gradient_noise_scale(objective, group_size=1, max_groups=128)
    weight = objective.model.weight.detach()[0]
    gradients = objective._source.data + H @ weight
    assert single.trace.value == pytest.approx(float(gradients.var(dim=0).sum()), rel=1e-10)
    mean = gradients.mean(dim=0)
    assert single.gradient_norm_squared.value == pytest.approx(float(mean @ mean - gradients.var(dim=0).sum() / 128), rel=1e-10)
    grouped = sk.gradient_noise_scale(objective, group_size=4)
    assert abs(grouped.trace.value - single.trace.value) < 4 * grouped.trace.stderr


@pytest.mark.parametrize("size", [1, 4, 16])
def test_the_noise_scale_of_ragged_token_means_does_not_depend_on_the_group_size(size: int) -> None:
    """The truth is that of the ratio sum s_i / sum n_i, s_i the token-summed gradient of a sequence of n_i tokens, linearised."""
    lengths = torch.randint(1, 17, (512,), generator=torch.Generator().manual_seed(0))
    x, keep = gaussian(512, 16, 3, seed=1) + 0.3, (torch.arange(16) < lengths[:, None]).double()
    y = (x.sum(-1) + 0.5 * gaussian(512, 16, seed=2)) * (1 + 0.2 * gaussian(512, 1, seed=3))
    model = built(lambda: nn.Linear(3, 1))

    def closure(m: nn.Module, b: Any) -> Tensor:
        return ((m(b["x"])[..., 0] - b["y"]).square() * b["keep"]).sum() / b["keep"].sum()

    objective = sk.Objective(model, {"x": x, "y": y, "keep": keep}, closure=closure, count=lambda b: float(b["keep"].sum()))
    off = 2 * (model(x)[..., 0] - y) * keep  # d/d output
    sums = torch.cat([(off[..., None] * x).sum(1), off.sum(1, keepdim=True)], 1).detach()  # (512, 4): weight and bias
    mean = sums.sum(0) / keep.sum()
    linear = (sums - mean * keep.sum(1, keepdim=True)) / keep.sum(1).mean()
    truth = float(linear.square().sum() / 511)
    noise = sk.gradient_noise_scale(objective, group_size=size, max_groups=512)
    assert abs(noise.trace.value - truth) < (1e-9 * truth if size == 1 else 3 * noise.trace.stderr)
    assert noise.trace.stderr < 0.35 * truth, "precise enough to notice the difference that lengths make"


def test_two_groupings_differ_and_the_same_seed_repeats() -> None:
    objective = known(200, seed=7)
    values = [sk.gradient_noise_scale(objective, group_size=10, seed=seed).trace.value for seed in (0, 0, 1)]
    assert values[0] == values[1] != values[2]


def test_a_zero_gradient_gives_no_number_for_the_scale() -> None:
    model = built(lambda: nn.Linear(DIM, 1, bias=False))
    still = sk.Objective(model, gaussian(32, DIM), closure=lambda m, b: 0.0 * m(b).mean(), count=len)
    noise = sk.gradient_noise_scale(still, group_size=4)
    assert noise.trace.value == 0
    assert math.isinf(noise.noise_scale.value) and math.isinf(noise.noise_scale.stderr) and not noise.noise_scale.converged


def test_gradients_that_are_not_finite_are_an_error() -> None:
    model = built(lambda: nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model.weight.zero_()
    broken = sk.Objective(model, gaussian(16, 2), closure=lambda m, b: m.weight.square().sum().sqrt() + 0 * b.mean(), count=len)
    for measure in (
        lambda: sk.gradient_noise_scale(broken, group_size=2),
        lambda: sk.batch_size_tests(broken),
        lambda: sk.batch_sharpness(broken, batch_size=4, max_batches=3),
        lambda: sk.gradient_noise_interaction(broken, batch_size=4),
        lambda: sk.directional_sharpness(broken, torch.optim.SGD(model.parameters(), lr=0.1)),
    ):
        with pytest.raises(sk.NonFiniteError, match=r"finite|NaN|squared norm"):
            measure()


def test_too_few_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="make 2 groups of 8"):
        sk.gradient_noise_scale(known(16, seed=1), group_size=8)


# -- tests of the batch size ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["mlp", "squared", "tied"])
def test_batch_size_tests_are_their_formulas_over_per_sample_gradients(name: str) -> None:
    """Also where samples count differently many tokens: each deviates from the mean as much as it shifts it."""
    problem = PROBLEMS[name]()
    counts = torch.tensor([problem.count(y) for _, y in problem.samples()], dtype=torch.float64)
    scaled = sample_gradients(problem)  # scaled so that their mean is the gradient
    shares = (counts / counts.mean())[:, None]
    mean = scaled.mean(dim=0)
    deviation = scaled - shares * mean
    b, squared = len(scaled), float(mean @ mean)
    along = deviation @ mean
    expected = {
        "norm": (float(deviation.square().sum()) / (b - 1) / b, 0.5**2 * squared),
        "inner product": (float(along.square().sum()) / (b - 1) / b, 0.25**2 * squared**2),
        "orthogonality": (float((deviation - torch.outer(along, mean) / squared).square().sum()) / (b - 1) / b, 3.0**2 * squared),
    }
    objective = sk.Objective(problem.model, problem.batches, loss=problem.loss)
    tests = sk.batch_size_tests(objective, norm=0.5, inner_product=0.25, orthogonality=3.0)
    assert [t.name for t in tests] == list(expected)
    for test in tests:
        statistic, bound = expected[test.name]
        assert test.statistic == pytest.approx(statistic, rel=1e-9)
        assert test.bound == pytest.approx(bound, rel=1e-9)
        assert test.passed == (statistic <= bound)
        needed = b if test.passed else math.ceil(statistic * b / bound - 1e-9)
        assert test.suggested_batch_size == needed
        assert ("large enough" in str(test)) == test.passed
        assert test.to_dict()["suggested_batch_size"] == needed


def test_the_norm_test_asks_for_the_noise_scale_over_the_threshold_squared() -> None:
    objective = known(200, seed=8)
    suggested = sk.batch_size_tests(objective, norm=0.05)[0].suggested_batch_size
    gradients = objective._source.data + H @ objective.model.weight.detach()[0]
    mean = gradients.mean(dim=0)
    assert suggested == math.ceil(float(gradients.var(dim=0).sum() / (mean @ mean)) / 0.05**2)


def test_a_batch_drawn_smaller_is_tested_as_such() -> None:
    objective = known(60, seed=9)
    found = sk.batch_size_tests(objective, batch_size=20)
    assert all(t.batch_size == 20 for t in found)
    for wrong in (1, 61, 0):
        with pytest.raises(ValueError, match="2 to 60 samples"):
            sk.batch_size_tests(objective, batch_size=wrong)
    with pytest.raises(ValueError, match="norm must be a positive number"):
        sk.batch_size_tests(objective, norm=0)


def test_where_the_gradient_vanishes_no_batch_is_large_enough() -> None:
    model = built(lambda: nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        model.weight.fill_(0.5)
    x, y = torch.ones(4, 1, dtype=torch.float64), torch.tensor([[0.0], [1.0], [0.0], [1.0]], dtype=torch.float64)
    test = sk.batch_size_tests(sk.Objective(model, (x, y), loss=F.mse_loss))[0]
    assert not test.passed and test.suggested_batch_size == 4
    assert "no batch size passes" in str(test)


# -- curvature along the steps -----------------------------------------------------------------------------------------------
def subset_pieces(problem: Any, chosen: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Gradient and dense Hessian of the loss averaged over what some samples count."""
    parts = [problem.samples()[i] for i in chosen]

    def value() -> Tensor:
        return sum(problem.unit(problem.model(x), y) for x, y in parts) / sum(problem.count(y) for _, y in parts)

    gradient = flat(torch.autograd.grad(value(), problem.params, allow_unused=True), problem.params)
    return gradient, dense_hessian(value, problem.params)


@pytest.mark.parametrize("momentum", [0.0, 0.8])
@pytest.mark.parametrize("name", [pytest.param("mlp", marks=pytest.mark.slow), "tied"])
def test_batch_sharpness_is_the_average_over_all_batches(name: str, momentum: float) -> None:
    problem = PROBLEMS[name]()
    objective = sk.Objective(problem.model, problem.batches, loss=problem.loss)
    optimizer = torch.optim.SGD(problem.params, lr=0.01, momentum=momentum)
    velocity = torch.zeros(objective.num_parameters, dtype=torch.float64)
    if momentum:
        start = objective.gradient()[1]  # a push that goes downhill in every batch keeps all ratios meaningful
        for p, v in zip(problem.params, objective.layout.split(start), strict=True):
            optimizer.state[p]["momentum_buffer"] = v.clone()
        velocity = momentum * start
    ratios = []
    for chosen in combinations(range(objective.num_samples), 3):
        g, hessian = subset_pieces(problem, chosen)
        s = g + velocity
        ratios.append(float(s @ hessian @ s / (s @ g)))
    with untouched(problem.model, optimizer=optimizer):
        found = sk.batch_sharpness(objective, batch_size=3, optimizer=optimizer, rtol=0.05, max_batches=2000)
    assert found.converged and found.stderr <= 0.05 * abs(found.value)
    assert abs(found.value - np.mean(ratios)) < 3.5 * found.stderr


@pytest.mark.parametrize("name", ["mlp", "squared", "tied", "weighted"])
def test_with_all_samples_it_is_the_curvature_along_the_gradient_from_one_batch(name: str) -> None:
    problem = PROBLEMS[name]()
    objective = sk.Objective(problem.model, problem.batches, loss=problem.loss)
    gradient, hessian = (
        flat(torch.autograd.grad(problem.value(), problem.params), problem.params),
        dense_hessian(problem.value, problem.params),
    )
    expected = float(gradient @ hessian @ gradient / (gradient @ gradient))
    found = sk.batch_sharpness(objective, batch_size=objective.num_samples)
    assert found.value == pytest.approx(expected, rel=1e-9)
    assert found.stderr == 0 and found.converged and found.num_matvecs == 1
    interaction = sk.gradient_noise_interaction(objective, batch_size=objective.num_samples)
    assert interaction.value == pytest.approx(expected, rel=1e-9)
    along = sk.directional_sharpness(objective, torch.optim.SGD(problem.params, lr=0.3))
    assert along == pytest.approx(expected, rel=1e-9)
    assert along <= float(torch.linalg.eigvalsh(hessian)[-1]) * (1 + 1e-9)


def test_the_noise_interaction_is_the_full_hessian_in_the_batch_gradients() -> None:
    objective = known(7, seed=11)
    gradients = objective._source.data + H @ objective.model.weight.detach()[0]
    mean, b = gradients.mean(dim=0), 3 / (1 - 3 / 7)
    centred = gradients - mean
    noise = float(torch.trace(H @ (centred.T @ centred) / 6)) / b
    expected = (float(mean @ H @ mean) + noise) / float(mean @ mean)
    found = sk.gradient_noise_interaction(objective, batch_size=3, rtol=0.04, max_batches=2000)
    assert found.converged
    assert abs(found.value - expected) < 3.5 * found.stderr
    assert sk.batch_sharpness(objective, batch_size=3, rtol=0.04).value < 0.9 * found.value, "the two are not the same quantity"


def test_directional_sharpness_follows_the_optimizers_own_step() -> None:
    objective = known(12, seed=12)
    weight = objective.model.weight
    optimizer = torch.optim.Adam([weight], lr=0.01, eps=1e-3)
    for _ in range(3):
        weight.grad = objective.gradient()[1].view_as(weight)
        optimizer.step()
    weight.grad = None
    with untouched(objective.model, optimizer=optimizer):
        found = sk.directional_sharpness(objective, optimizer)
    before, gradient = weight.detach().clone(), objective.gradient()[1]
    weight.grad = gradient.view_as(weight)
    optimizer.step()
    u = (before - weight.detach())[0] / 0.01
    assert found == pytest.approx(float(u @ H @ u / (u @ gradient)), rel=1e-9)


def test_not_reaching_the_tolerance_is_said() -> None:
    with pytest.warns(sk.ConvergenceWarning, match="25 batches of 1: not within 1e-06; raise max_batches"):
        found = sk.batch_sharpness(known(50, seed=13), batch_size=1, rtol=1e-6, max_batches=25)
    assert not found.converged and found.num_matvecs == 25


def test_batches_whose_ratio_means_nothing_are_left_out_and_counted() -> None:
    model = built(lambda: nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        model.weight.fill_(1.0)
    x = torch.tensor([[1.0], [0.0]], dtype=torch.float64).repeat(20, 1)  # every other sample has no gradient
    found = sk.batch_sharpness(sk.Objective(model, (x, torch.zeros_like(x)), loss=F.mse_loss), batch_size=1)
    assert found.value == pytest.approx(2.0)
    assert "left out" in found.method


def test_arguments_are_checked() -> None:
    objective = known(10, seed=1)
    with pytest.raises(TypeError, match=r"torch\.optim\.SGD, got Adam"):
        sk.batch_sharpness(objective, batch_size=2, optimizer=torch.optim.Adam(objective.model.parameters()))
    for wrong in (0, 11):
        with pytest.raises(ValueError, match="between 1 and the 10 samples"):
            sk.batch_sharpness(objective, batch_size=wrong)
        with pytest.raises(ValueError, match="between 1 and the 10 samples"):
            sk.gradient_noise_interaction(objective, batch_size=wrong)


@pytest.mark.parametrize("with_curvature", [False, True])
def test_the_noise_scale_is_the_same_with_little_memory_and_with_gradients_in_a_file(
    with_curvature: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sharpkit.objective.memory.used_memory", lambda device: 0.0)  # a test process breathes by more than these limits
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 60), nn.Tanh(), nn.Linear(60, 3))
    objective = sk.Objective(model, (torch.randn(256, 10), torch.randint(3, (256,))), loss=F.cross_entropy)
    vector = objective.num_parameters * 4
    plain = sk.gradient_noise_scale(objective, max_groups=32, with_curvature=with_curvature)
    for options in ({"offload": tmp_path}, {"offload": True}, {"memory_limit": 45.0 * vector}):
        made = sk.gradient_noise_scale(objective, max_groups=32, with_curvature=with_curvature, **options)
        for name in ("noise_scale", "trace", *(["curvature_noise_scale"] if with_curvature else [])):
            one, other = getattr(made, name), getattr(plain, name)
            assert one.value == pytest.approx(other.value, rel=1e-5) and one.stderr == pytest.approx(other.stderr, rel=1e-4)
    with pytest.raises(sk.OutOfMemoryError, match="a basis of 32 vectors"):
        sk.gradient_noise_scale(objective, max_groups=32, memory_limit=30.0 * vector)
