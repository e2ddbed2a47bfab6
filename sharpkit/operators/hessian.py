"""The Hessian of an objective, by double backward over a retained graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sharpkit._errors import ObjectiveError
from sharpkit.objective.memory import graph_cost
from sharpkit.objective.reduction import Piece
from sharpkit.objective.second_order import refuse_held_vectors
from sharpkit.operators.blocks import PieceProduct, Pieces, derivative
from sharpkit.operators.curvature import CurvatureOperator
from sharpkit.operators.probe import look_into_doubts


class HessianOperator(CurvatureOperator):
    """H = grad^2 f(w), exact: ``H @ v`` is the gradient of g(w) . v (Pearlmutter 1994).

    A product costs about 1.6 to 2.4 gradients once the graph of the data is built and kept. It is symmetric, linear, and the same however
    the data is cut into batches; the model is left as it was. Arguments and errors:
    :class:`~sharpkit.operators.curvature.CurvatureOperator`.

    Example:
        >>> import torch, sharpkit as sk
        >>> model = torch.nn.Linear(2, 1, bias=False).double()
        >>> x, y = torch.eye(2).double(), torch.zeros(2, 1).double()
        >>> H = sk.HessianOperator(sk.Objective(model, (x, y), loss=torch.nn.functional.mse_loss))
        >>> H.to_dense().tolist()
        [[1.0, 0.0], [0.0, 1.0]]

    References:
        Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 6 (1994).
    """

    def _build(self, piece: Piece) -> PieceProduct:
        params = self.layout.params
        if self.objective.mode == "train":
            refuse_held_vectors(self.objective.model, self.objective.in_eval)
        loss = self.objective.twice_differentiable(lambda: self.objective.evaluate(piece))
        # Reverse over reverse: reverse over forward mode is silently wrong for LayerNorm, InstanceNorm and BatchNorm in train mode.
        gradients = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
        if all(g is None for g in gradients):
            raise ObjectiveError("the loss does not depend on any of the selected parameters: check params= and that the model uses them")
        # Parameters in which the loss is linear have a gradient without a graph, and zero rows.
        curved = [j for j, g in enumerate(gradients) if g is not None and g.requires_grad]
        roots = [gradients[j] for j in curved]

        def multiply(vectors: Sequence[Tensor], batched: bool) -> Pieces:
            if not roots:
                return [None] * len(params)
            return derivative(roots, params, [vectors[j] for j in curved], batched=batched)

        return PieceProduct(multiply, piece.weight, graph_cost([r for r in roots if r is not None], exclude=params))

    def _look_into_doubts(self) -> None:
        look_into_doubts(self.objective, HessianOperator)
