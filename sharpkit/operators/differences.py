"""Hessian products as central differences of gradients: no second graph, any kernel with a first derivative, an error from two steps.

    H v = (g(w + h v) - g(w - h v)) / 2 h + O(h^2),   h = c |w| / |v|,

with c by the rounding of the gradient. The difference between the answers at h and 2 h is at least what the one at h is off by: three times
its truncation, or as much as its rounding.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from sharpkit._errors import NonFiniteError
from sharpkit.objective.objective import Objective
from sharpkit.objective.params import moved
from sharpkit.operators.base import Dot

# c, by the relative rounding of a gradient: measured on small transformers, in float64, float32 and under bfloat16 autocast, where smaller
# steps are lost in rounding and larger ones in the third derivative. In between by judgement.
_STEPS = ((1e-12, 1e-5), (1e-5, 1e-4), (1.0, 3e-4))


class Differences:
    """The product of an objective's Hessian with a vector by differences of its gradient; the parameters are left as they were.

    A product takes two gradients, and two more for its error: of the first, the second, the fourth, the eighth and so on.

    Args:
        objective: f.
        dot: inner product of two vectors.

    Attributes:
        error: the largest error of a product that was looked at, |v| = 1.
        size: the largest product, |v| = 1.
    """

    def __init__(self, objective: Objective, dot: Dot) -> None:
        self._objective, self._dot = copy.copy(objective), dot
        self._objective.twice = False
        self.error = self.size = 0.0
        self._made = 0

    @property
    def relative_error(self) -> float:
        """The error over the size of the largest product."""
        return self.error / self.size if self.size else 0.0

    def __call__(self, vector: Tensor) -> Tensor:
        """H v, (n,)."""
        self._made += 1
        if self._made & (self._made - 1):  # no power of 2
            product, length = self._difference(vector, 1.0), self._length(vector)
        else:
            product, error, length = self.with_error(vector)
            self.error = max(self.error, error / length if length else 0.0)
        if length:
            self.size = max(self.size, self._length(product) / length)
        return product

    def with_error(self, vector: Tensor) -> tuple[Tensor, float, float]:
        """H v, what it is off by at most, and |v|."""
        product = self._difference(vector, 1.0)
        return product, self._length(product - self._difference(vector, 2.0)), self._length(vector)

    def _length(self, vector: Tensor) -> float:
        return math.sqrt(float(self._dot(vector, vector)))

    def step(self, vector: Tensor) -> float:
        """h, 0 for a vector of zeros."""
        length, reach = self._length(vector), self._length(self._objective.layout.current()) or 1.0
        relative = next(step for rounding, step in _STEPS if self._objective.rounding <= rounding)
        return relative * reach / length if length else 0.0

    def _difference(self, vector: Tensor, factor: float) -> Tensor:
        if not (step := factor * self.step(vector)):
            return torch.zeros_like(vector)
        direction = self._objective.layout.split(vector)
        gradients = []
        for sign in (1.0, -1.0):
            with moved(self._objective.layout, direction, sign * step):
                loss, gradient = self._objective.gradient()
            if not math.isfinite(loss):
                raise NonFiniteError("the loss beside the present parameters is NaN or infinite, so gradients have no difference")
            gradients.append(gradient)
        return gradients[0].sub_(gradients[1]).div_(2 * step)
