"""The metrics a monitor knows: each measures one thing on the batch at hand, with its error and the limit it is held against."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sharpkit._errors import ConvergenceWarning, NonFiniteError, UnsupportedError
from sharpkit.analysis.critical import critical_learning_rate
from sharpkit.analysis.directional import (
    batch_sharpness,
    directional_sharpness,
    gradient_and_product,
    gradient_noise_interaction,
    momentum_step,
)
from sharpkit.analysis.layers import layer_of
from sharpkit.analysis.noise import gradient_noise_scale
from sharpkit.analysis.sharpness import preconditioned_hessian
from sharpkit.analysis.stability import update_rule
from sharpkit.linalg.lanczos import eigenpairs
from sharpkit.linalg.results import Eigenpairs, Estimate, standard_error
from sharpkit.linalg.trace import trace
from sharpkit.objective import Objective
from sharpkit.operators.base import SymmetricOperator
from sharpkit.training.records import Measurement
from sharpkit.training.situation import Situation, among, by_samples

Values = dict[str, Measurement]
_NOISE_GROUPS = 8
_MEAN_BATCHES = 24  # drawn from a probe set at a time
_LEAST_MATVECS = 3


# -- eigenvalues --------------------------------------------------------------------------------------------------------------
def _tracked(s: Situation, name: str, operator: SymmetricOperator, limit: float | None, where: str = "") -> Measurement:
    estimate = s.memory.tracker(name).update(operator, step=s.step, max_matvecs=s.max_matvecs)
    return Measurement.of(estimate, limit=limit, method=f"{estimate.method}{where}")


def _lambda_max(s: Situation) -> Values:
    guessed = s.memory.tracker("lambda_max").extrapolate(s.step)
    if guessed is not None:
        return {"lambda_max": Measurement.of(guessed, limit=s.hessian_limit())}
    return {"lambda_max": _tracked(s, "lambda_max", s.hessian, s.hessian_limit())}


def _preconditioned(s: Situation) -> Values:
    name = "preconditioned_lambda_max"
    guessed = s.memory.tracker(name).extrapolate(s.step)
    if guessed is not None:
        return {name: Measurement.of(guessed, limit=s.curvature_limit())}
    return {name: _tracked(s, name, preconditioned_hessian(s.hessian, s.optimizer), s.curvature_limit())}


def _probe_lambda_max(s: Situation) -> Values:
    return {"probe_lambda_max": _tracked(s, "probe_lambda_max", s.wide_hessian, s.hessian_limit(), f" {s.where}")}


def _ends(s: Situation, k: int, which: str) -> Eigenpairs:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        matvecs = None if s.max_matvecs is None else max(s.max_matvecs, k + _LEAST_MATVECS)
        k = min(k, s.wide_hessian.size)
        return eigenpairs(s.wide_hessian, k, which=which, tol=s.memory.tol, seed=s.memory.seed, max_matvecs=matvecs)  # type: ignore[arg-type]


def _as_values(s: Situation, pairs: Eigenpairs, names: list[str], limit: float | None) -> Values:
    found: Values = {}
    for j, name in enumerate(names[: len(pairs.values)]):
        value, error, converged = float(pairs.values[j]), float(pairs.residuals[j]), bool(pairs.converged[j])
        matvecs, seconds = (pairs.num_matvecs, pairs.seconds) if j == 0 else (0, 0.0)
        if math.isfinite(value):
            found[name] = Measurement(value, error, matvecs, seconds, f"Lanczos {s.where}", converged, limit)
    return found


def _lambda_min(s: Situation) -> Values:
    return _as_values(s, _ends(s, 1, "smallest"), ["lambda_min"], None)


def _top_k(s: Situation) -> Values:
    names = [f"lambda_{j + 1}" for j in range(s.top_k)]
    return _as_values(s, _ends(s, s.top_k, "largest"), names, s.hessian_limit())


def _per_layer(s: Situation) -> Values:
    found: Values = {}
    for layer in dict.fromkeys(layer_of(name) for name in s.wide.layout.names):
        block = s.wide_hessian.block(_in_layer(layer))
        name = f"lambda_max/{layer}"
        found[name] = _tracked(s, name, block, s.hessian_limit(), f" {s.where}")
    return found


def _groups(s: Situation) -> Values:
    """The block of each parameter group against that group's own limit."""
    found: Values = {}
    live = preconditioned_hessian(s.hessian, s.optimizer) if s.rule is not None and s.rule.adaptive else s.hessian
    reference = s.lr
    for index, group in enumerate(s.optimizer.param_groups):
        own = {id(p) for p in group["params"]}
        if not any(id(p) in own for p in s.objective.layout.params):
            continue
        block: SymmetricOperator = live.block(among(own))
        rule = update_rule(s.optimizer, group=index) if s.rule is not None else None
        lr, name = float(group["lr"]), f"lambda_max/group{index}"
        # the live matrix carries each group's rate relative to the first's, so that all are held against the first's
        at = reference if rule is not None and rule.adaptive else lr
        found[name] = _tracked(s, name, block, rule.max_curvature(at) if rule is not None and at > 0 else None)
    return found


def _in_layer(layer: str) -> Callable[[str, torch.Tensor], bool]:
    return lambda name, _: layer_of(name) == layer


# -- along the steps ------------------------------------------------------------------------------------------------------------
def _batch_sharpness(s: Situation) -> Values:
    """Over batches drawn from the probe set, or over the last training batches, each at its own step."""
    name, sgd = "batch_sharpness", isinstance(s.optimizer, torch.optim.SGD)
    started, size = time.perf_counter(), s.batch_size
    if s.probe is not None and size <= s.probe.num_samples:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            estimate = batch_sharpness(
                by_samples(s.probe),
                batch_size=size,
                optimizer=s.optimizer if sgd else None,
                max_batches=_MEAN_BATCHES,
                seed=s.memory.seed + s.step,
            )
        return {name: Measurement.of(estimate, limit=s.step_limit(), method=f"{estimate.method} from the probe set")}
    gradient, along, product = gradient_and_product(s.objective, momentum_step(s.objective, s.optimizer if sgd else None))
    dot = s.hessian.dot
    below, above = float(dot(along, gradient)), float(dot(along, product))
    if not below > 0 or not math.isfinite(above):
        raise NonFiniteError(f"the step of this batch goes uphill or is not finite (slope {-below:.3g}): its sharpness has no meaning")
    window = s.memory.window(name)
    window.append((float(s.step), above / below))
    values = np.array([value for _, value in window])
    how = f"{len(values)} training batches, steps {int(window[0][0])} to {s.step}"
    error = standard_error(values)
    return {name: Measurement(float(values.mean()), error, 1, time.perf_counter() - started, how, len(values) > 1, s.step_limit())}


def _gradient_noise_interaction(s: Situation) -> Values:
    if s.probe is None:
        raise UnsupportedError("gradient_noise_interaction compares batches with a larger set of data: pass probe=")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        estimate = gradient_noise_interaction(
            by_samples(s.probe), batch_size=min(s.batch_size, s.probe.num_samples), max_batches=_MEAN_BATCHES, seed=s.memory.seed + s.step
        )
    return {"gradient_noise_interaction": Measurement.of(estimate, limit=s.step_limit())}


def _critical_sharpness(s: Situation) -> Values:
    started, name = time.perf_counter(), "critical_sharpness"
    found = critical_learning_rate(s.objective, s.optimizer, guess=s.memory.numbers.get(name) or s.lr or 1e-3)
    if found.outcome != "found":
        raise NonFiniteError(f"no critical learning rate here: {found}")
    s.memory.numbers[name] = found.value
    error = (2 / found.lower - 2 / found.upper) / 2 if found.lower > 0 else math.inf
    how = f"{found.num_evaluations} forward passes and a gradient"
    return {name: Measurement(found.sharpness, error, 0, time.perf_counter() - started, how, True, s.step_limit())}


def _directional_sharpness(s: Situation) -> Values:
    started = time.perf_counter()
    value = directional_sharpness(s.objective, s.optimizer)
    how = "exact along the next update"
    return {"directional_sharpness": Measurement(value, 0.0, 1, time.perf_counter() - started, how, True, s.step_limit())}


# -- sums ---------------------------------------------------------------------------------------------------------------------
def _trace(s: Situation) -> Values:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        matvecs = 24 if s.max_matvecs is None else max(s.max_matvecs, _LEAST_MATVECS)
        estimate = trace(s.wide_hessian, rtol=0.05, seed=s.memory.seed + s.step, max_matvecs=matvecs)
    return {"trace": Measurement.of(estimate, limit=_trace_limit(s), method=f"{estimate.method} {s.where}")}


def _trace_limit(s: Situation) -> float | None:
    """tr H at which SGD with this batch size loses mean-square stability.

    2 (1 + beta) / lr = lambda_max + k tr H with k = (1 + beta) / ((1 - beta) B), the short form for Gaussian least squares.
    """
    rule, points = s.rule, s.memory.tracker("lambda_max").points
    if rule is None or rule.adaptive or rule.nesterov or rule.dampening or s.hessian_limit() is None or not points:
        return None
    room = 2 * (1 + rule.momentum) / s.lr - points[-1][1]
    return room * (1 - rule.momentum) * s.batch_size / (1 + rule.momentum) if room > 0 else None


def _noise_scale(s: Situation) -> Values:
    """tr Sigma and |G|^2 are averaged over the last batches first, then divided."""
    name, objective = "noise_scale", by_samples(s.objective)
    started = time.perf_counter()
    size = max(1, objective.num_samples // _NOISE_GROUPS)
    found = gradient_noise_scale(objective, group_size=size, max_groups=_NOISE_GROUPS, seed=s.memory.seed + s.step)
    window = s.memory.window(name)
    window.append((float(s.step), found.trace.value, found.gradient_norm_squared.value))
    noise, signal = (np.array([entry[j] for entry in window]) for j in (1, 2))
    value, error = _ratio_of_means(noise, signal)
    if len(window) == 1:
        value, error = found.noise_scale.value, found.noise_scale.stderr
    how = f"{len(window)} training batches, steps {int(window[0][0])} to {s.step}"
    return {name: Measurement(value, error, 0, time.perf_counter() - started, how, math.isfinite(value))}


def _ratio_of_means(above: np.ndarray[Any, Any], below: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Mean over mean and its jackknife error; NaN where the denominator is lost in noise."""
    n, total, base = len(above), above.sum(), below.sum()
    if n < 2 or base <= 0:
        return math.nan, math.inf
    left_out = (total - above) / (base - below)
    return float(total / base), float(np.sqrt((n - 1) / n * ((left_out - left_out.mean()) ** 2).sum()))


@dataclass(frozen=True)
class Metric:
    """One entry of the table below.

    Attributes:
        compute: measures it.
        gradients: about what one measurement costs, in gradients of the batch.
        live: reads the optimizer's state, so that for an adaptive one it is left out before the first step.
        needs_probe: only with ``probe=``.
    """

    compute: Callable[[Situation], Values]
    gradients: float
    live: bool = False
    needs_probe: bool = False


METRICS: dict[str, Metric] = {
    "lambda_max": Metric(_lambda_max, 11),
    "preconditioned_lambda_max": Metric(_preconditioned, 11, live=True),
    "probe_lambda_max": Metric(_probe_lambda_max, 11, needs_probe=True),
    "groups": Metric(_groups, 12, live=True),
    "batch_sharpness": Metric(_batch_sharpness, 4),
    "critical_sharpness": Metric(_critical_sharpness, 4),
    "directional_sharpness": Metric(_directional_sharpness, 4),
    "noise_scale": Metric(_noise_scale, 2),
    "trace": Metric(_trace, 24),
    "lambda_min": Metric(_lambda_min, 20),
    "top_k": Metric(_top_k, 40),
    "per_layer": Metric(_per_layer, 60),
    "gradient_noise_interaction": Metric(_gradient_noise_interaction, 60, needs_probe=True),
}


def custom(function: Callable[[Objective, torch.optim.Optimizer], float | Estimate]) -> Metric:
    """A user's own ``function(objective, optimizer)`` as a metric under its own name."""
    name = getattr(function, "__name__", type(function).__name__)

    def compute(s: Situation) -> Values:
        started, found = time.perf_counter(), function(s.objective, s.optimizer)
        seconds = time.perf_counter() - started
        if isinstance(found, Estimate):
            return {name: Measurement.of(found)}
        return {name: Measurement(float(found), 0.0, 0, seconds, f"{name}()")}

    return Metric(compute, 4)
