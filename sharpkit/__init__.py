"""sharpkit: measure the curvature of any PyTorch loss, derive stable learning rates, act on them.

``import sharpkit as sk`` loads nothing heavy: each public name is imported from its module when it is first used.

    objective = sk.Objective(model, (inputs, targets), loss=F.cross_entropy)
    sharpness = sk.measure(objective, optimizer=optimizer)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sharpkit import fits as fits
    from sharpkit import laws as laws
    from sharpkit import layerwise as layerwise
    from sharpkit import measures as measures
    from sharpkit import transfer as transfer
    from sharpkit._errors import ConvergenceWarning as ConvergenceWarning
    from sharpkit._errors import DocumentError as DocumentError
    from sharpkit._errors import NonDeterministicError as NonDeterministicError
    from sharpkit._errors import NonFiniteError as NonFiniteError
    from sharpkit._errors import NotSymmetricError as NotSymmetricError
    from sharpkit._errors import ObjectiveError as ObjectiveError
    from sharpkit._errors import ObjectiveWarning as ObjectiveWarning
    from sharpkit._errors import OutOfMemoryError as OutOfMemoryError
    from sharpkit._errors import SharpkitError as SharpkitError
    from sharpkit._errors import SharpkitWarning as SharpkitWarning
    from sharpkit._errors import UnsupportedError as UnsupportedError
    from sharpkit._results import Bounded as Bounded
    from sharpkit._results import Progress as Progress
    from sharpkit.batch_size.bracket import SharpnessBracket as SharpnessBracket
    from sharpkit.batch_size.bracket import sharpness_bracket as sharpness_bracket
    from sharpkit.batch_size.branching import BatchBranching as BatchBranching
    from sharpkit.batch_size.branching import branch_batch_sizes as branch_batch_sizes
    from sharpkit.batch_size.learning_rate_curve import LearningRateCurve as LearningRateCurve
    from sharpkit.batch_size.learning_rate_curve import learning_rate_curve as learning_rate_curve
    from sharpkit.batch_size.noise import BatchSizeTest as BatchSizeTest
    from sharpkit.batch_size.noise import GradientNoise as GradientNoise
    from sharpkit.batch_size.noise import batch_size_tests as batch_size_tests
    from sharpkit.batch_size.noise import gradient_noise_scale as gradient_noise_scale
    from sharpkit.batch_size.scaling import ScaledLearningRate as ScaledLearningRate
    from sharpkit.batch_size.scaling import safe_damping as safe_damping
    from sharpkit.batch_size.scaling import scale_learning_rate as scale_learning_rate
    from sharpkit.batch_size.warmup import BatchSizeWarmup as BatchSizeWarmup
    from sharpkit.batch_size.warmup import batch_size_warmup as batch_size_warmup
    from sharpkit.learner.learner import CurvatureLearner as CurvatureLearner
    from sharpkit.learner.race import RaceResult as RaceResult
    from sharpkit.learner.race import race as race
    from sharpkit.learner.schedules import refined_schedule as refined_schedule
    from sharpkit.learner.suggest import SuggestedLearningRate as SuggestedLearningRate
    from sharpkit.learner.suggest import suggest_learning_rate as suggest_learning_rate
    from sharpkit.linalg.diagonal import DiagonalEstimate as DiagonalEstimate
    from sharpkit.linalg.diagonal import diagonal as diagonal
    from sharpkit.linalg.diagonal import frobenius_norm as frobenius_norm
    from sharpkit.linalg.lanczos import eigenpairs as eigenpairs
    from sharpkit.linalg.power import power_iteration as power_iteration
    from sharpkit.linalg.results import Eigenpairs as Eigenpairs
    from sharpkit.linalg.results import Estimate as Estimate
    from sharpkit.linalg.results import SpectralDensity as SpectralDensity
    from sharpkit.linalg.slq import spectral_density as spectral_density
    from sharpkit.linalg.trace import trace as trace
    from sharpkit.measuring.comparison import OptimizerComparison as OptimizerComparison
    from sharpkit.measuring.comparison import compare_optimizers as compare_optimizers
    from sharpkit.measuring.critical import CriticalLearningRate as CriticalLearningRate
    from sharpkit.measuring.critical import RelativeCriticalRates as RelativeCriticalRates
    from sharpkit.measuring.critical import critical_learning_rate as critical_learning_rate
    from sharpkit.measuring.critical import relative_critical_rates as relative_critical_rates
    from sharpkit.measuring.directional import batch_sharpness as batch_sharpness
    from sharpkit.measuring.directional import directional_sharpness as directional_sharpness
    from sharpkit.measuring.directional import gradient_noise_interaction as gradient_noise_interaction
    from sharpkit.measuring.doctor import Diagnosis as Diagnosis
    from sharpkit.measuring.doctor import examine as examine
    from sharpkit.measuring.geometry import GeneralizedSharpness as GeneralizedSharpness
    from sharpkit.measuring.geometry import generalized_sharpness as generalized_sharpness
    from sharpkit.measuring.history import CurvatureHistory as CurvatureHistory
    from sharpkit.measuring.landscape import Landscape as Landscape
    from sharpkit.measuring.landscape import landscape as landscape
    from sharpkit.measuring.layers import LayerSharpness as LayerSharpness
    from sharpkit.measuring.layers import per_layer as per_layer
    from sharpkit.measuring.plan import Plan as Plan
    from sharpkit.measuring.plan import plan as plan
    from sharpkit.measuring.sharpness import Sharpness as Sharpness
    from sharpkit.measuring.sharpness import measure as measure
    from sharpkit.measuring.stability import StableLearningRate as StableLearningRate
    from sharpkit.measuring.stability import stable_learning_rate as stable_learning_rate
    from sharpkit.measuring.update import UpdateCurvature as UpdateCurvature
    from sharpkit.measuring.update import update_curvature as update_curvature
    from sharpkit.monitor import sinks as sinks
    from sharpkit.monitor.metrics import METRICS as METRICS
    from sharpkit.monitor.metrics import register_metric as register_metric
    from sharpkit.monitor.monitor import Monitor as Monitor
    from sharpkit.monitor.records import Measurement as Measurement
    from sharpkit.monitor.records import MonitorHistory as MonitorHistory
    from sharpkit.monitor.records import Record as Record
    from sharpkit.objective.batches import SeededPasses as SeededPasses
    from sharpkit.objective.objective import Objective as Objective
    from sharpkit.operators.base import SymmetricOperator as SymmetricOperator
    from sharpkit.operators.base import as_operator as as_operator
    from sharpkit.operators.fisher import EmpiricalFisherOperator as EmpiricalFisherOperator
    from sharpkit.operators.fisher import FisherOperator as FisherOperator
    from sharpkit.operators.fisher import GradientCovarianceOperator as GradientCovarianceOperator
    from sharpkit.operators.gauss_newton import GaussNewtonOperator as GaussNewtonOperator
    from sharpkit.operators.hessian import HessianOperator as HessianOperator
    from sharpkit.operators.preconditioned import AdaptiveOperator as AdaptiveOperator
    from sharpkit.operators.preconditioned import PreconditionedOperator as PreconditionedOperator
    from sharpkit.optimizers import UpdateRule as UpdateRule
    from sharpkit.optimizers import register_optimizer as register_optimizer
    from sharpkit.reporting import report as report
    from sharpkit.reporting.compare import Comparison as Comparison
    from sharpkit.reporting.compare import compare as compare
    from sharpkit.reporting.sections import Section as Section
    from sharpkit.reporting.sections import register_section as register_section
    from sharpkit.training_run import RaceProblem as RaceProblem

# Where each public name lives. A test holds this table and the imports above, which type checkers read, together.
_MODULES: dict[str, tuple[str, ...]] = {
    "sharpkit": ("fits", "laws", "layerwise", "measures", "transfer"),
    "sharpkit._errors": (
        "ConvergenceWarning",
        "DocumentError",
        "NonDeterministicError",
        "NonFiniteError",
        "NotSymmetricError",
        "ObjectiveError",
        "ObjectiveWarning",
        "OutOfMemoryError",
        "SharpkitError",
        "SharpkitWarning",
        "UnsupportedError",
    ),
    "sharpkit._results": ("Bounded", "Progress"),
    "sharpkit.batch_size.bracket": ("SharpnessBracket", "sharpness_bracket"),
    "sharpkit.batch_size.branching": ("BatchBranching", "branch_batch_sizes"),
    "sharpkit.batch_size.learning_rate_curve": ("LearningRateCurve", "learning_rate_curve"),
    "sharpkit.batch_size.noise": ("BatchSizeTest", "GradientNoise", "batch_size_tests", "gradient_noise_scale"),
    "sharpkit.batch_size.scaling": ("ScaledLearningRate", "safe_damping", "scale_learning_rate"),
    "sharpkit.batch_size.warmup": ("BatchSizeWarmup", "batch_size_warmup"),
    "sharpkit.learner.learner": ("CurvatureLearner",),
    "sharpkit.learner.race": ("RaceResult", "race"),
    "sharpkit.learner.schedules": ("refined_schedule",),
    "sharpkit.learner.suggest": ("SuggestedLearningRate", "suggest_learning_rate"),
    "sharpkit.linalg.diagonal": ("DiagonalEstimate", "diagonal", "frobenius_norm"),
    "sharpkit.linalg.lanczos": ("eigenpairs",),
    "sharpkit.linalg.power": ("power_iteration",),
    "sharpkit.linalg.results": ("Eigenpairs", "Estimate", "SpectralDensity"),
    "sharpkit.linalg.slq": ("spectral_density",),
    "sharpkit.linalg.trace": ("trace",),
    "sharpkit.measuring.comparison": ("OptimizerComparison", "compare_optimizers"),
    "sharpkit.measuring.critical": ("CriticalLearningRate", "RelativeCriticalRates", "critical_learning_rate", "relative_critical_rates"),
    "sharpkit.measuring.directional": ("batch_sharpness", "directional_sharpness", "gradient_noise_interaction"),
    "sharpkit.measuring.doctor": ("Diagnosis", "examine"),
    "sharpkit.measuring.geometry": ("GeneralizedSharpness", "generalized_sharpness"),
    "sharpkit.measuring.history": ("CurvatureHistory",),
    "sharpkit.measuring.landscape": ("Landscape", "landscape"),
    "sharpkit.measuring.layers": ("LayerSharpness", "per_layer"),
    "sharpkit.measuring.plan": ("Plan", "plan"),
    "sharpkit.measuring.sharpness": ("Sharpness", "measure"),
    "sharpkit.measuring.stability": ("StableLearningRate", "stable_learning_rate"),
    "sharpkit.measuring.update": ("UpdateCurvature", "update_curvature"),
    "sharpkit.monitor": ("sinks",),
    "sharpkit.monitor.metrics": ("METRICS", "register_metric"),
    "sharpkit.monitor.monitor": ("Monitor",),
    "sharpkit.monitor.records": ("Measurement", "MonitorHistory", "Record"),
    "sharpkit.objective.batches": ("SeededPasses",),
    "sharpkit.objective.objective": ("Objective",),
    "sharpkit.operators.base": ("SymmetricOperator", "as_operator"),
    "sharpkit.operators.fisher": ("EmpiricalFisherOperator", "FisherOperator", "GradientCovarianceOperator"),
    "sharpkit.operators.gauss_newton": ("GaussNewtonOperator",),
    "sharpkit.operators.hessian": ("HessianOperator",),
    "sharpkit.operators.preconditioned": ("AdaptiveOperator", "PreconditionedOperator"),
    "sharpkit.optimizers": ("UpdateRule", "register_optimizer"),
    "sharpkit.reporting": ("report",),
    "sharpkit.reporting.compare": ("Comparison", "compare"),
    "sharpkit.reporting.sections": ("Section", "register_section"),
    "sharpkit.training_run": ("RaceProblem",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}
_ARE_MODULES = {"fits", "laws", "layerwise", "measures", "sinks", "transfer"}  # public names that are modules themselves

__all__ = sorted(_HOME)


if not TYPE_CHECKING:  # a type checker reads the imports above; with this it would take any misspelt name for Any

    def __getattr__(name: str) -> Any:
        module = _HOME.get(name)
        if module is None:
            raise AttributeError(f"module 'sharpkit' has no attribute {name!r}")
        value = import_module(f"{module}.{name}") if name in _ARE_MODULES else getattr(import_module(module), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
