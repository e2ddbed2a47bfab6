"""Curvature divided by what optimizers divide by, read from live state: checked by the step the optimizer really takes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from problems import built, conv, dense_hessian, gaussian, labels, mlp, relative_error
from torch import Tensor, nn
from torch.nn import functional as F

import sharpkit as sk


def trained(make: Any, *, lrs: tuple[float, float] = (1e-2, 1e-2), steps: int = 3) -> tuple[Any, torch.optim.Optimizer]:
    problem = mlp()
    groups = [{"params": list(problem.model[0].parameters()), "lr": lrs[0]}, {"params": list(problem.model[2].parameters()), "lr": lrs[1]}]
    optimizer = make(groups)
    for _ in range(steps):
        optimizer.zero_grad()
        problem.value().backward()
        optimizer.step()
    return problem, optimizer


def divisor_by_experiment(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], lr: float) -> Tensor:
    """D from the optimizer's own arithmetic: with its first moment, corrected for its bias, set to one, its next step is -lr / D."""
    twin = copy.deepcopy(optimizer)
    steps = []
    for group, original in zip(twin.param_groups, optimizer.param_groups, strict=True):
        for p, q in zip(group["params"], original["params"], strict=True):
            state = twin.state[p]
            if "exp_avg" in state:
                beta1, beta2 = group["betas"]
                state["step"] -= 1  # take the last step once more, with its moments
                state["exp_avg"].fill_((1 - beta1 ** (float(state["step"]) + 1)) / beta1)
                state["exp_avg_sq"].div_(beta2)
                group["weight_decay"] = 0.0
            del q
    for group in twin.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
            before = p.detach().clone()
            steps.append((p, before))
    twin.step()
    return torch.cat([((before - p.detach()) / lr).reciprocal().reshape(-1) for p, before in steps])


SGD, ADAM, ADAMW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
RMS, ADAGRAD = torch.optim.RMSprop, torch.optim.Adagrad


def by_hand(optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> Tensor:
    """D in the words of each optimizer's documentation, relative to the first group's rate."""
    reference = optimizer.param_groups[0]["lr"]
    found = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            s = optimizer.state.get(p, {})
            if isinstance(optimizer, (ADAM, ADAMW)):
                t, b2 = float(s["step"]), group["betas"][1]
                v = s["max_exp_avg_sq"] if group["amsgrad"] else s["exp_avg_sq"]
                d = (v / (1 - b2**t)).sqrt() + group["eps"]
            elif isinstance(optimizer, RMS):
                v = s["square_avg"] - (s["grad_avg"] ** 2 if group["centered"] else 0)
                d = v.sqrt() + group["eps"]
            elif isinstance(optimizer, ADAGRAD):
                d = (s["sum"].sqrt() + group["eps"]) * (1 + (float(s["step"]) - 1) * group["lr_decay"])
            else:
                d = torch.ones_like(p)
            found.append((d * reference / group["lr"]).reshape(-1))
    return torch.cat(found)


@pytest.mark.parametrize(
    "make",
    [
        lambda g: SGD(g, momentum=0.9),
        lambda g: ADAM(g),
        lambda g: ADAM(g, amsgrad=True, betas=(0.8, 0.95)),
        lambda g: ADAMW(g, weight_decay=0.1),
        lambda g: ADAMW(g, amsgrad=True),
        lambda g: RMS(g),
        lambda g: RMS(g, centered=True, momentum=0.5),
        lambda g: ADAGRAD(g, lr_decay=0.1),
    ],
    ids=["sgd", "adam", "adam amsgrad", "adamw", "adamw amsgrad", "rmsprop", "rmsprop centred", "adagrad"],
)
@pytest.mark.parametrize("lrs", [(1e-2, 1e-2), (1e-2, 4e-2)], ids=["one rate", "two rates"])
def test_equals_the_scaled_dense_hessian(make: Any, lrs: tuple[float, float]) -> None:
    problem, optimizer = trained(make, lrs=lrs)
    H = sk.HessianOperator(sk.Objective(problem.model, problem.batches, loss=problem.loss))
    dense, d = dense_hessian(problem.value, problem.params), by_hand(optimizer, problem.params)
    P = sk.PreconditionedOperator(H, optimizer)
    expected = dense / (d[:, None] * d).sqrt()
    found = P.to_dense()
    assert relative_error(found, expected) < 1e-9
    similar = torch.linalg.eigvals(dense / d[:, None]).real.sort().values
    assert relative_error(torch.linalg.eigvalsh(found), similar) < 1e-8, "similar to D^-1 H"
    assert relative_error(P.block("2.*").to_dense(), expected[25:, 25:]) < 1e-9
    assert relative_error((H + 0.1).to_dense(), dense + 0.1 * torch.eye(43, dtype=torch.float64)) < 1e-9


@pytest.mark.parametrize("make", [lambda g: ADAM(g), lambda g: ADAMW(g, weight_decay=0.1)], ids=["adam", "adamw"])
def test_adam_divides_by_what_its_own_step_divides_by(make: Any) -> None:
    problem, optimizer = trained(make)
    by_step = divisor_by_experiment(optimizer, problem.params, 1e-2)
    assert relative_error(by_hand(optimizer, problem.params), by_step) < 1e-6


def test_parameters_the_optimizer_never_moves_have_zero_rows() -> None:
    problem = mlp()
    problem.model.add_module("unused", nn.Linear(2, 1).double())
    unused_free = lambda x: problem.model[2](problem.model[1](problem.model[0](x)))  # noqa: E731
    optimizer = ADAM(problem.model.parameters(), lr=1e-2)
    F.cross_entropy(unused_free(problem.batches[0][0]), problem.batches[0][1]).backward()
    optimizer.step()
    objective = sk.Objective(problem.model, problem.batches, closure=lambda m, b: F.cross_entropy(unused_free(b[0]), b[1]))
    P = sk.PreconditionedOperator(sk.HessianOperator(objective), optimizer).to_dense()
    assert not P[43:].any()
    assert P[:43, :43].any()


def test_parameters_that_rest_have_zero_rows_and_the_others_rates_are_relative_to_the_first_that_trains() -> None:
    problem = mlp()
    H = sk.HessianOperator(sk.Objective(problem.model, problem.batches, loss=problem.loss))
    dense, params = dense_hessian(problem.value, problem.params), list(problem.model.parameters())
    frozen = [{"params": params[:2], "lr": 0.0}, {"params": params[2:3], "lr": 0.1}, {"params": params[3:], "lr": 0.4}]
    for optimizer in (SGD(frozen), SGD(frozen[1:])):
        scale = torch.cat([torch.zeros(25), torch.full((params[2].numel(),), 1.0), torch.full((3,), 2.0)]).double()
        assert relative_error(sk.PreconditionedOperator(H, optimizer).to_dense(), scale[:, None] * dense * scale) < 1e-12


def test_what_cannot_be_read_from_an_optimizer_is_refused() -> None:
    problem = mlp()
    H = sk.HessianOperator(sk.Objective(problem.model, problem.batches, loss=problem.loss))
    params = list(problem.model.parameters())
    other = type("Other", (torch.optim.Optimizer,), {"step": lambda self, closure=None: None})
    with pytest.raises(sk.UnsupportedError, match=r"the state of Other is not known.*diagonal="):
        sk.PreconditionedOperator(H, other(params, {"lr": 0.1}))
    with pytest.raises(sk.UnsupportedError, match=r"Rprop has no linear rule.*generalized_sharpness"):
        sk.PreconditionedOperator(H, torch.optim.Rprop(params))
    for make in (ADAM, RMS, ADAGRAD):
        with pytest.raises(ValueError, match="first step"):
            sk.PreconditionedOperator(H, make(params))
    with pytest.raises(ValueError, match="holds none of the objective's parameters"):
        sk.PreconditionedOperator(H, SGD(mlp().model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="either"):
        sk.PreconditionedOperator(H)
    for diagonal, error in (
        (torch.zeros(43), ValueError),
        (torch.ones(4), ValueError),
        ([1.0] * 43, TypeError),
        (torch.full((43,), torch.nan), ValueError),
    ):
        with pytest.raises(error, match="diagonal"):
            sk.PreconditionedOperator(H, diagonal=diagonal)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="no named parameters"):
        sk.PreconditionedOperator(sk.as_operator(torch.eye(43)), SGD(params, lr=0.1))


def test_adaptive_curvature_is_unchanged_by_rescaling_a_layer() -> None:
    model = built(lambda: nn.Sequential(nn.Linear(4, 5, bias=False), nn.ReLU(), nn.Linear(5, 3, bias=False)))
    data = (gaussian(9, 4), labels(9))
    spectra = []
    for _ in range(2):
        A = sk.AdaptiveOperator(sk.HessianOperator(sk.Objective(model, data, loss=F.cross_entropy)))
        spectra.append(torch.linalg.eigvalsh(A.to_dense()))
        model[0].weight.data.mul_(10)
        model[2].weight.data.div_(10)
    assert relative_error(*spectra) < 1e-10
    block = A.block("0.*")
    assert relative_error(block.to_dense(), A.to_dense()[:20, :20]) < 1e-10
    assert conv().name
