"""The loss of the best output that does not depend on the input: what a run must beat to count as trained."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from sharpkit.objective.objective import Objective
from sharpkit.optimizers import line_search_minimizer


def constant_loss(objective: Objective) -> float:
    """The lowest loss of an output that does not depend on the input; NaN if it cannot be determined.

    For cross-entropy that is the entropy of the label frequencies, for squared error the variance of the targets. Where the targets are
    classes at several positions (text, pixels), one vector of class scores serves all positions.

    Args:
        objective: made with ``loss=``; a closure keeps output and loss together, and gives NaN.

    Returns:
        NaN as well where the output is not one floating-point tensor, its shape changes from sample to sample, or the search fails.

    Example:
        >>> import torch, sharpkit as sk
        >>> from sharpkit.batch_size.baseline import constant_loss
        >>> data = (torch.randn(4, 2), torch.tensor([[1.0], [1.0], [3.0], [3.0]]))
        >>> round(constant_loss(sk.Objective(torch.nn.Linear(2, 1), data, loss=torch.nn.functional.mse_loss)), 4)
        1.0
    """
    if objective.loss is None:
        return math.nan
    pieces: list[tuple[Tensor, Any, float]] = []
    with objective.undisturbed():  # gradients on: a model of forces takes one inside
        for piece in objective.pieces():
            objective.seed_for(piece.key[0])
            output = objective.predict(piece.batch)
            pieces.append((output.detach() if isinstance(output, Tensor) else output, piece.batch[1], piece.weight))
    outputs = [output for output, _, _ in pieces]
    # one constant must fit all outputs
    if not all(isinstance(z, Tensor) and z.is_floating_point() and z.ndim and z.shape[1:] == outputs[0].shape[1:] for z in outputs):
        return math.nan
    losses = [_best_constant(objective, pieces, shape) for shape in _shapes(outputs[0], pieces[0][1])]
    return min((value for value in losses if math.isfinite(value)), default=math.nan)


def _shapes(output: Tensor, target: Any) -> Iterable[tuple[int, ...]]:
    """Shapes of the constant, to be broadcast to the output: a score per class where targets are class numbers, else one whole output."""
    shapes = set()
    if isinstance(target, Tensor) and not target.is_floating_point():
        for axis in (1, output.ndim - 1):
            if 1 <= axis < output.ndim and target.shape == output.shape[:axis] + output.shape[axis + 1 :]:
                shapes.add(tuple(size if i == axis else 1 for i, size in enumerate(output.shape)))
    return sorted(shapes) or [(1, *output.shape[1:])]


def _best_constant(objective: Objective, pieces: list[tuple[Tensor, Any, float]], shape: tuple[int, ...]) -> float:
    constant = torch.zeros(shape, dtype=pieces[0][0].dtype, device=pieces[0][0].device, requires_grad=True)
    # 60 iterations with 10 vectors of memory: no pass through the network, and the entropy is met to 2e-3 even where a class never occurs
    search = line_search_minimizer([constant], max_iter=60, history_size=10)
    lowest = math.inf

    def loss() -> Tensor:
        nonlocal lowest
        total = torch.stack([w * objective.output_loss(constant.expand(z.shape), target) for z, target, w in pieces]).sum()
        (constant.grad,) = torch.autograd.grad(total, constant)
        lowest = min(lowest, value) if math.isfinite(value := float(total.detach())) else lowest
        return total

    with torch.enable_grad():
        search.step(loss)  # type: ignore[no-untyped-call]
    return lowest
