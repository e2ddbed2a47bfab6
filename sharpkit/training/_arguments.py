"""Checking what a user gives the monitor, with a message that says the remedy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from sharpkit._errors import UnsupportedError
from sharpkit.analysis.stability import update_rule
from sharpkit.linalg.results import Estimate
from sharpkit.objective import Objective
from sharpkit.training.metrics import METRICS, Metric, custom
from sharpkit.training.pace import DECAYS
from sharpkit.training.polyak import BULKS

MetricLike = str | Callable[[Objective, torch.optim.Optimizer], float | Estimate]


_WRAPPERS = ("AcceleratedOptimizer", "LightningOptimizer")  # subclasses of the torch class that hold the real one


def plain_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside a trainer's wrapper (accelerate, Lightning).

    Raises:
        TypeError: there is none.
    """
    found = optimizer
    while not isinstance(found, torch.optim.Optimizer) or type(found).__name__ in _WRAPPERS:
        inner = getattr(found, "optimizer", None)
        if inner is None or inner is found:
            raise TypeError(f"the optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        found = inner
    return found


def chosen_metrics(metrics: Sequence[MetricLike] | None, optimizer: torch.optim.Optimizer, probe: Any) -> dict[str, Metric]:
    """The metrics asked for by name, the main one first; defaults by the kind of optimizer."""
    if metrics is None:
        try:
            rule = update_rule(optimizer)
            adaptive = rule.adaptive
        except UnsupportedError:
            adaptive = False
        several = len({float(group["lr"]) for group in optimizer.param_groups}) > 1
        main = ["preconditioned_lambda_max", "lambda_max"] if adaptive or several else ["lambda_max"]
        metrics = [*main, "batch_sharpness", "critical_sharpness"]
    if isinstance(metrics, str) or not metrics:
        raise ValueError(f"metrics must be a list of at least one of {', '.join(METRICS)}, or functions; got {metrics!r}")
    chosen: dict[str, Metric] = {}
    for metric in metrics:
        if callable(metric):
            chosen[getattr(metric, "__name__", type(metric).__name__)] = custom(metric)
        elif metric in METRICS:
            chosen[metric] = METRICS[metric]
        else:
            raise ValueError(f"there is no metric {metric!r}; there are {', '.join(METRICS)}, or pass a function (objective, optimizer)")
        if callable(metric) or not METRICS[metric].needs_probe or probe is not None:
            continue
        raise ValueError(f"the metric {metric!r} needs a fixed set of data: pass probe=(inputs, targets)")
    return chosen


def check_settings(every: int | str, budget: float, tol: float, max_samples: int | None, max_interval: int) -> None:
    """Raise ValueError where a setting makes no sense."""
    if every != "auto" and (isinstance(every, (str, bool)) or every < 1):
        raise ValueError(f"every must be a number of steps from 1 on, or 'auto', got {every!r}")
    if not 0 < budget < 1:
        raise ValueError(f"budget is a share of training time between 0 and 1, got {budget}")
    if not 0 < tol < 1:
        raise ValueError(f"tol is a relative error between 0 and 1, got {tol}")
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"max_samples must be at least 1, got {max_samples}")
    if max_interval < 1:
        raise ValueError(f"max_interval must be at least 1, got {max_interval}")


def check_learner_settings(total_steps: int, interval: int | str, budget: float, safety: float, warmup: float, decay: Any) -> None:
    """Raise ValueError where a setting of the learner makes no sense."""
    if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 20:
        raise ValueError(f"total_steps must be the number of optimizer steps of the whole run, at least 20, got {total_steps!r}")
    if interval != "auto" and (isinstance(interval, (str, bool)) or interval < 1):
        raise ValueError(f"interval must be a number of steps from 1 on, or 'auto', got {interval!r}")
    for name, value in (("budget", budget), ("safety", safety), ("warmup", warmup)):
        if not 0 < value < 1:
            raise ValueError(f"{name} must lie between 0 and 1, got {value}")
    if not callable(decay) and decay not in DECAYS:
        raise ValueError(f"decay must be one of {', '.join(DECAYS)} or a function of the share of steps done, got {decay!r}")


def check_momentum(momentum: str, bulk: str | float, *, adaptive: bool) -> None:
    """Raise ValueError where a learner's choice of momentum makes no sense."""
    if momentum not in ("keep", "polyak"):
        raise ValueError(f"momentum must be 'keep' or 'polyak', got {momentum!r}")
    if momentum == "polyak" and adaptive:
        raise ValueError("momentum='polyak' is for SGD: Adam's beta1 averages, it does not accelerate")
    if bulk not in BULKS if isinstance(bulk, str) else not bulk > 1:
        raise ValueError(f"bulk must be one of {', '.join(BULKS)}, or lambda_max over it, a number above 1, got {bulk!r}")
