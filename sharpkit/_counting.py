"""How a loss averages: mean or sum, and over what. A batch must weigh what it counts, or uneven batches give wrong numbers.

Known losses say it themselves. For any other, the additivity of the loss is tried out on one batch split in two: a mean over counted
targets obeys c L = c_a L_a + c_b L_b for the right counts c, a sum obeys L = L_a + L_b.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sharpkit._batches import Batch, batch_length, tensors_of

CountFunction = Callable[[Batch], float]

_MODULES: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.CrossEntropyLoss: F.cross_entropy,
    nn.NLLLoss: F.nll_loss,
    nn.MSELoss: F.mse_loss,
    nn.L1Loss: F.l1_loss,
    nn.SmoothL1Loss: F.smooth_l1_loss,
    nn.HuberLoss: F.huber_loss,
    nn.BCELoss: F.binary_cross_entropy,
    nn.BCEWithLogitsLoss: F.binary_cross_entropy_with_logits,
}
_FUNCTIONS = set(_MODULES.values())
_LABELLED = (F.cross_entropy, F.nll_loss)


@dataclass(frozen=True)
class KnownLoss:
    """A standard PyTorch loss with its settings.

    Attributes:
        function: its functional form.
        reduction: ``"mean"`` or ``"sum"``.
        weight: class weights, (C,), or None.
        ignore_index: the label that does not count.
        label_smoothing: of cross-entropy.
    """

    function: Callable[..., Tensor]
    reduction: str
    weight: Tensor | None = None
    ignore_index: int = -100
    label_smoothing: float = 0.0

    @property
    def labelled(self) -> bool:
        """Whether targets are class labels (or class probabilities)."""
        return self.function in _LABELLED

    def count(self, target: Tensor) -> float:
        """What the mean divides by: counted targets, or the sum of their class weights."""
        if not self.labelled:
            return float(target.numel())
        if target.is_floating_point():
            return float(target.numel() / target.shape[1 if target.ndim > 1 else 0])
        counted = target[target != self.ignore_index]
        return float(counted.numel() if self.weight is None else self.weight.to(target.device)[counted].double().sum())


def recognise_loss(loss: Callable[..., Tensor]) -> KnownLoss | None:
    """The standard loss behind a function, a module or a ``functools.partial`` of one; None for anything else."""
    settings: dict[str, Any] = {}
    if isinstance(loss, functools.partial) and not loss.args:
        settings, loss = dict(loss.keywords), loss.func
    if type(loss) in _MODULES:
        settings = {name: getattr(loss, name) for name in ("reduction", "weight", "ignore_index", "label_smoothing") if hasattr(loss, name)}
        loss = _MODULES[type(loss)]  # type: ignore[index]
    if loss not in _FUNCTIONS or "size_average" in settings or "reduce" in settings:
        return None
    if settings.get("weight") is not None and loss not in _LABELLED:
        return None
    reduction = settings.get("reduction", "mean")
    weight = settings.get("weight")
    return KnownLoss(loss, reduction, weight, settings.get("ignore_index", -100), settings.get("label_smoothing", 0.0))


def candidate_counts(batch: Batch, known: KnownLoss | None, pair: bool) -> dict[str, float]:
    """What this batch may count, by every rule that applies, the likeliest first.

    Args:
        batch: whole or sliced.
        known: if given, its rule alone.
        pair: the batch is (input, target).
    """
    target = _find_target(batch, pair)
    if known is not None and target is not None:
        return {"targets": known.count(target)}
    counts: dict[str, float] = {}
    if target is not None and target.ndim > 0:
        labels = not target.is_floating_point() and not target.is_complex()
        if labels and not pair and target.ndim > 1:
            counts["next tokens"] = float((target[..., 1:] != -100).sum())
        if labels:
            counts["labels other than -100"] = float((target != -100).sum())
        counts["target entries"] = float(target.numel())
    if isinstance(batch, Mapping) and isinstance(mask := batch.get("attention_mask"), Tensor):
        counts["attended tokens"] = float(mask.sum())
    length = batch_length(batch)
    if length is None and target is not None and target.ndim > 0:
        length = target.shape[0]
    if length is not None:
        counts["samples"] = float(length)
    return counts or {"batches": 1.0}


def samples_in(batch: Batch, pair: bool) -> int:
    """Samples in a batch: its common leading dimension, else the target's, else 1."""
    if (length := batch_length(batch)) is not None:
        return length
    target = _find_target(batch, pair)
    return int(target.shape[0]) if target is not None and target.ndim > 0 else 1


def _find_target(batch: Batch, pair: bool) -> Tensor | None:
    if pair:
        target = batch[1]
        return target if isinstance(target, Tensor) else (tensors_of(target) or [None])[0]  # type: ignore[list-item]
    if isinstance(batch, Mapping):
        for key in ("labels", "label", "target", "targets", "y"):
            if isinstance(found := batch.get(key), Tensor):
                return found
        return None
    if isinstance(batch, (tuple, list)) and len(batch) >= 2 and isinstance(batch[1], Tensor):
        return batch[1]
    return None


def additive(whole: float, parts: tuple[float, float], counts: tuple[float, float] | None, *, rtol: float, atol: float = 0.0) -> bool:
    """Whether the loss of a batch is the (weighted) sum of its parts' losses.

    Args:
        whole: loss of the batch.
        parts: losses of its two parts.
        counts: what the parts count, for a mean; None for a sum.
        rtol: rounding of one loss, relative.
        atol: rounding of one loss, absolute: a small loss is a difference of larger logits.
    """
    scale = max(abs(whole), abs(parts[0]), abs(parts[1]))
    if counts is None:
        return abs(whole - sum(parts)) <= 2 * (rtol * scale + atol)
    total = sum(counts)
    return total > 0 and abs(whole - (counts[0] * parts[0] + counts[1] * parts[1]) / total) <= rtol * scale + atol


def machine_rtol(dtype: torch.dtype) -> float:
    """Relative rounding to allow in a loss of this type; in float64 for layers that compute in float32 all the same (RMSNorm)."""
    return {torch.float64: 1e-6, torch.float32: 3e-5}.get(dtype, 2e-2)


def machine_atol(dtype: torch.dtype) -> float:
    """Absolute rounding to allow in a loss of this type, from logits of some tens."""
    return {torch.float64: 1e-12, torch.float32: 3e-6}.get(dtype, 1e-2)
