"""Standard losses and their settings, and losses checked before they are used, so that a mistake is named where it was made."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from sharpkit._errors import NonFiniteError, ObjectiveError
from sharpkit.objective.batches import Batch

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
STANDARD_LOSSES = frozenset(_MODULES.values())
_LABELLED = (F.cross_entropy, F.nll_loss)


@dataclass(frozen=True)
class KnownLoss:
    """A standard PyTorch loss with its settings.

    Attributes:
        function: its functional form.
        reduction: ``"mean"`` or ``"sum"``.
        weight: class weights, (C,), or None.
        ignore_index: the label that does not count.
        label_smoothing: as in cross-entropy.
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
        if target.is_floating_point():  # class probabilities: (N, C, ...) or (C,), one target for each distribution
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
    # the legacy arguments override reduction=: such a loss is tried out like any other
    if loss not in STANDARD_LOSSES or "size_average" in settings or "reduce" in settings:
        return None
    if settings.get("weight") is not None and loss not in _LABELLED:  # an elementwise weight does not enter the divisor
        return None
    reduction = settings.get("reduction", "mean")
    weight = settings.get("weight")
    return KnownLoss(loss, reduction, weight, settings.get("ignore_index", -100), settings.get("label_smoothing", 0.0))


def call_model(model: nn.Module, inputs: Any) -> Any:
    """The model's output, or its ``.logits``: a mapping is passed as keywords, a tuple or list as positions, if the model takes them so."""
    output = _called(model, inputs)
    logits = getattr(output, "logits", None)
    return logits if not isinstance(output, Tensor) and isinstance(logits, Tensor) else output


def _called(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs) if _accepts(model, (), inputs) else model(inputs)
    if isinstance(inputs, (tuple, list)) and not isinstance(inputs, PackedSequence):  # a tuple, but one argument
        return model(*inputs) if _accepts(model, inputs, {}) else model(inputs)
    return model(inputs)


def _accepts(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """False only if the model's signature takes one argument, and not these."""
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):
        return True
    try:
        signature.bind(*args, **kwargs)
        return True
    except TypeError:
        pass
    try:
        signature.bind(None)
        return False
    except TypeError:
        return True  # neither: the model's own error names what is missing


def own_loss(model: nn.Module, batch: Batch) -> Tensor:
    """``model(**batch).loss``, as Hugging Face models compute it.

    Raises:
        TypeError: the batch is no mapping.
        ObjectiveError: the output has no loss.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"without loss= or closure=, batches must be dicts for model(**batch).loss; this one is a {type(batch).__name__}: pass "
            "loss= or closure="
        )
    loss = getattr(_called(model, batch), "loss", None)
    if not isinstance(loss, Tensor):
        raise ObjectiveError("model(**batch) returned no .loss: give the batch its labels, or pass loss= or closure=")
    return loss


def check_loss(loss: Any, batch_number: int) -> Tensor:
    """The loss itself, if one can differentiate it.

    Raises:
        ObjectiveError: not one real number as a tensor, or cut off from the parameters.
        NonFiniteError: NaN or infinite.
    """
    if not isinstance(loss, Tensor):
        hint = ": return the loss itself, not loss.item()" if isinstance(loss, (int, float)) else ""
        raise ObjectiveError(f"the loss must be a tensor holding one real number, got {type(loss).__name__}{hint}")
    if loss.numel() != 1 or not loss.is_floating_point():
        raise ObjectiveError(
            f"the loss must be a tensor holding one real number, got {loss.dtype} of shape {tuple(loss.shape)}: use reduction='mean', or "
            "average it in the loss function"
        )
    if not loss.requires_grad and torch.is_grad_enabled():
        raise ObjectiveError(
            "the loss does not depend on any trainable parameter: it was detached, or computed under torch.no_grad(), or from frozen "
            "parameters alone"
        )
    if not bool(torch.isfinite(loss)):
        raise NonFiniteError(
            f"the loss of batch {batch_number} is {float(loss.detach())}, where curvature is undefined: look at that batch for NaN and at "
            "the parameters for overflow"
        )
    return loss
