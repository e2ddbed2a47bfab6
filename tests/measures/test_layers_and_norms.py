"""Layers, the whole spectrum and norms of the weights: closed forms on a quadratic and on logistic regression."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from problems_measures import KINDS, Regression
from torch import nn
from torch.nn import functional as F

import sharpkit as sk
from sharpkit import measures


# -- layers ---------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_layers_have_their_blocks_curvature_and_rises(kind: str) -> None:
    problem = Regression(kind)
    found = measures.layer_sensitivity(problem.objective, bits=[2, 4], tol=1e-8, trace_rtol=1e-8)  # below the 1e-6 that it is held to
    H, g, w = problem.hessian(), problem.gradient(), problem.w
    values = torch.linalg.eigvalsh(H)
    assert found.lambda_max[0].value == pytest.approx(float(values[-1]), rel=1e-6)
    assert found.lambda_min[0].value == pytest.approx(float(values[0]), rel=1e-6)
    assert found.trace[0].value == pytest.approx(float(values.sum()), rel=1e-6)
    assert found.condition_number[0] == pytest.approx(float(values[-1] / values[0]), rel=1e-6)
    assert found.peakedness[0] == pytest.approx(float(values[-1] / values.mean()), rel=1e-6)
    for j, bits in enumerate((2, 4)):
        step = w.abs().max() / (2 ** (bits - 1) - 1)
        d = (w / step).round() * step - w
        assert found.rounding_error[0][j] == pytest.approx(float(d @ d), rel=1e-9)
        assert found.slope[0][j] == pytest.approx(float(g @ d), rel=1e-9)
        assert found.predicted[0][j] == pytest.approx(float(values.mean() * (d @ d) / 2), rel=1e-6)
        assert found.quadratic[0][j] == pytest.approx(float(g @ d + d @ H @ d / 2), rel=1e-6)
        assert found.measured is not None
        assert found.measured[0][j] == pytest.approx(float((problem.losses(w + d) - problem.losses(w)).mean()), rel=1e-6)
    if kind == "quadratic":
        assert found.quadratic[0] == pytest.approx(found.measured[0], rel=1e-6)  # type: ignore[index]


def test_rounding_by_channels_and_by_a_function_of_ones_own() -> None:
    w = torch.tensor([[1.0, 0.3], [0.1, 0.04]])
    assert measures.round_weights(w, 2, per_channel=True).flatten().tolist() == pytest.approx([1.0, 0.0, 0.1, 0.0])
    problem = Regression("quadratic")
    found = measures.layer_sensitivity(problem.objective, bits=[3], rounding=lambda weights, bits: weights * 0)
    assert found.rounding_error[0][0] == pytest.approx(float(problem.w @ problem.w), rel=1e-9)
    with pytest.raises(ValueError, match="shape"):
        measures.layer_sensitivity(problem.objective, bits=[3], rounding=lambda weights, bits: weights[0])


def test_ranks_are_spearmans_and_need_the_check() -> None:
    one, many = sk.Estimate(1.0, 0.0), ("a", "b", "c", "d")
    predicted, measured = ((4.0,), (3.0,), (2.0,), (1.0,)), ((3.0,), (4.0,), (2.0,), (0.5,))
    slope, each = ((0.0,), (2.0,), (0.0,), (0.0,)), (one,) * 4
    layers = measures.LayerSensitivity(many, (2,) * 4, each, each, each, (4,), predicted, slope, predicted, measured, measured, 1.0, 1, 1)
    assert layers.rank_correlation(4, by="trace") == pytest.approx(0.8)  # 1 - 6 * 2 / (4 * 15)
    assert layers.rank_correlation(4) == layers.rank_correlation(4, by="slope and trace") == pytest.approx(1.0)
    assert layers.ranking(4, by="trace") == many and layers.ranking(4, by="measured") == ("b", "a", "c", "d")
    unchecked = measures.layer_sensitivity(Regression("quadratic").objective, bits=[4], check=False)
    assert unchecked.measured is None and unchecked.num_evaluations == 1
    with pytest.raises(ValueError, match="check=True"):
        unchecked.ranking(4, by="measured")
    with pytest.raises(ValueError, match="bits"):
        layers.ranking(8)


def test_singular_blocks_have_an_infinite_condition_number() -> None:
    problem = Regression("quadratic", n=3)
    found = measures.layer_sensitivity(problem.objective, bits=[4], check=False)
    assert math.isinf(found.condition_number[0]) and math.isfinite(found.peakedness[0])


# -- the whole spectrum, norms --------------------------------------------------------------------------------------------------------
def test_the_effective_dimension_of_a_diagonal_quadratic_is_exact() -> None:
    x = torch.diag(torch.tensor([1.0, 2.0, 3.0, 0.0], dtype=torch.float64))
    objective = sk.Objective(nn.Linear(4, 1, bias=False).double(), (x, torch.zeros(4, 1).double()), loss=F.mse_loss)
    values = 2 * torch.tensor([1.0, 4.0, 9.0, 0.0]) / 4
    found = measures.effective_dimension(sk.HessianOperator(objective), 0.7)
    assert found.value == pytest.approx(float((values / (values + 0.7)).sum()), rel=1e-6)


def test_the_effective_dimension_of_logistic_regression_is_that_of_its_eigenvalues() -> None:
    problem = Regression("logistic", size=30, n=60)
    values = torch.linalg.eigvalsh(problem.hessian())
    expected = float((values / (values + 0.05)).sum())
    density = sk.spectral_density(sk.HessianOperator(problem.objective))  # as many steps as rows: exact
    found = measures.effective_dimension(density, 0.05)
    assert found.value == pytest.approx(expected, rel=1e-6) and found.num_matvecs == density.num_matvecs
    larger = Regression("logistic", size=120, n=240)
    values = torch.linalg.eigvalsh(larger.hessian())
    few = measures.effective_dimension(sk.HessianOperator(larger.objective), 0.05, num_probes=8, num_steps=30)
    assert 0 < abs(few.value - float((values / (values + 0.05)).sum())) <= 3 * few.stderr < 10
    assert measures.effective_dimension(-sk.HessianOperator(problem.objective), 0.05).value == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_the_fisher_rao_norm_is_that_of_the_samples_gradients(kind: str) -> None:
    problem = Regression(kind)
    expected = math.sqrt(float(((problem.x @ problem.w) * problem.slopes()).square().mean()))
    assert measures.fisher_rao_norm(problem.objective).value == pytest.approx(expected, rel=1e-6)
    assert measures.fisher_rao_norm(problem.objective, form="homogeneous", depth=1).value == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_closed_form_is_the_definition_where_the_network_is_homogeneous(reduction: str) -> None:
    g = torch.Generator().manual_seed(6)
    x, y = torch.randn(12, 4, generator=g, dtype=torch.float64), torch.randint(3, (12,), generator=g)
    net = nn.Sequential(
        nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 5, bias=False), nn.ReLU(), nn.Linear(5, 3, bias=False)
    ).double()
    objective = sk.Objective(net, [(x[:5], y[:5]), (x[5:], y[5:])], loss=nn.CrossEntropyLoss(reduction=reduction))
    direct = measures.fisher_rao_norm(objective).value
    assert measures.fisher_rao_norm(objective, form="homogeneous", depth=3).value == pytest.approx(direct, rel=1e-9)
    with_biases = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    objective = sk.Objective(with_biases, (x, y), loss=F.cross_entropy)
    both = [measures.fisher_rao_norm(objective, **how).value for how in ({}, {"form": "homogeneous", "depth": 2})]  # type: ignore[arg-type]
    assert both[0] != pytest.approx(both[1], rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_relative_flatness_of_one_neuron_is_its_norm_times_its_trace(kind: str) -> None:
    problem = Regression(kind)
    expected = float(problem.w @ problem.w) * float(problem.hessian().trace())
    found = measures.relative_flatness(problem.objective, rtol=1e-8)  # as above
    assert found.value == pytest.approx(expected, rel=1e-6)


def test_the_relative_flatness_of_a_softmax_layer_is_the_double_sum_over_neurons() -> None:
    g = torch.Generator().manual_seed(7)
    x, y = torch.randn(20, 4, generator=g, dtype=torch.float64), torch.randint(3, (20,), generator=g)
    model = nn.Linear(4, 3, bias=False).double()
    p, W = torch.softmax(model(x), dim=1).detach(), model.weight.detach()
    expected = 0.0
    for s, t in itertools.product(range(3), repeat=2):  # H_st = mean (p_s [s = t] - p_s p_t) x x^T
        trace = float(((p[:, s] * (s == t) - p[:, s] * p[:, t]) * x.square().sum(dim=1)).mean())
        expected += float(W[s] @ W[t]) * trace
    found = measures.relative_flatness(sk.Objective(model, (x, y), loss=F.cross_entropy), rtol=1e-8)  # as above
    assert found.value == pytest.approx(expected, rel=1e-6)
