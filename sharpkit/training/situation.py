"""What metrics share while one measurement is made, and what they remember from one to the next."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sharpkit._errors import UnsupportedError
from sharpkit.analysis.stability import UpdateRule, update_rule
from sharpkit.linalg.tracking import EigenvalueTracker
from sharpkit.objective import Objective
from sharpkit.operators.hessian import HessianOperator

_WINDOW = 16  # batches that a mean over batches looks back on


@dataclass
class Memory:
    """What metrics remember from one measurement to the next, saved with the monitor's state.

    Attributes:
        trackers: of eigenvalues, by metric.
        windows: the last results on single batches, by metric.
        numbers: single numbers, by metric.
    """

    tol: float = 0.02
    seed: int = 0
    trackers: dict[str, EigenvalueTracker] = field(default_factory=dict)
    windows: dict[str, deque[tuple[float, ...]]] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)

    def tracker(self, name: str) -> EigenvalueTracker:
        """The tracker of a metric, made when first asked for."""
        return self.trackers.setdefault(name, EigenvalueTracker(tol=self.tol, seed=self.seed))

    def window(self, name: str) -> deque[tuple[float, ...]]:
        """The last results of a metric."""
        return self.windows.setdefault(name, deque(maxlen=_WINDOW))

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors."""
        return {
            "trackers": {name: tracker.state_dict() for name, tracker in self.trackers.items()},
            "windows": {name: [list(entry) for entry in window] for name, window in self.windows.items()},
            "numbers": dict(self.numbers),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved memory."""
        self.trackers.clear()
        for name, saved in state["trackers"].items():
            self.tracker(name).load_state_dict(saved)
        self.windows = {name: deque((tuple(e) for e in entries), maxlen=_WINDOW) for name, entries in state["windows"].items()}
        self.numbers = {name: float(value) for name, value in state["numbers"].items()}


@dataclass
class Situation:
    """One measurement in the making: the function, the optimizer as it stands, and what is shared between metrics.

    Attributes:
        objective: the training batch, or the part of it that is measured.
        probe: the fixed probe set; None without one.
        optimizer: unwrapped; only read.
        batch_size: samples of the training batch, on all processes.
        step: optimizer steps done.
        memory: of the metrics.
        max_matvecs: products that the budget allows the next metric; None without a bound.
        top_k: how many eigenvalues ``top_k`` gives.
    """

    objective: Objective
    probe: Objective | None
    optimizer: torch.optim.Optimizer
    batch_size: int
    step: int
    memory: Memory
    max_matvecs: int | None = None
    top_k: int = 5

    @property
    def lr(self) -> float:
        """Of the first parameter group."""
        return float(self.optimizer.param_groups[0]["lr"])

    @cached_property
    def rule(self) -> UpdateRule | None:
        """Of the first parameter group; None for an optimizer whose limits are not known."""
        try:
            return update_rule(self.optimizer)
        except UnsupportedError:
            return None

    @property
    def awaits_state(self) -> bool:
        """Whether an adaptive optimizer has not stepped yet."""
        return self.rule is not None and self.rule.adaptive and not self.optimizer.state

    @cached_property
    def hessian(self) -> HessianOperator:
        """Of the training batch; its graph is shared by the metrics."""
        return HessianOperator(self.objective)

    @cached_property
    def wide(self) -> Objective:
        """What slow quantities are measured on: the probe set, or else the batch."""
        return self.probe or self.objective

    @cached_property
    def wide_hessian(self) -> HessianOperator:
        """Of the probe set, or else the batch."""
        return HessianOperator(self.probe) if self.probe is not None else self.hessian

    @property
    def where(self) -> str:
        """In words, what slow quantities are measured on."""
        return f"on {self.wide.num_samples} samples" + (" of the probe set" if self.probe is not None else "")

    def curvature_limit(self) -> float | None:
        """The largest stable lambda_max of the matrix that the optimizer's rule is about."""
        return self.rule.max_curvature(self.lr) if self.rule is not None and self.lr > 0 else None

    def hessian_limit(self) -> float | None:
        """The largest stable lambda_max(H): none for an adaptive optimizer, or where groups have other rates."""
        same = len({float(group["lr"]) for group in self.optimizer.param_groups}) == 1
        return self.curvature_limit() if self.rule is not None and not self.rule.adaptive and same else None

    def step_limit(self) -> float | None:
        """2 / lr: the curvature along a step at which the loss no longer falls to second order."""
        return 2 / self.lr if self.lr > 0 else None


def by_samples(objective: Objective) -> Objective:
    """The objective in eval mode where train mode ties the samples of a batch together."""
    if objective.may_separate and not objective._survey.draws:
        return objective
    other = copy.copy(objective)
    other.mode = "eval"
    other._survey = replace(objective._survey, draws=False)
    return other


def among(own: set[int]) -> Callable[[str, Tensor], bool]:
    """Selects the parameters of these ``id``s."""
    return lambda _, parameter: id(parameter) in own
