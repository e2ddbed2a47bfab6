"""Losses and arguments looked at before they are used, so that a mistake is named where it was made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from sharpkit._batches import Batch
from sharpkit._errors import NonFiniteError, ObjectiveError

MODES = ("eval", "train")


def call_model(model: nn.Module, inputs: Any) -> Any:
    """The model's output, or its ``.logits``: a mapping is passed as keywords, a tuple or list as positions."""
    if isinstance(inputs, Mapping):
        output = model(**inputs)
    elif isinstance(inputs, (tuple, list)) and not isinstance(inputs, PackedSequence):  # a tuple, but one argument
        output = model(*inputs)
    else:
        output = model(inputs)
    logits = getattr(output, "logits", None)
    return logits if not isinstance(output, Tensor) and isinstance(logits, Tensor) else output


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
    loss = getattr(model(**batch), "loss", None)
    if not isinstance(loss, Tensor):
        raise ObjectiveError("model(**batch) returned no .loss: give the batch its labels, or pass loss= or closure=")
    return loss


def check_arguments(*, model: Any, loss: Any, closure: Any, count: Any, reduction: Any, mode: Any, micro_batch_size: Any) -> None:
    """What an objective's arguments must be, apart from the data.

    Raises:
        TypeError, ValueError: they are not.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if loss is not None and closure is not None:
        raise ValueError("pass loss= or closure=, not both")
    for name, function, form in (
        ("loss", loss, "loss(output, target)"),
        ("closure", closure, "closure(model, batch)"),
        ("count", count, "count(batch)"),
    ):
        if function is not None and not callable(function):
            raise TypeError(f"{name} must be a function called as {form}, got {type(function).__name__}")
    if isinstance(loss, type):
        raise TypeError(f"loss is the class {loss.__name__}, not a loss: make one, loss={loss.__name__}()")
    if reduction not in ("auto", "mean", "sum"):
        raise ValueError(f"reduction must be 'auto', 'mean' or 'sum', got {reduction!r}")
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
    whole = isinstance(micro_batch_size, int) and not isinstance(micro_batch_size, bool) and micro_batch_size > 0
    if not (micro_batch_size is None or micro_batch_size == "auto" or whole):
        raise ValueError(f"micro_batch_size must be a positive integer, 'auto' or None, got {micro_batch_size!r}")


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
            f"the loss must be a tensor holding one real number, got {loss.dtype} of shape {tuple(loss.shape)}: use reduction='mean', "
            "or average it in "
            "the loss function"
        )
    if not loss.requires_grad and torch.is_grad_enabled():
        raise ObjectiveError(
            "the loss does not depend on any trainable parameter: it was detached, or computed under torch.no_grad(), or from frozen "
            "parameters alone"
        )
    if not bool(torch.isfinite(loss)):
        raise NonFiniteError(
            f"the loss of batch {batch_number} is {float(loss.detach())}, where curvature is undefined: look at that batch for NaN "
            "and at the parameters "
            "for overflow"
        )
    return loss
