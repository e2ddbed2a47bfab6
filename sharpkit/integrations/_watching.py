"""Two ways to see the very batches that a Hugging Face Trainer trains on: a hook on the model, a wrapper of its training_step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sharpkit.integrations._gathering import Gathering

_SCALING = "num_items_in_batch"  # tells the model to divide its loss by the tokens of the whole accumulated batch
_SCALE = "sharpkit_scale"  # beside a batch's tensors: the trained loss over the mean over counted tokens


class ForwardWatch:
    """Notes the keyword inputs of training forwards, from the begin of a step to its end, by a hook that is on the model only then.

    Args:
        model: unwrapped.
        run: that gets the micro-batches.
        pair: give them as (inputs, labels).
        most: forwards in one step; with more the watch ends by itself, as after a training that broke off.
        alone: one process trains on one device.
    """

    def __init__(self, model: nn.Module, run: Gathering, *, pair: bool, most: int, alone: bool) -> None:
        self._alone, self._num_items = alone, None
        self._model, self._run, self._pair, self._most = model, run, pair, most
        self._hook: torch.utils.hooks.RemovableHandle | None = None
        self._unchecked = run.derives_loss  # whether the trained loss is made from the model's own
        self._used = False
        self.losses_are_means = True

    def begin(self) -> None:
        """A step begins."""
        self.remove()
        self._hook = self._model.register_forward_hook(self._saw, with_kwargs=True)

    def end(self) -> str:
        """The step's gradient is complete.

        Returns:
            why these batches cannot be measured; empty if they can.
        """
        self.remove()
        reason = ""
        if not self._run.batches:
            reason = "no training forward model(**inputs) with keyword inputs was seen"
        elif self._unchecked and not self._used:
            reason = "the model's own loss, model(**inputs).loss, took no part in the gradient"
        self._unchecked = False
        if self._alone and self._run.derives_loss:
            note_scale(self._model, self._run.batches, self._num_items)
        return f"{reason}; use {self._run.callback}(...).attach(trainer), or pass closure=" if reason else ""

    def remove(self) -> None:
        """Take the hook off."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = None

    def _saw(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if args or not kwargs or not module.training or not torch.is_grad_enabled():
            return
        if len(self._run.batches) >= self._most:
            self.remove()
            self._run.forget()
            return
        loss = getattr(output, "loss", None)
        if self._unchecked and isinstance(loss, Tensor) and loss.requires_grad:
            loss.register_hook(self._was_used)  # type: ignore[no-untyped-call]
        self._num_items = kwargs.get(_SCALING)
        self.losses_are_means = self._num_items is None
        batch = {name: value for name, value in kwargs.items() if name != _SCALING}
        self._run.note(as_pair(batch) if self._pair else batch, loss if isinstance(loss, Tensor) else None)

    def _was_used(self, _: Tensor) -> None:
        self._used = True


class StepWatch:
    """Notes what training_step is given and the loss that it returns, by wrapping it until removed.

    Args:
        trainer: a Trainer.
        run: that gets the micro-batches.
        pair: give them as (inputs, labels).
        most: calls in one step; further ones are not noted.
        alone: one process trains on one device.
    """

    losses_are_means = False  # training_step returns each one's part of the whole

    def __init__(self, trainer: Any, run: Gathering, *, pair: bool, most: int, alone: bool) -> None:
        self._num_items: Any = None
        self._scales = alone and run.derives_loss and getattr(type(trainer).compute_loss, "__module__", "") == "transformers.trainer"
        self._trainer, self._run, self._pair, self._most = trainer, run, pair, most
        self._own = vars(trainer).get("training_step")
        self._wrapped = trainer.training_step
        trainer.training_step = self._training_step

    def begin(self) -> None:
        """A step begins."""

    def end(self) -> str:
        """The step's gradient is complete; always to be measured."""
        if self._scales and getattr(self._trainer, "model_accepts_loss_kwargs", False):
            note_scale(self._trainer.model, self._run.batches, self._num_items)
        return ""

    def remove(self) -> None:
        """Give the Trainer its training_step back."""
        if vars(self._trainer).get("training_step") != self._training_step:
            return
        if self._own is None:
            del self._trainer.training_step
        else:
            self._trainer.training_step = self._own

    def _training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self._num_items = args[0] if args else kwargs.get(_SCALING)
        kept = dict(inputs) if isinstance(inputs, Mapping) else inputs  # compute_loss may take labels out
        try:
            loss = self._wrapped(model, inputs, *args, **kwargs)
        except BaseException:
            self.remove()
            self._run.close()
            raise
        if len(self._run.batches) < self._most:
            self._run.note(as_pair(kept) if self._pair else kept, loss if isinstance(loss, Tensor) else None)
        return loss


def note_scale(model: Any, batches: list[Any], num_items: Any) -> None:
    """Put what the trained loss is times the mean over counted tokens beside each batch.

    The Trainer divides by a number of items of its own counting. For a model whose loss shifts the labels but whose class the Trainer does
    not know to do so (GPT2LMHeadModel), it counts the first token of each sequence as well.

    Args:
        model: that is trained.
        batches: of one optimizer step, dicts; changed in place.
        num_items: the Trainer's count over all of them, if it gave one.
    """
    shifts = getattr(getattr(model, "loss_function", None), "__name__", "") == "ForCausalLMLoss"
    if num_items is None or not shifts or not all(isinstance(b, dict) and isinstance(b.get("labels"), Tensor) for b in batches):
        return
    counted = sum((b["shift_labels"] if "shift_labels" in b else b["labels"][..., 1:]).ne(-100).sum() for b in batches)
    for batch in batches:
        batch[_SCALE] = counted / num_items


def without_scale(batch: Any) -> tuple[Any, Tensor | float]:
    """The batch as the model takes it, and its scale."""
    if not isinstance(batch, Mapping) or _SCALE not in batch:
        return batch, 1.0
    return {name: value for name, value in batch.items() if name != _SCALE}, batch[_SCALE]


def as_pair(batch: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """(inputs without labels, labels)."""
    return {name: value for name, value in batch.items() if name != "labels"}, batch.get("labels")
