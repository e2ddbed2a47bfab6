"""The norms in which an optimizer of fixed step length is steepest descent, and how long its steps are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.optim import Optimizer

from sharpkit._errors import UnsupportedError
from sharpkit.objective.params import ParamLayout
from sharpkit.optimizers.fixed_steps import Norm
from sharpkit.optimizers.groups import _NONE_HELD, is_maximizing, learning_rate, relative_rates
from sharpkit.optimizers.kinds import kind_of
from sharpkit.optimizers.wrappers import unwrap_optimizer


@dataclass(frozen=True)
class StepGeometry:
    """Each parameter's step at the rate ``lr`` of the reference group: its norm, and that it is lr times ``radii`` long in it.

    Attributes:
        norms: for each parameter of the layout.
        radii: likewise; 0 for a parameter that does not move, a tensor where each entry has a length of its own.
        lr: of the reference group.
    """

    norms: Sequence[Norm]
    radii: Sequence[float | Tensor]
    lr: float


def has_geometry(optimizer: Optimizer) -> bool:
    """Whether the optimizer's steps have a length of their own in a known norm, whatever the size of the gradient."""
    kind = kind_of(optimizer)
    return kind is not None and kind.geometry is not None


def step_geometry(optimizer: Optimizer, layout: ParamLayout) -> StepGeometry | None:
    """The geometry of the steps of an optimizer, None for one whose steps have no fixed length, or an unknown one.

    Raises:
        UnsupportedError: it maximizes.
        ValueError: it holds none of the parameters, or an entry of its own that is registered gives no length.
    """
    optimizer = unwrap_optimizer(optimizer)
    kind = kind_of(optimizer)
    if kind is None or kind.geometry is None:
        return None
    name = type(optimizer).__name__
    if is_maximizing(optimizer):
        raise UnsupportedError(f"the {name} maximizes, and sharpness bounds a descent: minimize the negative loss instead")
    if layout.shards is not None:
        raise UnsupportedError(
            f"the geometry of {name} is that of whole parameters, and these are sharded over processes: measure without optimizer="
        )
    ratios = relative_rates(optimizer, layout)
    own = {id(p): (group, ratio) for group, ratio in zip(optimizer.param_groups, ratios, strict=True) for p in group["params"]}
    if not any(id(p) in own for p in layout.params):
        raise ValueError(_NONE_HELD)
    norms, radii = list[Norm](), list[float | Tensor]()
    for p in layout.params:
        settings, ratio = own.get(id(p), ({}, 0.0))
        norm, radius = kind.geometry(optimizer.state.get(p, {}), settings, p) if ratio else ("blocks", 0.0)
        if isinstance(radius, Tensor) and (norm != "linf" or radius.shape != p.shape):
            raise ValueError(
                f"the geometry of {name} gave lengths of shape {tuple(radius.shape)} in {norm!r}: only 'linf' has one for each entry"
            )
        if not isinstance(radius, Tensor) and not (math.isfinite(radius) and radius >= 0):
            raise ValueError(f"the geometry of {name} gave the length {radius!r}: it must be a number of at least 0")
        norms.append(norm)
        radii.append(ratio * radius)
    return StepGeometry(norms, radii, learning_rate(optimizer, layout))
