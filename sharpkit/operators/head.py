"""Gauss-Newton and Fisher matrices of a cross-entropy over a large vocabulary, from a few tokens' logits at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sharpkit.objective.interrupts import Whole
from sharpkit.objective.logits import TANH, Chunked, LazyLogits, TokenLosses
from sharpkit.objective.loss import check_loss
from sharpkit.objective.memory import graph_cost
from sharpkit.objective.objective import Objective
from sharpkit.objective.reduction import Piece
from sharpkit.objective.second_order import custom_functions
from sharpkit.operators.blocks import PieceProduct, Pieces, derivative

Draw = Callable[[LazyLogits], Sequence[Tensor]]  # targets to take the loss at, of the model's logits


def product_in_chunks(objective: Objective, piece: Piece, curvature: str, draw: Draw | None = None) -> PieceProduct | None:
    """The product with J^T S J, J the Jacobian of the head's hidden states, weight and bias in the parameters, S a matrix in their space.

    With Z the derivative of the logits in hidden states, weight and bias, S = Z^T A Z. A is the loss's curvature in the logits, for each
    token diag(p) - p p^T or, of a Fisher matrix, r r^T with r the gradient. Z, A and Z^T are applied to some tokens at a time.

    Args:
        objective: made with ``loss=``.
        piece: of its data.
        curvature: ``"gauss_newton"`` or ``"fisher"``.
        draw: the targets whose matrices are averaged; by default the piece's own alone.

    Returns:
        None where the model's output is no large logits, or the loss is something else than a function of their cross-entropy.
    """
    if objective.loss is None or not objective.chunking.allowed or objective.second_order.doubts:
        return None
    params, mode = objective.layout.params, Chunked()
    while True:
        objective.seed_for(piece.key[0])  # the same dropout masks as in the objective's own evaluation
        with Whole(mode):
            output = objective.predict(piece.batch)
        if not isinstance(output, LazyLogits) or output.computed is not None:
            return None
        parts = [t for t in (output.hidden, output.weight, output.bias) if t is not None]
        if not objective.second_order.adapt(parts, once=True):
            break
    selected = {id(p) for p in params}
    head, outputs, leaves = output.cut(curvature, lambda t: t.requires_grad and (not t.is_leaf or id(t) in selected))
    if not outputs or custom_functions(outputs):
        return None
    slopes = []
    for target in [piece.batch[1]] if draw is None else draw(head):
        before = mode.losses
        loss = check_loss(objective.output_loss(head, target), piece.key[0])
        # of one cross-entropy alone, and without a bend between output and loss, which would be curvature of the loss
        if mode.losses != before + 1 or (seen := mode.last) is None or head.computed is not None:
            return None
        if seen.steps.count(TANH) > head.way.steps.count(TANH) or (draw is not None and not _is_likelihood(loss, seen, head, target)):
            return None
        slopes.append(torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True, materialize_grads=True))
    jacobian = _Jacobian(outputs, params)

    def multiply(vectors: Sequence[Tensor], batched: bool) -> Pieces:
        along = jacobian.forward(vectors)
        curved = [torch.zeros_like(t) for t in along]
        for slope in slopes:
            for total, part in zip(curved, derivative(slope, leaves, along, batched=False, zeros=True), strict=True):
                assert part is not None
                total.add_(part, alpha=1 / len(slopes))
        return jacobian.transpose(curved)

    return PieceProduct(multiply, piece.weight, graph_cost([*jacobian.roots, *slopes[0]], exclude=params), may_batch=False)


def _is_likelihood(loss: Tensor, seen: TokenLosses, head: LazyLogits, target: Tensor) -> bool:
    """Whether a loss is a weighted sum of -log p at these targets, p being the output's own probabilities."""
    kept = target != seen.ignored
    aligned = (
        target.shape == head.hidden.shape[:-1] and torch.equal(seen.labels, target[kept]) and torch.equal(seen.hidden, head.hidden[kept])
    )
    scales = [[step for step in steps if not isinstance(step, torch.dtype)] for steps in (seen.steps, head.way.steps)]
    (share,) = torch.autograd.grad(loss, seen.losses, create_graph=True)
    return aligned and seen.plain and scales[0] == scales[1] and seen.classes == len(head.weight) and not share.requires_grad


class _Jacobian:
    """The Jacobian of several tensors in the parameters; J v by the double-backward trick."""

    def __init__(self, outputs: Sequence[Tensor], params: Sequence[Tensor]) -> None:
        self._outputs, self._params = outputs, params
        self._dummies = [torch.zeros_like(t, requires_grad=True) for t in outputs]
        transposed = torch.autograd.grad(outputs, params, self._dummies, create_graph=True, allow_unused=True)
        self._used = [j for j, t in enumerate(transposed) if t is not None and t.requires_grad]
        self.roots = [t for t in transposed if t is not None and t.requires_grad]

    def forward(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """J v, in the outputs' shapes."""
        parts = derivative(self.roots, self._dummies, [vectors[j] for j in self._used], batched=False, zeros=True)
        return [part for part in parts if part is not None]

    def transpose(self, cotangents: Sequence[Tensor]) -> Pieces:
        """J^T u, one tensor per parameter."""
        return derivative(self._outputs, self._params, cotangents, batched=False)
