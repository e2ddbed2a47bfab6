"""Do hyperparameters transfer from narrow to wide (and shallow to deep) networks? ``sk.transfer`` measures, and says which rule is broken.

``sk.transfer.coordinate_check(build, [64, 128, 256], optimizer=optimizer, data=data, loss=loss)`` measures, ``find_culprits`` names the
rule, ``diagnose`` gives the verdict; ``parametrize(model, base, optimizer)`` makes a model and its optimizer one that transfers.
"""

from __future__ import annotations

from sharpkit.fits import Slope, log_slope
from sharpkit.transfer.base_shapes import read_base_shapes, write_base_shapes
from sharpkit.transfer.coordinates import Coordinate, CoordinateCheck, coordinate_check
from sharpkit.transfer.culprits import Culprit, find_culprits
from sharpkit.transfer.learning_rates import LearningRateTransfer, learning_rate_transfer
from sharpkit.transfer.parametrize import Parametrization, TensorRule, parametrize
from sharpkit.transfer.setup import Family
from sharpkit.transfer.sharpness import SharpnessTransfer, sharpness_transfer
from sharpkit.transfer.verdict import Verdict, diagnose

__all__ = [
    "Coordinate",
    "CoordinateCheck",
    "Culprit",
    "Family",
    "LearningRateTransfer",
    "Parametrization",
    "SharpnessTransfer",
    "Slope",
    "TensorRule",
    "Verdict",
    "coordinate_check",
    "diagnose",
    "find_culprits",
    "learning_rate_transfer",
    "log_slope",
    "parametrize",
    "read_base_shapes",
    "sharpness_transfer",
    "write_base_shapes",
]
