"""Losses and models that take a gradient inside: physics-informed residuals, gradient penalties, forces, in every check of transfer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import dense_hessian
from torch import Tensor, nn
from torch.nn import functional as F

from sharpkit.batch_size.pilot import constant_loss
from sharpkit.objective.objective import Objective
from sharpkit.transfer.coordinates import coordinate_check
from sharpkit.transfer.learning_rates import first_loss, learning_rate_transfer
from sharpkit.transfer.setup import Family
from sharpkit.transfer.sharpness import sharpness_transfer

D = torch.float64


def points(seed: int, samples: int = 12) -> Tensor:
    return torch.randn(samples, 2, dtype=D, generator=torch.Generator().manual_seed(seed))


def residual(model: nn.Module, x: Tensor) -> Tensor:
    """mean (u_xx + u - 1)^2, u the network."""
    x = x.detach().requires_grad_(True)
    u = model(x)
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (bend,) = torch.autograd.grad(slope[:, 0].sum(), x, create_graph=True)
    return (bend[:, :1] + u - 1).square().mean()


def penalty(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The critic's loss of a WGAN with gradient penalty."""
    real, fake = batch
    mixed = (0.3 * real + 0.7 * fake).detach().requires_grad_(True)
    (slope,) = torch.autograd.grad(model(mixed).sum(), mixed, create_graph=True)
    return model(fake).mean() - model(real).mean() + 10 * (slope.norm(dim=1) - 1).square().mean()


class Force(nn.Module):
    """Minus the slope of an energy."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.energy = network(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_(True)
        return -torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]


def network(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(2, width), nn.LayerNorm(width), nn.Tanh(), nn.Linear(width, 1)).to(D)


def sgd(model: nn.Module, width: int) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-3)


def settings(**own: Any) -> dict[str, Any]:
    return {"build": network, "optimizer": sgd, "loss": None, "closure": None, **own}


KINDS: dict[str, dict[str, Any]] = {
    "residual": settings(data=[points(0), points(1)], closure=residual),
    "penalty": settings(data=[(points(0), points(1) + 1), (points(2), points(3) + 1)], closure=penalty),
    "forces": settings(data=[(points(0), points(1)), (points(2), points(3))], loss=F.mse_loss, build=Force),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def loss_of(kind: dict[str, Any], model: nn.Module, batch: Any) -> Tensor:
    value: Tensor = kind["closure"](model, batch) if kind["closure"] else kind["loss"](model(batch[0]), batch[1])
    return value


@kinds
@pytest.mark.parametrize("around", [torch.enable_grad, torch.no_grad])
def test_the_first_loss_is_the_loss_whatever_the_mode_around_it(kind: str, around: Callable[[], Any]) -> None:
    family = Family(**KINDS[kind])
    run = family.start(4)
    with around():
        before, value = torch.is_grad_enabled(), first_loss(run)
        assert torch.is_grad_enabled() is before
    assert value in [pytest.approx(float(loss_of(KINDS[kind], run.model, batch).detach()), rel=1e-12) for batch in family.batches]
    assert all(p.grad is None for p in run.model.parameters()) and run.position == 0


@kinds
def test_runs_of_learning_rate_transfer_have_the_losses_of_training_by_hand(kind: str) -> None:
    own = KINDS[kind]
    rest = {name: own[name] for name in ("optimizer", "data", "loss", "closure")}
    found = learning_rate_transfer(own["build"], [4, 6], **rest, steps=4, seeds=1, factors=[0.5, 1.0, 2.0])
    run = Family(**own).start(4, lr_factor=0.5)
    for _ in range(4):
        batch = run.next_batch()
        run.optimizer.zero_grad()
        loss = loss_of(own, run.model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        run.optimizer.step()
    assert found.curves[0].losses[-1.0][0] == pytest.approx(float(loss.detach()), rel=1e-10), "the last quarter is the last step"


@kinds
def test_coordinates_are_those_of_the_forward_pass(kind: str) -> None:
    own = KINDS[kind]
    rest = {name: own[name] for name in ("optimizer", "data", "loss", "closure")}
    check = coordinate_check(own["build"], [4, 6, 8], **rest, steps=2, seeds=1)
    model, batch = Family(**own).start(4).model, own["data"][0]
    x = batch if isinstance(batch, Tensor) else 0.3 * batch[0] + 0.7 * batch[1] if kind == "penalty" else batch[0]
    first = (model.energy if isinstance(model, Force) else model)[0](x)
    name = "energy.0" if kind == "forces" else "0"
    assert check[name].rms[4][0][0] == pytest.approx(float(first.detach().square().mean().sqrt()), rel=1e-6)


@kinds
def test_sharpness_is_that_of_the_dense_hessian(kind: str) -> None:
    own = KINDS[kind]
    rest = {name: own[name] for name in ("optimizer", "data", "loss", "closure")}
    found = sharpness_transfer(own["build"], [4, 6], **rest, steps=2, every=2, seeds=1, tol=1e-4)
    model = Family(**own).start(4).model.eval()
    plain = _without_fused_norm(model)
    matrix = dense_hessian(lambda: loss_of(own, plain, own["data"][0]), [p for p in model.parameters() if p.requires_grad])
    assert found.lambda_max[4][0, 0] == pytest.approx(float(torch.linalg.eigvalsh(matrix)[-1]), rel=1e-3)


def _without_fused_norm(model: nn.Module) -> nn.Module:
    """Layer norm by plain operations, whose derivatives are right to any order, over the same parameters."""

    def normalised(module: Any, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + module.eps).sqrt() * module.weight + module.bias

    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.forward = normalised.__get__(module)  # type: ignore[method-assign]
    return model


def test_the_best_constant_force_is_the_mean_one() -> None:
    x, y = KINDS["forces"]["data"][0]
    objective = Objective(Force(4), (x, y), loss=F.mse_loss)
    assert constant_loss(objective) == pytest.approx(float((y - y.mean(0)).square().mean()), rel=1e-3)
