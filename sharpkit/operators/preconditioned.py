"""Curvature as an optimizer sees it: scaled on both sides by a diagonal, live optimizer state or |w|."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from sharpkit.objective.params import ParamLayout
from sharpkit.operators.base import SymmetricOperator, _DerivedOperator, check_operator, real_tensor, scale_rows
from sharpkit.optimizers import StepMatrix, UpdateRule, preconditioner_scale, step_matrix


@runtime_checkable
class _HasLayout(Protocol):
    layout: ParamLayout


class _DiagonalScaling(_DerivedOperator):
    """S A S with S = diag(scale), captured at construction."""

    def __init__(self, base: SymmetricOperator, scale: Tensor) -> None:
        super().__init__(base)
        if scale.shape != (base.length,):
            raise ValueError(f"the diagonal must have shape ({base.length},), got {tuple(scale.shape)}")
        if not bool(torch.isfinite(scale).all()):
            raise ValueError("the diagonal contains NaN or infinity")
        self.scale = scale.detach().to(dtype=base.dtype, device=base.device)

    def matvec(self, vector: Tensor) -> Tensor:
        return scale_rows(self.scale, self.base.multiply(scale_rows(self.scale, vector)))

    def block(self, pattern: str | Callable[[str, Tensor], bool]) -> SymmetricOperator:
        block = self.base.block(pattern)
        return _DiagonalScaling(block, self.scale[layout_of(self.base).indices(layout_of(block).names)])


class PreconditionedOperator(_DiagonalScaling):
    """D^-1/2 A D^-1/2: symmetric, with the eigenvalues of D^-1 A, D what an adaptive optimizer divides its gradients by.

    D is read from the live state: Adam, AdamW and NAdam sqrt(v_hat) + eps, amsgrad's maximum where used; RAdam over its rectification;
    Adamax the largest gradient; RMSprop sqrt(v) + eps, centred where asked; Adagrad sqrt(sum) + eps; Adadelta, Adafactor, schedule-free
    AdamW and RAdam, and Prodigy as docs/mathematics.md has them; SGD and ASGD 1. Groups with other learning rates or momenta than the first
    that trains are scaled so that the limit holds for that one's rate. Parameters that the optimizer does not move have zero rows: not
    held, at rate 0, without a gradient so far. The state is captured at construction: make a new operator after further steps.

    Args:
        base: a curvature operator, or a sum or multiple of such.
        optimizer: one of these or a registered one, after at least one step.
        diagonal: D itself, (n,) positive, for any other optimizer.

    Raises:
        UnsupportedError: another optimizer, without ``diagonal``.
        ValueError: the optimizer has not stepped yet, or holds none of the parameters.

    Example:
        >>> import torch, sharpkit as sk
        >>> A = sk.as_operator(torch.eye(2).double())
        >>> sk.PreconditionedOperator(A, diagonal=torch.tensor([4.0, 16.0])).to_dense().diagonal().tolist()
        [0.25, 0.0625]

    References:
        Cohen et al., "Adaptive gradient methods at the edge of stability" (2022), arXiv 2207.14484.
    """

    def __init__(self, base: SymmetricOperator, optimizer: torch.optim.Optimizer | None = None, *, diagonal: Tensor | None = None) -> None:
        check_operator(base)
        if (optimizer is None) == (diagonal is None):
            raise ValueError("pass either an optimizer or diagonal=")
        if optimizer is not None:
            scale = preconditioner_scale(optimizer, layout_of(base))
        else:
            divisor = real_tensor("diagonal", diagonal)
            if divisor.shape != (base.length,):
                raise ValueError(f"diagonal must have shape ({base.length},), got {tuple(divisor.shape)}")
            if not bool((divisor > 0).all()):
                raise ValueError("the diagonal must be positive everywhere")
            scale = divisor.double().rsqrt()  # in float64: small second moments lose digits in float32
        super().__init__(base, scale)


class DiagonalShift(_DerivedOperator):
    """A + diag(d)."""

    def __init__(self, base: SymmetricOperator, diagonal: Tensor) -> None:
        super().__init__(base)
        self.diagonal = diagonal.to(dtype=base.dtype, device=base.device)

    def matvec(self, vector: Tensor) -> Tensor:
        return self.base.multiply(vector) + scale_rows(self.diagonal, vector)

    def block(self, pattern: str | Callable[[str, Tensor], bool]) -> SymmetricOperator:
        block = self.base.block(pattern)
        return DiagonalShift(block, self.diagonal[layout_of(self.base).indices(layout_of(block).names)])


def optimizer_curvature(
    base: SymmetricOperator, optimizer: torch.optim.Optimizer, *, ratios: Sequence[float] | None = None, diagonal: Tensor | None = None
) -> tuple[SymmetricOperator, UpdateRule]:
    """The matrix that an optimizer's stability limit is about, and the rule by which its top eigenvalue bounds the learning rate.

    D^-1/2 R^1/2 (H + decay) R^1/2 D^-1/2 + R decoupled decay, R each group's weight against the first that trains; H itself where one rate
    and one rule move all parameters and nothing is divided by D.

    Args:
        base: a curvature operator.
        optimizer, ratios, diagonal: as in :func:`sharpkit.optimizers.limits.step_matrix`, which names the errors too.
    """
    turned = step_matrix(optimizer, layout_of(base), ratios=ratios, diagonal=diagonal)
    return turned_curvature(base, turned), turned.rule


def turned_curvature(base: SymmetricOperator, turned: StepMatrix) -> SymmetricOperator:
    """The matrix of :func:`optimizer_curvature`, what it is made of being known."""
    matrix = _shifted(base, turned.decay)
    if turned.scale is not None:
        matrix = _DiagonalScaling(matrix, turned.scale)
    return _shifted(matrix, turned.shift)


def _shifted(base: SymmetricOperator, shift: Tensor | float) -> SymmetricOperator:
    if isinstance(shift, Tensor):
        return DiagonalShift(base, shift)
    return base + shift if shift else base


class AdaptiveOperator(_DiagonalScaling):
    """T A T with T = diag(|w|): the quadratic form of adaptive sharpness, unchanged by rescaling the weights.

    Args:
        base: a curvature operator.
        weights: (n,) parameters w, by default the present ones.

    References:
        Kwon et al., "ASAM" (2021), arXiv 2102.11600.
    """

    def __init__(self, base: SymmetricOperator, *, weights: Tensor | None = None) -> None:
        check_operator(base)
        super().__init__(base, (layout_of(base).current() if weights is None else real_tensor("weights", weights)).abs())


def layout_of(operator: SymmetricOperator) -> ParamLayout:
    """The named parameters behind an operator or what it is derived from.

    Raises:
        TypeError: there are none.
    """
    inner: Any = operator
    while not isinstance(inner, _HasLayout):
        inner = getattr(inner, "base", None)  # of a sum the first: both have the same parameters, or adding them means nothing
        if inner is None:
            raise TypeError(
                f"{type(operator).__name__} has no named parameters to match with the optimizer's: wrap a curvature operator, or pass "
                "diagonal="
            )
    return inner.layout
