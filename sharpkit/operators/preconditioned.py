"""Curvature as an optimizer sees it: scaled on both sides by a diagonal, live optimizer state or |w|."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from sharpkit._errors import UnsupportedError
from sharpkit.objective.params import ParamLayout, ParamSelector
from sharpkit.operators.base import SymmetricOperator, _DerivedOperator


@runtime_checkable
class _HasLayout(Protocol):
    layout: ParamLayout


class _DiagonalScaling(_DerivedOperator):
    """S A S with S = diag(scale) taken at the time of making."""

    def __init__(self, base: SymmetricOperator, scale: Tensor) -> None:
        super().__init__(base)
        if scale.shape != (base.size,):
            raise ValueError(f"the diagonal must have shape ({base.size},), got {tuple(scale.shape)}")
        if not bool(torch.isfinite(scale).all()):
            raise ValueError("the diagonal contains NaN or infinity")
        self.scale = scale.detach().to(dtype=base.dtype, device=base.device)

    def _multiply_vector(self, vector: Tensor) -> Tensor:
        return self.base.multiply(self.scale * vector) * self.scale

    def _restricted_scale(self, pattern: ParamSelector) -> tuple[SymmetricOperator, Tensor]:
        block = self.base.block(pattern)  # type: ignore[arg-type]
        return block, self.scale[layout_of(self.base).indices(layout_of(block).names)]


class PreconditionedOperator(_DiagonalScaling):
    """D^-1/2 A D^-1/2: symmetric, with the eigenvalues of D^-1 A, D what an adaptive optimizer divides its gradients by.

    D is read from the live state: Adam and AdamW (1 - beta1^t)(sqrt(v_hat) + eps), amsgrad's maximum where used; RMSprop sqrt(v) + eps,
    centred where asked; Adagrad sqrt(sum) + eps; SGD 1. Parameter groups with other learning rates than the first are scaled by their
    ratio,
    so that the limit found holds for the first group's rate. Parameters that the optimizer has never moved have zero rows. The state is
    copied: make a new operator after further steps.

    Args:
        base: a curvature operator, or a sum or multiple of such.
        optimizer: torch.optim SGD, Adam, AdamW, RMSprop or Adagrad after at least one step.
        diagonal: D itself, (n,) positive, for any other optimizer.

    Raises:
        UnsupportedError: another optimizer, without ``diagonal``.
        ValueError: the optimizer has not stepped yet, or does not hold all parameters.

    Example:
        >>> import torch, sharpkit as sk
        >>> A = sk.as_operator(torch.eye(2).double())
        >>> sk.PreconditionedOperator(A, diagonal=torch.tensor([4.0, 16.0])).to_dense().diagonal().tolist()
        [0.25, 0.0625]

    References:
        Cohen et al., "Adaptive gradient methods at the edge of stability" (2022), arXiv 2207.14484.
    """

    def __init__(self, base: SymmetricOperator, optimizer: torch.optim.Optimizer | None = None, *, diagonal: Tensor | None = None) -> None:
        if (optimizer is None) == (diagonal is None):
            raise ValueError("pass either an optimizer or diagonal=")
        if optimizer is not None:
            scale = preconditioner_scale(optimizer, layout_of(base))
        else:
            if not isinstance(diagonal, Tensor):
                raise TypeError(f"diagonal must be a tensor of shape ({base.size},), got {type(diagonal).__name__}")
            if not bool((diagonal > 0).all()):
                raise ValueError("the diagonal must be positive everywhere")
            scale = diagonal.double().rsqrt()
        super().__init__(base, scale)

    def block(self, pattern: str | Callable[[str, Tensor], bool]) -> SymmetricOperator:
        block, scale = self._restricted_scale(pattern)
        return PreconditionedOperator(block, diagonal=scale.double().pow(-2))


class AdaptiveOperator(_DiagonalScaling):
    """T A T with T = diag(|w|): the quadratic form of adaptive sharpness, unchanged by rescaling the weights.

    Args:
        base: a curvature operator.
        weights: (n,) to take |w| of; by default the present parameters.

    References:
        Kwon et al., "ASAM" (2021), arXiv 2102.11600.
    """

    def __init__(self, base: SymmetricOperator, *, weights: Tensor | None = None) -> None:
        super().__init__(base, (layout_of(base).current() if weights is None else weights).abs())

    def block(self, pattern: str | Callable[[str, Tensor], bool]) -> SymmetricOperator:
        block, scale = self._restricted_scale(pattern)
        return AdaptiveOperator(block, weights=scale)


def layout_of(operator: SymmetricOperator) -> ParamLayout:
    """The named parameters behind an operator or what it is derived from.

    Raises:
        TypeError: there are none.
    """
    found: Any = operator
    while not isinstance(found, _HasLayout):
        found = getattr(found, "base", None)
        if found is None:
            raise TypeError(
                f"{type(operator).__name__} has no named parameters to match with the optimizer's: wrap a curvature operator, or pass "
                "diagonal="
            )
    return found.layout


def preconditioner_scale(optimizer: torch.optim.Optimizer, layout: ParamLayout) -> Tensor:
    """D^-1/2 from an optimizer's live state, with groups' learning rates relative to the first's.

    Returns:
        (n,) in the layout's order.
    """
    if type(optimizer) not in _DENOMINATORS:
        raise UnsupportedError(
            f"the state of {type(optimizer).__name__} is not known; supported: {', '.join(k.__name__ for k in _DENOMINATORS)}. Pass "
            "diagonal= "
            "with what it divides gradients by"
        )
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    reference = float(optimizer.param_groups[0]["lr"])
    if reference == 0 and any(float(group["lr"]) for group in optimizer.param_groups):
        raise ValueError("the first group's learning rate is 0, and the others' are relative to it: measure after the warmup's first step")
    if _DENOMINATORS[type(optimizer)] is not _sgd and not any(float(s.get("step", 0)) for s in optimizer.state.values()):
        raise ValueError(f"{type(optimizer).__name__} has no state yet: measure after its first step")
    pieces: list[Tensor | None] = []
    for name, p in zip(layout.names, layout.params, strict=True):
        if id(p) not in groups:
            raise ValueError(f"parameter {name!r} is not in the optimizer; select the optimizer's parameters with params=, or add it")
        group, state = groups[id(p)], optimizer.state.get(p, {})
        if _DENOMINATORS[type(optimizer)] is not _sgd and not float(state.get("step", 0)):
            pieces.append(None)  # without a gradient so far, it has never been moved
            continue
        denominator = _DENOMINATORS[type(optimizer)](state, group, p)
        ratio = float(group["lr"]) / reference if reference else 1.0
        pieces.append((ratio / denominator).sqrt())
    return layout.flatten(pieces)


def _adam(state: dict[str, Any], group: dict[str, Any], p: Tensor) -> Tensor:
    beta1, beta2 = group["betas"]
    moment: Tensor = state["max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"]
    t = float(state["step"])
    corrected = moment.double() / (1 - float(beta2) ** t)
    divisor: Tensor = (corrected.sqrt() + group["eps"]) * (1 - float(beta1) ** t)
    return divisor


def _rmsprop(state: dict[str, Any], group: dict[str, Any], p: Tensor) -> Tensor:
    moment: Tensor = state["square_avg"].double()
    if group.get("centered"):
        moment = moment - state["grad_avg"].double().square()
    divisor: Tensor = moment.clamp_min(0).sqrt() + group["eps"]
    return divisor


def _adagrad(state: dict[str, Any], group: dict[str, Any], p: Tensor) -> Tensor:
    total: Tensor = state["sum"].double()
    divisor: Tensor = (total.sqrt() + group["eps"]) * (1 + (float(state["step"]) - 1) * group["lr_decay"])
    return divisor


def _sgd(state: dict[str, Any], group: dict[str, Any], p: Tensor) -> Tensor:
    return torch.ones_like(p, dtype=torch.float64)


_DENOMINATORS: dict[type, Callable[[dict[str, Any], dict[str, Any], Tensor], Tensor]] = {
    torch.optim.SGD: _sgd,
    torch.optim.Adam: _adam,
    torch.optim.AdamW: _adam,
    torch.optim.RMSprop: _rmsprop,
    torch.optim.Adagrad: _adagrad,
}
