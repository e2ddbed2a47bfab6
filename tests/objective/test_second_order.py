"""Operations whose second derivative PyTorch gets wrong or lacks are right: against finite differences of first gradients, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import built, gaussian, labels, relative_error
from torch import Tensor, nn
from torch.nn import functional as F

import sharpkit as sk
from sharpkit.objective.second_order import _FAULTY, _REPLACEMENTS, Replaced

BY_DIFFERENCES = 1e-7  # central differences with a step of 1e-5 in float64
IDS = torch.tensor([[0, 1, 2, 2], [3, 4, 5, 6], [1, 1, 1, 1], [6, 0, 3, 5]])


def hessian_by_differences(loss: Callable[[], Tensor], params: list[nn.Parameter], step: float = 1e-5) -> Tensor:
    def gradient() -> Tensor:
        parts = [None if g is None else g.to_dense() for g in torch.autograd.grad(loss(), params, allow_unused=True)]
        return torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in zip(parts, params, strict=True)])

    rows = []
    for p in params:
        entries = p.data.view(-1)
        for i in range(entries.numel()):
            before = entries[i].item()
            entries[i] = before + step
            up = gradient()
            entries[i] = before - step
            rows.append((up - gradient()) / (2 * step))
            entries[i] = before
    return torch.stack(rows)


def penalised(model: nn.Module, x: Tensor) -> Tensor:
    """A gradient penalty, as in WGAN-GP."""
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return ((slope.flatten(1).norm(dim=1) - 1) ** 2).mean()


def mean_square(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def after(function: Callable[[Tensor], Tensor]) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), Function(function))


def ctc(z: Tensor) -> Tensor:
    return F.ctc_loss(z.view(6, 2, 5).log_softmax(2), torch.tensor([[1, 2], [3, 3]]), torch.tensor([6, 6]), torch.tensor([2, 2]))


CASES: dict[str, tuple[Callable[[], nn.Module], Any, Callable[..., Tensor]]] = {
    "weight_norm": (lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.Tanh()), gaussian(6, 4), mean_square),
    "weight_norm, old": (lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 3)), nn.Tanh()), gaussian(6, 4), mean_square),
    "weight_norm in a penalty": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.Tanh()),
        gaussian(6, 4),
        penalised,
    ),
    "weight_norm and a gradient in the weights": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.Tanh()),
        gaussian(6, 4),
        lambda m, x: sum(g.square().sum() for g in torch.autograd.grad(mean_square(m, x), list(m.parameters()), create_graph=True)),
    ),
    "BatchNorm in eval mode, in a penalty": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh()),
        gaussian(6, 4),
        penalised,
    ),
    "LayerNorm in a penalty": (lambda: nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Tanh()), gaussian(6, 4), penalised),
    "InstanceNorm in a penalty": (
        lambda: nn.Sequential(nn.Conv1d(2, 3, 2), nn.InstanceNorm1d(3, affine=True), nn.Tanh()),
        gaussian(5, 2, 4),
        penalised,
    ),
    "BatchNorm in a penalty": (lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh()), gaussian(6, 4), penalised),
    "GroupNorm in a penalty": (lambda: nn.Sequential(nn.Linear(4, 6), nn.GroupNorm(2, 6), nn.Tanh()), gaussian(6, 4), penalised),
    "hardsigmoid": (lambda: after(F.hardsigmoid), gaussian(6, 4), mean_square),
    "cdist": (lambda: after(lambda z: torch.cdist(z, z)), gaussian(6, 4), mean_square),
    "pdist": (lambda: after(F.pdist), gaussian(6, 4), mean_square),
    "sparse Embedding": (lambda: nn.Sequential(nn.Embedding(7, 3, sparse=True), nn.Linear(3, 2), nn.Tanh()), IDS, mean_square),
    "EmbeddingBag": (lambda: nn.Sequential(nn.EmbeddingBag(7, 3), nn.Linear(3, 2), nn.Tanh()), IDS, mean_square),
    "multi_margin_loss": (lambda: after(torch.tanh), gaussian(6, 4), lambda m, x: F.multi_margin_loss(m(x), labels(6, classes=5), p=2)),
    "multilabel_margin_loss": (
        lambda: after(torch.tanh),
        gaussian(2, 4),
        lambda m, x: F.multilabel_margin_loss(m(x), torch.tensor([[1, 2, -1, 0, 0], [0, -1, 1, 1, 1]])),
    ),
    "ctc_loss": (lambda: nn.Linear(4, 5), gaussian(12, 4), lambda m, x: ctc(m(x))),
}


@pytest.mark.parametrize("name", CASES)
def test_the_hessian_is_right_where_pytorch_has_none_or_a_wrong_one(name: str) -> None:
    make, x, loss = CASES[name]
    model = built(make).train("eval" not in name)
    expected = hessian_by_differences(lambda: loss(model, x), list(model.parameters()))
    objective = sk.Objective(model, x, closure=loss, mode="train" if model.training else "eval")
    if name == "weight_norm and a gradient in the weights":  # there even torch's gradient is wrong, which the reference differentiates
        with Replaced(["weight_norm"]):
            expected = hessian_by_differences(lambda: loss(model, x), list(model.parameters()))
    dense = sk.HessianOperator(objective).to_dense()
    assert relative_error(dense, expected) < BY_DIFFERENCES
    assert objective.value() == pytest.approx(float(loss(model, x).detach()), rel=1e-12)
    assert objective.second_order.probe_gradients == 0, "what the graph shows needs no probe"


def test_the_gradient_of_a_loss_that_takes_one_in_weight_normed_weights_is_that_of_its_value() -> None:
    """PyTorch's own is wrong: a loss that takes a gradient inside needs the second derivative for its first."""
    make, x, loss = CASES["weight_norm and a gradient in the weights"]
    model = built(make)
    objective = sk.Objective(model, x, closure=loss)
    _, gradient = objective.gradient()
    direction = gaussian(objective.num_parameters)
    with torch.no_grad():
        values = []
        for sign in (1.0, -1.0):
            for p, d in zip(objective.layout.params, objective.layout.split(direction), strict=True):
                p.add_(d, alpha=sign * 1e-6)
            values.append(objective.value())
            for p, d in zip(objective.layout.params, objective.layout.split(direction), strict=True):
                p.sub_(d, alpha=sign * 1e-6)
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(float(gradient @ direction), rel=1e-6)


FORMS: dict[str, list[tuple[Callable[..., Tensor], tuple[Tensor, ...]]]] = {
    "weight_norm": [(lambda v, g: torch._weight_norm(v, g, 0), (gaussian(4, 3), gaussian(4, 1)))],
    "layer_norm": [(lambda x, w, b: F.layer_norm(x, (4, 3), w, b), (gaussian(5, 4, 3), gaussian(4, 3), gaussian(4, 3)))],
    "batch_norm": [
        (lambda x, w, b: F.batch_norm(x, None, None, w, b, True), (gaussian(5, 4, 3), gaussian(4), gaussian(4))),
        (lambda x: F.instance_norm(x, torch.zeros(4).double(), torch.ones(4).double()), (gaussian(5, 4, 3),)),
    ],
    "hardsigmoid": [(F.hardsigmoid, (4 * gaussian(30),))],
    "cdist": [(lambda x, y, p=p: torch.cdist(x, y, p=p), (gaussian(2, 4, 3), gaussian(2, 5, 3))) for p in (1.0, 2.0, 3.0, float("inf"))],
    "pdist": [(lambda x, p=p: F.pdist(x, p), (gaussian(5, 3),)) for p in (1.0, 2.0, 3.0)],
    "embedding": [(lambda w: F.embedding(IDS, w, padding_idx=2), (gaussian(7, 3),))],
    "embedding_bag": [
        (lambda w, m=m, o=o: F.embedding_bag(IDS if o is None else IDS.flatten(), w, o, mode=m, padding_idx=2), (gaussian(7, 3),))
        for m in ("mean", "sum", "max")
        for o in (None, torch.tensor([0, 3, 3, 8]))
    ],
    "multi_margin_loss": [
        (lambda x, p=p, r=r: F.multi_margin_loss(x, labels(4, classes=6), p=p, margin=0.7, reduction=r), (gaussian(4, 6),))
        for p in (1, 2)
        for r in ("mean", "sum", "none")
    ],
    "multilabel_margin_loss": [
        (
            lambda x, r=r: F.multilabel_margin_loss(x, torch.tensor([[1, 2, -1, 0], [-1, 0, 0, 0], [3, 2, 1, 0]]), reduction=r),
            (gaussian(3, 4),),
        )
        for r in ("mean", "sum", "none")
    ],
    "ctc_loss": [
        (
            lambda x, r=r, t=t: F.ctc_loss(
                x.log_softmax(2), t, torch.tensor([9, 4]), torch.tensor([2, 3]), reduction=r, zero_infinity=True
            ),
            (gaussian(9, 2, 6),),
        )
        for r in ("mean", "sum", "none")
        for t in (torch.tensor([[1, 2, 0], [3, 3, 4]]), torch.tensor([1, 2, 3, 3, 4]), torch.tensor([[1, 2, 0], [3, 3, 3]]))
    ],
}


@pytest.mark.parametrize("name", FORMS)
def test_a_definition_has_the_value_and_the_gradient_of_the_operation(name: str) -> None:
    for function, tensors in FORMS[name]:
        inputs = [t.clone().requires_grad_() for t in tensors]
        own = function(*inputs)
        with Replaced([name]):
            mine = function(*inputs)
        torch.testing.assert_close(mine, own)
        along = torch.randn(own.shape, generator=torch.Generator().manual_seed(0), dtype=own.dtype)
        for a, b in zip(torch.autograd.grad(own, inputs, along), torch.autograd.grad(mine, inputs, along), strict=True):
            torch.testing.assert_close(b, a)


def test_every_faulty_operation_has_a_definition_and_a_test() -> None:
    assert set(_FAULTY.values()) == set(_REPLACEMENTS) == set(FORMS)


@pytest.mark.parametrize("norm", [F.batch_norm, F.instance_norm])
def test_running_statistics_move_as_in_the_operation_itself(norm: Callable[..., Tensor]) -> None:
    x, statistics = gaussian(5, 4, 3), [[torch.zeros(4).double(), torch.ones(4).double()] for _ in range(2)]
    kwargs = {"training": True} if norm is F.batch_norm else {}
    norm(x, *statistics[0], **kwargs)
    with Replaced(["batch_norm"]):
        norm(x, *statistics[1], **kwargs)
    torch.testing.assert_close(statistics[0], statistics[1])


def test_an_operation_that_cannot_be_replaced_is_named_with_a_way_out() -> None:
    model = built(lambda: nn.Sequential(nn.EmbeddingBag(7, 3, max_norm=1.0), nn.Linear(3, 2)))
    H = sk.HessianOperator(sk.Objective(model, IDS, closure=mean_square))
    with pytest.raises(sk.UnsupportedError, match=r"embedding_bag.*EmpiricalFisherOperator"):
        H @ gaussian(H.size)


def test_an_operation_without_second_derivative_and_definition_is_named() -> None:
    model = after(lambda z: torch.segment_reduce(z, "mean", lengths=torch.tensor([2, 4]))).double()
    H = sk.HessianOperator(sk.Objective(model, gaussian(6, 4), closure=mean_square))
    with pytest.raises(sk.UnsupportedError, match=r"no second derivative of segment_reduce.*GaussNewtonOperator"):
        H @ gaussian(H.size)


def test_ordinary_networks_keep_their_own_operations() -> None:
    model = built(lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)))
    objective = sk.Objective(model, (gaussian(6, 4), labels(6)), loss=F.cross_entropy)
    H = sk.HessianOperator(objective)
    H @ gaussian(H.size)
    known = objective.second_order
    assert not known.replaced and not known.doubts and not known.probe_gradients


# -- losses that take a gradient inside -------------------------------------------------------------------------------------------
def physics(model: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    u = model(x)
    return ((torch.autograd.grad(u.sum(), x, create_graph=True)[0] + u) ** 2).mean()


def test_reading_how_a_tensor_is_made_under_no_grad_is_no_doubt_but_reading_or_writing_its_numbers_is() -> None:
    def seen(look: Callable[[Tensor], Any]) -> set[str]:
        model = nn.Linear(2, 1).double()

        def closure(m: nn.Module, batch: Tensor) -> Tensor:
            out: Tensor = m(batch)
            with torch.no_grad():
                look(out)
            return out.square().mean()

        return sk.Objective(model, torch.ones(3, 2, dtype=torch.float64), closure=closure).second_order.doubts

    assert seen(lambda t: (t.dtype, t.device, t.shape, t.size(0), t.is_floating_point(), torch.zeros(3).to(dtype=t.dtype))) == set()
    assert seen(lambda t: t.exp()) == seen(lambda t: torch.zeros(3, 1).double().__setitem__(0, t[0])) == {"torch.no_grad()"}


@pytest.mark.parametrize("check", [True, False])
def test_a_loss_that_differentiates_inside_has_a_value_a_critical_rate_and_a_diagnosis(check: bool) -> None:
    model = built(lambda: nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)))
    x = torch.linspace(0, 1, 20, dtype=torch.float64)[:, None]
    objective = sk.Objective(model, x, closure=physics, count=len, check=check)
    assert objective.value() == pytest.approx(float(physics(model, x).detach()), rel=1e-12)
    assert sk.critical_learning_rate(objective, torch.optim.SGD(model.parameters(), lr=0.01)).outcome == "found"
    assert sk.examine(objective).passed
    expected = hessian_by_differences(lambda: physics(model, x), list(model.parameters()))
    assert relative_error(sk.HessianOperator(objective).to_dense(), expected) < BY_DIFFERENCES


def test_a_monitor_and_a_learning_rate_curve_take_a_loss_that_differentiates_inside() -> None:
    model = built(lambda: nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)))
    x = torch.linspace(0, 1, 64, dtype=torch.float64)[:, None]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    monitor = sk.Monitor(model, optimizer, closure=physics, every=1)
    physics(model, x).backward()
    optimizer.step()
    monitor.step(x)
    top = torch.linalg.eigvalsh(hessian_by_differences(lambda: physics(model, x), list(model.parameters())))[-1]
    assert monitor.history[-1]["lambda_max"].value == pytest.approx(float(top), rel=0.05)
    curve = sk.learning_rate_curve(sk.Objective(model, x, closure=physics, count=len), optimizer, batch_sizes=[8, 32])
    assert curve.lr > 0


def test_complex_views_of_parameters_at_any_place_in_the_vector_are_right() -> None:
    class Spectral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias, self.weight = nn.Parameter(gaussian(3)), nn.Parameter(gaussian(3, 3, 2))

        def forward(self, x: Tensor) -> Tensor:
            mixed = torch.fft.fft(x.to(torch.complex128)) @ torch.view_as_complex(self.weight)
            return (torch.fft.ifft(mixed).real + self.bias).tanh()

    model, x = Spectral(), gaussian(10, 3)
    expected = hessian_by_differences(lambda: mean_square(model, x), list(model.parameters()))
    assert relative_error(sk.HessianOperator(sk.Objective(model, x, closure=mean_square)).to_dense(), expected) < BY_DIFFERENCES
