"""Is the stated limit the rate at which the real optimizer breaks? Every torch.optim optimizer, one group and three, on a quadratic.

python -m experiments.optimizer_limits [--quick]
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import sharpkit as sk
from experiments._common import Row, run_as_script

_SHAPES = ((2, 2), (5, 1), (3, 1))  # one tensor a group; two-dimensional, as Muon wants them
_STEADY = 1 - 1e-9  # beta2, alpha: the divisor stays what it is over thousands of steps
_AGE = 1e9  # steps done: the bias corrections no longer change
_WIDTH = 1e-3  # of the bracket, relative
Groups = list[dict[str, Any]]
Make = Callable[[Groups], torch.optim.Optimizer]

# Settings of the three groups beside their rates: momentum, or beta1, and decay.
_RATES, _MOMENTA, _DECAYS = (1.0, 5.0, 0.3), (0.9, 0.5, 0.0), (0.0, 0.8, 3.0)


def quadratic() -> Tensor:
    """(12, 12) positive definite, eigenvalues 0.5 to 10 in random directions."""
    basis = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    return basis @ torch.diag(torch.linspace(0.5, 10.0, 12, dtype=torch.float64)) @ basis.T


class Quadratic(nn.Module):
    """f(w) = w^T H w / 2, w in three tensors, so small that gradients leave no mark on an adaptive optimizer's divisor."""

    def __init__(self) -> None:
        super().__init__()
        self.hessian = quadratic()
        generator = torch.Generator().manual_seed(1)
        draw = [1e-6 * torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in _SHAPES]
        self.parts = nn.ParameterList([nn.Parameter(part) for part in draw])

    def flat(self) -> Tensor:
        return torch.cat([part.reshape(-1) for part in self.parts])

    def forward(self, batch: Tensor) -> Tensor:
        w = self.flat()
        return 0.5 * w @ self.hessian @ w * batch.mean()

    def set_gradients(self) -> None:
        gradient = self.hessian @ self.flat().detach()
        for part, g in zip(self.parts, gradient.split([part.numel() for part in self.parts]), strict=True):
            part.grad = g.reshape(part.shape)


def settings_of(name: str, index: int, *, several: bool) -> dict[str, Any]:
    """Settings of a group for a row of the table: with several groups all differ, in rate, momentum and decay."""
    momentum, decay = (_MOMENTA[index], _DECAYS[index]) if several else (_MOMENTA[0], _DECAYS[1])
    base, _, variant = name.partition(" ")
    if base == "SGD":
        extra: dict[str, Any] = {"momentum": momentum} if variant else {}
        extra |= {"nesterov": momentum > 0} if variant == "Nesterov" else {"dampening": 0.4 * momentum} if variant == "dampened" else {}
        return {**extra, "weight_decay": decay}
    if base in ("Adam", "AdamW", "NAdam", "RAdam", "Adamax"):
        return {"betas": (momentum, _STEADY), "weight_decay": decay, **({"amsgrad": True} if variant == "amsgrad" else {})}
    if base == "RMSprop":
        return {"alpha": _STEADY, "momentum": momentum, "weight_decay": decay, "centered": variant == "centred"}
    if base == "Adagrad":
        return {"lr_decay": 1e-9, "weight_decay": decay}
    return {} if base in ("LBFGS", "Rprop", "SparseAdam") else {"weight_decay": decay}


_NAMES = (
    "SGD", "SGD momentum", "SGD Nesterov", "SGD dampened", "Adam", "Adam amsgrad", "AdamW", "RMSprop", "RMSprop centred", "Adagrad",
    "NAdam", "RAdam", "Adamax", "Adadelta", "Adafactor", "ASGD", "Rprop", "Muon", "SparseAdam", "LBFGS",
)  # fmt: skip
_KINDS = ("one group", "three groups", "one at rate 0", "one not held")


def make(name: str, kind: str) -> tuple[Quadratic, torch.optim.Optimizer]:
    """A model and its optimizer, grown old: moments as after a billion steps, momentum buffers at rest."""
    model, cls = Quadratic(), getattr(torch.optim, name.partition(" ")[0])
    parts = list(model.parts)
    if kind == "one group":
        groups: Groups = [{"params": parts, **settings_of(name, 0, several=False)}]
    else:
        groups = [{"params": [p], "lr": 0.01 * _RATES[i], **settings_of(name, i, several=True)} for i, p in enumerate(parts)]
    if kind in ("one at rate 0", "one not held"):
        resting = 0 if kind == "one at rate 0" else 1
        parts[resting].data.zero_()  # else the others would go to a minimum other than 0
        groups[resting]["lr"] = 0.0
    if kind == "one not held":
        del groups[1]
    optimizer = cls(groups, lr=0.01)
    if name.split()[0] in ("Adam", "AdamW", "RMSprop", "Adagrad"):
        before = copy.deepcopy(model.state_dict())
        model.set_gradients()
        optimizer.step()  # makes the state, and moves the parameters by the rate
        model.load_state_dict(before)
        generator = torch.Generator().manual_seed(2)
        for state in optimizer.state.values():
            for key, moment in state.items():
                if key == "step":
                    moment.fill_(_AGE)
                elif key in ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"):
                    least = 1.5 if key.startswith("max") else 0.5  # amsgrad's stays the larger one
                    moment.copy_(least + torch.rand(moment.shape, generator=generator, dtype=torch.float64))
                elif key == "grad_avg":
                    moment.fill_(0.3)
                else:
                    moment.zero_()
    return model, optimizer


def breaks(name: str, kind: str, factor: float, *, steps: int) -> bool:
    """Whether the parameters grow, from the middle of a run to its end, with all rates multiplied by a factor."""
    model, optimizer = make(name, kind)
    for group in optimizer.param_groups:
        group["lr"] *= factor
    halfway = math.inf
    for step in range(steps):
        model.set_gradients()
        optimizer.step()
        size = float(torch.cat([p.detach().reshape(-1) for group in optimizer.param_groups if group["lr"] for p in group["params"]]).norm())
        if step == steps // 2:
            halfway = size
        if not size < 1e-3:  # grown a thousandfold: further on, an adaptive optimizer's divisor would notice
            return True
    return size > halfway


def row_of(name: str, kind: str, *, width: float, steps: int) -> Row:
    """The stated limit, and the rate at which training breaks."""
    try:
        model, optimizer = make(name, kind)
    except Exception as error:
        return {"optimizer": name, "groups": kind, "outcome": "not made by torch", "why": str(error)}
    objective = sk.Objective(model, torch.ones(1, dtype=torch.float64), closure=lambda m, b: m(b))
    try:
        sharpness = sk.measure(objective, optimizer=optimizer, tol=1e-5)
    except (sk.SharpkitError, ValueError) as error:
        return {"optimizer": name, "groups": kind, "outcome": "refused", "why": str(error)}
    stated, present = float(sharpness.stable_lr), float(sharpness.lr or math.nan)
    lower, upper = 0.5 * stated, 2.0 * stated
    ends = (breaks(name, kind, lower / present, steps=steps), breaks(name, kind, upper / present, steps=steps))
    if ends != (False, True):
        return {"optimizer": name, "groups": kind, "outcome": "wrong", "stated": stated, "why": f"breaks at half, at twice: {ends}"}
    while upper / lower > 1 + width:
        middle = math.sqrt(lower * upper)
        lower, upper = (lower, middle) if breaks(name, kind, middle / present, steps=steps) else (middle, upper)
    real = math.sqrt(lower * upper)
    outcome = "right" if abs(stated / real - 1) < 0.01 else "wrong"
    return {"optimizer": name, "groups": kind, "outcome": outcome, "stated": stated, "real": real, "error": stated / real - 1}


def measure(quick: bool) -> list[Row]:
    names, kinds = (("SGD momentum", "AdamW"), _KINDS[1:2]) if quick else (_NAMES, _KINDS)
    return [row_of(name, kind, width=_WIDTH, steps=600 if quick else 1500) for name in names for kind in kinds]


def draw(rows: list[Row], figure: Any) -> None:
    axes, known = figure.subplots(), [row for row in rows if "error" in row]
    names = list(dict.fromkeys(row["optimizer"] for row in known))
    for j, kind in enumerate(dict.fromkeys(row["groups"] for row in known)):
        chosen = [row for row in known if row["groups"] == kind]
        places = [names.index(row["optimizer"]) + 0.12 * (j - 1.5) for row in chosen]
        axes.plot(places, [100 * row["error"] for row in chosen], "o", label=kind)
    axes.axhspan(-1, 1, alpha=0.1)
    axes.set_xticks(range(len(names)), names, rotation=20, fontsize=8)
    axes.set_ylabel("stated limit against the real one, %")
    axes.legend(fontsize=8)


if __name__ == "__main__":
    run_as_script("optimizer_limits", measure, draw)
