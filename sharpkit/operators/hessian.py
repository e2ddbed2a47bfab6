"""The Hessian of an objective, by double backward over a retained graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sharpkit._arguments import choice, flag
from sharpkit._errors import ObjectiveError, UnsupportedError
from sharpkit.objective.memory import graph_cost
from sharpkit.objective.objective import Objective
from sharpkit.objective.reduction import Piece
from sharpkit.objective.second_order import refuse_held_vectors
from sharpkit.operators.blocks import PieceProduct, Pieces, derivative
from sharpkit.operators.compiled import Compiling
from sharpkit.operators.curvature import CurvatureOperator
from sharpkit.operators.differences import Differences
from sharpkit.operators.probe import look_into_doubts

_ENDS = ("eigenpairs", "power_iteration")  # what differences in half precision are exact enough for
_NOISY = 5e-4  # rounding of a gradient from which on they are noise in random directions: that of the half-precision types


class HessianOperator(CurvatureOperator):
    """H = grad^2 f(w), exact: ``H @ v`` is the gradient of g(w) . v (Pearlmutter 1994).

    A product costs about 1.6 to 2.4 gradients once the graph of the data is built and kept. It is symmetric, linear, and the same however
    the data is cut into batches; the model is left as it was. Errors: :class:`~sharpkit.operators.curvature.CurvatureOperator`.

    Args:
        objective, retain, memory_limit: as in :class:`~sharpkit.operators.curvature.CurvatureOperator`.
        product: ``"exact"``, or ``"differences"``: central differences of gradients, two gradients each. They need no second graph and no
            second derivative (fused attention runs as in training), and have an error, measured from two step sizes, which ``rounding`` and
            all residuals hold. In half precision they tell large eigenvalues alone: traces and quadrature are refused.
        compile: give products to PyTorch's compiler once all graphs are kept. It takes one to three minutes, and pays where thousands
            follow (experiments/compiled_products.py). ``choices()["compiled"]`` says what came of it, and why where nothing did.

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

    _takes_shards = True

    def __init__(
        self,
        objective: Objective,
        *,
        retain: bool | str = "auto",
        memory_limit: float | None = None,
        compile: bool = False,
        product: str = "exact",
    ) -> None:
        super().__init__(objective, retain=retain, memory_limit=memory_limit)
        if choice("product", product, ("exact", "differences")) == "differences":
            self._differences = Differences(objective, self.dot)
        if flag("compile", compile) and objective.shards is not None:
            raise UnsupportedError("compile=True is not available for parameters sharded over processes: leave it out")
        self._compiling = Compiling(self.layout, self.rounding) if compile else None

    def _settings(self) -> dict[str, Any]:
        product = "exact" if self._differences is None else "differences"
        return {**super()._settings(), "compile": self._compiling is not None, "product": product}

    def check_alike(self, call: str, settings: Mapping[str, Any]) -> None:
        super().check_alike(call, settings)
        if self._differences is not None and call not in _ENDS and self.objective.rounding > _NOISY:
            raise UnsupportedError(
                f"{call} of differences of gradients in half precision would be noise, which hides all but the largest eigenvalues: use "
                "product='exact', measure without autocast, or ask for eigenpairs"
            )

    def choices(self) -> Mapping[str, str]:
        told = super().choices()
        return told if self._compiling is None else {**told, "compiled": self._compiling.outcome}

    def _may_improve(self) -> bool:
        return self._compiling is not None and self.all_kept and not self._compiling.covers(self._kept.values())

    def _improve(self) -> None:
        """Compile the products of all pieces."""
        assert self._compiling is not None
        for key, product in list(self._kept.items()):
            self._kept[key] = self._compiling.improved(product)

    def _build(self, piece: Piece) -> PieceProduct:
        params = self.layout.params
        if self.objective.mode == "train":
            refuse_held_vectors(self.objective.model, self.objective.in_eval)
        loss, weight = self.objective.twice_differentiable(lambda: self.objective.evaluate(piece)), piece.weight
        if self.objective.shards is not None:  # weighted before it is added up over processes
            loss, weight = loss * weight, 1.0
        # Reverse over reverse: reverse over forward mode is silently wrong for LayerNorm, InstanceNorm and BatchNorm in train mode.
        with self.objective.derivatives("graph"):
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

        return PieceProduct(multiply, weight, graph_cost([r for r in roots if r is not None], exclude=params))

    def _look_into_doubts(self) -> None:
        look_into_doubts(self.objective, HessianOperator)
