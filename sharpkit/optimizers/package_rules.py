"""The linear rules of optimizers in packages of their own: schedulefree, prodigyopt; none of them need be installed.

Schedule-free methods (Defazio et al. 2024, arXiv 2405.15682) take the gradient at y = (1 - beta) z + beta x, and the fast iterate z moves
by it. So z sees its own curvature times 1 - beta, which is what dampening = beta without a momentum buffer does. The mean x, of which a
step moves the share 1 / t, is too slow to matter. Decay is added at y to the divided gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sharpkit.optimizers.rules import Settings, State, UpdateRule
from sharpkit.optimizers.torch_rules import corrected, decay_of, rectification


def _warmup(settings: Settings) -> float:
    """The factor of the rate in the last step, or the first before it."""
    steps = settings.get("warmup_steps") or 0
    return min(max(int(settings.get("k", 0)), 1) / steps, 1.0) if steps else 1.0


def free_sgd_rule(settings: Settings) -> UpdateRule:
    """Of SGDScheduleFree, the warmup as it stands."""
    return UpdateRule(0.0, float(settings["momentum"]), False, decay_of(settings), share=_warmup(settings))


def free_adamw_rule(settings: Settings) -> UpdateRule:
    """Of AdamWScheduleFree, whose decay is not divided by D."""
    return UpdateRule(0.0, float(settings["betas"][0]), False, decay_of(settings), adaptive=True, share=_warmup(settings))


def free_adamw_preconditioner(state: State, settings: Settings, p: Tensor) -> Tensor:
    """Adam's, the steps counted in the group."""
    return corrected(state["exp_avg_sq"], float(settings["betas"][1]), int(settings["k"])).sqrt() + float(settings["eps"])


def free_radam_rule(settings: Settings) -> UpdateRule:
    """Of RAdamScheduleFree: the rectification multiplies the rate; while rho_t <= 4, no step is taken, or an undivided one."""
    rho, factor = rectification(max(int(settings["k"]), 1), float(settings["betas"][1]))
    factor = factor if rho > 4 else float(not settings["silent_sgd_phase"])
    return UpdateRule(0.0, float(settings["betas"][0]), False, decay_of(settings), adaptive=True, share=factor)


def free_radam_preconditioner(state: State, settings: Settings, p: Tensor) -> Tensor:
    """Adam's; 1 while rho_t <= 4."""
    if rectification(int(settings["k"]), float(settings["betas"][1]))[0] <= 4:
        return torch.ones_like(p, dtype=torch.float64)
    return free_adamw_preconditioner(state, settings, p)


def _prodigy_correction(settings: Settings) -> float:
    """Of the second moment alone, as for Adam; 1 where it is off, by default."""
    if not settings["use_bias_correction"] or not settings["k"]:
        return 1.0
    return math.sqrt(1 - float(settings["betas"][1]) ** int(settings["k"]))


def prodigy_rule(settings: Settings) -> UpdateRule:
    """Adam's, with the distance d that it has learned so far as a factor of the rate."""
    beta1, decoupled = float(settings["betas"][0]), bool(settings["decouple"])
    decay = decay_of(settings) * float(settings["d"]) * _prodigy_correction(settings) if decoupled else 0.0
    return UpdateRule(beta1, beta1, False, decay, decoupled, adaptive=True)


def prodigy_preconditioner(state: State, settings: Settings, p: Tensor) -> Tensor:
    """(sqrt(v) + d eps) / d^2: the moments hold d g and d^2 g^2, and d multiplies the rate once more."""
    d = float(settings["d"])
    divisor: Tensor = (state["exp_avg_sq"].double().sqrt() + d * float(settings["eps"])) / (d**2 * _prodigy_correction(settings))
    return divisor
