"""Groups with rates, momenta and decays of their own: measure, monitor, learner and curve state one limit, that of the dense matrix."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import dense_hessian
from torch import Tensor, nn
from torch.nn import functional as F

import sharpkit as sk
from sharpkit.batch_size.limits import limits_for
from sharpkit.batch_size.pilot import Ledger
from sharpkit.objective.samples import SamplePool
from sharpkit.optimizers import limit_rule

SGD, ADAM, ADAMW, RMS = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop
D = torch.float64


class Regression:
    """Least squares by two linear layers: 24 and 4 parameters."""

    def __init__(self, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(6, 4, bias=False), nn.Linear(4, 1, bias=False)).to(D)
        for p in self.model.parameters():
            p.data = torch.randn(p.shape, generator=g, dtype=D) / 2
        self.batch = (torch.randn(48, 6, generator=g, dtype=D), torch.randn(48, 1, generator=g, dtype=D))
        self.params = list(self.model.parameters())
        self.objective = sk.Objective(self.model, self.batch, loss=F.mse_loss)

    def value(self) -> Tensor:
        return F.mse_loss(self.model(self.batch[0]), self.batch[1])

    def optimizer(self, make: Callable[[Any], torch.optim.Optimizer], first: dict[str, Any], second: dict[str, Any]) -> Any:
        optimizer = make([{"params": self.params[:1], **first}, {"params": self.params[1:], **second}])
        for _ in range(3 if make not in (SGD,) else 0):  # moments, for an adaptive one
            optimizer.zero_grad()
            self.value().backward()
            optimizer.step()
        optimizer.zero_grad()
        return optimizer

    def limit(self, optimizer: torch.optim.Optimizer) -> float:
        """Largest rate of the first group that trains, in the words of torch's documentation, by the dense matrix."""
        speed, scale, coupled, shift = [], [], [], []
        for group in optimizer.param_groups:
            for p in group["params"]:
                adam = isinstance(optimizer, (ADAM, ADAMW))  # a kind of Adam from torch 2.7 on
                beta = group["betas"][0] if adam else group["momentum"]
                gain = 1 - beta if adam else 1 + 2 * beta if group.get("nesterov") else 1 - group.get("dampening", 0.0)
                state = optimizer.state.get(p, {})
                d = torch.ones_like(p)
                if adam:
                    d = (state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))).sqrt() + 1e-8
                elif isinstance(optimizer, RMS):
                    d = state["square_avg"].sqrt() + 1e-8
                decoupled = isinstance(optimizer, ADAMW)
                speed.append(torch.full((p.numel(),), group["lr"] * gain / (2 * (1 + beta)), dtype=D))
                scale.append(d.reshape(-1))
                coupled.append(torch.full((p.numel(),), 0.0 if decoupled else group["weight_decay"], dtype=D))
                shift.append(torch.full((p.numel(),), group["lr"] * group["weight_decay"] / 2 if decoupled else 0.0, dtype=D))
        s = (torch.cat(speed) / torch.cat(scale)).sqrt()
        H = dense_hessian(self.value, self.params)
        matrix = s[:, None] * (H + torch.diag(torch.cat(coupled))) * s + torch.diag(torch.cat(shift))
        return next(g["lr"] for g in optimizer.param_groups if g["lr"]) / float(torch.linalg.eigvalsh(matrix)[-1])


CASES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "rates": (SGD, {"lr": 1e-3, "momentum": 0.9}, {"lr": 1e-2, "momentum": 0.9}),
    "momenta": (SGD, {"lr": 1e-3, "momentum": 0.9}, {"lr": 1e-3, "momentum": 0.3, "nesterov": True}),
    "dampened": (SGD, {"lr": 1e-3, "momentum": 0.9, "dampening": 0.9}, {"lr": 1e-3}),
    "decay of one": (SGD, {"lr": 1e-3}, {"lr": 1e-3, "weight_decay": 4.0}),
    "all of it": (SGD, {"lr": 1e-3, "momentum": 0.5, "weight_decay": 1.0}, {"lr": 5e-3, "momentum": 0.9, "weight_decay": 2.0}),
    "one at rate 0": (SGD, {"lr": 0.0}, {"lr": 1e-2, "momentum": 0.9}),
    "Adam, decay of one": (ADAM, {"lr": 1e-3, "weight_decay": 0.7}, {"lr": 1e-3}),
    "Adam": (ADAM, {"lr": 1e-3, "betas": (0.5, 0.99)}, {"lr": 4e-3, "betas": (0.9, 0.999), "weight_decay": 0.5}),
    "AdamW": (ADAMW, {"lr": 1e-3, "weight_decay": 9.0}, {"lr": 4e-3, "weight_decay": 0.0}),
    "RMSprop": (RMS, {"lr": 1e-3, "momentum": 0.9}, {"lr": 3e-3, "momentum": 0.0, "weight_decay": 0.5}),
}


@pytest.mark.parametrize("name", CASES)
def test_every_place_states_the_limit_of_the_dense_matrix(name: str) -> None:
    problem = Regression()
    optimizer = problem.optimizer(*CASES[name])
    truth, rule = problem.limit(optimizer), limit_rule(optimizer)
    rates = [group["lr"] for group in optimizer.param_groups]
    lr = next(rate for rate in rates if rate)
    s = sk.measure(problem.objective, optimizer=optimizer)
    assert (float(s.stable_lr), s.lr) == (pytest.approx(truth, rel=2e-3), lr)
    assert s.stable_lr.rule == rule.condition and "R the groups' rates" in rule.condition
    assert f"  lambda_max {rule.operator} " in repr(s)
    monitor = sk.Monitor(problem.model, optimizer, loss=F.mse_loss, every=1, tol=1e-3, metrics=["preconditioned_lambda_max", "lambda_max"])
    monitor.step(problem.batch)
    seen = monitor.history[0]["preconditioned_lambda_max"]
    assert seen.limit is not None and seen.value / seen.limit == pytest.approx(lr / truth, rel=5e-3)
    assert monitor.history[0]["lambda_max"].limit is None, "no lambda_max(H) alone is the limit"
    if not rule.adaptive:  # the curve's D is that of a settled second moment, not the live one
        _, points = limits_for(SamplePool(problem.objective), optimizer, rule, sizes=[4, 48], seed=0, ledger=Ledger())
        assert points[-1][1] == pytest.approx(truth, rel=0.02)
    learner = sk.CurvatureLearner(optimizer, model=problem.model, loss=F.mse_loss, total_steps=20, interval=1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.0]
    decision = learner.step(problem.batch)
    assert decision is not None and decision.max_lr == pytest.approx(truth, rel=0.25), "by four products"
    assert [group["lr"] / lr for group in optimizer.param_groups] == pytest.approx([learner.lr * rate / lr**2 * 0.95 for rate in rates])


def test_a_scalar_cannot_give_the_limit_of_groups_that_differ() -> None:
    problem = Regression()
    for name in ("rates", "momenta", "AdamW"):
        with pytest.raises(sk.UnsupportedError, match=r"groups of .* differ.*sharpkit\.measure"):
            sk.stable_learning_rate(10.0, optimizer=problem.optimizer(*CASES[name]))
    alike = problem.optimizer(SGD, {"lr": 0.1, "momentum": 0.9}, {"lr": 0.1, "momentum": 0.9})
    assert sk.stable_learning_rate(10.0, optimizer=alike) == pytest.approx(0.38)


@pytest.mark.parametrize("make", [SGD, ADAM])
def test_an_optimizer_of_some_parameters_has_the_limit_of_their_block(make: Any) -> None:
    problem = Regression()
    optimizer = make(problem.params[1:], lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        problem.value().backward()
        optimizer.step()
    block = dense_hessian(problem.value, problem.params)[24:, 24:]
    top = float(sk.measure(problem.objective, optimizer=optimizer).stable_lr)
    head = sk.Objective(problem.model, problem.batch, loss=F.mse_loss, params="1.*")
    assert top == pytest.approx(float(sk.measure(head, optimizer=optimizer).stable_lr), rel=1e-3)
    if make is SGD:
        assert top == pytest.approx(2 / float(torch.linalg.eigvalsh(block)[-1]), rel=1e-3)


def test_selected_parameters_have_the_limit_and_the_rate_of_their_own_group() -> None:
    problem = Regression()
    optimizer = problem.optimizer(SGD, {"lr": 1e-3, "momentum": 0.9}, {"lr": 1e-2})
    s = sk.measure(sk.Objective(problem.model, problem.batch, loss=F.mse_loss, params="1.*"), optimizer=optimizer)
    block = dense_hessian(problem.value, problem.params)[24:, 24:]
    assert (float(s.stable_lr), s.lr) == (pytest.approx(2 / float(torch.linalg.eigvalsh(block)[-1]), rel=1e-3), 1e-2)


def test_in_a_warmup_from_0_the_ratios_are_those_of_the_initial_rates() -> None:
    problem = Regression()
    optimizer = problem.optimizer(*CASES["rates"])
    truth = problem.limit(optimizer)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    s = sk.measure(problem.objective, optimizer=optimizer)
    assert (float(s.stable_lr), s.lr) == (pytest.approx(truth, rel=2e-3), 0.0)


CALLS: dict[str, Callable[[Regression, Any], Any]] = {
    "measure": lambda problem, o: sk.measure(problem.objective, optimizer=o),
    "critical": lambda problem, o: sk.critical_learning_rate(problem.objective, o),
    "directional": lambda problem, o: sk.directional_sharpness(problem.objective, o),
    "curve": lambda problem, o: sk.learning_rate_curve(problem.objective, o),
    "monitor": lambda problem, o: sk.Monitor(problem.model, o, loss=F.mse_loss),
    "learner": lambda problem, o: sk.CurvatureLearner(o, model=problem.model, loss=F.mse_loss, total_steps=50),
}


@pytest.mark.parametrize("call", CALLS)
def test_an_optimizer_of_another_model_or_of_more_than_the_model_is_refused(call: str) -> None:
    problem, other = Regression(), Regression(1)
    with pytest.raises(ValueError, match="holds none of the objective's parameters"):
        CALLS[call](problem, SGD(other.params, lr=0.1))
    temperature = nn.Parameter(torch.ones(1))  # the loss's own
    with pytest.raises(sk.UnsupportedError, match=r"also trains 1 parameters that are no part of the Sequential.*nn\.ModuleList"):
        CALLS[call](problem, SGD([*problem.params, temperature], lr=0.1))


@pytest.mark.parametrize("call", CALLS)
def test_an_optimizer_without_a_number_as_its_rate_is_refused(call: str) -> None:
    problem = Regression()
    optimizer = SGD(problem.params, lr=0.1)
    optimizer.param_groups[0]["lr"] = None
    with pytest.raises(sk.UnsupportedError, match=r"lr=None.*relative_step=False"):
        CALLS[call](problem, optimizer)


def test_the_critical_rate_takes_the_groups_rates_in_their_ratio() -> None:
    """On a quadratic it is 2 u.g / u.Hu along the step that the groups make together."""
    problem = Regression()
    for p in problem.params[:1]:
        p.requires_grad_(False)  # one layer alone: a quadratic
    head = nn.Linear(4, 1, bias=True).to(D)
    model = nn.Sequential(problem.model[0], head)
    objective = sk.Objective(model, problem.batch, loss=F.mse_loss)
    optimizer = SGD([{"params": [head.weight], "lr": 1e-3}, {"params": [head.bias], "lr": 7e-3}])
    g, H = objective.gradient()[1], sk.HessianOperator(objective).to_dense()
    u = torch.cat([g[:4], 7 * g[4:]])
    expected = float(2 * (u @ g) / (u @ H @ u))
    critical = sk.critical_learning_rate(objective, optimizer, rtol=1e-3)  # the width of its bracket
    assert critical.lower <= expected <= critical.upper
    assert sk.directional_sharpness(objective, optimizer) == pytest.approx(2 / expected, rel=1e-9)
    assert math.isfinite(critical.value)


@pytest.mark.parametrize("call", ["critical", "directional"])
def test_groups_of_which_only_some_climb_have_no_rate_along_their_common_step(call: str) -> None:
    problem = Regression()
    mixed = problem.optimizer(SGD, {"lr": 1e-2}, {"lr": 1e-2, "maximize": True})
    with pytest.raises(sk.UnsupportedError, match=r"some parameter groups .* maximize=True and others minimize.*params="):
        CALLS[call](problem, mixed)
    chosen = sk.Objective(problem.model, problem.batch, loss=F.mse_loss, params="0.*")
    alone = problem.optimizer(SGD, {"lr": 1e-2}, {"lr": 0.0, "maximize": True})
    assert sk.directional_sharpness(chosen, mixed) == pytest.approx(sk.directional_sharpness(problem.objective, alone), rel=1e-12)


@pytest.mark.parametrize("first", [False, True])
def test_batch_sharpness_is_not_stated_for_an_optimizer_that_climbs(first: bool) -> None:
    problem = Regression()
    climbing = problem.optimizer(SGD, {"lr": 1e-2, "maximize": first}, {"lr": 1e-2, "maximize": True})
    with pytest.raises(sk.UnsupportedError, match="maximize=True: minimize the negative loss"):
        sk.batch_sharpness(problem.objective, batch_size=8, optimizer=climbing)
