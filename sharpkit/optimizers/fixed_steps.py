"""Methods whose steps have a fixed length, whatever the gradient's: the norm that it is fixed in, and what stands in for a linear rule."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from sharpkit.optimizers.rules import Settings, State

# A matrix has the shape (first, all others) of its tensor: its largest singular value, or largest l2 norm of a row or column. "blocks" is
# the l2 norm of each tensor, as all but "linf" (the largest entry) are of a vector; "l2" that of all parameters together.
Norm = Literal["l2", "linf", "spectral", "blocks", "rows", "columns"]


def sign_geometry(state: State, settings: Settings, p: Tensor) -> tuple[Norm, float]:
    """Every entry moves by the rate: sign descent, Lion (arXiv 2302.06675)."""
    return "linf", 1.0


def rprop_geometry(state: State, settings: Settings, p: Tensor) -> tuple[Norm, float | Tensor]:
    """Every entry moves by a length of its own, which the rate only begins with."""
    return "linf", state["step_size"] / float(settings["lr"]) if state else 1.0


def muon_geometry(state: State, settings: Settings, p: Tensor) -> tuple[Norm, float]:
    """All singular values of a matrix move by the rate, times a factor for its shape (Jordan et al. (2024); torch's ``adjust_lr_fn``)."""
    rows, columns = p.shape[0], math.prod(p.shape[1:])
    if settings.get("adjust_lr_fn") == "match_rms_adamw":
        return "spectral", 0.2 * math.sqrt(max(rows, columns))
    return "spectral", math.sqrt(max(1.0, rows / columns))


# Why there is no linear rule: a clause for the message, with what to do instead.
_INSTEAD = "its curvature is that of sharpkit.generalized_sharpness(objective, optimizer)"
SIGN = f"its steps are signs, whose length is not the gradient's: {_INSTEAD}"
ORTHOGONAL = f"it makes the step of every matrix orthogonal, of a length that is not the gradient's: {_INSTEAD}"
OWN_LENGTH = f"each coordinate has a step length of its own, which follows the signs of its gradients alone, not the rate: {_INSTEAD}"
SEARCH = (
    "it evaluates the loss several times in a step and multiplies by a matrix made of past gradients: measure without optimizer=, which "
    "gives lambda_max(H) and the limit of gradient descent"
)
SPARSE = "it takes sparse gradients alone, and those of an objective are dense: use Adam"
