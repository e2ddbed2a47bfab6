"""Standard losses and their settings, and losses checked before they are used, so that a mistake is named where it was made."""

from __future__ import annotations

import functools
import inspect
import numbers
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from sharpkit._arguments import check_callable, shown
from sharpkit._errors import NonFiniteError, ObjectiveError, ObjectiveWarning
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

    def counts(self, target: Tensor) -> Tensor:
        """:meth:`count` of each sample, (N,): the target has one row for each."""
        if not self.labelled or target.is_floating_point():
            return torch.full((len(target),), self.count(target[:1]), dtype=torch.float64)
        counted = target != self.ignore_index
        if self.weight is None:
            return counted.reshape(len(target), -1).sum(dim=1).double()
        weights = self.weight.to(target.device).double()[torch.where(counted, target, 0)] * counted
        return weights.reshape(len(target), -1).sum(dim=1)


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


def check_functions(loss: Any, closure: Any, count: Any = None) -> None:
    """TypeError or ValueError unless these can be called as a loss, a closure and a count."""
    if loss is not None and closure is not None:
        raise ValueError("pass loss= for (input, target) batches or closure= for everything else, not both")
    forms = {"loss": (loss, "loss(output, target)"), "closure": (closure, "closure(model, batch)"), "count": (count, "count(batch)")}
    for name, (given, form) in forms.items():
        if isinstance(given, type):
            raise TypeError(f"{name} is the class {given.__name__}, not a function: make one, {name}={given.__name__}()")
        if given is not None:
            check_callable(name, given, form)


def checked_reading(loss: Any) -> Tensor | float | None:
    """A loss of a training step as it is reported: a number or a tensor of one, which is detached and not read; NaN is a value.

    Raises:
        TypeError: it is none of these.
    """
    if loss is None:
        return None
    if isinstance(loss, Tensor) and loss.numel() == 1 and not loss.is_complex() and not loss.is_meta:
        return loss.detach()
    if isinstance(loss, (bool, Tensor)) or not isinstance(loss, numbers.Real):
        raise TypeError(f"loss= of a step must be a number or a tensor of one, got {shown(loss)}")
    return float(loss)


def check_axes(function: Any, output: Any, target: Any) -> None:
    """Refuse an elementwise loss, or a difference, of shapes (N, 1) and (N,); comment on class labels whose axis may be the wrong one.

    Raises:
        ObjectiveError: the shapes broadcast to all N x N pairs.
    """
    if not (isinstance(output, Tensor) and isinstance(target, Tensor)):
        return
    if function in _LABELLED:
        if output.ndim == 3 and output.shape[1] == output.shape[2] and target.shape == output.shape[:2]:
            warnings.warn(
                f"the output has shape {tuple(output.shape)} and the labels {tuple(target.shape)}: {function.__name__} takes axis 1 for "
                "the classes. If they are on the last axis, pass output.flatten(0, 1) and labels.flatten(), which leaves no doubt",
                ObjectiveWarning,
                stacklevel=3,
            )
    elif pairs_all(output, target):
        raise ObjectiveError(
            f"tensors of shapes {tuple(output.shape)} and {tuple(target.shape)} are compared, every output with every target: give "
            "output and target one shape, as by model(x).squeeze(-1) or y.unsqueeze(-1)"
        )


def pairs_all(first: Tensor, second: Tensor) -> bool:
    """Whether an elementwise operation would combine every row of one with every row of the other: shapes (N, 1) and (N,)."""
    longer, shorter = (first, second) if first.ndim > second.ndim else (second, first)
    return longer.shape == (*shorter.shape, 1) and shorter.ndim > 0 and shorter.shape[-1] > 1


def check_loss_form(loss: Any) -> Tensor:
    """The loss itself, if one can differentiate it.

    Raises:
        ObjectiveError: not one real number as a tensor, or cut off from the parameters.
    """
    if not isinstance(loss, Tensor):
        hint = ""
        if loss is None:
            hint = ": the function returned nothing; end it with return loss, and leave backward() to sharpkit"
        elif isinstance(loss, (int, float, np.number)):
            hint = ": return the loss itself, not loss.item()"
        elif isinstance(loss, (tuple, list, Mapping)) or hasattr(loss, "loss"):
            hint = ": return the loss alone, as by closure=lambda model, batch: f(model, batch)[0] of a tuple, or ['loss'] of a dict"
        raise ObjectiveError(f"the loss must be a tensor holding one real number, got {type(loss).__name__}{hint}")
    if loss.is_meta:
        raise ObjectiveError(
            "the loss is on the meta device, which holds no numbers: make the model and its data on 'cpu' or another device"
        )
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
    return loss


def check_loss(loss: Any, batch_number: int) -> Tensor:
    """The loss itself, if one can differentiate it.

    Raises:
        ObjectiveError: not one real number as a tensor, or cut off from the parameters.
        NonFiniteError: NaN or infinite.
    """
    value = check_loss_form(loss)
    if not bool(torch.isfinite(value)):
        raise NonFiniteError(
            f"the loss of batch {batch_number} is {float(value.detach())}, where curvature is undefined: look at that batch for NaN and at "
            "the parameters for overflow"
        )
    return value
