"""Near the weights, after one step and in the logits: closed forms on a quadratic and on logistic regression."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from problems_measures import KINDS, Regression
from scipy.optimize import brentq
from torch import Tensor, nn
from torch.nn import functional as F

import sharpkit as sk
from sharpkit import measures
from sharpkit.measures.nearby import checkpoints


def largest_rise(g: Tensor, H: Tensor, rho: float) -> float:
    """max of g.z + z^T H z / 2 over ||z||_2 <= rho for positive H: the secular equation of the trust region, solved by SciPy."""
    values, vectors = np.linalg.eigh(H.numpy())
    b = vectors.T @ g.numpy()

    def excess(mu: float) -> float:  # z = (mu - H)^-1 g with mu above the largest eigenvalue
        return float(np.sqrt(np.sum((b / (mu - values)) ** 2)) - rho)

    mu = brentq(excess, values[-1] + 1e-12, values[-1] + 2 * np.linalg.norm(b) / rho)
    z = b / (mu - values)
    return float(b @ z + (values * z * z).sum() / 2)


# -- near the weights -----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("adaptive", [False, True])
def test_the_worst_case_of_a_quadratic_is_the_trust_regions_within_a_percent(adaptive: bool) -> None:
    problem = Regression("quadratic")
    c = problem.w.abs() if adaptive else torch.ones(5, dtype=torch.float64)
    found = measures.m_sharpness(problem.objective, adaptive=adaptive, rho=[0.1, 0.5, 2.0], m=24)
    for rho, value in zip(found.rho, found.values, strict=True):
        expected = largest_rise(c * problem.gradient(), c[:, None] * problem.hessian() * c, rho)
        assert 0.99 * expected <= value.value <= expected * (1 + 1e-9)
    assert found.num_batches == 1 and [value.stderr for value in found.values] == [0.0, 0.0, 0.0]
    assert found.slopes[0] == pytest.approx(0.1 * float((c * problem.gradient()).norm()), rel=1e-9)


def test_the_worst_case_at_a_minimum_is_half_of_lambda_max_rho_squared() -> None:
    problem = Regression("quadratic")
    problem.model.weight.data = torch.linalg.lstsq(problem.x, problem.y).solution.T.contiguous()
    found = measures.m_sharpness(problem.objective, adaptive=False, rho=0.3, m=24)
    assert found.values[0].value == pytest.approx(float(torch.linalg.eigvalsh(problem.hessian())[-1]) * 0.3**2 / 2, rel=0.01)


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_l_inf_worst_case_of_a_quadratic_is_the_best_corner(adaptive: bool) -> None:
    problem = Regression("quadratic")
    c = problem.w.abs() if adaptive else torch.ones(5, dtype=torch.float64)
    found = measures.m_sharpness(problem.objective, perturbation="linf", adaptive=adaptive, rho=[0.01, 0.3], m=24)
    for rho, value in zip(found.rho, found.values, strict=True):  # a convex function is largest at a corner
        corners = [torch.tensor(signs, dtype=torch.float64) for signs in itertools.product((-1.0, 1.0), repeat=5)]
        rises = [float(problem.losses(problem.w + rho * c * s).mean() - problem.losses(problem.w).mean()) for s in corners]
        assert value.value == pytest.approx(max(rises), rel=0.01)


@pytest.mark.parametrize("perturbation", ["l2", "linf"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_the_worst_case_of_single_logistic_losses_has_a_closed_form(perturbation: str, adaptive: bool) -> None:
    problem = Regression("logistic")
    c = problem.w.abs() if adaptive else torch.ones(5, dtype=torch.float64)
    found = measures.m_sharpness(problem.objective, perturbation=perturbation, adaptive=adaptive, rho=0.4, m=1, max_batches=24)
    margins = (2 * problem.y[:, 0] - 1) * (problem.x @ problem.w)
    dual = (c * problem.x).norm(dim=1) if perturbation == "l2" else (c * problem.x).abs().sum(dim=1)
    rises = torch.log1p(torch.exp(-margins + 0.4 * dual)) - torch.log1p(torch.exp(-margins))
    assert found.values[0].value == pytest.approx(float(rises.mean()), rel=1e-6)
    spread = float(rises.std() / math.sqrt(24))
    assert spread <= found.values[0].stderr <= 1.2 * spread  # widened for their number
    assert found.num_batches == 24 and found.m == 1


@pytest.mark.parametrize(("perturbation", "variance"), [("gaussian", 1.0), ("uniform", 1 / 3)])
@pytest.mark.parametrize("adaptive", [False, True])
def test_the_average_case_of_a_quadratic_is_half_the_weighted_trace(perturbation: str, variance: float, adaptive: bool) -> None:
    problem = Regression("quadratic")
    c = problem.w.abs() if adaptive else torch.ones(5, dtype=torch.float64)
    found = measures.m_sharpness(problem.objective, perturbation=perturbation, adaptive=adaptive, rho=[0.1, 0.2], m=24, num_steps=400)
    for rho, value in zip(found.rho, found.values, strict=True):
        expected = variance * rho**2 / 2 * float((c**2 * problem.hessian().diagonal()).sum())
        assert abs(value.value - expected) <= 3 * value.stderr < 0.3 * expected
    assert found.num_gradients == 0 and found.num_evaluations == 1 + 2 * 400
    assert found.values[1].value == pytest.approx(4 * found.values[0].value, rel=1e-9)  # the same draws, and no slope


def test_the_cost_of_the_worst_case_is_as_stated() -> None:
    found = measures.m_sharpness(Regression("logistic").objective, rho=[0.1, 0.2, 0.4], m=8, num_steps=10)
    assert (found.num_batches, found.num_gradients, found.num_evaluations) == (3, 3 * (1 + 3 * 10), 0)
    values = [value.value for value in found.values]
    assert values == sorted(values)


def test_auto_pgds_checkpoints_are_the_papers() -> None:
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(20)[:3] == [5, 9, 12]


def test_a_loss_that_is_infinite_nearby_has_an_infinite_rise() -> None:
    model = nn.Linear(1, 1, bias=False).double()
    model.weight.data.fill_(1.0)
    objective = sk.Objective(model, (torch.ones(2, 1).double(), torch.ones(2, 1).double()), loss=lambda z, _: -torch.log(1.3 - z).mean())
    found = measures.m_sharpness(objective, rho=[0.1, 0.4], m=2)  # NaN beyond w = 1.3
    assert found.values[0].value == pytest.approx(math.log(0.3 / 0.2), rel=1e-6)
    assert math.isinf(found.values[1].value) and "infinite there" in found.findings()[-1]


def test_logit_normalisation_takes_out_the_scale_of_the_logits() -> None:
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(32, 4, generator=g, dtype=torch.float64), torch.randint(3, (32,), generator=g)
    model = nn.Linear(4, 3).double()
    weights = torch.randn(3, 4, generator=g, dtype=torch.float64)

    def value(scale: float, normal: bool, loss: Any = F.cross_entropy) -> float:
        model.weight.data, model.bias.data = scale * weights, torch.zeros(3).double()
        found = measures.m_sharpness(sk.Objective(model, (x, y), loss=loss), rho=0.2, m=32, logit_normalization=normal)
        return found.values[0].value

    assert value(10.0, True) == pytest.approx(value(1.0, True), rel=1e-9)
    assert value(10.0, False) != pytest.approx(value(1.0, False), rel=0.1)
    expected = F.cross_entropy((z := x @ weights.T - (x @ weights.T).mean(dim=1, keepdim=True)) / z.norm(dim=1, keepdim=True), y)
    model.weight.data = weights
    found = measures.m_sharpness(sk.Objective(model, (x, y), loss=F.cross_entropy), rho=0.2, m=32, logit_normalization=True)
    assert found.loss == pytest.approx(float(expected), rel=1e-9)
    with pytest.raises(sk.ObjectiveError, match="needs logits"):
        value(1.0, True, lambda z, t: F.cross_entropy(z, t))
    with pytest.raises(sk.ObjectiveError, match="mse_loss"):
        measures.m_sharpness(Regression("quadratic").objective, logit_normalization=True)


# -- one step -------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("adaptive", "floor"), [(False, 0.0), (True, 0.0), (True, 0.01)])
def test_one_step_sharpness_is_the_loss_after_sams_step(kind: str, adaptive: bool, floor: float) -> None:
    problem = Regression(kind)
    T = problem.w.abs() + floor if adaptive else torch.ones(5, dtype=torch.float64)
    e = 0.3 * T**2 * problem.gradient() / (T * problem.gradient()).norm()
    expected = float(problem.losses(problem.w + e).mean() - problem.losses(problem.w).mean())
    found = measures.sam_sharpness(problem.objective, rho=0.3, adaptive=adaptive, floor=floor)
    assert found.value == pytest.approx(expected, rel=1e-9) and found.stderr == 0.0
    if kind == "quadratic":
        closed = float(problem.gradient() @ e + e @ problem.hessian() @ e / 2)
        assert found.value == pytest.approx(closed, rel=1e-9)
    worst = measures.m_sharpness(problem.objective, rho=0.3, adaptive=adaptive, floor=floor, m=24)
    assert found.value <= worst.values[0].value * (1 + 1e-9)


def test_one_step_sharpness_of_batches_is_their_mean_with_its_error() -> None:
    problem = Regression("quadratic")
    found = measures.sam_sharpness(problem.objective, rho=0.3, m=1)
    g = problem.slopes()[:, None] * problem.x
    rises = 0.3 * g.norm(dim=1) + 0.3**2 * ((problem.x * g).sum(dim=1) / g.norm(dim=1)) ** 2
    assert found.value == pytest.approx(float(rises.mean()), rel=1e-9)
    assert found.num_batches == found.num_gradients == 24 and found.stderr >= float(rises.std() / math.sqrt(24))


def test_a_vanishing_gradient_gives_no_step() -> None:
    problem = Regression("quadratic")
    problem.model.weight.data.zero_()
    objective = sk.Objective(problem.model, (problem.x, torch.zeros(24, 1).double()), loss=F.mse_loss)
    with pytest.raises(sk.NonFiniteError, match="gradient is 0"):
        measures.sam_sharpness(objective)


# -- logits ---------------------------------------------------------------------------------------------------------------------------
def test_logit_sharpness_is_the_best_of_all_corners() -> None:
    g = torch.Generator().manual_seed(2)
    x, y = torch.randn(6, 3, generator=g, dtype=torch.float64), torch.tensor([0, 1, 2, 3, -100, 1])
    model = nn.Linear(3, 4).double()
    found = measures.logit_sharpness(sk.Objective(model, (x, y), loss=F.cross_entropy), eps=0.05)
    z = model(x).detach()
    corners = [torch.tensor(s, dtype=torch.float64) for s in itertools.product((-1.0, 1.0), repeat=4)]
    losses = torch.stack([F.cross_entropy(z + 0.05 * (z.abs() + 1) * s, y, reduction="none") for s in corners])
    kept = y != -100
    loss, worst = float(F.cross_entropy(z, y)), float(losses.max(dim=0).values[kept].mean())
    assert found.value == pytest.approx(100 * (worst - loss) / (1 + loss), rel=1e-9)
    assert found.loss == pytest.approx(loss, rel=1e-9) and found.num_targets == 5


def test_logit_sharpness_weighs_batches_and_classes_as_the_loss_does() -> None:
    g = torch.Generator().manual_seed(3)
    x, y, weight = torch.randn(10, 3, generator=g), torch.randint(4, (10,), generator=g), torch.tensor([1.0, 2.0, 0.5, 3.0])
    model, loss = nn.Linear(3, 4), nn.CrossEntropyLoss(weight=weight)
    parts = [(x[:3], y[:3]), (x[3:], y[3:])]
    whole, cut = (measures.logit_sharpness(sk.Objective(model, data, loss=loss)) for data in ((x, y), parts))
    assert cut.value == pytest.approx(whole.value, rel=1e-6)
    assert cut.loss == pytest.approx(float(loss(model(x), y).detach()), rel=1e-6)


def test_logit_sharpness_of_the_last_token_is_that_of_the_last_target_that_counts() -> None:
    g = torch.Generator().manual_seed(4)
    z, y = torch.randn(2, 5, 3, generator=g, dtype=torch.float64), torch.tensor([[1, 2, -100], [0, 4, 3]])
    model = nn.Conv1d(5, 5, 1).double()
    last = measures.logit_sharpness(sk.Objective(model, (z, y), loss=F.cross_entropy), tokens="last")
    out = model(z).detach()
    picked = torch.stack([out[0, :, 1], out[1, :, 2]])
    alone = measures.logit_sharpness(
        sk.Objective(nn.Linear(5, 5).double().requires_grad_(True), (z[:, :, 0], y[:, 0]), loss=F.cross_entropy)
    )
    assert last.loss == pytest.approx(float(F.cross_entropy(picked, torch.tensor([2, 3]))), rel=1e-9)
    assert last.num_targets == 2 and alone.num_targets == 2
    with pytest.raises(sk.ObjectiveError, match="tokens='last'"):
        measures.logit_sharpness(sk.Objective(nn.Linear(5, 5).double(), (z[:, :, 0], y[:, 0]), loss=F.cross_entropy), tokens="last")


def test_logit_sharpness_sees_a_cross_entropy_inside_a_closure_and_refuses_others() -> None:
    g = torch.Generator().manual_seed(5)
    x, y = torch.randn(8, 3, generator=g), torch.randint(4, (8,), generator=g)
    model = nn.Linear(3, 4)
    direct = measures.logit_sharpness(sk.Objective(model, (x, y), loss=F.cross_entropy))
    within = measures.logit_sharpness(sk.Objective(model, (x, y), closure=lambda m, b: F.cross_entropy(m(b[0]), b[1])))
    assert within.value == direct.value
    with pytest.raises(sk.ObjectiveError, match="made 0"):
        measures.logit_sharpness(sk.Objective(model, (x, y), loss=lambda z, t: F.nll_loss(z.log_softmax(1), t)))
    with pytest.raises(sk.ObjectiveError, match="smoothed"):
        measures.logit_sharpness(sk.Objective(model, (x, y), loss=nn.CrossEntropyLoss(label_smoothing=0.1)))


# -- refused, written and read --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda o: measures.m_sharpness(o, perturbation="l1"), "perturbation must be one of"),
        (lambda o: measures.m_sharpness(o, rho=[]), "at least one radius"),
        (lambda o: measures.m_sharpness(o, rho=-1.0), "rho"),
        (lambda o: measures.m_sharpness(o, m=25), "at most the 24 samples"),
        (lambda o: measures.sam_sharpness(o, rho=0.0), "rho"),
        (lambda o: measures.logit_sharpness(o, eps=0.0), "eps"),
        (lambda o: measures.logit_sharpness(o, tokens="first"), "tokens"),
        (lambda o: measures.layer_sensitivity(o, bits=[1]), "bits"),
        (lambda o: measures.layer_sensitivity(o, bits=[]), "at least one bit width"),
        (lambda o: measures.effective_dimension(sk.HessianOperator(o), 0.0), "damping"),
        (lambda o: measures.fisher_rao_norm(o, form="homogeneous"), "needs depth="),
        (lambda o: measures.fisher_rao_norm(o, depth=2), "leave it out"),
        (lambda o: measures.relative_flatness(o, "bias"), "weight must name"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(Regression("quadratic").objective)


def test_results_are_read_back_as_they_were_written_and_say_what_they_found() -> None:
    objective = Regression("logistic").objective
    every = [
        measures.m_sharpness(objective, rho=[0.1, 0.2], m=8),
        measures.m_sharpness(objective, perturbation="gaussian", rho=0.1, m=8),
        measures.sam_sharpness(objective),
        measures.layer_sensitivity(objective, bits=[2, 4]),
        measures.fisher_rao_norm(objective),
        measures.logit_sharpness(sk.Objective(nn.Linear(3, 2), (torch.ones(2, 3), torch.tensor([0, 1])), loss=F.cross_entropy)),
    ]
    for result in every:
        assert type(result).from_dict(result.to_dict()) == result
        assert result.findings() and all(sentence.endswith(".") for sentence in result.findings())


def test_model_and_random_state_are_left_as_they_were() -> None:
    problem = Regression("logistic")
    before, state, mode = problem.w.clone(), torch.get_rng_state(), problem.model.training
    measures.m_sharpness(problem.objective, m=8)
    measures.m_sharpness(problem.objective, m=8, perturbation="uniform")
    measures.sam_sharpness(problem.objective)
    measures.layer_sensitivity(problem.objective)
    assert torch.equal(problem.w, before) and torch.equal(torch.get_rng_state(), state)
    assert problem.model.training is mode and problem.model.weight.grad is None
