"""Two ways to see the very batches that a Hugging Face Trainer trains on: a hook on the model, a wrapper of its training_step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sharpkit.integrations._attachment import Attachment

_SCALING = "num_items_in_batch"  # tells the model to divide its loss by the tokens of the whole accumulated batch


class ForwardWatch:
    """Notes the keyword inputs of training forwards, from the begin of a step to its end, by a hook that is on the model only then.

    Args:
        model: unwrapped.
        run: that gets the micro-batches.
        pair: give them as (inputs, labels).
        most: forwards in one step; with more the watch ends by itself, as after a training that broke off.
        own_loss: check on the first step that the trained loss is made from the model's own.
    """

    def __init__(self, model: nn.Module, run: Attachment, *, pair: bool, most: int, own_loss: bool) -> None:
        self._model, self._run, self._pair, self._most = model, run, pair, most
        self._hook: torch.utils.hooks.RemovableHandle | None = None
        self._unchecked = own_loss
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
        if not self._run.num_waiting:
            reason = "no training forward model(**inputs) with keyword inputs was seen"
        elif self._unchecked and not self._used:
            reason = "the model's own loss, model(**inputs).loss, took no part in the gradient"
        self._unchecked = False
        return f"{reason}; use SharpnessCallback(...).attach(trainer), or pass closure=" if reason else ""

    def remove(self) -> None:
        """Take the hook off."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = None

    def _saw(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if args or not kwargs or not module.training or not torch.is_grad_enabled():
            return
        if self._run.num_waiting >= self._most:
            self.remove()
            self._run.forget()
            return
        loss = getattr(output, "loss", None)
        if self._unchecked and isinstance(loss, Tensor) and loss.requires_grad:
            loss.register_hook(self._was_used)  # type: ignore[no-untyped-call]
        self.losses_are_means = kwargs.get(_SCALING) is None
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
    """

    losses_are_means = False  # training_step returns each one's part of the whole

    def __init__(self, trainer: Any, run: Attachment, *, pair: bool, most: int) -> None:
        self._trainer, self._run, self._pair, self._most = trainer, run, pair, most
        self._own = vars(trainer).get("training_step")
        self._wrapped = trainer.training_step
        trainer.training_step = self._training_step

    def begin(self) -> None:
        """A step begins."""

    def end(self) -> str:
        """The step's gradient is complete; always to be measured."""
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
        kept = dict(inputs) if isinstance(inputs, Mapping) else inputs  # compute_loss may take labels out
        try:
            loss = self._wrapped(model, inputs, *args, **kwargs)
        except BaseException:
            self.remove()
            self._run.close()
            raise
        if self._run.num_waiting < self._most:
            self._run.note(as_pair(kept) if self._pair else kept, loss if isinstance(loss, Tensor) else None)
        return loss


def as_pair(batch: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """(inputs without labels, labels)."""
    return {name: value for name, value in batch.items() if name != "labels"}, batch.get("labels")
