"""What a monitor can measure: each metric is one function and one entry of the table METRICS.

A metric gets the :class:`Situation` of the step and returns its values by name. What is measured on the training batch is cheap and noisy;
slow quantities are measured on the probe set where there is one.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from sharpkit._arguments import as_text, real, whole
from sharpkit._errors import ConvergenceWarning, NonFiniteError, UnsupportedError
from sharpkit._results import Parts, State, standard_error
from sharpkit.batch_size.noise import gradient_noise_scale
from sharpkit.linalg.lanczos import eigenpairs
from sharpkit.linalg.results import Budget, Estimate, SpectralDensity
from sharpkit.linalg.slq import spectral_density
from sharpkit.linalg.trace import trace
from sharpkit.linalg.tracking import EigenvalueTracker
from sharpkit.measuring.critical import critical_learning_rate
from sharpkit.measuring.directional import (
    batch_sharpness,
    directional_sharpness,
    gradient_and_product,
    gradient_noise_interaction,
    momentum_step,
)
from sharpkit.measuring.geometry import Ball, sharpest
from sharpkit.measuring.layers import layer_of
from sharpkit.measuring.logit_growth import LogitGrowth, logit_growth
from sharpkit.monitor.records import Measurement
from sharpkit.objective.guard import silenced
from sharpkit.objective.objective import Objective
from sharpkit.objective.params import among
from sharpkit.operators.base import SymmetricOperator
from sharpkit.operators.hessian import HessianOperator
from sharpkit.operators.preconditioned import optimizer_curvature
from sharpkit.optimizers import (
    UpdateRule,
    has_geometry,
    has_linear_step,
    held_parameters,
    known_rule,
    learning_rate,
    learning_rates,
    step_geometry,
    update_rules,
)

Values = dict[str, Measurement]
# How many batches and products a slow quantity gets: enough for a useful error at a cost that a budget of a few per cent bears.
_WINDOW = 16  # training batches that a mean looks back on; by judgement
_LEAST_STEADY = 4  # of them that are averaged without asking whether they drift; by judgement: fewer have no error to tell it by
_SAME_RATE = 0.1  # relative change of the learning rate within which they are; by judgement: less than the scatter of a few batches shows
_MEAN_BATCHES = 24  # batches drawn from the probe set for a mean; by judgement
_NOISE_GROUPS = 8  # parts of a batch whose gradients are compared for the noise scale; by judgement
_TRACE_MATVECS = 24  # products of a trace without a budget; by judgement
# Products of a generalized sharpness, and directions to begin with, by trial on four runs of a small network: after ten measurements three
# of them were within 5 % of ten thorough starts and one a fifth below; with two directions two of them were a twentieth lower at first.
_SHARPEST_MATVECS, _SHARPEST_STARTS = 10, 4
# Lanczos steps and probes of a density that is looked at, by judgement: 24 steps show about as many features as a small picture can
_DENSITY_STEPS, _DENSITY_PROBES = 24, 4
_LEAST_MATVECS = 3  # products without which neither a trace nor the ends of a spectrum have an error; by judgement


@dataclass
class Memory(State, saved=("trackers", "windows", "numbers", "directions")):
    """What metrics remember from one measurement to the next, saved with the monitor's state."""

    tol: float = 0.02  # relative error that the trackers reach for
    seed: int = 0  # seeds all random vectors and draws
    trackers: Parts[EigenvalueTracker] = field(init=False)  # a tracker of an eigenvalue for each metric, made when first asked for
    windows: dict[str, deque[tuple[float, ...]]] = field(default_factory=dict)  # the last results on single batches, by metric
    numbers: dict[str, float] = field(default_factory=dict)  # single numbers, by metric
    directions: dict[str, Tensor] = field(default_factory=dict)  # (n,) the last ones found, by metric

    def __post_init__(self) -> None:
        # made at the first measurement: the monitor tells a cold start by whether the tracker was there before
        self.trackers = Parts(lambda _: EigenvalueTracker(tol=self.tol, seed=self.seed))

    def window(self, name: str) -> deque[tuple[float, ...]]:
        """The last results of a metric."""
        return self.windows.setdefault(name, deque(maxlen=_WINDOW))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.windows = {name: deque(entries, _WINDOW) for name, entries in self.windows.items()}


@dataclass
class Situation:
    """One measurement in the making: the function, the optimizer as it stands, and what is shared between metrics."""

    objective: Objective  # the training batch, or the part of it that is measured
    probe: Objective | None  # the fixed probe set; None without one
    optimizer: torch.optim.Optimizer  # unwrapped; only read
    batch_size: int  # number of samples in the training batch, on all processes
    step: int  # optimizer steps done
    memory: Memory  # what the metrics remember
    max_matvecs: int | None = None  # number of products that the budget allows the next metric; None if there is no bound
    top_k: int = 5  # how many eigenvalues top_k gives
    density: SpectralDensity | None = None  # what the metric of that name leaves for the record

    @property
    def lr(self) -> float:
        """Learning rate of the first group that trains measured parameters."""
        return learning_rate(self.optimizer, self.objective.layout)

    @cached_property
    def rule(self) -> UpdateRule | None:
        """The rule that limits that group's rate; None for an optimizer whose limits are not known."""
        return known_rule(self.optimizer, self.objective.layout)

    @property
    def awaits_state(self) -> bool:
        """Whether an adaptive optimizer has not stepped yet."""
        return self.rule is not None and self.rule.adaptive and not self.optimizer.state

    @cached_property
    def hessian(self) -> HessianOperator:
        """Hessian of the training batch; its graph is shared by the metrics."""
        return HessianOperator(self.objective)

    @cached_property
    def wide(self) -> Objective:
        """What slow quantities are measured on: the probe set, or else the batch."""
        return self.probe or self.objective

    @cached_property
    def wide_hessian(self) -> HessianOperator:
        """Hessian of the probe set, or else of the batch."""
        return HessianOperator(self.probe) if self.probe is not None else self.hessian

    @cached_property
    def logits(self) -> LogitGrowth:
        """How large the logits of the training batch are, for the metrics that look at them."""
        return logit_growth(self.objective)

    @property
    def where(self) -> str:
        """What slow quantities are measured on, in words."""
        return f"on {self.wide.num_samples} samples" + (" of the probe set" if self.probe is not None else "")

    def curvature_limit(self) -> float | None:
        """The largest stable lambda_max of the matrix that the optimizer's rule is about."""
        return self.rule.max_curvature(self.lr) if self.rule is not None and self.lr > 0 else None

    def hessian_limit(self) -> float | None:
        """The largest stable lambda_max(H): none for an adaptive optimizer, or if the groups' rates, momenta or decays differ."""
        return self.curvature_limit() if self.rule is not None and not self.rule.adaptive and not self.rule.matrix else None

    def step_limit(self) -> float | None:
        """2 / lr: the curvature along a step at which the loss no longer falls to second order."""
        return 2 / self.lr if self.lr > 0 else None


def _unwarned() -> AbstractContextManager[None]:
    """No warning about what did not converge: the record says so, and a warning at every measurement would drown the others."""
    return silenced(ConvergenceWarning)


# -- eigenvalues --------------------------------------------------------------------------------------------------------------
def _tracked(s: Situation, name: str, operator: SymmetricOperator, limit: float | None, where: str = "") -> Measurement:
    estimate = s.memory.trackers[name].update(operator, step=s.step, max_matvecs=s.max_matvecs)
    return Measurement.of(estimate, limit=limit, method=f"{estimate.method}{where}")


def _lambda_max(s: Situation) -> Values:
    return _followed(s, "lambda_max", lambda: s.hessian, s.hessian_limit())


def _preconditioned(s: Situation) -> Values:
    return _followed(s, "preconditioned_lambda_max", lambda: optimizer_curvature(s.hessian, s.optimizer)[0], s.curvature_limit())


def _followed(s: Situation, name: str, operator: Callable[[], SymmetricOperator], limit: float | None) -> Values:
    """An eigenvalue that moved along a line is extrapolated without a product; only then is no graph built either."""
    guessed = s.memory.trackers[name].extrapolate(s.step)
    return {name: _tracked(s, name, operator(), limit) if guessed is None else Measurement.of(guessed, limit=limit)}


def _probe_lambda_max(s: Situation) -> Values:
    return {"probe_lambda_max": _tracked(s, "probe_lambda_max", s.wide_hessian, s.hessian_limit(), f" {s.where}")}


def _ends(s: Situation, names: list[str], which: Literal["largest", "smallest"], limit: float | None) -> Values:
    k, values = min(len(names), s.wide_hessian.size), Values()
    # the stopping rule looks at k + 2 Ritz pairs: with a basis no larger than that, nothing would be known of them
    matvecs = None if s.max_matvecs is None else max(s.max_matvecs, len(names) + _LEAST_MATVECS)
    with _unwarned():
        pairs = eigenpairs(s.wide_hessian, k, which=which, tol=s.memory.tol, seed=s.memory.seed, max_matvecs=matvecs)
    for j, name in enumerate(names[: len(pairs.values)]):
        value, error, converged = float(pairs.values[j]), float(pairs.residuals[j]), bool(pairs.converged[j])
        matvecs, seconds = (pairs.num_matvecs, pairs.seconds) if j == 0 else (0, 0.0)  # one run gave them all: the first carries the cost
        if math.isfinite(value):
            rest = (matvecs, seconds, f"Lanczos {s.where}", converged, limit)
            values[name] = Measurement(value, error, *rest, error_kind="residual bound")
    return values


def _lambda_min(s: Situation) -> Values:
    return _ends(s, ["lambda_min"], "smallest", None)


def _top_k(s: Situation) -> Values:
    return _ends(s, [f"lambda_{j + 1}" for j in range(s.top_k)], "largest", s.hessian_limit())


def _per_layer(s: Situation) -> Values:
    values: Values = {}
    members: dict[str, set[int]] = {}
    for param, p in zip(s.wide.layout.names, s.wide.layout.live, strict=True):
        members.setdefault(layer_of(param), set()).add(id(p))
    for layer, own in members.items():
        # a block shares the graph of the whole Hessian: only the vectors are shorter
        name, block = f"lambda_max/{layer}", s.wide_hessian.block(among(own))
        values[name] = _tracked(s, name, block, s.hessian_limit(), f" {s.where}")
    return values


def _groups(s: Situation) -> Values:
    """The block of each parameter group against that group's own limit."""
    values: Values = {}
    live = optimizer_curvature(s.hessian, s.optimizer)[0] if s.rule is not None and s.rule.adaptive else s.hessian
    rules = update_rules(s.optimizer) if s.rule is not None else None
    for index, (params, lr) in enumerate(zip(held_parameters(s.optimizer), learning_rates(s.optimizer), strict=True)):
        own = {id(p) for p in params}
        if not any(id(p) in own for p in s.objective.layout.live):
            continue  # params= leaves this group out
        block: SymmetricOperator = live.block(among(own))
        name = f"lambda_max/group{index}"
        # the live matrix carries each group's weight relative to the first's, so that all are held against the first's
        rule, at = (s.rule, s.lr if lr else 0.0) if s.rule is None or s.rule.adaptive else (rules[index] if rules is not None else None, lr)
        values[name] = _tracked(s, name, block, rule.max_curvature(at) if rule is not None and at > 0 else None)
    return values


# -- along the steps ------------------------------------------------------------------------------------------------------------
def _batch_sharpness(s: Situation) -> Values:
    """Mean over batches drawn from the probe set, or over the last training batches, each at its own step."""
    name, stepper = "batch_sharpness", s.optimizer if has_linear_step(s.optimizer) else None
    # along the gradient, where the step is another, it has no limit
    started, size, limit = time.perf_counter(), s.batch_size, None if stepper is None else s.step_limit()
    if s.probe is not None and size <= s.probe.num_samples:
        with _unwarned():
            estimate = batch_sharpness(
                s.probe.by_samples(), batch_size=size, optimizer=stepper, max_batches=_MEAN_BATCHES, seed=s.memory.seed + s.step
            )
        return {name: Measurement.of(estimate, limit=limit, method=f"{estimate.method} from the probe set")}
    # One product, not a mean: averaged over this and the last batches, each at the parameters of its own step, while these moved little.
    gradient, along, product = gradient_and_product(s.objective, momentum_step(s.objective, stepper))
    dot = s.hessian.dot
    below, above = float(dot(along, gradient)), float(dot(along, product))
    uphill = not below > 0 or not math.isfinite(above)
    window = s.memory.window(name)
    window.append((float(s.step), math.nan if uphill else above / below, s.lr, float(size)))
    if uphill:
        raise NonFiniteError(f"the step of this batch goes uphill or is not finite (slope {-below:.3g}): its sharpness has no meaning")
    # it depends on the batch size, and follows the rate: what was measured at others is no sample of the same mean
    alike = [entry for entry in window if entry[3] == size and abs(entry[2] - s.lr) <= _SAME_RATE * s.lr]
    entries = [entry for entry in alike if math.isfinite(entry[1])]
    entries = entries[-_num_steady([entry[1] for entry in entries]) :]
    values = np.array([entry[1] for entry in entries])
    # a denominator that crosses 0 gives the ratio tails so heavy that it has no mean for the samples to converge to
    crosses = sum(entry[0] >= entries[0][0] for entry in alike) - len(entries)
    how = f"{len(values)} training batches, steps {int(entries[0][0])} to {s.step}" + (f", {crosses} uphill left out" if crosses else "")
    error, seconds = standard_error(values), time.perf_counter() - started
    return {name: Measurement(float(values.mean()), error, 1, seconds, how, len(values) > 1 and not crosses, limit)}


def _num_steady(values: Sequence[float]) -> int:
    """How many of the last values have one mean within their errors: twice as many for as long as the older ones agree."""
    count = min(_LEAST_STEADY, len(values))
    while count < len(values):
        more = min(2 * count, len(values))
        recent, older = np.array(values[-count:]), np.array(values[-more:-count])
        if abs(recent.mean() - older.mean()) > 2 * math.hypot(standard_error(recent), standard_error(older)):
            break
        count = more
    return count


def _gradient_noise_interaction(s: Situation) -> Values:
    if s.probe is None:
        raise UnsupportedError("gradient_noise_interaction compares batches with a larger set of data: pass probe=")
    with _unwarned():
        estimate = gradient_noise_interaction(
            s.probe.by_samples(), batch_size=min(s.batch_size, s.probe.num_samples), max_batches=_MEAN_BATCHES, seed=s.memory.seed + s.step
        )
    return {"gradient_noise_interaction": Measurement.of(estimate, limit=s.step_limit())}


def _critical_sharpness(s: Situation) -> Values:
    started, name = time.perf_counter(), "critical_sharpness"
    # the next update changes little from step to step, so that the last answer mostly brackets the new one with two forward passes
    critical = critical_learning_rate(s.objective, s.optimizer, guess=s.memory.numbers.get(name) or s.lr or 1e-3)
    if critical.outcome != "found":
        raise NonFiniteError(f"there is no critical learning rate here: {critical}")
    s.memory.numbers[name] = critical.value
    error = (2 / critical.lower - 2 / critical.upper) / 2 if critical.lower > 0 else math.inf
    how, seconds = f"{critical.num_evaluations} forward passes and a gradient", time.perf_counter() - started
    return {name: Measurement(critical.sharpness, error, 0, seconds, how, True, s.step_limit(), error_kind="half bracket")}


def _directional_sharpness(s: Situation) -> Values:
    started = time.perf_counter()
    value = directional_sharpness(s.objective, s.optimizer)
    how = "exact along the next update"
    return {"directional_sharpness": Measurement(value, 0.0, 1, time.perf_counter() - started, how, True, s.step_limit())}


def _generalized_sharpness(s: Situation) -> Values:
    """Of a method whose steps have a fixed length: S from the last direction, the steepest one and others, against 2 ||g||_* / lr."""
    name, started = "generalized_sharpness", time.perf_counter()
    shape = step_geometry(s.optimizer, s.objective.layout)
    if shape is None:
        kind = type(s.optimizer).__name__
        raise UnsupportedError(
            f"{name} is for methods whose steps have a fixed length, and those of {kind} have none that sharpkit knows: use "
            f"'preconditioned_lambda_max' or 'lambda_max', or register it with sharpkit.register_optimizer({kind}, geometry=...)"
        )
    most = _SHARPEST_MATVECS if s.max_matvecs is None else min(_SHARPEST_MATVECS, max(2, s.max_matvecs))
    budget, ball = Budget(s.hessian, max_matvecs=most), Ball(shape.norms, s.objective.layout, shape.radii)
    gradient, last = s.objective.gradient()[1], s.memory.directions.get(name)
    given = last.to(gradient) if last is not None and last.shape == gradient.shape else None
    seed = s.memory.seed + s.step
    value, direction, dual = sharpest(
        s.hessian, ball, gradient, budget, seed=seed, num_starts=_SHARPEST_STARTS, initial=given, thorough=False
    )
    s.memory.directions[name] = direction.clone()
    how, seconds = f"lower bound in the {ball.norm} norm", time.perf_counter() - started
    limit = 2 * dual / s.lr if s.lr > 0 else None
    return {name: Measurement(value, 0.0, budget.num_matvecs, seconds, how, True, limit)}


# -- sums ---------------------------------------------------------------------------------------------------------------------
def _trace(s: Situation) -> Values:
    with _unwarned():
        matvecs = _TRACE_MATVECS if s.max_matvecs is None else max(s.max_matvecs, _LEAST_MATVECS)
        estimate = trace(s.wide_hessian, rtol=0.05, seed=s.memory.seed + s.step, max_matvecs=matvecs)
    return {"trace": Measurement.of(estimate, limit=_trace_limit(s), method=f"{estimate.method} {s.where}")}


def _density(s: Situation) -> Values:
    """The whole spectrum, as far as the budget's products resolve it; the number is its share below zero."""
    most = _DENSITY_STEPS * _DENSITY_PROBES if s.max_matvecs is None else max(s.max_matvecs, _LEAST_MATVECS)
    steps = min(_DENSITY_STEPS, most, s.wide_hessian.size)
    probes = max(1, min(_DENSITY_PROBES, most // steps))
    with _unwarned():
        s.density = spectral_density(s.wide_hessian, num_probes=probes, num_steps=steps, seed=s.memory.seed + s.step)
    share = s.density.negative_mass
    return {"negative_mass": Measurement.of(share, method=f"{share.method} {s.where}")}


def _trace_limit(s: Situation) -> float | None:
    """tr H at which SGD with this batch size loses mean-square stability.

    2 (1 + beta) / lr = lambda_max + k tr H with k = (1 + beta) / ((1 - beta) B), the short form for Gaussian least squares.
    """
    rule, points = s.rule, s.memory.trackers["lambda_max"].points
    if rule is None or rule.adaptive or rule.gain != 1 or s.hessian_limit() is None or not points:
        return None
    # the last known lambda_max, measured by the main metric: another run of products for it would cost as much as the trace
    room = 2 * (1 + rule.momentum) / s.lr - points[-1][1]
    return room * (1 - rule.momentum) * s.batch_size / (1 + rule.momentum) if room > 0 else None


def _noise_scale(s: Situation) -> Values:
    """tr Sigma and |G|^2 are averaged over the last batches first, then divided: a mean of ratios would be biased by small |G|^2."""
    name, objective = "noise_scale", s.objective.by_samples()
    started = time.perf_counter()
    size = max(1, objective.num_samples // _NOISE_GROUPS)
    noise_of_batch = gradient_noise_scale(objective, group_size=size, max_groups=_NOISE_GROUPS, seed=s.memory.seed + s.step)
    window = s.memory.window(name)
    window.append((float(s.step), noise_of_batch.trace.value, noise_of_batch.gradient_norm_squared.value))
    entries = list(window)[-min(_num_steady([entry[j] for entry in window]) for j in (1, 2)) :]
    noise, signal = (np.array([entry[j] for entry in entries]) for j in (1, 2))
    value, error = _ratio_of_means(noise, signal)
    resolved = float(signal.mean()) > 2 * standard_error(signal)  # a denominator that may be 0 bounds nothing
    if len(entries) == 1:  # the jackknife needs two batches; the first has only its own groups to compare
        value, error = noise_of_batch.noise_scale.value, noise_of_batch.noise_scale.stderr
        resolved = noise_of_batch.gradient_norm_squared.value > 2 * noise_of_batch.gradient_norm_squared.stderr
    how = f"{len(entries)} training batches, steps {int(entries[0][0])} to {s.step}"
    if not resolved:
        how += "; not resolved: |G|^2 is within two errors of 0"
    return {name: Measurement(value, error, 0, time.perf_counter() - started, how, bool(math.isfinite(value) and resolved))}


def _ratio_of_means(above: np.ndarray[Any, Any], below: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Ratio of the means with its jackknife error; NaN if noise makes the denominator 0 or negative."""
    n, total, base = len(above), above.sum(), below.sum()
    if n < 2 or base <= 0:
        return math.nan, math.inf
    # left_out: (n,), the ratio without each batch in turn
    left_out = (total - above) / (base - below)
    return float(total / base), float(np.sqrt((n - 1) / n * ((left_out - left_out.mean()) ** 2).sum()))


# -- logits -------------------------------------------------------------------------------------------------------------------
def _attention_logits(s: Situation) -> Values:
    growth = s.logits
    if not growth.by_call:
        raise UnsupportedError("no attention was seen in the model's forward pass (sk.measures.logit_growth says what is looked for)")
    return {"attention_logits": Measurement(growth.attention, 0.0, 0, growth.seconds, f"largest of {len(growth.by_call)} attention calls")}


def _output_log_z(s: Situation) -> Values:
    growth = s.logits
    if not growth.num_targets:
        raise UnsupportedError("the loss did not call torch.nn.functional.cross_entropy with class labels, so its log Z is not known")
    return {"output_log_z": Measurement(growth.log_z, 0.0, 0, growth.seconds, f"root mean square of {growth.num_targets} targets")}


# Eigenvalues of H, and what is held against a number over the learning rate and so has the unit of one over it: for SGD that is the same,
# for methods that divide by the size of gradients it is one over parameter.
_OF_HESSIAN, _PER_RATE = "loss / parameter^2", "1 / learning rate"
_NO_UNIT = "none"
UNITS = {"loss": "that of the loss", "lr": "learning rate", "overhead": "none (share of the training time)"}


@dataclass(frozen=True)
class Metric:
    """One entry of the table below."""

    compute: Callable[[Situation], Values]  # measures it
    gradients: float  # approximate cost of one measurement, in gradients of the batch
    live: bool = False  # whether it reads the optimizer's state; for an adaptive one it is then left out before the first step
    needs_probe: bool = False  # whether it can be measured on a probe set only
    unit: str = _OF_HESSIAN  # of its values, in words


# By name. The numbers, by judgement, are what a first measurement costs in gradients of the batch; all later plans rest on measured costs.
METRICS: dict[str, Metric] = {
    "lambda_max": Metric(_lambda_max, 11),
    "preconditioned_lambda_max": Metric(_preconditioned, 11, live=True, unit=_PER_RATE),
    "probe_lambda_max": Metric(_probe_lambda_max, 11, needs_probe=True),
    "groups": Metric(_groups, 12, live=True, unit=_PER_RATE),
    "generalized_sharpness": Metric(_generalized_sharpness, 22, unit="loss / squared norm of a step"),
    "batch_sharpness": Metric(_batch_sharpness, 4, unit=_PER_RATE),
    "critical_sharpness": Metric(_critical_sharpness, 4, unit=_PER_RATE),
    "directional_sharpness": Metric(_directional_sharpness, 4, unit=_PER_RATE),
    "noise_scale": Metric(_noise_scale, 2, unit="samples"),
    "trace": Metric(_trace, 24),
    "lambda_min": Metric(_lambda_min, 20),
    "top_k": Metric(_top_k, 40),
    "per_layer": Metric(_per_layer, 60),
    "density": Metric(_density, 200, unit=f"{_NO_UNIT} (share of the eigenvalues)"),
    "attention_logits": Metric(_attention_logits, 0.5, unit=_NO_UNIT),
    "output_log_z": Metric(_output_log_z, 0.5, unit="nats"),
    "gradient_noise_interaction": Metric(_gradient_noise_interaction, 60, needs_probe=True),
}


MetricFunction = Callable[[Objective, torch.optim.Optimizer], float | Estimate]
MetricLike = str | MetricFunction

# What a metric of one's own is expected to cost in gradients of the batch: by judgement as much as batch sharpness.
_GUESSED_GRADIENTS = 4.0
_UNSAID = "not said"


def custom(
    function: MetricFunction,
    *,
    name: str | None = None,
    gradients: float = _GUESSED_GRADIENTS,
    limit: Callable[[torch.optim.Optimizer], float | None] | None = None,
    unit: str = _UNSAID,
) -> Metric:
    """A user's own ``function(objective, optimizer)`` as a metric, by default under the function's name."""
    called = name or name_of(function)

    def compute(s: Situation) -> Values:
        started, value = time.perf_counter(), function(s.objective, s.optimizer)
        seconds = time.perf_counter() - started
        bound = limit(s.optimizer) if limit is not None else None
        if isinstance(value, Estimate):
            return {called: Measurement.of(value, limit=bound)}
        return {called: Measurement(float(value), 0.0, 0, seconds, f"{name_of(function)}()", limit=bound)}

    return Metric(compute, gradients, unit=unit)


def name_of(function: Callable[..., Any]) -> str:
    """The name of a function, or of the class of a callable object."""
    return getattr(function, "__name__", type(function).__name__)


def register_metric(
    name: str,
    function: MetricFunction,
    *,
    gradients: float = _GUESSED_GRADIENTS,
    limit: Callable[[torch.optim.Optimizer], float | None] | None = None,
    unit: str = _UNSAID,
) -> None:
    """Give a metric of your own a name that ``metrics=[...]`` of the monitor and its callbacks knows, for this process.

    A function can be passed in ``metrics=[...]`` as it is; registering it adds a name, a cost to plan with, and a limit.

    Args:
        name: what records, plots and pages call it. A metric that sharpkit knows by this name already is replaced.
        function: (objective over the training batch, optimizer, which is only read) -> a number, or an :class:`Estimate` where the number
            has an error.
        gradients: approximate cost of one measurement, in gradients of the batch; only the first measurement is planned with it.
        limit: optimizer -> the value that the metric is compared with, None if there is none.
        unit: of the values, in words, for the header of a run; ``"none"`` where they have none.

    Raises:
        TypeError: function or limit is no function.
        ValueError: name is empty or no string, or gradients is not positive.

    Example:
        >>> import sharpkit as sk
        >>> def gradient_norm(objective, optimizer):
        ...     return float(objective.gradient()[1].norm())
        >>> sk.register_metric("gradient_norm", gradient_norm, gradients=1)
        >>> "gradient_norm" in METRICS
        True
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"name must be a text such as 'gradient_norm', got {name!r}")
    if not callable(function):
        raise TypeError(f"function must be a function of (objective, optimizer), got {type(function).__name__}")
    if limit is not None and not callable(limit):
        raise TypeError(f"limit must be a function of the optimizer, got {type(limit).__name__}")
    gradients = real("gradients", gradients, above=0)
    METRICS[name] = custom(function, name=name, gradients=gradients, limit=limit, unit=as_text("unit", unit))


def chosen_metrics(metrics: Sequence[MetricLike] | None, optimizer: torch.optim.Optimizer, probe: Any) -> dict[str, Metric]:
    """The metrics asked for by name, the main one first; defaults by the kind of optimizer."""
    if metrics is None:
        # groups that differ have one limit only for H scaled by their rates, as adaptive optimizers have one only for D^-1 H
        rule = known_rule(optimizer)
        main = ["preconditioned_lambda_max", "lambda_max"] if rule is not None and (rule.matrix or rule.adaptive) else ["lambda_max"]
        main = ["generalized_sharpness"] if has_geometry(optimizer) else main
        # batch sharpness along the gradient says nothing about a step that goes elsewhere
        metrics = [*main, *(["batch_sharpness"] if has_linear_step(optimizer) else []), "critical_sharpness"]
    if isinstance(metrics, str) or not isinstance(metrics, Iterable) or not (metrics := list(metrics)):
        raise ValueError(f"metrics must be a list of at least one of {', '.join(METRICS)}, or functions; got {metrics!r}")
    chosen: dict[str, Metric] = {}
    for metric in metrics:
        if isinstance(metric, (type, torch.nn.Module)) or not (callable(metric) or (isinstance(metric, str) and metric in METRICS)):
            raise ValueError(f"there is no metric {metric!r}; there are {', '.join(METRICS)}, or pass a function (objective, optimizer)")
        name, entry = (name_of(metric), custom(metric)) if callable(metric) else (metric, METRICS[metric])
        if entry.needs_probe and probe is None:
            raise ValueError(f"the metric {metric!r} needs a fixed set of data: pass probe=(inputs, targets)")
        chosen[name] = entry
    return chosen


def check_monitor_settings(every: Any, budget: Any, tol: Any, max_samples: Any, max_interval: Any, top_k: Any) -> None:
    """Raise TypeError or ValueError where a setting makes no sense."""
    if not isinstance(every, str) or every != "auto":
        whole("every", every, other="'auto'")
    real("budget", budget, above=0, below=1, hint="it is a share of training time")
    real("tol", tol, above=0, below=1, hint="it is a relative error")
    if max_samples is not None:
        whole("max_samples", max_samples)
    whole("max_interval", max_interval)
    whole("top_k", top_k)
