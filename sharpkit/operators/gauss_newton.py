"""The generalised Gauss-Newton matrix: curvature of the loss in the output, pulled back through the linearised model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sharpkit._errors import ObjectiveError
from sharpkit.objective.loss import check_loss
from sharpkit.objective.memory import graph_bytes
from sharpkit.objective.objective import Objective
from sharpkit.objective.reduction import Piece
from sharpkit.operators.curvature import CurvatureOperator, PieceProduct, Pieces, check_twice_differentiable


class OutputJacobian:
    """The Jacobian J of the model's output z(w) on one piece.

    J v is the derivative of u -> J^T u, which is linear, applied to v: the double-backward trick. It needs no forward-mode rule, works on
    the live parameters, and its graph is reused for every v.

    Attributes:
        output: z, detached.
        target: the piece's target.
        bytes_held: memory of the graph.
    """

    def __init__(self, objective: Objective, piece: Piece, params: Sequence[Tensor]) -> None:
        if objective.loss is None:
            raise ObjectiveError(
                "this operator needs the model's output and the loss apart: make the Objective with loss= and (input, target) batches, "
                "not with closure="
            )
        objective.seed_for(piece.key[0])  # the same dropout masks as in the objective's own evaluation
        output = objective.predict(piece.batch)
        if not isinstance(output, Tensor) or not output.is_floating_point():
            raise ObjectiveError(f"the model's output must be one floating-point tensor (or have .logits), got {type(output).__name__}")
        if not output.requires_grad:
            raise ObjectiveError("the model's output does not depend on any trainable parameter: it was detached, or made under no_grad()")
        check_twice_differentiable([output])
        self._output, self._params = output, params
        self.output, self.target = output.detach(), piece.batch[1]
        self._dummy = torch.zeros_like(self.output, requires_grad=True)  # u: its value does not matter, J^T u is linear in it
        transposed = torch.autograd.grad(output, params, grad_outputs=self._dummy, create_graph=True, allow_unused=True)
        if all(t is None for t in transposed):
            raise ObjectiveError("the model's output does not depend on any of the selected parameters: check params=")
        # parameters that the output does not use have no column in J
        self._used = [j for j, t in enumerate(transposed) if t is not None and t.requires_grad]
        self._transposed = [t for t in transposed if t is not None and t.requires_grad]
        self.bytes_held = graph_bytes([*self._transposed, output], exclude=params)

    def forward(self, vectors: Sequence[Tensor]) -> Tensor:
        """J v in the output's shape."""
        along = [vectors[j] for j in self._used]
        return torch.autograd.grad(
            self._transposed, self._dummy, grad_outputs=along, retain_graph=True, allow_unused=True, materialize_grads=True
        )[0]

    def transpose(self, cotangent: Tensor) -> Pieces:
        """J^T u, one tensor per parameter."""
        return list(torch.autograd.grad(self._output, self._params, grad_outputs=cotangent, retain_graph=True, allow_unused=True))


def output_gradient(objective: Objective, output: Tensor, target: Any, *, number: int, create_graph: bool = False) -> tuple[Tensor, Tensor]:
    """The loss's gradient in the output, and the output it was taken at (a leaf), both in the output's shape.

    Args:
        objective: with ``loss=``.
        output: where the gradient is taken.
        target: what the loss compares it with.
        number: number of the batch, for messages.
        create_graph: whether the gradient is to be differentiated again.
    """
    leaf = output.detach().requires_grad_()  # cut off from the model, so that the second derivative is the loss's alone
    loss = check_loss(objective.output_loss(leaf, target), number)
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=create_graph, allow_unused=True, materialize_grads=True)
    return gradient, leaf


class GaussNewtonOperator(CurvatureOperator):
    """G = (1/C) sum_i J_i^T S_i J_i, with J the Jacobian of the output and S the Hessian of the loss in the output.

    Positive semi-definite where the loss is convex in the output (cross-entropy, squared error, binary cross-entropy, Huber); equal to the
    Fisher matrix for cross-entropy and for squared error. Any twice differentiable loss(output, target) works; the objective must be made
    with ``loss=``.

    Example:
        >>> import torch, sharpkit as sk
        >>> model = torch.nn.Linear(2, 1, bias=False).double()
        >>> x, y = torch.eye(2).double(), torch.zeros(2, 1).double()
        >>> G = sk.GaussNewtonOperator(sk.Objective(model, (x, y), loss=torch.nn.functional.mse_loss))
        >>> G.to_dense().tolist()
        [[1.0, 0.0], [0.0, 1.0]]

    References:
        Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent", Neural Computation 14 (2002).
    """

    def _build(self, piece: Piece) -> PieceProduct:
        jacobian = OutputJacobian(self.objective, piece, self.layout.params)
        slope, leaf = output_gradient(self.objective, jacobian.output, jacobian.target, number=piece.key[0], create_graph=True)

        def multiply(vectors: Sequence[Tensor]) -> Pieces:
            if not slope.requires_grad:  # a loss that is linear in the output
                return [None] * len(self.layout.params)
            (curved,) = torch.autograd.grad(
                slope, leaf, grad_outputs=jacobian.forward(vectors), retain_graph=True, allow_unused=True, materialize_grads=True
            )
            return jacobian.transpose(curved)

        return PieceProduct(multiply, piece.weight, jacobian.bytes_held)
