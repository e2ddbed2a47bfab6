"""Carry hyperparameters from one batch size to another by a rule, and say where the rule ends."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

from sharpkit._arguments import real, reals, shown
from sharpkit._errors import SharpkitWarning
from sharpkit.objective.guard import silenced

if TYPE_CHECKING:
    from sharpkit.batch_size.learning_rate_curve import LearningRateCurve

_RULES = {"linear": 1.0, "sqrt": 0.5}  # powers of k: arXiv 1706.02677 and arXiv 2205.10287
_COMPANIONS = ("momentum", "betas", "eps", "weight_decay")


class ScaledLearningRate(float):
    """A learning rate for the new batch size (usable as a plain number), with what goes with it.

    Attributes:
        momentum, betas, eps, weight_decay: the companions adjusted for the new batch size, None where none was given.
        rule: what was done, in words.
    """

    momentum: float | None
    betas: tuple[float, float] | None
    eps: float | None
    weight_decay: float | None
    rule: str

    def __new__(cls, value: float, **companions: Any) -> ScaledLearningRate:
        self = super().__new__(cls, value)
        for name in (*_COMPANIONS, "rule"):
            setattr(self, name, companions.get(name))
        return self

    def __reduce__(self) -> tuple[type[float], tuple[float]]:
        return (float, (float(self),))  # a checkpoint that holds it must load anywhere

    def __repr__(self) -> str:
        shown = [f", {name}={getattr(self, name)}" for name in _COMPANIONS if getattr(self, name) is not None]
        return f"ScaledLearningRate({float(self):.6g}{''.join(shown)}: {self.rule})"


def scale_learning_rate(
    lr: float,
    batch_size: float,
    new_batch_size: float,
    *,
    rule: str | LearningRateCurve = "linear",
    momentum: float | None = None,
    betas: tuple[float, float] | None = None,
    eps: float | None = None,
    weight_decay: float | None = None,
) -> ScaledLearningRate:
    """The learning rate for another batch size, k = new / old.

    ``"linear"``: lr x k, for SGD. ``"sqrt"``: lr x sqrt(k), for Adam and its kin, with (1 - beta_i) x k and eps / sqrt(k), which holds
    while k (1 - beta_i) << 1: beyond a half it warns, and from 1 on that beta is 0. A :class:`sharpkit.LearningRateCurve` scales by the
    ratio of its largest stable rates: the measured rule, with betas and eps as under ``"sqrt"`` if its optimizer is adaptive and kept if
    not, and a warning outside of the batch sizes that it was measured at. Momentum of SGD is kept; weight decay is adjusted so that an
    epoch shrinks the weights as much as before: kept under ``"linear"``, x sqrt(k) under ``"sqrt"``.

    Args:
        lr: learning rate that works at ``batch_size``.
        batch_size: the old one.
        new_batch_size: the new one.
        rule: ``"linear"``, ``"sqrt"``, or a curve.
        momentum, betas, eps, weight_decay: companions to adjust; those not given are left out of the answer.

    Raises:
        ValueError: an unknown rule, or sizes or rates that are not positive.

    Example:
        >>> import sharpkit as sk
        >>> float(sk.scale_learning_rate(0.1, 128, 256))
        0.2
        >>> sk.scale_learning_rate(0.001, 256, 1024, rule="sqrt", betas=(0.9, 0.999))
        ScaledLearningRate(0.002, betas=(0.6, 0.996): lr x sqrt(k), k = 4)

    References:
        Goyal et al. (2017), arXiv 1706.02677, for the linear rule; Malladi et al. (2022), arXiv 2205.10287, for the square root and
        companions.
    """
    lr, batch_size = real("lr", lr, above=0), real("batch_size", batch_size, above=0)
    new_batch_size = real("new_batch_size", new_batch_size, above=0)
    momentum = None if momentum is None else real("momentum", momentum, least=0, below=1)
    if betas is not None:
        first, second = reals("betas", betas, length=2, least=0, below=1)
        betas = (first, second)
    eps = None if eps is None else real("eps", eps, least=0)
    weight_decay = None if weight_decay is None else real("weight_decay", weight_decay, least=0)
    k = new_batch_size / batch_size
    if not isinstance(rule, str):
        if not hasattr(rule, "max_lr"):  # told by its method: this module may not import the curve
            raise ValueError(f"rule must be 'linear', 'sqrt' or a LearningRateCurve, got {shown(rule)}")
        scaled, decay, said = _by_curve(lr, batch_size, new_batch_size, rule, weight_decay)
        if rule.exponent == _RULES["sqrt"]:  # an adaptive optimizer's averages reach back over samples, whatever the rate
            betas, eps = _adaptive_companions(betas, eps, k)
        return ScaledLearningRate(scaled, momentum=momentum, betas=betas, eps=eps, weight_decay=decay, rule=said)
    if rule not in _RULES:
        raise ValueError(f"rule must be 'linear', 'sqrt' or a LearningRateCurve, got {rule!r}")
    factor = k ** _RULES[rule]
    if rule == "sqrt":
        betas, eps = _adaptive_companions(betas, eps, k)
    # an epoch has k times fewer steps, each shrinking the weights by rate x decay
    decay = weight_decay * k / factor if weight_decay is not None else None
    said = f"lr x {'k' if rule == 'linear' else 'sqrt(k)'}, k = {k:g}"
    return ScaledLearningRate(lr * factor, momentum=momentum, betas=betas, eps=eps, weight_decay=decay, rule=said)


def _adaptive_companions(betas: tuple[float, float] | None, eps: float | None, k: float) -> tuple[tuple[float, float] | None, float | None]:
    return _scaled_betas(betas, k) if betas is not None else None, eps / math.sqrt(k) if eps is not None else None


def _scaled_betas(betas: tuple[float, float], k: float) -> tuple[float, float]:
    # So that the averages still reach as many samples back. At k (1 - beta) >= 1 that is less than one batch: no averaging, beta = 0.
    first, second = (round(max(1 - k * (1 - beta), 0.0), 12) for beta in betas)
    if k * (1 - min(betas)) > 0.5:  # by judgement: the rule is a limit of small k (1 - beta)
        _warn(f"k (1 - beta) = {k * (1 - min(betas)):.2g} is not small: the square-root rule is leaving the range it was derived for")
    return first, second


def _by_curve(
    lr: float, batch_size: float, new_batch_size: float, curve: LearningRateCurve, weight_decay: float | None
) -> tuple[float, float | None, str]:
    """The rate, the decay that goes with it, and the rule in words."""
    first, last = min(curve.batch_sizes), max(curve.batch_sizes)
    if outside := [f"{b:g}" for b in (batch_size, new_batch_size) if not first <= b <= last]:
        _warn(
            f"B = {' and '.join(outside)} lies outside of the batch sizes measured, {first} to {last}: the curve is extrapolated there; "
            "measure it with batch_sizes= that reach so far"
        )
    with silenced(SharpkitWarning):  # which says the same for each of the two
        old, new = curve.max_lr(batch_size), curve.max_lr(new_batch_size)
    factor = float(new) / float(old)
    scaled = lr * factor
    if scaled > new.upper:
        _warn(f"the scaled rate {scaled:.3g} lies above the largest stable one at B = {new_batch_size:g}, {new}: it was too large before")
    straight = (new_batch_size / batch_size) ** curve.exponent
    name = "square-root" if curve.exponent == 0.5 else "linear"
    if abs(factor / straight - 1) > 0.1:  # the tolerance of LearningRateCurve.rule_holds_to
        sizes = f"B = {batch_size:g} and {new_batch_size:g}"
        _warn(f"between {sizes} the {name} rule is off by {straight / factor:.2g}x; the measured curve was used")
    # an epoch has k times fewer steps, each shrinking by lr x decay
    decay = weight_decay * (new_batch_size / batch_size) / factor if weight_decay is not None else None
    return scaled, decay, f"measured curve, x {factor:.3g}"


def _warn(message: str) -> None:
    warnings.warn(message, SharpkitWarning, stacklevel=4)


def safe_damping(lr: float, batch_size: float, bulk_trace: float) -> float:
    """The smallest safe damping delta of a second-order step (H + delta)^-1 g: lr T / (2 B), T the trace of the bulk.

    Proportional to lr / B: doubling the batch halves the damping that is needed.

    Args:
        lr: learning rate of the second-order step.
        batch_size: B.
        bulk_trace: trace of the Hessian less its outliers.

    Example:
        >>> safe_damping(0.1, 64, 128.0)
        0.1

    References:
        Granziol, Zohren and Roberts (2022), arXiv 2006.09092.
    """
    lr, batch_size = real("lr", lr, above=0), real("batch_size", batch_size, above=0)
    return lr * real("bulk_trace", bulk_trace) / (2 * batch_size)
