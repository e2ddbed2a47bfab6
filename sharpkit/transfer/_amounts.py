"""How much a verdict measures in each mode, what that will take, and a family of depths made from one of widths."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sharpkit.transfer._sweep import duration, step_seconds
from sharpkit.transfer.setup import Family

PROXY_STEPS = 4


@dataclass(frozen=True)
class Amounts:
    """How much of everything a mode does."""

    sharpness_steps: int
    sharpness_every: int
    rate_steps: int
    until_certain: bool


AMOUNTS = {"quick": Amounts(40, 4, 60, True), "full": Amounts(200, 10, 150, False)}


def forecast(family: Family, sizes: Sequence[int], amounts: Amounts, seeds: int) -> str:
    """At most: learning rates at every size, no early end."""
    each = step_seconds(family, sizes)
    short = sum(each) * seeds * PROXY_STEPS * 3  # putting back every tensor takes about as long as two more steps
    products = 3 * amounts.sharpness_steps / amounts.sharpness_every
    sharp = sum(each) * (amounts.sharpness_steps + 2 * products)
    rates = sum(each) * amounts.rate_steps * (8 + 7 * (seeds - 1))
    return (
        f"cost over {family.dimension}s, from a timed step: coordinates {duration(short)}, sharpness {duration(sharp)}, "
        f"learning rates at most {duration(rates)}"
    )


def by_depth(build: Any, optimizer: Any, width: int, rest: tuple[Any, Any, Any]) -> Family:
    """Networks of one width by depth.

    Args:
        build: called as build(width, depth=...).
        optimizer: called with ``depth=`` where it takes that.
        width: of all.
        rest: data, loss and closure.

    Raises:
        TypeError: build takes no depth.
    """
    if not _takes_depth(build):
        raise TypeError("with depths, build must take the depth too: build(width, depth=...)")
    knows = _takes_depth(optimizer)
    return Family(
        lambda depth: build(width, depth=depth),
        lambda model, depth: optimizer(model, width, depth=depth) if knows else optimizer(model, width),
        *rest,
        dimension="depth",
    )


def _takes_depth(function: Any) -> bool:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False
    return "depth" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
