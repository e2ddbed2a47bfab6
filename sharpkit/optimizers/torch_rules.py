"""The linear rules of torch.optim's optimizers, what the adaptive ones divide by, and why some have no such rule.

Everything is as of the last step made, but for the first moment's bias correction: it passes by within a few steps, and what comes after
decides (experiments/adam_first_steps.py). Slower schedules, NAdam's of the momentum and RAdam's rectification, are taken as they stand.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sharpkit.optimizers.rules import Settings, State, UpdateRule


def decay_of(settings: Settings) -> float:
    """Weight decay of a group, 0 where it has none."""
    return float(settings.get("weight_decay") or 0.0)


# -- without a divisor ------------------------------------------------------------------------------------------------------------


def sgd_rule(settings: Settings) -> UpdateRule:
    """Heavy ball, dampened or Nesterov's."""
    return UpdateRule(float(settings["momentum"]), float(settings["dampening"]), bool(settings["nesterov"]), decay_of(settings))


def sgd_step(state: State, settings: Settings, p: Tensor) -> tuple[float, Tensor | None]:
    """(a, b) in the next step a g + b at rate 1."""
    buffer: Tensor | None = state.get("momentum_buffer")
    beta, sign = float(settings["momentum"]), -1.0 if settings.get("maximize") else 1.0  # climbing, torch accumulates -g in the buffer
    fresh = 1.0 if buffer is None else 1.0 - float(settings["dampening"])  # the first gradient fills the buffer undampened
    factor = (1 + beta * fresh if settings["nesterov"] else fresh) if beta else 1.0
    push = None if buffer is None or not beta else sign * (beta**2 if settings["nesterov"] else beta) * buffer
    if decay := decay_of(settings):
        push = sign * factor * decay * p.detach() + (0.0 if push is None else push)
    return factor, push


def asgd_rule(settings: Settings) -> UpdateRule:
    """Gradient descent at eta = lr / (1 + lambd lr t)^alpha, with lambd as one more decay; the mean of the iterates has no part in it."""
    lambd, lr = float(settings["lambd"]), float(settings["lr"])
    return UpdateRule(weight_decay=decay_of(settings) + lambd, share=(1 + lambd * lr * settings["step"]) ** -float(settings["alpha"]))


# -- divided by the root of a mean square -----------------------------------------------------------------------------------------


def adam_rule(settings: Settings, *, decoupled: bool | None = None) -> UpdateRule:
    """An averaging momentum, of Adam, RAdam and Adamax."""
    beta1 = float(settings["betas"][0])
    decoupled = bool(settings.get("decoupled_weight_decay")) if decoupled is None else decoupled
    # Coupled decay is part of the gradient and so of the preconditioned matrix, not of the rule: see gradient_decays.
    return UpdateRule(beta1, beta1, False, decay_of(settings) if decoupled else 0.0, decoupled, adaptive=True)


def adamw_rule(settings: Settings) -> UpdateRule:
    """Adam's with decoupled decay."""
    return adam_rule(settings, decoupled=True)


def corrected(moment: Tensor, beta2: float, step: float) -> Tensor:
    """A running mean of squares that began at 0, without that bias."""
    corrected: Tensor = moment.double() / (1 - beta2**step)
    return corrected


def adam_preconditioner(state: State, settings: Settings, p: Tensor) -> Tensor:
    """sqrt(v_hat) + eps, v_hat the bias-corrected second moment, without the factor 1 - beta1^t of Cohen et al. (2022, arXiv 2207.14484).

    That factor is the bias correction of the first moment, and goes to 1 in the steps to come, which decide: with v_hat held, torch's Adam
    breaks within .1 % of the limit without it after 1, 3, 10, 30 and 1000 steps alike; with it the limit after the first step would read a
    fifth of that. What it does is pass by: at half the limit a mode first grows 1300-fold after 1 step, 35-fold after 3, 1.8-fold after 10,
    and not at all after 30, before it decays (experiments/adam_first_steps.py).
    """
    moment: Tensor = state["max_exp_avg_sq" if settings.get("amsgrad") else "exp_avg_sq"]
    divisor: Tensor = corrected(moment, float(settings["betas"][1]), float(state["step"])).sqrt() + settings["eps"]
    return divisor


def nadam_rule(settings: Settings) -> UpdateRule:
    """The step holds (1 - mu_t) of the gradient itself and mu_(t+1) of its running mean, mu_t = beta1 (1 - .96^(momentum_decay t) / 2)."""
    beta1, psi, step = float(settings["betas"][0]), float(settings["momentum_decay"]), max(float(settings["step"]), 1.0)
    now, then = (beta1 * (1 - 0.5 * 0.96 ** (t * psi)) for t in (step, step + 1))
    decoupled = bool(settings.get("decoupled_weight_decay"))
    decay = decay_of(settings) if decoupled else 0.0
    return UpdateRule(beta1, beta1, False, decay, decoupled, adaptive=True, direct=1 - now, share=then)


def rectification(step: float, beta2: float) -> tuple[float, float]:
    """RAdam's (rho_t, factor of the step), which grows to 1; rho_t counts the squared gradients that the second moment has seen.

    References:
        Liu et al., "On the variance of the adaptive learning rate and beyond" (2020), arXiv 1908.03265.
    """
    last = 2 / (1 - beta2) - 1
    rho = last - 2 * step * beta2**step / (1 - beta2**step)
    return rho, math.sqrt((rho - 4) * (rho - 2) * last / ((last - 4) * (last - 2) * rho)) if rho > 4 else 0.0


def radam_preconditioner(state: State, settings: Settings, p: Tensor) -> Tensor:
    """Adam's over the rectification; 1 while rho_t <= 5, when the step is that of SGD with momentum."""
    beta2, step = float(settings["betas"][1]), float(state["step"])
    rho, factor = rectification(step, beta2)
    if rho <= 5:
        return torch.ones_like(p, dtype=torch.float64)
    divisor: Tensor = (state["exp_avg_sq"].double().sqrt() + settings["eps"]) / (factor * math.sqrt(1 - beta2**step))
    return divisor


def adamax_preconditioner(state: State, settings: Settings, p: Tensor) -> Tensor:
    """The largest |g| remembered; eps is in it."""
    largest: Tensor = state["exp_inf"]
    return largest


def rmsprop_rule(settings: Settings) -> UpdateRule:
    """Heavy ball of the divided gradient."""
    return UpdateRule(float(settings["momentum"]), adaptive=True)


def rmsprop_preconditioner(state: State, settings: Settings, p: Tensor) -> Tensor:
    """sqrt(v) + eps, less the square of the mean gradient under the root if the optimizer is centred."""
    moment: Tensor = state["square_avg"].double()
    if settings.get("centered"):
        moment = moment - state["grad_avg"].double().square()
    divisor: Tensor = moment.clamp_min(0).sqrt() + settings["eps"]
    return divisor


def divided_rule(settings: Settings) -> UpdateRule:
    """The divided gradient without momentum."""
    return UpdateRule(adaptive=True)


def adagrad_preconditioner(state: State, settings: Settings, p: Tensor) -> Tensor:
    """sqrt(sum) + eps; torch's own decay of the rate enters here, since lr stays as it was given."""
    total: Tensor = state["sum"].double()
    divisor: Tensor = (total.sqrt() + settings["eps"]) * (1 + (float(state["step"]) - 1) * settings["lr_decay"])
    return divisor


def adadelta_preconditioner(state: State, settings: Settings, p: Tensor) -> Tensor:
    """sqrt(v + eps) over the root mean square of past steps at rate 1, sqrt(u + eps)."""
    divisor: Tensor = ((state["square_avg"].double() + settings["eps"]) / (state["acc_delta"].double() + settings["eps"])).sqrt()
    return divisor


def adafactor_rule(settings: Settings) -> UpdateRule:
    """Linear while no update is clipped; the rate acts up to 1 / sqrt(t), the relative step.

    Clipped, a step keeps a length of its own, whatever the gradient's: what grows above the limit grows until it is clipped, and stays.
    """
    ceiling = settings["step"] ** -0.5 if settings["step"] else math.inf
    decay = decay_of(settings)
    return UpdateRule(0.0, 0.0, False, decay, True, adaptive=True, name="Adafactor while it clips no update", ceiling=ceiling)


def adafactor_preconditioner(state: State, settings: Settings, p: Tensor) -> Tensor:
    """sqrt(v), for matrices v the product of its means by rows and by columns, over the root mean square of the parameters."""
    least, smallest_size = settings["eps"]
    least = torch.finfo(p.dtype).eps if least is None else float(least)
    if "row_var" in state:
        rows, columns = state["row_var"].double(), state["col_var"].double()
        moment = rows @ columns / rows.mean(dim=-2, keepdim=True).clamp_min(least)
    else:
        moment = state["variance"].double()
    size = max(float(smallest_size), float(p.detach().double().norm()) / math.sqrt(p.numel()))
    divisor: Tensor = moment.clamp_min(least**2).sqrt() / size
    return divisor


# -- what D comes to --------------------------------------------------------------------------------------------------------------


def settled_root(mean: Tensor, second_moment: Tensor, settings: Settings) -> Tensor:
    """sqrt(v) + eps where the squared gradient has the mean v."""
    return second_moment.sqrt() + float(settings["eps"])


def settled_rmsprop(mean: Tensor, second_moment: Tensor, settings: Settings) -> Tensor:
    """The same, v less the square of the mean gradient if the optimizer is centred."""
    return settled_root(mean, second_moment - mean.square() if settings.get("centered") else second_moment, settings)
