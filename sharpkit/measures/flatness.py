"""Relative flatness of one layer: its Hessian's traces between neurons, weighted by the neurons' inner products."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sharpkit._arguments import as_seed, as_text, real, whole
from sharpkit._calls import public_call
from sharpkit.linalg.results import Estimate
from sharpkit.linalg.trace import trace
from sharpkit.objective.objective import Objective, check_objective
from sharpkit.operators.base import SymmetricOperator
from sharpkit.operators.hessian import HessianOperator


@public_call
def relative_flatness(
    objective: Objective, weight: str | None = None, *, rtol: float = 0.02, max_matvecs: int | None = None, seed: int = 0, name: str = ""
) -> Estimate:
    """kappa = sum over s, t of <w_s, w_t> tr H_st of one weight matrix, w_s its rows and H_st the block of the Hessian between two rows.

    It is the trace of B^T H B with B: M -> W M, whose products cost one Hessian product of the layer, so that it is estimated like any
    trace, to a standard error. For a matrix of d rows and m columns B^T H B has m^2 rows.

    Invariant under layer rescaling of a ReLU network, permutations of neurons, and scaling of filters before a batch norm whose statistics
    go with them. Small is flat.

    Args:
        objective: f, at a minimum as the theory has it.
        weight: name of the weight tensor, ``"4.weight"`` say; kernels are taken as one row for each filter. By default the last with two
            axes or more, in the model's order; the theory speaks of the layer that makes features.
        rtol: relative standard error to reach.
        max_matvecs: most products, by default 2000.
        seed: seeds the random probes.
        name: of the result, which pages and comparisons show.

    Returns:
        in units of the loss, with its standard error; 0 where it is exact up to rounding.

    Raises:
        ValueError: no such weight, or arguments out of range.

    Example:
        >>> import torch, sharpkit as sk
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> model.weight.data = torch.tensor([[1.0, 2.0]])
        >>> objective = sk.Objective(model, (torch.eye(2), torch.zeros(2, 1)), loss=torch.nn.functional.mse_loss)
        >>> round(sk.measures.relative_flatness(objective).value, 4)  # H = 1: |w|^2 tr H = 5 * 2
        10.0

    References:
        Petzka, Kamp, Adilova, Sminchisescu and Boley (2021), arXiv 2001.00939.
    """
    check_objective(objective, "relative_flatness")
    rtol, seed = real("rtol", rtol, above=0), as_seed(seed)
    max_matvecs = None if max_matvecs is None else whole("max_matvecs", max_matvecs)
    layout = objective.layout
    matrices = [name for name, p in zip(layout.names, layout.params, strict=True) if p.ndim >= 2]
    if weight is None and not matrices:
        raise ValueError(f"relative flatness is of a weight tensor with two axes or more, and there is none: {', '.join(layout.names[:8])}")
    chosen = matrices[-1] if weight is None else as_text("weight", weight)
    if chosen not in matrices:
        raise ValueError(f"weight must name a parameter with two axes or more, one of {', '.join(matrices[:8])}; got {chosen!r}")
    operator = _Turned(HessianOperator(objective.with_params(lambda each, _: each == chosen)))
    # a trace is measured to its own relative error; below that nothing is asked
    estimate = trace(operator, rtol=rtol, seed=seed, max_matvecs=max_matvecs)
    return replace(estimate, method=f"relative flatness of {chosen}: {estimate.method}")


class _Turned(SymmetricOperator):
    """B^T H B with B: M -> W M, over (m, m) matrices M laid flat.

    Args:
        hessian: H of one weight tensor W, (d, m) with further axes flattened.
    """

    def __init__(self, hessian: HessianOperator) -> None:
        (weights,) = hessian.layout.params
        self._hessian, self._weights = hessian, weights.detach().flatten(1).to(hessian.dtype)
        self._columns = self._weights.shape[1]
        super().__init__(self._columns**2, dtype=hessian.dtype, device=hessian.device)
        self.rounding = hessian.rounding

    def matvec(self, vector: Tensor) -> Tensor:
        return self.matmat(vector[:, None])[:, 0]

    def matmat(self, vectors: Tensor) -> Tensor:
        """Several products at once, (m^2, k)."""
        k, m = vectors.shape[1], self._columns
        turned = torch.einsum("dm,mjk->djk", self._weights, vectors.view(m, m, k)).reshape(-1, k)
        products = self._hessian @ turned
        return torch.einsum("dm,djk->mjk", self._weights, products.view(-1, m, k)).reshape(-1, k)
