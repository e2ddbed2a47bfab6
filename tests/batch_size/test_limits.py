"""The mean-square limits of SGD and Adam over the batch size, against their closed forms on dense matrices of least squares."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sharpkit as sk
from sharpkit.batch_size.limits import crossover_batch_size, gradient_moments, limits_for, preconditioner, short_form
from sharpkit.batch_size.pilot import Ledger
from sharpkit.objective.samples import SamplePool
from sharpkit.optimizers import UpdateRule, update_rule


class LeastSquares:
    """mean_i (x_i . w - y_i)^2: the gradients and Hessians of all samples are known."""

    def __init__(self, samples: int) -> None:
        g = torch.Generator().manual_seed(0)
        self.x = torch.randn(samples, 4, generator=g, dtype=torch.float64) * torch.tensor([3.0, 1.0, 0.7, 0.5], dtype=torch.float64)
        self.y = torch.randn(samples, 1, generator=g, dtype=torch.float64)
        torch.manual_seed(0)
        self.model = nn.Linear(4, 1, bias=False).double()
        self.pool = SamplePool(sk.Objective(self.model, (self.x, self.y), loss=F.mse_loss))

    def gradients(self) -> Tensor:
        """(N, 4)."""
        return (2 * (self.x @ self.model.weight.T - self.y) * self.x).detach()

    def top_and_noise(self, diagonal: Tensor | None = None) -> tuple[float, float]:
        """lambda_max of D^-1/2 H D^-1/2, and E ||(h_i - H) v||^2 / lambda_max along its top eigenvector, unbiased."""
        root = torch.ones(4, dtype=torch.float64) if diagonal is None else diagonal.rsqrt()
        z = self.x * root
        each = 2 * z[:, :, None] * z[:, None, :]
        values, vectors = torch.linalg.eigh(each.mean(dim=0))
        deviations = (each - each.mean(dim=0)) @ vectors[:, -1]
        return float(values[-1]), float(deviations.square().sum() / (len(each) - 1) / values[-1])


def limit(top: float, noise: float, size: float, samples: int, beta: float, dampening: float) -> float:
    """2 (1 + beta) / (lambda + (1 + beta) / (1 - beta) noise / b) / (1 - dampening), b = B / (1 - B / N)."""
    inverse = (1 - size / samples) / size
    return 2 * (1 + beta) / (top + (1 + beta) / (1 - beta) * noise * inverse) / (1 - dampening)


@pytest.mark.parametrize(("beta", "dampening"), [(0.0, 0.0), (0.9, 0.0), (0.9, 0.5)])
def test_the_limits_of_sgd_are_the_short_form_on_the_full_hessian(beta: float, dampening: float) -> None:
    problem = LeastSquares(64)
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.1, momentum=beta, dampening=dampening)
    curvature, points = limits_for(problem.pool, optimizer, update_rule(optimizer), sizes=[2, 16, 64], seed=0, ledger=Ledger())
    top, noise = problem.top_and_noise()
    assert (curvature.lambda_max, curvature.noise) == (pytest.approx(top, rel=1e-3), pytest.approx(noise, rel=1e-2))
    assert [p.batch_size for p in curvature.direct] == [2, 16], "batches are measured up to a quarter of the data"
    sizes = [b for b, _ in points]
    assert len(sizes) == 24 and sizes == pytest.approx([2 * 32 ** (i / 23) for i in range(24)]), "24 sizes, evenly spread in log"
    assert [rate for _, rate in points] == pytest.approx([limit(top, noise, b, 64, beta, dampening) for b in sizes], rel=1e-2)


@pytest.mark.parametrize("betas", [(0.9, 0.999), pytest.param((0.5, 0.999), marks=pytest.mark.slow)])
def test_the_limits_of_adam_are_those_of_the_matrix_its_second_moment_makes_at_each_batch_size(betas: tuple[float, float]) -> None:
    """D = sqrt(g^2 + var / B) + eps; averaged momentum is a heavy ball whose rate is smaller by 1 - beta."""
    problem = LeastSquares(64)
    optimizer = torch.optim.Adam(problem.model.parameters(), lr=0.1, betas=betas, eps=0.3)
    ledger = Ledger()
    curvature, points = limits_for(problem.pool, optimizer, update_rule(optimizer), sizes=[2, 4, 10, 64], seed=0, ledger=ledger)
    gradients = problem.gradients()
    assert [b for b, _ in points] == [2.0, 10.0, 64.0], "at both ends and the size nearest to the middle, in log"
    for size, rate in points:
        diagonal = (gradients.mean(dim=0).square() + gradients.var(dim=0) / size).sqrt() + 0.3
        top, noise = problem.top_and_noise(diagonal)
        assert rate == pytest.approx(limit(top, noise, size, 64, betas[0], betas[0]), rel=0.02)
        if size == 2:
            assert curvature.lambda_max == pytest.approx(top, rel=1e-3)
    assert [p.batch_size for p in curvature.direct] == [2, 4, 10] and all(3 <= len(p.largest) <= 24 for p in curvature.direct)


@pytest.mark.parametrize(
    ("samples", "part"), [(100, 128), pytest.param(800, 200, marks=pytest.mark.slow), pytest.param(2400, 512, marks=pytest.mark.slow)]
)
def test_adams_limits_at_larger_sizes_rest_on_a_quarter_of_the_data_between_128_and_512_samples(samples: int, part: int) -> None:
    problem, asked = LeastSquares(samples), []

    class Watched(SamplePool):
        def limited(self, max_samples: int, *, seed: int = 0) -> SamplePool:
            asked.append(max_samples)
            return super().limited(max_samples, seed=seed)

    optimizer = torch.optim.Adam(problem.model.parameters(), lr=0.1)
    limits_for(Watched(problem.pool.parent), optimizer, update_rule(optimizer), sizes=[4, 8], seed=0, ledger=Ledger())
    assert asked[-1] == part


def test_the_size_of_directly_measured_batches_is_bounded_by_a_quarter_of_the_data() -> None:
    problem = LeastSquares(640)
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    for sizes, direct in (([2, 4, 8, 16, 32, 160, 161], [2, 8, 16, 32, 160]), ([256, 512], [256])):
        curvature, _ = limits_for(problem.pool, optimizer, update_rule(optimizer), sizes=sizes, seed=0, ledger=Ledger())
        assert [p.batch_size for p in curvature.direct] == direct


def test_without_curvature_the_rate_is_bounded_by_the_noise_alone() -> None:
    """Weights that no sample depends on: lambda_max is 0, and only a floor of 1e-12 keeps the rate finite."""
    problem = LeastSquares(64)
    problem.pool = SamplePool(sk.Objective(problem.model, (0 * problem.x, problem.y), loss=F.mse_loss))
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    _, points = limits_for(problem.pool, optimizer, update_rule(optimizer), sizes=[2, 64], seed=0, ledger=Ledger())
    assert all(rate == pytest.approx(2e12) for _, rate in points)


# -- moments of the gradient --------------------------------------------------------------------------------------------------
def test_the_moments_of_few_samples_are_exact() -> None:
    problem, ledger = LeastSquares(64), Ledger()
    mean, variance = gradient_moments(problem.pool, seed=0, ledger=ledger)
    torch.testing.assert_close(mean, problem.gradients().mean(dim=0))
    torch.testing.assert_close(variance, problem.gradients().var(dim=0))
    assert ledger.samples == 64 and mean.dtype == torch.float64


def test_the_moments_of_many_samples_come_from_64_groups_and_are_those_of_single_samples() -> None:
    problem, ledger = LeastSquares(640), Ledger()
    mean, variance = gradient_moments(problem.pool, seed=0, ledger=ledger)
    torch.testing.assert_close(mean, problem.gradients().mean(dim=0), msg="the groups take in all the data")
    # the variance of 64 groups is known to sqrt(2 / 63) = 18 %, over four coordinates to some 10 %
    assert float((variance / problem.gradients().var(dim=0)).mean()) == pytest.approx(1, abs=0.4)
    assert ledger.samples == 640
    other = gradient_moments(problem.pool, seed=1, ledger=ledger)[1]
    assert not torch.equal(other, variance) and ledger.samples == 1280


def test_the_preconditioner_divides_by_the_second_moment_and_epsilon() -> None:
    mean, variance = torch.tensor([3.0, 0.0]).double(), torch.tensor([64.0, 4.0]).double()
    M = torch.tensor([[8.0, 2.0], [2.0, 6.0]]).double()
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.ones(2, dtype=torch.float64))])
    optimizer = torch.optim.Adam(model.parameters(), eps=0.5)
    matrix = sk.HessianOperator(sk.Objective(model, torch.ones(1).double(), closure=lambda m, b: 0.5 * m[0] @ M @ m[0] * b.mean()))
    root = torch.tensor([5.5, 1.5]).double().sqrt()  # sqrt(9 + 64 / 4) + 0.5 and sqrt(4 / 4) + 0.5
    turned = preconditioner(mean, variance, 4, optimizer)(matrix)
    torch.testing.assert_close(turned.to_dense(), matrix.to_dense() / root[:, None] / root[None, :])
    with pytest.raises(ValueError, match="not finite"):
        preconditioner(mean * math.nan, variance, 4, optimizer)
    del optimizer.param_groups[0]["eps"]
    plain = preconditioner(mean, variance * 0, 4, optimizer)(matrix)
    assert float(plain.to_dense()[1, 1]) == pytest.approx(6.0 / 1e-8), "torch's own epsilon where the optimizer names none"


def test_the_preconditioner_takes_each_groups_own_epsilon_and_rate() -> None:
    mean, variance = torch.tensor([3.0, 0.0, 2.0]).double(), torch.tensor([64.0, 4.0, 0.0]).double()
    M = torch.tensor([[8.0, 2.0, 1.0], [2.0, 6.0, 0.5], [1.0, 0.5, 4.0]]).double()
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.ones(size, dtype=torch.float64)) for size in (2, 1)])
    groups = [{"params": [model[1]], "lr": 0.1, "eps": 3.0}, {"params": [model[0]], "lr": 0.2, "eps": 0.5}]
    closure = lambda m, b: 0.5 * torch.cat(list(m)) @ M @ torch.cat(list(m)) * b.mean()  # noqa: E731
    matrix = sk.HessianOperator(sk.Objective(model, torch.ones(1).double(), closure=closure))
    turned = preconditioner(mean, variance, 4, torch.optim.Adam(groups))(matrix)
    scale = torch.tensor([2 / 5.5, 2 / 1.5, 1 / 5.0]).double().sqrt()  # R over sqrt(v) + eps, R against the first group's rate
    torch.testing.assert_close(turned.to_dense(), matrix.to_dense() * scale[:, None] * scale)


# -- the short form -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
def test_the_short_form_in_closed_form(beta: float) -> None:
    k = (1 + beta) / (1 - beta)
    assert short_form(3.0, 10.0, 4.0, momentum=beta) == pytest.approx(2 * (1 + beta) / (3 + k * 10 / 4))
    assert short_form(3.0, 10.0, math.inf, momentum=beta) == pytest.approx(2 * (1 + beta) / 3)
    assert short_form(0.0, 10.0, 4.0, momentum=beta) == pytest.approx(2 * (1 - beta) * 4 / 10), "by the noise alone: linear in b"
    at = crossover_batch_size(3.0, 10.0, momentum=beta)
    assert at == pytest.approx(k * 10 / 3)
    assert short_form(3.0, 10.0, at, momentum=beta) == pytest.approx((1 + beta) / 3), "half of the full batch's"


def test_where_nothing_is_curved_no_rate_is_too_high() -> None:
    assert short_form(0.0, 0.0, 8) == math.inf and short_form(-3.0, 0.0, 8) == math.inf
    assert crossover_batch_size(0.0, 5.0) == math.inf and crossover_batch_size(-1.0, 5.0) == math.inf
    assert short_form(0.5, 0.0, 8) == 4.0 and crossover_batch_size(0.5, 1.0) == 2.0


def test_a_rule_without_an_optimizer_behind_it_will_do() -> None:
    problem = LeastSquares(64)
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    plain, damped = (
        limits_for(problem.pool, optimizer, UpdateRule(0.9, dampening), sizes=[2, 64], seed=0, ledger=Ledger())[1]
        for dampening in (0.0, 0.9)
    )
    assert [d / p for (_, p), (_, d) in zip(plain, damped, strict=True)] == pytest.approx([10.0] * 24)
