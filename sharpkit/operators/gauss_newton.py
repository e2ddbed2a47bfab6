"""The generalised Gauss-Newton matrix: curvature of the loss in the output, pulled back through the linearised model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sharpkit._pieces import Piece
from sharpkit.operators._jacobian import OutputJacobian, output_gradient
from sharpkit.operators.curvature import CurvatureOperator, PieceProduct, Pieces


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
            if not slope.requires_grad:
                return [None] * len(self.layout.params)
            (curved,) = torch.autograd.grad(
                slope, leaf, grad_outputs=jacobian.forward(vectors), retain_graph=True, allow_unused=True, materialize_grads=True
            )
            return jacobian.transpose(curved)

        return PieceProduct(multiply, piece.weight, jacobian.bytes_held)
