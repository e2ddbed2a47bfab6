"""Learning-rate schedules as their papers have them, as functions of the share of the run; a torch scheduler and a plot of any."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from sharpkit._arguments import choice, real, reals, shown, whole
from sharpkit.learner.schedules import Schedule, cosine, linear

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["cosine", "cosine_power", "infinite", "linear", "plot_schedules", "power", "rex", "scheduler", "unified", "wsd", "wsd_s"]

_FLOOR = 0.1  # of the peak, where a decay of WSD-S ends, as in the paper


def rex(z: float) -> float:
    """(1 - z) / (1/2 + (1 - z) / 2): slow to fall, then fast.

    Example:
        >>> rex(0.0), round(rex(0.5), 4), rex(1.0)
        (1.0, 0.6667, 0.0)

    References:
        Chen, Wolfe and Kyrillidis (2022), arXiv 2107.04197.
    """
    return (1 - z) / (0.5 + 0.5 * (1 - z))


def wsd(decay: float = 0.1, *, shape: str = "exponential") -> Schedule:
    """Warm-up, stable, decay, without the warm-up: constant, then a decay over the last share of the run.

    Args:
        decay: that share.
        shape: of the decay: ``"linear"`` to 0, ``"exponential"`` to a hundredth, or ``"inverse"``: 1 / rate grows linearly to hundredfold.

    Example:
        >>> schedule = wsd(0.2, shape="linear")
        >>> schedule(0.5), round(schedule(0.9), 12), schedule(1.0)
        (1.0, 0.5, 0.0)

    References:
        Hu et al. (2024), arXiv 2404.06395; Wen et al. (2024), arXiv 2410.05192, for the inverse one.
    """
    decay = real("decay", decay, above=0, below=1)
    choice("shape", shape, ("linear", "exponential", "inverse"))
    ends: dict[str, Schedule] = {"linear": lambda u: 1 - u, "exponential": lambda u: 0.01**u, "inverse": lambda u: 1 / (1 + 99 * u)}
    return lambda z: 1.0 if z <= 1 - decay else ends[shape](min((z - 1 + decay) / decay, 1.0))


def wsd_s(ends: Sequence[float] = (0.25, 0.5, 1.0), *, decay: float = 0.1) -> Schedule:
    """WSD-S: constant, and a decay before each checkpoint, from which training goes on at the peak again: no step is thrown away.

    Each decay takes a share of the steps made until its end; 1 / rate grows linearly to tenfold.

    Args:
        ends: shares of the run at which a checkpoint is to be good, ascending, the last of them 1.
        decay: share of the steps until an end that its decay takes.

    Raises:
        ValueError: ends that do not ascend to 1, or a decay that would begin before the end before it.

    Example:
        >>> schedule = wsd_s((0.5, 1.0), decay=0.2)
        >>> [round(schedule(z), 3) for z in (0.3, 0.5, 0.6, 1.0)]
        [1.0, 0.1, 1.0, 0.1]

    References:
        Wen et al. (2024), arXiv 2410.05192.
    """
    decay, stops = real("decay", decay, above=0, below=1), reals("ends", ends, above=0, most=1)
    if not stops or stops != sorted(set(stops)) or stops[-1] != 1:
        raise ValueError(f"ends must ascend to 1, got {shown(ends)}")
    for before, end in zip([0.0, *stops], stops, strict=False):
        if (1 - decay) * end < before:
            raise ValueError(
                f"the decay to {end:g} would begin at {(1 - decay) * end:g}, before the checkpoint at {before:g}: choose a shorter"
            )

    def factor(z: float) -> float:
        end = next((stop for stop in stops if z <= stop), 1.0)
        done = (z / end - 1 + decay) / decay
        return 1.0 if done <= 0 else 1 / (1 + (1 / _FLOOR - 1) * min(done, 1.0))

    return factor


def power(start: float = 0.05, *, exponent: float = -0.51, decay: float = 0.1) -> Schedule:
    """The power schedule: constant, then a power of the steps made, then an exponential end to a hundredth.

    The paper's rate is min(peak, B a n^b) after n tokens at batch size B, with b = -0.51; ``start`` is where the two meet.

    Args:
        start: share of the run at which the power begins.
        exponent: b, negative.
        decay: share of the run of the end.

    Example:
        >>> schedule = power(0.1)
        >>> [round(schedule(z), 3) for z in (0.05, 0.1, 0.4, 1.0)]
        [1.0, 1.0, 0.493, 0.003]

    References:
        Shen et al. (2024), arXiv 2408.13359.
    """
    start, decay = (real(name, value, above=0, below=1) for name, value in (("start", start), ("decay", decay)))
    exponent = real("exponent", exponent, below=0)
    if start + decay > 1:
        raise ValueError(f"start and decay are shares of one run and must add up to 1 at most, got {start} + {decay}")

    def factor(z: float) -> float:
        body = float((max(min(z, 1 - decay), start) / start) ** exponent)
        return body if z <= 1 - decay else body * 0.01 ** min((z - 1 + decay) / decay, 1.0)

    return factor


def cosine_power(p: float = 10.0) -> Schedule:
    """(p^c - 1) / (p - 1) with c the cosine decay: a longer tail the larger p is; the cosine itself as p goes to 1.

    Example:
        >>> round(cosine_power(1.0001)(0.3) - cosine(0.3), 3)
        -0.0

    References:
        Hundt, Jain and Hager (2019), arXiv 1903.09900.
    """
    p = real("p", p, above=0)
    return lambda z: cosine(z) if p == 1.0 else (p ** cosine(z) - 1) / (p - 1)


def unified(phi: float = 1.0) -> Schedule:
    """2 c / (2 phi + (2 - phi) c) with c = 1 + cos(pi z): the budgeted schedule of many shapes, the cosine at phi = 2.

    Example:
        >>> round(unified(2.0)(0.3) - cosine(0.3), 12), unified(0.5)(0.0)
        (0.0, 1.0)
    """
    phi = real("phi", phi, above=0)

    def factor(z: float) -> float:
        c = 1 + math.cos(math.pi * z)
        return 2 * c / (2 * phi + (2 - phi) * c)

    return factor


def infinite(cool: float = 0.3, anneal: float = 0.1, *, level: float = 0.3) -> Schedule:
    """A cosine from the peak to a level over the first share of the run, constant there, and an exponential end.

    Training may go on from the level, whenever more data comes.

    Args:
        cool: share of the run of the cosine.
        anneal: share of the run of the end, to a hundredth of the level.
        level: over the peak.

    Raises:
        ValueError: the shares take more than the run.

    Example:
        >>> schedule = infinite(level=0.25)
        >>> schedule(0.0), schedule(0.5), schedule(1.0)
        (1.0, 0.25, 0.0025)

    References:
        Ibrahim et al. (2024), arXiv 2403.08763.
    """
    cool, anneal, level = (real(name, value, above=0, below=1) for name, value in (("cool", cool), ("anneal", anneal), ("level", level)))
    if cool + anneal > 1:
        raise ValueError(f"cool and anneal are shares of one run and must add up to 1 at most, got {cool} + {anneal}")

    def factor(z: float) -> float:
        if z < cool:
            return level + (1 - level) * cosine(z / cool)
        return level if z <= 1 - anneal else level * 0.01 ** min((z - 1 + anneal) / anneal, 1.0)

    return factor


def scheduler(
    optimizer: torch.optim.Optimizer, schedule: Schedule, *, total_steps: int, warmup: int = 0
) -> torch.optim.lr_scheduler.LambdaLR:
    """A torch scheduler that multiplies every group's present rate by a schedule; its ``state_dict`` and ``step`` are torch's own.

    Args:
        optimizer: with its peak rates set.
        schedule: of the share of steps done after the warm-up.
        total_steps: of the run; later steps keep the last factor.
        warmup: steps in which the factor grows linearly from 1 / warmup to 1.

    Raises:
        TypeError: schedule is no function.
        ValueError: a warm-up as long as the run.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.4)
        >>> steps = scheduler(optimizer, linear, total_steps=4)
        >>> for _ in range(2):
        ...     optimizer.step(); steps.step()
        >>> optimizer.param_groups[0]["lr"]
        0.2
    """
    if not callable(schedule):
        raise TypeError(f"schedule must be a function of the share of steps done, such as sk.laws.cosine, got {shown(schedule)}")
    total, first = whole("total_steps", total_steps), whole("warmup", warmup, least=0)
    if first >= total:
        raise ValueError(f"warmup must be shorter than the {total} steps of the run, got {first}")

    def factor(step: int) -> float:
        return (step + 1) / first if step < first else float(schedule(min((step - first) / (total - first), 1.0)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def plot_schedules(schedules: Mapping[str, Schedule], *, peak: float = 1.0, limit: float | None = None, ax: Axes | None = None) -> Axes:
    """Schedules by name on one plot, with the largest stable rate as measured (:func:`sharpkit.stable_learning_rate`) drawn in.

    Example:
        >>> import matplotlib; matplotlib.use("Agg")
        >>> plot_schedules({"cosine": cosine, "REX": rex}, peak=0.1, limit=0.3).get_ylabel()
        'learning rate'
    """
    from sharpkit.plots.laws import draw_schedules

    peak = real("peak", peak, above=0)
    return draw_schedules(schedules, peak=peak, limit=None if limit is None else real("limit", limit, above=0), ax=ax)
