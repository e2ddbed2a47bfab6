"""What a network's width does to an optimizer: which steps grow with a gradient or a matrix, what stands beside it, groups with factors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch.optim import Optimizer

from sharpkit._errors import UnsupportedError
from sharpkit.optimizers.kinds import kind_of
from sharpkit.optimizers.limits import decoupled_decays, is_adaptive
from sharpkit.optimizers.torch_rules import decay_of

# Their steps are scaled by the parameter's own size, by past steps, or not divided at first: the powers of the muP table are not theirs.
_OWN_SCALE = ("Adafactor", "Adadelta", "RAdam", "RAdamScheduleFree", "Prodigy", "Rprop")
_KEY = "transfer_factor"  # in groups: the factor on the rate, and the sign that it was applied

StepKind = Literal["linear", "entrywise", "spectral"]  # grows with the gradient; every entry about the rate; every singular value


class GroupFactors(NamedTuple):
    """On the settings of a group."""

    lr: float
    weight_decay: float
    eps: float


def subtracted_decays(optimizer: Optimizer) -> list[float]:
    """Of every group, the decay of which a step subtracts lr decay w, decoupled or in a gradient that is not divided."""
    if is_adaptive(optimizer, unknown=True):
        return decoupled_decays(optimizer)
    return [decay_of(group) for group in optimizer.param_groups]


def eps_beside_gradients(optimizer: Optimizer) -> list[float]:
    """Of every group, the eps that is added to the root of an average of g^2; 0 where there is none."""
    rooted = is_adaptive(optimizer, unknown=False)
    return [float(e) if rooted and isinstance(e := group.get("eps"), (int, float)) else 0.0 for group in optimizer.param_groups]


def step_kind(optimizer: Optimizer, group: int, shape: tuple[int, ...], base: tuple[int, ...]) -> tuple[StepKind, float]:
    """What a group's steps are like, and their length at one rate for a tensor of this shape over that for one of the base's.

    Raises:
        UnsupportedError: it is not known how they change with a tensor's size.
    """
    kind, name = kind_of(optimizer), type(optimizer).__name__
    if kind is not None and name not in _OWN_SCALE:
        if kind.rule is not None:
            return "entrywise" if kind.rules(optimizer)[group].adaptive else "linear", 1.0
        if kind.geometry is not None:
            settings = dict(optimizer.param_groups[group])
            (norm, now), (_, before) = (kind.geometry({}, settings, torch.empty(s, device="meta")) for s in (shape, base))
            if norm in ("linf", "spectral"):
                return "entrywise" if norm == "linf" else "spectral", float(now) / float(before)
    raise UnsupportedError(
        f"how the rates of {name} must change with width is not known: use SGD, Adam, AdamW or another of the same kind, Lion or Muon"
    )


def check_fresh(optimizer: Optimizer) -> None:
    """It has made no step, and no factors were applied.

    Raises:
        ValueError: it has.
    """
    if any(_KEY in group for group in optimizer.param_groups):
        raise ValueError(f"this {type(optimizer).__name__} was parametrized before: make a new one from the model")
    if any(optimizer.state.values()):
        raise ValueError(f"this {type(optimizer).__name__} has stepped already: parametrize it when model and optimizer are new")


def split_groups(optimizer: Optimizer, factors: Mapping[int, GroupFactors]) -> None:
    """Split every group by the factors of its tensors (by ``id``), in the order of first appearance, and apply them."""
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        parts: dict[GroupFactors, dict[str, Any]] = {}
        names: Iterable[Any] = group.get("param_names") or [None] * len(group["params"])
        for p, name in zip(group["params"], names, strict=True):
            own = factors[id(p)]
            if own not in parts:
                part = {**group, "params": [], "lr": group["lr"] * own.lr, _KEY: own.lr}
                part |= {"param_names": []} if name is not None else {}
                for key, factor in (("initial_lr", own.lr), ("weight_decay", own.weight_decay), ("eps", own.eps)):
                    if isinstance(group.get(key), (int, float)):
                        part[key] = group[key] * factor
                parts[own] = part
            parts[own]["params"].append(p)
            if name is not None:
                parts[own]["param_names"].append(name)
        groups += parts.values()
    optimizer.param_groups[:] = groups
