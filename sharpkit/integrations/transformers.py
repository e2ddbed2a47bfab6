"""Hugging Face transformers: a callback that measures sharpness while the Trainer trains."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sharpkit._batches import Batch
from sharpkit._errors import SharpkitWarning
from sharpkit._loss import own_loss
from sharpkit._params import ParamSelector
from sharpkit.integrations._attachment import Attachment, own_containers
from sharpkit.integrations._watching import ForwardWatch, StepWatch, without_scale
from sharpkit.objective import Closure
from sharpkit.training._arguments import MetricLike
from sharpkit.training.monitor import Monitor
from sharpkit.training.records import MonitorHistory

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(f"sharpkit.integrations.transformers needs transformers: pip install 'transformers[torch]' ({error})") from error

STATE_FILE = "sharpkit_monitor.pt"


class SharpnessCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """A :class:`sharpkit.Monitor` for ``transformers.Trainer``.

    Measures just before each optimizer step that is due; the micro-batches of an accumulated step are measured together, each weighed by
    its counted tokens. A file beside each checkpoint lets a resumed training continue the series. Training is left bit for bit as
    without the callback.

    The Trainer shows its callbacks neither batches nor losses. Two ways round that:

    - ``Trainer(..., callbacks=[SharpnessCallback(...)])``: a forward hook on the model notes the inputs of each training forward, and the
      loss is the model's own, ``model(**inputs).loss``. Values go to ``state.log_history``. That the model's own loss is what is trained
      is checked on the first step.
    - ``SharpnessCallback(...).attach(trainer)``: the inputs come from ``trainer.training_step`` and the loss from
      ``trainer.compute_loss``, so label smoothing, ``compute_loss_func``, a Trainer with its own loss and compiled models are measured as
      trained. Values go through ``trainer.log`` to all its reporters.

    Args:
        loss: ``loss(output, labels)``, where the output is the model's logits on the inputs without ``labels``.
        closure: ``closure(model, inputs)`` returning the loss.
        count, params, metrics, every, budget, tol, probe, mode, autocast, max_samples, max_interval, top_k, process_group, seed: as in
            :class:`sharpkit.Monitor`. With ``bf16=True`` the model's forward is under autocast also when it is measured.
        sinks: as in Monitor, or paths that end in ``.jsonl`` or ``.csv``; opened when training starts, closed when it ends.
        resume_from: folder of the checkpoint whose series to continue, where it is not ``output_dir/checkpoint-<step>``.

    Raises:
        ValueError: settings that make no sense; when training starts, a Trainer that must be attached to.

    Example:
        >>> callback = SharpnessCallback(every=100, metrics=["lambda_max"])  # Trainer(..., callbacks=[callback])
        >>> callback.history
        MonitorHistory(no record yet)
    """

    def __init__(
        self,
        *,
        loss: Callable[[Any, Any], Tensor] | None = None,
        closure: Closure | None = None,
        count: Callable[[Batch], float] | None = None,
        params: ParamSelector = None,
        metrics: Sequence[MetricLike] | None = None,
        every: int | str = "auto",
        budget: float = 0.05,
        tol: float = 0.02,
        probe: Any = None,
        mode: str = "train",
        autocast: torch.dtype | None = None,
        max_samples: int | None = None,
        max_interval: int = 1000,
        top_k: int = 5,
        sinks: Iterable[Any] | Any = (),
        process_group: Any = None,
        seed: int = 0,
        resume_from: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__()
        settings = {
            "loss": loss,
            "closure": closure,
            "count": count,
            "params": params,
            "metrics": metrics,
            "every": every,
            "budget": budget,
            "tol": tol,
            "probe": probe,
            "mode": mode,
            "autocast": autocast,
            "max_samples": max_samples,
            "max_interval": max_interval,
            "top_k": top_k,
            "sinks": sinks,
            "process_group": process_group,
            "seed": seed,
        }
        self._run = Attachment(settings)
        self._resume_from = resume_from
        self._trainer: Any = None
        self._watch: ForwardWatch | StepWatch | None = None

    @property
    def monitor(self) -> Monitor | None:
        """The monitor, once training has started."""
        return self._run.monitor

    @property
    def history(self) -> MonitorHistory:
        """The records so far."""
        return self._run.history

    def attach(self, trainer: Any) -> SharpnessCallback:
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
        """Take off what watches the training and close the sinks; done when training ends, and to be called where it broke off."""
        if self._watch is not None:
            self._watch.remove()
        self._watch = None
        self._run.close()

    # -- the Trainer's events ----------------------------------------------------------------------------------------------
    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any = None, optimizer: Any = None, **_: Any) -> None:
        self.close()
        trainer = self._trainer
        if trainer is None:
            _check_unattached(args, derives_loss=self._run.derives_loss)
        if state.global_step:
            self._run.load_state_dict(self._saved_series(args, state))

        def log(values: dict[str, float]) -> None:
            if trainer is None:
                state.log_history.append({**values, "epoch": state.epoch, "step": state.global_step})
            else:
                _log_through(trainer, values)

        def closure(model: nn.Module, batch: Batch) -> Tensor:
            inputs, scale = without_scale(batch)
            return (own_loss(model, inputs) if trainer is None else _trained_loss(trainer, model, inputs)) * scale

        self._run.start(model, optimizer, closure=closure, log=log, main=state.is_world_process_zero)
        pair = self._run.settings["loss"] is not None
        most, alone = 8 * max(args.gradient_accumulation_steps, 1), args.world_size == 1 and args.n_gpu <= 1
        if trainer is None:
            self._watch = ForwardWatch(model, self._run, pair=pair, most=most, alone=alone)
        else:
            self._watch = StepWatch(trainer, self._run, pair=pair, most=most, alone=alone)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._run.forget()
        if self._watch is not None:
            self._watch.begin()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._watch is None:
            return
        if reason := self._watch.end():
            warnings.warn(f"sharpness is not measured in this training: {reason}", SharpkitWarning, stacklevel=2)
            self.close()
            return
        self._run.step(mean=self._watch.losses_are_means)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = _checkpoint(args, state)
        if self.monitor is None or not state.is_world_process_zero:
            return
        if not folder.is_dir():
            warnings.warn(
                f"{folder} is not there: the series of measurements is not saved with this checkpoint", SharpkitWarning, stacklevel=2
            )
            return
        try:
            torch.save(self._run.state_dict(), folder / f"{STATE_FILE}.part")
            os.replace(folder / f"{STATE_FILE}.part", folder / STATE_FILE)
        except (OSError, RuntimeError) as error:
            warnings.warn(f"the series of measurements could not be saved in {folder}: {error}", SharpkitWarning, stacklevel=2)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.close()

    def _saved_series(self, args: Any, state: Any) -> dict[str, Any]:
        """Of the checkpoint that training resumes from; empty where there is none."""
        places = [Path(place) for place in (self._resume_from, args.resume_from_checkpoint) if isinstance(place, (str, os.PathLike))]
        places.append(_checkpoint(args, state))
        found = next((place / STATE_FILE for place in places if (place / STATE_FILE).is_file()), None)
        if found is None:
            warnings.warn(
                f"training resumes at step {state.global_step}, but there is no {STATE_FILE} in {places[-1]}: a new series begins at "
                "step 0. Pass SharpnessCallback(resume_from=<checkpoint folder>) to continue one from elsewhere",
                SharpkitWarning,
                stacklevel=3,
            )
            return {}
        try:
            loaded: dict[str, Any] = torch.load(found, map_location="cpu", weights_only=True)
        except Exception as error:
            warnings.warn(f"{found} cannot be read ({error}): a new series begins", SharpkitWarning, stacklevel=3)
            return {}
        return loaded


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _check_unattached(args: Any, *, derives_loss: bool) -> None:
    """Refuse what a hook on the model would measure wrongly or not see."""
    reason = ""
    if args.label_smoothing_factor and derives_loss:
        reason = "label_smoothing_factor makes the Trainer compute another loss than the model's own"
    elif args.torch_compile:
        reason = "with torch_compile=True a hook on the model would be compiled into it"
    if reason:
        raise ValueError(f"{reason}: use SharpnessCallback(...).attach(trainer) instead of Trainer(callbacks=[...])")


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
