"""What the callbacks of the Hugging Face Trainer share: the batches of a step, the trained loss, a state file beside each checkpoint."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from sharpkit._batches import Batch
from sharpkit._errors import SharpkitWarning
from sharpkit._loss import own_loss
from sharpkit.integrations._attachment import own_containers
from sharpkit.integrations._gathering import Gathering
from sharpkit.integrations._watching import ForwardWatch, StepWatch, without_scale

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(f"sharpkit.integrations.transformers needs transformers: pip install 'transformers[torch]' ({error})") from error


class TrainerHooks(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Notes the micro-batches of each optimizer step and saves a state with each checkpoint.

    Args:
        run: that gets the micro-batches and has the state.
        state_file: its name in a checkpoint's folder.
        what: is saved, in words.
        resume_from: folder of the checkpoint to go on from, where it is not the Trainer's own.
    """

    def __init__(self, run: Gathering, *, state_file: str, what: str, resume_from: str | os.PathLike[str] | None) -> None:
        super().__init__()
        self._gathering, self._state_file, self._what, self._resume_from = run, state_file, what, resume_from
        self._trainer: Any = None
        self._watch: ForwardWatch | StepWatch | None = None

    def attach(self, trainer: Any) -> Self:
        """Measure the Trainer's own loss and log through it; adds the callback to the Trainer.

        Args:
            trainer: that will train; its ``training_step`` is wrapped while it does.

        Returns:
            the callback itself.

        Raises:
            TypeError: no Trainer.
        """
        if not hasattr(trainer, "callback_handler") or not hasattr(trainer, "compute_loss"):
            raise TypeError(f"attach expects a transformers.Trainer, got {type(trainer).__name__}")
        self._trainer = trainer
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        return self

    def close(self) -> None:
        """Take off what watches the training; done when training ends, and to be called where it broke off."""
        if self._watch is not None:
            self._watch.remove()
        self._watch = None
        self._gathering.close()

    # -- for the callbacks -------------------------------------------------------------------------------------------------
    def load_saved(self, args: Any, state: Any) -> None:
        """Before training: what the trainer cannot do unattached, and the state of the checkpoint that it resumes from."""
        self.close()
        if self._trainer is None:
            _check_unattached(args, derives_loss=self._gathering.derives_loss, callback=self._gathering.callback)
        if state.global_step:
            self._gathering.load_state_dict(self._saved(args, state))

    def log_values(self, state: Any, values: dict[str, float]) -> None:
        """To the Trainer's log where attached, else to its history."""
        if self._trainer is None:
            state.log_history.append({**values, "epoch": state.epoch, "step": state.global_step})
        else:
            _log_through(self._trainer, values)

    def trained_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Of one micro-batch, as it is trained."""
        inputs, scale = without_scale(batch)
        return (own_loss(model, inputs) if self._trainer is None else _trained_loss(self._trainer, model, inputs)) * scale

    def watch(self, model: nn.Module, args: Any) -> None:
        """Begin to note batches."""
        pair = self._gathering.settings["loss"] is not None
        most, alone = 8 * max(args.gradient_accumulation_steps, 1), args.world_size == 1 and args.n_gpu <= 1
        if self._trainer is None:
            self._watch = ForwardWatch(model, self._gathering, pair=pair, most=most, alone=alone)
        else:
            self._watch = StepWatch(self._trainer, self._gathering, pair=pair, most=most, alone=alone)

    # -- the Trainer's events ----------------------------------------------------------------------------------------------
    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._gathering.forget()
        if self._watch is not None:
            self._watch.begin()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        saved = self._gathering.state_dict()
        folder = _checkpoint(args, state)
        if not saved or not state.is_world_process_zero:
            return
        if not folder.is_dir():
            warnings.warn(f"{folder} is not there: {self._what} is not saved with this checkpoint", SharpkitWarning, stacklevel=2)
            return
        try:
            torch.save(saved, folder / f"{self._state_file}.part")
            os.replace(folder / f"{self._state_file}.part", folder / self._state_file)
        except (OSError, RuntimeError) as error:
            warnings.warn(f"{self._what} could not be saved in {folder}: {error}", SharpkitWarning, stacklevel=2)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.close()

    def _saved(self, args: Any, state: Any) -> dict[str, Any]:
        """Of the checkpoint that training resumes from; empty where there is none."""
        places = [Path(place) for place in (self._resume_from, args.resume_from_checkpoint) if isinstance(place, (str, os.PathLike))]
        places.append(_checkpoint(args, state))
        found = next((place / self._state_file for place in places if (place / self._state_file).is_file()), None)
        if found is None:
            warnings.warn(
                f"training resumes at step {state.global_step}, but there is no {self._state_file} in {places[-1]}: {self._what} begins "
                f"anew. Pass {self._gathering.callback}(resume_from=<checkpoint folder>) to go on from one elsewhere",
                SharpkitWarning,
                stacklevel=3,
            )
            return {}
        try:
            loaded: dict[str, Any] = torch.load(found, map_location="cpu", weights_only=True)
        except Exception as error:
            warnings.warn(f"{found} cannot be read ({error}): {self._what} begins anew", SharpkitWarning, stacklevel=3)
            return {}
        return loaded


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _check_unattached(args: Any, *, derives_loss: bool, callback: str) -> None:
    """Refuse what a hook on the model would measure wrongly or not see."""
    reason = ""
    if args.label_smoothing_factor and derives_loss:
        reason = "label_smoothing_factor makes the Trainer compute another loss than the model's own"
    elif args.torch_compile:
        reason = "with torch_compile=True a hook on the model would be compiled into it"
    if reason:
        raise ValueError(f"{reason}: use {callback}(...).attach(trainer) instead of Trainer(callbacks=[...])")


def _trained_loss(trainer: Any, model: nn.Module, batch: Batch) -> Tensor:
    """By the Trainer's compute_loss, run on a shallow copy that logs nothing and has lists and dicts of its own."""
    twin = copy.copy(trainer)
    own_containers(twin)
    twin.log = _nothing
    loss: Tensor = twin.compute_loss(model, dict(batch) if isinstance(batch, Mapping) else batch)
    return loss


def _log_through(trainer: Any, values: dict[str, float]) -> None:
    """To all reporters, without using up the Trainer's own turn to log."""
    due = trainer.control.should_log
    try:
        trainer.log(dict(values))
    finally:
        trainer.control.should_log = due


def _nothing(*_: Any, **__: Any) -> None:
    return None
