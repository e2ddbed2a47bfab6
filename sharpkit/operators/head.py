"""Gauss-Newton and Fisher matrices of a cross-entropy over a large vocabulary, from a few tokens' logits at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sharpkit.objective.counting import samples_in
from sharpkit.objective.interrupts import Whole
from sharpkit.objective.logits import TANH, Chunked, LazyLogits, TokenLosses
from sharpkit.objective.loss import check_loss
from sharpkit.objective.memory import graph_cost, graph_nodes
from sharpkit.objective.objective import Objective
from sharpkit.objective.reduction import Piece
from sharpkit.objective.second_order import custom_functions
from sharpkit.operators.blocks import PieceProduct, Pieces, derivative

Draw = Callable[[LazyLogits], Sequence[Tensor]]  # labels of all tokens, from the model's logits
_SAME = 1e-4  # relative, of a loss computed in chunks and the model's own, which may be in float32: by judgement, far above its rounding


@dataclass(frozen=True)
class _CutLoss:
    """A loss as a function of leaves in place of the hidden states, weight and bias that its head multiplies.

    Attributes:
        loss: one number.
        seen: its cross-entropy.
        head: the model's output, of the leaves.
        kept: which of its tokens count; None where the cross-entropy's are others.
        outputs: what the leaves stand for, with graphs.
        leaves: those that depend on the parameters.
    """

    loss: Tensor
    seen: TokenLosses
    head: LazyLogits
    kept: Tensor | None
    outputs: list[Tensor]
    leaves: list[Tensor]


def product_in_chunks(objective: Objective, piece: Piece, curvature: str, draw: Draw | None = None) -> PieceProduct | None:
    """The product with J^T S J, J the Jacobian of the head's hidden states, weight and bias in the parameters, S a matrix in their space.

    With Z the derivative of the logits in hidden states, weight and bias, S = Z^T A Z. A is the loss's curvature in the logits, for each
    token diag(p) - p p^T or, of a Fisher matrix, r r^T with r the gradient. Z, A and Z^T are applied to some tokens at a time.

    Args:
        objective: with ``loss=``, or with the model's own.
        piece: of its data.
        curvature: ``"gauss_newton"`` or ``"fisher"``.
        draw: labels whose Fisher matrices are averaged.

    Returns:
        None where the model's output is no large logits, or the loss is something else than a function of their cross-entropy.
    """
    if (made := _cut_loss(objective, piece, curvature)) is None:
        return None
    losses = [made.loss]
    if draw is not None:
        if made.kept is None or not made.seen.plain:
            return None
        (share,) = torch.autograd.grad(made.loss, made.seen.losses, create_graph=True)
        if share.requires_grad:  # no sum of the tokens' losses, and so no likelihood
            return None
        losses = [(share * made.head.token_losses(made.kept, labels[made.kept])).sum() for labels in draw(made.head)]
    leaves, params = made.leaves, objective.layout.params
    slopes = [torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True, materialize_grads=True) for loss in losses]
    jacobian = _Jacobian(made.outputs, params)

    def multiply(vectors: Sequence[Tensor], batched: bool) -> Pieces:
        along = jacobian.forward(vectors)
        curved = [torch.zeros_like(t) for t in along]
        for slope in slopes:
            for total, part in zip(curved, derivative(slope, leaves, along, batched=False, zeros=True), strict=True):
                assert part is not None
                total.add_(part, alpha=1 / len(slopes))
        return jacobian.transpose(curved)

    held = [*jacobian.roots, *(part for slope in slopes for part in slope)]
    return PieceProduct(multiply, piece.weight, graph_cost(held, exclude=params, beside=jacobian.dummies), may_batch=False)


def sample_product_in_chunks(objective: Objective, piece: Piece, *, scale: float, weight: float) -> PieceProduct | None:
    """The product with the sum of g_i g_i^T, g_i the gradient of a sample's loss times ``scale``; None as :func:`product_in_chunks`.

    Args:
        objective: a mean or sum over samples.
        piece: of its data.
        scale: of the samples' gradients.
        weight: of the product.
    """
    made, samples = _cut_loss(objective, piece, "fisher"), samples_in(piece.batch, objective.loss is not None)
    if made is None or made.kept is None or len(made.kept) % samples:
        return None
    leaves, params, losses = made.leaves, objective.layout.params, made.seen.losses
    (share,) = torch.autograd.grad(made.loss, losses, retain_graph=True)
    sample = made.kept.flatten().nonzero()[:, 0] // (made.kept.numel() // samples)  # of each token that counts
    if objective.has_own_loss and not _adds_up(objective, piece, share.new_zeros(samples).index_add_(0, sample, share * losses.detach())):
        return None
    share = share * scale
    each = torch.zeros_like(losses, requires_grad=True)  # what every token's gradient is multiplied by: its value does not matter
    slopes = torch.autograd.grad(losses, leaves, each, create_graph=True, allow_unused=True, materialize_grads=True)
    jacobian = _Jacobian(made.outputs, params)

    def multiply(vectors: Sequence[Tensor], batched: bool) -> Pieces:
        (along,) = derivative(slopes, [each], jacobian.forward(vectors), batched=False, zeros=True)
        assert along is not None
        of_samples = share.new_zeros(samples).index_add_(0, sample, share * along)  # g_i . v
        back = derivative([losses], leaves, [share * of_samples[sample]], batched=False, zeros=True)
        return jacobian.transpose([part for part in back if part is not None])

    cost = graph_cost([*jacobian.roots, *slopes, losses], exclude=params, beside=jacobian.dummies)
    return PieceProduct(multiply, weight, cost, may_batch=False)


def _adds_up(objective: Objective, piece: Piece, of_samples: Tensor) -> bool:
    """Whether tokens were told apart by sample: what each adds to the loss is what it is by itself."""
    with torch.no_grad():
        for sample in objective.samples_of(piece):
            expected = float(objective.evaluate(sample)) * sample.weight
            part = float(of_samples[sample.key[1] - piece.key[1]]) * piece.weight
            if abs(part - expected) > _SAME * abs(expected):
                return False
    return True


def _cut_loss(objective: Objective, piece: Piece, curvature: str) -> _CutLoss | None:
    made = _own_loss_cut(objective, piece, curvature) if objective.has_own_loss else _loss_cut(objective, piece, curvature)
    return None if made is None or not made.outputs or custom_functions(made.outputs) else made


def _loss_cut(objective: Objective, piece: Piece, curvature: str) -> _CutLoss | None:
    """The loss of an (input, target) batch, cut at the model's output."""
    if objective.loss is None or not objective.chunking.allowed or objective.second_order.doubts:
        return None
    mode = Chunked()
    while True:
        objective.seed_for(piece.key[0])  # the same dropout masks as in the objective's own evaluation
        with Whole(mode):
            output = objective.predict(piece.batch)
        if not isinstance(output, LazyLogits) or output.computed is not None:
            return None
        if not objective.second_order.adapt([t for t in (output.hidden, output.weight, output.bias) if t is not None], once=True):
            break
    head, outputs, leaves = output.cut(curvature, _depending(objective))
    target = piece.batch[1]
    loss = check_loss(objective.output_loss(head, target), piece.key[0])
    # of one cross-entropy alone, and without a bend between output and loss, which would be curvature of the loss
    if mode.losses != 1 or (seen := mode.last) is None or head.computed is not None:
        return None
    if seen.logits.way.steps.count(TANH) > head.way.steps.count(TANH):
        return None
    return _CutLoss(loss, seen, head, _kept(seen, head, target), outputs, leaves)


def _own_loss_cut(objective: Objective, piece: Piece, curvature: str) -> _CutLoss | None:
    """A model's own loss, cut at what its cross-entropy receives: for it, that is the output."""
    selected = {id(p) for p in objective.layout.params}
    while True:
        mode = Chunked(least_bytes=0, cut=lambda lazy: lazy.cut(curvature, _depending(objective)))
        loss = objective.evaluate(piece, mode=mode)
        if mode.losses != 1 or (seen := mode.last) is None:
            return None
        if not objective.second_order.adapt([*mode.outputs, loss], once=True):
            break
    if any(id(getattr(node, "variable", None)) in selected for node in graph_nodes([loss])):  # some of it goes another way
        return None
    with torch.no_grad():
        if abs(float(loss.detach() - (expected := objective.evaluate(piece)))) > _SAME * abs(float(expected)):
            return None
    return _CutLoss(loss, seen, seen.logits, seen.kept, mode.outputs, mode.leaves)


def _depending(objective: Objective) -> Callable[[Tensor], bool]:
    """Whether a tensor that a head multiplies depends on the selected parameters, or is one."""
    selected = {id(p) for p in objective.layout.params}
    return lambda t: t.requires_grad and (not t.is_leaf or id(t) in selected)


def _kept(seen: TokenLosses, head: LazyLogits, target: Tensor) -> Tensor | None:
    """The tokens of the output that count; None where the cross-entropy is of others, or not of the output's own probabilities."""
    kept, loss = target != seen.ignored, seen.logits
    if target.shape != head.hidden.shape[:-1] or not torch.equal(seen.labels, target[kept]):
        return None
    scales = [[step for step in lazy.way.steps if not isinstance(step, torch.dtype)] for lazy in (loss, head)]
    if scales[0] != scales[1] or len(loss.weight) != len(head.weight) or not torch.equal(loss.hidden[seen.kept], head.hidden[kept]):
        return None
    return kept


class _Jacobian:
    """The Jacobian of several tensors in the parameters; J v by the double-backward trick."""

    def __init__(self, outputs: Sequence[Tensor], params: Sequence[Tensor]) -> None:
        self._outputs, self._params = outputs, params
        self.dummies = [torch.zeros_like(t, requires_grad=True) for t in outputs]
        transposed = torch.autograd.grad(outputs, params, self.dummies, create_graph=True, allow_unused=True)
        self._used = [j for j, t in enumerate(transposed) if t is not None and t.requires_grad]
        self.roots = [t for t in transposed if t is not None and t.requires_grad]

    def forward(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """J v, in the outputs' shapes."""
        parts = derivative(self.roots, self.dummies, [vectors[j] for j in self._used], batched=False, zeros=True)
        return [part for part in parts if part is not None]

    def transpose(self, cotangents: Sequence[Tensor]) -> Pieces:
        """J^T u, one tensor per parameter."""
        return derivative(self._outputs, self._params, cotangents, batched=False)
