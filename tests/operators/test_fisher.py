"""Fisher matrices: their expectation is the Gauss-Newton matrix, their draws are reproducible, and only likelihoods are taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contracts.operator_contract import check_operator
from problems import PROBLEMS, built, dense_gauss_newton, gaussian, labels, relative_error, standard_error_of
from torch import Tensor, nn
from torch.nn import functional as F

import sharpkit as sk


def fisher(problem: Any, **settings: Any) -> sk.FisherOperator:
    objective = sk.Objective(problem.model, problem.batches, loss=problem.loss, micro_batch_size=settings.pop("micro_batch_size", "auto"))
    return sk.FisherOperator(objective, likelihood=problem.likelihood, **settings)


@pytest.mark.parametrize("name", ["mlp", "tied", "squared", "binary"])
def test_the_expectation_over_draws_is_the_gauss_newton_matrix(name: str) -> None:
    problem = PROBLEMS[name]()
    draws = [fisher(problem, num_draws=40, seed=seed).to_dense() for seed in range(12)]
    expected, mean, error = dense_gauss_newton(problem), torch.stack(draws).mean(dim=0), standard_error_of(draws)
    # in units of its standard error (t with 11 degrees of freedom) the mean is off by about 1.1 in the root mean square
    scores = ((mean - expected) / error)[error > 1e-12 * expected.abs().max()]
    assert 0.5 < float(scores.square().mean().sqrt()) < 2
    assert relative_error(mean, expected) < 0.2
    assert relative_error(draws[0], draws[1]) > 1e-3, "other seeds are other draws"


@pytest.mark.parametrize("name", ["mlp", "squared", "binary"])
def test_the_same_seed_is_the_same_symmetric_matrix_however_batches_are_cut(name: str) -> None:
    problem = PROBLEMS[name]()
    dense = fisher(problem, num_draws=3, seed=4).to_dense()
    check_operator(fisher(problem, num_draws=3, seed=4), dense, model=problem.model)
    check_operator(fisher(problem, num_draws=3, seed=4, retain=False), dense, model=problem.model)
    check_operator(fisher(problem, num_draws=3, seed=4, micro_batch_size=2), dense, model=problem.model)
    assert float(torch.linalg.eigvalsh(dense).min()) > -1e-12 * float(dense.norm())


@pytest.mark.parametrize("own", ["per token", "per sequence"])
def test_the_scale_of_a_users_own_loss_is_found_not_guessed(own: str) -> None:
    """Summed over the tokens of a sequence and averaged over sequences, every token weighs 1 / sequences, not 1 / tokens."""
    problem = PROBLEMS["tied"]()
    x, y = torch.cat([x for x, _ in problem.batches]), labels(5, 4, classes=7)
    problem.batches = [(x, y)]

    def loss(z: Tensor, t: Tensor) -> Tensor:
        each = F.cross_entropy(z.transpose(1, 2), t, reduction="none")
        return each.mean() if own == "per token" else each.sum(1).mean()

    objective = sk.Objective(problem.model, problem.batches, loss=loss)
    draws = torch.stack([sk.FisherOperator(objective, num_draws=60, likelihood="categorical", seed=s).to_dense() for s in range(3)])
    expected = sk.GaussNewtonOperator(objective).to_dense()
    assert relative_error(draws.mean(dim=0).trace(), expected.trace()) < 0.2, "a wrong scale is off by the factor 4"


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(label_smoothing=0.1),
        nn.CrossEntropyLoss(weight=torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)),
        nn.L1Loss(),
        lambda z, t: F.cross_entropy(z, t),
    ],
    ids=["smoothed", "class weights", "absolute", "unknown"],
)
def test_losses_of_unknown_likelihood_are_refused(loss: Any) -> None:
    model = built(lambda: nn.Linear(4, 3))
    y = gaussian(6, 3) if isinstance(loss, nn.L1Loss) else labels(6)
    with pytest.raises(sk.ObjectiveError, match="likelihood"):
        sk.FisherOperator(sk.Objective(model, (gaussian(6, 4), y), loss=loss))


@pytest.mark.parametrize(
    ("loss", "likelihood"),
    [
        (nn.CrossEntropyLoss(label_smoothing=0.1), "categorical"),
        (nn.CrossEntropyLoss(weight=torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)), "categorical"),
        (lambda z, t: F.multi_margin_loss(z, t), "categorical"),
        (lambda z, t: F.huber_loss(z, t.double()[:, None] + 0 * z, delta=0.3), "gaussian"),
    ],
    ids=["smoothed", "class weights", "margin", "huber"],
)
def test_a_loss_that_is_not_the_likelihood_it_is_said_to_be_is_refused(loss: Any, likelihood: str) -> None:
    model = built(lambda: nn.Linear(4, 3))
    y = labels(6) if likelihood == "categorical" else gaussian(6, 3)
    if likelihood == "gaussian":
        loss = nn.HuberLoss(delta=0.3)
    A = sk.FisherOperator(sk.Objective(model, (gaussian(6, 4), y), loss=loss), likelihood=likelihood)
    with pytest.raises(sk.ObjectiveError, match="is not the negative log-likelihood"):
        A @ gaussian(15)


def test_settings_are_checked() -> None:
    objective = sk.Objective(built(lambda: nn.Linear(4, 3)), (gaussian(6, 4), labels(6)), loss=F.cross_entropy)
    with pytest.raises(ValueError, match="num_draws"):
        sk.FisherOperator(objective, num_draws=0)
    with pytest.raises(ValueError, match="likelihood must be one of"):
        sk.FisherOperator(objective, likelihood="poisson")
    closed = sk.Objective(objective.model, (gaussian(6, 4), labels(6)), closure=lambda m, b: F.cross_entropy(m(b[0]), b[1]))
    for kind in (sk.GaussNewtonOperator, lambda o: sk.FisherOperator(o, likelihood="categorical")):
        with pytest.raises(sk.ObjectiveError, match="closure="):
            kind(closed) @ gaussian(15)


def test_dropout_masks_are_part_of_per_sample_gradients_and_add_up() -> None:
    model = built(lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)))
    objective = sk.Objective(model, (gaussian(6, 4), labels(6)), loss=F.cross_entropy, mode="train")
    difference = sk.EmpiricalFisherOperator(objective) - sk.GradientCovarianceOperator(objective)
    gradient = objective.gradient()[1]
    assert relative_error(difference.to_dense(), gradient[:, None] * gradient) < 1e-10
    closed = sk.Objective(model, (gaussian(6, 4), labels(6)), closure=lambda m, b: F.cross_entropy(m(b[0]), b[1]), mode="train")
    with pytest.raises(sk.ObjectiveError, match="random numbers"):
        sk.EmpiricalFisherOperator(closed) @ gaussian(closed.num_parameters)


def test_covariance_follows_the_parameters() -> None:
    problem = PROBLEMS["mlp"]()
    A = sk.GradientCovarianceOperator(sk.Objective(problem.model, problem.batches, loss=problem.loss))
    A @ gaussian(43)
    problem.model[0].weight.data.mul_(2)
    fresh = sk.GradientCovarianceOperator(sk.Objective(problem.model, problem.batches, loss=problem.loss))
    assert torch.equal(A @ gaussian(43), fresh @ gaussian(43))
