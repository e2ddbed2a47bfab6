"""The matrix and the rule by which an optimizer's rate is bounded, all its groups together.

At a rate eta of the reference group (the first that trains), the others at r_i eta, training is stable where
eta s lambda_max(S (H + W) + V) <= 1 with s = gain / (2 (1 + beta)) of the reference's rule, S = diag(r_i s_i / s) D^-1, W the coupled decay
and V = diag(r_i decay_i / (2 s)) the decoupled one. It is exact on a quadratic whatever the groups' momenta: with H, W and V positive, the
step's eigenvalues reach the unit circle at +-1 alone, as the imaginary part of the characteristic equation on the circle shows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.optim import Optimizer

from sharpkit._errors import UnsupportedError
from sharpkit.objective.params import ParamLayout
from sharpkit.optimizers.groups import _NONE_HELD, _holding, _reference, is_maximizing, learning_rates, own_state, relative_rates
from sharpkit.optimizers.kinds import OptimizerKind, _no_rule, _unknown, kind_of
from sharpkit.optimizers.rules import Settings, State, UpdateRule
from sharpkit.optimizers.torch_rules import decay_of, settled_root
from sharpkit.optimizers.wrappers import unwrap_optimizer


def update_rule(optimizer: Optimizer, *, group: int | None = None) -> UpdateRule:
    """The linear update rule of a parameter group, by default of the first that trains.

    Raises:
        UnsupportedError: an optimizer whose linear rule is not known, or one that maximizes.
    """
    rules = update_rules(optimizer)
    return rules[_reference(relative_rates(unwrap_optimizer(optimizer))) if group is None else group]


def update_rules(optimizer: Optimizer) -> list[UpdateRule]:
    """The linear update rule of every parameter group; errors as in :func:`update_rule`."""
    optimizer = unwrap_optimizer(optimizer)
    kind = kind_of(optimizer)
    if kind is None or kind.rule is None:
        raise _no_rule(optimizer)
    if is_maximizing(optimizer):
        raise UnsupportedError(
            f"{type(optimizer).__name__} has maximize=True, and stability limits are those of descent: minimize the negative loss instead"
        )
    learning_rates(optimizer)  # some rules read the rate, which must be a number
    name = type(optimizer).__name__
    return [replace(rule, name=name) if rule.name == UpdateRule.name else rule for rule in kind.rules(optimizer)]


def is_adaptive(optimizer: Optimizer, *, unknown: bool | None = None) -> bool:
    """Whether gradients are divided by their own size, so that the limit is about D^-1 H.

    Where the rule is not known, the answer is ``unknown``, or an UnsupportedError if that is None.
    """
    kind = kind_of(optimizer)
    if kind is not None and kind.rule is not None:
        return kind.rules(optimizer)[0].adaptive
    if unknown is None:
        raise _no_rule(optimizer)
    return unknown


def has_heavy_ball(optimizer: Optimizer) -> bool:
    """Whether the setting "momentum" of every group is that of a heavy ball, which accelerates; that of a schedule-free method averages."""
    rules = zip(update_rules(optimizer), unwrap_optimizer(optimizer).param_groups, strict=True)
    return all(not rule.adaptive and rule.momentum == group.get("momentum") for rule, group in rules)


def decoupled_decays(optimizer: Optimizer) -> list[float]:
    """Decoupled weight decay of every group; 0 where decay enters the gradient instead."""
    kind = kind_of(optimizer)
    if kind is None or kind.rule is None:
        return [decay_of(group) if _is_beside(kind, group) else 0.0 for group in optimizer.param_groups]
    return [rule.weight_decay if rule.decoupled else 0.0 for rule in kind.rules(optimizer)]


def _is_beside(kind: OptimizerKind | None, group: Settings) -> bool:
    """Whether decay stands beside a step without a rule, as it does beside those of fixed length (Lion, Muon)."""
    return bool(group.get("decoupled_weight_decay")) or (kind is not None and kind.geometry is not None)


def gradient_decays(optimizer: Optimizer) -> list[float]:
    """Weight decay of every group that is divided by D together with the gradient, so that the matrix is D^-1 (H + decay).

    It is 0 where the rule holds the decay, as it does for SGD and AdamW.
    """
    kind = kind_of(optimizer)
    if kind is None or kind.rule is None:
        return [0.0 if _is_beside(kind, group) else decay_of(group) for group in optimizer.param_groups]
    rules = zip(kind.rules(optimizer), optimizer.param_groups, strict=True)
    # torch adds coupled decay to g before g enters the second moment and is divided by D, as if the loss had 0.5 decay |w|^2 more
    return [decay_of(group) if rule.adaptive and not rule.weight_decay else 0.0 for rule, group in rules]


@dataclass(frozen=True)
class _Groups:
    """The groups of an optimizer against the reference, by the formula at the head of this module.

    Attributes:
        rule: the reference's own.
        weights: r_i s_i / s of each group.
        coupled, shifts: decay_i of coupled and r_i decay_i / (2 s) of decoupled decay; r_i s_i decay_i / s of coupled decay beside D.
        extra: coupled decay that is no part of the rule, since it is divided by D.
        agree: whether one weight and one decay move all parameters, so that the limit is about H, or D^-1 H, itself.
    """

    rule: UpdateRule
    weights: list[float]
    coupled: list[float]
    shifts: list[float]
    extra: float
    agree: bool

    @classmethod
    def of(cls, optimizer: Optimizer, layout: ParamLayout | None, ratios: Sequence[float] | None) -> _Groups:
        ratios = relative_rates(optimizer, layout) if ratios is None else ratios
        rules, first = update_rules(optimizer), _reference(ratios)
        speeds = [rule.gain / (2 * (1 + rule.momentum)) for rule in rules]
        speed = speeds[first] or 1.0  # 0 where the method skips its steps for the time being
        weights = [ratio * own / speed for ratio, own in zip(ratios, speeds, strict=True)]
        divided = gradient_decays(optimizer)
        coupled = [own + (0.0 if rule.decoupled or rule.adaptive else rule.weight_decay) for own, rule in zip(divided, rules, strict=True)]
        # of an adaptive method that does not divide its decay by D, as AdamW and the schedule-free ones, the decay stands beside D^-1 H
        beside = [rule.weight_decay if rule.decoupled or rule.adaptive else 0.0 for rule in rules]
        shares = [r / (2 * speed) if rule.decoupled else weight for r, rule, weight in zip(ratios, rules, weights, strict=True)]
        shifts = [share * decay for share, decay in zip(shares, beside, strict=True)]
        reach = [rule.ceiling / ratio for rule, ratio in zip(rules, ratios, strict=True) if ratio]
        holding = [True] * len(rules) if layout is None else _holding(optimizer, layout)
        training = [index for index, ratio in enumerate(ratios) if ratio and holding[index]]
        moving = {id(p) for index in training for p in optimizer.param_groups[index]["params"]}
        agree = all(ratios) if layout is None else all(id(p) in moving for p in layout.live)  # none rests
        # 1e-9 by judgement: rates that a scheduler multiplied group by group agree to rounding
        agree = agree and all(
            math.isclose(values[index], values[first], rel_tol=1e-9) for values in (weights, coupled, shifts) for index in training
        )
        return cls(replace(rules[first], ceiling=min(reach)), weights, coupled, shifts, divided[first], agree)

    @property
    def limit_rule(self) -> UpdateRule:
        if self.agree:
            return self.rule
        inside = "(H + decay)" if any((*self.coupled, *self.shifts)) else "H"
        return replace(self.rule, weight_decay=0.0, matrix=f"R {'D^-1 ' if self.rule.adaptive else ''}{inside}")


def limit_rule(optimizer: Optimizer, layout: ParamLayout | None = None, *, ratios: Sequence[float] | None = None) -> UpdateRule:
    """The rule by which the top eigenvalue of :func:`step_matrix` bounds the reference group's rate; errors as in :func:`update_rule`."""
    return _Groups.of(unwrap_optimizer(optimizer), layout, ratios).limit_rule


def known_rule(optimizer: Optimizer, layout: ParamLayout | None = None) -> UpdateRule | None:
    """The same; None for an optimizer whose stability limit is not known."""
    try:
        return limit_rule(optimizer, layout)
    except UnsupportedError:
        return None


def groups_agree(optimizer: Optimizer, layout: ParamLayout | None = None) -> bool:
    """Whether one rate, one rule and one decay move all parameters, so that the limit is about H, or D^-1 H, itself."""
    return _Groups.of(unwrap_optimizer(optimizer), layout, None).agree


@dataclass(frozen=True)
class StepMatrix:
    """What turns the curvature A into the matrix that a limit is about, scale (A + decay) scale + shift, and its top into a rate.

    Attributes:
        rule: of the reference group, without the decay that the matrix holds.
        scale: (n,) square root of the groups' weights over D; None for 1 throughout.
        decay, shift: (n,) of coupled and decoupled decay; a number where it is the same throughout.
    """

    rule: UpdateRule
    scale: Tensor | None
    decay: Tensor | float
    shift: Tensor | float


def step_matrix(
    optimizer: Optimizer, layout: ParamLayout, *, ratios: Sequence[float] | None = None, diagonal: Tensor | None = None
) -> StepMatrix:
    """The matrix of an optimizer's limit, by the formula at the head of this module.

    Args:
        optimizer: after at least one step, if it is adaptive.
        layout: the parameters meant; those that the optimizer does not hold never move.
        ratios: the groups' rates over the reference's, where the optimizer's own are not those meant.
        diagonal: (n,) D, where it is not read from the optimizer's state.

    Raises:
        UnsupportedError: an optimizer whose rule or D is not known, or one that maximizes.
        ValueError: it has not stepped yet, or holds none of the parameters.
    """
    optimizer = unwrap_optimizer(optimizer)
    groups = _Groups.of(optimizer, layout, ratios)
    if groups.agree and not groups.rule.adaptive:
        return StepMatrix(groups.rule, None, 0.0, 0.0)
    scale = _scale(optimizer, layout, groups.weights, diagonal)
    if groups.agree:
        return StepMatrix(groups.rule, scale, groups.extra, 0.0)
    decay, shift = (_by_group(optimizer, layout, values) for values in (groups.coupled, groups.shifts))
    return StepMatrix(groups.limit_rule, scale, decay, shift)


def _by_group(optimizer: Optimizer, layout: ParamLayout, values: Sequence[float]) -> Tensor | float:
    """(n,) each group's value at its parameters, 0 at those that no group holds; the number 0 where all are 0."""
    if not any(values):
        return 0.0
    own = {id(p): value for value, group in zip(values, optimizer.param_groups, strict=True) for p in group["params"]}
    return layout.flatten(
        [torch.full_like(p, own.get(id(live), 0.0), dtype=torch.float64) for live, p in zip(layout.live, layout.params, strict=True)]
    )


def preconditioner_scale(optimizer: Optimizer, layout: ParamLayout) -> Tensor:
    """D^-1/2 from an optimizer's live state, with the groups' weights relative to the reference.

    Returns:
        (n,) in the layout's order; 0 for parameters that do not move: not held, at rate 0, or without a gradient so far.

    Raises:
        UnsupportedError: an optimizer whose D is not known.
        ValueError: it has not stepped yet, or holds none of the parameters.
    """
    optimizer = unwrap_optimizer(optimizer)
    kind = kind_of(optimizer)
    known = kind is not None and kind.rule is not None and not is_maximizing(optimizer)
    weights = _Groups.of(optimizer, layout, None).weights if known else relative_rates(optimizer, layout)
    return _scale(optimizer, layout, weights, None)


def _scale(optimizer: Optimizer, layout: ParamLayout, weights: Sequence[float], diagonal: Tensor | None) -> Tensor:
    kind = kind_of(optimizer)
    divide = kind.preconditioner if kind is not None and diagonal is None else None
    known = kind is not None and kind.rule is not None and (diagonal is not None or not update_rule(optimizer).adaptive)
    if divide is None and not known:
        remedy = "Pass diagonal= with what it divides gradients by"
        raise _unknown(optimizer, "the state", lambda k: k.preconditioner or k.step, remedy, "preconditioner")
    settings_of = kind.settings if kind is not None else lambda _, group: group
    live = [settings_of(optimizer, group) for group in optimizer.param_groups]
    groups = {id(p): (group, weight) for group, weight in zip(live, weights, strict=True) for p in group["params"]}
    if not any(id(p) in groups for p in layout.live):
        raise ValueError(_NONE_HELD)
    if divide is not None and not has_stepped(optimizer):
        raise ValueError(f"{type(optimizer).__name__} has no state yet: measure after its first step")
    pieces: list[Tensor | None] = []
    for name, held, p in zip(layout.names, layout.live, layout.params, strict=True):
        (settings, weight), state = groups.get(id(held), ({}, 0.0)), own_state(optimizer, layout, held)
        if not weight or (divide is not None and not _has_stepped(state)):
            pieces.append(None)
        elif divide is None:
            pieces.append(torch.full_like(p, weight, dtype=torch.float64).sqrt())
        else:
            _check_state(optimizer, state, p)
            denominator = divide(state, settings, p)
            if denominator.shape != p.shape:
                raise ValueError(f"the preconditioner of {name!r} must have shape {tuple(p.shape)}, got {tuple(denominator.shape)}")
            # a group at r times the first group's rate moves as if D were r times smaller, so the limit holds for the first's rate
            pieces.append((weight / denominator.double()).sqrt())
    scale = layout.flatten(pieces)
    return scale if diagonal is None else scale * diagonal.to(scale.device).rsqrt()


def _check_state(optimizer: Optimizer, state: State, p: Tensor) -> None:
    for name, value in state.items():
        if isinstance(value, Tensor) and value.numel() > 1 and not value.is_floating_point() and not value.is_complex():
            raise UnsupportedError(
                f"{type(optimizer).__name__} keeps {name} as {str(value.dtype).removeprefix('torch.')}, a code whose meaning is not "
                "known: pass diagonal= with what it divides gradients by, or use the optimizer that keeps its state in floating point"
            )


def has_stepped(optimizer: Optimizer) -> bool:
    """Whether any parameter has a state from a step."""
    return any(map(_has_stepped, optimizer.state.values()))


def _has_stepped(state: State) -> bool:
    # Adagrad makes its state, with step 0, before the first step; a method that counts its steps elsewhere makes it at the first one
    return bool(float(state["step"])) if "step" in state else bool(state)


def settled_preconditioner(optimizer: Optimizer, layout: ParamLayout, second_moment: Tensor, *, mean: Tensor | None = None) -> Tensor:
    """(n,) the D that an adaptive optimizer comes to where the squared gradient has the mean v, sqrt(v) + eps; each group's own settings.

    Args:
        optimizer: one whose state does not matter.
        layout: the parameters meant.
        second_moment: (n,) v.
        mean: (n,) of the gradient, 0 by default; a centred optimizer takes its square from v.

    Raises:
        UnsupportedError: an optimizer whose D does not come to rest, or depends on more than these moments.
    """
    check_settles(optimizer)
    kind = kind_of(optimizer)
    mean = torch.zeros_like(second_moment) if mean is None else mean
    held = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    settled = kind.settled if kind is not None and kind.settled is not None else settled_root
    # in the moments' own type: split by the layout they would be rounded to the parameters'
    pieces = zip(layout.live, torch.split(mean, list(layout.sizes)), torch.split(second_moment, list(layout.sizes)), strict=True)
    return torch.cat([settled(m, v, {"eps": 1e-8, **held.get(id(p), {})}) for p, m, v in pieces])  # torch's default where it has no eps


def check_settles(optimizer: Optimizer) -> None:
    """Raise UnsupportedError where an adaptive optimizer's D is not known from the moments of the gradient alone."""
    kind = kind_of(optimizer)
    if kind is not None and kind.preconditioner is not None and kind.settled is None:
        name = type(optimizer).__name__
        raise UnsupportedError(
            f"what {name} divides gradients by does not follow from the mean of the squared gradient, so its limit at other batch sizes is "
            "not known: sharpkit.measure(objective, optimizer=optimizer) gives the limit at the present state"
        )
