"""Do hyperparameters transfer from narrow to wide (and shallow to deep) networks? ``sk.transfer`` measures, and says which rule is broken.

    check = sk.transfer.coordinate_check(build, [64, 128, 256], optimizer=optimizer, data=data, loss=loss)
    sk.transfer.find_culprits(build, [64, 128, 256], optimizer=optimizer, data=data, loss=loss)

Each name is imported from its module when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sharpkit.transfer.coordinates import CoordinateCheck, coordinate_check
    from sharpkit.transfer.culprits import Culprit, find_culprits
    from sharpkit.transfer.fits import Slope, log_slope
    from sharpkit.transfer.setup import Family

# Where each public name lives.
_MODULES: dict[str, tuple[str, ...]] = {
    "sharpkit.transfer.coordinates": ("CoordinateCheck", "coordinate_check"),
    "sharpkit.transfer.culprits": ("Culprit", "find_culprits"),
    "sharpkit.transfer.learning_rates": ("learning_rate_transfer",),
    "sharpkit.transfer.setup": ("Family",),
    "sharpkit.transfer.sharpness": ("sharpness_transfer",),
    "sharpkit.transfer.slopes": ("Slope", "log_slope"),
    "sharpkit.transfer.verdict": ("diagnose",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    module = _HOME.get(name)
    if module is None:
        raise AttributeError(f"module 'sharpkit.transfer' has no attribute {name!r}")
    value = getattr(import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
