"""What leaves no trace in the graph is found by one finite-difference probe, once; ordinary networks pay nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import built, gaussian, labels, mlp, relative_error
from torch import Tensor, nn
from torch.nn import functional as F
from traces import untouched

import sharpkit as sk
from sharpkit.operators.probe import probe_derivatives


def square(how: str) -> Any:
    """z^2 with a right first derivative, and a second one that is right, cut off, or declared missing."""

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, z: Tensor) -> Tensor:
            ctx.save_for_backward(z)
            return z**2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (z,) = ctx.saved_tensors
            if how == "right":
                return grad * 2 * z
            with torch.no_grad():
                return grad * 2 * z.detach()

    if how == "once":
        Square.backward = staticmethod(torch.autograd.function.once_differentiable(lambda ctx, g: 2 * ctx.saved_tensors[0] * g))  # type: ignore[method-assign]
    return Square.apply


class Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


class FusedCrossEntropy(torch.autograd.Function):
    """Computes its gradient in the forward pass, as chunked and fused losses do."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            loss = F.cross_entropy(leaf, y)
            ctx.save_for_backward(*torch.autograd.grad(loss, leaf))
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.saved_tensors[0] * grad, None


class Applied(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, z: Tensor) -> Tensor:
        return self.function(z)


def network(function: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float64) -> nn.Module:
    return built(lambda: nn.Sequential(nn.Linear(4, 5), Applied(function), nn.Linear(5, 3)), dtype=dtype)


def objective(function: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float64, **settings: Any) -> sk.Objective:
    return sk.Objective(network(function, dtype), (gaussian(20, 4, dtype=dtype), labels(20)), loss=F.cross_entropy, **settings)


def scaled_by_a_hook(z: Tensor) -> Tensor:
    z = z * 1
    if z.requires_grad:
        z.register_hook(lambda g: 2 * g)
    return z.tanh()


NO_GRADIENT = {
    "gradient reversal": Reversal.apply,
    "straight-through": lambda z: z + (z.round() - z).detach(),
    "hard gumbel softmax": lambda z: F.gumbel_softmax(z, hard=True),
    "a detached factor": lambda z: z * z.detach().tanh(),
    "a factor as a number": lambda z: z.tanh() * float(z.square().mean()),
    "data": lambda z: z * z.data.tanh(),
    "a hook on a tensor": scaled_by_a_hook,
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", NO_GRADIENT)
def test_a_gradient_that_is_not_that_of_the_loss_is_refused(name: str, dtype: torch.dtype) -> None:
    problem = objective(NO_GRADIENT[name], dtype)
    for operator in (sk.HessianOperator, sk.GaussNewtonOperator):
        H = operator(problem)
        with untouched(problem.model), pytest.raises(sk.ObjectiveError, match=r"gradient is not that of the loss.*check=False"):
            H @ gaussian(H.size, dtype=dtype)
    assert problem.second_order.probe_gradients <= 7


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_second_derivative_that_is_cut_off_is_refused_once_and_for_all(dtype: torch.dtype) -> None:
    problem = objective(square("cut"), dtype)
    H = sk.HessianOperator(problem)
    for _ in range(2):
        with pytest.raises(sk.UnsupportedError, match=r"custom function Square.*EmpiricalFisherOperator"):
            H @ gaussian(H.size, dtype=dtype)
    taken = problem.second_order.probe_gradients
    with pytest.raises(sk.UnsupportedError):
        sk.HessianOperator(problem.with_data(list(problem.batches()))) @ gaussian(H.size, dtype=dtype)
    assert problem.second_order.probe_gradients == taken <= 7


HARMLESS = {
    "a custom function": square("right"),
    "a logged norm": lambda z: (z.detach().norm(), z.tanh())[1],
    "a shift that cancels": lambda z: (z - z.max(1, keepdim=True)[0].detach()).softmax(1),
    "kinks and a custom function": lambda z: square("right")(z.relu()),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", HARMLESS)
def test_what_only_looks_suspicious_is_measured_after_one_cheap_probe(name: str, dtype: torch.dtype) -> None:
    problem = objective(HARMLESS[name], dtype)
    H = sk.HessianOperator(problem)
    H @ gaussian(H.size, dtype=dtype)
    assert problem.second_order.doubts
    assert problem.second_order.probe_gradients == 3


def test_an_ordinary_network_is_not_probed() -> None:
    problem = mlp()
    H = sk.HessianOperator(sk.Objective(problem.model, problem.batches, loss=problem.loss))
    H @ gaussian(H.size)
    assert not H.objective.second_order.doubts
    assert H.objective.second_order.probe_gradients == 0


def test_check_false_measures_with_what_is_detached_held_fixed() -> None:
    H = sk.HessianOperator(objective(lambda z: z * z.detach().tanh(), check=False))
    assert (H @ gaussian(H.size)).any()


@pytest.mark.parametrize("how", ["cut", "once"])
@pytest.mark.parametrize("operator", [sk.GaussNewtonOperator, sk.EmpiricalFisherOperator, sk.FisherOperator])
def test_matrices_of_first_derivatives_are_exact_through_functions_that_have_no_second(how: str, operator: Any) -> None:
    exact = operator(objective(square("right"))).to_dense()
    assert relative_error(operator(objective(square(how))).to_dense(), exact) < 1e-10


def test_a_fused_loss_is_refused_by_the_hessian_and_by_gauss_newton_and_taken_by_the_empirical_fisher() -> None:
    model, data = network(torch.tanh), (gaussian(20, 4), labels(20))
    fused, plain = (sk.Objective(model, data, loss=loss) for loss in (FusedCrossEntropy.apply, F.cross_entropy))
    for operator, message in (
        (sk.HessianOperator, "no right second derivative"),
        (sk.GaussNewtonOperator, "second derivative of the loss"),
    ):
        with pytest.raises(sk.UnsupportedError, match=message):
            operator(fused) @ gaussian(43)
    fisher = sk.EmpiricalFisherOperator(fused).to_dense()
    assert relative_error(fisher, sk.EmpiricalFisherOperator(plain).to_dense()) < 1e-10


@pytest.mark.parametrize("function", [square("cut"), Reversal.apply], ids=["cut", "reversal"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_model_that_cannot_be_copied_is_probed_itself(function: Any, dtype: torch.dtype) -> None:
    problem = objective(function, dtype)
    problem.model.lock = threading.Lock()  # cannot be deep-copied
    H = sk.HessianOperator(problem)
    with untouched(problem.model), pytest.raises(sk.SharpkitError, match=r"derivative|gradient"):
        H @ gaussian(H.size, dtype=dtype)


def test_padding_rows_are_left_out_of_the_direction() -> None:
    """The loss depends on the padding row, but torch gives it no gradient through the embedding."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(7, 4, padding_idx=0)
            self.embedding.weight.data[0] = 0.3

        def forward(self, ids: Tensor) -> Tensor:
            return torch.tanh(self.embedding(ids)).mean(1) @ self.embedding.weight.T

    ids = torch.tensor([[0, 1, 2], [3, 0, 0], [4, 5, 6]])
    problem = sk.Objective(built(Tied), (ids, torch.tensor([1, 2, 0])), loss=F.cross_entropy)
    probe = probe_derivatives(problem, sk.HessianOperator, patient=True)
    assert probe.gradient.right
    assert probe.product is not None
    assert probe.product.right


def test_spectral_norm_is_refused_in_train_mode_and_right_in_eval_mode() -> None:
    for norm in (nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm):
        model = built(lambda norm=norm: nn.Sequential(norm(nn.Linear(5, 4)), nn.Tanh(), nn.Linear(4, 3)))
        data = (gaussian(12, 5), labels(12))
        H = sk.HessianOperator(sk.Objective(model, data, loss=F.cross_entropy, mode="train"))
        with pytest.raises(sk.UnsupportedError, match=r"spectral_norm.*mode='eval'"):
            H @ gaussian(H.size)
        objective = sk.Objective(model, data, loss=F.cross_entropy)
        probe = probe_derivatives(objective, sk.HessianOperator, patient=True)
        assert probe.product is not None
        assert probe.product.right
