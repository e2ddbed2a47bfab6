"""The parameter groups of an optimizer: which parameters they hold, at which rates they train, their settings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sharpkit._errors import UnsupportedError
from sharpkit.objective.interrupts import Whole
from sharpkit.objective.params import ParamLayout
from sharpkit.optimizers.rules import Settings, State
from sharpkit.optimizers.torch_rules import decay_of
from sharpkit.optimizers.wrappers import unwrap_optimizer


def held_parameters(optimizer: Optimizer) -> list[list[nn.Parameter]]:
    """The parameters of every group."""
    return [list(group["params"]) for group in optimizer.param_groups]


def _rate(settings: Settings) -> float:
    try:
        if (rate := float(settings["lr"])) >= 0 and not isinstance(settings["lr"], str):
            return rate
        raise ValueError
    except (KeyError, TypeError, ValueError, RuntimeError):  # absent, None, a text, a tensor of several rates
        raise UnsupportedError(
            f"a parameter group has lr={settings.get('lr')!r}, not a number of at least 0, so nothing says how far the optimizer "
            "steps: limits and learned rates are for optimizers whose groups keep a number as lr; give one (in transformers' Adafactor "
            "with relative_step=False)"
        ) from None


def learning_rates(optimizer: Optimizer) -> list[float]:
    """The learning rate of every group; UnsupportedError where one has none."""
    return [_rate(group) for group in optimizer.param_groups]


def rates_at_hand(optimizer: Optimizer) -> tuple[float | Tensor, ...] | None:
    """The learning rate of every group, without waiting for a device: a copy of a tensor that lies there; None where one has none."""
    rates: list[float | Tensor] = []
    for group in optimizer.param_groups:
        rate = group.get("lr")
        try:
            rates.append(rate.detach().clone() if isinstance(rate, Tensor) and rate.device.type != "cpu" else _rate(group))
        except UnsupportedError:
            return None
    return tuple(rates)


def relative_rates(optimizer: Optimizer, layout: ParamLayout | None = None) -> list[float]:
    """Every group's learning rate over that of the reference: the first that trains, and holds some of the layout's parameters if given.

    Groups that hold none of them count as resting.
    """
    rates = learning_rates(optimizer)
    if not any(rates):  # a warmup from 0: the scheduler multiplies the initial rates, if it noted them
        rates = [float(group.get("initial_lr", 1.0)) for group in optimizer.param_groups]
    if layout is not None:
        rates = [rate if holds else 0.0 for rate, holds in zip(rates, _holding(optimizer, layout), strict=True)]
    first = next((rate for rate in rates if rate), 0.0)
    return [rate / first if first else 1.0 for rate in rates]


def learning_rate(optimizer: Optimizer, layout: ParamLayout | None = None) -> float:
    """The learning rate of the reference group, as in :func:`relative_rates`: the one that limits are stated for."""
    return learning_rates(optimizer)[_reference(relative_rates(optimizer, layout))]


def _reference(ratios: Sequence[float]) -> int:
    return next((index for index, ratio in enumerate(ratios) if ratio == 1), 0)


def own_state(optimizer: Optimizer, layout: ParamLayout, live: Tensor) -> State:
    """What an optimizer keeps for a parameter; of a sharded one, for this process's own part of it.

    Raises:
        UnsupportedError: it keeps what is no part of it, such as means over its rows.
    """
    state: State = optimizer.state.get(live, {})
    if layout.shards is None:
        return state
    for name, value in state.items():
        if isinstance(value, Tensor) and value.numel() > 1 and value.shape != live.shape:
            raise UnsupportedError(
                f"{type(optimizer).__name__} keeps {name} of shape {tuple(value.shape)} for a sharded parameter of shape "
                f"{tuple(live.shape)}, which is not one value for each entry: measure without optimizer=, or use one such as AdamW"
            )
    return {name: layout.part_of(live, value) if isinstance(value, Tensor) else value for name, value in state.items()}


def _holding(optimizer: Optimizer, layout: ParamLayout) -> list[bool]:
    """Whether each group holds some of the parameters."""
    wanted = {id(p) for p in layout.live}
    return [any(id(p) in wanted for p in group["params"]) for group in optimizer.param_groups]


_NONE_HELD = "the optimizer holds none of the objective's parameters: make it from the same model's parameters()"


def is_maximizing(optimizer: Optimizer) -> bool:
    """Whether any group climbs the objective (``maximize=True``): limits are about descent, and say nothing then."""
    optimizer = unwrap_optimizer(optimizer)
    # pytorch_optimizer's keep it as an attribute of their own, for all groups
    return getattr(optimizer, "maximize", False) is True or any(group.get("maximize") for group in optimizer.param_groups)


def check_one_way(optimizer: Optimizer, layout: ParamLayout) -> None:
    """Raise UnsupportedError where some groups that train the layout's parameters climb the objective while others descend it."""
    optimizer = unwrap_optimizer(optimizer)
    ways = {bool(g.get("maximize")) for g, r in zip(optimizer.param_groups, relative_rates(optimizer, layout), strict=True) if r}
    if len(ways) > 1:
        raise UnsupportedError(
            f"some parameter groups of the {type(optimizer).__name__} have maximize=True and others minimize, so the loss along their "
            "common step bounds neither: select the parameters of one kind with params="
        )


def check_trains(optimizer: Optimizer, model: nn.Module) -> None:
    """Make sure that the optimizer trains this model and nothing beside it.

    Raises:
        ValueError: it holds none of the model's parameters.
        UnsupportedError: it also trains parameters that are not the model's, such as the loss's own.
    """
    optimizer = unwrap_optimizer(optimizer)
    if any(math.isinf(rate) for rate in learning_rates(optimizer)):
        raise ValueError("the optimizer has an infinite learning rate, which no step can be made with: give its groups finite ones")
    own = {id(p) for p in model.parameters()}
    moving = [p for group, ratio in zip(optimizer.param_groups, relative_rates(optimizer), strict=True) for p in group["params"] if ratio]
    if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(_NONE_HELD)
    if strangers := sum(p.requires_grad and id(p) not in own for p in moving):
        raise UnsupportedError(
            f"the optimizer also trains {strangers} parameters that are no part of the {type(model).__name__}, the loss's own or another "
            "model's, and its limit is that of all together: put both into one nn.ModuleList, and pass that with closure="
        )


def set_learning_rates(optimizer: Optimizer, rates: Iterable[float]) -> None:
    """Give every group its learning rate; one that is a tensor is overwritten in place, as captured graphs need it.

    All or none: Ctrl-C waits until every group has its own.
    """
    with Whole(_rates_set(optimizer, list(rates))):
        pass


@contextmanager
def _rates_set(optimizer: Optimizer, rates: Sequence[float]) -> Iterator[None]:
    written: dict[int, float] = {}
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        held = group["lr"]
        if not isinstance(held, Tensor):
            group["lr"] = rate
        elif written.setdefault(id(held), rate) == rate:
            held.fill_(rate)
        else:  # torch gives all groups the one tensor of lr=: groups that part need tensors of their own
            group["lr"] = torch.full_like(held, rate)
    yield


def regrouped(optimizer: Optimizer, layout: ParamLayout, factors: Sequence[float]) -> Optimizer:
    """The optimizer as it would be with a group for each of the layout's parameters, at a factor of its rate: to ask for limits.

    It shares the original's state and must not step. Parameters that the optimizer does not hold are left out.

    Args:
        optimizer: the original; only read.
        layout: the parameters meant.
        factors: for each of them, positive.
    """
    optimizer = unwrap_optimizer(optimizer)
    twin = type(optimizer).__new__(type(optimizer))
    Optimizer.__setstate__(twin, {"defaults": {}, "state": {}, "param_groups": []})
    vars(twin).update({name: value for name, value in vars(optimizer).items() if not name.startswith("_optimizer_")})
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    twin.param_groups = [
        {**groups[id(p)], "params": [p], "lr": _rate(groups[id(p)]) * factor}
        for p, factor in zip(layout.live, factors, strict=True)
        if id(p) in groups
    ]
    return twin


def restore_initial_rates(optimizer: Optimizer) -> None:
    """Give back the rates from before a scheduler's warmup, which may have begun at 0 and so hidden the groups' ratios."""
    set_learning_rates(optimizer, [float(group.get("initial_lr", _rate(group))) for group in optimizer.param_groups])


def begin_rates(optimizer: Optimizer, peak: float) -> None:
    """Give the reference group a rate, and the others theirs in proportion, for a new scheduler to begin from."""
    set_learning_rates(optimizer, [peak * ratio for ratio in relative_rates(optimizer)])
    for group in optimizer.param_groups:
        group.pop("initial_lr", None)  # torch's schedulers would begin from it


def current_momentum(optimizer: Optimizer) -> float:
    """Momentum, or beta1, of the first group; NaN for an optimizer that has none."""
    settings = optimizer.param_groups[0]
    return float(settings["betas"][0] if "betas" in settings else settings.get("momentum", math.nan))


def set_momentum(optimizer: Optimizer, value: float) -> None:
    """Give every group of an optimizer of SGD's kind this momentum."""
    for group in optimizer.param_groups:
        group["momentum"] = value


def averaging(optimizer: Optimizer) -> tuple[float, float] | None:
    """Beta1 and beta2 of the first group; None for an optimizer that does not average both moments."""
    return optimizer.param_groups[0].get("betas")


def weight_decay(optimizer: Optimizer) -> float:
    """Weight decay of the first group, coupled or not."""
    return decay_of(optimizer.param_groups[0])


def plain_settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Every group's settings that are plain values, for a key that tells runs apart."""
    plain = (int, float, str, tuple, bool, type(None))
    # a rate may be a tensor; it must count all the same, or runs at two rates would share a key
    groups = [{**group, "lr": _rate(group)} for group in optimizer.param_groups]
    return [{k: v for k, v in group.items() if k != "params" and isinstance(v, plain)} for group in groups]
