"""Which D bounds Adam's rate after its first few steps: with the factor 1 - beta1^t of the first moment's bias correction, or without?

python -m experiments.adam_first_steps [--quick]
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from experiments._common import Row, run_as_script
from sharpkit.objective.params import ParamLayout
from sharpkit.optimizers import limit_rule, step_matrix

_CURVATURE, _ROOT = 2.0, 3.0  # of f(w) = H w^2 / 2, and sqrt(v_hat), which stays as it is
_START = 1e-100  # far from where a growing mode overflows
_AGES = (1, 3, 10, 30, 1000)


def aged(t: int) -> tuple[nn.Parameter, torch.optim.Adam]:
    """One parameter and its Adam after t steps, momentum at rest."""
    w = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = torch.optim.Adam([w], lr=1e-3)
    w.grad = torch.ones_like(w)
    optimizer.step()
    state = optimizer.state[w]
    state["step"].fill_(t)
    state["exp_avg"].zero_()
    state["exp_avg_sq"].fill_(_ROOT**2 * (1 - 0.999**t))
    w.data.fill_(_START)
    return w, optimizer


def stated_limit(t: int) -> float:
    """What sharpkit states for it, by D from its state."""
    w, optimizer = aged(t)
    scale = step_matrix(optimizer, ParamLayout(("w",), (w,))).scale
    assert scale is not None
    return limit_rule(optimizer).max_learning_rate(_CURVATURE * float(scale) ** 2)


def train(t: int, lr: float, *, steps: int, held: bool = False) -> list[float]:
    """|w| over its first value, after every further step with v_hat held, until it overflows; with ``held``, the step count stays too."""
    w, optimizer = aged(t)
    optimizer.param_groups[0]["lr"] = lr
    state, sizes = optimizer.state[w], list[float]()
    for step in range(t + 1, t + 1 + steps):
        w.grad = _CURVATURE * w.detach()
        count = t + 1 if held else step
        state["step"].fill_(count - 1)
        # what the coming step turns into _ROOT^2 (1 - beta2^count)
        state["exp_avg_sq"].copy_((_ROOT**2 * (1 - 0.999**count) - 0.001 * w.grad**2) / 0.999)
        optimizer.step()
        sizes.append(float(w.detach().abs()) / _START)
        if not sizes[-1] < 1e90:  # further on, the held v_hat would drown in the gradient's square
            break
    return sizes


def breaks(t: int, lr: float, *, steps: int = 600, held: bool = False) -> bool:
    """Whether the parameter grows from the middle of the run to its end."""
    sizes = train(t, lr, steps=steps, held=held)
    return len(sizes) < steps or max(sizes[-steps // 10 :]) > max(sizes[steps // 2 : steps // 2 + steps // 10])


def limit(t: int, *, held: bool, width: float) -> float:
    """The rate at which it breaks, by bisection."""
    lower, upper = 0.05 * stated_limit(t), 2 * stated_limit(t)
    while upper / lower > 1 + width:
        middle = math.sqrt(lower * upper)
        lower, upper = (lower, middle) if breaks(t, middle, held=held) else (middle, upper)
    return math.sqrt(lower * upper)


def measure(quick: bool) -> list[Row]:
    rows = []
    for t in (3, 1000) if quick else _AGES:
        stated = stated_limit(t)
        row: Row = {"t": t, "stated": stated, "factor": 1 - 0.9 ** (t + 1)}
        for name, held in (("real", False), ("real, t held", True)):
            row[name] = limit(t, held=held, width=0.1 if quick else 1e-3) / stated
        row |= {f"growth at {r}": max(1.0, *train(t, r * stated, steps=600)) for r in (0.25, 0.5, 0.9)}
        rows.append(row)
    return rows


def draw(rows: list[Row], figure: Any) -> None:
    left, right = figure.subplots(1, 2)
    ages = [row["t"] for row in rows]
    for name in ("real", "real, t held"):
        left.semilogx(ages, [row[name] for row in rows], "o-", label=name)
    left.semilogx(ages, [row["factor"] for row in rows], "k:", label="1 - beta1^(t + 1)")
    left.set_ylabel("largest stable rate over the stated one")
    for ratio in (0.25, 0.5, 0.9):
        right.loglog(ages, [row[f"growth at {ratio}"] for row in rows], "o-", label=f"at {ratio} of the stated rate")
    right.set_ylabel("largest |w| over the first")
    for axes in (left, right):
        axes.set_xlabel("steps that Adam has made")
        axes.legend(fontsize=8)


if __name__ == "__main__":
    run_as_script("adam_first_steps", measure, draw)
