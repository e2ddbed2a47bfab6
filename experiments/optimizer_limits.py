"""Is the stated limit the rate at which the real optimizer breaks? Optimizers of torch and of packages, one group and three, on quadratics.

Everything but the parameters and the momentum is held at what it was, as second moments nearly are over the steps that decide. Such a step
is linear: its matrix is read off the real optimizer, one step from each unit vector, and its spectral radius passes 1 at the real limit.

python -m experiments.optimizer_limits [--quick]
"""

from __future__ import annotations

import copy
import importlib
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sharpkit as sk
from experiments._common import Row, run_as_script

_SHAPES = ((2, 2), (5, 1), (3, 1))  # one tensor a group; two-dimensional, as Muon wants them
_STEADY = 1 - 1e-9  # beta2, alpha: the divisor stays what it is over thousands of steps
_OLD = 1e9  # steps done: the bias corrections no longer change
_SMALL = 1e-6  # of the parameters: their gradients leave no mark on a divisor
_WIDTH = 1e-4  # of the bracket, relative
_MEMORY = ("momentum_buffer", "exp_avg", "momentum", "z")  # what moves with the parameters
_ROUNDING = 1e-9  # of a spectral radius, whose double eigenvalues are known to the root of float64's rounding at worst

# Settings of the three groups beside their rates: momentum, or beta1, and decay.
_RATES, _MOMENTA, _DECAYS = (1.0, 5.0, 0.3), (0.9, 0.5, 0.0), (0.0, 0.8, 3.0)
SPECTRA = {
    "even": torch.linspace(0.5, 10.0, 12, dtype=torch.float64),
    "four decades": torch.logspace(-2, 2, 12, dtype=torch.float64),
    "an outlier": torch.cat([torch.full((11,), 1.0), torch.tensor([50.0])]).double(),
}
KINDS = ("one group", "three groups", "one at rate 0", "one not held")

# Name, package; what is asked for beside momentum, rates and decay; steps done before, a billion where nothing is said.
_VARIANTS: dict[str, tuple[str, dict[str, Any], float]] = {
    "SGD": ("torch.optim", {}, _OLD),
    "SGD momentum": ("torch.optim", {}, _OLD),
    "SGD Nesterov": ("torch.optim", {}, _OLD),
    "SGD dampened": ("torch.optim", {}, _OLD),
    "Adam": ("torch.optim", {}, _OLD),
    "Adam amsgrad": ("torch.optim", {"amsgrad": True}, _OLD),
    "Adam foreach": ("torch.optim", {"foreach": True}, 200),
    "Adam tensor betas": ("torch.optim", {}, 200),
    "AdamW": ("torch.optim", {}, _OLD),
    "RMSprop": ("torch.optim", {}, _OLD),
    "RMSprop centred": ("torch.optim", {"centered": True}, _OLD),
    "Adagrad": ("torch.optim", {"lr_decay": 1e-9}, _OLD),
    "NAdam": ("torch.optim", {}, _OLD),
    "NAdam after 100 steps": ("torch.optim", {}, 100),
    "NAdam decoupled": ("torch.optim", {"decoupled_weight_decay": True}, 1000),
    "RAdam": ("torch.optim", {}, _OLD),
    "RAdam after 100 steps": ("torch.optim", {}, 100),
    "RAdam unadapted": ("torch.optim", {}, 3),
    "RAdam decoupled": ("torch.optim", {"decoupled_weight_decay": True}, 100),
    "Adamax": ("torch.optim", {}, _OLD),
    "Adadelta": ("torch.optim", {"rho": _STEADY, "eps": 0.1}, _OLD),
    "Adafactor": ("torch.optim", {"eps": (None, 1.0)}, 1),
    "Adafactor large weights": ("torch.optim", {}, 1),
    "ASGD": ("torch.optim", {"lambd": 0.4}, 300),
    "SGDScheduleFree": ("schedulefree", {}, _OLD),
    "SGDScheduleFree warmup": ("schedulefree", {"warmup_steps": 400}, 100),
    "AdamWScheduleFree": ("schedulefree", {}, _OLD),
    "AdamWScheduleFree warmup": ("schedulefree", {"warmup_steps": 400}, 100),
    "RAdamScheduleFree": ("schedulefree", {}, 100),
    "Prodigy": ("prodigyopt", {}, 100),
    "Prodigy corrected": ("prodigyopt", {"use_bias_correction": True}, 100),
    "Prodigy coupled": ("prodigyopt", {"decouple": False}, 100),
    "AdaBelief": ("pytorch_optimizer", {}, 100),
    "SophiaH": ("pytorch_optimizer", {}, 101),
    "Rprop": ("torch.optim", {}, 1),
    "Muon": ("torch.optim", {}, 1),
    "SparseAdam": ("torch.optim", {}, 1),
    "LBFGS": ("torch.optim", {}, 1),
    "Lion": ("lion_pytorch", {}, 1),
    "Lamb": ("pytorch_optimizer", {}, 1),
    "LARS": ("pytorch_optimizer", {}, 1),
    "SOAP": ("pytorch_optimizer", {}, 1),
    "StableSPAM": ("pytorch_optimizer", {}, 1),
}
NAMES = tuple(_VARIANTS)
PACKAGES = {name: package for name, (package, _, _) in _VARIANTS.items()}
REFUSED = ("Rprop", "Muon", "SparseAdam", "LBFGS", "Lion", "Lamb", "LARS", "SOAP", "StableSPAM")


class Quadratic(nn.Module):
    """f(w) = (w - c)^T H (w - c) / 2, w in three tensors, at a distance from c that leaves no mark on an adaptive optimizer's divisor."""

    def __init__(self, spectrum: str = "even", *, size: float = 0.0) -> None:
        super().__init__()
        basis = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
        self.hessian = basis @ torch.diag(SPECTRA[spectrum]) @ basis.T
        generator = torch.Generator().manual_seed(1)
        draw = [_SMALL * torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in _SHAPES]
        self.centre = size * torch.randn(12, generator=generator, dtype=torch.float64)
        self.parts = nn.ParameterList(nn.Parameter(part + centre) for part, centre in zip(draw, self.centres(), strict=True))

    def centres(self) -> list[Tensor]:
        return [c.reshape(shape) for c, shape in zip(self.centre.split([math.prod(s) for s in _SHAPES]), _SHAPES, strict=True)]

    def off_centre(self) -> Tensor:
        return torch.cat([part.reshape(-1) for part in self.parts]) - self.centre

    def forward(self, batch: Tensor) -> Tensor:
        w = self.off_centre()
        return 0.5 * w @ self.hessian @ w * batch.mean()

    def set_gradients(self, scale: float = 1.0) -> None:
        gradient = scale * (self.hessian @ self.off_centre().detach())
        for part, g in zip(self.parts, gradient.split([part.numel() for part in self.parts]), strict=True):
            part.grad = g.reshape(part.shape).clone()


def settings_of(name: str, index: int, *, several: bool) -> dict[str, Any]:
    """Settings of a group for a row of the table: with several groups all differ, in rate, momentum and decay."""
    (base, _, variant), (_, extra, age) = name.partition(" "), _VARIANTS[name]
    momentum, decay = (_MOMENTA[index], _DECAYS[index]) if several else (_MOMENTA[0], _DECAYS[1])
    momentum /= 9 if age < 10 else 1  # so few steps after the first, that the first moment's bias correction is over
    settings: dict[str, Any] = {**extra, "weight_decay": decay}
    if base == "SGD":
        settings |= {"momentum": momentum} if variant else {}
        settings |= {"nesterov": momentum > 0} if variant == "Nesterov" else {"dampening": 0.4 * momentum} if variant == "dampened" else {}
    elif base in ("Adam", "AdamW", "NAdam", "RAdam", "Adamax", "AdamWScheduleFree", "RAdamScheduleFree", "Prodigy", "AdaBelief", "SophiaH"):
        settings["betas"] = (momentum, _STEADY if age == _OLD else 0.999)
        if variant == "tensor betas":
            settings |= {"betas": tuple(map(torch.tensor, settings["betas"])), "capturable": False, "foreach": False}
    elif base == "RMSprop":
        settings |= {"alpha": _STEADY, "momentum": momentum}
    elif base == "SGDScheduleFree":
        settings["momentum"] = momentum or 0.2
    elif base in REFUSED:
        return {}
    return settings | ({"weight_decay": 0.0} if variant == "large weights" else {})


class Frozen:
    """A model and its real optimizer, grown old, all of whose state but the momentum is set back before every step.

    Args:
        name, kind, spectrum: a row of the table.
        factor: of all rates.
    """

    def __init__(self, name: str, kind: str, spectrum: str = "even", *, factor: float = 1.0) -> None:
        (base, _, variant), (package, _, self.age) = name.partition(" "), _VARIANTS[name]
        if package == "pytorch_optimizer":
            register_shown()
        self.model = Quadratic(spectrum, size=0.5 if variant == "large weights" else 0.0)
        parts, rates = list(self.model.parts), (1.0,) * 3 if base == "Prodigy" else _RATES  # Prodigy allows one rate alone
        if kind == "one group":
            groups = [{"params": parts, **settings_of(name, 0, several=False)}]
        else:
            groups = [{"params": [p], "lr": 0.01 * rates[i], **settings_of(name, i, several=True)} for i, p in enumerate(parts)]
        if kind in ("one at rate 0", "one not held"):
            resting = 0 if kind == "one at rate 0" else 1
            with torch.no_grad():  # else the others would go to a minimum other than the centre
                parts[resting].copy_(self.model.centres()[resting])
            groups[resting]["lr"] = 0.0
        if kind == "one not held":
            del groups[1]
        self.optimizer = getattr(importlib.import_module(package), base)(groups, lr=0.01)
        if base not in REFUSED:
            self._grow_old()
            self._multiply_rates(factor)
            self.before = copy.deepcopy(list(self.optimizer.state.values())), [dict(group) for group in self.optimizer.param_groups]

    def _grow_old(self) -> None:
        """State as after so many steps: second moments drawn, momentum at rest."""
        if hasattr(self.optimizer, "train"):
            self.optimizer.train()
        at = copy.deepcopy(self.model.state_dict())
        self.model.set_gradients()
        curved = {"hessian": [torch.ones_like(p) for p in self._params()]} if type(self.optimizer).__name__ == "SophiaH" else {}
        self.optimizer.step(**curved)  # makes the state, and moves the parameters by the rate
        self.model.load_state_dict(at)
        generator = torch.Generator().manual_seed(2)
        for group in self.optimizer.param_groups:
            group.update({key: int(self.age) for key in ("step", "k") if key in group})
            group.update({key: value for key, value in (("weight_sum", 1e30), ("d", 0.3), ("d_max", 0.3)) if key in group})
            for p in group["params"]:
                state = self.optimizer.state[p]
                for key, value in state.items():
                    if key == "step":
                        state[key] = torch.full_like(value, self.age) if isinstance(value, Tensor) else int(self.age)
                    elif key == "eta":
                        value.fill_(group["lr"] / (1 + group["lambd"] * group["lr"] * self.age) ** group["alpha"])
                    elif key == "z":
                        value.copy_(p.detach())
                    elif key == "grad_avg":
                        value.fill_(0.3)
                    elif key in _MEMORY or key == "mu_product":
                        value.zero_()
                    elif isinstance(value, Tensor) and key not in ("ax", "mu", "p0", "hessian"):
                        least = 1.5 if key.startswith("max") else 0.5  # amsgrad's stays the larger one
                        value.copy_(least + torch.rand(value.shape, generator=generator, dtype=torch.float64))

    def _multiply_rates(self, factor: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] *= factor
        for state in self.optimizer.state.values():
            if "eta" in state:  # ASGD's, in the ratio to the rate in which it stands
                state["eta"] *= factor

    def _params(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def step(self, *, gradients: float = 1.0) -> None:
        """One step of the real optimizer from the state that was, with the gradients multiplied."""
        for state, before in zip(self.optimizer.state.values(), self.before[0], strict=True):
            state.update({key: copy.deepcopy(value) for key, value in before.items() if key not in _MEMORY})
        for group, settings in zip(self.optimizer.param_groups, self.before[1], strict=True):
            group.update(settings)
        self.model.set_gradients(gradients)
        self.optimizer.step()

    def moving(self) -> tuple[list[Tensor], list[Tensor]]:
        """The tensors that a step moves in groups that train, parameters and momentum, and where each of them rests."""
        resting = {id(p): centre for p, centre in zip(self.model.parts, self.model.centres(), strict=True)}
        params = [p for group in self.optimizer.param_groups if group["lr"] for p in group["params"]]
        pieces, places = [p.data for p in params], [resting[id(p)] for p in params]
        for p in params:
            memory = {key: value for key, value in self.optimizer.state[p].items() if key in _MEMORY}
            pieces += memory.values()
            places += [resting[id(p)] if key == "z" else torch.zeros_like(p) for key in memory]
        return pieces, places

    def spectral_radius(self) -> float:
        """Of a step, as a matrix over all that moves."""
        pieces, places = self.moving()
        columns = []
        for piece in pieces:
            for entry in range(piece.numel()):
                for other, place in zip(pieces, places, strict=True):
                    other.copy_(place)
                piece.view(-1)[entry] += _SMALL
                self.step()
                columns.append(torch.cat([(moved - place).reshape(-1) for moved, place in zip(self.moving()[0], places, strict=True)]))
        return float(torch.linalg.eigvals(torch.stack(columns, dim=1) / _SMALL).abs().max())


def register_shown() -> None:
    """Register the optimizers of pytorch_optimizer as docs/extending.md shows it."""
    page = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()
    for block in re.findall(r"```python\n(import pytorch_optimizer.*?)```", page, flags=re.DOTALL):
        exec(compile(block, "extending.md", "exec"), {"sk": sk, "torch": torch})


def stated(name: str, kind: str, spectrum: str = "even") -> float:
    """The limit of the first group that trains, over its present rate."""
    frozen = Frozen(name, kind, spectrum)
    objective = sk.Objective(frozen.model, torch.ones(1, dtype=torch.float64), closure=lambda m, b: m(b))
    if name.partition(" ")[0] not in REFUSED:
        frozen.step(gradients=0.0)  # the divisor meant is the one of the last step
    sharpness = sk.measure(objective, optimizer=frozen.optimizer, num_probes=3, num_steps=12, tol=1e-6)
    return float(sharpness.stable_lr) / float(sharpness.lr or math.nan)


def row_of(name: str, kind: str, spectrum: str) -> Row:
    """The stated limit, and the rate at which training breaks."""
    row: Row = {"optimizer": name, "groups": kind, "spectrum": spectrum}
    try:
        present = next(group["lr"] for group in Frozen(name, kind, spectrum).optimizer.param_groups if group["lr"])
    except (ImportError, AttributeError) as error:
        return {**row, "outcome": "not installed", "why": str(error)}
    except Exception as error:
        return {**row, "outcome": "not made by its package", "why": str(error)}
    try:
        limit = stated(name, kind, spectrum)
    except (sk.SharpkitError, ValueError) as error:
        return {**row, "outcome": "refused", "why": str(error)}
    lower, upper = 0.5 * limit, 2.0 * limit
    ends = [Frozen(name, kind, spectrum, factor=factor).spectral_radius() for factor in (lower, upper)]
    if not (ends[0] <= 1 + _ROUNDING < ends[1]):
        return {**row, "outcome": "wrong", "stated": limit * present, "why": f"spectral radius at half and at twice the limit: {ends}"}
    while upper / lower > 1 + _WIDTH:
        middle = math.sqrt(lower * upper)
        broken = Frozen(name, kind, spectrum, factor=middle).spectral_radius() > 1 + _ROUNDING
        lower, upper = (lower, middle) if broken else (middle, upper)
    real = math.sqrt(lower * upper)
    outcome = "right" if abs(limit / real - 1) < 0.01 else "wrong"
    return {**row, "outcome": outcome, "stated": limit * present, "real": real * present, "error": limit / real - 1}


def measure(quick: bool) -> list[Row]:
    names, kinds, spectra = (("SGD momentum", "AdamW"), KINDS[1:2], ["even"]) if quick else (NAMES, KINDS, list(SPECTRA))
    rows = []
    for name in names:
        for kind in kinds:
            for spectrum in spectra:
                rows.append(row_of(name, kind, spectrum))
                if "error" not in rows[-1]:  # what is refused is refused for every spectrum
                    break
    return rows


def draw(rows: list[Row], figure: Any) -> None:
    axes, known = figure.subplots(), [row for row in rows if "error" in row]
    names = list(dict.fromkeys(row["optimizer"] for row in known))
    for j, kind in enumerate(dict.fromkeys(row["groups"] for row in known)):
        chosen = [row for row in known if row["groups"] == kind]
        places = [names.index(row["optimizer"]) + 0.12 * (j - 1.5) for row in chosen]
        axes.plot(places, [100 * row["error"] for row in chosen], ".", label=kind)
    axes.axhspan(-1, 1, alpha=0.1)
    axes.set_xticks(range(len(names)), names, rotation=75, fontsize=6)
    axes.set_ylabel("stated / real limit - 1, %")
    axes.legend(fontsize=8)


if __name__ == "__main__":
    run_as_script("optimizer_limits", measure, draw)
