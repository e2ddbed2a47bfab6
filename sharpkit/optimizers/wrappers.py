"""The torch optimizer inside a trainer's wrapper."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from sharpkit._errors import UnsupportedError

# Subclasses of the torch class, or holders of one, whose step only calls the real one's; by name, so that no package need be imported.
_WRAPPERS = ("AcceleratedOptimizer", "LightningOptimizer", "_FabricOptimizer")


def unwrap_optimizer(optimizer: Any) -> Optimizer:
    """The torch optimizer inside a trainer's wrapper (accelerate, Lightning), or held as ``.optimizer`` by an object without a step.

    Raises:
        TypeError: there is none.
        UnsupportedError: it is held by an object with a step of its own, as that of SAM or LookAhead.
    """
    inside = optimizer
    while True:
        # by names in the whole mro, since Lightning's wrapper makes a class of itself and the optimizer's class, "LightningAdam"
        trusted = any(cls.__name__ in _WRAPPERS for cls in type(inside).__mro__)
        if isinstance(inside, Optimizer) and not trusted:
            return inside
        inner = getattr(inside, "optimizer", None)
        if inner is None or inner is inside:
            came = type(optimizer).__name__
            raise TypeError(f"the optimizer must be a torch.optim.Optimizer, got {came}: pass the torch optimizer that it steps")
        # SAM's first and second step, LookAhead's, a scheduler's: whether such a step is only the inner one, nobody can tell
        if not trusted and (steps := [name for name in dir(type(inside)) if "step" in name and not name.startswith("_")]):
            holder, held = type(inside).__name__, type(inner).__name__
            raise UnsupportedError(
                f"{holder} holds a {held} and has a step of its own ({', '.join(steps)}), whose limit is not known: pass its .optimizer "
                f"instead of the {holder} if that step does nothing to the parameters but the inner one's"
            )
        inside = inner
