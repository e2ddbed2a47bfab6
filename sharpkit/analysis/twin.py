"""A private copy of an objective and its optimizer, to train or perturb without touching the user's."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sharpkit._batches import Batch, map_tensors
from sharpkit.objective import Objective


def twin_objective(objective: Objective, batches: list[Batch], *, dtype: torch.dtype | None = None) -> Objective:
    """The same objective over given batches, on a deep copy of the model; weights follow the original's rule and nothing is evaluated.

    Args:
        objective: the original.
        batches: data of the same kind.
        dtype: convert model, data and a loss module to this type. Raises whatever the model raises for it.
    """
    model = copy.deepcopy(objective.model)
    for original, twin in zip(objective.model.parameters(), model.parameters(), strict=True):
        twin.requires_grad_(original.requires_grad)
    loss = objective.loss
    if dtype is not None:
        model = model.to(dtype)
        batches = [map_tensors(lambda t: t.to(dtype) if t.is_floating_point() else t, batch) for batch in batches]
        loss = copy.deepcopy(loss).to(dtype) if isinstance(loss, nn.Module) else loss
    return Objective(
        model,
        batches,
        loss=loss,
        closure=None if loss is not None else objective._closure,
        count=objective.count_of,
        params=list(objective.layout.names),
        reduction=objective.reduction,
        mode=objective.mode,
        autocast=objective.autocast if dtype is None else None,
        process_group=False,
        seed=objective.seed,
        check=False,
    )


def twin_optimizer(
    optimizer: torch.optim.Optimizer, place: Mapping[int, nn.Parameter], *, lr: float | None = None, reset: bool = False
) -> torch.optim.Optimizer:
    """The same optimizer over other parameters, with a copy of its state; schedulers and hooks stay behind.

    Args:
        optimizer: the original; only read.
        place: the new parameter for each of its own, by ``id``.
        lr: rate of the first group, the others' keeping their ratio to it.
        reset: start with an empty state.

    Raises:
        ValueError: the optimizer holds parameters that the model does not.
    """
    reference = float(optimizer.param_groups[0]["lr"])
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        if any(id(p) not in place for p in group["params"]):
            raise ValueError("the optimizer holds parameters that are not the model's: make it from model.parameters()")
        settings = {key: value for key, value in group.items() if key not in ("params", "initial_lr")}
        if lr is not None:
            settings["lr"] = lr * (float(group["lr"]) / reference if reference else 1.0)
        groups.append({**settings, "params": [place[id(p)] for p in group["params"]]})
    other = type(optimizer).__new__(type(optimizer))
    torch.optim.Optimizer.__init__(other, groups, dict(optimizer.defaults))
    if not reset:
        for p, values in optimizer.state.items():
            other.state[place[id(p)]] = {
                key: v.detach().clone() if isinstance(v, torch.Tensor) else copy.deepcopy(v) for key, v in values.items()
            }
    return other


def matching(original: nn.Module, twin: nn.Module) -> dict[int, nn.Parameter]:
    """The twin's parameter for each of the original's, by ``id`` of the original."""
    return {id(p): t for p, t in zip(original.parameters(), twin.parameters(), strict=True)}
